package catalog

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Encode returns the snapshot of what was added. The time of creation is not part of its digest.
func (b *Builder) Encode(created time.Time) ([]byte, error) {
	if b.err != nil {
		return nil, b.err
	}
	skipped := b.skips.clone()
	order, firsts := b.order(skipped)

	m := meta{mounts: b.mounts, skipped: skipped.sorted()}
	for i, n := range b.seen {
		if n == 0 {
			m.notes = append(m.notes, fmt.Sprintf("%s/%s: nothing is there, so %s is empty; check the bucket and the prefix",
				b.mounts[i].URL, b.mounts[i].Prefix, b.mounts[i].Path))
		}
	}
	var names, extras int
	var total int64
	for _, i := range order {
		e := b.entries.at(i)
		if e.size > math.MaxInt64-total {
			return nil, fmt.Errorf("%s/%s: its size of %d bytes makes the dataset's overflow", b.mounts[e.mount].URL, b.key(i), e.size)
		}
		total += e.size
		names += int(e.nameLen)
		extras += len(b.extra(e))
	}
	tail := m.append(nil)
	if len(tail) > maxMeta {
		return nil, fmt.Errorf("the mounts of the dataset take %d bytes of its snapshot, of at most %d; split it into several datasets", len(tail), maxMeta)
	}
	if max(names, extras) > math.MaxUint32 {
		return nil, fmt.Errorf("dataset is too large for one snapshot (%d files and directories); split it by prefix into several datasets", len(order))
	}

	nameStart := headerSize + len(order)*recordSize
	extraStart := nameStart + names
	enc := make([]byte, extraStart+extras+len(tail))
	le := binary.LittleEndian
	copy(enc, magic)
	le.PutUint64(enc[createdOff:], uint64(toNanos(created)))
	le.PutUint32(enc[16:], uint32(len(order)))
	le.PutUint32(enc[20:], uint32(names))
	le.PutUint32(enc[24:], uint32(extras))
	le.PutUint32(enc[28:], uint32(len(tail)))
	copy(enc[extraStart+extras:], tail)

	record := func(i int) []byte { return enc[headerSize+i*recordSize:][:recordSize] }
	name, extra, dirs := nameStart, extraStart, 0
	for p, i := range order {
		e, r := b.entries.at(i), record(p)
		le.PutUint32(r[offName:], uint32(name-nameStart))
		le.PutUint64(r[offTime:], uint64(e.time))
		le.PutUint16(r[offMount:], e.mount)
		r[offFlags], r[offNameLen] = e.flags, e.nameLen
		if e.nameLen > 0 {
			name += copy(enc[name:], b.name(e))
		}
		if e.flags&flagDir != 0 {
			first, end := firsts[dirs], firsts[dirs+1]
			dirs++
			le.PutUint32(r[offSize:], first)
			le.PutUint32(r[offSize+4:], end-first)
			for c := first; c < end; c++ {
				le.PutUint32(record(int(c))[offParent:], uint32(p))
			}
			continue
		}
		le.PutUint64(r[offSize:], uint64(e.size))
		copy(r[offVersion:], e.version[:])
		le.PutUint32(r[offParts:], e.parts)
		if e.flags&flagsInExtras != 0 {
			le.PutUint32(r[offExtra:], uint32(extra-extraStart))
			extra += copy(enc[extra:], b.extra(e))
		}
	}
	// A directory is as new as the newest of what is below it. Parents come first, so go backwards.
	for p := len(order) - 1; p > 0; p-- {
		r := record(p)
		parent := record(int(le.Uint32(r[offParent:])))
		if t := int64(le.Uint64(r[offTime:])); t > int64(le.Uint64(parent[offTime:])) {
			le.PutUint64(parent[offTime:], uint64(t))
		}
	}
	return enc, nil
}

// order returns the entries that are shown, breadth first, and for each directory in that order the
// position of its first child, closed by the number of all. What loses its name to another is counted.
func (b *Builder) order(skipped skips) (order, firsts []uint32) {
	// Group by parent: a counting sort.
	n := b.entries.n
	start := make([]uint32, n+1)
	for i := uint32(1); i < n; i++ {
		start[b.entries.at(i).parent+1]++
	}
	for i := uint32(1); i <= n; i++ {
		start[i] += start[i-1]
	}
	children := make([]uint32, n-1)
	next := slices.Clone(start)
	for i := uint32(1); i < n; i++ {
		p := b.entries.at(i).parent
		children[next[p]] = i
		next[p]++
	}

	order = append(make([]uint32, 0, n), 0)
	for p := 0; p < len(order); p++ {
		i := order[p]
		if b.entries.at(i).flags&flagDir == 0 {
			continue
		}
		firsts = append(firsts, uint32(len(order)))
		group := children[start[i]:start[i+1]]
		slices.SortFunc(group, b.compare)
		for k, c := range group {
			e := b.entries.at(c)
			if k == 0 || b.name(e) != b.name(b.entries.at(order[len(order)-1])) {
				order = append(order, c)
				continue
			}
			shown := b.entries.at(order[len(order)-1])
			if b.same(shown, e) || b.same(b.entries.at(group[k-1]), e) {
				continue // the same version once more
			}
			reason := Duplicate
			if shown.flags&flagDir != 0 {
				reason = Shadowed
			}
			skipped.add(reason, b.mounts[e.mount].URL, b.key(c))
		}
	}
	return order, append(firsts, uint32(len(order)))
}

// key returns the key of the object that is entry i.
func (b *Builder) key(i uint32) string {
	e := b.entries.at(i)
	segments := []string{b.name(e)}
	for d := e.parent; d != b.roots[e.mount]; d = b.entries.at(d).parent {
		segments = append(segments, b.name(b.entries.at(d)))
	}
	slices.Reverse(segments)
	return b.mounts[e.mount].Prefix + strings.Join(segments, "/")
}
