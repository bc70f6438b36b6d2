package dataset

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"reflect"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	tierclient "github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/tier"
)

const (
	// absentAfter is how long a worker that does not serve stays in the membership: a restart moves no
	// bytes, a loss does, since without its owner every read of a block asks in vain first.
	absentAfter = time.Minute
	// askTimeout bounds one question to a worker.
	askTimeout = 5 * time.Second
)

// membership writes who the workers are into the ConfigMap that they and the readers mount.
//
// A member's id is its pod's name, which placement hashes; its address is the pod's own, which needs no
// DNS, so a restart under another address is a new epoch and moves nothing. Members are Leaving while they
// hand over their blocks, before the pod is stopped for good (scale-in) or for a new template (rollout). Once it is
// stopped they are out at once: its next pod comes with nothing, to others that have what was handed over.
func (r *Reconciler) membership(ctx context.Context, p *pass) error {
	have, err := r.list(ctx, p)
	if err != nil {
		return err
	}
	before := p.parse(have)
	had := make(map[string]ring.Member)
	for _, m := range before.Members {
		if m.State != ring.Leaving || !p.ended(m) {
			had[m.ID] = m
		}
	}
	next := ring.Membership{Members: []ring.Member{}}
	seen := make(map[string]bool)
	for i := range p.pods {
		pod := &p.pods[i]
		seen[pod.Name] = true
		old, was := had[pod.Name]
		switch {
		case p.serves(pod):
			delete(p.absent, pod.Name)
			m := r.member(pod)
			m.Joined = old.Joined
			next.Members = append(next.Members, m)
		case p.lately(pod.Name) && was:
			next.Members = append(next.Members, old)
		}
	}
	for _, m := range had {
		// The pod is gone: the set makes it anew, unless it was one too many.
		if n := ordinal(p.dataset, m.ID); !seen[m.ID] && n >= 0 && n < int(p.dataset.Spec.Workers.Replicas) && p.lately(m.ID) {
			next.Members = append(next.Members, m)
		}
	}
	slices.SortFunc(next.Members, func(a, b ring.Member) int { return ordinal(p.dataset, a.ID) - ordinal(p.dataset, b.ID) })
	roll := p.rolling(had)
	stay := 0
	for i := range next.Members {
		m := &next.Members[i]
		m.State = ring.Ready
		if ordinal(p.dataset, m.ID) >= int(p.dataset.Spec.Workers.Replicas) || m.ID == roll {
			m.State = ring.Leaving
		} else {
			stay++
		}
	}
	if stay == 0 { // nobody could take anything over
		for i := range next.Members {
			next.Members[i].State = ring.Ready
		}
	}
	next.Epoch = before.Epoch
	if before.Epoch == 0 || before.Epoch < p.epoch || !reflect.DeepEqual(before.Members, next.Members) {
		next.Epoch = nextEpoch(before.Epoch, p.epoch, p.now)
		markNew(before.Epoch, had, next, p.dataset.Status.Cached > 0, p.back())
	}
	p.members = next
	if err := r.putMembership(ctx, p, have); err != nil {
		return err
	}
	p.epoch = next.Epoch
	return nil
}

// nextEpoch is the epoch of the list after the one with epoch before, which is 0 where that is not known; greatest was
// written or is followed by a worker.
//
// It is the next number: a worker that finds one left out takes it that it has missed a list, and serves no name until it
// has asked all the others. Only the time is greater than all that were ever written where the list was deleted, and so
// may be what is remembered of it.
func nextEpoch(before, greatest uint64, now time.Time) uint64 {
	if before == 0 {
		return max(greatest+1, uint64(now.Unix()))
	}
	return max(before, greatest) + 1
}

// ended says whether the pod of a member is being stopped, or is gone. Where there are sockets, whose paths have the
// pods' UIDs, one that took its place meanwhile is known too; an address may change while a pod keeps its memory.
func (p *pass) ended(m ring.Member) bool {
	pod := p.pod(m.ID)
	return pod == nil || !pod.DeletionTimestamp.IsZero() || m.Socket != "" && m.Socket != socketOf(pod)
}

// markNew notes of the members of the next list which of them were not in the one before, with that epoch, or are back
// after they left.
//
// One that comes to others that hold bytes asks them first; in a tier that is empty, such as a new Dataset's, that would
// only be a detour. Where writes are acknowledged before the bucket has them, every one that comes back is marked: the
// others went on without what it held, which must not count any more. Where it is not known who was there before, since
// the list was deleted or made unreadable, nobody is: what all of them hold would not count, and be lost.
func markNew(before uint64, had map[string]ring.Member, next ring.Membership, cached, back bool) {
	if before == 0 || !cached && !back {
		return
	}
	for i := range next.Members {
		m := &next.Members[i]
		if _, was := had[m.ID]; !was {
			m.Joined = next.Epoch
		}
	}
}

// list is the ConfigMap with the list that was written last; nil where there is none.
func (r *Reconciler) list(ctx context.Context, p *pass) (*corev1.ConfigMap, error) {
	cm := &corev1.ConfigMap{}
	err := r.client.Get(ctx, client.ObjectKey{Namespace: p.dataset.Namespace, Name: v1alpha1.TierName(p.dataset.Name)}, cm)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	return cm, err
}

// written is the list that was written last.
func (r *Reconciler) written(ctx context.Context, p *pass) (ring.Membership, error) {
	have, err := r.list(ctx, p)
	if err != nil {
		return ring.Membership{}, err
	}
	return p.parse(have), nil
}

// parse gives the list that a ConfigMap has; empty, with epoch 0, where there is none.
func (p *pass) parse(cm *corev1.ConfigMap) ring.Membership {
	if cm == nil {
		return ring.Membership{}
	}
	m, err := ring.Parse([]byte(cm.Data[v1alpha1.KeyMembership]))
	if err != nil {
		// Somebody wrote it by hand: it is made anew.
		p.warn("MembershipInvalid", "WriteMembership", "config map %q: %v; it is written anew", cm.Name, err)
		return ring.Membership{}
	}
	if m.Members == nil {
		m.Members = []ring.Member{}
	}
	return m
}

// lately says whether a worker that does not serve did so until a moment ago.
func (p *pass) lately(id string) bool {
	since, ok := p.absent[id]
	if !ok {
		since = p.now
		p.absent[id] = since
	}
	left := since.Add(absentAfter).Sub(p.now)
	if left > 0 && (p.again == 0 || p.again > left) {
		p.again = left
	}
	return left > 0
}

func (r *Reconciler) member(pod *corev1.Pod) ring.Member {
	m := ring.Member{
		ID: pod.Name, Node: pod.Spec.NodeName,
		Addr:    net.JoinHostPort(pod.Status.PodIP, strconv.Itoa(v1alpha1.PortData)),
		Control: controlOf(pod),
	}
	if r.Store == StoreCSI {
		m.Socket = socketOf(pod)
	}
	return m
}

func controlOf(pod *corev1.Pod) string {
	return net.JoinHostPort(pod.Status.PodIP, strconv.Itoa(v1alpha1.PortControl))
}

func socketOf(pod *corev1.Pod) string {
	return v1alpha1.NodeSocketDir(string(pod.UID)) + "/" + v1alpha1.SocketName
}

// putMembership writes the list in the place of the one that it was made after. Where another, which the cache did not
// have yet, is there by now, that is a conflict: there would be two lists of one epoch.
func (r *Reconciler) putMembership(ctx context.Context, p *pass, have *corev1.ConfigMap) error {
	list, err := json.Marshal(p.members)
	if err != nil {
		return err
	}
	folder, err := json.Marshal(tier.Folder{Dataset: p.name(), Copies: int(p.dataset.Spec.Workers.Copies)})
	if err != nil {
		return err
	}
	return r.apply(ctx, p, wasRead{r.client, have}, v1alpha1.ConditionWorkersReady, &corev1.ConfigMap{
		ObjectMeta: p.object(v1alpha1.TierName(p.dataset.Name), v1alpha1.ComponentWorker),
		Data:       map[string]string{v1alpha1.KeyMembership: string(list), v1alpha1.KeyTier: string(folder)},
	})
}

// wasRead gives what was read before, not what is there by now.
type wasRead struct {
	client.Reader
	have *corev1.ConfigMap // nil: there was none
}

func (w wasRead) Get(_ context.Context, key client.ObjectKey, into client.Object, _ ...client.GetOption) error {
	if w.have == nil {
		return apierrors.NewNotFound(corev1.Resource("configmaps"), key.Name)
	}
	w.have.DeepCopyInto(into.(*corev1.ConfigMap))
	return nil
}

// control reaches the workers of the pass's membership.
func (r *Reconciler) control(p *pass) (*tierclient.Control, error) {
	return tierclient.NewControl(tierclient.ControlConfig{
		Dataset: p.name(), Membership: p.members, Keys: p.keys, Timeout: askTimeout, Dialer: r.Dial,
	})
}

// ask asks every worker for its status.
func (r *Reconciler) ask(ctx context.Context, p *pass) error {
	p.status, p.missing = make(map[string]wire.WorkerStatus), make(map[string]error)
	p.heard = make(map[string]bool)
	if len(p.members.Members) == 0 {
		return nil
	}
	k, err := r.control(p)
	if err != nil {
		return err
	}
	defer k.Close()
	all, err := k.Status(ctx)
	var miss *tierclient.Missing
	switch {
	case errors.As(err, &miss):
		p.missing = miss.Errors
	case err != nil:
		return err
	}
	for _, s := range all {
		p.status[s.ID], p.heard[s.ID] = s, true
		p.epoch = max(p.epoch, s.Epoch)
	}
	return nil
}

// tell gives the membership to the workers that follow an older one, which is quicker than the kubelet's
// update of the mounted file. Readers learn of it from the workers' replies.
func (r *Reconciler) tell(ctx context.Context, p *pass) error {
	behind := false
	for _, s := range p.status {
		behind = behind || s.Epoch < p.members.Epoch
	}
	if !behind {
		return nil
	}
	k, err := r.control(p)
	if err != nil {
		return err
	}
	defer k.Close()
	p.again = r.Poll / 5
	if err := k.Tell(ctx); err != nil {
		var miss *tierclient.Missing
		if !errors.As(err, &miss) {
			return err
		}
		// Who does not answer is reported by workersReady, and reads the file.
	}
	return nil
}
