package node_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/controllers"
	"github.com/stepcache/stepcache/controllers/dataset"
	"github.com/stepcache/stepcache/controllers/envtest"
	"github.com/stepcache/stepcache/controllers/node"
)

// cluster is an API server of this package's own, since nodes are the cluster's: its tests follow each other.
var cluster *rest.Config

// now is the controllers' time.
var now clock

// TestMain runs the controllers beside the tests, with the rights of an installation's.
func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	c, stop, err := envtest.Start(context.Background())
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	cluster = c
	rights, err := envtest.Rights(context.Background(), c)
	if err != nil {
		return 0, err
	}
	manager, err := controllers.New(rights, controllers.Options{
		Dataset: dataset.Options{Namespace: envtest.System, Image: "stepcache:v1", Store: dataset.StoreCSI, Clock: &now},
		Metrics: "0", Probes: "0", Logger: logr.Discard(),
	})
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- manager.Start(ctx) }()
	code = m.Run()
	cancel()
	return code, <-done
}

// clock is the controller's time: the real one, and what a test adds to it.
type clock struct{ ahead atomic.Int64 }

func (c *clock) Now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// world is a cluster's nodes, without the controllers of nodes and DaemonSets.
type world struct {
	*testing.T
	client.WithWatch
	looks int
}

func newWorld(t *testing.T) *world {
	t.Helper()
	c, err := client.NewWithWatch(cluster, client.Options{Scheme: controllers.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, WithWatch: c}
	t.Cleanup(func() {
		_ = c.DeleteAllOf(context.Background(), &corev1.Node{})
		_ = c.DeleteAllOf(context.Background(), &appsv1.DaemonSet{}, client.InNamespace(envtest.System))
	})
	return w
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// service installs the DaemonSet of config/node, changed, and waits until the controller knows it.
func (w *world) service(change func(*appsv1.DaemonSet)) *appsv1.DaemonSet {
	w.Helper()
	b, err := os.ReadFile("../../config/node/node.yaml")
	w.must(err)
	set := &appsv1.DaemonSet{}
	w.must(yaml.UnmarshalStrict(b, set))
	if change != nil {
		change(set)
	}
	w.must(w.Create(w.Context(), set))
	probe := maps.Clone(linux)
	maps.Copy(probe, set.Spec.Template.Spec.NodeSelector)
	envtest.Eventually(w, "the controller knows the DaemonSet", func() error {
		w.node("probe", probe)
		w.looked()
		label := w.get("probe").Labels[v1alpha1.LabelNodeReady]
		w.must(w.Delete(w.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "probe"}}))
		if label != "" {
			return fmt.Errorf("a node that it runs on has %q", label)
		}
		return nil
	})
	return set
}

var linux = map[string]string{corev1.LabelOSStable: "linux"}

func with(labels map[string]string, key, value string) map[string]string {
	all := map[string]string{key: value}
	for k, v := range labels {
		all[k] = v
	}
	return all
}

// node adds one that is ready. The API server gives it the taint of one that is not, which nobody takes away here.
func (w *world) node(name string, labels map[string]string, taints ...corev1.Taint) {
	w.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Spec: corev1.NodeSpec{Taints: taints}}
	w.must(w.Create(w.Context(), n))
	w.ready(name, corev1.ConditionTrue)
}

func (w *world) ready(name string, status corev1.ConditionStatus) {
	w.Helper()
	w.change(name, func(n *corev1.Node) {
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
	}, w.Status().Patch)
}

func (w *world) label(name, value string) {
	w.Helper()
	w.change(name, func(n *corev1.Node) {
		metav1.SetMetaDataLabel(&n.ObjectMeta, v1alpha1.LabelNodeReady, value)
	}, func(ctx context.Context, o client.Object, p client.Patch, _ ...client.SubResourcePatchOption) error {
		return w.Patch(ctx, o, p)
	})
}

func (w *world) change(name string, f func(*corev1.Node), patch func(context.Context, client.Object, client.Patch, ...client.SubResourcePatchOption) error) {
	w.Helper()
	n := w.get(name)
	before := n.DeepCopy()
	f(n)
	w.must(patch(w.Context(), n, client.MergeFrom(before)))
}

func (w *world) get(name string) *corev1.Node {
	w.Helper()
	n := &corev1.Node{}
	w.must(w.Get(w.Context(), client.ObjectKey{Name: name}, n))
	return n
}

// looked has the controller look at every node again, and waits until it has: it takes them one after the other, and
// the one that is made last has the label when all others were looked at.
func (w *world) looked() {
	w.Helper()
	nodes := &corev1.NodeList{}
	w.must(w.List(w.Context(), nodes))
	w.looks++
	for i := range nodes.Items {
		n := &nodes.Items[i]
		before := n.DeepCopy()
		metav1.SetMetaDataAnnotation(&n.ObjectMeta, "looks", fmt.Sprint(w.looks))
		w.must(w.Patch(w.Context(), n, client.MergeFrom(before)))
	}
	last := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("last-%d", w.looks), Labels: map[string]string{corev1.LabelOSStable: "windows"}}}
	w.must(w.Create(w.Context(), last))
	w.eventually(last.Name, "false")
	w.must(w.Delete(w.Context(), last))
}

func (w *world) eventually(name, value string) {
	w.Helper()
	envtest.Eventually(w, "node "+name, func() error {
		if got := w.get(name).Labels[v1alpha1.LabelNodeReady]; got != value {
			return fmt.Errorf("the label is %q, want %q", got, value)
		}
		return nil
	})
}

// labels compares what nodes have now.
func (w *world) labels(when string, want map[string]string) {
	w.Helper()
	for name, value := range want {
		if got := w.get(name).Labels[v1alpha1.LabelNodeReady]; got != value {
			w.Errorf("%s: node %s has %q, want %q", when, name, got, value)
		}
	}
}

// The DaemonSet is the one that is installed.
func TestNodesWithoutTheNodeServiceAreLabelled(t *testing.T) {
	w := newWorld(t)
	w.service(nil)
	never := map[string]map[string]string{
		"windows": {corev1.LabelOSStable: "windows"}, "unknown": nil, "fargate": with(linux, "eks.amazonaws.com/compute-type", "fargate"),
		"kubelet": with(linux, "type", "virtual-kubelet"), "agent": with(linux, "kubernetes.io/role", "agent-virtual"),
		"virtual": with(linux, "alibabacloud.com/virtual-node", "true"),
		"left":    with(with(linux, "type", "virtual-kubelet"), v1alpha1.LabelNodeReady, "true"),
	}
	for name, labels := range never {
		w.node(name, labels)
	}
	for name := range never {
		w.eventually(name, "false")
	}

	w.node("new", linux)
	w.node("tainted", linux, corev1.Taint{Key: "gpu", Effect: corev1.TaintEffectNoExecute})
	w.node("numbered", with(linux, v1alpha1.LabelNodeReady, "5577006791947779410")) // as Karpenter makes it
	w.node("served", with(linux, v1alpha1.LabelNodeReady, "true"))
	w.node("dead", linux)
	w.ready("dead", corev1.ConditionUnknown)
	w.node("restarts", linux)
	asWere := map[string]string{"new": "", "tainted": "", "numbered": "5577006791947779410", "served": "true", "dead": "", "restarts": ""}
	w.looked()
	w.labels("at once", asWere)
	now.advance(node.Grace - time.Minute)
	w.looked()
	w.labels("before the grace ends", asWere)
	w.ready("restarts", corev1.ConditionFalse)
	w.looked()
	w.ready("restarts", corev1.ConditionTrue)
	w.looked()
	now.advance(2 * time.Minute)
	w.looked()
	lacking := map[string]string{"new": "false", "tainted": "false", "numbered": "false", "served": "true", "dead": "", "restarts": ""}
	w.labels("after the grace", lacking)

	// The service comes late, and goes.
	w.label("new", "true")
	w.looked()
	w.labels("it serves", map[string]string{"new": "true"})
	w.label("new", "")
	w.looked()
	w.labels("it went", map[string]string{"new": ""})
	now.advance(node.Grace)
	w.looked()
	w.labels("it stays away", map[string]string{"new": "false"})
}

func TestADeletedNodeIsLeftAlone(t *testing.T) {
	w := newWorld(t)
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "going", Finalizers: []string{"test/held"}}}
	w.must(w.Create(t.Context(), n))
	w.eventually("going", "false")
	w.must(w.Delete(t.Context(), n))
	w.label("going", "")
	w.looked()
	w.labels("deleted", map[string]string{"going": ""})
	w.must(w.Patch(t.Context(), n, client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`))))
}

func TestChangesOfTheDaemonSet(t *testing.T) {
	w := newWorld(t)
	w.node("a", linux)
	w.node("b", with(linux, v1alpha1.LabelNodeReady, "true"))
	w.eventually("a", "false") // there is no DaemonSet
	w.eventually("b", "false")

	set := w.service(nil)
	w.looked()
	w.labels("it is there", map[string]string{"a": "false", "b": "false"}) // until the service says otherwise
	w.label("a", "true")
	w.label("b", "true")
	w.looked()
	w.labels("it serves", map[string]string{"a": "true", "b": "true"})

	before := set.DeepCopy()
	set.Spec.Template.Spec.NodeSelector = map[string]string{corev1.LabelHostname: "a"}
	w.must(w.Patch(t.Context(), set, client.MergeFrom(before)))
	w.eventually("a", "false")
	w.eventually("b", "false")
}

// Those that the service never comes to count as no trouble.
func TestNodesThatTheServiceIsToRunOnAreCounted(t *testing.T) {
	w := newWorld(t)
	w.service(nil)
	w.node("windows", map[string]string{corev1.LabelOSStable: "windows"})
	w.eventually("windows", "false")
	w.node("new", linux)
	w.node("numbered", with(linux, v1alpha1.LabelNodeReady, "5577006791947779410"))
	w.node("served", with(linux, v1alpha1.LabelNodeReady, "true"))
	w.node("lacking", with(linux, v1alpha1.LabelNodeReady, "false"))
	got, err := node.New(w, dataset.Options{Namespace: envtest.System}).Census(t.Context())
	w.must(err)
	if want := map[string]int{"true": 1, "false": 1, "": 2}; !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// Nodes of another kind may have a DaemonSet of their own, and kustomize may give a name a prefix.
func TestANodeIsServedByAnyDaemonSetOfTheNodeService(t *testing.T) {
	w := newWorld(t)
	for _, pool := range []string{"small", "large"} {
		w.service(func(s *appsv1.DaemonSet) {
			s.Name, s.Spec.Template.Spec.NodeSelector = pool+"-node", map[string]string{"pool": pool}
		})
	}
	served := with(linux, v1alpha1.LabelNodeReady, "true")
	w.node("small", with(served, "pool", "small"))
	w.node("large", with(served, "pool", "large"))
	w.node("other", with(served, "pool", "other"))
	w.looked()
	w.labels("two pools", map[string]string{"small": "true", "large": "true", "other": "false"})
}

func TestTaintsThatTheDaemonSetDoesNotTolerate(t *testing.T) {
	w := newWorld(t)
	w.service(func(s *appsv1.DaemonSet) {
		s.Spec.Template.Spec.Tolerations = []corev1.Toleration{{Key: "gpu", Operator: corev1.TolerationOpExists}}
	})
	taint := func(key string, effect corev1.TaintEffect) corev1.Taint {
		return corev1.Taint{Key: key, Effect: effect}
	}
	served := with(linux, v1alpha1.LabelNodeReady, "true")
	w.node("tolerated", linux, taint("gpu", corev1.TaintEffectNoSchedule))
	w.node("preferred", linux, taint("team", corev1.TaintEffectPreferNoSchedule))
	w.node("passing", linux, taint(corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute), taint(corev1.TaintNodeUnschedulable, corev1.TaintEffectNoSchedule),
		taint(corev1.TaintNodeDiskPressure, corev1.TaintEffectNoSchedule), taint(corev1.TaintNodeMemoryPressure, corev1.TaintEffectNoSchedule),
		taint(corev1.TaintNodePIDPressure, corev1.TaintEffectNoSchedule), taint(corev1.TaintNodeNetworkUnavailable, corev1.TaintEffectNoSchedule))
	w.node("no-schedule", linux, taint("team", corev1.TaintEffectNoSchedule))
	w.node("no-execute", linux, taint("team", corev1.TaintEffectNoExecute))
	w.node("stays", served, taint("team", corev1.TaintEffectNoSchedule)) // its pod was there before the taint
	w.node("evicted", served, taint("team", corev1.TaintEffectNoExecute))
	w.looked()
	w.labels("tainted", map[string]string{
		"tolerated": "", "preferred": "", "passing": "", "no-schedule": "false", "no-execute": "false", "stays": "true", "evicted": "false",
	})
}

func TestTheServicesWordIsNotOverwritten(t *testing.T) {
	w := newWorld(t)
	w.service(nil)
	w.node("a", linux)
	patched := 0
	r := node.New(interceptor.NewClient(w, interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, options ...client.PatchOption) error {
			w.label("a", "true") // after the controller has read the node
			patched++
			return c.Patch(ctx, o, p, options...)
		},
	}), dataset.Options{Namespace: envtest.System, Clock: &now})
	look := func() {
		t.Helper()
		_, err := r.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKey{Name: "a"}})
		w.must(err)
	}
	look()
	now.advance(node.Grace)
	look()
	w.labels("it came as the controller gave up", map[string]string{"a": "true"})
	if patched != 1 {
		t.Errorf("the controller wrote %d times", patched)
	}
}
