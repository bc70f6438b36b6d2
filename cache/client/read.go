package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// maxPieces is how many pieces of one read are fetched at once.
const maxPieces = 8

// ReadAt reads len(p) bytes of file i from off, fewer with io.EOF at its end, from memory, the node's
// store or the workers. Sequential readers are recognised and read ahead for. It returns within
// ClientTimeout for each block that it has to fetch, and never bytes of another version of the file: an
// object that changed in the bucket is source.ErrChanged, and one that was deleted source.ErrNotFound,
// unless the tier holds the bytes.
func (c *Client) ReadAt(ctx context.Context, i catalog.Index, p []byte, off int64) (int, error) {
	if !c.begin() {
		return 0, errClosed
	}
	defer c.calls.Done()
	o, err := c.object(i)
	if err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: offset %d: %w", c.name(i), off, source.ErrInvalid)
	}
	if off >= o.Size {
		if len(p) == 0 && off == o.Size {
			return 0, nil
		}
		return 0, io.EOF
	}
	short := int64(len(p)) > o.Size-off
	if short {
		p = p[:o.Size-off]
	}
	if len(p) == 0 {
		return 0, nil
	}
	r := reading{c: c, index: i, object: o, near: c.near(ctx, i, o)}
	r.advice = c.streams.observe(i, o.Size, off, int64(len(p)), r.ready)
	n, err := r.read(ctx, p, off)
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}

// object is the placement of file i.
func (c *Client) object(i catalog.Index) (ring.Object, error) {
	o, ok := c.snapshot.Ring(i)
	if !ok {
		return ring.Object{}, fmt.Errorf("dataset %s: node %d is no file of snapshot %s: %w", c.config.Dataset, i, c.short(), source.ErrInvalid)
	}
	return o, nil
}

// maxPeek is how many blocks a Peek may touch.
const maxPeek = 2

// View is what Peek found: bytes in the client's memory or in the caller's, not to be changed, and valid until Release.
type View struct {
	Pieces [][]byte

	c       *Client
	pieces  [maxPeek][]byte
	extents [maxPeek]*extent
	n       int // of extents
}

// Release gives the bytes back. It must be called once, before the Client is closed.
func (v *View) Release() {
	for _, e := range v.extents[:v.n] {
		v.c.cache.release(e)
	}
}

// Peek is ReadAt without waiting, and without a copy where the client has the bytes in its memory: it gives the len(p)
// bytes from off of file i, which must be within the file, if they can be had now, and nil otherwise. They may be in p.
// To the recognition of sequential readers it is a read when it succeeds.
func (c *Client) Peek(i catalog.Index, off int64, p []byte) *View {
	if !c.begin() {
		return nil
	}
	defer c.calls.Done()
	n := len(p)
	node, ok := c.snapshot.Node(i)
	if !ok || node.Dir || off < 0 || n <= 0 || int64(n) > node.Size-off || (off+int64(n)-1)/ring.BlockSize-off/ring.BlockSize >= maxPeek {
		return nil
	}
	v := &View{c: c}
	r := reading{c: c, index: i, object: ring.Object{Size: node.Size}}
	switch {
	case v.find(i, off, n):
		c.count.bufferHits.Add(int64(v.n))
		c.count.bufferBytes.Add(int64(n))
		if c.config.Store != nil || node.Size > proof { // else nothing is read ahead of this file
			r.object, _ = c.snapshot.Ring(i)
		}
	default:
		if r.near = c.nears.now(i); r.near == nil || !r.near.readNow(p, off) {
			return nil
		}
		v.Pieces = append(v.pieces[:0], p)
		c.count.nearHits.Add(1)
		c.count.nearBytes.Add(int64(n))
		r.object = r.near.object
	}
	r.advice = c.streams.observe(i, node.Size, off, int64(n), r.ready)
	r.readAhead((off + int64(n) - 1) / ring.BlockSize)
	if off == 0 && node.Size <= smallFile {
		r.nextFiles(false)
	}
	return v
}

// find looks in the buffers.
func (v *View) find(i catalog.Index, off int64, n int) bool {
	for at, left := off, n; left > 0; v.n++ {
		block := at / ring.BlockSize
		from := int(at - block*ring.BlockSize)
		part := min(left, ring.BlockSize-from)
		lo, hi := span(from, part)
		e := v.c.cache.peek(blockKey{i, block}, lo, hi, from+part)
		if e == nil {
			v.Release()
			v.n = 0
			return false
		}
		v.extents[v.n] = e
		from -= e.lo * checksum.Size
		v.pieces[v.n] = e.buf[from : from+part]
		at += int64(part)
		left -= part
	}
	v.Pieces = v.pieces[:v.n]
	return true
}

// reading is one ReadAt.
type reading struct {
	c      *Client
	index  catalog.Index
	object ring.Object
	near   *near // nil: it is read over the network
	advice advice
	walk   *walk // for which it guesses that somebody will read this; nil for a read
}

// part is the piece of a read that lies in one block.
type part struct {
	block  int64
	off    int // within the block
	p      []byte
	since  time.Time // when the reader began to wait for it
	extent *extent
	near   *arrival
	far    bool // it could not be read where this machine's worker has it
	held   *store.Block
	filled <-chan struct{} // closed when the node's store has it, or has failed to get it
}

// blockLen is the length of a block of a file of that size.
func blockLen(size, block int64) int { return int(min(ring.BlockSize, size-block*ring.BlockSize)) }

func (r *reading) blockLen(block int64) int { return blockLen(r.object.Size, block) }

// span is the run of chunks that covers the bytes [off, off+n) of a block.
func span(off, n int) (lo, hi int) {
	return off / checksum.Size, checksum.Count(off + n)
}

func (r *reading) read(ctx context.Context, p []byte, off int64) (int, error) {
	var (
		open [maxPieces]part
		n    int // of open
		todo = p // not begun
		at   = off
		done int
	)
	defer func() {
		for k := range open[:n] {
			r.end(&open[k])
		}
	}()
	for done < len(p) {
		for n < len(open) && len(todo) > 0 {
			block := at / ring.BlockSize
			k := part{block: block, off: int(at - block*ring.BlockSize), since: time.Now()}
			k.p = todo[:min(len(todo), r.blockLen(block)-k.off)]
			if !r.begin(&k) && n > 0 {
				break // no room for more than one at a time
			}
			open[n] = k
			n++
			todo = todo[len(k.p):]
			at += int64(len(k.p))
		}
		if done == 0 {
			r.readAhead((off + int64(len(p)) - 1) / ring.BlockSize)
			if off == 0 && r.object.Size <= smallFile {
				r.nextFiles(open[0].extent != nil && !isClosed(open[0].extent.done))
			}
		}
		if err := r.finish(ctx, &open[0]); err != nil {
			return done, err
		}
		done += len(open[0].p)
		r.end(&open[0])
		copy(open[:], open[1:n])
		n--
		open[n] = part{}
	}
	return done, nil
}

// begin finds where a part's bytes are or will be. False: nowhere, there is no room in memory.
func (r *reading) begin(k *part) bool {
	c := r.c
	lo, hi := span(k.off, len(k.p))
	key := blockKey{r.index, k.block}
	if k.extent = c.cache.find(key, lo, hi); k.extent != nil {
		if isClosed(k.extent.done) {
			c.count.bufferHits.Add(1)
		} else {
			c.count.joins.Add(1)
		}
		return true
	}
	if r.near != nil && !k.far {
		if k.near = r.near.want(k.block); k.near != nil {
			k.near.hurry()
			return true
		}
	}
	if c.config.Store != nil {
		if b, ok := c.config.Store.Lookup(r.object, k.block); ok {
			c.count.storeHits.Add(1)
			k.held = b
			return true
		}
		if k.filled = c.fills.of(key); k.filled != nil {
			c.count.joins.Add(1)
			return true
		}
	}
	length := r.blockLen(k.block)
	if r.advice.whole {
		lo, hi = span(0, length)
	}
	k.extent = r.start(key, lo, hi, length, nil)
	return k.extent != nil
}

// start makes an extent of a block of the given length and begins to fetch it, unless it is there. It is
// nil when there is no room. Without ahead the caller owns a reference.
func (r *reading) start(key blockKey, lo, hi, length int, ahead *stream) *extent {
	c := r.c
	n := min(hi*checksum.Size, length) - lo*checksum.Size
	e, made := c.cache.add(c.ctx, key, lo, hi, n, ahead)
	if !made {
		if e != nil && ahead == nil {
			c.count.joins.Add(1)
		}
		return e
	}
	if ahead != nil {
		c.count.ahead.Add(1)
	} else {
		c.count.misses.Add(1)
	}
	w := piece{
		index: r.index, object: r.object, block: key.block,
		off: key.block*ring.BlockSize + int64(lo)*checksum.Size, n: n, urgent: e.urgent,
	}
	buf := e.buf
	var sums []uint64
	if n == length && c.config.Store != nil {
		w.sums = &sums
	}
	ok := c.spawn(func() {
		var err error
		if r.walk == nil {
			err = c.fetch(e.ctx, w, buf)
		} else if err = c.guess(e.ctx, w, buf); errors.Is(err, errGuess) {
			c.walks.refused(r.walk)
		}
		c.cache.finish(e, err)
		if err != nil {
			return
		}
		if n == length {
			c.keep(w, buf, sums)
		}
		c.cache.release(e)
	})
	if !ok {
		c.cache.finish(e, errClosed)
	}
	return e
}

// keep puts a whole block into the node's store, with the sums that it came with.
func (c *Client) keep(w piece, buf []byte, sums []uint64) {
	if c.config.Store == nil {
		return
	}
	l := loan{p: buf}
	b, err := c.config.Store.Place(c.ctx, w.object, w.block, func(_ context.Context, to io.WriterAt) ([]uint64, error) {
		return sums, l.write(to)
	})
	l.end()
	if err != nil { // the reader has its bytes all the same
		c.log.Debug("node store did not take a block", "file", c.path(w.index), "block", w.block, "error", err)
		return
	}
	b.Release()
}

// loan is a buffer that another goroutine may write from until end returns: the store may run a fill on, or begin
// it, after who asked for it has given up, when the buffer is another block's already.
type loan struct {
	mu sync.Mutex // keeps who gave up waiting, and nobody else
	p  []byte
}

func (l *loan) write(to io.WriterAt) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.p == nil {
		return errClosed
	}
	_, err := to.WriteAt(l.p, 0)
	return err
}

func (l *loan) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.p = nil
}

// finish waits for a part's bytes and copies them out.
func (r *reading) finish(ctx context.Context, k *part) error {
	c := r.c
	anew := false  // ctx ends with the reader's time
	var last error // of a fetch whose time was over before the reader's
	ended := func() error {
		if last != nil && errors.Is(context.Cause(ctx), errDeadline) {
			return last // tells what the workers said
		}
		return c.giveUp(ctx, piece{index: r.index}, nil)
	}
	for {
		switch {
		case k.filled != nil:
			select {
			case <-k.filled:
			case <-ctx.Done():
				return ended()
			}
			k.filled = nil
			r.begin(k)
			continue
		case k.near != nil:
			select {
			case <-k.near.done:
			case <-ctx.Done():
				return ended()
			}
			if a := k.near; a.err == nil && r.near.read(k.block, a.sums, k.p, k.off) {
				c.count.nearHits.Add(1)
				c.count.nearBytes.Add(int64(len(k.p)))
				return nil
			}
			// Another worker may hold it, whatever this one, or the bucket, said.
			k.near, k.far = nil, true
			r.begin(k)
			continue
		case k.held != nil:
			if c.readStore(k.held, k.p, k.off) {
				c.count.storeBytes.Add(int64(len(k.p)))
				return nil
			}
			// Read it past the store this time, whatever the store says of the block now.
			r.end(k)
		case k.extent != nil:
			select {
			case <-k.extent.done:
			case <-ctx.Done():
				return ended()
			}
			e := k.extent
			if e.err == nil {
				at := k.off - e.lo*checksum.Size
				copy(k.p, e.buf[at:])
				if at+len(k.p) == len(e.buf) {
					c.cache.finished(e)
				}
				c.count.bufferBytes.Add(int64(len(k.p)))
				return nil
			}
			left := c.timing.client - time.Since(k.since)
			switch {
			case c.ctx.Err() != nil:
				return e.err
			case errors.Is(e.err, context.Canceled), errors.Is(e.err, errGuess):
				// Those for whom it was fetched gave up as this reader joined, or it was a guess.
			case errors.Is(e.err, context.DeadlineExceeded) && left > 0:
				last = e.err // the time of those for whom it was fetched is over, and not this reader's
			default:
				return e.err
			}
			if !anew {
				anew = true
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeoutCause(ctx, left, errDeadline)
				defer cancel()
			}
			r.end(k)
			r.begin(k)
			continue
		}
		return r.direct(ctx, k)
	}
}

// end gives back what a part holds.
func (r *reading) end(k *part) {
	if k.extent != nil {
		r.c.cache.release(k.extent)
	}
	if k.held != nil {
		k.held.Release()
	}
	k.extent, k.held = nil, nil
}

// scratch holds buffers of directSize for readers that found no room: each has one at most, so they are
// bounded by the number of reads under way.
const directSize = 2 * checksum.Size

var scratch = sync.Pool{New: func() any { return new([directSize]byte) }}

// direct reads a part past the buffers, which are all being received into or copied from: in small
// pieces, but at once.
func (r *reading) direct(ctx context.Context, k *part) error {
	c := r.c
	c.count.direct.Add(1)
	length := r.blockLen(k.block)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	buf := scratch.Get().(*[directSize]byte)
	defer scratch.Put(buf)
	for done := 0; done < len(k.p); {
		off := k.off + done
		lo := off / checksum.Size * checksum.Size
		n := min(directSize, length-lo)
		// The caller's memory takes the bytes itself where it lies on the boundaries.
		dst := buf[:n]
		aligned := off == lo && (len(k.p)-done >= checksum.Size || off+len(k.p)-done == length)
		if aligned {
			n = len(k.p) - done
			if off+n != length {
				n -= n % checksum.Size
			}
			dst = k.p[done : done+n]
		}
		w := piece{index: r.index, object: r.object, block: k.block, off: k.block*ring.BlockSize + int64(lo), n: n, urgent: now}
		if err := c.fetch(ctx, w, dst); err != nil {
			return err
		}
		if aligned {
			done += n
		} else {
			done += copy(k.p[done:], buf[off-lo:n])
		}
	}
	c.count.directBytes.Add(int64(len(k.p)))
	return nil
}

// now is an urgency that is there from the beginning.
var now = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// ready says whether a block is in memory, on its way or in the node's store.
func (r *reading) ready(block int64) bool {
	_, hi := span(0, r.blockLen(block))
	if r.c.cache.holds(blockKey{r.index, block}, 0, hi) || r.near != nil && r.near.wanted(block) {
		return true
	}
	return r.inStore(block)
}

func (r *reading) inStore(block int64) bool {
	if r.c.config.Store == nil {
		return false
	}
	b, ok := r.c.config.Store.Lookup(r.object, block)
	if ok {
		b.Release()
	}
	return ok || r.c.fills.of(blockKey{r.index, block}) != nil
}

// readAhead fetches what the stream will want next, as far as there is room.
func (r *reading) readAhead(last int64) {
	if r.advice.window == 0 {
		return
	}
	end := min(last+r.advice.window, ring.Blocks(r.object.Size)-1)
	for block := last + 1; block <= end; block++ {
		if r.ready(block) {
			continue
		}
		if r.near != nil && r.near.want(block) != nil {
			continue
		}
		length := r.blockLen(block)
		_, hi := span(0, length)
		if r.start(blockKey{r.index, block}, 0, hi, length, r.advice.stream) == nil {
			return
		}
	}
}

// readStore reads from a block of the node's store. False: the memory is bad, and the block was dropped.
func (c *Client) readStore(b *store.Block, p []byte, off int) bool {
	if err := readSummed(b, b.Len(), b.Sums(), p, off); err != nil {
		c.count.corrupt.Add(1)
		c.count.refetched.Add(1)
		c.log.Warn("block of the node store failed its checksum and is fetched again", "error", err)
		c.config.Store.Verify(b)
		return false
	}
	return true
}

// readSummed reads len(p) bytes from off of a block of the given size and checks the sums of all chunks that it reads
// of. What differs from them, or is not there, is wire.ErrCorrupt.
func readSummed(r io.ReaderAt, size int, sums []uint64, p []byte, off int) error {
	if len(sums) != checksum.Count(size) {
		return fmt.Errorf("%w: %d sums for %d bytes", wire.ErrCorrupt, len(sums), size)
	}
	var buf *[directSize]byte
	for done := 0; done < len(p); {
		at := off + done
		k := at / checksum.Size
		lo := k * checksum.Size
		n := min(checksum.Size, size-lo)
		dst := p[done:]
		direct := at == lo && len(dst) >= n
		if direct {
			// Several whole chunks at once, as many as the processor has at hand when it comes to the sums.
			n = min(len(dst), summedAtOnce, size-lo)
			if lo+n < size {
				n -= n % checksum.Size
			}
			dst = dst[:n]
		} else {
			if buf == nil {
				buf = scratch.Get().(*[directSize]byte)
				defer scratch.Put(buf)
			}
			dst = buf[:n]
		}
		if got, err := r.ReadAt(dst, int64(lo)); got != n {
			return fmt.Errorf("%w: %d of %d bytes: %v", wire.ErrCorrupt, got, n, err)
		}
		if err := wire.CheckSums(dst, sums[k:k+checksum.Count(n)]); err != nil {
			return err
		}
		if direct {
			done += n
		} else {
			done += copy(p[done:], dst[at-lo:])
		}
	}
	return nil
}

// summedAtOnce is how much is read before its sums are checked.
const summedAtOnce = 256 << 10

// Forget drops what is kept for a file that nobody has open: its streams, buffers and what is read ahead.
func (c *Client) Forget(i catalog.Index) {
	if !c.begin() {
		return
	}
	defer c.calls.Done()
	c.streams.forget(i)
	c.nears.forget(i)
	if o, ok := c.snapshot.Ring(i); ok {
		c.cache.forgetFile(i, o.Size)
	}
}

// Resident asks the workers which blocks of a file they hold: bit n of the answer, least significant
// first, is block n. It fails only if no worker answers.
func (c *Client) Resident(ctx context.Context, i catalog.Index) ([]byte, error) {
	if !c.begin() {
		return nil, errClosed
	}
	defer c.calls.Done()
	o, err := c.object(i)
	if err != nil {
		return nil, err
	}
	v := c.members.view()
	owners := v.Owners(o, 0, c.copies)
	if o.Size > ring.StripeThreshold {
		owners = v.Owners(o, 0, 0)
	}
	bitmap := make([]byte, (ring.Blocks(o.Size)+7)/8)
	last, answered := errors.New("no worker is ready"), false
	for _, m := range owners {
		_, body, err := v.peers[m.ID].small(ctx, wire.Request{Op: wire.OpResident, Snapshot: c.digest, Index: i})
		if err != nil {
			last = err
			continue
		}
		answered = true
		for k := range min(len(body), len(bitmap)) {
			bitmap[k] |= body[k]
		}
	}
	if !answered {
		return nil, fmt.Errorf("%s: residency: %w", c.name(i), last)
	}
	return bitmap, nil
}
