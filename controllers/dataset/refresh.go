package dataset

import (
	"context"
	"time"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// refreshing is a listing of the bucket that was asked for. It may take minutes, for which no pass waits.
type refreshing struct {
	value string // of the annotation
	ended chan error
	since time.Time
	// again is when it may be tried once more, after a failure; zero while it is under way.
	again time.Time
	pause time.Duration
}

// refreshPause is the longest pause between tries of a listing that fails, or as long as the try took.
const refreshPause = 10 * time.Minute

// refresh has the bucket listed once for each value of the annotation. It comes before the workers are asked, so that
// the status that tells of a listing has what was listed.
func (r *Reconciler) refresh(ctx context.Context, p *pass) error {
	st, want := &p.dataset.Status, p.dataset.Annotations[v1alpha1.AnnotationRefresh]
	now := p.refreshing
	if want == "" || want == st.Refreshed {
		return nil
	}
	if writable(p.dataset) {
		p.warn("NothingToRefresh", "Refresh", "annotation %s: a Dataset that takes puts has no listing: its names are asked for as they are", v1alpha1.AnnotationRefresh)
		return nil
	}
	if len(p.members.Members) == 0 {
		return nil // the first who comes lists it
	}
	if now == nil || !now.again.IsZero() && (now.value != want || !p.now.Before(now.again)) {
		k, err := r.control(p)
		if err != nil {
			return err
		}
		next := &refreshing{value: want, ended: make(chan error, 1), since: p.now, pause: r.Poll}
		if now != nil && now.value == want {
			next.pause = min(2*now.pause, refreshPause)
		}
		go func() {
			defer k.Close()
			_, err := k.Refresh(ctx) // which ends with the controller, not with the pass
			next.ended <- err
		}()
		p.refreshing, now = next, next
	}
	select {
	case err := <-now.ended:
		if err != nil {
			// A listing that fails late has cost as many requests as one that does not.
			now.again = p.now.Add(max(now.pause, p.now.Sub(now.since)))
			p.warn("RefreshFailed", "Refresh", "%v; it is tried again", err)
			break
		}
		p.refreshing, st.Refreshed = nil, now.value
	default:
	}
	if now.again.IsZero() && st.Refreshed != want {
		p.soon(r.Poll / 5)
	}
	return nil
}
