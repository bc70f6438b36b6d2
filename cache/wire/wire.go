// Package wire is the protocol between workers and their readers.
//
// It owns the frames of the block protocol (framed TCP, and the same frames one a packet over a Unix
// SOCK_SEQPACKET socket where descriptors travel with replies), the handshake that authenticates a
// connection, the JSON of the HTTP control endpoint and how its requests are signed, and the deadlines
// of the data path, which nest. Both sides of the tier import it, and no policy lives here.
//
// Concurrency: functions are pure or work on one connection, whose reads and writes are each for one
// goroutine at a time. Failure: a frame that does not decode (bad magic, length or checksum) is
// ErrCorrupt, after which the connection is of no use and must be closed.
//
// It may import cache/checksum, cache/ring and cache/source.
package wire

import (
	"errors"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// The deadlines of the data path, each stated here only. They nest: whoever waits for another waits
// longer than the other may take.
const (
	// SourceTimeout bounds how long a fetch of a block from the bucket goes on while nothing comes, retries included.
	SourceTimeout = 20 * time.Second
	// WorkerTimeout bounds a worker's answer to one Read.
	WorkerTimeout = 25 * time.Second
	// ClientTimeout bounds one block in the client, with every worker that it falls back to.
	ClientTimeout = 55 * time.Second
	// FUSETimeout bounds one read of the file system.
	FUSETimeout = 60 * time.Second
	// PingInterval and PongTimeout: a connection with requests under way is pinged, and one that does not
	// answer within the time-out belongs to a hung worker: its requests go elsewhere. A worker that only
	// waits for a slow bucket answers pings.
	PingInterval = 1 * time.Second
	PongTimeout  = 3 * time.Second
	// DialTimeout bounds connect and handshake.
	DialTimeout = 3 * time.Second
	// RemindEvery is how often a reader asks workers for its snapshot, which they keep for those that do: pages that the
	// kernel has, and files that are read by descriptor, ask for nothing.
	RemindEvery = 10 * time.Minute
)

// Op is the kind of a request.
type Op uint8

// Requests.
const (
	// OpPing is answered at once, by the connection's reader itself.
	OpPing Op = iota + 1
	// OpRead asks for bytes of one file of a snapshot: [Off, Off+Length) within one block, from a multiple of
	// checksum.Size to another one or the end of the object. The reply carries the sums of the payload, so that every
	// byte that travels is checked by its receiver.
	OpRead
	// OpHandOver gives a block, which is [Off, Off+Length), to the worker that owns it from now on: the sender, which
	// leaves the membership, holds it. It is answered once the receiver holds it too, or NotResident when it has no room
	// but that of other blocks.
	OpHandOver
	// OpSnapshot asks for bytes [Off, Off+Length) of the encoded snapshot named by Snapshot; zero digest:
	// the current one, whose digest comes back in the reply's Body. The reply's Size is its whole length.
	OpSnapshot
	// OpMembers asks for the membership list; the reply's payload is its JSON. Its Index is NamesServed where the
	// worker answers questions about names.
	OpMembers
	// OpLease (Unix socket only) asks for a read-only descriptor of a file that the worker holds whole.
	// With WaitMillis > 0 the worker first fills the file, for that long at most; one that is too large for that it
	// waits for where so many read it that another reader would only slow them. The descriptor comes with the reply
	// (SCM_RIGHTS) and the lease's id in Off. The lease ends with OpRelease or with the connection; a live lease keeps
	// the file from eviction.
	OpLease
	// OpRelease ends the lease whose id is in Off.
	OpRelease
	// OpResident asks which blocks of a file are resident; the payload is a bitmap, least significant
	// bit first.
	OpResident
	// OpObjects makes the connection one that carries HTTP requests about the names of a writable dataset from the
	// OK reply on: of the write role those of other workers (cache/objects), of the read role those of names.go.
	OpObjects
	// OpBlock (Unix socket only) asks for block Off/BlockSize of a file that was leased with FlagEarly to be readable
	// through its descriptor: Index is the lease's id, Off and Length are the block. The answer comes once it is, with
	// the block's sums in the payload (SumList); it stays so until the lease ends. NotResident: it is not
	// there, and is not fetched for this since it would take the place of others, or is not kept: OpRead serves it.
	OpBlock
	// OpOffer gives a snapshot, of Off bytes, to a worker that does not hold it any more: see Offer.
	OpOffer
)

// Flag modifies a request.
type Flag uint8

// Flags.
const (
	// FlagReadThrough: the sender could not reach the owner; answer from the bucket although this worker
	// does not own the block. Without it a worker that owns neither the block nor a copy of it and does not
	// hold it answers NotOwner.
	FlagReadThrough Flag = 1 << iota
	// FlagResidentOnly: answer only if the block is resident, NotResident otherwise (hedged reads).
	FlagResidentOnly
	// FlagPeer: the sender is a worker that fills its own copy. The receiver treats itself as the first
	// owner: it goes to the bucket and asks no other worker, so that two workers never wait for each other.
	FlagPeer
	// FlagVerify: the sender received bytes that failed their sums. The receiver reads what it holds again
	// and compares; a block that is bad in its memory is dropped, fetched anew and counted before it answers.
	FlagVerify
	// FlagHandOver is set in each OpHandOver, for workers of earlier releases: without it the request was a hint to
	// them, which they answered before they did anything.
	FlagHandOver
	// FlagGuess, of OpRead: nobody has asked for the bytes yet. The receiver fetches a block that it does not
	// hold only where that takes the place of nothing (NotResident otherwise) and while few such fetches are
	// under way (Overloaded otherwise), so that guesses never stand in the way of readers.
	FlagGuess
	// FlagEarly, of OpLease: the file may be incomplete, and the sender asks OpBlock for each block before it reads it
	// through the descriptor.
	FlagEarly
)

// Status of a reply.
type Status uint8

// Statuses. Every one but OK comes with a message for people in the payload, naming the object.
const (
	OK Status = iota
	// NotOwner: another worker owns the block under this worker's membership.
	NotOwner
	// NotResident answers FlagResidentOnly and OpLease.
	NotResident
	// UnknownSnapshot: the worker does not have this snapshot (yet): ask another, or again later.
	UnknownSnapshot
	// Overloaded: the worker's queue is full: back off, then ask again or another worker.
	Overloaded
	// Changed, NotFound, Denied, NoBucket, Unversioned, Throttled, Unavailable, Invalid: the source's
	// error of the same name. Changed and NotFound of a fetch are final for the object version.
	Changed
	NotFound
	Denied
	NoBucket
	Unversioned
	Throttled
	Unavailable
	Invalid
	// Internal: a fault of the worker (its memory, a bug): ask another.
	Internal
	// Late: the worker had no answer when the time for it was up, and does not know of anything wrong.
	Late
)

// Digest names a snapshot; package catalog says what it is a SHA-256 of.
type Digest = [32]byte

// Request is one request. Its encoding is a fixed header with a CRC32C of its own.
type Request struct {
	Op       Op
	Flags    Flag
	ID       uint32 // chosen by the sender, unique among its requests under way
	Epoch    uint64 // the sender's membership epoch
	Snapshot Digest
	Index    uint32 // the file's node index in the snapshot
	Off      int64
	Length   int32
	// WaitMillis is how long the sender will wait for the answer (OpLease: for the file to be filled);
	// zero means the default of the operation.
	WaitMillis uint32
}

// Reply is a reply's header; Sums and the payload of Length bytes follow it. The header's CRC32C covers
// the sums too; the sums cover the payload.
type Reply struct {
	Status Status
	ID     uint32
	Epoch  uint64 // the sender's membership epoch: a reader with an older one asks OpMembers
	// Index and Off echo a Read's, so that an answer to another question is never taken for this one's.
	Index  uint32
	Off    int64
	Size   int64 // OpSnapshot: the whole length
	Body   Digest
	Length int32
	Sums   []uint64
}

// Errors.
var (
	// ErrCorrupt: a frame or a payload failed its checksum or could not be decoded.
	ErrCorrupt = errors.New("corrupt frame")
	// ErrUnauthorized: the handshake failed: unknown dataset, role or key.
	ErrUnauthorized = errors.New("unauthorized")
	// ErrVersion: the handshake failed, since the two sides are of releases whose protocols differ. It goes away once
	// both are replaced by the same.
	ErrVersion = errors.New("another version of the protocol")
	// ErrNotOwner, ErrNotResident, ErrUnknownSnapshot, ErrOverloaded, ErrInternal, ErrLate: the statuses.
	ErrNotOwner        = errors.New("not the owner")
	ErrNotResident     = errors.New("not resident")
	ErrUnknownSnapshot = errors.New("unknown snapshot")
	ErrOverloaded      = errors.New("worker overloaded")
	ErrInternal        = errors.New("worker fault")
	ErrLate            = errors.New("worker did not answer in time")
)

// statusErrors maps statuses to the errors that both sides test for with errors.Is.
var statusErrors = map[Status]error{
	NotOwner: ErrNotOwner, NotResident: ErrNotResident, UnknownSnapshot: ErrUnknownSnapshot,
	Overloaded: ErrOverloaded, Internal: ErrInternal, Late: ErrLate,
	Changed: source.ErrChanged, NotFound: source.ErrNotFound, Denied: source.ErrDenied,
	NoBucket: source.ErrNoBucket, Unversioned: source.ErrUnversioned, Throttled: source.ErrThrottled,
	Unavailable: source.ErrUnavailable, Invalid: source.ErrInvalid,
}
