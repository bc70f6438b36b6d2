// Package source reads and writes the objects of a bucket.
//
// It owns the contract between the cache tier and an object store, and nothing of the tier: the
// sub-packages s3, oss and file implement it, the decorators of this package (Retry, Limit, Measure)
// wrap any implementation, and sourcetest is the one suite that every implementation passes.
//
// Concurrency: a Source is safe for concurrent use. Failure: every error wraps exactly one of the
// sentinel errors below where one applies, names the object (scheme://bucket/key) and says what the
// user can do; retry is decided by errors.Is against them, never by text.
//
// It may import the standard library, general libraries and the client libraries of stores; outside its
// own folder nothing of this module.
package source

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"time"
)

// Errors of a Source. Those marked (temporary) are worth another try; Retry tries only those.
var (
	// ErrNotFound: the object does not exist.
	ErrNotFound = errors.New("object not found")
	// ErrNoBucket: the bucket does not exist.
	ErrNoBucket = errors.New("bucket not found")
	// ErrChanged: the object exists in another version than the one asked for.
	ErrChanged = errors.New("object changed")
	// ErrDenied: the store refused the credentials, or there are none.
	ErrDenied = errors.New("access denied")
	// ErrUnversioned: the store gives the object neither an ETag nor a version id, so that its bytes
	// cannot be bound to a version, and the mount does not say allowUnversioned.
	ErrUnversioned = errors.New("object has no version")
	// ErrThrottled: the store asks for fewer requests (503 SlowDown, 429) (temporary).
	ErrThrottled = errors.New("throttled")
	// ErrUnavailable: no connection, a reset, a time-out, a truncated body or a 5xx (temporary).
	ErrUnavailable = errors.New("store unavailable")
	// ErrInvalid: the request can never succeed as it stands (a bad name, range or setting).
	ErrInvalid = errors.New("invalid request")
	// ErrReadOnly: the source does not accept writes.
	ErrReadOnly = errors.New("read-only source")
)

// Temporary says whether another try of the same request may succeed.
func Temporary(err error) bool {
	return errors.Is(err, ErrThrottled) || errors.Is(err, ErrUnavailable)
}

// Object describes one version of one object, as listed or stated.
type Object struct {
	// Key is the object's full name in its bucket (for file: the slash-separated path below the root).
	Key string
	// Size is in bytes.
	Size int64
	// Version is an opaque token that only the source which made it understands: the quoted-free
	// ETag, the version id, or for a local file its device, inode, size, mtime and ctime. Two different
	// contents of a key never share it. Empty only in a listing of a store without ETags.
	Version string
	// ModTime is the store's last-modified time.
	ModTime time.Time
	// Digest is the whole-object digest that the store publishes with a listing or stat; may be zero.
	Digest Digest
	// Skip, when not empty, says in a listing why this entry is no object that can be read (a local
	// folder's sockets, devices, links that lead out of it; OSS's links that cannot be followed). Such an
	// entry has no Version. It is listed so that whoever shows the listing can count and report it.
	Skip string
}

// Algorithm names a whole-object digest.
type Algorithm uint8

// The digests that stores publish.
const (
	None Algorithm = iota
	// MD5 is the ETag of an S3 or OSS object that was put in one part without KMS encryption.
	MD5
	// CRC64ECMA is OSS's x-oss-hash-crc64ecma (big-endian in Sum).
	CRC64ECMA
	// CRC32C, CRC64NVME, CRC32, SHA256: S3's full-object checksums.
	CRC32C
	CRC64NVME
	CRC32
	SHA256
)

// Digest is a digest of a whole object. The zero Digest means that none is published.
type Digest struct {
	Algorithm Algorithm
	Sum       []byte
}

// Body is the content of a Get. Its reader yields exactly the bytes asked for, or an error that is
// not io.EOF: a connection that ends early is ErrUnavailable.
type Body struct {
	io.ReadCloser
	// Digest is the whole-object digest that came with the answer, also of a ranged one; may be zero.
	Digest Digest
}

// Lister lists objects.
type Lister interface {
	// List calls yield for every object whose key starts with prefix, in no particular order (it may
	// list several sub-prefixes at once), but never concurrently. An error of yield ends the listing
	// and is returned. Memory is bounded, whatever the number of keys. Directory markers (keys that
	// end in a slash) are yielded like any other object.
	List(ctx context.Context, prefix string, yield func(Object) error) error
}

// PageRequest asks for one page of a listing.
type PageRequest struct {
	// Prefix is what every key starts with.
	Prefix string
	// After: only keys greater than it (in order of bytes) are wanted; empty means from the start.
	After string
	// Delimited asks for the level below Prefix only: objects without a further slash, and the common
	// prefixes (ending in a slash) of the others.
	Delimited bool
	// Max is how many objects and prefixes are enough, where that is less than a page; 0 is a whole one.
	Max int
}

// Keys is how many objects and prefixes to ask the store for.
func (r PageRequest) Keys() int {
	if r.Max > 0 && r.Max < maxKeys {
		return r.Max
	}
	return maxKeys
}

// maxKeys is what stores list at once.
const maxKeys = 1000

// Page is a page of a listing, of at most 1,000 objects and prefixes together.
type Page struct {
	Objects  []Object
	Prefixes []string
	// More says that there may be more keys after the last of this page.
	More bool
}

// Pager lists one page with one request. Stores that list in pages implement it and let ListPages do
// their List; the decorators then work on each page, so that a page that fails is tried again alone.
type Pager interface {
	Page(ctx context.Context, r PageRequest) (Page, error)
}

// Stater describes an object.
type Stater interface {
	// Stat returns the current version of key. Errors: ErrNotFound, ErrNoBucket, ErrDenied, ErrUnversioned.
	Stat(ctx context.Context, key string) (Object, error)
}

// Getter reads an object.
type Getter interface {
	// Get reads length bytes from offset off of the very version o names (If-Match or version id):
	// ErrChanged when the store now has another, ErrNotFound when it is gone. o needs Key, Size and
	// Version. The range lies within [0, o.Size]; an empty range yields an empty body without a request.
	Get(ctx context.Context, o Object, off, length int64) (Body, error)
}

// Putter writes an object.
type Putter interface {
	// Put streams r to key and returns the version it became. size is the length of r in bytes, or -1
	// when unknown; large bodies go in parts with constant memory. After an error no object is visible
	// under key that was not there before, and no parts are left behind. An r that ends before size, or
	// does not end there, is ErrInvalid. A stream cannot be read twice, so the Retry decorator does not
	// repeat a Put: an implementation repeats the requests whose bytes it holds itself, with Try.
	// ModTime of the answer is this machine's clock where the store does not tell.
	Put(ctx context.Context, key string, r io.Reader, size int64) (Object, error)
}

// Deleter deletes an object.
type Deleter interface {
	// Delete removes key. It is idempotent: a missing object is no error.
	Delete(ctx context.Context, key string) error
}

// Source is a bucket, or the part of one below a root.
type Source interface {
	Lister
	Stater
	Getter
	Putter
	Deleter
	// URL is the canonical name of the source: scheme://bucket for s3 and oss with the endpoint's host
	// in front of the bucket where it is not the provider's own (s3://host:port/bucket), file:///root
	// for a local folder. It has no credentials and no trailing slash. It is part of every ID.
	URL() string
}

// ID names the bytes of one object version everywhere in the tier: the first 16 bytes of a SHA-256
// over (source URL, key, version, size). Cached bytes belong to an ID, never to a name.
type ID [16]byte

// Identify computes the ID of an object of the source with the given URL.
func Identify(url string, o Object) ID {
	h := sha256.New()
	var n [8]byte
	for _, s := range []string{url, o.Key, o.Version} {
		binary.LittleEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		io.WriteString(h, s)
	}
	binary.LittleEndian.PutUint64(n[:], uint64(o.Size))
	h.Write(n[:])
	return ID(h.Sum(nil)[:16])
}
