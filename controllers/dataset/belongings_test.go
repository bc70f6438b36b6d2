package dataset

import (
	"context"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// named is an API server that has a Dataset of that UID.
type named struct {
	client.Reader
	uid types.UID
}

func (n named) Get(_ context.Context, _ client.ObjectKey, o client.Object, _ ...client.GetOption) error {
	o.SetUID(n.uid)
	return nil
}

// deleter counts what it deletes.
type deleter struct {
	client.Client
	deleted int
}

func (d *deleter) Delete(context.Context, client.Object, ...client.DeleteOption) error {
	d.deleted++
	return nil
}

// A cache that is behind has the Dataset that had the name before, to which the objects of the present one are left ones.
func TestWhatIsLeftIsDeletedOnlyForTheDatasetThatIs(t *testing.T) {
	d := &v1alpha1.Dataset{}
	d.Namespace, d.Name, d.UID = "argo", "genomes", "mine"
	left := &corev1.ConfigMap{}
	for uid, want := range map[types.UID]int{"mine": 1, "another": 0} {
		c := &deleter{}
		r := &Reconciler{client: c, live: named{uid: uid}}
		err := r.discardLeft(t.Context(), d, left)
		if c.deleted != want || apierrors.IsConflict(err) != (want == 0) || want > 0 && err != nil {
			t.Errorf("where the Dataset is %s: %d deleted, %v", uid, c.deleted, err)
		}
	}
	if err := (&Reconciler{}).discardLeft(t.Context(), d); err != nil {
		t.Error(err)
	}
}
