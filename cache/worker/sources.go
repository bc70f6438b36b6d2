package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
)

// sources are the opened mounts, in the order of Config.Mounts.
type sources struct {
	mounts  []catalog.Mount
	sources []*scheme.Source
}

// plain are the sources without their meters, as catalog.List takes them.
func (s *sources) plain() []source.Source {
	var out []source.Source
	for _, o := range s.sources {
		out = append(out, o)
	}
	return out
}

// matches says whether a snapshot was made of the very mounts that are configured now.
func (s *sources) matches(snap *catalog.Snapshot) bool {
	return slices.EqualFunc(s.mounts, snap.Mounts(), func(a, b catalog.Mount) bool {
		return a.URL == b.URL && a.Path == b.Path && strings.TrimSuffix(a.Prefix, "/") == strings.TrimSuffix(b.Prefix, "/")
	})
}

// forSnapshot is the source of each mount of a snapshot; nil where no configured mount has its URL any
// more. Credentials may differ by prefix, so the very mount is preferred.
func (s *sources) forSnapshot(snap *catalog.Snapshot) []*scheme.Source {
	var out []*scheme.Source
	for _, m := range snap.Mounts() {
		var found *scheme.Source
		for i, have := range s.mounts {
			if have.URL != m.URL {
				continue
			}
			if found == nil || have.Path == m.Path {
				found = s.sources[i]
			}
		}
		out = append(out, found)
	}
	return out
}

// newBackoff is the wait between tries of what keeps the whole worker from serving.
func newBackoff() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = 500*time.Millisecond, 15*time.Second
	return b
}

// openSources opens every mount, trying again until it works or ctx ends: a Secret may come later.
func (w *Worker) openSources(ctx context.Context) (*sources, error) {
	wait := newBackoff()
	for {
		s, err := w.tryOpenSources(ctx)
		w.problems.set(problemSources, err)
		if err == nil {
			return s, nil
		}
		if err := w.sleep(ctx, wait.NextBackOff()); err != nil {
			return nil, err
		}
	}
}

func (w *Worker) tryOpenSources(ctx context.Context) (*sources, error) {
	s := &sources{}
	for _, m := range w.config.Mounts {
		src, err := w.deps.OpenSource(ctx, m.Config)
		if err != nil {
			return nil, fmt.Errorf("dataset %s: mount %s: %w", w.config.Dataset, m.Path, err)
		}
		s.sources = append(s.sources, src)
		s.mounts = append(s.mounts, m.catalogMount(src.URL()))
	}
	return s, nil
}

// sleep waits on the worker's clock.
func (w *Worker) sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-w.clock.After(d):
		return nil
	}
}

// readSource reads one block of a file from the bucket and writes it piece by piece: one ranged request, which the
// source itself resumes and retries. It returns the block's sums.
func (w *Worker) readSource(ctx context.Context, f file, block int64, to io.WriterAt) ([]uint64, error) {
	return w.fromBucket(ctx, f, func(ctx context.Context, moved func()) ([]uint64, error) {
		size := blockLen(f.ring.Size, block)
		body, err := w.get(ctx, f, blockOff(block), size)
		if err != nil {
			return nil, err
		}
		defer body.Close()
		return w.receive(f, body, size, to, moved)
	})
}

// errStill: the bucket sent next to nothing of a block for the time that is allowed.
var errStill = errors.New("the bucket sends next to nothing")

// fromBucket reads a block, and gives it up once no piece of it came for the time that is allowed: what comes slowly
// would only be asked for again, but of a connection with a byte now and then another makes more. How long a reader waits
// for all of it is the reader's own affair. read calls moved when a piece has come.
func (w *Worker) fromBucket(ctx context.Context, f file, read func(ctx context.Context, moved func()) ([]uint64, error)) ([]uint64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	still := time.AfterFunc(w.sourceTimeout, func() { cancel(errStill) })
	defer still.Stop()
	sums, err := read(ctx, func() { still.Reset(w.sourceTimeout) })
	if err != nil && errors.Is(context.Cause(ctx), errStill) {
		// The deadline is this worker's, so the reader is told what it waited for. Of the cause only the words: an
		// answer that was cut short because time was up says that somebody gave up.
		err = fmt.Errorf("%w: %s: the bucket sent next to nothing of it for %v: %v", source.ErrUnavailable, f.object.Key, w.sourceTimeout, err)
	}
	w.noteBucket(doubt{source: f.source, ask: func(ctx context.Context) error { return w.probe(ctx, f) }}, err)
	return sums, err
}

// get asks the bucket for a range of a file.
func (w *Worker) get(ctx context.Context, f file, off, length int64) (source.Body, error) {
	if f.source == nil {
		return source.Body{}, fmt.Errorf("%w: %s: its mount is no longer part of dataset %s", source.ErrInvalid, f.object.Key, w.config.Dataset)
	}
	return f.source.Get(ctx, f.object, off, length)
}

// receive writes the next size bytes of an answer to where they stay, and returns their sums.
func (w *Worker) receive(f file, body source.Body, size int64, to io.WriterAt, moved func()) ([]uint64, error) {
	sums := make([]uint64, 0, checksum.Count(int(size)))
	// Each piece is summed and written when it has just come, while the processor still has it at hand: a whole
	// block is larger than that, and would be fetched from memory twice more. And what is received into was used
	// before: 64 blocks under way, each in memory of its own, would be first touches of 256 MiB.
	buf := pieces.Get().(*[sumPiece]byte)
	defer pieces.Put(buf)
	for off := int64(0); off < size; {
		piece := buf[:min(size-off, sumPiece)]
		if _, err := io.ReadFull(body, piece); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("%w: %s/%s ended early", source.ErrUnavailable, f.source.URL(), f.object.Key)
			}
			return nil, err
		}
		moved()
		sums = checksum.Append(sums, piece)
		if _, err := to.WriteAt(piece, off); err != nil {
			return nil, err
		}
		off += int64(len(piece))
	}
	w.digests.published(f.ring.ID, body.Digest)
	return sums, nil
}

// sumPiece is how much is received at a time, in whole sums.
const sumPiece = 2 * checksum.Size

var pieces = sync.Pool{New: func() any { return new([sumPiece]byte) }}

// doubt is about a bucket that refused something, or failed to do it.
type doubt struct {
	source *scheme.Source
	final  bool                        // it refused, which does not pass by itself
	names  bool                        // of what is done to names, of which a block that is read says nothing
	ask    func(context.Context) error // whether it refuses all, or fails for all the tries that an operation has
	said   wire.Status                 // of the problem that is told; keepBucket's
}

// noteBucket notes how an operation on a bucket ended: a failure for keepBucket to look into, and that all is well again.
func (w *Worker) noteBucket(d doubt, err error) {
	have := w.doubted.Load()
	switch d.final = errors.Is(err, source.ErrDenied) || errors.Is(err, source.ErrNoBucket); {
	case err == nil:
		if have != nil && have.source == d.source && (d.names || !have.names) && w.doubted.CompareAndSwap(have, nil) {
			w.tellBucket(nil)
		}
	case d.final && (have == nil || !have.final), source.Temporary(err) && have == nil:
		if w.doubted.CompareAndSwap(have, &d) {
			select {
			case w.doubtedNow <- struct{}{}:
			default:
			}
		}
	}
}

// tellBucket sets the bucket's problem. With one that may pass the worker serves on what it holds; so it does where the
// names of a writable dataset are concerned, since who asks for one is told what the bucket says.
func (w *Worker) tellBucket(err error) {
	kind, other := problemAway, problemBucket
	if w.gateway == nil && (errors.Is(err, source.ErrDenied) || errors.Is(err, source.ErrNoBucket)) {
		kind, other = other, kind
	}
	w.problems.set(kind, err)
	w.problems.set(other, nil)
}

// keepBucket looks into what a bucket refused or failed to do: whether it is of one object, which concerns its readers
// only, or of all. It asks again with backoff, so that the problem is over once the bucket is mended although nobody
// asks a worker that is not ready.
func (w *Worker) keepBucket(ctx context.Context) error {
	failures := make(map[*scheme.Source]int64)
	for {
		var look <-chan time.Time
		if w.gateway != nil {
			look = w.clock.After(namesLook)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.doubtedNow:
		case <-look:
			w.noteNames(failures)
		}
		wait := newBackoff()
		for {
			d := w.doubted.Load()
			if d == nil {
				break
			}
			if err := d.ask(ctx); err == nil {
				w.noteBucket(*d, nil)
				continue
			} else if ctx.Err() == nil && wire.StatusOf(err) != d.said {
				// Its first words stay: later ones differ by ports and counts only.
				d.said = wire.StatusOf(err)
				w.tellBucket(err)
				if w.doubted.Load() != d {
					w.tellBucket(nil) // an operation went well meanwhile
				}
			}
			if w.sleep(ctx, wait.NextBackOff()) != nil {
				return nil
			}
		}
	}
}

// namesLook is how often it is looked whether names met failures.
const namesLook = 5 * time.Second

// noteNames notes where the names of a writable dataset met failures of the bucket since the last look: what is done to
// names goes by other ways to it than a read of a block.
func (w *Worker) noteNames(before map[*scheme.Source]int64) {
	src := w.sources.Load()
	if src == nil || w.problems.ready() != nil {
		return // that is told already
	}
	for i, s := range src.sources {
		kinds := s.Meter.Counts().Errors
		n := kinds["denied"] + kinds["no_bucket"] + kinds["unavailable"] + kinds["throttled"]
		if n == before[s] {
			continue
		}
		if have := w.doubted.Load(); have != nil && have.source != s {
			continue // one at a time
		}
		before[s] = n
		w.noteBucket(src.namesDoubt(i), source.ErrUnavailable)
	}
}

// namesDoubt is a doubt about what is done to the names of a mount, whose bucket is asked for a page of them.
func (s *sources) namesDoubt(i int) doubt {
	ask := func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, wire.SourceTimeout)
		defer cancel()
		pages, ok := source.PagerOf(s.sources[i].Source)
		if !ok {
			return nil // names are not served of such
		}
		_, err := pages.Page(ctx, source.PageRequest{Prefix: s.mounts[i].Prefix, Max: 1})
		return err
	}
	return doubt{source: s.sources[i], names: true, ask: ask}
}

// meetBuckets asks the buckets of a writable dataset once, so that one that refuses its names, or is away, is told
// before somebody asks for one. Who asks is served all the same: workers may hold what is wanted, or take it.
func (w *Worker) meetBuckets(ctx context.Context, src *sources) {
	defer w.problems.set(problemSnapshot, nil)
	var told atomic.Bool
	ctx = source.NotifyTries(ctx, func(err error) { // more of them may take a while
		told.Store(true)
		w.tellBucket(err)
		w.problems.set(problemSnapshot, nil)
	})
	for i := range src.sources {
		d := src.namesDoubt(i)
		if err := d.ask(ctx); err != nil {
			w.tellBucket(err)
			w.noteBucket(d, source.ErrUnavailable)
			return // one at a time
		}
		if told.Swap(false) && w.doubted.Load() == nil {
			w.tellBucket(nil)
		}
	}
}

// probes is how many other objects are tried before a bucket is taken to fail all reads.
const probes = 4

// probe reads a byte of f and of a few others of the same mount, all at once, since of a bucket that is away each takes
// all its tries. It is nil when the bucket gives any of them; an object that is gone or changed is an answer too.
func (w *Worker) probe(ctx context.Context, f file) error {
	ctx, cancel := context.WithTimeout(ctx, wire.SourceTimeout)
	defer cancel()
	files := []file{f}
	if snap, ok := w.snapshots.get(wire.Digest{}); ok {
		defer snap.release()
		// Spread over the snapshot, since what is refused may be a folder.
		step := max(1, snap.Len()/(4*probes))
		for i := 0; i < snap.Len() && len(files) <= probes; i += step {
			if other, ok := snap.file(catalog.Index(i)); ok && other.source == f.source && other.object.Size > 0 && other.ring.ID != f.ring.ID {
				files = append(files, other)
			}
		}
	}
	errs := make([]error, len(files))
	var wg sync.WaitGroup
	for i, f := range files {
		wg.Go(func() {
			body, err := f.source.Get(ctx, f.object, 0, 1)
			if err == nil {
				_, err = io.ReadFull(body, make([]byte, 1))
				body.Close()
			}
			if errors.Is(err, source.ErrNotFound) || errors.Is(err, source.ErrChanged) {
				err = nil
			}
			if errs[i] = err; err == nil {
				cancel() // the others need not be waited for
			}
		})
	}
	wg.Wait()
	if slices.Contains(errs, nil) {
		return nil
	}
	return errs[0]
}
