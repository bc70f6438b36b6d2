package client

import (
	"slices"
	"sync"
	"time"
)

// latency learns how long answers take, so that a hedge is sent when one is slow by the standard of the
// others, whatever the network and the bucket. Small and large requests are kept apart.
type latency struct {
	mu    sync.Mutex
	kinds [2]sample
	spend float64 // hedges that may be sent: each answer earns a fraction of one
}

type sample struct {
	last [128]time.Duration
	n    int
	p95  time.Duration
}

const (
	// hedgeShare bounds hedges to this share of the requests: when all answers are slow they would only
	// make it worse.
	hedgeShare = 0.05
	hedgeBurst = 8
	// smallRequest parts the two kinds.
	smallRequest = 256 << 10
)

func (l *latency) kind(n int) *sample {
	if n <= smallRequest {
		return &l.kinds[0]
	}
	return &l.kinds[1]
}

func (l *latency) observe(n int, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spend = min(l.spend+hedgeShare, hedgeBurst)
	s := l.kind(n)
	s.last[s.n%len(s.last)] = d
	s.n++
	if s.n%16 == 0 {
		sorted := slices.Clone(s.last[:min(s.n, len(s.last))])
		slices.Sort(sorted)
		s.p95 = sorted[len(sorted)*95/100]
	}
}

// hedge is how long to wait before asking a second copy; false before there is experience.
func (l *latency) hedge(n int) (time.Duration, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.kind(n)
	return s.p95, s.p95 > 0
}

// pay takes one hedge from what was earned.
func (l *latency) pay() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spend < 1 {
		return false
	}
	l.spend--
	return true
}
