package catalog

import (
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source"
)

var (
	day0 = time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)
	root = []Mount{{URL: "s3://bucket", Path: "/"}}
)

// object makes an object as S3 lists it.
func object(key string, size int64) source.Object {
	sum := md5.Sum([]byte(key))
	return source.Object{
		Key: key, Size: size, ModTime: day0, Version: hex.EncodeToString(sum[:]),
		Digest: source.Digest{Algorithm: source.MD5, Sum: sum[:]},
	}
}

func objects(keys ...string) (out []source.Object) {
	for i, k := range keys {
		out = append(out, object(k, int64(i+1)))
	}
	return out
}

// build encodes the objects of one or more mounts and opens the result.
func build(t testing.TB, mounts []Mount, of ...[]source.Object) *Snapshot {
	t.Helper()
	b := NewBuilder(mounts)
	for m, objects := range of {
		for _, o := range objects {
			if err := b.Add(m, o); err != nil {
				t.Fatalf("add %q: %v", o.Key, err)
			}
		}
	}
	encoded, err := b.Encode(day0)
	if err != nil {
		t.Fatalf("encode: %v", err)
	}
	s, err := Open(encoded)
	if err != nil {
		t.Fatalf("open what was encoded: %v", err)
	}
	return s
}

// tree lists the whole tree the long way, and checks on it what holds of every snapshot.
func tree(t testing.TB, s *Snapshot) (paths []string) {
	t.Helper()
	var files []string
	for i := range Index(s.Len()) {
		n, ok := s.Node(i)
		if !ok {
			t.Fatalf("node %d of %d is missing", i, s.Len())
		}
		p := s.Path(i)
		if j, ok := s.Lookup(p); !ok || j != i {
			t.Errorf("lookup of %q, the path of node %d: %d, %v", p, i, j, ok)
		}
		if j, ok := s.Child(n.Parent, n.Name); i > 0 && (!ok || j != i) {
			t.Errorf("child %q of %d: %d, %v; want %d", n.Name, n.Parent, j, ok, i)
		}
		_, o, isFile := s.Object(i)
		if isFile == n.Dir {
			t.Errorf("%s: directory %v, object %v", p, n.Dir, isFile)
		}
		previous := ""
		for c := n.First; c < n.First+n.Count; c++ {
			child, ok := s.Node(c)
			if !ok || child.Parent != i || child.Name <= previous {
				t.Errorf("%s: child %d is %+v after %q", p, c, child, previous)
			}
			previous = child.Name
		}
		switch {
		case n.Dir && p != "/":
			p += "/"
		case isFile:
			files = append(files, p)
			if o.Size != n.Size || !o.ModTime.Equal(n.ModTime) {
				t.Errorf("%s: node %+v, object %+v", p, n, o)
			}
		}
		paths = append(paths, p)
	}
	var walked []string
	s.Walk(0, func(i Index) bool { walked = append(walked, s.Path(i)); return true })
	slices.Sort(files)
	if sorted := slices.Sorted(slices.Values(walked)); !slices.Equal(sorted, files) {
		t.Errorf("walk gives %q, the nodes %q", sorted, files)
	}
	if int64(len(files)) != s.Files() {
		t.Errorf("%d files, counted %d", len(files), s.Files())
	}
	return paths
}

func TestTreeIsBreadthFirstAndSorted(t *testing.T) {
	s := build(t, root, objects("b/y", "b/x", "a", "c/d/e", "b-", "c/a"))
	want := []string{"/", "/a", "/b/", "/b-", "/c/", "/b/x", "/b/y", "/c/a", "/c/d/", "/c/d/e"}
	if diff := cmp.Diff(want, tree(t, s)); diff != "" {
		t.Error(diff)
	}
	if s.Bytes() != 21 || s.Files() != 6 || s.Len() != 10 {
		t.Errorf("%d bytes, %d files, %d nodes", s.Bytes(), s.Files(), s.Len())
	}
}

func TestDigestDoesNotDependOnOrderOrTime(t *testing.T) {
	mounts := []Mount{{URL: "s3://one", Path: "/one"}, {URL: "s3://two", Prefix: "p/", Path: "/x/two"}}
	var one, two []source.Object
	for i := range 300 {
		one = append(one, object(fmt.Sprintf("d%d/f%d", i%7, i), int64(i)))
		two = append(two, object(fmt.Sprintf("p/%d/%d", i%90, i%11), int64(i)))
	}
	// Awkward ones: shadowed, repeated in several versions, skipped, markers.
	one = append(one, object("d1", 4), object("d1/f1/g", 1), object("e//", 0), object("e/../x", 0), object("m/", 0), object("m/", 7))
	for i := range 12 {
		o := object("again", int64(i%5))
		o.ModTime = day0.Add(time.Duration(i%4) * time.Hour)
		one = append(one, o, object(fmt.Sprintf("skip//%d", i), 1))
	}
	rng := rand.New(rand.NewPCG(1, 2))
	first := build(t, mounts, one, two)
	for range 5 {
		rng.Shuffle(len(one), func(i, j int) { one[i], one[j] = one[j], one[i] })
		rng.Shuffle(len(two), func(i, j int) { two[i], two[j] = two[j], two[i] })
		s := build(t, mounts, one, two)
		if s.Digest() != first.Digest() {
			t.Fatalf("another order, another snapshot: %s", cmp.Diff(first.Skipped(), s.Skipped()))
		}
	}
	if len(first.Skipped()) < 5 {
		t.Errorf("skipped %+v", first.Skipped())
	}
	tree(t, first)

	b := NewBuilder(root)
	x, _ := b.Encode(day0)
	y, _ := b.Encode(day0.Add(time.Hour))
	sx, _ := Open(x)
	sy, _ := Open(y)
	if sx.Digest() != sy.Digest() || sx.Created().Equal(sy.Created()) {
		t.Errorf("created %v and %v: digests %x and %x", sx.Created(), sy.Created(), sx.Digest(), sy.Digest())
	}
	if s := build(t, root, objects("a")); s.Digest() == sx.Digest() {
		t.Error("another content, the same digest")
	}
}
