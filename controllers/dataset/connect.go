package dataset

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	tierclient "github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
)

// Connect reaches the workers of a Dataset as its reconciler wrote them down, where their pods are: whoever may write the
// namespace's ConfigMaps would otherwise have the controller connect to what only it can reach. lists reads ConfigMaps and
// pods (a cache will do), live reads Secrets. The caller closes what it gets. The error is for people: a Dataset that was
// just made has neither list nor keys yet.
func Connect(ctx context.Context, lists, live client.Reader, d *v1alpha1.Dataset, o Options) (*tierclient.Control, error) {
	name := d.Namespace + "/" + d.Name
	cm := &corev1.ConfigMap{}
	if err := lists.Get(ctx, client.ObjectKey{Namespace: d.Namespace, Name: v1alpha1.TierName(d.Name)}, cm); err != nil {
		return nil, fmt.Errorf("dataset %s: membership: %w", name, err)
	}
	m, err := ring.Parse([]byte(cm.Data[v1alpha1.KeyMembership]))
	if err != nil {
		return nil, fmt.Errorf("dataset %s: config map %s: %w", name, cm.Name, err)
	}
	pods := &corev1.PodList{}
	if err := lists.List(ctx, pods, client.InNamespace(d.Namespace), client.MatchingLabels(selector(d))); err != nil {
		return nil, fmt.Errorf("dataset %s: workers: %w", name, err)
	}
	at := make(map[string]string)
	for i := range pods.Items {
		if pod := &pods.Items[i]; pod.Status.PodIP != "" {
			at[pod.Name] = controlOf(pod)
		}
	}
	for i := range m.Members {
		m.Members[i].Control = at[m.Members[i].ID]
	}
	secret := &corev1.Secret{}
	if err := live.Get(ctx, client.ObjectKey{Namespace: d.Namespace, Name: v1alpha1.KeysName(d.Name)}, secret); err != nil {
		return nil, fmt.Errorf("dataset %s: keys: %w", name, err)
	}
	keys, err := keysOf(secret)
	if err != nil {
		return nil, fmt.Errorf("dataset %s: secret %s: %w", name, secret.Name, err)
	}
	return tierclient.NewControl(tierclient.ControlConfig{Dataset: name, Membership: m, Keys: keys, Timeout: askTimeout, Dialer: o.Dial})
}
