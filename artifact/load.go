package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/source"
)

// A large object is loaded in ranges, a few at once.
const (
	rangeSize    = 16 << 20
	rangesAtOnce = 8
)

// What is loaded belongs to the step, which may run as another user than the driver: everyone may read and
// write it, as argoexec sees to for a single file. The driver's umask applies; its command has none.
const (
	fileMode   fs.FileMode = 0o666
	folderMode fs.FileMode = 0o777
)

// loaded is what Load or Save moved.
type loaded struct {
	files int
	bytes int64
}

// load makes the artifact of a key a file or directory at path. The error is source.ErrNotFound where
// there is neither an object of that name nor one below it.
func (b *bucket) load(ctx context.Context, key, path string) (l loaded, err error) {
	p, err := openPlace(path, b.options.shared, true)
	if err != nil {
		return l, err
	}
	defer p.close()
	if !strings.HasSuffix(key, "/") {
		o, _, err := b.stat(ctx, key)
		if err == nil {
			return loaded{1, o.size}, b.loadFile(ctx, p.root, &o, p.name)
		}
		if !errors.Is(err, source.ErrNotFound) {
			return l, err
		}
	}
	return b.loadDirectory(ctx, p, strings.TrimSuffix(key, "/")+"/")
}

// loadDirectory makes every object below prefix a file below p. Listing and loading go on side by side.
func (b *bucket) loadDirectory(ctx context.Context, p *place, prefix string) (l loaded, err error) {
	var root *os.Root
	var made folders
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(b.options.Parallel)
	err = b.list(gctx, prefix, func(o object) error {
		if root == nil { // only now is it known that there is a directory
			if err := p.root.MkdirAll(p.name, folderMode); err != nil {
				return err
			}
			r, err := p.root.OpenRoot(p.name)
			if err != nil {
				return err
			}
			root, made = r, folders{root: r}
		}
		rel := strings.TrimPrefix(o.key, prefix)
		name, marker := strings.CutSuffix(rel, "/")
		switch {
		case rel == "":
			return nil // the marker of the directory itself
		case !cleanName(name):
			return &source.Error{Op: "get", Name: b.object(o.key), Kind: source.ErrInvalid,
				Err:  fmt.Errorf("%q cannot be a file below the artifact's directory", rel),
				Hint: "remove or rename the object"}
		case marker:
			return made.make(name)
		}
		if err := made.make(path.Dir(name)); err != nil {
			return err
		}
		l.files, l.bytes = l.files+1, l.bytes+o.size
		g.Go(func() error { return b.loadFile(gctx, root, &o, name) })
		return gctx.Err()
	})
	gerr := g.Wait()
	if root == nil && err == nil && gerr == nil {
		err = &source.Error{Op: "get", Name: b.object(strings.TrimSuffix(prefix, "/")), Kind: source.ErrNotFound,
			Err: errors.New("there is no object of this name and none below it")}
	}
	if root != nil {
		defer root.Close()
	}
	if gerr != nil { // the first failure; the listing only ended because of it
		err = gerr
	}
	return l, err
}

// folders makes each folder once.
type folders struct {
	root *os.Root
	mu   sync.Mutex
	made map[string]bool
}

func (f *folders) make(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if name == "." || f.made[name] {
		return nil
	}
	if err := f.root.MkdirAll(name, folderMode); err != nil {
		return err
	}
	if f.made == nil {
		f.made = map[string]bool{}
	}
	f.made[name] = true
	return nil
}

// loadFile writes one object to a file. A file that could not be written whole is removed.
func (b *bucket) loadFile(ctx context.Context, root *os.Root, o *object, name string) (err error) {
	f, err := root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, fileMode)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr // a full disk may say so only here
		}
		if err != nil {
			_ = root.Remove(name) // the failure matters more
		}
	}()
	if o.size <= rangeSize {
		err = b.loadRange(ctx, o, f, 0, o.size)
	} else {
		err = b.loadRanges(ctx, o, f)
	}
	if err != nil {
		return err
	}
	if x := executable(o.mode); x != 0 {
		return f.Chmod(fileMode | x)
	}
	return nil
}

func (b *bucket) loadRanges(ctx context.Context, o *object, f *os.File) error {
	if err := f.Truncate(o.size); err != nil { // so that no room is seen before a byte is read
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(rangesAtOnce)
	for off := int64(0); off < o.size && ctx.Err() == nil; off += rangeSize {
		g.Go(func() error { return b.loadRange(ctx, o, f, off, min(rangeSize, o.size-off)) })
	}
	return g.Wait()
}

func (b *bucket) loadRange(ctx context.Context, o *object, f *os.File, off, n int64) error {
	if err := b.options.slots.Acquire(ctx, 1); err != nil {
		return b.fail(ctx, "get", o.key, &answer{}, err)
	}
	defer b.options.slots.Release(1)
	at := off
	return b.read(ctx, o, off, n, func(p []byte) error {
		_, err := f.WriteAt(p, at)
		at += int64(len(p))
		return err
	})
}

// executable are the bits for execution among the permissions that an object's metadata carries.
func executable(permissions string) fs.FileMode {
	n, err := strconv.ParseUint(permissions, 8, 32)
	if permissions == "" || err != nil {
		return 0
	}
	return fs.FileMode(n) & 0o111
}

// loadNothing makes the empty directory that stands for a missing optional artifact.
func (b *bucket) loadNothing(path string) error {
	p, err := openPlace(path, b.options.shared, true)
	if err != nil {
		return err
	}
	defer p.close()
	return p.root.MkdirAll(p.name, folderMode)
}
