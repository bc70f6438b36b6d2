package webhook

import (
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
)

func TestParseMounts(t *testing.T) {
	got, err := parseMounts(" genomes=/data/ ,ns/other=/x, ", "argo")
	want := []annotationMount{{types.NamespacedName{Namespace: "argo", Name: "genomes"}, "/data"}, {types.NamespacedName{Namespace: "ns", Name: "other"}, "/x"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for value, says := range map[string]string{
		"My_NS/genomes=/data": `"My_NS" is not the name of a namespace`,
		"ns/My_genomes=/data": `"My_genomes" is not the name of a Dataset`,
	} {
		if _, err := parseMounts(value, "argo"); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %s", value, err, says)
		}
	}
}

func TestParseStagePaths(t *testing.T) {
	got, err := parseStagePaths(`/a/{b,c}.bin, genomes=/d/**,ns/other=/e\,f`, "argo")
	want := []stagePath{{pattern: "/a/{b,c}.bin"}, {types.NamespacedName{Namespace: "argo", Name: "genomes"}, "/d/**"}, {types.NamespacedName{Namespace: "ns", Name: "other"}, `/e\,f`}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}

func TestParseStagePathsRefusesWhatIsMatchedForEver(t *testing.T) {
	_, err := parseStagePaths("/**/"+strings.Repeat("{,}", 40)+"x", "argo")
	if err == nil || !strings.Contains(err.Error(), "stands for more than 256") {
		t.Errorf("%v", err)
	}
}

func FuzzParseMounts(f *testing.F) {
	for _, s := range []string{"genomes=/data", "ns/g=/a/b,h=/c", ",,=", "g=/a,g=/a/b", "a=/\x00", "g=//x", strings.Repeat("a=/b,", 1000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		all, err := parseMounts(s, "argo")
		if err == nil && len(all) == 0 {
			t.Fatal("nothing, and no error")
		}
		for i, m := range all {
			if m.dataset.Namespace == "" || m.dataset.Name == "" || !path.IsAbs(m.path) || path.Clean(m.path) != m.path || m.path == "/" || strings.ContainsAny(m.path, ":\n\x00") {
				t.Errorf("%q: %+v", s, m)
			}
			for _, o := range all[:i] {
				if o.path == m.path || below(o.path, m.path) || below(m.path, o.path) {
					t.Errorf("%q: %s and %s overlap", s, o.path, m.path)
				}
			}
		}
	})
}

func FuzzParseStagePaths(f *testing.F) {
	for _, s := range []string{"/a", "g=/a/**", "/{a,b}", "/[", `/\`, "/a/../b", "}{,/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		all, err := parseStagePaths(s, "argo")
		if err == nil && len(all) == 0 {
			t.Fatal("nothing, and no error")
		}
		for _, p := range all {
			if err := checkPattern(p.pattern); err != nil {
				t.Errorf("%q: %v", s, err)
			}
		}
	})
}

func FuzzParseStep(f *testing.F) {
	pod, err := os.ReadFile("testdata/pods/argo-v3.7.yaml")
	if err != nil {
		f.Fatal(err)
	}
	_, value, _ := strings.Cut(string(pod), "value: '")
	value, _, _ = strings.Cut(value, "'\n")
	for _, s := range []string{value, "offloaded", "{}", "null", `{"inputs":null,"script":null}`, `{"inputs":{"artifacts":[null,{"s3":{}},{"s3":null,"oss":{"bucket":"b","key":"../../x"}}]}}`, strings.Repeat("x", argoOffloaded)} {
		f.Add(s)
	}
	d := dataset("argo", "genomes")
	f.Fuzz(func(t *testing.T, s string) {
		st, ok := parseStep(s)
		if len(s) >= argoOffloaded && ok {
			t.Error("what is offloaded is known")
		}
		for _, o := range st.objects {
			if o.bucket == "" || o.key == "" {
				t.Errorf("%q: %+v", s, o)
			}
			for _, p := range o.in(d) {
				if !path.IsAbs(p) {
					t.Errorf("%q: path %q", s, p)
				}
				if got := catalog.NewPattern(escapePattern(p)).Folder; got != p {
					t.Errorf("%q is escaped to %q", p, got)
				}
			}
		}
	})
}

// From 131,072 bytes Argo keeps the template elsewhere; what is in the variable then is not to be believed.
func TestOffloadedTemplateIsUnknown(t *testing.T) {
	small := `{"inputs":{"artifacts":[{"s3":{"bucket":"inputs","key":"genomes/x"}}]},"pad":"`
	for _, c := range []struct {
		value string
		known bool
	}{
		{"offloaded", false},
		{small + strings.Repeat("x", 131071-len(small)-2) + `"}`, true},
		{small + strings.Repeat("x", 131072-len(small)-2) + `"}`, false},
		{`{"inputs":`, false},
	} {
		s, ok := parseStep(c.value)
		if ok != c.known || ok && len(s.objects) != 1 {
			t.Errorf("%d bytes: known %v, %v", len(c.value), ok, s.objects)
		}
	}
}

func TestArtifactsInDatasets(t *testing.T) {
	oss := dataset("argo", "genomes", func(d *v1alpha1.Dataset) {
		d.Spec.Mounts = []v1alpha1.Mount{
			{Source: "oss://inputs/genomes", Path: "/g", Endpoint: "oss-cn-shanghai-internal.aliyuncs.com"},
			{Source: "oss://inputs/single/a.bin", Path: "/one", Endpoint: "oss-cn-shanghai-internal.aliyuncs.com"},
			{Source: "dataset://x/y", Path: "/d"},
		}
	})
	s3 := dataset("argo", "genomes")
	for _, c := range []struct {
		d    *v1alpha1.Dataset
		o    object
		want []string
	}{
		{s3, object{"s3", "minio:9000", "inputs", "genomes/a/b"}, []string{"/a/b"}},
		{s3, object{"s3", "http://MINIO:9000/", "inputs", "genomes/a/"}, []string{"/a"}},
		{s3, object{"s3", "", "inputs", "genomes"}, []string{"/", "/genomes"}},
		{s3, object{"s3", "other:9000", "inputs", "genomes/a"}, nil},
		{s3, object{"s3", "", "others", "genomes/a"}, nil},
		{s3, object{"s3", "", "inputs", "genomes2/a"}, nil},
		{s3, object{"s3", "", "inputs", "elsewhere/a"}, nil},
		{s3, object{"oss", "", "inputs", "genomes/a"}, nil},
		{oss, object{"oss", "oss-cn-shanghai.aliyuncs.com", "inputs", "genomes/a"}, []string{"/g/a"}},
		{oss, object{"s3", "oss-cn-shanghai.aliyuncs.com", "inputs", "genomes/a"}, []string{"/g/a"}},
		{oss, object{"s3", "minio:9000", "inputs", "genomes/a"}, nil},
		{oss, object{"oss", "", "inputs", "single/a.bin"}, []string{"/one", "/one/a.bin"}},
		{oss, object{"oss", "", "inputs", "single"}, []string{"/one"}},
	} {
		if got := c.o.in(c.d); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %q, want %q", c.o, got, c.want)
		}
	}
}

func TestPathsBelow(t *testing.T) {
	for text, want := range map[string][]string{
		"sha256sum /data/a/b /data/c":                     {"a/b", "c"},
		`["cat","/data/x y"]`:                             {"x"},
		"--in=/data/a --out=/tmp/data/b":                  {"a"},
		"/data/a;/data/b|wc -l>/data/c":                   {"a", "b", "c"},
		"cat /data/shards/* /data/$F /data/`x`":           nil,
		"/data/../etc/passwd":                             {"etc/passwd"},
		"/data /data/ /database/x /xdata/data/y":          nil,
		"PATH=/bin:/data/bin python3 -c 'f(\"/data/q\")'": {"bin", "q"},
	} {
		if got := pathsBelow(text, "/data"); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func FuzzPathsBelow(f *testing.F) {
	f.Add("cat /data/a /data/b*", "/data")
	f.Add("/data/data/data/", "/data")
	f.Fuzz(func(t *testing.T, text, folder string) {
		folder = path.Clean("/" + folder)
		for _, p := range pathsBelow(text, folder) {
			if p == "" || strings.HasPrefix(p, "/") || path.Clean(p) != p || strings.HasPrefix(p, "../") {
				t.Errorf("%q below %q: %q", text, folder, p)
			}
		}
	})
}

func TestReads(t *testing.T) {
	pod := decodePod(t, readPod(t, "argo-v3.7", put("annotations", AnnotationStagePaths, "/listed/**,other=/no")))
	n := &need{dataset: dataset("argo", "genomes"), volumes: []int{2}}
	want := []string{"/listed/**", "/index/chr1.fai", "/shards/0001.bin"}
	if d := cmp.Diff(want, reads(pod, "argo", n)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	// A mount of a folder of the Dataset.
	c := &pod.Spec.Containers[1]
	c.VolumeMounts[0] = corev1.VolumeMount{Name: "data", MountPath: "/data", SubPath: "deep"}
	if got := reads(pod, "argo", n); !slices.Contains(got, "/deep/shards/0001.bin") {
		t.Errorf("%q", got)
	}
}
