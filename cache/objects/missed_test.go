package objects

import (
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
)

// A worker that missed a list is not sure of its names until it has asked the others, although it is their owner by
// every list that it has seen: by the one that it missed another may have been.
func TestAWorkerThatMissedAListIsNotSureOfItsNames(t *testing.T) {
	now := time.Now()
	owns := func(l ring.Membership) bool { return len(l.Members) > 0 && l.Members[0].ID == "w0" }
	list := func(epoch uint64) ring.Membership {
		return ring.Membership{Epoch: epoch, Members: []ring.Member{{ID: "w0"}, {ID: "w1"}}}
	}
	for _, c := range []struct {
		name string
		next uint64
		want bool
	}{{"the next list", 4, true}, {"the one after that", 5, false}} {
		e := epochs{
			self: "w0", back: true, list: list(3), past: []ring.Membership{list(3)}, settled: true, looked: now,
			ask: make(map[string]ring.Member), changed: make(chan struct{}),
		}
		e.peers.init()
		if _, ok := e.sure(now, owns); !ok {
			t.Fatal("not sure under a settled list")
		}
		e.follow(list(c.next), now)
		if s, ok := e.sure(now, owns); ok != c.want || s.settled || s.Epoch != c.next {
			t.Errorf("%s: sure: %v, settled: %v, epoch %d", c.name, ok, s.settled, s.Epoch)
		}
	}
}
