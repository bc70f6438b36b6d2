package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/ports"
)

const testDataset = "argo/test"

// testDeadline is for waits that normally take milliseconds.
const testDeadline = 60 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 3*testDeadline)
	t.Cleanup(cancel)
	return ctx
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// quick is the default timing with short pauses, and with no end to the patience with a worker that is
// slow: on a loaded machine that says nothing of the worker.
func quick() timing {
	t := defaultTiming()
	t.ping, t.pong, t.near = 150*time.Millisecond, testDeadline, testDeadline
	t.redial, t.redialMax = 5*time.Millisecond, 50*time.Millisecond
	t.retry, t.retryMax = 5*time.Millisecond, 50*time.Millisecond
	t.file = 10 * time.Millisecond
	return t
}

// impatient is for tests of workers that hang. A false alarm costs them time, never their result.
func impatient() timing {
	t := quick()
	t.pong = 900 * time.Millisecond
	return t
}

// content is n bytes that depend on the seed, with a period that is no multiple of anything that could be
// mixed up.
func content(seed uint64, n int) []byte {
	const period = 1<<20 - 1
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(p[:min(n, period)])
	for have := min(n, period); have < n; have += copy(p[have:], p[have-period:have]) {
	}
	return p
}

// tier is a dataset and workers that serve it from memory, written on package wire alone: what a worker
// does to a request is for the test to say.
type tier struct {
	t      testing.TB
	keys   wire.Keys
	snap   *catalog.Snapshot
	data   map[string][]byte
	timing timing

	mu      sync.Mutex
	list    ring.Membership
	workers map[string]*fake
}

func newTier(t testing.TB, files map[string][]byte) *tier {
	t.Helper()
	k := &tier{t: t, keys: wire.GenerateKeys(), data: files, timing: quick(), workers: make(map[string]*fake)}
	k.snap = makeSnapshot(t, files, "v1")
	t.Cleanup(func() {
		k.mu.Lock()
		workers := k.workers
		k.mu.Unlock()
		for _, w := range workers {
			w.stop()
		}
	})
	return k
}

func makeSnapshot(t testing.TB, files map[string][]byte, version string) *catalog.Snapshot {
	t.Helper()
	b := catalog.NewBuilder([]catalog.Mount{{URL: "s3://bucket", Path: "/"}})
	for name, p := range files {
		if err := b.Add(0, source.Object{Key: name, Size: int64(len(p)), Version: version, ModTime: time.Unix(1, 0)}); err != nil {
			t.Fatal(err)
		}
	}
	enc, err := b.Encode(time.Unix(2, 0))
	if err != nil {
		t.Fatal(err)
	}
	s, err := catalog.Open(enc)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (k *tier) index(name string) catalog.Index {
	k.t.Helper()
	i, ok := k.snap.Lookup("/" + name)
	if !ok {
		k.t.Fatalf("no file %s", name)
	}
	return i
}

// membership is the current list.
func (k *tier) membership() ring.Membership {
	k.mu.Lock()
	defer k.mu.Unlock()
	return ring.Membership{Epoch: k.list.Epoch, Members: append([]ring.Member(nil), k.list.Members...)}
}

// setMembers makes the running workers the membership, at a new epoch.
func (k *tier) setMembers() ring.Membership {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.list.Epoch++
	k.list.Members = nil
	for id, w := range k.workers {
		k.list.Members = append(k.list.Members, ring.Member{ID: id, Addr: w.addr, Node: w.node, Socket: w.socket, State: ring.Ready})
	}
	return k.list
}

// start runs the named workers and makes them the membership.
func (k *tier) start(ids ...string) {
	k.t.Helper()
	for _, id := range ids {
		w := &fake{tier: k, id: id, node: "node-" + id}
		w.listen(ports.Free(k.t, 1)[0])
		k.mu.Lock()
		k.workers[id] = w
		k.mu.Unlock()
	}
	k.setMembers()
}

func (k *tier) worker(id string) *fake {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.workers[id]
}

// owners are the workers of a file's block in order.
func (k *tier) owners(name string, block int64) []*fake {
	o, _ := k.snap.Ring(k.index(name))
	var ws []*fake
	for _, m := range k.membership().Owners(o, block, 0) {
		ws = append(ws, k.worker(m.ID))
	}
	return ws
}

func (k *tier) config() Config {
	return Config{Dataset: testDataset, Membership: k.membership(), Keys: k.keys, Logger: quiet()}
}

func (k *tier) dial(change func(*Config)) *Client {
	k.t.Helper()
	config := k.config()
	if change != nil {
		change(&config)
	}
	c, err := dial(testContext(k.t), config, k.timing)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { c.Close() })
	return c
}

// experienced gives the client the experience that answers take no time.
func experienced(c *Client) {
	for range 128 {
		c.latency.observe(1<<20, 1)
		c.latency.observe(1<<10, 1)
	}
}

// fake is one worker. It owns what the ring says and serves everything from memory.
type fake struct {
	tier       *tier
	id, node   string
	addr       string
	socket     string
	epochDelta uint64

	// on decides about a read; nil, or a nil answer, serves it as a worker should.
	on atomic.Pointer[func(r wire.Request) *answer]
	// reads are the requests that were served or refused, in order.
	mu     sync.Mutex
	reads  []wire.Request
	ln     net.Listener
	conns  map[net.Conn]bool
	paused chan struct{} // closed by resume; nil when it runs
	wg     sync.WaitGroup

	members  atomic.Int64 // OpMembers answered
	snapshot atomic.Pointer[catalog.Snapshot]
	other    atomic.Pointer[func(r wire.Request) *answer] // requests that are not reads
}

// answer is what a worker does instead of serving a read.
type answer struct {
	status wire.Status
	text   string
	change func(*wire.Reply) // of the true reply's header
	flip   int               // inverts a bit of this byte (from 1) of the payload
	drop   bool              // closes the connection
	raw    []byte            // is sent as it is
	wait   <-chan struct{}   // answers (truly, or with the above) once it is closed
	never  bool              // sends nothing
	body   []byte            // is the payload (requests that are not reads)
}

func (w *fake) set(on func(r wire.Request) *answer) {
	if on == nil {
		w.on.Store(nil)
		return
	}
	w.on.Store(&on)
}

func (w *fake) listen(addr string) {
	w.tier.t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		w.tier.t.Fatal(err)
	}
	w.mu.Lock()
	w.ln, w.addr, w.conns = ln, ln.Addr().String(), make(map[net.Conn]bool)
	w.mu.Unlock()
	w.wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			w.mu.Lock()
			if w.ln != ln {
				w.mu.Unlock()
				nc.Close()
				return
			}
			w.conns[nc] = true
			w.mu.Unlock()
			w.wg.Go(func() { w.serve(nc) })
		}
	})
}

// stop kills the worker: everything is closed and gone when it returns.
func (w *fake) stop() {
	w.mu.Lock()
	if w.ln != nil {
		w.ln.Close()
	}
	w.ln = nil
	for nc := range w.conns {
		nc.(*net.TCPConn).SetLinger(0)
		nc.Close()
	}
	w.conns = nil
	paused := w.paused
	w.paused = nil
	w.mu.Unlock()
	if paused != nil {
		close(paused)
	}
	w.wg.Wait()
}

// restart brings a stopped worker back, at its old address.
func (w *fake) restart() {
	addr := w.addr
	for deadline := time.Now().Add(testDeadline); ; {
		ln, err := net.Listen("tcp", addr)
		if err == nil {
			ln.Close()
			break
		}
		if time.Now().After(deadline) {
			w.tier.t.Fatal(err)
		}
		runtime.Gosched()
	}
	w.listen(addr)
}

// pause makes the worker hang: the kernel accepts for it, and it answers nothing.
func (w *fake) pause() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.paused == nil {
		w.paused = make(chan struct{})
	}
}

func (w *fake) resume() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.paused != nil {
		close(w.paused)
		w.paused = nil
	}
}

func (w *fake) gate() {
	w.mu.Lock()
	paused := w.paused
	w.mu.Unlock()
	if paused != nil {
		<-paused
	}
}

func (w *fake) seen() []wire.Request {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]wire.Request(nil), w.reads...)
}

func (w *fake) serve(nc net.Conn) {
	defer func() {
		nc.Close()
		w.mu.Lock()
		delete(w.conns, nc)
		w.mu.Unlock()
	}()
	w.gate()
	if _, _, err := wire.ServerHandshake(nc, testDataset, w.tier.keys); err != nil {
		return
	}
	var (
		mu sync.Mutex // writes
		br = bufio.NewReader(nc)
	)
	gone := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(gone)
	send := func(b []byte) {
		w.gate()
		mu.Lock()
		defer mu.Unlock()
		nc.Write(b)
	}
	for {
		r, err := wire.ReadRequest(br)
		if err != nil {
			return
		}
		w.gate()
		if r.Op == wire.OpPing {
			send(wire.AppendFrame(nil, wire.Reply{ID: r.ID, Epoch: w.epoch()}, nil))
			continue
		}
		wg.Go(func() {
			reply, p, a := w.answer(r)
			if a != nil {
				switch {
				case a.drop:
					nc.Close()
					return
				case a.never:
					return
				case a.raw != nil:
					send(a.raw)
					return
				}
				if a.wait != nil {
					select {
					case <-a.wait:
					case <-gone:
						return
					}
				}
			}
			reply.ID, reply.Epoch = r.ID, w.epoch()
			reply.Length, reply.Sums = int32(len(p)), checksum.All(p)
			if a != nil && a.flip > 0 {
				p = bytes.Clone(p)
				p[a.flip-1] ^= 4
			}
			if a != nil && a.change != nil {
				a.change(&reply)
				p = p[:min(len(p), int(reply.Length))]
			}
			send(append(wire.AppendReply(nil, reply), p...))
		})
	}
}

func (w *fake) epoch() uint64 { return w.tier.membership().Epoch + w.epochDelta }

func (w *fake) answer(r wire.Request) (wire.Reply, []byte, *answer) {
	fail := func(s wire.Status, text string) (wire.Reply, []byte, *answer) {
		return wire.Reply{Status: s}, []byte(text), nil
	}
	snap := w.snapshot.Load()
	if snap == nil {
		snap = w.tier.snap
	}
	if r.Op != wire.OpRead {
		if on := w.other.Load(); on != nil {
			if a := (*on)(r); a != nil {
				return wire.Reply{Status: a.status, Off: r.Off, Size: int64(len(a.body)), Body: r.Snapshot}, append([]byte(a.text), a.body...), a
			}
		}
	}
	switch r.Op {
	case wire.OpMembers:
		w.members.Add(1)
		b, err := json.Marshal(w.tier.membership())
		if err != nil {
			panic(err)
		}
		return wire.Reply{}, b, nil
	case wire.OpSnapshot:
		if r.Snapshot != (wire.Digest{}) && r.Snapshot != snap.Digest() {
			return fail(wire.UnknownSnapshot, "no such snapshot")
		}
		enc := snap.Encoded()
		if r.Off < 0 || r.Off >= int64(len(enc)) {
			return fail(wire.Invalid, "offset")
		}
		p := enc[r.Off:min(int64(len(enc)), r.Off+int64(r.Length))]
		return wire.Reply{Size: int64(len(enc)), Body: snap.Digest(), Off: r.Off}, p, nil
	case wire.OpRead:
	default:
		return fail(wire.Invalid, "unknown operation")
	}

	w.mu.Lock()
	w.reads = append(w.reads, r)
	w.mu.Unlock()
	var a *answer
	if on := w.on.Load(); on != nil {
		a = (*on)(r)
	}
	if a != nil && a.status != wire.OK {
		return wire.Reply{Status: a.status}, []byte(a.text), a
	}
	o, ok := w.tier.snap.Ring(r.Index)
	if !ok || r.Snapshot != w.tier.snap.Digest() {
		return fail(wire.UnknownSnapshot, "no such snapshot")
	}
	end := r.Off + int64(r.Length)
	if r.Off < 0 || r.Length <= 0 || end > o.Size || r.Off%checksum.Size != 0 ||
		(end%checksum.Size != 0 && end != o.Size) || r.Off/ring.BlockSize != (end-1)/ring.BlockSize {
		return fail(wire.Invalid, fmt.Sprintf("range [%d, %d) of %d", r.Off, end, o.Size))
	}
	owner := w.tier.membership().Owners(o, r.Off/ring.BlockSize, 1)
	if r.Flags&(wire.FlagReadThrough|wire.FlagResidentOnly) == 0 && (len(owner) == 0 || owner[0].ID != w.id) && a == nil {
		return fail(wire.NotOwner, "owned by another")
	}
	p := w.tier.data[strings.TrimPrefix(w.tier.snap.Path(r.Index), "/")][r.Off:end]
	return wire.Reply{Index: r.Index, Off: r.Off}, p, a
}

// checkRead reads [off, off+n) and compares.
func checkRead(ctx context.Context, c *Client, i catalog.Index, want []byte, off int64, n int) error {
	p := make([]byte, n)
	got, err := c.ReadAt(ctx, i, p, off)
	exp := want[min(off, int64(len(want))):min(off+int64(n), int64(len(want)))]
	switch {
	case err == io.EOF && int(off)+n < len(want):
		return fmt.Errorf("read of %d at %d of %d: early EOF", n, off, len(want))
	case err == nil && got != n:
		return fmt.Errorf("read of %d at %d of %d: %d bytes and no error", n, off, len(want), got)
	case err != nil && err != io.EOF:
		return fmt.Errorf("read of %d at %d of %d: %w", n, off, len(want), err)
	case !bytes.Equal(p[:got], exp):
		return fmt.Errorf("read of %d at %d of %d: wrong bytes", n, off, len(want))
	}
	return nil
}

// eventually waits for cond, which something else makes true.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(testDeadline); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen within %v", what, testDeadline)
		}
		time.Sleep(time.Millisecond)
	}
}

// ours counts the goroutines that run code of this package but not of its tests.
func ours() (n int, stacks string) {
	buf := make([]byte, 4<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var b strings.Builder
	for g := range strings.SplitSeq(string(buf), "\n\n") {
		if strings.Contains(g, "cache/client.(*") && !strings.Contains(g, "_test.go") {
			n++
			b.WriteString(g + "\n\n")
		}
	}
	return n, b.String()
}

var errTest = errors.New("test")
