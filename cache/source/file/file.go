// Package file reads and writes the files of a local folder as the objects of a bucket, for local mode.
//
// It owns how a file is an object: keys are slash-separated paths below the root, only regular files are
// objects, and a file's version is its device, inode, size, mtime and ctime. Nothing outside the root is
// ever opened, whatever the keys and links say (os.Root). What is no object (a socket, a device, a link
// that leads out of the root or to a folder, a name that is not a key) is listed with Skip set, so that
// it is reported and not silently dropped.
//
// Concurrency: a Folder is safe for concurrent use. Failure: source.Error as everywhere; a file that
// changes while it is read gives ErrChanged, as far as its ctime tells (kernels before 6.13 count it in
// ticks of some milliseconds, and a write through a mapping shows late). It may import cache/source.
package file

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/stepcache/stepcache/cache/source"
)

// maxKey is the longest key, as in a bucket.
const maxKey = 1024

// unfinished starts the names of files that a Put is writing or left behind when the process died.
const unfinished = ".stepcache-put-"

// Folder is one local folder, by its name: it is opened for each operation and not held, so that a folder that
// takes its place, or is mounted there, is seen, and the one before can be unmounted.
type Folder struct {
	dir, url string
}

var _ source.Source = (*Folder)(nil)

// Open opens the folder that c.URL names. The folder must exist.
func Open(_ context.Context, c source.Config) (*Folder, error) {
	scheme, _, dir, err := source.Split(c.URL)
	if err != nil {
		return nil, err
	}
	if scheme != "file" {
		return nil, &source.Error{Op: "open", Name: c.URL, Kind: source.ErrInvalid, Err: errors.New("not a file:// URL"), Hint: "write file:///folder"}
	}
	dir = filepath.Clean(dir)
	f := &Folder{dir: dir, url: "file://" + dir}
	root, err := f.open("open")
	if err != nil {
		return nil, err
	}
	_ = root.Close() // nothing was done with it
	return f, nil
}

// open opens the folder for one operation. While there is none nothing is said of its files: they may come back.
func (f *Folder) open(op string) (*os.Root, error) {
	root, err := os.OpenRoot(f.dir)
	if err == nil {
		return root, nil
	}
	e := &source.Error{Op: op, Name: f.url, Kind: kind(err), Err: err}
	info, serr := os.Stat(f.dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || serr == nil && !info.IsDir() {
		e.Kind, e.Hint = source.ErrNoBucket, "make the folder, or correct its name"
	}
	return nil, e
}

// URL implements source.Source.
func (f *Folder) URL() string { return f.url }

func (f *Folder) fail(op, key string, err error) error {
	e := &source.Error{Op: op, Name: f.url + "/" + key, Kind: kind(err), Err: err}
	var errno syscall.Errno
	switch {
	case errors.Is(err, syscall.ENOSPC):
		e.Hint = "the disk is full"
	case errors.Is(err, fs.ErrNotExist) || errors.As(err, &errno):
	default:
		e.Hint = "a link that leads out of the folder is not followed" // os.Root has no error value for it
	}
	return e
}

// kind judges an error of the file system.
func kind(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR):
		return source.ErrNotFound
	case errors.Is(err, syscall.EROFS):
		return source.ErrReadOnly
	case errors.Is(err, fs.ErrPermission):
		return source.ErrDenied
	case errors.Is(err, syscall.EIO), errors.Is(err, syscall.ESTALE), errors.Is(err, syscall.ENOSPC),
		errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return source.ErrUnavailable
	}
	return source.ErrInvalid
}

// badKey says why key cannot be a file's; "" means it can.
func badKey(key string) string {
	switch {
	case len(key) > maxKey:
		return fmt.Sprintf("name longer than %d bytes", maxKey)
	case strings.HasSuffix(key, "/"):
		return "directory marker: a folder needs none"
	case key == "." || !isPath(key):
		return "not a path below the folder"
	case strings.IndexByte(key, 0) >= 0:
		return "name with a zero byte"
	case strings.HasPrefix(path.Base(key), unfinished):
		return "an unfinished put"
	}
	return ""
}

// isPath is fs.ValidPath without its demand for UTF-8: a file's name is bytes.
func isPath(key string) bool { return fs.ValidPath(strings.ToValidUTF8(key, "?")) }

func (f *Folder) checkKey(op, key string) error {
	if why := badKey(key); why != "" {
		return &source.Error{Op: op, Name: f.url + "/" + key, Kind: source.ErrInvalid, Err: errors.New(why)}
	}
	return nil
}

// Stat implements source.Stater.
func (f *Folder) Stat(ctx context.Context, key string) (source.Object, error) {
	if err := f.checkKey("stat", key); err != nil {
		return source.Object{}, err
	}
	if err := ctx.Err(); err != nil {
		return source.Object{}, &source.Error{Op: "stat", Name: f.url + "/" + key, Kind: source.ContextKind(ctx), Err: err}
	}
	root, err := f.open("stat")
	if err != nil {
		return source.Object{}, err
	}
	defer root.Close()
	info, err := root.Stat(key)
	if err != nil {
		return source.Object{}, f.fail("stat", key, err)
	}
	if !info.Mode().IsRegular() {
		return source.Object{}, f.special("stat", key, info.Mode())
	}
	return object(key, info), nil
}

// special is the error for what is there but no object: a folder is none, and so not found.
func (f *Folder) special(op, key string, mode fs.FileMode) error {
	e := &source.Error{Op: op, Name: f.url + "/" + key, Kind: source.ErrInvalid, Err: errors.New(what(mode) + " is no object")}
	if mode.IsDir() {
		e.Kind = source.ErrNotFound
	}
	return e
}

func what(mode fs.FileMode) string {
	switch t := mode.Type(); {
	case t.IsDir():
		return "a folder"
	case t&fs.ModeSymlink != 0:
		return "a link"
	case t&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case t&fs.ModeSocket != 0:
		return "a socket"
	case t&fs.ModeDevice != 0:
		return "a device"
	}
	return "a special file"
}

func object(key string, info fs.FileInfo) source.Object {
	return source.Object{Key: key, Size: info.Size(), Version: version(info), ModTime: info.ModTime()}
}

func version(info fs.FileInfo) string {
	s := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%x-%x-%x-%x.%x-%x.%x", s.Dev, s.Ino, s.Size, s.Mtim.Sec, s.Mtim.Nsec, s.Ctim.Sec, s.Ctim.Nsec)
}

// Get implements source.Getter.
func (f *Folder) Get(ctx context.Context, o source.Object, off, length int64) (source.Body, error) {
	if err := f.checkKey("get", o.Key); err != nil {
		return source.Body{}, err
	}
	if off < 0 || length < 0 || off+length < off || off+length > o.Size {
		return source.Body{}, &source.Error{Op: "get", Name: f.url + "/" + o.Key, Kind: source.ErrInvalid,
			Err: fmt.Errorf("range %d+%d is not within %d bytes", off, length, o.Size)}
	}
	if length == 0 {
		return source.Body{ReadCloser: io.NopCloser(strings.NewReader(""))}, nil
	}
	root, err := f.open("get")
	if err != nil {
		return source.Body{}, err
	}
	defer root.Close()
	b := &body{folder: f, ctx: ctx, key: o.Key, version: o.Version, off: off, left: length}
	// Looked at before it is opened, since opening a device or a pipe does something.
	info, err := root.Stat(o.Key)
	if err != nil {
		return source.Body{}, f.fail("get", o.Key, err)
	}
	if !info.Mode().IsRegular() {
		return source.Body{}, f.special("get", o.Key, info.Mode())
	}
	if b.file, err = root.OpenFile(o.Key, os.O_RDONLY|syscall.O_NONBLOCK, 0); err != nil {
		return source.Body{}, f.fail("get", o.Key, err)
	}
	if err := b.check(); err != nil {
		_ = b.file.Close() // the error that matters is known
		return source.Body{}, err
	}
	return source.Body{ReadCloser: b}, nil
}

// body reads a part of one version of a file.
type body struct {
	folder       *Folder
	ctx          context.Context
	file         *os.File
	key, version string
	off, left    int64
	err          error
}

// check compares the open file with the version asked for.
func (b *body) check() error {
	info, err := b.file.Stat()
	if err != nil {
		return b.folder.fail("get", b.key, err)
	}
	if v := version(info); !info.Mode().IsRegular() || v != b.version {
		return &source.Error{Op: "get", Name: b.folder.url + "/" + b.key, Kind: source.ErrChanged,
			Err: fmt.Errorf("the file is now %s, asked was %s", v, b.version)}
	}
	return nil
}

// Read implements io.Reader. The version is compared after each read and before its bytes are given
// out, so that no byte of a later version is.
func (b *body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.left == 0 {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := b.ctx.Err(); err != nil {
		b.err = &source.Error{Op: "get", Name: b.folder.url + "/" + b.key, Kind: source.ContextKind(b.ctx), Err: err}
		return 0, b.err
	}
	n, err := b.file.ReadAt(p[:min(int64(len(p)), b.left)], b.off)
	if cerr := b.check(); cerr != nil {
		b.err = cerr
		return 0, b.err
	}
	b.off, b.left = b.off+int64(n), b.left-int64(n)
	switch {
	case b.left == 0:
		return n, io.EOF
	case err != nil:
		b.err = b.folder.fail("get", b.key, err)
		return n, b.err
	}
	return n, nil
}

// Close implements io.Closer.
func (b *body) Close() error { return b.file.Close() }

// Put implements source.Putter: the file appears whole, by a rename, once its bytes are on the disk.
func (f *Folder) Put(ctx context.Context, key string, r io.Reader, size int64) (o source.Object, err error) {
	if err := f.checkKey("put", key); err != nil {
		return o, err
	}
	root, err := f.open("put")
	if err != nil {
		return o, err
	}
	defer root.Close()
	dir := path.Dir(key)
	if err := root.MkdirAll(dir, 0o755); err != nil {
		return o, f.conflict("put", key, err)
	}
	if info, err := root.Stat(key); err == nil && info.IsDir() {
		return o, f.conflict("put", key, syscall.EISDIR)
	}
	temp := path.Join(dir, unfinished+rand.Text())
	file, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return o, f.fail("put", key, err)
	}
	defer func() {
		if err != nil {
			_ = file.Close() // it is removed
			if rerr := root.Remove(temp); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
				err = fmt.Errorf("%w; %s could not be removed: %v", err, temp, rerr)
			}
		}
	}()
	content := &countedReader{ctx: ctx, r: r}
	if size >= 0 {
		content.r = io.LimitReader(r, size+1) // one more, to see that there is none
	}
	n, err := io.Copy(file, content)
	switch {
	case ctx.Err() != nil:
		return o, &source.Error{Op: "put", Name: f.url + "/" + key, Kind: source.ContextKind(ctx), Err: ctx.Err()}
	case content.err != nil:
		return o, fmt.Errorf("put %s/%s: read the content: %w", f.url, key, content.err)
	case err != nil:
		return o, f.fail("put", key, err)
	case size >= 0 && n != size:
		return o, &source.Error{Op: "put", Name: f.url + "/" + key, Kind: source.ErrInvalid,
			Err: fmt.Errorf("the content is not as long as it was said to be: %d bytes", size)}
	}
	if err := file.Sync(); err != nil {
		return o, f.fail("put", key, err)
	}
	if err := root.Rename(temp, key); err != nil {
		return o, f.conflict("put", key, err)
	}
	info, err := file.Stat() // after the rename, which changes the ctime
	if err != nil {
		return o, f.fail("put", key, err)
	}
	if err := file.Close(); err != nil {
		return o, f.fail("put", key, err)
	}
	return object(key, info), nil
}

// conflict is an error of a name that is a file on one path and a folder on another, which a bucket
// could hold and a folder cannot.
func (f *Folder) conflict(op, key string, err error) error {
	e := f.fail(op, key, err).(*source.Error)
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.EISDIR) || errors.Is(err, syscall.EEXIST) {
		e.Kind, e.Hint = source.ErrInvalid, "a name cannot be both a file and a folder"
	}
	return e
}

// countedReader ends with ctx and tells the content's errors from the file's.
type countedReader struct {
	ctx context.Context
	r   io.Reader
	err error
}

func (c *countedReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}

// Delete implements source.Deleter. Folders left empty stay: they are no objects.
func (f *Folder) Delete(ctx context.Context, key string) error {
	if err := f.checkKey("delete", key); err != nil {
		return err
	}
	root, err := f.open("delete")
	if err != nil {
		return err
	}
	defer root.Close()
	info, err := root.Lstat(key)
	if err == nil && info.IsDir() {
		return nil // no object of this name
	}
	if err == nil {
		err = root.Remove(key)
	}
	if err == nil || kind(err) == source.ErrNotFound {
		return nil
	}
	return f.fail("delete", key, err)
}
