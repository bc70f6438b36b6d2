package catalog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source"
)

// awkward is a snapshot with one of everything the encoding knows.
func awkward(t testing.TB) *Snapshot {
	mounts := []Mount{
		{URL: "s3://one", Prefix: "p/", Path: "/a/b"},
		{URL: "oss://two", Path: "/c", AllowUnversioned: true},
		{URL: "file:///three", Prefix: "none/", Path: "/d"},
	}
	plain := object("p/plain", 100)
	parts := object("p/parts", 5<<30)
	parts.Version, parts.Digest = plain.Version+"-640", source.Digest{}
	upper := object("p/x/upper", 7)
	upper.Version = strings.ToUpper(upper.Version)
	crc := object("p/x/crc", 8)
	crc.Digest = source.Digest{Algorithm: source.CRC64ECMA, Sum: []byte("12345678")}
	sha := object("p/x/y/sha", 9)
	sha.Version, sha.Digest = "null", source.Digest{Algorithm: source.SHA256, Sum: bytes.Repeat([]byte{7}, 32)}
	id := object("p/x/y/id", 0)
	id.Version, id.Digest = strings.Repeat("v", maxVersion), source.Digest{}
	bare := object("bare", 3)
	bare.Version, bare.Digest, bare.ModTime = "", source.Digest{}, time.Time{}
	return build(t, mounts,
		[]source.Object{plain, parts, upper, crc, sha, id, object("p/empty/", 0), object("p//", 1), object("p/x", 2), object("p/\xff\n", 6)},
		[]source.Object{bare, object("z/../z", 1), object("z/ok", 4)}, nil)
}

// use calls every method on every node, and checks what holds of all snapshots.
func use(t testing.TB, s *Snapshot) {
	t.Helper()
	tree(t, s)
	for i := range Index(s.Len()) {
		n, _ := s.Node(i)
		r, isFile := s.Ring(i)
		m, o, _ := s.Object(i)
		if isFile && (r.Size != o.Size || !strings.HasPrefix(o.Key, s.Mounts()[m].Prefix)) {
			t.Errorf("node %d: %+v, %+v", i, r, o)
		}
		for _, name := range []string{"", "\x00", n.Name + "\x00", "/", ".."} {
			if c, ok := s.Child(i, name); ok {
				t.Errorf("%q in %d is %d", name, i, c)
			}
		}
		stop := 0
		s.Walk(i, func(Index) bool { stop++; return stop < 3 })
	}
	for _, i := range []Index{Index(s.Len()), Index(s.Len()) + 1, 1<<32 - 1} {
		_, node := s.Node(i)
		_, _, object := s.Object(i)
		_, r := s.Ring(i)
		_, child := s.Child(i, "a")
		s.Walk(i, func(Index) bool { t.Errorf("walked below node %d of %d", i, s.Len()); return false })
		if node || object || r || child || s.Path(i) != "" {
			t.Errorf("node %d of %d exists", i, s.Len())
		}
	}
	var files int64
	for _, n := range s.Histogram() {
		files += n
	}
	if files != s.Files() || s.Bytes() < 0 {
		t.Errorf("histogram has %d of %d files; %d bytes", files, s.Files(), s.Bytes())
	}
	s.Created()
	s.Skipped()
	s.Notes()
}

func TestWhatIsEncodedComesBack(t *testing.T) {
	s := awkward(t)
	use(t, s)
	again, err := Open(bytes.Clone(s.Encoded()))
	if err != nil || again.Digest() != s.Digest() || !again.Created().Equal(day0) {
		t.Fatalf("%v", err)
	}
	// Building it from its own objects gives the same tree and versions.
	b := NewBuilder(s.Mounts())
	s.Walk(0, func(i Index) bool {
		m, o, _ := s.Object(i)
		if err := b.Add(m, o); err != nil {
			t.Error(err)
		}
		return true
	})
	encoded, err := b.Encode(day0)
	if err != nil {
		t.Fatal(err)
	}
	rebuilt, err := Open(encoded)
	if err != nil {
		t.Fatal(err)
	}
	var versions int
	s.Walk(0, func(i Index) bool {
		j, _ := rebuilt.Lookup(s.Path(i))
		_, x, _ := s.Object(i)
		_, y, _ := rebuilt.Object(j)
		if !cmp.Equal(x, y) {
			t.Errorf("%+v became %+v", x, y)
		}
		versions++
		return true
	})
	if versions != 9 || rebuilt.Files() != s.Files() {
		t.Errorf("%d files, rebuilt %d", versions, rebuilt.Files())
	}
}

func TestVersionsComeBackAsTheyWere(t *testing.T) {
	const md5 = "0123456789abcdef0123456789abcdef"
	for _, v := range []string{
		md5, strings.ToUpper(md5), md5 + "-1", strings.ToUpper(md5) + "-10000", md5 + "-4294967295", strings.Repeat("0", 32), // packed
		md5 + "-0", md5 + "-01", md5 + "-", md5 + "-4294967296", md5 + "-+1", md5 + "--1", "0123456789ABCDEF0123456789abcdef", // not
		md5[1:], md5 + "0", "x" + md5[1:], "null", "-", "\"" + md5 + "\"", "\xff\x00", "fe01:12:34", strings.Repeat("v", maxVersion),
	} {
		for _, d := range []source.Digest{
			{}, {Algorithm: source.MD5, Sum: []byte("\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef")},
			{Algorithm: source.MD5, Sum: make([]byte, 16)}, {Algorithm: source.CRC32C, Sum: []byte{1, 2, 3, 4}},
		} {
			o := source.Object{Key: "k", Size: 1, Version: v, ModTime: day0, Digest: d}
			s := build(t, root, []source.Object{o})
			if _, got, ok := s.Object(1); !ok || !cmp.Equal(got, o) {
				t.Errorf("%+v became %+v", o, got)
			}
		}
	}
}

func TestTimes(t *testing.T) {
	old, recent := object("d/old", 1), object("d/e/new", 1)
	old.ModTime, recent.ModTime = time.Unix(0, 5), time.Unix(100, 0)
	marker := object("m/", 0)
	zero := object("zero", 1)
	zero.ModTime = time.Time{}
	ancient, far := object("x/ancient", 1), object("y/far", 1)
	ancient.ModTime, far.ModTime = time.Date(1066, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)
	s := build(t, root, []source.Object{old, recent, marker, zero, ancient, far})
	for p, want := range map[string]time.Time{"d/old": old.ModTime, "d": recent.ModTime, "d/e": recent.ModTime, "m": day0, "zero": {}, "x": minTime, "y": maxTime, "/": maxTime} {
		i, ok := s.Lookup(p)
		if n, _ := s.Node(i); !ok || !n.ModTime.Equal(want) {
			t.Errorf("%s: %v, want %v", p, n.ModTime, want)
		}
	}
}

func TestLookup(t *testing.T) {
	s := build(t, root, objects("a/b/c", "a/b2", "d"))
	for p, want := range map[string]bool{
		"": true, "/": true, "/a": true, "a": true, "a/b/c": true, "/a/b/c": true, "d": true,
		"//": false, "/a/": false, "a//b": false, "/a/../d": false, ".": false, "d/x": false, "a/b/c/d": false, "a/b1": false, "A": false, "//a": false,
	} {
		if i, ok := s.Lookup(p); ok != want {
			t.Errorf("%q: %d, %v", p, i, ok)
		}
	}
}

func TestWalkIsInPathOrderAndStops(t *testing.T) {
	s := build(t, root, objects("b/2", "b/1/x", "b-", "a", "c/d/", "c/e", "b/3"))
	want := []string{"/a", "/b/1/x", "/b/2", "/b/3", "/b-", "/c/e"}
	walk := func(dir string, n int) (paths []string) {
		i, _ := s.Lookup(dir)
		s.Walk(i, func(i Index) bool { paths = append(paths, s.Path(i)); return len(paths) != n })
		return
	}
	for dir, part := range map[string][]string{"/": want, "b": want[1:4], "b/1": {"/b/1/x"}, "c": {"/c/e"}, "c/d": nil, "b/2": {"/b/2"}} {
		if diff := cmp.Diff(part, walk(dir, -1)); diff != "" {
			t.Errorf("%s: %s", dir, diff)
		}
	}
	if got := walk("/", 2); !slices.Equal(got, want[:2]) {
		t.Errorf("stopped after two: %q", got)
	}
	walk = func(dir string, n int) (paths []string) {
		i, _ := s.Lookup(dir)
		s.WalkAll(i, func(i Index) bool { paths = append(paths, s.Path(i)); return len(paths) != n })
		return
	}
	want = []string{"/a", "/b", "/b/1", "/b/1/x", "/b/2", "/b/3", "/b-", "/c", "/c/d", "/c/e"}
	for dir, part := range map[string][]string{"/": want, "b": want[2:6], "c": want[8:], "c/d": nil, "b/2": {"/b/2"}} {
		if diff := cmp.Diff(part, walk(dir, -1)); diff != "" {
			t.Errorf("with directories, %s: %s", dir, diff)
		}
	}
	if got := walk("/", 2); !slices.Equal(got, want[:2]) {
		t.Errorf("stopped at a directory: %q", got)
	}
}

func TestHistogram(t *testing.T) {
	var given []source.Object
	for i, size := range []int64{0, 1, 1, 2, 3, 4, 1 << 20, 1<<20 - 1, maxSize} {
		given = append(given, object(fmt.Sprint(i), size))
	}
	h := build(t, root, given).Histogram()
	want := make([]int64, 64)
	want[0], want[1], want[2], want[3], want[20], want[21], want[47] = 1, 2, 2, 1, 1, 1, 1
	if diff := cmp.Diff(want, h); diff != "" {
		t.Error(diff)
	}
}

func TestAccessorsGiveCopies(t *testing.T) {
	s := awkward(t)
	s.Mounts()[0].URL = "x"
	s.Histogram()[0] = 99
	s.Skipped()[0].Examples[0] = "x"
	s.Notes()[0] = "x"
	i, _ := s.Lookup("/a/b/plain")
	_, o, _ := s.Object(i)
	clear(o.Digest.Sum)
	if _, again, _ := s.Object(i); bytes.Equal(again.Digest.Sum, o.Digest.Sum) || s.Mounts()[0].URL == "x" || s.Histogram()[0] == 99 ||
		s.Skipped()[0].Examples[0] == "x" || s.Notes()[0] == "x" {
		t.Error("the snapshot was changed")
	}
}

func TestSumOfSizesDoesNotOverflow(t *testing.T) {
	const n = 1 << 63 / maxSize
	b := NewBuilder(root)
	for i := range n {
		if err := b.Add(0, object(fmt.Sprintf("%06d", i), maxSize)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Encode(day0); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("s3://bucket/%06d: its size", n-1)) {
		t.Errorf("2^63 bytes: %v", err)
	}
	var objects []source.Object
	for i := range n {
		objects = append(objects, object(fmt.Sprintf("%06d", i), maxSize))
	}
	objects[n-1].Size = 1
	one := build(t, root, objects).Encoded()
	binary.LittleEndian.PutUint64(one[headerSize+n*recordSize+offSize:], maxSize)
	if _, err := Open(one); !errors.Is(err, ErrCorrupt) {
		t.Errorf("2^63 bytes, encoded: %v", err)
	}
}

// A listing, or a snapshot of somebody else's making, that claims a size beyond any store's must not have the
// tier keep account of as many blocks.
func TestAnObjectTooLargeForAnyStoreIsCounted(t *testing.T) {
	for _, size := range []int64{maxSize + 1, 1<<63 - 1} {
		s := build(t, root, []source.Object{object("big", size), object("least", maxSize), object("small", 1)})
		if _, ok := s.Lookup("/big"); ok || s.Files() != 2 {
			t.Errorf("%d bytes: it is shown beside %d files", size, s.Files()-1)
		}
		if k := s.Skipped(); len(k) != 1 || k[0].Reason != LargeFile || k[0].Count != 1 || !strings.HasSuffix(k[0].Examples[0], "/big") {
			t.Errorf("%d bytes: skipped %+v", size, k)
		}
		b := slices.Clone(s.Encoded())
		i, _ := s.Lookup("/small")
		binary.LittleEndian.PutUint64(b[headerSize+int(i)*recordSize+offSize:], uint64(size))
		if _, err := Open(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d bytes, encoded: %v", size, err)
		}
	}
}

// Each of these once passed one check and must fail another.
func TestOpenRefusesEveryDamage(t *testing.T) {
	good := awkward(t).Encoded()
	le := binary.LittleEndian
	s := awkward(t)
	at := func(p string) int {
		i, ok := s.Lookup(p)
		if !ok {
			t.Fatal(p)
		}
		return headerSize + int(i)*recordSize
	}
	u32 := func(off int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { le.PutUint32(b[off:], v); return b }
	}
	for name, damage := range map[string]func([]byte) []byte{
		"empty":               func(b []byte) []byte { return nil },
		"only a header":       func(b []byte) []byte { return b[:headerSize] },
		"another magic":       func(b []byte) []byte { b[7]++; return b },
		"no nodes":            u32(16, 0),
		"too many nodes":      u32(16, 1<<32-1),
		"names too long":      u32(20, 1<<32-1),
		"a byte more":         func(b []byte) []byte { return append(b, 0) },
		"root is a file":      func(b []byte) []byte { b[headerSize+offFlags] = 0; return b },
		"root has a parent":   u32(headerSize+offParent, 1),
		"root is its own son": u32(headerSize+offSize, 0),
		"cycle":               u32(at("/a")+offSize, 0),
		"children elsewhere":  u32(at("/a")+offSize, 1<<32-1),
		"too many children":   u32(at("/a")+offSize+4, 1<<32-1),
		"no children":         u32(at("/a")+offSize+4, 0),
		"another parent":      u32(at("/a/b/plain")+offParent, 0),
		"parent beyond":       u32(at("/a/b/plain")+offParent, 1<<31),
		"name elsewhere":      u32(at("/a/b/plain")+offName, 0),
		"unknown flag":        func(b []byte) []byte { b[at("/a/b/plain")+offFlags] |= 1 << 6; return b },
		"file is a directory": func(b []byte) []byte { b[at("/a/b/plain")+offFlags] = flagDir; return b },
		"negative size":       func(b []byte) []byte { b[at("/a/b/plain")+offSize+7] = 0x80; return b },
		"mount beyond":        func(b []byte) []byte { le.PutUint16(b[at("/a/b/plain")+offMount:], 3); return b },
		"another mount":       func(b []byte) []byte { le.PutUint16(b[at("/a/b/plain")+offMount:], 1); return b },
		"no mount":            func(b []byte) []byte { le.PutUint16(b[at("/a/b/plain")+offMount:], noMount); return b },
		"mount root is none":  func(b []byte) []byte { le.PutUint16(b[at("/c")+offMount:], noMount); return b },
		"extra elsewhere":     u32(at("/a/b/x/crc")+offExtra, 1),
		"extra beyond":        u32(at("/a/b/x/crc")+offExtra, 1<<32-1),
		"extra of none":       u32(at("/a/b/plain")+offExtra, 1),
		"parts and digest":    u32(at("/a/b/plain")+offParts, 2),
		"upper without hex":   func(b []byte) []byte { b[at("/a/b/x/y/sha")+offFlags] |= flagUpper; return b },
		"swapped names":       func(b []byte) []byte { return bytes.Replace(b, []byte("partsplain"), []byte("plainparts"), 1) },
		"equal names":         func(b []byte) []byte { return bytes.Replace(b, []byte("partsplain"), []byte("plainplain"), 1) },
		"slash in a name":     func(b []byte) []byte { return bytes.Replace(b, []byte("partsplain"), []byte("par/splain"), 1) },
		"NUL in a name":       func(b []byte) []byte { return bytes.Replace(b, []byte("partsplain"), []byte("par\x00splain"), 1) },
		"mount path moved":    func(b []byte) []byte { return bytes.Replace(b, []byte("/a/b"), []byte("/a/x"), 1) },
		"mount path bad":      func(b []byte) []byte { return bytes.Replace(b, []byte("/a/b"), []byte("/a//"), 1) },
		"prefix is no folder": func(b []byte) []byte { return bytes.Replace(b, []byte("none/"), []byte("none_"), 1) },
	} {
		b := damage(bytes.Clone(good))
		if bytes.Equal(b, good) {
			t.Errorf("%s: nothing was damaged", name)
		}
		if _, err := Open(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for n := range good {
		if _, err := Open(good[:n]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("cut to %d of %d bytes: %v", n, len(good), err)
		}
	}
}

// A flipped byte is refused, or gives another snapshot that is sound in itself (another digest; only the
// time of creation is outside of it).
func TestOpenOfEveryFlippedByte(t *testing.T) {
	s := awkward(t)
	good := bytes.Clone(s.Encoded())
	for i := range good {
		for _, x := range []byte{0x01, 0x80, 0xff} {
			good[i] ^= x
			if o, err := Open(good); err == nil {
				use(t, o)
				if same := i >= createdOff && i < createdOff+8; same != (o.Digest() == s.Digest()) {
					t.Errorf("byte %d ^ %#x: the same digest: %v", i, x, !same)
				}
			} else if !errors.Is(err, ErrCorrupt) {
				t.Errorf("byte %d ^ %#x: %v", i, x, err)
			}
			good[i] ^= x
		}
	}
}

// A chain of directories deeper than any path would make every Path a long climb.
func TestOpenRefusesBottomlessDirectories(t *testing.T) {
	const n = maxDepth + 2
	encoded := make([]byte, headerSize, headerSize+n*(recordSize+1)+100)
	le := binary.LittleEndian
	copy(encoded, magic)
	for i := range uint32(n) {
		r := make([]byte, recordSize)
		le.PutUint64(r[offTime:], 1)
		r[offFlags] = flagDir
		le.PutUint32(r[offSize:], i+1)
		if i < n-1 {
			le.PutUint32(r[offSize+4:], 1)
		}
		if i > 0 {
			le.PutUint32(r[offParent:], i-1)
			le.PutUint32(r[offName:], i-1)
			r[offNameLen] = 1
		}
		encoded = append(encoded, r...)
	}
	encoded = append(encoded, bytes.Repeat([]byte("d"), n-1)...)
	tail := meta{mounts: []Mount{{URL: "s3://b", Path: "/"}}}.append(nil)
	encoded = append(encoded, tail...)
	le.PutUint32(encoded[16:], n)
	le.PutUint32(encoded[20:], n-1)
	le.PutUint32(encoded[28:], uint32(len(tail)))
	if _, err := Open(encoded); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "deep") {
		t.Errorf("%d directories deep: %v", n-1, err)
	}
}

func TestOpenFile(t *testing.T) {
	s := awkward(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "snapshot")
	if err := os.WriteFile(path, s.Encoded(), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	use(t, f)
	if f.Digest() != s.Digest() || f.unmap == nil {
		t.Error("the file is another snapshot, or not mapped")
	}
	i, _ := f.Lookup("/a/b/x/y/sha")
	p := f.Path(i)
	_, o, _ := f.Object(i)
	f.Close()
	f.Close()
	if p != "/a/b/x/y/sha" || o.Key != "p/x/y/sha" || o.Version != "null" || o.Digest.Sum[0] != 7 { // copies outlive Close
		t.Errorf("%s, %+v", p, o)
	}

	if _, err := OpenFile(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := OpenFile(dir); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), dir) {
		t.Errorf("a folder: %v", err)
	}
	for _, n := range []int{0, 1, headerSize, len(s.Encoded()) - 1} {
		os.WriteFile(path, s.Encoded()[:n], 0o600)
		if _, err := OpenFile(path); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), path) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestLookupsDoNotAllocate(t *testing.T) {
	s := awkward(t)
	i, _ := s.Lookup("/a/b/x/y/sha")
	if n := testing.AllocsPerRun(100, func() {
		s.Lookup("/a/b/x/y/sha")
		s.Node(i)
		s.Walk(0, func(Index) bool { return true })
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { s.Path(i) }); n > 1 {
		t.Errorf("path: %v allocations", n)
	}
}

// Files of snapshots outlive an upgrade, and workers and mounts of two versions exchange them: whoever
// changes the layout changes magic too. (The words of a reason or a note may change.)
func TestEncodingIsFixed(t *testing.T) {
	const want = "fc77c3aaffc1abb0fa642cf7e88a7177b2789f69f67b655512fadbb8d8773a5f"
	if got := fmt.Sprintf("%x", awkward(t).Digest()); got != want {
		t.Errorf("digest %s, was %s", got, want)
	}
}

// Whoever keeps a mapped snapshot may use it although another has closed it; the last one gives the memory back.
func TestWhoKeepsASnapshotMayUseItAfterItIsClosed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kept.snapshot")
	want := awkward(t)
	if err := os.WriteFile(path, want.Encoded(), 0o600); err != nil {
		t.Fatal(err)
	}
	mapped := func() bool {
		b, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Skipf("what is mapped cannot be seen: %v", err)
		}
		return bytes.Contains(b, []byte(path))
	}
	s, err := OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	one, ok := s.Keep()
	two, also := s.Keep()
	if !ok || !also || !mapped() {
		t.Fatal("it cannot be kept")
	}
	s.Close()
	s.Close()
	one()
	one()
	if !mapped() {
		t.Fatal("it is unmapped although somebody keeps it")
	}
	use(t, s)
	if _, ok := s.Keep(); ok {
		t.Error("a closed snapshot can be kept")
	}
	two()
	if mapped() {
		t.Error("it stays mapped although nobody keeps it")
	}
}

// A snapshot may come from anybody's program: bytes that are unpacked, to several times their size, are few.
func TestOpenRefusesMoreThanIsUnpacked(t *testing.T) {
	for more, want := range map[int]bool{0: true, maxMeta: false} {
		s := awkward(t)
		m := s.meta
		// Notes that are empty: four zero bytes each.
		m.notes = make([]string, (maxMeta-len(m.append(nil)))/4+len(m.notes)+more/4)
		tail := m.append(nil)
		enc := slices.Concat(s.encoded[:len(s.encoded)-len(s.meta.append(nil))], tail)
		binary.LittleEndian.PutUint32(enc[28:], uint32(len(tail)))
		if _, err := Open(enc); (err == nil) != want || !want && !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d bytes: %v", len(tail), err)
		}
	}
}

// What is left out of a listing is told within those bytes, however long the keys are.
func TestLargestMeta(t *testing.T) {
	var mounts []Mount
	for i := range 32 {
		mounts = append(mounts, Mount{
			URL: "s3://" + strings.Repeat("u", 2048), Prefix: strings.Repeat("p", 1024), Path: fmt.Sprintf("/%02d%s", i, strings.Repeat("/"+strings.Repeat("d", 255), 3)),
		})
	}
	b := NewBuilder(mounts)
	for r := range 32 {
		for k := range maxExamples {
			o := object(mounts[0].Prefix+"/"+strings.Repeat("\xff", 1<<16)+fmt.Sprint(r, k), 1)
			o.Skip = fmt.Sprintf("the reason of number %d", r)
			if err := b.Add(0, o); err != nil {
				t.Fatal(err)
			}
		}
	}
	enc, err := b.Encode(time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if tail := binary.LittleEndian.Uint32(enc[28:]); tail > maxMeta/2 {
		t.Errorf("%d bytes", tail)
	}
	if _, err := Open(enc); err != nil {
		t.Error(err)
	}
}
