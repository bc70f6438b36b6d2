// Package dataload runs DataLoads: it tells the workers of a Dataset what to pull, follows them, and says
// how far they are.
//
// It owns one reconciler; each file holds one part of a load's life: when it starts (start.go), what is
// said of it while it runs (follow.go), how it ends (end.go). The bytes are the workers' business: a pass
// asks or tells them, never waits, and comes again. There is one write of the status per pass, and Events
// are sent after it.
//
// A load's id at the workers follows from the object and the start of its run, which is written down before
// the workers are told: a controller that restarts goes on with the same run.
//
// Concurrency: passes of different loads run at once, of one load never. Failure: workers that do not answer
// are waited for while a load runs and before it runs again, and for a bounded time when it is deleted.
//
// It may import api, cache, tier and controllers/dataset.
package dataload

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/controllers/dataset"
)

// What the controller may do, beside what package dataset lists.
//
// +kubebuilder:rbac:groups=data.stepcache.dev,resources=dataloads,verbs=get;list;watch;update;patch;delete
// +kubebuilder:rbac:groups=data.stepcache.dev,resources=dataloads/status;dataloads/finalizers,verbs=update;patch
// +kubebuilder:rbac:groups=data.stepcache.dev,resources=datasets,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=configmaps,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=secrets,verbs=get
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

// Reasons of the conditions Complete and Failed.
const (
	ReasonDatasetNotFound  = "DatasetNotFound"
	ReasonDatasetNotReady  = "DatasetNotReady"
	ReasonWaiting          = "Waiting" // for another load, or for its time
	ReasonLoading          = "Loading"
	ReasonWorkersMissing   = "WorkersMissing"
	ReasonLoaded           = "Loaded"
	ReasonFilesFailed      = "FilesFailed"
	ReasonNotLoaded        = "NotLoaded" // does not fit, or nothing matches
	ReasonTooManyCopies    = "TooManyCopies"
	ReasonPredecessor      = "PredecessorFailed"
	ReasonLoadsInCircle    = "LoadsInCircle"
	ReasonInvalidSchedule  = "InvalidSchedule"
	conditionNotApplicable = "NotFailed"
)

// Reconciler runs DataLoads.
type Reconciler struct {
	dataset.Options
	client client.Client
	live   client.Reader
	events events.EventRecorder

	mu    sync.Mutex
	rates map[types.UID]sample
}

// sample is how far a load was, for its rate.
type sample struct {
	run   string
	at    time.Time
	bytes int64
	rate  float64
}

// New returns a Reconciler. c should be a manager's client, live its API reader. Poll is how often the
// workers of a running load are asked; zero means 2 s.
func New(c client.Client, live client.Reader, recorder events.EventRecorder, o dataset.Options) *Reconciler {
	if o.Clock == nil {
		o.Clock = dataset.SystemClock{}
	}
	if o.Poll == 0 {
		o.Poll = 2 * time.Second
	}
	return &Reconciler{Options: o, client: c, live: live, events: recorder, rates: make(map[types.UID]sample)}
}

// SetupWithManager registers the reconciler.
func (r *Reconciler) SetupWithManager(m ctrl.Manager) error {
	loads := func(ctx context.Context, namespace string, wanted func(*v1alpha1.DataLoad) bool) []reconcile.Request {
		list := &v1alpha1.DataLoadList{}
		if err := r.client.List(ctx, list, client.InNamespace(namespace)); err != nil {
			return nil // only a shut-down cache fails; every load is also looked at in its own time
		}
		var out []reconcile.Request
		for i := range list.Items {
			if wanted(&list.Items[i]) {
				out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
			}
		}
		return out
	}
	ofDataset := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		return loads(ctx, o.GetNamespace(), func(l *v1alpha1.DataLoad) bool { return l.Spec.DatasetRef.Name == o.GetName() && !ended(l) })
	})
	after := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		return loads(ctx, o.GetNamespace(), func(l *v1alpha1.DataLoad) bool {
			return l.Spec.RunAfter != nil && l.Spec.RunAfter.Name == o.GetName() && !ended(l)
		})
	})
	return ctrl.NewControllerManagedBy(m).Named("dataload").
		For(&v1alpha1.DataLoad{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&v1alpha1.Dataset{}, ofDataset).
		Watches(&v1alpha1.DataLoad{}, after).
		WithOptions(dataset.Queue()).
		Complete(r)
}

// pass is one reconciliation of one load.
type pass struct {
	load    *v1alpha1.DataLoad // its status is what this pass will write
	dataset *v1alpha1.Dataset  // nil where there is none
	now     time.Time
	again   time.Duration
	over    bool // the run ended, and leaves nothing at the workers
	events  []event
}

type event struct{ kind, reason, action, note string }

func (p *pass) warn(reason, action, format string, a ...any) {
	p.events = append(p.events, event{corev1.EventTypeWarning, reason, action, fmt.Sprintf(format, a...)})
}

func (p *pass) note(reason, action, format string, a ...any) {
	p.events = append(p.events, event{corev1.EventTypeNormal, reason, action, fmt.Sprintf(format, a...)})
}

func (p *pass) condition(kind string, status metav1.ConditionStatus, reason, format string, a ...any) {
	text := dataset.Cut(fmt.Sprintf(format, a...), dataset.MaxMessage)
	meta.SetStatusCondition(&p.load.Status.Conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: text,
		ObservedGeneration: p.load.Generation, LastTransitionTime: metav1.NewTime(p.now),
	})
}

// Reconcile implements reconcile.Reconciler.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	have := &v1alpha1.DataLoad{}
	if err := r.client.Get(ctx, req.NamespacedName, have); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	p := &pass{load: have.DeepCopy(), now: r.Clock.Now()}
	d := &v1alpha1.Dataset{}
	err := r.client.Get(ctx, types.NamespacedName{Namespace: have.Namespace, Name: have.Spec.DatasetRef.Name}, d)
	switch {
	case err == nil:
		p.dataset = d
	case !apierrors.IsNotFound(err):
		return reconcile.Result{}, err
	}
	if !have.DeletionTimestamp.IsZero() {
		return r.deletion(ctx, p)
	}
	if controllerutil.AddFinalizer(p.load, v1alpha1.Finalizer) {
		// The status is written once this is in the cache: the patch brings the next pass.
		err := r.client.Patch(ctx, p.load, client.MergeFromWithOptions(have, client.MergeFromWithOptimisticLock{}))
		if err != nil {
			return reconcile.Result{RequeueAfter: time.Second}, ignoreConflict(err)
		}
		return reconcile.Result{RequeueAfter: time.Millisecond}, nil
	}
	if gone, err := r.expired(ctx, p); gone || err != nil {
		return reconcile.Result{}, err
	}
	err = r.advance(ctx, p)
	p.load.Status.ObservedGeneration = p.load.Generation // what advance has seen before tells it of an edit
	if !equality.Semantic.DeepEqual(have.Status, p.load.Status) {
		// With the lock: a run that another pass wrote down must not be written over from a stale cache.
		want := have.DeepCopy()
		want.Status = p.load.Status
		werr := r.client.Status().Patch(ctx, want, client.MergeFromWithOptions(have, client.MergeFromWithOptimisticLock{}))
		if apierrors.IsConflict(werr) {
			return reconcile.Result{RequeueAfter: time.Second / 4}, err
		}
		err = errors.Join(err, client.IgnoreNotFound(werr))
	}
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("dataload %s: %w", req, err)
	}
	for _, e := range p.events {
		r.events.Eventf(p.load, nil, e.kind, e.reason, e.action, "%s", dataset.Cut(e.note, dataset.MaxNote))
	}
	if p.over {
		// Not before its end is written down: the next pass would have it begun again. The workers would go over it with
		// each change of their list. One that does not answer has mostly restarted, and does not know it either.
		_ = r.forgetRun(ctx, p)
	}
	if p.again == 0 {
		return reconcile.Result{}, nil
	}
	// Spread, so that many loads do not come at once; a run that is months ahead must not start days late.
	return reconcile.Result{RequeueAfter: p.again + rand.N(min(p.again/10, 3*time.Second)+1)}, nil
}

func ignoreConflict(err error) error {
	if apierrors.IsConflict(err) {
		return nil
	}
	return client.IgnoreNotFound(err)
}

// soon sees to it that the next pass is within d.
func (p *pass) soon(d time.Duration) {
	d = max(d, time.Millisecond)
	if p.again == 0 || d < p.again {
		p.again = d
	}
}

// ended says whether a load has had its end: nothing but its deletion changes it any more.
func ended(l *v1alpha1.DataLoad) bool {
	return l.Spec.Schedule == "" && (l.Status.Phase == v1alpha1.DataLoadComplete || l.Status.Phase == v1alpha1.DataLoadFailed)
}

// id names a run of a load to the workers, which take 253 bytes. The UID tells apart names that are cut.
func id(l *v1alpha1.DataLoad) string {
	name := l.Namespace + "." + l.Name
	run := fmt.Sprintf(".%s.%d", string(l.UID)[:min(8, len(l.UID))], l.Status.StartTime.Unix())
	return name[:min(253-len(run), len(name))] + run
}
