package webhook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	kclient "sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
)

// owner is the node that owns a file of genomes, on the given workers.
func owners(t *testing.T, h *Holdings, file string, n int) []string {
	t.Helper()
	k, _ := h.get(types.NamespacedName{Namespace: "argo", Name: "genomes"})
	i, ok := k.snapshot.Lookup(file)
	if !ok {
		t.Fatalf("no file %s", file)
	}
	o, _ := k.snapshot.Ring(i)
	var nodes []string
	for _, m := range k.members.Owners(o, 0, n) {
		nodes = append(nodes, m.Node)
	}
	return nodes
}

func TestShare(t *testing.T) {
	h := holdings(t)
	d := dataset("argo", "genomes")
	near := func(got, want float64) bool { return math.Abs(got-want) < 1 }
	one := owners(t, h, "/shards/0001.bin", 1)[0]
	two := owners(t, h, "/shards/0002.bin", 1)[0]
	if one == two {
		t.Fatal("both shards are on one node: this tests nothing")
	}
	for _, c := range []struct {
		name     string
		patterns []string
		want     map[string]float64
		total    float64
	}{
		{"one file", []string{"/shards/0001.bin"}, map[string]float64{one: 600 << 20}, 600 << 20},
		{"twice named", []string{"/shards/0001.bin", "/shards/0001*"}, map[string]float64{one: 600 << 20}, 600 << 20},
		{"a folder", []string{"/shards"}, map[string]float64{one: 600 << 20, two: 400 << 20}, 1000 << 20},
		{"wildcards", []string{"/*/000{1,2}.b?n"}, map[string]float64{one: 600 << 20, two: 400 << 20}, 1000 << 20},
		{"folder by wildcard", []string{"/shar*"}, map[string]float64{one: 600 << 20, two: 400 << 20}, 1000 << 20},
		{"escaped", []string{escapePattern("/odd [name]*")}, map[string]float64{owners(t, h, "/odd [name]*", 1)[0]: 5}, 5},
		{"empty file", []string{"/ref/empty"}, map[string]float64{owners(t, h, "/ref/empty", 1)[0]: 1}, 1},
		// Larger than the threshold: striped over all.
		{"striped", []string{"/ref/huge"}, map[string]float64{"n1": 1 << 30, "n2": 1 << 30, "n3": 1 << 30}, 3 << 30},
		// No hint, or none that is right: the Dataset as a whole.
		{"nothing", nil, map[string]float64{"n1": 1 << 30, "n2": 1 << 30, "n3": 1 << 30}, 3 << 30},
		{"unknown", []string{"/nope", "/no/*"}, map[string]float64{"n1": 1 << 30, "n2": 1 << 30, "n3": 1 << 30}, 3 << 30},
		{"all", []string{"/"}, map[string]float64{"n1": 1 << 30, "n2": 1 << 30, "n3": 1 << 30}, 3 << 30},
	} {
		got, total := h.Share(t.Context(), d, c.patterns)
		if len(got) != len(c.want) || !near(total, c.total) {
			t.Errorf("%s: %v of %v, want %v of %v", c.name, got, total, c.want, c.total)
			continue
		}
		for n, b := range c.want {
			if !near(got[n], b) {
				t.Errorf("%s: %s holds %v, want %v", c.name, n, got[n], b)
			}
		}
	}
	// Each copy is as good as the other.
	d.Spec.Workers.Copies = 2
	got, total := h.Share(t.Context(), d, []string{"/shards/0001.bin"})
	for _, n := range owners(t, h, "/shards/0001.bin", 2) {
		if got[n] != 600<<20 || total != 600<<20 {
			t.Errorf("copies: %v of %v", got, total)
		}
	}
	// Nobody is ready; nobody knows.
	k, _ := h.get(types.NamespacedName{Namespace: "argo", Name: "genomes"})
	for i := range k.members.Members {
		k.members.Members[i].State = ring.Leaving
	}
	if got, _ := h.Share(t.Context(), d, nil); got != nil {
		t.Errorf("leaving workers: %v", got)
	}
	if got, _ := h.Share(t.Context(), dataset("argo", "other"), nil); got != nil {
		t.Errorf("unknown Dataset: %v", got)
	}
}

// A Dataset of very many files is not gone through file by file during a call.
func TestShareIsBounded(t *testing.T) {
	files := make(map[string]int64)
	for i := range 3000 {
		files[fmt.Sprintf("many/%04d", i)] = 1
	}
	nodes := make([]string, 100)
	for i := range nodes {
		nodes[i] = fmt.Sprintf("n%d", i)
	}
	h := &Holdings{Logger: quiet()}
	h.set(types.NamespacedName{Namespace: "argo", Name: "genomes"}, &holding{members: members(nodes...), snapshot: snapshot(t, "", files)})
	d := dataset("argo", "genomes")
	got, total := h.Share(t.Context(), d, []string{"/many"})
	if len(got) != 100 || total != float64(d.Status.Bytes) {
		t.Errorf("%d nodes of %v: not the Dataset as a whole", len(got), total)
	}
	if got, _ := h.Share(t.Context(), d, []string{"/many/0001", "/many/0002"}); len(got) > 2 {
		t.Errorf("two files on %d nodes", len(got))
	}
}

// Nor by those of its files that come first.
func TestShareOfWhatIsTooMuchToLookAtIsTheDatasets(t *testing.T) {
	files := map[string]int64{"a/first.fa": 1, "z/last.fa": 1}
	for i := range maxPlacements {
		files[fmt.Sprintf("many/%06d", i)] = 1
	}
	h := &Holdings{Logger: quiet()}
	h.set(types.NamespacedName{Namespace: "argo", Name: "genomes"}, &holding{members: members("n1", "n2", "n3"), snapshot: snapshot(t, "", files)})
	d := dataset("argo", "genomes")
	if got, total := h.Share(t.Context(), d, []string{"/*/*.fa"}); len(got) != 3 || total != float64(d.Status.Bytes) {
		t.Errorf("%v of %v: not the Dataset as a whole", got, total)
	}
	if got, total := h.Share(t.Context(), d, []string{"/a/*.fa", "/z/last.fa"}); total != 2 {
		t.Errorf("two files: %v of %v", got, total)
	}
}

// All patterns of a call together look at as many files as one may, and none at all for whoever does not wait any more.
func TestShareLooksAtSoManyFilesForAllPatterns(t *testing.T) {
	files := map[string]int64{"z/last.fa": 1}
	for i := range maxPlacements / 2 {
		files[fmt.Sprintf("many/%06d", i)] = 1
	}
	h := &Holdings{Logger: quiet()}
	h.set(types.NamespacedName{Namespace: "argo", Name: "genomes"}, &holding{members: members("n1", "n2", "n3"), snapshot: snapshot(t, "", files)})
	d := dataset("argo", "genomes")
	for _, c := range []struct {
		patterns []string
		found    bool
	}{
		{[]string{"/*/last.fa"}, true},
		{[]string{"/z/last.fa", "/*/a", "/*/b"}, false},
		{[]string{"/*/last.fa" + strings.Repeat("{,}", 8)}, false}, // 256 for each file
	} {
		if _, total := h.Share(t.Context(), d, c.patterns); (total == 1) != c.found {
			t.Errorf("%q: %v bytes of files", c.patterns, total)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, total := h.Share(ctx, d, []string{"/*/last.fa"}); total == 1 {
		t.Error("a call that has ended went through the files")
	}
}

// known are objects that the webhook's cache would have.
type known struct {
	kclient.Reader
	objects []kclient.Object
}

func (k known) Get(_ context.Context, name types.NamespacedName, o kclient.Object, _ ...kclient.GetOption) error {
	for _, have := range k.objects {
		if reflect.TypeOf(have) == reflect.TypeOf(o) && kclient.ObjectKeyFromObject(have) == name {
			reflect.ValueOf(o).Elem().Set(reflect.ValueOf(have).Elem())
			return nil
		}
	}
	return apierrors.NewNotFound(schema.GroupResource{}, name.Name)
}

// A Dataset of very many files must not take the webhook down, and with it the pods of all others.
func TestSnapshotsThatDoNotFitAreNotPulled(t *testing.T) {
	d := dataset("argo", "genomes")
	_, _, secret, list := runGenomes(t, d)
	var dials atomic.Int64
	var log bytes.Buffer
	start := func(room int64) *Holdings {
		k := known{objects: []kclient.Object{d, secret, list}}
		return &Holdings{Cache: k, Live: k, Room: room, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelInfo})),
			Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
				dials.Add(1)
				return (&net.Dialer{}).DialContext(ctx, network, addr)
			}}
	}
	name := types.NamespacedName{Namespace: "argo", Name: "genomes"}
	reconciled := func(h *Holdings) *catalog.Snapshot {
		t.Helper()
		r, err := h.Reconcile(t.Context(), reconcile.Request{NamespacedName: name})
		if err != nil {
			t.Fatal(err)
		}
		k, _ := h.get(name)
		if again := r.RequeueAfter > 0; again != (k.snapshot == nil) {
			t.Errorf("again in %v with snapshot %v", r.RequeueAfter, k.snapshot)
		}
		return k.snapshot
	}

	s := reconciled(start(0))
	if s == nil {
		t.Fatalf("no snapshot without a bound:\n%s", &log)
	}
	size := int64(len(s.Encoded()))

	h := start(2*size - 1)
	log.Reset()
	if reconciled(h) != nil {
		t.Error("pulled into half the room that it takes")
	}
	if text := log.String(); strings.Count(text, "without a look at their files") != 1 || !strings.Contains(text, "resources.limits.memory") {
		t.Errorf("it said:\n%s", text)
	}
	if share, total := h.Share(t.Context(), d, []string{"/shards/0001.bin"}); len(share) != 2 || total != float64(d.Status.Bytes) {
		t.Errorf("placed by %v of %v, not by the Dataset as a whole", share, total)
	}
	log.Reset()
	before := dials.Load()
	if reconciled(h) != nil || log.Len() > 0 || dials.Load() != before {
		t.Errorf("asked for again in vain, with %d connections:\n%s", dials.Load()-before, &log)
	}

	other := types.NamespacedName{Namespace: "ref", Name: "hg38"}
	h = start(3*size - 1)
	h.set(other, &holding{snapshot: s})
	if reconciled(h) != nil {
		t.Error("pulled beside another for which the room is taken")
	}
	h.set(other, nil)
	if reconciled(h) == nil {
		t.Error("not pulled when the other had gone")
	}

	// The one before goes where there is no room for both.
	h = start(2 * size)
	h.set(name, &holding{digest: "before", snapshot: s})
	if got := reconciled(h); got == nil || got == s {
		t.Error("the new snapshot was not pulled in place of the one before")
	}
	if !h.admit(other, "digest", size/2) {
		t.Error("room stays taken after a pull")
	}

	// An earlier version listed a Dataset that takes puts; its listing goes as the controller takes it from the status.
	d.Status.Snapshot = ""
	if r, err := h.Reconcile(t.Context(), reconcile.Request{NamespacedName: name}); err != nil || r.RequeueAfter > 0 {
		t.Error(r, err)
	}
	if k, ok := h.get(name); !ok || k.snapshot != nil || k.digest != "" || len(k.members.Members) == 0 {
		t.Errorf("of a Dataset without a snapshot: %+v", k)
	}
}

// Workers that send nothing of their Dataset's snapshot are given up soon, and what is known of their nodes meanwhile is
// what there is now.
func TestWorkersThatSendNothing(t *testing.T) {
	d := dataset("argo", "genomes")
	_, _, secret, list := runGenomes(t, d)
	name := types.NamespacedName{Namespace: "argo", Name: "genomes"}
	var log bytes.Buffer
	dialed := make(chan struct{}, 100)
	k := known{objects: []kclient.Object{d, secret, list}}
	h := &Holdings{Cache: k, Live: k, Logger: slog.New(slog.NewTextHandler(&log, nil)), pullStall: 50 * time.Millisecond,
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			dialed <- struct{}{}
			ours, theirs := net.Pipe()
			t.Cleanup(func() { theirs.Close() })
			return ours, nil
		}}
	ctx, cancel := context.WithTimeout(t.Context(), pullTimeout/2)
	defer cancel()
	if r, err := h.Reconcile(ctx, reconcile.Request{NamespacedName: name}); err != nil || r.RequeueAfter == 0 || ctx.Err() != nil {
		t.Fatal(r, err, ctx.Err())
	}
	if !strings.Contains(log.String(), "nothing of the snapshot came for 50ms") {
		t.Errorf("it said:\n%s", &log)
	}

	// The membership changes while a snapshot is pulled.
	for len(dialed) > 0 {
		<-dialed
	}
	moves := make(chan struct{})
	h.pullStall, h.Dialer = 0, func(ctx context.Context, network, addr string) (net.Conn, error) {
		dialed <- struct{}{}
		<-moves
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	pulled := make(chan error)
	go func() {
		_, err := h.Reconcile(t.Context(), reconcile.Request{NamespacedName: name})
		pulled <- err
	}()
	<-dialed
	text, err := json.Marshal(members("n7"))
	if err != nil {
		t.Fatal(err)
	}
	newer := list.DeepCopy()
	newer.Data[v1alpha1.KeyMembership] = string(text)
	k.objects[2] = newer
	if _, _, err := h.follow(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	if got := h.Nodes(d); !slices.Equal(got, []string{"n7"}) {
		t.Errorf("workers on %q while a snapshot is pulled", got)
	}
	close(moves)
	if err := <-pulled; err != nil {
		t.Fatal(err)
	}
	if k, _ := h.get(name); k.snapshot == nil || !slices.Equal(h.Nodes(d), []string{"n7"}) {
		t.Errorf("a snapshot: %v, workers on %q after it", k.snapshot != nil, h.Nodes(d))
	}
}

func place(t *testing.T, w *world, h *Holdings, pod *corev1.Pod, needs ...*need) *patch {
	t.Helper()
	p := &patch{pod: pod}
	if warnings := (&Placer{Nodes: w, Holdings: h}).Place(context.Background(), "argo", p, needs); len(warnings) > 0 {
		t.Errorf("warnings %q", warnings)
	}
	return p
}

// workersOn adds nodes from 0 to the world, with a worker of the Dataset on each.
func (w *world) workersOn(h *Holdings, namespace, name string, nodes int) {
	var all []string
	for i := range nodes {
		node := fmt.Sprintf("m%03d", i)
		w.nodes[node] = "h" + node
		all = append(all, node)
	}
	h.set(types.NamespacedName{Namespace: namespace, Name: name}, &holding{members: members(all...)})
}

func TestPlace(t *testing.T) {
	h := holdings(t)
	n := &need{dataset: dataset("argo", "genomes")}
	for _, c := range []struct {
		name  string
		world func(*world)
		pod   *corev1.Pod
		need  *need
		ops   bool
	}{
		{"placed", nil, &corev1.Pod{}, n, true},
		{"nodes that are gone or take no pods", func(w *world) { w.nodes = nil }, &corev1.Pod{}, n, false},
		{"a node already", nil, &corev1.Pod{Spec: corev1.PodSpec{NodeName: "n1"}}, n, false},
		{"not wanted", nil, &corev1.Pod{}, &need{dataset: dataset("argo", "genomes", func(d *v1alpha1.Dataset) { d.Spec.Locality = v1alpha1.LocalityNone })}, false},
		{"required, but no nodes", func(w *world) { w.nodes = nil }, &corev1.Pod{}, &need{dataset: dataset("argo", "genomes", func(d *v1alpha1.Dataset) { d.Spec.Locality = v1alpha1.LocalityRequire })}, false},
	} {
		w := newWorld()
		if c.world != nil {
			c.world(w)
		}
		if p := place(t, w, h, c.pod, c.need); (len(p.ops) > 0) != c.ops {
			t.Errorf("%s: %v", c.name, p.ops)
		}
	}
}

// To name the first of many nodes that hold the same would pack the pods of all steps onto them.
func TestNodesThatNothingSetsApartAreNotPreferred(t *testing.T) {
	const key = "w/p/0"
	for _, c := range []struct {
		name  string
		nodes int
		need  *need
		want  func(*Holdings) map[string]int32
	}{
		{"as many as a pod names", maxNodes, &need{dataset: dataset("argo", "genomes")}, func(*Holdings) map[string]int32 {
			all := map[string]int32{}
			for i := range maxNodes {
				all[fmt.Sprintf("hm%03d", i)] = 2
			}
			return all
		}},
		{"more", 200, &need{dataset: dataset("argo", "genomes")}, func(*Holdings) map[string]int32 { return nil }},
		{"more, and one that owns what is loaded", 200, &need{dataset: dataset("argo", "genomes"), keys: []string{key}}, func(h *Holdings) map[string]int32 {
			k, _ := h.get(types.NamespacedName{Namespace: "argo", Name: "genomes"})
			return map[string]int32{"h" + k.members.NameOwners("argo/genomes", key, 1)[0].Node: 100}
		}},
	} {
		w, h, pod := newWorld(), holdings(t), &corev1.Pod{}
		w.workersOn(h, "argo", "genomes", c.nodes)
		p := place(t, w, h, pod, c.need)
		if got, want := preferred(pod), c.want(h); !maps.Equal(got, want) || len(want) == 0 && len(p.ops) > 0 {
			t.Errorf("%s: drawn to %v by %v, want %v", c.name, got, p.ops, want)
		}
	}
}

// What a step seems to read is a guess: a thousand steps that name one file would wait for the node that holds it.
func TestRequireNamesTheNodesOfAllWorkers(t *testing.T) {
	required := func(d *v1alpha1.Dataset) { d.Spec.Locality = v1alpha1.LocalityRequire }
	many := func(n int) (hosts []string) {
		for i := range n {
			hosts = append(hosts, fmt.Sprintf("hm%03d", i))
		}
		return hosts
	}
	genomes := &need{dataset: dataset("argo", "genomes", required)}
	other := &need{dataset: dataset("argo", "other", required)}
	const file = "/index/chr1.fai"
	step := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{AnnotationStagePaths: file}}}
	owner := owners(t, holdings(t), file, 1)[0]
	for _, c := range []struct {
		name  string
		world func(*world, *Holdings)
		pod   *corev1.Pod
		needs []*need
		want  []string
		warns []string
	}{
		{"one file", nil, step, []*need{genomes}, []string{"host1", "host2", "host3"}, nil},
		{"a node that takes no pods", func(w *world, _ *Holdings) { delete(w.nodes, "n2") }, step, []*need{genomes}, []string{"host1", "host3"}, nil},
		{"the file's own node takes none", func(w *world, _ *Holdings) { delete(w.nodes, owner) }, step, []*need{genomes},
			slices.DeleteFunc([]string{"host1", "host2", "host3"}, func(host string) bool { return host == newWorld().nodes[owner] }), nil},
		{"more nodes than are preferred", func(w *world, h *Holdings) { w.workersOn(h, "argo", "genomes", 200) }, &corev1.Pod{}, []*need{genomes}, many(200), nil},
		{"too many", func(w *world, h *Holdings) { w.workersOn(h, "argo", "genomes", maxRequired+1) }, &corev1.Pod{}, []*need{genomes}, nil,
			[]string{"argo/genomes", "257 nodes", "no more than 256"}},
		{"two Datasets", func(_ *world, h *Holdings) {
			h.set(types.NamespacedName{Namespace: "argo", Name: "other"}, &holding{members: members("n3", "n2", "n4")})
		}, &corev1.Pod{}, []*need{genomes, other}, []string{"host2", "host3"}, nil},
		{"two Datasets on different nodes", func(w *world, h *Holdings) {
			w.workersOn(h, "argo", "other", 3)
		}, &corev1.Pod{}, []*need{genomes, other}, nil, []string{"argo/genomes and argo/other", "no node has workers of all"}},
		{"another whose workers are not known", nil, &corev1.Pod{}, []*need{other, genomes}, []string{"host1", "host2", "host3"}, nil},
		{"another that prefers", func(w *world, h *Holdings) { w.workersOn(h, "argo", "other", 3) }, &corev1.Pod{},
			[]*need{genomes, {dataset: dataset("argo", "other")}}, []string{"host1", "host2", "host3"}, nil},
	} {
		w, h := newWorld(), holdings(t)
		if c.world != nil {
			c.world(w, h)
		}
		p := &patch{pod: c.pod.DeepCopy()}
		warnings := (&Placer{Nodes: w, Holdings: h}).Place(t.Context(), "argo", p, c.needs)
		var got []string
		if a := p.pod.Spec.Affinity; a != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
			terms := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
			if len(terms) != 1 || len(terms[0].MatchExpressions) != 1 {
				t.Errorf("%s: required: %v", c.name, terms)
			}
			got = terms[0].MatchExpressions[0].Values
			if p.pod.Annotations[AnnotationPlaced] == "" {
				t.Errorf("%s: not marked", c.name)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: required: %v, want %v", c.name, got, c.want)
		}
		if text := strings.Join(warnings, "\n"); (text == "") != (c.warns == nil) || slices.ContainsFunc(c.warns, func(s string) bool { return !strings.Contains(text, s) }) {
			t.Errorf("%s: warnings %q, want %q", c.name, warnings, c.warns)
		}
	}
}

// stepPod is a pod of a workflow whose inputs are artifacts, as Argo writes it.
func stepPod(t testing.TB, endpoint, bucket string, keys ...string) []byte {
	t.Helper()
	location := func(key string) map[string]any {
		return map[string]any{"name": "in", "path": "/in", "s3": map[string]any{"endpoint": endpoint, "bucket": bucket, "key": key, "insecure": true}}
	}
	var artifacts []any
	for _, k := range keys {
		artifacts = append(artifacts, location(k))
	}
	template, err := json.Marshal(map[string]any{"name": "one", "inputs": map[string]any{"artifacts": artifacts}, "outputs": map[string]any{}})
	if err != nil {
		t.Fatal(err)
	}
	env := []corev1.EnvVar{{Name: argoTemplate, Value: string(template)}}
	raw, err := json.Marshal(&corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{GenerateName: "one-", Labels: map[string]string{argoWorkflow: "one"}},
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{{Name: "init", Image: "argoexec", Env: env}},
			Containers:     []corev1.Container{{Name: "main", Image: "busybox", Env: env}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func preferred(pod *corev1.Pod) map[string]int32 {
	weights := map[string]int32{}
	if pod.Spec.Affinity != nil {
		for _, term := range pod.Spec.Affinity.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution {
			for _, h := range term.Preference.MatchExpressions[0].Values {
				weights[h] = term.Weight
			}
		}
	}
	return weights
}

func TestStepThatLoadsArtifactsFromTheTierIsDrawnToTheirOwners(t *testing.T) {
	h := holdings(t)
	m := members("n1", "n2", "n3")
	m.Members = append(m.Members, ring.Member{ID: "nowhere", Addr: "127.0.0.1:1", State: ring.Leaving})
	h.set(types.NamespacedName{Namespace: "argo", Name: "results"}, &holding{members: m})
	h.set(types.NamespacedName{Namespace: "ref", Name: "shared"}, &holding{members: m})
	owner := func(dataset, key string) string {
		return strings.Replace(m.NameOwners(dataset, key, 1)[0].Node, "n", "host", 1)
	}
	// Keys of two owners.
	one, two := "w/p/0", ""
	for i := 1; two == ""; i++ {
		if k := fmt.Sprintf("w/p/%d", i); owner("argo/results", k) != owner("argo/results", one) {
			two = k
		}
	}
	const endpoint = "results-s3.argo.svc:9000"
	for _, c := range []struct {
		name   string
		change func(*world)
		raw    []byte
		want   map[string]int32 // by host; others have 50
		placed string
	}{
		{"one", nil, stepPod(t, endpoint, "results", one), map[string]int32{owner("argo/results", one): 100}, "argo/results"},
		{"whole name and scheme", nil, stepPod(t, "http://results-s3.argo.svc.cluster.local:9000/", "results", one), map[string]int32{owner("argo/results", one): 100}, "argo/results"},
		{"two owners", nil, stepPod(t, endpoint, "results", one, two), map[string]int32{owner("argo/results", one): 75, owner("argo/results", two): 75}, "argo/results"},
		{"shared", nil, stepPod(t, "shared-s3.ref.svc:9000", "shared", one), map[string]int32{owner("ref/shared", one): 100}, "ref/shared"},
		{"not shared", func(w *world) { w.datasets[3].Spec.ShareWith = nil }, stepPod(t, "shared-s3.ref.svc:9000", "shared", one), nil, ""},
		{"locality None", func(w *world) { w.datasets[2].Spec.Locality = v1alpha1.LocalityNone }, stepPod(t, endpoint, "results", one), nil, ""},
		{"a Dataset that only reads", func(w *world) { w.datasets[2].Spec.Access = v1alpha1.ReadOnly }, stepPod(t, endpoint, "results", one), nil, ""},
		{"nodes that take no pods", func(w *world) { w.nodes = nil }, stepPod(t, endpoint, "results", one), nil, ""},
		{"the cluster is not known", func(w *world) { w.fails = errors.New("not yet") }, stepPod(t, endpoint, "results", one), nil, ""},
		{"no such Dataset", nil, stepPod(t, "other-s3.argo.svc:9000", "other", one), nil, ""},
		{"another bucket", nil, stepPod(t, endpoint, "other", one), nil, ""},
		{"another port", nil, stepPod(t, "results-s3.argo.svc:80", "results", one), nil, ""},
		{"no port", nil, stepPod(t, "results-s3.argo.svc", "results", one), nil, ""},
		{"outside the cluster", nil, stepPod(t, "results-s3.argo.example.com:9000", "results", one), nil, ""},
		{"no artifacts", nil, stepPod(t, endpoint, "results"), nil, ""},
	} {
		w := newWorld()
		w.datasets = append(w.datasets,
			dataset("argo", "results", func(d *v1alpha1.Dataset) { d.Spec.Access = v1alpha1.ReadWrite }),
			dataset("ref", "shared", func(d *v1alpha1.Dataset) {
				d.Spec.Access, d.Spec.ShareWith = v1alpha1.ReadWrite, []v1alpha1.Namespace{"argo"}
			}))
		if c.change != nil {
			c.change(w)
		}
		l := localityHandler(t, w)
		l.Placer.Holdings = h
		after := apply(t, c.raw, l.Handle(t.Context(), request("argo", c.raw)))
		pod := decodePod(t, after)
		want := map[string]int32{}
		if c.want != nil {
			want = map[string]int32{"host1": 50, "host2": 50, "host3": 50}
			maps.Copy(want, c.want)
		}
		if got := preferred(pod); !maps.Equal(got, want) || pod.Annotations[AnnotationPlaced] != c.placed {
			t.Errorf("%s: drawn to %v and placed by %q, want %v by %q", c.name, got, pod.Annotations[AnnotationPlaced], want, c.placed)
		}
		if again := l.Handle(t.Context(), request("argo", after)); len(again.Patches) > 0 {
			t.Errorf("%s: patched again: %v", c.name, again.Patches)
		}
	}
}

func BenchmarkInject(b *testing.B) {
	h := injectHandler(b, newWorld())
	r := request("argo", readPod(b, "argo-v3.7", inject("sidecar")))
	b.ReportAllocs()
	for b.Loop() {
		if a := h.Handle(context.Background(), r); !a.Allowed {
			b.Fatal(a.Result)
		}
	}
}
