package client

import (
	"sync/atomic"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// A block for the node's store is written as it is received, so what fails its sums in the middle of it has begun
// already: it is fetched again and written over, and no bytes of it count before all are right.
func TestAPayloadThatIsBadHalfwayIsPlacedAnew(t *testing.T) {
	data := map[string][]byte{"f": content(1, 2*ring.BlockSize+12345)}
	k := newTier(t, data)
	k.start("a")
	var spoiled atomic.Int64
	k.worker("a").set(func(r wire.Request) *answer {
		if r.Op == wire.OpRead && r.Flags&wire.FlagVerify == 0 && spoiled.Add(1) <= 3 {
			return &answer{flip: int(r.Length)/2 + 1}
		}
		return nil
	})
	st := openStore(t)
	c := k.dial(func(c *Config) { c.Store = st })
	lease, err := c.Lease(testContext(t), k.index("f"), testDeadline)
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Release()
	got := make([]byte, len(data["f"]))
	if _, err := lease.File.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if string(got) != string(data["f"]) {
		t.Error("wrong bytes")
	}
	if s := c.Stats(); s.Corrupt != 3 || s.Refetched != 3 {
		t.Errorf("%d corrupt, %d refetched, want 3 of each", s.Corrupt, s.Refetched)
	}
}
