package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/controllers/envtest"
)

var update = flag.Bool("update", false, "write the golden patches")

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// world is a cluster that a test makes up.
type world struct {
	datasets   []*v1alpha1.Dataset
	loads      []*v1alpha1.DataLoad
	namespaces map[string]map[string]string
	nodes      map[string]string // hostname by name
	memory     []int64
	service    bool
	fails      error
}

func (w *world) Datasets(_ context.Context, namespace string) ([]*v1alpha1.Dataset, error) {
	var all []*v1alpha1.Dataset
	for _, d := range w.datasets {
		if d.Namespace == namespace {
			all = append(all, d)
		}
	}
	return all, w.fails
}

func (w *world) Loads(context.Context, string) ([]*v1alpha1.DataLoad, error) { return w.loads, w.fails }

func (w *world) NamespaceLabels(_ context.Context, namespace string) (map[string]string, error) {
	return w.namespaces[namespace], w.fails
}

func (w *world) NodeService(context.Context) (bool, error) { return w.service, w.fails }
func (w *world) Memory(context.Context) ([]int64, error)   { return w.memory, w.fails }

func (w *world) Hostname(_ context.Context, node string) (string, bool) {
	h, ok := w.nodes[node]
	return h, ok
}

func dataset(namespace, name string, change ...func(*v1alpha1.Dataset)) *v1alpha1.Dataset {
	d := &v1alpha1.Dataset{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: v1alpha1.DatasetSpec{
			Mounts:   []v1alpha1.Mount{{Source: "s3://inputs/genomes/", Path: "/", Endpoint: "minio:9000", Anonymous: true}},
			Workers:  v1alpha1.Workers{Replicas: 3, Memory: resource.MustParse("1Gi"), Copies: 1},
			Access:   v1alpha1.ReadOnly,
			Locality: v1alpha1.LocalityPrefer,
		},
		Status: v1alpha1.DatasetStatus{Phase: v1alpha1.DatasetReady, Bytes: 3 << 30},
	}
	for _, c := range change {
		c(d)
	}
	return d
}

// newWorld has Dataset argo/genomes, which replaces the claim oss-data, and ref/hg38, which is shared with
// argo, on three nodes with a node service.
func newWorld() *world {
	return &world{
		datasets: []*v1alpha1.Dataset{
			dataset("argo", "genomes", func(d *v1alpha1.Dataset) { d.Spec.Replaces = []v1alpha1.Replaced{{ClaimName: "oss-data"}} }),
			dataset("ref", "hg38", func(d *v1alpha1.Dataset) {
				d.Spec.ShareWith = []v1alpha1.Namespace{"argo"}
				d.Spec.Locality = v1alpha1.LocalityNone
			}),
		},
		namespaces: map[string]map[string]string{"argo": {}, "ref": {}},
		nodes:      map[string]string{"n1": "host1", "n2": "host2", "n3": "host3"},
		memory:     []int64{16 << 30, 16 << 30, 16 << 30},
		service:    true,
	}
}

// files of argo/genomes.
var genomes = map[string]int64{"shards/0001.bin": 600 << 20, "shards/0002.bin": 400 << 20, "index/chr1.fai": 1 << 20, "ref/huge": 3 << 30, "ref/empty": 0, "odd [name]*": 5}

func snapshot(t testing.TB, prefix string, files map[string]int64) *catalog.Snapshot {
	t.Helper()
	b := catalog.NewBuilder([]catalog.Mount{{URL: "s3://inputs", Prefix: prefix, Path: "/"}})
	for name, size := range files {
		if err := b.Add(0, source.Object{Key: prefix + name, Size: size, Version: "v1", ModTime: time.Unix(1, 0)}); err != nil {
			t.Fatal(err)
		}
	}
	enc, err := b.Encode(time.Unix(2, 0))
	if err != nil {
		t.Fatal(err)
	}
	s, err := catalog.Open(enc)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func members(nodes ...string) ring.Membership {
	m := ring.Membership{Epoch: 1}
	for i, n := range nodes {
		m.Members = append(m.Members, ring.Member{ID: fmt.Sprintf("genomes-worker-%d", i), Node: n, Addr: "127.0.0.1:1", State: ring.Ready})
	}
	return m
}

// runGenomes runs a real worker of argo/genomes, in a membership with one that is dead, and writes d's status. It
// returns the objects that the controller would make.
func runGenomes(t testing.TB, d *v1alpha1.Dataset) (ring.Membership, wire.Keys, *corev1.Secret, *corev1.ConfigMap) {
	t.Helper()
	dir := t.TempDir()
	keys := wire.GenerateKeys()
	for name, size := range genomes {
		path := filepath.Join(dir, "bucket", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o644), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"store", "keys"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := wire.WriteKeys(filepath.Join(dir, "keys"), keys); err != nil {
		t.Fatal(err)
	}
	w, err := worker.New(context.Background(), worker.Config{
		Dataset: "argo/genomes", ID: "genomes-worker-0", Memory: 64 << 20, Dir: filepath.Join(dir, "store"), KeysDir: filepath.Join(dir, "keys"),
		Listen: "127.0.0.1:0", Control: "127.0.0.1:0",
		Mounts: []worker.Mount{{Path: "/", Config: source.Config{URL: "file://" + filepath.Join(dir, "bucket")}}},
	}, worker.Deps{Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		w.Close()
	})
	envtest.Eventually(t, "listing", func() error {
		if w.Status().Snapshot == "" {
			return errors.New(w.Status().Problem)
		}
		return nil
	})
	m := members("n1", "n2")
	m.Members[0].Addr = w.Addr().String()
	list, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	read, err := os.ReadFile(filepath.Join(dir, "keys", "read"))
	if err != nil {
		t.Fatal(err)
	}
	d.Status.Phase, d.Status.Snapshot, d.Status.Bytes = v1alpha1.DatasetReady, w.Status().Snapshot, 5<<30
	labels := map[string]string{v1alpha1.LabelDataset: "genomes"}
	return m, keys,
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "argo", Name: v1alpha1.ReaderName("genomes"), Labels: labels}, Data: map[string][]byte{v1alpha1.KeyRead: read}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "argo", Name: v1alpha1.TierName("genomes"), Labels: labels}, Data: map[string]string{v1alpha1.KeyMembership: string(list)}}
}

// holdings are of argo/genomes, with a worker on each node of newWorld.
func holdings(t testing.TB) *Holdings {
	h := &Holdings{Logger: quiet()}
	s := snapshot(t, "genomes/", genomes)
	h.set(types.NamespacedName{Namespace: "argo", Name: "genomes"}, &holding{members: members("n1", "n2", "n3"), snapshot: s})
	return h
}

func injectHandler(t testing.TB, w *world) *Inject {
	return &Inject{
		Injector: &Injector{Cluster: w, Image: "stepcache:test", StageLimit: 4 << 30, NewID: func() string { return "0123456789" }},
		Placer:   &Placer{Nodes: w, Holdings: holdings(t)},
		Logger:   quiet(),
	}
}

func localityHandler(t testing.TB, w *world) *Locality {
	i := injectHandler(t, w)
	return &Locality{i.Injector, i.Placer, i.Logger}
}

func readPod(t testing.TB, name string, change ...func(pod map[string]any)) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "pods", name+".yaml"))
	if err != nil {
		t.Fatal(err)
	}
	pod := map[string]any{}
	if err := yaml.Unmarshal(b, &pod); err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(pod)
	}
	b, err = json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// put sets a string below metadata: labels or annotations.
func put(where, key, value string) func(map[string]any) {
	return func(pod map[string]any) {
		meta := pod["metadata"].(map[string]any)
		m, _ := meta[where].(map[string]any)
		if m == nil {
			m = map[string]any{}
			meta[where] = m
		}
		if value == "" {
			delete(m, key)
		} else {
			m[key] = value
		}
	}
}

func inject(mode string) func(map[string]any) { return put("labels", v1alpha1.LabelInject, mode) }

func mounts(value string) func(map[string]any) {
	return put("annotations", v1alpha1.AnnotationMounts, value)
}

func request(namespace string, raw []byte) admission.Request {
	return admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{
		UID: "1", Namespace: namespace, Operation: admissionv1.Create, Object: runtime.RawExtension{Raw: raw},
		Kind: metav1.GroupVersionKind{Version: "v1", Kind: "Pod"},
	}}
}

// apply does to the pod what an API server does with the answer.
func apply(t testing.TB, raw []byte, r admission.Response) []byte {
	t.Helper()
	if !r.Allowed {
		t.Fatalf("refused: %v", r.Result)
	}
	if len(r.Patches) == 0 {
		return raw
	}
	b, err := json.Marshal(r.Patches)
	if err != nil {
		t.Fatal(err)
	}
	p, err := jsonpatch.DecodePatch(b)
	if err != nil {
		t.Fatal(err)
	}
	after, err := p.Apply(raw)
	if err != nil {
		t.Fatalf("the patch does not apply: %v\n%s", err, b)
	}
	return after
}

func decodePod(t testing.TB, raw []byte) *corev1.Pod {
	t.Helper()
	pod := &corev1.Pod{}
	if err := json.Unmarshal(raw, pod); err != nil {
		t.Fatal(err)
	}
	return pod
}

// golden compares the patch with the file of its name.
func golden(t *testing.T, name string, r admission.Response) {
	t.Helper()
	path := filepath.Join("testdata", "patches", name+".json")
	got, err := json.MarshalIndent(r.Patches, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test ./webhook -update writes it)", err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("not %s (-want +got):\n%s", path, d)
	}
}

// denial is the message of a refusal.
func denial(t testing.TB, r admission.Response) string {
	t.Helper()
	if r.Allowed || r.Result == nil || r.Result.Code != 403 {
		t.Fatalf("not denied: allowed %v, %v", r.Allowed, r.Result)
	}
	return r.Result.Message
}

func volumeNames(pod *corev1.Pod) string {
	var names []string
	for _, v := range pod.Spec.Volumes {
		names = append(names, v.Name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}
