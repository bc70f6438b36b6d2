package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	maxMends = 4096 // waiting
	// mendAgain is the wait between tries of blocks that could not be fetched: a bucket that is away gets one request
	// a minute for all of them.
	mendAgain = time.Minute
)

// mends is the bounded queue of blocks that were found corrupt, by the scrub or by the digest of the whole object.
// Kernels read leased files without asking for their blocks, and pinned ones are promised to be there, so they are
// fetched again unasked, into their place.
type mends chan mend

type mend struct {
	object ring.Object
	block  int64
	whole  bool // the object is wrong, whichever of its blocks is
}

// push queues a block that the scrub found. What is too much waits for somebody to ask for it: that much memory does not
// go bad by itself.
func (m mends) push(o ring.Object, block int64) {
	select {
	case m <- mend{object: o, block: block}:
	default:
	}
}

// pushAll queues the blocks of an object whose digest is another, as long as they leave room for what the scrub finds.
func (m mends) pushAll(o ring.Object) {
	for block := range ring.Blocks(o.Size) {
		if len(m) > cap(m)/2 {
			return // the next reader fetches it
		}
		select {
		case m <- mend{object: o, block: block, whole: true}:
		default:
			return
		}
	}
}

// keepMending works the queue off until ctx ends, one block at a time: where the memory itself is bad they come again
// with each round of the scrub, and ask no more of the bucket than the scrub reads.
func (w *Worker) keepMending(ctx context.Context) error {
	var failed []mend
	var again <-chan time.Time
	for {
		var m mend
		select {
		case <-ctx.Done():
			return nil
		case m = <-w.mends:
		case <-again:
			m, failed, again = failed[0], failed[1:], nil
		}
		pause := mendAgain
		if err := w.mend(ctx, m); err == nil {
			pause = 0 // the others, too
		} else if m.whole && errors.Is(err, wire.ErrNotOwner) {
			pause = 0 // another worker's by now, whose readers have it fetched
		} else if ctx.Err() == nil {
			final := errors.Is(err, source.ErrChanged) || errors.Is(err, source.ErrNotFound) || errors.Is(err, source.ErrInvalid) || len(failed) >= maxMends
			w.log.Warn("a block that was found corrupt was not fetched again", "error", err, "triedAgain", !final)
			if !final {
				failed = append(failed, m)
			}
		}
		if len(failed) > 0 && (again == nil || pause == 0) {
			again = w.clock.After(pause)
		}
	}
}

// mend fetches one block again. What is in no snapshot, as all that a writable dataset holds, is left to the next
// reader: nobody has such a file by descriptor.
func (w *Worker) mend(ctx context.Context, m mend) error {
	f, err := w.snapshots.find(m.object)
	if errors.Is(err, errNoSnapshot) && w.gateway != nil {
		err = fmt.Errorf("%w: a writable dataset has no snapshot", source.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("block %d of object %x: %w", m.block, m.object.ID, err)
	}
	ctx, cancel := context.WithTimeout(ctx, wire.WorkerTimeout)
	defer cancel()
	b, done, err := w.acquire(ctx, f, m.block, 0, budget{})
	if errors.Is(err, wire.ErrNotOwner) && !m.whole {
		// Who has the file open here reads on here, whoever owns it now.
		b, done, err = w.acquire(ctx, f, m.block, wire.FlagReadThrough, budget{})
	}
	if err != nil {
		return fmt.Errorf("block %d of %s: %w", m.block, f, err)
	}
	b.Release()
	done()
	if !m.whole { // which is told for the object
		w.log.Info("a block that was found corrupt was fetched again", "object", f.String(), "block", m.block)
	}
	return nil
}
