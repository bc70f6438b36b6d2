package controllers_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// What is as it should be costs the API server no write, however often it is looked at.
func TestNothingIsWrittenWhenNothingChanged(t *testing.T) {
	w := newWorld(t)
	w.bucket.PutT(t, "data", "file", make([]byte, 100_000))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	there := w.ns + "-there"
	w.namespace(there)
	d := w.dataset("genomes", 2)
	d.Spec.ShareWith = []v1alpha1.Namespace{v1alpha1.Namespace(there)}
	d.Spec.Workers.Template = &v1alpha1.WorkerTemplate{Spec: v1alpha1.WorkerPod{
		ImagePullSecrets: []corev1.LocalObjectReference{{Name: "registry"}},
		Tolerations:      []corev1.Toleration{{Key: "big", Operator: corev1.TolerationOpExists}},
		Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{
			Weight: 1, Preference: corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "a", Operator: corev1.NodeSelectorOpExists}}},
		}}}},
	}}
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)
	w.copyOf(d, there)
	w.load(d, "pinned", func(l *v1alpha1.DataLoad) { l.Spec.Pin, l.Spec.TTLSecondsAfterFinished = true, ptr.To[int32](3600) })
	// What the load has changed is in the status once a pass asked the workers after it, and after they compared the
	// file with its digest, which they do in their own time; that pass and the next may still write.
	w.allCached(d)
	w.eventually("the status counts what was compared", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		if d.Status.Integrity.Verified != d.Status.Files {
			return fmt.Errorf("status %s", asJSON(d.Status))
		}
		return nil
	})
	_, from := w.requests.since(0)
	_, from = w.passesSince(d, from, 3)
	w.clock.advance(2 * time.Minute) // copies are looked at again, and pins
	all, _ := w.passesSince(d, from, 8)
	writes := slices.DeleteFunc(all, func(q string) bool { return strings.HasPrefix(q, "GET ") })
	if len(writes) > 0 {
		t.Errorf("%d writes in 8 passes: %q", len(writes), writes)
	}
}

// passesSince waits until the controllers have looked at a Dataset so many times since a number of requests, and
// returns the requests since then and how many there are in all.
func (w *world) passesSince(d *v1alpha1.Dataset, from, n int) (all []string, to int) {
	w.Helper()
	w.eventually(fmt.Sprintf("%d passes", n), func() error {
		all, to = w.requests.since(from)
		seen := 0
		for _, q := range all {
			if q == "GET /api/v1/namespaces/"+w.ns+"/secrets/"+d.Name+"-keys" {
				seen++
			}
		}
		if seen < n {
			return fmt.Errorf("%d", seen)
		}
		return nil
	})
	return all, to
}
