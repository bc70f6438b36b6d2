package webhook

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// mode is how a pod gets its data.
type mode string

const (
	auto    mode = "auto"
	csi     mode = "csi"
	sidecar mode = "sidecar"
	stage   mode = "stage"
)

// Labels of others by which a pod asks for its data.
const (
	labelFluid       = "serverless.fluid.io/inject"
	labelFluidTarget = "alibabacloud.com/fluid-sidecar-target"
)

// asks says whether the pod asks for data by a label, and for which mode.
func asks(pod *corev1.Pod) (m mode, ok bool, err error) {
	if value, has := pod.Labels[v1alpha1.LabelInject]; has {
		switch m := mode(value); m {
		case auto, csi, sidecar, stage:
			return m, true, nil
		}
		return "", true, fmt.Errorf("label %s: %q is not a mode: write auto, csi, sidecar or stage", v1alpha1.LabelInject, value)
	}
	if pod.Labels[labelFluid] == "true" || pod.Labels[labelFluidTarget] != "" {
		return auto, true, nil
	}
	return "", false, nil
}

// privileges is what pod security lets a namespace's pods do.
type privileges uint8

const (
	unsaid     privileges = iota // no label: an API server's default is to allow everything
	privileged                   // said so
	limited                      // baseline or restricted
)

const labelEnforce = "pod-security.kubernetes.io/enforce"

func privilegesOf(namespaceLabels map[string]string) privileges {
	switch namespaceLabels[labelEnforce] {
	case "":
		return unsaid
	case "privileged":
		return privileged
	}
	return limited
}

// choose decides the mode of a pod that asked for one.
func choose(asked mode, pod *corev1.Pod, namespace string, namespaceLabels map[string]string, nodeService bool) (mode, error) {
	may := privilegesOf(namespaceLabels)
	if pod.Spec.HostNetwork && (asked == sidecar || asked == stage) && lends(pod, namespaceLabels, nodeService) {
		return "", fmt.Errorf("the mode %s reads through the pod's own network, and the workers let in pods by label (NetworkPolicy), which does not tell a pod with hostNetwork: use csi, which reads through the node service", asked)
	}
	// What is mounted in a user namespace of its own is of no use to other containers.
	apart := pod.Spec.HostUsers != nil && !*pod.Spec.HostUsers
	switch asked {
	case auto:
		switch {
		case serverless(pod, namespaceLabels):
			// Nodes without a kernel of their own rarely run privileged containers: somebody must have said so.
			if may == privileged && !apart {
				return sidecar, nil
			}
			return stage, nil
		case nodeService:
			return csi, nil
		case may != limited && !apart:
			return sidecar, nil
		}
		return stage, nil
	case sidecar:
		switch lent := lends(pod, namespaceLabels, nodeService); {
		case may == limited && !lent:
			return "", fmt.Errorf("the mode sidecar needs a privileged container where no node service lends it its mounts, and namespace %s does not allow that (label %s=%s): use stage, or install the node service",
				namespace, labelEnforce, namespaceLabels[labelEnforce])
		case apart && !lent:
			return "", errors.New("the mode sidecar needs the user namespace of the node where no node service lends it its mounts, and the pod has one of its own (hostUsers: false): use stage, or install the node service")
		}
	}
	return asked, nil
}

// lends says whether there is a node service where the pod runs: it lends a sidecar its mounts, which so needs no right.
func lends(pod *corev1.Pod, namespaceLabels map[string]string, nodeService bool) bool {
	return nodeService && !serverless(pod, namespaceLabels)
}

// serverless says whether a pod runs on a node that is made for it: no DaemonSet is there.
func serverless(pod *corev1.Pod, namespaceLabels map[string]string) bool {
	if pod.Labels[labelFluidTarget] != "" {
		return true
	}
	for _, labels := range []map[string]string{pod.Labels, namespaceLabels} {
		for _, key := range []string{"alibabacloud.com/eci", "eci", "alibabacloud.com/acs"} {
			if labels[key] == "true" {
				return true
			}
		}
		if labels["alibabacloud.com/compute-class"] != "" {
			return true
		}
	}
	if strings.HasPrefix(pod.Spec.NodeName, "virtual-kubelet") || pod.Labels["eks.amazonaws.com/fargate-profile"] != "" {
		return true
	}
	return bound(pod, virtual) || slices.Contains([]string{"eci-scheduler", "fargate-scheduler"}, pod.Spec.SchedulerName)
}

// windows says whether a pod runs on Windows, where there is no node service.
func windows(pod *corev1.Pod) bool {
	return pod.Spec.OS != nil && pod.Spec.OS.Name == corev1.Windows || bound(pod, func(key, value string) bool {
		return key == corev1.LabelOSStable && value == string(corev1.Windows)
	})
}

// bound says whether a pod's node selector or affinity lets it onto nodes with such a label only.
func bound(pod *corev1.Pod, such func(key, value string) bool) bool {
	for key, value := range pod.Spec.NodeSelector {
		if such(key, value) {
			return true
		}
	}
	if a := pod.Spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		terms := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
		elsewhere := func(t corev1.NodeSelectorTerm) bool { // every alternative must lead to such a node
			return !slices.ContainsFunc(t.MatchExpressions, func(r corev1.NodeSelectorRequirement) bool {
				return r.Operator == corev1.NodeSelectorOpIn && len(r.Values) == 1 && such(r.Key, r.Values[0])
			})
		}
		return len(terms) > 0 && !slices.ContainsFunc(terms, elsewhere)
	}
	return false
}

// virtual says whether a node label belongs to nodes without a machine.
func virtual(key, value string) bool {
	return key == "type" && value == "virtual-kubelet" ||
		key == "kubernetes.io/role" && value == "agent-virtual" ||
		key == "alibabacloud.com/virtual-node" && value == "true" ||
		key == "eks.amazonaws.com/compute-type" && value == "fargate"
}
