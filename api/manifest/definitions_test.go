package manifest

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/registry/customresource/tableconvertor"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
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

// What kubectl get shows, an API server makes of the definition: a column of type date is an age, and no time to come.
func TestALoadsEndIsATimeInItsColumn(t *testing.T) {
	b, err := crds.ReadFile("crd/data.stepcache.dev_dataloads.yaml")
	if err != nil {
		t.Fatal(err)
	}
	crd := &apiextensionsv1.CustomResourceDefinition{}
	if err := yaml.Unmarshal(b, crd); err != nil {
		t.Fatal(err)
	}
	columns, err := tableconvertor.New(crd.Spec.Versions[0].AdditionalPrinterColumns)
	if err != nil {
		t.Fatal(err)
	}
	end := metav1.NewTime(time.Now().Add(time.Hour).Truncate(time.Second).UTC())
	l := &v1alpha1.DataLoad{Status: v1alpha1.DataLoadStatus{Progress: v1alpha1.Progress{EstimatedCompletion: &end}}}
	table, err := columns.ConvertToTable(t.Context(), l, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(table.ColumnDefinitions, func(c metav1.TableColumnDefinition) bool { return c.Name == "Until" })
	if got, want := table.Rows[0].Cells[at], end.Format(time.RFC3339); got != want {
		t.Errorf("column Until shows %v, want %s", got, want)
	}
}

// Argo CD compares a list whole: what a server adds to an item of one is a difference that no sync takes away. A
// list's keys must have their defaults, or an item without one is refused.
func TestServersAddNothingToTheItemsOfLists(t *testing.T) {
	for name, compiled := range kinds {
		k, err := compiled()
		if err != nil {
			t.Fatal(err)
		}
		spec := k.structural.Properties["spec"]
		noDefaultsInItems(t, name+".spec", &spec, false)
	}
}

func noDefaultsInItems(t *testing.T, at string, s *structuralschema.Structural, inItem bool) {
	t.Helper()
	if inItem && s.Default.Object != nil {
		t.Errorf("%s has a default within an item of a list", at)
	}
	for name, p := range s.Properties {
		noDefaultsInItems(t, at+"."+name, &p, inItem)
	}
	if s.AdditionalProperties != nil && s.AdditionalProperties.Structural != nil {
		noDefaultsInItems(t, at+"{}", s.AdditionalProperties.Structural, inItem)
	}
	if s.Items == nil {
		return
	}
	for name, p := range s.Items.Properties {
		if !slices.Contains(s.XListMapKeys, name) {
			noDefaultsInItems(t, at+"[]."+name, &p, true)
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
