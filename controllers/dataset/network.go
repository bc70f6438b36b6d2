package dataset

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// network keeps the Service, the PodDisruptionBudget and the NetworkPolicy of the workers.
func (r *Reconciler) network(ctx context.Context, p *pass) error {
	d := p.dataset
	meta := func() metav1.ObjectMeta { return p.object(v1alpha1.WorkersName(d.Name), v1alpha1.ComponentWorker) }
	if err := r.apply(ctx, p, r.client, v1alpha1.ConditionWorkersReady, &corev1.Service{ObjectMeta: meta(), Spec: corev1.ServiceSpec{
		ClusterIP: corev1.ClusterIPNone, Selector: selector(d),
		PublishNotReadyAddresses: true, // a worker that cannot read its bucket still has to be asked why
		Ports: []corev1.ServicePort{
			{Name: "data", Port: v1alpha1.PortData, TargetPort: intstr.FromString("data")},
			{Name: "control", Port: v1alpha1.PortControl, TargetPort: intstr.FromString("control")},
		},
	}}); err != nil {
		return err
	}
	budget := policyv1.PodDisruptionBudgetSpec{MaxUnavailable: ptr.To(intstr.FromInt32(1)), Selector: &metav1.LabelSelector{MatchLabels: selector(d)}}
	if !p.back() {
		// While the bucket cannot be read no worker is ready, and nodes are to be drained all the same.
		budget.UnhealthyPodEvictionPolicy = ptr.To(policyv1.AlwaysAllow)
	}
	if err := r.apply(ctx, p, r.client, v1alpha1.ConditionWorkersReady, &policyv1.PodDisruptionBudget{ObjectMeta: meta(), Spec: budget}); err != nil {
		return err
	}
	return r.apply(ctx, p, r.client, v1alpha1.ConditionWorkersReady, &networkingv1.NetworkPolicy{ObjectMeta: meta(), Spec: r.policy(d)})
}

// policy lets in who has business with the workers. It comes on top of the keys, which are what keeps
// others out where no policy is enforced.
func (r *Reconciler) policy(d *v1alpha1.Dataset) networkingv1.NetworkPolicySpec {
	port := func(name string) networkingv1.NetworkPolicyPort {
		return networkingv1.NetworkPolicyPort{Port: ptr.To(intstr.FromString(name))}
	}
	in := func(namespace string, labels map[string]string) networkingv1.NetworkPolicyPeer {
		peer := networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: labels}}
		if namespace != "" {
			peer.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: namespace}}
		}
		return peer
	}
	reader := map[string]string{v1alpha1.LabelReader: "true"}
	readers := []networkingv1.NetworkPolicyPeer{
		in("", reader),
		in(r.Namespace, map[string]string{v1alpha1.LabelComponent: v1alpha1.ComponentNode}),
		in(r.Namespace, map[string]string{v1alpha1.LabelComponent: v1alpha1.ComponentWebhook}), // pulls snapshots
	}
	for _, ns := range otherNamespaces(d) {
		readers = append(readers, in(string(ns), reader))
	}
	policy := networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: selector(d)},
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
		Ingress: []networkingv1.NetworkPolicyIngressRule{
			{From: []networkingv1.NetworkPolicyPeer{in("", selector(d))}, Ports: []networkingv1.NetworkPolicyPort{port("data"), port("control")}},
			{From: readers, Ports: []networkingv1.NetworkPolicyPort{port("data")}},
			{From: []networkingv1.NetworkPolicyPeer{
				in(r.Namespace, map[string]string{v1alpha1.LabelComponent: v1alpha1.ComponentController}),
				// The port's metrics and health are for everybody who gets there; all else is signed.
				{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{v1alpha1.LabelMonitoring: "true"}}},
			}, Ports: []networkingv1.NetworkPolicyPort{port("control")}},
		},
	}
	if writable(d) {
		// Steps that keep artifacts carry no label of ours.
		clients := []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}
		for _, ns := range otherNamespaces(d) {
			clients = append(clients, networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: string(ns)}}})
		}
		policy.Ingress = append(policy.Ingress, networkingv1.NetworkPolicyIngressRule{From: clients, Ports: []networkingv1.NetworkPolicyPort{port("s3")}})
	}
	return policy
}
