package trial

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/bench/access"
)

// What the direct reader asks for at once of a large object, as download tools do.
const (
	part      = 8 << 20
	partsOnce = 16
)

// Client is an S3 client of the bucket.
func (b *Bucket) Client() (*minio.Core, error) {
	u, err := url.Parse(b.Endpoint)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("endpoint %q: want a URL such as https://s3.example.com", b.Endpoint)
	}
	o := &minio.Options{Creds: credentials.NewStaticV4(b.AccessKey, b.SecretKey, b.Token), Region: b.Region, Secure: u.Scheme == "https", BucketLookup: minio.BucketLookupDNS}
	if b.PathStyle {
		o.BucketLookup = minio.BucketLookupPath
	}
	c, err := minio.NewCore(u.Host, o)
	if err == nil {
		c.SetS3EnableDualstack(strings.Contains(u.Host, "dualstack.")) // as it is written, like all others
	}
	return c, err
}

// objects does the job at the bucket itself.
func (j *Job) objects(ctx context.Context) (d Done, err error) {
	c, err := j.Bucket.Client()
	if err != nil {
		return d, err
	}
	var count, bytes atomic.Int64
	start := time.Now()
	more := func(n, b int64) bool {
		count.Add(n)
		bytes.Add(b)
		return ctx.Err() == nil && (j.Limit == 0 || time.Since(start) < j.Limit)
	}
	f := access.File{}
	if len(j.Files) > 0 {
		f = j.Files[0]
	}
	p := make([]byte, max(j.Piece, 1))
	switch j.Op {
	case opDigest:
		return j.digest(ctx, func(ctx context.Context, f access.File) (io.ReadCloser, error) { return j.get(ctx, c, f, 0, f.Size) })
	case opSequential, opHash:
		digests := make([]string, j.Readers)
		err = each(ctx, j.Readers, j.Readers, func(ctx context.Context, k int) error {
			h := sha256.New()
			err := j.parts(ctx, c, f, func(p []byte) bool {
				if j.Op == opHash {
					h.Write(p)
				}
				return more(0, int64(len(p)))
			})
			more(1, 0)
			digests[k] = hex.EncodeToString(h.Sum(nil))
			return err
		})
		if j.Op == opHash {
			for _, digest := range digests {
				d.add(digest)
			}
		}
	case opRandom:
		r := rand.New(rand.NewPCG(1, uint64(j.Piece)))
		for range j.Count {
			off := r.Int64N(max(f.Size/int64(j.Piece), 1)) * int64(j.Piece)
			body, err := j.get(ctx, c, f, off, int64(j.Piece))
			if err != nil {
				return d, err
			}
			n, err := io.ReadFull(body, p)
			body.Close()
			if err != nil {
				return d, err
			}
			if !more(1, int64(n)) {
				break
			}
		}
	case opSmall:
		err = each(ctx, j.Readers, len(j.Files), func(ctx context.Context, k int) error {
			if !more(0, 0) {
				return nil
			}
			body, err := j.get(ctx, c, j.Files[k], 0, j.Files[k].Size)
			if err != nil {
				return err
			}
			defer body.Close()
			n, err := access.Discard(body)
			if err == nil && n != j.Files[k].Size {
				err = fmt.Errorf("%s: %d bytes of %d", j.Files[k].Path, n, j.Files[k].Size)
			}
			more(1, n)
			return err
		})
	case opOpenStat:
		for _, f := range j.Files {
			if _, err := c.StatObject(ctx, j.Bucket.Name, j.Bucket.Prefix+f.Path, minio.StatObjectOptions{}); err != nil {
				return d, err
			}
			if !more(1, 0) {
				break
			}
		}
	case opWalk:
		token := ""
		for {
			r, err := c.ListObjectsV2(j.Bucket.Name, j.Bucket.Prefix, "", token, "", 1000)
			if err != nil {
				return d, err
			}
			if !more(int64(len(r.Contents)), 0) || !r.IsTruncated {
				break
			}
			token = r.NextContinuationToken
		}
	default:
		err = fmt.Errorf("the job of a bench's reader: no operation %q", j.Op)
	}
	d.Amount = access.Amount{Count: count.Load(), Bytes: bytes.Load(), Took: time.Since(start)}
	return d, err
}

// get asks for a range of an object.
func (j *Job) get(ctx context.Context, c *minio.Core, f access.File, off, n int64) (io.ReadCloser, error) {
	var o minio.GetObjectOptions
	if n > 0 && (off > 0 || n < f.Size) {
		if err := o.SetRange(off, min(off+n, f.Size)-1); err != nil {
			return nil, err
		}
	}
	body, _, _, err := c.GetObject(ctx, j.Bucket.Name, j.Bucket.Prefix+f.Path, o)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", f.Path, err)
	}
	return body, nil
}

var errEnough = errors.New("enough")

// parts reads an object by many ranges at once and hands them on in order, until that says no.
func (j *Job) parts(ctx context.Context, c *minio.Core, f access.File, take func(p []byte) bool) error {
	n := int((f.Size + part - 1) / part)
	ready := make([]chan []byte, n)
	for k := range ready {
		ready[k] = make(chan []byte, 1)
	}
	free := make(chan []byte, partsOnce)
	for range min(partsOnce, n) {
		free <- make([]byte, part)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		for k := range n {
			var p []byte
			select {
			case p = <-free:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			g.Go(func() error {
				off := int64(k) * part
				p = p[:min(part, f.Size-off)]
				body, err := j.get(ctx, c, f, off, int64(len(p)))
				if err != nil {
					return err
				}
				defer body.Close()
				if _, err := io.ReadFull(body, p); err != nil {
					return fmt.Errorf("get %s: %w", f.Path, err)
				}
				ready[k] <- p
				return nil
			})
		}
		return nil
	})
	g.Go(func() error {
		for k := range n {
			select {
			case p := <-ready[k]:
				if !take(p) {
					return errEnough
				}
				free <- p[:part]
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil && !errors.Is(err, errEnough) {
		return err
	}
	return nil
}

// each calls f for 0 to n-1, so many at once.
func each(ctx context.Context, once, n int, f func(ctx context.Context, k int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(once)
	for k := range n {
		g.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return f(ctx, k)
		})
	}
	return g.Wait()
}
