package dataset

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// maxNamed is how many of the pods in the way are named.
const maxNamed = 10

// deletion waits for the pods that use the Dataset, and for the bucket to have what was written, then lets the
// Dataset go.
func (r *Reconciler) deletion(ctx context.Context, p *pass) error {
	if !controllerutil.ContainsFinalizer(p.dataset, v1alpha1.Finalizer) {
		r.forget(p.dataset.UID)
		return nil
	}
	p.dataset.Status.ObservedGeneration = p.dataset.Generation
	settled := p.back()
	if settled {
		if err := r.settle(ctx, p); err != nil {
			return err
		}
	}
	pods, err := r.users(ctx, p)
	if err != nil {
		return err
	}
	if len(pods) == 0 {
		if !r.mayStop(p, "deletion", time.Time{}) {
			p.condition(v1alpha1.ConditionReady, metav1.ConditionFalse, ReasonUnflushed, "deletion waits for the bucket (see condition %s); %s", v1alpha1.ConditionFlushed, WayOut(p.dataset))
			return nil
		}
		if pods, err = Release(ctx, r.client, r.live, p.dataset); err != nil {
			return err
		}
		p.users = pods
	}
	if len(pods) > 0 {
		text := "waits for " + Named(pods) + " that use it"
		p.condition(v1alpha1.ConditionReady, metav1.ConditionFalse, "InUse", "deletion %s", text)
		p.warn("InUse", "Delete", "deletion %s", text)
		p.soon(p.lookedAt.Add(p.pause).Sub(p.now)) // pods of users are not watched
		if settled {
			return nil
		}
		return r.settle(ctx, p) // here, so that nothing that fails of it keeps a deletion that nobody is in the way of
	}
	p.condition(v1alpha1.ConditionReady, metav1.ConditionFalse, "Deleting", "nothing uses it any more")
	r.forget(p.dataset.UID)
	return nil
}

// users are the pods that use a Dataset that is being deleted, as they were a moment ago: one look reads all pods of
// its namespaces, so the pauses between two grow, the longer it takes. Release looks again.
func (r *Reconciler) users(ctx context.Context, p *pass) ([]string, error) {
	if p.now.Before(p.lookedAt.Add(p.pause)) {
		return p.users, nil
	}
	pods, err := Users(ctx, r.live, p.dataset)
	if err != nil {
		return nil, err
	}
	p.users, p.lookedAt, p.pause = pods, p.now, min(max(2*p.pause, r.Poll/5), 4*r.Poll)
	return pods, nil
}

// Named is how many pods there are, and the first of them.
func Named(pods []string) string {
	text := fmt.Sprintf("%d pods (%s", len(pods), strings.Join(pods[:min(len(pods), maxNamed)], ", "))
	if len(pods) > maxNamed {
		text += " and others"
	}
	return text + ")"
}

// Release removes what belongs to a Dataset that is being deleted, and then its finalizer: first its claim and the
// copies of its Secrets, so that no new pod can start with it, then its volume, the label of its namespace, its workers
// and all else. While pods use it, it names them and takes nothing from them. live reads past any cache.
func Release(ctx context.Context, c client.Client, live client.Reader, d *v1alpha1.Dataset) (pods []string, err error) {
	if pods, err := Users(ctx, live, d); err != nil || len(pods) > 0 {
		return pods, err
	}
	claim := &corev1.PersistentVolumeClaim{}
	err = live.Get(ctx, client.ObjectKey{Namespace: d.Namespace, Name: v1alpha1.ClaimName(d.Name)}, claim)
	if client.IgnoreNotFound(err) != nil {
		return nil, err
	}
	if err == nil && belongs(claim, d) {
		if err := discard(ctx, c, []client.Object{claim}); err != nil {
			return nil, err
		}
	}
	for _, ns := range union(d.Status.SharedWith, otherNamespaces(d)) {
		if err := removeCopies(ctx, c, live, d, string(ns)); err != nil {
			return nil, err
		}
	}
	// A pod may have come while claim and copies could still be used; from now on none can.
	if pods, err := Users(ctx, live, d); err != nil || len(pods) > 0 {
		return pods, err
	}
	volume := &corev1.PersistentVolume{}
	err = live.Get(ctx, client.ObjectKey{Name: v1alpha1.VolumeName(d.Namespace, d.Name)}, volume)
	if client.IgnoreNotFound(err) != nil {
		return nil, err
	}
	if err == nil && belongs(volume, d) {
		if err := discard(ctx, c, []client.Object{volume}); err != nil {
			return nil, err
		}
	}
	if err := unlabelNamespace(ctx, c, d); err != nil {
		return nil, err
	}
	all, err := find(ctx, c, belongings(client.ObjectKeyFromObject(d)), func(o client.Object) bool { return belongs(o, d) })
	if err != nil {
		return nil, err
	}
	if err := discard(ctx, c, all); err != nil {
		return nil, err
	}
	patched := d.DeepCopy()
	controllerutil.RemoveFinalizer(patched, v1alpha1.Finalizer)
	return nil, client.IgnoreNotFound(c.Patch(ctx, patched, client.MergeFromWithOptions(d, client.MergeFromWithOptimisticLock{})))
}

// Users names the pods that have not ended and use the Dataset: by its claim, unless one of somebody else has the name,
// inline from a namespace that may, or through a reader of their own (sidecar, stage). Pods are listed here, past the
// cache, since nothing else wants to know of every step's.
func Users(ctx context.Context, live client.Reader, d *v1alpha1.Dataset) ([]string, error) {
	claim := &corev1.PersistentVolumeClaim{}
	err := live.Get(ctx, client.ObjectKey{Namespace: d.Namespace, Name: v1alpha1.ClaimName(d.Name)}, claim)
	if client.IgnoreNotFound(err) != nil {
		return nil, err
	}
	byClaim := err != nil || !foreign(claim, d)
	namespaces := []string{d.Namespace}
	for _, ns := range union(d.Status.SharedWith, otherNamespaces(d)) {
		namespaces = append(namespaces, string(ns))
	}
	running := client.MatchingFieldsSelector{Selector: fields.AndSelectors(
		fields.OneTermNotEqualSelector("status.phase", string(corev1.PodSucceeded)), fields.OneTermNotEqualSelector("status.phase", string(corev1.PodFailed)))}
	var names []string
	for _, ns := range namespaces {
		next := ""
		for {
			pods := &corev1.PodList{}
			if err := live.List(ctx, pods, client.InNamespace(ns), running, client.Limit(500), client.Continue(next)); err != nil {
				return nil, err
			}
			for i := range pods.Items {
				if uses(&pods.Items[i], d, byClaim) {
					names = append(names, ns+"/"+pods.Items[i].Name)
				}
			}
			if next = pods.Continue; next == "" {
				break
			}
		}
	}
	return names, nil
}

// uses says whether a pod uses the Dataset; byClaim is whether it does by a claim of the Dataset's name.
func uses(pod *corev1.Pod, d *v1alpha1.Dataset, byClaim bool) bool {
	return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
		if c := v.PersistentVolumeClaim; c != nil {
			return byClaim && pod.Namespace == d.Namespace && c.ClaimName == v1alpha1.ClaimName(d.Name)
		}
		if s := v.Projected; s != nil {
			// What the webhook gives the containers that it adds (sidecar, stage) to find the workers. The
			// workers themselves mount the list as a plain ConfigMap.
			return pod.Namespace == d.Namespace && slices.ContainsFunc(s.Sources, func(s corev1.VolumeProjection) bool {
				return s.ConfigMap != nil && s.ConfigMap.Name == v1alpha1.TierName(d.Name)
			})
		}
		if s := v.Secret; s != nil {
			// The workers of a Dataset whose source this one is.
			mount := v1alpha1.Mount{Source: "dataset://" + d.Namespace + "/" + d.Name}
			return s.SecretName == mount.ReaderSecret(pod.Namespace)
		}
		c := v.CSI
		if c == nil || c.Driver != v1alpha1.DriverName {
			return false
		}
		kind, ns := c.VolumeAttributes[v1alpha1.AttributeVolume], c.VolumeAttributes[v1alpha1.AttributeNamespace]
		return (kind == "" || kind == v1alpha1.VolumeDataset) && c.VolumeAttributes[v1alpha1.AttributeDataset] == d.Name &&
			(ns == d.Namespace || ns == "" && pod.Namespace == d.Namespace)
	})
}
