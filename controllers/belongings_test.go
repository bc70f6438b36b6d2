package controllers_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/wire"
)

// names are the kinds and names of a Dataset's objects and their UIDs, sorted.
func (w *world) names(d *v1alpha1.Dataset) (names []string) {
	for _, o := range w.belongings(w.Context(), d.Name) {
		names = append(names, fmt.Sprintf("%T %s %s", o, o.GetName(), o.GetUID()))
	}
	slices.Sort(names)
	return names
}

// nothing waits until no object of a Dataset is left, but for what the cluster protects.
func (w *world) nothing(d *v1alpha1.Dataset) {
	w.Helper()
	w.eventually("nothing is left of "+d.Name, func() error {
		for _, o := range w.belongings(w.Context(), d.Name) {
			if o.GetDeletionTimestamp().IsZero() {
				return fmt.Errorf("%T %s is", o, o.GetName())
			}
		}
		return nil
	})
}

// Argo CD deletes what it prunes in the foreground.
func TestForegroundDeletionTakesNothingFromThePodsThatUseTheDataset(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 1, 1000)
	pod := w.pod("reader", corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "genomes"}})
	w.must(w.Create(t.Context(), pod))
	before, workers := w.names(d), asJSON(w.members(d))
	w.must(w.Delete(t.Context(), d, client.PropagationPolicy(metav1.DeletePropagationForeground)))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "InUse", "reader")
	w.eventually("the garbage collector is done", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		if !slices.Equal(d.Finalizers, []string{v1alpha1.Finalizer}) {
			return fmt.Errorf("finalizers %q", d.Finalizers)
		}
		return nil
	})
	if after := w.names(d); !slices.Equal(after, before) || asJSON(w.members(d)) != workers || len(w.statuses()) != 2 {
		t.Errorf("of %q a Dataset in use has %q left, and %d workers", before, after, len(w.statuses()))
	}
	w.must(w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	w.gone(d)
	w.nothing(d)
}

// disguise has a Dataset's objects be as an earlier version made them.
func (w *world) disguise(d *v1alpha1.Dataset) {
	w.Helper()
	for _, o := range w.belongings(w.Context(), d.Name) {
		update(w, o, func(o client.Object) {
			labels := o.GetLabels()
			delete(labels, v1alpha1.LabelUID)
			o.SetLabels(labels)
			w.must(controllerutil.SetControllerReference(d, o, w.Scheme()))
		})
	}
}

func TestWhatAnEarlierVersionMadeHasNoOwnerAnyMore(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	ownerless := func() {
		w.Helper()
		w.eventually("nothing has an owner", func() error {
			for _, o := range w.belongings(t.Context(), d.Name) {
				if len(o.GetOwnerReferences()) > 0 || o.GetLabels()[v1alpha1.LabelUID] != string(d.UID) {
					return fmt.Errorf("%T %s has %s, labels %v", o, o.GetName(), asJSON(o.GetOwnerReferences()), o.GetLabels())
				}
			}
			return nil
		})
	}
	before := w.names(d)
	w.stopManager()
	w.disguise(d)
	// One that cannot go on is no exception.
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.Mounts[0].CredentialsSecretRef = nil })
	w.start()
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "InvalidSpec")
	ownerless()

	// Nor is one that is being deleted.
	pod := w.pod("reader", corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "genomes"}})
	w.must(w.Create(t.Context(), pod))
	w.stopManager()
	w.disguise(d)
	w.must(w.Delete(t.Context(), d))
	w.start()
	ownerless()
	if after := w.names(d); !slices.Equal(after, before) {
		t.Errorf("objects %q, before %q", after, before)
	}
	w.must(w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	w.gone(d)
	w.nothing(d)
}

// A policy that lets nobody change what an earlier version made keeps no deletion waiting.
func TestADeletionNeedsNoChangeOfWhatItDeletes(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	w.stopManager()
	w.disguise(d)
	w.must(w.Delete(t.Context(), d))
	w.requests.refusing(v1alpha1.LabelUID)
	w.start()
	w.gone(d)
	w.nothing(d)
}

func TestDatasetWhoseFinalizerWasTakenOffLeavesNothing(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	theirs := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes-s3", Labels: map[string]string{v1alpha1.LabelDataset: "genomes"}}}
	w.must(w.Create(t.Context(), theirs))
	tearOut := func() {
		w.Helper()
		w.stopManager()
		update(w, d, func(d *v1alpha1.Dataset) { d.Finalizers = nil })
		w.must(w.Delete(t.Context(), d))
		w.gone(d)
	}
	tearOut()
	w.start()
	w.eventually("what it had is gone", func() error {
		all := w.belongings(t.Context(), d.Name)
		claim := slices.IndexFunc(all, func(o client.Object) bool {
			_, ok := o.(*corev1.PersistentVolumeClaim)
			return ok && !o.GetDeletionTimestamp().IsZero()
		})
		if len(all) != 2 || claim < 0 {
			return fmt.Errorf("%q is there", w.names(d))
		}
		all[claim].SetFinalizers(nil) // no pod uses it
		return w.Update(t.Context(), all[claim])
	})
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(theirs), theirs))
	w.must(w.Delete(t.Context(), theirs))

	// One that is made anew meanwhile gets its own objects.
	d = w.ready("genomes", 1, 1, 1000)
	tearOut()
	before := w.names(d)
	d = w.dataset("genomes", 1)
	w.must(w.Create(t.Context(), d))
	w.start()
	w.condition(d, v1alpha1.ConditionVolumeReady, metav1.ConditionFalse, "NameTaken", "had this name before", "once no pod uses it")
	claim := &corev1.PersistentVolumeClaim{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes"}, claim))
	if claim.DeletionTimestamp.IsZero() || claim.Labels[v1alpha1.LabelUID] == string(d.UID) {
		t.Errorf("claim %s", asJSON(claim.ObjectMeta))
	}
	claim.Finalizers = nil
	w.must(w.Update(t.Context(), claim))
	w.waitReady(d)
	for _, name := range w.names(d) {
		if slices.Contains(before, name) {
			t.Errorf("it has %s of the Dataset before it", name)
		}
	}
}

func TestWorkersThatAreGoneAreNoWordThatTheBucketHasEverything(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	w.tell(d)
	w.lag("genomes-worker-0", wire.Unflushed{Objects: 3, Bytes: 12 << 20, Oldest: time.Now()})
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionFalse, "Pending", "3 objects")
	w.must(w.Delete(t.Context(), d))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "Unflushed")
	for _, o := range w.belongings(t.Context(), d.Name) {
		switch o.(type) {
		case *appsv1.StatefulSet, *corev1.ConfigMap, *corev1.Secret:
			w.must(w.Delete(t.Context(), o))
		}
	}
	// A list that was being written meanwhile has its worker for a minute.
	w.eventually("no worker runs", func() error {
		if n := len(w.statuses()); n > 0 {
			return fmt.Errorf("%d do", n)
		}
		return nil
	})
	w.passes(d, 4)
	w.clock.advance(2 * time.Minute)
	w.condition(d, v1alpha1.ConditionFlushed, metav1.ConditionUnknown, "NotAnswering", "3 objects", "none to ask any more")
	w.event("WaitsForBucket", "none to ask any more", "accept-loss=")
	_, from := w.requests.since(0)
	w.passesSince(d, from, 4)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
	if d.Status.Unflushed.Objects != 3 {
		t.Errorf("status %s", asJSON(d.Status))
	}
	w.acceptLoss(d, 0)
	w.gone(d)
}
