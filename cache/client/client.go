// Package client reads a dataset through its workers.
//
// It owns the snapshot that a reader sees, the connections to the workers, where to ask for a block and
// what to do when the answer is late, wrong or missing, the reader's memory with its read-ahead, the
// leases of whole files, and Control, the client of the workers' HTTP endpoint.
//
// # The model
//
// Dial pulls one snapshot, to which the Client is bound for its life. A read is cut at the blocks. For each
// the Client looks in its buffers, then where a worker of this machine keeps the file (near.go), then in the node's
// store, and then asks: the block's owners under the
// newest membership that it knows, then any other worker, which reads it through from the bucket. A worker
// that is dead, hung, overloaded, refused by the bucket or wrong costs time and no more: while the bucket
// and one worker answer, a read ends with the object's bytes, within wire.ClientTimeout a block. Every
// payload is checked against its sums, and a reply must echo what was asked for. Only the object itself can
// fail a read: it changed or is gone. The workers are reminded of the snapshot for as long as it is read, and given
// it back when all have lost it (remind.go).
//
// Names is the reader of a writable dataset, which has no snapshot that holds: it asks for names and for the bytes
// of their versions, over connections of its own (wire.PathName and so on).
//
// # Rules
//
// Concurrency: everything is safe for concurrent use. Every goroutine belongs to a Client and has ended when
// Close returns. Memory is Config.BufferBytes, or less by what Config.Buffers leaves, from the moment a buffer waits
// for its bytes, and a small fixed buffer for each read under way that finds no room; it goes back to the system when
// nobody has read for a minute or two. Failure: errors name the dataset, the file and
// its object, and wrap the source's errors (source.ErrChanged and so on), ErrNoLease, wire.ErrUnauthorized
// or the context's.
//
// It may import cache/catalog, cache/checksum, cache/ring, cache/source (for its errors), cache/store, cache/wire and
// cache/meminfo.
package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/meminfo"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// Config says which dataset to read and how.
type Config struct {
	// Dataset is the name that handshakes are bound to: namespace/name.
	Dataset string
	// Membership, MembershipFile and Seeds say who the workers are; at least one is needed. The file is
	// followed. Seeds are host:port addresses of the block protocol, asked for the membership when nobody
	// else knows it. Newer lists that workers have always count.
	Membership     ring.Membership
	MembershipFile string
	Seeds          []string
	// Keys are the dataset's; Read is used. KeySource, when set, is asked instead at every connection, so
	// that a rotation needs no restart (wire.KeyWatcher.Keys).
	Keys      wire.Keys
	KeySource func() wire.Keys
	// Node is the machine that this process runs on; workers on it are preferred, and may lease files.
	Node string
	// Copies is how many workers hold each block; zero means 1. With more, slow answers are hedged.
	Copies int
	// BufferBytes bounds the memory for blocks; zero means 256 MiB. At least one block.
	BufferBytes int64
	// Buffers are shared with the process's other clients; nil: nobody knows of them, and BufferBytes alone count.
	Buffers *Buffers
	// Store is the node's cache; nil for none. The caller closes it, after the Client.
	Store *store.Store
	// Snapshot is the digest of the snapshot to read; zero: the workers' current one.
	Snapshot catalog.Digest
	// SnapshotDir keeps pulled snapshots, shared by the processes of a node. Empty: in memory only, where there must be
	// room for them within the container's limit.
	SnapshotDir string
	// SnapshotsKept is how many of them stay there: when one more comes the oldest go, which harms nobody who reads
	// them. Zero: all, since their owner clears the folder.
	SnapshotsKept int
	// Progress is told how Dial gets on, in its goroutine. May be nil.
	Progress func(Progress)
	// Logger gets the rare events; nil means slog.Default.
	Logger *slog.Logger
	// Dialer connects to workers; nil means a net.Dialer. It must honour its context.
	Dialer func(ctx context.Context, network, addr string) (net.Conn, error)
	// Descriptor is called with each descriptor that a worker sends, before anything else is done with it, also before
	// it is closed, and may refuse it (wire.ReceiveWithFD). Nil: workers are trusted so far.
	Descriptor func(fd int) error
}

const defaultBuffers = 256 << 20

// restMin is how much memory must have become free for the collector to be troubled at once.
const restMin = 4 * ring.BlockSize

// timing is what tests make shorter. The defaults come from package wire where it states them.
type timing struct {
	ping, pong time.Duration
	// idle is how long a connection stays over which nothing is asked.
	idle           time.Duration
	near, nearIdle time.Duration
	// crowd is crowdPatience, of files larger than large.
	crowd          time.Duration
	large          int64
	client, worker time.Duration
	// slow is when a request without an answer gives its share of the network to others.
	slow time.Duration
	// redial and retry are the first pauses between dials and between rounds, Max the longest.
	redial, redialMax time.Duration
	retry, retryMax   time.Duration
	// file is how often the membership file is looked at.
	file time.Duration
	// rest is how often it is looked whether anybody reads.
	rest time.Duration
	// remind is how often the workers are asked for the snapshot.
	remind time.Duration
}

func defaultTiming() timing {
	return timing{
		ping: wire.PingInterval, pong: wire.PongTimeout, idle: time.Minute, near: nearPatience, nearIdle: nearIdle, client: wire.ClientTimeout,
		crowd: crowdPatience, large: maxLeaseFill,
		// The worker gives up first and says why.
		worker: wire.WorkerTimeout + 2*time.Second,
		slow:   250 * time.Millisecond,
		redial: 50 * time.Millisecond, redialMax: 2 * time.Second,
		retry: 20 * time.Millisecond, retryMax: time.Second,
		file: time.Second,
		rest: time.Minute, remind: wire.RemindEvery,
	}
}

// Client reads one snapshot of a dataset.
type Client struct {
	config   Config
	copies   int
	log      *slog.Logger
	timing   timing
	dialer   func(ctx context.Context, network, addr string) (net.Conn, error)
	now      func() time.Time
	limit    func() (bytes int64, ok bool) // of the container's memory
	disk     func(dir string, size, has int64) error
	reserved int64 // of it, for a snapshot (reserve)
	snapshot *catalog.Snapshot
	digest   catalog.Digest
	members  *members
	cache    *blocks
	streams  *streams
	walks    *walks
	fills    fills
	nears    nears
	latency  latency
	count    counters
	// forgotten has a token while reads fail since workers do not hold the snapshot; unwanted is why all refuse it now.
	forgotten chan struct{}
	unwanted  atomic.Pointer[error]

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // goroutines
	calls  sync.WaitGroup // calls of exported methods under way

	mu     sync.Mutex
	closed bool
	socks  map[string]*sock
}

// Dial connects to the dataset's workers and gets the snapshot, waiting while they still list the bucket.
// It ends with ctx, or when every worker refuses this client's key.
func Dial(ctx context.Context, config Config) (*Client, error) {
	return dial(ctx, config, defaultTiming())
}

func dial(ctx context.Context, config Config, t timing) (*Client, error) {
	c, err := newClient(config, t)
	if err != nil {
		return nil, fmt.Errorf("dataset %s: %w", config.Dataset, err)
	}
	s, err := c.pull(ctx, config.Snapshot)
	if err != nil {
		c.Close()
		return nil, err
	}
	c.snapshot, c.digest = s, s.Digest()
	c.walks = newWalks(s, c.config.BufferBytes, c.now)
	c.spawn(func() { c.remind(c.ctx) })
	return c, nil
}

func newClient(config Config, t timing) (*Client, error) {
	switch {
	case config.Dataset == "":
		return nil, errors.New("no dataset: set namespace/name")
	case config.Copies < 0:
		return nil, fmt.Errorf("copies is %d: set 1 or more", config.Copies)
	case config.BufferBytes < 0, config.BufferBytes > 0 && config.BufferBytes < ring.BlockSize:
		return nil, fmt.Errorf("buffers of %d bytes: set at least one block of %d", config.BufferBytes, ring.BlockSize)
	case config.KeySource == nil && len(config.Keys.Read) == 0:
		return nil, fmt.Errorf("%w: no read key; give the client the Dataset's keys", wire.ErrUnauthorized)
	}
	if config.BufferBytes == 0 {
		config.BufferBytes = defaultBuffers
	}
	if config.Buffers == nil {
		config.Buffers = NewBuffers(config.BufferBytes)
	}
	c := &Client{
		config: config, copies: max(1, config.Copies), log: config.Logger, timing: t, dialer: config.Dialer, now: time.Now, limit: meminfo.Limit, disk: roomOnDisk,
		cache: newBlocks(config.BufferBytes, config.Buffers), streams: newStreams(), socks: make(map[string]*sock),
		forgotten: make(chan struct{}, 1),
	}
	if c.log == nil {
		c.log = slog.Default()
	}
	c.log = c.log.With("dataset", config.Dataset)
	if c.dialer == nil {
		c.dialer = new(net.Dialer).DialContext
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	m, err := newMembers(c)
	if err != nil {
		c.cancel()
		return nil, err
	}
	c.members = m
	c.spawn(func() { m.run(c.ctx) })
	c.spawn(func() {
		for sleep(c.ctx, t.rest) {
			if c.cache.rest() >= restMin {
				debug.FreeOSMemory() // by itself the collector may take five minutes
			}
		}
	})
	return c, nil
}

// Close ends every read and connection, waits for the goroutines, and closes the snapshot. Leases stay
// valid until they are released.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.members.close()
	c.calls.Wait()
	c.wg.Wait()
	if c.snapshot != nil {
		c.snapshot.Close()
	}
	c.cache.close()
	c.release()
	return nil
}

// Snapshot is what the Client reads. It is valid until Close.
func (c *Client) Snapshot() *catalog.Snapshot { return c.snapshot }

// begin enters an exported method; the caller ends it with c.calls.Done. False: the Client is closed.
func (c *Client) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.calls.Add(1)
	return true
}

// spawn runs f in a goroutine that Close waits for. False: the Client is closed, and f does not run.
func (c *Client) spawn(f func()) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.wg.Go(f)
	return true
}

func (c *Client) keys() wire.Keys {
	if c.config.KeySource != nil {
		return c.config.KeySource()
	}
	return c.config.Keys
}

func (c *Client) shuffle(p []*peer) {
	rand.Shuffle(len(p), func(i, j int) { p[i], p[j] = p[j], p[i] })
}
