package mount

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/meminfo"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// Names are those of a writable dataset, as they are now. Paths have no leading slash; "" is the root.
type Names interface {
	// Lookup is what a path names: source.ErrNotFound for nothing.
	Lookup(ctx context.Context, path string) (wire.Name, error)
	// List is what is in a folder, from after on, which is "" or the After of the answer before, or a name that
	// was listed (with a slash behind that of a folder).
	List(ctx context.Context, folder, after string) (wire.Names, error)
	// ReadAt reads len(p) bytes of one version of a file: source.ErrChanged when there is another by now.
	ReadAt(ctx context.Context, path, version string, p []byte, off int64) (int, error)
}

// Live is what takes the place of a snapshot's digest in the Settings of a mount that follows the names.
var Live = catalog.Digest(sha256.Sum256([]byte("the names of a writable dataset, as they are")))

// fresh is how long the kernel may use a name without asking again.
const fresh = time.Second

// live is a tree that grows: a node is one version of one name, or a folder, and never becomes another one. So
// what the kernel keeps of a node, its pages too, stays right; that the name has another version now it learns
// by asking for the name, which it does after fresh, and is told another node. Nodes of names that are gone are
// kept: one may be open.
//
// The nodes are a log in the table, which is parked with the mount: a successor reads there what the ids mean that
// the kernel has. While both serve, each finds there what the other one wrote. In this process's own memory is
// where each node is in the log, some ninety bytes beside as many in it, so that a walk over millions of names can be
// afforded. What all such mounts of a process take is bounded together (nameMemory).
type live struct {
	names   Names
	dataset string
	table   *table
	created time.Time
	now     func() time.Time
	seed    maphash.Seed

	mu    sync.RWMutex
	at    []uint32                 // by node: where in the log its record is; the first two have none
	next  []catalog.Index          // by node: an older one of the same hash; zero: none
	first map[uint64]catalog.Index // by hash: the newest node of it
	read  int                      // bytes of the log that are in these
	pages map[catalog.Index]*livePage
}

// liveNode is what the log has of a node.
type liveNode struct {
	parent        catalog.Index
	name, version string
	dir           bool
	size          int64
	mod           time.Time
}

// livePage is a part of a folder that was listed a moment ago: the kernel takes it in smaller parts.
type livePage struct {
	nodes []catalog.Index
	after string
	at    time.Time
}

const (
	// liveSlots is the room for the log, 256 MiB, which takes memory only as it is used.
	liveSlots = 1 << 25
	// maxVersion is the length of the longest version that a listing has.
	maxVersion = 1 << 10
	// besideRecord is the memory of a node beside its record.
	besideRecord = 96
	// maxPages bounds how many folders' last parts are kept.
	maxPages = 64
	// settleName is a file that is there for settle only.
	settleName  = ".stepcache-settle"
	settleIndex = 1
)

// nameMemory is the memory of the nodes of all live mounts of a process: logs, which outlive the process with what is
// parked, and what is beside them.
type nameMemory struct {
	mu         sync.Mutex
	most, used int64
}

// ownNames are this process's: a quarter of its container's limit.
var ownNames = sync.OnceValue(func() *nameMemory {
	limit, limited := meminfo.Limit()
	if !limited {
		return &nameMemory{most: math.MaxInt64}
	}
	return &nameMemory{most: limit / 4}
})

// room is what a mount that takes own may take at most: half of what the others leave, so that there is always some for
// one more.
func (g *nameMemory) room(own int64) int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return (g.most - (g.used - own)) / 2
}

func (g *nameMemory) take(bytes int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.used += bytes
}

func newLive(n Names, t *table, o Options) *live {
	if t.names = o.nameMemory; t.names == nil {
		t.names = ownNames()
	}
	return &live{
		names: n, dataset: o.Dataset, table: t, created: time.Now(), now: time.Now, seed: maphash.MakeSeed(),
		at: make([]uint32, settleIndex+1), next: make([]catalog.Index, settleIndex+1),
		first: make(map[uint64]catalog.Index), pages: make(map[catalog.Index]*livePage),
	}
}

// has says whether there is such a node, also when another process made it a moment ago.
func (l *live) has(ctx context.Context, i catalog.Index) bool {
	return int(i) < l.Len() || l.inherit(ctx) == nil && int(i) < l.Len()
}

func (l *live) node(i catalog.Index) (liveNode, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.get(i)
}

// get is node with mu held.
func (l *live) get(i catalog.Index) (liveNode, bool) {
	switch {
	case i == 0:
		return liveNode{dir: true}, true
	case i == settleIndex:
		return liveNode{name: settleName}, true
	case int(i) >= len(l.at):
		return liveNode{}, false
	}
	r := l.record(i)
	n := liveNode{
		parent: catalog.Index(binary.LittleEndian.Uint32(r[4:])), dir: r[24] == 1,
		size: int64(binary.LittleEndian.Uint64(r[8:])),
		name: string(recordName(r)), version: string(recordVersion(r)),
	}
	if t := int64(binary.LittleEndian.Uint64(r[16:])); t != 0 {
		n.mod = time.Unix(0, t).UTC()
	}
	return n, true
}

// Node and the others are a snapshot's.
func (l *live) Node(i catalog.Index) (catalog.Node, bool) {
	n, ok := l.node(i)
	return catalog.Node{Name: n.name, Dir: n.dir, Size: n.size, ModTime: n.mod, Parent: n.parent}, ok
}

func (l *live) Path(i catalog.Index) string { return "/" + l.path(i) }

// path is a node's path as Names has it.
func (l *live) path(i catalog.Index) string {
	l.mu.RLock()
	defer l.mu.RUnlock()
	path := ""
	for i != 0 {
		n, ok := l.get(i)
		if !ok {
			break
		}
		if path == "" {
			path = n.name
		} else {
			path = n.name + "/" + path
		}
		i = n.parent
	}
	return path
}

func (l *live) Object(i catalog.Index) (int, source.Object, bool) {
	n, ok := l.node(i)
	return 0, source.Object{Key: l.path(i), Size: n.size, Version: n.version, ModTime: n.mod}, ok && !n.dir
}

func (l *live) Mounts() []catalog.Mount {
	return []catalog.Mount{{URL: "dataset://" + l.dataset, Path: "/"}}
}

func (l *live) Len() int {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return len(l.at)
}

func (l *live) Bytes() int64           { return 0 }
func (l *live) Created() time.Time     { return l.created }
func (l *live) Digest() catalog.Digest { return Live }
func (l *live) Histogram() []int64     { return nil }
func (l *live) Keep() (func(), bool)   { return func() {}, true }
func (l *live) Forget(catalog.Index)   {}

// ReadAt implements Reader.
func (l *live) ReadAt(ctx context.Context, i catalog.Index, p []byte, off int64) (int, error) {
	n, ok := l.node(i)
	if !ok || n.dir || i == settleIndex {
		return 0, fmt.Errorf("%w: node %d is no file", source.ErrInvalid, i)
	}
	return l.names.ReadAt(ctx, l.path(i), n.version, p, off)
}

// lookup asks what a name in a folder is.
func (l *live) lookup(ctx context.Context, dir catalog.Index, name string) (catalog.Index, error) {
	if dir == 0 && name == settleName {
		return settleIndex, nil
	}
	found, err := l.names.Lookup(ctx, join(l.path(dir), name))
	if err != nil {
		return 0, err
	}
	found.Name = name
	nodes, err := l.enter(ctx, dir, []wire.Name{found})
	if err != nil {
		return 0, err
	}
	return nodes[0], nil
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// list gives what is in a folder from the node after on, or from its start (0), until add returns false.
func (l *live) list(ctx context.Context, dir, after catalog.Index, add func(catalog.Index) bool) error {
	p, from, err := l.position(ctx, dir, after)
	for err == nil {
		for _, n := range p.nodes[from:] {
			if !add(n) {
				return nil
			}
		}
		if p.after == "" {
			return nil
		}
		p, err = l.fetch(ctx, dir, p.after)
		from = 0
	}
	return err
}

// position is the part of a folder with what comes after a node, and where in it.
func (l *live) position(ctx context.Context, dir, after catalog.Index) (p *livePage, from int, err error) {
	if after == 0 {
		p, err = l.fetch(ctx, dir, "")
		return p, 0, err
	}
	l.mu.RLock()
	p = l.pages[dir]
	l.mu.RUnlock()
	if p != nil && l.now().Sub(p.at) < fresh {
		if k := slices.Index(p.nodes, after); k >= 0 {
			return p, k + 1, nil
		}
	}
	if !l.has(ctx, after) {
		return nil, 0, fmt.Errorf("%w: position in a folder", source.ErrInvalid)
	}
	n, _ := l.node(after)
	if n.parent != dir {
		return nil, 0, fmt.Errorf("%w: position in a folder", source.ErrInvalid)
	}
	name := n.name
	if n.dir {
		name += "/"
	}
	p, err = l.fetch(ctx, dir, name)
	return p, 0, err
}

// fetch lists the next part of a folder.
func (l *live) fetch(ctx context.Context, dir catalog.Index, after string) (*livePage, error) {
	at := l.now()
	found, err := l.names.List(ctx, l.path(dir), after)
	if err != nil {
		return nil, err
	}
	if found.After != "" && found.After <= after {
		return nil, fmt.Errorf("%w: the listing does not go on after %q", source.ErrUnavailable, after)
	}
	nodes, err := l.enter(ctx, dir, found.Names)
	if err != nil {
		return nil, err
	}
	p := &livePage{nodes: nodes, after: found.After, at: at}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pages) >= maxPages {
		clear(l.pages)
	}
	l.pages[dir] = p
	return p, nil
}

// errFull: so many names were looked at through this mount that there is no room for more.
var errFull = errors.New("the mount has no room for more names: let pods that mount writable Datasets on this node end, or raise the memory limit of what serves the mount")

// worn says whether so much of the room is taken that whoever comes now had better get another mount.
func (l *live) worn() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	own := l.table.named
	return l.read > len(l.log())/2 || own > l.table.names.room(own)/2
}

// enter finds the nodes of what a folder has, and makes those that are new.
func (l *live) enter(ctx context.Context, dir catalog.Index, names []wire.Name) ([]catalog.Index, error) {
	out := make([]catalog.Index, len(names))
	if l.find(dir, names, out) {
		return out, nil
	}
	if err := l.table.lock(ctx); err != nil {
		return nil, err
	}
	defer l.table.unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.catchUp(); err != nil {
		return nil, err
	}
	for k, n := range names {
		i, ok := l.search(dir, n)
		if !ok {
			var err error
			if i, err = l.append(dir, n); err != nil {
				return nil, err
			}
		}
		out[k] = i
	}
	return out, nil
}

// find is enter as long as nothing is new.
func (l *live) find(dir catalog.Index, names []wire.Name, out []catalog.Index) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for k, n := range names {
		i, ok := l.search(dir, n)
		if !ok {
			return false
		}
		out[k] = i
	}
	return true
}

// search finds one node. Only with mu held.
func (l *live) search(dir catalog.Index, n wire.Name) (catalog.Index, bool) {
	if n.Dir {
		n.Version = ""
	}
	for i := l.first[l.hash(dir, n.Dir, n.Name, n.Version)]; i != 0; i = l.next[i] {
		r := l.record(i)
		if binary.LittleEndian.Uint32(r[4:]) == uint32(dir) && (r[24] == 1) == n.Dir &&
			string(recordName(r)) == n.Name && string(recordVersion(r)) == n.Version {
			return i, true
		}
	}
	return 0, false
}

func (l *live) hash(dir catalog.Index, isDir bool, name, version string) uint64 {
	var h maphash.Hash
	h.SetSeed(l.seed)
	var head [5]byte
	binary.LittleEndian.PutUint32(head[:], uint32(dir))
	if isDir {
		head[4] = 1
	}
	h.Write(head[:])
	h.WriteString(name)
	h.WriteByte(0)
	h.WriteString(version)
	return h.Sum64()
}

// The log begins with its length in bytes, and has one record a node, in order: its length, and its fields.
const (
	logHead    = 8
	recordHead = 4 + 4 + 8 + 8 + 2 + 2 + 2 // length, parent, size, time, flags, lengths of name and version
)

func (l *live) log() []byte { return l.table.mem[offTable:] }

// record is what the log has of a node. Only with mu held.
func (l *live) record(i catalog.Index) []byte {
	r := l.log()[logHead+int(l.at[i]):]
	return r[:binary.LittleEndian.Uint32(r)]
}

func recordName(r []byte) []byte {
	return r[recordHead : recordHead+int(binary.LittleEndian.Uint16(r[26:]))]
}

func recordVersion(r []byte) []byte {
	return r[recordHead+int(binary.LittleEndian.Uint16(r[26:])):]
}

// append makes a node. Only with the table's lock and mu held, and caught up.
func (l *live) append(dir catalog.Index, n wire.Name) (catalog.Index, error) {
	if n.Dir {
		n = wire.Name{Name: n.Name, Dir: true}
	}
	if len(n.Version) > maxVersion {
		return 0, fmt.Errorf("%w: %.64q has a version of %d bytes, of at most %d", source.ErrInvalid, n.Name, len(n.Version), maxVersion)
	}
	log := l.log()
	size := recordHead + len(n.Name) + len(n.Version)
	at, own := logHead+l.read, l.table.named
	if size > 1<<16 || at+size > len(log) || len(l.at) >= 1<<31 || own+int64(size+besideRecord) > l.table.names.room(own) {
		return 0, errFull
	}
	r := log[at : at+size]
	binary.LittleEndian.PutUint32(r, uint32(size))
	binary.LittleEndian.PutUint32(r[4:], uint32(dir))
	binary.LittleEndian.PutUint64(r[8:], uint64(n.Size))
	binary.LittleEndian.PutUint64(r[16:], 0)
	if !n.ModTime.IsZero() {
		binary.LittleEndian.PutUint64(r[16:], uint64(n.ModTime.UnixNano()))
	}
	r[24], r[25] = 0, 0
	if n.Dir {
		r[24] = 1
	}
	binary.LittleEndian.PutUint16(r[26:], uint16(len(n.Name)))
	binary.LittleEndian.PutUint16(r[28:], uint16(len(n.Version)))
	copy(r[recordHead:], n.Name)
	copy(r[recordHead+len(n.Name):], n.Version)
	// Last: a process that dies before has written nothing.
	binary.LittleEndian.PutUint64(log, uint64(l.read+size))
	return l.add(dir, n.Dir, n.Name, n.Version, size), nil
}

// add takes in the record that comes next.
func (l *live) add(dir catalog.Index, isDir bool, name, version string, size int) catalog.Index {
	i, h := catalog.Index(len(l.at)), l.hash(dir, isDir, name, version)
	l.at = append(l.at, uint32(l.read))
	l.next = append(l.next, l.first[h])
	l.first[h] = i
	l.read += size
	l.table.named += int64(size + besideRecord)
	l.table.names.take(int64(size + besideRecord))
	return i
}

// catchUp reads what another process wrote. Only with the table's lock and mu held.
func (l *live) catchUp() error {
	log := l.log()
	end := binary.LittleEndian.Uint64(log)
	bad := errors.New("the parked names of the mount make no sense")
	if end > uint64(len(log)-logHead) {
		return bad
	}
	for uint64(l.read) < end {
		r := log[logHead+l.read : logHead+int(end)]
		if len(r) < recordHead {
			return bad
		}
		size, name, version := int(binary.LittleEndian.Uint32(r)), int(binary.LittleEndian.Uint16(r[26:])), int(binary.LittleEndian.Uint16(r[28:]))
		parent := binary.LittleEndian.Uint32(r[4:])
		if size != recordHead+name+version || size > len(r) || int(parent) >= len(l.at) {
			return bad // a parent comes before its children
		}
		r = r[:size]
		l.add(catalog.Index(parent), r[24] == 1, string(recordName(r)), string(recordVersion(r)), size)
	}
	return nil
}

// inherit reads what the mount's former server wrote, which may still serve.
func (l *live) inherit(ctx context.Context) error {
	if err := l.table.lock(ctx); err != nil {
		return err
	}
	defer l.table.unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.catchUp()
}

// lookupLive is Lookup of a mount that follows the names.
func (f *fileSystem) lookupLive(cancel <-chan struct{}, h *fuse.InHeader, dir catalog.Index, name string, out *fuse.EntryOut) fuse.Status {
	if len(name) > nameMax {
		return f.fail(unix.ENAMETOOLONG)
	}
	ctx, stop := f.patientContext(cancel, h.Pid)
	defer stop()
	i, err := f.live.lookup(ctx, dir, name)
	if errors.Is(err, source.ErrNotFound) {
		return fuse.ENOENT // not kept: it may be put at any time
	}
	if err != nil {
		return f.failed(ctx, "look up "+name, dir, err)
	}
	n, _ := f.snap.Node(i)
	f.entry(i, &n, out)
	return fuse.OK
}

// listLive is list of such a mount. A position is the node that was told last, which names what comes after it
// whatever is put or deleted meanwhile.
func (f *fileSystem) listLive(cancel <-chan struct{}, in *fuse.ReadIn, dir catalog.Index, n *catalog.Node, add func(e fuse.DirEntry, i catalog.Index, n *catalog.Node) bool) fuse.Status {
	p := in.Offset
	for ; p < dotEntries; p++ {
		e, i := fuse.DirEntry{Mode: unix.S_IFDIR, Off: p + 1, Name: "."}, dir
		if p == 1 {
			e.Name, i = "..", n.Parent
		}
		e.Ino = nodeID(i)
		if !add(e, i, nil) {
			return fuse.OK
		}
	}
	ctx, stop := f.patientContext(cancel, in.Pid)
	defer stop()
	after := catalog.Index(p - dotEntries) // the root, which is in no folder, is the start
	err := f.live.list(ctx, dir, after, func(i catalog.Index) bool {
		c, _ := f.snap.Node(i)
		e := fuse.DirEntry{Name: c.Name, Mode: unix.S_IFREG, Ino: nodeID(i), Off: uint64(i) + dotEntries}
		if c.Dir {
			e.Mode = unix.S_IFDIR
		}
		return add(e, i, &c)
	})
	if err != nil {
		return f.failed(ctx, "list", dir, err)
	}
	return fuse.OK
}

var (
	_ tree   = (*live)(nil)
	_ Reader = (*live)(nil)
)
