package store

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// waiters waits until n callers wait for a block.
func waiters(t *testing.T, s *Store, o ring.Object, n int64, want int) {
	t.Helper()
	eventually(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		ob := s.objects[o.ID]
		return ob != nil && ob.blocks[n] != nil && ob.blocks[n].flight != nil && ob.blocks[n].flight.waiters == want
	})
}

func TestABlockIsFilledOnceHoweverManyAsk(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, checksum.Size+1)
	var fills atomic.Int32
	gate := make(chan struct{})
	fill := func(ctx context.Context, p []byte) error {
		fills.Add(1)
		<-gate
		return filler(o, 0)(ctx, p)
	}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			b, err := s.Acquire(context.Background(), o, 0, fill)
			if err != nil {
				t.Error(err)
				return
			}
			check(t, o, 0, b)
			b.Release()
		})
	}
	waiters(t, s, o, 0, 100)
	close(gate)
	wg.Wait()
	if fills.Load() != 1 {
		t.Errorf("%d fills", fills.Load())
	}
	if st := s.Stats(); st.Misses != 1 || st.Shared != 99 {
		t.Errorf("%+v", st)
	}
	checkBooks(t, s)
}

func TestAnErrorGoesToAllWhoWaitAndToNobodyLater(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 1000)
	boom := errors.New("boom")
	gate := make(chan struct{})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			_, err := s.Acquire(context.Background(), o, 0, func(_ context.Context, p []byte) error {
				<-gate
				content(o, 0, p)
				return boom
			})
			if !errors.Is(err, boom) {
				t.Errorf("got %v", err)
			}
		})
	}
	waiters(t, s, o, 0, 10)
	close(gate)
	wg.Wait()
	if n := files(t, s.dir); n != 0 {
		t.Errorf("a failed fill left %d files", n)
	}
	if st := s.Stats(); st.Used != baseCost {
		t.Errorf("a failed fill left %d bytes", st.Used-baseCost)
	}
	load(t, s, o)
	checkBooks(t, s)
}

func TestACallerThatLeavesDoesNotStopTheOthers(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 1000)
	gate := make(chan struct{})
	fill := func(ctx context.Context, p []byte) error {
		<-gate
		if ctx.Err() != nil {
			t.Error("the fill was cancelled while one waits")
		}
		return filler(o, 0)(ctx, p)
	}
	ctx, cancel := context.WithCancel(context.Background())
	first := make(chan error, 1)
	go func() {
		_, err := s.Acquire(ctx, o, 0, fill)
		first <- err
	}()
	waiters(t, s, o, 0, 1)
	second := make(chan error, 1)
	go func() {
		b, err := s.Acquire(context.Background(), o, 0, fill)
		if err == nil {
			check(t, o, 0, b)
			b.Release()
		}
		second <- err
	}()
	waiters(t, s, o, 0, 2)
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the one that left: %v", err)
	}
	close(gate)
	if err := <-second; err != nil {
		t.Errorf("the one that stayed: %v", err)
	}
	checkBooks(t, s)
}

func TestTheLastCallerToLeaveCancelsTheFillAndTheNextTriesAgain(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	cancelled, finish := make(chan struct{}), make(chan struct{})
	var running atomic.Int32
	done := make(chan error, 1)
	go func() {
		_, err := s.Acquire(ctx, o, 0, func(ctx context.Context, p []byte) error {
			running.Add(1)
			defer running.Add(-1)
			<-ctx.Done()
			close(cancelled)
			<-finish
			return ctx.Err()
		})
		done <- err
	}()
	waiters(t, s, o, 0, 1)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	<-cancelled
	// A caller who comes while the cancelled fill is still ending waits for it and then fills anew.
	next := make(chan struct{})
	go func() {
		defer close(next)
		b, err := s.Acquire(context.Background(), o, 0, func(ctx context.Context, p []byte) error {
			if running.Load() != 0 {
				t.Error("two fills at a time")
			}
			return filler(o, 0)(ctx, p)
		})
		if err != nil {
			t.Error(err)
			return
		}
		check(t, o, 0, b)
		b.Release()
	}()
	close(finish)
	<-next
	checkBooks(t, s)
}

func TestAnEndedContextGetsNothing(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	o := anObject(1, 1000)
	if _, err := s.Acquire(ctx, o, 0, filler(o, 0)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if st := s.Stats(); st.Misses != 0 {
		t.Error("a fill was started")
	}
}

func TestCloseEndsFillsUnderWay(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 1000)
	done := make(chan error, 1)
	go func() {
		_, err := s.Acquire(context.Background(), o, 0, func(ctx context.Context, p []byte) error {
			<-ctx.Done()
			return ctx.Err()
		})
		done <- err
	}()
	waiters(t, s, o, 0, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestFillsWaitForBuffersInLine(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib, BufferBytes: 2 * ring.BlockSize})
	o := anObject(1, 12*ring.BlockSize)
	var now, most atomic.Int32
	var wg sync.WaitGroup
	for n := range int64(12) {
		wg.Go(func() {
			b, err := s.Acquire(context.Background(), o, n, func(ctx context.Context, p []byte) error {
				k := now.Add(1)
				for m := most.Load(); k > m && !most.CompareAndSwap(m, k); m = most.Load() {
				}
				defer now.Add(-1)
				return filler(o, n)(ctx, p)
			})
			if err != nil {
				t.Error(err)
				return
			}
			check(t, o, n, b)
			b.Release()
		})
	}
	wg.Wait()
	if most.Load() > 2 {
		t.Errorf("%d fills at a time with buffers for two", most.Load())
	}
	eventually(t, func() bool { // those of the last fill are given back after its end
		s.buffers.mu.Lock()
		defer s.buffers.mu.Unlock()
		return s.buffers.used == 0 && s.buffers.kept <= s.buffers.total
	})
}

// timed is a context whose deadline is when a test says.
type timed struct {
	context.Context
	up chan struct{}
}

func (c timed) Done() <-chan struct{} { return c.up }
func (c timed) Err() error {
	select {
	case <-c.up:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// A reader whose time was up finds the fill that it began; one that went away ends it, and so does one that does not
// come again. What nobody waits for in the end is kept.
func TestAFillGoesOnForWhoseTimeWasUp(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	gate := make(chan struct{})
	var fills atomic.Int32
	var wg sync.WaitGroup
	// read waits for a block as a reader does that leaves by leave.
	read := func(ctx context.Context, o ring.Object, leave func(), want error) {
		t.Helper()
		wg.Go(func() {
			b, err := s.Acquire(ctx, o, 0, func(ctx context.Context, p []byte) error {
				fills.Add(1)
				select {
				case <-gate:
					return filler(o, 0)(ctx, p)
				case <-ctx.Done():
					return ctx.Err()
				}
			})
			if !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
			if err == nil {
				check(t, o, 0, b)
				b.Release()
			}
		})
		waiters(t, s, o, 0, 1)
		leave()
	}
	late := func(o ring.Object) {
		t.Helper()
		up := make(chan struct{})
		read(timed{t.Context(), up}, o, func() { close(up) }, context.DeadlineExceeded)
		wg.Wait()
	}
	again, gone, unwatched, forgotten := anObject(1, 1000), anObject(2, 1000), anObject(3, 1000), anObject(4, 1000)
	late(again)
	late(unwatched)
	ctx, cancel := context.WithCancel(t.Context())
	read(ctx, gone, cancel, context.Canceled)
	wg.Wait()
	eventually(t, func() bool { return flights(s, gone) == 0 })
	s.lingers = time.Millisecond
	late(forgotten)
	eventually(t, func() bool { return flights(s, forgotten) == 0 })
	if n := flights(s, again) + flights(s, unwatched); n != 2 {
		t.Errorf("%d fills go on", n)
	}
	read(t.Context(), again, func() { close(gate) }, nil)
	wg.Wait()
	if n := fills.Load(); n != 4 {
		t.Errorf("%d fills of 4 blocks", n)
	}
	eventually(t, func() bool { return s.Residency(unwatched).Blocks == 1 })
	b, ok := s.Lookup(unwatched, 0)
	if !ok {
		t.Fatal("it is not there")
	}
	check(t, unwatched, 0, b)
	b.Release()
	checkBooks(t, s)
}

// Of fills that nobody waits for a few go on at once, and none that waits for another worker.
func TestFewFillsGoOnForNobody(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	hang := func(ctx context.Context, _ []byte) error {
		<-ctx.Done()
		return ctx.Err()
	}
	var wg sync.WaitGroup
	late := func(i int, acquire func(ctx context.Context, o ring.Object) error) (o ring.Object) {
		o = anObject(i, 1000)
		up := make(chan struct{})
		wg.Go(func() {
			if err := acquire(timed{t.Context(), up}, o); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v", err)
			}
		})
		waiters(t, s, o, 0, 1)
		close(up)
		wg.Wait()
		return o
	}
	peers := late(0, func(ctx context.Context, o ring.Object) error {
		_, err := s.AcquireSummed(ctx, o, 0, func(ctx context.Context, p []byte) ([]uint64, error) { return nil, hang(ctx, p) })
		return err
	})
	eventually(t, func() bool { return flights(s, peers) == 0 })
	var all []ring.Object
	for i := range maxLingering + 3 {
		all = append(all, late(i+1, func(ctx context.Context, o ring.Object) error {
			_, err := s.Acquire(ctx, o, 0, hang)
			return err
		}))
	}
	eventually(t, func() bool {
		n := 0
		for _, o := range all {
			n += flights(s, o)
		}
		return n == maxLingering
	})
	s.mu.Lock()
	n := s.lingering
	s.mu.Unlock()
	if n != maxLingering {
		t.Errorf("%d are counted", n)
	}
}

// flights is how many fills of an object are under way.
func flights(s *Store, o ring.Object) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ob := s.objects[o.ID]; ob != nil {
		for _, b := range ob.blocks {
			if b.flight != nil {
				n++
			}
		}
	}
	return n
}
