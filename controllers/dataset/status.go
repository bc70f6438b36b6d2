package dataset

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/wire"
)

// Reasons of the condition WorkersReady.
const (
	ReasonAllReady        = "AllReady"
	ReasonStarting        = "Starting"
	ReasonUnschedulable   = "Unschedulable"
	ReasonOutOfMemory     = "OutOfMemory"
	ReasonImageNotPulled  = "ImageNotPulled"
	ReasonCrashing        = "Crashing"
	ReasonNodeUnreachable = "NodeUnreachable"
	ReasonNotAnswering    = "NotAnswering"
	ReasonNotReady        = "NotReady"
	ReasonKeysInvalid     = "KeysInvalid"
	ReasonUpdating        = "Updating" // all serve, and some what the Dataset asked for before
	ReasonRefused         = "Refused"  // the API server does not allow what the Dataset needs; of Ready, WorkersReady and Shared
)

// refusedWithin is how old a refusal of a pod may be: a StatefulSet that is refused asks again after ever longer, at
// most after 1,000 seconds.
const refusedWithin = 20 * time.Minute

// refusedAgain and refusedFirst are the pauses between two looks for such, once there was one and before: an API server
// reads all Events of a namespace to find some.
const refusedAgain, refusedFirst = time.Minute, 10 * time.Second

// MaxMessage bounds a condition's message, well below what the API server takes.
const MaxMessage = 2000

// MaxNote bounds an Event's note: the API server takes no Event with more than 1,024 bytes.
const MaxNote = 1000

// Cut is text, cut to so many bytes where it is longer.
func Cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + " …"
}

func (p *pass) condition(kind string, status metav1.ConditionStatus, reason, format string, a ...any) {
	text := Cut(fmt.Sprintf(format, a...), MaxMessage)
	meta.SetStatusCondition(&p.dataset.Status.Conditions, metav1.Condition{
		Type: kind, Status: status, Reason: reason, Message: text,
		ObservedGeneration: p.dataset.Generation, LastTransitionTime: metav1.NewTime(p.now),
	})
}

// sourced takes over what the workers say of the data, and whether they reach it.
func (r *Reconciler) sourced(ctx context.Context, p *pass) error {
	st := &p.dataset.Status
	r.count(p)
	if reason, text, err := r.unreadable(ctx, p.dataset); err != nil {
		return err
	} else if text != "" {
		p.condition(v1alpha1.ConditionSourced, metav1.ConditionFalse, reason, "%s", text)
		p.warn(reason, "ReadDataset", "%s", text)
		return nil
	}
	missing, err := r.missingSecrets(ctx, p)
	if err != nil {
		return err
	}
	reason, problem := "", ""
	for _, id := range slices.Sorted(maps.Keys(p.status)) {
		if s := p.status[id]; s.Reason != "" {
			reason, problem = reasonOf(s), s.Problem
			// Who just waits for another to list says less than the one that cannot.
			if reasonOf(s) != ReasonListing {
				break
			}
		}
	}
	switch {
	case problem == "" && len(p.status) == 0 && len(missing) == 0:
		// Nobody to ask: what was known stays, unless nothing was.
		if !meta.IsStatusConditionTrue(st.Conditions, v1alpha1.ConditionSourced) {
			p.condition(v1alpha1.ConditionSourced, metav1.ConditionUnknown, ReasonNoWorker, "no worker answers yet")
		}
	case len(missing) > 0 && (problem != "" || st.Snapshot == ""):
		text := strings.Join(missing, "; ")
		p.condition(v1alpha1.ConditionSourced, metav1.ConditionFalse, ReasonCredentialsMissing, "%s", text)
		p.warn(ReasonCredentialsMissing, "ReadCredentials", "%s", text)
	case problem != "":
		text := forPeople(p.dataset, problem)
		if reason == ReasonListing {
			text = "the bucket is being listed"
		} else {
			p.warn(reason, "ReadBucket", "%s", text)
		}
		p.condition(v1alpha1.ConditionSourced, metav1.ConditionFalse, reason, "%s", text)
	case writable(p.dataset):
		p.condition(v1alpha1.ConditionSourced, metav1.ConditionTrue, ReasonReachable, "the workers reach the bucket; what it holds is asked of it when somebody asks them")
	case st.Snapshot == "":
		p.condition(v1alpha1.ConditionSourced, metav1.ConditionFalse, ReasonListing, "the bucket is being listed")
	default:
		p.condition(v1alpha1.ConditionSourced, metav1.ConditionTrue, ReasonListed, "%d files, %s", st.Files, st.Size)
	}
	if meta.IsStatusConditionTrue(st.Conditions, v1alpha1.ConditionSourced) {
		p.unsay(ReasonCredentialsMissing, ReasonAccessDenied, ReasonNoSuchBucket, ReasonUnavailable, ReasonNotShared, ReasonDatasetNotFound)
	}
	return nil
}

// unreadable says which Dataset that is a source of this one it may not read, or not any more. Of another
// namespace there is one answer for what is not there and what is not shared.
func (r *Reconciler) unreadable(ctx context.Context, d *v1alpha1.Dataset) (reason, text string, err error) {
	for i := range d.Spec.Mounts {
		name, _, ok := d.Spec.Mounts[i].Dataset()
		if !ok {
			continue
		}
		target := &v1alpha1.Dataset{}
		err := r.live.Get(ctx, name, target)
		if client.IgnoreNotFound(err) != nil {
			return "", "", err
		}
		switch there := err == nil && target.DeletionTimestamp.IsZero(); {
		case there && target.SharesWith(d.Namespace) && writable(target):
			return ReasonInvalidSpec, fmt.Sprintf("dataset %s has access: ReadWrite, and so no listing by which another could read it: mount its bucket instead", name), nil
		case there && target.SharesWith(d.Namespace):
		case name.Namespace != d.Namespace:
			return ReasonNotShared, fmt.Sprintf("there is no Dataset %s that is shared with namespace %s: its owner adds the namespace to spec.shareWith", name, d.Namespace), nil
		default:
			return ReasonDatasetNotFound, fmt.Sprintf("there is no Dataset %q in namespace %s: create it", name.Name, name.Namespace), nil
		}
	}
	return "", "", nil
}

// reasonOf is the condition's reason for a worker's problem.
func reasonOf(s wire.WorkerStatus) string {
	if strings.HasSuffix(s.Problem, wire.ListingProblem) || strings.Contains(s.Problem, wire.FollowingProblem) {
		return ReasonListing
	}
	switch s.Reason {
	case wire.Denied.String():
		return ReasonAccessDenied
	case wire.NoBucket.String():
		return ReasonNoSuchBucket
	case wire.UnknownSnapshot.String():
		return ReasonListing
	case wire.Invalid.String():
		return ReasonInvalidSpec
	}
	return ReasonUnavailable
}

// missingSecrets names the Secrets that are not there and what they should hold. It looks only while
// something is wrong, and never at what a Secret holds.
func (r *Reconciler) missingSecrets(ctx context.Context, p *pass) ([]string, error) {
	if meta.IsStatusConditionTrue(p.dataset.Status.Conditions, v1alpha1.ConditionSourced) && !slices.ContainsFunc(
		slices.Collect(maps.Values(p.status)), func(s wire.WorkerStatus) bool { return s.Reason != "" }) {
		return nil, nil
	}
	var missing []string
	for i := range p.dataset.Spec.Mounts {
		ref := p.dataset.Spec.Mounts[i].CredentialsSecretRef
		if ref == nil {
			continue
		}
		m := &metav1.PartialObjectMetadata{}
		m.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Secret"))
		err := r.live.Get(ctx, client.ObjectKey{Namespace: p.dataset.Namespace, Name: ref.Name}, m)
		switch {
		case apierrors.IsNotFound(err):
			keys := ref.Map()
			text := fmt.Sprintf("secret %q not found in namespace %s; create it with keys %s and %s", ref.Name, p.dataset.Namespace, keys["accessKeyID"], keys["accessKeySecret"])
			if !slices.Contains(missing, text) {
				missing = append(missing, text)
			}
		case err != nil:
			return nil, err
		}
	}
	return missing, nil
}

// count sums up the workers' own figures.
func (r *Reconciler) count(p *pass) {
	st := &p.dataset.Status
	if len(p.status) == 0 {
		if len(p.members.Members) == 0 { // whoever held something is gone, and does not just fail to answer
			st.Cached, st.CachedPercentage = 0, 0
		}
		return
	}
	copies := int64(max(1, p.dataset.Spec.Workers.Copies))
	var cached, source, opened int64
	var sum v1alpha1.Integrity
	var listed *wire.WorkerStatus
	lister, _ := p.members.Lister(p.name())
	for _, id := range slices.Sorted(maps.Keys(p.status)) {
		s := p.status[id]
		cached += s.Cached
		source += s.SourceBytes
		opened += s.ServedBytes + s.OpenedBytes
		sum.Verified += s.Verified
		sum.Unverified += s.Unverified
		sum.Corrupt += s.Corrupt
		sum.Refetched += s.Refetched
		if s.Snapshot != "" && (listed == nil || id == lister.ID) {
			listed = &s
		}
	}
	if writable(p.dataset) {
		// What workers of an earlier release listed is not what the bucket has.
		st.Snapshot, st.SnapshotTime, st.Files, st.Bytes, st.Size, st.Skipped, st.CachedPercentage = "", nil, 0, 0, "", nil, 0
		st.Cached, listed = cached/copies, nil
	}
	st.Integrity = sum
	if opened > 0 {
		st.HitRatio = fmt.Sprintf("%.2f", min(1, max(0, 1-float64(source)/float64(opened))))
	}
	if listed == nil {
		return
	}
	if st.Snapshot != listed.Snapshot {
		if st.Snapshot != "" {
			p.note("Refreshed", "List", "the bucket was listed again: %d files; pods that start from now on see them", listed.Files)
		}
		st.Snapshot, st.SnapshotTime = listed.Snapshot, &metav1.Time{Time: p.now}
	}
	st.Files, st.Bytes = listed.Files, listed.Bytes
	st.Size = size(listed.Bytes)
	st.Skipped = nil
	for _, why := range slices.SortedFunc(maps.Keys(listed.Skipped), func(a, b string) int {
		return cmp.Or(cmp.Compare(listed.Skipped[b], listed.Skipped[a]), cmp.Compare(a, b))
	}) {
		if len(st.Skipped) < 16 {
			st.Skipped = append(st.Skipped, v1alpha1.Skipped{Reason: why, Count: listed.Skipped[why]})
		}
	}
	st.Cached = min(cached/copies, st.Bytes)
	st.CachedPercentage = 100
	if st.Bytes > 0 {
		st.CachedPercentage = int32(float64(st.Cached) / float64(st.Bytes) * 100)
	}
}

// size is a number of bytes for people, in the units that manifests use.
func size(bytes int64) string {
	const units = "KMGTPE"
	if bytes < 1024 {
		return fmt.Sprint(bytes)
	}
	v, unit := float64(bytes), -1
	for v >= 1024 && unit < len(units)-1 {
		v /= 1024
		unit++
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + string(units[unit]) + "i"
}

// workersReady counts the workers and says of the first that does not serve what is wrong.
func (r *Reconciler) workersReady(ctx context.Context, p *pass) error {
	st := &p.dataset.Status
	replicas := p.dataset.Spec.Workers.Replicas
	for i := range p.pods {
		if made := p.pods[i].CreationTimestamp.Time; made.After(p.made) {
			p.made, p.asked, p.words = made, time.Time{}, ""
		}
	}
	st.Workers = v1alpha1.WorkersStatus{Replicas: int32(len(p.pods)), Selector: labels.SelectorFromSet(selector(p.dataset)).String()}
	reason, text := "", ""
	var of *corev1.Pod
	former := int32(0)
	for i := range p.pods {
		pod := &p.pods[i]
		if p.stale(pod) && ordinal(p.dataset, pod.Name) < int(replicas) {
			former++
		}
		why, what := r.wrong(p, pod)
		if why == "" {
			st.Workers.Ready++
			continue
		}
		if reason == "" && ordinal(p.dataset, pod.Name) < int(replicas) {
			reason, text, of = why, what, pod
		}
	}
	switch {
	case reason != "":
		p.condition(v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, reason, "%d of %d workers serve; worker %s", st.Workers.Ready, replicas, text)
		if reason != ReasonStarting && reason != ReasonNotReady {
			p.event(of, corev1.EventTypeWarning, reason, "RunWorkers", "worker %s", text)
		}
	case st.Workers.Ready < replicas:
		if words := r.podsRefused(ctx, p); words != "" {
			p.condition(v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, ReasonRefused, "%d of %d workers serve; the others get no pod: %s", st.Workers.Ready, replicas, words)
			p.warn(ReasonRefused, "RunWorkers", "workers get no pod: %s", words)
			break
		}
		p.condition(v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, ReasonStarting, "%d of %d workers serve; the others have no pod yet (see the events of StatefulSet %s)", st.Workers.Ready, replicas, v1alpha1.WorkersName(p.dataset.Name))
	default:
		if former > 0 {
			p.condition(v1alpha1.ConditionWorkersReady, metav1.ConditionFalse, ReasonUpdating, "%d of %d workers have this configuration; the others serve with the one before until they are restarted", replicas-former, replicas)
		} else {
			p.condition(v1alpha1.ConditionWorkersReady, metav1.ConditionTrue, ReasonAllReady, "%d of %d workers serve", st.Workers.Ready, replicas)
		}
		p.unsay(ReasonUnschedulable, ReasonOutOfMemory, ReasonImageNotPulled, ReasonCrashing, ReasonNodeUnreachable, ReasonNotAnswering, ReasonRefused)
	}
	return nil
}

// podsRefused is what the StatefulSet was last told when it asked for a pod in vain (a quota, a limit, the level of
// pod security), since its last pod was made; nothing when it was not. Only its Events have that, which are read as
// long as pods are missing and not watched, which would be to read all of a cluster's.
func (r *Reconciler) podsRefused(ctx context.Context, p *pass) string {
	since := p.now.Add(-refusedWithin)
	if p.made.After(since) {
		since = p.made
	}
	pause := refusedFirst
	if p.words != "" {
		pause = refusedAgain
	}
	if p.now.Sub(p.asked) < pause {
		return p.words
	}
	list := &corev1.EventList{}
	if err := r.live.List(ctx, list, client.InNamespace(p.dataset.Namespace), client.MatchingFields{"involvedObject.uid": string(p.set.UID), "reason": "FailedCreate"}); err != nil {
		// The pods are missing all the same, and are told as that.
		ctrl.LoggerFrom(ctx).Error(err, "read why workers have no pods")
		return ""
	}
	words := ""
	for i := range list.Items {
		e := &list.Items[i]
		at := e.LastTimestamp.Time
		if e.Series != nil {
			at = e.Series.LastObservedTime.Time
		} else if at.IsZero() {
			at = e.EventTime.Time
		}
		if !at.Before(since) {
			words, since = e.Message, at
		}
	}
	if strings.Contains(words, "must specify limits.cpu") { // of a quota, in a namespace without defaults
		words += ": set spec.workers.cpuLimit"
	}
	p.asked, p.words = p.now, words
	return words
}

// unscheduled is the condition that says that no node has room for a pod; nil when one has, or it was not looked yet.
func unscheduled(pod *corev1.Pod) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if c := &pod.Status.Conditions[i]; c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return c
		}
	}
	return nil
}

// wrong says why a worker does not serve, and what helps; nothing when it does.
func (r *Reconciler) wrong(p *pass, pod *corev1.Pod) (reason, text string) {
	if c := unscheduled(pod); c != nil {
		store, heap := memoryOf(p.dataset)
		alone := ""
		if p.dataset.Spec.Write.Policy == v1alpha1.WriteBack {
			alone = " and, with write policy Back, a node of its own"
		}
		return ReasonUnschedulable, fmt.Sprintf("%s: %s; a worker needs %s of memory (its cache of %s and what serves it)%s: lower spec.workers.memory or replicas, or add nodes",
			pod.Name, c.Message, size(store+heap), size(p.dataset.Spec.Workers.MemoryBytes()), alone)
	}
	if c := unreachable(p.nodes[pod.Spec.NodeName]); c != nil {
		return ReasonNodeUnreachable, fmt.Sprintf("%s: node %s does not answer (%s)", pod.Name, pod.Spec.NodeName, c.Reason)
	}
	for _, c := range pod.Status.ContainerStatuses {
		if c.Ready {
			continue
		}
		if t := c.LastTerminationState.Terminated; t != nil && t.Reason == "OOMKilled" {
			return ReasonOutOfMemory, fmt.Sprintf("%s: was killed for its memory limit of %s; raise spec.workers.memory and with it the limit, and please report it", pod.Name, limit(pod))
		}
		if w := c.State.Waiting; w != nil {
			switch w.Reason {
			case "ErrImagePull", "ImagePullBackOff", "InvalidImageName":
				return ReasonImageNotPulled, fmt.Sprintf("%s: image %s: %s", pod.Name, c.Image, cmp.Or(w.Message, w.Reason))
			case "CrashLoopBackOff":
				last := w.Message
				if t := c.LastTerminationState.Terminated; t != nil && t.Message != "" {
					last = t.Message
				}
				return ReasonCrashing, fmt.Sprintf("%s: ends again and again: %s (kubectl logs %s)", pod.Name, last, pod.Name)
			}
		}
	}
	s, answered := p.status[pod.Name]
	switch {
	case !pod.DeletionTimestamp.IsZero():
		return ReasonStarting, pod.Name + ": is being stopped"
	case pod.Status.Phase != corev1.PodRunning || pod.Status.PodIP == "":
		return ReasonStarting, pod.Name + ": its pod is starting"
	case p.missing[pod.Name] != nil:
		if !podReady(pod) {
			return ReasonStarting, pod.Name + ": its pod is starting"
		}
		return ReasonNotAnswering, fmt.Sprintf("%s: does not answer the controller: %v", pod.Name, p.missing[pod.Name])
	case answered && s.Reason != "" && !s.Serves:
		return ReasonNotReady, fmt.Sprintf("%s: %s", pod.Name, forPeople(p.dataset, s.Problem))
	case !podReady(pod):
		return ReasonNotReady, pod.Name + ": is not ready yet"
	}
	return "", ""
}

func limit(pod *corev1.Pod) string {
	q := resource.Quantity{}
	for _, c := range pod.Spec.Containers {
		q.Add(*c.Resources.Limits.Memory())
	}
	return q.String()
}

// summarize sets Ready and the phase from the other conditions.
func (p *pass) summarize() {
	st := &p.dataset.Status
	if !p.dataset.DeletionTimestamp.IsZero() {
		st.Phase = v1alpha1.DatasetDeleting
		return
	}
	const notChecked = "NotChecked"
	invalid, former := false, false
	var first *metav1.Condition
	for _, kind := range []string{v1alpha1.ConditionSourced, v1alpha1.ConditionWorkersReady, v1alpha1.ConditionVolumeReady} {
		c := meta.FindStatusCondition(st.Conditions, kind)
		if c == nil {
			p.condition(kind, metav1.ConditionUnknown, notChecked, "not looked at yet")
			c = meta.FindStatusCondition(st.Conditions, kind)
		}
		invalid = invalid || c.Reason == ReasonInvalidSpec
		former = former || c.ObservedGeneration != p.dataset.Generation
		// Where a pass ended early the one that says why stands behind those that it did not come to; and that workers are
		// replaced is nothing beside a volume that cannot be mounted.
		if c.Status != metav1.ConditionTrue && (first == nil || (first.Reason == notChecked || first.Reason == ReasonUpdating) && c.Reason != notChecked) {
			copied := *c
			first = &copied
		}
	}
	if first == nil && p.refused == nil && former {
		return // the pass ended before it came to them: what is told is still of the spec before
	}
	st.ObservedGeneration = p.dataset.Generation
	before := meta.IsStatusConditionTrue(st.Conditions, v1alpha1.ConditionReady)
	if first == nil && p.refused == nil {
		text := "the data can be read"
		if all := p.dataset.Spec.Workers.TotalBytes() / int64(max(1, p.dataset.Spec.Workers.Copies)); st.Bytes > all {
			text = fmt.Sprintf("the data can be read; of its %s the workers can hold %s at a time", st.Size, size(all))
		}
		p.condition(v1alpha1.ConditionReady, metav1.ConditionTrue, "Ready", "%s", text)
		st.Phase = v1alpha1.DatasetReady
		if !before {
			p.note("Ready", "Reconcile", "%s", text)
		}
		return
	}
	p.unsay("Ready")
	if p.refused != nil {
		// The others are as far as the pass came.
		p.condition(v1alpha1.ConditionReady, metav1.ConditionFalse, ReasonRefused, "the API server refuses what the Dataset needs; it is asked again until it allows that: %v", p.refused)
	} else {
		p.condition(v1alpha1.ConditionReady, metav1.ConditionFalse, first.Reason, "%s: %s", first.Type, first.Message)
	}
	switch {
	case invalid:
		st.Phase = v1alpha1.DatasetFailed
	case (st.Snapshot != "" || writable(p.dataset)) && st.Workers.Ready > 0 && meta.IsStatusConditionTrue(st.Conditions, v1alpha1.ConditionVolumeReady):
		st.Phase = v1alpha1.DatasetDegraded
	default:
		st.Phase = v1alpha1.DatasetPending
	}
}
