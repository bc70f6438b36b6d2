// Package node says which nodes are without the node service.
//
// A node of which nothing is known takes pods with Datasets, so that an autoscaler, which knows of the nodes that it
// could add no more than their kind, adds one for them; the kubelet then tries their mounts until the node service is
// there. So it is the nodes without that are labelled: v1alpha1.LabelNodeReady is "false" on those where no DaemonSet of
// it runs a pod, at once, and on those where one does and the service has not come in a while. "true" is the node
// service's own word, which takes the place of "false" and is left alone wherever a DaemonSet keeps a pod. An installation
// may have several, of other names, for nodes of several kinds: they are told by their label.
//
// "false" stays until that word, also where a DaemonSet runs a pod again: the service says it as soon as a pod can
// mount anything, and a "false" that was taken away before would come back on nodes where it does not come up.
//
// It owns one reconciler of Nodes. Concurrency: one pass at a time; since when a node lacks the service is remembered
// in this process alone, so that a new one counts anew. Failure: a label that somebody wrote meanwhile is never
// overwritten, the pass that the change brings decides again. It may import api and controllers/dataset for its options.
package node

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	schedulingv1 "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/controllers/dataset"
)

// +kubebuilder:rbac:groups="",resources=nodes,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=apps,resources=daemonsets,verbs=get;list;watch,namespace=stepcache-system

// DaemonSets selects those of the node service in an installation's namespace.
var DaemonSets = client.MatchingLabels{v1alpha1.LabelComponent: v1alpha1.ComponentNode}

// Grace is how long a ready node may be without the service: an image has to be pulled. "false" any sooner would have
// an autoscaler add another node for the pods that wait. It is longer than the pause after which a node service that
// runs labels its node again, so that a label that got lost does no harm.
const Grace = 6 * time.Minute

// Reconciler labels the nodes without a node service.
type Reconciler struct {
	dataset.Options
	client client.Client
	// lacks is since when a ready node is without the service, by its name.
	lacks map[string]absence
}

type absence struct {
	node  types.UID // another node of the name has a time of its own
	since time.Time
}

// New returns a Reconciler. c should be a manager's client.
func New(c client.Client, o dataset.Options) *Reconciler {
	if o.Clock == nil {
		o.Clock = dataset.SystemClock{}
	}
	return &Reconciler{Options: o, client: c, lacks: make(map[string]absence)}
}

// SetupWithManager registers the reconciler.
func (r *Reconciler) SetupWithManager(m ctrl.Manager) error {
	all := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		nodes := &corev1.NodeList{}
		if err := r.client.List(ctx, nodes); err != nil {
			log.FromContext(ctx).Error(err, "nodes are not looked at again for a change of the node service")
			return nil
		}
		requests := make([]reconcile.Request, len(nodes.Items))
		for i := range nodes.Items {
			requests[i].Name = nodes.Items[i].Name
		}
		return requests
	})
	return ctrl.NewControllerManagedBy(m).Named("node").
		For(&corev1.Node{}).
		// Its status changes with every pod.
		Watches(&appsv1.DaemonSet{}, all, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	node := &corev1.Node{}
	if err := r.client.Get(ctx, req.NamespacedName, node); err != nil {
		delete(r.lacks, req.Name)
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if !node.DeletionTimestamp.IsZero() {
		return reconcile.Result{}, nil
	}
	runs, err := r.runs(ctx, node)
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("node %s: %w", node.Name, err)
	}
	label := node.Labels[v1alpha1.LabelNodeReady]
	lacks := runs && label != "true" && label != "false" && ready(node)
	if !lacks {
		delete(r.lacks, node.Name)
	}
	sets := fmt.Sprintf("daemonset of namespace %s with the label %s=%s", r.Namespace, v1alpha1.LabelComponent, v1alpha1.ComponentNode)
	why := fmt.Sprintf("no %s runs a pod there", sets)
	switch {
	case lacks:
		had, ok := r.lacks[node.Name]
		if !ok || had.node != node.UID {
			had = absence{node: node.UID, since: r.Clock.Now()}
			r.lacks[node.Name] = had
		}
		if left := had.since.Add(Grace).Sub(r.Clock.Now()); left > 0 {
			return reconcile.Result{RequeueAfter: left}, nil
		}
		why = fmt.Sprintf("it has been ready for %v without the service; see the pod of the %s there", Grace, sets)
	case runs || label == "false":
		return reconcile.Result{}, nil
	}
	before := node.DeepCopy()
	if node.Labels == nil {
		node.Labels = map[string]string{}
	}
	node.Labels[v1alpha1.LabelNodeReady] = "false"
	// The lock, since the node service may say "true" at the same time.
	err = r.client.Patch(ctx, node, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	switch {
	case apierrors.IsConflict(err) || apierrors.IsNotFound(err):
		return reconcile.Result{}, nil // the change brings the next pass
	case err != nil:
		return reconcile.Result{}, fmt.Errorf("node %s: %w", node.Name, err)
	}
	log.FromContext(ctx).Info("pods with Datasets are kept away from the node", "why", why)
	return reconcile.Result{}, nil
}

// Census counts the nodes where a DaemonSet runs the service, by what their label says: "true", "false" or neither, "".
func (r *Reconciler) Census(ctx context.Context) (map[string]int, error) {
	nodes := &corev1.NodeList{}
	if err := r.client.List(ctx, nodes); err != nil {
		return nil, err
	}
	n := map[string]int{}
	for i := range nodes.Items {
		if runs, err := r.runs(ctx, &nodes.Items[i]); err != nil {
			return nil, err
		} else if !runs {
			continue
		}
		label := nodes.Items[i].Labels[v1alpha1.LabelNodeReady]
		if label != "true" && label != "false" {
			label = ""
		}
		n[label]++
	}
	return n, nil
}

func ready(node *corev1.Node) bool {
	for i := range node.Status.Conditions {
		if c := &node.Status.Conditions[i]; c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// passing are taints that come and go with a node's health, which the pods of every DaemonSet tolerate.
var passing = map[string]bool{
	corev1.TaintNodeNotReady: true, corev1.TaintNodeUnreachable: true, corev1.TaintNodeNetworkUnavailable: true, corev1.TaintNodeUnschedulable: true,
	corev1.TaintNodeDiskPressure: true, corev1.TaintNodeMemoryPressure: true, corev1.TaintNodePIDPressure: true,
}

// runs says whether a DaemonSet runs the node service on the node.
func (r *Reconciler) runs(ctx context.Context, node *corev1.Node) (bool, error) {
	sets := &appsv1.DaemonSetList{}
	if err := r.client.List(ctx, sets, client.InNamespace(r.Namespace), DaemonSets); err != nil {
		return false, err
	}
	for i := range sets.Items {
		if ok, err := fits(ctx, &sets.Items[i].Spec.Template.Spec, node); ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}

// fits says whether a DaemonSet runs a pod on the node, by the rules of the cluster's own controller of DaemonSets.
func fits(ctx context.Context, spec *corev1.PodSpec, node *corev1.Node) (bool, error) {
	if ok, err := nodeaffinity.NewRequiredNodeAffinity(spec.NodeSelector, spec.Affinity).Match(node); err != nil || !ok {
		return false, err
	}
	// A pod that runs stays for all but NoExecute, and goes on saying "true".
	stays := node.Labels[v1alpha1.LabelNodeReady] == "true"
	_, refused := schedulingv1.FindMatchingUntoleratedTaint(log.FromContext(ctx), node.Spec.Taints, spec.Tolerations, func(t *corev1.Taint) bool {
		return !passing[t.Key] && (t.Effect == corev1.TaintEffectNoExecute || t.Effect == corev1.TaintEffectNoSchedule && !stays)
	}, true)
	return !refused, nil
}
