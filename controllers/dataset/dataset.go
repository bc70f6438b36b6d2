// Package dataset makes a Dataset real on a cluster: its keys, its workers and who they are, its volume and
// claim, and what its status says.
//
// It owns one reconciler. Each file named after a phase holds that phase; phases run in the order of
// Reconcile, each on a pass that holds what the earlier ones found. A phase that cannot go on returns a
// *blocked error, which names the condition that says why; what the API server does not allow is told in
// Ready; anything else that fails is tried again with backoff. A pass that ends early, and one of a Dataset whose
// deletion waits, still keeps the list of workers. There is one write of the status per pass, and
// Events are sent after it.
//
// Buckets and the Secrets of their credentials are read by the workers only: what the controller says of
// them it was told by a worker over the control endpoint, for which it uses the Dataset's control key.
//
// What the bucket does not have yet (write policy Back) is never thrown away unasked: deletion, scaling in,
// a rollout and the replacement of a worker wait for it, say so, and name the annotation that ends the wait.
//
// Concurrency: passes of different Datasets run at once, of one Dataset never; what is remembered between
// passes (memory) can be lost at any time at the cost of a later answer. Failure: workers that do not
// answer are reported and never waited for, deletion finishes without them, but for those that may hold writes.
//
// It may import api, cache and tier; the load controller imports it to reach a Dataset's workers.
package dataset

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// What the controller may do. Secrets are read by name and never listed; a worker's credentials are asked
// for as metadata only.
//
// +kubebuilder:rbac:groups=data.stepcache.dev,resources=datasets,verbs=get;list;watch;update;patch
// +kubebuilder:rbac:groups=data.stepcache.dev,resources=datasets/status,verbs=update;patch
// +kubebuilder:rbac:groups=apps,resources=statefulsets,verbs=get;list;watch;create;update;delete
// +kubebuilder:rbac:groups="",resources=services;configmaps,verbs=get;list;watch;create;update;delete
// +kubebuilder:rbac:groups="",resources=secrets,verbs=get;create;update;delete
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch;delete
// +kubebuilder:rbac:groups="",resources=nodes,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=namespaces,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups="",resources=persistentvolumes;persistentvolumeclaims,verbs=get;list;watch;create;update;patch;delete
// +kubebuilder:rbac:groups=policy,resources=poddisruptionbudgets,verbs=get;list;watch;create;update;delete
// +kubebuilder:rbac:groups=networking.k8s.io,resources=networkpolicies,verbs=get;list;watch;create;update;delete
// +kubebuilder:rbac:groups="",resources=events,verbs=get;list
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups=coordination.k8s.io,resources=leases,verbs=get;create;update,namespace=stepcache-system
// +kubebuilder:rbac:groups="",resources=events,verbs=create;patch,namespace=stepcache-system

// Store is what holds the workers' bytes.
type Store string

// Kinds of store. CSI is memory that the node service mounts with huge pages, for clusters whose nodes all
// run it; EmptyDir works everywhere.
const (
	StoreCSI      Store = "csi"
	StoreEmptyDir Store = "emptydir"
)

// Clock is the time as the controller sees it.
type Clock interface{ Now() time.Time }

// Options of a Reconciler.
type Options struct {
	// Namespace is the installation's own: controller, node service and webhook run there.
	Namespace string
	// Image is what new Datasets' workers run.
	Image string
	Store Store
	// Env is more of the environment of workers that start from now on: the proxy through which they reach buckets.
	Env []corev1.EnvVar
	// Poll is how often workers are asked for their status once all is well; a random tenth is added.
	// Zero means 15 s. While something is missing they are asked at a fifth of it.
	Poll time.Duration
	// Only limits the controllers to the objects of one namespace, and allows several managers in one
	// process. Empty: all namespaces.
	Only string
	// Clock is the time; nil means the system's.
	Clock Clock
	// Dial connects to workers; nil means a net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// SystemClock is the system's.
type SystemClock struct{}

// Now implements Clock.
func (SystemClock) Now() time.Time { return time.Now() }

// Reconciler makes Datasets real.
type Reconciler struct {
	Options
	client client.Client
	// live reads past the cache: Secrets, and the pods of a Dataset that is being deleted.
	live   client.Reader
	events events.EventRecorder
	// noSameNode: the API server is too old for Services that prefer the client's own node.
	noSameNode atomic.Bool

	mu     sync.Mutex
	memory map[types.UID]*memory
}

// memory is what is remembered of a Dataset between passes.
type memory struct {
	// absent is since when a worker cannot serve, by member id.
	absent map[string]time.Time
	// heard are the members that answered when they were asked last.
	heard map[string]bool
	// epoch is the greatest that was written, or that a worker follows.
	epoch uint64
	// leaving is since when a member hands over.
	leaving map[string]time.Time
	// scaleIn is since when there are workers too many; zero while there are not.
	scaleIn time.Time
	// looks are what the pass before and this one learned of the writes that the bucket does not have.
	looks [2]*looked
	// made is when the newest pod was made that was seen, words what the StatefulSet was told since when it asked for one
	// in vain, and asked when that was looked up.
	made, asked time.Time
	words       string
	// inherited: what was there before this controller was looked at.
	inherited bool
	// users are the pods that a deletion waits for, as they were at lookedAt, and pause is how long that is good enough.
	users    []string
	lookedAt time.Time
	pause    time.Duration
	// said is the last text of each Event, so that an unchanged problem is told once.
	said map[told]string
	// refreshing is under way, or has ended since the last pass; or nil.
	refreshing *refreshing
	// copies are those of Secrets in other namespaces, by namespace and name.
	copies map[client.ObjectKey]copied
}

// New returns a Reconciler. c should be a manager's client, live its API reader.
func New(c client.Client, live client.Reader, recorder events.EventRecorder, o Options) *Reconciler {
	if o.Clock == nil {
		o.Clock = SystemClock{}
	}
	if o.Poll == 0 {
		o.Poll = 15 * time.Second
	}
	if o.Dial == nil {
		o.Dial = (&net.Dialer{Timeout: wire.DialTimeout}).DialContext
	}
	return &Reconciler{Options: o, client: c, live: live, events: recorder, memory: make(map[types.UID]*memory)}
}

// SetupWithManager registers the reconciler.
func (r *Reconciler) SetupWithManager(m ctrl.Manager) error {
	toDataset := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
		name := o.GetLabels()[v1alpha1.LabelDataset]
		if name == "" {
			return nil
		}
		ns := o.GetNamespace()
		if pv, ok := o.(*corev1.PersistentVolume); ok && pv.Spec.ClaimRef != nil {
			ns = pv.Spec.ClaimRef.Namespace
		}
		if r.Only != "" && ns != r.Only {
			return nil
		}
		return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: ns, Name: name}}}
	})
	appears := predicate.Funcs{
		UpdateFunc:  func(event.UpdateEvent) bool { return false },
		DeleteFunc:  func(event.DeleteEvent) bool { return false },
		GenericFunc: func(event.GenericEvent) bool { return false },
	}
	return ctrl.NewControllerManagedBy(m).Named("dataset").
		For(&v1alpha1.Dataset{}, builder.WithPredicates(predicate.Or(predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{}))).
		Watches(&appsv1.StatefulSet{}, toDataset).
		Watches(&corev1.ConfigMap{}, toDataset).
		Watches(&corev1.Service{}, toDataset).
		Watches(&policyv1.PodDisruptionBudget{}, toDataset).
		Watches(&networkingv1.NetworkPolicy{}, toDataset).
		Watches(&corev1.PersistentVolumeClaim{}, toDataset).
		Watches(&corev1.Pod{}, toDataset).
		Watches(&corev1.PersistentVolume{}, toDataset).
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(r.sharers), builder.WithPredicates(appears)).
		WithOptions(Queue()).
		Complete(r)
}

// retryAtMost is the longest pause after passes that failed, which is what everybody waits for after an outage of the
// API server. The default is 1,000 seconds.
const retryAtMost = 30 * time.Second

// maxPasses is how many objects are looked at at a time. A pass mostly waits, for wire.DialTimeout and more where a worker
// is cut off, and with a zone many are; what it holds in memory are the answers of one Dataset's workers.
const maxPasses = 64

// Queue is how the passes of a controller's objects follow each other.
func Queue() controller.Options {
	return controller.Options{
		MaxConcurrentReconciles: maxPasses,
		RateLimiter:             workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](5*time.Millisecond, retryAtMost),
	}
}

// blocked is an error that a condition tells: the pass ends, and is tried again at the usual interval or
// when something changes.
type blocked struct {
	condition, reason string
	err               error
}

func (b *blocked) Error() string { return b.err.Error() }
func (b *blocked) Unwrap() error { return b.err }

func block(condition, reason, format string, a ...any) error {
	return &blocked{condition, reason, fmt.Errorf(format, a...)}
}

// refuses says whether an error is the API server's word that it does not allow what it was asked for.
func refuses(err error) bool { return apierrors.IsForbidden(err) || apierrors.IsInvalid(err) }

// pass is one reconciliation of one Dataset: what its phases find, for the phases after them.
type pass struct {
	*memory
	dataset *v1alpha1.Dataset // its status is what this pass will write
	now     time.Time
	keys    wire.Keys
	access  map[string][]byte // the S3 endpoint's Secret, of a Dataset that takes puts
	pods    []corev1.Pod      // the workers', by ordinal
	nodes   map[string]*corev1.Node
	set     *appsv1.StatefulSet // as it is; nil before it was made
	wanted  string              // the hash that worker pods should carry
	members ring.Membership
	status  map[string]wire.WorkerStatus // by member id
	missing map[string]error             // members that did not answer
	refused error                        // what ended the pass because the API server does not allow it
	again   time.Duration                // when to come again, if that is before the usual interval; 0: then
	notices []notice
}

// notice is an Event of the Dataset, about one of its workers' pods unless that is nil.
type notice struct {
	pod                        *corev1.Pod
	kind, reason, action, note string
}

// told is what an Event is about.
type told struct {
	reason string
	pod    types.UID
}

// phase is one step of a pass.
type phase func(context.Context, *pass) error

// Reconcile implements reconcile.Reconciler.
func (r *Reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	have := &v1alpha1.Dataset{}
	if err := r.client.Get(ctx, req.NamespacedName, have); err != nil {
		if apierrors.IsNotFound(err) {
			err = r.orphans(ctx, req.NamespacedName)
		}
		return reconcile.Result{}, err
	}
	p := &pass{memory: r.remember(have.UID), dataset: have.DeepCopy(), now: r.Clock.Now()}
	prepare := []phase{r.inherit, r.finalizer, r.claimTaken, r.validate, r.namespace, r.makeKeys, r.gateway, r.config}
	serve := []phase{
		r.membership, r.network, r.refresh, r.ask, r.tell, r.flushed, r.rotate, r.share, r.workers, r.replace, r.sourced, r.workersReady, r.volume,
	}
	if !have.DeletionTimestamp.IsZero() {
		prepare, serve = []phase{r.inherit}, []phase{r.deletion}
	}
	var failed []error
	end := func(err error) {
		var b *blocked
		switch {
		case err == nil:
		case errors.As(err, &b):
			p.condition(b.condition, metav1.ConditionFalse, b.reason, "%s", b.Error())
		case apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err):
			// The cache is behind; the change that it waits for brings the next pass.
			p.again = time.Second
		case have.DeletionTimestamp.IsZero() && refuses(err):
			// Only somebody who changes a quota, a policy, a right or the Dataset helps, and a pass at the usual
			// interval sees it sooner than one that is backed off.
			p.refused = err
		default:
			failed = append(failed, err)
		}
	}
	for i, do := range slices.Concat([]phase{r.observe}, prepare, serve) {
		err := do(ctx, p)
		if err == nil {
			continue
		}
		end(err)
		if i == 0 || i > len(prepare) {
			break
		}
		// Whatever is wrong, a deletion goes on that nobody is in the way of, and readers have to find the workers there are.
		if have.DeletionTimestamp.IsZero() {
			end(r.settle(ctx, p))
			break
		}
	}
	p.summarize()
	if err := r.write(ctx, have, p); err != nil {
		return reconcile.Result{}, errors.Join(append(failed, err)...)
	}
	r.send(p)
	if len(failed) > 0 {
		return reconcile.Result{}, fmt.Errorf("dataset %s: %w", req, errors.Join(failed...))
	}
	usual := r.Poll
	if phase := p.dataset.Status.Phase; phase != v1alpha1.DatasetReady && phase != v1alpha1.DatasetDeleting {
		usual /= 5
	}
	p.soon(usual)
	return reconcile.Result{RequeueAfter: p.again + rand.N(p.again/10+1)}, nil
}

// write is the one write of the status.
func (r *Reconciler) write(ctx context.Context, have *v1alpha1.Dataset, p *pass) error {
	if equality.Semantic.DeepEqual(have.Status, p.dataset.Status) {
		return nil
	}
	// What the phases changed of the object's metadata is written already.
	want := have.DeepCopy()
	want.Status = p.dataset.Status
	return client.IgnoreNotFound(r.client.Status().Patch(ctx, want, client.MergeFrom(have)))
}

// send tells the Events of a pass, each text once until it changes.
func (r *Reconciler) send(p *pass) {
	for _, e := range p.notices {
		about, related := told{reason: e.reason}, runtime.Object(nil)
		if e.pod != nil {
			// The recorder takes Events of one reason for one, of which it counts how often it came, unless they differ in this.
			about.pod, related = e.pod.UID, e.pod
		}
		if p.said[about] == e.note {
			continue
		}
		p.said[about] = e.note
		r.events.Eventf(p.dataset, related, e.kind, e.reason, e.action, "%s", e.note)
	}
	maps.DeleteFunc(p.said, func(t told, _ string) bool {
		return t.pod != "" && !slices.ContainsFunc(p.pods, func(pod corev1.Pod) bool { return pod.UID == t.pod })
	})
}

// unsay has Events of the reasons be told again if they come again.
func (p *pass) unsay(reasons ...string) {
	maps.DeleteFunc(p.said, func(t told, _ string) bool { return slices.Contains(reasons, t.reason) })
}

// soon has the Dataset come again no later than after d.
func (p *pass) soon(d time.Duration) {
	if p.again == 0 || p.again > d {
		p.again = d
	}
}

func (p *pass) warn(reason, action, format string, a ...any) {
	p.event(nil, corev1.EventTypeWarning, reason, action, format, a...)
}

func (p *pass) note(reason, action, format string, a ...any) {
	p.event(nil, corev1.EventTypeNormal, reason, action, format, a...)
}

func (p *pass) event(pod *corev1.Pod, kind, reason, action, format string, a ...any) {
	p.notices = append(p.notices, notice{pod, kind, reason, action, Cut(fmt.Sprintf(format, a...), MaxNote)})
}

func (r *Reconciler) remember(uid types.UID) *memory {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.memory[uid]
	if m == nil {
		m = &memory{absent: make(map[string]time.Time), leaving: make(map[string]time.Time), said: make(map[told]string), copies: make(map[client.ObjectKey]copied)}
		r.memory[uid] = m
	}
	return m
}

func (r *Reconciler) forget(uid types.UID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.memory, uid)
}

// finalizer makes sure that deletion waits for the pods that use the Dataset.
func (r *Reconciler) finalizer(ctx context.Context, p *pass) error {
	before := p.dataset.DeepCopy()
	if !controllerutil.AddFinalizer(p.dataset, v1alpha1.Finalizer) {
		return nil
	}
	patched := p.dataset.DeepCopy()
	if err := r.client.Patch(ctx, patched, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return err
	}
	p.dataset.ResourceVersion = patched.ResourceVersion
	return nil
}
