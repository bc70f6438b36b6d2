// Package store keeps blocks of objects in memory: sparse files on a tmpfs, one per object version.
//
// It owns residency (which blocks of which object are held), the quota and what is evicted for it, the
// checksums of what is held, pins and leases, and what a restarted process finds again. It knows nothing
// of buckets, workers or networks: the bytes of a block come from the Fill that a caller passes.
//
// Life of a block: a fill writes it into a pooled heap buffer, its sums are taken, the policy (otter,
// W-TinyLFU) admits it or refuses it, its bytes are reserved under the quota, and only then is it written
// to the object's file; so a failed fill leaves no trace and no page exists that the quota does not hold.
// What is refused is served from the heap buffer and forgotten. What was just written is kept beside the policy
// for a while (Keep). A block is evicted by punching a hole, or
// by unlinking the file with its last block. A file whose descriptor ever left (Lease) is never punched
// nor truncated: it is unlinked whole, and only once the kernel says that nobody else has it open.
//
// Concurrency: everything is safe for concurrent use. One mutex guards all state in memory, the policy
// included, and is never held over file I/O; a block or a file that is being changed on the tmpfs is
// marked so, and whoever needs it waits for that change alone. Failure: a full tmpfs is never an error to
// a reader (the block is served from heap); an error of a fill goes to those who wait for it and to nobody
// later; bytes that no longer match their sums are dropped and counted, never returned as good by Verify.
//
// It may import cache/checksum, cache/meminfo, cache/ring and cache/source of this module.
package store

import (
	"container/list"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/maypok86/otter/v2"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// Errors.
var (
	// ErrFull: pins would exceed the quota.
	ErrFull = errors.New("cache full")
	// ErrNotWhole: the store does not hold all blocks of the object.
	ErrNotWhole = errors.New("object not wholly resident")
	// ErrNoLease: this store cannot hand out descriptors; the message says why.
	ErrNoLease = errors.New("descriptors cannot be leased")
	// ErrInUse: another process has the folder open.
	ErrInUse = errors.New("store folder in use")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store closed")
	// ErrInvalid: the call can never succeed as it stands (a block outside the object, another size for a known ID).
	ErrInvalid = errors.New("invalid request")
)

// Options of Open.
type Options struct {
	// Dir is the folder of the store, best a tmpfs of its own (see MountTmpfs). It is made if missing.
	Dir string
	// Quota is the most that the store holds, in bytes: pages, kernel inodes and the journal together.
	Quota int64
	// BufferBytes bounds the heap buffers of fills and of blocks that are served uncached; who needs one
	// waits in line. Zero means 64 MiB. At least one block.
	BufferBytes int64
	// Logger gets the rare events (corruption, a full tmpfs); nil means slog.Default.
	Logger *slog.Logger
}

// Fill writes exactly len(p) bytes, the block's content, into p. It is called at most once at a time per
// block. Its context ends when nobody waits for the block any more, and is not expected to come back, or the store
// closes; it has no deadline of its own.
type Fill func(ctx context.Context, p []byte) error

// FillSummed is a Fill that also gives the sums of the block (package checksum), which it has just compared with what
// is in p, or taken of it as it came: the sums then go with the bytes from where the block was first received,
// and are not taken anew. The store keeps the slice. Nil: there are none, and the store takes them.
type FillSummed func(ctx context.Context, p []byte) (sums []uint64, err error)

// Residency is how much of an object the store holds.
type Residency struct {
	Blocks int64 // resident blocks
	Total  int64 // blocks of the object
	Bytes  int64 // resident bytes of content
	Whole  bool
	Leases int // that are out, early ones included
}

// Stats are gauges and counters of a store.
type Stats struct {
	Quota   int64 // bytes
	Used    int64 // bytes held against the quota: pages, inodes, journal, zombies, entries in the heap
	Pinned  int64 // bytes of pinned blocks, resident or not
	Zombie  int64 // bytes of unlinked files that somebody still has open (part of Used)
	Blocks  int64 // resident blocks
	Objects int64 // objects with at least one resident block
	Bytes   int64 // resident bytes of content
	Leases  int64 // live leases

	Hits      uint64 // Acquire or Lookup found the block resident
	Misses    uint64 // fills started
	Shared    uint64 // Acquire joined a fill under way
	Uncached  uint64 // fills served from heap
	Evicted   uint64 // blocks evicted
	Corrupt   uint64 // blocks whose bytes no longer matched their sums
	Recovered uint64 // blocks found and verified by Open
	Scrubbed  uint64 // blocks checked by Scrub
	NoSpace   uint64 // writes that the file system refused although the quota allowed them

	// Tmpfs is false when Dir is on another file system: the cache then is as fast as that.
	Tmpfs bool
}

// Store is an open store.
type Store struct {
	dir     string
	log     *slog.Logger
	quota   int64
	unit    int64 // bytes that the file system allocates at a time
	tmpfs   bool
	own     bool   // the file system belongs to this folder alone
	noLease string // why Lease refuses; empty when it does not
	// wholeOnly: the file system makes no holes, so that only whole files can be evicted.
	wholeOnly bool
	lock      *os.File
	journal   *journal
	buffers   *buffers

	ctx    context.Context // of all fills
	cancel context.CancelFunc
	// lingers is lingers, but for tests.
	lingers time.Duration
	wg      sync.WaitGroup // fills, hands without one, and drops that wait for a fill
	hands   hands

	mu        sync.Mutex
	lingering int       // fills that nobody waits for
	idle      sync.Cond // an eviction or a write ended
	closed    bool
	objects   map[source.ID]*object
	owners    map[string]map[key]struct{} // pins by owner
	unpinning map[string]chan struct{}    // owners whose pins are being ended; closed once they are

	policy   *otter.Cache[key, *block]
	max      int64    // the policy's maximum in bytes
	inPolicy int64    // bytes of reserved blocks that the policy holds
	victims  []*block // blocks that the policy let go and that still have their bytes
	letGo    letGo    // those that it let go lately
	read     int64    // bytes of all blocks used, each time they were
	limit    int64    // the quota, or less while the file system is full below it
	used     int64    // bytes held or promised
	evicting int64    // part of used that evictions under way will free
	writing  int      // blocks being written
	changes  uint64   // grows with everything that changes pages on the file system
	pages    int64    // bytes of pages of reserved blocks
	entries  int64    // reserved blocks
	inHeap   int64    // bytes of them that the heap's limit was raised by
	live     int64    // bytes of journal records of resident blocks
	pinned   int64
	zombie   int64                // bytes of zombies and orphans
	orphans  int64                // bytes that a former life's readers still hold
	polls    uint                 // of orphans
	zombies  map[*object]struct{} // dropped objects whose pages may still be in use
	held     map[*object]struct{} // objects that somebody outside had open when they were to be evicted
	leases   int64
	early    int64 // bytes of objects that were leased before they were whole, and are still
	stats    Stats // counters only

	fresh      list.List // objects kept beside the policy, in the order in which they came
	freshBytes int64     // their weight
	missed     int64     // bytes of all blocks that were wanted and not here
}

// key names a block to the policy, also after the block is gone: its frequency outlives it.
type key struct {
	id source.ID
	n  int64
}

const (
	// inodeCost is about what the kernel holds for an inode, its directory entry and its page tree.
	inodeCost = 1 << 10
	// entryCost is about what a block's entries take of the heap: its own, its object's, the policy's, and its pin; 645
	// bytes without a pin and 962 with one, 1,126 while a former process's blocks are being recovered.
	entryCost = 1 << 10
	// entriesStep is in what steps the heap's limit follows them.
	entriesStep = 16 << 20
	// baseCost is what the journal and its copy while it is rewritten take beyond the blocks' own records.
	baseCost = 4 * journalSlack
	// minQuota is the smallest that makes sense.
	minQuota = 1 << 20
)

// Open opens the store in opts.Dir and recovers what a former process left there: blocks whose bytes match
// their sums stay resident, everything else of this store is removed. Files that are not the store's are
// left alone. One process at a time may have the folder open.
func Open(ctx context.Context, opts Options) (*Store, error) {
	if opts.Quota < minQuota {
		return nil, fmt.Errorf("store %s: quota of %d bytes is too small, at least %d are needed: %w", opts.Dir, opts.Quota, minQuota, ErrInvalid)
	}
	if opts.BufferBytes == 0 {
		opts.BufferBytes = 64 << 20
	}
	if opts.BufferBytes < ring.BlockSize {
		return nil, fmt.Errorf("store %s: buffers of %d bytes hold no block, at least %d are needed: %w", opts.Dir, opts.BufferBytes, ring.BlockSize, ErrInvalid)
	}
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	s := &Store{
		dir: opts.Dir, log: opts.Logger, quota: opts.Quota, limit: opts.Quota, max: opts.Quota - baseCost,
		buffers: newBuffers(opts.BufferBytes), lingers: lingers,
		objects: make(map[source.ID]*object),
		owners:  make(map[string]map[key]struct{}), unpinning: make(map[string]chan struct{}),
		zombies: make(map[*object]struct{}),
		held:    make(map[*object]struct{}),
		used:    baseCost,
	}
	s.idle.L = &s.mu
	s.policy = s.newPolicy()
	if err := s.openDir(); err != nil {
		return nil, err
	}
	if err := s.recover(ctx); err != nil {
		s.raiseHeap(0)
		s.lock.Close()
		return nil, fmt.Errorf("store %s: %w", s.dir, err)
	}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go s.writeJournal() // ended by Close
	return s, nil
}

// Close ends the fills under way, writes out the journal and closes every file. What is resident stays on
// the file system for the next Open. Blocks and leases still held keep their open files until released.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.idle.Broadcast()
	s.mu.Unlock()
	s.cancel()
	s.hands.close()
	s.wg.Wait()
	err := s.closeJournal()

	var last []*os.File
	s.mu.Lock()
	for o := range s.zombies {
		for o.reaping { // by somebody who just released it, and looks at the descriptor
			s.idle.Wait()
		}
		if _, left := s.zombies[o]; left && o.last != nil {
			last = append(last, o.last)
		}
	}
	clear(s.zombies)
	s.raiseHeap(0)
	s.mu.Unlock()
	for _, f := range last {
		f.Close()
	}
	return errors.Join(err, s.lock.Close())
}

// Stats returns the current figures.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Quota, st.Used, st.Pinned, st.Zombie = s.quota, s.used, s.pinned, s.zombie
	st.Leases, st.Tmpfs = s.leases, s.tmpfs
	return st
}

// Residency says how much of an object is held.
func (s *Store) Residency(o ring.Object) Residency {
	r := Residency{Total: ring.Blocks(o.Size)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ob := s.objects[o.ID]; ob != nil && ob.size == o.Size {
		r.Blocks, r.Bytes, r.Leases = ob.resident, ob.bytes, ob.leases
	}
	r.Whole = r.Blocks == r.Total
	return r
}

// Bitmap says which blocks of an object are resident, least significant bit first.
func (s *Store) Bitmap(o ring.Object) []byte {
	m := make([]byte, (ring.Blocks(o.Size)+7)/8)
	s.mu.Lock()
	defer s.mu.Unlock()
	if ob := s.objects[o.ID]; ob != nil && ob.size == o.Size {
		for n, b := range ob.blocks {
			if b.state == resident {
				m[n/8] |= 1 << (n % 8)
			}
		}
	}
	return m
}

func name(id source.ID) string { return hex.EncodeToString(id[:]) }

func (s *Store) path(id source.ID) string { return filepath.Join(s.dir, name(id)) }
