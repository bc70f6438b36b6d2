package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/stepcache/stepcache/cache/catalog"
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

// readSource reads one block of a file from the bucket into p: one ranged request, which the source
// itself resumes and retries for as long as the deadline lets it.
func (w *Worker) readSource(ctx context.Context, f file, block int64, p []byte) error {
	ctx, cancel := context.WithTimeout(ctx, wire.SourceTimeout)
	defer cancel()
	err := func() error {
		if f.source == nil {
			return fmt.Errorf("%w: %s: its mount is no longer part of dataset %s", source.ErrInvalid, f.object.Key, w.config.Dataset)
		}
		body, err := f.source.Get(ctx, f.object, blockOff(block), int64(len(p)))
		if err != nil {
			return err
		}
		defer body.Close()
		if _, err := io.ReadFull(body, p); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("%w: %s/%s ended early", source.ErrUnavailable, f.source.URL(), f.object.Key)
			}
			return err
		}
		w.digests.published(f.ring.ID, body.Digest)
		return nil
	}()
	if err != nil && ctx.Err() != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		// The deadline is this worker's, so the reader is told what it waited for.
		err = fmt.Errorf("%w: %s: the bucket did not send it within %v: %w", source.ErrUnavailable, f.object.Key, wire.SourceTimeout, err)
	}
	w.noteBucket(f, err)
	return err
}

// noteBucket keeps the problem of a bucket that refuses all reads. A refusal is remembered with the file
// that met it, which keepBucket tries again.
func (w *Worker) noteBucket(f file, err error) {
	switch {
	case err == nil:
		if w.refused.Swap(nil) != nil {
			w.problems.set(problemBucket, nil)
		}
	case errors.Is(err, source.ErrDenied) || errors.Is(err, source.ErrNoBucket):
		w.problems.set(problemBucket, err)
		if w.refused.Swap(&f) == nil {
			select {
			case w.refusedNow <- struct{}{}:
			default:
			}
		}
	}
}

// keepBucket asks a bucket that refused a read again, with backoff, so that the worker gets ready again
// once it is mended although nobody asks a worker that is not ready.
func (w *Worker) keepBucket(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.refusedNow:
		}
		wait := newBackoff()
		for {
			if w.sleep(ctx, wait.NextBackOff()) != nil {
				return nil
			}
			f := w.refused.Load()
			if f == nil {
				break
			}
			w.probe(ctx, *f)
		}
	}
}

// probe reads one byte of f. An object that is gone or changed is an answer too: the bucket lets us in.
func (w *Worker) probe(ctx context.Context, f file) {
	ctx, cancel := context.WithTimeout(ctx, wire.SourceTimeout)
	defer cancel()
	body, err := f.source.Get(ctx, f.object, 0, min(1, f.object.Size))
	if err == nil {
		_, err = io.ReadFull(body, make([]byte, min(1, f.object.Size)))
		body.Close()
	}
	if errors.Is(err, source.ErrNotFound) || errors.Is(err, source.ErrChanged) {
		err = nil
	}
	w.noteBucket(f, err)
}
