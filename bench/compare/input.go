package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/bench/trial"
	"github.com/stepcache/stepcache/test/bucket"
)

// scale is how large everything is.
type scale struct {
	large, limited, step int64 // sizes of files
	small, tree          int   // numbers of files
	smallSize            int64
	rounds, slowRounds   int
	limit                time.Duration
	// bandwidth and firstByte are those of the limited bucket.
	bandwidth int64
	firstByte time.Duration
	// artifacts are how many small ones there are of each size, artifact and shared the sizes of the large one and
	// of that which many get.
	artifacts        int
	artifact, shared int64
}

// smallArtifacts are the sizes of small ones.
var smallArtifacts = []int64{1 << 10, 32 << 10, 1 << 20}

var scales = map[string]scale{
	"small":  {4 << 20, 4 << 20, 256 << 10, 40, 300, 100 << 10, 1, 1, 300 * time.Millisecond, 200e6, 20 * time.Millisecond, 16, 20 << 20, 256 << 10},
	"medium": {512 << 20, 128 << 20, 32 << 20, 3_000, 20_000, 100 << 10, 2, 1, 1500 * time.Millisecond, 200e6, 20 * time.Millisecond, 200, 128 << 20, 8 << 20},
	"full":   {2 << 30, 512 << 20, 128 << 20, 10_000, 100_000, 100 << 10, 3, 1, 2500 * time.Millisecond, 200e6, 20 * time.Millisecond, 400, 256 << 20, 32 << 20},
}

// The buckets, each the data of a section.
const (
	largeBucket   = "large"
	smallBucket   = "small"
	treeBucket    = "tree"
	limitedBucket = "limited"
	stepsBucket   = "steps"
	putsBucket    = "artifacts"
)

// input starts the servers and fills them. What is in them is native files too, in the servers' own folders.
func input(ctx context.Context, o options, dir string) (in trial.Input, remove func(), err error) {
	var servers []*bucket.Server
	remove = func() {
		for _, s := range servers {
			s.Close()
		}
	}
	start := func(name string, bytesPerSecond int64, firstByte time.Duration) (*bucket.Server, string, error) {
		objects := filepath.Join(dir, name)
		if err := os.Mkdir(objects, 0o755); err != nil {
			return nil, "", err
		}
		s, err := bucket.Start(ctx, bucket.Options{Binary: o.versitygw, Dir: objects, BytesPerSecond: bytesPerSecond, FirstByte: firstByte})
		if err == nil {
			servers = append(servers, s)
		}
		return s, objects, err
	}
	c := o.scale
	free, freeDir, err := start("s3", 0, 0)
	if err != nil {
		return in, remove, err
	}
	slow, slowDir, err := start("s3-limited", c.bandwidth, c.firstByte)
	if err != nil {
		return in, remove, err
	}
	in.Artifacts = artifacts(c, slow)
	if err := slow.MakeBucket(ctx, putsBucket); err != nil {
		return in, remove, err
	}
	type part struct {
		data   **trial.Data
		server *bucket.Server
		dir    string
		name   string
		files  []access.File
	}
	one := func(size int64) []access.File { return []access.File{{Path: "file.bin", Size: size}} }
	for _, p := range []part{
		{&in.Large, free, freeDir, largeBucket, one(c.large)},
		{&in.Small, free, freeDir, smallBucket, access.Tree(c.small, c.smallSize)},
		{&in.Tree, free, freeDir, treeBucket, access.Tree(c.tree, 0)},
		{&in.Limited, slow, slowDir, limitedBucket, one(c.limited)},
		{&in.Steps, slow, slowDir, stepsBucket, one(c.step)},
	} {
		d := &trial.Data{
			Bucket: at(p.server, p.name),
			Native: filepath.Join(p.dir, p.name), Files: p.files, Entries: access.Entries(len(p.files)),
		}
		for _, f := range p.files {
			// A file takes whole pages, and what the store keeps of it beside.
			d.Memory += f.Size + 8<<10
		}
		d.Memory += d.Memory/4 + 64<<20
		*p.data = d
		began := time.Now()
		if err := fill(ctx, p.server, d); err != nil {
			return in, remove, fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Fprintf(os.Stderr, "input: %s in %s\n", p.name, time.Since(began).Round(time.Millisecond))
	}
	return in, remove, nil
}

// at is a bucket of a server.
func at(s *bucket.Server, name string) *trial.Bucket {
	return &trial.Bucket{Endpoint: s.Endpoint(), Region: s.Region, Name: name, PathStyle: true,
		AccessKey: s.AccessKey, SecretKey: s.SecretKey, Sent: s.Sent, Requests: s.Requests}
}

// artifacts are those that the trial puts itself.
func artifacts(c scale, s *bucket.Server) *trial.Artifacts {
	a := &trial.Artifacts{Small: smallArtifacts, Count: c.artifacts, Large: c.artifact, Shared: c.shared}
	a.Bucket, a.Puts = at(s, putsBucket), true
	// What comes in parts is held as such too, until it is one object.
	a.Memory = 64<<20 + 2*(c.artifact+3*c.shared)
	for _, size := range a.Small {
		a.Memory += int64(a.Count) * (size + 8<<10)
	}
	a.Memory += a.Memory / 4
	return a
}

// fill puts a bucket's objects.
func fill(ctx context.Context, s *bucket.Server, d *trial.Data) error {
	if err := s.MakeBucket(ctx, d.Bucket.Name); err != nil {
		return err
	}
	c, err := s.Client()
	if err != nil {
		return err
	}
	if d.Bucket.Name == treeBucket {
		planted, err := plant(ctx, d)
		if err != nil || planted {
			return err
		}
	}
	core := minio.Core{Client: c}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for k, f := range d.Files {
		g.Go(func() error {
			if f.Size > 16<<20 {
				return putLarge(ctx, c, d, f)
			}
			content := access.Noise(int(f.Size), uint64(k))
			sum := sha256.Sum256(content)
			// With the digest in the header the body goes as it is.
			o := minio.PutObjectOptions{DisableContentSha256: true}
			_, err := core.PutObject(ctx, d.Bucket.Name, f.Path, bytes.NewReader(content), f.Size, "", hex.EncodeToString(sum[:]), o)
			return err
		})
	}
	return g.Wait()
}

func putLarge(ctx context.Context, c *minio.Client, d *trial.Data, f access.File) error {
	file, err := os.CreateTemp("", "put")
	if err != nil {
		return err
	}
	file.Close()
	defer os.Remove(file.Name())
	if err := access.WriteNoise(file.Name(), f.Size, byte(len(d.Bucket.Name))); err != nil {
		return err
	}
	_, err = c.FPutObject(ctx, d.Bucket.Name, f.Path, file.Name(), minio.PutObjectOptions{PartSize: 64 << 20, NumThreads: 4})
	return err
}

// plant makes empty objects as the server's own files, with the attribute in which it keeps their ETag: a hundred
// thousand requests would take longer than what is measured. It says no where files have no such attributes.
func plant(ctx context.Context, d *trial.Data) (bool, error) {
	if err := access.WriteTree(ctx, d.Native, d.Files, nil, false); err != nil {
		return false, err
	}
	const emptyMD5 = `"d41d8cd98f00b204e9800998ecf8427e"`
	for _, f := range d.Files {
		path := filepath.Join(d.Native, f.Path)
		if err := os.Chmod(path, 0o644); err != nil {
			return false, err
		}
		if err := unix.Setxattr(path, "user.etag", []byte(emptyMD5), 0); errors.Is(err, unix.ENOTSUP) {
			return false, nil
		} else if err != nil {
			return false, fmt.Errorf("%s: %w", path, err)
		}
	}
	return true, nil
}
