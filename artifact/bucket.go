package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	miniocreds "github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

// EnvCredentials names the variable with the folder of a mounted Secret NAME-s3, or with a folder that
// has one such folder for each Dataset. Without it keys come from the environment itself.
const EnvCredentials = "STEPCACHE_S3_CREDENTIALS"

// credentialsEnv are the variables with keys; earlier ones win.
var credentialsEnv = append([]credentials.Env{
	{ID: "STEPCACHE_S3_ACCESS_KEY_ID", Secret: "STEPCACHE_S3_SECRET_ACCESS_KEY", Token: "STEPCACHE_S3_SESSION_TOKEN"},
}, credentials.S3Env...)

// bucket is one bucket behind an S3 gateway. Every call retries by itself what may succeed later, for
// patience without progress at most.
type bucket struct {
	core     minio.Core
	name     string
	plain    bool
	keysFrom string // where credentials come from, for errors
	options  *Options
	idle     func() // closes connections without requests
}

// object is one object as listed or asked for.
type object struct {
	key  string
	size int64
	etag string
	// mode is what the metadata says, or zero; a listing does not tell it.
	mode string
}

func openBucket(c configuration, o *Options) (*bucket, error) {
	host, secure, err := source.Endpoint(c.Endpoint)
	if err != nil {
		return nil, err
	}
	b := &bucket{name: c.Bucket, plain: !secure, options: o}
	dir := c.credentialsDir(o.CredentialsDir)
	b.keysFrom = "the environment"
	if dir != "" {
		b.keysFrom = dir
	}
	reader, err := credentials.Open(source.Config{
		URL: "s3://" + c.Bucket, CredentialsDir: dir,
		CredentialKeys: map[string]string{credentials.KeySecret: "secretAccessKey"},
	}, credentials.Options{Env: credentialsEnv, Getenv: o.Getenv})
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		DialContext:         o.dialer(),
		TLSHandshakeTimeout: 5 * time.Second, ExpectContinueTimeout: time.Second,
		MaxIdleConns: o.Parallel, MaxIdleConnsPerHost: o.Parallel, IdleConnTimeout: 60 * time.Second,
		DisableCompression: true, // bytes must be what the store holds
		ReadBufferSize:     64 << 10, WriteBufferSize: 64 << 10,
	}
	core, err := minio.NewCore(host, &minio.Options{
		Creds: miniocreds.New(&signer{reader: reader, from: b.keysFrom}), Secure: secure, Region: c.Region,
		BucketLookup: minio.BucketLookupPath, // a Service has no name below which buckets are hosts
		Transport:    noting{transport},
		MaxRetries:   1, // source.Try retries, where it is bounded
	})
	if err != nil {
		return nil, fmt.Errorf("endpoint %s: %w", c.Endpoint, err)
	}
	b.core, b.idle = *core, transport.CloseIdleConnections
	return b, nil
}

// dialer reaches the node-local service where one is set and answers, else the address asked for. The
// request is the same either way, since a signature covers the name of the host and not its address.
func (o *Options) dialer() func(ctx context.Context, network, address string) (net.Conn, error) {
	d := &net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}
	if o.NodeAddress == "" {
		return d.DialContext
	}
	local := &net.Dialer{Timeout: time.Second, KeepAlive: 15 * time.Second}
	network, at := "tcp", o.NodeAddress
	if path, ok := strings.CutPrefix(at, "unix://"); ok {
		network, at = "unix", path
	}
	return func(ctx context.Context, n, address string) (net.Conn, error) {
		c, err := local.DialContext(ctx, network, at)
		if err != nil && ctx.Err() == nil {
			return d.DialContext(ctx, n, address)
		}
		return c, err
	}
}

// signer gives minio-go the credentials as they are now, so that a rotation needs no restart.
type signer struct {
	reader *credentials.Reader
	from   string
	mu     sync.Mutex
	last   credentials.Value
}

// IsExpired implements credentials.Provider of minio-go, which asks before each request.
func (s *signer) IsExpired() bool {
	v, err := s.reader.Get(context.Background()) // files or the environment: nothing to wait for
	s.mu.Lock()
	defer s.mu.Unlock()
	return err != nil || v != s.last
}

// RetrieveWithCredContext implements credentials.Provider.
func (s *signer) RetrieveWithCredContext(*miniocreds.CredContext) (miniocreds.Value, error) {
	v, err := s.reader.Get(context.Background())
	if err != nil {
		var e *source.Error
		if errors.As(err, &e) {
			copied := *e
			copied.Hint = fmt.Sprintf("give the driver's container the keys accessKeyID and secretAccessKey of the Secret NAME-s3: as files in $%s, or as $%s and $%s (executor.env in Argo's ConfigMap)",
				EnvCredentials, credentialsEnv[0].ID, credentialsEnv[0].Secret)
			err = &copied
		}
		return miniocreds.Value{}, err
	}
	s.mu.Lock()
	s.last = v
	s.mu.Unlock()
	return miniocreds.Value{AccessKeyID: v.AccessKeyID, SecretAccessKey: v.AccessKeySecret, SessionToken: v.SessionToken, SignerType: miniocreds.SignatureV4}, nil
}

// Retrieve implements credentials.Provider.
func (s *signer) Retrieve() (miniocreds.Value, error) { return s.RetrieveWithCredContext(nil) }

func (b *bucket) object(key string) string { return "s3://" + b.name + "/" + key }

// try repeats f while it fails with what may pass, and ends a request without an answer after Stall.
func (b *bucket) try(ctx context.Context, f func(context.Context) error) error {
	return b.tryFor(ctx, b.options.Stall, f)
}

// tryFor is try for requests whose answer may take up to limit.
func (b *bucket) tryFor(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	return source.Try(ctx, source.RetryOptions{Elapsed: b.options.Patience, Slack: limit, Logger: b.options.Logger},
		func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			return f(ctx)
		})
}

// stat describes the object of a key: source.ErrNotFound where there is none.
func (b *bucket) stat(ctx context.Context, key string) (object, minio.ObjectInfo, error) {
	var info minio.ObjectInfo
	err := b.try(ctx, func(ctx context.Context) (err error) {
		ctx, seen := watch(ctx)
		if info, err = b.core.StatObject(ctx, b.name, key, minio.StatObjectOptions{}); err != nil {
			return b.fail(ctx, "stat", key, seen, err)
		}
		return nil
	})
	return object{key: key, size: info.Size, etag: info.ETag, mode: info.UserMetadata[modeMetadata]}, info, err
}

// list calls yield for every object below prefix, in order, page by page.
func (b *bucket) list(ctx context.Context, prefix string, yield func(object) error) error {
	after := ""
	for {
		page, err := b.page(ctx, prefix, after, pageSize)
		if err != nil {
			return err
		}
		for _, o := range page {
			if err := yield(o); err != nil {
				return err
			}
		}
		if len(page) < pageSize {
			return nil
		}
		after = page[len(page)-1].key
	}
}

const pageSize = 1000

// page lists at most n objects below prefix whose keys follow after.
func (b *bucket) page(ctx context.Context, prefix, after string, n int) (page []object, err error) {
	no := false
	err = b.try(ctx, func(ctx context.Context) error {
		ctx, seen := watch(ctx)
		page = page[:0]
		for o := range b.core.ListObjectsIter(ctx, b.name, minio.ListObjectsOptions{
			Prefix: prefix, StartAfter: after, Recursive: true, MaxKeys: n, FetchOwner: &no,
		}) {
			if o.Err != nil {
				return b.fail(ctx, "list", prefix, seen, o.Err)
			}
			page = append(page, object{key: o.Key, size: o.Size, etag: o.ETag})
			if len(page) == n {
				return nil // the iterator would go on to the next page by itself
			}
		}
		if err := ctx.Err(); err != nil { // of which the iterator says nothing
			return b.fail(ctx, "list", prefix, seen, err)
		}
		return nil
	})
	return page, err
}

// read passes n bytes of o from off on to sink, in order. A body that breaks is gone on with at the same
// version; only the time without progress is bounded.
func (b *bucket) read(ctx context.Context, o *object, off, n int64, sink func([]byte) error) error {
	for n > 0 {
		var failed error // of sink, which is not the store's
		before := n
		err := b.try(ctx, func(context.Context) error {
			got, err := b.readOnce(ctx, o, off, n, func(p []byte) error {
				failed = sink(p)
				return failed
			})
			off, n = off+got, n-got
			if failed != nil || err != nil && got >= progress && source.Temporary(err) {
				return nil // tried again by the loop around, with all patience
			}
			return err
		})
		switch {
		case failed != nil:
			return failed
		case err != nil:
			return err
		case n == before:
			return &source.Error{Op: "get", Name: b.object(o.key), Kind: source.ErrUnavailable, Err: io.ErrUnexpectedEOF}
		}
	}
	return nil
}

// progress is how many bytes an answer must bring to count as one: a connection that is accepted and then
// breaks is none.
const progress = 1 << 20

func (b *bucket) readOnce(ctx context.Context, o *object, off, n int64, sink func([]byte) error) (got int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stall := time.AfterFunc(b.options.Stall, func() { cancel(errStall) })
	defer stall.Stop()
	ctx, seen := watch(ctx)
	var options minio.GetObjectOptions
	if o.etag != "" {
		options.Set("If-Match", `"`+o.etag+`"`)
	}
	whole := off == 0 && n == o.size
	if !whole {
		options.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	}
	fail := func(err error) error {
		if errors.Is(context.Cause(ctx), errStall) {
			return &source.Error{Op: "get", Name: b.object(o.key), Kind: source.ErrUnavailable, Err: fmt.Errorf("%w for %v", errStall, b.options.Stall)}
		}
		return b.fail(ctx, "get", o.key, seen, err)
	}
	body, info, _, err := b.core.GetObject(ctx, b.name, o.key, options)
	if err != nil {
		return 0, fail(err)
	}
	defer body.Close()
	changed := func(format string, args ...any) error {
		return &source.Error{Op: "get", Name: b.object(o.key), Kind: source.ErrChanged, Err: fmt.Errorf(format, args...)}
	}
	switch {
	case o.etag != "" && info.ETag != o.etag:
		return 0, changed("the answer is of version %s, asked was %s", info.ETag, o.etag)
	case !whole && seen.status != http.StatusPartialContent:
		return 0, changed("asked for a range, answered with status %d", seen.status)
	case info.Size >= 0 && info.Size != n:
		return 0, changed("asked for %d bytes, answered %d", n, info.Size)
	}
	if off == 0 { // ranges are asked for at once: only the first writes it
		o.mode = info.UserMetadata[modeMetadata]
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for got < n {
		stall.Reset(b.options.Stall)
		k, err := body.Read((*buf)[:min(int64(len(*buf)), n-got)])
		stall.Stop()
		if k > 0 {
			if err := sink((*buf)[:k]); err != nil {
				return got, err
			}
			got += int64(k)
		}
		if got == n {
			return got, nil
		}
		if errors.Is(err, io.EOF) {
			return got, &source.Error{Op: "get", Name: b.object(o.key), Kind: source.ErrUnavailable, Err: io.ErrUnexpectedEOF}
		}
		if err != nil {
			return got, fail(err)
		}
	}
	return got, nil
}

var errStall = errors.New("no sign of life")

// bufferSize is what a transfer holds of a body.
const bufferSize = 256 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// removeAll deletes objects, many a request; those that are gone are no error.
func (b *bucket) removeAll(ctx context.Context, keys []string) error {
	// The answer is of a thousand deletions; Patience has time for a second request all the same.
	return b.tryFor(ctx, 2*b.options.Stall, func(ctx context.Context) error {
		ctx, seen := watch(ctx)
		var failed []string
		var last error // one that lasts, where there is one
		results, err := b.core.RemoveObjectsWithIter(ctx, b.name, func(yield func(minio.ObjectInfo) bool) {
			for _, k := range keys {
				if !yield(minio.ObjectInfo{Key: k}) {
					return
				}
			}
		}, minio.RemoveObjectsOptions{})
		if err != nil {
			return b.fail(ctx, "delete", keys[0], seen, err)
		}
		for r := range results {
			if r.Err == nil {
				continue
			}
			err := r.Err
			if r.ObjectName == "" { // the request itself failed
				return b.fail(ctx, "delete", keys[0], seen, err)
			}
			if err = b.fail(ctx, "delete", r.ObjectName, seen, err); errors.Is(err, source.ErrNotFound) {
				continue
			}
			failed = append(failed, r.ObjectName)
			if last == nil || source.Temporary(last) {
				last = err
			}
		}
		if err := ctx.Err(); err != nil {
			return b.fail(ctx, "delete", keys[0], seen, err)
		}
		keys = failed
		return last
	})
}

// remove deletes one object. A missing one is no error.
func (b *bucket) remove(ctx context.Context, key string) error {
	return b.try(ctx, func(ctx context.Context) error {
		ctx, seen := watch(ctx)
		err := b.core.RemoveObject(ctx, b.name, key, minio.RemoveObjectOptions{})
		if err == nil {
			return nil
		}
		if err = b.fail(ctx, "delete", key, seen, err); errors.Is(err, source.ErrNotFound) {
			return nil
		}
		return err
	})
}
