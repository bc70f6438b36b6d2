package controllers_test

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/wire"
)

func (w *world) namespace(name string) {
	w.Helper()
	w.must(w.Create(w.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}))
}

// poke has the controller look at a Dataset at once.
func (w *world) poke(d *v1alpha1.Dataset) {
	w.Helper()
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, "poke", fmt.Sprint(time.Now().UnixNano()))
	})
}

// copyOf waits until a namespace has the copy of the Dataset's reader Secret, as the Secret is now.
func (w *world) copyOf(d *v1alpha1.Dataset, namespace string) *corev1.Secret {
	w.Helper()
	s := &corev1.Secret{}
	w.eventually("the copy in "+namespace, func() error {
		reader := &corev1.Secret{}
		w.must(w.Get(w.Context(), client.ObjectKey{Namespace: w.ns, Name: d.Name + "-reader"}, reader))
		err := w.Get(w.Context(), client.ObjectKey{Namespace: namespace, Name: w.ns + "." + d.Name + "-reader"}, s)
		if err == nil && !reflect.DeepEqual(s.Data, reader.Data) {
			err = errors.New("it has other keys than the Dataset's")
		}
		return err
	})
	return s
}

func TestSharedDatasetHasItsReaderSecretInTheOtherNamespaces(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	there, later, taken := w.ns+"-there", w.ns+"-later", w.ns+"-taken"
	w.namespace(there)
	w.namespace(taken)
	theirs := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: taken, Name: w.ns + ".genomes-reader"}, Data: map[string][]byte{"read": []byte("theirs")}}
	w.must(w.Create(t.Context(), theirs))
	update(w, d, func(d *v1alpha1.Dataset) {
		d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(there), v1alpha1.Namespace(later), v1alpha1.Namespace(taken), v1alpha1.Namespace(w.ns)}
	})
	s := w.copyOf(d, there)
	if len(s.Data["read"]) == 0 || s.Data["write"] != nil || s.Data["control"] != nil {
		t.Errorf("the copy holds more than the read key, or not even that: it has %d keys", len(s.Data))
	}

	// A Secret of somebody else is named and left alone, and the Dataset is ready all the same.
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionFalse, "NameTaken", w.ns+".genomes-reader", taken)
	w.event("ShareBlocked", taken)
	w.waitReady(d)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(theirs), theirs))
	if string(theirs.Data["read"]) != "theirs" || len(theirs.Labels) > 0 {
		t.Errorf("somebody else's Secret was changed: %s", asJSON(theirs))
	}
	w.must(w.Delete(t.Context(), theirs))

	// A namespace that is not there yet gets its copy when it comes.
	w.poke(d)
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionFalse, "NamespaceMissing", later)
	w.copyOf(d, taken)
	w.namespace(later)
	w.copyOf(d, later)
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionTrue, "Shared", "3 other namespaces")

	// New keys reach the copies.
	old := string(s.Data["read"])
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRotateKeys, "today")
	})
	w.event("KeysRotated")
	w.eventually("the copy has the new key", func() error {
		if s := w.copyOf(d, there); string(s.Data["read"]) == old {
			return errors.New("it has the old one")
		}
		return nil
	})

	// One that somebody deleted comes back.
	w.must(w.Delete(t.Context(), s))
	w.clock.advance(2 * time.Minute)
	w.copyOf(d, there)

	// A namespace that may not read any more loses its copy, also when the controller was away meanwhile.
	w.stopManager()
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(later)} })
	w.start()
	w.noCopy(d, there)
	w.noCopy(d, taken)
	w.copyOf(d, later)

	// A pod there keeps the Dataset from going; then the last copy goes with it.
	pod := w.pod("reader", corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: v1alpha1.DriverName,
		NodePublishSecretRef: &corev1.LocalObjectReference{Name: w.ns + ".genomes-reader"},
		VolumeAttributes:     map[string]string{v1alpha1.AttributeDataset: "genomes", v1alpha1.AttributeNamespace: w.ns}}})
	pod.Namespace = later
	w.must(w.Create(t.Context(), pod))
	w.must(w.Delete(t.Context(), d))
	w.condition(d, v1alpha1.ConditionReady, metav1.ConditionFalse, "InUse", "1 pods", later+"/reader")
	w.copyOf(d, later)
	w.must(w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	w.gone(d)
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: later, Name: w.ns + ".genomes-reader"}, &corev1.Secret{}); !apierrors.IsNotFound(err) {
		t.Errorf("the copy outlived its Dataset: %v", err)
	}
}

// What config/README.md tells to do revokes what a namespace has kept of the keys, in this order, and no sooner.
func TestAKeyThatANamespaceKeptIsRevoked(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 1, 1000)
	there := w.ns + "-there"
	w.namespace(there)
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(there)} })
	w.copyOf(d, there)
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRotateKeys, "before")
	})
	w.event("KeysRotated", `for "before"`)
	s := &corev1.Secret{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: d.Name + "-reader"}, s))
	kept, err := wire.ParseKeys(s.Data["read"]) // which its copy has, too
	w.must(err)
	taken := func(want int) { // by so many of the workers
		t.Helper()
		w.eventually(fmt.Sprintf("%d workers take the key", want), func() error {
			n := 0
			var last error
			for _, m := range w.members(d).Members {
				c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", m.Addr)
				w.must(err)
				if last = wire.ClientHandshake(t.Context(), c, w.ns+"/"+d.Name, wire.RoleRead, kept[0]); last == nil {
					n++
				}
				c.Close()
			}
			if n != want {
				return fmt.Errorf("%d do: %v", n, last)
			}
			return nil
		})
	}
	taken(2)
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = nil })
	w.noCopy(d, there)
	taken(2)
	update(w, d, func(d *v1alpha1.Dataset) {
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationRotateKeys, "revoke")
	})
	w.event("KeysRotated", `for "revoke"`)
	taken(2)
	update(w, d, func(d *v1alpha1.Dataset) { delete(d.Annotations, v1alpha1.AnnotationRotateKeys) })
	taken(0)
	w.noCopy(d, there)
	w.reader(d) // has the new one
}

func (w *world) noCopy(d *v1alpha1.Dataset, namespace string) {
	w.Helper()
	w.gone(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: w.ns + "." + d.Name + "-reader"}})
}

func TestSharedWritableDatasetHasItsReadOnlyAccessKeysInTheOtherNamespaces(t *testing.T) {
	w := newWorld(t)
	w.bucket.PutT(t, "data", "old", []byte("old"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	there, other, taken := w.ns+"-there", w.ns+"-other", w.ns+"-taken"
	for _, ns := range []string{there, other, taken} {
		w.namespace(ns)
	}
	name := w.ns + ".artifacts-s3"
	theirs := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: taken, Name: name}, Data: map[string][]byte{"accessKeyID": []byte("theirs")}}
	w.must(w.Create(t.Context(), theirs))
	d := w.dataset("artifacts", 1)
	d.Spec.Access = v1alpha1.ReadWrite
	d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(there), v1alpha1.Namespace(other), v1alpha1.Namespace(taken), v1alpha1.Namespace(w.ns)}
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)

	// The copy is what its own namespace's Secret says of reading, under the names that clients look for, and
	// nothing else: above all not the keys that write.
	own := &corev1.Secret{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "artifacts-s3"}, own))
	want := func() map[string][]byte {
		return map[string][]byte{
			"endpoint": []byte("http://artifacts-s3." + w.ns + ".svc:9000"), "bucket": []byte("artifacts"), "region": []byte("us-east-1"),
			"accessKeyID": own.Data["readOnlyAccessKeyID"], "secretAccessKey": own.Data["readOnlySecretAccessKey"],
		}
	}
	s := &corev1.Secret{}
	same := func() error {
		if err := w.Get(t.Context(), client.ObjectKey{Namespace: there, Name: name}, s); err != nil {
			return err
		}
		if !reflect.DeepEqual(s.Data, want()) {
			return fmt.Errorf("its keys are %q", slices.Sorted(maps.Keys(s.Data)))
		}
		return nil
	}
	w.eventually("the copy", same)
	if s.Labels[v1alpha1.LabelSharedFrom] != w.ns || s.Labels[v1alpha1.LabelDataset] != "artifacts" || s.Labels["app.kubernetes.io/managed-by"] != "stepcache" {
		t.Errorf("labels %v", s.Labels)
	}
	w.copyOf(d, there) // the read key as for every Dataset

	// It reads as it stands, and does not write.
	c := w.s3("artifacts-worker-0", string(s.Data["accessKeyID"]), string(s.Data["secretAccessKey"]))
	if o, err := c.StatObject(t.Context(), string(s.Data["bucket"]), "old", minio.StatObjectOptions{}); err != nil || o.Size != 3 {
		t.Errorf("read with the copy: %+v, %v", o, err)
	}
	if _, err := c.PutObject(t.Context(), "artifacts", "no", strings.NewReader("x"), 1, minio.PutObjectOptions{}); minio.ToErrorResponse(err).Code != "AccessDenied" {
		t.Errorf("write with the copy: %v", err)
	}

	// A Secret of somebody else is named and left alone; the copy of the read key is made beside it.
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionFalse, "NameTaken", name, taken, "S3 endpoint")
	w.copyOf(d, taken)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(theirs), theirs))
	if string(theirs.Data["accessKeyID"]) != "theirs" || len(theirs.Labels) > 0 {
		t.Errorf("somebody else's Secret was changed: labels %v", theirs.Labels)
	}

	// Keys that are made anew reach it; what somebody changed is put right, and what was deleted comes back.
	old := string(s.Data["secretAccessKey"])
	update(w, own, func(s *corev1.Secret) { delete(s.Data, "readOnlySecretAccessKey") })
	w.poke(d)
	w.eventually("the copy has the new key", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(own), own))
		if err := same(); err != nil {
			return err
		}
		if now := string(s.Data["secretAccessKey"]); now == old || now == "" {
			return errors.New("it has the old one")
		}
		return nil
	})
	update(w, s, func(s *corev1.Secret) { s.Data["accessKeyID"] = []byte("else") })
	w.clock.advance(2 * time.Minute)
	w.poke(d)
	w.eventually("the copy is put right", same)
	w.must(w.Delete(t.Context(), s))
	w.clock.advance(2 * time.Minute)
	w.poke(d)
	w.eventually("the copy is back", same)

	// Who may not read any more loses it, and the last one goes with the Dataset; somebody else's stays.
	update(w, d, func(d *v1alpha1.Dataset) {
		d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(other), v1alpha1.Namespace(taken)}
	})
	w.gone(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: there, Name: name}})
	w.noCopy(d, there)
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: other, Name: name}, s))
	w.must(w.Delete(t.Context(), d))
	w.gone(d)
	for _, n := range []string{name, w.ns + ".artifacts-reader"} {
		if err := w.Get(t.Context(), client.ObjectKey{Namespace: other, Name: n}, s); !apierrors.IsNotFound(err) {
			t.Errorf("copy %s outlived its Dataset: %v", n, err)
		}
	}
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(theirs), theirs))
}

// What another namespace does not take is told, and is no reason for the Dataset's own to go without.
func TestNamespaceThatRefusesItsCopyIsToldAndKeepsNobodyWaiting(t *testing.T) {
	w := newWorld(t)
	full, there := w.ns+"-full", w.ns+"-there"
	w.namespace(full)
	w.namespace(there)
	quota := w.allowNone(full, corev1.ResourceSecrets, &corev1.Secret{})
	w.bucket.PutT(t, "data", "file", []byte("content"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("genomes", 1)
	d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(full), v1alpha1.Namespace(there)}
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionFalse, "Refused", full, w.ns+".genomes-reader", "exceeded quota: none", "mount the Dataset")
	w.event("ShareBlocked", full, "exceeded quota: none")
	s := w.copyOf(d, there)
	w.waitReady(d)

	w.must(w.Delete(t.Context(), quota))
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionTrue, "Shared", "2 other namespaces")

	// A copy that nobody may change.
	update(w, s, func(s *corev1.Secret) {
		s.Data["read"], s.Immutable = []byte("else"), ptr.To(true)
	})
	w.clock.advance(2 * time.Minute)
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionFalse, "Refused", there, "immutable")
	w.waitReady(d)
	w.must(w.Delete(t.Context(), s))
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionTrue, "Shared")

	// A namespace that does not let its copy go is remembered until it does.
	w.requests.refusing(string(w.copyOf(d, there).UID))
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(full)} })
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionFalse, "Refused", there, "not supported")
	w.waitReady(d)
	w.requests.refusing("")
	w.noCopy(d, there)
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionTrue, "Shared", "1 other namespaces")
}

func TestDatasetThatIsSharedNoMoreSaysNothingOfIt(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 1000)
	there := w.ns + "-there"
	w.namespace(there)
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(there)} })
	w.copyOf(d, there)
	w.condition(d, v1alpha1.ConditionShared, metav1.ConditionTrue, "Shared")
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = nil })
	w.noCopy(d, there)
	w.eventually("nothing is said of it", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		if len(d.Status.SharedWith) > 0 || len(d.Status.Conditions) != 4 {
			return fmt.Errorf("status %s", asJSON(d.Status))
		}
		return nil
	})
}
