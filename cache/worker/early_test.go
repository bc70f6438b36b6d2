package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// blockOf is the question for one block of a leased file.
func blockOf(lease, size, block int64) wire.Request {
	return wire.Request{Op: wire.OpBlock, Index: uint32(lease), Off: blockOff(block), Length: int32(blockLen(size, block))}
}

// sums asks for one block of a leased file, and gives its sums.
func (c *receiver) sums(lease, size, block int64) ([]uint64, error) {
	_, p, _, err := c.exchange(blockOf(lease, size, block))
	if err != nil {
		return nil, err
	}
	return wire.SumList(p, int(blockLen(size, block)))
}

// readsThrough compares a block with what can be read through a lease's descriptor.
func readsThrough(t *testing.T, f *os.File, sums []uint64, want []byte, block int64) {
	t.Helper()
	want = want[blockOff(block):][:blockLen(int64(len(want)), block)]
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, blockOff(block)); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("block %d is not the file's", block)
	}
	if err := wire.CheckSums(want, sums); err != nil {
		t.Errorf("block %d: %v", block, err)
	}
}

func TestAnEarlyLeaseIsReadBlockByBlock(t *testing.T) {
	noGoroutines(t)
	want := content(2*ring.BlockSize+5, 1)
	size := int64(len(want))
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	c := tr.receive(0)
	rep, f, err := c.ask(wire.Request{Op: wire.OpLease, Flags: wire.FlagEarly, Index: i})
	if err != nil || f == nil || rep.Size != size {
		t.Fatalf("%+v, %v, %v", rep, f, err)
	}
	w := tr.workers[0]
	if gets, _ := tr.gates[0].counts(); gets != 0 || w.Status().OpenedBytes != 0 {
		t.Errorf("%d requests to the bucket and %d bytes counted for a lease", gets, w.Status().OpenedBytes)
	}
	for _, n := range []int64{2, 0, 2} {
		sums, err := c.sums(rep.Off, size, n)
		if err != nil {
			t.Fatal(err)
		}
		readsThrough(t, f, sums, want, n)
	}
	if gets, _ := tr.gates[0].counts(); gets != 2 {
		t.Errorf("%d requests to the bucket for two blocks", gets)
	}
	eventually(t, "they are counted as opened", func() error { // after the answer
		if got := w.Status().OpenedBytes; got != ring.BlockSize+10 {
			return fmt.Errorf("%d bytes", got)
		}
		return nil
	})
	for name, req := range map[string]wire.Request{
		"another's lease":   blockOf(rep.Off+1, size, 0),
		"no lease":          blockOf(0, size, 0),
		"within a block":    {Op: wire.OpBlock, Index: uint32(rep.Off), Off: 5, Length: ring.BlockSize},
		"a part of one":     {Op: wire.OpBlock, Index: uint32(rep.Off), Length: 5},
		"beyond the end":    {Op: wire.OpBlock, Index: uint32(rep.Off), Off: 3 * ring.BlockSize, Length: 5},
		"before the start":  {Op: wire.OpBlock, Index: uint32(rep.Off), Off: -ring.BlockSize, Length: ring.BlockSize},
		"more than is left": {Op: wire.OpBlock, Index: uint32(rep.Off), Off: 2 * ring.BlockSize, Length: ring.BlockSize},
	} {
		if _, _, err := c.ask(req); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := c.ask(wire.Request{Op: wire.OpRelease, Off: rep.Off}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.sums(rep.Off, size, 0); !errors.Is(err, source.ErrInvalid) {
		t.Errorf("after its release: %v", err)
	}
}

func TestReadersOfEarlyLeasesShareOneFill(t *testing.T) {
	noGoroutines(t)
	want := content(ring.BlockSize+7, 3)
	size := int64(len(want))
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	begun, release := make(chan struct{}, 8), make(chan struct{})
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		begun <- struct{}{}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	type answer struct {
		sums []uint64
		err  error
	}
	const n = 3
	answers := make(chan answer, n)
	for range n {
		c := tr.receive(0)
		rep, _, err := c.ask(wire.Request{Op: wire.OpLease, Flags: wire.FlagEarly, Index: i})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			sums, err := c.sums(rep.Off, size, 1)
			answers <- answer{sums, err}
		}()
	}
	<-begun
	eventually(t, "all wait for the one fill", func() error {
		if s := tr.workers[0].store.Stats(); s.Shared != n-1 {
			return fmt.Errorf("%d share it", s.Shared)
		}
		return nil
	})
	close(release)
	for range n {
		if a := <-answers; a.err != nil || wire.CheckSums(want[ring.BlockSize:], a.sums) != nil {
			t.Errorf("%+v", a)
		}
	}
	if gets, _ := tr.gates[0].counts(); gets != 1 {
		t.Errorf("%d requests to the bucket", gets)
	}
}

func TestABlockOfAnEarlyLeaseSaysWhyItIsNotThere(t *testing.T) {
	noGoroutines(t)
	const size = 1000
	tr := newTier(t, map[string][]byte{"f": content(size, 1)})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	c := tr.receive(0)
	rep, _, err := c.ask(wire.Request{Op: wire.OpLease, Flags: wire.FlagEarly, Index: i})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []error{source.ErrChanged, source.ErrNotFound, source.ErrDenied} {
		tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error { return fmt.Errorf("%w: %s", want, o.Key) })
		if _, err := c.sums(rep.Off, size, 0); !errors.Is(err, want) {
			t.Errorf("%v: %v", want, err)
		}
	}
}

func TestABlockOfAnEarlyLeaseIsFetchedAnew(t *testing.T) {
	noGoroutines(t)
	want := content(2*ring.BlockSize, 1)
	size := int64(len(want))
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	tr.workers[0].sourceTimeout = time.Second // after which a fill from a bucket that hangs makes way for another
	i := index(t, tr.snapshot(), "/f")
	c := tr.receive(0)
	rep, f, err := c.ask(wire.Request{Op: wire.OpLease, Flags: wire.FlagEarly, Index: i})
	if err != nil {
		t.Fatal(err)
	}
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error { <-ctx.Done(); return ctx.Err() })
	req := blockOf(rep.Off, size, 0)
	req.WaitMillis = 20
	if _, _, err := c.ask(req); err == nil {
		t.Error("a bucket that does not answer has answered")
	}
	tr.gates[0].set(nil)
	var sums []uint64
	eventually(t, "it is fetched anew", func() (err error) {
		sums, err = c.sums(rep.Off, size, 0)
		return err
	})
	readsThrough(t, f, sums, want, 0)

	// Dropped since: the block is in another file now.
	w := tr.workers[0]
	snap, file, err := w.resolve(wire.Request{Index: i})
	if err != nil {
		t.Fatal(err)
	}
	snap.release()
	w.store.Drop(file.ring)
	if _, err := c.sums(rep.Off, size, 0); !errors.Is(err, source.ErrInvalid) {
		t.Errorf("of a dropped file: %v", err)
	}
}

// A block that would take the place of others is not fetched for a lease: the reader gets it, and the policy decides,
// when it is read.
func TestABlockOfAnEarlyLeaseTakesNothingsPlace(t *testing.T) {
	noGoroutines(t)
	cold := content(2*ring.BlockSize, 1)
	size := int64(len(cold))
	tr := newTier(t, map[string][]byte{"cold": cold, "hot": content(3*ring.BlockSize, 2)})
	tr.config = func(_ int, c *Config) { c.Memory = 4*ring.BlockSize + 1<<20 }
	tr.start(1)
	snap := tr.snapshot()
	w, r, c := tr.workers[0], tr.dial(0), tr.receive(0)
	if _, err := r.file(index(t, snap, "/hot"), 3*ring.BlockSize, 0); err != nil {
		t.Fatal(err)
	}
	i := index(t, snap, "/cold")
	rep, f, err := c.ask(wire.Request{Op: wire.OpLease, Flags: wire.FlagEarly, Index: i})
	if err != nil {
		t.Fatal(err)
	}
	sums, err := c.sums(rep.Off, size, 0)
	if err != nil {
		t.Fatal(err)
	}
	readsThrough(t, f, sums, cold, 0)
	before, _ := tr.gates[0].counts()
	if _, err := c.sums(rep.Off, size, 1); !errors.Is(err, wire.ErrNotResident) {
		t.Errorf("a block for which there is no room: %v", err)
	}
	if gets, _ := tr.gates[0].counts(); gets != before {
		t.Error("it was fetched for nothing")
	}
	if got := w.store.Stats().Blocks; got != 4 {
		t.Errorf("%d blocks are held", got)
	}
	// One that the store holds is read this way, whoever brought it there.
	if p, err := r.read(i, ring.BlockSize, ring.BlockSize, 0); err != nil || !bytes.Equal(p, cold[ring.BlockSize:]) {
		t.Fatalf("%d bytes, %v", len(p), err)
	}
	readsThrough(t, f, sums, cold, 0)
}

func TestNoEarlyLeaseOfWhatIsNotOwnedOrTooLarge(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(3*ring.BlockSize, 1), "g": content(8*ring.BlockSize, 2)})
	tr.config = func(_ int, c *Config) { c.Memory = 8 * ring.BlockSize }
	tr.start(2)
	snap := tr.snapshot()
	owner := tr.owners(snap, "/f", 0)[0]
	early := wire.Request{Op: wire.OpLease, Flags: wire.FlagEarly, Index: index(t, snap, "/f")}
	if _, _, err := tr.receive(1 - owner).ask(early); !errors.Is(err, wire.ErrNotOwner) {
		t.Errorf("of a file that is another's: %v", err)
	}
	if _, f, err := tr.receive(owner).ask(early); err != nil || f == nil {
		t.Errorf("of its own: %v", err)
	}
	early.Index = index(t, snap, "/g")
	if _, _, err := tr.receive(tr.owners(snap, "/g", 0)[0]).ask(early); !errors.Is(err, wire.ErrNotResident) {
		t.Errorf("of more than it has room for: %v", err)
	}
}
