// Package s3 reads and writes the objects of a bucket of S3, or of a store that speaks its protocol.
//
// It owns how the contract of package source is kept over S3 (through minio-go): which header binds a
// read to a version, which digest is one of the whole object, what an error code means. Concurrency: a
// Bucket is safe for concurrent use. Failure: every request is sent once and fails with a source.Error;
// only the parts of a Put, whose bytes are held, are sent again. It may import cache/source,
// cache/source/credentials and minio-go.
package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7"
	miniocreds "github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/s3utils"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

// awsEndpoint is used where a Config has none; minio-go makes the region's own of it.
const awsEndpoint = "s3.amazonaws.com"

// lookups are the client library's words for where a request names the bucket.
var lookups = map[source.Addressing]minio.BucketLookupType{
	"": minio.BucketLookupAuto, source.AddressingPath: minio.BucketLookupPath, source.AddressingVirtual: minio.BucketLookupDNS,
}

// Bucket is one S3 bucket.
type Bucket struct {
	core        minio.Core
	signer      *signer
	transport   *credentials.Transport
	name        string
	url         string
	config      source.Config
	unversioned bool
	// answered is when the bucket last did what it was asked for, in nanoseconds: a moment later a missing object need not
	// be told with a second request from a missing bucket, or from a key that the store does not know any more.
	answered atomic.Int64
	// doubts counts the puts, one after the other, that the store took only when they were signed as a whole.
	doubts atomic.Int32
}

var (
	_ source.Source = (*Bucket)(nil)
	_ source.Pager  = (*Bucket)(nil)
)

// Open checks the settings and returns the bucket. It sends no request.
func Open(_ context.Context, c source.Config) (*Bucket, error) {
	invalid := func(err error, hint string) (*Bucket, error) {
		return nil, &source.Error{Op: "open", Name: c.URL, Kind: source.ErrInvalid, Err: err, Hint: hint}
	}
	scheme, name, _, err := source.Split(c.URL)
	if err != nil {
		return nil, err
	}
	if scheme != "s3" {
		return invalid(errors.New("not an s3:// URL"), "write s3://bucket/prefix/")
	}
	if err := s3utils.CheckValidBucketName(name); err != nil {
		return invalid(err, "a bucket's name has 3 to 63 letters, digits, dots and hyphens")
	}
	host, secure := awsEndpoint, true
	if c.Endpoint != "" {
		if host, secure, err = source.Endpoint(c.Endpoint); err != nil {
			return nil, err
		}
	}
	signer, err := newSigner(c)
	if err != nil {
		return nil, err
	}
	sender := credentials.NewTransport(c, newTransport(c))
	options := &minio.Options{
		Creds: miniocreds.New(signer), Secure: secure, Region: c.Region,
		Transport:    &transport{next: sender},
		BucketLookup: lookups[c.Addressing],
		MaxRetries:   1, // package source retries, where it is counted and bounded
	}
	core, err := minio.NewCore(host, options)
	if err != nil {
		return invalid(err, "check the endpoint")
	}
	// By default minio-go goes to the dual-stack endpoint, whose name neither an interface endpoint of a network's own
	// nor a rule for what may leave it knows.
	core.SetS3EnableDualstack(strings.Contains(host, "dualstack."))
	b := &Bucket{core: *core, signer: signer, transport: sender, name: name, config: c, unversioned: c.AllowUnversioned, url: "s3://" + name}
	if !s3utils.IsAmazonEndpoint(*core.EndpointURL()) {
		b.url = "s3://" + host + "/" + name
	}
	return b, nil
}

// newTransport keeps as many idle connections as there may be requests, and never decompresses: bytes
// must be what the store holds.
func newTransport(c source.Config) *http.Transport {
	n := c.MaxRequests
	if n <= 0 {
		n = 64
	}
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           source.Dialer(5 * time.Second).DialContext,
		TLSHandshakeTimeout:   5 * time.Second,
		ExpectContinueTimeout: time.Second,
		MaxIdleConns:          n,
		MaxIdleConnsPerHost:   n,
		IdleConnTimeout:       60 * time.Second,
		DisableCompression:    true,
		// What comes with an answer's header is copied once more, out of this buffer; the rest is not.
		ReadBufferSize:  4 << 10,
		WriteBufferSize: 64 << 10,
	}
}

// URL implements source.Source.
func (b *Bucket) URL() string { return b.url }

func (b *Bucket) object(key string) string { return fmt.Sprintf("%s/%s", b.url, key) }

// Page implements source.Pager: one page of the store, which may be shorter than asked for. A page is in no order of
// names (all objects, then all prefixes), so that a part of it would hide names that sort before others of it.
func (b *Bucket) Page(ctx context.Context, q source.PageRequest) (source.Page, error) {
	ours, seen := watch(ctx)
	ours, end := context.WithCancel(ours)
	defer end()
	no := false
	var page source.Page
	for o := range b.core.ListObjectsIter(ours, b.name, minio.ListObjectsOptions{
		Prefix: q.Prefix, StartAfter: q.After, Recursive: !q.Delimited, MaxKeys: q.Keys(), FetchOwner: &no,
	}) {
		if o.Err != nil && seen.end != nil {
			page.More = true // the next page was about to be asked for
			break
		}
		if o.Err != nil {
			return source.Page{}, b.fail(ctx, "list", q.Prefix, seen, o.Err)
		}
		// minio-go tells prefixes from objects only by what they lack.
		prefix := q.Delimited && strings.HasSuffix(o.Key, "/") && o.ETag == "" && o.LastModified.IsZero()
		switch {
		case prefix && o.Key <= q.After || o.Key == q.After && q.After != "":
			continue // stores name once more what a page starts at or within
		case prefix:
			page.Prefixes = append(page.Prefixes, o.Key)
		default:
			page.Objects = append(page.Objects, b.listed(o))
		}
		// The iterator goes on to the next page by itself. It may while this one is empty; else one page a request
		// keeps each retried alone.
		seen.end = end
	}
	// The iterator says nothing when it ends because the context did.
	if err := ctx.Err(); err != nil {
		return source.Page{}, b.fail(ctx, "list", q.Prefix, seen, err)
	}
	b.has()
	return page, nil
}

// List implements source.Lister.
func (b *Bucket) List(ctx context.Context, prefix string, yield func(source.Object) error) error {
	return source.ListPages(ctx, b, prefix, yield)
}

// listed leaves the digest out: a listing does not say whether an ETag is an MD5 (it is not for objects
// encrypted with a customer's key).
func (b *Bucket) listed(o minio.ObjectInfo) source.Object {
	r := source.Object{Key: o.Key, Size: o.Size, ModTime: o.LastModified, Version: o.ETag}
	if r.Version == "" && b.unversioned {
		r.Version = timeVersion(o.LastModified)
	}
	return r
}

// Stat implements source.Stater.
func (b *Bucket) Stat(ctx context.Context, key string) (source.Object, error) {
	o, _, err := b.stat(ctx, key)
	return o, err
}

func (b *Bucket) stat(ctx context.Context, key string) (source.Object, minio.ObjectInfo, error) {
	ctx, seen := watch(ctx)
	var options minio.StatObjectOptions
	options.Set("x-amz-checksum-mode", "ENABLED")
	o, err := b.core.StatObject(ctx, b.name, key, options)
	if err == nil && decoded(seen, o) {
		asStored(&options)
		o, err = b.core.StatObject(ctx, b.name, key, options)
	}
	if err != nil {
		// The status is all that is known; a store that tells the code in a header has said enough.
		if s := seen.status; (s == http.StatusBadRequest || s == http.StatusMovedPermanently) &&
			strings.HasPrefix(minio.ToErrorResponse(err).Code, strconv.Itoa(s)) {
			return source.Object{}, o, b.reason(ctx, key, s)
		}
		err = b.fail(ctx, "stat", key, seen, err)
		if errors.Is(err, source.ErrNotFound) && (seen.doubtful || time.Since(time.Unix(0, b.answered.Load())) > trust) {
			return source.Object{}, o, b.missing(ctx, key, err)
		}
		return source.Object{}, o, err
	}
	o.Headers.Set("Expires", seen.expires)
	b.has()
	if o.Size < 0 {
		return source.Object{}, o, b.noLength("stat", key)
	}
	version, err := b.version("stat", key, o)
	if err != nil {
		return source.Object{}, o, err
	}
	return source.Object{Key: key, Size: o.Size, Version: version, ModTime: o.LastModified, Digest: digest(o, true)}, o, nil
}

// reason asks for a byte of an object that HEAD is refused for: what the store does not take may be the session token, the
// region, or the name, which only an answer with a body says.
func (b *Bucket) reason(ctx context.Context, key string, status int) error {
	ctx, seen := watch(ctx)
	var options minio.GetObjectOptions
	options.Set("Range", "bytes=0-0")
	body, _, _, err := b.core.GetObject(ctx, b.name, key, options)
	if err == nil {
		_ = body.Close() // whatever it is
	} else if seen.status != http.StatusRequestedRangeNotSatisfiable { // which an empty object is answered with
		return b.fail(ctx, "stat", key, seen, err)
	}
	return b.invalid("stat", key, fmt.Errorf("%d %s to HEAD, of an object that can be read", status, http.StatusText(status)))
}

// trust is how long after an answer of the bucket an answer to HEAD that something is not there is believed.
const trust = 10 * time.Second

// missing tells a missing object from whatever else a store says 404 for: the answer to HEAD has no body to say which.
func (b *Bucket) missing(ctx context.Context, key string, notFound error) error {
	ctx, seen := watch(ctx)
	no := false
	var err error
	for o := range b.core.ListObjectsIter(ctx, b.name, minio.ListObjectsOptions{Prefix: key, Recursive: true, MaxKeys: 1, FetchOwner: &no}) {
		err = o.Err
		break
	}
	if err == nil {
		err = ctx.Err() // of which the iterator says nothing
	}
	if err == nil {
		b.has()
		return notFound
	}
	err = b.fail(ctx, "stat", key, seen, err)
	switch {
	case errors.Is(err, source.ErrDenied) && seen.status == http.StatusForbidden: // the credentials may not list
		return notFound
	case errors.Is(err, source.ErrInvalid) && seen.status != 0 && seen.status != http.StatusNotFound:
		return notFound // the store does not list, or not like this: directory buckets want a prefix with a slash at its end
	}
	return err
}

// has notes that the bucket did what it was asked for.
func (b *Bucket) has() { b.answered.Store(time.Now().UnixNano()) }

// Delete implements source.Deleter.
func (b *Bucket) Delete(ctx context.Context, key string) error {
	ctx, seen := watch(ctx)
	err := b.core.RemoveObject(ctx, b.name, key, minio.RemoveObjectOptions{})
	if err == nil {
		return nil
	}
	if err = b.fail(ctx, "delete", key, seen, err); errors.Is(err, source.ErrNotFound) {
		return nil
	}
	return err
}

func (b *Bucket) invalid(op, key string, err error) error {
	return &source.Error{Op: op, Name: b.object(key), Kind: source.ErrInvalid, Err: err}
}
