package client

import (
	"bytes"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

func TestReadHeldAsksForWhatIsResidentOnly(t *testing.T) {
	data := map[string][]byte{
		"small": content(1, 100_001), "block": content(2, ring.BlockSize), "large": content(3, ring.BlockSize+1), "empty": nil,
	}
	k := newTier(t, data)
	k.start("a")
	c := k.dial(nil)
	var asked, others atomic.Int64
	var act atomic.Pointer[answer]
	k.worker("a").set(func(r wire.Request) *answer {
		asked.Add(1)
		if r.Flags != wire.FlagResidentOnly {
			others.Add(1)
		}
		return act.Load()
	})
	for _, name := range []string{"small", "block"} {
		p := make([]byte, len(data[name]))
		if err := c.ReadHeld(testContext(t), k.index(name), p); err != nil || !bytes.Equal(p, data[name]) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if st := c.Stats(); st.Buffered != 0 {
		t.Errorf("%d bytes are kept", st.Buffered)
	}
	for name, n := range map[string]int{"small": 100_000, "large": ring.BlockSize + 1, "empty": 0} {
		if err := c.ReadHeld(testContext(t), k.index(name), make([]byte, n)); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("%d bytes of %s: %v", n, name, err)
		}
	}
	if err := c.ReadHeld(testContext(t), catalog.Index(1<<30), make([]byte, 1)); !errors.Is(err, source.ErrInvalid) {
		t.Errorf("a file that does not exist: %v", err)
	}
	before := asked.Load()
	p := make([]byte, len(data["small"]))
	act.Store(&answer{status: wire.NotResident, text: "not here"})
	if err := c.ReadHeld(testContext(t), k.index("small"), p); !errors.Is(err, wire.ErrNotResident) {
		t.Errorf("what the worker does not hold: %v", err)
	}
	act.Store(&answer{flip: 70_000})
	if err := c.ReadHeld(testContext(t), k.index("small"), p); !errors.Is(err, wire.ErrCorrupt) {
		t.Errorf("bytes that fail their sums: %v", err)
	}
	if n := asked.Load() - before; n != 2 {
		t.Errorf("asked %d times for two files", n)
	}
	if others.Load() > 0 {
		t.Errorf("%d requests may make the worker fetch", others.Load())
	}
	c.Close()
	if err := c.ReadHeld(testContext(t), k.index("small"), p); !errors.Is(err, errClosed) {
		t.Errorf("of a closed client: %v", err)
	}
}
