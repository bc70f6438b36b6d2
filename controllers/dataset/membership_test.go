package dataset

import (
	"context"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
)

func TestMembersThatComeBackAreMarked(t *testing.T) {
	list := func(epoch uint64, ids ...string) (m ring.Membership) {
		m.Epoch = epoch
		for _, id := range ids {
			m.Members = append(m.Members, ring.Member{ID: id})
		}
		return m
	}
	mark := func(before, next ring.Membership, cached, back bool) {
		had := make(map[string]ring.Member)
		for _, m := range before.Members {
			had[m.ID] = m
		}
		markNew(before.Epoch, had, next, cached, back)
	}
	for _, c := range []struct {
		name         string
		before       ring.Membership
		cached, back bool
		want         []uint64 // of w-0 and w-1
	}{
		{"to others that hold bytes", list(7, "w-0"), true, false, []uint64{0, 8}},
		{"to a tier that is empty", list(7, "w-0"), false, false, []uint64{0, 0}},
		{"with write policy Back, to a tier whose cache is empty", list(7, "w-0"), false, true, []uint64{0, 8}},
		{"with write policy Back, all of them", list(7, "w-2"), false, true, []uint64{8, 8}},
		{"with write policy Back, nobody", list(7, "w-0", "w-1"), true, true, []uint64{0, 0}},
		{"after the list was lost, what they hold counts", list(0), true, true, []uint64{0, 0}},
	} {
		next := list(8, "w-0", "w-1")
		mark(c.before, next, c.cached, c.back)
		for i, m := range next.Members {
			if m.Joined != c.want[i] {
				t.Errorf("%s: %s joined at %d, want %d", c.name, m.ID, m.Joined, c.want[i])
			}
		}
	}
	next := list(9, "w-0")
	next.Members[0].Joined = 5
	if mark(list(8, "w-0"), next, true, true); next.Members[0].Joined != 5 {
		t.Errorf("one that stayed: %d", next.Members[0].Joined)
	}
}

// A member that leaves goes on with what it holds for as long as its pod does, and its next pod has nothing of it.
func TestAMemberThatLeftIsOutUntilItsNextPodServes(t *testing.T) {
	for _, policy := range []v1alpha1.WritePolicy{v1alpha1.WriteThrough, v1alpha1.WriteBack} {
		server := &oneList{}
		r := New(server, server, nil, Options{Store: StoreCSI})
		d := &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "d", UID: "u"}}
		d.Spec.Workers.Replicas, d.Spec.Write.Policy, d.Status.Cached = 2, policy, 1
		pod := func(n int, uid, template string) corev1.Pod {
			return corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{
					Name: v1alpha1.WorkersName("d") + "-" + strconv.Itoa(n), UID: types.UID(uid), Annotations: map[string]string{annotationWorker: template},
				},
				Status: corev1.PodStatus{
					Phase: corev1.PodRunning, PodIP: "10.0.0.1" + strconv.Itoa(n), Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
				},
			}
		}
		list := func(wanted string, pods ...corev1.Pod) (states string, joined bool) {
			t.Helper()
			p := &pass{memory: r.remember("u"), dataset: d, now: time.Unix(1_800_000_000, 0), pods: pods, wanted: wanted}
			if err := r.membership(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			for _, m := range p.members.Members {
				states += m.ID[len(m.ID)-1:] + " " + string(m.State) + " "
				joined = joined || m.Joined == p.members.Epoch
			}
			return states, joined
		}
		leaves := func() {
			t.Helper()
			list("old", pod(0, "a", "old"), pod(1, "b", "old"))
			if got, _ := list("new", pod(0, "a", "old"), pod(1, "b", "old")); got != "0 Ready 1 Leaving " {
				t.Fatalf("%s: a rollout: %s", policy, got)
			}
		}

		leaves()
		elsewhere := pod(1, "b", "old")
		elsewhere.Status.PodIP = "10.0.0.99"
		if got, joined := list("old", pod(0, "a", "old"), elsewhere); got != "0 Ready 1 Ready " || joined {
			t.Errorf("%s: a rollout that was taken back, of a pod that has another address since: %s, marked %v", policy, got, joined)
		}

		leaves()
		ends := pod(1, "b", "old")
		ends.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
		for what, pods := range map[string][]corev1.Pod{"is being stopped": {pod(0, "a", "old"), ends}, "is gone": {pod(0, "a", "old")}} {
			if got, joined := list("new", pods...); got != "0 Ready " || joined {
				t.Errorf("%s: its pod %s: %s, marked %v", policy, what, got, joined)
			}
		}
		if got, joined := list("new", pod(0, "a", "old"), pod(1, "c", "new")); got != "0 Leaving 1 Ready " || !joined {
			t.Errorf("%s: its next pod: %s, marked %v", policy, got, joined)
		}

		leaves()
		if got, joined := list("new", pod(0, "a", "new"), pod(1, "d", "new")); got != "0 Ready 1 Ready " || !joined {
			t.Errorf("%s: its next pod, which is there before the controller looks: %s, marked %v", policy, got, joined)
		}
	}
}

// oneList is an API server that has one ConfigMap at most.
type oneList struct {
	client.Client
	have      *corev1.ConfigMap
	writes    int
	meanwhile func() // called after a read, once
}

func (o *oneList) Scheme() *runtime.Scheme {
	s := runtime.NewScheme()
	utilruntime.Must(v1alpha1.AddToScheme(s))
	return s
}

func (o *oneList) Get(_ context.Context, key client.ObjectKey, into client.Object, _ ...client.GetOption) error {
	if o.have == nil {
		return apierrors.NewNotFound(corev1.Resource("configmaps"), key.Name)
	}
	o.have.DeepCopyInto(into.(*corev1.ConfigMap))
	if f := o.meanwhile; f != nil {
		o.meanwhile = nil
		f()
	}
	return nil
}

func (o *oneList) Create(_ context.Context, cm client.Object, _ ...client.CreateOption) error {
	o.write(cm.(*corev1.ConfigMap))
	return nil
}

func (o *oneList) Update(_ context.Context, cm client.Object, _ ...client.UpdateOption) error {
	if cm.GetResourceVersion() != o.have.ResourceVersion {
		return apierrors.NewConflict(corev1.Resource("configmaps"), cm.GetName(), nil)
	}
	o.write(cm.(*corev1.ConfigMap))
	return nil
}

func (o *oneList) write(cm *corev1.ConfigMap) {
	o.writes++
	cm.ResourceVersion = strconv.Itoa(o.writes)
	o.have = cm.DeepCopy()
}

// Workers take an epoch that is left out for a list that they missed, and one that is given twice for one list.
func TestAnEpochNamesOneListAndNoneIsLeftOut(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	server := &oneList{}
	r := New(server, server, nil, Options{})
	d := &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "d", UID: "u"}}
	d.Spec.Workers.Replicas = 3
	write := func(after time.Duration, workers ...int) (uint64, error) {
		t.Helper()
		now = now.Add(after)
		p := &pass{memory: r.remember("u"), dataset: d, now: now}
		for _, n := range workers {
			p.pods = append(p.pods, corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.WorkersName("d") + "-" + strconv.Itoa(n)},
				Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1" + strconv.Itoa(n)},
			})
		}
		err := r.membership(t.Context(), p)
		return p.members.Epoch, err
	}
	must := func(after time.Duration, workers ...int) uint64 {
		t.Helper()
		epoch, err := write(after, workers...)
		if err != nil {
			t.Fatal(err)
		}
		return epoch
	}
	restart := func() { r = New(server, server, nil, Options{}) }

	first := must(0, 0)
	for _, c := range []struct {
		what    string
		before  func()
		workers []int
		want    uint64
	}{
		{"nothing changed", nil, []int{0}, first},
		{"one came", nil, []int{0, 1}, first + 1},
		{"another came", nil, []int{0, 1, 2}, first + 2},
		{"one is away for a moment", nil, []int{0, 1}, first + 2},
		{"it is away for long", nil, []int{0, 1}, first + 3},
		{"a worker follows a newer list", func() { r.remember("u").epoch = first + 5 }, []int{0, 1}, first + 6},
		{"it comes back after a restart", restart, []int{0, 1, 2}, first + 7},
	} {
		if c.before != nil {
			c.before()
		}
		if got := must(5*time.Minute, c.workers...); got != c.want {
			t.Errorf("%s: epoch %d after the first, want %d", c.what, got-first, c.want-first)
		}
	}
	last := first + 7

	for _, c := range []struct {
		what string
		lost func()
	}{
		{"the list was deleted", func() { server.have = nil }},
		{"it was deleted, and the controller restarted", func() { server.have = nil; restart() }},
		{"it was overwritten", func() { server.have.Data[v1alpha1.KeyMembership] = "mine" }},
		{"it was overwritten, and the controller restarted", func() { server.have.Data[v1alpha1.KeyMembership] = "mine"; restart() }},
	} {
		c.lost()
		got := must(time.Minute, 0, 1, 2)
		if got <= last {
			t.Errorf("%s: epoch %d is not greater than %d", c.what, got, last)
		}
		if next := must(10*time.Minute, 0, 1); next != got { // for a moment
			t.Errorf("%s: epoch %d after %d", c.what, next, got)
		}
		if next := must(10*time.Minute, 0, 1); next != got+1 {
			t.Errorf("%s: epoch %d after %d", c.what, next, got)
		}
		last = got + 1
	}

	// A former controller's last write comes between this one's reads.
	restart()
	server.meanwhile = func() {
		other := server.have.DeepCopy()
		other.Data[v1alpha1.KeyMembership] = "of the same epoch"
		server.write(other)
	}
	if epoch, err := write(time.Minute, 0, 1, 2); !apierrors.IsConflict(err) {
		t.Errorf("epoch %d was written over another list of that epoch: %v", epoch, err)
	}
}
