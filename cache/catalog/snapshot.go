package catalog

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// Snapshot is an opened snapshot. It is immutable and safe for concurrent use.
type Snapshot struct {
	encoded []byte
	records []byte
	names   []byte
	extras  []byte
	meta    meta
	roots   []Index // the directory of each mount

	n         uint32
	files     int64
	bytes     int64
	histogram []int64
	digest    Digest

	mu     sync.Mutex
	unmap  func() // nil when the bytes are not mapped
	users  int    // who keep it
	closed bool
}

// Encoded returns the bytes that the snapshot is read from. They must not be changed.
func (s *Snapshot) Encoded() []byte { return s.encoded }

// Digest names the snapshot's content; see type Digest.
func (s *Snapshot) Digest() Digest { return s.digest }

// Created is when the listing began. The digest does not vouch for it.
func (s *Snapshot) Created() time.Time {
	return fromNanos(int64(binary.LittleEndian.Uint64(s.encoded[createdOff:])))
}

// Len returns the number of nodes, directories included; their indexes are [0, Len).
func (s *Snapshot) Len() int { return int(s.n) }

// Files returns the number of files.
func (s *Snapshot) Files() int64 { return s.files }

// Bytes returns the sum of the files' sizes.
func (s *Snapshot) Bytes() int64 { return s.bytes }

// Mounts returns the mounts, in the order they were given, with their prefixes as listed.
func (s *Snapshot) Mounts() []Mount { return slices.Clone(s.meta.mounts) }

// Skipped returns what could not be shown, by reason.
func (s *Snapshot) Skipped() []Skipped {
	out := slices.Clone(s.meta.skipped)
	for i := range out {
		out[i].Examples = slices.Clone(out[i].Examples)
	}
	return out
}

// Notes returns what a person should know of the listing, such as a prefix that no object has.
func (s *Snapshot) Notes() []string { return slices.Clone(s.meta.notes) }

// Histogram counts the files by size: entry k those of [2^(k-1), 2^k) bytes (k is bits.Len64 of the size),
// entry 0 the empty ones.
func (s *Snapshot) Histogram() []int64 { return slices.Clone(s.histogram) }

// Close gives the memory of a mapped file back, once nobody keeps it. But by those who do, nothing obtained from
// the snapshot but copies (paths, objects, digests) may be used after it, nor the snapshot itself.
func (s *Snapshot) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.settle()
}

// Keep has the snapshot stay usable for the caller until release, whoever closes it meanwhile. False: it is closed.
func (s *Snapshot) Keep() (release func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false
	}
	s.users++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.users--
		s.settle()
	}), true
}

// settle unmaps what nobody uses any more. s.mu is held.
func (s *Snapshot) settle() {
	if s.closed && s.users == 0 && s.unmap != nil {
		s.unmap()
		s.unmap = nil
	}
}

// record is a node's record; its methods read fields in place.
type record []byte

func (r record) u32(off int) uint32 { return binary.LittleEndian.Uint32(r[off:]) }
func (r record) i64(off int) int64  { return int64(binary.LittleEndian.Uint64(r[off:])) }
func (r record) mount() uint16      { return binary.LittleEndian.Uint16(r[offMount:]) }
func (r record) flags() uint8       { return r[offFlags] }
func (r record) dir() bool          { return r[offFlags]&flagDir != 0 }
func (r record) parent() Index      { return r.u32(offParent) }
func (r record) children() (first Index, count uint32) {
	return r.u32(offSize), r.u32(offSize + 4)
}

func (s *Snapshot) record(i Index) record {
	off := int(i) * recordSize
	return record(s.records[off : off+recordSize : off+recordSize])
}

// name returns the name of a record, without a copy.
func (s *Snapshot) name(r record) string {
	off := int(r.u32(offName))
	b := s.names[off : off+int(r[offNameLen])]
	return unsafe.String(unsafe.SliceData(b), len(b))
}

// Node describes node i; false if there is none.
func (s *Snapshot) Node(i Index) (Node, bool) {
	if i >= s.n {
		return Node{}, false
	}
	r := s.record(i)
	n := Node{Name: s.name(r), Dir: r.dir(), ModTime: fromNanos(r.i64(offTime)), Parent: r.parent()}
	if n.Dir {
		n.First, n.Count = r.children()
	} else {
		n.Size = r.i64(offSize)
	}
	return n, true
}

// Child finds the entry of a directory that has the given name.
func (s *Snapshot) Child(dir Index, name string) (Index, bool) {
	if dir >= s.n {
		return 0, false
	}
	r := s.record(dir)
	if !r.dir() {
		return 0, false
	}
	lo, count := r.children()
	end := lo + count
	for hi := end; lo < hi; {
		mid := lo + (hi-lo)/2
		switch c := strings.Compare(s.name(s.record(mid)), name); {
		case c == 0:
			return mid, true
		case c < 0:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return 0, false
}

// Lookup finds the node of a path in the dataset: "/", "/a/b" or "a/b". Paths are taken as they stand: "..",
// "//" or a slash at the end name nothing.
func (s *Snapshot) Lookup(path string) (Index, bool) {
	path = strings.TrimPrefix(path, "/")
	if path == "" {
		return 0, true
	}
	i := Index(0)
	for more := true; more; {
		var name string
		name, path, more = strings.Cut(path, "/")
		var ok bool
		if i, ok = s.Child(i, name); !ok {
			return 0, false
		}
	}
	return i, true
}

// Path returns the path of node i in the dataset; "/" for the root, "" if there is no such node.
func (s *Snapshot) Path(i Index) string {
	if i >= s.n {
		return ""
	}
	if i == 0 {
		return "/"
	}
	return s.join("/", i, 0)
}

// join returns prefix and the names from below the directory top down to node i.
func (s *Snapshot) join(prefix string, i, top Index) string {
	n := len(prefix) - 1 // of the slashes between the names there is one less than names
	for k := i; k != top; {
		r := s.record(k)
		n += 1 + int(r[offNameLen])
		k = r.parent()
	}
	b := make([]byte, n)
	copy(b, prefix)
	for k := i; k != top; {
		r := s.record(k)
		name := s.name(r)
		n -= len(name)
		copy(b[n:], name)
		if k = r.parent(); k != top {
			n--
			b[n] = '/'
		}
	}
	return unsafe.String(unsafe.SliceData(b), len(b))
}

// Object returns the object of file i and the mount it belongs to; false for a directory.
func (s *Snapshot) Object(i Index) (mount int, o source.Object, ok bool) {
	if i >= s.n {
		return 0, source.Object{}, false
	}
	r := s.record(i)
	if r.dir() {
		return 0, source.Object{}, false
	}
	mount = int(r.mount())
	o = source.Object{
		Key:     s.join(s.meta.mounts[mount].Prefix, i, s.roots[mount]),
		Size:    r.i64(offSize),
		ModTime: fromNanos(r.i64(offTime)),
	}
	flags, packed := r.flags(), r[offVersion:offVersion+16]
	if flags&flagPacked != 0 {
		o.Version = unpack(packed, r.u32(offParts), flags&flagUpper != 0)
	}
	if flags&flagSame != 0 {
		o.Digest = source.Digest{Algorithm: source.MD5, Sum: slices.Clone(packed)}
	}
	if flags&flagsInExtras != 0 {
		version, a, sum, _, _ := readExtra(s.extras[r.u32(offExtra):], flags)
		if flags&flagVersion != 0 {
			o.Version = string(version)
		}
		if flags&flagDigest != 0 {
			o.Digest = source.Digest{Algorithm: a, Sum: slices.Clone(sum)}
		}
	}
	return mount, o, true
}

// Ring returns what placement and store need to know of file i; false for a directory. Its ID is what
// source.Identify says of the object; an object without a version is identified by its time in the
// version's place, so that the bytes of two times never mix.
func (s *Snapshot) Ring(i Index) (ring.Object, bool) {
	mount, o, ok := s.Object(i)
	if !ok {
		return ring.Object{}, false
	}
	if o.Version == "" {
		o.Version = "time:" + strconv.FormatInt(toNanos(o.ModTime), 10)
	}
	return ring.Object{ID: source.Identify(s.meta.mounts[mount].URL, o), Size: o.Size}, true
}

// Walk calls f for the files below dir, directory by directory in the order of names, until f returns
// false. If dir is a file, it is the one.
func (s *Snapshot) Walk(dir Index, f func(Index) bool) { s.walk(dir, false, f) }

// WalkAll is Walk that calls f for the directories below dir too, each before what is in it.
func (s *Snapshot) WalkAll(dir Index, f func(Index) bool) { s.walk(dir, true, f) }

func (s *Snapshot) walk(dir Index, dirs bool, f func(Index) bool) {
	if dir >= s.n {
		return
	}
	// Parents and neighbours are enough to find the way: no stack.
	for i := dir; ; {
		r := s.record(i)
		if (!r.dir() || dirs && i != dir) && !f(i) {
			return
		}
		if r.dir() {
			if first, count := r.children(); count > 0 {
				i = first
				continue
			}
		}
		for { // on to the next neighbour, of the node or of the nearest directory above that has one
			if i == dir {
				return
			}
			parent := s.record(i).parent()
			first, count := s.record(parent).children()
			if i+1 < first+count {
				i++
				break
			}
			i = parent
		}
	}
}

// digestOf hashes an encoding with its time of creation set to zero.
func digestOf(encoded []byte) Digest {
	var zero [8]byte
	h := sha256.New()
	h.Write(encoded[:createdOff])
	h.Write(zero[:])
	h.Write(encoded[createdOff+8:])
	return Digest(h.Sum(nil))
}
