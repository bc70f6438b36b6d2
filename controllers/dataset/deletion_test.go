package dataset

import (
	"context"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// podLists are an API server's lists of pods.
type podLists struct {
	client.Reader
	asked []client.ListOptions
	pods  []corev1.Pod
}

func (l *podLists) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return apierrors.NewNotFound(schema.GroupResource{}, "")
}

func (l *podLists) List(_ context.Context, into client.ObjectList, options ...client.ListOption) error {
	o := client.ListOptions{}
	o.ApplyOptions(options)
	l.asked = append(l.asked, o)
	into.(*corev1.PodList).Items = l.pods
	return nil
}

// A namespace may have thousands of pods, and many Datasets that are deleted at once.
func TestADeletionLooksForPodsLessAndLessOften(t *testing.T) {
	user := corev1.Pod{}
	user.Namespace, user.Name = "argo", "reader"
	user.Spec.Volumes = []corev1.Volume{{VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "genomes"}}}}
	lists := &podLists{pods: []corev1.Pod{user}}
	r := &Reconciler{Options: Options{Poll: 15 * time.Second}, live: lists}
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name = "argo", "genomes"
	start := time.Unix(10000, 0)
	m := &memory{}
	var looks []int
	for s := range 240 {
		pods, err := r.users(t.Context(), &pass{memory: m, dataset: d, now: start.Add(time.Duration(s) * time.Second)})
		if err != nil || !slices.Equal(pods, []string{"argo/reader"}) {
			t.Fatalf("users %q, %v", pods, err)
		}
		if n := len(lists.asked); n > len(looks) {
			looks = append(looks, s)
		}
	}
	if want := []int{0, 3, 9, 21, 45, 93, 153, 213}; !slices.Equal(looks, want) {
		t.Errorf("looks after %v s, want %v", looks, want)
	}
	// Of those that have ended there are the most.
	if o := lists.asked[0]; o.Namespace != "argo" || o.FieldSelector == nil || o.FieldSelector.String() != "status.phase!=Succeeded,status.phase!=Failed" {
		t.Errorf("asked for %+v", o)
	}
}
