package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// A Dataset that takes puts (access: ReadWrite) has no listing that holds: commands ask for its names as they are now.

// names connects a command to a tier that takes puts; nil for one that takes none.
func (t *tierFlags) names(ctx context.Context) (*client.Names, error) {
	f, err := t.one()
	if err != nil {
		return nil, err
	}
	config, err := f.ClientConfig()
	if err != nil {
		return nil, err
	}
	ctx, cancel := t.bounded(ctx, f)
	defer cancel()
	n, err := client.DialNames(ctx, config)
	switch {
	case errors.Is(err, client.ErrNotWritable):
		return nil, nil
	case err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("%w (%w)", context.Cause(ctx), err)
	}
	return n, err
}

// dialListed is dial for what goes by a listing; a Dataset that takes puts has none, for whose coming dial would wait.
// what it is wanted for ends the error.
func (t *tierFlags) dialListed(ctx context.Context, what string) (*client.Client, error) {
	f, err := t.one()
	if err != nil {
		return nil, err
	}
	names, err := t.names(ctx)
	if err != nil {
		return nil, err
	}
	if names != nil {
		names.Close()
		return nil, fmt.Errorf("dataset %s takes puts (access: ReadWrite): it has no listing %s", f.Dataset, what)
	}
	return t.dial(ctx)
}

// named is a file or a folder of such a Dataset. The path has no leading slash; the root's is empty.
type named struct {
	wire.Name
	path string
}

func (n named) entry() entry {
	e := newEntry("/"+n.path, n.Dir, n.Size, n.ModTime)
	e.Version = n.Version
	return e
}

func lookupName(ctx context.Context, n *client.Names, name string) (named, error) {
	p := strings.TrimPrefix(path.Clean("/"+name), "/")
	if p == "" {
		return named{Name: wire.Name{Dir: true}}, nil
	}
	what, err := n.Lookup(ctx, p)
	if errors.Is(err, source.ErrNotFound) {
		err = noSuchPath(name)
	}
	what.Name = path.Base(p)
	return named{what, p}, err
}

// walkNames calls f with what is in a folder, and below it if that is wanted, folders before what is in them.
func walkNames(ctx context.Context, n *client.Names, folder named, recursive bool, f func(named) error) error {
	for after := ""; ; {
		part, err := n.List(ctx, folder.path, after)
		if err != nil {
			return err
		}
		for _, name := range part.Names {
			what := named{name, path.Join(folder.path, name.Name)}
			if err := f(what); err != nil {
				return err
			}
			if what.Dir && recursive {
				if err := walkNames(ctx, n, what, true, f); err != nil {
					return err
				}
			}
		}
		if after = part.After; after == "" {
			return nil
		}
	}
}

// getNames copies what is at or below a name to dest.
func getNames(ctx context.Context, n *client.Names, what named, dest string, force bool) error {
	all, bytes := []named{what}, what.Size
	if what.Dir {
		if err := os.MkdirAll(dest, 0o755); err != nil {
			return err
		}
		all = nil
		err := walkNames(ctx, n, what, true, func(w named) error {
			all = append(all, w)
			bytes += w.Size
			return nil
		})
		if err != nil {
			return err
		}
	}
	p := newProgress("get /"+what.path, bytes)
	defer p.finish()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, w := range all {
		// The workers give no name that is "..", so that the result lies below dest.
		to := filepath.Join(dest, filepath.FromSlash(strings.TrimPrefix(strings.TrimPrefix(w.path, what.path), "/")))
		if w.Dir {
			if err := os.MkdirAll(to, 0o755); err != nil {
				return errors.Join(err, g.Wait())
			}
			continue
		}
		g.Go(func() error {
			return writeFile(to, force, w.ModTime, func(out io.Writer) error { return copyName(ctx, n, w, out, p) })
		})
	}
	return g.Wait()
}

// copyName writes the content of the version of a file that was found.
func copyName(ctx context.Context, n *client.Names, what named, w io.Writer, p *progress) error {
	buf := make([]byte, min(copyBuffer, max(what.Size, 1)))
	for off := int64(0); off < what.Size; {
		b := buf[:min(int64(len(buf)), what.Size-off)]
		if _, err := n.ReadAt(ctx, what.path, what.Version, b, off); errors.Is(err, source.ErrChanged) {
			return fmt.Errorf("/%s was put anew while it was copied: copy it again: %w", what.path, err)
		} else if err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		off += int64(len(b))
		if p != nil {
			p.add(int64(len(b)))
		}
	}
	return nil
}
