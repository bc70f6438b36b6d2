package dataload

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

// A worker still holds what was pinned when there were fewer workers, and is to hold less.
func TestPercentIsAtMost100(t *testing.T) {
	r, p := begun(t)
	var sum tierclient.LoadSum
	sum.Resident, sum.Total, sum.Workers = 150, 100, map[string]wire.LoadStatus{"genomes-worker-0": {}}
	r.progress(p, sum)
	if got := p.load.Status.Progress; got.Percent != 100 || got.Bytes != 150 || got.TotalBytes != 100 {
		t.Errorf("progress %+v", got)
	}
}

// A Dataset's status brings passes often.
func TestScheduleThatNeverComesIsToldOnce(t *testing.T) {
	r, p := begun(t)
	l := p.load
	l.Spec.Schedule, l.Generation = "0 0 30 2 *", 2
	l.Status.NextScheduleTime = &metav1.Time{Time: p.now.Add(time.Hour)} // that of the schedule before
	if err := r.advance(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	l.Status.ObservedGeneration = 2
	ended := l.Status.CompletionTime
	if len(p.events) == 0 || ended == nil || l.Status.Phase != v1alpha1.DataLoadFailed || l.Status.NextScheduleTime != nil || p.again != 0 {
		t.Errorf("events %v, again in %v, status %+v", p.events, p.again, l.Status)
	}
	p = &pass{load: l, dataset: p.dataset, now: p.now.Add(time.Hour)}
	if err := r.advance(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if len(p.events) != 0 || !l.Status.CompletionTime.Equal(ended) || p.again != 0 {
		t.Errorf("events %v, again in %v, status %+v", p.events, p.again, l.Status)
	}
	// Another edit that is as bad is told too.
	l.Spec.Schedule, l.Generation = "0 0 31 2 *", 3
	if err := r.advance(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if len(p.events) != 1 || !strings.Contains(p.events[0].note, "0 0 31 2 *") {
		t.Errorf("events %v", p.events)
	}
	// One that is corrected waits for its time, and is not taken for a run that was put off.
	l.Spec.Schedule, l.Generation = "@hourly", 4
	for range 2 {
		if err := r.advance(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		l.Status.ObservedGeneration = 4
	}
	if s := l.Status; s.Phase != v1alpha1.DataLoadPending || !meta.IsStatusConditionFalse(s.Conditions, v1alpha1.ConditionFailed) || s.CompletionTime != nil ||
		!strings.Contains(meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionComplete).Message, "its next run is at") || len(p.events) != 1 {
		t.Errorf("events %v, status %+v", p.events, s)
	}
}

func TestFirstRunThatIsPutOffStaysDue(t *testing.T) {
	l := &v1alpha1.DataLoad{}
	l.Spec.Schedule = "@hourly"
	r, p := &Reconciler{}, &pass{load: l, now: time.Unix(1_000_000, 0)}
	for _, want := range []string{ReasonWaiting, ReasonDatasetNotFound, ReasonDatasetNotFound} {
		if err := r.advance(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if c := meta.FindStatusCondition(l.Status.Conditions, v1alpha1.ConditionComplete); c.Reason != want || l.Status.Phase != v1alpha1.DataLoadPending {
			t.Errorf("status %+v, want reason %s", l.Status, want)
		}
		p.now = l.Status.NextScheduleTime.Time
		if want == ReasonDatasetNotFound {
			p.now = p.now.Add(-time.Minute) // before the time of the next one
		}
	}
}

// The longest names there are.
func TestWorkersTakeTheIDOfEveryRun(t *testing.T) {
	_, p := begun(t)
	a := p.load
	a.Namespace, a.Name = strings.Repeat("n", 63), strings.Repeat("a", 252)+"1"
	b := a.DeepCopy()
	b.Name, b.UID = strings.Repeat("a", 252)+"2", "9876543210"
	if x, y := id(a), id(b); len(x) > 253 || x == y {
		t.Errorf("ids %q and %q", x, y)
	}
	// A name that fits is left as it is: a run under way would be another one.
	a.Namespace, a.Name = "argo", strings.Repeat("a", 200)
	if got, want := id(a), "argo."+a.Name+".01234567.1000000"; got != want {
		t.Errorf("id %q, want %q", got, want)
	}
}

func TestAnEditAppliesFromTheNextRun(t *testing.T) {
	r, p := begun(t)
	before := request(p)
	p.load.Spec.Paths, p.load.Spec.Pin = []v1alpha1.PathPattern{"/shards"}, true
	p.dataset.Spec.Workers.Copies = 2
	if got := request(p); !reflect.DeepEqual(got, before) {
		t.Errorf("the run is told %+v, was %+v", got, before)
	}
	if q := (&pass{load: p.load, now: p.now}); r.keep(t.Context(), q) != nil || q.again != 0 {
		t.Errorf("what the run did not pin is looked after in %v", q.again)
	}
	// Nobody has to be told of the end of the last run.
	p.load.Status.StartTime = nil
	if err := r.begin(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if got := request(p); !reflect.DeepEqual(got.Paths, []string{"/shards/**"}) || !got.Pin || got.Copies != 2 {
		t.Errorf("the next run is told %+v", got)
	}
}

// Loads of before the bound of patterns are not refused by the admission; workers refuse them.
func TestPathsThatWorkersRefuseFailTheLoad(t *testing.T) {
	bad := v1alpha1.PathPattern("/" + strings.Repeat("{a,b}", 9))
	for name, change := range map[string]func(p *pass){
		"runs": func(p *pass) { p.load.Status.Run.Paths = []string{"/x", string(bad)} },
		"due": func(p *pass) {
			p.load.Spec.Paths = []v1alpha1.PathPattern{bad}
			p.load.Status.Phase = v1alpha1.DataLoadPending
			p.load.Status.NextScheduleTime = &metav1.Time{Time: p.now}
		},
		"complete and pinned": func(p *pass) {
			p.load.Status.Run.Paths, p.load.Status.Run.Pin = []string{string(bad)}, true
			p.load.Status.Phase = v1alpha1.DataLoadComplete
			p.load.Status.NextScheduleTime = &metav1.Time{Time: p.now.Add(time.Hour)}
		},
	} {
		r, p := begun(t)
		change(p)
		if err := r.advance(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		c := meta.FindStatusCondition(p.load.Status.Conditions, v1alpha1.ConditionFailed)
		if p.load.Status.Phase != v1alpha1.DataLoadFailed || c == nil || c.Reason != ReasonNotLoaded || !strings.Contains(c.Message, "{a,b}") {
			t.Errorf("%s: status %+v", name, p.load.Status)
		}
	}
}
