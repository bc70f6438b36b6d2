package objects

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// downFor is how long a worker that could not be reached, or hung, is not asked again.
	downFor = 5 * time.Second
	// maxIdlePeers is how many idle connections are kept to one worker.
	maxIdlePeers = 16
	// maxAnswer bounds an answer that is not a block.
	maxAnswer = 1 << 20
)

// headerOptions has the options of a put that is passed on; its epoch is in wire.HeaderEpoch.
const headerOptions = "Stepcache-Options"

// peers asks other workers.
type peers struct {
	n         *Names
	transport *http.Transport

	// closing ends every dial; dials are those under way, which the transport runs on by itself.
	closing context.Context
	close   context.CancelFunc
	dials   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[*peerConn]struct{}
	down   map[string]down
	pongs  map[string]time.Time // when each last answered a ping, by address
}

// peerConn is a connection that is closed with the peers, whatever the transport does with it.
type peerConn struct {
	net.Conn
	p *peers
}

func (c *peerConn) Close() error {
	c.p.mu.Lock()
	delete(c.p.conns, c)
	c.p.mu.Unlock()
	return c.Conn.Close()
}

type down struct {
	until time.Time
	err   error
}

func newPeers(n *Names) *peers {
	p := &peers{n: n, conns: make(map[*peerConn]struct{}), down: make(map[string]down), pongs: make(map[string]time.Time)}
	p.closing, p.close = context.WithCancel(context.Background())
	p.transport = &http.Transport{
		DialContext: p.dial, MaxIdleConnsPerHost: maxIdlePeers, IdleConnTimeout: time.Minute, DisableCompression: true,
		// Whoever takes the body says so first, so that a refusal leaves it unread.
		ExpectContinueTimeout: time.Hour,
		ReadBufferSize:        64 << 10, WriteBufferSize: 64 << 10,
	}
	return p
}

// shut ends every connection and waits for those that are being made.
func (p *peers) shut() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.close()
	p.dials.Wait()
	p.transport.CloseIdleConnections()
	p.mu.Lock()
	var left []*peerConn
	for c := range p.conns {
		left = append(left, c)
	}
	p.mu.Unlock()
	for _, c := range left {
		c.Close()
	}
}

// keep forgets what was noted of workers that are not members any more.
func (p *peers) keep(members []ring.Member) {
	is := make(map[string]bool, len(members))
	for _, m := range members {
		is[m.Addr] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for a := range p.down {
		if !is[a] {
			delete(p.down, a)
		}
	}
	for a := range p.pongs {
		if !is[a] {
			delete(p.pongs, a)
		}
	}
}

// dial connects, proves the write key and turns the connection into one of HTTP.
func (p *peers) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, net.ErrClosed
	}
	p.dials.Add(1)
	p.mu.Unlock()
	defer p.dials.Done()
	ctx, cancel := context.WithTimeout(ctx, wire.DialTimeout)
	defer cancel()
	defer context.AfterFunc(p.closing, cancel)()
	nc, err := wire.Connect(ctx, func(ctx context.Context) (net.Conn, error) { return p.n.c.Dial(ctx, network, addr) },
		p.n.c.Dataset, wire.RoleWrite, p.n.c.Keys(), wire.ToObjects)
	if err != nil {
		return nil, err
	}
	c := &peerConn{nc, p}
	p.mu.Lock()
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	return c, nil
}

// known is why m is not asked at present; nil when it is.
func (p *peers) known(m ring.Member) error {
	p.mu.Lock()
	d, ok := p.down[m.Addr]
	p.mu.Unlock()
	if ok && p.n.c.Clock.Now().Before(d.until) {
		return &errPeer{m, fmt.Errorf("not asked again so soon: %w", d.err)}
	}
	return nil
}

// isUp notes that m is there: it has just asked something.
func (p *peers) isUp(m ring.Member) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.down, m.Addr)
}

// errHung: the peer answers no pings.
var errHung = fmt.Errorf("no answer to a ping within %v", wire.PongTimeout)

// do sends one request and gives the good answer to read. Requests under way are accompanied by pings: a
// peer that waits for a slow bucket answers them and is waited for, one that hangs is not.
func (p *peers) do(ctx context.Context, m ring.Member, req *http.Request, read func(*http.Response) error) error {
	own, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := p.watch(own, m, cancel)
	defer stop()
	req = req.WithContext(own)
	resp, err := p.transport.RoundTrip(req)
	if err == nil {
		defer resp.Body.Close()
		if err = p.judge(m, resp); err != nil {
			return err
		}
		if err = read(resp); err == nil {
			// To its end, so that the connection serves again.
			_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<10))
		}
	}
	if err == nil {
		return nil
	}
	if cause := context.Cause(own); cause != nil && ctx.Err() == nil {
		err = cause
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var dial *net.OpError
	if errors.Is(err, errHung) || errors.As(err, &dial) && dial.Op == "dial" || wire.Refused(err) || isTimeout(err) {
		p.mu.Lock()
		p.down[m.Addr] = down{p.n.c.Clock.Now().Add(downFor), err}
		p.mu.Unlock()
	}
	return &errPeer{m, err}
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// watch pings m until stop, and calls cancel when it does not answer.
func (p *peers) watch(ctx context.Context, m ring.Member, cancel context.CancelCauseFunc) (stop func()) {
	var mu sync.Mutex
	var timer *time.Timer
	ended := false
	var ping func()
	again := func() {
		mu.Lock()
		defer mu.Unlock()
		if !ended {
			timer = time.AfterFunc(wire.PingInterval, ping)
		}
	}
	var running sync.WaitGroup
	ping = func() {
		mu.Lock()
		if ended {
			mu.Unlock()
			return
		}
		running.Add(1)
		mu.Unlock()
		defer running.Done()
		p.mu.Lock()
		recent := time.Since(p.pongs[m.Addr]) < wire.PingInterval*9/10
		p.mu.Unlock()
		if !recent {
			within, done := context.WithTimeout(ctx, wire.PongTimeout)
			err := p.ping(within, m)
			done()
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				cancel(fmt.Errorf("%w: %w", errHung, err))
				return
			}
			p.mu.Lock()
			p.pongs[m.Addr] = time.Now()
			p.mu.Unlock()
		}
		again()
	}
	again()
	return func() {
		mu.Lock()
		ended = true
		timer.Stop()
		mu.Unlock()
		cancel(nil) // a ping under way
		running.Wait()
	}
}

func (p *peers) ping(ctx context.Context, m ring.Member) error {
	req, err := p.request(ctx, http.MethodGet, m, "/ping", nil, 0, nil)
	if err != nil {
		return err
	}
	resp, err := p.transport.RoundTrip(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// request makes a request. epoch 0 is none.
func (p *peers) request(ctx context.Context, method string, m ring.Member, path string, query url.Values, epoch uint64, body io.Reader) (*http.Request, error) {
	u := url.URL{Scheme: "http", Host: m.Addr, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if epoch > 0 {
		req.Header.Set(wire.HeaderEpoch, strconv.FormatUint(epoch, 10))
	}
	return req, nil
}

// refusal is the body of an answer that is not good.
type refusal struct {
	Kind  string `json:"kind"`
	Text  string `json:"text"`
	Epoch uint64 `json:"epoch,omitempty"`
	// Bucket is what the bucket answered, where that is what the client is told.
	Bucket *source.Refusal `json:"bucket,omitempty"`
}

// refusalOf is an error as other workers are told of it.
func refusalOf(err error) refusal {
	r := refusal{Kind: kindOf(err), Text: err.Error()}
	errors.As(err, &r.Bucket)
	return r
}

func (p *peers) judge(m ring.Member, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	var r refusal
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&r); err != nil {
		return &errPeer{m, fmt.Errorf("status %d", resp.StatusCode)}
	}
	if resp.StatusCode == http.StatusConflict {
		return &errStale{m, r.Epoch}
	}
	return remote(m, r)
}

// epoch asks which epoch m follows, and tells it ours.
func (p *peers) epoch(ctx context.Context, m ring.Member, ours uint64) (theirs standpoint, err error) {
	req, err := p.request(ctx, http.MethodGet, m, "/epoch", url.Values{"from": {p.n.c.Self}}, ours, nil)
	if err != nil {
		return theirs, err
	}
	resp, err := p.transport.RoundTrip(req)
	if err != nil {
		return theirs, err
	}
	defer resp.Body.Close()
	if err := p.judge(m, resp); err != nil {
		return theirs, err
	}
	_, err = fmt.Fscanf(io.LimitReader(resp.Body, 64), "%d %d %d", &theirs.Epoch, &theirs.Settled, &theirs.Closed)
	return theirs, err
}

// ask sends a request without a body, or with one in JSON, and decodes the answer.
func (p *peers) ask(ctx context.Context, m ring.Member, epoch uint64, method, path string, query url.Values, in, out any) error {
	var content []byte
	if in != nil {
		var err error
		if content, err = json.Marshal(in); err != nil {
			return err
		}
	}
	for try := 1; ; try++ {
		if method != http.MethodGet {
			if err := waits(ctx); err != nil {
				return err
			}
		}
		var body io.Reader
		if in != nil {
			body = bytes.NewReader(content)
		}
		req, err := p.request(ctx, method, m, path, query, epoch, body)
		if err != nil {
			return err
		}
		err = p.do(ctx, m, req, func(resp *http.Response) error {
			if out == nil {
				return nil
			}
			return json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out)
		})
		var peer *errPeer
		if try == 1 && errors.As(err, &peer) && ctx.Err() == nil && p.known(m) == nil {
			continue // the peer was restarted since the connection was made: a new one tells
		}
		return err
	}
}

// put passes a put on. The body is untouched when body.begun is false after an error.
func (p *peers) put(ctx context.Context, m ring.Member, epoch uint64, query url.Values, options any, body *framer) (v versionJSON, err error) {
	o, err := json.Marshal(options)
	if err != nil {
		return v, err
	}
	for try := 1; ; try++ {
		// Not closed by the transport, which may still be about to read it: see stopped.
		guard := &guarded{r: body}
		req, err := p.request(ctx, http.MethodPut, m, "/put", query, epoch, guard)
		if err != nil {
			return v, err
		}
		req.ContentLength = -1
		req.Header.Set("Expect", "100-continue")
		req.Header.Set(headerOptions, base64.StdEncoding.EncodeToString(o))
		err = p.do(ctx, m, req, func(resp *http.Response) error {
			return json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&v)
		})
		guard.stop() // the transport may read on in its own goroutine after it gave up
		var peer *errPeer
		if try == 1 && !body.begun && errors.As(err, &peer) && ctx.Err() == nil && p.known(m) == nil {
			continue
		}
		if err != nil && body.err != nil && body.err != io.EOF {
			return v, body.err
		}
		return v, err
	}
}

// guarded is a body that its owner can take back: after stop nothing reads it any more.
type guarded struct {
	mu      sync.Mutex
	r       io.Reader
	stopped bool
}

func (g *guarded) Read(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stopped {
		return 0, io.ErrClosedPipe
	}
	return g.r.Read(p)
}

// stop waits for a read under way, which ends with the connection that the bytes come from.
func (g *guarded) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopped = true
}

// block fetches one block of a version into into.
func (p *peers) block(ctx context.Context, m ring.Member, key string, o source.Object, n int64, into []byte) error {
	query := url.Values{"key": {key}, "version": {o.Version}, "size": {strconv.FormatInt(o.Size, 10)}, "block": {strconv.FormatInt(n, 10)}}
	return p.bytes(ctx, m, "/block", query, into)
}

// bytes fetches a block and its checksums, which it compares.
func (p *peers) bytes(ctx context.Context, m ring.Member, path string, query url.Values, into []byte) error {
	req, err := p.request(ctx, http.MethodGet, m, path, query, 0, nil)
	if err != nil {
		return err
	}
	return p.do(ctx, m, req, func(resp *http.Response) error {
		r := bufio.NewReaderSize(resp.Body, 64<<10)
		sums := make([]byte, checksum.EncodedSize*checksum.Count(len(into)))
		if _, err := io.ReadFull(r, sums); err != nil {
			return cutOff(err)
		}
		if _, err := io.ReadFull(r, into); err != nil {
			return cutOff(err)
		}
		return wire.CheckSums(into, checksum.Decode(sums))
	})
}
