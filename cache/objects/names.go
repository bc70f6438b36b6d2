package objects

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// Fresh is how long a version that the bucket told is used without asking again, FreshExclusive the
	// same where nobody but the dataset writes to the bucket.
	Fresh          = time.Second
	FreshExclusive = 30 * time.Second
	// HandOverTime is how long a member that does not answer is taken to follow an old membership.
	HandOverTime = time.Minute
	// UploadAge is when an unfinished upload in parts of an exclusive dataset is given up.
	UploadAge = 7 * 24 * time.Hour
)

// Mount is one source and where its keys appear.
type Mount struct {
	// Path is where it appears in the dataset: "/" or "/a/b".
	Path string
	// Prefix is what every key of it starts with in the bucket.
	Prefix string
	Source source.Source
}

// Members tells the list of workers.
type Members interface {
	// List is the list in force, and a channel that is closed when another takes its place.
	List() (ring.Membership, <-chan struct{})
	// Look has the list read again soon: another worker follows a newer one.
	Look()
}

// Clock is the time as this package sees it.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}

// Config of New.
type Config struct {
	// Dataset is namespace/name, Self this worker's member id.
	Dataset, Self string
	// Mounts are the dataset's; nil while the sources are not open yet.
	Mounts func() []Mount
	Store  *store.Store
	// Quota is the store's, in bytes.
	Quota int64
	// Dir is a folder that outlives the process where the store does, for the journal of uploads.
	Dir string
	// Exclusive: nobody else writes below the mounts.
	Exclusive bool
	// Back, when not nil, has writes acknowledged before the bucket has them.
	Back    *Back
	Members Members
	// Fetched, when not nil, is told of each block that came from the bucket, with the digest of the whole object that
	// came along, or from another worker. Resident is told of each object of which a block has become resident.
	Fetched  func(ring.Object, source.Digest)
	Resident func(source.Object, ring.Object)
	// Dial connects to other workers, Keys are the dataset's.
	Dial   func(ctx context.Context, network, addr string) (net.Conn, error)
	Keys   func() wire.Keys
	Clock  Clock
	Logger *slog.Logger
}

// Names are the names of one dataset, at one worker.
type Names struct {
	c     Config
	log   *slog.Logger
	fresh time.Duration

	epochs   epochs
	versions versions
	peers    *peers
	stage    *stager
	uploads  *uploads
	// writing bounds the bytes that puts hold in memory, heap those that reads hold in blocks that the store
	// does not keep.
	writing, large *semaphore.Weighted
	heap           *semaphore.Weighted
	counts         counts
	opened         atomic.Pointer[[]*mount]
	handler        http.Handler
	warm           chan warming
	replaced       replaced
	parts          parts
	assemblies     assemblies
	back           *back // nil: writes are acknowledged once the bucket has them

	// life ends with Close, which waits for those that ask other workers.
	life   context.Context
	end    context.CancelFunc
	asking sync.WaitGroup
}

// Counts are what was done since the start.
type Counts struct {
	Puts, Deletes, Copies, Reads, Lists int64
	// Written are bytes that were put, Read those that readers got from this worker's gateway, Followed those that
	// mounts got.
	Written, Read, Followed int64
	// Forwarded are operations passed on to another worker, Direct those executed here although another
	// worker owns the name, which could not be reached; Waited those acknowledged only after Fresh.
	Forwarded, Direct, Waited int64
	// Back are puts that were acknowledged before the bucket had them, Flushed versions brought there since.
	Back, Flushed int64
	// Staged are puts whose bytes are in the tier since, Unstaged those that were too large or had no room.
	// Assembled are bytes of objects that were made of the parts that workers held of them.
	Staged, Unstaged, Assembled int64
}

type counts struct {
	puts, deletes, copies, reads, lists, written, read, followed atomic.Int64
	forwarded, direct, waited, staged, unstaged                  atomic.Int64
	back, flushed, assembled                                     atomic.Int64
}

var (
	_ gateway.Objects   = (*Names)(nil)
	_ gateway.Writer    = (*Names)(nil)
	_ gateway.Multipart = (*Names)(nil)

	_ gateway.BulkWriter = (*Names)(nil)
)

// Buffers is the heap in bytes that the names of one worker need at most beside a worker's own: puts under
// way, the block that each has staged, and reads of what the store does not keep.
const Buffers = 256 << 20

const (
	// maxWriting bounds the heap of puts under way: each holds parts of 16 MiB while they are sent.
	maxWriting = 128 << 20
	// maxHeap bounds the heap of blocks that are sent without being kept.
	maxHeap = 8 * ring.BlockSize
)

// New returns the names of a dataset. Run must be called.
func New(c Config) (*Names, error) {
	if c.Dataset == "" || c.Self == "" || c.Mounts == nil || c.Store == nil || c.Members == nil || c.Keys == nil || c.Dial == nil {
		return nil, errors.New("objects: the configuration is not complete")
	}
	if c.Clock == nil {
		c.Clock = systemClock{}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Fetched == nil {
		c.Fetched = func(ring.Object, source.Digest) {}
	}
	if c.Resident == nil {
		c.Resident = func(source.Object, ring.Object) {}
	}
	n := &Names{
		c: c, log: c.Logger, fresh: Fresh,
		versions: versions{names: make(map[string]*name)},
		writing:  semaphore.NewWeighted(maxWriting), large: semaphore.NewWeighted(maxWriting / 2), heap: semaphore.NewWeighted(maxHeap),
		warm: make(chan warming, 64),
	}
	if c.Exclusive {
		n.fresh = FreshExclusive
	}
	var err error
	if n.uploads, err = openUploads(filepath.Join(c.Dir, uploadsName)); err != nil {
		return nil, err
	}
	n.stage = &stager{store: c.Store, quota: c.Quota}
	n.life, n.end = context.WithCancel(context.Background())
	n.parts = parts{stager: n.stage, of: make(map[uploadName]*list.Element)}
	n.replaced = replaced{store: c.Store, reading: make(map[ring.Object]int), dead: make(map[ring.Object]bool)}
	n.peers = newPeers(n)
	if c.Back != nil {
		if c.Back.Copies < 2 || c.Back.MaxBytes <= 0 {
			return nil, errors.New("objects: to acknowledge what the bucket does not have takes at least 2 copies, and memory for them")
		}
		if n.back, err = newBack(n, *c.Back); err != nil {
			n.uploads.close()
			return nil, err
		}
		n.epochs.back, n.epochs.copies = true, c.Back.Copies
	}
	n.handler = n.routes()
	n.epochs.init(c.Members, c.Self, c.Clock.Now())
	return n, nil
}

type systemClock struct{}

func (systemClock) Now() time.Time                         { return time.Now() }
func (systemClock) After(d time.Duration) <-chan time.Time { return time.After(d) }

// Run keeps what must be kept up to date until ctx ends: which members follow which epoch, uploads to be
// given up, and what is to be made warm.
func (n *Names) Run(ctx context.Context) error {
	loops := []func(context.Context){n.keepUploads, n.keepWarm}
	if n.back != nil {
		loops = append(loops, n.back.keepFlushing, n.keepConfirmed)
	}
	done := make(chan struct{}, len(loops))
	for _, loop := range loops {
		go func() {
			defer func() { done <- struct{}{} }()
			loop(ctx)
		}()
	}
	n.keepEpochs(ctx)
	for range loops {
		<-done
	}
	return nil
}

// Leave must be called before this worker stops to listen for others, who then take it to be gone: what it
// still does is done as by a worker that is not settled.
func (n *Names) Leave() { n.epochs.leave() }

// Close gives back what New took, after the last request has ended.
func (n *Names) Close() {
	n.end()
	n.asking.Wait()
	n.uploads.close()
	n.peers.shut()
}

// Counts returns the counters.
func (n *Names) Counts() Counts {
	c := &n.counts
	return Counts{
		Puts: c.puts.Load(), Deletes: c.deletes.Load(), Copies: c.copies.Load(), Reads: c.reads.Load(), Lists: c.lists.Load(),
		Written: c.written.Load(), Read: c.read.Load(), Followed: c.followed.Load(),
		Forwarded: c.forwarded.Load(), Direct: c.direct.Load(), Waited: c.waited.Load(), Staged: c.staged.Load(), Unstaged: c.unstaged.Load(),
		Back: c.back.Load(), Flushed: c.flushed.Load(), Assembled: c.assembled.Load(),
	}
}

// place is a key in its bucket.
type place struct {
	*mount
	key string // in the bucket
}

// name is the key in the dataset.
func (p place) name() string { return p.path + p.key[len(p.prefix):] }

func (p place) String() string { return p.URL() + "/" + p.key }

// mount is a Mount and what was found of its source.
type mount struct {
	source.Source
	writer source.Writer
	pager  source.Pager
	path   string // as the start of keys of the dataset: "" or "a/b/"
	prefix string // of keys of the bucket
	tags   tags
	// noMatch and noAbsent count the puts, one after the other, that the store took only without the condition that there
	// is a certain version, or none.
	noMatch, noAbsent atomic.Int32
	// taken is when the bucket took an object last, in nanoseconds of Unix.
	taken atomic.Int64
}

func (m *mount) takes(now time.Time) { m.taken.Store(now.UnixNano()) }

// mounts are the opened mounts in the order of their paths. Once opened they stay.
func (n *Names) mounts() ([]*mount, error) {
	if m := n.opened.Load(); m != nil {
		return *m, nil
	}
	given := n.c.Mounts()
	if given == nil {
		return nil, fmt.Errorf("%w: dataset %s: worker %s has not opened the sources yet", gateway.ErrBusy, n.c.Dataset, n.c.Self)
	}
	out := make([]*mount, 0, len(given))
	for _, g := range given {
		m := &mount{Source: g.Source, path: pathOf(g.Path), prefix: g.Prefix}
		if m.prefix != "" && m.prefix[len(m.prefix)-1] != '/' {
			m.prefix += "/" // as a listing of the mount does
		}
		var ok bool
		if m.writer, ok = source.WriterOf(g.Source); !ok {
			return nil, fmt.Errorf("%w: dataset %s: %s cannot be written through the tier; access: ReadWrite needs a bucket, s3:// or oss://", gateway.ErrReadOnly, n.c.Dataset, g.Source.URL())
		}
		if m.pager, ok = source.PagerOf(g.Source); !ok {
			return nil, fmt.Errorf("%w: dataset %s: %s cannot be listed in pages", gateway.ErrReadOnly, n.c.Dataset, g.Source.URL())
		}
		out = append(out, m)
	}
	sortMounts(out)
	n.opened.Store(&out)
	return out, nil
}

// locate finds the bucket of a key.
func (n *Names) locate(key string) (place, error) {
	if err := checkKey(key); err != nil {
		return place{}, fmt.Errorf("%w: key %q: %w", source.ErrInvalid, key, err)
	}
	mounts, err := n.mounts()
	if err != nil {
		return place{}, err
	}
	for _, m := range mounts {
		if rel, ok := strings.CutPrefix(key, m.path); ok && rel != "" {
			p := place{m, m.prefix + rel}
			if len(p.key) > maxKey {
				return place{}, fmt.Errorf("%w: key %q: with the mount's prefix it is longer than %d bytes", source.ErrInvalid, key, maxKey)
			}
			return p, nil
		}
	}
	return place{}, fmt.Errorf("%w: key %q: no mount of dataset %s is at its path", source.ErrNotFound, key, n.c.Dataset)
}
