package v1alpha1

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// As the scheduler and autoscalers judge: the latter by a node that is not there yet, and has no label of ours.
func TestNodesForPods(t *testing.T) {
	selector, err := nodeaffinity.NewNodeSelector(&corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: NodesForPods()}}})
	if err != nil {
		t.Fatal(err)
	}
	const ready = LabelNodeReady
	for name, c := range map[string]struct {
		labels map[string]string
		want   bool
	}{
		"not there yet":   {map[string]string{corev1.LabelOSStable: "linux"}, true},
		"of Karpenter":    {map[string]string{corev1.LabelOSStable: "linux", ready: "5577006791947779410"}, true},
		"with service":    {map[string]string{corev1.LabelOSStable: "linux", ready: "true"}, true},
		"without service": {map[string]string{corev1.LabelOSStable: "linux", ready: "false"}, false},
		"Windows":         {map[string]string{corev1.LabelOSStable: "windows"}, false},
	} {
		if got := selector.Match(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Labels: c.labels}}); got != c.want {
			t.Errorf("a node that is %s: %v, want %v", name, got, c.want)
		}
	}
}
