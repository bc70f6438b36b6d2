package client

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// Names reads a writable dataset by its names, as they are now: it has no snapshot. What it finds was true after
// the call began. A name's owner is asked, which mostly knows; the others besides when that does not answer soon.
// Like a Client it is safe for concurrent use, and all its goroutines have ended, or hold nothing, when Close returns.
type Names struct {
	c         *Client
	transport *http.Transport

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
	down   map[string]time.Time // until when a worker that could not be reached is asked last
	outage map[string]*outage   // of workers that could not be reached
}

// ErrNotWritable: the dataset takes no puts, so that its names never change: Dial reads it.
var ErrNotWritable = errors.New("the dataset is not writable")

// lateAfter is when another worker is asked besides one that has not answered.
const lateAfter = wire.PongTimeout

// downTime is how long a worker that could not be reached, or did not answer, is asked only after the others.
const downTime = 5 * time.Second

// maxNameConns bounds the connections to one worker: each carries one request at a time.
const maxNameConns = 16

// DialNames connects to the dataset's workers, and waits until they can list it, unless config.Snapshot is set: then a
// mount shows it already, whose readers can do with what the workers hold. The error is ErrNotWritable where they
// serve a dataset that is read-only, or do not know this protocol yet. It ends with ctx, or when every worker refuses
// this client's key.
func DialNames(ctx context.Context, config Config) (*Names, error) {
	c, err := newClient(config, defaultTiming())
	if err != nil {
		return nil, fmt.Errorf("dataset %s: %w", config.Dataset, err)
	}
	n := &Names{c: c, conns: make(map[net.Conn]struct{}), down: make(map[string]time.Time), outage: make(map[string]*outage)}
	n.transport = &http.Transport{
		DialContext: n.dial, MaxConnsPerHost: maxNameConns, MaxIdleConnsPerHost: maxNameConns, IdleConnTimeout: time.Minute,
		DisableCompression: true, ReadBufferSize: 64 << 10,
	}
	writable, err := c.Writable(ctx)
	if err == nil && !writable {
		err = fmt.Errorf("dataset %s: %w", config.Dataset, ErrNotWritable)
	}
	if err == nil && config.Snapshot == (catalog.Digest{}) {
		_, err = n.List(ctx, "", "") // that workers cannot reach the bucket is better known now than by the first reader
	}
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// Writable says whether the workers can be asked for names. That it answers also proves that they take the read key.
// It ends with ctx, or when every worker refuses this client's key.
func (c *Client) Writable(ctx context.Context) (bool, error) {
	if !c.begin() {
		return false, errClosed
	}
	defer c.calls.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(errClosed) })() // Close waits for this call
	var told wire.Reply
	err := c.fromAny(ctx, func(p *peer) (err error) {
		ctx, cancel := context.WithTimeoutCause(ctx, c.timing.worker, wire.ErrLate)
		defer cancel()
		told, _, err = p.small(ctx, wire.Request{Op: wire.OpMembers})
		return err
	})
	return told.Index == wire.NamesServed, err
}

// Close ends every request and connection.
func (n *Names) Close() error {
	n.mu.Lock()
	n.closed = true
	left := make([]net.Conn, 0, len(n.conns))
	for c := range n.conns {
		left = append(left, c)
	}
	n.mu.Unlock()
	for _, c := range left {
		c.Close()
	}
	err := n.c.Close()
	n.transport.CloseIdleConnections()
	return err
}

// Lookup is what the path, without its leading slash, names now: source.ErrNotFound for nothing.
func (n *Names) Lookup(ctx context.Context, path string) (wire.Name, error) {
	var name wire.Name
	err := n.ask(ctx, path, wire.PathName, url.Values{"path": {path}}, wire.MaxNames, jsonInto(&name))
	return name, err
}

// List is what is in a folder, in the order of the bucket's keys, from the first that comes after a former
// answer's After on. An empty After says that this is all.
func (n *Names) List(ctx context.Context, folder, after string) (wire.Names, error) {
	var names wire.Names
	err := n.ask(ctx, folder, wire.PathNames, url.Values{"path": {folder}, "after": {after}}, wire.MaxNames, jsonInto(&names))
	return names, err
}

// ReadAt reads len(p) bytes of one version of a file, which has them: source.ErrChanged when the name has
// another version by now.
func (n *Names) ReadAt(ctx context.Context, path, version string, p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		part := p[done:min(len(p), done+wire.MaxBytes)]
		query := url.Values{"path": {path}, "version": {version}, "off": {strconv.FormatInt(off+int64(done), 10)}, "length": {strconv.Itoa(len(part))}}
		err := n.ask(ctx, path, wire.PathBytes, query, int64(len(part)), func(h http.Header, b []byte) error {
			want, err := strconv.ParseUint(h.Get(wire.HeaderSum), 16, 32)
			if err != nil || len(b) != len(part) || crc32.Checksum(b, castagnoli) != uint32(want) {
				return fmt.Errorf("%w: bytes of %s", wire.ErrCorrupt, path)
			}
			copy(part, b)
			return nil
		})
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func jsonInto[T any](v *T) func(http.Header, []byte) error {
	return func(_ http.Header, b []byte) error {
		var told T
		if err := json.Unmarshal(b, &told); err != nil {
			return fmt.Errorf("%w: %w", wire.ErrCorrupt, err)
		}
		*v = told
		return nil
	}
}

// ask asks the name's owner, then the others, round and round until one answers or ctx ends.
func (n *Names) ask(ctx context.Context, path, what string, query url.Values, limit int64, take func(http.Header, []byte) error) error {
	if !n.c.begin() {
		return errClosed
	}
	defer n.c.calls.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(n.c.ctx, func() { cancel(errClosed) })() // Close waits for this call
	pause := n.c.pauses()
	last := errors.New("no worker is ready")
	for {
		changed := n.c.members.wait()
		done, err := n.round(ctx, n.workers(path), what, query, limit, take)
		if done {
			if err != nil {
				err = n.failed(path, err)
			}
			return err
		}
		last = telling(last, err)
		if ctx.Err() != nil {
			return n.failed(path, fmt.Errorf("%w: %w", context.Cause(ctx), last))
		}
		n.c.members.refresh()
		sleepUntil(ctx, pause.NextBackOff(), changed)
	}
}

// said is what came of an attempt.
type said struct {
	header http.Header
	body   []byte
	err    error
}

// round asks workers one after the other: the next when one fails, and besides when one is late, which a bucket that
// is slow may well make it. done says that there is an answer, perhaps an error that another worker would give too;
// without, the error is the most telling of what workers said, or nil when none said anything before ctx ended.
func (n *Names) round(ctx context.Context, workers []string, what string, query url.Values, limit int64, take func(http.Header, []byte) error) (done bool, err error) {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan said, len(workers))
	refused := 0
	next := time.NewTimer(0)
	defer next.Stop()
	for asked, answered := 0, 0; answered < len(workers); {
		select {
		case <-ctx.Done():
			return false, err
		case <-next.C:
			if asked == len(workers) {
				continue
			}
			if asked > answered {
				n.isDown(workers[asked-1]) // others are asked first, for now
			}
			addr := workers[asked]
			asked++
			running.Go(func() {
				h, b, err := n.attempt(ctx, addr, what, query, limit)
				answers <- said{h, b, err}
			})
			next.Reset(lateAfter)
		case a := <-answers:
			answered++
			if a.err == nil {
				a.err = take(a.header, a.body)
			}
			if a.err != nil && ctx.Err() != nil {
				return false, err // it was cut short
			}
			switch {
			case a.err == nil:
				return true, nil
			case errors.Is(a.err, source.ErrNotFound), errors.Is(a.err, source.ErrChanged), errors.Is(a.err, source.ErrInvalid),
				errors.Is(a.err, source.ErrDenied), errors.Is(a.err, source.ErrNoBucket), errors.Is(a.err, ErrNotWritable):
				return true, a.err
			case wire.Refused(a.err):
				// One that has not seen the newest keys yet, or is not replaced yet, does not speak for the others.
				if refused++; refused == len(workers) {
					return true, a.err
				}
			}
			err = telling(err, a.err)
			next.Reset(0)
		}
	}
	return false, err
}

func (n *Names) failed(path string, err error) error {
	return fmt.Errorf("dataset %s: /%s: %w", n.c.config.Dataset, path, err)
}

// workers are the addresses to ask about a name, in order.
func (n *Names) workers(path string) []string {
	v := n.c.members.view()
	var out, others []string
	for _, m := range v.NameOwners(n.c.config.Dataset, path, 1) {
		out = append(out, m.Addr)
	}
	for _, p := range n.c.sources() {
		if !slices.Contains(out, p.member.Addr) && !slices.Contains(others, p.member.Addr) {
			others = append(others, p.member.Addr)
		}
	}
	out = append(out, others...)
	now := n.c.now()
	n.mu.Lock()
	defer n.mu.Unlock()
	slices.SortStableFunc(out, func(a, b string) int { return cmp.Compare(max(0, n.down[a].Sub(now)), max(0, n.down[b].Sub(now))) })
	return out
}

// isDown notes that a worker could not be reached.
func (n *Names) isDown(addr string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down[addr] = n.c.now().Add(downTime)
}

// reached notes whether a worker could be reached.
func (n *Names) reached(addr string, err error) {
	n.mu.Lock()
	o := n.outage[addr]
	if o == nil && err != nil {
		o = &outage{}
		n.outage[addr] = o
	}
	n.mu.Unlock()
	if o != nil {
		o.note(n.c, addr, err)
	}
}

// attempt is one question to one worker.
func (n *Names) attempt(ctx context.Context, addr, what string, query url.Values, limit int64) (http.Header, []byte, error) {
	parent := ctx
	// The worker gives up first and says why.
	ctx, cancel := context.WithTimeoutCause(ctx, n.c.timing.worker, wire.ErrLate)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+what+"?"+query.Encode(), nil)
	if err != nil {
		return nil, nil, err
	}
	answer, err := n.transport.RoundTrip(r)
	if err != nil {
		if parent.Err() == nil {
			n.isDown(addr)
			n.reached(addr, err)
		}
		return nil, nil, err
	}
	n.reached(addr, nil)
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		limit = wire.MaxMessage
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, limit+1))
	switch {
	case err != nil:
		return nil, nil, err
	case int64(len(body)) > limit:
		return nil, nil, fmt.Errorf("%w: more than %d bytes", errWrong, limit)
	}
	if epoch, err := strconv.ParseUint(answer.Header.Get(wire.HeaderEpoch), 10, 64); err == nil && epoch > n.c.members.view().Epoch {
		n.c.members.refresh()
	}
	if answer.StatusCode != http.StatusOK {
		status, err := strconv.ParseUint(answer.Header.Get(wire.HeaderStatus), 10, 8)
		if err != nil || wire.Status(status) == wire.OK {
			return nil, nil, fmt.Errorf("%w: %s", errWrong, answer.Status)
		}
		return nil, nil, wire.Status(status).Err(string(body))
	}
	return answer.Header, body, nil
}

// dial proves the read key and turns the connection into one of HTTP.
func (n *Names) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, wire.DialTimeout)
	defer cancel()
	nc, err := n.c.prove(ctx, network, addr, func(ctx context.Context, nc net.Conn) error {
		err := wire.ToObjects(ctx, nc)
		if errors.Is(err, source.ErrInvalid) {
			err = fmt.Errorf("%w: %w", ErrNotWritable, err)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return n.keep(nc)
}

// keep notes a connection, which is closed with the Names whatever the transport does with it.
func (n *Names) keep(nc net.Conn) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		nc.Close()
		return nil, errClosed
	}
	c := &nameConn{Conn: nc, n: n}
	n.conns[c] = struct{}{}
	return c, nil
}

type nameConn struct {
	net.Conn
	n *Names
}

func (c *nameConn) Close() error {
	c.n.mu.Lock()
	delete(c.n.conns, c)
	c.n.mu.Unlock()
	return c.Conn.Close()
}
