package dataload

import (
	"context"
	"errors"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/stepcache/stepcache/api/v1alpha1"
	tierclient "github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/controllers/dataset"
)

// unpinWithin is how long a deleted load waits for workers that do not answer. Those that restarted have no
// pins any more; one that is cut off and comes back would keep them until it restarts.
const unpinWithin = 2 * time.Minute

// fail ends a run that cannot succeed.
func (r *Reconciler) fail(p *pass, reason, format string, a ...any) {
	st := &p.load.Status
	st.Phase = v1alpha1.DataLoadFailed
	st.CompletionTime = &metav1.Time{Time: p.now}
	st.Progress.BytesPerSecond, st.Progress.EstimatedCompletion = 0, nil
	p.condition(v1alpha1.ConditionComplete, metav1.ConditionFalse, reason, format, a...)
	p.condition(v1alpha1.ConditionFailed, metav1.ConditionTrue, reason, format, a...)
	p.warn(reason, "Load", format, a...)
	r.finish(p)
}

// finish forgets what is only of use while a run is under way.
func (r *Reconciler) finish(p *pass) {
	r.mu.Lock()
	delete(r.rates, p.load.UID)
	r.mu.Unlock()
	p.again = 0
	p.over = !p.pins()
	switch {
	case p.load.Spec.Schedule != "" && p.load.Status.NextScheduleTime != nil:
		p.soon(p.load.Status.NextScheduleTime.Sub(p.now))
	case p.load.Spec.TTLSecondsAfterFinished != nil:
		p.soon(time.Duration(*p.load.Spec.TTLSecondsAfterFinished) * time.Second)
	}
	if p.pins() && p.load.Status.Phase == v1alpha1.DataLoadComplete {
		p.soon(keepPoll)
	}
}

// expired deletes a load whose time to live is over. One that others wait to run after is kept until they have begun:
// they have to see that it completed.
func (r *Reconciler) expired(ctx context.Context, p *pass) (bool, error) {
	l := p.load
	if !ended(l) || l.Spec.TTLSecondsAfterFinished == nil || l.Status.CompletionTime == nil {
		return false, nil
	}
	left := l.Status.CompletionTime.Add(time.Duration(*l.Spec.TTLSecondsAfterFinished) * time.Second).Sub(p.now)
	if left > 0 {
		p.soon(left)
		return false, nil
	}
	waits, err := r.waits(ctx, l)
	if err != nil {
		return false, err
	}
	if waits != "" {
		p.note("Kept", "Delete", "its time to live is over, but dataload %q, which runs after it, has not begun: see what that waits for, or delete it", waits)
		p.soon(waitPoll)
		return false, nil
	}
	return true, client.IgnoreNotFound(r.client.Delete(ctx, l, client.Preconditions{UID: &l.UID}))
}

// waits is the name of a load that has yet to run after l; empty: there is none.
func (r *Reconciler) waits(ctx context.Context, l *v1alpha1.DataLoad) (string, error) {
	list := &v1alpha1.DataLoadList{}
	if err := r.client.List(ctx, list, client.InNamespace(l.Namespace)); err != nil {
		return "", err
	}
	for i := range list.Items {
		o := &list.Items[i]
		if o.Spec.RunAfter != nil && o.Spec.RunAfter.Name == l.Name && o.DeletionTimestamp.IsZero() &&
			(o.Status.Phase == "" || o.Status.Phase == v1alpha1.DataLoadPending) {
			return o.Name, nil
		}
	}
	return "", nil
}

// forgetRun ends the last run at the workers, and with it its pins.
func (r *Reconciler) forgetRun(ctx context.Context, p *pass) error {
	if p.dataset == nil || p.load.Status.StartTime == nil {
		return nil
	}
	k, err := dataset.Connect(ctx, r.client, r.live, p.dataset, r.Options)
	if err != nil {
		return err
	}
	defer k.Close()
	return k.DeleteLoad(ctx, id(p.load))
}

// deletion takes the pins away and lets the object go: at once when the Dataset is gone, and in any case
// after a bounded time.
func (r *Reconciler) deletion(ctx context.Context, p *pass) (reconcile.Result, error) {
	l := p.load
	if !controllerutil.ContainsFinalizer(l, v1alpha1.Finalizer) {
		return reconcile.Result{}, nil
	}
	if p.dataset != nil && p.dataset.DeletionTimestamp.IsZero() {
		if err := client.IgnoreNotFound(r.forgetRun(ctx, p)); err != nil {
			var miss *tierclient.Missing
			if p.now.Sub(l.DeletionTimestamp.Time) < unpinWithin {
				if errors.As(err, &miss) {
					return reconcile.Result{RequeueAfter: r.Poll}, nil
				}
				return reconcile.Result{}, err
			}
			r.events.Eventf(l, nil, "Warning", "PinsLeft", "Delete", "%s", dataset.Cut("deleted although not every worker could be told to unpin: "+err.Error(), dataset.MaxNote))
		}
	}
	before := l.DeepCopy()
	controllerutil.RemoveFinalizer(l, v1alpha1.Finalizer)
	r.mu.Lock()
	delete(r.rates, l.UID)
	r.mu.Unlock()
	err := r.client.Patch(ctx, l, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if err := ignoreConflict(err); err != nil {
		return reconcile.Result{}, err
	}
	return reconcile.Result{RequeueAfter: requeueOn(err)}, nil
}

func requeueOn(err error) time.Duration {
	if err != nil {
		return time.Second
	}
	return 0
}
