package trial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
)

// What is picked of a dataset that was not made for a bench.
const (
	leastLarge = 4 << 20
	mostShared = 512 << 20 // for pods and steps
	mostSmall  = 1 << 20
	smallFiles = 10_000
	smallBytes = 1 << 30
	leastSmall = 10
	treeFiles  = 100_000
)

// perFile is what a cache may need for a file beside its bytes.
const perFile = 8 << 10

// Pick chooses from a running dataset what the sections read, and copies it into dir, which must be in memory: the
// largest file of up to so many bytes, and files of up to 1 MiB, each as far as the tier has room for it: what it does not
// hold would never be warm. A section for which there is nothing is left out.
func Pick(ctx context.Context, c *client.Client, b *Bucket, dir string, largest, room int64, log io.Writer) (in Input, err error) {
	var large, shared, tooLarge access.File
	var small, tree []access.File
	smallTotal, entries, total := int64(0), int64(0), int64(0)
	s := c.Snapshot()
	s.Walk(0, func(i catalog.Index) bool {
		n, _ := s.Node(i)
		if path := strings.TrimPrefix(s.Path(i), "/"); path != "" {
			entries++
			if n.Dir {
				return true
			}
			f := access.File{Path: path, Size: n.Size}
			total += n.Size + perFile
			if n.Size <= min(largest, room) && n.Size > large.Size {
				large = f
			}
			if n.Size > room && n.Size <= largest && n.Size > tooLarge.Size {
				tooLarge = f
			}
			if n.Size <= min(mostShared, largest, room) && n.Size > shared.Size {
				shared = f
			}
			if n.Size > 0 && n.Size <= mostSmall && len(small) < smallFiles && smallTotal+n.Size <= smallBytes &&
				smallTotal+n.Size+int64(len(small)+1)*perFile <= room {
				small = append(small, f)
				smallTotal += n.Size
			}
			if len(tree) < treeFiles {
				tree = append(tree, f)
			}
		}
		return true
	})
	if entries == 0 {
		return in, errors.New("the dataset has no files")
	}
	if tooLarge.Size > 0 {
		fmt.Fprintf(log, "files of more than %s, such as %s of %s, do not fit the tier's memory and are left out\n",
			humanize.IBytes(uint64(room)), tooLarge.Path, humanize.IBytes(uint64(tooLarge.Size)))
	}
	var copied []access.File
	data := func(files ...access.File) *Data {
		copied = append(copied, files...)
		return &Data{Bucket: b, Native: dir, Files: files, Memory: total + total/4 + 64<<20}
	}
	if large.Size >= leastLarge {
		in.Large = data(large)
	}
	if shared.Size > 0 {
		in.Limited, in.Steps = data(shared), data(shared)
	}
	if len(small) >= leastSmall {
		in.Small = data(small...)
	}
	in.Tree = &Data{Bucket: b, Files: tree, Memory: total + total/4 + 64<<20}
	return in, download(ctx, c, copied, dir)
}

// download copies files of a dataset into a folder, each once.
func download(ctx context.Context, c *client.Client, files []access.File, dir string) error {
	p := make([]byte, access.Chunk)
	have := map[string]bool{}
	for _, f := range files {
		if have[f.Path] {
			continue
		}
		have[f.Path] = true
		i, ok := c.Snapshot().Lookup("/" + f.Path)
		if !ok {
			return fmt.Errorf("%s is not in the dataset", f.Path)
		}
		path := filepath.Join(dir, f.Path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		out, err := os.Create(path)
		if err != nil {
			return err
		}
		for off := int64(0); off < f.Size && err == nil; {
			var n int
			n, err = c.ReadAt(ctx, i, p[:min(f.Size-off, access.Chunk)], off)
			if n > 0 && (err == nil || err == io.EOF) {
				_, err = out.Write(p[:n])
			}
			off += int64(n)
		}
		if err := errors.Join(err, out.Close()); err != nil {
			return fmt.Errorf("copy %s to read it natively: %w", f.Path, err)
		}
	}
	return nil
}
