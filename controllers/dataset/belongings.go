package dataset

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// What belongs to a Dataset is told by the label with its UID, and not by an owner reference: the cluster's garbage
// collector takes away what has such a one as soon as its owner is deleted with propagation policy Foreground, as Argo
// CD deletes, whatever the owner's finalizers wait for.

// belongings are what may belong to a Dataset in its namespace, by kind and name. Of those that are watched the list of
// workers is the last: as long as one of them is there, so may be the Secrets, which are not watched, and whoever
// deletes them and is interrupted comes again. The workers' end begins before their keys go, since one without keys
// cannot be asked whether the bucket has what it holds.
func belongings(dataset client.ObjectKey) []client.Object {
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: dataset.Namespace, Name: name}
	}
	workers, s3 := v1alpha1.WorkersName(dataset.Name), v1alpha1.S3Name(dataset.Name)
	return []client.Object{
		&corev1.PersistentVolumeClaim{ObjectMeta: meta(v1alpha1.ClaimName(dataset.Name))},
		&appsv1.StatefulSet{ObjectMeta: meta(workers)},
		&policyv1.PodDisruptionBudget{ObjectMeta: meta(workers)},
		&networkingv1.NetworkPolicy{ObjectMeta: meta(workers)},
		&corev1.Service{ObjectMeta: meta(workers)},
		&corev1.Service{ObjectMeta: meta(s3)},
		&corev1.ConfigMap{ObjectMeta: meta(workers)},
		&corev1.ConfigMap{ObjectMeta: meta(s3)},
		&corev1.Secret{ObjectMeta: meta(s3)},
		&corev1.Secret{ObjectMeta: meta(v1alpha1.ReaderName(dataset.Name))},
		&corev1.Secret{ObjectMeta: meta(v1alpha1.KeysName(dataset.Name))},
		&corev1.ConfigMap{ObjectMeta: meta(v1alpha1.TierName(dataset.Name))},
	}
}

// belongs says whether an object is the Dataset's. What earlier versions made has it for its controller. A volume,
// which no namespace keeps from being found, is one Dataset's after the other of that name.
func belongs(o client.Object, d *v1alpha1.Dataset) bool {
	if _, ok := o.(*corev1.PersistentVolume); ok {
		return o.GetLabels()[v1alpha1.LabelDataset] == d.Name
	}
	return o.GetLabels()[v1alpha1.LabelUID] == string(d.UID) || metav1.IsControlledBy(o, d)
}

// left says whether an object is of a Dataset that had the name before: somebody has taken its finalizer off by force.
func left(o client.Object, name string, uid types.UID) bool {
	of := o.GetLabels()[v1alpha1.LabelUID]
	return of != "" && of != string(uid) && o.GetLabels()[v1alpha1.LabelDataset] == name
}

// foreign says whether an object is neither the Dataset's nor of one that had its name before.
func foreign(o client.Object, d *v1alpha1.Dataset) bool {
	return !belongs(o, d) && !left(o, d.Name, d.UID)
}

// taken blocks on an object that is foreign.
func taken(condition string, o client.Object) error {
	return block(condition, v1alpha1.ReasonNameTaken, "%s %q exists and is not this Dataset's; make the Dataset under another name, or, if nobody needs what is there, delete that", kindOf(o), o.GetName())
}

// find reads those of the objects that are there and are what is looked for.
func find(ctx context.Context, c client.Reader, all []client.Object, want func(client.Object) bool) ([]client.Object, error) {
	var found []client.Object
	for _, o := range all {
		err := c.Get(ctx, client.ObjectKeyFromObject(o), o)
		switch {
		case apierrors.IsNotFound(err):
		case err != nil:
			return nil, fmt.Errorf("%s %s: %w", kindOf(o), o.GetName(), err)
		case want(o):
			found = append(found, o)
		}
	}
	return found, nil
}

// discard deletes objects as they were found, in their order.
func discard(ctx context.Context, c client.Client, all []client.Object) error {
	for _, o := range all {
		if !o.GetDeletionTimestamp().IsZero() {
			continue
		}
		uid := o.GetUID()
		err := c.Delete(ctx, o, client.Preconditions{UID: &uid}, client.PropagationPolicy(metav1.DeletePropagationBackground))
		if client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("%s %s: %w", kindOf(o), o.GetName(), err)
		}
	}
	return nil
}

// discardLeft deletes what is left of a Dataset that had the name before this one. That the cache may be behind, and this
// one the earlier of the two, is why the API server is asked first.
func (r *Reconciler) discardLeft(ctx context.Context, d *v1alpha1.Dataset, all ...client.Object) error {
	if len(all) == 0 {
		return nil
	}
	now := &v1alpha1.Dataset{}
	if err := r.live.Get(ctx, client.ObjectKeyFromObject(d), now); err != nil {
		return err
	}
	if now.UID != d.UID {
		return apierrors.NewConflict(v1alpha1.GroupVersion.WithResource("datasets").GroupResource(), d.Name, errors.New("another has its name by now"))
	}
	return discard(ctx, r.client, all)
}

func kindOf(o client.Object) string { return reflect.TypeOf(o).Elem().Name() }

// withoutOwner are an object's owner references but for those to a Dataset.
func withoutOwner(o client.Object, d *v1alpha1.Dataset) []metav1.OwnerReference {
	return slices.DeleteFunc(slices.Clone(o.GetOwnerReferences()), func(ref metav1.OwnerReference) bool { return ref.UID == d.UID })
}

// inherit sees, once, to what was there before this controller: what an earlier version made loses its owner reference,
// also while the Dataset is being deleted, and what a Dataset left that had the name before is deleted.
func (r *Reconciler) inherit(ctx context.Context, p *pass) error {
	if p.inherited {
		return nil
	}
	d := p.dataset
	var old []client.Object
	all, err := find(ctx, r.client, belongings(client.ObjectKeyFromObject(d)), func(client.Object) bool { return true })
	if err != nil {
		return err
	}
	for _, o := range all {
		switch refs := withoutOwner(o, d); {
		case left(o, d.Name, d.UID):
			old = append(old, o)
		case len(refs) < len(o.GetOwnerReferences()) && belongs(o, d):
			o.SetOwnerReferences(refs)
			labels := map[string]string{v1alpha1.LabelUID: string(d.UID)}
			maps.Copy(labels, o.GetLabels())
			o.SetLabels(labels)
			if err := client.IgnoreNotFound(r.client.Update(ctx, o)); err != nil {
				return fmt.Errorf("%s %s: %w", kindOf(o), o.GetName(), err)
			}
		}
	}
	if err := r.discardLeft(ctx, d, old...); err != nil {
		return err
	}
	p.inherited = true
	return nil
}

// orphans deletes what belonged to a Dataset that is not there any more: somebody has taken its finalizer off by force.
func (r *Reconciler) orphans(ctx context.Context, dataset client.ObjectKey) error {
	mine := func(o client.Object) bool { return left(o, dataset.Name, "") }
	volume := &corev1.PersistentVolume{}
	volume.Name = v1alpha1.VolumeName(dataset.Namespace, dataset.Name)
	watched := slices.DeleteFunc(append(belongings(dataset), volume), func(o client.Object) bool { _, ok := o.(*corev1.Secret); return ok })
	some, err := find(ctx, r.client, watched, func(o client.Object) bool { return mine(o) && o.GetDeletionTimestamp().IsZero() })
	if err != nil || len(some) == 0 {
		return err
	}
	all, err := find(ctx, r.client, append([]client.Object{volume}, belongings(dataset)...), mine)
	if err != nil {
		return err
	}
	// After all were read: what belongs to a Dataset that is made from now on is not among them. A list that is empty
	// says more than an object that is not found, which so is also while its kind is not served.
	there := &v1alpha1.DatasetList{}
	if err := r.live.List(ctx, there, client.InNamespace(dataset.Namespace), client.MatchingFields{"metadata.name": dataset.Name}); err != nil || len(there.Items) > 0 {
		return err
	}
	return discard(ctx, r.client, all)
}
