package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/ring"
)

func TestFlippedBitsAreCaughtDroppedAndMended(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 2*ring.BlockSize+77)
	load(t, s, o)
	flip(t, s.path(o.ID), ring.BlockSize+1)
	for n := range int64(3) {
		b := acquire(t, s, o, n)
		other := acquire(t, s, o, n) // another reader at the same time
		if ok := s.Verify(b); ok != (n != 1) {
			t.Errorf("block %d verifies: %v", n, ok)
		}
		if ok := s.Verify(other); ok != (n != 1) {
			t.Errorf("block %d verifies to another: %v", n, ok)
		}
		if n == 1 {
			if _, ok := s.Lookup(o, n); ok {
				t.Error("still found")
			}
			if _, err := s.Lease(o); !errors.Is(err, ErrNotWhole) {
				t.Errorf("leased: %v", err)
			}
			again := acquire(t, s, o, n) // while others still have the bad one
			check(t, o, n, again)
			check(t, o, n, other) // mended in place
			again.Release()
		}
		b.Release()
		other.Release()
	}
	if st := s.Stats(); st.Corrupt != 1 {
		t.Errorf("counted once: %+v", st)
	}
	if !s.Residency(o).Whole {
		t.Error("not whole again")
	}
	checkBooks(t, s)
	s = reopen(t, s, 32*mib)
	if !s.Residency(o).Whole {
		t.Error("not recovered whole")
	}
}

// Small blocks cost more to look at than their bytes say.
func TestASmallBlockCountsForMoreOfTheScrub(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	for i := range 200 {
		acquire(t, s, anObject(i, 500), 0).Release()
	}
	// What the rate does not give at once takes hours, for which the deadline leaves no time.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.Scrub(ctx, 1, func(ring.Object, int64) {}); err == nil || ctx.Err() != nil {
		t.Fatal(err)
	}
	if n := s.Stats().Scrubbed; n != ring.BlockSize/leastScrubbed {
		t.Errorf("%d blocks were looked at for %d bytes", n, ring.BlockSize)
	}
}

func TestCorruptBlocksThatNobodyWantsAreEvictedFirst(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 24 * mib})
	o := anObject(1, 2*ring.BlockSize)
	load(t, s, o)
	flip(t, s.path(o.ID), 5)
	b := acquire(t, s, o, 0)
	if s.Verify(b) {
		t.Fatal("verified")
	}
	b.Release()
	checkBooks(t, s)
	s.Drop(anObject(2, 1)) // unknown: no harm
	acquire(t, s, anObject(3, 100), 0).Release()
	if st := s.Stats(); st.Used > 6*mib || st.Evicted != 0 {
		t.Errorf("the bad block is still held: %+v", st)
	}
	checkBooks(t, s)
}

// A step keeps the descriptor of a file whose bytes rot: mended in place, it never shows a hole.
func TestALeasedFileIsMendedInPlace(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 24 * mib})
	o := anObject(1, ring.BlockSize+5000)
	load(t, s, o)
	l := lease(t, s, o)
	r := startReader(t, "map", l.File)
	r.sees(o)
	flip(t, s.path(o.ID), 4)
	b := acquire(t, s, o, 0)
	if s.Verify(b) {
		t.Fatal("verified")
	}
	b.Release()
	l.Release()
	// A fill that fails leaves it as it was.
	boom := errors.New("boom")
	if _, err := s.Acquire(context.Background(), o, 0, func(context.Context, []byte) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	checkBooks(t, s)
	load(t, s, o)
	r.sees(o)
	churn(t, s, 100)
	r.sees(o)
	checkBooks(t, s)
}

func TestScrubFindsWhatNobodyReads(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	for i := range 5 {
		load(t, s, anObject(i, mib))
	}
	flip(t, s.path(anObject(3, mib).ID), mib-1)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	var told []ring.Object
	go func() {
		done <- s.Scrub(ctx, 1<<30, func(o ring.Object, n int64) {
			s.Residency(o) // no lock is held
			told = append(told, o)
			if n != 0 {
				t.Errorf("told of block %d", n)
			}
		})
	}()
	eventually(t, func() bool { return s.Stats().Corrupt == 1 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if !slices.Equal(told, []ring.Object{anObject(3, mib)}) {
		t.Errorf("told of %v", told)
	}
	if s.Residency(anObject(3, mib)).Blocks != 0 {
		t.Error("still resident")
	}
	if st := s.Stats(); st.Blocks != 4 || st.Hits != 0 {
		t.Errorf("%+v", st)
	}
	checkBooks(t, s)
}

func TestMountedTmpfsIsPrivateAndHasRoomForTheQuota(t *testing.T) {
	dir := ownTmpfs(t, 8*mib)
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if size := int64(fs.Blocks) * fs.Bsize; fs.Type != unix.TMPFS_MAGIC || size <= 8*mib {
		t.Errorf("type %x, %d bytes", fs.Type, size)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[1] == dir {
			for _, o := range []string{"nosuid", "nodev", "noexec"} {
				if !strings.Contains(f[3], o) {
					t.Errorf("mounted %s, without %s", f[3], o)
				}
			}
		}
	}
	s := open(t, Options{Dir: dir, Quota: 8 * mib})
	if !s.own || !s.Stats().Tmpfs {
		t.Error("not seen as a tmpfs of its own")
	}
	if err := Unmount(filepath.Join(t.TempDir(), "nothing")); err != nil {
		t.Errorf("where nothing is mounted: %v", err)
	}
}

func TestATmpfsLeftByAFormerProcessIsKept(t *testing.T) {
	dir := ownTmpfs(t, 16*mib)
	s := open(t, Options{Dir: dir, Quota: 16 * mib})
	o := anObject(1, 6*mib)
	load(t, s, o)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if note, err := MountTmpfs(dir, 64*mib); err != nil || note == "" {
		t.Fatalf("%q %v", note, err)
	}
	s = open(t, Options{Dir: dir, Quota: 64 * mib})
	if !s.Residency(o).Whole {
		t.Error("what it held is gone")
	}
	for i := range 8 {
		load(t, s, anObject(10+i, 6*mib))
	}
	if st := s.Stats(); st.NoSpace != 0 {
		t.Errorf("it did not grow: %+v", st)
	}
	if _, err := MountTmpfs(dir, mib); err == nil {
		t.Error("made smaller than what it holds")
	}
	s.Close()
	if err := Unmount(dir); err != nil {
		t.Fatal(err)
	}
	if own, err := isMount(dir); err != nil || own {
		t.Errorf("one mount over the other: %v", err)
	}
}

func TestMountAtAnImpossiblePlaceSaysWhere(t *testing.T) {
	if _, err := MountTmpfs("/proc/no-such-place", mib); err == nil || !strings.Contains(err.Error(), "/proc/no-such-place") {
		t.Errorf("got %v", err)
	}
}

// Some sandboxes' file systems cannot make holes.
func TestWithoutHolesWholeFilesAreEvicted(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 24 * mib})
	s.wholeOnly = true
	for range 4 {
		for i := range 8 {
			load(t, s, anObject(i, ring.BlockSize+mib))
		}
	}
	if st := s.Stats(); st.Evicted == 0 || st.Blocks == 0 {
		t.Errorf("%+v", st)
	}
	for i := range 8 {
		o := anObject(i, ring.BlockSize+mib)
		var st unix.Stat_t
		if err := unix.Stat(s.path(o.ID), &st); err == nil && st.Blocks*512 != s.Residency(o).Bytes {
			t.Errorf("a file of %d bytes for %d resident", st.Blocks*512, s.Residency(o).Bytes)
		}
	}
	checkBooks(t, s)
}

// A tmpfs that gives every file huge pages takes one for the smallest object: the quota counts them.
func TestQuotaCountsHugePagesOfSmallFiles(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("stepcache", dir, "tmpfs", 0, "size=128m,huge=always"); err != nil {
		t.Skipf("needs the right to mount a tmpfs with huge pages: %v", err)
	}
	t.Cleanup(func() { Unmount(dir) })
	s := open(t, Options{Dir: dir, Quota: 32 * mib})
	for i := range 40 {
		load(t, s, anObject(i, 10_000))
	}
	statfsWithin(t, s)
	checkBooks(t, s)
}
