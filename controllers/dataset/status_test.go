package dataset

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// A Dataset whose bucket is away says so, and stays one that pods can start with: its workers serve what they hold.
func TestADatasetWhoseBucketIsAwayIsDegraded(t *testing.T) {
	d := &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data"}}
	d.Spec.Mounts = []v1alpha1.Mount{{Source: "s3://bucket/", Path: "/"}}
	d.Spec.Workers.Replicas = 1
	pod := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data-worker-0"}}
	pod.Status.Phase, pod.Status.PodIP = corev1.PodRunning, "10.0.0.1"
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	for _, c := range []struct {
		status     wire.WorkerStatus
		serving    int32
		phase      v1alpha1.DatasetPhase
		ready, why string
	}{
		{wire.WorkerStatus{}, 1, v1alpha1.DatasetReady, "True", "Ready"},
		{wire.WorkerStatus{Reason: wire.Unavailable.String(), Problem: "connection refused", Serves: true}, 1, v1alpha1.DatasetDegraded, "False", ReasonUnavailable},
		{wire.WorkerStatus{Reason: wire.Denied.String(), Problem: "no such key"}, 0, v1alpha1.DatasetPending, "False", ReasonAccessDenied},
	} {
		c.status.ID, c.status.Snapshot = pod.Name, "abc"
		r := &Reconciler{}
		p := &pass{
			memory: &memory{said: make(map[told]string)}, dataset: d.DeepCopy(), now: time.Now(),
			pods: []corev1.Pod{pod}, status: map[string]wire.WorkerStatus{pod.Name: c.status},
		}
		p.condition(v1alpha1.ConditionVolumeReady, metav1.ConditionTrue, "Bound", "bound")
		for _, do := range []phase{r.sourced, r.workersReady} {
			if err := do(t.Context(), p); err != nil {
				t.Fatal(err)
			}
		}
		p.summarize()
		st := p.dataset.Status
		ready := meta.FindStatusCondition(st.Conditions, v1alpha1.ConditionReady)
		if st.Phase != c.phase || st.Workers.Ready != c.serving || string(ready.Status) != c.ready || ready.Reason != c.why || !strings.Contains(ready.Message, c.status.Problem) {
			t.Errorf("%+v: phase %s, %d serve, %+v", c.status, st.Phase, st.Workers.Ready, ready)
		}
	}
}

// A pass that ends early says nothing of a spec that it has not looked at.
func TestReadyIsOfTheSpecThatTheOtherConditionsAreOf(t *testing.T) {
	d := &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data", Generation: 1}}
	p := &pass{memory: &memory{said: make(map[told]string)}, dataset: d, now: time.Now()}
	look := func() {
		for _, kind := range []string{v1alpha1.ConditionSourced, v1alpha1.ConditionWorkersReady, v1alpha1.ConditionVolumeReady} {
			p.condition(kind, metav1.ConditionTrue, "Fine", "fine")
		}
	}
	expect := func(status metav1.ConditionStatus, generation int64) {
		t.Helper()
		p.summarize()
		c := meta.FindStatusCondition(d.Status.Conditions, v1alpha1.ConditionReady)
		if c.Status != status || c.ObservedGeneration != generation || d.Status.ObservedGeneration != generation {
			t.Errorf("of generation %d: %+v", d.Generation, d.Status)
		}
	}
	look()
	expect(metav1.ConditionTrue, 1)
	d.Generation = 2
	expect(metav1.ConditionTrue, 1)
	p.condition(v1alpha1.ConditionVolumeReady, metav1.ConditionFalse, ReasonBinding, "not bound")
	expect(metav1.ConditionFalse, 2)
	look()
	expect(metav1.ConditionTrue, 2)
}

// recorder takes the notes of Events.
type recorder struct{ notes []string }

func (r *recorder) Eventf(_, _ runtime.Object, _, _, _, note string, a ...any) {
	r.notes = append(r.notes, fmt.Sprintf(note, a...))
}

func TestOfEachWorkerAProblemIsToldOnce(t *testing.T) {
	told := &recorder{}
	r := New(nil, nil, told, Options{})
	m := r.remember("uid")
	pods := make([]corev1.Pod, 2)
	pods[0].UID, pods[1].UID = "a", "b"
	pass := func(pods ...corev1.Pod) *pass {
		p := &pass{memory: m, dataset: &v1alpha1.Dataset{}, pods: pods}
		for i := range pods {
			p.event(&pods[i], corev1.EventTypeWarning, "Lost", "Look", "lost %s", pods[i].UID)
		}
		p.warn("Lost", "Look", "lost")
		return p
	}
	expect := func(want ...string) {
		t.Helper()
		if !slices.Equal(told.notes, want) {
			t.Errorf("told %q, want %q", told.notes, want)
		}
		told.notes = nil
	}
	r.send(pass(pods...))
	expect("lost a", "lost b", "lost")
	r.send(pass(pods...))
	expect()
	r.send(pass(pods[0]))
	expect()
	if len(m.said) != 2 {
		t.Errorf("of a pod that is gone is remembered what was told: %v", m.said)
	}
	p := pass(pods[0])
	p.unsay("Lost")
	r.send(p)
	expect("lost a", "lost")
}

// Of a Dataset that takes puts nobody counts what is in its bucket; what workers of an earlier release listed goes.
func TestAWritableDatasetHasNoListing(t *testing.T) {
	d := &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data"}}
	d.Spec.Access, d.Spec.Workers.Copies = v1alpha1.ReadWrite, 2
	d.Status.Snapshot, d.Status.Files, d.Status.Bytes, d.Status.Size, d.Status.CachedPercentage = "abc", 1, 2, "2", 100
	for _, snapshot := range []string{"abc", ""} { // the former is of such a worker
		p := &pass{
			memory: &memory{said: make(map[told]string)}, dataset: d, now: time.Now(),
			status: map[string]wire.WorkerStatus{"data-worker-0": {Snapshot: snapshot, Files: 1, Bytes: 2, Cached: 60}},
		}
		if err := (&Reconciler{}).sourced(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		st := d.Status
		if c := meta.FindStatusCondition(st.Conditions, v1alpha1.ConditionSourced); c == nil || c.Reason != ReasonReachable ||
			st.Snapshot != "" || st.Files != 0 || st.Bytes != 0 || st.Size != "" || st.CachedPercentage != 0 || st.Cached != 30 {
			t.Errorf("with snapshot %q of a worker: %+v, %+v", snapshot, c, st)
		}
	}
}

// Nothing is held once no worker is left; one that does not answer for a moment holds what it held.
func TestWhatIsCachedGoesWithTheWorkers(t *testing.T) {
	d := &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data"}}
	d.Status.Snapshot, d.Status.Bytes, d.Status.Cached, d.Status.CachedPercentage = "abc", 60, 60, 100
	for _, c := range []struct {
		members []ring.Member
		cached  int64
		percent int32
	}{{[]ring.Member{{ID: "data-worker-0"}}, 60, 100}, {nil, 0, 0}} {
		p := &pass{memory: &memory{said: make(map[told]string)}, dataset: d, now: time.Now(), members: ring.Membership{Members: c.members}}
		if err := (&Reconciler{}).sourced(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if st := d.Status; st.Cached != c.cached || st.CachedPercentage != c.percent || st.Bytes != 60 {
			t.Errorf("with %d members: %d bytes, %d %%, of %d", len(c.members), st.Cached, st.CachedPercentage, st.Bytes)
		}
	}
}

func TestWhyAWorkerDroppedWhatItHeldIsTold(t *testing.T) {
	p := &pass{dataset: &v1alpha1.Dataset{}}
	if why := p.why(0); why != "" {
		t.Errorf("of nothing: %q", why)
	}
	if why := p.why(1); !strings.Contains(why, "have no room") {
		t.Errorf("of a read-only Dataset: %q", why)
	}
	p.dataset.Spec.Access = v1alpha1.ReadWrite
	if why := p.why(1); !strings.Contains(why, "hand nothing over") {
		t.Errorf("of one that takes puts: %q", why)
	}
}
