package dataset

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
)

// Reasons of the condition Flushed.
const (
	ReasonFlushed           = "Flushed"
	ReasonPending           = "Pending"           // the bucket is being brought what it does not have yet
	ReasonBucketUnavailable = "BucketUnavailable" // and does not take it
	ReasonUnflushed         = "Unflushed"         // of Ready: deletion waits for it
)

const (
	// annotationWrite, on worker pods, is there where they acknowledge what the bucket does not have yet: such
	// pods are, for a while, also those of a Dataset that was changed to write through.
	annotationWrite = v1alpha1.Group + "/write-policy"
	// flushGrace is how long a worker that is stopped has for bringing to the bucket what it holds, a little more
	// than it takes for that by itself.
	flushGrace = 600
	// clocksDiffer is by how much those of the controller and the workers may: writes are told apart by when they
	// were put.
	clocksDiffer = time.Minute
)

// looked is what one pass learned of the writes that the bucket does not have.
type looked struct {
	epoch   uint64
	objects int64
	bytes   int64
	oldest  time.Time
	problem string
	// unasked are the workers that may hold some and could not be asked, and why.
	unasked map[string]string
	// nobody: there is no worker to ask; what it had last is what was said last.
	nobody bool
}

// back says whether workers of the Dataset may hold what the bucket does not have.
func (p *pass) back() bool {
	return HoldsWrites(p.dataset) || slices.ContainsFunc(p.pods, func(pod corev1.Pod) bool { return pod.Annotations[annotationWrite] != "" })
}

// HoldsWrites says, of a Dataset alone, whether its workers may hold what the bucket does not have.
func HoldsWrites(d *v1alpha1.Dataset) bool {
	c := meta.FindStatusCondition(d.Status.Conditions, v1alpha1.ConditionFlushed)
	return d.Spec.Write.Policy == v1alpha1.WriteBack || c != nil && c.Status != metav1.ConditionTrue
}

// AcceptsLoss says whether the user has said that what the bucket does not have may be lost for the Dataset's
// last change, its deletion among them.
func AcceptsLoss(d *v1alpha1.Dataset) bool {
	return d.Annotations[v1alpha1.AnnotationAcceptLoss] == strconv.FormatInt(d.Generation, 10)
}

// WayOut is what a user does who cannot wait for the bucket.
func WayOut(d *v1alpha1.Dataset) string {
	return fmt.Sprintf("to lose what the bucket does not have: kubectl annotate dset -n %s %s --overwrite %s=%d", d.Namespace, d.Name, v1alpha1.AnnotationAcceptLoss, d.Generation)
}

// flushed sums up what the bucket does not have yet, and says so.
func (r *Reconciler) flushed(_ context.Context, p *pass) error {
	st := &p.dataset.Status
	if !p.back() {
		p.looks[0], p.looks[1] = nil, nil
		st.Unflushed = v1alpha1.Unflushed{}
		meta.RemoveStatusCondition(&st.Conditions, v1alpha1.ConditionFlushed)
		return nil
	}
	now := p.look()
	p.looks[0], p.looks[1] = p.looks[1], now
	if len(now.unasked) == 0 || now.bytes > st.Unflushed.Bytes || now.objects > st.Unflushed.Objects {
		st.Unflushed = v1alpha1.Unflushed{Objects: now.objects, Bytes: now.bytes}
		if !now.oldest.IsZero() {
			st.Unflushed.Oldest = &metav1.Time{Time: now.oldest.Truncate(time.Second)}
		}
	}
	switch text := now.String(); {
	case now.problem != "":
		p.condition(v1alpha1.ConditionFlushed, metav1.ConditionFalse, ReasonBucketUnavailable, "%s", forPeople(p.dataset, text))
		p.warn(ReasonBucketUnavailable, "Flush", "what was written is not in the bucket yet: %s", forPeople(p.dataset, now.problem))
	case !now.nobody && (now.objects > 0 || now.bytes > 0):
		p.condition(v1alpha1.ConditionFlushed, metav1.ConditionFalse, ReasonPending, "%s", text)
	case len(now.unasked) > 0 || now.nobody:
		p.condition(v1alpha1.ConditionFlushed, metav1.ConditionUnknown, ReasonNotAnswering, "%s", text)
	default:
		p.condition(v1alpha1.ConditionFlushed, metav1.ConditionTrue, ReasonFlushed, "the bucket has all that was written")
		p.unsay(ReasonBucketUnavailable)
	}
	return nil
}

// look sums up the workers' answers.
func (p *pass) look() *looked {
	l := &looked{epoch: p.members.Epoch, unasked: make(map[string]string)}
	for _, m := range p.members.Members {
		s, answered := p.status[m.ID]
		switch {
		case !answered && p.missing[m.ID] != nil:
			l.unasked[m.ID] = fmt.Sprintf("does not answer: %v", p.missing[m.ID])
		case !answered && len(p.keys.Control) == 0:
			l.unasked[m.ID] = fmt.Sprintf("cannot be asked: secret %q with the Dataset's keys is gone", v1alpha1.KeysName(p.dataset.Name))
		case !answered:
			l.unasked[m.ID] = "was not asked yet"
		case s.Epoch < p.members.Epoch:
			// It may not have begun yet to hold what another one did.
			l.unasked[m.ID] = "does not know yet who the workers are"
		}
	}
	for i := range p.pods {
		pod := &p.pods[i]
		if p.member(pod.Name) || !mayHold(pod) {
			continue
		}
		switch c := unreachable(p.nodes[pod.Spec.NodeName]); {
		case c != nil:
			l.unasked[pod.Name] = fmt.Sprintf("is on node %s, which does not answer (%s): bring the node back, or delete the pod if the node is gone", pod.Spec.NodeName, c.Reason)
		case !pod.DeletionTimestamp.IsZero():
			l.unasked[pod.Name] = "is being stopped, and brings to the bucket what it holds"
		default:
			l.unasked[pod.Name] = "is not one of the workers yet"
		}
	}
	for _, id := range slices.Sorted(maps.Keys(p.status)) {
		u := p.status[id].Unflushed
		l.objects += u.Objects
		l.bytes += u.Bytes
		if !u.Oldest.IsZero() && (l.oldest.IsZero() || u.Oldest.Before(l.oldest)) {
			l.oldest = u.Oldest
		}
		if l.problem == "" {
			l.problem = u.Problem
		}
	}
	if last := p.dataset.Status.Unflushed; len(p.members.Members) == 0 && len(l.unasked) == 0 && (last.Objects > 0 || last.Bytes > 0) {
		// That they are gone is no word that the bucket has it.
		l.nobody, l.objects, l.bytes = true, last.Objects, last.Bytes
		if last.Oldest != nil {
			l.oldest = last.Oldest.Time
		}
	}
	return l
}

// mayHold says whether a pod's worker has run: its memory is there as long as the pod is.
func mayHold(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodRunning || pod.Status.Phase == corev1.PodUnknown
}

// String says what the bucket lacks, and what keeps it from having it.
func (l *looked) String() string {
	var parts []string
	if l.objects > 0 || l.bytes > 0 {
		text := fmt.Sprintf("the bucket does not have %d objects yet, %s", l.objects, humanize.IBytes(uint64(max(l.bytes, 0))))
		if !l.oldest.IsZero() {
			text += ", the oldest since " + l.oldest.UTC().Format(time.RFC3339)
		}
		parts = append(parts, text)
	}
	return strings.Join(append(parts, l.troubles()...), "; ")
}

// troubles are what does not change with every write.
func (l *looked) troubles() []string {
	var parts []string
	if l.problem != "" {
		parts = append(parts, l.problem)
	}
	for _, id := range slices.Sorted(maps.Keys(l.unasked)) {
		parts = append(parts, "worker "+id+" "+l.unasked[id])
	}
	if l.nobody {
		parts = append(parts, "that is what the workers said last, and there is none to ask any more")
	}
	return parts
}

// has says whether, as far as this look knows, the bucket has all that was put before a time; the zero time: all
// that there is. The workers in without are left out.
func (l *looked) has(epoch uint64, before time.Time, without []string) bool {
	if l == nil || l.epoch != epoch {
		return false
	}
	for id := range l.unasked {
		if !slices.Contains(without, id) {
			return false
		}
	}
	if l.objects == 0 && l.bytes == 0 {
		return true
	}
	return !before.IsZero() && l.oldest.After(before.Add(clocksDiffer))
}

// safe says whether the bucket has all that was put before a time; the zero time: all that there is. It takes
// two looks, since workers are not asked at one instant: what one hands over to another between two answers is
// in neither, and is in the next.
func (p *pass) safe(before time.Time, without ...string) bool {
	return p.looks[0].has(p.members.Epoch, before, without) && p.looks[1].has(p.members.Epoch, before, without)
}

// mayStop says whether workers may go for good as far as writes are concerned: the bucket has what they had when
// they began to leave, or the user does not mind. Otherwise it says what is waited for, and comes back soon.
func (r *Reconciler) mayStop(p *pass, what string, before time.Time) bool {
	switch {
	case !p.back() || p.safe(before):
		return true
	case AcceptsLoss(p.dataset):
		if last := p.looks[1]; last != nil && last.String() != "" {
			p.warn("LossAccepted", "Flush", "%s does not wait any more, as annotation %s says: %s", what, v1alpha1.AnnotationAcceptLoss, forPeople(p.dataset, last.String()))
		}
		return true
	}
	p.soon(r.Poll / 5)
	if last := p.looks[1]; last != nil && last.String() != "" {
		parts := append([]string{what + " waits until the bucket has all that was written (condition " + v1alpha1.ConditionFlushed + " says what it lacks)"}, last.troubles()...)
		p.warn("WaitsForBucket", "Flush", "%s; %s", forPeople(p.dataset, strings.Join(parts, "; ")), WayOut(p.dataset))
	}
	return false
}

// surplusMayStop is mayStop for the workers that are too many.
func (r *Reconciler) surplusMayStop(p *pass) bool {
	before := p.scaleIn
	if slices.ContainsFunc(p.members.Members, func(m ring.Member) bool {
		return ordinal(p.dataset, m.ID) >= int(p.dataset.Spec.Workers.Replicas) && m.State != ring.Leaving
	}) {
		before = time.Time{} // it takes writes still, since none of those that stay is there
	}
	return r.mayStop(p, "scaling in", before)
}

// replaceable says whether the worker of an unreachable node may be started elsewhere: the others, who hold all that
// it does as long as fewer are lost than there are copies, have brought it to the bucket.
func (p *pass) replaceable(pod *corev1.Pod, since time.Time) bool {
	if !p.back() || AcceptsLoss(p.dataset) {
		return true
	}
	var lost []string
	for i := range p.pods {
		if name := p.pods[i].Name; unreachable(p.nodes[p.pods[i].Spec.NodeName]) != nil {
			lost = append(lost, name)
		}
	}
	return len(lost) < int(p.dataset.Spec.Workers.Copies) && !p.member(pod.Name) && p.safe(since.Add(absentAfter), lost...)
}

func (p *pass) member(id string) bool {
	return slices.ContainsFunc(p.members.Members, func(m ring.Member) bool { return m.ID == id })
}

// settle keeps the tier of a Dataset going whose deletion waits, or whose pass ended early: who its workers are, as
// pods come and go, and what they hold. Nothing is made that is not there: the namespace may be on its way out too.
func (r *Reconciler) settle(ctx context.Context, p *pass) error {
	var err error
	if p.members, err = r.written(ctx, p); err != nil {
		return err
	}
	if p.members.Epoch == 0 && !p.back() {
		return nil
	}
	secret := &corev1.Secret{}
	err = r.live.Get(ctx, client.ObjectKey{Namespace: p.dataset.Namespace, Name: v1alpha1.KeysName(p.dataset.Name)}, secret)
	if client.IgnoreNotFound(err) != nil {
		return err
	}
	if p.keys, err = keysOf(secret); err != nil {
		p.keys.Control = nil
	}
	var phases []phase
	if p.members.Epoch > 0 {
		phases = append(phases, r.membership)
	}
	if len(p.keys.Control) > 0 {
		phases = append(phases, r.ask, r.tell)
	} else {
		p.heard = nil // nobody can be asked: what they said once counts no more
	}
	for _, do := range append(phases, r.flushed, r.replace) {
		var b *blocked
		if err := do(ctx, p); err != nil && !errors.As(err, &b) {
			return err
		}
	}
	return nil
}
