package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// ErrNoLease: no descriptor of the file can be had now; the error says why. ReadAt serves it all the same.
var ErrNoLease = errors.New("no lease")

// maxLeaseFill is the size of the largest file that is brought into the node's store whole for a lease.
const maxLeaseFill = 256 << 20

// crowdPatience is how long a larger file is waited for to become whole where a worker of this machine finds that
// enough read it already.
const crowdPatience = 5 * time.Second

// fillers is how many blocks are fetched at once for that.
const fillers = 8

// Lease is a read-only descriptor of a file that is wholly in memory on this machine. Its bytes are those
// of the snapshot for as long as the descriptor is open, also when the worker that gave it is gone.
type Lease struct {
	File *os.File
	// Lost is closed when the worker that gave the lease went away: the memory of a file that nobody else
	// has open then stays taken until the lease is released. Nil for a lease of the node's own store.
	Lost <-chan struct{}

	from    *leaser // who gave it, by this id; nil for one of the node's own store
	id      int64
	once    sync.Once
	release func()
}

// Release ends the lease and closes File. It may be called more than once.
func (l *Lease) Release() { l.once.Do(l.release) }

// Lease returns a descriptor of file i from a worker on this machine that holds all of it, or from the
// node's store. With wait the file is first brought in, for about that long at most. A large one that is not whole
// may be waited for without it, where so many read it that one more would only slow them: for crowdPatience at most, and
// for three quarters of the time that ctx has. When passthrough is not possible now the error wraps ErrNoLease.
func (c *Client) Lease(ctx context.Context, i catalog.Index, wait time.Duration) (*Lease, error) {
	if !c.begin() {
		return nil, errClosed
	}
	defer c.calls.Done()
	o, err := c.object(i)
	if err != nil {
		return nil, err
	}
	no := func(why error) error { return fmt.Errorf("%s: %w: %w", c.name(i), ErrNoLease, why) }
	if o.Size == 0 {
		return nil, no(errors.New("the file is empty"))
	}
	if n := c.stripes(o); n > 0 {
		return nil, no(fmt.Errorf("the file is striped over %d workers", n))
	}
	patience := wait
	if wait == 0 && o.Size > c.timing.large {
		patience = c.timing.crowd
		if end, ok := ctx.Deadline(); ok {
			patience = max(min(patience, time.Until(end)/4*3), 0)
		}
	}
	reason := errors.New("no owner of it has a socket on this machine")
	for _, socket := range c.sockets(o) {
		l, err := c.sockLease(ctx, socket, i, o.Size, patience, 0)
		if err == nil {
			c.count.leases.Add(1)
			return l, nil
		}
		reason = err
		if ctx.Err() != nil {
			return nil, no(context.Cause(ctx))
		}
	}
	if c.config.Store != nil {
		l, err := c.storeLease(ctx, i, o, wait)
		if err == nil {
			c.count.leases.Add(1)
			return l, nil
		}
		reason = err
	}
	return nil, no(reason)
}

// stripes is over how many workers a file is striped; 0: each of its owners owns all of it, as where there are no more
// workers than copies.
func (c *Client) stripes(o ring.Object) int {
	if o.Size > ring.StripeThreshold {
		if n := len(c.members.view().Owners(o, 0, 0)); n > c.copies {
			return n
		}
	}
	return 0
}

// sockets are those of the file's owners: of workers on this node, or, of a client that is not told its node, any that
// is there. One that is told looks at no other path: what a worker calls its socket may be anything on this machine.
func (c *Client) sockets(o ring.Object) []string {
	var here, there []string
	for _, m := range c.members.view().Owners(o, 0, c.copies) {
		switch {
		case m.Socket == "":
		case m.Node == c.config.Node:
			here = append(here, m.Socket)
		case c.config.Node == "":
			if _, err := os.Stat(m.Socket); err == nil {
				there = append(there, m.Socket)
			}
		}
	}
	return append(here, there...)
}

// storeLease leases from the node's store, filling it first if there is time.
func (c *Client) storeLease(ctx context.Context, i catalog.Index, o ring.Object, wait time.Duration) (*Lease, error) {
	st := c.config.Store
	lease, err := st.Lease(o)
	if err != nil && wait > 0 {
		if stats := st.Stats(); o.Size > maxLeaseFill || o.Size > stats.Quota/2 {
			return nil, fmt.Errorf("%d bytes are too many for the node's store", o.Size)
		}
		if err := c.fill(ctx, i, o, wait); err != nil {
			return nil, err
		}
		lease, err = st.Lease(o)
	}
	if err != nil {
		return nil, err
	}
	return &Lease{File: lease.File, release: lease.Release}, nil
}

// fill brings all blocks of a file into the node's store.
func (c *Client) fill(ctx context.Context, i catalog.Index, o ring.Object, wait time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, errDeadline)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fillers)
	for block := range ring.Blocks(o.Size) {
		g.Go(func() error {
			key := blockKey{i, block}
			defer c.fills.begin(key)()
			for {
				b, err := c.config.Store.Place(ctx, o, block, func(ctx context.Context, to io.WriterAt) ([]uint64, error) {
					return c.fillBlock(ctx, piece{index: i, object: o, block: block, off: block * ring.BlockSize, n: blockLen(o.Size, block), urgent: now, to: to})
				})
				if errors.Is(err, errClosed) && ctx.Err() == nil && c.ctx.Err() == nil {
					continue // another client of the store was to fill it, and was closed
				}
				if err != nil {
					return err
				}
				b.Release()
				return nil
			}
		})
	}
	return g.Wait()
}

// fillBlock gets a whole block for the node's store. The store may run it on after who began it has given up,
// because others wait for the block, so Close must know of it; they are told that it was closed.
func (c *Client) fillBlock(ctx context.Context, w piece) (sums []uint64, err error) {
	if !c.begin() {
		return nil, errClosed
	}
	defer c.calls.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	if sums, err = c.copyBuffered(ctx, w); sums != nil || err != nil {
		return sums, err
	}
	w.sums = &sums
	err = c.fetch(ctx, w, nil)
	if err != nil && c.ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", errClosed, err)
	}
	return sums, err
}

// copyBuffered copies a whole block that is in the client's buffers or on its way there; no sums: it is not.
func (c *Client) copyBuffered(ctx context.Context, w piece) ([]uint64, error) {
	_, hi := span(0, w.n)
	e := c.cache.find(blockKey{w.index, w.block}, 0, hi)
	if e == nil {
		return nil, nil
	}
	defer c.cache.release(e)
	select {
	case <-e.done:
	case <-ctx.Done():
		return nil, nil
	}
	if e.err != nil {
		return nil, nil
	}
	if _, err := w.to.WriteAt(e.buf, 0); err != nil {
		return nil, err
	}
	c.count.joins.Add(1)
	return checksum.All(e.buf), nil
}

// fills are the blocks that are being fetched into the node's store for leases, so that reads wait for them
// instead of fetching them as well.
type fills struct {
	mu sync.Mutex
	m  map[blockKey]*filling
}

type filling struct {
	done chan struct{}
	n    int
}

// begin notes a fill until the returned function is called.
func (f *fills) begin(key blockKey) (end func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.m == nil {
		f.m = make(map[blockKey]*filling)
	}
	w := f.m[key]
	if w == nil {
		w = &filling{done: make(chan struct{})}
		f.m[key] = w
	}
	w.n++
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if w.n--; w.n == 0 {
			delete(f.m, key)
			close(w.done)
		}
	}
}

// of is closed when the fill of a block has ended; nil if there is none.
func (f *fills) of(key blockKey) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if w := f.m[key]; w != nil {
		return w.done
	}
	return nil
}

// leaser is a connection to a worker's Unix socket. Leases end with it, so it is kept while there are any.
type leaser struct {
	c      *Client
	path   string
	conn   *net.UnixConn
	closed chan struct{}
	slots  slots // of blocks that are asked for

	mu      sync.Mutex
	nextID  uint32
	pending map[uint32]chan leased
	err     error
}

type leased struct {
	reply wire.Reply
	text  string
	file  *os.File
	err   error
}

// sock is one socket path: its connection, or until when it is not tried again.
type sock struct {
	mu      sync.Mutex
	leaser  *leaser
	dialing chan struct{}
	until   time.Time
	err     error
}

func (c *Client) sockLease(ctx context.Context, path string, i catalog.Index, size int64, wait time.Duration, flags wire.Flag) (*Lease, error) {
	s, l, err := c.leaser(ctx, path)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, wait+c.timing.pong, wire.ErrLate)
	defer cancel()
	r, err := l.ask(ctx, wire.Request{
		Op: wire.OpLease, Flags: flags, Snapshot: c.digest, Index: i, Epoch: c.members.view().Epoch,
		WaitMillis: uint32(min(wait, time.Hour).Milliseconds()),
	})
	if errors.Is(err, wire.ErrLate) {
		// The next files must not be opened that slowly. Its leases stay: they need no answers.
		s.hold(c.now().Add(c.timing.redialMax), err)
	}
	if err != nil {
		return nil, err
	}
	if err := r.reply.Status.Err(r.text); err != nil {
		if r.file != nil {
			r.file.Close()
		}
		return nil, err
	}
	id := r.reply.Off
	if r.file == nil {
		return nil, fmt.Errorf("%w: a lease without a descriptor", errWrong)
	}
	// That it is a regular file, open for reading only, was checked as it was received.
	info, err := r.file.Stat()
	if err == nil && (info.Size() != size || r.reply.Index != i) {
		err = fmt.Errorf("%w: a descriptor of a file of %d bytes instead of %d", errWrong, info.Size(), size)
	}
	if err != nil {
		r.file.Close()
		l.giveBack(id)
		return nil, err
	}
	file := r.file
	return &Lease{File: file, Lost: l.closed, from: l, id: id, release: func() {
		file.Close() // first: from then on the worker may free it
		l.giveBack(id)
	}}, nil
}

// leaser returns the connection to a socket, made now if there is none. One that cannot be reached is not
// tried again for a while, since opening a file must not wait for it each time.
func (c *Client) leaser(ctx context.Context, path string) (*sock, *leaser, error) {
	c.mu.Lock()
	s := c.socks[path]
	if s == nil {
		s = &sock{}
		c.socks[path] = s
	}
	c.mu.Unlock()
	for {
		s.mu.Lock()
		switch {
		case s.dialing == nil && c.now().Before(s.until):
			defer s.mu.Unlock()
			return nil, nil, s.err
		case s.leaser != nil && !isClosed(s.leaser.closed):
			defer s.mu.Unlock()
			return s, s.leaser, nil
		case s.dialing == nil:
			s.dialing = make(chan struct{})
			s.mu.Unlock()
			l, err := c.dialSocket(ctx, path)
			s.mu.Lock()
			close(s.dialing)
			s.dialing, s.leaser, s.err = nil, l, err
			if err != nil && ctx.Err() == nil {
				s.until = c.now().Add(c.timing.redialMax)
			}
			s.mu.Unlock()
			return s, l, err
		}
		wait := s.dialing
		s.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
}

// hold makes the socket be left alone for a while.
func (s *sock) hold(until time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until, s.err = until, err
}

func (c *Client) dialSocket(ctx context.Context, path string) (*leaser, error) {
	nc, err := c.prove(ctx, "unixpacket", path, nil)
	if err != nil {
		return nil, err
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("%s: the dialer gave no Unix socket", path)
	}
	l := &leaser{c: c, path: path, conn: uc, closed: make(chan struct{}), pending: make(map[uint32]chan leased)}
	failed := make(chan struct{})
	stop := context.AfterFunc(c.ctx, func() { defer close(failed); l.fail(errClosed) })
	if !c.spawn(func() {
		l.read()
		if !stop() {
			<-failed // Close waits for this goroutine, and so for that one
		}
	}) {
		if !stop() {
			<-failed
		}
		l.fail(errClosed)
		return nil, errClosed
	}
	return l, nil
}

// ask sends one request and waits for its answer.
func (l *leaser) ask(ctx context.Context, req wire.Request) (leased, error) {
	answer := make(chan leased, 1)
	l.mu.Lock()
	if l.err != nil {
		defer l.mu.Unlock()
		return leased{}, l.err
	}
	l.nextID++
	req.ID = l.nextID
	l.pending[req.ID] = answer
	l.mu.Unlock()
	if err := l.send(req); err != nil {
		return leased{}, err
	}
	select {
	case r := <-answer:
		return r, r.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	_, waiting := l.pending[req.ID]
	delete(l.pending, req.ID)
	l.mu.Unlock()
	if !waiting { // it came at the last moment
		r := <-answer
		return r, r.err
	}
	return leased{}, fmt.Errorf("socket %s: %w", l.path, context.Cause(ctx))
}

// send writes one packet, which is whole or not at all however many write.
func (l *leaser) send(req wire.Request) error {
	l.conn.SetWriteDeadline(time.Now().Add(wire.PongTimeout))
	if err := wire.SendWithFD(l.conn, wire.AppendRequest(nil, req), nil); err != nil {
		err = fmt.Errorf("socket %s: %w: %w", l.path, errLost, err)
		l.fail(err)
		return err
	}
	return nil
}

func (l *leaser) giveBack(id int64) {
	if !isClosed(l.closed) {
		_ = l.send(wire.Request{Op: wire.OpRelease, Snapshot: l.c.digest, Off: id}) // if it fails the lease ended with the connection
	}
}

func (l *leaser) read() {
	buf := make([]byte, wire.MaxPacket)
	for {
		n, file, err := wire.ReceiveWithFD(l.conn, buf, l.c.config.Descriptor)
		if err != nil {
			l.fail(fmt.Errorf("socket %s: %w: %w", l.path, errLost, err))
			return
		}
		reply, text, err := wire.ReadFrame(bytes.NewReader(buf[:n]))
		if err != nil {
			if file != nil {
				file.Close()
			}
			l.fail(fmt.Errorf("socket %s: %w: %w", l.path, errLost, err))
			return
		}
		l.mu.Lock()
		answer := l.pending[reply.ID]
		delete(l.pending, reply.ID)
		l.mu.Unlock()
		switch {
		case answer != nil:
			answer <- leased{reply: reply, text: string(text), file: file}
		case file != nil: // nobody waits for it any more
			file.Close()
			l.giveBack(reply.Off)
		}
	}
}

// fail ends the connection: the worker is gone, or its leases are.
func (l *leaser) fail(err error) {
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return
	}
	l.err = err
	pending := l.pending
	l.pending = nil
	close(l.closed)
	l.mu.Unlock()
	l.conn.Close()
	for _, answer := range pending {
		answer <- leased{err: err}
	}
}
