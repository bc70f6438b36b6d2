package worker

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// maxIdlePeers is how many idle connections are kept to one worker.
	maxIdlePeers = 4
	// downFor is how long a worker that could not be reached, or hung, is not asked for blocks again: the
	// bucket has them, and each question would cost a reader the time that it takes to find out.
	downFor = 5 * time.Second
)

// peers asks other workers: for snapshots, and for blocks that this worker holds a copy of. A connection
// carries one request at a time; idle ones are kept for the next.
type peers struct {
	dataset string
	keys    func() wire.Keys
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	now     func() time.Time
	// ping and pong are wire.PingInterval and wire.PongTimeout but in tests.
	ping, pong time.Duration

	mu     sync.Mutex
	idle   map[string][]*peerConn
	down   map[string]down
	closed bool
}

// down is why a worker is not asked for blocks, and until when.
type down struct {
	until time.Time
	err   error
}

type peerConn struct {
	net.Conn
	r          *bufio.Reader
	ping, pong time.Duration
	next       uint32 // request ids
	used       bool   // carried a request before
}

// errPeer wraps what went wrong with the connection to a peer, as against what the peer answered.
type errPeer struct {
	member ring.Member
	err    error
}

func (e *errPeer) Error() string {
	return fmt.Sprintf("worker %s at %s: %v", e.member.ID, e.member.Addr, e.err)
}
func (e *errPeer) Unwrap() error { return e.err }

// frame asks m and returns its reply with a payload of any length.
func (p *peers) frame(ctx context.Context, m ring.Member, req wire.Request) (wire.Reply, []byte, error) {
	var body []byte
	rep, err := p.do(ctx, m, req, func(rep wire.Reply) []byte {
		body = make([]byte, rep.Length)
		return body
	})
	return rep, body, err
}

// read asks m for exactly len(p) bytes, which go into p.
func (p *peers) read(ctx context.Context, m ring.Member, req wire.Request, into []byte) error {
	p.mu.Lock()
	d := p.down[m.Addr]
	p.mu.Unlock()
	if p.now().Before(d.until) {
		return &errPeer{m, fmt.Errorf("not asked again so soon: %w", d.err)}
	}
	rep, err := p.do(ctx, m, req, func(rep wire.Reply) []byte {
		if int(rep.Length) != len(into) {
			return nil
		}
		return into
	})
	if err != nil {
		return err
	}
	if rep.Index != req.Index || rep.Off != req.Off {
		return &errPeer{m, fmt.Errorf("%w: answer to another question", wire.ErrCorrupt)}
	}
	return nil
}

// do asks m. buffer gives room for the payload of an OK reply; nil from it means that the length is wrong.
// An error is the status's, or an *errPeer.
func (p *peers) do(ctx context.Context, m ring.Member, req wire.Request, buffer func(wire.Reply) []byte) (wire.Reply, error) {
	for {
		c, err := p.conn(ctx, m)
		if err != nil {
			p.failed(ctx, m, err)
			return wire.Reply{}, &errPeer{m, err}
		}
		reused := c.used
		c.used = true
		rep, msg, answered, err := c.exchange(ctx, req, buffer)
		if err != nil {
			c.Close()
			if reused && !answered && ctx.Err() == nil && !errors.Is(err, errHung) {
				continue // the peer was restarted since: a new connection tells
			}
			if errors.Is(err, errHung) {
				p.failed(ctx, m, err)
			}
			return wire.Reply{}, &errPeer{m, err}
		}
		p.put(m.Addr, c)
		return rep, rep.Status.Err(msg)
	}
}

func (p *peers) conn(ctx context.Context, m ring.Member) (*peerConn, error) {
	p.mu.Lock()
	if l := p.idle[m.Addr]; len(l) > 0 {
		c := l[len(l)-1]
		p.idle[m.Addr] = l[:len(l)-1]
		p.mu.Unlock()
		return c, nil
	}
	p.mu.Unlock()
	dctx, cancel := context.WithTimeout(ctx, wire.DialTimeout)
	defer cancel()
	nc, err := wire.Connect(dctx, func(ctx context.Context) (net.Conn, error) { return p.dial(ctx, "tcp", m.Addr) },
		p.dataset, wire.RoleRead, p.keys(), nil)
	if err != nil {
		return nil, err
	}
	return &peerConn{Conn: nc, r: bufio.NewReaderSize(nc, 64<<10), ping: p.ping, pong: p.pong}, nil
}

// failed notes that m could not be reached, unless it was the caller who gave up.
func (p *peers) failed(ctx context.Context, m ring.Member, err error) {
	if ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down[m.Addr] = down{p.now().Add(downFor), err}
}

// keep closes the idle connections to everybody but the given members, whose addresses change with every
// restart of theirs, and forgets what was noted of others.
func (p *peers) keep(members []ring.Member) {
	var drop []*peerConn
	p.mu.Lock()
	is := func(addr string) bool {
		return slices.ContainsFunc(members, func(m ring.Member) bool { return m.Addr == addr })
	}
	for addr, l := range p.idle {
		if !is(addr) {
			drop = append(drop, l...)
			delete(p.idle, addr)
		}
	}
	for addr := range p.down {
		if !is(addr) {
			delete(p.down, addr)
		}
	}
	p.mu.Unlock()
	for _, c := range drop {
		c.Close()
	}
}

func (p *peers) put(addr string, c *peerConn) {
	p.mu.Lock()
	keep := !p.closed && len(p.idle[addr]) < maxIdlePeers
	if keep {
		p.idle[addr] = append(p.idle[addr], c)
	}
	delete(p.down, addr)
	p.mu.Unlock()
	if !keep {
		c.Close()
	}
}

func (p *peers) close() {
	p.mu.Lock()
	p.closed = true
	idle := p.idle
	p.idle = nil
	p.mu.Unlock()
	for _, l := range idle {
		for _, c := range l {
			c.Close()
		}
	}
}

// errHung: the peer answers no pings.
var errHung = fmt.Errorf("no answer to a ping within %v", wire.PongTimeout)

// exchange sends req and waits for its reply, pinging meanwhile: a peer that waits for a slow bucket
// answers pings and is waited for, one that hangs is not. Silence is counted in intervals that this process saw
// pass, not in wall-clock time: one that was stopped for a while does not take its own pause for the peer's.
// answered says that the peer sent something.
func (c *peerConn) exchange(ctx context.Context, req wire.Request, buffer func(wire.Reply) []byte) (rep wire.Reply, msg string, answered bool, err error) {
	// The end of ctx cuts every read and write short.
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err() // the connection's deadline is spoilt
		}
		if err == nil {
			err = c.SetDeadline(time.Time{})
		}
	}()
	c.next++
	req.ID = c.next
	if err := c.send(req); err != nil {
		return rep, "", false, err
	}
	silent, limit := 0, 1+int(max(1, c.pong/c.ping)) // intervals; after the first one there is a ping
	for {
		if err := c.readWithin(ctx, c.ping); err != nil {
			return rep, "", answered, err
		}
		if _, err := c.r.Peek(1); errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil {
			switch silent++; silent {
			case 1:
				c.next++
				if err := c.send(wire.Request{Op: wire.OpPing, ID: c.next}); err != nil {
					return rep, "", answered, err
				}
			case limit:
				return rep, "", answered, errHung
			}
			continue
		} else if err != nil {
			return rep, "", answered, err
		}
		answered = true
		if err := c.readWithin(ctx, wire.WorkerTimeout); err != nil {
			return rep, "", answered, err
		}
		rep, err := wire.ReadReply(c.r)
		if err != nil {
			return rep, "", answered, err
		}
		if rep.ID != req.ID {
			silent = 0 // the answer to a ping
			if rep.Length > 0 {
				return rep, "", answered, fmt.Errorf("%w: reply %d was not asked for", wire.ErrCorrupt, rep.ID)
			}
			continue
		}
		p := make([]byte, 0)
		if rep.Status != wire.OK {
			if rep.Length > wire.MaxMessage {
				return rep, "", answered, fmt.Errorf("%w: message of %d bytes", wire.ErrCorrupt, rep.Length)
			}
			p = make([]byte, rep.Length)
		} else if rep.Length > 0 {
			if p = buffer(rep); p == nil {
				return rep, "", answered, fmt.Errorf("%w: reply of %d bytes to a request for %d", wire.ErrCorrupt, rep.Length, req.Length)
			}
		} else if buffer(rep) == nil {
			return rep, "", answered, fmt.Errorf("%w: empty reply to a request for %d bytes", wire.ErrCorrupt, req.Length)
		}
		if _, err := io.ReadFull(c.r, p); err != nil {
			return rep, "", answered, err
		}
		if err := wire.CheckSums(p, rep.Sums); err != nil {
			return rep, "", answered, err
		}
		if rep.Status != wire.OK {
			msg = string(p)
		}
		return rep, msg, answered, nil
	}
}

// readWithin sets the deadline of the next reads. It looks at ctx after that, so that a deadline that the
// end of ctx has set is never undone for a read that follows.
func (c *peerConn) readWithin(ctx context.Context, d time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	return ctx.Err()
}

func (c *peerConn) send(r wire.Request) error {
	c.SetWriteDeadline(time.Now().Add(wire.PongTimeout))
	_, err := c.Write(wire.AppendRequest(nil, r))
	return err
}
