package mount

import (
	"context"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
)

const (
	// forever is how long the kernel may keep what a snapshot says.
	forever = 10 * 365 * 24 * time.Hour
	// generation tells two files apart that had a node id one after the other: no id is ever used again.
	generation = 1
	nameMax    = 255
	// blockSize is the size that programs which ask (cp, cat, dd) read by.
	blockSize = 1 << 20
	// statBlock is the unit of statfs.
	statBlock = 4096
)

// fileSystem answers the kernel. Its node ids are indexes of the snapshot plus one, so that the root directory,
// index 0, has FUSE's root id, 1.
type fileSystem struct {
	fuse.RawFileSystem // ENOSYS to everything that is not below

	ctx     context.Context // ends with the connection
	conn    *os.File
	snap    tree
	live    *live // the same, where it follows the names; or nil
	reader  Reader
	peeker  Peeker // the same, or nil
	opt     Options
	log     *slog.Logger
	limit   *rate.Limiter // of log lines about failed reads
	count   counters
	mode    Mode
	noDirs  bool // the kernel may open directories without asking
	created time.Time
	table   *table
	pass    passthrough
	push    *pusher
	direct  [directFiles]chan struct{} // have one for each direct read that is under way
}

// tree is what a mount shows: nodes that never change. catalog.Snapshot says what its methods are.
type tree interface {
	Node(i catalog.Index) (catalog.Node, bool)
	Path(i catalog.Index) string
	Object(i catalog.Index) (mount int, o source.Object, ok bool)
	Mounts() []catalog.Mount
	Len() int
	Bytes() int64
	Created() time.Time
	Digest() catalog.Digest
	Histogram() []int64
	Keep() (release func(), ok bool)
}

func newFileSystem(ctx context.Context, snap tree, r Reader, t *table, o Options) *fileSystem {
	f := &fileSystem{
		RawFileSystem: fuse.NewDefaultRawFileSystem(), ctx: ctx, snap: snap, reader: r, opt: o, table: t,
		log: o.Logger.With("dataset", o.Dataset), limit: rate.NewLimiter(rate.Every(time.Second), 10),
		created: snap.Created(),
	}
	for i := range f.direct {
		f.direct[i] = make(chan struct{}, maxDirect)
	}
	f.live, _ = snap.(*live)
	f.peeker, _ = r.(Peeker)
	f.pass.init(f)
	f.push = newPusher(f)
	return f
}

// negotiate settles what depends on what the kernel can do. It runs before the first request.
func (f *fileSystem) negotiate(s *fuse.Server, m Mode) {
	flags := s.KernelSettings().Flags64()
	f.noDirs = flags&fuse.CAP_NO_OPENDIR_SUPPORT != 0
	f.pass.negotiate(s, flags)
	if f.live != nil {
		f.mode = NoOpen // nothing is leased, and the table has the log where it has the files' handles otherwise
		return
	}
	if m == Auto {
		m = NoOpen
		if f.pass.available() {
			m = ChooseMode(f.snap.Histogram())
		}
	}
	if m == NoOpen && flags&fuse.CAP_NO_OPEN_SUPPORT == 0 {
		m = Passthrough
	}
	f.mode = m
	if m != NoOpen || !canRead(flags) {
		f.push.off.Store(true)
	}
}

// close lets go of everything. No request is under way.
func (f *fileSystem) close() {
	f.pass.close()
	f.table.close()
}

func stack() string { return string(debug.Stack()) }

// String names the file system for go-fuse.
func (f *fileSystem) String() string { return subtype }

// node finds a node by its id. The kernel knows only ids that it was given.
func (f *fileSystem) node(id uint64) (catalog.Index, catalog.Node, bool) {
	i := catalog.Index(id - 1)
	if id == 0 || id > uint64(f.snap.Len()) && (f.live == nil || id > math.MaxUint32 || !f.live.has(f.ctx, i)) {
		return 0, catalog.Node{}, false
	}
	n, ok := f.snap.Node(i)
	return i, n, ok
}

func nodeID(i catalog.Index) uint64 { return uint64(i) + 1 }

func (f *fileSystem) attr(i catalog.Index, n *catalog.Node, a *fuse.Attr) {
	t := n.ModTime
	if t.IsZero() {
		t = f.created
	}
	*a = fuse.Attr{
		Ino: nodeID(i), Size: uint64(n.Size), Blocks: (uint64(n.Size) + 511) / 512,
		Mode: unix.S_IFREG | f.opt.FileMode, Nlink: 1, Blksize: blockSize,
		Owner: fuse.Owner{Uid: *f.opt.UID, Gid: *f.opt.GID},
	}
	if n.Dir {
		// One link, not two and one for each sub-directory: programs take one for "not counted".
		a.Mode, a.Size, a.Blocks = unix.S_IFDIR|f.opt.DirMode, 0, 0
	}
	a.SetTimes(&t, &t, &t)
}

func (f *fileSystem) entry(i catalog.Index, n *catalog.Node, out *fuse.EntryOut) {
	out.NodeId, out.Generation = nodeID(i), generation
	out.SetEntryTimeout(f.valid())
	out.SetAttrTimeout(forever)
	f.attr(i, n, &out.Attr)
}

// valid is how long the kernel may keep that a name is this node.
func (f *fileSystem) valid() time.Duration {
	if f.live != nil {
		return fresh
	}
	return forever
}

// Lookup finds a name in a directory. A name that is not there is told as an entry without a node, which the
// kernel keeps too.
func (f *fileSystem) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	f.count.lookups.Add(1)
	dir, n, ok := f.node(h.NodeId)
	if !ok {
		return f.fail(unix.ESTALE)
	}
	if !n.Dir {
		return f.fail(unix.ENOTDIR)
	}
	if f.live != nil {
		return f.lookupLive(cancel, h, dir, name, out)
	}
	if i, ok := f.snap.(*catalog.Snapshot).Child(dir, name); ok {
		if n, ok := f.snap.Node(i); ok {
			f.entry(i, &n, out)
			return fuse.OK
		}
	}
	if len(name) > nameMax {
		return f.fail(unix.ENAMETOOLONG)
	}
	out.SetEntryTimeout(forever)
	return fuse.OK
}

// Forget says that the kernel forgot a node. Where it does not tell of a close, this is the last that is heard.
func (f *fileSystem) Forget(id, _ uint64) {
	if f.mode != NoOpen {
		return
	}
	if i, n, ok := f.node(id); ok && !n.Dir {
		f.reader.Forget(i)
	}
}

func (f *fileSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	i, n, ok := f.node(in.NodeId)
	if !ok {
		return f.fail(unix.ESTALE)
	}
	f.attr(i, &n, &out.Attr)
	out.SetTimeout(forever)
	return fuse.OK
}

// Access is asked only by a kernel that ignores default_permissions.
func (f *fileSystem) Access(_ <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	_, n, ok := f.node(in.NodeId)
	mode := f.opt.FileMode
	if n.Dir {
		mode = f.opt.DirMode
	}
	switch {
	case !ok:
		return f.fail(unix.ESTALE)
	case in.Mask&unix.W_OK != 0:
		return f.fail(unix.EROFS)
	case in.Mask&unix.X_OK != 0 && mode&0o111 == 0:
		return f.fail(unix.EACCES)
	}
	return fuse.OK
}

// StatFs shows a file system that is full: the dataset is all there is.
func (f *fileSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{
		Blocks: (uint64(f.snap.Bytes()) + statBlock - 1) / statBlock, Bsize: statBlock, Frsize: statBlock,
		Files: uint64(f.snap.Len()), NameLen: nameMax,
	}
	return fuse.OK
}

// OpenDir needs no handle, a directory is read by position. So the kernel is told not to ask, and keeps what
// it has read of a directory.
func (f *fileSystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	switch {
	case f.live != nil:
		return fuse.OK // asked each time, so that the kernel keeps nothing
	case f.noDirs:
		return fuse.ENOSYS
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_CACHE_DIR
	return fuse.OK
}

// Positions in a directory: 0 is its start, 1 is after ".", 2 after "..", k+3 after the k-th child.
const dotEntries = 2

func (f *fileSystem) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(cancel, in, func(e fuse.DirEntry, _ catalog.Index, _ *catalog.Node) bool { return out.AddDirEntry(e) })
}

func (f *fileSystem) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(cancel, in, func(e fuse.DirEntry, i catalog.Index, n *catalog.Node) bool {
		o := out.AddDirLookupEntry(e)
		if o != nil && n != nil {
			f.entry(i, n, o)
		}
		return o != nil
	})
}

// list gives add the entries of a directory from a position on, until it is full. n is nil for "." and "..".
func (f *fileSystem) list(cancel <-chan struct{}, in *fuse.ReadIn, add func(e fuse.DirEntry, i catalog.Index, n *catalog.Node) bool) fuse.Status {
	f.count.readdirs.Add(1)
	dir, n, ok := f.node(in.NodeId)
	if !ok {
		return f.fail(unix.ESTALE)
	}
	if !n.Dir {
		return f.fail(unix.ENOTDIR)
	}
	if f.live != nil {
		return f.listLive(cancel, in, dir, &n, add)
	}
	end := uint64(n.Count) + dotEntries
	if in.Offset >= end { // it has taken in all that was before
		f.push.list(dir, &n)
	}
	for p := in.Offset; p < end; p++ {
		e, i := fuse.DirEntry{Mode: unix.S_IFDIR, Off: p + 1}, dir
		var child *catalog.Node
		switch p {
		case 0:
			e.Name = "."
		case 1:
			e.Name, i = "..", n.Parent
		default:
			i = n.First + catalog.Index(p-dotEntries)
			c, ok := f.snap.Node(i)
			if !ok {
				return f.fail(unix.EIO)
			}
			e.Name, child = c.Name, &c
			if !c.Dir {
				e.Mode = unix.S_IFREG
			}
		}
		e.Ino = nodeID(i)
		if !add(e, i, child) {
			break
		}
	}
	return fuse.OK
}

// fail counts an errno.
func (f *fileSystem) fail(e unix.Errno) fuse.Status {
	f.count.failed(e)
	return fuse.Status(e)
}

// A file system mounted read-only refuses changes before they come here; these are for a kernel that does not.

func (f *fileSystem) SetAttr(<-chan struct{}, *fuse.SetAttrIn, *fuse.AttrOut) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Mknod(<-chan struct{}, *fuse.MknodIn, string, *fuse.EntryOut) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Mkdir(<-chan struct{}, *fuse.MkdirIn, string, *fuse.EntryOut) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Unlink(<-chan struct{}, *fuse.InHeader, string) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Rmdir(<-chan struct{}, *fuse.InHeader, string) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Rename(<-chan struct{}, *fuse.RenameIn, string, string) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Link(<-chan struct{}, *fuse.LinkIn, string, *fuse.EntryOut) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Symlink(<-chan struct{}, *fuse.InHeader, string, string, *fuse.EntryOut) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) SetXAttr(<-chan struct{}, *fuse.SetXAttrIn, string, []byte) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) RemoveXAttr(<-chan struct{}, *fuse.InHeader, string) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Create(<-chan struct{}, *fuse.CreateIn, string, *fuse.CreateOut) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Tmpfile(<-chan struct{}, *fuse.CreateIn, *fuse.CreateOut) fuse.Status {
	return f.fail(unix.EROFS)
}
func (f *fileSystem) Write(<-chan struct{}, *fuse.WriteIn, []byte) (uint32, fuse.Status) {
	return 0, f.fail(unix.EROFS)
}
func (f *fileSystem) Writev(<-chan struct{}, *fuse.WriteIn, [][]byte) (uint32, fuse.Status) {
	return 0, f.fail(unix.EROFS)
}
func (f *fileSystem) CopyFileRange(<-chan struct{}, *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, f.fail(unix.EROFS)
}
func (f *fileSystem) Fallocate(<-chan struct{}, *fuse.FallocateIn) fuse.Status {
	return f.fail(unix.EROFS)
}

// Flush, FsyncDir, Fsync, Lseek, Ioctl, Readlink and the locks are ENOSYS, from the embedded default: the
// kernel then does by itself what there is to do (nothing to flush; locks are its own) and does not ask again.

// Flush overrides a default that is OK, which the kernel would ask for at every close.
func (f *fileSystem) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }
