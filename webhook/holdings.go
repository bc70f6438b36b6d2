package webhook

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/bmatcuk/doublestar/v4"
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
	// pullTimeout bounds getting one snapshot.
	pullTimeout = time.Minute
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
	Logger *slog.Logger

	mu sync.RWMutex
	of map[types.NamespacedName]holding
}

// holding is what is known of one Dataset. It is not changed, but replaced.
type holding struct {
	members ring.Membership
	digest  string
	// snapshot is nil until it is pulled.
	snapshot *catalog.Snapshot
}

// Reconcile brings what is known of one Dataset up to date.
func (h *Holdings) Reconcile(ctx context.Context, r reconcile.Request) (reconcile.Result, error) {
	d := &v1alpha1.Dataset{}
	err := h.Cache.Get(ctx, r.NamespacedName, d)
	if apierrors.IsNotFound(err) || err == nil && (d.DeletionTimestamp != nil || d.Spec.Locality == v1alpha1.LocalityNone) {
		h.set(r.NamespacedName, nil)
		return reconcile.Result{}, nil
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	m, err := h.members(ctx, d)
	if apierrors.IsNotFound(err) {
		h.set(r.NamespacedName, nil) // its arrival is an event
		return reconcile.Result{}, nil
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	known, _ := h.get(r.NamespacedName)
	known.members = m
	h.set(r.NamespacedName, &known)
	if d.Status.Snapshot == "" || d.Status.Snapshot == known.digest || len(m.Members) == 0 {
		return reconcile.Result{}, nil
	}
	s, err := h.pull(ctx, d, m)
	if err != nil {
		// Placement by Dataset goes on meanwhile, so this is no error of the webhook's.
		h.Logger.Info("a Dataset's snapshot cannot be had: its pods are placed without a look at their files",
			"dataset", r.NamespacedName.String(), "reason", err)
		return reconcile.Result{RequeueAfter: holdingsRetry}, nil
	}
	known.snapshot, known.digest = s, d.Status.Snapshot
	h.set(r.NamespacedName, &known)
	return reconcile.Result{}, nil
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
	ctx, cancel := context.WithTimeoutCause(ctx, pullTimeout, errors.New("the workers did not send the snapshot in time"))
	defer cancel()
	c, err := client.Dial(ctx, client.Config{
		Dataset: d.Namespace + "/" + d.Name, Membership: m, Keys: wire.Keys{Read: keys},
		Snapshot: digest, BufferBytes: ring.BlockSize, Dialer: h.Dialer, Logger: h.Logger,
	})
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return nil, err
	}
	defer c.Close()
	// The client's own goes with it.
	return catalog.Open(slices.Clone(c.Snapshot().Encoded()))
}

func (h *Holdings) get(name types.NamespacedName) (holding, bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	k, ok := h.of[name]
	return k, ok
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
	everywhere := false
	return ctrl.NewControllerManagedBy(m).Named("holdings").
		For(&v1alpha1.Dataset{}).
		Watches(&corev1.ConfigMap{}, toDataset).
		WithOptions(controller.Options{NeedLeaderElection: &everywhere, MaxConcurrentReconciles: 4}).
		Complete(h)
}

// Share is how many bytes each node holds of what the patterns match in the Dataset, and how many they are in
// all; of the whole Dataset where they match nothing, or there are none. Nil: nobody holds any of it, or it is
// not known.
func (h *Holdings) Share(d *v1alpha1.Dataset, patterns []string) (share map[string]float64, total float64) {
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
	left := max(1, maxPlacements/ready)
	found := false
	for i := range filesOf(k.snapshot, patterns) {
		if left--; left < 0 {
			clear(share) // as many files as that are everywhere
			found, total = false, 0
			break
		}
		found = true
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
	if !found {
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
// folder stands for all in it. A file is told once.
func filesOf(s *catalog.Snapshot, patterns []string) func(func(catalog.Index) bool) {
	return func(yield func(catalog.Index) bool) {
		if s == nil {
			return
		}
		seen := make(map[catalog.Index]bool)
		once := func(i catalog.Index) bool {
			if seen[i] {
				return true
			}
			seen[i] = true
			return yield(i)
		}
		for _, p := range patterns {
			folder, wild := p, hasWildcard(p)
			if wild {
				folder, _ = doublestar.SplitPattern(p)
			} else {
				folder = unescape(p)
			}
			i, ok := s.Lookup(path.Clean(folder))
			if !ok {
				continue
			}
			if !wild {
				if i == 0 {
					continue // all of it is no hint
				}
				more := true
				s.Walk(i, func(i catalog.Index) bool { more = once(i); return more })
				if !more {
					return
				}
				continue
			}
			pattern := strings.TrimSuffix(p, "/")
			if !strings.HasSuffix(pattern, "/**") {
				pattern += "/**"
			}
			more, looked := true, 0
			s.Walk(i, func(i catalog.Index) bool {
				if looked++; looked > maxPlacements {
					return false
				}
				if ok, _ := doublestar.Match(pattern, s.Path(i)); ok {
					more = once(i)
				}
				return more
			})
			if !more {
				return
			}
		}
	}
}

// hasWildcard says whether a pattern can match more than one path and what is below it.
func hasWildcard(p string) bool {
	for i := 0; i < len(p); i++ {
		switch p[i] {
		case '\\':
			i++
		case '*', '?', '[', '{':
			return true
		}
	}
	return false
}

// unescape undoes escapePattern, for a pattern without wildcards.
func unescape(p string) string {
	var b strings.Builder
	for i := 0; i < len(p); i++ {
		if p[i] == '\\' && i+1 < len(p) {
			i++
		}
		b.WriteByte(p[i])
	}
	return b.String()
}
