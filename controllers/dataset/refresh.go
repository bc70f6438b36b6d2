package dataset

import (
	"context"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// refreshing is a listing of the bucket that was asked for. It may take minutes, for which no pass waits.
type refreshing struct {
	value string     // of the annotation
	ended chan error // has one, once the listing has ended
}

// refresh has the bucket listed once for each value of the annotation. It comes before the workers are asked, so that
// the status that tells of a listing has what was listed.
func (r *Reconciler) refresh(ctx context.Context, p *pass) error {
	st, want := &p.dataset.Status, p.dataset.Annotations[v1alpha1.AnnotationRefresh]
	switch {
	case want == "" || want == st.Refreshed:
		return nil
	case writable(p.dataset):
		p.warn("NothingToRefresh", "Refresh", "annotation %s: a Dataset that takes puts has no listing: its names are asked for as they are", v1alpha1.AnnotationRefresh)
		return nil
	case len(p.members.Members) == 0:
		return nil // the first who comes lists it
	case p.refreshing == nil:
		k, err := r.control(p)
		if err != nil {
			return err
		}
		now := &refreshing{want, make(chan error, 1)}
		go func() {
			defer k.Close()
			_, err := k.Refresh(ctx) // which ends with the controller, not with the pass
			now.ended <- err
		}()
		p.refreshing = now
	}
	select {
	case err := <-p.refreshing.ended:
		done := p.refreshing
		p.refreshing = nil
		if err != nil {
			p.warn("RefreshFailed", "Refresh", "%v; it is tried again", err)
			return nil
		}
		if st.Refreshed = done.value; st.Refreshed == want {
			return nil
		}
	default:
	}
	p.soon(r.Poll / 5)
	return nil
}
