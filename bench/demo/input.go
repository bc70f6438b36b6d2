package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/test/bucket"
)

// The names of the demo's bucket and of its objects.
const (
	bucketName = "demo"
	largeKey   = "large.bin"
	treePrefix = "go/"
)

// input is what the steps read, and the digest that each of them must find.
type input struct {
	large     file
	tree      []file // ordered by path
	treeBytes int64
}

// file is one object, named by its key, which is also its path in the dataset.
type file struct {
	path   string
	size   int64
	sha256 string
}

// share is the part of the tree that step i of n reads.
func (in *input) share(i, n int) []file {
	var out []file
	for j := i; j < len(in.tree); j += n {
		out = append(out, in.tree[j])
	}
	return out
}

// putInput puts the Go source tree, and one file of the given size made from it, into a bucket.
func putInput(ctx context.Context, s3 *bucket.Server, size int64) (*input, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return nil, fmt.Errorf("the demo reads the Go source tree and asks go where it is: go env GOROOT: %w", err)
	}
	root := filepath.Join(strings.TrimSpace(string(out)), "src")
	paths, err := regularFiles(root)
	if err != nil {
		return nil, err
	}
	if len(paths) == 0 {
		return nil, fmt.Errorf("no Go source tree at %s: install Go with its sources", root)
	}
	client, err := s3.Client()
	if err != nil {
		return nil, err
	}
	if err := s3.MakeBucket(ctx, bucketName); err != nil {
		return nil, err
	}
	in := &input{tree: make([]file, len(paths))}
	p := newProgress("put the input", int64(len(paths)+1))
	defer p.finish()

	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(9)
	g.Go(func() error {
		r := newRepeated(root, paths, size)
		defer r.Close()
		if _, err := client.PutObject(ctx, bucketName, largeKey, r, size, minio.PutObjectOptions{}); err != nil {
			return fmt.Errorf("put %s: %w", largeKey, err)
		}
		in.large = file{largeKey, size, hex.EncodeToString(r.sum.Sum(nil))}
		p.add(1)
		return nil
	})
	var mu sync.Mutex
	core := minio.Core{Client: client}
	for i, path := range paths {
		g.Go(func() error {
			b, err := os.ReadFile(filepath.Join(root, path))
			if err != nil {
				return err
			}
			key := treePrefix + filepath.ToSlash(path)
			sum := sha256.Sum256(b)
			digest := hex.EncodeToString(sum[:])
			// With the digest in the header and no digests of chunks the body goes as it is. Chunk signatures add
			// an empty chunk to an empty file, after which this server takes the connection for broken.
			o := minio.PutObjectOptions{DisableContentSha256: true}
			if _, err := core.PutObject(ctx, bucketName, key, bytes.NewReader(b), int64(len(b)), "", digest, o); err != nil {
				return fmt.Errorf("put %s: %w", key, err)
			}
			in.tree[i] = file{key, int64(len(b)), digest}
			mu.Lock()
			in.treeBytes += int64(len(b))
			mu.Unlock()
			p.add(1)
			return nil
		})
	}
	return in, g.Wait()
}

// regularFiles are the regular files below root, by path relative to it, in order.
func regularFiles(root string) ([]string, error) {
	var paths []string
	// GOROOT may be a link.
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, err
	}
	err = filepath.WalkDir(real, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(real, path)
		paths = append(paths, rel)
		return err
	})
	sort.Strings(paths)
	return paths, err
}

// repeated reads the files one after the other, again and again with a line of its own before each round
// so that no two rounds are alike, up to a size, and hashes what it gives.
type repeated struct {
	root  string
	paths []string
	left  int64
	next  int
	round int
	cur   io.Reader
	open  *os.File
	sum   hash.Hash
}

func newRepeated(root string, paths []string, size int64) *repeated {
	return &repeated{root: root, paths: paths, left: size, sum: sha256.New()}
}

func (r *repeated) Read(p []byte) (int, error) {
	for {
		if r.left == 0 {
			return 0, io.EOF
		}
		if r.cur == nil {
			if err := r.advance(); err != nil {
				return 0, err
			}
		}
		n, err := r.cur.Read(p[:min(int64(len(p)), r.left)])
		r.left -= int64(n)
		r.sum.Write(p[:n])
		if err == io.EOF {
			r.cur, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (r *repeated) advance() error {
	if r.next == len(r.paths) {
		r.next = 0
		r.round++
	}
	if r.next == 0 && r.open != nil {
		r.cur = strings.NewReader(fmt.Sprintf("\n// round %d\n", r.round))
		r.Close()
		return nil
	}
	r.Close()
	f, err := os.Open(filepath.Join(r.root, r.paths[r.next]))
	if err != nil {
		return err
	}
	r.next++
	r.open, r.cur = f, f
	return nil
}

// Close ends the file being read.
func (r *repeated) Close() {
	if r.open != nil {
		_ = r.open.Close()
		r.open = nil
	}
}
