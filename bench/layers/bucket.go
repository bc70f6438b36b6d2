package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/test/bucket"
)

const bucketName = "bench"

// parallel is how many requests the S3 client has under way when it reads alone: as many as a worker's load.
const parallel = 64

// objects is how many the bucket holds.
const objects = 8

// startBucket runs an S3 server without limits that holds o.bytes in some objects.
func (b *bench) startBucket(ctx context.Context, s *scope) (*bucket.Server, error) {
	dir, err := os.MkdirTemp(b.dir, "b")
	if err != nil {
		return nil, err
	}
	s.add(func() { _ = os.RemoveAll(dir) })
	s3, err := bucket.Start(ctx, bucket.Options{Binary: b.o.versitygw, Dir: dir})
	if err != nil {
		return nil, err
	}
	s.add(s3.Close)
	if err := s3.MakeBucket(ctx, bucketName); err != nil {
		return nil, err
	}
	c, err := s3.Client()
	if err != nil {
		return nil, err
	}
	for k := range objects {
		file := fmt.Sprintf("%s/object", b.dir)
		if err := access.WriteNoise(file, b.o.bytes/objects, byte(k)); err != nil {
			return nil, err
		}
		_, err := c.FPutObject(ctx, bucketName, fmt.Sprintf("o%d", k), file, minio.PutObjectOptions{})
		_ = os.Remove(file)
		if err != nil {
			return nil, fmt.Errorf("put the input: %w", err)
		}
	}
	return s3, nil
}

// startFrom brings up the tier of the bucket.
func (b *bench) startFrom(ctx context.Context, s3 *bucket.Server) (*dataset, error) {
	secret := fmt.Sprintf(`apiVersion: v1
kind: Secret
metadata: {name: access-key}
stringData: {accessKeyID: %q, accessKeySecret: %q}
---
`, s3.AccessKey, s3.SecretKey)
	mount := fmt.Sprintf("source: \"s3://%s/\", endpoint: %q, region: %s, credentialsSecretRef: {name: access-key}", bucketName, s3.Endpoint(), s3.Region)
	return b.start(ctx, secret, mount, b.o.bytes+b.o.bytes/4+64<<20)
}

// warmGroup: how fast a tier pulls a dataset out of a bucket that does not limit it.
func (b *bench) warmGroup() group {
	var s3 *bucket.Server
	var d *dataset
	size := b.o.bytes / objects * objects
	// The ranges that the client reads in when it is alone: those of blocks, or larger ones, whichever are faster here.
	ranges := int64(ring.BlockSize)
	alone := &base{name: "the S3 client alone", run: func(ctx context.Context) (float64, error) {
		return alone(ctx, s3, b.o.bytes/objects, ranges)
	}}
	renew := func(ctx context.Context) (err error) {
		if d != nil {
			d.close()
			d = nil
		}
		d, err = b.startFrom(ctx, s3)
		return err
	}
	return group{
		setup: func(ctx context.Context, s *scope) (err error) {
			if s3, err = b.startBucket(ctx, s); err != nil {
				return err
			}
			s.add(func() {
				if d != nil {
					d.close()
				}
			})
			if ranges, err = faster(ctx, s3, b.o.bytes/objects); err == nil {
				alone.name += fmt.Sprintf(", ranges of %d MiB", ranges>>20)
			}
			return err
		},
		rows: []*row{{layer: "warming", name: "from an S3 server on loopback", unit: bytesPerSecond, of: alone, reference: "≥ 0.9 of the client alone",
			prepare: renew,
			// The client alone needs no memory: what a host does for it is no part of what is compared.
			fills: size + size/4 + 64<<20,
			run: func(ctx context.Context) (float64, error) {
				took, err := d.load(ctx)
				return float64(size) / took.Seconds(), err
			}}},
	}
}

// faster says by which ranges the client library reads faster when it is alone: those of a block, or larger ones.
func faster(ctx context.Context, s3 *bucket.Server, size int64) (ranges int64, err error) {
	of, best := []int64{ring.BlockSize, 4 * ring.BlockSize}, 0.0
	for range 3 {
		for _, r := range of {
			v, err := alone(ctx, s3, size, r)
			if err != nil {
				return 0, err
			}
			if v > best {
				best, ranges = v, r
			}
		}
	}
	return ranges, nil
}

// alone reads every object of the bucket by ranges, with the client library that workers use and nothing behind it, in a
// process of its own as a worker is: what goes from one process to another costs more than what stays within one.
func alone(ctx context.Context, s3 *bucket.Server, size, ranges int64) (float64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, self, aloneCommand)
	job, err := json.Marshal(aloneJob{Endpoint: s3.Endpoint(), AccessKey: s3.AccessKey, SecretKey: s3.SecretKey, Region: s3.Region, Size: size, Ranges: ranges})
	if err != nil {
		return 0, err
	}
	cmd.Stdin, cmd.Stderr = bytes.NewReader(job), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("the S3 client alone: %w", err)
	}
	var took time.Duration
	if err := json.Unmarshal(out, &took); err != nil {
		return 0, fmt.Errorf("the S3 client alone said %q: %w", out, err)
	}
	return float64(size*objects) / took.Seconds(), nil
}

// aloneCommand is what this program is started with to be the S3 client alone.
const aloneCommand = "s3-client"

// aloneJob is what it is told on its standard input. It answers with how long it took, in nanoseconds.
type aloneJob struct {
	Endpoint, AccessKey, SecretKey, Region string
	Size, Ranges                           int64
}

func (j aloneJob) run(ctx context.Context) (time.Duration, error) {
	c, err := minio.NewCore(strings.TrimPrefix(j.Endpoint, "http://"), &minio.Options{
		Creds: credentials.NewStaticV4(j.AccessKey, j.SecretKey, ""), Region: j.Region, BucketLookup: minio.BucketLookupPath,
	})
	if err != nil {
		return 0, err
	}
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for k := range objects {
		for off := int64(0); off < j.Size; off += j.Ranges {
			g.Go(func() error {
				var o minio.GetObjectOptions
				n := min(j.Ranges, j.Size-off)
				if err := o.SetRange(off, off+n-1); err != nil {
					return err
				}
				body, _, _, err := c.GetObject(ctx, bucketName, fmt.Sprintf("o%d", k), o)
				if err != nil {
					return err
				}
				defer body.Close()
				got, err := access.Discard(body)
				if err == nil && got != n {
					err = io.ErrUnexpectedEOF
				}
				return err
			})
		}
	}
	err = g.Wait()
	return time.Since(start), err
}

// onceGroup: how often each byte leaves the bucket when many want it at the same time.
func (b *bench) onceGroup() group {
	const readers = 8
	var s3 *bucket.Server
	size := b.o.bytes / objects * objects
	return group{
		setup: func(ctx context.Context, s *scope) (err error) {
			s3, err = b.startBucket(ctx, s)
			return err
		},
		rows: []*row{{layer: "once", name: fmt.Sprintf("bytes that left the bucket, %d cold readers of all", readers), unit: times, reference: "≤ 1.02",
			run: func(ctx context.Context) (float64, error) {
				d, err := b.startFrom(ctx, s3)
				if err != nil {
					return 0, err
				}
				defer d.close()
				before := s3.Sent()
				g, ctx := errgroup.WithContext(ctx)
				for range readers {
					g.Go(func() error {
						var c *client.Client
						c, err := d.folder.Dial(ctx)
						if err != nil {
							return err
						}
						defer c.Close()
						for k := range objects {
							if _, err := clientRead(ctx, c, fmt.Sprintf("/o%d", k), size/objects); err != nil {
								return err
							}
						}
						return nil
					})
				}
				err = g.Wait()
				return float64(s3.Sent()-before) / float64(size), err
			}}},
	}
}
