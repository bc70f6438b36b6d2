package store

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
)

// placer writes a block in three pieces.
func placer(o ring.Object, n int64) FillPlace {
	return func(_ context.Context, w io.WriterAt) ([]uint32, error) {
		p := make([]byte, blockLen(o.Size, n))
		content(o, n, p)
		for _, part := range [][2]int{{len(p) / 2, len(p)}, {0, 1}, {1, len(p) / 2}} {
			if _, err := w.WriteAt(p[part[0]:part[1]], int64(part[0])); err != nil {
				return nil, err
			}
		}
		return sumsOf(p), nil
	}
}

func TestAPlacedBlockIsAsGoodAsAnyOther(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, ring.BlockSize+SumSize+1)
	for n := range int64(2) {
		b, err := s.Place(t.Context(), o, n, placer(o, n))
		if err != nil {
			t.Fatal(err)
		}
		if !b.Resident() || !s.Verify(b) {
			t.Errorf("block %d: resident %v", n, b.Resident())
		}
		check(t, o, n, b)
		b.Release()
		again, err := s.Place(t.Context(), o, n, func(context.Context, io.WriterAt) ([]uint32, error) {
			t.Error("a block that is there was filled again")
			return nil, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		again.Release()
	}
	l, err := s.Lease(o)
	if err != nil {
		t.Fatal(err)
	}
	l.Release()
	checkBooks(t, s)
}

func TestAFailedPlaceLeavesNothing(t *testing.T) {
	failed := errors.New("failed")
	o := anObject(1, 2*ring.BlockSize)
	for name, c := range map[string]struct {
		fill FillPlace
		want error
	}{
		"the fill fails halfway": {func(_ context.Context, w io.WriterAt) ([]uint32, error) {
			_, err := w.WriteAt(make([]byte, mib), 0)
			return nil, errors.Join(failed, err)
		}, failed},
		"not all is written": {func(_ context.Context, w io.WriterAt) ([]uint32, error) {
			p := make([]byte, ring.BlockSize)
			_, err := w.WriteAt(p[1:], 0)
			return sumsOf(p), err
		}, ErrInvalid},
		"a sum is missing": {func(_ context.Context, w io.WriterAt) ([]uint32, error) {
			p := make([]byte, ring.BlockSize)
			_, err := w.WriteAt(p, 0)
			return sumsOf(p)[1:], err
		}, ErrInvalid},
		"beyond the block": {func(_ context.Context, w io.WriterAt) ([]uint32, error) {
			_, err := w.WriteAt(make([]byte, 2), ring.BlockSize-1)
			return nil, err
		}, ErrInvalid},
		"before the block": {func(_ context.Context, w io.WriterAt) ([]uint32, error) {
			_, err := w.WriteAt(make([]byte, 2), -1)
			return nil, err
		}, ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
			if _, err := s.Place(t.Context(), o, 1, c.fill); !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if _, ok := s.Lookup(o, 1); ok {
				t.Error("the block is there")
			}
			if st := s.Stats(); st.Used != baseCost {
				t.Errorf("%d bytes are used, %d when empty", st.Used, int64(baseCost))
			}
			checkBooks(t, s)
			b, err := s.Place(t.Context(), o, 1, placer(o, 1))
			if err != nil {
				t.Fatal(err)
			}
			check(t, o, 1, b)
			b.Release()
			checkBooks(t, s)
		})
	}
}

// Where there is no room the fill is not even called; who joined and can do with heap gets the block all the same.
func TestPlaceNeedsRoom(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	full := anObject(1, 4*ring.BlockSize)
	var held []*Block
	for n := range ring.Blocks(full.Size) {
		b := acquire(t, s, full, n)
		held = append(held, b) // in use: nothing can be evicted
	}
	o := anObject(2, ring.BlockSize)
	_, err := s.Place(t.Context(), o, 0, func(context.Context, io.WriterAt) ([]uint32, error) {
		t.Error("filled without room")
		return nil, nil
	})
	if !errors.Is(err, ErrNoRoom) {
		t.Fatal(err)
	}
	b := acquire(t, s, o, 0)
	check(t, o, 0, b)
	b.Release()
	for _, b := range held {
		b.Release()
	}
	checkBooks(t, s)
}

// Close ends a fill that waits, and tells its caller.
func TestCloseEndsAPlace(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, ring.BlockSize)
	begun := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		_, err := s.Place(context.Background(), o, 0, func(ctx context.Context, _ io.WriterAt) ([]uint32, error) {
			close(begun)
			<-ctx.Done()
			return nil, ctx.Err()
		})
		ended <- err
	}()
	<-begun
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}
