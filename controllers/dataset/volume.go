package dataset

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Reasons of the condition VolumeReady.
const (
	ReasonBound         = "Bound"
	ReasonBinding       = "Binding"       // the cluster has not bound the claim yet
	ReasonNoNodeService = "NoNodeService" // no node could mount the claim
	ReasonClaimDeleted  = "ClaimDeleted"  // somebody deletes the claim, and pods keep it
)

// claimTaken tells of a claim of somebody else that has the name of the Dataset's, before anything else can end the pass
// (the workers' StatefulSet may have a name that is taken as well, by Fluid's): the webhook goes by it.
func (r *Reconciler) claimTaken(ctx context.Context, p *pass) error {
	claim := &corev1.PersistentVolumeClaim{}
	key := client.ObjectKey{Namespace: p.dataset.Namespace, Name: v1alpha1.ClaimName(p.dataset.Name)}
	err := r.client.Get(ctx, key, claim)
	if apierrors.IsNotFound(err) {
		err = r.live.Get(ctx, key, claim) // the cache holds our own objects only
	}
	if err == nil && foreign(claim, p.dataset) {
		p.condition(v1alpha1.ConditionVolumeReady, metav1.ConditionFalse, v1alpha1.ReasonNameTaken, "%v", taken(v1alpha1.ConditionVolumeReady, claim))
	}
	return client.IgnoreNotFound(err)
}

// volume keeps the PersistentVolume and the claim of the Dataset's own name. The volume says which Dataset,
// never which snapshot, so that it outlives refreshes; who may read it is the claim's namespace, since what
// a volume says cannot change when shareWith does. It may be mounted only where a node service is or may come.
func (r *Reconciler) volume(ctx context.Context, p *pass) error {
	d := p.dataset
	const least = 1 * mi
	reader := &corev1.SecretReference{Namespace: d.Namespace, Name: v1alpha1.ReaderName(d.Name)}
	pv := &corev1.PersistentVolume{ObjectMeta: p.object(v1alpha1.VolumeName(d.Namespace, d.Name), v1alpha1.ComponentNode)}
	pv.Namespace = ""
	pv.Spec = corev1.PersistentVolumeSpec{
		// The bytes of the data, for people: nothing is reserved.
		Capacity:                      corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(max(d.Status.Bytes, least), resource.BinarySI)},
		AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadOnlyMany},
		PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
			Driver: v1alpha1.DriverName, VolumeHandle: v1alpha1.VolumeHandle(d.Namespace, d.Name), ReadOnly: true,
			VolumeAttributes: map[string]string{v1alpha1.AttributeDataset: d.Name, v1alpha1.AttributeNamespace: d.Namespace},
			// The kubelet hands the read key to the node service, which so needs no right to read Secrets.
			NodeStageSecretRef: reader, NodePublishSecretRef: reader,
		}},
		ClaimRef: &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: d.Namespace, Name: v1alpha1.ClaimName(d.Name)},
		NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: v1alpha1.NodesForPods(),
		}}}},
	}
	if err := r.apply(ctx, p, r.client, v1alpha1.ConditionVolumeReady, pv); err != nil {
		return err
	}
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: p.object(v1alpha1.ClaimName(d.Name), v1alpha1.ComponentNode)}
	claim.Spec = corev1.PersistentVolumeClaimSpec{
		AccessModes:      []corev1.PersistentVolumeAccessMode{corev1.ReadOnlyMany},
		StorageClassName: ptr.To(""), VolumeName: pv.Name,
		Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(least, resource.BinarySI)}},
	}
	if err := r.apply(ctx, p, r.client, v1alpha1.ConditionVolumeReady, claim); err != nil {
		return err
	}
	if !claim.DeletionTimestamp.IsZero() {
		text := fmt.Sprintf("claim %q is being deleted: no new pod can be scheduled with it; once the pods that have it have ended it is made anew", claim.Name)
		p.warn(ReasonClaimDeleted, "Bind", "%s", text)
		return block(v1alpha1.ConditionVolumeReady, ReasonClaimDeleted, "%s", text)
	}
	p.unsay(ReasonClaimDeleted)
	switch claim.Status.Phase {
	case corev1.ClaimBound:
	case corev1.ClaimLost:
		return block(v1alpha1.ConditionVolumeReady, "Lost", "claim %q has lost its volume; delete the claim, it is made anew", claim.Name)
	default:
		return block(v1alpha1.ConditionVolumeReady, ReasonBinding, "claim %q is not bound to volume %s yet", claim.Name, pv.Name)
	}
	if r.Store == StoreCSI {
		nodes := &corev1.NodeList{}
		if err := r.client.List(ctx, nodes, client.MatchingLabels{v1alpha1.LabelNodeReady: "true"}, client.Limit(1)); err != nil {
			return err
		}
		if len(nodes.Items) == 0 {
			return block(v1alpha1.ConditionVolumeReady, ReasonNoNodeService, "no node has label %s=true: see that the pods of the node service in namespace %s run", v1alpha1.LabelNodeReady, r.Namespace)
		}
	}
	p.condition(v1alpha1.ConditionVolumeReady, metav1.ConditionTrue, ReasonBound, "claim %q can be mounted", claim.Name)
	return nil
}
