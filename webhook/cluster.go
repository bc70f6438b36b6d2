package webhook

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	kclient "sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// informed is what the webhook knows of the cluster, out of a cache that informers fill. It implements
// Objects and Nodes.
type informed struct{ cache kclient.Reader }

var (
	_ Objects = informed{}
	_ Nodes   = informed{}
)

// shared lists without copying: what comes of it is read only.
func (c informed) shared(ctx context.Context, list kclient.ObjectList, namespace string) error {
	yes := true
	return c.cache.List(ctx, list, &kclient.ListOptions{Namespace: namespace, UnsafeDisableDeepCopy: &yes})
}

func (c informed) Datasets(ctx context.Context, namespace string) ([]*v1alpha1.Dataset, error) {
	list := &v1alpha1.DatasetList{}
	if err := c.shared(ctx, list, namespace); err != nil {
		return nil, err
	}
	all := make([]*v1alpha1.Dataset, len(list.Items))
	for i := range list.Items {
		all[i] = &list.Items[i]
	}
	return all, nil
}

func (c informed) Loads(ctx context.Context, namespace string) ([]*v1alpha1.DataLoad, error) {
	list := &v1alpha1.DataLoadList{}
	if err := c.shared(ctx, list, namespace); err != nil {
		return nil, err
	}
	all := make([]*v1alpha1.DataLoad, len(list.Items))
	for i := range list.Items {
		all[i] = &list.Items[i]
	}
	return all, nil
}

func (c informed) NamespaceLabels(ctx context.Context, namespace string) (map[string]string, error) {
	ns := &corev1.Namespace{}
	err := c.cache.Get(ctx, types.NamespacedName{Name: namespace}, ns)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, err
	case ns.Labels == nil:
		return map[string]string{}, nil
	}
	return ns.Labels, nil
}

func (c informed) NodeService(ctx context.Context) (bool, error) {
	list := &corev1.NodeList{}
	if err := c.shared(ctx, list, ""); err != nil {
		return false, err
	}
	for i := range list.Items {
		if list.Items[i].Labels[v1alpha1.LabelNodeReady] == "true" {
			return true, nil
		}
	}
	return false, nil
}

func (c informed) Memory(ctx context.Context) ([]int64, error) {
	list := &corev1.NodeList{}
	if err := c.shared(ctx, list, ""); err != nil {
		return nil, err
	}
	var all []int64
	for i := range list.Items {
		if n := &list.Items[i]; takesPods(n) {
			all = append(all, n.Status.Allocatable.Memory().Value())
		}
	}
	return all, nil
}

func (c informed) Hostname(ctx context.Context, node string) (string, bool) {
	n := &corev1.Node{}
	if err := c.cache.Get(ctx, types.NamespacedName{Name: node}, n); err != nil || !takesPods(n) {
		return "", false
	}
	host, ok := n.Labels[corev1.LabelHostname]
	return host, ok
}

func takesPods(n *corev1.Node) bool {
	if n.Spec.Unschedulable {
		return false
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// slim keeps of a node what is asked of it: nodes change often and are large.
func slim(o any) (any, error) {
	if n, ok := o.(*corev1.Node); ok {
		n.ManagedFields, n.Annotations, n.Status.Images = nil, nil, nil
	}
	return o, nil
}
