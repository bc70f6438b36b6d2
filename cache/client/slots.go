package client

import (
	"container/list"
	"context"
	"sync"

	"github.com/stepcache/stepcache/cache/ring"
)

// The bounds of what one worker is asked for at once. Eight blocks keep a network busy; small files are
// bounded by number instead, since eight small requests behind a bucket's latency would be no faster
// than one reader. Read-ahead leaves room for demand.
const (
	slotBytes  = 8 * ring.BlockSize
	slotCalls  = 256
	aheadBytes = 6 * ring.BlockSize
	aheadCalls = 192
)

// slots bounds the requests under way to one worker, by bytes and by number. Demand goes before
// read-ahead, and first come first served within each.
type slots struct {
	mu     sync.Mutex
	bytes  int64
	calls  int
	demand list.List // of *waiter
	ahead  list.List
}

type waiter struct {
	bytes int64
	ready chan struct{}
	in    *list.List
	elem  *list.Element
}

// slot is a right to have a request under way. Its two parts are given back once each.
type slot struct {
	s     *slots
	bytes int64
	held  bool
	ended bool
}

func (s *slots) fits(n, bytes int64, calls int) bool {
	return s.calls == 0 || (s.calls < calls && s.bytes+n <= bytes)
}

// acquire waits for room for n bytes. The request is read-ahead until urgent is closed.
func (s *slots) acquire(ctx context.Context, n int64, urgent <-chan struct{}) (*slot, error) {
	s.mu.Lock()
	w := &waiter{bytes: n, ready: make(chan struct{})}
	w.in = &s.ahead
	if isClosed(urgent) {
		w.in, urgent = &s.demand, nil
	}
	w.elem = w.in.PushBack(w)
	s.grant()
	s.mu.Unlock()
	for {
		select {
		case <-w.ready:
			return &slot{s: s, bytes: n, held: true}, nil
		case <-urgent:
			urgent = nil
			s.mu.Lock()
			if w.elem != nil {
				w.in.Remove(w.elem)
				w.in = &s.demand
				w.elem = w.in.PushBack(w)
				s.grant()
			}
			s.mu.Unlock()
		case <-ctx.Done():
			s.mu.Lock()
			if w.elem != nil {
				w.in.Remove(w.elem)
				w.elem = nil
				s.grant() // it may have been in the way of a smaller one
				s.mu.Unlock()
				return nil, context.Cause(ctx)
			}
			s.mu.Unlock()
			(&slot{s: s, bytes: n, held: true}).release()
			return nil, context.Cause(ctx)
		}
	}
}

// try is acquire without waiting.
func (s *slots) try(n int64) (*slot, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.demand.Len() > 0 || !s.fits(n, slotBytes, slotCalls) {
		return nil, false
	}
	s.bytes += n
	s.calls++
	return &slot{s: s, bytes: n, held: true}, true
}

// grant admits the waiters that fit, in order. s.mu is held.
func (s *slots) grant() {
	for _, q := range []struct {
		l     *list.List
		bytes int64
		calls int
	}{{&s.demand, slotBytes, slotCalls}, {&s.ahead, aheadBytes, aheadCalls}} {
		for q.l.Len() > 0 {
			w := q.l.Front().Value.(*waiter)
			if !s.fits(w.bytes, q.bytes, q.calls) {
				return
			}
			q.l.Remove(w.elem)
			w.elem = nil
			s.bytes += w.bytes
			s.calls++
			close(w.ready)
		}
	}
}

// yield gives the bytes back while the request is still under way: one that waits long for its answer
// waits for the bucket and takes nothing of the network, so that it must not keep others from blocks
// that the worker holds.
func (t *slot) yield() {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if t.held {
		t.held = false
		t.s.bytes -= t.bytes
		t.s.grant()
	}
}

// release ends the request's part. It is idempotent.
func (t *slot) release() {
	t.yield()
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if !t.ended {
		t.ended = true
		t.s.calls--
		t.s.grant()
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
