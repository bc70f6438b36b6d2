package catalog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/source"
)

// Progress is told how many objects, and of how many bytes, were listed so far: every few hundred objects
// and once at the end. It is never called concurrently.
type Progress func(files, bytes int64)

// LargeError says that a snapshot would take more of the heap than it may.
type LargeError struct {
	Files int64 // objects that were listed
	Need  int64 // bytes that they would take
}

func (e *LargeError) Error() string {
	return fmt.Sprintf("a listing of %d objects takes %d bytes of memory, more than there are for it", e.Files, e.Need)
}

// batchSize is how many objects go from a listing to the builder at once.
const batchSize = 512

type batch struct {
	mount   int
	single  bool
	objects []source.Object
}

// List lists the mounts, all at once, each from the source at the same position, into a new snapshot. A
// mount's URL may be left empty: it is its source's. An object without a version is refused by name
// (source.ErrUnversioned) unless the mount allows it, and so is a listing that fails in part: a snapshot
// is whole or there is none. A mount below whose prefix there is nothing is an empty directory and a note. Where most is
// not zero and it takes more bytes of the heap to make the snapshot, the rest is listed to say how many (LargeError).
func List(ctx context.Context, mounts []Mount, sources []source.Source, most int64, p Progress) (*Snapshot, error) {
	if len(mounts) != len(sources) {
		return nil, fmt.Errorf("catalog: %d mounts but %d sources", len(mounts), len(sources))
	}
	created := time.Now()
	normal := make([]Mount, len(mounts))
	for i, m := range mounts {
		m.URL = sources[i].URL()
		normal[i] = m
	}
	b := NewBuilder(normal)
	if b.err != nil {
		return nil, b.err
	}
	prefixes := make([]string, len(mounts)) // b.mounts belongs to this goroutine once the listings run
	for i := range prefixes {
		prefixes[i] = b.mounts[i].Prefix
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The listings only hand over what they find; the builder stays with this goroutine.
	batches := make(chan batch, len(mounts))
	g, gctx := errgroup.WithContext(ctx)
	for i := range mounts {
		g.Go(func() error { return listMount(gctx, i, mounts[i].Prefix, prefixes[i], sources[i], batches) })
	}
	listed := make(chan error, 1)
	go func() {
		listed <- g.Wait()
		close(batches)
	}()

	var files, bytes int64
	var failed error
	var large float64 // where they are too many, what each takes
	for part := range batches {
		if failed != nil {
			continue // until the listings notice
		}
		if large > 0 {
			files += int64(len(part.objects))
			continue
		}
		for _, o := range part.objects {
			add := b.Add
			if part.single {
				add = b.single
			}
			if failed = add(part.mount, o); failed != nil {
				cancel()
				break
			}
			files++
			bytes += o.Size
		}
		if p != nil && failed == nil {
			p(files, bytes)
		}
		if need := b.Need(); most > 0 && need > most && failed == nil {
			large, b = float64(need)/float64(files), nil
		}
	}
	if err := <-listed; failed == nil {
		failed = err
	}
	if failed != nil {
		return nil, failed
	}
	if large > 0 {
		return nil, &LargeError{Files: files, Need: int64(large * float64(files))}
	}
	if p != nil {
		p(files, bytes)
	}
	encoded, err := b.Encode(created)
	if err != nil {
		return nil, err
	}
	return Open(encoded)
}

// listMount lists one mount into out. given is its prefix as the user wrote it.
func listMount(ctx context.Context, mount int, given, prefix string, src source.Source, out chan<- batch) error {
	next := batch{mount: mount}
	flush := func() error {
		if len(next.objects) == 0 {
			return nil
		}
		select {
		case out <- next:
			next.objects = nil
			return nil
		case <-ctx.Done():
			return fmt.Errorf("listing %s/%s: %w", src.URL(), prefix, context.Cause(ctx))
		}
	}
	found := false
	err := src.List(ctx, prefix, func(o source.Object) error {
		found = true
		next.objects = append(next.objects, o)
		if len(next.objects) < batchSize {
			return nil
		}
		return flush()
	})
	if err == nil && !found && given != prefix {
		var o source.Object
		switch o, err = src.Stat(ctx, given); {
		case err == nil:
			next.single = true
			next.objects = append(next.objects, o)
		case errors.Is(err, source.ErrNotFound):
			err = nil
		}
	}
	if err == nil {
		err = flush()
	}
	return err // the source's names what failed
}
