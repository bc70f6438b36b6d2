package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/bucket"
)

// still is a clock on which no time passes, so that blocks take none, and on which the patience of who joined a run
// ends when the test says so.
type still struct {
	quick
	now     time.Time
	patient chan time.Time
}

func (s still) Now() time.Time { return s.now }

func (s still) After(d time.Duration) <-chan time.Time {
	if d == joinedFor {
		return s.patient
	}
	return s.quick.After(d)
}

// largeSize is nine blocks, the last of which is short.
const largeSize = 8*ring.BlockSize + 12345

// runs is a tier of one worker whose loads make runs of four blocks of the file "large", since there are so many small
// ones besides.
type runs struct {
	*tier
	large   []byte
	index   uint32
	patient chan time.Time
	asked   chan [2]int64 // ranges of large that the source was asked for
	wrap    func(source.Source) source.Source
}

func newRuns(t *testing.T, change func(*runs)) *runs {
	t.Helper()
	noGoroutines(t)
	files := map[string][]byte{"large": content(largeSize, 1)}
	for i := range leastRuns*maxRun - 9 {
		files[fmt.Sprintf("small/%03d", i)] = content(1000, byte(i))
	}
	r := &runs{tier: newTier(t, files), large: files["large"], patient: make(chan time.Time), asked: make(chan [2]int64, 1000)}
	g := &gate{}
	r.deps = func(int) Deps {
		return Deps{Clock: still{now: time.Now(), patient: r.patient}, OpenSource: func(ctx context.Context, c source.Config) (*scheme.Source, error) {
			s, err := scheme.Open(ctx, c)
			if err != nil {
				return nil, err
			}
			var inner source.Source = noted{s, r.asked}
			if r.wrap != nil {
				inner = r.wrap(inner)
			}
			return &scheme.Source{Source: gated{inner, g}, Meter: s.Meter}, nil
		}}
	}
	if change != nil {
		change(r)
	}
	r.start(1)
	r.gates[0] = g
	r.index = index(t, r.snapshot(), "/large")
	return r
}

// noted notes what is asked of the large file.
type noted struct {
	source.Source
	asked chan [2]int64
}

func (s noted) Get(ctx context.Context, o source.Object, off, n int64) (source.Body, error) {
	if o.Size == largeSize {
		s.asked <- [2]int64{off / ring.BlockSize, ring.Blocks(n)}
	}
	return s.Source.Get(ctx, o, off, n)
}

// requests are the ranges of large that were asked for until now: block and number of blocks, in order.
func (r *runs) requests() (out [][2]int64) {
	for {
		select {
		case a := <-r.asked:
			out = append(out, a)
			continue
		default:
		}
		slices.SortFunc(out, func(a, b [2]int64) int { return slices.Compare(a[:], b[:]) })
		return out
	}
}

func (r *runs) want(ranges ...[2]int64) {
	r.t.Helper()
	if got := r.requests(); !slices.Equal(got, ranges) {
		r.t.Errorf("asked for %v, want %v", got, ranges)
	}
}

// whole checks that every byte of the large file is resident.
func (r *runs) whole() {
	r.t.Helper()
	if p, err := r.dial(0).file(r.index, largeSize, wire.FlagResidentOnly); err != nil || !bytes.Equal(p, r.large) {
		r.t.Errorf("the large file: %v", err)
	}
}

// block reads one block of the large file, as a reader that does not know of the load.
func (r *runs) block(c *reader, n int64) error {
	p, err := c.read(r.index, blockOff(n), int(blockLen(largeSize, n)), 0)
	if err == nil && !bytes.Equal(p, r.large[blockOff(n):][:len(p)]) {
		err = errors.New("wrong bytes")
	}
	return err
}

// hold makes requests for the first block of the large file wait until release, or until they are given up.
func (r *runs) hold() (held chan struct{}, release func()) {
	held, free := make(chan struct{}, 1), make(chan struct{})
	r.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		if o.Size == largeSize && off == 0 {
			held <- struct{}{}
			select {
			case <-free:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	return held, sync.OnceFunc(func() { close(free) })
}

// joined waits until a reader shares a fill.
func (r *runs) joined() {
	r.t.Helper()
	eventually(r.t, "the reader joins", func() error {
		if n := r.workers[0].store.Stats().Shared; n != 1 {
			return fmt.Errorf("%d share", n)
		}
		return nil
	})
}

func TestALoadAsksForAdjacentBlocksAtOnce(t *testing.T) {
	r := newRuns(t, nil)
	before := r.workers[0].Status().SourceBytes
	r.load(wire.LoadRequest{ID: "l"})
	s := r.waitLoad(0, "l")
	if !s.Done || s.Resident != s.Total || s.Fetched != s.Total {
		t.Errorf("%+v", s)
	}
	r.want([2]int64{0, 4}, [2]int64{4, 4}, [2]int64{8, 1})
	if got := r.workers[0].Status().SourceBytes - before; got != s.Total {
		t.Errorf("%d bytes left the source, want %d", got, s.Total)
	}
	if gets, _ := r.gates[0].counts(); gets != leastRuns*maxRun-9+3 {
		t.Errorf("%d requests", gets)
	}
	r.whole()
}

// A block that is there, or that somebody else brings in, ends a run before it and is not asked for again.
func TestARunOfALoadLeavesOutWhatIsThere(t *testing.T) {
	r := newRuns(t, nil)
	c := r.dial(0)
	for _, n := range []int64{2, 4} {
		if err := r.block(c, n); err != nil {
			t.Fatal(err)
		}
	}
	r.want([2]int64{2, 1}, [2]int64{4, 1})
	r.load(wire.LoadRequest{ID: "l"})
	if s := r.waitLoad(0, "l"); !s.Done || s.Fetched != s.Total-2*ring.BlockSize {
		t.Errorf("%+v", s)
	}
	r.want([2]int64{0, 2}, [2]int64{3, 1}, [2]int64{5, 3}, [2]int64{8, 1})
	r.whole()
}

// With few blocks each is asked for by itself, so that they come over many connections.
func TestASmallLoadAsksForEachBlock(t *testing.T) {
	r := newRuns(t, nil)
	r.load(wire.LoadRequest{ID: "l", Paths: []string{"/large"}})
	if s := r.waitLoad(0, "l"); !s.Done {
		t.Errorf("%+v", s)
	}
	var each [][2]int64
	for n := range int64(9) {
		each = append(each, [2]int64{n, 1})
	}
	r.want(each...)
}

// Runs are shorter where blocks take long.
func TestRunsAreShorterWhereTheBucketIsSlow(t *testing.T) {
	items := make([]item, 10)
	for i := range items {
		items[i] = item{7, int32(i)}
	}
	items[9].index = 8
	for pace, want := range map[time.Duration]int{0: 4, runTime / 100: 4, runTime / 4: 4, runTime / 3: 3, runTime / 2: 2, runTime: 1, time.Hour: 1} {
		l := &load{}
		l.pace.Store(int64(pace))
		if n := l.adjacent(items, maxRun); n != want {
			t.Errorf("blocks take %v: %d at once, want %d", pace, n, want)
		}
	}
	l := &load{}
	if n := l.adjacent(items[8:], maxRun); n != 1 {
		t.Errorf("%d blocks of two files at once", n)
	}
	if n := l.adjacent([]item{{7, 1}, {7, 3}}, maxRun); n != 1 {
		t.Errorf("%d blocks that are not adjacent", n)
	}
}

func TestAReaderWaitsForItsTurnInARun(t *testing.T) {
	r := newRuns(t, nil)
	held, release := r.hold()
	defer release()
	r.load(wire.LoadRequest{ID: "l"})
	<-held
	got := make(chan error, 1)
	c := r.dial(0)
	go func() { got <- r.block(c, 2) }()
	r.joined()
	release()
	if err := <-got; err != nil {
		t.Error(err)
	}
	if s := r.waitLoad(0, "l"); !s.Done || s.Fetched != s.Total {
		t.Errorf("%+v", s)
	}
	r.want([2]int64{0, 4}, [2]int64{4, 4}, [2]int64{8, 1})
	r.whole()
}

// A reader does not wait for ever for the blocks before its own: its block is asked for alone then, and the run ends
// before it.
func TestAReaderOfARunThatStallsGetsItsBlockAlone(t *testing.T) {
	r := newRuns(t, nil)
	held, release := r.hold()
	defer release()
	r.load(wire.LoadRequest{ID: "l"})
	<-held
	got := make(chan error, 1)
	c := r.dial(0)
	go func() { got <- r.block(c, 2) }()
	r.patient <- time.Time{}
	if err := <-got; err != nil { // while the first is still held
		t.Error(err)
	}
	release()
	if s := r.waitLoad(0, "l"); !s.Done || s.Fetched != s.Total {
		t.Errorf("%+v", s)
	}
	r.want([2]int64{0, 4}, [2]int64{2, 1}, [2]int64{3, 1}, [2]int64{4, 4}, [2]int64{8, 1})
	r.whole()
}

// A load that is deleted takes its runs with it, but not the block that a reader waits for.
func TestAReaderOfARunWhoseLoadIsDeletedGetsItsBlock(t *testing.T) {
	r := newRuns(t, nil)
	held, release := r.hold()
	defer release()
	r.load(wire.LoadRequest{ID: "l"})
	<-held
	got := make(chan error, 1)
	c := r.dial(0)
	go func() { got <- r.block(c, 2) }()
	r.joined()
	if _, err := r.control(0, "DELETE", wire.PathLoads+"/l", nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// cutting cuts off the first answer for all of a run, in the middle of its second block.
type cutting struct {
	source.Source
	once *sync.Once
	err  error
}

func (s cutting) Get(ctx context.Context, o source.Object, off, n int64) (source.Body, error) {
	b, err := s.Source.Get(ctx, o, off, n)
	if err == nil && o.Size == largeSize && off == 0 && n > ring.BlockSize {
		s.once.Do(func() {
			b.ReadCloser = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(io.LimitReader(b.ReadCloser, 3*ring.BlockSize/2), failing{s.err}), b.ReadCloser}
		})
	}
	return b, err
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// What had arrived stays, the block that was under way fails as any other does and is tried again, and the others are
// asked for alone.
func TestARunThatBreaksFailsOnlyTheBlockUnderWay(t *testing.T) {
	for name, err := range map[string]error{"an error": fmt.Errorf("%w: injected", source.ErrUnavailable), "an end": io.EOF} {
		t.Run(name, func(t *testing.T) {
			r := newRuns(t, func(r *runs) {
				r.wrap = func(s source.Source) source.Source { return cutting{s, &sync.Once{}, err} }
			})
			r.load(wire.LoadRequest{ID: "l"})
			if s := r.waitLoad(0, "l"); !s.Done || s.FailedFiles != 0 {
				t.Errorf("%+v", s)
			}
			got := r.requests()
			for _, want := range [][2]int64{{0, 4}, {1, 1}, {2, 1}, {3, 1}} {
				if n := len(slices.DeleteFunc(slices.Clone(got), func(a [2]int64) bool { return a != want })); n != 1 {
					t.Errorf("%v was asked for %d times: %v", want, n, got)
				}
			}
			r.whole()
		})
	}
}

// TestARunOfAnObjectThatChangedFails: no byte of another version gets in by a run.
func TestARunOfAnObjectThatChangedFails(t *testing.T) {
	r := newRuns(t, nil)
	r.gates[0].set(func(_ context.Context, o source.Object, _ int64) error {
		if o.Size == largeSize {
			return fmt.Errorf("%w: injected", source.ErrChanged)
		}
		return nil
	})
	r.load(wire.LoadRequest{ID: "l"})
	s := r.waitLoad(0, "l")
	if s.Done || s.FailedFiles != 1 || len(s.Failures) != 1 || s.Failures[0].Path != "/large" || s.Resident != s.Total-largeSize {
		t.Errorf("%+v", s)
	}
}

// A fill that is begun anew, since the store had neither room nor a buffer, has had its turn: it asks for its block
// alone, as do those after it.
func TestAFillOfARunThatBeginsAnew(t *testing.T) {
	r := newRuns(t, nil)
	w := r.workers[0]
	snap, _ := w.snapshots.get(wire.Digest{})
	defer snap.release()
	f, ok := snap.file(r.index)
	if !ok {
		t.Fatal("no such file")
	}
	run := newRun(w, f, 4)
	refused := errors.New("no buffer")
	never := make(chan struct{})
	if _, err := run.fill(t.Context(), store.Part{I: 0, Of: 2, Joined: never}, refusing{refused}); !errors.Is(err, refused) {
		t.Fatal(err)
	}
	r.want([2]int64{4, 2})
	for i := range 2 {
		p := make([]byte, ring.BlockSize)
		sums, err := run.fill(t.Context(), store.Part{I: i, Of: 2, Joined: never}, bytesAt(p))
		if err != nil || wire.CheckSums(p, sums) != nil || !bytes.Equal(p, r.large[blockOff(int64(4+i)):][:len(p)]) {
			t.Errorf("block %d: %v", i, err)
		}
	}
	r.want([2]int64{4, 1}, [2]int64{5, 1})
}

type refusing struct{ err error }

func (r refusing) WriteAt([]byte, int64) (int, error) { return 0, r.err }

// TestALoadGoesOnWhereItsConnectionsBreak: a run that breaks halfway is resumed as any request is.
func TestALoadGoesOnWhereItsConnectionsBreak(t *testing.T) {
	noGoroutines(t)
	s := bucket.StartT(t, bucket.Options{})
	want := content(largeSize, 1)
	s.PutT(t, "data", "large", want)
	for i := range leastRuns*maxRun - 9 {
		s.PutT(t, "data", fmt.Sprintf("small/%03d", i), content(10, byte(i)))
	}
	proxy := bucket.Faults(t, s)
	tr, _ := overBucket(t, s, proxy.Endpoint(), "")
	tr.deps = func(int) Deps { return Deps{Clock: still{now: time.Now()}} }
	tr.start(1)
	i := index(t, tr.snapshot(), "/large")
	var asked atomic.Int32 // requests that end where the first run does
	proxy.Set(func(q *http.Request) bucket.Fault {
		var from, to int64
		if _, err := fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-%d", &from, &to); err == nil && to == 4*ring.BlockSize-1 && asked.Add(1) == 1 {
			return bucket.Fault{Truncate: 10 << 20}
		}
		return bucket.Fault{}
	})
	tr.load(wire.LoadRequest{ID: "l"})
	if st := tr.waitLoad(0, "l"); !st.Done || st.Fetched != st.Total || len(st.Failures) != 0 {
		t.Errorf("%+v", st)
	}
	if p, err := tr.dial(0).file(i, largeSize, wire.FlagResidentOnly); err != nil || !bytes.Equal(p, want) {
		t.Errorf("the large file: %v", err)
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("the run was asked for %d times: it was not resumed", n)
	}
}
