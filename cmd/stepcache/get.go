package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
)

// copyBuffer is how much is asked of the client at once: a block.
const copyBuffer = 4 << 20

func getCommand() *cobra.Command {
	var t tierFlags
	var force bool
	cmd := &cobra.Command{
		Use:   "get PATH [DEST]",
		Short: "Copy a file or a folder out of a dataset, without a mount",
		Long: `Copies PATH to DEST: a file, a folder it goes into (made where it ends with a slash), or - for standard
output. Folders are copied with all that is below them. A file appears under its name only when it is whole; one
that exists is kept unless --force. Pipes and devices are written to.`,
		Example: "  stepcache get /shards/0001.bin\n  stepcache get /ref/genome.fa - | head\n  stepcache get /shards ./shards",
		Args:    args(cobra.RangeArgs(1, 2)),
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "overwrite files that exist")
	cmd.RunE = func(cmd *cobra.Command, a []string) error {
		ctx := cmd.Context()
		names, err := t.names(ctx)
		if err != nil {
			return err
		}
		if names != nil {
			defer names.Close()
			what, err := lookupName(ctx, names, a[0])
			if err != nil {
				return err
			}
			return copyTo(cmd, a, what.Name.Name, what.Dir, func(w io.Writer) error { return copyName(ctx, names, what, w, nil) },
				func(dest string) error { return getNames(ctx, names, what, dest, force) })
		}
		c, err := t.dial(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		i, err := lookup(c, a[0])
		if err != nil {
			return err
		}
		n, _ := c.Snapshot().Node(i)
		return copyTo(cmd, a, n.Name, n.Dir, func(w io.Writer) error { return copyOut(ctx, c, i, w, nil) },
			func(dest string) error { return getAll(ctx, c, i, dest, force) })
	}
	return cmd
}

// copyTo copies what a command's first argument names, whose own name is given, to where the second one says: a file by
// content into what is there already and takes bytes, all else by whole to a path.
func copyTo(cmd *cobra.Command, a []string, name string, dir bool, content func(io.Writer) error, whole func(dest string) error) error {
	dest := first(a[1:], ".")
	if dest == "-" {
		if dir {
			return fmt.Errorf("%s is a folder: it cannot go to standard output", a[0])
		}
		return content(cmd.OutOrStdout())
	}
	info, err := os.Stat(dest)
	switch {
	case err == nil && !info.IsDir() && !info.Mode().IsRegular() && !dir:
		// A pipe or a device takes the bytes; a file put in its place would break whoever uses it.
		f, err := os.OpenFile(dest, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(content(f), f.Close())
	case err == nil && info.IsDir() && name != "", err != nil && strings.HasSuffix(dest, "/") && !dir:
		// As cp does: into a folder, else under the name given. The root has no name.
		dest = filepath.Join(dest, name)
	case err == nil && !info.IsDir() && dir:
		return fmt.Errorf("%s is a folder and %s is not: name another destination", a[0], dest)
	}
	return whole(dest)
}

// getAll copies what is at or below i to dest.
func getAll(ctx context.Context, c *client.Client, i catalog.Index, dest string, force bool) error {
	s := c.Snapshot()
	base := s.Path(i)
	if n, _ := s.Node(i); n.Dir {
		if err := os.MkdirAll(dest, 0o755); err != nil {
			return err
		}
	}
	var all []catalog.Index
	var bytes int64
	s.WalkAll(i, func(j catalog.Index) bool {
		n, _ := s.Node(j)
		all = append(all, j)
		bytes += n.Size
		return true
	})
	p := newProgress("get "+base, bytes)
	defer p.finish()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, j := range all {
		g.Go(func() error {
			// Names of a snapshot have no "..", so that the result lies below dest.
			rel := strings.TrimPrefix(strings.TrimPrefix(s.Path(j), base), "/")
			return getNode(ctx, c, j, filepath.Join(dest, filepath.FromSlash(rel)), force, p)
		})
	}
	return g.Wait()
}

// getNode makes a file, or a folder without what is in it: one may be empty, and a program may still expect it.
func getNode(ctx context.Context, c files, i catalog.Index, dest string, force bool, p *progress) error {
	n, _ := c.Snapshot().Node(i)
	if n.Dir {
		return os.MkdirAll(dest, 0o755)
	}
	return writeFile(dest, force, n.ModTime, func(w io.Writer) error { return copyOut(ctx, c, i, w, p) })
}

// writeFile makes a file of that content, which appears under its name only when it is whole.
func writeFile(dest string, force bool, modified time.Time, content func(io.Writer) error) (err error) {
	if _, err := os.Lstat(dest); err == nil && !force {
		return fmt.Errorf("%s exists: remove it, or use --force", dest)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dest), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(dest), ".stepcache-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	err = content(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if !modified.IsZero() {
		_ = os.Chtimes(f.Name(), time.Time{}, modified) // a file system without times is no reason to fail
	}
	return os.Rename(f.Name(), dest)
}

// copyOut writes a file's content.
func copyOut(ctx context.Context, c files, i catalog.Index, w io.Writer, p *progress) error {
	n, _ := c.Snapshot().Node(i)
	defer c.Forget(i)
	buf := make([]byte, min(copyBuffer, max(n.Size, 1)))
	for off := int64(0); off < n.Size; {
		k, err := c.ReadAt(ctx, i, buf, off)
		if k > 0 {
			if _, err := w.Write(buf[:k]); err != nil {
				return err
			}
			off += int64(k)
			if p != nil {
				p.add(int64(k))
			}
		}
		if err != nil && (!errors.Is(err, io.EOF) || off < n.Size) {
			return err
		}
	}
	return nil
}
