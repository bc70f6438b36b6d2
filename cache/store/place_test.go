package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// placer writes a block in three pieces.
func placer(o ring.Object, n int64) FillPlace {
	return func(_ context.Context, w io.WriterAt) ([]uint64, error) {
		p := make([]byte, blockLen(o.Size, n))
		content(o, n, p)
		half := max(len(p)/2, 1)
		for _, part := range [][2]int{{half, len(p)}, {0, 1}, {1, half}} {
			if _, err := w.WriteAt(p[part[0]:part[1]], int64(part[0])); err != nil {
				return nil, err
			}
		}
		return checksum.All(p), nil
	}
}

// placers are both ways to have a block written where it is to stay.
var placers = map[string]func(*Store, context.Context, ring.Object, int64, FillPlace) (*Block, error){
	"placed": (*Store).Place, "placed with its first piece": (*Store).AcquirePlaced,
}

func TestAPlacedBlockIsAsGoodAsAnyOther(t *testing.T) {
	for name, place := range placers {
		t.Run(name, func(t *testing.T) { testPlaced(t, place) })
	}
}

func testPlaced(t *testing.T, place func(*Store, context.Context, ring.Object, int64, FillPlace) (*Block, error)) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, ring.BlockSize+checksum.Size+1)
	for n := range int64(2) {
		b, err := place(s, t.Context(), o, n, placer(o, n))
		if err != nil {
			t.Fatal(err)
		}
		if !b.Resident() || !s.Verify(b) {
			t.Errorf("block %d: resident %v", n, b.Resident())
		}
		check(t, o, n, b)
		b.Release()
		again, err := place(s, t.Context(), o, n, func(context.Context, io.WriterAt) ([]uint64, error) {
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
		"the fill fails halfway": {func(_ context.Context, w io.WriterAt) ([]uint64, error) {
			_, err := w.WriteAt(make([]byte, mib), 0)
			return nil, errors.Join(failed, err)
		}, failed},
		"not all is written": {func(_ context.Context, w io.WriterAt) ([]uint64, error) {
			p := make([]byte, ring.BlockSize)
			_, err := w.WriteAt(p[1:], 0)
			return checksum.All(p), err
		}, ErrInvalid},
		"a sum is missing": {func(_ context.Context, w io.WriterAt) ([]uint64, error) {
			p := make([]byte, ring.BlockSize)
			_, err := w.WriteAt(p, 0)
			return checksum.All(p)[1:], err
		}, ErrInvalid},
		"beyond the block": {func(_ context.Context, w io.WriterAt) ([]uint64, error) {
			_, err := w.WriteAt(make([]byte, 2), ring.BlockSize-1)
			return nil, err
		}, ErrInvalid},
		"before the block": {func(_ context.Context, w io.WriterAt) ([]uint64, error) {
			_, err := w.WriteAt(make([]byte, 2), -1)
			return nil, err
		}, ErrInvalid},
	} {
		for how, place := range placers {
			t.Run(how+": "+name, func(t *testing.T) {
				s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
				if _, err := place(s, t.Context(), o, 1, c.fill); !errors.Is(err, c.want) {
					t.Fatalf("%v, want %v", err, c.want)
				}
				if _, ok := s.Lookup(o, 1); ok {
					t.Error("the block is there")
				}
				if st := s.Stats(); st.Used != baseCost {
					t.Errorf("%d bytes are used, %d when empty", st.Used, int64(baseCost))
				}
				checkBooks(t, s)
				b, err := place(s, t.Context(), o, 1, placer(o, 1))
				if err != nil {
					t.Fatal(err)
				}
				check(t, o, 1, b)
				b.Release()
				checkBooks(t, s)
			})
		}
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
	_, err := s.Place(t.Context(), o, 0, func(context.Context, io.WriterAt) ([]uint64, error) {
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
	for name, place := range placers {
		t.Run(name, func(t *testing.T) {
			s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
			o := anObject(1, ring.BlockSize)
			begun := make(chan struct{})
			ended := make(chan error, 1)
			go func() {
				_, err := place(s, context.Background(), o, 0, func(ctx context.Context, _ io.WriterAt) ([]uint64, error) {
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
		})
	}
}

// Without room, the pieces are kept in a buffer and all who wait are served from it. Where no buffer is free the fill
// gives up what it has under way, and is called again once there is one.
func TestAPlacedBlockWithoutRoomIsServedFromHeap(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib, BufferBytes: ring.BlockSize})
	full := anObject(1, 3*ring.BlockSize)
	var held []*Block
	for n := range ring.Blocks(full.Size) {
		b := acquire(t, s, full, n)
		held = append(held, b) // in use: nothing can be evicted
	}
	first, second := anObject(2, ring.BlockSize), anObject(3, ring.BlockSize-1)
	b, err := s.AcquirePlaced(t.Context(), first, 0, placer(first, 0))
	if err != nil {
		t.Fatal(err)
	}
	if b.Resident() {
		t.Error("it is resident although nothing could be evicted")
	}
	check(t, first, 0, b)

	// The one buffer is in use now.
	var calls int
	refused := make(chan struct{})
	got := make(chan error, 1)
	go func() {
		other, err := s.AcquirePlaced(context.Background(), second, 0, func(ctx context.Context, w io.WriterAt) ([]uint64, error) {
			calls++
			sums, err := placer(second, 0)(ctx, w)
			if err != nil {
				close(refused)
			}
			return sums, err
		})
		if err == nil {
			p := make([]byte, second.Size)
			want := make([]byte, second.Size)
			content(second, 0, want)
			if _, err = other.ReadAt(p, 0); err == nil && !bytes.Equal(p, want) {
				err = errors.New("wrong bytes")
			}
			other.Release()
		}
		got <- err
	}()
	<-refused
	b.Release()
	if err := <-got; err != nil || calls != 2 {
		t.Errorf("%d calls, %v", calls, err)
	}
	for _, b := range held {
		b.Release()
	}
	checkBooks(t, s)
}

// A fill that never begins costs nobody his place: a bucket that does not answer must not empty the store.
func TestAPlacedBlockThatDoesNotComeEvictsNothing(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib})
	for k := range 8 {
		o := anObject(k, ring.BlockSize)
		acquire(t, s, o, 0).Release()
	}
	before := s.Stats()
	failed := errors.New("the bucket does not answer")
	for k := range 20 {
		o := anObject(100+k, ring.BlockSize)
		if _, err := s.AcquirePlaced(t.Context(), o, 0, func(context.Context, io.WriterAt) ([]uint64, error) { return nil, failed }); !errors.Is(err, failed) {
			t.Fatal(err)
		}
	}
	if after := s.Stats(); after.Blocks != before.Blocks || after.Evicted != before.Evicted || before.Evicted == 0 {
		t.Errorf("%d blocks and %d evicted, were %d and %d", after.Blocks, after.Evicted, before.Blocks, before.Evicted)
	}
	checkBooks(t, s)
}

// What the file system refuses although the quota allows it is served from heap.
func TestAPlacedBlockThatTheFileSystemRefuses(t *testing.T) {
	dir := ownTmpfs(t, 16*mib) // with its slack 32 MiB and a bit
	s := open(t, Options{Dir: dir, Quota: 64 * mib, Logger: quiet()})
	if err := os.WriteFile(filepath.Join(dir, "somebody-else"), make([]byte, 12*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	for k := range 20 {
		o := anObject(k, 3*mib)
		calls := 0
		b, err := s.AcquirePlaced(t.Context(), o, 0, func(ctx context.Context, w io.WriterAt) ([]uint64, error) {
			calls++
			return placer(o, 0)(ctx, w)
		})
		if err != nil {
			t.Fatal(err)
		}
		check(t, o, 0, b)
		if calls > 2 || calls == 2 && b.Resident() {
			t.Errorf("resident: %v after %d calls", b.Resident(), calls)
		}
		b.Release()
	}
	if s.Stats().NoSpace == 0 {
		t.Error("the file system had room for all: nothing was tested")
	}
	checkBooks(t, s)
}
