package worker

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// loadFills is how many requests a load has under way at most: what saturates a bucket of 20 ms with files of
	// 100 KiB. Large blocks are held back by the store's buffers and the source's limit.
	loadFills = 64
	// firstFills is how many it has at first, and leastFills where blocks take longer than slowBlock: the fewer, the
	// sooner each is here, and who wants one meanwhile, or another block of the same bucket, waits for no longer than a
	// reader may. Fewer still would be slow where the bucket gives each connection but a part of what it can.
	firstFills, leastFills = 16, 4
	slowBlock              = wire.SourceTimeout / 2
	// leastRuns is how many requests a load has under way before they are for more than a block: a bucket may give
	// each connection but a part of what it can.
	leastRuns = 16
	// runTime is what a run should take at most, by what blocks took before: who wants the last waits for all.
	runTime = time.Second
	// maxPasses is how often a load goes over what it misses before it gives up.
	maxPasses = 5
	// maxFailures is how many failed files are listed, and maxFailed the bytes that they may take of an answer: names may
	// be so long that fewer fit.
	maxFailures = 100
	maxFailed   = wire.MaxControl - 32<<10
	// residentEvery is how often a finished load looks again at what is still resident.
	residentEvery = 5 * time.Second
	// pinAgain is how long after it failed a load that pins is tried again, and pinAgainMax after it failed often: what
	// it pins is promised until it is deleted, and a worker that restarts while the bucket refuses must not be without
	// it for ever.
	pinAgain, pinAgainMax = time.Minute, 30 * time.Minute
	// snapshotPatience is how long a load waits for a snapshot that another worker may hold, once this one has one.
	snapshotPatience = 2 * time.Minute
)

// load pulls the blocks that this worker owns of the files that match.
type load struct {
	w      *Worker
	req    wire.LoadRequest
	cancel context.CancelFunc
	ended  chan struct{}
	// resident and fetched are the counters of the pass under way.
	resident, fetched atomic.Int64
	pace              atomic.Int64 // how long a block took last, a time.Duration

	mu      sync.Mutex
	status  wire.LoadStatus
	items   []item
	digest  wire.Digest
	checked time.Time
}

// item is one block that this worker has to hold.
type item struct {
	index catalog.Index
	block int32
}

// current is the status as of now.
func (l *load) current() wire.LoadStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.status
	s.Resident, s.Fetched = l.resident.Load(), l.fetched.Load()
	s.Failures = append([]wire.LoadFailure(nil), l.status.Failures...)
	return s
}

func (l *load) update(f func(*wire.LoadStatus)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.status)
}

// run loads until everything is resident, or it cannot be, and again whenever the membership changes, since
// other blocks are this worker's then, and what it pins from time to time, until the load is deleted.
func (l *load) run(ctx context.Context) {
	w := l.w
	var pinned string // the owner of the pins in force
	defer func() {
		if pinned != "" {
			w.store.Unpin(pinned)
		}
	}()
	pause, again := pinAgain, false
	for {
		v := w.members.view()
		owner := fmt.Sprintf("load/%s/%d", l.req.ID, v.Epoch)
		pctx, cancel := context.WithCancelCause(ctx)
		stop := make(chan struct{})
		var watch sync.WaitGroup
		watch.Go(func() {
			select {
			case <-v.replaced:
				cancel(errReplaced)
			case <-stop:
			}
		})
		err := l.attempt(pctx, v, owner, pinned, again)
		close(stop)
		watch.Wait()
		replaced := errors.Is(context.Cause(pctx), errReplaced)
		cancel(nil)
		if pinned != "" && pinned != owner {
			// Only now, so that blocks which stay this worker's are pinned without a gap.
			w.store.Unpin(pinned)
		}
		pinned = owner
		if ctx.Err() != nil {
			return
		}
		if replaced {
			pause, again = pinAgain, false
			continue
		}
		l.update(func(s *wire.LoadStatus) {
			s.Done, s.Problem, s.Lost = err == nil, "", errors.Is(err, errFinal) || errors.Is(err, errUnheld)
			s.Finished = w.clock.Now()
			if err != nil && !errors.Is(err, errFailures) {
				s.Problem = err.Error()
			}
		})
		if err != nil {
			w.log.Warn("load not done", "load", l.req.ID, "error", err)
		} else {
			w.log.Info("load done", "load", l.req.ID, "bytes", l.resident.Load())
		}
		var soon <-chan time.Time
		if err != nil && l.req.Pin && !errors.Is(err, errFinal) {
			soon = w.clock.After(pause)
		}
		select {
		case <-ctx.Done():
			return
		case <-v.replaced:
			pause, again = pinAgain, false
		case <-soon:
			pause, again = min(2*pause, pinAgainMax), true
		}
	}
}

var (
	errReplaced = errors.New("the membership changed")
	errFailures = errors.New("some files could not be loaded")
	// errFinal is errFailures where trying again helps none of them.
	errFinal = fmt.Errorf("%w, and cannot be", errFailures)
	// errUnheld: no worker has the load's snapshot any more.
	errUnheld = errors.New("no worker holds the snapshot any more: load the current one")
)

// attempt goes over the load's blocks under one membership until they are resident. Its pins are owner's;
// those of previous, from the membership before, make room for them if they must. While it is tried again it stays
// finished, so that nobody waits for it.
func (l *load) attempt(ctx context.Context, v *view, owner, previous string, again bool) error {
	w := l.w
	l.update(func(s *wire.LoadStatus) {
		if s.Failures, s.FailedFiles = nil, 0; !again {
			s.Done, s.Finished, s.Problem, s.Lost = false, time.Time{}, "", false
		}
	})
	if !slices.ContainsFunc(v.Members, func(m ring.Member) bool { return m.ID == w.config.ID }) {
		// It would own nothing and be done at once: what it will own is not known yet.
		l.update(func(s *wire.LoadStatus) {
			s.Problem = fmt.Sprintf("load %s: worker %s is not in the membership list yet (epoch %d)", l.req.ID, w.config.ID, v.Epoch)
		})
		<-ctx.Done() // run ends it when the list changes
		return ctx.Err()
	}
	snap, err := l.snapshot(ctx)
	if err != nil {
		return err
	}
	defer snap.release()
	items, err := l.plan(ctx, snap, v)
	if err != nil {
		return err
	}
	if l.req.Pin {
		for _, it := range items {
			r, _ := snap.Ring(it.index)
			err := w.store.Pin(r, int64(it.block), owner)
			if errors.Is(err, store.ErrFull) && previous != "" && previous != owner {
				w.store.Unpin(previous)
				err = w.store.Pin(r, int64(it.block), owner)
			}
			if errors.Is(err, store.ErrFull) && !again && w.loads.giveWay() {
				err = w.store.Pin(r, int64(it.block), owner)
			}
			if err != nil {
				w.store.Unpin(owner)
				if errors.Is(err, store.ErrFull) {
					return fmt.Errorf("load %s: %w: %w", l.req.ID, errUnfit, err)
				}
				return fmt.Errorf("load %s: pin %s: %w", l.req.ID, snap.Path(it.index), err)
			}
		}
	} else if total, quota := l.current().Total, w.store.Stats().Quota; total > quota {
		return fmt.Errorf("load %s: %w: its %d bytes on worker %s exceed the cache of %d: %s", l.req.ID, errUnfit, total, w.config.ID, quota, wayOut(snap, items, quota))
	} else {
		defer w.loads.hold(snap, items, owner)()
	}
	wait, passes := newBackoff(), maxPasses
	if again {
		passes = 1
	}
	for pass := 1; ; pass++ {
		more := l.pass(ctx, snap, v, items)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		missing := l.count(snap, items)
		failures := l.current().FailedFiles
		switch {
		case missing == 0:
			l.update(func(s *wire.LoadStatus) { s.Failures, s.FailedFiles = nil, 0 })
			return nil
		case failures > 0 && !more:
			return fmt.Errorf("load %s: %d files: %w", l.req.ID, failures, errFinal)
		case failures > 0 && pass >= passes:
			return fmt.Errorf("load %s: %d files: %w", l.req.ID, failures, errFailures)
		case pass >= passes:
			return fmt.Errorf("load %s: %w: %d of its bytes were loaded but not kept beside what else is cached: load fewer paths, pin it, or raise the workers' memory", l.req.ID, errUnfit, missing)
		}
		if failures > 0 {
			if err := w.sleep(ctx, wait.NextBackOff()); err != nil {
				return err
			}
		}
		l.update(func(s *wire.LoadStatus) { s.Failures, s.FailedFiles = nil, 0 })
	}
}

// wayOut says what helps where a load has more bytes for a worker than its cache.
func wayOut(snap *snapshot, items []item, quota int64) string {
	var largest ring.Object
	var path string
	for _, it := range items {
		if r, ok := snap.Ring(it.index); ok && r.Size > largest.Size && r.Size <= ring.StripeThreshold {
			largest, path = r, snap.Path(it.index)
		}
	}
	if largest.Size > quota {
		return fmt.Sprintf("%s has %d bytes, and one worker holds all of a file up to %d GiB: raise the workers' memory above that, or leave it out; more workers do not help", path, largest.Size, ring.StripeThreshold>>30)
	}
	return "load fewer paths, raise the workers' memory or add workers"
}

// snapshot waits for the load's snapshot, saying so meanwhile. Once this worker has another, it may be that nobody holds
// the load's any more: all workers lost their memory, or did without it for long.
func (l *load) snapshot(ctx context.Context) (*snapshot, error) {
	w := l.w
	d, err := parseDigest(l.req.Snapshot)
	if err != nil {
		return nil, err
	}
	if l.digest != (wire.Digest{}) {
		d = l.digest // what was current when the load began
	}
	var waited time.Duration
	asked := 0 // how often everybody had been
	for {
		if snap, ok := w.snapshots.get(d); ok {
			l.mu.Lock()
			l.digest = snap.Digest()
			l.status.Snapshot, l.status.Problem = hex.EncodeToString(l.digest[:]), ""
			l.mu.Unlock()
			return snap, nil
		}
		w.wantSnapshot(d)
		l.update(func(s *wire.LoadStatus) { s.Problem = w.unknownSnapshot(d).Error() })
		if cur, ok := w.snapshots.get(wire.Digest{}); ok {
			cur.release()
			// Nobody is asked while a listing goes on: it counts only if everybody was, after that time.
			switch waited += pollInterval; {
			case waited <= snapshotPatience:
				asked = w.snapshots.missed(d).times
			case w.snapshots.missed(d).times > asked:
				return nil, fmt.Errorf("load %s: %w: %w", l.req.ID, w.unknownSnapshot(d), errUnheld)
			}
		}
		if err := w.sleep(ctx, pollInterval); err != nil {
			return nil, err
		}
	}
}

// plan lists the blocks that this worker has to hold.
func (l *load) plan(ctx context.Context, snap *snapshot, v *view) ([]item, error) {
	var items []item
	var files, total, matched int64
	patterns := catalog.NewPatterns(l.req.Paths)
	if len(patterns) == 0 {
		patterns = []catalog.Pattern{catalog.NewPattern("/")}
	}
	snap.WalkMatching(patterns, func(i catalog.Index, _ string, matches bool) bool {
		if !matches {
			return ctx.Err() == nil
		}
		matched++
		r, ok := snap.Ring(i)
		if !ok {
			return true
		}
		mine := false
		for block := range ring.Blocks(r.Size) {
			if _, place := v.owners(l.w.config.ID, r, block, l.req.Copies); place >= 0 {
				items = append(items, item{i, int32(block)})
				total += blockLen(r.Size, block)
				mine = true
			}
		}
		if mine {
			files++
		}
		return ctx.Err() == nil
	})
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	l.mu.Lock()
	l.items = items
	l.status.Files, l.status.Total = files, total
	l.mu.Unlock()
	if matched == 0 && len(l.req.Paths) > 0 {
		return nil, fmt.Errorf("load %s: no file of the snapshot matches %q", l.req.ID, l.req.Paths)
	}
	return items, nil
}

// withFailure lists one more failed file, where there is room.
func withFailure(listed []wire.LoadFailure, f wire.LoadFailure) []wire.LoadFailure {
	if len(listed) >= maxFailures {
		return listed
	}
	more := append(listed, f)
	if text, err := json.Marshal(more); err != nil || len(text) > maxFailed {
		return listed
	}
	return more
}

// pass fetches what is not resident and notes the files that fail; again says whether another pass may
// get more of them.
func (l *load) pass(ctx context.Context, snap *snapshot, v *view, items []item) (again bool) {
	l.resident.Store(0)
	var mu sync.Mutex
	failedFiles := make(map[catalog.Index]bool) // and whether the failure is final
	retry := false
	var g errgroup.Group
	p := newPlaces()
	longest := max(1, min(len(items)/leastRuns, maxRun))
	for len(items) > 0 {
		select {
		case <-p.free:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		it := items[0]
		adjacent := items[:l.adjacent(items, longest)]
		items = items[len(adjacent):]
		mu.Lock()
		skip := failedFiles[it.index]
		mu.Unlock()
		if skip {
			p.free <- struct{}{}
			continue
		}
		g.Go(func() error {
			defer func() { p.leave(time.Duration(l.pace.Load())) }()
			err := l.fetchAll(ctx, snap, v, adjacent)
			if err == nil || ctx.Err() != nil {
				return nil
			}
			final := errors.Is(err, source.ErrChanged) || errors.Is(err, source.ErrNotFound) || errors.Is(err, source.ErrInvalid)
			mu.Lock()
			_, known := failedFiles[it.index]
			failedFiles[it.index] = failedFiles[it.index] || final
			retry = retry || !final
			mu.Unlock()
			if errors.Is(err, source.ErrChanged) || errors.Is(err, source.ErrNotFound) {
				err = fmt.Errorf("%w; %s", err, source.Relist)
			}
			if !known {
				l.update(func(s *wire.LoadStatus) {
					s.FailedFiles++
					path := snap.Path(it.index)
					s.Failures = withFailure(s.Failures, wire.LoadFailure{Path: path, Quoted: wire.Quoted(path), Reason: err.Error()})
				})
			}
			return nil
		})
	}
	g.Wait()
	return retry
}

// places are those of the requests that a pass has under way: one more with each that ends, up to loadFills, and one
// fewer, down to leastFills, while blocks take long.
type places struct {
	free chan struct{} // a token for each that is not taken
	mu   sync.Mutex
	n    int
}

func newPlaces() *places {
	p := &places{free: make(chan struct{}, loadFills), n: firstFills}
	for range p.n {
		p.free <- struct{}{}
	}
	return p
}

// leave gives a place back. pace is how long a block took last.
func (p *places) leave(pace time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case pace > slowBlock && p.n > leastFills:
		p.n--
		return
	case pace <= slowBlock && p.n < loadFills:
		p.n++
		p.free <- struct{}{}
	}
	p.free <- struct{}{}
}

// adjacent is how many of the next items may be asked for at once, at least one.
func (l *load) adjacent(items []item, longest int) int {
	if pace := time.Duration(l.pace.Load()); pace > 0 {
		longest = min(longest, int(runTime/pace))
	}
	n := 1
	for n < min(len(items), longest) && items[n].index == items[0].index && items[n].block == items[n-1].block+1 {
		n++
	}
	return n
}

// fetchAll makes adjacent blocks of a file resident: those that are absent in runs.
func (l *load) fetchAll(ctx context.Context, snap *snapshot, v *view, items []item) error {
	f, ok := snap.file(items[0].index)
	if !ok {
		return fmt.Errorf("%w: node %d is not a file", source.ErrInvalid, items[0].index)
	}
	for len(items) > 0 {
		n, err := l.fetchRun(ctx, f, v, int64(items[0].block), len(items))
		if n == 0 && err == nil {
			n, err = 1, l.fetch(ctx, f, v, int64(items[0].block))
		}
		if err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

// fetchRun fetches a block and those after it, at most so many, with one request, and returns how many these were:
// none where the first has to be fetched by itself.
func (l *load) fetchRun(ctx context.Context, f file, v *view, first int64, most int) (int, error) {
	start := l.w.clock.Now()
	run, err := l.w.begin(ctx, f, v, l.req.Copies, first, most)
	if err != nil || len(run) == 0 {
		return 0, err
	}
	var g errgroup.Group
	for _, p := range run {
		g.Go(func() error {
			b, err := p.Wait(ctx)
			if err != nil {
				return err
			}
			l.have(b)
			if b.Resident() {
				l.w.checkWhole(f)
			}
			b.Release()
			return nil
		})
	}
	err = g.Wait()
	l.pace.Store(int64(l.w.clock.Now().Sub(start)) / int64(len(run)))
	return len(run), err
}

// fetch makes one block resident.
func (l *load) fetch(ctx context.Context, f file, v *view, block int64) error {
	w := l.w
	size := blockLen(f.ring.Size, block)
	if b, ok := w.store.Lookup(f.ring, block); ok {
		b.Release()
		l.resident.Add(size)
		return nil
	}
	owners, place := v.owners(w.config.ID, f.ring, block, l.req.Copies)
	start := w.clock.Now()
	b, done, err := w.fill(ctx, f, block, owners, place, 0, budget{})
	if err != nil {
		return err
	}
	l.pace.Store(int64(w.clock.Now().Sub(start)))
	l.have(b)
	b.Release()
	done()
	return nil
}

// have counts a block that was fetched.
func (l *load) have(b *store.Block) {
	l.fetched.Add(int64(b.Len()))
	if b.Resident() {
		l.resident.Add(int64(b.Len()))
	}
}

// count sets the resident bytes to what the store holds and returns what is missing.
func (l *load) count(snap *snapshot, items []item) (missing int64) {
	var resident int64
	var bitmap []byte
	var size int64
	last := catalog.Index(0) // the root is no file
	for _, it := range items {
		if it.index != last {
			last = it.index
			r, _ := snap.Ring(it.index)
			bitmap, size = l.w.store.Bitmap(r), r.Size
		}
		n := blockLen(size, int64(it.block))
		if i := int(it.block / 8); i < len(bitmap) && bitmap[i]&(1<<(it.block%8)) != 0 {
			resident += n
		} else {
			missing += n
		}
	}
	l.resident.Store(resident)
	return missing
}

// refresh brings the resident bytes of a finished load up to date, now and then.
func (l *load) refresh() {
	l.mu.Lock()
	now := l.w.clock.Now()
	due := !l.status.Finished.IsZero() && now.Sub(l.checked) >= residentEvery
	if due {
		l.checked = now
	}
	items, d := l.items, l.digest
	l.mu.Unlock()
	if !due || d == (wire.Digest{}) {
		return
	}
	if snap, ok := l.w.snapshots.get(d); ok {
		l.count(snap, items)
		snap.release()
	}
}

// parseDigest reads a snapshot's name; empty is the zero digest.
func parseDigest(s string) (d wire.Digest, err error) {
	if s == "" {
		return d, nil
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(d) {
		return d, fmt.Errorf("snapshot %q is not a digest of %d hex digits", s, 2*len(d))
	}
	return wire.Digest(b), nil
}
