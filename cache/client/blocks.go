package client

import (
	"container/list"
	"context"
	"math/bits"
	"sync"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// blockKey names a block of a file.
type blockKey struct {
	index catalog.Index
	block int64
}

// extent is a run of a block's chunks (a chunk is what one sum covers), in memory or on its way. Whoever
// wants bytes that a run covers waits for it: a run is fetched once however many ask.
type extent struct {
	key    blockKey
	lo, hi int // chunks [lo, hi) of the block
	size   int // what it takes of the budget
	buf    []byte
	done   chan struct{} // closed when buf is filled, or err set
	err    error
	ctx    context.Context // of the fetch
	cancel context.CancelFunc
	// urgent is closed once somebody waits for a run that was read ahead: it then goes before others.
	urgent     chan struct{}
	urgentOnce sync.Once

	// Guarded by blocks.mu.
	refs   int  // who waits for it or copies from it; a fetch under way does not count
	gone   bool // no longer in the map: the last user frees it
	ahead  bool // read ahead and not asked for yet
	born   int64
	stream *stream
	spent  bool          // a reader has come to its end
	elem   *list.Element // in used, spent or unread, when it may be evicted
}

func (e *extent) hurry() { e.urgentOnce.Do(func() { close(e.urgent) }) }

func (e *extent) covers(lo, hi int) bool { return e.lo <= lo && hi <= e.hi }

// blocks is the client's memory: the extents and the budget that they take. Buffers are counted from
// before their bytes arrive, and kept for reuse within the budget.
//
// Demand may evict anything that nobody waits for or copies from. Read-ahead may evict only what was
// read already, or what was read ahead for somebody who has long not come for it, and has three quarters
// of the budget at most. Neither ever waits for room: a demand read that gets none reads past the
// buffers, so that readers who are stuck cannot stop the others.
//
// What a reader has read to its end it hardly reads again, and above it there is the kernel's page cache. So
// that goes first, and once there is maxSpent of it, or a quarter of the budget, it goes before new memory is taken:
// memory that was touched already costs much less than memory that was not.
//
// Once nobody has read for a while all of it goes back to the system (rest): a node has many readers, of which few read.
type blocks struct {
	most   int64    // of what shared leaves
	shared *Buffers // with the process's other clients

	mu      sync.Mutex
	joined  bool // shared counts these
	extents map[blockKey][]*extent
	taken   int64 // by extents and hedges
	free    [classes][][]byte
	pooled  int64     // in free
	used    list.List // *extent, ready and idle, least recently used first
	spent   list.List // *extent, ready and idle, read to the end, in that order
	spentBy int64     // bytes in spent
	unread  list.List // *extent, read ahead and not asked for yet, oldest first
	ahead   int64     // taken by extents that were read ahead and not asked for yet
	clock   int64     // bytes ever taken
	coming  int       // extents whose fetch is under way
	uses    uint64    // of extents and buffers, ever
	rested  uint64    // uses when rest was called last
}

// Buffers come in powers of two from one chunk to one block.
const classes = 7

func class(n int) (k, size int) {
	k = max(0, bits.Len(uint(n-1))-bits.Len(uint(checksum.Size-1)))
	return k, checksum.Size << k
}

func newBlocks(most int64, shared *Buffers) *blocks {
	return &blocks{most: most, shared: shared, extents: make(map[blockKey][]*extent)}
}

// budget is what the buffers may take now.
func (b *blocks) budget() int64 { return min(b.most, b.shared.part.Load()) }

// trim gives up what is beyond the budget since that became smaller, except what is in use or awaited: that goes when it
// is done with and another block wants its room.
func (b *blocks) trim() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.room(0, false)
	for b.taken+b.pooled > b.budget() && b.shrink(0) {
	}
}

// leave is for who needs no share any more, until it takes a buffer again. b.mu is held.
func (b *blocks) leave() {
	if b.joined {
		b.joined = false
		b.shared.leave(b)
	}
}

// maxSpent is how much is kept of what was read to its end while other memory can be had.
const maxSpent = 4 * ring.BlockSize

// find returns the extent that covers the chunks, with a reference, or nil.
func (b *blocks) find(key blockKey, lo, hi int) *extent {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lookup(key, lo, hi)
}

// peek is find for a reader that only takes what is there; end is where, within the block, it will have read to.
func (b *blocks) peek(key blockKey, lo, hi, end int) *extent {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.extents[key] {
		if e.covers(lo, hi) && isClosed(e.done) && e.err == nil {
			b.use(e)
			e.spent = e.spent || end == e.lo*checksum.Size+len(e.buf)
			return e
		}
	}
	return nil
}

func (b *blocks) lookup(key blockKey, lo, hi int) *extent {
	for _, e := range b.extents[key] {
		if e.covers(lo, hi) {
			b.use(e)
			return e
		}
	}
	return nil
}

// use takes a reference for a reader. b.mu is held.
func (b *blocks) use(e *extent) {
	b.uses++
	e.refs++
	e.hurry()
	if e.ahead {
		e.ahead = false
		b.ahead -= int64(e.size)
	}
	b.unlist(e)
}

// holds says whether a run is there or on its way, without using it.
func (b *blocks) holds(key blockKey, lo, hi int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.extents[key] {
		if e.covers(lo, hi) {
			return true
		}
	}
	return false
}

// add makes the extent of n bytes at chunks [lo, hi) for the caller to fill, with a reference unless it
// is read ahead; or returns the one that is there. made says which. Both nil and false: no room.
// ctx bounds the fetch.
func (b *blocks) add(ctx context.Context, key blockKey, lo, hi, n int, ahead *stream) (e *extent, made bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if ahead == nil {
		if e := b.lookup(key, lo, hi); e != nil {
			return e, false
		}
	} else {
		for _, e := range b.extents[key] {
			if e.covers(lo, hi) {
				return e, false
			}
		}
	}
	_, size := class(n)
	if !b.room(int64(size), ahead != nil) {
		return nil, false
	}
	b.clock += int64(size)
	e = &extent{
		key: key, lo: lo, hi: hi, size: size, done: make(chan struct{}), urgent: make(chan struct{}),
		born: b.clock, stream: ahead,
	}
	e.ctx, e.cancel = context.WithCancel(ctx)
	e.buf = b.take(n)
	if ahead != nil {
		e.ahead = true
		b.ahead += int64(size)
	} else {
		e.refs = 1
		e.hurry()
	}
	b.extents[key] = append(b.extents[key], e)
	b.coming++
	return e, true
}

// room makes room for size bytes. b.mu is held.
func (b *blocks) room(size int64, ahead bool) bool {
	budget := b.budget()
	if ahead {
		for b.ahead+size > budget/4*3 {
			if !b.evictStale() {
				return false
			}
		}
	}
	for b.taken+size > budget {
		switch {
		case b.spent.Len() > 0:
			b.evict(b.spent.Front().Value.(*extent))
		case b.used.Len() > 0:
			b.evict(b.used.Front().Value.(*extent))
		case ahead:
			if !b.evictStale() {
				return false
			}
		case b.unread.Len() > 0:
			b.waste(b.unread.Front().Value.(*extent))
		default:
			return false
		}
	}
	for b.taken+b.pooled+size > budget && b.shrink(size) {
	}
	return true
}

// evictStale gives up the oldest block that was read ahead if twice the budget was received since:
// its reader has stopped.
func (b *blocks) evictStale() bool {
	if b.unread.Len() == 0 {
		return false
	}
	e := b.unread.Front().Value.(*extent)
	if b.clock-e.born < 2*b.budget() {
		return false
	}
	b.waste(e)
	return true
}

// waste evicts a block that was read ahead for nothing, and tells its stream.
func (b *blocks) waste(e *extent) {
	if e.stream != nil {
		e.stream.wasted.Store(true)
	}
	b.evict(e)
}

// shrink drops one pooled buffer, of a class that is not the wanted one if possible.
func (b *blocks) shrink(want int64) bool {
	for _, same := range []bool{false, true} {
		for k := range b.free {
			size := int64(checksum.Size << k)
			if n := len(b.free[k]); n > 0 && (size == want) == same {
				b.free[k][n-1] = nil
				b.free[k] = b.free[k][:n-1]
				b.pooled -= size
				return true
			}
		}
	}
	return false
}

// take returns a buffer of n bytes, for which there is room. b.mu is held.
func (b *blocks) take(n int) []byte {
	k, size := class(n)
	b.uses++
	b.taken += int64(size)
	if !b.joined {
		b.joined = true
		b.shared.join(b)
	}
	for len(b.free[k]) == 0 && b.spentBy > min(b.budget()/4, maxSpent) {
		b.evict(b.spent.Front().Value.(*extent))
	}
	if have := len(b.free[k]); have > 0 {
		buf := b.free[k][have-1]
		b.free[k][have-1] = nil
		b.free[k] = b.free[k][:have-1]
		b.pooled -= int64(size)
		return buf[:n]
	}
	return fresh(size)[:n]
}

// rest lets go of what nobody uses, if nothing was used, came or is on its way since it was called last, and returns how
// much that was.
func (b *blocks) rest() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.uses != b.rested || b.coming > 0 {
		b.rested = b.uses
		return 0
	}
	had := b.taken + b.pooled
	for _, l := range []*list.List{&b.spent, &b.used, &b.unread} {
		for l.Len() > 0 {
			b.evict(l.Front().Value.(*extent))
		}
	}
	b.free, b.pooled = [classes][][]byte{}, 0
	if b.taken == 0 {
		b.leave()
	}
	return had - b.taken
}

// close is for the end of the client; what is still in use is freed by its users.
func (b *blocks) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.leave()
}

// put takes a buffer back. b.mu is held.
func (b *blocks) put(buf []byte, size int) {
	b.taken -= int64(size)
	k, _ := class(size)
	b.free[k] = append(b.free[k], buf[:size])
	b.pooled += int64(size)
}

// spare returns a buffer if one is free without evicting anything.
func (b *blocks) spare(n int) (buf []byte, size int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, size = class(n)
	budget := b.budget()
	if b.taken+int64(size) > budget {
		return nil, 0, false
	}
	for b.taken+b.pooled+int64(size) > budget && b.shrink(int64(size)) {
	}
	return b.take(n), size, true
}

// giveBack returns a spare buffer.
func (b *blocks) giveBack(buf []byte, size int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.put(buf, size)
}

// finish ends an extent's fetch. A failed one is forgotten, so that the next reader tries anew. Of one
// that succeeded the fetch keeps a reference, for keeping the bytes elsewhere too, until release.
func (b *blocks) finish(e *extent, err error) {
	b.mu.Lock()
	b.coming--
	b.uses++
	e.err = err
	close(e.done)
	if err != nil {
		b.forget(e)
		b.settle(e)
	} else {
		e.refs++
	}
	b.mu.Unlock()
	e.cancel()
}

// finished notes that a reader has read an extent to its end.
func (b *blocks) finished(e *extent) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e.spent = true
}

// release ends a reader's use of an extent. When the last one leaves before it is there, its fetch ends.
func (b *blocks) release(e *extent) {
	b.mu.Lock()
	e.refs--
	idle := e.refs == 0 && !isClosed(e.done)
	if idle {
		b.forget(e) // nobody else may join a fetch that is being ended
	}
	b.settle(e)
	b.mu.Unlock()
	if idle {
		e.cancel()
	}
}

// settle decides what becomes of an extent: when nobody uses it, it may be evicted, or is freed if it was
// forgotten. b.mu is held.
func (b *blocks) settle(e *extent) {
	switch {
	case e.refs > 0 || !isClosed(e.done):
	case e.gone:
		b.drop(e)
	case e.elem == nil && e.ahead:
		e.elem = b.unread.PushBack(e)
	case e.elem == nil && e.spent:
		e.elem = b.spent.PushBack(e)
		b.spentBy += int64(e.size)
	case e.elem == nil:
		e.elem = b.used.PushBack(e)
	}
}

// evict frees an idle extent. b.mu is held.
func (b *blocks) evict(e *extent) {
	b.forget(e)
	b.drop(e)
}

// drop frees the buffer of an extent that nobody uses. b.mu is held.
func (b *blocks) drop(e *extent) {
	b.unlist(e)
	if e.ahead {
		e.ahead = false
		b.ahead -= int64(e.size)
	}
	if e.buf != nil {
		b.put(e.buf, e.size)
		e.buf = nil
	}
}

// forget takes an extent out of the map. b.mu is held.
func (b *blocks) forget(e *extent) {
	if e.gone {
		return
	}
	e.gone = true
	list := b.extents[e.key]
	for i, x := range list {
		if x == e {
			list[i] = list[len(list)-1]
			list[len(list)-1] = nil
			list = list[:len(list)-1]
			break
		}
	}
	if len(list) == 0 {
		delete(b.extents, e.key)
	} else {
		b.extents[e.key] = list
	}
}

func (b *blocks) unlist(e *extent) {
	if e.elem == nil {
		return
	}
	before := b.spent.Len()
	b.used.Remove(e.elem) // a no-op for an element of another list
	b.unread.Remove(e.elem)
	if b.spent.Remove(e.elem); b.spent.Len() < before {
		b.spentBy -= int64(e.size)
	}
	e.elem = nil
}

// forgetFile drops what is held of a file of the given size, and ends what is read ahead of it.
func (b *blocks) forgetFile(i catalog.Index, size int64) {
	b.mu.Lock()
	var cancels []context.CancelFunc
	drop := func(e *extent) {
		switch {
		case e.refs > 0 && !isClosed(e.done): // somebody waits for it
		case e.refs > 0: // the last user frees it
			b.forget(e)
		case !isClosed(e.done):
			b.forget(e)
			cancels = append(cancels, e.cancel)
		default:
			b.evict(e)
		}
	}
	if n := ring.Blocks(size); n <= int64(len(b.extents)) {
		for k := range n {
			for _, e := range append([]*extent(nil), b.extents[blockKey{i, k}]...) {
				drop(e)
			}
		}
	} else {
		for key, list := range b.extents {
			if key.index == i {
				for _, e := range append([]*extent(nil), list...) {
					drop(e)
				}
			}
		}
	}
	b.mu.Unlock()
	for _, cancel := range cancels {
		cancel()
	}
}

// usage is what the buffers take: bytes in use, and those kept for reuse.
func (b *blocks) usage() (taken, pooled int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.taken, b.pooled
}
