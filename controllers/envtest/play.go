package envtest

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Patience is how long a test waits for what normally takes a moment.
const Patience = 90 * time.Second

// Eventually waits until f has nothing to complain of.
func Eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(Patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(30 * time.Millisecond)
	}
}

// CollectPods does once what a cluster's collector of pods does for those that never got a node: it removes what
// is marked as deleted. The API server marks a pod and then removes it, and who asked may go away between the
// two, as a controller does that is stopped: nobody else comes for the pod then, there being no kubelet.
func CollectPods(ctx context.Context, c client.Client, options ...client.ListOption) {
	pods := &corev1.PodList{}
	_ = c.List(ctx, pods, options...)
	for i := range pods.Items {
		if p := &pods.Items[i]; !p.DeletionTimestamp.IsZero() && p.Spec.NodeName == "" {
			_ = c.Delete(ctx, p, client.GracePeriodSeconds(0))
		}
	}
}
