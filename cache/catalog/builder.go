package catalog

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"github.com/stepcache/stepcache/cache/source"
)

// maxSize is the size of the largest object that is shown, above what any store holds.
const maxSize = 64 << 40

// maxExamples is how many examples a snapshot keeps of each kind of skipped key.
const maxExamples = 5

// maxExample is the length of an example: the longest key that stores have, were all of it escaped. The rest of a longer
// one is left out.
const maxExample = 8 << 10

// Builder collects objects and encodes them. It keeps some 60 bytes and the name's last segment for each,
// and the memory of what Encode returns on top. It belongs to one goroutine.
type Builder struct {
	err    error
	mounts []Mount
	roots  []uint32 // the directory of each mount
	seen   []int64  // objects added to each mount

	entries entries
	dirs    map[dirKey]uint32 // directories by parent and name
	names   arena
	extras  arena
	skips   skips
	buf     []byte

	// The directory of the last object, since listings mostly stay in one.
	lastMount int
	lastDir   string
	last      uint32
}

type dirKey struct {
	parent uint32
	name   string
}

// entry is a node while the tree is being built: the record, but with parents that count in the order of
// insertion.
type entry struct {
	version [16]byte
	size    int64
	time    int64
	name    uint32 // in names
	extra   uint32 // in extras
	parent  uint32
	parts   uint32
	mount   uint16
	flags   uint8
	nameLen uint8
}

// entries grows by chunks: a slice that doubles would hold three times what it needs while it copies.
type entries struct {
	chunks [][]entry
	n      uint32
}

const chunkBits = 12

func (e *entries) at(i uint32) *entry { return &e.chunks[i>>chunkBits][i&(1<<chunkBits-1)] }

func (e *entries) add(v entry) uint32 {
	if int(e.n>>chunkBits) == len(e.chunks) {
		e.chunks = append(e.chunks, make([]entry, 1<<chunkBits))
	}
	*e.at(e.n) = v
	e.n++
	return e.n - 1
}

// arena keeps strings end to end in chunks, so that a million names cost no object each.
type arena struct {
	chunks []*strings.Builder
}

const arenaBits = 16

// add returns where s lies, and a copy of it that lives there; false when 4 GiB are full.
func (a *arena) add(s []byte) (ref uint32, kept string, ok bool) {
	if len(a.chunks) == 0 || a.chunks[len(a.chunks)-1].Len()+len(s) > 1<<arenaBits {
		if len(a.chunks) == 1<<(32-arenaBits) {
			return 0, "", false
		}
		c := new(strings.Builder)
		c.Grow(1 << arenaBits)
		a.chunks = append(a.chunks, c)
	}
	k := len(a.chunks) - 1
	c := a.chunks[k]
	at := c.Len()
	c.Write(s)
	return uint32(k)<<arenaBits | uint32(at), c.String()[at:], true
}

func (a *arena) get(ref uint32, n int) string { return a.from(ref)[:n] }

// from returns everything from ref to the end of its chunk.
func (a *arena) from(ref uint32) string {
	return a.chunks[ref>>arenaBits].String()[ref&(1<<arenaBits-1):]
}

// skips counts what cannot be shown. Of the keys it keeps the first in the order of their bytes, which
// does not depend on the order in which they come.
type skips map[string]*Skipped

func (s skips) add(reason, url, key string) {
	e := s[reason]
	if e == nil {
		e = &Skipped{Reason: reason}
		s[reason] = e
	}
	e.Count++
	q := strconv.Quote(url + "/" + key)
	q = q[1:min(len(q)-1, maxExample)]
	if i, found := slices.BinarySearch(e.Examples, q); !found {
		e.Examples = slices.Insert(e.Examples, i, q)
		e.Examples = e.Examples[:min(len(e.Examples), maxExamples)]
	}
}

func (s skips) clone() skips {
	c := make(skips, len(s))
	for r, e := range s {
		c[r] = &Skipped{Reason: e.Reason, Count: e.Count, Examples: slices.Clone(e.Examples)}
	}
	return c
}

func (s skips) sorted() []Skipped {
	var out []Skipped
	for _, r := range slices.Sorted(maps.Keys(s)) {
		out = append(out, *s[r])
	}
	return out
}

// NewBuilder begins a snapshot of the given mounts. What is wrong with them, Add and Encode tell.
func NewBuilder(mounts []Mount) *Builder {
	b := &Builder{dirs: make(map[dirKey]uint32), skips: make(skips), lastMount: -1}
	b.mounts, b.err = checkMounts(mounts)
	if b.err != nil {
		return b
	}
	b.entries.add(entry{mount: noMount, flags: flagDir, time: noTime})
	b.roots = make([]uint32, len(b.mounts))
	b.seen = make([]int64, len(b.mounts))
	for i, m := range b.mounts {
		dir := uint32(0)
		for name := range strings.SplitSeq(m.Path[1:], "/") {
			if name != "" {
				dir = b.dir(dir, name, noMount)
			}
		}
		b.entries.at(dir).mount = uint16(i)
		b.roots[i] = dir
	}
	return b
}

// Add adds an object of a mount. An object that cannot be shown is counted and is no error; one without a
// version is source.ErrUnversioned unless the mount allows it. After an error there will be no snapshot.
func (b *Builder) Add(mount int, o source.Object) error {
	if b.err == nil {
		b.err = b.add(mount, o)
	}
	return b.err
}

func (b *Builder) add(mount int, o source.Object) error {
	if mount < 0 || mount >= len(b.mounts) {
		return fmt.Errorf("catalog: object %q belongs to mount %d of %d", o.Key, mount, len(b.mounts))
	}
	m := &b.mounts[mount]
	rel, ok := strings.CutPrefix(o.Key, m.Prefix)
	if !ok {
		return fmt.Errorf("%s/%s: the listing of prefix %q gave a key outside of it: %w", m.URL, o.Key, m.Prefix, source.ErrInvalid)
	}
	if o.Size < 0 || len(o.Version) > maxVersion || len(o.Digest.Sum) > maxSum {
		return fmt.Errorf("%s/%s: the listing gave size %d, a version of %d bytes and a digest of %d bytes: %w",
			m.URL, o.Key, o.Size, len(o.Version), len(o.Digest.Sum), source.ErrInvalid)
	}
	b.seen[mount]++
	if o.Skip != "" {
		b.skips.add(o.Skip, m.URL, o.Key)
		return nil
	}

	rel, marker := strings.CutSuffix(rel, "/")
	if rel == "" && !marker { // the prefix's own marker
		b.marker(mount, b.roots[mount], o)
		return nil
	}
	if reason := badKey(m.Path, rel); reason != "" {
		b.skips.add(reason, m.URL, o.Key)
		return nil
	}
	if o.Size > maxSize && !marker {
		b.skips.add(LargeFile, m.URL, o.Key)
		return nil
	}
	dirName, name := "", rel
	if marker {
		dirName, name = rel, ""
	} else if i := strings.LastIndexByte(rel, '/'); i >= 0 {
		dirName, name = rel[:i], rel[i+1:]
	}
	dir := b.dirOf(mount, dirName)
	if b.err != nil {
		return b.err
	}
	if marker {
		b.marker(mount, dir, o)
		return nil
	}
	if o.Version == "" && !m.AllowUnversioned {
		return fmt.Errorf("%s/%s: its bytes cannot be bound to a version; set allowUnversioned on the mount to bind them by size and time: %w",
			m.URL, o.Key, source.ErrUnversioned)
	}
	b.file(mount, dir, name, o)
	return b.err
}

// marker notes a directory marker for a directory that is already in the tree.
func (b *Builder) marker(mount int, dir uint32, o source.Object) {
	if o.Size > 0 {
		b.skips.add(MarkerContent, b.mounts[mount].URL, o.Key)
	}
	e := b.entries.at(dir)
	e.time = max(e.time, toNanos(o.ModTime))
}

func (b *Builder) file(mount int, dir uint32, name string, o source.Object) {
	e := entry{parent: dir, size: o.Size, time: toNanos(o.ModTime), mount: uint16(mount)}
	if sum, parts, upper, ok := pack(o.Version); ok {
		e.version, e.parts, e.flags = sum, parts, flagPacked
		if upper {
			e.flags |= flagUpper
		}
	} else if o.Version != "" {
		e.flags |= flagVersion
	}
	if d := o.Digest; d.Algorithm != source.None && len(d.Sum) > 0 {
		if e.flags&flagPacked != 0 && e.parts == 0 && d.Algorithm == source.MD5 && bytes.Equal(d.Sum, e.version[:]) {
			e.flags |= flagSame
		} else {
			e.flags |= flagDigest
		}
	}
	ok := true
	if e.flags&flagsInExtras != 0 {
		b.buf = appendExtra(b.buf[:0], e.flags, o.Version, o.Digest)
		if e.extra, _, ok = b.extras.add(b.buf); !ok {
			b.full()
			return
		}
	}
	b.insert(e, name)
}

// insert adds e under a name, which it copies and returns.
func (b *Builder) insert(e entry, name string) (uint32, string) {
	b.buf = append(b.buf[:0], name...)
	ref, kept, ok := b.names.add(b.buf)
	if !ok || b.entries.n == 1<<32-1 {
		b.full()
		return 0, ""
	}
	e.name, e.nameLen = ref, uint8(len(name))
	return b.entries.add(e), kept
}

func (b *Builder) full() {
	b.err = fmt.Errorf("dataset is too large for one snapshot (%d entries); split it by prefix into several datasets", b.entries.n)
}

// dirOf returns the directory rel of a mount, making it and those above it.
func (b *Builder) dirOf(mount int, rel string) uint32 {
	if mount == b.lastMount && rel == b.lastDir {
		return b.last
	}
	dir := b.roots[mount]
	if rel != "" {
		for name := range strings.SplitSeq(rel, "/") {
			dir = b.dir(dir, name, uint16(mount))
		}
	}
	b.lastMount, b.lastDir, b.last = mount, rel, dir
	return dir
}

func (b *Builder) dir(parent uint32, name string, mount uint16) uint32 {
	if d, ok := b.dirs[dirKey{parent, name}]; ok {
		return d
	}
	d, kept := b.insert(entry{parent: parent, time: noTime, mount: mount, flags: flagDir}, name)
	if b.err == nil {
		b.dirs[dirKey{parent, kept}] = d
	}
	return d
}

// Need is about how many bytes of the heap it takes to encode what was added, with the builder and what comes of it.
func (b *Builder) Need() int64 {
	const order = 16 // what Encode sorts by, of each entry
	text := int64(len(b.names.chunks)+len(b.extras.chunks)) << arenaBits
	return int64(len(b.entries.chunks))<<chunkBits*(entrySize+order+recordSize) + 2*text + int64(len(b.dirs))*dirSize
}

const (
	entrySize = int64(unsafe.Sizeof(entry{}))
	// dirSize is what a directory takes of the map of them at most, while that grows.
	dirSize = 128
)

// single makes the mount, below whose prefix nothing was found, one of the single object o.
func (b *Builder) single(mount int, o source.Object) error {
	if b.err == nil {
		b.mounts[mount].Prefix = o.Key[:strings.LastIndexByte(o.Key, '/')+1]
	}
	return b.Add(mount, o)
}

// same says whether two entries of one name are the same version of the object. The time is part of the
// version where there is no other.
func (b *Builder) same(x, y *entry) bool {
	return x.flags == y.flags && x.size == y.size && x.version == y.version && x.parts == y.parts &&
		b.extra(x) == b.extra(y) && (x.time == y.time || x.flags&(flagPacked|flagVersion) != 0)
}

func (b *Builder) name(e *entry) string { return b.names.get(e.name, int(e.nameLen)) }

// extra returns the encoded version and digest of e that have no room in the entry.
func (b *Builder) extra(e *entry) string {
	if e.flags&flagsInExtras == 0 {
		return ""
	}
	s := b.extras.from(e.extra)
	n := 0
	if e.flags&flagVersion != 0 {
		n += 2 + int(s[0]) + int(s[1])<<8
	}
	if e.flags&flagDigest != 0 {
		n += 2 + int(s[n+1])
	}
	return s[:n]
}

// compare orders the children of a directory by name, and those of one name by who is shown: a directory
// before a file, and the newest file before the others; the rest makes the order total.
func (b *Builder) compare(i, j uint32) int {
	x, y := b.entries.at(i), b.entries.at(j)
	if c := strings.Compare(b.name(x), b.name(y)); c != 0 {
		return c
	}
	return cmp.Or(
		cmp.Compare(y.flags&flagDir, x.flags&flagDir),
		cmp.Compare(y.time, x.time),
		cmp.Compare(y.size, x.size),
		bytes.Compare(y.version[:], x.version[:]),
		cmp.Compare(y.parts, x.parts),
		cmp.Compare(y.flags, x.flags),
		strings.Compare(b.extra(y), b.extra(x)),
	)
}
