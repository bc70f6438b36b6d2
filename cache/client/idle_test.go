package client

import (
	"bytes"
	"math/rand/v2"
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
	for range 128 { // experience: answers take no time
		c.latency.observe(1<<20, 1)
		c.latency.observe(1<<10, 1)
	}
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
