package dataset

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
)

// Workers answer one after the other: what one hands over to another meanwhile may be in neither answer.
func TestOneLookThatFindsNothingIsNotEnough(t *testing.T) {
	nothing := func(epoch uint64) *looked { return &looked{epoch: epoch} }
	some := &looked{epoch: 7, objects: 1}
	bytes := &looked{epoch: 7, bytes: 1} // of an object that is being taken in
	hung := &looked{epoch: 7, unasked: map[string]string{"w-1": "does not answer"}}
	for _, c := range []struct {
		name    string
		looks   [2]*looked
		without []string
		want    bool
	}{
		{"nobody has looked", [2]*looked{}, nil, false},
		{"one look", [2]*looked{nil, nothing(7)}, nil, false},
		{"two looks", [2]*looked{nothing(7), nothing(7)}, nil, true},
		{"another membership meanwhile", [2]*looked{nothing(6), nothing(7)}, nil, false},
		{"another membership since", [2]*looked{nothing(6), nothing(6)}, nil, false},
		{"some before", [2]*looked{some, nothing(7)}, nil, false},
		{"some now", [2]*looked{nothing(7), some}, nil, false},
		{"bytes", [2]*looked{nothing(7), bytes}, nil, false},
		{"one could not be asked", [2]*looked{nothing(7), hung}, nil, false},
		{"one could not be asked before", [2]*looked{hung, nothing(7)}, nil, false},
		{"but is not waited for", [2]*looked{hung, hung}, []string{"w-1"}, true},
		{"another one is not", [2]*looked{hung, hung}, []string{"w-2"}, false},
	} {
		p := &pass{memory: &memory{looks: c.looks}, members: ring.Membership{Epoch: 7}}
		if got := p.safe(time.Time{}, c.without...); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// Whoever goes on writing must not keep a worker for ever: what counts is what it may have had.
func TestWritesAfterAWorkerBeganToLeaveAreNotWaitedFor(t *testing.T) {
	left := time.Unix(10000, 0)
	for _, c := range []struct {
		oldest time.Time
		before time.Time
		want   bool
	}{
		{left.Add(-time.Hour), left, false},
		{left, left, false},
		{left.Add(clocksDiffer), left, false}, // clocks may differ so much
		{left.Add(clocksDiffer + time.Second), left, true},
		{left.Add(time.Hour), time.Time{}, false}, // all that there is
		{time.Time{}, left, false},                // nobody says how old they are
	} {
		l := &looked{epoch: 7, objects: 1, bytes: 1, oldest: c.oldest}
		p := &pass{memory: &memory{looks: [2]*looked{l, l}}, members: ring.Membership{Epoch: 7}}
		if got := p.safe(c.before); got != c.want {
			t.Errorf("oldest %v, before %v: %v", c.oldest, c.before, got)
		}
	}
}

func TestTheLossIsAcceptedForOneChangeOnly(t *testing.T) {
	d := &v1alpha1.Dataset{}
	d.Generation = 3
	for value, want := range map[string]bool{"": false, "2": false, "3": true, "4": false, "03": false, "true": false} {
		d.Annotations = map[string]string{v1alpha1.AnnotationAcceptLoss: value}
		if got := AcceptsLoss(d); got != want {
			t.Errorf("%q: %v", value, got)
		}
	}
}

func TestWorkersThatWriteBackStandApartAndHaveTimeToFlush(t *testing.T) {
	r := &Reconciler{Options: Options{Store: StoreEmptyDir}}
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "artifacts"
	d.Spec.Access = v1alpha1.ReadWrite
	d.Spec.Workers = v1alpha1.Workers{Replicas: 2, Copies: 2, Memory: resource.MustParse("64Mi")}
	theirs := corev1.PodAffinityTerm{TopologyKey: "rack"}
	d.Spec.Workers.Template = &v1alpha1.WorkerTemplate{Spec: v1alpha1.WorkerPod{Affinity: &corev1.Affinity{
		NodeAffinity:    &corev1.NodeAffinity{},
		PodAntiAffinity: &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{theirs}},
	}}}
	through := r.podSpec(&pass{dataset: d}, "stepcache:v1")
	if *through.TerminationGracePeriodSeconds != 30 || len(through.Affinity.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution) != 1 {
		t.Errorf("a write-through worker: %d s, %+v", *through.TerminationGracePeriodSeconds, through.Affinity)
	}
	d.Spec.Write.Policy = v1alpha1.WriteBack
	for range 2 { // the user's own stays as it is
		back := r.podSpec(&pass{dataset: d}, "stepcache:v1")
		terms := back.Affinity.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution
		if len(terms) != 2 || terms[0].TopologyKey != "rack" || terms[1].TopologyKey != corev1.LabelHostname ||
			terms[1].LabelSelector.MatchLabels[v1alpha1.LabelDataset] != "artifacts" || terms[1].LabelSelector.MatchLabels[v1alpha1.LabelComponent] != v1alpha1.ComponentWorker || back.Affinity.NodeAffinity == nil {
			t.Errorf("affinity %+v", back.Affinity)
		}
		if *back.TerminationGracePeriodSeconds != 600 {
			t.Errorf("%d s to flush", *back.TerminationGracePeriodSeconds)
		}
	}
	d.Spec.Workers.Template = nil
	if a := r.podSpec(&pass{dataset: d}, "stepcache:v1").Affinity; a == nil || len(a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution) != 1 {
		t.Errorf("affinity without a template %+v", a)
	}
}
