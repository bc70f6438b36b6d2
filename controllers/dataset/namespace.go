package dataset

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// namespace labels the Dataset's namespace where the webhook should look at workflow pods that carry no
// label of ours.
func (r *Reconciler) namespace(ctx context.Context, p *pass) error {
	if !wantsWatch(p.dataset) {
		return nil
	}
	switch err := labelNamespace(ctx, r.client, p.dataset.Namespace, true); {
	case err == nil:
		p.unsay("NamespaceNotLabelled")
		return nil
	case !refuses(err):
		return err
	case len(p.dataset.Spec.Replaces) > 0:
		return fmt.Errorf("spec.replaces and spec.locality want label %s on the namespace; without replaces and with locality: None it is not asked for: %w", v1alpha1.LabelWatched, err)
	default:
		// Pods find their data wherever they run.
		p.warn("NamespaceNotLabelled", "LabelNamespace", "spec.locality wants label %s on the namespace, and until it is there pods are not drawn to the nodes that hold their data; with locality: None it is not asked for: %v", v1alpha1.LabelWatched, err)
		return nil
	}
}

func wantsWatch(d *v1alpha1.Dataset) bool {
	return len(d.Spec.Replaces) > 0 || d.Spec.Locality != v1alpha1.LocalityNone
}

// unlabelNamespace takes the label away with the last Dataset that wants it.
func unlabelNamespace(ctx context.Context, c client.Client, d *v1alpha1.Dataset) error {
	others := &v1alpha1.DatasetList{}
	if err := c.List(ctx, others, client.InNamespace(d.Namespace)); err != nil {
		return err
	}
	for i := range others.Items {
		if o := &others.Items[i]; o.UID != d.UID && wantsWatch(o) {
			return nil
		}
	}
	return labelNamespace(ctx, c, d.Namespace, false)
}

func labelNamespace(ctx context.Context, c client.Client, name string, on bool) error {
	ns := &corev1.Namespace{}
	if err := c.Get(ctx, client.ObjectKey{Name: name}, ns); err != nil {
		return client.IgnoreNotFound(err)
	}
	_, has := ns.Labels[v1alpha1.LabelWatched]
	if has == on {
		return nil
	}
	before := ns.DeepCopy()
	if on {
		if ns.Labels == nil {
			ns.Labels = map[string]string{}
		}
		ns.Labels[v1alpha1.LabelWatched] = "true"
	} else {
		delete(ns.Labels, v1alpha1.LabelWatched)
	}
	if err := c.Patch(ctx, ns, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("namespace %s: %w", name, err)
	}
	return nil
}
