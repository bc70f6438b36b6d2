package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// handOverAsks is how many blocks a leaving worker has its successors take at once.
	handOverAsks = 16
	// handOverTries is how often a new owner is asked for one block.
	handOverTries = 5
	// handOverPatience is how long one that is not ready yet is asked for one block: what a kubelet may take to update
	// its mounted list, and more than a restart takes.
	handOverPatience = 2 * time.Minute
)

// unready says whether a new owner does not answer, does not follow the membership yet or has no such snapshot yet,
// all of which passes.
func unready(err error) bool {
	var unreachable *errPeer
	return errors.As(err, &unreachable) || errors.Is(err, wire.ErrNotOwner) || errors.Is(err, wire.ErrUnknownSnapshot)
}

// keepHandingOver gives this worker's blocks to their new owners whenever the membership says that it
// leaves. The new owners pull: what a load pins there is pinned before it is pulled and makes room for
// itself; everything else is taken only where it displaces nothing.
func (w *Worker) keepHandingOver(ctx context.Context) error {
	for {
		v := w.members.view()
		if v.leaves(w.config.ID) {
			w.handOver(ctx, v)
		} else {
			w.handedOver.Store(nil)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-v.replaced:
		}
	}
}

// handOver goes once over what the store holds of the current snapshot and of the others, by which somebody may still
// read what the bucket does not have any more. It ends early when the membership is replaced: the next round finds what
// was handed already.
func (w *Worker) handOver(ctx context.Context, v *view) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-v.replaced:
			cancel()
		case <-ctx.Done():
		}
	}()
	defer func() { cancel(); <-watched }()

	var total, handed, dropped atomic.Int64
	tell := func(done bool) {
		w.handedOver.Store(&wire.HandOver{Epoch: v.Epoch, Total: total.Load(), Handed: handed.Load(), Dropped: dropped.Load(), Done: done})
	}
	tell(false)
	cur, ok := w.snapshots.get(wire.Digest{})
	for ; !ok && w.gateway == nil; cur, ok = w.snapshots.get(wire.Digest{}) {
		// One that restarted while it leaves holds what it held, and will know of what snapshot.
		if w.store.Stats().Blocks == 0 {
			tell(true)
			return
		}
		if w.sleep(ctx, pollInterval) != nil {
			return
		}
	}
	snaps := w.snapshots.all()
	if ok {
		cur.release()
	}
	defer func() {
		for _, snap := range snaps {
			snap.release()
		}
	}()
	var lost sync.Map // takers that take nothing: nobody waits for them block by block
	var g errgroup.Group
	g.SetLimit(handOverAsks)
	for at, snap := range snaps {
		snap.Walk(0, func(i catalog.Index) bool {
			f, ok := snap.file(i)
			if !ok || w.store.Residency(f.ring).Blocks == 0 || at > 0 && among(snaps[:at], snap.Path(i), f) {
				return true
			}
			bitmap := w.store.Bitmap(f.ring)
			for block := range ring.Blocks(f.ring.Size) {
				if at := int(block / 8); at >= len(bitmap) || bitmap[at]&(1<<(block%8)) == 0 {
					continue
				}
				if ctx.Err() != nil {
					return false
				}
				size := blockLen(f.ring.Size, block)
				total.Add(size)
				g.Go(func() error {
					if w.give(ctx, v, &lost, f, block) {
						handed.Add(size)
					} else {
						dropped.Add(size)
					}
					tell(false)
					return nil
				})
			}
			return true
		})
	}
	g.Wait()
	if rest := w.store.Stats().Bytes - total.Load(); w.gateway != nil && rest > 0 {
		// What is in no snapshot is known by its version only, not by a name that a new owner could ask the bucket for.
		total.Add(rest)
		dropped.Add(rest)
	}
	if ctx.Err() == nil {
		tell(true)
		w.log.Info("handed over", "epoch", v.Epoch, "total", total.Load(), "handed", handed.Load(), "dropped", dropped.Load())
	}
}

// among says whether one of the snapshots has the same version of the file.
func among(snaps []*snapshot, path string, f file) bool {
	return slices.ContainsFunc(snaps, func(snap *snapshot) bool {
		i, ok := snap.Lookup(path)
		if !ok {
			return false
		}
		r, ok := snap.Ring(i)
		return ok && r.ID == f.ring.ID
	})
}

// taker is a new owner, of what is of one snapshot or, without a digest, of anything.
type taker struct {
	id       string
	snapshot wire.Digest
}

// takes says whether a new owner is not lost for a file.
func takes(lost *sync.Map, m ring.Member, f file) bool {
	_, any := lost.Load(taker{id: m.ID})
	_, this := lost.Load(taker{m.ID, f.snapshot})
	return !any && !this
}

// give has one block's new owners take it; false when not all of them did.
func (w *Worker) give(ctx context.Context, v *view, lost *sync.Map, f file, block int64) bool {
	owners := v.Owners(f.ring, block, w.config.Copies)
	given := len(owners) > 0
	for _, m := range owners {
		if !takes(lost, m, f) {
			given = false
			continue
		}
		if err := w.giveTo(ctx, v, lost, m, f, block); err != nil {
			if ctx.Err() != nil {
				return false // which says nothing of m
			}
			if unready(err) {
				of := taker{id: m.ID}
				if errors.Is(err, wire.ErrUnknownSnapshot) {
					of.snapshot = f.snapshot // it may have no room for an old one
				}
				if _, known := lost.LoadOrStore(of, true); !known {
					w.log.Warn("a new owner takes nothing of what this worker hands over", "to", m.ID, "error", err)
				}
			}
			w.log.Debug("block not handed over", "to", m.ID, "object", f.String(), "block", block, "error", err)
			given = false
		}
	}
	return given
}

// giveTo has one new owner take a block, and ends also once another found that the owner takes nothing.
func (w *Worker) giveTo(ctx context.Context, v *view, lost *sync.Map, m ring.Member, f file, block int64) error {
	wait := newBackoff()
	var waited time.Duration
	for try := 1; ; try++ {
		asked := w.clock.Now()
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, wire.WorkerTimeout)
			defer cancel()
			req := wire.Request{
				Op: wire.OpHandOver, Flags: wire.FlagHandOver, Epoch: v.Epoch, Snapshot: f.snapshot, Index: f.index,
				Off: blockOff(block), Length: int32(blockLen(f.ring.Size, block)),
			}
			_, _, err := w.peers.frame(ctx, m, req)
			return err
		}()
		waited += w.clock.Now().Sub(asked)
		if err == nil || errors.Is(err, wire.ErrNotResident) { // no room is final
			return err
		}
		again := try < handOverTries
		if unready(err) {
			again = takes(lost, m, f) && waited < handOverPatience
		}
		pause := wait.NextBackOff()
		if !again || w.sleep(ctx, pause) != nil {
			return err
		}
		waited += pause
	}
}

// takeOver makes a block resident that its leaving owner offers, unless that would displace others.
func (w *Worker) takeOver(ctx context.Context, req wire.Request, f file, budget budget) error {
	block := req.Off / ring.BlockSize
	if req.Off < 0 || req.Length <= 0 || req.Off%ring.BlockSize != 0 || int64(req.Length) != blockLen(f.ring.Size, block) {
		return fmt.Errorf("%w: %s: %d bytes from %d are not one block to be handed over", source.ErrInvalid, f, req.Length, req.Off)
	}
	end, ok := w.promise(f, block, 0)
	defer end()
	if !ok {
		return fmt.Errorf("%w: worker %s has no room for block %d of %s", wire.ErrNotResident, w.config.ID, block, f)
	}
	ctx, cancel := context.WithTimeout(ctx, waitOf(req))
	defer cancel()
	b, done, err := w.acquire(ctx, f, block, 0, budget)
	if err != nil {
		return err
	}
	defer done()
	defer b.Release()
	if !b.Resident() {
		return fmt.Errorf("%w: worker %s did not keep block %d of %s", wire.ErrNotResident, w.config.ID, block, f)
	}
	return nil
}
