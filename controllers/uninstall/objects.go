package uninstall

import "k8s.io/apimachinery/pkg/runtime/schema"

// object is one that config/ installs and that goes by its name. A test compares these lists, and what goes by its
// label, with the manifests.
type object struct {
	kind    schema.GroupVersionKind
	name    string
	cluster bool // it is in no namespace
}

const (
	admission = "admissionregistration.k8s.io"
	rbac      = "rbac.authorization.k8s.io"
)

func kind(group, kind string) schema.GroupVersionKind {
	return schema.GroupVersionKind{Group: group, Version: "v1", Kind: kind}
}

var (
	webhooks = []object{
		{kind(admission, "MutatingWebhookConfiguration"), "stepcache-inject", true},
		{kind(admission, "MutatingWebhookConfiguration"), "stepcache-locality", true},
		{kind(admission, "ValidatingWebhookConfiguration"), "stepcache-validation", true},
	}
	running = []object{
		{kind("apps", "Deployment"), "stepcache-controller", false},
		{kind("apps", "Deployment"), "stepcache-webhook", false},
	}
	rights = []object{
		{kind("policy", "PodDisruptionBudget"), "stepcache-controller", false},
		{kind("policy", "PodDisruptionBudget"), "stepcache-webhook", false},
		{kind("", "ResourceQuota"), "stepcache-critical", false},
		{kind("", "Service"), "stepcache-controller-metrics", false},
		{kind("", "Service"), "stepcache-webhook", false},
		{kind("", "Secret"), "stepcache-webhook-cert", false},
		{kind("coordination.k8s.io", "Lease"), "stepcache-controller", false},
		{kind(rbac, "ClusterRoleBinding"), "stepcache-controller", true},
		{kind(rbac, "ClusterRoleBinding"), "stepcache-node", true},
		{kind(rbac, "ClusterRoleBinding"), "stepcache-webhook", true},
		{kind(rbac, "ClusterRoleBinding"), "stepcache-webhook-locality", true},
		{kind(rbac, "ClusterRole"), "stepcache-controller", true},
		{kind(rbac, "ClusterRole"), "stepcache-edit", true},
		{kind(rbac, "ClusterRole"), "stepcache-node", true},
		{kind(rbac, "ClusterRole"), "stepcache-view", true},
		{kind(rbac, "ClusterRole"), "stepcache-webhook", true},
		{kind(rbac, "ClusterRole"), "stepcache-webhook-locality", true},
		{kind(rbac, "RoleBinding"), "stepcache-controller", false},
		{kind(rbac, "RoleBinding"), "stepcache-webhook", false},
		{kind(rbac, "Role"), "stepcache-controller", false},
		{kind(rbac, "Role"), "stepcache-webhook", false},
		{kind("", "ServiceAccount"), "stepcache-controller", false},
		{kind("", "ServiceAccount"), "stepcache-node", false},
		{kind("", "ServiceAccount"), "stepcache-webhook", false},
		{kind(admission, "ValidatingAdmissionPolicyBinding"), "stepcache-node", true},
		{kind(admission, "ValidatingAdmissionPolicy"), "stepcache-node", true},
		{kind("storage.k8s.io", "CSIDriver"), "csi.data.stepcache.dev", true},
	}
	definitions = []object{
		{kind("apiextensions.k8s.io", "CustomResourceDefinition"), "dataloads.data.stepcache.dev", true},
		{kind("apiextensions.k8s.io", "CustomResourceDefinition"), "datasets.data.stepcache.dev", true},
	}
)
