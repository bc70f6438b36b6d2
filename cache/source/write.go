package source

import (
	"context"
	"errors"
	"io"
	"time"
)

// Errors of a Writer, besides those of a Source.
var (
	// ErrNoUpload: the multipart upload does not exist (any more).
	ErrNoUpload = errors.New("no such multipart upload")
	// ErrBadPart: a part was not put, or not with that ETag, or parts are not in order.
	ErrBadPart = errors.New("invalid part")
	// ErrPartTooSmall: a part that is not the last is smaller than the store allows.
	ErrPartTooSmall = errors.New("part too small")
)

// Attributes are what a store keeps of an object beside its bytes.
type Attributes struct {
	ContentType string
	// Headers are Cache-Control, Content-Disposition, Content-Encoding, Content-Language and Expires, by
	// canonical name.
	Headers map[string]string
	// Metadata is the user's own, by lower-case name without the store's prefix.
	Metadata map[string]string
}

// WriteOptions of one object.
type WriteOptions struct {
	Attributes
	// IfMatch is the version that must be the current one, or "*" for any: ErrChanged when there is
	// another, ErrNotFound when there is none. IfAbsent: ErrChanged when there is any. The store decides
	// both in the same step as it makes the object. Where it is known to decide none, the error is also
	// errors.ErrUnsupported.
	IfMatch  string
	IfAbsent bool
	// Sums are those of the content, for PutObject.
	Sums Sums
	// Begun is told of each upload in parts that is begun for the object, before its first byte is sent, so
	// that somebody can remove the parts when this process dies. Ended is told when nothing is done with it any
	// more, and whether it is gone for sure: otherwise somebody must abort it.
	Begun func(upload string)
	Ended func(upload string, gone bool)
}

// Sums are what the sender of content said of it before its first byte; nil is what he did not say. The reader of
// the content fails at its end where one does not hold. So a store need not take them once more, may begin to send
// before the content is all there, and has them checked where the bytes arrive.
type Sums struct {
	MD5, SHA256 []byte
}

// Part is one part of an upload.
type Part struct {
	Number  int
	Version string // as Object.Version
	Size    int64
	ModTime time.Time
}

// Upload is an upload in parts under way.
type Upload struct {
	Key, ID string
	Started time.Time
}

// Writer is what a writable dataset needs of a store beyond Source. Stores implement it beside Source;
// WriterOf finds it below the decorators.
type Writer interface {
	// Describe is Stat with the attributes.
	Describe(ctx context.Context, key string) (Object, Attributes, error)
	// PutObject is Put with options.
	PutObject(ctx context.Context, key string, r io.Reader, size int64, o WriteOptions) (Object, error)
	// Copy makes key of the very version that from names (ErrChanged when there is another by now), with
	// the attributes of o, within the store. ErrInvalid when it is too large for the store to do so.
	Copy(ctx context.Context, from Object, key string, o WriteOptions) (Object, error)
	// BeginUpload begins an upload in parts.
	BeginUpload(ctx context.Context, key string, a Attributes) (upload string, err error)
	// PutPart sends one part; one with the same number is replaced. Memory is bounded. A part that is small enough to
	// be held is sent again while that helps; a larger one is sent once. An r that fails, ends before size or does
	// not end there leaves no part.
	PutPart(ctx context.Context, key, upload string, number int, r io.Reader, size int64, sums Sums) (Part, error)
	// PartHeld is how many bytes of a part of that size PutPart holds in memory at once; zero where it passes it on.
	PartHeld(size int64) int64
	// Parts lists up to max parts with a number above after, and says whether there are more.
	Parts(ctx context.Context, key, upload string, after, max int) ([]Part, bool, error)
	// CompleteUpload makes the object of the parts, of which Number and Version matter. Of o only the
	// conditions do. Size is -1 where the store does not tell it.
	CompleteUpload(ctx context.Context, key, upload string, parts []Part, o WriteOptions) (Object, error)
	// AbortUpload removes an upload and its parts: ErrNoUpload when there is none.
	AbortUpload(ctx context.Context, key, upload string) error
	// Uploads lists up to max uploads under way whose key starts with prefix and is greater than after, by key.
	Uploads(ctx context.Context, prefix, after string, max int) ([]Upload, error)
}

// BulkDeleter is implemented by Writers whose store deletes many objects with one request.
type BulkDeleter interface {
	// DeleteAll deletes up to 1,000 keys, and returns those that the store says are gone, or were never there. Of the
	// others nothing is known: Delete tells, one by one. An error says that the request as a whole failed.
	DeleteAll(ctx context.Context, keys []string) (gone map[string]bool, err error)
}

// BulkDeleterOf is the BulkDeleter that a Writer of WriterOf is; false when the store is none.
func BulkDeleterOf(w Writer) (BulkDeleter, bool) {
	d, ok := w.(*decorated)
	if !ok {
		return nil, false
	}
	_, ok = d.w.(BulkDeleter)
	return d, ok
}

// around is implemented by this package's decorators: what they do to any one operation.
type around interface {
	inner() Source
	around(ctx context.Context, c call, f func(context.Context) error) error
	content(r io.Reader) io.Reader
}

// call is one operation, to a decorator.
type call struct {
	op   int // a Meter's
	name string
	pace pace
}

// pace is how an operation is tried.
type pace int

const (
	once pace = iota // it takes its time, and cannot be repeated
	soon             // it is answered soon or tried again
	slow             // it is tried again, and the store may have much to look through before it answers
)

// WriterOf is the Writer below s, with everything that the decorators of this package do around it; false
// when the store is none.
func WriterOf(s Source) (Writer, bool) {
	d := &decorated{url: s.URL()}
	for {
		if w, ok := s.(Writer); ok {
			d.w = w
			return d, true
		}
		a, ok := s.(around)
		if !ok {
			return nil, false
		}
		d.chain = append(d.chain, a)
		s = a.inner()
	}
}

// PagerOf is the Pager that s is, with its decorators; false when the store has no pages.
func PagerOf(s Source) (Pager, bool) {
	p := pager(s)
	return p, p != nil
}

// decorated is a Writer within decorators, the outermost first.
type decorated struct {
	url   string
	w     Writer
	chain []around
}

func (d *decorated) do(ctx context.Context, op int, key string, p pace, f func(context.Context) error) error {
	c := call{op: op, name: d.url + "/" + key, pace: p}
	run := f
	for i := len(d.chain) - 1; i >= 0; i-- {
		a, next := d.chain[i], run
		run = func(ctx context.Context) error { return a.around(ctx, c, next) }
	}
	return run(ctx)
}

func (d *decorated) content(r io.Reader) io.Reader {
	for _, a := range d.chain {
		r = a.content(r)
	}
	return r
}

func (d *decorated) Describe(ctx context.Context, key string) (o Object, a Attributes, err error) {
	err = d.do(ctx, opStat, key, soon, func(ctx context.Context) error {
		o, a, err = d.w.Describe(ctx, key)
		return err
	})
	return o, a, err
}

func (d *decorated) PutObject(ctx context.Context, key string, r io.Reader, size int64, w WriteOptions) (o Object, err error) {
	err = d.do(ctx, opPut, key, once, func(ctx context.Context) error {
		o, err = d.w.PutObject(ctx, key, d.content(r), size, w)
		return err
	})
	return o, err
}

func (d *decorated) Copy(ctx context.Context, from Object, key string, w WriteOptions) (o Object, err error) {
	err = d.do(ctx, opPut, key, once, func(ctx context.Context) error {
		o, err = d.w.Copy(ctx, from, key, w)
		return err
	})
	return o, err
}

func (d *decorated) BeginUpload(ctx context.Context, key string, a Attributes) (upload string, err error) {
	err = d.do(ctx, opPut, key, once, func(ctx context.Context) error {
		upload, err = d.w.BeginUpload(ctx, key, a)
		return err
	})
	return upload, err
}

func (d *decorated) PutPart(ctx context.Context, key, upload string, number int, r io.Reader, size int64, sums Sums) (p Part, err error) {
	err = d.do(ctx, opPut, key, once, func(ctx context.Context) error {
		p, err = d.w.PutPart(ctx, key, upload, number, d.content(r), size, sums)
		return err
	})
	return p, err
}

func (d *decorated) PartHeld(size int64) int64 { return d.w.PartHeld(size) }

func (d *decorated) Parts(ctx context.Context, key, upload string, after, max int) (parts []Part, more bool, err error) {
	err = d.do(ctx, opList, key, soon, func(ctx context.Context) error {
		parts, more, err = d.w.Parts(ctx, key, upload, after, max)
		return err
	})
	return parts, more, err
}

func (d *decorated) CompleteUpload(ctx context.Context, key, upload string, parts []Part, w WriteOptions) (o Object, err error) {
	err = d.do(ctx, opPut, key, once, func(ctx context.Context) error {
		o, err = d.w.CompleteUpload(ctx, key, upload, parts, w)
		return err
	})
	return o, err
}

func (d *decorated) AbortUpload(ctx context.Context, key, upload string) error {
	tries := 0
	return d.do(ctx, opDelete, key, soon, func(ctx context.Context) error {
		tries++
		err := d.w.AbortUpload(ctx, key, upload)
		if tries > 1 && errors.Is(err, ErrNoUpload) {
			return nil // the try before, whose answer was lost
		}
		return err
	})
}

// DeleteAll implements BulkDeleter, of a Writer that is one.
func (d *decorated) DeleteAll(ctx context.Context, keys []string) (gone map[string]bool, err error) {
	err = d.do(ctx, opDelete, "", slow, func(ctx context.Context) error {
		gone, err = d.w.(BulkDeleter).DeleteAll(ctx, keys)
		return err
	})
	return gone, err
}

func (d *decorated) Uploads(ctx context.Context, prefix, after string, max int) (u []Upload, err error) {
	err = d.do(ctx, opList, prefix, slow, func(ctx context.Context) error {
		u, err = d.w.Uploads(ctx, prefix, after, max)
		return err
	})
	return u, err
}

// What the decorators do to one operation.

func (r *retry) inner() Source { return r.Source }

func (r *retry) content(in io.Reader) io.Reader { return in }

func (r *retry) around(ctx context.Context, c call, f func(context.Context) error) error {
	switch c.pace {
	case once:
		return f(ctx)
	case slow:
		return r.patient(ctx, f)
	}
	return r.run(ctx, f)
}

func (l *limit) inner() Source { return l.Source }

func (l *limit) content(in io.Reader) io.Reader { return in }

func (l *limit) around(ctx context.Context, c call, f func(context.Context) error) error {
	if err := l.enter(ctx, meterOps[c.op], c.name); err != nil {
		return err
	}
	defer l.slots.Release(1)
	return f(ctx)
}

func (s *measure) inner() Source { return s.Source }

func (s *measure) content(in io.Reader) io.Reader { return countingReader{in, &s.meter.written} }

func (s *measure) around(ctx context.Context, c call, f func(context.Context) error) error {
	start := time.Now()
	err := f(ctx)
	s.meter.done(c.op, start, err)
	return err
}

func (s *stall) inner() Source { return s.Source }

func (s *stall) content(in io.Reader) io.Reader { return in }

func (s *stall) around(ctx context.Context, c call, f func(context.Context) error) error {
	limit := s.limit
	switch c.pace {
	case once:
		return f(ctx)
	case slow:
		limit = s.slow
	}
	return s.watch(ctx, meterOps[c.op], c.name, limit, f)
}
