package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/wire"
)

// Errors of a connection: none is an answer of the worker, all mean that its requests go elsewhere.
var (
	errLost   = errors.New("connection lost")
	errHung   = errors.New("worker does not answer")
	errWrong  = errors.New("worker answered another question")
	errClosed = errors.New("client is closed")
	// errIdle: nothing was asked over it for long. Only start says it, of a request that was not sent.
	errIdle = fmt.Errorf("%w: it was idle", errLost)
)

// call is one request under way on one connection. Its fields belong to the connection until done is
// closed, or until abandon returned true.
type call struct {
	req wire.Request
	// dst receives the payload of an OK reply, which has exactly its length; nil takes any
	// length (the decoder bounds it) into body.
	dst []byte
	// to, instead of dst, gets the payload of an OK reply piece by piece, each once it has been compared with its
	// sums: so not all of it, or parts of it again, unless the call ends well.
	to   io.WriterAt
	done chan struct{}

	reply wire.Reply
	body  []byte
	err   error
	bad   error // the body failed its sums, or to did not take it
}

// length is that of the payload of an OK reply; any if it is not known.
func (k *call) length() (n int, known bool) {
	if k.dst == nil && k.to == nil {
		return 0, false
	}
	return int(k.req.Length), true
}

// wait is for calls whose buffer is not shared with anyone: it gives up with ctx.
func (k *call) wait(ctx context.Context, c *conn) error {
	select {
	case <-k.done:
		return k.err
	case <-ctx.Done():
		if !c.takeBack(k) {
			return nil
		}
		return ctx.Err()
	}
}

// conn is one authenticated connection, multiplexed: many calls under way, answered in any order. It has
// two goroutines, which end when it fails; fail and rest are the ways to end it.
//
// The writer also watches liveness, and ends a connection over which nothing is asked any more: a worker has thousands
// of readers, and keeps nothing for one that its connection would have to be there for. Silence is counted in ticks
// during which the process ran, not in wall-clock time, so that a process that was stopped for a while does not take its
// own pause for the worker's.
type conn struct {
	nc    net.Conn
	sends chan *call
	// epoch is told the membership epoch of every reply.
	epoch func(uint64)
	// corrupt is told of a frame that does not decode.
	corrupt func()
	rx      atomic.Uint64 // bytes received
	grace   time.Duration // for an answer that is being received when its call is given up
	closed  chan struct{}

	mu      sync.Mutex
	pending map[uint32]*call
	current *call // whose payload is being received
	bytes   int64 // asked for and not answered
	nextID  uint32
	idle    int // ticks since the last call
	err     error
}

// newConn starts the goroutines of an authenticated connection in wg.
func newConn(nc net.Conn, wg *sync.WaitGroup, t timing, epoch func(uint64), corrupt func()) *conn {
	c := &conn{
		nc: nc, sends: make(chan *call, 64), epoch: epoch, corrupt: corrupt,
		grace: t.pong, closed: make(chan struct{}), pending: make(map[uint32]*call),
	}
	wg.Add(2)
	go func() { defer wg.Done(); c.read() }()
	go func() { defer wg.Done(); c.write(t) }()
	return c
}

// start sends a request. The call is done when its done channel is closed.
func (c *conn) start(req wire.Request, dst []byte, to io.WriterAt) (*call, error) {
	k := &call{req: req, dst: dst, to: to, done: make(chan struct{})}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil, c.err
	}
	for {
		c.nextID++
		if _, taken := c.pending[c.nextID]; !taken && c.nextID != pingID {
			break
		}
	}
	k.req.ID = c.nextID
	c.pending[k.req.ID] = k
	c.idle = 0
	n, _ := k.length()
	c.bytes += int64(n)
	c.mu.Unlock()
	select {
	case c.sends <- k:
	case <-c.closed: // fail has ended the call, or is about to
	}
	return k, nil
}

// abandon gives a call up: its reply will be thrown away. False means that the reply is being received
// or has been: the caller must wait for done before it touches the buffer (see takeBack).
func (c *conn) abandon(k *call) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending[k.req.ID] != k {
		return false
	}
	c.forget(k)
	return true
}

// takeBack gives a call up and returns once its buffer is the caller's again; false when the answer came at the
// last moment and counts. What is being received gets a little time. Then the connection ends, since bytes that
// come one by one are signs of life for ever.
func (c *conn) takeBack(k *call) bool {
	if c.abandon(k) {
		return true
	}
	t := time.NewTimer(c.grace)
	defer t.Stop()
	select {
	case <-k.done:
	case <-t.C:
		c.fail(fmt.Errorf("%w: an answer did not come to its end", errLost))
		<-k.done
	}
	return k.err != nil
}

// forget takes a call out of the pending ones. c.mu is held.
func (c *conn) forget(k *call) {
	delete(c.pending, k.req.ID)
	n, _ := k.length()
	c.bytes -= int64(n)
}

// load is how many bytes the connection has under way.
func (c *conn) load() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}

// rest counts a tick at which nothing is under way, and ends the connection at the most-th since the last call. False:
// something is under way. That is seen under the lock that calls enter under, so none is cut off.
func (c *conn) rest(most int) bool {
	c.mu.Lock()
	if len(c.pending) > 0 || c.current != nil {
		c.mu.Unlock()
		return false
	}
	if c.idle++; c.idle >= most {
		c.end(errIdle)
		return true
	}
	c.mu.Unlock()
	return true
}

// fail ends the connection and every call on it. Only the first reason counts.
func (c *conn) fail(err error) {
	c.mu.Lock()
	c.end(err)
}

// end is fail for who holds c.mu, which it unlocks.
func (c *conn) end(err error) {
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	calls := c.pending
	c.pending, c.bytes = nil, 0
	close(c.closed)
	c.mu.Unlock()
	c.nc.Close()
	for _, k := range calls {
		k.err = err
		close(k.done)
	}
}

func (c *conn) dead() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// pingID marks pings: no call has it.
const pingID = 0

func (c *conn) write(t timing) {
	tick := time.NewTicker(t.ping)
	defer tick.Stop()
	var (
		frame  []byte
		pinged bool   // a ping is out
		seen   uint64 // c.rx when it went out
		silent int    // ticks since, without a byte received
	)
	limit, most := int(max(1, t.pong/t.ping)), int(max(1, t.idle/t.ping))
	send := func() bool {
		// A worker that reads nothing for this long is as hung as one that writes nothing.
		c.nc.SetWriteDeadline(time.Now().Add(t.pong))
		if _, err := c.nc.Write(frame); err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				c.fail(errHung)
			} else {
				c.fail(fmt.Errorf("%w: %w", errLost, err))
			}
			return false
		}
		return true
	}
	for {
		frame = frame[:0]
		select {
		case k := <-c.sends:
			frame = wire.AppendRequest(frame, k.req)
			for more := true; more; {
				select {
				case k := <-c.sends:
					frame = wire.AppendRequest(frame, k.req)
				default:
					more = false
				}
			}
		case <-tick.C:
			if c.rest(most) {
				pinged, silent = false, 0
				continue
			}
			if rx := c.rx.Load(); pinged && rx == seen {
				if silent++; silent >= limit {
					c.fail(errHung)
					return
				}
				continue
			}
			pinged, seen, silent = true, c.rx.Load(), 0
			frame = wire.AppendRequest(frame, wire.Request{Op: wire.OpPing, ID: pingID})
		case <-c.closed:
			return
		}
		if !send() {
			return
		}
	}
}

// Read counts what arrives, for liveness: bytes of a large payload on a slow line are a sign of life.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.nc.Read(p)
	if n > 0 {
		c.rx.Add(uint64(n))
	}
	return n, err
}

func (c *conn) read() {
	// Large enough for any header with its sums; most of a payload bypasses it into the caller's buffer.
	br := bufio.NewReaderSize(c, 16<<10)
	for {
		if err := c.receive(br); err != nil {
			if errors.Is(err, wire.ErrCorrupt) {
				c.corrupt()
			}
			c.fail(broken(err))
			return
		}
	}
}

// broken says what a failure to read means for the connection.
func broken(err error) error {
	switch {
	case errors.Is(err, errWrong):
		return err
	case err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: the worker closed it", errLost)
	}
	return fmt.Errorf("%w: %w", errLost, err)
}

func (c *conn) receive(br *bufio.Reader) error {
	reply, err := wire.ReadReply(br)
	if err != nil {
		return err
	}
	c.epoch(reply.Epoch)
	c.mu.Lock()
	k := c.pending[reply.ID]
	if k != nil {
		c.forget(k)
		c.current = k
	}
	c.mu.Unlock()
	if k == nil { // a pong, or the answer to a call that was given up
		_, err := br.Discard(int(reply.Length))
		return err
	}
	err = c.payload(br, k, reply)
	c.mu.Lock()
	c.current = nil
	if err != nil {
		if k.err = c.err; k.err == nil { // else it was ended while it was received: that is why
			k.err = broken(err)
		}
	}
	c.mu.Unlock()
	close(k.done)
	return err
}

// stride is how much of a payload is received before it is compared with its sums and passed on: so much that what
// arrives meanwhile comes with the same system call, so little that the processor has it at hand still.
const stride = 16 * checksum.Size

// strides are what payloads of calls that have a writer are received through. There are as many as connections that
// receive such a payload just now, however many workers there are.
var strides = sync.Pool{New: func() any { return new([stride]byte) }}

// errSink: the bytes were right, and whoever they were for did not take them.
var errSink = errors.New("not taken")

// payload receives the payload of k's reply.
func (c *conn) payload(br *bufio.Reader, k *call, reply wire.Reply) error {
	k.reply = reply
	n, known := k.length()
	switch {
	case reply.Status != wire.OK:
		if reply.Length > wire.MaxMessage {
			return fmt.Errorf("%w: message of %d bytes", errWrong, reply.Length)
		}
		k.body = make([]byte, reply.Length)
	case !known:
		k.body = make([]byte, reply.Length) // bounded by the decoder
	case reply.Index != k.req.Index || reply.Off != k.req.Off || int(reply.Length) != n:
		return fmt.Errorf("%w: %d bytes at %d of file %d instead of %d at %d of %d", errWrong,
			reply.Length, reply.Off, reply.Index, n, k.req.Off, k.req.Index)
	default:
		k.body = k.dst // nil with a writer
	}
	var through *[stride]byte
	if k.body == nil && k.to != nil {
		through = strides.Get().(*[stride]byte)
		defer strides.Put(through)
	}
	for off := 0; off < int(reply.Length); off += stride {
		part := min(stride, int(reply.Length)-off)
		var p []byte
		if k.body != nil {
			p = k.body[off : off+part]
		} else {
			p = through[:part]
		}
		have := 0
		if br.Buffered() > 0 { // what came with the header
			have, _ = br.Read(p[:min(br.Buffered(), part)])
		}
		if _, err := io.ReadFull(c, p[have:]); err != nil {
			return err
		}
		if k.bad != nil {
			continue // the rest must be received all the same
		}
		first := off / checksum.Size
		if err := wire.CheckSums(p, reply.Sums[first:first+checksum.Count(part)]); err != nil {
			k.bad = fmt.Errorf("from byte %d: %w", off, err)
		} else if k.body == nil {
			if _, err := k.to.WriteAt(p, int64(off)); err != nil {
				k.bad = fmt.Errorf("%w: %w", errSink, err)
			}
		}
	}
	return nil
}
