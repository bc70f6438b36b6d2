package manifest

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func mountOf(name, namespace, source, more string) string {
	return fmt.Sprintf("---\napiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: %s, namespace: %s}\nspec: {mounts: [{source: %q}], workers: {memory: 64Mi} %s}\n",
		name, namespace, source, more)
}

func loadOf(name, more string) string {
	return fmt.Sprintf("---\napiVersion: data.stepcache.dev/v1alpha1\nkind: DataLoad\nmetadata: {name: %s}\nspec: {datasetRef: {name: genomes} %s}\n", name, more)
}

func TestReferences(t *testing.T) {
	for _, c := range []struct{ name, manifest, want string }{
		{"load before its Dataset", load + "---\n" + dataset, ""},
		{"load without its Dataset", load, "DataLoad default/warm: spec.datasetRef.name: \"genomes\": there is no Dataset of that name in namespace default"},
		{"load of a Dataset of a mistyped group", strings.Replace(dataset, "data.step", "step", 1) + "---\n" + load, "no Dataset of that name in namespace default in these manifests; add it or correct the name (a Dataset of apiVersion stepcache.dev/v1alpha1 is there, which is not used: it would have to be data.stepcache.dev/v1alpha1)"},
		{"source of a mistyped group", strings.Replace(mountOf("a", "ns", "s3://bucket", ""), "data.step", "step", 1) + mountOf("b", "ns", "dataset://ns/a", ""), "no Dataset ns/a in these manifests; add it (a Dataset of apiVersion stepcache.dev/v1alpha1 is there"},
		{"runAfter of a mistyped group", dataset + strings.Replace(loadOf("a", ""), "data.step", "step", 1) + loadOf("b", ", runAfter: {name: a}"), "(a DataLoad of apiVersion stepcache.dev/v1alpha1 is there"},
		{"load in another namespace", strings.Replace(dataset, "genomes}", "genomes, namespace: argo}", 1) + "---\n" + load, "there is no Dataset of that name in namespace default"},
		{"dataset source", mountOf("a", "ns", "s3://bucket", "") + mountOf("b", "ns", "dataset://ns/a/x", ""), ""},
		{"dataset source of a shared one", mountOf("a", "ns", "s3://bucket", ", shareWith: [ms]") + mountOf("b", "ms", "dataset://ns/a", ""), ""},
		{"dataset source not shared", mountOf("a", "ns", "s3://bucket", ", shareWith: [ks]") + mountOf("b", "ms", "dataset://ns/a", ""), "Dataset ns/a does not share with namespace ms; add it to that Dataset's shareWith"},
		{"dataset source missing", mountOf("b", "ms", "dataset://ns/a", ""), "there is no Dataset ns/a in these manifests"},
		{"dataset source is itself", mountOf("a", "ns", "dataset://ns/a/x", ""), "a Dataset cannot mount itself"},
		{"dataset sources in a circle", mountOf("a", "ns", "dataset://ns/b", "") + mountOf("b", "ns", "dataset://ns/c", "") + mountOf("c", "ns", "dataset://ns/a", ""), "Dataset ns/b leads back to this one"},
		{"dataset source beside a circle", mountOf("a", "ns", "dataset://ns/b", "") + mountOf("b", "ns", "dataset://ns/b", ""), "Dataset ns/b: spec.mounts[0].source: \"dataset://ns/b\": a Dataset cannot mount itself"},
		{"runAfter missing", dataset + loadOf("x", ", runAfter: {name: yy}"), "there is no DataLoad of that name"},
		{"runAfter in a circle", dataset + loadOf("x", ", runAfter: {name: yy}") + loadOf("yy", ", runAfter: {name: z}") + loadOf("z", ", runAfter: {name: x}"), "these loads wait for each other"},
		{"two of one name", dataset + "---\n" + dataset, "m.yaml: document 2 (line 8): Dataset default/genomes: there already is one in m.yaml, document 1 (line 1)"},
		{"one name, two kinds", dataset + loadOf("genomes", ""), ""},
		{"one name, two namespaces", mountOf("a", "ns", "s3://bucket", "") + mountOf("a", "ms", "s3://bucket", ""), ""},
		{"default namespace by name", dataset + "---\n" + strings.Replace(dataset, "genomes}", "genomes, namespace: default}", 1), "there already is one"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("m.yaml", []byte(c.manifest))
			if c.want != "" {
				refused(t, err, c.want)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestLoadsComeAfterWhatTheyRunAfter(t *testing.T) {
	s, err := Parse("m.yaml", []byte(dataset+
		loadOf("c", ", runAfter: {name: b}")+loadOf("first", "")+loadOf("b", ", runAfter: {name: a}")+loadOf("a", "")))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range s.Loads() {
		got = append(got, l.Name)
	}
	if want := []string{"a", "b", "c", "first"}; !slices.Equal(got, want) {
		t.Errorf("loads in the order %v, want %v", got, want)
	}
}
