package sourcetest

import (
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/source"
)

// list lists prefix, checks what every listing must be, and returns it in order of keys.
func (s *suite) list(t *testing.T, prefix string) []source.Object {
	t.Helper()
	var objects []source.Object
	var inside atomic.Int32
	seen := map[string]bool{}
	err := s.src.List(t.Context(), prefix, func(o source.Object) error {
		if inside.Add(1) != 1 {
			t.Error("yield is called concurrently")
		}
		defer inside.Add(-1)
		if seen[o.Key] || !strings.HasPrefix(o.Key, prefix) || o.Version == "" && o.Skip == "" {
			t.Errorf("listing %q yields %+v (again: %v)", prefix, o, seen[o.Key])
		}
		seen[o.Key] = true
		objects = append(objects, o)
		return nil
	})
	if err != nil {
		t.Fatalf("list %q: %v", prefix, err)
	}
	sort.Slice(objects, func(i, j int) bool { return objects[i].Key < objects[j].Key })
	return objects
}

// listKeys has more than two pages, of every shape that tempts a listing to err: flat and deep folders,
// names that sort before and after the slash, one name a prefix of another.
func listKeys() []string {
	var keys []string
	add := func(format string, n int) {
		for i := range n {
			keys = append(keys, fmt.Sprintf(format, i))
		}
	}
	add("flat/%04d", 1300)
	add("many/%03d/x", 700)
	add("deep/a/b/c/d/%03d", 300)
	add("deep/a/b/c-d/%d", 20) // '-' sorts before '/'
	add("deep/a/b/c.d/%d", 20) // '.' too
	add("deep/a/b/c0d/%d", 20) // '0' after
	add("root%02d", 50)
	return append(keys, "deep-", "deep.x", "deep0", "ünicode/ä", "zz/+ %", "zz/a&b", "z")
}

func testList(t *testing.T, s *suite) {
	keys := listKeys()
	var g errgroup.Group
	g.SetLimit(8)
	for _, key := range keys {
		g.Go(func() error {
			_, err := s.src.Put(t.Context(), key, strings.NewReader(key), int64(len(key)))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	sort.Strings(keys)
	for _, prefix := range []string{"", "flat/", "flat/00", "many/", "deep", "deep/", "deep/a/b/c", "deep/a/b/c/d/", "z", "zz/+ ", "ünicode/", "nothing", "root0"} {
		var want []string
		for _, k := range keys {
			if strings.HasPrefix(k, prefix) {
				want = append(want, k)
			}
		}
		got := s.list(t, prefix)
		if len(got) != len(want) {
			t.Errorf("prefix %q: %d objects, want %d", prefix, len(got), len(want))
			continue
		}
		for i, o := range got {
			if o.Key != want[i] || o.Size != int64(len(o.Key)) || o.ModTime.IsZero() {
				t.Errorf("prefix %q: %+v, want %q", prefix, o, want[i])
				break
			}
		}
	}
	// A listed version is one to read with.
	for _, o := range s.list(t, "zz/") {
		if got, err := read(t.Context(), s.src, o, 0, o.Size); err != nil || string(got) != o.Key {
			t.Errorf("read of listed %+v: %q, %v", o, got, err)
		}
	}
	enough := errors.New("enough")
	n := 0
	err := s.src.List(t.Context(), "", func(source.Object) error {
		if n++; n == 1500 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || n != 1500 {
		t.Errorf("a yield that fails: %d calls, %v", n, err)
	}
}

func testListEmpty(t *testing.T, s *suite) {
	if got := s.list(t, ""); len(got) != 0 {
		t.Errorf("an empty bucket lists %v", got)
	}
	s.put(t, "a/b", content(1, 10))
	for _, prefix := range []string{"a/b/", "b", "a/bb", "a//", "../"} {
		if got := s.list(t, prefix); len(got) != 0 {
			t.Errorf("prefix %q lists %v", prefix, got)
		}
	}
}
