package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"github.com/stepcache/stepcache/cache/ring"
)

// Verify reads the block again and compares its sums. If they differ the block is no longer resident: it
// is counted, not found any more, and the next Acquire fills it again (in place where readers still have
// the file, which mends what they see). The caller releases b as always.
func (s *Store) Verify(b *Block) bool {
	if b.Check(0, int64(b.Len())) == nil {
		return true
	}
	if b.heap != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.b.state != resident || b.b.flight != nil {
		return false // found before, or being mended
	}
	s.log.Error("store: bytes do not match their checksums, the block will be fetched again", "object", name(b.b.obj.id), "block", b.b.n)
	s.stats.Corrupt++
	s.policyRemove(b.b)
	s.setState(b.b, corrupt)
	s.journal.del(b.b)
	s.setOut(b.b)
	return false
}

// leastScrubbed is what a block counts for in the rate of Scrub at least: a file is opened for each.
const leastScrubbed = 64 << 10

// Scrub verifies resident blocks at the given rate, round and round, until ctx ends; it returns ctx's error. It tells
// found of each whose sums differ, once: whoever reads the file through a lease asks for no block, so that nothing
// would fill it again. found is called under no lock of the store, and the scrub goes on when it returns.
func (s *Store) Scrub(ctx context.Context, bytesPerSecond int64, found func(o ring.Object, n int64)) error {
	if bytesPerSecond <= 0 {
		return fmt.Errorf("scrubbing %d bytes a second: %w", bytesPerSecond, ErrInvalid)
	}
	limit := rate.NewLimiter(rate.Limit(bytesPerSecond), ring.BlockSize)
	for {
		checked, err := s.scrubOnce(ctx, limit, found)
		if err != nil {
			return err
		}
		if checked == 0 {
			// Nothing is resident: look again later, not in a loop.
			t := time.NewTimer(time.Minute)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
			}
		}
	}
}

func (s *Store) scrubOnce(ctx context.Context, limit *rate.Limiter, found func(ring.Object, int64)) (checked int, err error) {
	s.mu.Lock()
	objects := make([]ring.Object, 0, len(s.objects))
	for id, o := range s.objects {
		objects = append(objects, ring.Object{ID: id, Size: o.size})
	}
	s.mu.Unlock()
	for _, o := range objects {
		for _, n := range s.residentBlocks(o) {
			if err := limit.WaitN(ctx, max(blockLen(o.Size, n), leastScrubbed)); err != nil {
				return checked, err
			}
			if s.scrubBlock(o, n, found) {
				checked++
			}
		}
	}
	return checked, ctx.Err()
}

func (s *Store) residentBlocks(o ring.Object) []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ns []int64
	if ob := s.objects[o.ID]; ob != nil && ob.size == o.Size {
		for n, b := range ob.blocks {
			if b.state == resident {
				ns = append(ns, n)
			}
		}
	}
	slices.Sort(ns)
	return ns
}

// scrubBlock verifies one block without counting as a use of it.
func (s *Store) scrubBlock(o ring.Object, n int64, found func(ring.Object, int64)) bool {
	s.mu.Lock()
	ob := s.objects[o.ID]
	if s.closed || ob == nil || ob.size != o.Size || ob.closing != nil {
		s.mu.Unlock()
		return false
	}
	b := ob.blocks[n]
	if b == nil || b.state != resident || b.flight != nil {
		s.mu.Unlock()
		return false
	}
	b.refs++
	ob.refs++
	s.stats.Scrubbed++
	sums := b.sums
	s.mu.Unlock()
	h, err := s.handle(b, sums)
	if err != nil {
		return false
	}
	good := s.Verify(h)
	h.Release()
	if !good {
		found(o, n)
	}
	return true
}
