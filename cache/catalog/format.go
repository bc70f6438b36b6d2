package catalog

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// The encoding, little-endian:
//
//	header   magic [8], created i64, nodes u32, and the lengths u32 of names, extras and meta
//	records  nodes × recordSize, breadth first
//	names    the nodes' names, one after the other
//	extras   versions and digests that have no room in a record, one after the other
//	meta     mounts, skipped keys, notes
//
// Every byte is determined by what is encoded: there are no gaps and no choices, so that equal content
// means an equal digest, and Open refuses everything else.
const (
	magic      = "SCSNAP\x00\x01"
	headerSize = 32
	createdOff = 8

	recordSize = 52
	offName    = 0  // u32: start in names
	offParent  = 4  // u32
	offSize    = 8  // i64: a file's size; a directory's first child u32 and number of children u32
	offTime    = 16 // i64: Unix nanoseconds, noTime if unknown
	offVersion = 24 // [16]: an MD5 as version
	offParts   = 40 // u32: the number of parts that follows it ("MD5-12"), or 0
	offExtra   = 44 // u32: start in extras, if the flags say so
	offMount   = 48 // u16: the mount; noMount for directories above the mounts
	offFlags   = 50 // u8
	offNameLen = 51 // u8

	noMount = math.MaxUint16
	noTime  = math.MinInt64

	maxVersion = 1024
	maxSum     = 64
	// maxMeta bounds what is unpacked, which takes several times as much memory and may come from anybody's program. The
	// largest of a Dataset, with 32 mounts and notes and the longest examples of each kind of skipped key, is half of it.
	maxMeta = 4 << 20
)

// Flags of a record. A version is empty, packed (32 hex digits, the way almost every store writes an
// ETag) or in extras; a digest is absent, the packed version itself or in extras.
const (
	flagDir       = 1 << iota
	flagPacked    // the version is packed
	flagUpper     // its hex digits are in upper case (OSS)
	flagVersion   // the version is in extras
	flagSame      // the digest is MD5 and equal to the packed version, which has no parts
	flagDigest    // the digest is in extras
	flagsFile     = flagPacked | flagUpper | flagVersion | flagSame | flagDigest
	flagsInExtras = flagVersion | flagDigest
)

// pack splits a version of the form hex MD5, or hex MD5 "-" parts. Only what unpack gives back is packed.
func pack(v string) (sum [16]byte, parts uint32, upper, ok bool) {
	head, tail, multi := strings.Cut(v, "-")
	if len(head) != 32 {
		return
	}
	lower := false
	for _, c := range []byte(head) {
		upper = upper || c >= 'A' && c <= 'F'
		lower = lower || c >= 'a' && c <= 'f'
	}
	if upper && lower {
		return
	}
	if _, err := hex.Decode(sum[:], []byte(head)); err != nil {
		return
	}
	if multi {
		n, err := strconv.ParseUint(tail, 10, 32)
		if err != nil || n == 0 || strconv.FormatUint(n, 10) != tail {
			return
		}
		parts = uint32(n)
	}
	return sum, parts, upper, true
}

func unpack(sum []byte, parts uint32, upper bool) string {
	var b [32 + 1 + 10]byte
	v := hex.AppendEncode(b[:0], sum)
	if upper {
		for i, c := range v {
			if c >= 'a' {
				v[i] = c - 'a' + 'A'
			}
		}
	}
	if parts > 0 {
		v = strconv.AppendUint(append(v, '-'), uint64(parts), 10)
	}
	return string(v)
}

// appendExtra encodes what the flags say belongs in extras.
func appendExtra(b []byte, flags uint8, version string, d source.Digest) []byte {
	if flags&flagVersion != 0 {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(version)))
		b = append(b, version...)
	}
	if flags&flagDigest != 0 {
		b = append(b, byte(d.Algorithm), byte(len(d.Sum)))
		b = append(b, d.Sum...)
	}
	return b
}

// readExtra decodes an entry at the start of b and returns its length. The results alias b.
func readExtra(b []byte, flags uint8) (version []byte, a source.Algorithm, sum []byte, n int, ok bool) {
	if flags&flagVersion != 0 {
		if len(b) < 2 {
			return
		}
		l := int(binary.LittleEndian.Uint16(b))
		if l == 0 || l > maxVersion || len(b)-2 < l {
			return
		}
		version, n = b[2:2+l], 2+l
	}
	if flags&flagDigest != 0 {
		r := b[n:]
		if len(r) < 2 {
			return
		}
		l := int(r[1])
		if r[0] == byte(source.None) || l == 0 || l > maxSum || len(r)-2 < l {
			return
		}
		a, sum = source.Algorithm(r[0]), r[2:2+l]
		n += 2 + l
	}
	return version, a, sum, n, true
}

// Times outside these bounds do not fit Unix nanoseconds and are moved to the nearest that does.
var (
	minTime = time.Unix(0, math.MinInt64+1)
	maxTime = time.Unix(0, math.MaxInt64)
)

func toNanos(t time.Time) int64 {
	switch {
	case t.IsZero():
		return noTime
	case t.Before(minTime):
		t = minTime
	case t.After(maxTime):
		t = maxTime
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == noTime {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// meta is the part of a snapshot that is unpacked when it is opened.
type meta struct {
	mounts  []Mount
	skipped []Skipped
	notes   []string
}

func (m meta) append(b []byte) []byte {
	u32 := func(n int) { b = binary.LittleEndian.AppendUint32(b, uint32(n)) }
	str := func(s string) { u32(len(s)); b = append(b, s...) }
	u32(len(m.mounts))
	for _, m := range m.mounts {
		str(m.URL)
		str(m.Prefix)
		str(m.Path)
		if m.AllowUnversioned {
			u32(1)
		} else {
			u32(0)
		}
	}
	u32(len(m.skipped))
	for _, s := range m.skipped {
		str(s.Reason)
		b = binary.LittleEndian.AppendUint64(b, uint64(s.Count))
		u32(len(s.Examples))
		for _, e := range s.Examples {
			str(e)
		}
	}
	u32(len(m.notes))
	for _, n := range m.notes {
		str(n)
	}
	return b
}

func readMeta(b []byte) (m meta, err error) {
	short := false
	u32 := func() int {
		if len(b) < 4 {
			short, b = true, nil
			return 0
		}
		n := binary.LittleEndian.Uint32(b)
		b = b[4:]
		return int(n)
	}
	// count reads the length of a list whose entries take at least min bytes each, so that a length that
	// was made up costs no memory.
	count := func(min int) int {
		n := u32()
		if n > len(b)/min {
			short = true
			return 0
		}
		return n
	}
	str := func() string {
		n := count(1)
		s := string(b[:n])
		b = b[n:]
		return s
	}
	for range count(16) {
		mount := Mount{URL: str(), Prefix: str(), Path: str()}
		allow := u32()
		mount.AllowUnversioned = allow == 1
		short = short || allow > 1
		m.mounts = append(m.mounts, mount)
	}
	for range count(16) {
		s := Skipped{Reason: str()}
		if len(b) < 8 {
			short = true
			break
		}
		s.Count = int64(binary.LittleEndian.Uint64(b))
		short = short || s.Count <= 0
		b = b[8:]
		for range count(4) {
			s.Examples = append(s.Examples, str())
		}
		m.skipped = append(m.skipped, s)
	}
	for range count(4) {
		m.notes = append(m.notes, str())
	}
	if short || len(b) > 0 {
		return meta{}, fmt.Errorf("%w: its list of mounts is damaged", ErrCorrupt)
	}
	return m, nil
}
