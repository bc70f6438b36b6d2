package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/store"
)

// budget is the memory that this node may use for what workers of other nodes send: one figure an install, of
// which each Dataset that is mounted here has a slice in a store of its own. The tmpfses are in this process's
// mount namespace only and go with it.
type budget struct {
	dir   string
	total int64
	log   *slog.Logger

	mu   sync.Mutex
	left int64
}

// leastSlice is what a store must have to be of any use: some blocks.
const leastSlice = 8 * ring.BlockSize

// slice is a Dataset's store; nil streams everything.
type slice struct {
	store *store.Store
	of    *budget
	dir   string
	bytes int64
}

func newBudget(dir string, total int64, log *slog.Logger) *budget {
	return &budget{dir: dir, total: total, left: total, log: log}
}

// take reserves a Dataset's part: half of what is left, so that the next one gets something too, or its cap where that is
// less.
func (b *budget) take(limit int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	want := b.left / 2
	if limit >= 0 {
		want = min(want, limit)
	}
	if want < leastSlice {
		return 0
	}
	b.left -= want
	return want
}

func (b *budget) giveBack(n int64) {
	b.mu.Lock()
	b.left += n
	b.mu.Unlock()
}

// open makes a store for a Dataset. That there is none to be had is no error: everything is streamed then.
func (b *budget) open(ctx context.Context, dataset string, limit int64) *slice {
	n := b.take(limit)
	if n == 0 {
		return nil
	}
	s, err := b.mount(ctx, n)
	if err != nil {
		b.giveBack(n)
		b.log.Warn("no node cache: everything is streamed", "dataset", dataset, "bytes", n, "error", err)
		return nil
	}
	b.log.Info("node cache", "dataset", dataset, "bytes", n)
	return s
}

func (b *budget) mount(ctx context.Context, n int64) (*slice, error) {
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(b.dir, "node-")
	if err != nil {
		return nil, err
	}
	note, err := store.MountTmpfs(dir, n)
	if err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	if note != "" {
		b.log.Info(note)
	}
	s, err := store.Open(ctx, store.Options{Dir: dir, Quota: n, Logger: b.log})
	if err != nil {
		return nil, errors.Join(err, store.Unmount(dir), os.Remove(dir))
	}
	return &slice{store: s, of: b, dir: dir, bytes: n}, nil
}

// close takes the store away; descriptors that it gave out stay readable.
func (s *slice) close() error {
	err := errors.Join(s.store.Close(), store.Unmount(s.dir), os.RemoveAll(s.dir))
	s.of.giveBack(s.bytes)
	if err != nil {
		return fmt.Errorf("node cache: %w", err)
	}
	return nil
}
