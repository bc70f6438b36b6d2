package gateway

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// Errors of Objects, besides those of package source (ErrNotFound, ErrChanged, ErrThrottled,
// ErrUnavailable, ErrDenied, ErrInvalid). They are told apart with errors.Is.
var (
	// ErrReadOnly: the dataset does not accept writes.
	ErrReadOnly = source.ErrReadOnly
	// ErrNoUpload: the multipart upload does not exist: it was completed, aborted, or never begun.
	ErrNoUpload = errors.New("no such multipart upload")
	// ErrBadPart: Complete names a part that was not put, or not with that ETag.
	ErrBadPart = errors.New("invalid part")
	// ErrPartTooSmall: Complete names a part, not the last, that is smaller than the bucket allows.
	ErrPartTooSmall = errors.New("part too small")
	// ErrTooLarge: the object is larger than the dataset can ever take.
	ErrTooLarge = errors.New("object too large")
	// ErrPrecondition: IfMatch or IfNoneMatch of PutOptions does not hold.
	ErrPrecondition = errors.New("precondition failed")
	// ErrBusy: no room or no owner for the name at present; another try may succeed.
	ErrBusy = errors.New("busy")
	// ErrLeft: whoever asked gave up and waits for no answer; nothing was done.
	ErrLeft = errors.New("the client gave up")
)

// Info is one version of an object.
type Info struct {
	Key  string
	Size int64
	// ETag is as it goes on the wire, without quotes; multipart ones end in -N.
	ETag    string
	ModTime time.Time
	// ContentType, Headers and Metadata may be left empty in a listing.
	ContentType string
	// Headers are those that S3 keeps with an object besides its content type, as they were put, by
	// canonical name: Cache-Control, Content-Disposition, Content-Encoding, Content-Language, Expires.
	Headers map[string]string
	// Metadata is x-amz-meta-*, by lower-case name without that prefix.
	Metadata map[string]string
}

// Objects are the names of one dataset. Keys are valid (see ValidKey). An error wraps one of package
// source or of this package; any other is answered as InternalError.
type Objects interface {
	// Stat describes the current version of key: source.ErrNotFound when there is none.
	Stat(ctx context.Context, key string) (Info, error)
	// Open opens the version that Stat would have named; bytes never mix versions.
	Open(ctx context.Context, key string) (Object, error)
	// List returns up to max entries (objects and common prefixes together) whose key or common prefix
	// is greater than after, in order of bytes. With a delimiter, an after that is itself a common prefix
	// (starts with prefix and ends in the delimiter) skips everything below it; whether a common prefix that
	// after lies within is listed again is left open. An empty delimiter lists every key. max is between 1
	// and 1000.
	List(ctx context.Context, prefix, delimiter, after string, max int) (Page, error)
}

// Object is one version of an object, open for reading.
type Object interface {
	Info() Info
	// WriteRange writes n bytes from offset off to w, by zero copy where w allows (w is the response: an
	// io.ReaderFrom that sends an *os.File, or an io.LimitedReader of one, by sendfile). The range lies
	// within the object. An error after the first byte cuts the connection, so that no client takes a
	// part for the whole.
	WriteRange(ctx context.Context, w io.Writer, off, n int64) error
	Close() error
}

// Page is a page of a listing: Objects and Prefixes are each in order of bytes.
type Page struct {
	Objects  []Info
	Prefixes []string
	// More says that there may be entries after this page: where the bucket does not tell without being asked
	// for them, the next page may turn out to be empty.
	More bool
	// Next is the after of the next page: the last key or common prefix of this one.
	Next string
}

// Writer is implemented by Objects that accept puts.
type Writer interface {
	// Put stores size bytes of r and returns the version that they became. An r that ends early
	// (io.ErrUnexpectedEOF) or fails with any error aborts: nothing is visible, nothing leaked. r returns
	// its integrity error (a bad digest, a bad chunk signature) at its end, before the put may be
	// committed: implementations read r to io.EOF first. The error of r is wrapped in the one returned.
	Put(ctx context.Context, key string, size int64, r io.Reader, o PutOptions) (Info, error)
	// Delete is idempotent: a missing object is no error.
	Delete(ctx context.Context, key string) error
	// Copy makes to of the very version from names (Key, ETag and Size as Stat or Open gave them):
	// source.ErrChanged when there is another by now. o is complete: what is to be kept of the original
	// has been copied into it. from and to may be the same key, which replaces what o holds.
	Copy(ctx context.Context, from Info, to string, o PutOptions) (Info, error)
}

// BulkWriter is implemented by Writers that delete many objects with fewer requests than there are keys.
type BulkWriter interface {
	// DeleteMany deletes keys as Delete does, and returns the errors of those that it could not.
	DeleteMany(ctx context.Context, keys []string) map[string]error
}

// PutOptions of one object.
type PutOptions struct {
	ContentType string
	Headers     map[string]string // as in Info
	Metadata    map[string]string // as in Info
	// IfMatch is an ETag without quotes or "*"; IfNoneMatch is "*" or empty. They are decided in the same
	// step as the version is (ErrPrecondition, and source.ErrNotFound for an IfMatch without an object).
	IfMatch, IfNoneMatch string
	// Sums are those of the content of a Put.
	Sums source.Sums
}

// Multipart is implemented by Writers that take an object in parts. Part numbers are 1 to MaxParts.
type Multipart interface {
	Create(ctx context.Context, key string, o PutOptions) (upload string, err error)
	// PutPart is to a part what Put is to an object; a number that was put before is replaced.
	PutPart(ctx context.Context, key, upload string, number int, size int64, r io.Reader, sums source.Sums) (Part, error)
	// Complete makes the object of the parts named (Number and ETag; in rising order, at least one). o
	// has the conditions only; the rest was given to Create. A Complete that is repeated after it
	// succeeded may answer the same again.
	Complete(ctx context.Context, key, upload string, parts []Part, o PutOptions) (Info, error)
	Abort(ctx context.Context, key, upload string) error
	// Parts lists up to max parts with a number greater than after, in order, and whether there are more.
	Parts(ctx context.Context, key, upload string, after, max int) ([]Part, bool, error)
	// Uploads lists the uploads under way whose key starts with prefix, and says whether there are more than it lists.
	Uploads(ctx context.Context, prefix string) ([]Upload, bool, error)
}

// Part is one part of an upload.
type Part struct {
	Number  int
	ETag    string // as in Info
	Size    int64
	ModTime time.Time
}

// Upload is a multipart upload under way.
type Upload struct {
	Key, ID string
	Started time.Time
}

// MaxParts is the highest part number, and so the most parts of an upload.
const MaxParts = 10000
