package worker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/stepcache/stepcache/cache/meminfo"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// drainTimeout bounds how long a worker that stops finishes what is under way.
	drainTimeout = 5 * time.Second
	// minBuffers and maxBuffers bound the heap for fills and for blocks that are served without being
	// kept: a sixteenth of the cache, between these.
	minBuffers = 16 * ring.BlockSize
	maxBuffers = 64 * ring.BlockSize
)

// Clock is the time as the worker sees it, apart from the deadlines of connections, which the kernel
// keeps. Tests drive it by hand.
type Clock interface {
	Now() time.Time
	// After is time.After.
	After(d time.Duration) <-chan time.Time
}

type systemClock struct{}

func (systemClock) Now() time.Time                         { return time.Now() }
func (systemClock) After(d time.Duration) <-chan time.Time { return time.After(d) }

// Deps are what a Worker takes from outside. The zero value is what a real worker uses.
type Deps struct {
	Logger *slog.Logger
	Clock  Clock
	// OpenSource opens a mount's source; nil means scheme.Open.
	OpenSource func(context.Context, source.Config) (*scheme.Source, error)
	// Dial connects to other workers; nil means a net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Memory is what the control groups of this process have left of their limit, and that; nil means meminfo's, where
	// GOMEMLIMIT is set: elsewhere the limit may be of more than this worker, and of page caches that can be given back.
	Memory func() (left, limit int64, limited bool)
}

// Worker serves one dataset's blocks.
type Worker struct {
	config    Config
	deps      Deps
	log       *slog.Logger
	clock     Clock
	keys      *wire.KeyWatcher
	store     *store.Store
	scrubRate int64

	blocks     net.Listener
	control    net.Listener
	socket     *net.UnixListener // nil: none
	socketFile fs.FileInfo

	started   time.Time
	members   members
	problems  problems
	sources   atomic.Pointer[sources]
	snapshots snapshots
	refreshes chan refreshRequest
	wanted    chan wire.Digest
	offers    chan struct{} // holds a token while a snapshot is taken back
	listed    atomic.Int64  // objects listed so far
	peers     *peers
	// peerFills bounds the bytes of fills that wait for other workers, connBudget the bytes of fills and of
	// uncached answers of one connection, so that a reader that does not take them holds up only itself.
	peerFills  *semaphore.Weighted
	connBudget int64
	// sourceTimeout is wire.SourceTimeout, but for tests.
	sourceTimeout time.Duration
	// leaseFill is maxLeaseFill, but for tests.
	leaseFill int64
	crowds    crowds
	asking    blockSet
	guesses   chan struct{} // a token for each fill that nobody asked for
	digests   *digests
	// doubted is a bucket that failed; nil while all are well.
	doubted    atomic.Pointer[doubt]
	doubtedNow chan struct{}
	mends      mends
	loads      *loads
	handedOver atomic.Pointer[wire.HandOver] // nil unless this worker leaves
	promised   atomic.Int64                  // bytes of guesses, and being taken over from workers that leave
	requests   chan struct{}                 // a token for each request under way
	counts     counts
	nonces     wire.Nonces
	gateway    *gatewayServer // nil: read-only
	registry   *prometheus.Registry
	http       *http.Client

	// hard ends when the time to drain is over. Set by Serve.
	hard         context.Context
	stopping     chan struct{} // closed when Serve begins to stop
	controlEnded chan struct{}

	mu     sync.Mutex
	state  int // opened, serving, closed
	cancel context.CancelFunc
	ended  chan struct{}
}

const (
	opened = iota
	serving
	closed
)

// New opens the store, where it finds again what an earlier run left, and the listeners, so that Addr and
// ControlAddr are known; Serve does the rest. It does not touch the bucket.
func New(ctx context.Context, c Config, d Deps) (_ *Worker, err error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("worker config: %w", err)
	}
	c.Copies = max(1, c.Copies)
	if d.Logger == nil {
		d.Logger = slog.Default()
	}
	d.Logger = d.Logger.With("dataset", c.Dataset, "worker", c.ID)
	if d.Clock == nil {
		d.Clock = systemClock{}
	}
	if d.Memory == nil {
		d.Memory = func() (left, limit int64, limited bool) {
			left, limited = meminfo.Room()
			limit, _ = meminfo.Limit()
			return left, limit, limited && meminfo.MoveHeap(0) != math.MaxInt64
		}
	}
	if d.Dial == nil {
		d.Dial = (&net.Dialer{}).DialContext
	}
	if d.OpenSource == nil {
		d.OpenSource = func(ctx context.Context, s source.Config) (*scheme.Source, error) {
			return scheme.Open(ctx, s, scheme.Elapsed(wire.SourceTimeout), scheme.Logger(d.Logger))
		}
	}
	buffers := min(max(c.Memory/16, minBuffers), maxBuffers)
	w := &Worker{
		config: c, deps: d, log: d.Logger, clock: d.Clock, scrubRate: c.ScrubBytesPerSecond,
		refreshes: make(chan refreshRequest), wanted: make(chan wire.Digest, 16), offers: make(chan struct{}, 1),
		peerFills: semaphore.NewWeighted(buffers / 2), connBudget: buffers / 4, leaseFill: maxLeaseFill, digests: newDigests(), sourceTimeout: wire.SourceTimeout,
		doubtedNow: make(chan struct{}, 1), mends: make(mends, maxMends),
		requests: make(chan struct{}, maxRequests), guesses: make(chan struct{}, maxGuesses),
		stopping: make(chan struct{}), controlEnded: make(chan struct{}), ended: make(chan struct{}),
	}
	if w.scrubRate == 0 {
		w.scrubRate = defaultScrub
	}
	w.asking.n = make(map[blockKey]int)
	w.problems = problems{log: w.log, text: make(map[problem]string), errs: make(map[problem]error)}
	w.snapshots = snapshots{now: w.clock.Now, room: SnapshotRoom(c.Memory), memory: c.Memory, held: make(map[wire.Digest]*snapshot)}
	w.loads = &loads{w: w, byID: make(map[string]*load)}
	w.members.self, w.members.path, w.members.look = c.ID, c.MembershipFile, make(chan struct{}, 1)
	w.started = w.clock.Now()
	w.http = &http.Client{Transport: &http.Transport{DialContext: d.Dial, DisableKeepAlives: true}}
	if w.keys, err = wire.WatchKeys(c.KeysDir, w.clock.Now); err != nil {
		return nil, err
	}
	w.peers = &peers{dataset: c.Dataset, keys: w.keys.Keys, dial: d.Dial, now: w.clock.Now, ping: wire.PingInterval, pong: wire.PongTimeout, idle: make(map[string][]*peerConn), down: make(map[string]down)}

	if err := os.MkdirAll(c.Dir, 0o750); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	w.store, err = store.Open(ctx, store.Options{Dir: c.Dir, Quota: c.Memory - c.maxUnflushed(), BufferBytes: buffers, Logger: w.log})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.closeFiles()
		}
	}()
	if w.blocks, err = net.Listen("tcp", c.Listen); err != nil {
		return nil, fmt.Errorf("worker: block protocol: %w", err)
	}
	if w.control, err = net.Listen("tcp", c.Control); err != nil {
		return nil, fmt.Errorf("worker: control endpoint: %w", err)
	}
	if c.Socket != "" {
		if w.socket, err = listenSocket(c.Socket); err != nil {
			return nil, err
		}
		if w.socketFile, err = os.Lstat(c.Socket); err != nil {
			return nil, fmt.Errorf("socket: %w", err)
		}
	}
	alone := ring.Membership{}
	if c.MembershipFile == "" {
		alone = ring.Membership{Epoch: 1, Members: []ring.Member{{
			ID: c.ID, Addr: w.blocks.Addr().String(), Control: w.control.Addr().String(), Socket: c.Socket, State: ring.Ready,
		}}}
	}
	v, err := newView(alone, c.ID)
	if err != nil {
		return nil, err
	}
	w.members.current.Store(v)
	if c.MembershipFile != "" {
		w.problems.set(problemMembers, w.members.reload())
	}
	if c.Gateway != nil {
		if w.gateway, err = newGateway(w); err != nil {
			return nil, err
		}
	}
	w.problems.set(problemSnapshot, errNoSnapshot) // from the start: nobody is to take it for ready before it has looked
	w.registry = newRegistry(w)
	return w, nil
}

// Run makes a Worker and serves until ctx ends.
func Run(ctx context.Context, c Config, d Deps) error {
	w, err := New(ctx, c, d)
	if err != nil {
		return err
	}
	return w.Serve(ctx)
}

// Serve serves until ctx ends or Close, then finishes what is under way for a bounded time, gives
// everything back and returns nil. No goroutine is left.
func (w *Worker) Serve(ctx context.Context) error {
	w.mu.Lock()
	if w.state != opened {
		w.mu.Unlock()
		return errors.New("worker: Serve was called before, or the worker is closed")
	}
	w.state = serving
	asked, cancel := context.WithCancel(ctx)
	w.cancel = cancel
	w.mu.Unlock()
	defer close(w.ended)
	defer w.cancel()
	// What runs ends only once the bucket has what this worker acknowledged.
	ctx, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()

	hard, stopHard := context.WithCancel(context.WithoutCancel(ctx))
	defer stopHard()
	w.hard = hard
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		select {
		case <-asked.Done():
			if w.gateway != nil {
				w.gateway.drain(ctx)
			}
			end()
		case <-ctx.Done():
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		close(w.stopping)
		if w.gateway != nil {
			w.gateway.names.Leave()
		}
		w.blocks.Close()
		if w.socket != nil {
			w.socket.Close()
		}
		t := time.AfterFunc(drainTimeout, stopHard)
		context.AfterFunc(hard, func() { t.Stop() })
		return nil
	})
	for _, loop := range []func(context.Context) error{
		w.keepMembers, w.keepSnapshot, w.keepBucket, w.keepDigests, w.keepScrubbing, w.keepMending, w.keepHandingOver,
		func(ctx context.Context) error { return w.acceptBlocks(ctx, w.blocks) },
		func(ctx context.Context) error { return w.serveControl(ctx, w.control) },
	} {
		g.Go(func() error { return loop(ctx) })
	}
	if w.socket != nil {
		g.Go(func() error { return w.acceptLeases(ctx, w.socket) })
	}
	if w.gateway != nil {
		g.Go(func() error { return w.gateway.names.Run(ctx) })
		g.Go(func() error { return w.gateway.serve(ctx) })
		w.log.Info("gateway serves", "addr", w.GatewayAddr().String(), "bucket", w.config.Gateway.Bucket)
	}
	w.log.Info("worker serves", "addr", w.Addr().String(), "control", w.ControlAddr().String(), "socket", w.config.Socket)
	err := g.Wait()
	w.loads.close()
	w.closeFiles()
	w.mu.Lock()
	w.state = closed
	w.mu.Unlock()
	w.log.Info("worker stopped")
	return err
}

// keepScrubbing reads resident blocks again now and then, so that memory that went bad is found, and mended, even
// where only readers of a leased file, which nobody checks, meet it.
func (w *Worker) keepScrubbing(ctx context.Context) error {
	if w.scrubRate <= 0 {
		return nil
	}
	if err := w.store.Scrub(ctx, w.scrubRate, w.mends.push); ctx.Err() == nil {
		return fmt.Errorf("scrub: %w", err)
	}
	return nil
}

// closeFiles gives back what New took.
func (w *Worker) closeFiles() {
	for _, l := range []net.Listener{w.blocks, w.control} {
		if l != nil {
			l.Close()
		}
	}
	if w.socket != nil {
		w.socket.Close()
		if w.socketFile != nil {
			removeSocket(w.config.Socket, w.socketFile)
		}
	}
	if w.gateway != nil {
		w.gateway.close()
	}
	w.peers.close()
	w.http.CloseIdleConnections()
	w.snapshots.closeAll()
	if err := w.store.Close(); err != nil {
		w.log.Warn("store not closed well", "error", err)
	}
}

// Close ends Serve and waits for it; without Serve it gives back what New took.
func (w *Worker) Close() error {
	w.mu.Lock()
	switch w.state {
	case opened:
		w.state = closed
		w.mu.Unlock()
		w.closeFiles()
		close(w.ended)
		return nil
	case serving:
		w.cancel()
	}
	w.mu.Unlock()
	<-w.ended
	return nil
}

// Addr is the address of the block protocol.
func (w *Worker) Addr() net.Addr { return w.blocks.Addr() }

// ControlAddr is the address of the control endpoint.
func (w *Worker) ControlAddr() net.Addr { return w.control.Addr() }

// GatewayAddr is the address of the S3 endpoint; nil when there is none.
func (w *Worker) GatewayAddr() net.Addr {
	if w.gateway == nil {
		return nil
	}
	return w.gateway.listener.Addr()
}
