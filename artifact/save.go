package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync/atomic"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// save stores the file or directory at path under key: a file as one object, a directory as one object a
// file below key/, and an empty directory as an empty object whose name ends in a slash.
func (b *bucket) save(ctx context.Context, filePath, key string) (l loaded, err error) {
	p, err := openPlace(filePath, b.options.shared, false)
	if err != nil {
		return l, err
	}
	defer p.close()
	info, err := p.root.Stat(p.name)
	if err != nil {
		return l, err
	}
	switch {
	case info.IsDir():
		return b.saveDirectory(ctx, p, strings.TrimSuffix(key, "/"))
	case !info.Mode().IsRegular():
		return l, fmt.Errorf("%s is a %s, which no object can be; save a file or a directory", filePath, kindOf(info.Mode()))
	case strings.HasSuffix(key, "/"):
		return l, fmt.Errorf("%s is a file, but the key %q ends in a slash, as only a directory's may; remove the slash", filePath, key)
	}
	n, err := b.saveFile(ctx, p.root, p.name, key)
	return loaded{1, n}, err
}

func (b *bucket) saveDirectory(ctx context.Context, p *place, key string) (l loaded, err error) {
	root, err := p.root.OpenRoot(p.name)
	if err != nil {
		return l, err
	}
	defer root.Close()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(b.options.Parallel)
	var bytes atomic.Int64
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := gctx.Err(); err != nil {
			return err
		}
		object := key + "/" + name
		switch {
		case d.IsDir():
			empty, err := isEmpty(root, name)
			if err != nil || !empty || name == "." {
				return err
			}
			l.files++
			g.Go(func() error { return b.saveMarker(gctx, object+"/") })
			return nil
		case d.Type()&fs.ModeSymlink != 0:
			// What a link within the directory names is saved in its place; os.Root refuses all others.
			info, err := root.Stat(name)
			if err != nil || !info.Mode().IsRegular() {
				b.options.Logger.Warn("not saved: a link that leads out of the artifact, to a directory or nowhere", "key", object, "path", path.Join(p.root.Name(), p.name, name))
				return nil
			}
		case !d.Type().IsRegular():
			b.options.Logger.Warn("not saved: neither a file nor a directory", "key", object, "kind", kindOf(d.Type()))
			return nil
		}
		if !utf8.ValidString(name) {
			return fmt.Errorf("%q: its name is not UTF-8, as a key must be; rename it, or use archive: {tar: {}}", name)
		}
		if len(object) > 1024 {
			return fmt.Errorf("%s: its key would have %d bytes, more than the 1024 that a bucket takes; use shorter names, or archive: {tar: {}}", name, len(object))
		}
		l.files++
		g.Go(func() error {
			n, err := b.saveFile(gctx, root, name, object)
			bytes.Add(n)
			return err
		})
		return nil
	})
	if gerr := g.Wait(); gerr != nil { // the first failure; the walk only ended because of it
		err = gerr
	}
	l.bytes = bytes.Load()
	if err == nil && l.files == 0 {
		err = b.saveMarker(ctx, key+"/")
	}
	return l, err
}

func isEmpty(root *os.Root, name string) (bool, error) {
	d, err := root.Open(name)
	if err != nil {
		return false, err
	}
	defer d.Close()
	_, err = d.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}

// saveMarker stores the object that stands for an empty directory.
func (b *bucket) saveMarker(ctx context.Context, key string) error {
	return b.putWhole(ctx, key, strings.NewReader(""), 0, "")
}

func (b *bucket) saveFile(ctx context.Context, root *os.Root, name, key string) (int64, error) {
	if err := b.options.files.Acquire(ctx, 1); err != nil {
		return 0, b.fail(ctx, "put", key, &answer{}, err)
	}
	defer b.options.files.Release(1)
	// A pipe put in the file's place meanwhile must not hold the driver up.
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() {
		return 0, fmt.Errorf("%s is a %s by now", name, kindOf(info.Mode()))
	}
	mode := ""
	if perm := info.Mode().Perm(); perm&0o111 != 0 {
		mode = fmt.Sprintf("%04o", perm)
	}
	return info.Size(), b.putFile(ctx, key, f, info.Size(), mode)
}

func kindOf(m fs.FileMode) string {
	switch {
	case m&fs.ModeNamedPipe != 0:
		return "pipe"
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeDevice != 0:
		return "device"
	case m&fs.ModeSymlink != 0:
		return "link"
	}
	return "special file"
}
