package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// FillPlace writes the whole of a block to w, at offsets within the block, one piece after the other, and returns
// its sums, with which it has compared what it wrote: nobody looks at that again. It returns soon after ctx ends.
type FillPlace func(ctx context.Context, w io.WriterAt) ([]uint64, error)

// ErrNoRoom: the policy refuses the block, or nothing can be evicted for it.
var ErrNoRoom = errors.New("no room in the store")

// Place is AcquireSummed past the store's buffers, for who receives a block piece by piece or has it in memory
// already: room is made first, and the fill writes to where the block is to stay. So it is ErrNoRoom where
// AcquireSummed serves from heap, and the fill is not called then.
func (s *Store) Place(ctx context.Context, o ring.Object, n int64, fill FillPlace) (*Block, error) {
	return s.acquire(ctx, o, n, true, func(ctx context.Context, fl *flight) { s.place(ctx, fl, fill) })
}

// AcquirePlaced is AcquireSummed for who receives a block piece by piece from where an answer may not come: room is
// made with the first piece. Where there is some, each piece is written to where the block is to stay, past the
// store's buffers, while the processor has it at hand; where there is none, the pieces are kept in a buffer and the
// block is served from heap. The fill is called again, to begin anew, where no buffer is free at once or the file
// system refuses what it had room for.
func (s *Store) AcquirePlaced(ctx context.Context, o ring.Object, n int64, fill FillPlace) (*Block, error) {
	return s.acquire(ctx, o, n, true, func(ctx context.Context, fl *flight) { s.arrive(ctx, fl, fill) })
}

// arrive fills one block and admits it with its first piece.
func (s *Store) arrive(ctx context.Context, fl *flight, fill FillPlace) {
	b := fl.b
	w := &arriving{placing: placing{b: b}, s: s}
	filled := func() (sums []uint64, err error) {
		if sums, err = fill(ctx, w); err == nil {
			err = w.check(sums)
		}
		return sums, err
	}
	sums, err := filled()
	if w.reserved {
		if err != nil && w.file != nil {
			s.closeFile(b.obj)
		}
		if s.wrote(b, err == nil, w.refused) {
			s.end(fl, nil, sums, nil)
			return
		}
	}
	if err != nil && w.again {
		// Whoever waits for a buffer must not keep an answer of the bucket waiting, which others need to free theirs.
		w.bytes = 0
		if w.heap, err = s.buffers.get(ctx, int(b.size)); err == nil {
			sums, err = filled()
		}
	}
	if err == nil {
		s.end(fl, w.heap, sums, nil)
		return
	}
	if w.heap != nil {
		w.heap.release()
	}
	if s.ctx.Err() != nil {
		err = errors.Join(ErrClosed, err)
	}
	s.end(fl, nil, nil, wrap(b, err))
}

// arriving is a block that is admitted with its first piece.
type arriving struct {
	placing
	s        *Store
	reserved bool    // there is room for it
	heap     *buffer // or else it is held here
	again    bool    // it must be begun anew, with a buffer
}

var errNoBuffer = errors.New("no buffer is free")

// WriteAt writes within the block.
func (w *arriving) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(w.b.size) {
		return w.placing.WriteAt(p, off) // says so
	}
	if !w.reserved && w.heap == nil {
		if w.reserved = w.s.reserve(w.b); !w.reserved {
			if w.heap = w.s.buffers.try(int(w.b.size)); w.heap == nil {
				w.again = true
				return 0, errNoBuffer
			}
		} else if w.file, w.refused = w.s.openFile(w.b.obj, true); w.refused != nil { // in use for end, as write leaves it
			w.file, w.again = nil, true
			return 0, w.refused
		}
	}
	if w.heap != nil {
		n := copy(w.heap.p[off:], p)
		w.bytes += int64(n)
		return n, nil
	}
	n, err := w.placing.WriteAt(p, off)
	if err != nil {
		w.again = true
	}
	return n, err
}

// place admits one block and has it written.
func (s *Store) place(ctx context.Context, fl *flight, fill FillPlace) {
	b := fl.b
	if !s.reserve(b) {
		s.end(fl, nil, nil, wrap(b, ErrNoRoom))
		return
	}
	var sums []uint64
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
func (w *placing) check(sums []uint64) error {
	if w.bytes < int64(w.b.size) || len(sums) != checksum.Count(int(w.b.size)) {
		return fmt.Errorf("%d bytes of a block of %d were written, with %d sums: %w", w.bytes, w.b.size, len(sums), ErrInvalid)
	}
	return nil
}
