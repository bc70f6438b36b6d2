package catalog

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source"
)

// skipped returns the counts by reason, and checks that the examples are as promised.
func skipped(t testing.TB, s *Snapshot) map[string]int64 {
	t.Helper()
	out := map[string]int64{}
	for _, e := range s.Skipped() {
		if e.Count < 1 || len(e.Examples) == 0 || len(e.Examples) > maxExamples || int64(len(e.Examples)) > e.Count || !slices.IsSorted(e.Examples) {
			t.Errorf("%s: %d, examples %q", e.Reason, e.Count, e.Examples)
		}
		out[e.Reason] = e.Count
	}
	return out
}

// Every rule of the package comment: the keys (each with one byte, or none if it ends in ":0"), what is
// shown of them, and what is counted.
func TestKeyRules(t *testing.T) {
	long := strings.Repeat("n", 255)
	key1024 := strings.Repeat("k/", 511) + "kk"
	for _, c := range []struct {
		name  string
		keys  []string
		want  []string
		count map[string]int64
	}{
		{"dot dot", []string{"../a", "a/..", "a/../b", "..", "..a", "a..", "...", "ok"}, []string{"/", "/...", "/..a", "/a..", "/ok"}, map[string]int64{DotSegment: 4}},
		{"dot", []string{"./a", "a/.", "a/./b", ".", ".hidden"}, []string{"/", "/.hidden"}, map[string]int64{DotSegment: 4}},
		{"double slash", []string{"a//b", "a//:0", "//", "c/d"}, []string{"/", "/c/", "/c/d"}, map[string]int64{EmptySegment: 3}},
		{"leading slash", []string{"/a", "/", "/a/b", "a"}, []string{"/", "/a"}, map[string]int64{EmptySegment: 3}},
		{"file beside directory", []string{"a", "a/b", "c/d", "c/d/e", "c/d/f"}, []string{"/", "/a/", "/c/", "/a/b", "/c/d/", "/c/d/e", "/c/d/f"}, map[string]int64{Shadowed: 2}},
		{"empty file beside directory", []string{"a:0", "a/b"}, []string{"/", "/a/", "/a/b"}, map[string]int64{Shadowed: 1}},
		{"file beside its marker", []string{"a", "a/:0"}, []string{"/", "/a/"}, map[string]int64{Shadowed: 1}},
		{"file beside keys that are not shown", []string{"a", "a//b", "a/../c"}, []string{"/", "/a"}, map[string]int64{EmptySegment: 1, DotSegment: 1}},
		{"directory marker", []string{"a/:0", "b/c/:0", "b/c/d"}, []string{"/", "/a/", "/b/", "/b/c/", "/b/c/d"}, map[string]int64{}},
		{"directory marker with content", []string{"a/", "b/", "b/c"}, []string{"/", "/a/", "/b/", "/b/c"}, map[string]int64{MarkerContent: 2}},
		{"long names", []string{long, long + "n", long + "/x", long + "n/x", "x/" + long + "n/:0"}, []string{"/", "/" + long + "/", "/" + long + "/x"}, map[string]int64{LongName: 3, Shadowed: 1}},
		{"1,024-byte key", []string{key1024}, nil, map[string]int64{}},
		{"long path", []string{strings.Repeat("p/", 2046) + "pp", strings.Repeat("p/", 2046) + "ppp"}, nil, map[string]int64{LongPath: 1}},
		{"not UTF-8", []string{"\xff\xfe/\x80", "é", "e\u0301"}, []string{"/", "/e\u0301", "/é", "/\xff\xfe/", "/\xff\xfe/\x80"}, map[string]int64{}},
		{"control characters", []string{"a\nb", "\t", " ", "\x1b[31m", "\\"}, []string{"/", "/\t", "/\x1b[31m", "/ ", "/\\", "/a\nb"}, map[string]int64{}},
		{"NUL", []string{"a\x00b", "\x00/c", "d"}, []string{"/", "/d"}, map[string]int64{NulByte: 2}},
		{"names around the slash", []string{"a-b/x", "a/b", "a.b", "a0"}, []string{"/", "/a/", "/a-b/", "/a.b", "/a0", "/a/b", "/a-b/x"}, map[string]int64{}},
		{"empty key", []string{":0", "a"}, []string{"/", "/a"}, map[string]int64{}},
	} {
		for _, prefix := range []string{"", "p/q/"} {
			t.Run(c.name+" "+prefix, func(t *testing.T) {
				var given []source.Object
				for _, k := range c.keys {
					size := int64(1)
					if rest, ok := strings.CutSuffix(k, ":0"); ok {
						k, size = rest, 0
					}
					given = append(given, object(prefix+k, size))
				}
				mounts := []Mount{{URL: "s3://bucket", Prefix: prefix, Path: "/"}}
				s := build(t, mounts, given)
				paths := tree(t, s)
				if c.want != nil {
					if diff := cmp.Diff(c.want, paths); diff != "" {
						t.Error(diff)
					}
				} else if s.Files() != 1 {
					t.Errorf("%d files", s.Files())
				}
				if diff := cmp.Diff(c.count, skipped(t, s)); diff != "" {
					t.Error(diff)
				}
				slices.Reverse(given)
				if again := build(t, mounts, given); again.Digest() != s.Digest() {
					t.Error("in reverse order it is another snapshot")
				}
				// What is shown leads back to its key.
				s.Walk(0, func(i Index) bool {
					if _, o, _ := s.Object(i); !slices.ContainsFunc(given, func(g source.Object) bool { return cmp.Equal(g, o) }) {
						t.Errorf("%s is object %+v, which was not listed", s.Path(i), o)
					}
					return true
				})
			})
		}
	}
}

func TestExamplesAreEscapedAndTheFirst(t *testing.T) {
	var given []source.Object
	for i := range 20 {
		given = append(given, object(fmt.Sprintf("x//%02d\n\x1b\xff", i), 1))
	}
	s := build(t, root, given)
	want := []Skipped{{Reason: EmptySegment, Count: 20}}
	for i := range maxExamples {
		want[0].Examples = append(want[0].Examples, fmt.Sprintf(`s3://bucket/x//%02d\n\x1b\xff`, i))
	}
	if diff := cmp.Diff(want, s.Skipped()); diff != "" {
		t.Error(diff)
	}
}

func TestObjectListedInTwoVersionsIsShownInTheNewest(t *testing.T) {
	older, newer := object("a", 1), object("a", 2)
	older.ModTime = day0.Add(-time.Hour)
	newer.Version = "00000000000000000000000000000001"
	newer.Digest = source.Digest{}
	touched := newer
	touched.ModTime = day0.Add(-2 * time.Hour)
	for _, given := range [][]source.Object{{older, newer, newer, touched}, {newer, older, touched, newer}, {touched, newer, older, older}} {
		s := build(t, root, given)
		i, _ := s.Lookup("a")
		if _, o, _ := s.Object(i); !cmp.Equal(o, newer) {
			t.Errorf("shown is %+v", o)
		}
		if diff := cmp.Diff(map[string]int64{Duplicate: 1}, skipped(t, s)); diff != "" {
			t.Error(diff)
		}
	}
}

func TestMountsThatCannotBe(t *testing.T) {
	for _, c := range []struct {
		paths []string
		want  string
	}{
		{nil, "no mounts"},
		{[]string{""}, "must start with a slash"},
		{[]string{"a"}, "must start with a slash"},
		{[]string{"/a/"}, EmptySegment},
		{[]string{"//a"}, EmptySegment},
		{[]string{"/a/../b"}, DotSegment},
		{[]string{"/a\x00"}, NulByte},
		{[]string{"/" + strings.Repeat("x", 256)}, LongName},
		{[]string{"/" + strings.Repeat("x/", 2047) + "xx"}, LongPath},
		{[]string{"/a", "/a"}, "overlap"},
		{[]string{"/a", "/"}, "overlap"},
		{[]string{"/a/b/c", "/a-", "/a/b"}, `"/a/b" of s3://2 and "/a/b/c" of s3://0 overlap`},
		{make([]string, 70_000), "at most"},
		{[]string{"/a", "/ab", "/a-b/c", "/a.b", "/b/a"}, ""},
	} {
		var mounts []Mount
		for i, p := range c.paths {
			mounts = append(mounts, Mount{URL: "s3://" + strconv.Itoa(i), Path: p})
		}
		b := NewBuilder(mounts)
		err := b.Add(0, object("a", 1))
		_, encodeErr := b.Encode(day0)
		if c.want == "" {
			if err != nil || encodeErr != nil {
				t.Errorf("%q: %v, %v", c.paths, err, encodeErr)
			}
		} else if err == nil || !strings.Contains(err.Error(), c.want) || encodeErr == nil {
			t.Errorf("%d paths %.60q: %v, %v; want %q", len(c.paths), c.paths, err, encodeErr, c.want)
		}
	}
}

func TestMountsBesideEachOther(t *testing.T) {
	mounts := []Mount{
		{URL: "s3://one", Prefix: "p", Path: "/a/b"},
		{URL: "oss://two", Path: "/a/c/d"},
		{URL: "s3://none", Prefix: "gone/", Path: "/z"},
	}
	s := build(t, mounts, []source.Object{object("p/x/y", 1), object("p/z", 2)}, []source.Object{object("x", 3)})
	want := []string{"/", "/a/", "/z/", "/a/b/", "/a/c/", "/a/b/x/", "/a/b/z", "/a/c/d/", "/a/b/x/y", "/a/c/d/x"}
	if diff := cmp.Diff(want, tree(t, s)); diff != "" {
		t.Error(diff)
	}
	mounts[0].Prefix = "p/"
	if diff := cmp.Diff(mounts, s.Mounts()); diff != "" {
		t.Error(diff)
	}
	if notes := s.Notes(); len(notes) != 1 || !strings.Contains(notes[0], "s3://none/gone/") || !strings.Contains(notes[0], "/z") {
		t.Errorf("notes %q", notes)
	}
	for p, want := range map[string]string{"/a/b/x/y": "0 p/x/y", "a/b/z": "0 p/z", "/a/c/d/x": "1 x"} {
		i, ok := s.Lookup(p)
		m, o, isFile := s.Object(i)
		if got := fmt.Sprint(m, " ", o.Key); !ok || !isFile || got != want {
			t.Errorf("%s: %q, want %q", p, got, want)
		}
		r, ok := s.Ring(i)
		if !ok || r.Size != o.Size || r.ID != source.Identify(mounts[m].URL, o) {
			t.Errorf("%s: %+v", p, r)
		}
	}
}

func TestKeyOutsideThePrefixIsAnError(t *testing.T) {
	mounts := []Mount{{URL: "s3://bucket", Prefix: "data", Path: "/"}}
	for _, key := range []string{"data2/x", "data", "dat", ""} {
		if err := NewBuilder(mounts).Add(0, object(key, 1)); !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "s3://bucket/"+key) {
			t.Errorf("%q: %v", key, err)
		}
	}
	for _, m := range []int{-1, 1} {
		if err := NewBuilder(mounts).Add(m, object("data/x", 1)); err == nil {
			t.Errorf("mount %d was accepted", m)
		}
	}
}

func TestWhatNoSourceMayGive(t *testing.T) {
	negative, version, digest := object("a", -1), object("a", 1), object("a", 1)
	version.Version = strings.Repeat("v", maxVersion+1)
	digest.Digest.Sum = make([]byte, maxSum+1)
	for _, o := range []source.Object{negative, version, digest} {
		if err := NewBuilder(root).Add(0, o); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("size %d, version of %d bytes: %v", o.Size, len(o.Version), err)
		}
	}
}

func TestWhatTheSourceSkipsIsCounted(t *testing.T) {
	socket := source.Object{Key: "run/socket", Skip: "a socket"}
	s := build(t, root, []source.Object{socket, object("a", 1)})
	if diff := cmp.Diff([]string{"/", "/a"}, tree(t, s)); diff != "" {
		t.Error(diff)
	}
	want := []Skipped{{Reason: "a socket", Count: 1, Examples: []string{"s3://bucket/run/socket"}}}
	if diff := cmp.Diff(want, s.Skipped()); diff != "" {
		t.Error(diff)
	}
}

func TestUnversionedIsRefusedByNameUnlessAllowed(t *testing.T) {
	bare := object("x/a", 1)
	bare.Version, bare.Digest = "", source.Digest{}
	b := NewBuilder(root)
	err := b.Add(0, bare)
	if _, again := b.Encode(day0); again != err {
		t.Errorf("a listing that failed can be encoded: %v", again)
	}
	if !errors.Is(err, source.ErrUnversioned) || !strings.Contains(err.Error(), "s3://bucket/x/a") || !strings.Contains(err.Error(), "allowUnversioned") {
		t.Errorf("refused with %v", err)
	}
	allow := []Mount{{URL: "s3://bucket", Path: "/", AllowUnversioned: true}}
	s := build(t, allow, []source.Object{bare})
	i, _ := s.Lookup("x/a")
	if _, o, ok := s.Object(i); !ok || !cmp.Equal(o, bare) {
		t.Errorf("%+v, want %+v", o, bare)
	}
	later := bare
	later.ModTime = bare.ModTime.Add(time.Second)
	a, _ := s.Ring(i)
	if b, _ := build(t, allow, []source.Object{later}).Ring(i); a.ID == b.ID {
		t.Error("without a version, another time must be another identity")
	}
	if !s.Mounts()[0].AllowUnversioned {
		t.Error("allowUnversioned is lost")
	}
}
