package controllers_test

import (
	"errors"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/controllers/dataload"
	"github.com/stepcache/stepcache/controllers/dataset"
)

func (w *world) dataload(name, dataset string) *v1alpha1.DataLoad {
	return &v1alpha1.DataLoad{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: name}, Spec: v1alpha1.DataLoadSpec{DatasetRef: v1alpha1.Reference{Name: dataset}}}
}

func (w *world) pinned() (sum int64) {
	for _, s := range w.statuses() {
		sum += s.Pinned
	}
	return sum
}

func TestLoadWaitsForItsDatasetThenLoadsAllOfIt(t *testing.T) {
	w := newWorld(t)
	l := w.dataload("warm", "genomes")
	w.must(w.Create(t.Context(), l))
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionFalse, "DatasetNotFound", `no Dataset "genomes"`)
	if l.Status.Phase != v1alpha1.DataLoadPending {
		t.Errorf("phase %s", l.Status.Phase)
	}
	w.bucket.PutT(t, "data", "a", make([]byte, 5<<20))
	w.bucket.PutT(t, "data", "b", make([]byte, 1000))
	d := w.dataset("genomes", 2)
	w.must(w.Create(t.Context(), d))
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionFalse, "DatasetNotReady", `secret "access-key"`)
	w.must(w.Create(t.Context(), w.secret("access-key")))
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionTrue, "Loaded", "2 files")
	s := l.Status
	if s.Phase != v1alpha1.DataLoadComplete || s.Progress.Bytes != 5<<20+1000 || s.Progress.TotalBytes != 5<<20+1000 || s.Progress.Percent != 100 ||
		s.StartTime == nil || s.CompletionTime == nil || s.Progress.EstimatedCompletion != nil || s.ObservedGeneration != l.Generation || s.Snapshot == "" {
		t.Errorf("status %s", asJSON(s))
	}
	if got := w.cached(); got != 5<<20+1000 {
		t.Errorf("%d bytes cached", got)
	}
	w.event("Complete", "loaded")
}

func TestLoadTakesPathsAndCopies(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 6, 10_000)
	l := w.load(d, "half", func(l *v1alpha1.DataLoad) {
		l.Spec.Paths, l.Spec.Copies = []v1alpha1.PathPattern{"/dir0"}, ptr.To[int32](2)
	})
	if g := l.Status.Progress; g.TotalBytes != 60_000 || g.Bytes != 60_000 {
		t.Errorf("progress %s", asJSON(g))
	}
}

// A run that is over is not the workers' any more, unless they are to keep what it pinned: they went over it again with
// each change of their list. What is said of it stays.
func TestWorkersForgetARunThatIsOver(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	var told []string // which loads were begun and forgotten
	w.between(func(r *http.Response) error {
		mu.Lock()
		defer mu.Unlock()
		if q := r.Request; q.Method != http.MethodGet && strings.HasPrefix(q.URL.Path, wire.PathLoads) {
			name, _, _ := strings.Cut(strings.TrimPrefix(path.Base(q.URL.Path), w.ns+"."), ".")
			told = append(told, q.Method+" "+name)
		}
		return nil
	})
	d := w.ready("genomes", 1, 2, 1000)
	w.load(d, "pin", func(l *v1alpha1.DataLoad) { l.Spec.Pin = true })
	none := w.dataload("none", "genomes")
	none.Spec.Paths = []v1alpha1.PathPattern{"/nothing"}
	w.must(w.Create(t.Context(), none))
	w.condition(none, v1alpha1.ConditionFailed, metav1.ConditionTrue, "NotLoaded")
	l := w.load(d, "warm", func(*v1alpha1.DataLoad) {})
	want := []string{"DELETE none", "DELETE warm", "POST loads", "POST loads", "POST loads"}
	w.eventually("the runs are forgotten", func() error {
		mu.Lock()
		defer mu.Unlock()
		if slices.Sort(told); !slices.Equal(told, want) {
			return fmt.Errorf("the worker was told %q, want %q", told, want)
		}
		return nil
	})
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(l), l))
	if g := l.Status.Progress; l.Status.Phase != v1alpha1.DataLoadComplete || g.Bytes != 2000 || g.Percent != 100 {
		t.Errorf("status %s", asJSON(l.Status))
	}
}

func TestPinsLastAsLongAsTheirLoad(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 2, 6, 100_000)
	l := w.load(d, "pin", func(l *v1alpha1.DataLoad) { l.Spec.Pin = true })
	if got := w.pinned(); got < 600_000 {
		t.Fatalf("%d bytes pinned", got)
	}
	// A controller that restarts goes on with the same run.
	w.stopManager()
	w.start()
	// A worker that restarts has lost its pins and is told again.
	w.set(func(w *world) {
		r := w.workers["genomes-worker-0"]
		r.stop()
		delete(w.workers, "genomes-worker-0")
	})
	w.eventually("the worker is back", func() error {
		if s := w.statuses(); s["genomes-worker-0"].Snapshot == "" {
			return fmt.Errorf("statuses %s", asJSON(s))
		}
		return nil
	})
	w.clock.advance(time.Minute)
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(l), l))
	started := l.Status.StartTime
	w.eventually("pins are back", func() error {
		if got := w.pinned(); got < 600_000 || w.cached() != 600_000 {
			return fmt.Errorf("%d bytes pinned, %d cached", got, w.cached())
		}
		return nil
	})
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(l), l))
	if !l.Status.StartTime.Equal(started) || l.Status.Phase != v1alpha1.DataLoadComplete {
		t.Errorf("status %s", asJSON(l.Status))
	}
	w.must(w.Delete(t.Context(), l))
	w.gone(l)
	if got := w.pinned(); got != 0 {
		t.Errorf("%d bytes pinned after their load was deleted", got)
	}
}

// All workers lose their memory, and with it the snapshot that was pinned: the bucket has another one by then.
func TestPinsOfASnapshotThatNobodyHoldsAreThoseOfTheCurrentOne(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 6, 10_000)
	l := w.load(d, "pin", func(l *v1alpha1.DataLoad) { l.Spec.Pin = true })
	before := l.Status.Snapshot
	w.bucket.PutT(t, "data", "dir0/new", make([]byte, 5000))
	w.set(func(w *world) {
		r := w.workers["genomes-worker-0"]
		r.stop()
		delete(w.workers, "genomes-worker-0")
	})
	w.clock.advance(time.Minute)
	w.event("LoadsAgain", "lost what was pinned")
	w.eventually("it is complete again", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(l), l))
		if st := l.Status; st.Phase != v1alpha1.DataLoadComplete || st.Snapshot == before || st.Snapshot != d.Status.Snapshot || st.Progress.Bytes != 65_000 {
			return fmt.Errorf("status %s", asJSON(st))
		}
		return nil
	})
	if got := w.pinned(); got < 65_000 {
		t.Errorf("%d bytes pinned", got)
	}
}

// A Dataset that is deleted may be made anew: what its loads pin is looked after then as well.
func TestAPinnedLoadIsLookedAtWithoutItsDataset(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 1, 10_000)
	l := w.load(d, "pin", func(l *v1alpha1.DataLoad) { l.Spec.Pin = true })
	w.must(w.Delete(t.Context(), d))
	w.gone(d)
	w.stopManager()
	r := dataload.New(w.Client, w.Client, events.NewFakeRecorder(100), dataset.Options{Clock: w.clock})
	got, err := r.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(l)})
	if err != nil || got.RequeueAfter == 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestLoadThatCannotSucceedSaysWhy(t *testing.T) {
	w := newWorld(t)
	p := make([]byte, 4<<20)
	for i := range 6 {
		p[0] = byte(i)
		w.bucket.PutT(t, "data", fmt.Sprintf("f%d", i), p)
	}
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("genomes", 1)
	d.Spec.Workers.Memory = resource.MustParse("16Mi")
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)

	copies := w.dataload("copies", "genomes")
	copies.Spec.Copies = ptr.To[int32](2)
	w.must(w.Create(t.Context(), copies))
	w.condition(copies, v1alpha1.ConditionFailed, metav1.ConditionTrue, "TooManyCopies", "scale it")

	none := w.dataload("none", "genomes")
	none.Spec.Paths = []v1alpha1.PathPattern{"/nothing/**"}
	w.must(w.Create(t.Context(), none))
	w.condition(none, v1alpha1.ConditionFailed, metav1.ConditionTrue, "NotLoaded", "no file", "/nothing/**")

	large := w.dataload("large", "genomes")
	large.Spec.Pin = true
	w.must(w.Create(t.Context(), large))
	w.condition(large, v1alpha1.ConditionFailed, metav1.ConditionTrue, "NotLoaded", "does not fit")
	w.event("NotLoaded", "does not fit")
	if large.Status.Phase != v1alpha1.DataLoadFailed || large.Status.CompletionTime == nil {
		t.Errorf("status %s", asJSON(large.Status))
	}

	// An object that has changed since it was listed is named, with the reason; nothing else is held against
	// the load.
	w.bucket.PutT(t, "data", "f1", []byte("changed"))
	changed := w.dataload("changed", "genomes")
	changed.Spec.Paths = []v1alpha1.PathPattern{"/f1", "/f2"}
	w.must(w.Create(t.Context(), changed))
	w.condition(changed, v1alpha1.ConditionFailed, metav1.ConditionTrue, "FilesFailed", "1 files", "/f1")
	if f := changed.Status.Failures; changed.Status.FailedFiles != 1 || len(f) != 1 || f[0].Path != "/f1" || f[0].Reason == "" {
		t.Errorf("failures %s", asJSON(changed.Status))
	}
}

func TestLoadRunsAfterAnother(t *testing.T) {
	w := newWorld(t)
	second := w.dataload("second", "genomes")
	second.Spec.RunAfter = &v1alpha1.Reference{Name: "first"}
	w.must(w.Create(t.Context(), second))
	w.ready("genomes", 1, 2, 1000)
	w.condition(second, v1alpha1.ConditionComplete, metav1.ConditionFalse, "Waiting", `no DataLoad "first"`)
	first := w.dataload("first", "genomes")
	first.Spec.Paths = []v1alpha1.PathPattern{"/dir0"}
	w.must(w.Create(t.Context(), first))
	w.condition(second, v1alpha1.ConditionComplete, metav1.ConditionTrue, "Loaded")
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(first), first))
	if second.Status.StartTime.Before(first.Status.CompletionTime) && !second.Status.StartTime.Equal(ptr.To(metav1.NewTime(first.Status.CompletionTime.Truncate(time.Second)))) {
		t.Errorf("second began at %v, first ended at %v", second.Status.StartTime, first.Status.CompletionTime)
	}

	bad := w.dataload("bad", "genomes")
	bad.Spec.Paths = []v1alpha1.PathPattern{"/nothing"}
	w.must(w.Create(t.Context(), bad))
	third := w.dataload("third", "absent") // what cannot run does not wait for its Dataset
	third.Spec.RunAfter = &v1alpha1.Reference{Name: "bad"}
	w.must(w.Create(t.Context(), third))
	w.condition(third, v1alpha1.ConditionFailed, metav1.ConditionTrue, "PredecessorFailed", `"bad"`)

	a, b := w.dataload("a", "genomes"), w.dataload("b", "genomes")
	a.Spec.RunAfter, b.Spec.RunAfter = &v1alpha1.Reference{Name: "b"}, &v1alpha1.Reference{Name: "a"}
	w.must(w.Create(t.Context(), a))
	w.must(w.Create(t.Context(), b))
	w.condition(b, v1alpha1.ConditionFailed, metav1.ConditionTrue, "LoadsInCircle", "wait for each other")
}

func TestScheduledLoadRunsAgain(t *testing.T) {
	w := newWorld(t)
	w.ready("genomes", 1, 2, 1000)
	l := w.dataload("hourly", "genomes")
	l.Spec.Schedule, l.Spec.Pin = "@hourly", true
	w.must(w.Create(t.Context(), l))
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionFalse, "Waiting", "its next run is at")
	next := l.Status.NextScheduleTime
	if next == nil || next.UTC().Minute() != 0 || next.Sub(w.clock.Now()) > time.Hour {
		t.Fatalf("next run at %v", next)
	}
	var last *metav1.Time
	for range 2 {
		// The time comes while no controller runs: the run is made up for.
		w.stopManager()
		w.clock.advance(time.Hour)
		w.start()
		w.runs(l, last)
		last = l.Status.StartTime
		if !l.Status.NextScheduleTime.After(w.clock.Now()) {
			t.Errorf("next run at %v", l.Status.NextScheduleTime)
		}
	}
	if got := w.pinned(); got < 2000 || got > 100_000 {
		t.Errorf("%d bytes pinned after two runs of 2000 bytes", got)
	}
}

// later has the time of the next run come, and waits until the load says why that is put off.
func (w *world) later(l *v1alpha1.DataLoad, reason string, parts ...string) {
	w.Helper()
	w.stopManager()
	w.clock.advance(time.Hour)
	w.start()
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionFalse, reason, parts...)
	if l.Status.Phase != v1alpha1.DataLoadPending {
		w.Errorf("status %s", asJSON(l.Status))
	}
}

// runs waits until a load has completed a run other than one that began at last.
func (w *world) runs(l *v1alpha1.DataLoad, last *metav1.Time) {
	w.Helper()
	w.eventually("a run completes", func() error {
		w.must(w.Get(w.Context(), client.ObjectKeyFromObject(l), l))
		if l.Status.Phase != v1alpha1.DataLoadComplete || l.Status.StartTime.Equal(last) {
			return fmt.Errorf("status %s", asJSON(l.Status))
		}
		return nil
	})
}

// hourly is a load that pins and has completed its first run.
func (w *world) hourly() *v1alpha1.DataLoad {
	w.Helper()
	l := w.dataload("hourly", "genomes")
	l.Spec.Schedule, l.Spec.Pin = "@hourly", true
	w.must(w.Create(w.Context(), l))
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionFalse, "Waiting")
	w.clock.advance(time.Hour)
	w.stopManager()
	w.start()
	w.runs(l, nil)
	return l
}

func TestRunThatIsPutOffLeavesNoPinsOfTheLastOne(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 2, 1000)
	l := w.hourly()
	last := l.Status.StartTime
	// The Dataset is not ready when the next time comes: its second worker has no node.
	w.set(func(w *world) { w.pending = true })
	update(w, d, func(d *v1alpha1.Dataset) { d.Spec.Workers.Replicas = 2 })
	w.condition(d, v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, "Starting")
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes-worker-1"}}
	w.eventually("the second worker has a pod", func() error { return w.Get(t.Context(), client.ObjectKeyFromObject(pod), pod) })
	w.later(l, "DatasetNotReady", "1 of 2 workers")
	w.set(func(w *world) { w.pending = false })
	w.must(w.Delete(t.Context(), pod, client.GracePeriodSeconds(0)))
	w.waitReady(d)
	w.runs(l, last)
	if got := w.pinned(); got < 2000 {
		t.Errorf("%d bytes pinned after a run of 2000 bytes", got)
	}
	w.must(w.Delete(t.Context(), l))
	w.gone(l)
	if got := w.pinned(); got != 0 {
		t.Errorf("%d bytes pinned after their load was deleted", got)
	}
}

func TestScheduleThatIsEditedCountsAtOnce(t *testing.T) {
	w := newWorld(t)
	w.ready("genomes", 1, 2, 1000)
	l := w.dataload("yearly", "genomes")
	l.Spec.Schedule = "@yearly"
	w.must(w.Create(t.Context(), l))
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionFalse, "Waiting", "-01-01T00:00:00Z")
	update(w, l, func(l *v1alpha1.DataLoad) { l.Spec.Schedule = "0 0 1 7 *" })
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionFalse, "Waiting", "-07-01T00:00:00Z")
	if next := l.Status.NextScheduleTime; next.UTC().Month() != time.July || l.Status.ObservedGeneration != l.Generation {
		t.Errorf("status %s", asJSON(l.Status))
	}
}

// What spreads the passes of many loads must not be a part of a long wait.
func TestScheduledLoadDoesNotStartLate(t *testing.T) {
	w := newWorld(t)
	w.ready("genomes", 1, 1, 1000)
	l := w.dataload("yearly", "genomes")
	l.Spec.Schedule = v1alpha1.Schedule(fmt.Sprintf("0 0 1 %d *", 1+(w.clock.Now().UTC().Month()+5)%12))
	w.must(w.Create(t.Context(), l))
	w.condition(l, v1alpha1.ConditionComplete, metav1.ConditionFalse, "Waiting")
	w.stopManager()
	r := dataload.New(w.Client, w.Client, events.NewFakeRecorder(100), dataset.Options{Clock: w.clock})
	before := w.clock.Now()
	got, err := r.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(l)})
	if err != nil || got.RequeueAfter == 0 || before.Add(got.RequeueAfter).After(l.Status.NextScheduleTime.Add(3*time.Second)) {
		t.Errorf("asks for a pass in %v, %v before the run: %v", got.RequeueAfter, l.Status.NextScheduleTime.Sub(before), err)
	}
}

func TestRunIsPutOffUntilTheLastOneIsForgotten(t *testing.T) {
	w := newWorld(t)
	w.ready("genomes", 1, 2, 1000)
	l := w.hourly()
	last := l.Status.StartTime
	var lost atomic.Bool
	lost.Store(true)
	w.between(func(r *http.Response) error {
		if r.Request.Method == http.MethodDelete && lost.Load() {
			return errors.New("the answer is lost")
		}
		return nil
	})
	w.later(l, "WorkersMissing", "genomes-worker-0")
	lost.Store(false)
	w.stopManager()
	w.start()
	w.runs(l, last)
}

func TestLoadIsDeletedAfterItsTimeToLive(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 2, 1000)
	l := w.load(d, "brief", func(l *v1alpha1.DataLoad) {
		l.Spec.Pin, l.Spec.TTLSecondsAfterFinished = true, ptr.To[int32](60)
	})
	kept := w.load(d, "kept", nil)
	w.stopManager()
	w.clock.advance(time.Minute)
	w.start()
	w.gone(l)
	if got := w.pinned(); got != 0 {
		t.Errorf("%d bytes pinned", got)
	}
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(kept), kept))
}

// The load that runs after it has to see that it completed.
func TestLoadIsKeptBeyondItsTimeToLiveForTheOneThatRunsAfterIt(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 2, 1000)
	second := w.dataload("second", "late")
	second.Spec.RunAfter = &v1alpha1.Reference{Name: "first"}
	w.must(w.Create(t.Context(), second))
	first := w.load(d, "first", func(l *v1alpha1.DataLoad) { l.Spec.TTLSecondsAfterFinished = ptr.To[int32](60) })
	w.condition(second, v1alpha1.ConditionComplete, metav1.ConditionFalse, "DatasetNotFound")
	w.stopManager()
	w.clock.advance(time.Minute)
	r := dataload.New(w.Client, w.Client, events.NewFakeRecorder(100), dataset.Options{Clock: w.clock})
	if got, err := r.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(first)}); err != nil || got.RequeueAfter == 0 {
		t.Errorf("%+v, %v", got, err)
	}
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(first), first))
	if first.DeletionTimestamp != nil {
		t.Fatal("deleted while another load waits to run after it")
	}
	w.start()
	w.event("Kept", `"second"`)
	w.ready("late", 1, 0, 0)
	w.condition(second, v1alpha1.ConditionComplete, metav1.ConditionTrue, "Loaded")
	w.stopManager()
	w.start()
	w.gone(first)
}

func TestDeletedLoadIsNotStuckWithoutWorkersOrDataset(t *testing.T) {
	w := newWorld(t)
	d := w.ready("genomes", 1, 2, 1000)
	one := w.load(d, "one", func(l *v1alpha1.DataLoad) { l.Spec.Pin = true })
	two := w.load(d, "two", func(l *v1alpha1.DataLoad) { l.Spec.Pin = true })
	w.set(func(w *world) { // the worker hangs: its pod is there, nobody answers
		w.deaf = true
		for _, r := range w.workers {
			r.cancel()
			<-r.done
		}
	})
	w.must(w.Delete(t.Context(), one))
	w.eventually("the load waits for its worker", func() error {
		err := w.Get(t.Context(), client.ObjectKeyFromObject(one), one)
		if err != nil || one.DeletionTimestamp == nil {
			return fmt.Errorf("load %s: %v", asJSON(one), err)
		}
		return nil
	})
	w.clock.advance(3 * time.Minute)
	w.gone(one)
	w.event("PinsLeft", "genomes-worker-0")

	w.must(w.Delete(t.Context(), d))
	w.gone(d)
	w.must(w.Delete(t.Context(), two))
	w.gone(two)
}

func TestRulesOfTheObjectsHoldOnARealServer(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		change func(*v1alpha1.Dataset)
		says   string
	}{
		"overlap": {func(d *v1alpha1.Dataset) {
			d.Spec.Mounts = append(d.Spec.Mounts, d.Spec.Mounts[0])
			d.Spec.Mounts[0].Path, d.Spec.Mounts[1].Path = "/a", "/a/b"
		}, "must not overlap"},
		"scheme":   {func(d *v1alpha1.Dataset) { d.Spec.Mounts[0].Source = "gopher://x" }, "s3://"},
		"replicas": {func(d *v1alpha1.Dataset) { d.Spec.Workers.Replicas = 1001 }, "less than or equal to 1000"},
		"copies":   {func(d *v1alpha1.Dataset) { d.Spec.Workers.Copies = 2 }, "copies must not exceed replicas"},
		"memory":   {func(d *v1alpha1.Dataset) { d.Spec.Workers.Memory = resource.MustParse("1Mi") }, "at least 16Mi"},
	} {
		d := w.dataset("bad-"+name, 1)
		c.change(d)
		if err := w.Create(t.Context(), d); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	d := w.dataset("genomes", 1)
	w.must(w.Create(t.Context(), d))
	w.eventually("a mount's source cannot change", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		d.Spec.Mounts[0].Source = "s3://other/"
		if err := w.Update(t.Context(), d); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "cannot change") {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
}
