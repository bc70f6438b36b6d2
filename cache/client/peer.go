package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// errDown: the worker could not be reached lately and is being redialled; the error wraps why.
var errDown = errors.New("no connection to the worker")

// connsPerPeer bounds the connections to one worker: a second one is opened once the first has more
// than a block under way.
const connsPerPeer = 2

// peer is one worker at one address: its connections, its slots and whether it is believed alive.
//
// It dials on first use, and anew once its connections were closed since nothing was asked. When a dial fails or a
// connection hangs the peer is down: requests fail at once and a goroutine of its own redials with jittered backoff until
// it succeeds or the peer is closed, so that no request pays for finding out.
type peer struct {
	c      *Client
	member ring.Member
	slots  slots
	ctx    context.Context
	cancel context.CancelFunc
	// strange is set when it did not get the client's snapshot in good time.
	strange atomic.Bool
	told    atomic.Uint64 // the newest epoch that it announced and was asked about
	outage  outage

	mu      sync.Mutex
	conns   []*conn
	dialing *dialing // a first connection is being made, or remade
	second  bool     // a second one is being made
	down    error    // why the peer is down; nil when it is not
	closed  bool
}

// dialing is one attempt that requests may wait for.
type dialing struct {
	done chan struct{}
	conn *conn
	err  error
}

func (c *Client) newPeer(m ring.Member) *peer {
	p := &peer{c: c, member: m}
	p.ctx, p.cancel = context.WithCancel(c.ctx)
	return p
}

// live is a connection that is ready now, the less busy one, or nil.
func (p *peer) live() *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pick()
}

func (p *peer) pick() *conn {
	alive := p.conns[:0]
	for _, c := range p.conns {
		if !c.dead() {
			alive = append(alive, c)
		}
	}
	clear(p.conns[len(alive):])
	p.conns = alive
	var best *conn
	var least int64
	for _, c := range alive {
		if n := c.load(); best == nil || n < least {
			best, least = c, n
		}
	}
	if best != nil && least > ring.BlockSize && len(alive) < connsPerPeer && !p.second && !p.closed {
		p.second = p.c.spawn(func() {
			conn, err := p.dial(p.ctx)
			p.mu.Lock()
			p.second = false
			unwanted := err == nil && !p.adopt(conn)
			p.mu.Unlock()
			if unwanted {
				conn.fail(errClosed)
			} // after an error the first one serves; the next request tries again
		})
	}
	return best
}

// adopt takes a new connection in, unless the peer is closed. p.mu is held.
func (p *peer) adopt(c *conn) bool {
	if p.closed || p.ctx.Err() != nil {
		return false
	}
	p.conns = append(p.conns, c)
	return true
}

// isDown says whether requests fail at once.
func (p *peer) isDown() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.down != nil
}

// get returns a connection, waiting for one to be made unless the peer is known to be down.
func (p *peer) get(ctx context.Context) (*conn, error) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, fmt.Errorf("%w: it left the membership", errDown)
	}
	if c := p.pick(); c != nil {
		p.mu.Unlock()
		return c, nil
	}
	if p.down != nil {
		defer p.mu.Unlock()
		return nil, p.down
	}
	if p.dialing == nil {
		p.redial(0)
	}
	d := p.dialing
	p.mu.Unlock()
	if d == nil {
		return nil, errClosed
	}
	select {
	case <-d.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if d.err != nil {
		return nil, d.err
	}
	return d.conn, nil
}

// wake has a connection made, for those that ask later, where there is none.
func (p *peer) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pick() == nil && p.down == nil && p.dialing == nil && !p.closed {
		p.redial(0)
	}
}

// start sends a request over a connection that get gives. One that has been idle for too long just then is not it.
func (p *peer) start(ctx context.Context, req wire.Request, dst []byte, to io.WriterAt) (*conn, *call, error) {
	for {
		conn, err := p.get(ctx)
		if err != nil {
			return nil, nil, err
		}
		k, err := conn.start(req, dst, to)
		if !errors.Is(err, errIdle) {
			return conn, k, err
		}
	}
}

// rest ends the connections that have nothing under way.
func (p *peer) rest() {
	p.mu.Lock()
	conns := slices.Clone(p.conns)
	p.mu.Unlock()
	for _, c := range conns {
		c.rest(1)
	}
}

// suspect is told that a connection hung: the worker's others are as good as dead, and the peer is down
// until a handshake proves otherwise.
func (p *peer) suspect(err error) {
	p.mu.Lock()
	if p.closed || p.down != nil {
		p.mu.Unlock()
		return
	}
	p.down = fmt.Errorf("%w: %w", errDown, err)
	if p.dialing == nil {
		p.redial(p.c.timing.redial)
	}
	conns := p.conns
	p.conns = nil
	p.mu.Unlock()
	p.outage.note(p.c, p.member.ID, err)
	for _, c := range conns {
		c.fail(err)
	}
}

// redial starts the goroutine that dials until it succeeds. p.mu is held.
func (p *peer) redial(first time.Duration) {
	d := &dialing{done: make(chan struct{})}
	p.dialing = d
	ok := p.c.spawn(func() {
		b := backoff.NewExponentialBackOff()
		b.InitialInterval, b.MaxInterval = p.c.timing.redial, p.c.timing.redialMax
		b.Reset()
		for wait := first; ; wait = b.NextBackOff() {
			if wait > 0 && !sleep(p.ctx, wait) {
				p.settle(d, nil, errClosed)
				return // the peer or the client is closed
			}
			conn, err := p.dial(p.ctx)
			if p.settle(d, conn, err) {
				return
			}
		}
	})
	if !ok {
		p.dialing, d.err = nil, errClosed
		close(d.done)
	}
}

// settle records the outcome of a dial and says whether dialling is over.
func (p *peer) settle(d *dialing, c *conn, err error) bool {
	p.mu.Lock()
	ended := p.closed || p.ctx.Err() != nil
	over := err == nil || ended
	wasDown := p.down != nil
	unwanted := false
	p.down = nil
	if err != nil {
		p.down = fmt.Errorf("%w: %w", errDown, err)
	} else {
		unwanted = !p.adopt(c)
	}
	if over {
		p.dialing = nil
	}
	if !isClosed(d.done) {
		d.conn, d.err = c, p.down
		close(d.done)
	}
	p.mu.Unlock()
	if !ended {
		p.outage.note(p.c, p.member.ID, err)
	}
	switch {
	case unwanted:
		c.fail(errClosed)
	case wasDown && err == nil:
		p.c.members.announce()
	}
	return over
}

// outage tells of a worker that cannot be reached, and that it can be again. What flaps is told of once in tellEvery.
type outage struct {
	mu   sync.Mutex
	told bool
	last time.Time
}

const tellEvery = time.Minute

// note is told how an attempt to reach the worker ended.
func (o *outage) note(c *Client, worker string, err error) {
	now := time.Now()
	o.mu.Lock()
	tell := o.told
	if err != nil {
		tell = !o.told && now.Sub(o.last) >= tellEvery
	}
	if tell {
		o.told, o.last = err != nil, now
	}
	o.mu.Unlock()
	switch {
	case tell && err != nil:
		c.log.Warn("a worker cannot be reached", "worker", worker, "error", err)
	case tell:
		c.log.Info("the worker can be reached again", "worker", worker)
	}
}

// dial makes one authenticated connection.
func (p *peer) dial(ctx context.Context) (*conn, error) {
	nc, err := p.c.prove(ctx, "tcp", p.member.Addr, nil)
	if err != nil {
		return nil, err
	}
	return newConn(nc, &p.c.wg, p.c.timing,
		func(epoch uint64) { p.c.members.saw(p, epoch) },
		func() { p.c.count.corrupt.Add(1) }), nil
}

// prove connects and proves the read key; then is what comes next.
func (c *Client) prove(ctx context.Context, network, addr string, then func(context.Context, net.Conn) error) (net.Conn, error) {
	return wire.Connect(ctx, func(ctx context.Context) (net.Conn, error) { return c.connect(ctx, network, addr) },
		c.config.Dataset, wire.RoleRead, c.keys(), then)
}

// small makes a request whose reply is not a block. The error of a reply that is not OK is its status's.
func (p *peer) small(ctx context.Context, req wire.Request) (wire.Reply, []byte, error) {
	req.Epoch = p.c.members.view().Epoch
	conn, k, err := p.start(ctx, req, nil, nil)
	if err != nil {
		return wire.Reply{}, nil, err
	}
	if err := k.wait(ctx, conn); err != nil {
		if errors.Is(err, errHung) {
			p.suspect(err)
		}
		return wire.Reply{}, nil, err
	}
	if k.bad != nil {
		p.c.count.corrupt.Add(1)
		return wire.Reply{}, nil, k.bad
	}
	if k.reply.Status != wire.OK {
		return k.reply, nil, k.reply.Status.Err(string(k.body))
	}
	return k.reply, k.body, nil
}

// close ends the peer's connections; its calls fail and go elsewhere.
func (p *peer) close() {
	p.cancel()
	p.mu.Lock()
	p.closed = true
	conns := p.conns
	p.conns = nil
	p.mu.Unlock()
	for _, c := range conns {
		c.fail(fmt.Errorf("%w: the worker left the membership", errLost))
	}
}

// connect dials within DialTimeout.
func (c *Client) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, wire.DialTimeout)
	defer cancel()
	return c.dialer(ctx, network, addr)
}

// sleep waits for d; false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool { return sleepUntil(ctx, d, nil) }

// sleepUntil is sleep that early ends too.
func sleepUntil(ctx context.Context, d time.Duration, early <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-early:
		return true
	case <-ctx.Done():
		return false
	}
}
