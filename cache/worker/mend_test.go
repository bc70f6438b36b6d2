package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// Whoever reads a file through the kernel asks the worker for nothing: what goes bad below is mended unasked.
func TestALeasedFileThatGoesBadIsMended(t *testing.T) {
	noGoroutines(t)
	files := make(map[string][]byte)
	for k := range 16 {
		files[fmt.Sprintf("f%02d", k)] = content(ring.BlockSize+1000+int64(k), byte(k))
	}
	tr := newTier(t, files)
	tr.start(1)
	snap := tr.snapshot()
	for name, want := range files {
		if _, err := tr.dial(0).file(index(t, snap, "/"+name), int64(len(want)), 0); err != nil {
			t.Fatal(err)
		}
	}
	// A scrub that finds nothing at first looks again only after a while.
	tr.stop(0)
	tr.add(0)
	tr.setMembers()
	snap = tr.snapshot()
	c := tr.receive(0)
	leased := make(map[string]func(off int64) byte)
	for name := range files {
		_, f, err := c.ask(wire.Request{Op: wire.OpLease, Index: index(t, snap, "/"+name)})
		if err != nil {
			t.Fatal(err)
		}
		leased[name] = func(off int64) byte {
			b := make([]byte, 1)
			if _, err := f.ReadAt(b, off); err != nil {
				t.Error(err)
			}
			return b[0]
		}
	}
	rots := func(name string, off int64) {
		t.Helper()
		want := files[name]
		before := tr.workers[0].store.Stats().Corrupt
		flip(t, filepath.Join(tr.dir, "w0"), int64(len(want)), off)
		eventually(t, "the reader of the lease sees the right byte", func() error {
			if n := tr.workers[0].store.Stats().Corrupt; n != before+1 {
				return fmt.Errorf("%d blocks were found corrupt, not %d", n, before+1)
			}
			if got := leased[name](off); got != want[off] {
				return fmt.Errorf("%x, want %x", got, want[off])
			}
			return nil
		})
	}
	rots("f00", 70_000)
	rots("f00", 70_000) // again, in the same place
	rots("f01", ring.BlockSize+7)

	var asked atomic.Int32
	tr.gates[0].set(func(_ context.Context, _ source.Object, off int64) error {
		// Whether the bucket is away is asked by first bytes.
		if off > 0 && asked.Add(1) == 1 {
			return fmt.Errorf("%w: for a while", source.ErrUnavailable)
		}
		return nil
	})
	rots("f02", ring.BlockSize+5)
	if n := asked.Load(); n != 2 {
		t.Errorf("the bucket was asked %d times", n)
	}

	// The same where another worker owns the file by now.
	tr.add(1)
	tr.setMembers()
	snap = tr.snapshot()
	for name := range files {
		if tr.owners(snap, "/"+name, 0)[0] == 1 {
			rots(name, 99)
			return
		}
	}
	t.Error("the second worker owns nothing")
}

// What the bucket does not have any more is not asked for again and again, and keeps nothing else from being mended.
func TestWhatCannotBeMendedIsLeft(t *testing.T) {
	files := map[string][]byte{"gone": content(1000, 1), "f": content(2000, 2)}
	tr := newTier(t, files)
	tr.config = func(_ int, c *Config) { c.ScrubBytesPerSecond = -1 }
	tr.start(1)
	snap, w := tr.snapshot(), tr.workers[0]
	var asked atomic.Int32
	tr.gates[0].set(func(_ context.Context, o source.Object, _ int64) error {
		if o.Key != "gone" {
			return nil
		}
		asked.Add(1)
		return fmt.Errorf("%w: %s", source.ErrChanged, o.Key)
	})
	gone, _ := snap.Ring(index(t, snap, "/gone"))
	f, _ := snap.Ring(index(t, snap, "/f"))
	w.mends.push(gone, 0)
	w.mends.push(ring.Object{ID: source.ID{1}, Size: 2000}, 0) // of no snapshot
	w.mends.push(f, 0)
	eventually(t, "the last is there", func() error {
		if !w.store.Residency(f).Whole {
			return errors.New("not yet")
		}
		return nil
	})
	if n := asked.Load(); n != 1 {
		t.Errorf("what is gone was asked for %d times", n)
	}
	if p, err := tr.dial(0).file(index(t, snap, "/f"), 2000, wire.FlagResidentOnly); err != nil || !bytes.Equal(p, files["f"]) {
		t.Error(err)
	}
}

// A worker that takes puts will never know of what snapshot a block is, so that the block is not tried again.
func TestWhatIsInNoSnapshotOfAWritableDatasetIsLeft(t *testing.T) {
	tr := newTier(t, nil)
	tr.config = func(_ int, c *Config) {
		c.Mounts[0].URL = "s3://data/"
		c.Gateway = &GatewayConfig{Listen: "127.0.0.1:0", Bucket: "data", Credentials: t.TempDir()}
	}
	tr.start(1)
	if err := tr.workers[0].mend(t.Context(), mend{ring.Object{ID: source.ID{1}, Size: 2000}, 0, false}); !errors.Is(err, source.ErrNotFound) {
		t.Error(err)
	}
}
