package store

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// reopen closes s and opens its folder again.
func reopen(t *testing.T, s *Store, quota int64) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, Options{Dir: s.dir, Quota: quota})
}

// noFill fails the test when a block that should be resident is filled.
func noFill(t *testing.T) Fill {
	return func(context.Context, []byte) error {
		t.Error("fetched again")
		return errors.New("fetched again")
	}
}

func TestARestartServesAgainWhatWasHeld(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	var objects []ring.Object
	for i, size := range []int64{1, 4096, 100_000, ring.BlockSize, 3*ring.BlockSize + 1} {
		objects = append(objects, anObject(i, size))
		load(t, s, objects[i])
	}
	part := anObject(50, 4*ring.BlockSize)
	acquire(t, s, part, 2).Release()
	before := s.Stats()
	s = reopen(t, s, 64*mib)
	after := s.Stats()
	if after.Used != before.Used || after.Blocks != before.Blocks || after.Bytes != before.Bytes || int64(after.Recovered) != before.Blocks {
		t.Errorf("before %+v, after %+v", before, after)
	}
	for _, o := range objects {
		for n := range ring.Blocks(o.Size) {
			b, err := s.Acquire(context.Background(), o, n, noFill(t))
			if err != nil {
				t.Fatal(err)
			}
			check(t, o, n, b)
			b.Release()
		}
	}
	if m := s.Bitmap(part); m[0] != 0b100 {
		t.Errorf("bitmap of a part: %b", m)
	}
	load(t, s, part)
	checkBooks(t, s)
}

func TestAKilledStoreIsRecovered(t *testing.T) {
	dir := memDir(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "STORE_TEST_ROLE=store", "STORE_TEST_DIR="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "filled\n" {
		t.Fatalf("%q %v", line, err)
	}
	// It has the folder until it dies.
	if _, err := Open(context.Background(), Options{Dir: dir, Quota: 64 * mib, Logger: quiet()}); !errors.Is(err, ErrInUse) {
		t.Errorf("opened beside another process: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	s := open(t, Options{Dir: dir, Quota: 64 * mib})
	if st := s.Stats(); st.Recovered != 25 {
		t.Errorf("%+v", st)
	}
	for i := range 20 {
		load(t, s, anObject(i, int64(i)*300_000))
	}
	checkBooks(t, s)
}

func TestOneProcessAtATimeHasTheFolder(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	if _, err := Open(context.Background(), Options{Dir: s.dir, Quota: 16 * mib, Logger: quiet()}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), s.dir) {
		t.Errorf("got %v", err)
	}
	reopen(t, s, 16*mib)
}

// For every length that a torn write can leave, the store opens, serves what the rest of the journal says,
// and fetches again what it does not.
func TestAJournalTornAtEveryByteOfItsTailIsRead(t *testing.T) {
	dir := memDir(t)
	s := open(t, Options{Dir: dir, Quota: 16 * mib})
	const n = 4
	for i := range n {
		load(t, s, anObject(i, 2*checksum.Size+int64(i)))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(s.journal.path)
	if err != nil {
		t.Fatal(err)
	}
	saved := make(map[string][]byte)
	for i := range n {
		path := s.path(anObject(i, 2*checksum.Size+int64(i)).ID)
		if saved[path], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	record := int(recordLen(2 * checksum.Size)) // at the least
	for cut := len(whole); cut >= len(whole)-2*record-4; cut-- {
		for path, p := range saved {
			if err := os.WriteFile(path, p, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(s.journal.path, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, Options{Dir: dir, Quota: 16 * mib})
		lost := (len(whole) - cut + record - 1) / record
		if got := int(s.Stats().Recovered); got < n-lost-1 || got > n-(len(whole)-cut)/(record+4) || (cut == len(whole) && got != n) {
			t.Errorf("cut by %d bytes: %d recovered of %d", len(whole)-cut, got, n)
		}
		for i := range n {
			load(t, s, anObject(i, 2*checksum.Size+int64(i)))
		}
		checkBooks(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFlippedBitAnywhereInTheJournalHarmsNothing(t *testing.T) {
	dir := memDir(t)
	s := open(t, Options{Dir: dir, Quota: 16 * mib})
	o := anObject(1, 5000)
	load(t, s, o)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(s.journal.path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		p := bytes.Clone(whole)
		p[i] ^= 0x08
		if err := os.WriteFile(s.journal.path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, Options{Dir: dir, Quota: 16 * mib})
		load(t, s, o)
		checkBooks(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWhatAJournalOfAnotherVersionSpeaksOfIsDropped(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	o := anObject(1, 100_000)
	load(t, s, o)
	s.Close()
	p, err := os.ReadFile(s.journal.path)
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.Replace(p, []byte(journalMagic), []byte("stepcache journal 1\n"), 1)
	if bytes.Equal(p, other) {
		t.Fatal("the journal has no magic")
	}
	if err := os.WriteFile(s.journal.path, other, 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	s = open(t, Options{Dir: s.dir, Quota: 16 * mib, Logger: slog.New(slog.NewTextHandler(&said, nil))})
	if st := s.Stats(); st.Recovered != 0 || !strings.Contains(said.String(), "another version") {
		t.Errorf("%+v, and the log says %q", st, said.String())
	}
	if _, err := os.Stat(s.path(o.ID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its file is still there: %v", err)
	}
	load(t, s, o)
	checkBooks(t, s)
}

func TestFlippedBitsInFilesAreFoundByRecovery(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	o := anObject(1, 3*ring.BlockSize+100)
	load(t, s, o)
	small := anObject(2, 10)
	load(t, s, small)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	flip(t, s.path(o.ID), ring.BlockSize+12345)
	flip(t, s.path(o.ID), o.Size-1)
	flip(t, s.path(small.ID), 9)
	s = open(t, Options{Dir: s.dir, Quota: 64 * mib})
	if m := s.Bitmap(o); m[0] != 0b0101 {
		t.Errorf("bitmap %b", m)
	}
	if r := s.Residency(small); r.Blocks != 0 {
		t.Errorf("%+v", r)
	}
	load(t, s, o)
	load(t, s, small)
	checkBooks(t, s)
}

func TestFilesThatWereCutShortOrReplacedAreDropped(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	cut, grown, folder := anObject(1, 5*mib), anObject(2, 5*mib), anObject(3, 1000)
	for _, o := range []ring.Object{cut, grown, folder} {
		load(t, s, o)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Truncate(s.path(cut.ID), 4*mib), os.Truncate(s.path(grown.ID), 6*mib),
		os.Remove(s.path(folder.ID)), os.Mkdir(s.path(folder.ID), 0o700)); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Dir: s.dir, Quota: 64 * mib})
	for _, o := range []ring.Object{cut, grown, folder} {
		if r := s.Residency(o); r.Blocks != 0 {
			t.Errorf("%+v", r)
		}
		load(t, s, o)
	}
	checkBooks(t, s)
}

func TestUnknownFilesOfTheStoreAreRemovedAndNobodyElses(t *testing.T) {
	dir := memDir(t)
	mine := filepath.Join(dir, name(anObject(1, 1).ID))
	others := []string{"README", "0123", strings.Repeat("Z", 32), strings.ToUpper(name(anObject(3, 1).ID)), name(anObject(2, 1).ID) + ".bak"}
	for _, path := range append([]string{mine}, others...) {
		if path != mine {
			path = filepath.Join(dir, path)
		}
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open(t, Options{Dir: dir, Quota: 16 * mib})
	if _, err := os.Stat(mine); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	for _, n := range others {
		if _, err := os.Stat(filepath.Join(dir, n)); err != nil {
			t.Error(err)
		}
	}
}

func TestASmallerQuotaHoldsAfterARestart(t *testing.T) {
	s := open(t, Options{Dir: ownTmpfs(t, 64*mib), Quota: 64 * mib})
	for i := range 10 {
		load(t, s, anObject(i, 5*mib+100))
	}
	s = reopen(t, s, 20*mib)
	if st := s.Stats(); st.Used > 20*mib || st.Blocks < 3 {
		t.Errorf("%+v", st)
	}
	statfsWithin(t, s)
	for i := range 10 {
		load(t, s, anObject(i, 5*mib+100))
	}
	checkBooks(t, s)
	statfsWithin(t, s)
}

func TestWhatWasWrittenButNotNotedIsFreed(t *testing.T) {
	s := open(t, Options{Dir: ownTmpfs(t, 64*mib), Quota: 64 * mib})
	o := anObject(1, 4*ring.BlockSize)
	acquire(t, s, o, 1).Release()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(s.path(o.ID), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, ring.BlockSize)
	for _, n := range []int64{0, 2, 3} {
		content(o, n, p)
		if _, err := f.WriteAt(p, n*ring.BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	s = open(t, Options{Dir: s.dir, Quota: 64 * mib})
	if m := s.Bitmap(o); m[0] != 0b10 {
		t.Errorf("bitmap %b", m)
	}
	if used, err := s.fsUsed(); err != nil || used > ring.BlockSize+mib {
		t.Errorf("%d bytes held for one block: %v", used, err)
	}
	if st := s.Stats(); st.Zombie != 0 {
		t.Errorf("%+v", st)
	}
	load(t, s, o)
	checkBooks(t, s)
}

func TestPagesThatAFormerLifesReaderHoldsCountUntilItIsGone(t *testing.T) {
	s := open(t, Options{Dir: ownTmpfs(t, 32*mib), Quota: 32 * mib})
	o := anObject(1, 2*ring.BlockSize)
	load(t, s, o)
	l := lease(t, s, o)
	r := startReader(t, "read", l.File)
	l.Release()
	s.Drop(o)
	s = reopen(t, s, 32*mib)
	if st := s.Stats(); st.Zombie < o.Size {
		t.Errorf("not counted: %+v", st)
	}
	churn(t, s, 100)
	statfsWithin(t, s)
	r.sees(o)
	r.kill()
	for i := 0; i < 10 && s.Stats().Zombie != 0; i++ { // it looks now and then
		churn(t, s, 1000*(i+1))
	}
	if st := s.Stats(); st.Zombie != 0 {
		t.Errorf("still counted: %+v", st)
	}
	statfsWithin(t, s)
	checkBooks(t, s)
}

func TestFilesOfOthersOnTheStoresTmpfsAreNotItsOwn(t *testing.T) {
	s := open(t, Options{Dir: ownTmpfs(t, 32*mib), Quota: 32 * mib})
	load(t, s, anObject(1, mib))
	before := s.Stats().Used
	if err := errors.Join(os.Mkdir(s.file("snapshots"), 0o700), os.WriteFile(s.file("snapshots/one"), make([]byte, 3*mib), 0o600)); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, 32*mib)
	if st := s.Stats(); st.Used != before || st.Zombie != 0 {
		t.Errorf("%d bytes used before, %+v", before, st)
	}
}

func TestTheJournalStaysSmallHoweverMuchIsReadThrough(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 4 * mib})
	for i := range 3000 {
		acquire(t, s, anObject(i%900, 6000), 0).Release()
	}
	st := s.Stats()
	if st.Evicted < 100 {
		t.Fatalf("too little was evicted for a test: %+v", st)
	}
	s.mu.Lock()
	live := s.live
	s.mu.Unlock()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(s.journal.path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() > 2*live+journalSlack+int64(len(journalMagic)) {
		t.Errorf("journal of %d bytes for %d live", fi.Size(), live)
	}
	s = open(t, Options{Dir: s.dir, Quota: 4 * mib})
	if got := s.Stats(); got.Blocks != st.Blocks {
		t.Errorf("%d blocks before, %d after", st.Blocks, got.Blocks)
	}
}

func TestOpenSaysWhatIsWrongWithTheFolder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, filepath.Join(file, "below"), "/proc/no-such-place"} {
		if _, err := Open(context.Background(), Options{Dir: dir, Quota: 16 * mib, Logger: quiet()}); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	load(t, s, anObject(1, 100))
	s.Close()
	cancel()
	if _, err := Open(ctx, Options{Dir: s.dir, Quota: 16 * mib, Logger: quiet()}); !errors.Is(err, context.Canceled) {
		t.Errorf("a recovery that nobody waits for: %v", err)
	}
	open(t, Options{Dir: s.dir, Quota: 16 * mib}) // and it lost nothing nor kept the lock
}

func FuzzJournal(f *testing.F) {
	o := &object{id: anObject(1, 1).ID, size: 100}
	b := &block{obj: o, sums: []uint64{1, 2}}
	p := appendAdd([]byte(journalMagic), b)
	f.Add(p)
	f.Add(appendRecord(p, recordGone, o.id[:]))
	f.Add(appendRecord(p, recordDel, o.id[:], make([]byte, 8)))
	f.Add(p[:len(p)-1])
	f.Add(appendRecord([]byte(journalMagic), recordAdd, []byte("short")))
	f.Fuzz(func(t *testing.T, p []byte) {
		if _, err := readJournal(bytes.NewReader(p)); err != nil && !errors.Is(err, errOtherJournal) {
			t.Error(err)
		}
	})
}
