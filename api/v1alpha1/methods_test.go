package v1alpha1

import (
	"strings"
	"testing"
	"time"

	"github.com/bmatcuk/doublestar/v4"
	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

func TestMountSource(t *testing.T) {
	for _, c := range []struct {
		source string
		scheme Scheme
		bucket bool
		target string
		folder string
	}{
		{"s3://bucket/a://b", SchemeS3, true, "", ""},
		{"oss://bucket", SchemeOSS, true, "", ""},
		{"file:///data", SchemeFile, false, "", ""},
		{"dataset://ns/name", SchemeDataset, false, "ns/name", "/"},
		{"dataset://ns/name/", SchemeDataset, false, "ns/name", "/"},
		{"dataset://ns/name/a/b/", SchemeDataset, false, "ns/name", "/a/b"},
		{"nothing", "", false, "", ""},
	} {
		m := Mount{Source: c.source}
		target, folder, ok := m.Dataset()
		want := types.NamespacedName{}
		if ns, name, found := strings.Cut(c.target, "/"); found {
			want = types.NamespacedName{Namespace: ns, Name: name}
		}
		if m.Scheme() != c.scheme || m.Bucket() != c.bucket || target != want || folder != c.folder || ok != (c.target != "") {
			t.Errorf("%s: scheme %q, bucket %v, target %v %q %v", c.source, m.Scheme(), m.Bucket(), target, folder, ok)
		}
	}
}

func TestQuantities(t *testing.T) {
	w := Workers{Replicas: 3, Memory: resource.MustParse("12Gi")}
	if w.MemoryBytes() != 12<<30 || w.TotalBytes() != 36<<30 {
		t.Errorf("%d, %d", w.MemoryBytes(), w.TotalBytes())
	}
	// The largest tier that the rules allow does not overflow.
	w = Workers{Replicas: 1000, Memory: resource.MustParse("64Ti")}
	if w.TotalBytes() != 64000<<40 {
		t.Errorf("%d", w.TotalBytes())
	}
	zero := resource.MustParse("0")
	for name, c := range map[string]struct {
		node *NodeCache
		ok   bool
	}{"absent": {nil, false}, "empty": {&NodeCache{}, false}, "zero": {&NodeCache{Memory: &zero}, true}} {
		if n, ok := c.node.MemoryBytes(); n != 0 || ok != c.ok {
			t.Errorf("%s: %d, %v", name, n, ok)
		}
	}
}

func TestRefreshEvery(t *testing.T) {
	hour := &metav1.Duration{Duration: time.Hour}
	for _, c := range []struct {
		refresh Refresh
		want    time.Duration
	}{
		{Refresh{}, 0},
		{Refresh{Policy: RefreshNever, Interval: hour}, 0},
		{Refresh{Policy: RefreshInterval}, 0},
		{Refresh{Policy: RefreshInterval, Interval: hour}, time.Hour},
	} {
		if d, ok := c.refresh.Every(); d != c.want || ok != (c.want > 0) {
			t.Errorf("%+v: %v, %v", c.refresh, d, ok)
		}
	}
}

func TestCredentialsRefMap(t *testing.T) {
	want := map[string]string{"accessKeyID": "accessKeyID", "accessKeySecret": "accessKeySecret", "sessionToken": "sessionToken"}
	var absent *CredentialsRef
	for _, r := range []*CredentialsRef{absent, {Name: "a"}, {Name: "a", Keys: &CredentialKeys{}}} {
		if diff := cmp.Diff(want, r.Map()); diff != "" {
			t.Error(diff)
		}
	}
	want["accessKeySecret"] = "SK"
	if diff := cmp.Diff(want, (&CredentialsRef{Keys: &CredentialKeys{AccessKeySecret: "SK"}}).Map()); diff != "" {
		t.Error(diff)
	}
}

func TestSharesWith(t *testing.T) {
	d := &Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "own"}, Spec: DatasetSpec{ShareWith: []Namespace{"friend"}}}
	for ns, want := range map[string]bool{"own": true, "friend": true, "other": false, "": false} {
		if got := d.SharesWith(ns); got != want {
			t.Errorf("%q: %v", ns, got)
		}
	}
}

func TestPatternsMatchFilesAndFolders(t *testing.T) {
	for _, c := range []struct{ pattern, matched, not string }{
		{"/", "/a /a/b", ""},
		{"/**", "/a /a/b", ""},
		{"/shards", "/shards /shards/0/x", "/shards2 /a/shards"},
		{"/shards/", "/shards/0/x", "/shards2"},
		{"/shards/**", "/shards/x /shards/0/x", "/other"},
		{"/*/x", "/a/x /a/x/y", "/a/b/x"},
		{"/**/*.fa", "/r.fa /a/b/r.fa /a/folder.fa/x", "/r.fai"},
		{`/a\*`, "/a*", "/ab"},
	} {
		l := DataLoad{Spec: DataLoadSpec{Paths: []PathPattern{PathPattern(c.pattern)}}}
		match := func(path string) bool {
			ok := false
			for _, p := range l.Patterns() {
				m, err := doublestar.Match(p, path)
				if err != nil {
					t.Fatalf("%s: %v", p, err)
				}
				ok = ok || m
			}
			return ok
		}
		for _, path := range strings.Fields(c.matched) {
			if !match(path) {
				t.Errorf("%s does not load %s", c.pattern, path)
			}
		}
		for _, path := range strings.Fields(c.not) {
			if match(path) {
				t.Errorf("%s loads %s", c.pattern, path)
			}
		}
	}
	if p := (&DataLoad{}).Patterns(); p != nil {
		t.Errorf("no paths, yet patterns %v", p)
	}
}

func TestCopiesOf(t *testing.T) {
	d := &Dataset{Spec: DatasetSpec{Workers: Workers{Copies: 2}}}
	three := int32(3)
	if got := (&DataLoad{}).CopiesOf(d); got != 2 {
		t.Errorf("got %d", got)
	}
	if got := (&DataLoad{Spec: DataLoadSpec{Copies: &three}}).CopiesOf(d); got != 3 {
		t.Errorf("got %d", got)
	}
}

func TestCheckClusterTellsWhatOnlyLocalModeCan(t *testing.T) {
	for _, c := range []struct {
		mount Mount
		want  string
	}{
		{Mount{Source: "s3://bucket", Path: "/", CredentialsSecretRef: &CredentialsRef{Name: "a"}}, ""},
		{Mount{Source: "s3://bucket", Path: "/", Anonymous: true}, ""},
		{Mount{Source: "s3://bucket", Path: "/", Ambient: true}, ""},
		{Mount{Source: "dataset://a/b", Path: "/"}, ""},
		{Mount{Source: "file:///data", Path: "/x"}, "spec.mounts[/x].source: Forbidden: file:///data is a folder of one machine"},
		{Mount{Source: "oss://bucket", Path: "/"}, "spec.mounts[/].credentialsSecretRef: Required value: on a cluster"},
	} {
		err := (&Dataset{Spec: DatasetSpec{Mounts: []Mount{c.mount}}}).CheckCluster().ToAggregate()
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.mount.Source, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got %v, want %s", c.mount.Source, err, c.want)
		}
	}
}

func TestAddToScheme(t *testing.T) {
	s := runtime.NewScheme()
	if err := AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	for _, o := range []runtime.Object{&Dataset{}, &DatasetList{}, &DataLoad{}, &DataLoadList{}} {
		kinds, _, err := s.ObjectKinds(o)
		if err != nil || len(kinds) != 1 || kinds[0].GroupVersion() != GroupVersion {
			t.Errorf("%T: %v, %v", o, kinds, err)
		}
	}
}

// What is not set is not written: an applied object holds what its author wrote, not our zero values.
func TestZeroValuesAreNotWritten(t *testing.T) {
	d := &Dataset{Spec: DatasetSpec{Mounts: []Mount{{Source: "s3://b"}}, Workers: Workers{Memory: resource.MustParse("1Gi"), Template: &WorkerTemplate{}}}}
	b, err := yaml.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	want := "metadata: {}\nspec:\n  mounts:\n  - source: s3://b\n  workers:\n    memory: 1Gi\n    template: {}\n"
	if diff := cmp.Diff(want, string(b)); diff != "" {
		t.Error(diff)
	}
}
