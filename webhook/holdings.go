package webhook

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	kclient "sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// pullTimeout bounds getting one snapshot, with a second more for each pullRate bytes of it, and pullStall how long
	// nothing of it may come, which is longer than a worker may take for a piece: over a slow line a large one takes its
	// time, and others wait for its turn.
	pullTimeout = time.Minute
	pullRate    = 200 << 10
	pullStall   = wire.WorkerTimeout + 5*time.Second
	// maxPlacements bounds the arithmetic of one call: files times workers.
	maxPlacements = 200_000
	// holdingsRetry is when a snapshot is asked for again that could not be had.
	holdingsRetry = 30 * time.Second
)

// Holdings knows which node holds which bytes of each Dataset, from its membership and its snapshot: a
// file's place is arithmetic on both, before it is loaded as well as after. It keeps itself up to date in
// the background, as a reconciler of Datasets that every replica runs for itself. A call reads memory only.
type Holdings struct {
	// Cache reads Datasets and ConfigMaps; Live reads Secrets, one a pull.
	Cache, Live kclient.Reader
	// Dialer connects to workers; nil means a net.Dialer.
	Dialer func(ctx context.Context, network, addr string) (net.Conn, error)
	// Room is how many bytes of memory the snapshots of all Datasets may take together; zero means no bound. Beyond
	// it pods are placed without a look at their files: the webhook must not die of a Dataset, since pods of all
	// others are refused while it is away.
	Room   int64
	Logger *slog.Logger

	mu sync.RWMutex
	of map[types.NamespacedName]holding
	// pulled is the memory of snapshots that are being pulled.
	pulled map[types.NamespacedName]int64

	pullStall time.Duration // for tests; zero means pullStall
}

func (h *Holdings) stall() time.Duration { return cmp.Or(h.pullStall, pullStall) }

var errNoRoom = errors.New("the webhook has no memory for it: raise its limit (resources.limits.memory)")

// holding is what is known of one Dataset. It is not changed, but replaced.
type holding struct {
	members ring.Membership
	digest  string
	// snapshot is nil until it is pulled, and where there is no room for it.
	snapshot *catalog.Snapshot
	// tooBig is the size of the snapshot that there is no room for.
	tooBig int64
}

// size is the memory that it takes.
func (k holding) size() int64 {
	if k.snapshot == nil {
		return 0
	}
	return int64(len(k.snapshot.Encoded()))
}

// Reconcile brings what is known of one Dataset up to date, its snapshot as well.
func (h *Holdings) Reconcile(ctx context.Context, r reconcile.Request) (reconcile.Result, error) {
	d, known, err := h.follow(ctx, r.NamespacedName)
	if err != nil || d == nil {
		return reconcile.Result{}, err
	}
	same := d.Status.Snapshot == known.digest
	if same && known.tooBig == 0 || len(known.members.Members) == 0 {
		return reconcile.Result{}, nil
	}
	defer h.pullEnds(r.NamespacedName)
	if same && !h.admit(r.NamespacedName, known.digest, known.tooBig) {
		return reconcile.Result{RequeueAfter: holdingsRetry}, nil // others may have gone by then
	}
	s, err := h.pull(ctx, d, known.members)
	if err != nil {
		// Placement by Dataset goes on meanwhile, so this is no error of the webhook's.
		if known.tooBig == 0 || !errors.Is(err, errNoRoom) {
			h.Logger.Info("a Dataset's snapshot cannot be had: its pods are placed without a look at their files",
				"dataset", r.NamespacedName.String(), "reason", err)
		}
		return reconcile.Result{RequeueAfter: holdingsRetry}, nil
	}
	h.change(r.NamespacedName, func(k *holding) { k.digest, k.snapshot, k.tooBig = d.Status.Snapshot, s, 0 })
	return reconcile.Result{}, nil
}

// follow brings what is known of one Dataset up to date but for its snapshot, and returns that and the Dataset; no Dataset
// where it has nothing. It waits for nobody.
func (h *Holdings) follow(ctx context.Context, name types.NamespacedName) (*v1alpha1.Dataset, holding, error) {
	d := &v1alpha1.Dataset{}
	err := h.Cache.Get(ctx, name, d)
	if apierrors.IsNotFound(err) || err == nil && (d.DeletionTimestamp != nil || d.Spec.Locality == v1alpha1.LocalityNone) {
		h.set(name, nil)
		return nil, holding{}, nil
	}
	if err != nil {
		return nil, holding{}, err
	}
	m, err := h.members(ctx, d)
	if apierrors.IsNotFound(err) {
		h.set(name, nil) // its arrival is an event
		return nil, holding{}, nil
	}
	if err != nil {
		return nil, holding{}, err
	}
	known := h.change(name, func(k *holding) {
		if d.Status.Snapshot == "" {
			*k = holding{} // one that takes puts has none, though an earlier version listed it
		}
		k.members = m
	})
	return d, known, nil
}

func (h *Holdings) members(ctx context.Context, d *v1alpha1.Dataset) (ring.Membership, error) {
	tier := &corev1.ConfigMap{}
	if err := h.Cache.Get(ctx, types.NamespacedName{Namespace: d.Namespace, Name: v1alpha1.TierName(d.Name)}, tier); err != nil {
		return ring.Membership{}, err
	}
	m, err := ring.Parse([]byte(tier.Data[v1alpha1.KeyMembership]))
	if err != nil {
		return ring.Membership{}, fmt.Errorf("configmap %s/%s: %w", tier.Namespace, tier.Name, err)
	}
	return m, nil
}

// pull gets the current snapshot from the workers.
func (h *Holdings) pull(ctx context.Context, d *v1alpha1.Dataset, m ring.Membership) (*catalog.Snapshot, error) {
	var digest catalog.Digest
	if n, err := hex.Decode(digest[:], []byte(d.Status.Snapshot)); err != nil || n != len(digest) {
		return nil, fmt.Errorf("status.snapshot %q is not a digest", d.Status.Snapshot)
	}
	secret := &corev1.Secret{}
	if err := h.Live.Get(ctx, types.NamespacedName{Namespace: d.Namespace, Name: v1alpha1.ReaderName(d.Name)}, secret); err != nil {
		return nil, err
	}
	keys, err := wire.ParseKeys(secret.Data[v1alpha1.KeyRead])
	if err != nil {
		return nil, fmt.Errorf("secret %s/%s, key %s: %w", secret.Namespace, secret.Name, v1alpha1.KeyRead, err)
	}
	ctx, refuse := context.WithCancelCause(ctx)
	defer refuse(nil)
	late := time.AfterFunc(pullTimeout, func() { refuse(errors.New("the workers did not send the snapshot in time")) })
	defer late.Stop()
	stalled := time.AfterFunc(h.stall(), func() { refuse(fmt.Errorf("nothing of the snapshot came for %v", h.stall())) })
	defer stalled.Stop()
	received, admitted := int64(0), false
	c, err := client.Dial(ctx, client.Config{
		Dataset: d.Namespace + "/" + d.Name, Membership: m, Keys: wire.Keys{Read: keys},
		Snapshot: digest, BufferBytes: ring.BlockSize, Dialer: h.Dialer, Logger: h.Logger,
		Progress: func(p client.Progress) {
			if p.Received > 0 && p.Received != received {
				received = p.Received
				stalled.Reset(h.stall())
			}
			if p.Size == 0 || admitted {
				return
			}
			if admitted = h.admit(types.NamespacedName{Namespace: d.Namespace, Name: d.Name}, d.Status.Snapshot, p.Size); !admitted {
				refuse(fmt.Errorf("it is %s: %w", size(p.Size), errNoRoom))
				return
			}
			late.Reset(pullTimeout + time.Duration(p.Size/pullRate)*time.Second)
		},
	})
	if err == nil {
		defer c.Close()
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errNoRoom): // a small one came whole all the same
		return nil, cause
	case err != nil && cause != nil:
		return nil, fmt.Errorf("%w: %w", cause, err)
	case err != nil:
		return nil, err
	}
	// The client's own goes with it.
	return catalog.Open(slices.Clone(c.Snapshot().Encoded()))
}

// admit says whether there is room for a snapshot of so many bytes, and takes it until pullEnds: twice its size, since
// the client has a copy of its own. One that is held of the Dataset goes where both cannot be.
func (h *Holdings) admit(name types.NamespacedName, digest string, size int64) bool {
	if h.Room == 0 {
		return true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	left := h.Room - 2*size
	for n, k := range h.of {
		if n != name {
			left -= k.size()
		}
	}
	for n, bytes := range h.pulled {
		if n != name {
			left -= bytes
		}
	}
	k := h.of[name]
	if left < k.size() {
		k.snapshot, k.digest = nil, ""
	}
	if left < 0 {
		k.digest, k.tooBig = digest, size
		h.of[name] = k
		return false
	}
	h.of[name] = k
	if h.pulled == nil {
		h.pulled = make(map[types.NamespacedName]int64)
	}
	h.pulled[name] = 2 * size
	return true
}

func (h *Holdings) pullEnds(name types.NamespacedName) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.pulled, name)
}

func (h *Holdings) get(name types.NamespacedName) (holding, bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	k, ok := h.of[name]
	return k, ok
}

// change replaces what is known by what change makes of it.
func (h *Holdings) change(name types.NamespacedName, change func(*holding)) holding {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.of == nil {
		h.of = make(map[types.NamespacedName]holding)
	}
	k := h.of[name]
	change(&k)
	h.of[name] = k
	return k
}

func (h *Holdings) set(name types.NamespacedName, k *holding) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if k == nil {
		delete(h.of, name)
		return
	}
	if h.of == nil {
		h.of = make(map[types.NamespacedName]holding)
	}
	h.of[name] = *k
}

// SetupWithManager has the manager run it, on every replica.
func (h *Holdings) SetupWithManager(m ctrl.Manager) error {
	toDataset := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o kclient.Object) []reconcile.Request {
		name := o.GetLabels()[v1alpha1.LabelDataset]
		if name == "" {
			return nil
		}
		return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: o.GetNamespace(), Name: name}}}
	})
	// Workers that send nothing hold up the snapshots of others for a while, but not what is known of their nodes.
	members := reconcile.Func(func(ctx context.Context, r reconcile.Request) (reconcile.Result, error) {
		_, _, err := h.follow(ctx, r.NamespacedName)
		return reconcile.Result{}, err
	})
	everywhere := false
	for name, r := range map[string]reconcile.Reconciler{"members": members, "holdings": h} {
		err := ctrl.NewControllerManagedBy(m).Named(name).
			For(&v1alpha1.Dataset{}).
			Watches(&corev1.ConfigMap{}, toDataset).
			WithOptions(controller.Options{NeedLeaderElection: &everywhere, MaxConcurrentReconciles: 4}).
			Complete(r)
		if err != nil {
			return err
		}
	}
	return nil
}

// Nodes are those with Ready workers of the Dataset, one as often as it has some; none where that is not known.
func (h *Holdings) Nodes(d *v1alpha1.Dataset) []string {
	k, _ := h.get(types.NamespacedName{Namespace: d.Namespace, Name: d.Name})
	var nodes []string
	for _, m := range k.members.Members {
		if m.State == ring.Ready && m.Node != "" {
			nodes = append(nodes, m.Node)
		}
	}
	return nodes
}

// Share is how many bytes each node holds of what the patterns match in the Dataset, and how many they are in
// all; of the whole Dataset where they match nothing, or there are none. Nil: nobody holds any of it, or it is
// not known.
func (h *Holdings) Share(ctx context.Context, d *v1alpha1.Dataset, patterns []string) (share map[string]float64, total float64) {
	k, ok := h.get(types.NamespacedName{Namespace: d.Namespace, Name: d.Name})
	if !ok {
		return nil, 0
	}
	var weights float64
	ready := 0
	for _, m := range k.members.Members {
		if m.State == ring.Ready && m.Node != "" {
			weights += weight(m)
			ready++
		}
	}
	if ready == 0 {
		return nil, 0
	}
	copies := max(1, int(d.Spec.Workers.Copies))
	share = make(map[string]float64)
	spread := func(bytes float64) {
		total += bytes
		for _, m := range k.members.Members {
			if m.State == ring.Ready && m.Node != "" {
				share[m.Node] += bytes * min(1, float64(copies)*weight(m)/weights)
			}
		}
	}
	files := filesOf(ctx, k.snapshot, patterns, max(1, maxPlacements/ready))
	for _, i := range files {
		o, _ := k.snapshot.Ring(i)
		bytes := float64(max(o.Size, 1))
		if o.Size > ring.StripeThreshold {
			spread(bytes)
			continue
		}
		total += bytes
		for _, m := range k.members.Owners(o, 0, copies) {
			share[m.Node] += bytes
		}
	}
	if len(files) == 0 {
		spread(float64(max(d.Status.Bytes, 1)))
	}
	delete(share, "")
	return share, total
}

// artifactBytes is what an artifact counts beside files, whose sizes are known: as little as a pod is worth
// moving for.
const artifactBytes = float64(ring.BlockSize)

// Names is Share for keys of a Dataset that takes puts: all of a key at the node of its owner, which knows its
// version and was the last to write it, and half as much at the nodes of the other workers.
func (h *Holdings) Names(d *v1alpha1.Dataset, keys []string) (share map[string]float64, total float64) {
	name := types.NamespacedName{Namespace: d.Namespace, Name: d.Name}
	k, _ := h.get(name)
	total = artifactBytes * float64(len(keys))
	share = make(map[string]float64)
	for _, m := range k.members.Members {
		if m.State == ring.Ready {
			share[m.Node] = total / 2
		}
	}
	for _, key := range keys {
		for _, m := range k.members.NameOwners(name.String(), key, 1) {
			share[m.Node] += artifactBytes / 2
		}
	}
	delete(share, "")
	return share, total
}

func weight(m ring.Member) float64 { return float64(max(m.Weight, 1)) }

// filesOf are the files of a snapshot that match any of the patterns, as in a DataLoad: one that matches a
// folder stands for all in it. A file is told once. None where they are more than most, or too many to look at: as many
// are everywhere, and the first of them would say that they are where these are. The call ends with ctx.
func filesOf(ctx context.Context, s *catalog.Snapshot, patterns []string, most int) (files []catalog.Index) {
	if s == nil {
		return nil
	}
	seen := make(map[catalog.Index]bool)
	enough, looked := false, 0
	add := func(i catalog.Index) {
		if seen[i] {
			return
		}
		seen[i] = true
		files = append(files, i)
		enough = enough || len(files) > most
	}
	for _, p := range catalog.NewPatterns(patterns) {
		if p.Glob == "" && p.Folder == "/" {
			continue // all of it is no hint
		}
		alternatives := catalog.Alternatives(p.Glob)
		s.WalkMatching([]catalog.Pattern{p}, func(i catalog.Index, at string, matches bool) bool {
			// The steps of a match, of which an ordinary one takes less than the first thousands.
			looked += 1 + alternatives*len(p.Glob)*len(at)>>12
			if looked > maxPlacements || ctx.Err() != nil {
				enough = true
			} else if matches {
				add(i)
			}
			return !enough
		})
		if enough {
			return nil
		}
	}
	return files
}
