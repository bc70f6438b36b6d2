package artifact_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/artifact"
)

// tree reads a directory: contents by name, directories ending in a slash, executables marked.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		info, err := d.Info()
		if err != nil {
			return err
		}
		if d.IsDir() {
			got[name+"/"] = ""
			return nil
		}
		content, err := os.ReadFile(path)
		if info.Mode()&0o111 != 0 {
			name += " (executable)"
		}
		got[name] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestFile(t *testing.T) {
	overBoth(t, artifact.Options{}, func(t *testing.T, f *fixture) {
		for name, content := range map[string][]byte{
			"small": []byte("hello world\n"), "empty": {}, "in parts": large,
		} {
			t.Run(name, func(t *testing.T) {
				art := f.artifact("wf/pod/" + name)
				if err := f.save(t.Context(), f.write(t, "out/"+name, content, 0o644), art); err != nil {
					t.Fatal(err)
				}
				in := f.path("in/" + name + ".tmp")
				if err := f.load(t.Context(), art, in); err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(in)
				if err != nil || !bytes.Equal(got, content) {
					t.Errorf("%d bytes, %v, want %d", len(got), err, len(content))
				}
				if is, err := f.isDirectory(t.Context(), art); is || err != nil {
					t.Errorf("directory: %v, %v", is, err)
				}
				if names, err := f.list(t.Context(), art); len(names) > 0 || err != nil {
					t.Errorf("%v, %v", names, err)
				}
				var streamed bytes.Buffer
				if err := f.open(t.Context(), art, &streamed); err != nil || !bytes.Equal(streamed.Bytes(), content) {
					t.Errorf("streamed %d bytes, %v", streamed.Len(), err)
				}
				for range 2 { // deletion is idempotent
					if err := f.delete(t.Context(), art); err != nil {
						t.Error(err)
					}
				}
			})
		}
		if left := f.objects(t); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

func TestDirectory(t *testing.T) {
	overBoth(t, artifact.Options{}, func(t *testing.T, f *fixture) {
		want := map[string]string{
			"a": "1", "sub/": "", "sub/b c": "2", "sub/deep/": "", "sub/deep/日本": "3", "sub/none/": "", "run (executable)": "#!/bin/sh\n", "zero": "",
		}
		for name, content := range map[string]string{"a": "1", "sub/b c": "2", "sub/deep/日本": "3", "zero": ""} {
			f.write(t, "out/"+name, []byte(content), 0o644)
		}
		f.write(t, "out/run", []byte("#!/bin/sh\n"), 0o755)
		if err := os.MkdirAll(f.path("out/sub/none"), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"wf/pod/out", "wf/slash/"} {
			art := f.artifact(key)
			if err := f.save(t.Context(), f.path("out"), art); err != nil {
				t.Fatal(err)
			}
			in := f.path("in" + fmt.Sprint(len(key)))
			if err := f.load(t.Context(), art, in); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, tree(t, in)); d != "" {
				t.Errorf("%s:\n%s", key, d)
			}
			if is, err := f.isDirectory(t.Context(), art); !is || err != nil {
				t.Errorf("directory: %v, %v", is, err)
			}
		}
		// As Argo's data templates and its server want them: full keys, no markers.
		names, err := f.list(t.Context(), f.artifact("wf/pod/out"))
		if d := cmp.Diff([]string{"wf/pod/out/a", "wf/pod/out/run", "wf/pod/out/sub/b c", "wf/pod/out/sub/deep/日本", "wf/pod/out/zero"}, names); d != "" || err != nil {
			t.Errorf("%v\n%s", err, d)
		}
		for _, key := range []string{"wf/pod/out", "wf/slash/"} {
			if err := f.delete(t.Context(), f.artifact(key)); err != nil {
				t.Error(err)
			}
		}
		if left := f.objects(t); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// An executable of a directory stays one, whether it is loaded at once, in ranges, or streamed as a tar.
func TestExecutablesOfADirectory(t *testing.T) {
	overBoth(t, artifact.Options{}, func(t *testing.T, f *fixture) {
		f.write(t, "out/data", []byte("1"), 0o644)
		f.write(t, "out/large", large, 0o755)
		f.write(t, "out/small", []byte("#!/bin/sh\n"), 0o755)
		if err := os.Mkdir(f.path("out/none"), 0o755); err != nil {
			t.Fatal(err)
		}
		art := f.artifact("out")
		if err := f.save(t.Context(), f.path("out"), art); err != nil {
			t.Fatal(err)
		}
		if err := f.load(t.Context(), art, f.path("in")); err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"data": "1", "large (executable)": string(large), "none/": "", "small (executable)": "#!/bin/sh\n"}
		if got := tree(t, f.path("in")); !maps.Equal(got, want) {
			t.Errorf("loaded %v", slices.Sorted(maps.Keys(got)))
		}
		var streamed bytes.Buffer
		if err := f.open(t.Context(), art, &streamed); err != nil {
			t.Fatal(err)
		}
		if got := untar(t, &streamed); !maps.Equal(got, want) {
			t.Errorf("streamed %v", slices.Sorted(maps.Keys(got)))
		}
	})
}

// untar reads an archive as tree does a directory.
func untar(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	got := map[string]string{}
	for archive := tar.NewReader(r); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		name := h.Name
		if h.Typeflag == tar.TypeReg && h.Mode&0o111 != 0 {
			name += " (executable)"
		}
		got[name] = string(content)
	}
}
