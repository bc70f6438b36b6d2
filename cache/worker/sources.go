package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
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
	w.noteBucket(f, err)
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

// noteBucket notes a read that the bucket refused, for keepBucket to look into, and that it lets us in again.
func (w *Worker) noteBucket(f file, err error) {
	switch {
	case err == nil:
		if r := w.refused.Load(); r != nil && r.source == f.source && w.refused.CompareAndSwap(r, nil) {
			w.problems.set(problemBucket, nil)
		}
	case errors.Is(err, source.ErrDenied) || errors.Is(err, source.ErrNoBucket):
		if w.refused.CompareAndSwap(nil, &f) {
			select {
			case w.refusedNow <- struct{}{}:
			default:
			}
		}
	}
}

// keepBucket looks into refused reads: whether one object is refused, which concerns its readers only, or
// all are, which makes the worker not ready. It asks again with backoff, so that the worker gets ready
// once the bucket is mended although nobody asks a worker that is not ready.
func (w *Worker) keepBucket(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.refusedNow:
		}
		wait := newBackoff()
		for {
			f := w.refused.Load()
			if f == nil {
				break
			}
			if err := w.probe(ctx, *f); err == nil {
				w.noteBucket(*f, nil)
				break
			} else if ctx.Err() == nil {
				w.problems.set(problemBucket, err)
				if w.refused.Load() == nil {
					w.problems.set(problemBucket, nil) // a read went well meanwhile
				}
			}
			if w.sleep(ctx, wait.NextBackOff()) != nil {
				return nil
			}
		}
	}
}

// probes is how many other objects are tried before a bucket is taken to refuse all reads.
const probes = 4

// probe reads a byte of f and, while that is refused, of a few others of the same mount. It is nil when
// the bucket lets us in for any of them. An object that is gone or changed is an answer too.
func (w *Worker) probe(ctx context.Context, f file) error {
	try := func(f file) error {
		if f.object.Size == 0 {
			return source.ErrInvalid // reads nothing, proves nothing
		}
		ctx, cancel := context.WithTimeout(ctx, wire.SourceTimeout)
		defer cancel()
		body, err := f.source.Get(ctx, f.object, 0, 1)
		if err == nil {
			_, err = io.ReadFull(body, make([]byte, 1))
			body.Close()
		}
		if errors.Is(err, source.ErrNotFound) || errors.Is(err, source.ErrChanged) {
			err = nil
		}
		return err
	}
	first := try(f)
	if first == nil || errors.Is(first, source.ErrNoBucket) {
		return first
	}
	snap, ok := w.snapshots.get(wire.Digest{})
	if !ok {
		return first
	}
	defer snap.release()
	// Spread over the snapshot, since what is refused may be a folder.
	step := max(1, snap.Len()/(4*probes))
	for i, tried := 0, 0; i < snap.Len() && tried < probes; i += step {
		other, ok := snap.file(catalog.Index(i))
		if !ok || other.source != f.source || other.object.Size == 0 || other.ring.ID == f.ring.ID {
			continue
		}
		tried++
		if try(other) == nil {
			return nil
		}
	}
	return first
}
