package worker

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/objects"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// Bounds of what readers may ask for at once. Beyond them the answer is Overloaded, so that a connection
// is always read and pings are always answered.
const (
	maxHandshakes   = 256 // connections that have not authenticated yet
	maxConnRequests = 256
	maxRequests     = 8192
	connPins        = 16 * ring.BlockSize
	// writeTimeout is how long a reader may take nothing of a reply before it is cut off, so that it does not keep
	// blocks from eviction and buffers from others. One that takes little has a slow line, which many share perhaps:
	// how long it waits for the whole is for it to say.
	writeTimeout = 10 * time.Second
	// chunkSize is the length of the buffers that replies are copied through. Over loopback, blocks of 4 MiB
	// from huge pages (4 KiB pages): copied in chunks of 1 MiB 4.7 (3.1) GB/s, a mapping made for each
	// block 4.7 (3.1), sendfile 3.1 (2.5), small files 3.7 (1.5), 2.4 (1.2), 3.3 (1.3). A copy needs no
	// mapping that outlives an eviction, and no pages in flight after the block was released.
	chunkSize = 1 << 20
	// maxChunks is how many of them are in use at most. A reader keeps one for as long as its reply takes, so of a crowd
	// that shares a line most have a small one, which costs the processor no more, and none waits for those that take
	// nothing.
	maxChunks  = 32
	smallChunk = 32 << 10
	// connMemory is what an idle connection takes, in heap, in its goroutine's stack and in the kernel.
	connMemory = 16 << 10
	// minConns and maxConns bound how many are open at once. The first is for a thousand nodes with some readers each.
	minConns = 8 << 10
	maxConns = 32 << 10
)

// connLimit is how many connections are open at once: half of what a pod has more of memory with a larger cache (1/64 of
// it) is for them, and half of the descriptors; files need some too.
func connLimit(memory int64, descriptors uint64) int {
	return int(min(uint64(min(max(memory/128/connMemory, minConns), maxConns)), max(descriptors/2, 1)))
}

// budget bounds the bytes that a reader may hold.
type budget struct{ s *semaphore.Weighted }

func newBudget(n int64) budget { return budget{semaphore.NewWeighted(n)} }

func (b budget) take(ctx context.Context, n int64) error {
	if b.s == nil {
		return nil // the worker's own fills are bounded by their number
	}
	return b.s.Acquire(ctx, n)
}

func (b budget) try(n int64) bool { return b.s == nil || b.s.TryAcquire(n) }

func (b budget) give(n int64) {
	if b.s != nil {
		b.s.Release(n)
	}
}

// conn is one reader's connection. One goroutine reads requests; each runs in its own, and writes its
// reply when it has the turn.
type conn struct {
	net.Conn
	worker   *Worker
	cancel   context.CancelFunc
	turn     chan struct{} // holds a token while a reply is written
	requests chan struct{} // a token for each request under way
	budget   budget        // fills and blocks in heap
	pins     budget        // resident blocks that wait to be sent
	header   []byte        // of the reply being written
}

// chunks and smallChunks are the buffers that replies are copied through; chunkTokens has a token for each of chunks that
// is in use.
var (
	chunks      = sync.Pool{New: func() any { b := make([]byte, chunkSize); return &b }}
	smallChunks = sync.Pool{New: func() any { b := make([]byte, smallChunk); return &b }}
	chunkTokens = make(chan struct{}, maxChunks)
)

// takeChunk returns a buffer for a reply of n bytes; giveChunk takes it back.
func takeChunk(n int64) *[]byte {
	if n > smallChunk {
		select {
		case chunkTokens <- struct{}{}:
			return chunks.Get().(*[]byte)
		default:
		}
	}
	return smallChunks.Get().(*[]byte)
}

func giveChunk(buf *[]byte) {
	if len(*buf) == smallChunk {
		smallChunks.Put(buf)
		return
	}
	chunks.Put(buf)
	<-chunkTokens
}

// acceptBlocks serves the block protocol until the listener is closed, and returns once every connection
// has ended.
func (w *Worker) acceptBlocks(ctx context.Context, l net.Listener) error {
	strangers := make(chan struct{}, maxHandshakes)
	return w.accept(ctx, l, func(ctx context.Context, nc net.Conn) {
		select {
		case strangers <- struct{}{}:
		default:
			w.counts.refused.Add(1)
			return
		}
		role, id, err := wire.ServerHandshake(nc, w.config.Dataset, w.keys.Keys())
		<-strangers
		if err != nil {
			w.counts.refused.Add(1)
			w.log.Debug("connection refused", "error", err)
			return
		}
		w.serveConn(ctx, nc, &permit{keys: w.keys.Keys, now: w.clock.Now, role: role, id: id, checked: w.clock.Now()})
	})
}

// permit is what a connection was let in for. A key that is taken away, because it leaked perhaps, must not
// serve on over connections that it opened before. It is for one goroutine.
type permit struct {
	keys    func() wire.Keys
	now     func() time.Time
	role    wire.Role
	id      wire.KeyID
	checked time.Time
}

// permitEvery is how often a connection's key is looked up again.
const permitEvery = time.Second

// valid says whether the key is still one of the dataset's.
func (p *permit) valid() bool {
	if now := p.now(); now.Sub(p.checked) >= permitEvery {
		p.checked = now
		return p.keys().Has(p.role, p.id)
	}
	return true
}

// accept runs serve for each connection of l, a bounded number at once, until l is closed. It closes the
// connection after serve, and returns after the last.
func (w *Worker) accept(ctx context.Context, l net.Listener, serve func(context.Context, net.Conn)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("limit of descriptors: %w", err)
	}
	slots := make(chan struct{}, connLimit(w.config.Memory, files.Cur))
	for {
		nc, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			// Out of descriptors, most likely: those that are open may be closed soon.
			w.log.Warn("accept failed", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			nc.Close()
			w.counts.refused.Add(1)
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			defer nc.Close()
			serve(ctx, nc)
		})
	}
}

// serveConn serves an authenticated connection until its reader closes it or the worker stops. What is
// under way then is finished, as far as the drain time lets it.
func (w *Worker) serveConn(ctx context.Context, nc net.Conn, permit *permit) {
	cctx, cancel := context.WithCancel(w.hard)
	c := &conn{
		Conn: nc, worker: w, cancel: cancel, turn: make(chan struct{}, 1),
		requests: make(chan struct{}, maxConnRequests), budget: newBudget(w.connBudget), pins: newBudget(connPins),
	}
	// The end of ctx stops the reading of requests, the end of hard everything.
	stopRead := context.AfterFunc(ctx, func() { nc.SetReadDeadline(time.Unix(1, 0)) })
	stopAll := context.AfterFunc(cctx, func() { nc.Close() })
	var wg sync.WaitGroup
	defer func() {
		stopRead()
		if ctx.Err() == nil {
			cancel() // the reader left: nobody waits for what is under way
		}
		wg.Wait()
		cancel()
		stopAll()
	}()
	r := bufio.NewReaderSize(nc, 2<<10) // thousands of connections have one
	for {
		req, err := wire.ReadRequest(r)
		if err != nil {
			if err != io.EOF && ctx.Err() == nil && cctx.Err() == nil {
				w.log.Debug("connection ended", "peer", nc.RemoteAddr().String(), "error", err)
			}
			return
		}
		if !permit.valid() {
			w.counts.refused.Add(1)
			w.log.Info("connection ended: its key is not one of the dataset's any more", "peer", nc.RemoteAddr().String())
			return
		}
		if req.Op == wire.OpObjects {
			serve, err := w.namesFor(permit)
			if err != nil {
				c.fail(cctx, req, err)
				return
			}
			if c.reply(cctx, req, wire.Reply{}, nil) == nil {
				// The sender waits for the reply, so that nothing of what follows is in r.
				stopRead()
				serve(ctx, nc, permit.valid)
			}
			return
		}
		if req.Op == wire.OpOffer {
			if err := c.offered(cctx, ctx, req, r); err != nil {
				c.fail(cctx, req, err)
			}
			return
		}
		if req.Op == wire.OpPing {
			if c.reply(cctx, req, wire.Reply{}, nil) != nil {
				return
			}
			continue
		}
		if !c.begin() {
			if c.fail(cctx, req, fmt.Errorf("%w: too many requests at worker %s", wire.ErrOverloaded, w.config.ID)) != nil {
				return
			}
			continue
		}
		wg.Go(func() {
			defer c.end()
			c.handle(cctx, req)
		})
	}
}

// begin takes a place among the requests of the connection and of the worker.
func (c *conn) begin() bool {
	select {
	case c.requests <- struct{}{}:
	default:
		return false
	}
	select {
	case c.worker.requests <- struct{}{}:
		return true
	default:
		<-c.requests
		return false
	}
}

func (c *conn) end() {
	<-c.worker.requests
	<-c.requests
}

// handle answers one request.
func (c *conn) handle(ctx context.Context, req wire.Request) {
	var err error
	switch req.Op {
	case wire.OpRead:
		err = c.read(ctx, req)
	case wire.OpHandOver:
		err = c.takeOver(ctx, req)
	case wire.OpSnapshot:
		err = c.snapshot(ctx, req)
	case wire.OpMembers:
		err = c.members(ctx, req)
	case wire.OpResident:
		err = c.resident(ctx, req)
	default:
		err = fmt.Errorf("%w: operation %d is not served here", source.ErrInvalid, req.Op)
	}
	if err != nil {
		c.fail(ctx, req, err)
	}
}

// resolve is the file that a request names, and its snapshot, to be released.
func (w *Worker) resolve(req wire.Request) (*snapshot, file, error) {
	snap, ok := w.snapshots.get(req.Snapshot)
	if !ok {
		w.wantSnapshot(req.Snapshot)
		return nil, file{}, w.unknownSnapshot(req.Snapshot)
	}
	f, ok := snap.file(catalog.Index(req.Index))
	if !ok {
		snap.release()
		return nil, file{}, fmt.Errorf("%w: node %d is not a file of the snapshot", source.ErrInvalid, req.Index)
	}
	return snap, f, nil
}

func (c *conn) read(ctx context.Context, req wire.Request) error {
	w := c.worker
	snap, f, err := w.resolve(req)
	if err != nil {
		return err
	}
	snap.release()
	if err := checkRange(f.ring.Size, req.Off, req.Length); err != nil {
		return fmt.Errorf("%s: %w", f, err)
	}
	block := req.Off / ring.BlockSize
	within, cancel := context.WithTimeout(ctx, waitOf(req))
	b, done, unpin, err := c.acquire(within, f, block, req.Flags)
	cancel()
	if err != nil {
		return err
	}
	defer unpin()
	defer done()
	defer b.Release()
	off := req.Off - blockOff(block)
	first := int(off / checksum.Size)
	sums := b.Sums()[first : first+checksum.Count(int(req.Length))]
	if err := c.replyBlock(ctx, req, wire.Reply{Index: req.Index, Off: req.Off, Length: req.Length, Sums: sums}, b, off); err != nil {
		return err
	}
	if req.Flags&wire.FlagPeer == 0 { // a worker that fills its own copy is no reader
		w.counts.served.Add(int64(req.Length))
	}
	return nil
}

// acquire is Worker.acquire with a bound on the resident blocks that wait for the connection's turn: they
// are kept from eviction, and a reader that takes its answers slowly must not keep much from it.
func (c *conn) acquire(ctx context.Context, f file, block int64, flags wire.Flag) (b *store.Block, done, unpin func(), err error) {
	none := func() {}
	size := blockLen(f.ring.Size, block)
	b, done, err = c.worker.acquire(ctx, f, block, flags, c.budget)
	if err != nil || !b.Resident() {
		return b, done, none, err
	}
	if c.pins.try(size) {
		return b, done, func() { c.pins.give(size) }, nil
	}
	// It has enough waiting: this block is free to go until there is room, and is most likely still there.
	b.Release()
	done()
	if err := c.pins.take(ctx, size); err != nil {
		return nil, none, none, fmt.Errorf("%w: block %d of %s: this reader does not take what it asked for: %w", wire.ErrOverloaded, block, f, err)
	}
	b, done, err = c.worker.acquire(ctx, f, block, flags, c.budget)
	if err != nil {
		c.pins.give(size)
		return nil, none, none, err
	}
	return b, done, func() { c.pins.give(size) }, nil
}

func (c *conn) takeOver(ctx context.Context, req wire.Request) error {
	snap, f, err := c.worker.resolve(req)
	if err != nil {
		return err
	}
	snap.release()
	if err := c.worker.takeOver(ctx, req, f, c.budget); err != nil {
		return err
	}
	return c.reply(ctx, req, wire.Reply{Index: req.Index, Off: req.Off}, nil)
}

func (c *conn) snapshot(ctx context.Context, req wire.Request) error {
	w := c.worker
	var snap *snapshot
	var ok bool
	if req.Snapshot == (wire.Digest{}) {
		snap, ok = w.snapshots.tellable()
	} else {
		snap, ok = w.snapshots.get(req.Snapshot)
	}
	if !ok {
		return w.unknownSnapshot(req.Snapshot)
	}
	defer snap.release()
	encoded := snap.Encoded()
	size := int64(len(encoded))
	if req.Length < 0 || req.Length > wire.MaxPayload || req.Off < 0 || req.Off > size {
		return fmt.Errorf("%w: %d bytes from %d of a snapshot of %d", source.ErrInvalid, req.Length, req.Off, size)
	}
	p := encoded[req.Off:min(size, req.Off+int64(req.Length))]
	return c.reply(ctx, req, wire.Reply{Off: req.Off, Size: size, Body: snap.Digest()}, p)
}

func (c *conn) members(ctx context.Context, req wire.Request) error {
	encoded := c.worker.members.view().encoded
	if len(encoded) > wire.MaxPayload {
		return fmt.Errorf("%w: the membership list has %d bytes, more than a reply", wire.ErrInternal, len(encoded))
	}
	var rep wire.Reply
	if c.worker.gateway != nil {
		rep.Index = wire.NamesServed
	}
	return c.reply(ctx, req, rep, encoded)
}

func (c *conn) resident(ctx context.Context, req wire.Request) error {
	snap, f, err := c.worker.resolve(req)
	if err != nil {
		return err
	}
	snap.release()
	p := c.worker.store.Bitmap(f.ring)
	if len(p) > wire.MaxPayload {
		return fmt.Errorf("%w: %s has too many blocks", source.ErrInvalid, f)
	}
	return c.reply(ctx, req, wire.Reply{Index: req.Index}, p)
}

// fail answers with the status of err.
func (c *conn) fail(ctx context.Context, req wire.Request, err error) error {
	if ctx.Err() != nil {
		return ctx.Err() // the connection ended: nobody is there to be told
	}
	if errors.Is(err, errWrite) {
		return err
	}
	status := wire.StatusOf(err)
	if status == wire.Internal {
		c.worker.log.Error("request failed", "op", req.Op, "error", err)
	}
	c.worker.counts.status(status)
	return c.reply(ctx, req, wire.Reply{Status: status, Index: req.Index, Off: req.Off}, wire.Text(err.Error()))
}

// errWrite: the reply could not be written; the connection is closed.
var errWrite = errors.New("reply not written")

// reply writes a reply with a payload in memory.
func (c *conn) reply(ctx context.Context, req wire.Request, rep wire.Reply, p []byte) error {
	rep.Length, rep.Sums = int32(len(p)), checksum.All(p)
	return c.write(ctx, req, rep, func(header []byte) error {
		return c.send(header, p)
	})
}

// replyBlock writes a reply whose payload are the bytes of b from off on. Its sums are the stored ones.
func (c *conn) replyBlock(ctx context.Context, req wire.Request, rep wire.Reply, b *store.Block, off int64) error {
	if p := b.Bytes(); p != nil {
		return c.write(ctx, req, rep, func(header []byte) error {
			return c.send(header, p[off:off+int64(rep.Length)])
		})
	}
	return c.write(ctx, req, rep, func(header []byte) error {
		buf := takeChunk(int64(rep.Length))
		defer giveChunk(buf)
		for left := int64(rep.Length); left > 0; {
			p := (*buf)[:min(left, int64(len(*buf)))]
			if _, err := b.ReadAt(p, off); err != nil {
				// Whoever cut the file short did so to all who come: the next one has the block fetched again.
				c.worker.store.Verify(b)
				return fmt.Errorf("read a block in memory: %w", err)
			}
			if err := c.send(header, p); err != nil {
				return err
			}
			header = nil
			off += int64(len(p))
			left -= int64(len(p))
		}
		return nil
	})
}

// write waits for the connection's turn and writes one frame. After an error the connection is closed:
// half a frame may have left.
func (c *conn) write(ctx context.Context, req wire.Request, rep wire.Reply, frame func(header []byte) error) error {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errWrite, ctx.Err())
	}
	defer func() { <-c.turn }()
	rep.ID, rep.Epoch = req.ID, c.worker.members.view().Epoch
	c.header = wire.AppendReply(c.header[:0], rep)
	if err := frame(c.header); err != nil {
		c.cancel()
		c.Close()
		c.worker.log.Debug("reply not written", "peer", c.RemoteAddr().String(), "error", err)
		return fmt.Errorf("%w: %w", errWrite, err)
	}
	return nil
}

// send writes a piece of a frame for as long as the reader takes some of it.
func (c *conn) send(header, p []byte) error {
	bufs := net.Buffers{header, p}
	// In two halves: the kernel tells of room once there is much of it, but who asks gets what there is.
	for idle := 0; ; {
		if err := c.SetWriteDeadline(time.Now().Add(writeTimeout / 2)); err != nil {
			return err
		}
		n, err := bufs.WriteTo(c.Conn)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if idle++; n > 0 {
			idle = 0
		}
		if idle == 2 {
			return err
		}
	}
}

// namesFor is what serves a connection with requests about names: other workers' have the write key, those of
// readers that follow the names the read key.
func (w *Worker) namesFor(p *permit) (serve func(context.Context, net.Conn, func() bool), err error) {
	switch {
	case w.gateway == nil:
		return nil, fmt.Errorf("%w: worker %s serves a read-only dataset", source.ErrInvalid, w.config.ID)
	case p.role == wire.RoleWrite:
		return w.gateway.names.ServeConn, nil
	case p.role == wire.RoleRead:
		return func(ctx context.Context, nc net.Conn, valid func() bool) {
			objects.Serve(ctx, nc, valid, w.gateway.readers)
		}, nil
	}
	return nil, fmt.Errorf("%w: worker %s: requests about names need the read or the write key", source.ErrDenied, w.config.ID)
}
