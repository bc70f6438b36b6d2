package artifact_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/artifact"
	"github.com/stepcache/stepcache/artifact/plugin"
)

// through is an artifact that goes to worker i.
func (f *fixture) through(i int, key string) *plugin.Artifact {
	art := f.artifact(key)
	art.Plugin.Configuration = f.others[i]
	return art
}

// What one step saves through one worker, the next loads, lists and deletes through another.
func TestArtifactsPassBetweenWorkers(t *testing.T) {
	f := startTier(t, artifact.Options{})
	want := map[string]string{"run (executable)": "#!/bin/sh\n", "none/": "", "empty": ""}
	for i := range 300 {
		name := fmt.Sprintf("%d/part-%03d", i%7, i)
		f.write(t, "out/"+name, []byte(strings.Repeat("x", i)), 0o644)
		want[name], want[fmt.Sprintf("%d/", i%7)] = strings.Repeat("x", i), ""
	}
	f.write(t, "out/run", []byte("#!/bin/sh\n"), 0o755)
	f.write(t, "out/empty", nil, 0o644)
	if err := os.MkdirAll(f.path("out/none"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		key := fmt.Sprintf("wf/%d/out", i)
		if err := f.save(t.Context(), f.path("out"), f.through(i, key)); err != nil {
			t.Fatal(err)
		}
		in := f.path(fmt.Sprint("in", i))
		if err := f.load(t.Context(), f.through(1-i, key), in); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, tree(t, in)); d != "" {
			t.Errorf("saved through worker %d:\n%s", i, d)
		}
		if names, err := f.list(t.Context(), f.through(1-i, key)); len(names) != 302 || err != nil || names[0] != key+"/0/part-000" {
			t.Errorf("listed %d names, %v", len(names), err)
		}
		if err := f.delete(t.Context(), f.through(1-i, key)); err != nil {
			t.Error(err)
		}
		wantError(t, f.load(t.Context(), f.through(i, key), f.path("again")), "not found")
	}
	if left := f.objects(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if left := f.uploads(t); len(left) > 0 {
		t.Errorf("uploads left: %v", left)
	}
}

func TestOddKeysPassThroughTheTier(t *testing.T) {
	f := startTier(t, artifact.Options{})
	for n, key := range []string{"a b/c+d", "ü/ñ/日本", "q?x=1&y#z", "100%25/%2F", "-.~_!*'()", "=eq;semi:colon@at,", `back\slash`, "wf-[1].{2}|3^`<>\""} {
		content := []byte(key + fmt.Sprint(n))
		if err := f.save(t.Context(), f.write(t, fmt.Sprint("out", n), content, 0o644), f.through(n%2, key)); err != nil {
			t.Errorf("save %q: %v", key, err)
			continue
		}
		var streamed bytes.Buffer
		if err := f.open(t.Context(), f.through(1-n%2, key), &streamed); err != nil || !bytes.Equal(streamed.Bytes(), content) {
			t.Errorf("%q: %q, %v", key, streamed.Bytes(), err)
		}
		if is, err := f.isDirectory(t.Context(), f.through(n%2, key)); is || err != nil {
			t.Errorf("%q: directory: %v, %v", key, is, err)
		}
		if err := f.delete(t.Context(), f.through(n%2, key)); err != nil {
			t.Errorf("delete %q: %v", key, err)
		}
	}
	if left := f.objects(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestMissingInputOfATier(t *testing.T) {
	f := startTier(t, artifact.Options{})
	for i := range 2 {
		art := f.through(i, "none")
		wantError(t, f.load(t.Context(), art, f.path("a.tmp")), "not found")
		_, err := f.list(t.Context(), art)
		wantError(t, err, "not found")
		wantError(t, f.open(t.Context(), art, io.Discard), "not found")
		if is, err := f.isDirectory(t.Context(), art); is || err != nil {
			t.Errorf("%v, %v", is, err)
		}
		art.Optional = true
		in := f.path(fmt.Sprint("b.tmp", i))
		if err := f.load(t.Context(), art, in); err != nil {
			t.Errorf("optional: %v", err)
		}
		if got, err := os.ReadDir(in); err != nil || len(got) > 0 {
			t.Errorf("%v, %v", got, err)
		}
	}
}

// A step that overwrites what an earlier one saved: whoever loads it afterwards, through whichever worker,
// has the last, and the bucket has it too.
func TestTheLastSaveIsLoaded(t *testing.T) {
	f := startTier(t, artifact.Options{})
	for n := range 6 {
		content := []byte(strings.Repeat(fmt.Sprint(n), 1+n*700_000))
		if err := f.save(t.Context(), f.write(t, "out", content, 0o644), f.through(n%2, "k")); err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			in := f.path("in")
			if err := f.load(t.Context(), f.through(i, "k"), in); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(in); err != nil || !bytes.Equal(got, content) {
				t.Errorf("save %d through worker %d: %d bytes, want %d, %v", n, i, len(got), len(content), err)
			}
			os.Remove(in)
		}
		c, err := f.server.Client()
		if err != nil {
			t.Fatal(err)
		}
		o, err := c.GetObject(t.Context(), bucketName, f.prefix+"k", minio.GetObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(o); err != nil || !bytes.Equal(got, content) {
			t.Errorf("the bucket has %d bytes of %d, %v", len(got), len(content), err)
		}
		o.Close()
	}
}
