package catalog_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/file"
)

// A real folder, listed by the real source: what the snapshot says of each file is enough to read it.
func TestListOfAFolder(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"a/b.txt": "one", "a/\xff\n": "two", "empty": "", "a.b": "three"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	src, err := file.Open(context.Background(), source.Config{URL: "file://" + dir})
	if err != nil {
		t.Fatal(err)
	}
	s, err := catalog.List(t.Context(), []catalog.Mount{{Path: "/data"}}, []source.Source{src}, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	s.Walk(0, func(i catalog.Index) bool {
		_, o, _ := s.Object(i)
		b, err := src.Get(t.Context(), o, 0, o.Size)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		content, err := io.ReadAll(b)
		if err != nil {
			t.Fatal(err)
		}
		got[s.Path(i)] = string(content)
		if r, ok := s.Ring(i); !ok || r.Size != o.Size || r.ID != source.Identify(src.URL(), o) {
			t.Errorf("%s: %+v of %+v", s.Path(i), r, o)
		}
		return true
	})
	for path, want := range map[string]string{"/data/a/b.txt": "one", "/data/a/\xff\n": "two", "/data/empty": "", "/data/a.b": "three"} {
		if c, ok := got[path]; !ok || c != want {
			t.Errorf("%q: %q, %v; want %q", path, c, ok, want)
		}
	}
	if len(got) != 4 || !slices.ContainsFunc(s.Skipped(), func(k catalog.Skipped) bool { return k.Count == 1 && k.Examples[0] == src.URL()+"/pipe" }) {
		t.Errorf("files %q, skipped %+v", got, s.Skipped())
	}
}
