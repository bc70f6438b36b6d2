package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
)

func passthroughFixture(t *testing.T, o Options) (files, *leasing, *Server) {
	all := files{"big": content("big", 5<<20+1), "two": content("two", 2<<20), "three": content("three", 3<<20), "small": content("small", 1000)}
	s := snapshotOf(t, all)
	r := newLeasing(t, s, all)
	if o.IdleTime == 0 {
		o.IdleTime = time.Hour
	}
	o.Mode = Passthrough
	m := mounted(t, s, r, o)
	needPassthrough(t, m)
	return all, r, m
}

func TestPassthroughReadsPastTheServer(t *testing.T) {
	all, r, m := passthroughFixture(t, Options{})
	for name, want := range all {
		if err := sameBytes(filepath.Join(m.Dir(), name), want); err != nil {
			t.Error(err)
		}
	}
	st := m.Stats()
	if st.Opens != 4 || st.PassthroughOpens != 3 || st.PassthroughBytes != 10<<20+1 || st.OpenedBytes != 10<<20+1001 || st.Bytes != 1000 || st.Leased != 3 {
		t.Errorf("%+v", st)
	}
	if r.reads.Load() != st.Reads {
		t.Errorf("the reader was asked %d times", r.reads.Load())
	}
}

func TestReopenNeedsNoLease(t *testing.T) {
	all, r, m := passthroughFixture(t, Options{})
	path := filepath.Join(m.Dir(), "big")
	for range 10 {
		if err := sameBytes(path, all["big"]); err != nil {
			t.Fatal(err)
		}
		checkQuiet(t, m)
	}
	if n := r.taken.Load() & (1<<32 - 1); n != 1 {
		t.Errorf("%d leases for one file", n)
	}
	m.fs.pass.sweep(time.Now().Add(30*time.Minute), 64)
	if r.given.Load() != 0 {
		t.Error("the lease was given back early")
	}
	m.fs.pass.sweep(time.Now().Add(2*time.Hour), 64)
	if r.given.Load() != 1 || m.Stats().Leased != 0 {
		t.Errorf("%d leases given back, %d kept", r.given.Load(), m.Stats().Leased)
	}
	if err := sameBytes(path, all["big"]); err != nil {
		t.Error(err)
	}
}

func TestIdleLeasesAreBounded(t *testing.T) {
	all, r, m := passthroughFixture(t, Options{IdleLeases: 1})
	for _, name := range []string{"big", "two", "three"} {
		if err := sameBytes(filepath.Join(m.Dir(), name), all[name]); err != nil {
			t.Fatal(err)
		}
		checkQuiet(t, m)
	}
	eventually(t, "two leases are given back", func() bool { return r.given.Load() == 2 })
	i, _ := m.fs.snap.(*catalog.Snapshot).Lookup("/three")
	if tableEntry(t, m, i).backing == 0 {
		t.Error("the newest was given back, not the oldest")
	}
}

func TestLeasesAreBounded(t *testing.T) {
	all, _, m := passthroughFixture(t, Options{Leases: 1})
	a, err := os.Open(filepath.Join(m.Dir(), "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := sameBytes(filepath.Join(m.Dir(), "two"), all["two"]); err != nil {
		t.Error(err)
	}
	if st := m.Stats(); st.PassthroughOpens != 1 || st.Opens != 2 {
		t.Errorf("%+v", st)
	}
}

// The kernel answers EIO to an open that mixes ways of reading one file.
func TestWaysOfReadingAFileDoNotMix(t *testing.T) {
	all, r, m := passthroughFixture(t, Options{})
	path := filepath.Join(m.Dir(), "big")
	no := func(context.Context, string, time.Duration) error { return errNoLease }
	r.lease.Store(&no)
	buffered, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer buffered.Close()
	r.lease.Store(nil)
	// A lease can be had now, but the file is open the other way.
	second, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sameAt(buffered, all["big"]), sameAt(second, all["big"])); err != nil {
		t.Error(err)
	}
	if n := m.Stats().PassthroughOpens; n != 0 {
		t.Errorf("%d passthrough opens beside a buffered one", n)
	}
	buffered.Close()
	second.Close()
	checkQuiet(t, m)
	through, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer through.Close()
	r.lease.Store(&no)
	again, err := os.Open(path) // no lease, but the file is passed through
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := errors.Join(sameAt(through, all["big"]), sameAt(again, all["big"])); err != nil {
		t.Error(err)
	}
	if n := m.Stats().PassthroughOpens; n != 2 {
		t.Errorf("%d passthrough opens, want 2", n)
	}
	// A mapping holds the file open after its close.
	cmd := command(t, "mmap", order{Path: path})
	if out, err := cmd.Output(); err != nil {
		t.Errorf("%s %v", out, err)
	}
}

// Whoever reads a large file twice in a row has it passed through the second time, if it can be by then.
func TestAnOpenWaitsForTheCloseBeforeIt(t *testing.T) {
	all := files{"large": content("large", closeMin), "big": content("big", closeMin-1)}
	s := snapshotOf(t, all)
	r := newLeasing(t, s, all)
	m := mounted(t, s, r, Options{Mode: Passthrough, IdleTime: time.Hour, closeWait: time.Hour})
	needPassthrough(t, m)
	no := func(context.Context, string, time.Duration) error { return errNoLease }
	r.lease.Store(&no)
	open := func(name string) *os.File {
		f, err := os.Open(filepath.Join(m.Dir(), name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	large, big := open("large"), open("big")
	r.lease.Store(nil)
	if second := open("big"); m.Stats().PassthroughOpens != 0 {
		t.Errorf("%s is passed through beside a handle that is not", second.Name())
	}
	opened := make(chan *os.File)
	go func() {
		f, _ := os.Open(large.Name())
		opened <- f
	}()
	i, _ := s.Lookup("/large")
	eventually(t, "an open waits for the close", func() bool {
		m.fs.pass.mu.Lock()
		defer m.fs.pass.mu.Unlock()
		return m.fs.pass.closing[i] != nil
	})
	large.Close()
	f := <-opened
	if f == nil {
		t.Fatal("not opened")
	}
	defer f.Close()
	if err := sameAt(f, all["large"]); err != nil {
		t.Error(err)
	}
	if n := m.Stats().PassthroughOpens; n != 1 {
		t.Errorf("%d passthrough opens", n)
	}
	big.Close()
}

func TestAnOpenDoesNotWaitForLong(t *testing.T) {
	all := files{"large": content("large", closeMin)}
	s := snapshotOf(t, all)
	r := newLeasing(t, s, all)
	m := mounted(t, s, r, Options{Mode: Passthrough, closeWait: time.Millisecond})
	needPassthrough(t, m)
	no := func(context.Context, string, time.Duration) error { return errNoLease }
	r.lease.Store(&no)
	for range 3 {
		f, err := os.Open(filepath.Join(m.Dir(), "large"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := sameAt(f, all["large"]); err != nil {
			t.Error(err)
		}
	}
	if n := m.Stats().PassthroughOpens; n != 0 {
		t.Errorf("%d passthrough opens", n)
	}
}

func TestMixingUnderLoad(t *testing.T) {
	// Leases come and go at random while files are opened, read and closed: no open may fail.
	all, r, m := passthroughFixture(t, Options{IdleTime: time.Millisecond, IdleLeases: 1})
	var n atomic.Int64
	sometimes := func(context.Context, string, time.Duration) error {
		if n.Add(1)%3 == 0 {
			return errNoLease
		}
		return nil
	}
	r.lease.Store(&sometimes)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for range 40 {
				for _, name := range []string{"two", "three"} {
					f, err := os.Open(filepath.Join(m.Dir(), name))
					if err != nil {
						t.Error(err)
						return
					}
					b := make([]byte, 5000)
					if _, err := f.ReadAt(b, 1<<20); err != nil || !bytes.Equal(b, all[name][1<<20:1<<20+5000]) {
						t.Errorf("%s: %v", name, err)
					}
					f.Close()
				}
			}
		})
	}
	wg.Wait()
	checkQuiet(t, m)
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	m.Wait()
	if taken, given := r.taken.Load()&(1<<32-1), r.given.Load(); taken != given {
		t.Errorf("%d leases taken, %d given back", taken, given)
	}
}

func TestOneLeaseForAllWhoOpenAtOnce(t *testing.T) {
	_, r, m := passthroughFixture(t, Options{LeaseWait: 20 * time.Second})
	var asked atomic.Int64
	goon := make(chan struct{})
	hold := func(ctx context.Context, _ string, wait time.Duration) error {
		asked.Add(1)
		if wait <= 0 {
			t.Error("a file of this size is worth waiting for")
		}
		<-goon
		return nil
	}
	r.lease.Store(&hold)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			fd, err := unix.Open(filepath.Join(m.Dir(), "big"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Error(err)
				return
			}
			unix.Close(fd)
		})
	}
	eventually(t, "all have asked to open", func() bool { return m.Stats().Opens == 8 })
	close(goon)
	wg.Wait()
	if st := m.Stats(); asked.Load() > 2 || st.PassthroughOpens != 8 {
		t.Errorf("%d leases asked for, %d passthrough opens", asked.Load(), st.PassthroughOpens)
	}
}

func TestSlowLeaseIsGivenUp(t *testing.T) {
	all, r, m := passthroughFixture(t, Options{LeaseWait: time.Second, LeaseWaitMax: 2 << 20})
	var waits sync.Map
	never := func(ctx context.Context, path string, wait time.Duration) error {
		waits.Store(path, wait)
		<-ctx.Done()
		return ctx.Err()
	}
	r.lease.Store(&never)
	for _, name := range []string{"two", "three"} {
		if err := sameBytes(filepath.Join(m.Dir(), name), all[name]); err != nil {
			t.Error(err)
		}
	}
	if w, _ := waits.Load("two"); w != time.Second {
		t.Errorf("waits %v for a file of LeaseWaitMax", w)
	}
	if w, _ := waits.Load("three"); w != time.Duration(0) {
		t.Errorf("waits %v for a larger file", w)
	}
	if st := m.Stats(); st.PassthroughOpens != 0 || st.LeaseMisses != 2 {
		t.Errorf("%+v", st)
	}
}

func TestLeaseOfAWrongFileIsRefused(t *testing.T) {
	all, r, m := passthroughFixture(t, Options{})
	i, _ := m.fs.snap.(*catalog.Snapshot).Lookup("/big")
	if err := os.WriteFile(filepath.Join(r.dir, fmt.Sprint(i)), []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := sameBytes(filepath.Join(m.Dir(), "big"), all["big"]); err != nil {
		t.Error(err)
	}
	if st := m.Stats(); st.PassthroughOpens != 0 || r.given.Load() != 1 {
		t.Errorf("%+v, %d leases given back", st, r.given.Load())
	}
}

// refusing is a kernel that has the capability and then refuses.
type refusing struct {
	registrar
	errno atomic.Uint32
}

func (r *refusing) RegisterBackingFd(m *fuse.BackingMap) (int32, syscall.Errno) {
	if e := r.errno.Load(); e != 0 {
		return 0, syscall.Errno(e)
	}
	return r.registrar.RegisterBackingFd(m)
}

func TestARefusalSwitchesPassthroughOff(t *testing.T) {
	var log logs
	var k refusing
	all, r, m := passthroughFixture(t, Options{Logger: log.logger(), wrap: func(r registrar) registrar { k.registrar = r; return &k }})
	early, err := os.Open(filepath.Join(m.Dir(), "two"))
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	k.errno.Store(uint32(unix.EPERM))
	for range 3 {
		for _, name := range []string{"big", "two", "three"} { // "two" stays what it is
			if err := sameBytes(filepath.Join(m.Dir(), name), all[name]); err != nil {
				t.Error(err)
			}
		}
	}
	if st := m.Stats(); st.Passthrough || st.PassthroughOpens != 4 || st.Leased != 1 {
		t.Errorf("%+v", st)
	}
	if n := strings.Count(log.String(), "refused passthrough"); n != 1 || !strings.Contains(log.String(), "CAP_SYS_ADMIN") {
		t.Errorf("%d lines about it in the log:\n%s", n, log.String())
	}
	if r.given.Load() == 0 {
		t.Error("the lease that could not be registered was not given back")
	}
}

func TestAWantThatPassesLeavesPassthroughOn(t *testing.T) {
	var k refusing
	all, r, m := passthroughFixture(t, Options{wrap: func(r registrar) registrar { k.registrar = r; return &k }})
	for _, errno := range []syscall.Errno{unix.ENOMEM, unix.ENFILE, unix.EMFILE} {
		k.errno.Store(uint32(errno))
		if err := sameBytes(filepath.Join(m.Dir(), "big"), all["big"]); err != nil {
			t.Error(err)
		}
		if st := m.Stats(); !st.Passthrough || st.PassthroughOpens != 0 || st.Leased != 0 {
			t.Errorf("after %v: %+v", errno, st)
		}
		checkQuiet(t, m) // a file that still counts as open stays as it is
	}
	if r.given.Load() != 3 {
		t.Errorf("%d leases given back", r.given.Load())
	}
	k.errno.Store(0)
	if err := sameBytes(filepath.Join(m.Dir(), "big"), all["big"]); err != nil {
		t.Error(err)
	}
	if st := m.Stats(); st.PassthroughOpens != 1 {
		t.Errorf("once there is room: %+v", st)
	}
}

func TestReaderWithoutLeasesIsNoOpen(t *testing.T) {
	all := files{"big": content("big", 5<<20)}
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{})
	if m.Mode() != NoOpen || m.Stats().Passthrough {
		t.Errorf("mode %v", m.Mode())
	}
	if err := sameBytes(filepath.Join(m.Dir(), "big"), all["big"]); err != nil {
		t.Error(err)
	}
	if n := m.Stats().Opens; n != 0 {
		t.Errorf("the kernel asked for %d opens", n)
	}
}

func TestModeFollowsTheDataset(t *testing.T) {
	h := func(sizes map[int]int64) []int64 {
		v := make([]int64, 64)
		for k, n := range sizes {
			v[k] = n
		}
		return v
	}
	for _, c := range []struct {
		what string
		h    []int64
		want Mode
	}{
		{"nothing", h(nil), NoOpen},
		{"empty files", h(map[int]int64{0: 10}), NoOpen},
		{"small files", h(map[int]int64{13: 100_000}), NoOpen},
		{"a source tree: 10,000 of 8 KiB, ten of 2 MiB", h(map[int]int64{14: 10_000, 22: 10}), NoOpen},
		{"images of 1 to 2 MiB", h(map[int]int64{21: 5000}), Passthrough},
		{"shards of 256 MiB", h(map[int]int64{29: 100}), Passthrough},
		{"mixed: one file of 64 MiB beside a million small ones", h(map[int]int64{12: 1_000_000, 27: 1}), Passthrough},
		{"mixed: twenty of 32 MiB beside a million small ones", h(map[int]int64{12: 1_000_000, 26: 20}), NoOpen},
	} {
		if got := ChooseMode(c.h); got != c.want {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
	var m Mode
	for _, v := range []Mode{Auto, Passthrough, NoOpen} {
		b, _ := v.MarshalText()
		if err := m.UnmarshalText(b); err != nil || m != v {
			t.Errorf("%s: %v %v", b, m, err)
		}
	}
	if m.UnmarshalText([]byte("fast")) == nil {
		t.Error("there is no mode fast")
	}
}
