package file

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/stepcache/stepcache/cache/source"
)

// listBatch is how many entries of a folder are held at once.
const listBatch = 1024

// List implements source.Lister, in the order in which folders hold their entries. Memory holds a batch
// of entries a level.
func (f *Folder) List(ctx context.Context, prefix string, yield func(source.Object) error) error {
	root, err := f.open("list")
	if err != nil {
		return err
	}
	defer root.Close()
	l := lister{folder: f, root: root, ctx: ctx, prefix: prefix, yield: yield}
	// The folder part of the prefix need not exist, and one that could not be a path has no keys.
	dir := "."
	if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
		dir = prefix[:i]
	}
	if dir != "." && !isPath(dir) || strings.IndexByte(prefix, 0) >= 0 {
		return nil
	}
	if dir != "." {
		// Links are followed nowhere below the root while listing, so not here either.
		for d := dir; d != "."; d = path.Dir(d) {
			info, err := root.Lstat(d)
			if err != nil && kind(err) == source.ErrNotFound || err == nil && !info.IsDir() {
				return nil
			}
			if err != nil {
				return f.fail("list", d, err)
			}
		}
	}
	err = l.list(dir)
	if e := (*source.Error)(nil); errors.As(err, &e) && e.Kind == source.ErrNotFound && dir == "." {
		e.Kind, e.Hint = source.ErrNoBucket, "the folder was removed meanwhile"
	}
	return err
}

type lister struct {
	folder *Folder
	root   *os.Root
	ctx    context.Context
	prefix string
	yield  func(source.Object) error
}

func (l *lister) list(dir string) error {
	d, err := l.root.OpenFile(dir, os.O_RDONLY, 0)
	if err != nil {
		return l.unreadable(dir, err)
	}
	defer d.Close()
	for {
		entries, err := d.ReadDir(listBatch)
		for _, e := range entries {
			if err := l.entry(dir, e); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return l.unreadable(dir, err)
		case l.ctx.Err() != nil:
			return &source.Error{Op: "list", Name: l.folder.url + "/" + dir, Kind: source.ContextKind(l.ctx), Err: l.ctx.Err()}
		}
	}
}

// unreadable is for a folder that cannot be read: one below the root that went away meanwhile holds
// nothing; a listing without one that is there would be a listing with holes.
func (l *lister) unreadable(dir string, err error) error {
	if dir != "." && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return l.folder.fail("list", dir, err)
}

func (l *lister) entry(dir string, e fs.DirEntry) error {
	key := e.Name()
	if dir != "." {
		key = dir + "/" + key
	}
	if e.IsDir() {
		if strings.HasPrefix(key+"/", l.prefix) || strings.HasPrefix(l.prefix, key+"/") {
			return l.list(key)
		}
		return nil
	}
	if !strings.HasPrefix(key, l.prefix) {
		return nil
	}
	skip := func(why string) error { return l.yield(source.Object{Key: key, Skip: why}) }
	if why := badKey(key); why != "" {
		return skip(why)
	}
	info, err := e.Info()
	if err == nil && info.Mode()&fs.ModeSymlink != 0 {
		// A link to a file below the root is an object; one to a folder could make a loop.
		if info, err = l.root.Stat(key); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return skip("a link to nothing")
			}
			return skip("a link that leads out of the folder or in a circle")
		}
		if info.IsDir() {
			return skip("a link to a folder")
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // removed meanwhile
	case err != nil:
		return l.folder.fail("list", key, err)
	case !info.Mode().IsRegular():
		return skip(what(info.Mode()))
	}
	return l.yield(object(key, info))
}
