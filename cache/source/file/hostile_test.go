package file_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/file"
)

// folder makes a root with a secret beside it that must never be reached.
func folder(t *testing.T) (root string, f *file.Folder) {
	t.Helper()
	top := t.TempDir()
	root = filepath.Join(top, "root")
	for _, d := range []string{root, filepath.Join(top, "outside")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(top, "outside", "secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := file.Open(t.Context(), source.Config{URL: "file://" + root + "/"})
	if err != nil {
		t.Fatal(err)
	}
	if f.URL() != "file://"+root {
		t.Errorf("URL is %s", f.URL())
	}
	return root, f
}

func TestPathTraversalIsRefused(t *testing.T) {
	root, f := folder(t)
	for _, key := range []string{"../outside/secret", "a/../../outside/secret", "/etc/passwd", "..", ".", "", "a//b", "a/./b", "a/", "nul\x00l",
		".stepcache-put-X", strings.Repeat("k/", 600)} {
		o := source.Object{Key: key, Size: 6, Version: "x"}
		_, statErr := f.Stat(t.Context(), key)
		_, getErr := f.Get(t.Context(), o, 0, 6)
		_, putErr := f.Put(t.Context(), key, strings.NewReader("x"), 1)
		for op, err := range map[string]error{"stat": statErr, "get": getErr, "put": putErr, "delete": f.Delete(t.Context(), key)} {
			if !errors.Is(err, source.ErrInvalid) {
				t.Errorf("%s %q: %v", op, key, err)
			}
		}
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestLinksOutOfTheFolderAreRefused(t *testing.T) {
	root, f := folder(t)
	for name, target := range map[string]string{"abs": "/etc/passwd", "rel": "../outside/secret", "dir": "../outside", "hop": "dir"} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"abs", "rel", "dir/secret", "hop/secret", "dir/new"} {
		if _, err := f.Stat(t.Context(), key); !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "leads out") {
			t.Errorf("stat %s: %v", key, err)
		}
		if _, err := f.Get(t.Context(), source.Object{Key: key, Size: 6, Version: "x"}, 0, 6); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("get %s: %v", key, err)
		}
	}
	for _, key := range []string{"dir/new", "dir/secret", "hop/x/y"} {
		if _, err := f.Put(t.Context(), key, strings.NewReader("x"), 1); err == nil {
			t.Errorf("put %s reached outside", key)
		}
		if err := f.Delete(t.Context(), key); err == nil && key == "dir/secret" {
			t.Errorf("delete %s reached outside", key)
		}
	}
	entries, err := os.ReadDir(filepath.Join(root, "..", "outside"))
	if err != nil || len(entries) != 1 {
		t.Errorf("outside holds %v, %v", entries, err)
	}
	// Put over a link replaces the link.
	if _, err := f.Put(t.Context(), "rel", strings.NewReader("mine"), 4); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(root, "..", "outside", "secret")); err != nil || string(b) != "secret" {
		t.Errorf("%q, %v", b, err)
	}
}

// Everything that is no object is listed with the reason, and never opened.
func TestWhatIsNoObjectIsReported(t *testing.T) {
	root, f := folder(t)
	at := func(name string) string { return filepath.Join(root, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(at("d/empty"), 0o755))
	must(os.WriteFile(at("d/file"), []byte("content"), 0o644))
	must(os.Symlink("file", at("d/inside")))
	must(os.Symlink("../d", at("d/loop")))
	must(os.Symlink("self", at("self")))
	must(os.Symlink("nowhere", at("dangling")))
	must(os.Symlink("../outside/secret", at("out")))
	must(syscall.Mkfifo(at("pipe"), 0o644))
	must(os.WriteFile(at(".stepcache-put-LEFT"), []byte("half"), 0o644))
	must(os.WriteFile(at("bytes\xff"), []byte("x"), 0o644))
	folder, err := os.Open(filepath.Dir(at("sock"))) // a short name of it: a socket's path has 107 bytes at most
	must(err)
	defer folder.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/sock", folder.Fd()))
	must(err)
	defer l.Close()
	want := map[string]string{"d/file": "", "d/inside": "", "bytes\xff": "", "d/loop": "a link to a folder", "self": "circle", "dangling": "a link to nothing",
		"out": "leads out", "pipe": "pipe", "sock": "socket", ".stepcache-put-LEFT": "unfinished"}
	for key, why := range want {
		if why == "" || why == "unfinished" {
			continue
		}
		if _, err := f.Stat(t.Context(), key); err == nil {
			t.Errorf("stat of %s, %s, succeeds", key, why)
		}
		if _, err := f.Get(t.Context(), source.Object{Key: key, Size: 4, Version: "x"}, 0, 4); err == nil {
			t.Errorf("get of %s, %s, succeeds", key, why)
		}
	}
	must(f.List(t.Context(), "", func(o source.Object) error {
		why, ok := want[o.Key]
		if !ok || !strings.Contains(o.Skip, why) || (why == "") != (o.Skip == "") || (o.Version == "") != (o.Skip != "") {
			t.Errorf("listed %+v, want reason %q", o, why)
		}
		delete(want, o.Key)
		return nil
	}))
	if len(want) > 0 {
		t.Errorf("not listed: %v", want)
	}
	o, err := f.Stat(t.Context(), "d/inside")
	must(err)
	b, err := f.Get(t.Context(), o, 0, o.Size)
	must(err)
	defer b.Close()
	if got, err := io.ReadAll(b); err != nil || string(got) != "content" {
		t.Errorf("through a link inside: %q, %v", got, err)
	}
}

func TestNamesThatAreFileAndFolder(t *testing.T) {
	root, f := folder(t)
	put := func(key string) error {
		_, err := f.Put(t.Context(), key, strings.NewReader("x"), 1)
		return err
	}
	if err := put("a/b"); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"a", "a/b/c"} {
		if err := put(key); !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "both a file and a folder") {
			t.Errorf("put %s: %v", key, err)
		}
	}
	if _, err := f.Stat(t.Context(), "a"); !errors.Is(err, source.ErrNotFound) {
		t.Errorf("a folder is no object: %v", err)
	}
	if err := f.Delete(t.Context(), "a"); err != nil {
		t.Errorf("delete of a folder's name: %v", err)
	}
	if err := f.Delete(t.Context(), "a/b/c"); err != nil {
		t.Errorf("delete below a file: %v", err)
	}
	if _, err := os.Stat(filepath.Join(root, "a", "b")); err != nil {
		t.Error(err)
	}
}

// An object replaced by rename, rewritten in place with the same size and time, or cut while it is read
// is never a mixture.
func TestChangesAreSeen(t *testing.T) {
	root, f := folder(t)
	name := filepath.Join(root, "k")
	for how, change := range map[string]func() error{
		"replaced": func() error {
			return errors.Join(os.WriteFile(name+"2", []byte("BBBB"), 0o644), os.Rename(name+"2", name))
		},
		"touched back": func() error {
			info, err := os.Stat(name)
			if err != nil {
				return err
			}
			return errors.Join(os.WriteFile(name, []byte("BBBB"), 0o644), os.Chtimes(name, info.ModTime(), info.ModTime()))
		},
		"cut": func() error { return os.Truncate(name, 2) },
	} {
		if err := os.WriteFile(name, []byte("AAAA"), 0o644); err != nil {
			t.Fatal(err)
		}
		o, err := f.Stat(t.Context(), "k")
		if err != nil {
			t.Fatal(err)
		}
		b, err := f.Get(t.Context(), o, 0, 4)
		if err != nil {
			t.Fatal(err)
		}
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(b); string(got) != "AAAA" && !errors.Is(err, source.ErrChanged) || strings.Contains(string(got), "B") {
			t.Errorf("%s while open: %q, %v", how, got, err)
		}
		b.Close()
		if _, err := f.Get(t.Context(), o, 0, 4); !errors.Is(err, source.ErrChanged) {
			t.Errorf("%s: %v", how, err)
		}
	}
}

// A folder that is replaced, or removed and made again, is the new one for every operation, and while there is none
// nothing is said of its files.
func TestAFolderThatTakesThePlace(t *testing.T) {
	root, f := folder(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	list := func() (names []string, err error) {
		err = f.List(t.Context(), "", func(o source.Object) error {
			names = append(names, o.Key)
			return nil
		})
		return names, err
	}
	must(os.WriteFile(filepath.Join(root, "k"), []byte("old"), 0o644))
	old, err := f.Stat(t.Context(), "k")
	must(err)
	for how, replace := range map[string]func(next string) error{
		"moved":   func(next string) error { return errors.Join(os.Rename(root, next+"-before"), os.Rename(next, root)) },
		"removed": func(next string) error { return errors.Join(os.RemoveAll(root), os.Rename(next, root)) },
		"a link":  func(next string) error { return errors.Join(os.RemoveAll(root), os.Symlink(next, root)) },
	} {
		next := filepath.Join(t.TempDir(), "next")
		must(os.Mkdir(next, 0o755))
		must(os.WriteFile(filepath.Join(next, "k"), []byte(how), 0o644))
		must(os.WriteFile(filepath.Join(next, "new"), []byte(how), 0o644))
		must(replace(next))
		// Not listed before: another process may have listed it.
		if _, err := f.Get(t.Context(), old, 0, old.Size); !errors.Is(err, source.ErrChanged) {
			t.Errorf("%s: the old file: %v", how, err)
		}
		if names, err := list(); err != nil || len(names) != 2 {
			t.Errorf("%s: listed %q, %v", how, names, err)
		}
		o, err := f.Stat(t.Context(), "new")
		must(err)
		b, err := f.Get(t.Context(), o, 0, o.Size)
		must(err)
		if got, err := io.ReadAll(b); err != nil || string(got) != how {
			t.Errorf("%s: %q, %v", how, got, err)
		}
		b.Close()
		_, err = f.Put(t.Context(), "put", strings.NewReader("x"), 1)
		must(err)
		if _, err := os.Stat(filepath.Join(root, "put")); err != nil {
			t.Errorf("%s: %v", how, err)
		}
		must(f.Delete(t.Context(), "put"))
	}
	must(os.RemoveAll(root))
	_, statErr := f.Stat(t.Context(), "k")
	_, getErr := f.Get(t.Context(), old, 0, old.Size)
	_, putErr := f.Put(t.Context(), "k", strings.NewReader("x"), 1)
	_, listErr := list()
	for op, err := range map[string]error{"stat": statErr, "get": getErr, "put": putErr, "list": listErr, "delete": f.Delete(t.Context(), "k")} {
		if !errors.Is(err, source.ErrNoBucket) || !strings.Contains(err.Error(), "make the folder") {
			t.Errorf("%s without a folder: %v", op, err)
		}
	}
	must(os.Mkdir(root, 0o755))
	if names, err := list(); err != nil || len(names) != 0 {
		t.Errorf("made again: listed %q, %v", names, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for url, kind := range map[string]error{
		"file://" + dir + "/none": source.ErrNoBucket, "file://" + dir + "/file": source.ErrNoBucket, "file://rel": source.ErrInvalid, "s3://b": source.ErrInvalid,
	} {
		if _, err := file.Open(t.Context(), source.Config{URL: url}); !errors.Is(err, kind) {
			t.Errorf("%s: %v", url, err)
		}
	}
	_, f := folder(t)
	if err := f.List(t.Context(), "", func(source.Object) error { return nil }); err != nil {
		t.Error(err)
	}
}
