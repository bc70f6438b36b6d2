package dataset

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// annotationApplied is the hash of what was last applied, so that a field that is not wanted any more is
// taken away.
const annotationApplied = v1alpha1.Group + "/applied"

// object is the metadata of an object that belongs to the Dataset.
func (p *pass) object(name, component string) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: p.dataset.Namespace, Name: name,
		Labels: map[string]string{
			v1alpha1.LabelDataset: p.dataset.Name, v1alpha1.LabelUID: string(p.dataset.UID), v1alpha1.LabelComponent: component,
			"app.kubernetes.io/name": "stepcache", "app.kubernetes.io/managed-by": "stepcache",
		},
	}
}

// apply makes an object of the Dataset be as want says, where it is not: created, or changed when what is
// wanted changed or somebody else changed one of its fields. reader is the cache, or past it. want becomes
// what is on the server.
func (r *Reconciler) apply(ctx context.Context, p *pass, reader client.Reader, condition string, want client.Object) error {
	hash, err := hashOf(want)
	if err != nil {
		return err
	}
	if want.GetAnnotations() == nil {
		want.SetAnnotations(map[string]string{})
	}
	want.GetAnnotations()[annotationApplied] = hash

	have := reflect.New(reflect.TypeOf(want).Elem()).Interface().(client.Object)
	err = reader.Get(ctx, client.ObjectKeyFromObject(want), have)
	if apierrors.IsNotFound(err) {
		err = r.client.Create(ctx, want)
		if !apierrors.IsAlreadyExists(err) {
			return err
		}
		// The cache holds our own objects only; this may be one of somebody else.
		err = r.live.Get(ctx, client.ObjectKeyFromObject(want), have)
	}
	if err != nil {
		return err
	}
	kind := kindOf(want)
	switch {
	case foreign(have, p.dataset):
		return taken(condition, have)
	case !belongs(have, p.dataset):
		if err := r.discardLeft(ctx, p.dataset, have); err != nil {
			return err
		}
		return block(condition, v1alpha1.ReasonNameTaken, "%s %q is of a Dataset that had this name before; it is being deleted, and goes once no pod uses it", kind, want.GetName())
	}
	if pv, ok := have.(*corev1.PersistentVolume); ok && pv.Spec.NodeAffinity != nil {
		want.(*corev1.PersistentVolume).Spec.NodeAffinity = pv.Spec.NodeAffinity // it cannot be changed, and an earlier version made another
	}
	free, err := r.free(ctx, have)
	if err != nil {
		return err
	}
	owners := withoutOwner(have, p.dataset)
	if have.GetAnnotations()[annotationApplied] == hash && !free && len(owners) == len(have.GetOwnerReferences()) {
		same, err := unchanged(want, have)
		if err != nil {
			return fmt.Errorf("%s %s: %w", kind, want.GetName(), err)
		}
		if same {
			reflect.ValueOf(want).Elem().Set(reflect.ValueOf(have).Elem())
			return nil
		}
	}
	// Labels, annotations and owners of others stay.
	labels, annotations := maps.Clone(have.GetLabels()), maps.Clone(have.GetAnnotations())
	if labels == nil {
		labels = map[string]string{}
	}
	if annotations == nil {
		annotations = map[string]string{}
	}
	maps.Copy(labels, want.GetLabels())
	maps.Copy(annotations, want.GetAnnotations())
	want.SetLabels(labels)
	want.SetAnnotations(annotations)
	want.SetOwnerReferences(owners)
	want.SetFinalizers(have.GetFinalizers())
	want.SetResourceVersion(have.GetResourceVersion())
	switch want := want.(type) {
	case *corev1.Service:
		want.Spec.ClusterIP, want.Spec.ClusterIPs = have.(*corev1.Service).Spec.ClusterIP, have.(*corev1.Service).Spec.ClusterIPs
	case *corev1.PersistentVolume:
		// The cluster writes the claim's UID into the reference when it binds the two, and calls a claim Lost
		// whose volume does not have it any more. Once that claim is gone the next one may bind.
		if !free {
			want.Spec.ClaimRef = have.(*corev1.PersistentVolume).Spec.ClaimRef
		}
	}
	if err := r.client.Update(ctx, want); err != nil {
		return fmt.Errorf("%s %s: %w", kind, want.GetName(), err)
	}
	return nil
}

// free says whether an object is a volume whose reference still names a claim that is gone, which keeps the next
// one from binding. That it is Released does not tell: the next claim's UID is written before the phase changes.
// The claim is read past the cache, which may not have the next one yet.
func (r *Reconciler) free(ctx context.Context, have client.Object) (bool, error) {
	pv, ok := have.(*corev1.PersistentVolume)
	if !ok || pv.Status.Phase != corev1.VolumeReleased || pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID == "" {
		return false, nil
	}
	claim := &corev1.PersistentVolumeClaim{}
	err := r.live.Get(ctx, client.ObjectKey{Namespace: pv.Spec.ClaimRef.Namespace, Name: pv.Spec.ClaimRef.Name}, claim)
	return claim.UID != pv.Spec.ClaimRef.UID, client.IgnoreNotFound(err)
}

// unchanged says whether have is as want says; what want leaves open may be anything, and its status is not ours.
// They are compared as they are written: there a number that is left open is absent, while in memory it is a
// zero, which no default of the server's equals.
func unchanged(want, have client.Object) (bool, error) {
	w, err := runtime.DefaultUnstructuredConverter.ToUnstructured(want)
	if err != nil {
		return false, err
	}
	h, err := runtime.DefaultUnstructuredConverter.ToUnstructured(have)
	if err != nil {
		return false, err
	}
	delete(w, "status")
	return within(w, h), nil
}

// within says whether a decoded JSON value has all that want has.
func within(want, have any) bool {
	switch want := want.(type) {
	case nil:
		return true
	case map[string]any:
		h, ok := have.(map[string]any)
		if !ok {
			return len(want) == 0
		}
		for k, v := range want {
			if !within(v, h[k]) {
				return false
			}
		}
		return true
	case []any:
		h, _ := have.([]any)
		if len(h) != len(want) {
			return false
		}
		for i := range want {
			if !within(want[i], h[i]) {
				return false
			}
		}
		return true
	}
	return reflect.DeepEqual(want, have)
}

// hashOf is a short name of a value.
func hashOf(v any) (string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8]), nil
}
