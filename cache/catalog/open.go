package catalog

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/source"
)

// Open checks an encoded snapshot and reads it in place: encoded must not change afterwards. The caller
// compares the digest, if it asked for a certain snapshot.
func Open(encoded []byte) (*Snapshot, error) {
	s, err := parse(encoded)
	if err != nil {
		return nil, err
	}
	if err := s.checkTree(); err != nil {
		return nil, err
	}
	if err := s.checkMounts(); err != nil {
		return nil, err
	}
	s.digest = digestOf(encoded)
	return s, nil
}

// OpenFile opens a snapshot in a file, mapped into memory so that the processes of a node share it. The
// file must never be changed or truncated while it is open: write a new one beside it and rename.
func OpenFile(path string) (*Snapshot, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	if !st.Mode().IsRegular() || st.Size() < headerSize || st.Size() > math.MaxInt {
		return nil, fmt.Errorf("snapshot %s: %w: it is %d bytes of %s", path, ErrCorrupt, st.Size(), st.Mode())
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: cannot map it: %w", path, err)
	}
	s, err := Open(b)
	if err != nil {
		unix.Munmap(b)
		return nil, fmt.Errorf("snapshot %s: %w", path, err)
	}
	s.unmap = func() { unix.Munmap(b) }
	return s, nil
}

// parse splits the encoding into its parts.
func parse(encoded []byte) (*Snapshot, error) {
	if len(encoded) < headerSize || string(encoded[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: it does not start like one", ErrCorrupt)
	}
	le := binary.LittleEndian
	n := le.Uint32(encoded[16:])
	records := uint64(n) * recordSize
	names, extras, tail := uint64(le.Uint32(encoded[20:])), uint64(le.Uint32(encoded[24:])), uint64(le.Uint32(encoded[28:]))
	if n == 0 || headerSize+records+names+extras+tail != uint64(len(encoded)) {
		return nil, fmt.Errorf("%w: %d bytes do not fit its header; it may have been cut short", ErrCorrupt, len(encoded))
	}
	if tail > maxMeta {
		return nil, fmt.Errorf("%w: its list of mounts is %d bytes long, of at most %d", ErrCorrupt, tail, maxMeta)
	}
	s := &Snapshot{encoded: encoded, n: n, histogram: make([]int64, 64)}
	rest := encoded[headerSize:]
	s.records, rest = rest[:records:records], rest[records:]
	s.names, rest = rest[:names:names], rest[names:]
	s.extras, rest = rest[:extras:extras], rest[extras:]
	var err error
	if s.meta, err = readMeta(rest); err != nil {
		return nil, err
	}
	mounts, err := checkMounts(s.meta.mounts)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if !slices.Equal(mounts, s.meta.mounts) {
		return nil, fmt.Errorf("%w: a prefix does not end in a slash", ErrCorrupt)
	}
	return s, nil
}

// checkTree checks what every method relies on: that the records are one tree in breadth-first order with
// sorted, valid names, and that names and extras are used up in order and to the end. Parents come before
// their children, so that every way up ends.
func (s *Snapshot) checkTree() error {
	c := checker{s: s}
	if !c.node(0, "") {
		return fmt.Errorf("%w: root directory: %s", ErrCorrupt, c.problem)
	}
	next := uint64(1) // where the next directory's children begin
	levelEnd, depth := uint64(1), 0
	for i := Index(0); i < s.n; i++ {
		if uint64(i) == next {
			return fmt.Errorf("%w: node %d: in no directory", ErrCorrupt, i)
		}
		if uint64(i) == levelEnd {
			levelEnd = next
			if depth++; depth > maxDepth {
				return fmt.Errorf("%w: node %d: more than %d directories deep", ErrCorrupt, i, maxDepth)
			}
		}
		r := s.record(i)
		if !r.dir() {
			continue
		}
		first, count := r.children()
		if uint64(first) != next || next+uint64(count) > uint64(s.n) {
			return fmt.Errorf("%w: node %d: entries %d+%d are not where they belong", ErrCorrupt, i, first, count)
		}
		next += uint64(count)
		previous := ""
		for child := first; uint64(child) < next; child++ {
			if s.record(child).parent() != i {
				return fmt.Errorf("%w: node %d: its directory is not %d", ErrCorrupt, child, i)
			}
			if !c.node(child, previous) {
				return fmt.Errorf("%w: node %d: %s", ErrCorrupt, child, c.problem)
			}
			previous = s.name(s.record(child))
		}
	}
	if c.names != uint64(len(s.names)) || c.extras != uint64(len(s.extras)) {
		return fmt.Errorf("%w: bytes that belong to no node", ErrCorrupt)
	}
	return nil
}

// checker visits the nodes in order; it keeps how far names and extras are used.
type checker struct {
	s             *Snapshot
	names, extras uint64
	problem       string
}

// node checks one record by itself, and that its name comes after previous (except the root's).
func (c *checker) node(i Index, previous string) bool {
	s, r := c.s, c.s.record(i)
	if uint64(r.u32(offName)) != c.names || c.names+uint64(r[offNameLen]) > uint64(len(s.names)) {
		c.problem = "its name is not where it belongs"
		return false
	}
	c.names += uint64(r[offNameLen])
	name := s.name(r)
	if i == 0 {
		if name != "" || !r.dir() || r.parent() != 0 {
			c.problem = "is something else"
			return false
		}
	} else if c.problem = badName(name); c.problem != "" {
		return false
	} else if strings.IndexByte(name, '/') >= 0 || name <= previous {
		c.problem = "its name has a slash or is out of order"
		return false
	}

	flags, parts := r.flags(), r.u32(offParts)
	packed := [16]byte(r[offVersion:])
	ok := false
	switch {
	case flags&flagDir != 0:
		ok = flags == flagDir && packed == [16]byte{} && parts == 0
	case flags&flagPacked != 0:
		ok = flags&^flagsFile == 0 && flags&flagVersion == 0 && flags&(flagSame|flagDigest) != flagSame|flagDigest &&
			(flags&flagSame == 0 || parts == 0) && (flags&flagUpper == 0 || hasLetter(packed))
	default:
		ok = flags&^flagsFile == 0 && flags&(flagUpper|flagSame) == 0 && packed == [16]byte{} && parts == 0
	}
	if !ok {
		c.problem = "its version is not well-formed"
		return false
	}
	if flags&flagsInExtras == 0 {
		if r.u32(offExtra) != 0 {
			c.problem = "its version is not where it belongs"
			return false
		}
	} else {
		if uint64(r.u32(offExtra)) != c.extras || c.extras >= uint64(len(s.extras)) {
			c.problem = "its version is not where it belongs"
			return false
		}
		version, a, sum, n, ok := readExtra(s.extras[c.extras:], flags)
		if ok && flags&flagVersion != 0 && len(version) < 64 {
			_, _, _, packable := pack(string(version))
			ok = !packable
		}
		if ok && flags&flagPacked != 0 && parts == 0 {
			ok = a != source.MD5 || string(sum) != string(packed[:])
		}
		if !ok {
			c.problem = "its version or digest is not well-formed"
			return false
		}
		c.extras += uint64(n)
	}
	if flags&flagDir != 0 {
		return true
	}

	size := r.i64(offSize)
	if size < 0 || size > maxSize || size > math.MaxInt64-s.bytes {
		c.problem = fmt.Sprintf("size %d", size)
		return false
	}
	s.files++
	s.bytes += size
	s.histogram[bits.Len64(uint64(size))]++
	return true
}

func hasLetter(sum [16]byte) bool {
	for _, b := range sum {
		if b >= 0xa0 || b&0xf >= 0xa {
			return true
		}
	}
	return false
}

// checkMounts checks that the path of every mount is there and that every node belongs to the mount whose
// path it is below, since that is how a file's key is put together.
func (s *Snapshot) checkMounts() error {
	s.roots = make([]Index, len(s.meta.mounts))
	for m, mount := range s.meta.mounts {
		i, ok := s.Lookup(mount.Path)
		if !ok || s.record(i).mount() != uint16(m) || !s.record(i).dir() {
			return fmt.Errorf("%w: mount path %q is not in it", ErrCorrupt, mount.Path)
		}
		s.roots[m] = i
	}
	for i := Index(0); i < s.n; i++ {
		r := s.record(i)
		m, above := r.mount(), uint16(noMount)
		if i > 0 {
			above = s.record(r.parent()).mount()
		}
		switch {
		case above != noMount:
			if m == above {
				continue
			}
		case m == noMount:
			if r.dir() {
				continue
			}
		case int(m) < len(s.roots) && s.roots[m] == i:
			continue
		}
		return fmt.Errorf("%w: node %d: belongs to another mount", ErrCorrupt, i)
	}
	return nil
}
