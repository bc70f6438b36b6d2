package manifest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

const (
	dataset = `apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: genomes}
spec:
  mounts: [{source: "s3://bucket/prefix/"}]
  workers: {memory: 64Mi}
`
	load = `apiVersion: data.stepcache.dev/v1alpha1
kind: DataLoad
metadata: {name: warm}
spec:
  datasetRef: {name: genomes}
`
)

// refused fails the test unless err is there and every one of its lines that matters is named by want,
// in which each line is a part of a line of err.
func refused(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil {
		t.Fatalf("accepted; want an error with %q", want)
	}
	for _, w := range strings.Split(strings.TrimSpace(want), "\n") {
		if !strings.Contains(err.Error(), strings.TrimSpace(w)) {
			t.Errorf("got error\n%v\nwant it to have\n%s", err, w)
		}
	}
}

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReadDesignExample(t *testing.T) {
	s, err := Read("testdata/design.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d, ok := s.Dataset(types.NamespacedName{Namespace: "argo", Name: "genomes"})
	if !ok || len(s.Datasets) != 1 || len(s.DataLoads) != 1 || len(s.Secrets) != 1 {
		t.Fatalf("read %+v", s)
	}
	if got := d.Spec.Workers.MemoryBytes(); got != 12<<30 {
		t.Errorf("memory of a worker is %d", got)
	}
	if got, ok := d.Spec.Node.MemoryBytes(); !ok || got != 2<<30 {
		t.Errorf("memory of a node is %d, %v", got, ok)
	}
	if loads := s.Loads(); len(loads) != 1 || loads[0].CopiesOf(d) != 2 {
		t.Errorf("loads are %+v", loads)
	}
	files, err := s.Credentials(d, &d.Spec.Mounts[0])
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]byte{"accessKeyID": []byte("id"), "accessKeySecret": []byte("secret")}
	if diff := cmp.Diff(want, files); diff != "" {
		t.Error(diff)
	}
}

func TestDefaults(t *testing.T) {
	s, err := Parse("m.yaml", []byte(dataset+"---\n"+load))
	if err != nil {
		t.Fatal(err)
	}
	d, l := s.Datasets[0], s.DataLoads[0]
	got := map[string]any{
		"namespace": d.Namespace, "path": d.Spec.Mounts[0].Path, "replicas": d.Spec.Workers.Replicas,
		"copies": d.Spec.Workers.Copies, "access": d.Spec.Access, "write": d.Spec.Write.Policy,
		"refresh": d.Spec.Refresh.Policy, "locality": d.Spec.Locality, "load namespace": l.Namespace,
		"load copies": l.CopiesOf(d), "apiVersion": d.APIVersion, "kind": l.Kind,
	}
	want := map[string]any{
		"namespace": "default", "path": "/", "replicas": int32(1),
		"copies": int32(1), "access": v1alpha1.ReadOnly, "write": v1alpha1.WriteThrough,
		"refresh": v1alpha1.RefreshNever, "locality": v1alpha1.LocalityPrefer, "load namespace": "default",
		"load copies": int32(1), "apiVersion": "data.stepcache.dev/v1alpha1", "kind": "DataLoad",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, ok := d.Spec.Node.MemoryBytes(); ok {
		t.Error("a node's memory has a value though none was set")
	}
	if _, ok := d.Spec.Refresh.Every(); ok {
		t.Error("refreshes though policy is Never")
	}
}

func TestDefaultsWithinWhatIsWritten(t *testing.T) {
	s, err := Parse("m.yaml", []byte(`apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: genomes}
spec:
  mounts: [{source: "s3://bucket", credentialsSecretRef: {name: k, keys: {accessKeyID: AK}}}]
  workers: {memory: 64Mi}
  write: {}
  refresh: {policy: Interval, interval: 1h30m}
  access: null
`))
	if err != nil {
		t.Fatal(err)
	}
	spec := s.Datasets[0].Spec
	if spec.Access != v1alpha1.ReadOnly || spec.Write.Policy != v1alpha1.WriteThrough {
		t.Errorf("access %q, write policy %q", spec.Access, spec.Write.Policy)
	}
	if every, ok := spec.Refresh.Every(); !ok || every != 90*time.Minute {
		t.Errorf("refreshes every %v, %v", every, ok)
	}
	want := map[string]string{"accessKeyID": "AK", "accessKeySecret": "accessKeySecret", "sessionToken": "sessionToken"}
	if diff := cmp.Diff(want, spec.Mounts[0].CredentialsSecretRef.Map()); diff != "" {
		t.Error(diff)
	}
}

func TestReadFolderOneLevelInOrder(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"b.yml":        load,
		"a.yaml":       dataset + "---\nkind: ConfigMap\napiVersion: v1\n",
		"c.json":       `{"apiVersion":"v1","kind":"ConfigMap"} {"apiVersion":"argoproj.io/v1alpha1","kind":"Workflow"}`,
		"notes.txt":    "not read: [",
		".hidden.yaml": "not read: [",
	})
	if err := os.Mkdir(filepath.Join(dir, "deeper.yaml"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "deeper.yaml"), map[string]string{"x.yaml": "not read: ["})
	s, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Datasets) != 1 || len(s.DataLoads) != 1 {
		t.Errorf("read %d Datasets and %d DataLoads", len(s.Datasets), len(s.DataLoads))
	}
	want := map[string]int{"v1, ConfigMap": 2, "argoproj.io/v1alpha1, Workflow": 1}
	if diff := cmp.Diff(want, s.Ignored); diff != "" {
		t.Error(diff)
	}
}

func TestReadSeveralPaths(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"d.yaml": dataset, "l.yaml": load})
	if _, err := Read(filepath.Join(dir, "l.yaml"), filepath.Join(dir, "d.yaml")); err != nil {
		t.Error(err)
	}
	// The same file twice is a mistake, or the result of one.
	_, err := Read(filepath.Join(dir, "d.yaml"), dir)
	refused(t, err, "d.yaml: document 1 (line 1): Dataset default/genomes: there already is one in")
}

func TestReadWhatIsNotThere(t *testing.T) {
	dir := t.TempDir()
	_, err := Read(filepath.Join(dir, "missing.yaml"))
	refused(t, err, "missing.yaml: no such file or directory")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Error("the cause is lost")
	}
	_, err = Read(dir)
	refused(t, err, "holds no file named *.yaml")
	_, err = Read()
	refused(t, err, "no manifest given")
	if err := os.Symlink("nowhere", filepath.Join(dir, "dangling.yaml")); err != nil {
		t.Fatal(err)
	}
	_, err = Read(dir)
	refused(t, err, "dangling.yaml: no such file or directory")
}

func TestErrorsNameEveryPlace(t *testing.T) {
	_, err := Parse("m.yaml", []byte(strings.Replace(dataset, "64Mi", "0", 1)+"---\n# a comment\n---\n"+
		strings.Replace(load, "spec:", "spec:\n  path: [/x]", 1)))
	refused(t, err, `
		m.yaml: document 1 (line 1): Dataset default/genomes: spec.workers.memory: 0: memory of a worker must be at least 16Mi
		m.yaml: document 2 (line 10): DataLoad default/warm: spec.path: there is no such field; did you mean paths?`)
	var e *Error
	if !errors.As(err, &e) || e.File != "m.yaml" || e.Document != 1 || e.Line != 1 || e.Object != "Dataset default/genomes" {
		t.Errorf("got %+v", e)
	}
}

func TestObjectsThatAreNone(t *testing.T) {
	for name, c := range map[string]struct{ manifest, want string }{
		"list":                {"- a\n- b\n", "not an object"},
		"text":                {"hello", "not an object"},
		"no kind":             {"apiVersion: v1\n", "it needs apiVersion and kind"},
		"kind is a number":    {"apiVersion: v1\nkind: 3\n", "it needs apiVersion and kind"},
		"bad apiVersion":      {"apiVersion: a/b/c\nkind: Dataset\n", "must be group/version"},
		"other version":       {strings.Replace(dataset, "v1alpha1", "v1", 1), `"data.stepcache.dev/v1alpha1"`},
		"misspelt kind":       {strings.Replace(dataset, "kind: Dataset", "kind: DataSet", 1), `kind: there is no "DataSet" in data.stepcache.dev/v1alpha1; did you mean Dataset? what is read are Dataset and DataLoad, and Secret of apiVersion: v1`},
		"Secret of the group": {strings.Replace(dataset, "kind: Dataset", "kind: Secret", 1), `kind: there is no "Secret" in data.stepcache.dev/v1alpha1; what is read are Dataset and DataLoad, and Secret of apiVersion: v1`},
		"no metadata":         {strings.Replace(dataset, "metadata: {name: genomes}", "", 1), "metadata.name is missing"},
		"metadata is text":    {strings.Replace(dataset, "{name: genomes}", "x", 1), "metadata.name is missing"},
		"metadata is null":    {strings.Replace(dataset, "{name: genomes}", "", 1), "metadata.name is missing"},
		"name is a number":    {strings.Replace(dataset, "genomes", "12", 1), "put it in quotes"},
		"generated name":      {strings.Replace(dataset, "name: genomes", "generateName: x-", 1), "generateName"},
		"namespace a number":  {strings.Replace(dataset, "genomes}", "genomes, namespace: 3}", 1), "metadata.namespace: must be text"},
		"bad namespace":       {strings.Replace(dataset, "genomes}", "genomes, namespace: A_b}", 1), "metadata.namespace"},
		"label not text":      {strings.Replace(dataset, "genomes}", "genomes, labels: {a: 1}}", 1), "metadata.labels: must be text; put it in quotes"},
		"annotations a list":  {strings.NewReplacer("genomes}", "genomes, annotations: [x]}", "64Mi", "0").Replace(dataset), "metadata.annotations: must be a map of fields\nspec.workers.memory: 0: memory of a worker must be at least 16Mi"},
		"time that is none":   {strings.Replace(dataset, "genomes}", "genomes, creationTimestamp: x}", 1), "metadata: cannot be read"},
		"half a worker":       {strings.Replace(dataset, "64Mi}", "64Mi, replicas: 2.5}", 1), "spec.workers.replicas: must be a whole number of at most 2147483647"},
		"far too many":        {strings.Replace(dataset, "64Mi}", "64Mi, replicas: 99999999999999999999}", 1), "spec.workers.replicas: must be a whole number of at most 2147483647"},
		"bad label":           {strings.Replace(dataset, "genomes}", "genomes, labels: {a: 'b c'}}", 1), "metadata.labels"},
		"unknown in metadata": {strings.Replace(dataset, "genomes}", "genomes, nmespace: b}", 1), "metadata.nmespace: there is no such field"},
		"no spec":             {"apiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: a}\n", "spec is missing"},
		"spec is null":        {"apiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: a}\nspec:\n", "spec is missing"},
		"spec is a list":      {"apiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: a}\nspec: []\n", "spec: must be a map of fields"},
		"list of lists":       {"apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: List, items: []}]\n", "no Lists themselves"},
		"list without items":  {"apiVersion: v1\nkind: List\n", "items"},
		"list of text":        {"apiVersion: v1\nkind: List\nitems: [a]\n", "items[0]"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("m.yaml", []byte(c.manifest))
			refused(t, err, c.want)
		})
	}
}

// What kubectl get -o yaml wrote can be read again: a List, a status and the metadata of a server.
func TestReadWhatAClusterWrote(t *testing.T) {
	s, err := Parse("m.yaml", []byte(`apiVersion: v1
kind: List
items:
- apiVersion: data.stepcache.dev/v1alpha1
  kind: Dataset
  metadata:
    name: genomes
    namespace: argo
    creationTimestamp: "2026-01-02T03:04:05Z"
    generation: 3
    resourceVersion: "17"
    uid: 6f1c5e62-3a4b-4b8e-9d55-0242ac120002
    managedFields: [{manager: kubectl, operation: Apply, apiVersion: data.stepcache.dev/v1alpha1, fieldsType: FieldsV1, fieldsV1: {"f:spec": {}}}]
  spec:
    mounts: [{source: "s3://bucket/prefix/"}]
    workers: {memory: 64Mi}
  status: {phase: Ready, files: 3, whatever: 1}
`))
	if err != nil {
		t.Fatal(err)
	}
	if d := s.Datasets[0]; d.Namespace != "argo" || d.Status.Phase != "" {
		t.Errorf("read %+v", d)
	}
}
