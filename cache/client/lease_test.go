package client

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// lender is a worker's Unix socket.
type lender struct {
	t    *testing.T
	path string
	// give says which file to hand out for a request; with an error that is the answer.
	give func(r wire.Request) (*os.File, error)
	// block answers for a block of a file; nil: never.
	block    func(r wire.Request) (reply wire.Reply, payload []byte)
	released atomic.Int64

	mu    sync.Mutex
	ln    *net.UnixListener
	conns []net.Conn
	wg    sync.WaitGroup
}

// socketPath is short enough for sun_path, which one below TMPDIR need not be.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

func lend(t *testing.T, keys wire.Keys, give func(r wire.Request) (*os.File, error)) *lender {
	l := &lender{t: t, path: socketPath(t), give: give}
	l.listen(keys)
	t.Cleanup(l.stop)
	return l
}

func (l *lender) listen(keys wire.Keys) {
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: l.path, Net: "unixpacket"})
	if err != nil {
		l.t.Fatal(err)
	}
	l.mu.Lock()
	l.ln = ln
	l.mu.Unlock()
	l.wg.Go(func() {
		for {
			nc, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			l.mu.Lock()
			l.conns = append(l.conns, nc)
			l.mu.Unlock()
			l.wg.Go(func() { l.serve(nc, keys) })
		}
	})
}

func (l *lender) stop() {
	l.mu.Lock()
	l.ln.Close()
	for _, c := range l.conns {
		c.Close()
	}
	l.conns = nil
	l.mu.Unlock()
	l.wg.Wait()
}

func (l *lender) serve(nc *net.UnixConn, keys wire.Keys) {
	defer nc.Close()
	if _, _, err := wire.ServerHandshake(nc, testDataset, keys); err != nil {
		return
	}
	buf := make([]byte, wire.MaxPacket)
	var lease int64
	for {
		n, err := nc.Read(buf)
		if err != nil {
			return
		}
		r, err := wire.DecodeRequest(buf[:n])
		if err != nil {
			return
		}
		switch r.Op {
		case wire.OpRelease:
			l.released.Add(1)
			wire.SendWithFD(nc, wire.AppendFrame(nil, wire.Reply{ID: r.ID, Off: r.Off}, nil), nil)
		case wire.OpLease:
			f, err := l.give(r)
			if err != nil {
				wire.SendWithFD(nc, wire.AppendFrame(nil, wire.Reply{ID: r.ID, Index: r.Index, Status: wire.StatusOf(err)}, wire.Text(err.Error())), nil)
				continue
			}
			lease++
			wire.SendWithFD(nc, wire.AppendFrame(nil, wire.Reply{ID: r.ID, Index: r.Index, Off: lease}, nil), f)
			if f != nil {
				f.Close()
			}
		case wire.OpBlock:
			if l.block != nil {
				reply, p := l.block(r)
				reply.ID = r.ID
				wire.SendWithFD(nc, wire.AppendFrame(nil, reply, p), nil)
			}
		}
	}
}

func leaseTier(t *testing.T) (*tier, string) {
	k := newTier(t, map[string][]byte{"f": content(1, 5<<20), "empty": nil})
	k.start("a")
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, k.data["f"], 0o600); err != nil {
		t.Fatal(err)
	}
	return k, path
}

// What a worker calls its socket may be a path on this machine that nobody should look at.
func TestSocketsOfOtherNodesAreNotLookedAt(t *testing.T) {
	k, path := leaseTier(t)
	l := lend(t, k.keys, func(wire.Request) (*os.File, error) { return os.Open(path) })
	k.worker("a").socket = l.path
	k.setMembers()
	c := k.dial(func(c *Config) { c.Node = "node-b" })
	if lease, err := c.Lease(testContext(t), k.index("f"), 0); !errors.Is(err, ErrNoLease) {
		if err == nil {
			lease.Release()
		}
		t.Errorf("leased from another node's worker: %v", err)
	}
	c = k.dial(nil) // it may be on this machine, as far as this one knows
	lease, err := c.Lease(testContext(t), k.index("f"), 0)
	if err != nil {
		t.Fatal(err)
	}
	lease.Release()
}

func TestDescriptorsOfWorkersMayBeRefused(t *testing.T) {
	k, path := leaseTier(t)
	l := lend(t, k.keys, func(wire.Request) (*os.File, error) { return os.Open(path) })
	k.worker("a").socket = l.path
	k.setMembers()
	c := k.dial(func(c *Config) { c.Descriptor = func(int) error { return errors.New("not a worker's memory") } })
	if lease, err := c.Lease(testContext(t), k.index("f"), 0); !errors.Is(err, ErrNoLease) || !strings.Contains(err.Error(), "not a worker's memory") {
		if err == nil {
			lease.Release()
		}
		t.Errorf("leased: %v", err)
	}
}

func TestLeaseReceivesTheFileAndReleaseIsIdempotent(t *testing.T) {
	ctx := testContext(t)
	k, path := leaseTier(t)
	l := lend(t, k.keys, func(wire.Request) (*os.File, error) { return os.Open(path) })
	k.worker("a").socket = l.path
	k.setMembers()
	c := k.dial(func(c *Config) { c.Node = "node-a" })
	lease, err := c.Lease(ctx, k.index("f"), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(lease.File)
	if err != nil || string(got) != string(k.data["f"]) {
		t.Fatal(len(got), err)
	}
	lease.Release()
	lease.Release()
	eventually(t, "the release", func() bool { return l.released.Load() == 1 })
	if _, err := lease.File.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Fatal("the descriptor stayed open", err)
	}

	// Another lease is lost with the worker: its holder is told, and what it has stays readable.
	lease, err = c.Lease(ctx, k.index("f"), 0)
	if err != nil {
		t.Fatal(err)
	}
	l.stop()
	select {
	case <-lease.Lost:
	case <-time.After(testDeadline):
		t.Fatal("not told")
	}
	if got, err := io.ReadAll(lease.File); err != nil || string(got) != string(k.data["f"]) {
		t.Fatal(len(got), err)
	}
	lease.Release()
	// It comes back, and so do leases.
	l.listen(k.keys)
	eventually(t, "a lease from the new worker", func() bool {
		lease, err := c.Lease(ctx, k.index("f"), 0)
		if err == nil {
			lease.Release()
		}
		return err == nil
	})
	c.Close()
	if n, stacks := ours(); n > 0 {
		t.Fatalf("%d goroutines left:\n%s", n, stacks)
	}
}

// A file that is large enough to be striped is whole where one worker has every stripe of it.
func TestALargeFileIsLeasedFromAWorkerThatOwnsAllOfIt(t *testing.T) {
	ctx := testContext(t)
	const size = ring.StripeThreshold + 1
	k := newTier(t, map[string][]byte{"large": make([]byte, size)}) // never touched, so it takes no memory
	k.start("a")
	path := filepath.Join(t.TempDir(), "large")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	l := lend(t, k.keys, func(wire.Request) (*os.File, error) { return os.Open(path) })
	k.worker("a").socket = l.path
	k.setMembers()
	c := k.dial(nil)
	lease, err := c.Lease(ctx, k.index("large"), 0)
	if err != nil {
		t.Fatal(err)
	}
	lease.Release()
	c.Close()

	k.start("b")
	c = k.dial(nil)
	if _, err := c.Lease(ctx, k.index("large"), 0); !errors.Is(err, ErrNoLease) || !strings.Contains(err.Error(), "striped over 2 workers") {
		t.Fatalf("leased, or why not: %v", err)
	}
	c.Close()
	c = k.dial(func(c *Config) { c.Copies = 2 })
	if lease, err = c.Lease(ctx, k.index("large"), 0); err != nil {
		t.Fatal(err)
	}
	lease.Release()
}

func TestNoLeaseSaysWhy(t *testing.T) {
	ctx := testContext(t)
	k, path := leaseTier(t)
	short := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(short, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	var give atomic.Pointer[func(wire.Request) (*os.File, error)]
	set := func(f func(wire.Request) (*os.File, error)) { give.Store(&f) }
	l := lend(t, k.keys, func(r wire.Request) (*os.File, error) { return (*give.Load())(r) })

	expect := func(c *Client, name, why string) {
		t.Helper()
		lease, err := c.Lease(ctx, k.index(name), 0)
		if !errors.Is(err, ErrNoLease) || !strings.Contains(err.Error(), why) || lease != nil {
			t.Fatalf("%v, want %q", err, why)
		}
	}
	c := k.dial(nil)
	expect(c, "f", "no owner of it has a socket")
	expect(c, "empty", "the file is empty")
	c.Close()

	k.worker("a").socket = l.path
	k.setMembers()
	c = k.dial(nil) // no node told: the socket is there, and that is enough
	set(func(wire.Request) (*os.File, error) {
		return nil, errors.Join(wire.ErrNotResident, errors.New("3 of 7 blocks"))
	})
	expect(c, "f", "3 of 7 blocks")
	if _, err := c.Lease(ctx, k.index("f"), 0); !errors.Is(err, wire.ErrNotResident) {
		t.Fatal(err)
	}
	set(func(wire.Request) (*os.File, error) { return os.Open(short) })
	expect(c, "f", "a descriptor of a file of 5 bytes")
	eventually(t, "giving the wrong file back", func() bool { return l.released.Load() == 1 })
	set(func(wire.Request) (*os.File, error) { return nil, nil })
	expect(c, "f", "without a descriptor")
	set(func(wire.Request) (*os.File, error) { return os.OpenFile(path, os.O_RDWR, 0) })
	expect(c, "f", "not opened for reading only")
	set(func(wire.Request) (*os.File, error) { return os.Open(t.TempDir()) })
	expect(c, "f", "not a regular file")
	set(func(wire.Request) (*os.File, error) { return os.Open(path) })
	if lease, err := c.Lease(ctx, k.index("f"), 0); err != nil {
		t.Fatal(err)
	} else {
		lease.Release()
	}
	// A directory has no lease, and neither has a closed client.
	if _, err := c.Lease(ctx, 0, 0); !errors.Is(err, source.ErrInvalid) {
		t.Fatal(err)
	}
	c.Close()
	if _, err := c.Lease(ctx, k.index("f"), 0); !errors.Is(err, errClosed) {
		t.Fatal(err)
	}
}

func TestALeaseThatComesTooLateIsGivenBack(t *testing.T) {
	k, path := leaseTier(t)
	asked, open := make(chan struct{}), make(chan struct{})
	l := lend(t, k.keys, func(wire.Request) (*os.File, error) {
		close(asked)
		<-open
		return os.Open(path)
	})
	k.worker("a").socket = l.path
	k.setMembers()
	c := k.dial(nil)
	ctx, cancel := context.WithCancel(testContext(t))
	done := make(chan error)
	go func() {
		_, err := c.Lease(ctx, k.index("f"), time.Minute)
		done <- err
	}()
	<-asked
	cancel()
	if err := <-done; !errors.Is(err, ErrNoLease) || !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	close(open)
	eventually(t, "giving it back", func() bool { return l.released.Load() == 1 })
}

func TestAWorkerThatHangsOnItsSocketIsLeftAloneForAWhile(t *testing.T) {
	ctx := testContext(t)
	k, _ := leaseTier(t)
	k.timing = impatient()
	open := make(chan struct{})
	var asked atomic.Int64
	l := lend(t, k.keys, func(wire.Request) (*os.File, error) {
		asked.Add(1)
		<-open
		return nil, wire.ErrNotResident
	})
	defer close(open)
	k.worker("a").socket = l.path
	k.setMembers()
	c := k.dial(nil)
	clock := time.Now()
	c.now = func() time.Time { return clock }
	for range 5 {
		if _, err := c.Lease(ctx, k.index("f"), 0); !errors.Is(err, ErrNoLease) || !errors.Is(err, wire.ErrLate) {
			t.Fatal(err)
		}
	}
	eventually(t, "the question to be seen", func() bool { return asked.Load() > 0 })
	if asked.Load() != 1 {
		t.Fatalf("asked %d times", asked.Load())
	}
	clock = clock.Add(time.Minute)
	go c.Lease(ctx, k.index("f"), testDeadline)
	// The lender answers one connection's requests in order, so that the second waits unseen; that it was
	// sent shows in who waits.
	eventually(t, "another try", func() bool {
		c.mu.Lock()
		s := c.socks[l.path]
		c.mu.Unlock()
		s.mu.Lock()
		lr := s.leaser
		s.mu.Unlock()
		lr.mu.Lock()
		defer lr.mu.Unlock()
		return len(lr.pending) == 1
	})
}

func openStore(t testing.TB) *store.Store {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "stepcache-client-")
	if err != nil {
		t.Skipf("no folder on tmpfs (/dev/shm): %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	st, err := store.Open(testContext(t), store.Options{Dir: dir, Quota: 64 << 20, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st
}

func TestTheNodeStoreKeepsBlocksAndLeasesWholeFiles(t *testing.T) {
	ctx := testContext(t)
	k, _ := leaseTier(t)
	st := openStore(t)
	c := k.dial(func(c *Config) { c.Store = st })
	i := k.index("f")
	if _, err := c.Lease(ctx, i, 0); !errors.Is(err, ErrNoLease) || !errors.Is(err, store.ErrNotWhole) {
		t.Fatal(err)
	}
	if err := checkRead(ctx, c, i, k.data["f"], 0, 5<<20); err != nil {
		t.Fatal(err)
	}
	o, _ := k.snap.Ring(i)
	eventually(t, "the store to hold it", func() bool { return st.Residency(o).Whole })
	// From now on nobody needs a worker.
	k.worker("a").stop()
	c.Forget(i)
	for _, off := range []int64{0, 1, 65535, 4<<20 - 10, 5<<20 - 1} {
		if err := checkRead(ctx, c, i, k.data["f"], off, 200_000); err != nil {
			t.Fatal(err)
		}
	}
	if c.Stats().StoreHits == 0 {
		t.Fatal("not read from the store")
	}
	lease, err := c.Lease(ctx, i, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(lease.File); err != nil || string(got) != string(k.data["f"]) {
		t.Fatal(len(got), err)
	}
	lease.Release()
	lease.Release()
}

func TestLeaseFillsTheNodeStoreWithinTheWait(t *testing.T) {
	ctx := testContext(t)
	k, _ := leaseTier(t)
	st := openStore(t)
	c := k.dial(func(c *Config) { c.Store = st })
	lease, err := c.Lease(ctx, k.index("f"), testDeadline)
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Release()
	if got, err := io.ReadAll(lease.File); err != nil || string(got) != string(k.data["f"]) {
		t.Fatal(len(got), err)
	}
	k2 := newTier(t, map[string][]byte{"g": content(2, 1<<20)})
	k2.start("a")
	c2 := k2.dial(func(c *Config) { c.Store = st })
	k2.worker("a").set(func(wire.Request) *answer { return &answer{never: true} })
	if _, err := c2.Lease(ctx, k2.index("g"), time.Millisecond); !errors.Is(err, ErrNoLease) {
		t.Fatal(err)
	}
}

func TestABadBlockOfTheNodeStoreIsFetchedAgain(t *testing.T) {
	ctx := testContext(t)
	k, _ := leaseTier(t)
	st := openStore(t)
	c := k.dial(func(c *Config) { c.Store = st })
	i := k.index("f")
	o, _ := k.snap.Ring(i)
	if err := checkRead(ctx, c, i, k.data["f"], 0, 5<<20); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the store to hold it", func() bool { return st.Residency(o).Whole })
	b, ok := st.Lookup(o, 1)
	if !ok {
		t.Fatal("not resident")
	}
	f, off := b.File()
	if f == nil {
		t.Skip("the store gives no file to damage")
	}
	name := f.Name()
	b.Release()
	w, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte{k.data["f"][ring.BlockSize+100] ^ 1}, off+100); err != nil {
		t.Fatal(err)
	}
	w.Close()
	c.Forget(i)
	eventually(t, "the buffers to be empty", func() bool { return c.Stats().Buffered == 0 })
	if err := checkRead(ctx, c, i, k.data["f"], ring.BlockSize, 1<<20); err != nil {
		t.Fatal(err)
	}
	if s := c.Stats(); s.Corrupt == 0 || s.Refetched == 0 {
		t.Fatalf("%+v", s)
	}
}

func TestLeasesAndReadsShareWhatIsFetchedForTheNodeStore(t *testing.T) {
	for _, leaseFirst := range []bool{true, false} {
		ctx := testContext(t)
		k, _ := leaseTier(t)
		c := k.dial(func(c *Config) { c.Store = openStore(t) })
		i, hold := k.index("f"), make(chan struct{})
		w := k.worker("a")
		w.set(func(wire.Request) *answer { return &answer{wait: hold} })
		errs := make(chan error, 2)
		lease := func() {
			l, err := c.Lease(ctx, i, testDeadline)
			if err == nil {
				var got []byte
				if got, err = io.ReadAll(l.File); err == nil && string(got) != string(k.data["f"]) {
					err = errors.New("wrong bytes")
				}
				l.Release()
			}
			errs <- err
		}
		read := func() { errs <- checkRead(ctx, c, i, k.data["f"], 0, 5<<20) }
		first, second := read, lease
		if leaseFirst {
			first, second = lease, read
		}
		go first()
		eventually(t, "both blocks are asked for", func() bool { return len(w.seen()) == 2 })
		go second()
		eventually(t, "the second waits", func() bool {
			return c.fills.of(blockKey{i, 0}) != nil && c.fills.of(blockKey{i, 1}) != nil && (!leaseFirst || c.Stats().Joins >= 2)
		})
		close(hold)
		for range 2 {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
		if n := len(w.seen()); n != 2 {
			t.Errorf("lease first %v: %d requests for two blocks", leaseFirst, n)
		}
	}
}

// A large file may be waited for where many read it; its worker decides. What ctx has left is not used up by that.
func TestOnlyALargeFileMayBeWaitedForAtACrowd(t *testing.T) {
	data := map[string][]byte{"small": content(1, ring.BlockSize), "large": content(2, ring.BlockSize+1)}
	k := newTier(t, data)
	k.start("a")
	k.timing.large, k.timing.crowd = ring.BlockSize, time.Minute
	waits := make(chan time.Duration, 1)
	l := lend(t, k.keys, func(r wire.Request) (*os.File, error) {
		waits <- time.Duration(r.WaitMillis) * time.Millisecond
		return nil, wire.ErrNotResident
	})
	k.worker("a").socket = l.path
	k.setMembers()
	c := k.dial(nil)
	waited := func(name string, left, told time.Duration) time.Duration {
		t.Helper()
		ctx := t.Context()
		if left != 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, left)
			defer cancel()
		}
		if _, err := c.Lease(ctx, k.index(name), told); !errors.Is(err, ErrNoLease) {
			t.Fatalf("%s: %v", name, err)
		}
		return wait(t, "asking for "+name, waits)
	}
	if d := waited("small", 0, 0); d != 0 {
		t.Errorf("a small file is waited for %v", d)
	}
	if d := waited("large", 0, 0); d != time.Minute {
		t.Errorf("a large file is waited for %v", d)
	}
	if d := waited("large", time.Hour, 0); d != time.Minute {
		t.Errorf("with much time it is waited for %v", d)
	}
	if d := waited("large", time.Minute, 0); d > 45*time.Second || d == 0 {
		t.Errorf("of a minute it is waited for %v", d)
	}
	if d := waited("large", 0, time.Second); d != time.Second {
		t.Errorf("told to wait for a second it is waited for %v", d)
	}
}
