package store

import (
	"context"
	"io"

	"github.com/stepcache/stepcache/cache/ring"
)

// FillRun is FillPlace for one block of a run. The fills of a run are called at once: how they take turns is theirs.
// A fill that is called again, as AcquirePlaced says, has the same Part.
type FillRun func(ctx context.Context, p Part, w io.WriterAt) ([]uint64, error)

// Part is which block of a run a fill is for.
type Part struct {
	// I counts the blocks of the run from 0; there are Of.
	I, Of int
	// Joined is closed when somebody else than who began the run waits for the block.
	Joined <-chan struct{}
}

// Pending is a block whose fill was begun. Whoever began it waits for it.
type Pending struct {
	s  *Store
	fl *flight
}

// Begin begins the fills of adjacent blocks, for who receives them one after the other: from block n on, at most so
// many, up to the first that is not absent. Each is filled as by AcquirePlaced, and shared with all who want it
// meanwhile. It returns none where block n itself is there or on its way.
func (s *Store) Begin(ctx context.Context, o ring.Object, n int64, most int, fill FillRun) ([]Pending, error) {
	if err := checkBlock(o, n); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	ob, err := s.object(o)
	if err != nil {
		return nil, err
	}
	defer s.tidy(ob)
	of := 0
	for ob.closing == nil && of < most && n+int64(of) < ring.Blocks(o.Size) && ob.blocks[n+int64(of)] == nil {
		of++
	}
	begun := make([]Pending, 0, of)
	for i := range of {
		joined := make(chan struct{})
		b := s.start(ctx, ob, n+int64(i), nil, true, func(ctx context.Context, fl *flight) {
			s.arrive(ctx, fl, func(ctx context.Context, w io.WriterAt) ([]uint64, error) {
				return fill(ctx, Part{I: i, Of: of, Joined: joined}, w)
			})
		})
		b.flight.joined = joined
		s.join(b.flight)
		begun = append(begun, Pending{s, b.flight})
	}
	return begun, nil
}

// Wait returns the block in use once it is filled, or the error of its fill. It is called once; who leaves with the
// end of ctx gives the block up.
func (p Pending) Wait(ctx context.Context) (*Block, error) { return p.s.await(ctx, p.fl) }
