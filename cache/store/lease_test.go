package store

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/ring"
)

// TestMain lets the test binary play the part of another process: a reader that got a descriptor, or a
// store that is killed.
func TestMain(m *testing.M) {
	switch os.Getenv("STORE_TEST_ROLE") {
	case "read", "map":
		readerMain(os.Getenv("STORE_TEST_ROLE") == "map")
	case "store":
		storeMain()
	default:
		os.Exit(m.Run())
	}
}

// readerMain holds descriptor 3, by a mapping alone if mapped, and for every line on its input tells the
// digest of what it sees there. It ends with its input.
func readerMain(mapped bool) {
	f := os.NewFile(3, "lease")
	st, err := f.Stat()
	if err != nil {
		panic(err)
	}
	read := func() []byte {
		p := make([]byte, st.Size())
		if _, err := f.ReadAt(p, 0); err != nil && err != io.EOF {
			panic(err)
		}
		return p
	}
	if mapped {
		m, err := unix.Mmap(3, 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			panic(err)
		}
		f.Close()
		read = func() []byte { return m }
	}
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		p := read()
		sum := sha256.Sum256(p)
		fmt.Println(hex.EncodeToString(sum[:]), bytes.IndexByte(p, 0))
	}
	os.Exit(0)
}

// reader is a process with a descriptor of a leased file.
type reader struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Scanner
	done bool
}

func startReader(t *testing.T, role string, f *os.File) *reader {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "STORE_TEST_ROLE="+role)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := &reader{t: t, cmd: cmd, in: in, out: bufio.NewScanner(out)}
	t.Cleanup(r.kill)
	if r.line() != "ready" {
		t.Fatal("the reader did not start")
	}
	return r
}

func (r *reader) line() string {
	r.t.Helper()
	if !r.out.Scan() {
		r.t.Fatal("the reader ended")
	}
	return r.out.Text()
}

// sees asserts that the reader still sees the object as it was.
func (r *reader) sees(o ring.Object) {
	r.t.Helper()
	p := make([]byte, o.Size)
	for n := range ring.Blocks(o.Size) {
		content(o, n, p[n*ring.BlockSize:][:blockLen(o.Size, n)])
	}
	sum := sha256.Sum256(p)
	fmt.Fprintln(r.in, "look")
	if got, want := r.line(), hex.EncodeToString(sum[:])+" -1"; got != want {
		r.t.Errorf("the reader sees other bytes (digest and first zero byte): %s, want %s", got, want)
	}
}

func (r *reader) kill() {
	if !r.done {
		r.done = true
		r.cmd.Process.Signal(syscall.SIGKILL)
		r.cmd.Wait()
	}
}

// churn reads so much through the store, often enough to be admitted, that whatever can be evicted is.
func churn(t *testing.T, s *Store, from int) {
	t.Helper()
	for i := range int(2*s.quota/(2*mib)) + 1 {
		o := anObject(from+i, 2*mib)
		for range 5 {
			acquire(t, s, o, 0).Release()
		}
	}
	if st := s.Stats(); st.Used > st.Quota {
		t.Errorf("above the quota: %+v", st)
	}
}

func lease(t *testing.T, s *Store, o ring.Object) *Lease {
	t.Helper()
	return leaseBy(t, s.Lease, o)
}

func leaseBy(t *testing.T, how func(ring.Object) (*Lease, error), o ring.Object) *Lease {
	t.Helper()
	l, err := how(o)
	if errors.Is(err, ErrNoLease) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Release)
	return l
}

func TestALeasedFileIsReadOnlyAndNotEvicted(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 24 * mib})
	o := anObject(1, ring.BlockSize+5)
	load(t, s, o)
	l := lease(t, s, o)
	if _, err := l.File.WriteAt([]byte{0}, 0); err == nil {
		t.Error("a lease can be written to")
	}
	churn(t, s, 100)
	if !s.Residency(o).Whole {
		t.Error("evicted while leased")
	}
	p := make([]byte, o.Size)
	if _, err := io.ReadFull(l.File, p); err != nil {
		t.Error(err)
	}
	if bytes.IndexByte(p, 0) >= 0 {
		t.Error("a zero that was not in the object")
	}
	l.Release()
	churn(t, s, 1000)
	if r := s.Residency(o); r.Blocks != 0 {
		t.Errorf("not evicted whole after the lease ended: %+v", r)
	}
	checkBooks(t, s)
}

// The heart of the matter: whatever a step does with a descriptor that once left, it never sees a hole.
func TestEvictionWhileDescriptorsAreOutShowsNoZero(t *testing.T) {
	for _, role := range []string{"read", "map"} {
		t.Run(role, func(t *testing.T) {
			s := open(t, Options{Dir: ownTmpfs(t, 24*mib), Quota: 24 * mib})
			o := anObject(1, 2*ring.BlockSize+4097)
			load(t, s, o)
			l := lease(t, s, o)
			r := startReader(t, role, l.File)
			l.Release() // the lease is over, the reader's own copy is not
			churn(t, s, 100)
			r.sees(o)
			statfsWithin(t, s)
			if !s.Residency(o).Whole {
				t.Error("evicting it freed nothing, since a reader holds its pages, and yet it was")
			}
			load(t, s, o) // and it still serves

			// Dropped under the reader: its pages count until it is gone, and the object gets a new file.
			s.Drop(o)
			if st := s.Stats(); st.Zombie < o.Size {
				t.Errorf("zombies of %d bytes are not counted: %+v", o.Size, st)
			}
			load(t, s, o)
			churn(t, s, 1000)
			r.sees(o)
			statfsWithin(t, s)
			if st := s.Stats(); st.Zombie < o.Size {
				t.Errorf("zombies of %d bytes are no longer counted: %+v", o.Size, st)
			}
			r.kill()
			churn(t, s, 2000)
			if st := s.Stats(); st.Zombie != 0 {
				t.Errorf("still counted after the reader died: %+v", st)
			}
			statfsWithin(t, s)
			checkBooks(t, s)
		})
	}
}

func TestAKilledReadersFileIsEvictedWhole(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 24 * mib})
	o := anObject(1, 2*ring.BlockSize)
	load(t, s, o)
	l := lease(t, s, o)
	r := startReader(t, "read", l.File)
	l.Release()
	churn(t, s, 100)
	r.sees(o)
	var before unix.Stat_t
	if err := unix.Stat(s.path(o.ID), &before); err != nil {
		t.Fatal(err)
	}
	if before.Blocks*512 < o.Size {
		t.Error("a file that was lent has holes")
	}
	r.kill()
	churn(t, s, 1000)
	if r := s.Residency(o); r.Blocks != 0 {
		t.Errorf("still held after its reader died: %+v", r)
	}
	if _, err := os.Stat(s.path(o.ID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is not unlinked: %v", err)
	}
	checkBooks(t, s)
}

func TestWhenEverythingIsLeasedReadsAreServedUncached(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	var leases []*Lease
	for i := range 3 {
		o := anObject(i, ring.BlockSize)
		load(t, s, o)
		leases = append(leases, lease(t, s, o))
	}
	o := anObject(50, ring.BlockSize)
	for range 20 {
		b := acquire(t, s, o, 0)
		if b.Resident() {
			t.Error("resident: the test tests nothing")
		}
		if f, _ := b.File(); f != nil {
			t.Error("a file for a block served from heap")
		}
		check(t, o, 0, b)
		if !s.Verify(b) || len(b.Bytes()) != b.Len() {
			t.Error("bytes and sums of a block served from heap do not match")
		}
		b.Release()
	}
	if st := s.Stats(); st.Uncached != 20 || st.Evicted != 0 {
		t.Errorf("%+v", st)
	}
	for _, l := range leases {
		l.Release()
	}
	for range 20 {
		acquire(t, s, o, 0).Release()
	}
	if !s.Residency(o).Whole {
		t.Error("not admitted after the leases ended")
	}
	checkBooks(t, s)
}

func TestWhereLeasesCannotBeSafeThereAreNone(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	s.noLease = "said by the test"
	o := anObject(1, 100)
	load(t, s, o)
	if _, err := s.Lease(o); !errors.Is(err, ErrNoLease) || !strings.Contains(err.Error(), "said by the test") {
		t.Errorf("got %v", err)
	}
}

func TestALeasedFileOfAFormerLifeIsNeverPunched(t *testing.T) {
	dir := memDir(t)
	s := open(t, Options{Dir: dir, Quota: 24 * mib})
	o := anObject(1, 2*ring.BlockSize+1)
	load(t, s, o)
	l := lease(t, s, o)
	r := startReader(t, "map", l.File)
	l.Release()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open(t, Options{Dir: dir, Quota: 24 * mib})
	if !s.Residency(o).Whole {
		t.Fatal("not recovered")
	}
	churn(t, s, 100)
	r.sees(o)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// Its bytes rot: the reader's file is unlinked, not punched, though a part of it is bad.
	flip(t, s.path(o.ID), ring.BlockSize+3)
	var bad unix.Stat_t
	if err := unix.Stat(s.path(o.ID), &bad); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Dir: dir, Quota: 24 * mib})
	if r := s.Residency(o); r.Blocks != 0 {
		t.Errorf("%+v", r)
	}
	fmt.Fprintln(r.in, "look")
	if got := r.line(); !strings.HasSuffix(got, " -1") {
		t.Errorf("the reader sees a zero: %s", got)
	}
	load(t, s, o)
	checkBooks(t, s)
}

// statfsWithin asserts that the store's own tmpfs holds no more than the quota.
func statfsWithin(t *testing.T, s *Store) {
	t.Helper()
	used, err := s.fsUsed()
	if err != nil {
		t.Fatal(err)
	}
	if used > s.quota {
		t.Errorf("the tmpfs holds %d bytes, the quota is %d", used, s.quota)
	}
}

// flip changes one bit of a file.
func flip(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

// storeMain fills a store, tells so and waits to be killed.
func storeMain() {
	s, err := Open(context.Background(), Options{Dir: os.Getenv("STORE_TEST_DIR"), Quota: 64 * mib, Logger: quiet()})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for i := range 20 {
		o := anObject(i, int64(i)*300_000)
		for n := range ring.Blocks(o.Size) {
			b, err := s.Acquire(context.Background(), o, n, filler(o, n))
			if err != nil {
				panic(err)
			}
			b.Release()
		}
	}
	for written := false; !written; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		written = s.journal.bytes.Load() == s.live+int64(len(journalMagic))
		s.mu.Unlock()
	}
	fmt.Println("filled")
	select {}
}

// Leases outlive a store: the last release of a dropped object looks at its descriptor, which Close closes.
func TestLeasesOfDroppedObjectsEndWhileTheStoreCloses(t *testing.T) {
	const n = 16
	for range 20 {
		s := open(t, Options{Dir: memDir(t), Quota: 24 * mib})
		var leases []*Lease
		for i := range n {
			o := anObject(i, 4096)
			load(t, s, o)
			leases = append(leases, lease(t, s, o))
			s.Drop(o)
		}
		start := make(chan struct{})
		var wg sync.WaitGroup
		for _, l := range leases {
			wg.Go(func() { <-start; l.Release() })
		}
		wg.Go(func() {
			<-start
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		close(start)
		wg.Wait()
		if st := s.Stats(); st.Leases != 0 {
			t.Fatalf("%+v", st)
		}
	}
}
