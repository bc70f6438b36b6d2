package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/tier"
)

// stepCommand is one step, in a process of its own: it hashes the files named on its standard input, one
// path a line and one after the other, and prints "sha256  path" for each.
func stepCommand() *cobra.Command {
	var endpoint, dir, tierDir string
	cmd := &cobra.Command{
		Use:   "step",
		Short: "One step: hash the files named on standard input",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			var open opener
			var err error
			switch {
			case endpoint != "":
				open, err = openDirect(endpoint)
			case dir != "":
				open = func(_ context.Context, path string) (io.ReadCloser, error) { return os.Open(filepath.Join(dir, path)) }
			case tierDir != "":
				var c *client.Client
				if open, c, err = openLibrary(ctx, tierDir); err == nil {
					defer c.Close()
				}
			default:
				err = errors.New("want --endpoint, --dir or --tier")
			}
			if err != nil {
				return err
			}
			return hashAll(ctx, open, os.Stdin, os.Stdout)
		},
	}
	cmd.Flags().StringVar(&endpoint, "endpoint", "", "read from the bucket at this URL")
	cmd.Flags().StringVar(&dir, "dir", "", "read from the dataset mounted at this folder")
	cmd.Flags().StringVar(&tierDir, "tier", "", "read through the client library from the tier of this folder")
	return cmd
}

type opener func(ctx context.Context, path string) (io.ReadCloser, error)

func hashAll(ctx context.Context, open opener, paths io.Reader, out io.Writer) error {
	buf := make([]byte, 1<<20)
	lines := bufio.NewScanner(paths)
	w := bufio.NewWriter(out)
	for lines.Scan() {
		r, err := open(ctx, lines.Text())
		if err != nil {
			return err
		}
		h := sha256.New()
		// The bare reader and writer, so that the buffer is used: steps read as hashing tools do.
		_, err = io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{r}, buf)
		r.Close()
		if err != nil {
			return fmt.Errorf("read %s: %w", lines.Text(), err)
		}
		fmt.Fprintf(w, "%s  %s\n", hex.EncodeToString(h.Sum(nil)), lines.Text())
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return w.Flush()
}

// openDirect reads objects as a step without a cache does.
func openDirect(endpoint string) (opener, error) {
	c, err := minio.New(strings.TrimPrefix(endpoint, "http://"), &minio.Options{
		Creds:  credentials.NewStaticV4(bucket.AccessKey, bucket.SecretKey, ""),
		Region: bucket.Region, BucketLookup: minio.BucketLookupPath,
	})
	if err != nil {
		return nil, err
	}
	core := minio.Core{Client: c}
	return func(ctx context.Context, path string) (io.ReadCloser, error) {
		r, _, _, err := core.GetObject(ctx, bucketName, path, minio.GetObjectOptions{})
		return r, err
	}, nil
}

// openLibrary reads files through the client library, where nothing can be mounted.
func openLibrary(ctx context.Context, dir string) (opener, *client.Client, error) {
	f, err := tier.Open(dir)
	if err != nil {
		return nil, nil, err
	}
	c, err := f.Dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context, path string) (io.ReadCloser, error) {
		i, ok := c.Snapshot().Lookup(path)
		if !ok {
			return nil, fmt.Errorf("no file %s in the dataset", path)
		}
		n, _ := c.Snapshot().Node(i)
		return io.NopCloser(io.NewSectionReader(readerAt(func(p []byte, off int64) (int, error) {
			return c.ReadAt(ctx, i, p, off)
		}), 0, n.Size)), nil
	}, c, nil
}

type readerAt func(p []byte, off int64) (int, error)

func (f readerAt) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }
