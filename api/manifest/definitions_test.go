package manifest

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// The embedded definitions are those that a cluster gets, byte for byte.
func TestEmbeddedDefinitionsAreConfigCRD(t *testing.T) {
	const dir = "../../config/crd"
	embedded, err := fs.Glob(crds, "crd/*.yaml")
	if err != nil || len(embedded) != len(kinds) {
		t.Fatalf("%d definitions are embedded (%v), want %d", len(embedded), err, len(kinds))
	}
	for _, name := range embedded {
		got, err := crds.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join(dir, filepath.Base(name)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs from %s; run make generate", name, dir)
		}
	}
	config, err := filepath.Glob(filepath.Join(dir, "data.stepcache.dev_*.yaml"))
	if err != nil || len(config) != len(embedded) {
		t.Errorf("config/crd has %d definitions (%v), %d are embedded; run make generate", len(config), err, len(embedded))
	}
}

// A rule that does not compile would be an error of every object.
func TestDefinitionsCompile(t *testing.T) {
	for name, compiled := range kinds {
		k, err := compiled()
		if err != nil {
			t.Fatal(err)
		}
		if k.rules == nil {
			t.Errorf("%s has no rules", name)
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	for b.Loop() {
		if _, err := compile("crd/data.stepcache.dev_datasets.yaml"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParse(b *testing.B) {
	content, err := os.ReadFile("testdata/design.yaml")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := Parse("m.yaml", content); err != nil {
			b.Fatal(err)
		}
	}
}
