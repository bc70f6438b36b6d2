package uninstall

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// remains deletes what belonged to Datasets, and copies of their Secrets in other namespaces. Most of it goes with its
// Dataset; what was orphaned, or whose Dataset somebody tore out by its finalizer, does not.
func (u *uninstaller) remains(ctx context.Context) error {
	for _, kind := range []schema.GroupVersionKind{
		{Group: "apps", Version: "v1", Kind: "StatefulSet"},
		{Version: "v1", Kind: "Pod"},
		{Version: "v1", Kind: "Service"},
		{Version: "v1", Kind: "ConfigMap"},
		{Version: "v1", Kind: "Secret"},
		{Group: "policy", Version: "v1", Kind: "PodDisruptionBudget"},
		{Group: "networking.k8s.io", Version: "v1", Kind: "NetworkPolicy"},
		{Version: "v1", Kind: "PersistentVolumeClaim"},
	} {
		selectors := []client.ListOption{client.MatchingLabels{"app.kubernetes.io/managed-by": "stepcache"}, client.HasLabels{v1alpha1.LabelDataset}}
		if err := u.removeAll(ctx, kind, selectors...); err != nil {
			return err
		}
	}
	return nil
}

// removeAll deletes all objects of a kind. Only their metadata is read: Secrets among them.
func (u *uninstaller) removeAll(ctx context.Context, kind schema.GroupVersionKind, options ...client.ListOption) error {
	all := &metav1.PartialObjectMetadataList{}
	all.SetGroupVersionKind(kind.GroupVersion().WithKind(kind.Kind + "List"))
	if err := u.c.List(ctx, all, options...); absent(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%s: %w", kind.Kind, err)
	}
	for i := range all.Items {
		o := &all.Items[i]
		o.SetGroupVersionKind(kind)
		if u.DryRun && (len(o.OwnerReferences) > 0 || u.named[o.Labels[v1alpha1.LabelUID]]) {
			continue // it goes with its owner or its Dataset, which was named
		}
		if err := u.remove(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

// pods waits for the end of everything that has a volume of the driver: without the node service the kubelet
// could not unmount it, and the pod would be Terminating for ever.
func (u *uninstaller) pods(ctx context.Context) error {
	return u.until(ctx, func(ctx context.Context) (string, error) {
		dead, err := u.deadNodes(ctx)
		if err != nil {
			return "", err
		}
		var left []string
		next := ""
		for {
			pods := &corev1.PodList{}
			if err := u.c.List(ctx, pods, client.Limit(500), client.Continue(next)); err != nil {
				return "", err
			}
			for i := range pods.Items {
				p := &pods.Items[i]
				if !mounts(p) || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
					continue
				}
				if dead[p.Spec.NodeName] {
					if worker := p.Labels[v1alpha1.LabelComponent] == v1alpha1.ComponentWorker; worker && !u.DryRun {
						if err := u.force(ctx, p); err != nil {
							return "", err
						}
					}
					continue
				}
				left = append(left, p.Namespace+"/"+p.Name)
				if u.DeletePods && !u.DryRun {
					if err := u.remove(ctx, p); err != nil {
						return "", err
					}
				}
			}
			if next = pods.Continue; next == "" {
				break
			}
		}
		if len(left) == 0 || u.DryRun {
			return "", nil
		}
		return fmt.Sprintf("waiting for %d pods with volumes of %s: %s", len(left), v1alpha1.DriverName, some(left)), nil
	})
}

// mounts says whether a pod has an inline volume of the driver.
func mounts(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool { return v.CSI != nil && v.CSI.Driver == v1alpha1.DriverName })
}

// deadNodes do not answer: nothing on them can be waited for, and their mounts end when they restart.
func (u *uninstaller) deadNodes(ctx context.Context) (map[string]bool, error) {
	nodes := &corev1.NodeList{}
	if err := u.c.List(ctx, nodes); err != nil {
		return nil, err
	}
	dead := make(map[string]bool)
	for i := range nodes.Items {
		for _, c := range nodes.Items[i].Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				dead[nodes.Items[i].Name] = true
			}
		}
	}
	return dead, nil
}

// volumes deletes the volumes of Datasets.
func (u *uninstaller) volumes(ctx context.Context) error {
	return u.until(ctx, func(ctx context.Context) (string, error) {
		all := &corev1.PersistentVolumeList{}
		if err := u.c.List(ctx, all, client.HasLabels{v1alpha1.LabelDataset}); err != nil {
			return "", err
		}
		var left []string
		for i := range all.Items {
			if s := all.Items[i].Spec.CSI; s == nil || s.Driver != v1alpha1.DriverName {
				continue
			}
			if err := u.remove(ctx, &all.Items[i]); err != nil {
				return "", err
			}
			left = append(left, all.Items[i].Name)
		}
		if len(left) == 0 || u.DryRun {
			return "", nil
		}
		return "waiting for the end of volumes " + some(left), nil
	})
}

func (u *uninstaller) webhooks(ctx context.Context) error { return u.list(ctx, webhooks) }

// node removes the node service, which takes its mounts and its node's label away as it ends, then the keeper
// of its mounts. Each is every DaemonSet with its label: config/README.md offers a second one for other nodes.
func (u *uninstaller) node(ctx context.Context) error {
	for _, component := range []string{v1alpha1.ComponentNode, v1alpha1.ComponentKeeper} {
		if err := u.removeAll(ctx, kind("apps", "DaemonSet"), client.InNamespace(u.Namespace), client.MatchingLabels{v1alpha1.LabelComponent: component}); err != nil {
			return err
		}
		if err := u.gone(ctx, component); err != nil {
			return err
		}
	}
	return nil
}

// gone waits until no pod of a component is left on the nodes that answer.
func (u *uninstaller) gone(ctx context.Context, component string) error {
	if u.DryRun {
		return nil
	}
	return u.until(ctx, func(ctx context.Context) (string, error) {
		dead, err := u.deadNodes(ctx)
		if err != nil {
			return "", err
		}
		pods := &corev1.PodList{}
		if err := u.c.List(ctx, pods, client.InNamespace(u.Namespace), client.MatchingLabels{v1alpha1.LabelComponent: component}); err != nil {
			return "", err
		}
		var left []string
		for i := range pods.Items {
			p := &pods.Items[i]
			if !dead[p.Spec.NodeName] {
				left = append(left, p.Name)
				continue
			}
			if err := u.force(ctx, p); err != nil {
				return "", err
			}
		}
		if len(left) == 0 {
			return "", nil
		}
		return "waiting for the end of pods " + some(left), nil
	})
}

// force deletes a pod of ours whose kubelet does not answer and so cannot confirm its end.
func (u *uninstaller) force(ctx context.Context, p *corev1.Pod) error {
	u.say("pod %s/%s is on node %s, which does not answer: it is not waited for; what is mounted there ends with a restart of the node", p.Namespace, p.Name, p.Spec.NodeName)
	return client.IgnoreNotFound(u.c.Delete(ctx, p, client.GracePeriodSeconds(0)))
}

// programs ends the controller and the webhook.
func (u *uninstaller) programs(ctx context.Context) error {
	if err := u.list(ctx, running); err != nil {
		return err
	}
	for _, component := range []string{v1alpha1.ComponentController, v1alpha1.ComponentWebhook} {
		if err := u.gone(ctx, component); err != nil {
			return err
		}
	}
	return nil
}

// labels takes the labels of nodes and namespaces away. A node service that was killed left its own, and the
// controller those of nodes without.
func (u *uninstaller) labels(ctx context.Context) error {
	for _, of := range []struct{ kind, label string }{{"Node", v1alpha1.LabelNodeReady}, {"Namespace", v1alpha1.LabelWatched}} {
		all := &metav1.PartialObjectMetadataList{}
		all.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind(of.kind + "List"))
		if err := u.c.List(ctx, all, client.HasLabels{of.label}); err != nil {
			return err
		}
		for i := range all.Items {
			o := &all.Items[i]
			o.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind(of.kind))
			u.did = true
			if u.DryRun {
				u.say("would take label %s from %s %s", of.label, of.kind, o.Name)
				continue
			}
			before := o.DeepCopy()
			delete(o.Labels, of.label)
			if err := u.c.Patch(ctx, o, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
				return fmt.Errorf("%s %s: %w", of.kind, o.Name, err)
			}
			u.say("took label %s from %s %s", of.label, of.kind, o.Name)
		}
	}
	return nil
}

// others removes all else: the rights of what ran, then the definitions and the namespace.
func (u *uninstaller) others(ctx context.Context) error {
	if err := u.list(ctx, rights); err != nil {
		return err
	}
	// Their objects are gone; one that somebody has made since would hang on its finalizer with nobody there to
	// take it away.
	for _, kind := range []string{v1alpha1.KindDataLoad, v1alpha1.KindDataset} {
		all := &metav1.PartialObjectMetadataList{}
		all.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(kind + "List"))
		if err := u.c.List(ctx, all); absent(err) || u.DryRun {
			continue
		} else if err != nil {
			return err
		}
		if len(all.Items) > 0 {
			return fmt.Errorf("%s %s/%s was made meanwhile", kind, all.Items[0].Namespace, all.Items[0].Name)
		}
	}
	if err := u.list(ctx, definitions); err != nil {
		return err
	}
	return u.namespace(ctx)
}

// list deletes the objects of a list and waits until they are gone.
func (u *uninstaller) list(ctx context.Context, list []object) error {
	return u.until(ctx, func(ctx context.Context) (string, error) {
		var left []string
		for _, o := range list {
			have := &unstructured.Unstructured{}
			have.SetGroupVersionKind(o.kind)
			key := client.ObjectKey{Name: o.name}
			if !o.cluster {
				key.Namespace = u.Namespace
			}
			if err := u.c.Get(ctx, key, have); absent(err) {
				continue
			} else if err != nil {
				return "", fmt.Errorf("%s %s: %w", o.kind.Kind, o.name, err)
			}
			if err := u.remove(ctx, have); err != nil {
				return "", err
			}
			left = append(left, o.kind.Kind+" "+o.name)
		}
		if len(left) == 0 || u.DryRun {
			return "", nil
		}
		return "waiting for the end of " + some(left), nil
	})
}

// namespace deletes the installation's namespace, unless somebody else runs something in it.
func (u *uninstaller) namespace(ctx context.Context) error {
	pods := &corev1.PodList{}
	if err := u.c.List(ctx, pods, client.InNamespace(u.Namespace)); err != nil {
		return err
	}
	for i := range pods.Items {
		if pods.Items[i].Labels[v1alpha1.LabelComponent] == "" {
			u.say("namespace %s stays, since pod %s there is not of this installation", u.Namespace, pods.Items[i].Name)
			return nil
		}
	}
	return u.until(ctx, func(ctx context.Context) (string, error) {
		ns := &corev1.Namespace{}
		if err := u.c.Get(ctx, client.ObjectKey{Name: u.Namespace}, ns); err != nil {
			return "", client.IgnoreNotFound(err)
		}
		if err := u.remove(ctx, ns); err != nil || u.DryRun {
			return "", err
		}
		why := ""
		for _, c := range ns.Status.Conditions {
			if c.Status == corev1.ConditionTrue && c.Message != "" {
				why = ": " + c.Message
			}
		}
		return "waiting for the end of Namespace " + u.Namespace + why, nil
	})
}
