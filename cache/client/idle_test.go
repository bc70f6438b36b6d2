package client

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/wire"
)

// open is how many connections the worker has.
func (w *fake) open() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.conns)
}

func TestAConnectionOverWhichNothingIsAskedIsClosed(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.timing.ping, k.timing.idle = 5*time.Millisecond, 50*time.Millisecond
	k.start("a")
	c := k.dial(nil)
	w := k.worker("a")
	read := func() error { return c.ReadHeld(testContext(t), k.index("f"), make([]byte, 1000)) }
	for range 2 {
		if err := read(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the end of a connection", func() bool { return w.open() == 0 })
	}
	// One that an answer is waited for over is not.
	open := make(chan struct{})
	w.set(func(wire.Request) *answer { return &answer{wait: open} })
	done := make(chan error, 1)
	go func() { done <- read() }()
	var conn *conn
	peer := c.members.view().peers["a"]
	eventually(t, "a request", func() bool { conn = peer.live(); return conn != nil && conn.load() > 0 })
	eventually(t, "some answers to pings", func() bool { return conn.rx.Load() > 20*wire.ReplySize })
	close(open)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestNoRequestMeetsTheEndOfAnIdleConnection(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.start("a")
	c := k.dial(nil)
	peer := c.members.view().peers["a"]
	var readers sync.WaitGroup
	enough, over := make(chan struct{}), make(chan struct{})
	for range 4 {
		readers.Go(func() {
			p := make([]byte, 1000)
			for !isClosed(enough) {
				// No second try is made for this one.
				if err := c.ReadHeld(testContext(t), k.index("f"), p); err != nil || !bytes.Equal(p, k.data["f"]) {
					t.Error(err)
					return
				}
			}
		})
	}
	go func() { readers.Wait(); close(over) }()
	for ends := 0; ends < 100 && !isClosed(over); time.Sleep(rand.N(100 * time.Microsecond)) {
		if peer.live() == nil {
			continue
		}
		peer.rest() // if nothing is under way
		if peer.live() == nil {
			ends++
		}
	}
	close(enough)
	<-over
}

func TestRemindersLeaveNoConnections(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.timing.remind = 20 * time.Millisecond
	k.start("a", "b", "c")
	k.dial(nil)
	var reminded [3]atomic.Int64
	all := func() (open int) {
		for _, id := range []string{"a", "b", "c"} {
			open += k.worker(id).open()
		}
		return open
	}
	for i, id := range []string{"a", "b", "c"} {
		on := func(r wire.Request) *answer {
			reminded[i].Add(1)
			return nil
		}
		k.worker(id).other.Store(&on)
	}
	eventually(t, "reminders", func() bool { return reminded[0].Load() > 1 && reminded[1].Load() > 1 && reminded[2].Load() > 1 })
	eventually(t, "the end of the reminders' connections", func() bool { return all() == 1 }) // the snapshot's
}

func TestAHedgeWithoutAConnectionHasOneMade(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 9<<20)})
	k.start("a", "b")
	c := k.dial(func(c *Config) { c.Copies = 2 })
	experienced(c)
	ws := k.owners("f", 0)
	second := c.members.view().peers[ws[1].id]
	second.rest()
	open := make(chan struct{})
	ws[0].set(func(wire.Request) *answer { return &answer{wait: open} })
	done := make(chan error, 1)
	go func() { done <- checkRead(testContext(t), c, k.index("f"), k.data["f"], 1<<20, 100_000) }()
	eventually(t, "a connection", func() bool { return second.live() != nil })
	close(open)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// A connection to a worker that is cut off takes seconds to fail: where there is another copy no read waits for that.
func TestACopyIsReadWhileTheFirstWorkerIsDialled(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 9<<20)})
	k.start("a", "b", "c")
	var hole atomic.Pointer[string] // what is sent to this address is lost
	var open chan struct{}
	c := k.dial(func(c *Config) {
		c.Copies = 2
		c.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if lost := hole.Load(); lost != nil && *lost == addr {
				<-open
				ctx = context.WithoutCancel(ctx) // however long the test took
			}
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		}
	})
	experienced(c)
	ws := k.owners("f", 0)
	first := c.members.view().peers[ws[0].id]
	eventually(t, "the end of its connection", func() bool { first.rest(); return first.live() == nil })
	open = make(chan struct{})
	opened := sync.OnceFunc(func() { close(open) })
	defer opened()
	hole.Store(&ws[0].addr)
	read := func(off int64) error {
		done := make(chan error, 1)
		go func() { done <- checkRead(testContext(t), c, k.index("f"), k.data["f"], off, 100_000) }()
		return wait(t, "the read", done)
	}
	ws[1].set(func(wire.Request) *answer { return &answer{} }) // as an owner, also of what it does not hold yet
	if err := read(1 << 20); err != nil {
		t.Fatal(err)
	}
	first.mu.Lock()
	dialing := first.dialing
	first.mu.Unlock()
	if dialing == nil || isClosed(dialing.done) {
		t.Error("nobody dials the first any more")
	}
	// Once there is a connection it is asked for what the bucket has lost.
	ws[1].set(func(wire.Request) *answer { opened(); return &answer{status: wire.Changed} })
	if err := read(3 << 20); err != nil {
		t.Fatal(err)
	}
	if len(ws[0].seen()) == 0 || len(ws[2].seen()) > 0 {
		t.Errorf("the first was asked %d times, and one that is no owner %d times", len(ws[0].seen()), len(ws[2].seen()))
	}
}

// Where the other copy's worker is down it is the bucket that would be asked instead.
func TestASlowDialIsWaitedForWhereTheOtherCopyIsDown(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 9<<20)})
	k.start("a", "b", "c")
	var slow atomic.Pointer[string]
	c := k.dial(func(c *Config) {
		c.Copies = 2
		c.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if s := slow.Load(); s != nil && *s == addr {
				sleep(ctx, 4*dialPatience)
				ctx = context.WithoutCancel(ctx) // however long the test took
			}
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		}
	})
	experienced(c)
	ws := k.owners("f", 0)
	peers := c.members.view().peers
	first, second := peers[ws[0].id], peers[ws[1].id]
	ws[1].stop()
	eventually(t, "the second is known to be down", func() bool { second.wake(); return second.isDown() })
	eventually(t, "the end of the first's connection", func() bool { first.rest(); return first.live() == nil })
	slow.Store(&ws[0].addr)
	if err := checkRead(testContext(t), c, k.index("f"), k.data["f"], 1<<20, 100_000); err != nil {
		t.Fatal(err)
	}
	if len(ws[0].seen()) == 0 || len(ws[2].seen()) > 0 {
		t.Errorf("the first was asked %d times, and one that is no owner %d times", len(ws[0].seen()), len(ws[2].seen()))
	}
}
