package stepcache_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stepcache/stepcache/api/manifest"
)

// Every example is what an API server accepts; `make e2e` also runs what its cluster can.
func TestExamplesAreValid(t *testing.T) {
	folders, err := os.ReadDir("examples")
	if err != nil {
		t.Fatal(err)
	}
	datasets := 0
	for _, f := range folders {
		if !f.IsDir() {
			continue
		}
		set, err := manifest.Read(filepath.Join("examples", f.Name()))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, d := range set.Datasets {
			datasets++
			for _, e := range d.CheckCluster() {
				t.Errorf("%s: %v", f.Name(), e)
			}
		}
	}
	if datasets < 3 {
		t.Errorf("%d Datasets found in the examples, want 3 and more", datasets)
	}
}
