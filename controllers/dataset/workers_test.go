package dataset

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// What a worker would end over is told before there is one.
func TestConfigurationThatAWorkerRefusesIsAnError(t *testing.T) {
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "artifacts"
	d.Spec.Access = v1alpha1.ReadWrite
	d.Spec.Mounts = []v1alpha1.Mount{{Source: "s3://data/", Path: "/"}}
	d.Spec.Workers = v1alpha1.Workers{Replicas: 2, Memory: resource.MustParse("64Mi")}
	r := &Reconciler{Options: Options{Store: StoreCSI}}
	c, err := r.workerConfig(d)
	if err != nil || c.Gateway == nil || c.Gateway.Bucket != "artifacts" || c.ID != "" {
		t.Fatalf("%+v, %v", c, err)
	}
	d.Spec.Write.Policy, d.Spec.Workers.Copies = v1alpha1.WriteBack, 2
	if c, err := r.workerConfig(d); err != nil || c.Write.Policy != "Back" || c.Write.Copies != 2 {
		t.Errorf("write policy Back: %+v, %v", c.Write, err)
	}
	d.Spec.Workers.Copies = 1
	if _, err := r.workerConfig(d); err == nil || !strings.Contains(err.Error(), "write.copies") {
		t.Errorf("write policy Back with one copy: %v", err)
	}
	d.Spec.Write.Policy = "Sometimes"
	if _, err := r.workerConfig(d); err == nil || !strings.Contains(err.Error(), "Sometimes") || !strings.Contains(err.Error(), "argo/artifacts") {
		t.Errorf("an unknown policy: %v", err)
	}
	d.Spec.Access = v1alpha1.ReadOnly
	if c, err := r.workerConfig(d); err != nil || c.Gateway != nil {
		t.Errorf("a Dataset that only reads: %+v, %v", c, err)
	}
}

func TestARolloutTakesOneWorkerAtATime(t *testing.T) {
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "genomes"
	d.Spec.Workers.Replicas = 3
	p := &pass{dataset: d, memory: &memory{}, wanted: "new"}
	// Of each worker: its template, whether it runs and is Ready, and whether it leaves already.
	for _, c := range []struct{ workers, want string }{
		{"old ready, old ready, old ready", "2"},
		{"old ready, old unready, old ready", "1"},
		{"old unready, old unready, old unready", "2"},
		{"old unready leaving, old unready, old ready", "0"},
		{"old ready, old ready, new unready", ""},
		{"old unready, old unready, new unready", ""},
		{"old unready, old unready, new ready", "1"},
		{"old ready, new ready, new ready", "0"},
		{"old ready, old ready, new starting", ""},
		{"old ready, old starting, new ready", ""},
		{"new ready, new unready, new ready", ""},
	} {
		p.pods = nil
		had := make(map[string]ring.Member)
		for i, worker := range strings.Split(c.workers, ", ") {
			is := strings.Fields(worker)
			pod := corev1.Pod{}
			pod.Name, pod.Annotations = fmt.Sprintf("%s-%d", v1alpha1.WorkersName(d.Name), i), map[string]string{annotationWorker: is[0]}
			if is[1] != "starting" {
				pod.Status.Phase, pod.Status.PodIP = corev1.PodRunning, "10.0.0.1"
			}
			if is[1] == "ready" {
				pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
			}
			if len(is) > 2 {
				had[pod.Name] = ring.Member{ID: pod.Name, State: ring.Leaving}
			}
			p.pods = append(p.pods, pod)
		}
		want := c.want
		if want != "" {
			want = v1alpha1.WorkersName(d.Name) + "-" + want
		}
		if got := p.rolling(had); got != want {
			t.Errorf("%s: %q leaves, want %q", c.workers, got, want)
		}
	}
}

func TestAWorkerThatIsNotReadyIsReadAllTheSame(t *testing.T) {
	pod := &corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1"}}
	pod.Name = "w"
	p := &pass{memory: &memory{}, status: map[string]wire.WorkerStatus{"w": {Cached: 1}}}
	if !p.read(pod) {
		t.Error("one that holds something is not read")
	}
	p.status["w"] = wire.WorkerStatus{}
	if p.read(pod) {
		t.Error("one that holds nothing is read")
	}
	delete(p.status, "w")
	if p.read(pod) {
		t.Error("one that does not answer is read")
	}
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	if !p.read(pod) {
		t.Error("one that is ready, and does not answer the controller, is not read")
	}
}

// Who holds what nobody else has goes only where the others can come no other way.
func TestTheOnlyWorkerGoesForThoseThatHaveNoRoomBesideIt(t *testing.T) {
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "genomes"
	for _, c := range []struct {
		replicas int32
		members  int
		others   []string
		want     bool
	}{
		{1, 1, nil, true},
		{2, 1, nil, false}, // not made yet
		{2, 1, []string{"new waiting"}, true},
		{2, 1, []string{"old waiting"}, false},
		{2, 1, []string{"new starting"}, false},
		{3, 1, []string{"new waiting", "new waiting"}, true},
		{3, 1, []string{"new waiting", "new starting"}, false},
		{3, 2, []string{"new waiting"}, false},
		{2, 1, []string{"new starting", "new waiting"}, false}, // the last is one too many
	} {
		d.Spec.Workers.Replicas = c.replicas
		p := &pass{dataset: d, memory: &memory{}, wanted: "new"}
		p.members.Members = make([]ring.Member, c.members)
		for i, is := range append([]string{"old serving"}, c.others...) {
			pod := corev1.Pod{}
			pod.Name = fmt.Sprintf("%s-%d", v1alpha1.WorkersName(d.Name), i)
			pod.Annotations = map[string]string{annotationWorker: strings.Fields(is)[0]}
			if strings.HasSuffix(is, "waiting") {
				pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse}}
			}
			p.pods = append(p.pods, pod)
		}
		if got := p.alone(); got != c.want {
			t.Errorf("of %d, with %d that serve and %q: alone is %t", c.replicas, c.members, c.others, got)
		}
	}
}
