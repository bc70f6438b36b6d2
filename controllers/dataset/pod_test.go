package dataset

import (
	"maps"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

func TestFootprintLeavesRoomForEverythingBesideTheCache(t *testing.T) {
	for _, c := range []struct{ quota, store, heap int64 }{
		{16 * mi, 80 * mi, 320*mi + mi/4},
		{512 * mi, 576 * mi, 328 * mi},
		{12 << 30, 13 << 30, 1280*mi + 192*mi},
		{64 << 40, 64<<40 + 1<<30, 1280*mi + 1<<40},
	} {
		store, heap := footprint(c.quota)
		if store != c.store || heap != c.heap {
			t.Errorf("quota %d: store %d and heap %d, want %d and %d", c.quota, store, heap, c.store, c.heap)
		}
		if store <= c.quota || heap < 256*mi {
			t.Errorf("quota %d: no room beside it", c.quota)
		}
	}
}

func TestMessagesNameTheSecretAndNotAFolderOfThePod(t *testing.T) {
	ref := &v1alpha1.CredentialsRef{Name: "access-key"}
	d := &v1alpha1.Dataset{Spec: v1alpha1.DatasetSpec{Mounts: []v1alpha1.Mount{{CredentialsSecretRef: ref}, {CredentialsSecretRef: ref}}}}
	got := forPeople(d, "folder /etc/stepcache/credentials/access-key has no key accessKeyID; make /etc/stepcache/credentials/access-key readable")
	if want := `secret "access-key" has no key accessKeyID; make secret "access-key" readable`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSizesAreInTheUnitsOfManifests(t *testing.T) {
	for bytes, want := range map[int64]string{0: "0", 1023: "1023", 1024: "1Ki", 1536: "1.5Ki", 12 << 30: "12Gi", 1 << 62: "4Ei"} {
		if got := size(bytes); got != want {
			t.Errorf("%d: %s, want %s", bytes, got, want)
		}
	}
}

func TestWorkersStayOutOfServiceMeshesUnlessAskedIn(t *testing.T) {
	type texts = map[string]string
	for name, c := range map[string]struct {
		template            *v1alpha1.WorkerTemplate
		labels, annotations texts
	}{
		"nothing asked": {nil, texts{injectIstio: "false", ambientIstio: "none"}, texts{injectLinkerd: "disabled"}},
		"others": {&v1alpha1.WorkerTemplate{Metadata: v1alpha1.WorkerMetadata{Labels: map[string]v1alpha1.LabelValue{"team": "a"}, Annotations: texts{"b": "c"}}},
			texts{"team": "a", injectIstio: "false", ambientIstio: "none"}, texts{"b": "c", injectLinkerd: "disabled"}},
		"by label": {&v1alpha1.WorkerTemplate{Metadata: v1alpha1.WorkerMetadata{Labels: map[string]v1alpha1.LabelValue{injectIstio: "true"}}},
			texts{injectIstio: "true", ambientIstio: "none"}, texts{injectLinkerd: "disabled"}},
		"by label, without a sidecar": {&v1alpha1.WorkerTemplate{Metadata: v1alpha1.WorkerMetadata{Labels: map[string]v1alpha1.LabelValue{ambientIstio: "ambient"}}},
			texts{injectIstio: "false", ambientIstio: "ambient"}, texts{injectLinkerd: "disabled"}},
		"by annotation": {&v1alpha1.WorkerTemplate{Metadata: v1alpha1.WorkerMetadata{Annotations: texts{injectIstio: "true", injectLinkerd: "enabled"}}},
			texts{ambientIstio: "none"}, texts{injectIstio: "true", injectLinkerd: "enabled"}},
	} {
		d := &v1alpha1.Dataset{}
		d.Spec.Workers.Template = c.template
		if labels, annotations := podMeta(d); !maps.Equal(labels, c.labels) || !maps.Equal(annotations, c.annotations) {
			t.Errorf("%s: labels %v, annotations %v", name, labels, annotations)
		}
	}
}

// Of what a Dataset's author writes nothing gets into a worker's environment; of the installation's settings its proxy.
func TestWorkersHaveTheProxyOfTheInstallation(t *testing.T) {
	d := &v1alpha1.Dataset{}
	d.Spec.Workers = v1alpha1.Workers{Replicas: 1, Memory: resource.MustParse("64Mi")}
	proxy := []corev1.EnvVar{{Name: "HTTPS_PROXY", Value: "http://proxy.example:3128"}, {Name: "NO_PROXY", Value: ".svc,.internal"}}
	env := func(r *Reconciler) []corev1.EnvVar {
		return r.podSpec(&pass{dataset: d}, "stepcache:v1").Containers[0].Env
	}
	plain := env(&Reconciler{Options: Options{Store: StoreEmptyDir}})
	if got := env(&Reconciler{Options: Options{Store: StoreEmptyDir, Env: proxy}}); !equality.Semantic.DeepEqual(got, append(plain, proxy...)) {
		t.Errorf("%v, without a proxy %v", got, plain)
	}
}

// On a node whose CPUs are all busy a worker has what it asks for, and nothing but the Dataset limits it on another.
func TestWorkersAskForCPUAsTheDatasetSays(t *testing.T) {
	r := &Reconciler{Options: Options{Store: StoreEmptyDir}}
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "genomes"
	d.Spec.Workers = v1alpha1.Workers{Replicas: 1, Memory: resource.MustParse("64Mi")}
	of := func(q string) *resource.Quantity {
		if q == "" {
			return nil
		}
		return ptr.To(resource.MustParse(q))
	}
	for _, c := range []struct{ cpu, limit, request string }{
		{"", "", "250m"}, {"10m", "", "10m"}, {"4", "", "4"},
		{"", "2", "250m"}, {"1", "1", "1"}, {"", "100m", "100m"}, {"2", "500m", "500m"},
	} {
		d.Spec.Workers.CPU, d.Spec.Workers.CPULimit = of(c.cpu), of(c.limit)
		all := r.podSpec(&pass{dataset: d}, "stepcache:v1").Containers[0].Resources
		if got := all.Requests.Cpu().String(); got != c.request {
			t.Errorf("cpu %q, limit %q: asks for %s, want %s", c.cpu, c.limit, got, c.request)
		}
		if got, limited := all.Limits[corev1.ResourceCPU]; limited != (c.limit != "") || limited && got.String() != c.limit {
			t.Errorf("cpu %q, limit %q: is limited to %s (%t)", c.cpu, c.limit, &got, limited)
		}
		if all.Limits.Memory().Cmp(*all.Requests.Memory()) != 0 || all.Limits.Memory().IsZero() {
			t.Errorf("cpu %q, limit %q: %v", c.cpu, c.limit, all)
		}
	}
}

// On another node the pod would wait for its volumes for ever.
func TestWorkersWithAStoreOfTheNodeServiceStayWithIt(t *testing.T) {
	r := &Reconciler{Options: Options{Store: StoreCSI}}
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "genomes"
	d.Spec.Workers = v1alpha1.Workers{Replicas: 1, Memory: resource.MustParse("64Mi")}
	term := func(rs ...corev1.NodeSelectorRequirement) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: rs}
	}
	gpu := corev1.NodeSelectorRequirement{Key: "gpu", Operator: corev1.NodeSelectorOpExists}
	byName := []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{"a"}}}
	ours := v1alpha1.NodesForPods()
	for name, c := range map[string]struct{ asked, want []corev1.NodeSelectorTerm }{
		"nothing asked": {nil, []corev1.NodeSelectorTerm{term(ours...)}},
		"alternatives": {[]corev1.NodeSelectorTerm{term(gpu), {MatchFields: byName}, {}},
			[]corev1.NodeSelectorTerm{term(append([]corev1.NodeSelectorRequirement{gpu}, ours...)...), {MatchFields: byName, MatchExpressions: ours}, {}}},
	} {
		if c.asked != nil {
			d.Spec.Workers.Template = &v1alpha1.WorkerTemplate{Spec: v1alpha1.WorkerPod{Affinity: &corev1.Affinity{
				NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: c.asked}},
			}}}
		}
		for range 2 { // the user's own stays as it is
			got := r.podSpec(&pass{dataset: d}, "stepcache:v1").Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
			if !equality.Semantic.DeepEqual(got, c.want) {
				t.Errorf("%s: %+v", name, got)
			}
		}
		d.Spec.Workers.Template = nil
	}
	r.Store = StoreEmptyDir
	if a := r.podSpec(&pass{dataset: d}, "stepcache:v1").Affinity; a != nil {
		t.Errorf("a worker that needs no node service: %+v", a)
	}
}
