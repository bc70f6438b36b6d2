package store

import "sync"

// maxIdleHands is how many goroutines wait for the next fill.
const maxIdleHands = 64

// hands are the goroutines of fills. They are kept for the next fill: a source's client needs a deep stack, and
// growing a new one for each block was 6 % of the time of small blocks. The latest to be free is the next to
// be used. A fill never waits for a hand.
type hands struct {
	mu     sync.Mutex
	idle   []chan func() // of capacity 1
	closed bool
}

// run calls f in a goroutine that wg counts.
func (h *hands) run(wg *sync.WaitGroup, f func()) {
	h.mu.Lock()
	n := len(h.idle)
	if n == 0 {
		h.mu.Unlock()
		wg.Go(func() { h.work(f) })
		return
	}
	next := h.idle[n-1]
	h.idle = h.idle[:n-1]
	h.mu.Unlock()
	next <- f
}

func (h *hands) work(f func()) {
	next := make(chan func(), 1)
	for f != nil {
		f()
		h.mu.Lock()
		if h.closed || len(h.idle) >= maxIdleHands {
			h.mu.Unlock()
			return
		}
		h.idle = append(h.idle, next)
		h.mu.Unlock()
		f = <-next // nil: closed
	}
}

// close ends the idle ones, and the others after their fill.
func (h *hands) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, next := range h.idle {
		close(next)
	}
	h.idle = nil
}
