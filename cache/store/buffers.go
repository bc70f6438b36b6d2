package store

import (
	"context"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"github.com/stepcache/stepcache/cache/ring"
)

// buffers are the heap buffers of fills, bounded in bytes. Who finds none waits in line.
type buffers struct {
	total int64
	free  *semaphore.Weighted // bytes

	mu   sync.Mutex
	idle [classes][][]byte // by size class, kept for reuse within the same bound
	kept int64
	used int64
}

const (
	minClass = 12 // 4 KiB
	classes  = 11 // up to ring.BlockSize
)

var _ [ring.BlockSize]struct{} = [1 << (minClass + classes - 1)]struct{}{}

// buffer is the content of one block in heap.
type buffer struct {
	p    []byte
	pool *buffers
	refs atomic.Int32
}

func newBuffers(total int64) *buffers {
	return &buffers{total: total, free: semaphore.NewWeighted(total)}
}

func class(n int) int { return max(bits.Len(uint(n-1)), minClass) - minClass }

// get returns a buffer of n bytes, held once.
func (p *buffers) get(ctx context.Context, n int) (*buffer, error) {
	if err := p.free.Acquire(ctx, 1<<(class(n)+minClass)); err != nil {
		return nil, err
	}
	return p.take(n), nil
}

// try is get without waiting; nil: none is free.
func (p *buffers) try(n int) *buffer {
	if !p.free.TryAcquire(1 << (class(n) + minClass)) {
		return nil
	}
	return p.take(n)
}

// take is get for whom room was made.
func (p *buffers) take(n int) *buffer {
	c := class(n)
	size := int64(1) << (c + minClass)
	b := &buffer{pool: p}
	b.refs.Store(1)
	p.mu.Lock()
	p.used += size
	if l := len(p.idle[c]); l > 0 {
		b.p = p.idle[c][l-1][:n]
		p.idle[c] = p.idle[c][:l-1]
		p.kept -= size
	} else if p.used+p.kept > p.total {
		// Idle buffers of other sizes make room, so that the heap keeps to the bound.
		for i := range p.idle {
			p.kept -= int64(len(p.idle[i])) << (i + minClass)
			p.idle[i] = nil
		}
	}
	p.mu.Unlock()
	if b.p == nil {
		b.p = make([]byte, n, size)
	}
	return b
}

// hold adds n holders.
func (b *buffer) hold(n int) { b.refs.Add(int32(n)) }

// release ends one hold; the last one gives the buffer back.
func (b *buffer) release() {
	if b.refs.Add(-1) > 0 {
		return
	}
	p, c := b.pool, class(cap(b.p))
	size := int64(cap(b.p))
	p.mu.Lock()
	p.used -= size
	p.idle[c] = append(p.idle[c], b.p[:0])
	p.kept += size
	p.mu.Unlock()
	b.p = nil
	p.free.Release(size)
}
