package client

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/ring"
)

// Buffers is the memory that the clients of a process have together for blocks. Those that read share it in equal parts,
// each no more than its own Config.BufferBytes; who has not read for a while has given everything back and does not count.
//
// A part is two blocks at the least, with which a file can be streamed: beyond that many readers the limit does not hold.
type Buffers struct {
	// part is what each may have at the time. It is asked for at every block, so that no lock is needed for it.
	part atomic.Int64

	mu    sync.Mutex // may be locked with a client's blocks.mu, and never the other way round
	most  int64
	limit int64 // at most that
	using map[*blocks]bool
}

// NewBuffers returns buffers of so many bytes, at least one block.
func NewBuffers(limit int64) *Buffers {
	limit = max(limit, ring.BlockSize)
	s := &Buffers{most: limit, limit: limit, using: make(map[*blocks]bool)}
	s.divide()
	return s
}

// divide makes the parts anew. s.mu is held, or nobody else knows of s.
func (s *Buffers) divide() {
	s.part.Store(max(s.limit/int64(max(len(s.using), 1)), min(s.limit, 2*ring.BlockSize)))
}

// join is called by who begins to read. The others' parts become smaller, which they are told.
func (s *Buffers) join(b *blocks) {
	s.mu.Lock()
	defer s.mu.Unlock()
	others := slices.Collect(maps.Keys(s.using))
	s.using[b] = true
	s.divide()
	trim(others)
}

// trim has clients give up what is beyond their parts, which have become smaller.
func trim(clients []*blocks) {
	if len(clients) == 0 {
		return
	}
	go func() { // the caller holds locks
		for _, b := range clients {
			b.trim()
		}
	}()
}

// leave is called by who has nothing any more.
func (s *Buffers) leave(b *blocks) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.using, b)
	s.divide()
}

// bound sets the limit, at most what it was first.
func (s *Buffers) bound(limit int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit = max(min(s.most, limit), ring.BlockSize)
	s.divide()
	trim(slices.Collect(maps.Keys(s.using)))
}
