package dataset

import (
	"context"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// observe reads the Dataset's workers as they are.
func (r *Reconciler) observe(ctx context.Context, p *pass) error {
	set := &appsv1.StatefulSet{}
	err := r.client.Get(ctx, client.ObjectKey{Namespace: p.dataset.Namespace, Name: v1alpha1.WorkersName(p.dataset.Name)}, set)
	switch {
	case err == nil:
		p.set = set
	case !apierrors.IsNotFound(err):
		return err
	}
	pods := &corev1.PodList{}
	if err := r.client.List(ctx, pods, client.InNamespace(p.dataset.Namespace), client.MatchingLabels(selector(p.dataset))); err != nil {
		return err
	}
	p.pods = slices.DeleteFunc(pods.Items, func(pod corev1.Pod) bool { return ordinal(p.dataset, pod.Name) < 0 })
	slices.SortFunc(p.pods, func(a, b corev1.Pod) int { return ordinal(p.dataset, a.Name) - ordinal(p.dataset, b.Name) })
	p.nodes = make(map[string]*corev1.Node)
	for i := range p.pods {
		name := p.pods[i].Spec.NodeName
		if name == "" || p.nodes[name] != nil {
			continue
		}
		node := &corev1.Node{}
		if err := r.client.Get(ctx, client.ObjectKey{Name: name}, node); err == nil {
			p.nodes[name] = node
		} else if !apierrors.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// selector finds the Dataset's worker pods.
func selector(d *v1alpha1.Dataset) map[string]string {
	return map[string]string{v1alpha1.LabelDataset: d.Name, v1alpha1.LabelComponent: v1alpha1.ComponentWorker}
}

// ordinal is the number of a worker of the Dataset by its pod's name; negative for another's.
func ordinal(d *v1alpha1.Dataset, pod string) int {
	s, ok := strings.CutPrefix(pod, v1alpha1.WorkersName(d.Name)+"-")
	n, err := strconv.Atoi(s)
	if !ok || err != nil || n < 0 {
		return -1
	}
	return n
}

// serves says whether a worker should answer: it runs, on a node that is reachable, and is not being stopped. One that
// did answer is not dead because its node cannot reach the API server.
func (p *pass) serves(pod *corev1.Pod) bool {
	return pod.Status.PodIP != "" && pod.Status.Phase == corev1.PodRunning && pod.DeletionTimestamp.IsZero() &&
		(p.heard[pod.Name] || unreachable(p.nodes[pod.Spec.NodeName]) == nil)
}

// unreachable is the condition that says that a node does not answer; nil when it does, or is not known.
func unreachable(node *corev1.Node) *corev1.NodeCondition {
	if node == nil {
		return nil
	}
	for i := range node.Status.Conditions {
		if c := &node.Status.Conditions[i]; c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			return c
		}
	}
	return nil
}

func podReady(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp.IsZero() && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// pod is the worker's pod; nil when there is none.
func (p *pass) pod(name string) *corev1.Pod {
	for i := range p.pods {
		if p.pods[i].Name == name {
			return &p.pods[i]
		}
	}
	return nil
}
