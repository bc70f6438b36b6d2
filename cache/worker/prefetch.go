package worker

import (
	"context"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/wire"
)

const (
	maxPrefetches   = 4096 // waiting
	prefetchWorkers = 8
)

// prefetches is the bounded queue of blocks that are worth having soon.
type prefetches chan prefetch

type prefetch struct {
	file  file
	block int64
}

// push queues a block; false when the queue is full.
func (p prefetches) push(f file, block int64) bool {
	select {
	case p <- prefetch{f, block}:
		return true
	default:
		return false
	}
}

// keepPrefetching works the queue off until ctx ends.
func (w *Worker) keepPrefetching(ctx context.Context) error {
	var g errgroup.Group
	for range prefetchWorkers {
		g.Go(func() error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case p := <-w.prefetches:
					w.prefetch(ctx, p)
				}
			}
		})
	}
	return g.Wait()
}

// prefetch makes one block resident if this worker owns it or a copy of it.
func (w *Worker) prefetch(ctx context.Context, p prefetch) {
	ctx, cancel := context.WithTimeout(ctx, wire.WorkerTimeout)
	defer cancel()
	b, done, err := w.acquire(ctx, p.file, p.block, 0, budget{})
	if err != nil {
		w.log.Debug("prefetch failed", "object", p.file.String(), "block", p.block, "error", err)
		return
	}
	b.Release()
	done()
}
