package worker

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// maxRun is how many adjacent blocks a load asks for at once: a request costs both sides as much as half a megabyte,
// and beyond four blocks little is gained.
const maxRun = 4

// joinedFor is how long a reader waits for its turn in a run before its block is asked for alone. With what the bucket
// may take then it is less than what the reader waits for this worker.
const joinedFor = 3 * time.Second

const _ = uint64(wire.WorkerTimeout - wire.SourceTimeout - joinedFor)

// run is the fills of adjacent blocks that come in one answer of the bucket. The blocks stay what they are: each is
// summed and published by itself as its bytes arrive, and whoever wants one meanwhile waits for that. The fill whose
// turn it is reads from the answer and then passes it on. When the run is over, for whatever reason, those that had no
// turn ask for their blocks alone.
type run struct {
	w     *Worker
	f     file
	first int64 // block

	// body and cancel are of the fill whose turn it is.
	body   source.Body
	cancel context.CancelFunc

	turn [maxRun]chan struct{} // closed when it is the fill's turn
	over chan struct{}

	mu   sync.Mutex
	at   int          // whose turn it is
	left [maxRun]bool // had its turn, or does without
}

// begin begins to bring in a block and those after it, at most so many and at most maxRun, with one request to the
// bucket. It returns none where that is not for this worker alone to do, or the block is there or on its way, so that
// fill is to be asked for it. Whoever waits for a block calls checkWhole once it is resident.
func (w *Worker) begin(ctx context.Context, f file, v *view, copies int, first int64, most int) ([]store.Pending, error) {
	n := 0
	for n < min(most, maxRun) && w.fromBucketOnly(f, v, copies, first+int64(n)) {
		n++
	}
	if n < 2 {
		return nil, nil
	}
	return w.store.Begin(ctx, f.ring, first, n, newRun(w, f, first).fill)
}

// fromBucketOnly says whether fill gets a block from the bucket without asking other workers.
func (w *Worker) fromBucketOnly(f file, v *view, copies int, block int64) bool {
	owners, place := v.owners(w.config.ID, f.ring, block, copies)
	return place == 0 && len(w.members.view().former(f.ring, block, len(owners), w.isNew())) == 0
}

func newRun(w *Worker, f file, first int64) *run {
	r := &run{w: w, f: f, first: first, over: make(chan struct{})}
	for i := range r.turn {
		r.turn[i] = make(chan struct{})
	}
	close(r.turn[0])
	return r
}

// fill is a store.FillRun.
func (r *run) fill(ctx context.Context, p store.Part, to io.WriterAt) (sums []uint64, err error) {
	if r.wait(ctx, p) {
		sums, err = r.w.fromBucket(ctx, r.f, func(ctx context.Context, moved func()) ([]uint64, error) { return r.read(ctx, p, to, moved) })
		r.pass(p, err == nil)
	} else {
		sums, err = r.w.readSource(ctx, r.f, r.first+int64(p.I), to)
	}
	if err == nil {
		r.w.digests.dirty(r.f.ring.ID)
	}
	return sums, err
}

// read receives a block in its turn; the first asks for all.
func (r *run) read(ctx context.Context, p store.Part, to io.WriterAt, moved func()) (sums []uint64, err error) {
	own := ctx
	if p.I == 0 {
		own, r.cancel = context.WithCancel(context.WithoutCancel(ctx)) // the answer outlives this fill
	}
	stop := context.AfterFunc(ctx, r.cancel)
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err() // nobody waits for this block any more, and the answer is cut off for the next
		}
	}()
	if p.I == 0 {
		off := blockOff(r.first)
		length := min(blockOff(r.first+int64(p.Of)), r.f.ring.Size) - off
		if r.body, err = r.w.get(own, r.f, off, length); err != nil {
			return nil, err
		}
	}
	return r.w.receive(r.f, r.body, blockLen(r.f.ring.Size, r.first+int64(p.I)), to, moved)
}

// wait waits for a fill's turn and says whether it has one.
func (r *run) wait(ctx context.Context, p store.Part) bool {
	joined := p.Joined
	var enough <-chan time.Time
	for {
		select {
		case <-r.turn[p.I]:
			return r.leave(p)
		case <-r.over:
			return false
		case <-joined:
			joined, enough = nil, r.w.clock.After(joinedFor)
			continue
		case <-enough:
		case <-ctx.Done():
		}
		if r.leave(p) {
			r.end() // its turn came meanwhile
		}
		return false
	}
}

// leave notes that a fill waits no more, and says whether it has the turn, which it has once: a fill that begins anew
// asks for its block alone.
func (r *run) leave(p store.Part) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	had := r.left[p.I]
	r.left[p.I] = true
	return !had && r.at == p.I
}

// pass gives the turn to the next fill, if all is well and it still waits.
func (r *run) pass(p store.Part, well bool) {
	next := p.I + 1
	r.mu.Lock()
	if well = well && next < p.Of && !r.left[next]; well {
		r.at = next
	}
	r.mu.Unlock()
	if well {
		close(r.turn[next])
	} else {
		r.end()
	}
}

// end is called by the fill that has the turn.
func (r *run) end() {
	if r.body.ReadCloser != nil {
		r.body.Close()
	}
	if r.cancel != nil {
		r.cancel()
	}
	close(r.over)
}
