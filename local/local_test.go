package local

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Who gathers holds on one worker what the manifest's tier would; flags are named to those who have them.
func TestMemoryShares(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name    string
		options Options
		share   int64
		says    string
	}{
		{"enough workers", Options{Workers: 3, Gather: true}, 16 * mib, ""},
		{"fewer workers", Options{Workers: 1, Flags: true}, 16 * mib, "dataset a/b: 1 worker on this machine instead of 3 (--workers)\n"},
		{"gathered", Options{Workers: 1, Gather: true}, 48 * mib, "dataset a/b: 1 worker on this machine instead of 3, with 48 MiB each\n"},
		{"gathered on two", Options{Workers: 2, Gather: true}, 24 * mib, "dataset a/b: 2 workers on this machine instead of 3, with 24 MiB each\n"},
		{"gathered as far as there is memory", Options{Workers: 1, Gather: true, Memory: 32 * mib}, 32 * mib,
			"dataset a/b: 1 worker on this machine instead of 3, with 48 MiB each\ndataset a/b: 32 MiB a worker on this machine instead of 48 MiB\n"},
	} {
		d := &v1alpha1.Dataset{}
		d.Namespace, d.Name = "a", "b"
		d.Spec.Workers = v1alpha1.Workers{Replicas: 3, Copies: 1, Memory: resource.MustParse("16Mi")}
		var said bytes.Buffer
		c.options.Log = &said
		shares, err := (&Tier{options: c.options}).memoryShares([]*v1alpha1.Dataset{d})
		if err != nil || !slices.Equal(shares, []int64{c.share}) || said.String() != c.says {
			t.Errorf("%s: %d, %v, said %q, want %d, %q", c.name, shares, err, &said, c.share, c.says)
		}
	}
	d := &v1alpha1.Dataset{}
	d.Spec.Workers = v1alpha1.Workers{Replicas: 1, Copies: 1, Memory: resource.MustParse("16Mi")}
	for _, flags := range []bool{false, true} {
		_, err := (&Tier{options: Options{Workers: 1, Memory: mib, Flags: flags, Log: &bytes.Buffer{}}}).memoryShares([]*v1alpha1.Dataset{d})
		if err == nil || strings.Contains(err.Error(), "--memory") != flags {
			t.Errorf("too little memory, flags %v: %v", flags, err)
		}
	}
}

// Another system's Dataset is passed over, and who has no other learns why it does not count.
func TestStartWithAnothersDataset(t *testing.T) {
	file := filepath.Join(t.TempDir(), "fluid.yaml")
	text := "apiVersion: data.fluid.io/v1alpha1\nkind: Dataset\nmetadata: {name: genomes}\n---\napiVersion: data.fluid.io/v1alpha1\nkind: DataLoad\nmetadata: {name: warm}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	_, err := Start(t.Context(), Options{Manifests: []string{file}, Log: &said})
	if err == nil || !strings.Contains(err.Error(), "fluid.yaml: no Dataset of data.stepcache.dev/v1alpha1 in it") {
		t.Errorf("%v", err)
	}
	if want := "not used: 1 object of data.fluid.io/v1alpha1, DataLoad\nnot used: 1 object of data.fluid.io/v1alpha1, Dataset\n"; said.String() != want {
		t.Errorf("said %q, want %q", &said, want)
	}
}
