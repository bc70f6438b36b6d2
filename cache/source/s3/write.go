package s3

import (
	"cmp"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/source"
)

var (
	_ source.Writer      = (*Bucket)(nil)
	_ source.BulkDeleter = (*Bucket)(nil)
)

// maxCopy is the most that one request of the protocol copies.
const maxCopy = 5 << 30

// keptHeaders are the headers that the protocol keeps with an object besides Content-Type.
var keptHeaders = []string{"Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Expires"}

// metaPrefix begins the headers of the user's own metadata. minio-go adds it too, but not to names that it takes for
// headers: those would be told to the store as such, and set what the user may not.
const metaPrefix = "X-Amz-Meta-"

// optionsOf are the attributes and conditions of o for the client library.
func optionsOf(o source.WriteOptions) minio.PutObjectOptions {
	p := minio.PutObjectOptions{
		ContentType:  o.ContentType,
		CacheControl: o.Headers["Cache-Control"], ContentDisposition: o.Headers["Content-Disposition"],
		ContentEncoding: o.Headers["Content-Encoding"], ContentLanguage: o.Headers["Content-Language"],
		UserMetadata: make(map[string]string, len(o.Metadata)+1),
	}
	if e := o.Headers["Expires"]; e != "" {
		p.UserMetadata["Expires"] = e // the field for it takes dates only; this is sent as it is
	}
	for k, v := range o.Metadata {
		p.UserMetadata[http.CanonicalHeaderKey(metaPrefix+k)] = v
	}
	if o.IfMatch != "" {
		p.SetMatchETag(o.IfMatch)
	}
	if o.IfAbsent {
		p.SetMatchETagExcept("*")
	}
	return p
}

// Describe implements source.Writer.
func (b *Bucket) Describe(ctx context.Context, key string) (source.Object, source.Attributes, error) {
	o, info, err := b.stat(ctx, key)
	if err != nil {
		return o, source.Attributes{}, err
	}
	a := source.Attributes{ContentType: info.ContentType, Headers: map[string]string{}, Metadata: map[string]string{}}
	for _, h := range keptHeaders {
		if v := info.Headers.Get(h); v != "" {
			a.Headers[h] = v
		}
	}
	for k, v := range info.UserMetadata {
		if k = strings.ToLower(k); k != strings.ToLower(nonceMetadata) {
			a.Metadata[k] = v
		}
	}
	return o, a, nil
}

// PutObject implements source.Writer.
func (b *Bucket) PutObject(ctx context.Context, key string, r io.Reader, size int64, o source.WriteOptions) (source.Object, error) {
	return b.putWith(ctx, key, r, size, &putOptions{PutObjectOptions: optionsOf(o), WriteOptions: o})
}

// putOptions are those of one Put, for the client library and as they were given.
type putOptions struct {
	minio.PutObjectOptions
	source.WriteOptions
}

func (o *putOptions) conditional() bool { return o.IfMatch != "" || o.IfAbsent }

func (o *putOptions) begun(upload string) {
	if o.Begun != nil {
		o.Begun(upload)
	}
}

func (o *putOptions) ended(upload string, gone bool) {
	if o.Ended != nil {
		o.Ended(upload, gone)
	}
}

// conditions are the conditions of o alone, for the request that completes an upload.
func (o *putOptions) conditions() minio.PutObjectOptions {
	var p minio.PutObjectOptions
	if o.IfMatch != "" {
		p.SetMatchETag(o.IfMatch)
	}
	if o.IfAbsent {
		p.SetMatchETagExcept("*")
	}
	return p
}

// Copy implements source.Writer.
func (b *Bucket) Copy(ctx context.Context, from source.Object, key string, o source.WriteOptions) (source.Object, error) {
	if from.Size > maxCopy {
		return source.Object{}, b.invalid("put", key, fmt.Errorf("a copy of %d bytes is more than one request copies", from.Size))
	}
	if o.IfMatch != "" || o.IfAbsent {
		return source.Object{}, b.invalid("put", key, errors.New("a copy has no conditions"))
	}
	headers := map[string]string{
		"x-amz-metadata-directive":   "REPLACE",
		"x-amz-copy-source-if-match": `"` + from.Version + `"`,
	}
	for k, v := range optionsOf(o).Header() {
		headers[k] = v[0]
	}
	var info minio.ObjectInfo
	err := source.Try(ctx, source.RetryOptions{Slack: copySlack}, func(ctx context.Context) (err error) {
		ctx, seen := watch(ctx)
		info, err = b.core.CopyObject(ctx, b.name, from.Key, b.name, key, headers, minio.CopySrcOptions{}, minio.PutObjectOptions{})
		if err != nil {
			return b.fail(ctx, "put", key, seen, err)
		}
		// A store that fails after it began to answer says so under a status of success, which minio-go reads as
		// an answer without ETag.
		if info.ETag == "" {
			return &source.Error{Op: "put", Name: b.object(key), Kind: source.ErrUnavailable, Err: errors.New("the answer does not say that it was copied")}
		}
		return nil
	})
	if err != nil {
		return source.Object{}, err
	}
	return b.put(ctx, key, strings.Trim(info.ETag, `"`), from.Size)
}

// copySlack is how long a store may take to copy 5 GiB.
const copySlack = 5 * time.Minute

// BeginUpload implements source.Writer. A try whose answer is lost may leave an upload without parts.
func (b *Bucket) BeginUpload(ctx context.Context, key string, a source.Attributes) (string, error) {
	return b.begin(ctx, key, optionsOf(source.WriteOptions{Attributes: a}))
}

func (b *Bucket) begin(ctx context.Context, key string, options minio.PutObjectOptions) (upload string, err error) {
	err = source.Try(ctx, source.RetryOptions{}, func(ctx context.Context) (err error) {
		ctx, seen := watch(ctx)
		if upload, err = b.core.NewMultipartUpload(ctx, b.name, key, options); err != nil {
			return b.fail(ctx, "put", key, seen, err)
		}
		return nil
	})
	return upload, err
}

// PutPart implements source.Writer.
func (b *Bucket) PutPart(ctx context.Context, key, upload string, number int, r io.Reader, size int64, sums source.Sums) (source.Part, error) {
	if size < 0 {
		return source.Part{}, b.invalid("put", key, errors.New("a part of unknown size"))
	}
	var etag string
	put := func(ctx context.Context, s sent) error {
		ctx, seen := watch(ctx)
		part, err := b.core.PutObjectPart(ctx, b.name, key, upload, number, s.body, size,
			minio.PutObjectPartOptions{Md5Base64: s.md5, Sha256Hex: s.sha256, DisableContentSha256: !s.chunks})
		if err != nil {
			return b.fail(ctx, "put", key, seen, err)
		}
		etag = part.ETag
		return nil
	}
	var err error
	if size > partSize {
		err = b.passOn(ctx, key, r, size, sums, put)
	} else {
		c := newContent(r, size, sums)
		defer c.release()
		err = b.deliver(ctx, key, c, put)
	}
	if err != nil {
		return source.Part{}, err
	}
	return source.Part{Number: number, Version: etag, Size: size, ModTime: time.Now().UTC()}, nil
}

// PartHeld implements source.Writer.
func (b *Bucket) PartHeld(size int64) int64 {
	if size > partSize {
		return 0
	}
	return size
}

// passOn sends what is too large to be held: once, as it comes, and its last byte only once r has ended well.
func (b *Bucket) passOn(ctx context.Context, key string, r io.Reader, size int64, sums source.Sums, send func(context.Context, sent) error) error {
	c := &careful{r: r, left: size}
	body := lend(c)
	s := b.asTold(sums)
	s.body = body
	err := send(ctx, s)
	body.back()
	if c.err != nil {
		return b.unread(key, c.err)
	}
	return err
}

// careful yields the left bytes of r, the last one only after r ended where it should: a store that got
// all bytes but one keeps nothing.
type careful struct {
	r     io.Reader
	left  int64
	ended bool  // well
	err   error // of r
}

func (c *careful) Read(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	if c.left == 0 {
		if !c.ended { // there is none
			c.end(0)
		}
		return 0, cmp.Or(c.err, io.EOF)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if c.left > 1 {
		n, err := c.r.Read(p[:min(int64(len(p)), c.left-1)])
		c.left -= int64(n)
		if err != nil {
			if c.err = err; err == io.EOF {
				c.err = fmt.Errorf("%w: %d bytes before its end", errLength, c.left)
			}
			return n, c.err
		}
		return n, nil
	}
	last, ok := c.end(1)
	if !ok {
		return 0, c.err
	}
	p[0] = last
	c.left = 0
	return 1, nil
}

// end reads the last n bytes, none or one, and that there are no more.
func (c *careful) end(n int) (last byte, ok bool) {
	var b [2]byte
	got, err := 0, error(nil)
	for got <= n && err == nil { // not io.ReadFull, which has one word for an end that it met and for an error of r
		var k int
		k, err = c.r.Read(b[got : n+1])
		got += k
	}
	switch {
	case got > n:
		c.err = fmt.Errorf("%w: there is more", errLength)
	case err != io.EOF:
		c.err = err
	case got < n:
		c.err = fmt.Errorf("%w: 1 byte before its end", errLength)
	default:
		c.ended = true
	}
	return b[0], c.ended
}

// Parts implements source.Writer.
func (b *Bucket) Parts(ctx context.Context, key, upload string, after, max int) ([]source.Part, bool, error) {
	ctx, seen := watch(ctx)
	r, err := b.core.ListObjectParts(ctx, b.name, key, upload, after, max)
	if err != nil {
		return nil, false, b.failUpload(ctx, "list", key, seen, err)
	}
	parts := make([]source.Part, 0, len(r.ObjectParts))
	for _, p := range r.ObjectParts {
		parts = append(parts, source.Part{Number: p.PartNumber, Version: strings.Trim(p.ETag, `"`), Size: p.Size, ModTime: p.LastModified})
	}
	return parts, r.IsTruncated, nil
}

// CompleteUpload implements source.Writer.
func (b *Bucket) CompleteUpload(ctx context.Context, key, upload string, parts []source.Part, o source.WriteOptions) (source.Object, error) {
	list := make([]minio.CompletePart, 0, len(parts))
	var sums []byte
	for _, p := range parts {
		list = append(list, minio.CompletePart{PartNumber: p.Number, ETag: p.Version})
		sum, err := hex.DecodeString(p.Version)
		if err != nil || len(sum) != md5.Size {
			sums = nil // another store's ETags: nothing follows from them
			break
		}
		sums = append(sums, sum...)
	}
	for _, p := range parts[len(list):] {
		list = append(list, minio.CompletePart{PartNumber: p.Number, ETag: p.Version})
	}
	etag, err := b.complete(ctx, key, upload, list, sums, -1, &putOptions{WriteOptions: o})
	if err != nil {
		return source.Object{}, err
	}
	// The answer tells no size. Where it cannot be asked, or the object is another already, it was completed
	// all the same.
	if now, err := b.Stat(ctx, key); err == nil && (etag == "" || now.Version == etag) {
		return now, nil
	}
	return source.Object{Key: key, Size: -1, Version: etag, ModTime: time.Now().UTC().Truncate(time.Second)}, nil
}

// DeleteAll implements source.BulkDeleter.
func (b *Bucket) DeleteAll(ctx context.Context, keys []string) (map[string]bool, error) {
	ctx, seen := watch(ctx)
	results, err := b.core.RemoveObjectsWithIter(ctx, b.name, func(yield func(minio.ObjectInfo) bool) {
		for _, key := range keys {
			if !yield(minio.ObjectInfo{Key: key}) {
				return
			}
		}
	}, minio.RemoveObjectsOptions{})
	if err != nil {
		return nil, b.fail(ctx, "delete", "", seen, err)
	}
	gone := make(map[string]bool, len(keys))
	for r := range results {
		if r.Err == nil {
			gone[r.ObjectName] = true
		} else {
			err = r.Err // the library says so of each when it is the request's
		}
	}
	if err == nil {
		err = ctx.Err() // of which the results say nothing
	}
	if len(gone) == 0 && err != nil {
		return nil, b.fail(ctx, "delete", "", seen, err)
	}
	return gone, nil
}

// AbortUpload implements source.Writer.
func (b *Bucket) AbortUpload(ctx context.Context, key, upload string) error {
	ctx, seen := watch(ctx)
	if err := b.core.AbortMultipartUpload(ctx, b.name, key, upload); err != nil {
		return b.failUpload(ctx, "delete", key, seen, err)
	}
	return nil
}

// Uploads implements source.Writer.
func (b *Bucket) Uploads(ctx context.Context, prefix, after string, max int) (out []source.Upload, err error) {
	key, id := after, ""
	for len(out) < max {
		ctx, seen := watch(ctx)
		r, err := b.core.ListMultipartUploads(ctx, b.name, prefix, key, id, "", min(1000, max-len(out)))
		if err != nil {
			return nil, b.fail(ctx, "list", prefix, seen, err)
		}
		for _, u := range r.Uploads {
			out = append(out, source.Upload{Key: u.Key, ID: u.UploadID, Started: u.Initiated})
		}
		if !r.IsTruncated || r.NextKeyMarker == key && r.NextUploadIDMarker == id {
			break
		}
		key, id = r.NextKeyMarker, r.NextUploadIDMarker
	}
	return slices.Clip(out), nil
}

// failUpload is fail for a request about an upload, where "not found" is about that.
func (b *Bucket) failUpload(ctx context.Context, op, key string, seen *answer, err error) error {
	err = b.fail(ctx, op, key, seen, err)
	var e *source.Error
	if errors.As(err, &e) && e.Kind == source.ErrNotFound {
		e.Kind = source.ErrNoUpload
	}
	return err
}
