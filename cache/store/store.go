// Package store keeps blocks of objects in memory: sparse files on a tmpfs, one per object version.
//
// It owns residency (which blocks of which object are held), the quota and what is evicted for it, the
// checksums of what is held, pins and leases, and what a restarted process finds again. It knows nothing
// of buckets, workers or networks: the bytes of a block come from the Fill that a caller passes.
//
// Life of a block: a fill writes it into a pooled heap buffer, its sums are taken, the policy (otter,
// W-TinyLFU) admits it or refuses it, its bytes are reserved under the quota, and only then is it written
// to the object's file; so a failed fill leaves no trace and no page exists that the quota does not hold.
// What is refused is served from the heap buffer and forgotten. A block is evicted by punching a hole, or
// by unlinking the file with its last block. A file whose descriptor ever left (Lease) is never punched
// nor truncated: it is unlinked whole, and only once the kernel says that nobody else has it open.
//
// Concurrency: everything is safe for concurrent use. One mutex guards all state in memory, the policy
// included, and is never held over file I/O; a block or a file that is being changed on the tmpfs is
// marked so, and whoever needs it waits for that change alone. Failure: a full tmpfs is never an error to
// a reader (the block is served from heap); an error of a fill goes to those who wait for it and to nobody
// later; bytes that no longer match their sums are dropped and counted, never returned as good by Verify.
//
// It may import cache/ring and cache/source of this module.
package store

import (
	"context"
	"errors"
	"log/slog"
	"os"

	"github.com/stepcache/stepcache/cache/ring"
)

// SumSize is the length in bytes that one CRC32C (Castagnoli) covers, the same as wire.SumSize: a
// block's sums travel with its bytes unchanged.
const SumSize = 64 << 10

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
// block. Its context ends when nobody waits for the block any more or the store closes; it has no deadline
// of its own.
type Fill func(ctx context.Context, p []byte) error

// Residency is how much of an object the store holds.
type Residency struct {
	Blocks int64 // resident blocks
	Total  int64 // blocks of the object
	Bytes  int64 // resident bytes of content
	Whole  bool
}

// Stats are gauges and counters of a store.
type Stats struct {
	Quota   int64 // bytes
	Used    int64 // bytes held against the quota: pages, inodes, journal, zombies
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

// Block is one block in use: its bytes stay until Release.
type Block struct{}

// Lease is a read-only descriptor of a wholly resident object.
type Lease struct {
	// File may be passed to other processes. It is closed by Release.
	File *os.File
}

// Store is an open store.
type Store struct{}

var errTODO = errors.New("store: not built yet")

func Open(ctx context.Context, opts Options) (*Store, error) { return nil, errTODO }
func (s *Store) Close() error                                { return errTODO }
func (s *Store) Acquire(ctx context.Context, o ring.Object, block int64, fill Fill) (*Block, error) {
	return nil, errTODO
}
func (s *Store) Lookup(o ring.Object, block int64) (*Block, bool)      { return nil, false }
func (b *Block) Release()                                              {}
func (b *Block) Len() int                                              { return 0 }
func (b *Block) Sums() []uint32                                        { return nil }
func (b *Block) Resident() bool                                        { return false }
func (b *Block) File() (*os.File, int64)                               { return nil, 0 }
func (b *Block) ReadAt(p []byte, off int64) (int, error)               { return 0, errTODO }
func (b *Block) Bytes() []byte                                         { return nil }
func (s *Store) Verify(b *Block) bool                                  { return false }
func (s *Store) Scrub(ctx context.Context, bytesPerSecond int64) error { return errTODO }
func (s *Store) Lease(o ring.Object) (*Lease, error)                   { return nil, errTODO }
func (l *Lease) Release()                                              {}
func (s *Store) Pin(o ring.Object, block int64, owner string) error    { return errTODO }
func (s *Store) Unpin(owner string)                                    {}
func (s *Store) Residency(o ring.Object) Residency                     { return Residency{} }
func (s *Store) Bitmap(o ring.Object) []byte                           { return nil }
func (s *Store) Drop(o ring.Object)                                    {}
func (s *Store) Stats() Stats                                          { return Stats{} }
func MountTmpfs(dir string, bytes int64) (note string, err error)      { return "", errTODO }
func Unmount(dir string) error                                         { return errTODO }
