// Package catalog holds a dataset's snapshot: the immutable listing of its mounts at one time, named by a
// digest, as one flat run of bytes that is read in place.
//
// # The model
//
// A snapshot is a tree of nodes in breadth-first order. A node's index is its position: the root directory
// is 0, the children of a directory are neighbours, sorted by the bytes of their names, and a parent comes
// before its children. Nothing is unpacked: a lookup is a binary search a path segment, a directory is a
// range of indexes, and a file system can use index+1 as its node id in every process that holds the
// snapshot. Builder and List make a snapshot, Open and OpenFile check one that somebody else made.
//
// The same objects, listed twice, give the same bytes but for the time of creation, which the digest
// leaves out. The order of the listing makes no difference.
//
// # Keys
//
// What an object's key becomes, once the mount's prefix is taken off and split at "/":
//
//   - A prefix is a folder: "data" means "data/", and "data2/x" is not below it. Only when nothing is below
//     "data/" does List look for the single object "data", which is then shown under its last segment.
//   - Names are bytes. Non-UTF-8, newline, control characters and blanks are shown as they are.
//   - A segment longer than 255 bytes, or one with a NUL byte, cannot be a name: counted (LongName, NulByte).
//     A key is otherwise of any length, as long as its path in the dataset fits 4,095 bytes (LongPath).
//   - An empty segment (a leading slash, "//") cannot be told from its neighbours: counted (EmptySegment).
//   - The segments "." and ".." mean other directories to every reader: counted (DotSegment).
//   - "a" beside "a/b": the directory is shown, the object "a" is counted (Shadowed), however small it is.
//   - "a/" is a directory marker: the directory a exists, even if it is empty. Content of a marker has no
//     place in a file system: counted (MarkerContent); the directory is still shown.
//   - A key that one listing gives in several versions (it changed meanwhile) is shown in the newest;
//     the others are counted (Duplicate). The same version given twice is one object.
//   - Mount paths must not overlap, so two mounts never claim one path. The directories above a mount's path
//     are made up. One object below two mounts is two files with one identity, cached once.
//   - An object of more than 64 TiB, which no store has but a sparse file or a broken listing can claim, is
//     counted (LargeFile): it would have more blocks than anybody can keep account of.
//   - What the source itself says is no object (source.Object.Skip) is counted with the source's reason.
//
// A counted key leaves no trace in the tree; Skipped says how many there are of each kind, with examples.
//
// # Rules
//
// Concurrency: a Snapshot is immutable and safe for concurrent use until Close; a Builder belongs to one
// goroutine. Failure: Open refuses bytes that any later call could stumble over, with ErrCorrupt; after that
// no method fails, and an index that is out of range gives zero values.
//
// It may import cache/source and cache/ring.
package catalog

import (
	"errors"
	"time"
)

// ErrCorrupt: the bytes are not a snapshot, or a damaged one.
var ErrCorrupt = errors.New("corrupt snapshot")

// Digest names a snapshot: SHA-256 over its encoding with the time of creation set to zero.
type Digest = [32]byte

// Index is the position of a node in a snapshot; 0 is the root directory.
type Index = uint32

// Mount is one source in the tree of a dataset.
type Mount struct {
	// URL is the source's canonical name (source.Source.URL).
	URL string
	// Prefix is what the keys of the mount start with; empty, or with a slash at its end (added if missing).
	Prefix string
	// Path is where the mount's files appear: "/", or a clean absolute path like "/a/b".
	Path string
	// AllowUnversioned accepts objects without a version.
	AllowUnversioned bool
}

// Node is one directory or file.
type Node struct {
	// Name is the last segment of the path; "" for the root. It is valid until Close.
	Name string
	Dir  bool
	// Size is in bytes; 0 for a directory.
	Size int64
	// ModTime is the object's, in UTC; for a directory the newest of what is below it. May be zero.
	ModTime time.Time
	// Parent is the directory of the node; the root is its own.
	Parent Index
	// First and Count are a directory's children, in the order of their names' bytes: [First, First+Count).
	First Index
	Count uint32
}

// Skipped counts the keys that cannot be shown for one reason.
type Skipped struct {
	// Reason is one of the constants below, or the source's own.
	Reason string
	Count  int64
	// Examples are the first few in the order of their bytes, as URL/key, escaped as in a Go string.
	Examples []string
}

// Why a key cannot be shown; see the package comment.
const (
	EmptySegment  = "empty path segment"
	DotSegment    = "path segment . or .."
	NulByte       = "NUL byte in name"
	LongName      = "name over 255 bytes"
	LongPath      = "path over 4095 bytes"
	Shadowed      = "object beside a directory of the same name"
	MarkerContent = "directory marker with content"
	LargeFile     = "object over 64 TiB"
	Duplicate     = "older version in the same listing"
)
