package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// A file that a worker of this machine owns is read where the worker keeps it, also while it is being filled and where
// the kernel cannot pass it through: the worker lends its file early (wire.FlagEarly) and tells for each block when it
// is there, with its sums, and nothing but that travels. Whatever is wrong with this way, the reader goes the other
// one, over the network, and the file is read that way for a while.

const (
	// maxNear is how many files are lent to one client at once; each costs a descriptor.
	maxNear = 256
	// nearIdle is how long nobody reads a file before it is given back, though somebody may have it open: nothing of
	// it can be evicted meanwhile.
	nearIdle = 5 * time.Second
	// nearAgain and nearAgainMax are the first and the longest pause before a file is asked for again; before a block
	// is, it is nearAgain.
	nearAgain    = time.Second
	nearAgainMax = 5 * time.Minute
	// nearPatience is how long a block is waited for. What comes after it, one block over the network, is bounded by
	// wire.ClientTimeout, and both together by wire.FUSETimeout.
	nearPatience = wire.FUSETimeout - wire.ClientTimeout
)

// nears are the files that are lent to the client, and those that were asked for in vain.
type nears struct {
	mu    sync.Mutex
	files map[catalog.Index]*nearFile
	lent  int
}

// nearFile is what is known of one file. Guarded by nears.mu.
type nearFile struct {
	asking chan struct{} // closed once the worker has answered; nil when nobody asks
	near   *near
	until  time.Time // when it may be asked for again
	pause  time.Duration
}

// near is one file that is lent.
type near struct {
	c      *Client
	index  catalog.Index
	object ring.Object
	lease  *Lease
	since  time.Time
	used   atomic.Int64 // when last, in nanoseconds after that, which no setting of the clock moves
	over   chan struct{}
	once   sync.Once // closes over

	mu     sync.Mutex
	blocks map[int64]*arrival
}

// arrival is a block that was asked for.
type arrival struct {
	done   chan struct{} // closed when sums or err is set
	sums   []uint64
	err    error
	at     time.Time     // when err was
	urgent chan struct{} // closed when somebody waits for it
	once   sync.Once     // closes urgent
}

// near is file i where a worker of this machine has it; nil: it is to be read over the network.
func (c *Client) near(ctx context.Context, i catalog.Index, o ring.Object) *near {
	if o.Size <= ring.BlockSize {
		return nil // it is one read, or it is passed through: asking costs more than it gains
	}
	s := &c.nears
	for {
		s.mu.Lock()
		f := s.files[i]
		switch {
		case f == nil:
			f = s.add(i, c.now())
		case f.near != nil:
			defer s.mu.Unlock()
			f.near.use()
			return f.near
		case f.asking != nil:
			asking := f.asking
			s.mu.Unlock()
			select {
			case <-asking:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		if s.lent >= maxNear || c.now().Before(f.until) {
			s.mu.Unlock()
			return nil
		}
		s.lent++
		f.asking = make(chan struct{})
		s.mu.Unlock()
		n := c.lendNear(i, o)
		s.mu.Lock()
		close(f.asking)
		f.asking = nil
		if n == nil {
			s.lent--
			f.refuse(c.now())
		} else {
			f.near = n
		}
		s.mu.Unlock()
		if n != nil && !c.spawn(n.keep) {
			n.end()
		}
		return n
	}
}

// now is a file that is lent, or nil: nobody is asked for it.
func (s *nears) now(i catalog.Index) *near {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.files[i]; f != nil && f.near != nil {
		return f.near
	}
	return nil
}

// add makes room for what is known of a file. s.mu is held.
func (s *nears) add(i catalog.Index, now time.Time) *nearFile {
	if s.files == nil {
		s.files = make(map[catalog.Index]*nearFile)
	}
	for other, f := range s.files { // any: what is lost is a pause
		if len(s.files) < maxFiles {
			break
		}
		if f.near == nil && f.asking == nil {
			delete(s.files, other)
		}
	}
	f := &nearFile{until: now}
	s.files[i] = f
	return f
}

// refuse notes that the file cannot be had, or not be read this way. nears.mu is held.
func (f *nearFile) refuse(now time.Time) {
	f.pause = min(max(2*f.pause, nearAgain), nearAgainMax)
	f.until = now.Add(f.pause)
}

// lendNear asks this machine's workers for a file. No reader's context bounds it, since others wait for it too.
func (c *Client) lendNear(i catalog.Index, o ring.Object) *near {
	if c.stripes(o) > 0 {
		return nil
	}
	for _, socket := range c.sockets(o) {
		l, err := c.sockLease(c.ctx, socket, i, o.Size, 0, wire.FlagEarly)
		if err != nil {
			c.log.Debug("a file is not read where its worker keeps it", "file", c.path(i), "socket", socket, "error", err)
			continue
		}
		n := &near{c: c, index: i, object: o, lease: l, since: c.now(), over: make(chan struct{}), blocks: make(map[int64]*arrival)}
		return n
	}
	return nil
}

// use notes that somebody reads the file.
func (n *near) use() { n.used.Store(int64(n.c.now().Sub(n.since))) }

// keep ends the loan when it is given up or lost, or nobody has read the file for long.
func (n *near) keep() {
	t := time.NewTicker(n.c.timing.nearIdle)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if n.c.now().Sub(n.since)-time.Duration(n.used.Load()) < n.c.timing.nearIdle {
				continue
			}
		case <-n.over:
		case <-n.lease.Lost:
		case <-n.c.ctx.Done():
		}
		n.end()
		return
	}
}

// end gives the file back. It is called once.
func (n *near) end() {
	n.stop()
	s := &n.c.nears
	s.mu.Lock()
	s.lent--
	if f := s.files[n.index]; f != nil && f.near == n {
		delete(s.files, n.index)
	}
	s.mu.Unlock()
	n.lease.Release()
}

// readNow fills p from off of the file if all of that is there.
func (n *near) readNow(p []byte, off int64) bool {
	for len(p) > 0 {
		block := off / ring.BlockSize
		n.mu.Lock()
		a := n.blocks[block]
		n.mu.Unlock()
		if a == nil || !isClosed(a.done) || a.err != nil {
			return false
		}
		from := int(off - block*ring.BlockSize)
		part := p[:min(len(p), blockLen(n.object.Size, block)-from)]
		if !n.read(block, a.sums, part, from) {
			return false
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	n.use()
	return true
}

// giveUp has the file read over the network for a while.
func (n *near) giveUp(err error) {
	n.c.log.Debug("a file is read over the network from now on", "file", n.c.path(n.index), "error", err)
	s := &n.c.nears
	s.mu.Lock()
	if f := s.files[n.index]; f != nil && f.near == n {
		f.near = nil
		f.refuse(n.c.now())
	}
	s.mu.Unlock()
	n.stop()
}

func (n *near) stop() { n.once.Do(func() { close(n.over) }) }

// forget gives a file back that nobody has open any more.
func (s *nears) forget(i catalog.Index) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[i]
	if f == nil || f.asking != nil { // what is lent to nobody goes once it is idle
		return
	}
	delete(s.files, i)
	if f.near != nil {
		f.near.stop()
	}
}

// want asks for a block, unless it was asked for already; nil: not long ago the worker had no room for it.
func (n *near) want(block int64) *arrival {
	n.mu.Lock()
	a := n.blocks[block]
	if a.refused() {
		if n.c.now().Sub(a.at) < nearAgain {
			n.mu.Unlock()
			return nil
		}
		a = nil
	}
	made := a == nil
	if made {
		a = &arrival{done: make(chan struct{}), urgent: make(chan struct{})}
		n.blocks[block] = a
	}
	n.mu.Unlock()
	if made && !n.c.spawn(func() {
		a.sums, a.err = n.ask(block, a.urgent)
		a.at = n.c.now()
		close(a.done)
		if a.err != nil && !a.refused() {
			n.giveUp(a.err)
		}
	}) {
		a.err = errClosed
		close(a.done)
	}
	return a
}

// refused says whether the worker has answered that it does not keep the block.
func (a *arrival) refused() bool {
	return a != nil && isClosed(a.done) && errors.Is(a.err, wire.ErrNotResident)
}

// hurry lets a block that somebody waits for go before those that are read ahead.
func (a *arrival) hurry() { a.once.Do(func() { close(a.urgent) }) }

// wanted says whether a block is there or on its way.
func (n *near) wanted(block int64) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	a := n.blocks[block]
	return a != nil && !a.refused()
}

// ask waits until the worker has a block, and returns its sums.
func (n *near) ask(block int64, urgent <-chan struct{}) ([]uint64, error) {
	c, l := n.c, n.lease.from
	size := blockLen(n.object.Size, block)
	slot, err := l.slots.acquire(c.ctx, int64(size), urgent)
	if err != nil {
		return nil, err
	}
	defer slot.release()
	defer time.AfterFunc(c.timing.slow, slot.yield).Stop()
	ctx, cancel := context.WithTimeoutCause(c.ctx, c.timing.near, wire.ErrLate)
	defer cancel()
	req := wire.Request{
		Op: wire.OpBlock, Snapshot: c.digest, Index: uint32(n.lease.id), Epoch: c.members.view().Epoch,
		Off: block * ring.BlockSize, Length: int32(size), WaitMillis: uint32(wire.WorkerTimeout.Milliseconds()),
	}
	r, err := l.ask(ctx, req)
	if err != nil {
		return nil, err
	}
	if r.file != nil {
		r.file.Close()
		return nil, fmt.Errorf("%w: a descriptor with a block", errWrong)
	}
	if err := r.reply.Status.Err(r.text); err != nil {
		return nil, err
	}
	if r.reply.Index != req.Index || r.reply.Off != req.Off {
		return nil, fmt.Errorf("%w: a block at %d instead of %d", errWrong, r.reply.Off, req.Off)
	}
	return wire.SumList([]byte(r.text), size)
}

// read reads from off of a block that is there, with those sums. False: it is not what they say.
func (n *near) read(block int64, sums []uint64, p []byte, off int) bool {
	size := blockLen(n.object.Size, block)
	err := readSummed(io.NewSectionReader(n.lease.File, block*ring.BlockSize, int64(size)), size, sums, p, off)
	if err == nil {
		return true
	}
	if errors.Is(err, wire.ErrCorrupt) && !isClosed(n.over) {
		n.c.count.corrupt.Add(1)
		n.c.count.refetched.Add(1)
		n.c.log.Warn("a block in the memory of this machine's worker failed its checksum and is read over the network", "file", n.c.path(n.index), "block", block, "error", err)
	}
	n.giveUp(err)
	return false
}
