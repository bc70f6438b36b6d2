package dataload

import (
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
	tierclient "github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/wire"
)

// begun is a pass over a scheduled load whose first run has begun.
func begun(t *testing.T) (*Reconciler, *pass) {
	t.Helper()
	r := &Reconciler{rates: make(map[types.UID]sample)}
	l, d := &v1alpha1.DataLoad{}, &v1alpha1.Dataset{}
	l.Namespace, l.Name, l.UID, l.Generation = "argo", "warm", "0123456789", 1
	l.Spec.Schedule = "@hourly"
	d.Spec.Workers.Copies, d.Spec.Workers.Replicas = 1, 3
	p := &pass{load: l, dataset: d, now: time.Unix(1_000_000, 0)}
	if err := r.begin(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return r, p
}

func TestPercentIsAtMost100(t *testing.T) {
	r, p := begun(t)
	var sum tierclient.LoadSum
	sum.Resident, sum.Total, sum.Workers = 150, 100, map[string]wire.LoadStatus{"genomes-worker-0": {}}
	r.progress(p, sum)
	if got := p.load.Status.Progress; got.Percent != 100 || got.Bytes != 150 || got.TotalBytes != 100 {
		t.Errorf("progress %+v", got)
	}
}
