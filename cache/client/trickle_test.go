package client

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/wire"
)

// trickle stands before a worker and passes its answers on: so many bytes at once, then one at a time, each a
// sign of life.
func trickle(t *testing.T, addr string, first int64) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	t.Cleanup(func() { close(done); ln.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", addr)
			if err != nil {
				a.Close()
				return
			}
			wg.Go(func() { <-done; a.Close(); b.Close() })
			wg.Go(func() { io.Copy(b, a) })
			wg.Go(func() {
				if _, err := io.CopyN(a, b, first); err != nil {
					return
				}
				tick := time.NewTicker(5 * time.Millisecond)
				defer tick.Stop()
				for {
					if _, err := io.CopyN(a, b, 1); err != nil {
						return
					}
					select {
					case <-tick.C:
					case <-done:
						return
					}
				}
			})
		}
	})
	return ln.Addr().String()
}

// A worker whose answer comes byte by byte is alive by every ping, and yet its request goes elsewhere when its
// time is over: the buffer that it is received into is taken back for it.
func TestAWorkerWhoseAnswerTricklesIsGivenUpInTime(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 5<<20)})
	k.timing = impatient()
	k.timing.worker = 300 * time.Millisecond
	k.start("a", "b")
	list := k.membership()
	o, _ := k.snap.Ring(k.index("f"))
	owner := list.Owners(o, 0, 1)[0]
	for n := range list.Members {
		if list.Members[n].ID == owner.ID {
			list.Members[n].Addr = trickle(t, owner.Addr, 1<<20)
		}
	}
	k.mu.Lock()
	k.list.Members = list.Members
	k.mu.Unlock()
	for _, buffers := range []int64{0, 4 << 20} {
		c := k.dial(func(c *Config) { c.Membership, c.BufferBytes = list, buffers })
		ctx, cancel := context.WithTimeout(context.Background(), testDeadline)
		defer cancel()
		if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 5<<20); err != nil {
			t.Fatal(err)
		}
		if c.Stats().Fallbacks == 0 {
			t.Error("the other worker was not asked")
		}
		closed := make(chan struct{})
		go func() { c.Close(); close(closed) }()
		select {
		case <-closed:
		case <-time.After(testDeadline):
			t.Fatal("Close waits for the worker")
		}
	}
}

// An answer that waits for others on the same line is waited for while those come: asking anew or elsewhere would only
// make them more.
func TestAnAnswerOnACrowdedLineIsWaitedFor(t *testing.T) {
	k := newTier(t, map[string][]byte{"late": content(1, 4<<20), "crowd": content(2, 4<<20)})
	k.timing.worker = 2 * time.Second
	k.start("a")
	c := k.dial(nil)
	ctx := testContext(t)
	turn, asked := make(chan struct{}), make(chan struct{}, 100)
	late := k.index("late")
	k.worker("a").set(func(r wire.Request) *answer {
		if r.Index != late {
			return nil
		}
		asked <- struct{}{}
		return &answer{wait: turn}
	})
	done := make(chan error, 1)
	go func() { done <- checkRead(ctx, c, late, k.data["late"], 0, 4<<20) }()
	<-asked
	for begun := time.Now(); ; c.Forget(k.index("crowd")) {
		if err := checkRead(ctx, c, k.index("crowd"), k.data["crowd"], 0, 4<<20); err != nil {
			t.Fatal(err)
		}
		if time.Since(begun) < k.timing.worker*3/2 {
			continue
		}
		select {
		case <-turn:
		default:
			close(turn)
		}
		select {
		case err := <-done:
			if err != nil || len(asked) > 0 {
				t.Fatalf("asked for %d times more, %v", len(asked), err)
			}
			return
		default:
		}
	}
}
