package client

import (
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// flipper is a TCP proxy in front of a worker that inverts bits on their way to the client.
type flipper struct {
	ln    net.Listener
	to    string
	every atomic.Int64 // bytes between two flips on average; zero: none
	flips atomic.Int64
	conns atomic.Uint64
	wg    sync.WaitGroup
	mu    sync.Mutex
	open  []net.Conn
}

func newFlipper(t *testing.T, to string) *flipper {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &flipper{ln: ln, to: to}
	f.wg.Go(func() {
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				continue
			}
			f.mu.Lock()
			f.open = append(f.open, a, b)
			f.mu.Unlock()
			f.wg.Go(func() { io.Copy(b, a); b.Close(); a.Close() })
			rnd := rand.New(rand.NewPCG(99, f.conns.Add(1)))
			f.wg.Go(func() { f.copy(a, b, rnd); a.Close(); b.Close() })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		f.mu.Lock()
		for _, c := range f.open {
			c.Close()
		}
		f.mu.Unlock()
		f.wg.Wait()
	})
	return f
}

func (f *flipper) copy(dst, src net.Conn, rnd *rand.Rand) {
	buf := make([]byte, 64<<10)
	left := int64(-1)
	for {
		n, err := src.Read(buf)
		if every := f.every.Load(); every > 0 {
			if left < 0 {
				left = rnd.Int64N(2 * every)
			}
			at := left
			for ; at < int64(n); at += 1 + rnd.Int64N(2*every) {
				buf[at] ^= 1 << rnd.IntN(8)
				f.flips.Add(1)
			}
			left = at - int64(n)
		}
		if _, werr := dst.Write(buf[:n]); werr != nil || err != nil {
			return
		}
	}
}

func TestBitsFlippedOnTheWireAreAlwaysCaughtRefetchedAndCounted(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 9<<20+12345), "g": content(2, 70_000)})
	k.start("a", "b")
	list := k.membership()
	var fs []*flipper
	for n := range list.Members {
		f := newFlipper(t, list.Members[n].Addr)
		fs = append(fs, f)
		list.Members[n].Addr = f.ln.Addr().String()
	}
	k.mu.Lock()
	k.list.Members = list.Members // so that workers tell the same
	k.mu.Unlock()
	var log lines
	c := k.dial(func(c *Config) { c.Membership = list; c.BufferBytes = 8 << 20; c.Logger = log.logger() })
	for _, f := range fs {
		f.every.Store(3 << 20) // payloads for the most part, headers and handshakes now and then
	}
	flips := func() (n int64) {
		for _, f := range fs {
			n += f.flips.Load()
		}
		return n
	}
	rnd := rand.New(rand.NewPCG(5, 5))
	for n := 0; n < 12 || c.Stats().Corrupt == 0; n++ {
		for name, want := range k.data {
			off := rnd.Int64N(int64(len(want)))
			if err := checkRead(ctx, c, k.index(name), want, off, 1+rnd.IntN(2<<20)); err != nil {
				t.Fatalf("%s after %d flips: %v", name, flips(), err)
			}
		}
		if n%4 == 0 {
			c.Forget(k.index("f"))
			c.Forget(k.index("g"))
		}
		if n > 2000 {
			t.Fatalf("%d flips, none in a payload", flips())
		}
	}
	s := c.Stats()
	if len(log.with("failed its checksum", " file=/f ", "dataset="+testDataset)) == 0 {
		t.Errorf("the file that was corrupt on the way is not named: %q", log.buf.String())
	}
	if s.Refetched == 0 || s.Corrupt < s.Refetched {
		t.Fatalf("%d flips: %+v", flips(), s)
	}
	t.Logf("%d flips, %d payloads refused, %d refetched, %d from another worker", flips(), s.Corrupt, s.Refetched, s.Fallbacks)
}

func TestSnapshotChunkFlippedOnTheWireIsAskedForAgain(t *testing.T) {
	files := make(map[string][]byte)
	for _, name := range names(2000) {
		files[name] = nil
	}
	k := newTier(t, files)
	k.start("a")
	list := k.membership()
	f := newFlipper(t, list.Members[0].Addr)
	f.every.Store(100_000)
	list.Members[0].Addr = f.ln.Addr().String()
	c := k.dial(func(c *Config) { c.Membership = list })
	if c.Snapshot().Digest() != k.snap.Digest() || c.Snapshot().Files() != 2000 {
		t.Fatal("another snapshot")
	}
}

// A worker that hangs in the middle of a payload is found out, and the block comes from another.
func TestAWorkerThatHangsInTheMiddleOfAPayload(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 5<<20)})
	k.timing = impatient()
	k.start("a", "b")
	list := k.membership()
	o, _ := k.snap.Ring(k.index("f"))
	owner := list.Owners(o, 0, 1)[0]
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	defer wg.Wait()
	defer close(done)
	defer ln.Close()
	wg.Go(func() {
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", owner.Addr)
			if err != nil {
				a.Close()
				return
			}
			wg.Go(func() { <-done; a.Close(); b.Close() })
			wg.Go(func() { io.Copy(b, a) })
			wg.Go(func() {
				io.CopyN(a, b, 1<<20)
				<-done // says no more, and does not close
			})
		}
	})
	for n := range list.Members {
		if list.Members[n].ID == owner.ID {
			list.Members[n].Addr = ln.Addr().String()
		}
	}
	k.mu.Lock()
	k.list.Members = list.Members
	k.mu.Unlock()
	c := k.dial(func(c *Config) { c.Membership = list })
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 5<<20); err != nil {
		t.Fatal(err)
	}
	if c.Stats().Fallbacks == 0 {
		t.Fatal("the other worker was not asked")
	}
}
