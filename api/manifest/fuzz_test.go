package manifest

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Whatever a file holds, reading it ends with objects that pass their own rules again, or with errors
// that name the file; never with a panic.
func FuzzParse(f *testing.F) {
	seeds, err := filepath.Glob("testdata/*.*")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds in testdata (%v)", err)
	}
	for _, seed := range seeds {
		b, err := os.ReadFile(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, filepath.Ext(seed) == ".json")
	}
	for _, r := range datasetRules {
		f.Add([]byte("apiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: genomes}\nspec: "+r.spec), false)
	}
	f.Fuzz(func(t *testing.T, content []byte, asJSON bool) {
		name := "m.yaml"
		if asJSON {
			name = "m.json"
		}
		s, err := Parse(name, content)
		if err != nil {
			var e *Error
			if s != nil || !errors.As(err, &e) || e.File != name || err.Error() == "" {
				t.Fatalf("got %v and error %#v", s, err)
			}
			return
		}
		for _, d := range s.Datasets {
			if errs := Validate(t.Context(), d); len(errs) > 0 {
				t.Errorf("accepted, then refused: %v", errs)
			}
			if d.Spec.Workers.MemoryBytes() < 16<<20 || d.Spec.Workers.TotalBytes() < 16<<20 {
				t.Errorf("a worker has %d bytes of memory, all have %d", d.Spec.Workers.MemoryBytes(), d.Spec.Workers.TotalBytes())
			}
			for i := range d.Spec.Mounts {
				m := &d.Spec.Mounts[i]
				if _, _, ok := m.Dataset(); ok != (m.Scheme() == v1alpha1.SchemeDataset) {
					t.Errorf("source %q names a Dataset: %v", m.Source, ok)
				}
				_, _ = s.credentials(d, m, func(string) (string, bool) { return "", false })
			}
			d.CheckCluster()
		}
		if n := len(s.Loads()); n != len(s.DataLoads) {
			t.Errorf("%d of %d loads in order", n, len(s.DataLoads))
		}
		// What was read can be written and is read as the same.
		for _, l := range s.DataLoads {
			b, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			if errs := Validate(t.Context(), l); len(errs) > 0 {
				t.Errorf("accepted, then refused: %v\n%s", errs, b)
			}
		}
	})
}
