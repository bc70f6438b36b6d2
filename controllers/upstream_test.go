package controllers_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	tierclient "github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/wire"
)

// reader is a client of the Dataset as a pod of its namespace would have.
func (w *world) reader(d *v1alpha1.Dataset) *tierclient.Client {
	w.Helper()
	s := &corev1.Secret{}
	w.must(w.Get(w.Context(), client.ObjectKey{Namespace: w.ns, Name: d.Name + "-reader"}, s))
	read, err := wire.ParseKeys(s.Data["read"])
	w.must(err)
	c, err := tierclient.Dial(w.Context(), tierclient.Config{Dataset: w.ns + "/" + d.Name, Membership: w.members(d), Keys: wire.Keys{Read: read}, Logger: slog.New(slog.DiscardHandler)})
	w.must(err)
	w.Cleanup(func() { c.Close() })
	return c
}

func (w *world) reads(c *tierclient.Client, path string, want []byte) {
	w.Helper()
	i, ok := c.Snapshot().Lookup(path)
	if !ok {
		w.Fatalf("there is no %s", path)
	}
	p := make([]byte, len(want))
	if n, err := c.ReadAt(w.Context(), i, p, 0); err != nil || n != len(want) || !bytes.Equal(p, want) {
		w.Fatalf("%s: %d bytes, %v", path, n, err)
	}
}

func TestDatasetOfAnotherDatasetIsReadThroughItsTier(t *testing.T) {
	w := newWorld(t)
	large := bytes.Repeat([]byte("0123456789abcdef"), 700_000)
	w.bucket.PutT(t, "data", "hg38/large", large)
	w.bucket.PutT(t, "data", "hg38/small", []byte("small"))
	w.bucket.PutT(t, "data", "other", []byte("other"))
	w.must(w.Create(t.Context(), w.secret("access-key")))

	// It waits for what it is made of.
	outer := w.dataset("view", 2)
	outer.Spec.Mounts = []v1alpha1.Mount{{Source: "dataset://" + w.ns + "/genomes/hg38", Path: "/reference"}}
	w.must(w.Create(t.Context(), outer))
	w.condition(outer, v1alpha1.ConditionSourced, metav1.ConditionFalse, "DatasetNotFound", `no Dataset "genomes"`)
	inner := w.dataset("genomes", 2)
	w.must(w.Create(t.Context(), inner))
	w.waitReady(inner)
	w.waitReady(outer)
	if outer.Status.Files != 2 {
		t.Errorf("status %s", asJSON(outer.Status))
	}
	set := &appsv1.StatefulSet{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "view-worker"}, set))
	if set.Spec.Template.Labels[v1alpha1.LabelReader] != "true" || !strings.Contains(asJSON(set.Spec.Template.Spec.Volumes), `"secretName":"genomes-reader"`) {
		t.Errorf("the workers' pods cannot read from the other tier: %s", asJSON(set.Spec.Template))
	}

	// The inner tier has it all; without a bucket there is nowhere else to have it from.
	w.load(inner, "warm", nil)
	w.bucket.Close()
	c := w.reader(outer)
	w.reads(c, "/reference/large", large)
	w.reads(c, "/reference/small", []byte("small"))
	w.load(outer, "all", nil)
	w.eventually("both hold it", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(outer), outer))
		if outer.Status.CachedPercentage != 100 || outer.Status.Integrity.Corrupt > 0 {
			return fmt.Errorf("status %s", asJSON(outer.Status))
		}
		return nil
	})

	// Its workers are users of the other.
	w.must(w.Delete(t.Context(), inner))
	w.condition(inner, v1alpha1.ConditionReady, metav1.ConditionFalse, "InUse", "view-worker-0", "view-worker-1")
	w.must(w.Delete(t.Context(), outer))
	w.gone(outer)
	w.gone(inner)
}

func TestDatasetOfAnotherNamespaceNeedsToBeShared(t *testing.T) {
	w := newWorld(t)
	there := w.ns + "-there"
	w.namespace(there)
	target := w.dataset("genomes", 1)
	target.Namespace = there
	w.must(w.Create(t.Context(), target))
	d := w.dataset("view", 1)
	d.Spec.Mounts = []v1alpha1.Mount{{Source: "dataset://" + there + "/genomes", Path: "/"}}
	w.must(w.Create(t.Context(), d))
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "NotShared", there+"/genomes", "spec.shareWith")
	w.event("NotShared", there+"/genomes")
	// Shared, it waits for the key, which its controller gives, and for its workers.
	update(w, target, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(w.ns)} })
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "AccessDenied", "no read key", "spec.shareWith")
	update(w, target, func(d *v1alpha1.Dataset) { d.Spec.ShareWith = nil })
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "NotShared")
	// One that is not there is told like one that is not shared.
	w.must(w.Delete(t.Context(), target))
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionFalse, "NotShared", there+"/genomes")
}
