package dataload

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	tierclient "github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/controllers/dataset"
)

const (
	// maxFailures is how many failed files the status names.
	maxFailures = 20
	// keepPoll is how often a completed load that pins is looked after: a worker that restarted has no
	// pins any more.
	keepPoll = 15 * time.Second
)

// request is what the workers are told, the same in every pass of one run: they refuse another one under its id.
func request(p *pass) wire.LoadRequest {
	run := p.load.Status.Run
	if run == nil { // an older controller began it
		run = newRun(p)
	}
	return wire.LoadRequest{ID: id(p.load), Snapshot: p.load.Status.Snapshot, Paths: run.Paths, Copies: int(run.Copies), Pin: run.Pin}
}

// newRun is what a run that begins is told.
func newRun(p *pass) *v1alpha1.Run {
	return &v1alpha1.Run{Paths: p.load.Patterns(), Copies: p.load.CopiesOf(p.dataset), Pin: p.load.Spec.Pin}
}

// pins says whether the current or last run pins what it loads.
func (p *pass) pins() bool {
	if run := p.load.Status.Run; run != nil {
		return run.Pin
	}
	return p.load.Spec.Pin
}

// sum asks all workers for the run, and tells those that do not know it what to load: all of them at first,
// later those that restarted or are new.
func (r *Reconciler) sum(ctx context.Context, p *pass) (tierclient.LoadSum, error) {
	k, err := dataset.Connect(ctx, r.client, r.live, p.dataset, r.Options)
	if err != nil {
		return tierclient.LoadSum{}, err
	}
	defer k.Close()
	sum, err := k.LoadStatus(ctx, id(p.load))
	unknown := errors.Is(err, tierclient.ErrNoLoad)
	for _, e := range sum.Missing {
		unknown = unknown || errors.Is(e, tierclient.ErrNoLoad)
	}
	if !unknown {
		return sum, ignoreMissing(err)
	}
	// The workers forget a run whose end is written down, and what this pass goes by may be from before that.
	now := &v1alpha1.DataLoad{}
	switch err := r.live.Get(ctx, client.ObjectKeyFromObject(p.load), now); {
	case client.IgnoreNotFound(err) != nil:
		return tierclient.LoadSum{}, err
	case err != nil, now.UID != p.load.UID, now.Status.Phase != p.load.Status.Phase, !now.Status.StartTime.Equal(p.load.Status.StartTime):
		return tierclient.LoadSum{}, errStale
	}
	if err := k.Load(ctx, request(p)); ignoreMissing(err) != nil {
		return sum, err
	}
	sum, err = k.LoadStatus(ctx, id(p.load))
	return sum, ignoreMissing(err)
}

// errStale: the load is not what the pass went by any more.
var errStale = errors.New("the load has changed meanwhile")

// ignoreMissing leaves workers that do not answer to the sum, which names them.
func ignoreMissing(err error) error {
	var miss *tierclient.Missing
	if errors.As(err, &miss) || errors.Is(err, tierclient.ErrNoLoad) {
		return nil
	}
	return err
}

// follow takes over how far a run is.
func (r *Reconciler) follow(ctx context.Context, p *pass) error {
	if p.dataset == nil || !p.dataset.DeletionTimestamp.IsZero() {
		r.fail(p, ReasonDatasetNotFound, "dataset %q was deleted while it loaded", p.load.Spec.DatasetRef.Name)
		return nil
	}
	p.soon(r.Poll)
	sum, err := r.sum(ctx, p)
	if errors.Is(err, errStale) {
		p.soon(time.Second / 4)
		return nil
	}
	if err != nil {
		p.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, ReasonWorkersMissing, "%v", err)
		return nil
	}
	r.progress(p, sum)
	st := &p.load.Status
	settled := settled(sum)
	switch {
	case sum.Done && sum.Resident == sum.Total:
		st.Phase = v1alpha1.DataLoadComplete
		st.CompletionTime = &metav1.Time{Time: p.now}
		st.Progress.EstimatedCompletion = nil
		p.condition(v1alpha1.ConditionComplete, metav1.ConditionTrue, ReasonLoaded, "%s of %d files are resident", humanize.IBytes(uint64(sum.Resident)), sum.Files)
		p.note("Complete", "Load", "loaded %s in %v", humanize.IBytes(uint64(sum.Resident)), p.now.Sub(st.StartTime.Time).Round(time.Second))
		r.finish(p)
	case settled && sum.Problem != "":
		r.fail(p, ReasonNotLoaded, "%s", sum.Problem)
	case settled && sum.FailedFiles > 0:
		r.fail(p, ReasonFilesFailed, "%d files could not be loaded; the first: %s: %s", sum.FailedFiles, st.Failures[0].Path, st.Failures[0].Reason)
	case settled && sum.Done:
		// Done at the workers, and evicted since: only a pin would have kept it.
		r.fail(p, ReasonNotLoaded, "%s of %s were loaded and did not stay: raise the workers' memory, load less, or pin it",
			humanize.IBytes(uint64(sum.Total-sum.Resident)), humanize.IBytes(uint64(sum.Total)))
	case len(sum.Missing) > 0:
		p.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, ReasonWorkersMissing, "waits for %s", missing(sum))
	case sum.Problem != "":
		p.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, ReasonLoading, "%s", sum.Problem)
	default:
		p.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, ReasonLoading, "the workers load")
	}
	return nil
}

// settled says whether every worker is done, or can do no more for now.
func settled(sum tierclient.LoadSum) bool {
	return len(sum.Missing) == 0 && len(sum.Workers) > 0 && sum.Settled()
}

func missing(sum tierclient.LoadSum) string {
	var texts []string
	for _, id := range slices.Sorted(maps.Keys(sum.Missing)) {
		texts = append(texts, fmt.Sprintf("worker %s: %v", id, sum.Missing[id]))
	}
	return strings.Join(texts, "; ")
}

// progress sums up the workers' counters.
func (r *Reconciler) progress(p *pass, sum tierclient.LoadSum) {
	st := &p.load.Status
	if len(sum.Workers) == 0 {
		return
	}
	if sum.Snapshot != "" {
		st.Snapshot = sum.Snapshot
	}
	st.FailedFiles, st.Failures = sum.FailedFiles, nil
	for _, f := range sum.Failures {
		if len(st.Failures) < maxFailures {
			st.Failures = append(st.Failures, v1alpha1.Failure{Path: f.Path, Reason: f.Reason})
		}
	}
	g := &st.Progress
	g.Bytes, g.TotalBytes = sum.Resident, sum.Total
	switch {
	case sum.Total > 0:
		// A worker that is to hold less than before still counts what it held.
		g.Percent = int32(min(100, float64(sum.Resident)/float64(sum.Total)*100))
	case sum.Done:
		g.Percent = 100 // nothing to load
	}
	g.BytesPerSecond = r.rate(p, sum.Resident)
	g.EstimatedCompletion = nil
	if left := sum.Total - sum.Resident; left > 0 && g.BytesPerSecond > 0 {
		at := metav1.NewTime(p.now.Add(time.Duration(float64(left) / float64(g.BytesPerSecond) * float64(time.Second))).Truncate(time.Second))
		g.EstimatedCompletion = &at
	}
}

// rate is how fast a run goes: over its whole time at first, then smoothed over the last passes.
func (r *Reconciler) rate(p *pass, bytes int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	run := id(p.load)
	last := r.rates[p.load.UID]
	if last.run != run {
		last = sample{run: run, at: p.load.Status.StartTime.Time}
	}
	span := p.now.Sub(last.at).Seconds()
	if span < 0.5 {
		return int64(last.rate)
	}
	now := float64(max(0, bytes-last.bytes)) / span
	if last.rate > 0 {
		now = 0.6*last.rate + 0.4*now
	}
	r.rates[p.load.UID] = sample{run: run, at: p.now, bytes: bytes, rate: now}
	return int64(now)
}

// keep looks after the pins of a complete load, and tells how much of it is held still. Workers that lost their
// memory load it again. What they cannot have any more, since it is another snapshot's by now, is loaded from the
// Dataset's current one.
func (r *Reconciler) keep(ctx context.Context, p *pass) error {
	if !p.pins() || p.load.Status.StartTime == nil {
		return nil
	}
	p.soon(keepPoll)
	if p.dataset == nil || !p.dataset.DeletionTimestamp.IsZero() {
		return nil // it may be made anew
	}
	sum, err := r.sum(ctx, p)
	if err != nil {
		return nil // the Dataset's own conditions tell; it is asked again
	}
	if len(sum.Missing) == 0 {
		complete := p.load.Status.Progress.EstimatedCompletion
		r.progress(p, sum)
		p.load.Status.Progress.BytesPerSecond, p.load.Status.Progress.EstimatedCompletion = 0, complete
	}
	if sum.Lost && settled(sum) && p.dataset.Status.Snapshot != p.load.Status.Snapshot && notReady(p.dataset) == "" && p.load.CopiesOf(p.dataset) <= p.dataset.Spec.Workers.Replicas {
		if r.begin(ctx, p) == nil { // or the next pass does
			p.note("LoadsAgain", "Load", "workers lost what was pinned, of a snapshot that is not current any more")
		}
	}
	return nil
}
