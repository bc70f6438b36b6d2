package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/stepcache/stepcache/cache/ring"
)

// FillPlace writes the whole of a block to w, at offsets within the block, one piece after the other, and returns
// its sums, with which it has compared what it wrote: nobody looks at that again. It returns soon after ctx ends.
type FillPlace func(ctx context.Context, w io.WriterAt) ([]uint32, error)

// ErrNoRoom: the policy refuses the block, or nothing can be evicted for it.
var ErrNoRoom = errors.New("no room in the store")

// Place is AcquireSummed past the store's buffers, for who receives a block piece by piece or has it in memory
// already: room is made first, and the fill writes to where the block is to stay. So it is ErrNoRoom where
// AcquireSummed serves from heap, and the fill is not called then.
func (s *Store) Place(ctx context.Context, o ring.Object, n int64, fill FillPlace) (*Block, error) {
	return s.acquire(ctx, o, n, func(ctx context.Context, fl *flight) { s.place(ctx, fl, fill) })
}

// place admits one block and has it written.
func (s *Store) place(ctx context.Context, fl *flight, fill FillPlace) {
	b := fl.b
	if !s.reserve(b) {
		s.end(fl, nil, nil, wrap(b, ErrNoRoom))
		return
	}
	var sums []uint32
	w := &placing{b: b}
	f, err := s.openFile(b.obj, true) // and left in use for end, as write does
	if err == nil {
		w.file = f
		if sums, err = fill(ctx, w); err == nil {
			err = w.check(sums)
		}
		if err != nil {
			s.closeFile(b.obj)
		}
	} else {
		w.refused = err
	}
	if s.wrote(b, err == nil, w.refused) {
		s.end(fl, nil, sums, nil)
		return
	}
	switch {
	case w.refused != nil:
		err = fmt.Errorf("%w: %w", ErrNoRoom, w.refused)
	case s.ctx.Err() != nil:
		err = errors.Join(ErrClosed, err)
	}
	s.end(fl, nil, nil, wrap(b, err))
}

// placing writes one block to its place.
type placing struct {
	b       *block
	file    *os.File
	bytes   int64
	refused error // by the file system
}

// WriteAt writes within the block.
func (w *placing) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(w.b.size) {
		return 0, fmt.Errorf("%d bytes at %d of a block of %d: %w", len(p), off, w.b.size, ErrInvalid)
	}
	n, err := w.file.WriteAt(p, w.b.off()+off)
	if err != nil {
		w.refused = err
	}
	w.bytes += int64(n)
	return n, err
}

// check refuses what cannot be the whole block with its sums.
func (w *placing) check(sums []uint32) error {
	if w.bytes < int64(w.b.size) || len(sums) != sumsIn(int(w.b.size)) {
		return fmt.Errorf("%d bytes of a block of %d were written, with %d sums: %w", w.bytes, w.b.size, len(sums), ErrInvalid)
	}
	return nil
}
