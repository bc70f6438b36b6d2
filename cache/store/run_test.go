package store

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
)

// inTurn fills the blocks of a run from n on, one after the other.
func inTurn(o ring.Object, n int64) FillRun {
	var mu sync.Mutex
	cond := sync.NewCond(&mu)
	at := 0
	return func(ctx context.Context, p Part, w io.WriterAt) ([]uint64, error) {
		mu.Lock()
		for at < p.I {
			cond.Wait()
		}
		mu.Unlock()
		sums, err := placer(o, n+int64(p.I))(ctx, w)
		mu.Lock()
		at++
		cond.Broadcast()
		mu.Unlock()
		return sums, err
	}
}

// await waits for all of a run.
func await(t *testing.T, o ring.Object, n int64, run []Pending) {
	t.Helper()
	for i, p := range run {
		b, err := p.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		check(t, o, n+int64(i), b)
		b.Release()
	}
}

func TestARunEndsBeforeTheFirstBlockThatIsNotAbsent(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	o := anObject(1, 9*ring.BlockSize+1)
	acquire(t, s, o, 3).Release()
	gate := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		b, err := s.Acquire(context.Background(), o, 6, func(ctx context.Context, p []byte) error {
			<-gate
			return filler(o, 6)(ctx, p)
		})
		if err == nil {
			b.Release()
		}
		done <- err
	}()
	waiters(t, s, o, 6, 1)
	for _, c := range []struct {
		from       int64
		most, want int
	}{
		{3, 4, 0}, // it is there
		{6, 4, 0}, // it is on its way
		{0, 0, 0},
		{0, 2, 2},
		{2, 4, 1}, // before one that is there
		{4, 9, 2}, // before one that is on its way
		{7, 9, 3}, // the last of the object is short
	} {
		run, err := s.Begin(t.Context(), o, c.from, c.most, inTurn(o, c.from))
		if err != nil || len(run) != c.want {
			t.Fatalf("from %d at most %d: %d blocks, %v; want %d", c.from, c.most, len(run), err, c.want)
		}
		await(t, o, c.from, run)
	}
	close(gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if r := s.Residency(o); !r.Whole {
		t.Errorf("%+v", r)
	}
	if st := s.Stats(); st.Misses != 10 || st.Shared != 0 {
		t.Errorf("%+v", st)
	}
	checkBooks(t, s)
}

func TestARunOfWhatCannotBe(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	o := anObject(1, ring.BlockSize)
	for _, n := range []int64{-1, 1} {
		if _, err := s.Begin(t.Context(), o, n, 4, nil); !errors.Is(err, ErrInvalid) {
			t.Errorf("from block %d of one: %v", n, err)
		}
	}
	acquire(t, s, o, 0).Release()
	if _, err := s.Begin(t.Context(), ring.Object{ID: o.ID, Size: 2}, 0, 4, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("an object of another size: %v", err)
	}
	// What nothing is begun of is forgotten.
	other := anObject(2, ring.BlockSize)
	if run, err := s.Begin(t.Context(), other, 0, 0, nil); err != nil || len(run) != 0 {
		t.Errorf("%d blocks, %v", len(run), err)
	}
	s.mu.Lock()
	if s.objects[other.ID] != nil {
		t.Error("an object of which nothing was begun is remembered")
	}
	s.mu.Unlock()
	s.Close()
	if _, err := s.Begin(t.Context(), o, 0, 4, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// Who wants a block of a run shares its fill, which is told so, and stays when those who began the run leave.
func TestAReaderJoinsABlockOfARun(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	o := anObject(1, 3*ring.BlockSize)
	gate := make(chan struct{})
	joined, cancelled := make(chan int, 3), make(chan int, 3)
	ctx, cancel := context.WithCancel(context.Background())
	run, err := s.Begin(ctx, o, 0, 3, func(ctx context.Context, p Part, w io.WriterAt) ([]uint64, error) {
		select {
		case <-p.Joined:
			joined <- p.I
		case <-ctx.Done():
			cancelled <- p.I
			return nil, ctx.Err()
		}
		<-gate
		return placer(o, int64(p.I))(ctx, w)
	})
	if err != nil || len(run) != 3 {
		t.Fatal(len(run), err)
	}
	var wg sync.WaitGroup
	for range 2 { // the second one joins too, which is told once
		wg.Go(func() {
			b, err := s.Acquire(context.Background(), o, 1, func(context.Context, []byte) error {
				t.Error("filled twice")
				return nil
			})
			if err != nil {
				t.Error(err)
				return
			}
			check(t, o, 1, b)
			b.Release()
		})
	}
	waiters(t, s, o, 1, 3)
	if i := <-joined; i != 1 {
		t.Errorf("block %d was joined", i)
	}
	cancel()
	for i, p := range run {
		if _, err := p.Wait(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("block %d: %v", i, err)
		}
	}
	if a, b := <-cancelled, <-cancelled; a+b != 2 || a == b {
		t.Errorf("the fills of %d and %d were cancelled", a, b)
	}
	close(gate)
	wg.Wait()
	for _, n := range []int64{0, 2} {
		if _, ok := s.Lookup(o, n); ok {
			t.Errorf("block %d is there", n)
		}
	}
	checkBooks(t, s)
}

func TestAFailedFillOfARunFailsOnlyItsBlock(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	o := anObject(1, 4*ring.BlockSize)
	failed := errors.New("failed")
	run, err := s.Begin(t.Context(), o, 0, 4, func(ctx context.Context, p Part, w io.WriterAt) ([]uint64, error) {
		if p.I == 1 {
			_, err := w.WriteAt(make([]byte, mib), 0)
			return nil, errors.Join(failed, err)
		}
		return placer(o, int64(p.I))(ctx, w)
	})
	if err != nil || len(run) != 4 {
		t.Fatal(len(run), err)
	}
	for i, p := range run {
		b, err := p.Wait(t.Context())
		if (i == 1) != errors.Is(err, failed) {
			t.Errorf("block %d: %v", i, err)
		}
		if err == nil {
			check(t, o, int64(i), b)
			b.Release()
		}
	}
	checkBooks(t, s)
	load(t, s, o)
	checkBooks(t, s)
}

// Without room and with a buffer for one block only, the others of a run are called again once there is one: nobody
// holds what another waits for.
func TestARunWithoutRoomIsServedFromHeap(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 16 * mib, BufferBytes: ring.BlockSize})
	full := anObject(1, 3*ring.BlockSize)
	var held []*Block
	for n := range ring.Blocks(full.Size) {
		held = append(held, acquire(t, s, full, n)) // in use: nothing can be evicted
	}
	o := anObject(2, 4*ring.BlockSize)
	run, err := s.Begin(t.Context(), o, 0, 4, func(ctx context.Context, p Part, w io.WriterAt) ([]uint64, error) {
		return placer(o, int64(p.I))(ctx, w)
	})
	if err != nil || len(run) != 4 {
		t.Fatal(len(run), err)
	}
	var wg sync.WaitGroup
	for i, p := range run {
		wg.Go(func() {
			b, err := p.Wait(context.Background())
			if err != nil {
				t.Error(err)
				return
			}
			if b.Resident() {
				t.Errorf("block %d is resident although nothing could be evicted", i)
			}
			check(t, o, int64(i), b)
			b.Release()
		})
	}
	wg.Wait()
	for _, b := range held {
		b.Release()
	}
	checkBooks(t, s)
}

func TestCloseEndsARun(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	o := anObject(1, 3*ring.BlockSize)
	run, err := s.Begin(context.Background(), o, 0, 3, func(ctx context.Context, _ Part, _ io.WriterAt) ([]uint64, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for i, p := range run {
		if _, err := p.Wait(context.Background()); !errors.Is(err, ErrClosed) {
			t.Errorf("block %d: %v", i, err)
		}
	}
}
