package dataload

import (
	"context"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
)

// waitPoll is how often a load that waits looks again at what is not watched.
const waitPoll = 30 * time.Second

// advance does what is due.
func (r *Reconciler) advance(ctx context.Context, p *pass) error {
	st := &p.load.Status
	due, err := r.due(p)
	c := meta.FindStatusCondition(st.Conditions, v1alpha1.ConditionFailed)
	invalid := c != nil && c.Reason == ReasonInvalidSchedule
	if err != nil {
		if !invalid || c.ObservedGeneration != p.load.Generation {
			st.NextScheduleTime = nil // of the schedule before
			r.fail(p, ReasonInvalidSchedule, "%v", err)
		}
		return nil
	}
	if invalid {
		st.Phase, st.CompletionTime = v1alpha1.DataLoadPending, nil
		p.condition(v1alpha1.ConditionFailed, metav1.ConditionFalse, conditionNotApplicable, "the schedule was corrected")
	}
	running := st.Phase == v1alpha1.DataLoadRunning
	paths := p.load.Patterns()
	if run := st.Run; run != nil && !due {
		paths = run.Paths
	}
	switch bad := checkPaths(paths); {
	case bad != nil && (running || due || st.Phase == v1alpha1.DataLoadComplete && p.pins()):
		r.fail(p, ReasonNotLoaded, "%v; create a DataLoad with other paths", bad)
	case (running || due) && p.dataset != nil && p.dataset.Spec.Access == v1alpha1.ReadWrite:
		r.fail(p, ReasonNotLoaded, "dataset %q has access: ReadWrite, and so no listing to load from: its workers hold what is put and read; delete this DataLoad", p.dataset.Name)
	case running:
		if due && p.load.Spec.Schedule != "" {
			p.note("Skipped", "Schedule", "the run of %s has not ended; the one of %s is left out", st.StartTime.UTC().Format(time.RFC3339), p.now.UTC().Format(time.RFC3339))
		}
		return r.follow(ctx, p)
	case due:
		return r.start(ctx, p)
	case st.Phase == v1alpha1.DataLoadComplete:
		return r.keep(ctx, p)
	case p.load.Spec.Schedule != "" && (st.Phase == "" || st.Phase == v1alpha1.DataLoadPending):
		r.wait(p, ReasonWaiting, "its next run is at %s", st.NextScheduleTime.UTC().Format(time.RFC3339))
	}
	return nil
}

// checkPaths says what workers would refuse of a load's paths. Admission refuses that too, but not of a load that was
// there before its bounds were.
func checkPaths(paths []string) error {
	for _, p := range paths {
		if err := catalog.CheckPattern(p); err != nil {
			return err
		}
	}
	return nil
}

// due says whether a run should start now, and writes down when the next one does. A run that was missed
// while no controller ran is made up for once.
func (r *Reconciler) due(p *pass) (bool, error) {
	st := &p.load.Status
	if p.load.Spec.Schedule == "" {
		return !ended(p.load), nil
	}
	next, err := p.load.Spec.Schedule.Next(p.now)
	if err != nil {
		return false, err
	}
	c := meta.FindStatusCondition(st.Conditions, v1alpha1.ConditionComplete)
	due := st.Phase == v1alpha1.DataLoadPending && c != nil && c.Reason != ReasonWaiting // put off
	if st.NextScheduleTime != nil && !st.NextScheduleTime.After(p.now) {
		due = true
	}
	if st.NextScheduleTime == nil || due || p.load.Status.ObservedGeneration != p.load.Generation {
		st.NextScheduleTime = &metav1.Time{Time: next}
	}
	p.soon(st.NextScheduleTime.Sub(p.now))
	return due, nil
}

// start writes a new run down once nothing is in its way; the next pass tells the workers.
func (r *Reconciler) start(ctx context.Context, p *pass) error {
	// First, since others are kept until this one has begun or failed.
	if ok, err := r.after(ctx, p); !ok || err != nil {
		return err
	}
	d := p.dataset
	ref := p.load.Spec.DatasetRef.Name
	switch {
	case d == nil:
		r.putOff(p, ReasonDatasetNotFound, "there is no Dataset %q in namespace %s; create it, or delete this DataLoad", ref, p.load.Namespace)
		return nil
	case !d.DeletionTimestamp.IsZero():
		r.putOff(p, ReasonDatasetNotReady, "dataset %q is being deleted", ref)
		return nil
	case p.load.CopiesOf(d) > d.Spec.Workers.Replicas:
		r.fail(p, ReasonTooManyCopies, "%d copies of each block need as many workers; dataset %q has %d: scale it, or create a DataLoad with fewer copies", p.load.CopiesOf(d), ref, d.Spec.Workers.Replicas)
		return nil
	}
	if text := notReady(d); text != "" {
		r.putOff(p, ReasonDatasetNotReady, "dataset %q is not ready: %s", ref, text)
		return nil
	}
	if err := r.begin(ctx, p); err != nil {
		r.putOff(p, ReasonWorkersMissing, "begins once the workers have let go of the last run: %v", err)
	}
	return nil
}

// begin writes a new run down, of the Dataset's current snapshot, once the workers have let go of the last one.
func (r *Reconciler) begin(ctx context.Context, p *pass) error {
	// The pins of the last run make way for this one's: most are for the same blocks. Once this run's start is
	// written down nobody knows the last one's id any more.
	if err := r.forgetRun(ctx, p); err != nil {
		return err
	}
	st, d := &p.load.Status, p.dataset
	began := metav1.NewTime(p.now.Truncate(time.Second))
	st.Phase, st.StartTime, st.CompletionTime = v1alpha1.DataLoadRunning, &began, nil
	st.Run = newRun(p)
	st.Snapshot, st.Progress, st.Failures, st.FailedFiles = d.Status.Snapshot, v1alpha1.Progress{}, nil, 0
	p.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, ReasonLoading, "the workers are being told")
	p.condition(v1alpha1.ConditionFailed, metav1.ConditionFalse, conditionNotApplicable, "nothing has failed")
	p.note("Started", "Load", "loads snapshot %.12s of dataset %s", st.Snapshot, d.Name)
	p.soon(time.Millisecond)
	return nil
}

// notReady is why a Dataset cannot be loaded yet; empty: it can.
func notReady(d *v1alpha1.Dataset) string {
	for _, kind := range []string{v1alpha1.ConditionSourced, v1alpha1.ConditionWorkersReady} {
		switch c := meta.FindStatusCondition(d.Status.Conditions, kind); {
		case c == nil:
			return "its controller has not looked at it yet"
		case c.Status != metav1.ConditionTrue:
			return c.Message
		}
	}
	return ""
}

// after says whether the load that this one runs after is complete.
func (r *Reconciler) after(ctx context.Context, p *pass) (bool, error) {
	if p.load.Spec.RunAfter == nil {
		return true, nil
	}
	seen := map[string]bool{p.load.Name: true}
	var first *v1alpha1.DataLoad
	for name := p.load.Spec.RunAfter.Name; ; {
		l := &v1alpha1.DataLoad{}
		err := r.client.Get(ctx, types.NamespacedName{Namespace: p.load.Namespace, Name: name}, l)
		if apierrors.IsNotFound(err) {
			break
		}
		if err != nil {
			return false, err
		}
		if first == nil {
			first = l
		}
		seen[name] = true
		if l.Spec.RunAfter == nil {
			break
		}
		if name = l.Spec.RunAfter.Name; seen[name] {
			r.fail(p, ReasonLoadsInCircle, "this load and dataload %q wait for each other, so that neither would run; create one without runAfter", first.Name)
			return false, nil
		}
	}
	name := p.load.Spec.RunAfter.Name
	switch {
	case first == nil:
		r.putOff(p, ReasonWaiting, "there is no DataLoad %q to run after; create it", name)
	case first.Status.Phase == v1alpha1.DataLoadComplete:
		return true, nil
	case ended(first):
		r.fail(p, ReasonPredecessor, "dataload %q, which it runs after, has failed", name)
	default:
		r.putOff(p, ReasonWaiting, "runs after dataload %q", name)
	}
	return false, nil
}

// putOff leaves a run that is due for later. The reason of one that is scheduled is another than ReasonWaiting, see due.
func (r *Reconciler) putOff(p *pass, reason, format string, a ...any) {
	r.wait(p, reason, format, a...)
	p.soon(waitPoll)
}

func (r *Reconciler) wait(p *pass, reason, format string, a ...any) {
	p.load.Status.Phase = v1alpha1.DataLoadPending
	p.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, reason, format, a...)
}
