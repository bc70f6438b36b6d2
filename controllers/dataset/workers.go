package dataset

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/tier"
)

const (
	// handOverWithin bounds how long a leaving worker is waited for.
	handOverWithin = 15 * time.Minute
	// unreachableAfter is how long neither a node nor its workers may answer before they are replaced: they hold nothing
	// that the bucket does not.
	unreachableAfter = 2 * time.Minute
	// annotationWorker, on worker pods, is the hash of what the user decided about them. Pods that carry
	// another one than is wanted are replaced, one at a time; what a new version of the controller changes
	// of the template is not part of it.
	annotationWorker = v1alpha1.Group + "/worker"
)

// workerConfig is the configuration of the Dataset's workers. What a worker would refuse is an error here: a
// condition says it better than a pod that ends again and again.
func (r *Reconciler) workerConfig(d *v1alpha1.Dataset) (worker.Config, error) {
	c, err := tier.WorkerConfig(d, credentialsDir)
	if err != nil {
		return c, err
	}
	c.Dir, c.KeysDir, c.MembershipFile = storeDir, keysDir, path.Join(tierDir, v1alpha1.KeyMembership)
	c.Listen, c.Control = fmt.Sprintf(":%d", v1alpha1.PortData), fmt.Sprintf(":%d", v1alpha1.PortControl)
	if r.Store == StoreCSI {
		c.Socket = path.Join(socketDir, v1alpha1.SocketName)
	}
	gatewayConfig(d, &c)
	check := c
	check.ID = "any" // each worker's own
	if err := check.Validate(); err != nil {
		return c, fmt.Errorf("dataset %s: %w", c.Dataset, err)
	}
	return c, nil
}

// config writes the workers' configuration, which they share.
func (r *Reconciler) config(ctx context.Context, p *pass) error {
	c, err := r.workerConfig(p.dataset)
	if err != nil {
		return err
	}
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	asked := []any{
		string(b), p.dataset.Spec.Workers.MemoryBytes(), p.dataset.Spec.Workers.Template, r.Store,
		p.dataset.Annotations[v1alpha1.AnnotationRollout],
	}
	// What is not asked for must not change the hash of pods from before.
	if q := p.dataset.Spec.Workers.CPU; q != nil {
		asked = append(asked, q.MilliValue())
	}
	if q := p.dataset.Spec.Workers.CPULimit; q != nil {
		asked = append(asked, "limit", q.MilliValue())
	}
	wanted, err := hashOf(asked)
	if err != nil {
		return err
	}
	if err := r.apply(ctx, p, r.client, v1alpha1.ConditionWorkersReady, &corev1.ConfigMap{
		ObjectMeta: p.object(v1alpha1.WorkersName(p.dataset.Name), v1alpha1.ComponentWorker),
		Data:       map[string]string{configFile: string(b)},
	}); err != nil {
		return err
	}
	p.wanted = wanted // no sooner: none leaves for what cannot come
	return nil
}

// rolling is the member that leaves for a new template, one at a time. All that have it already must be ready, so that
// one which breaks workers stops at the first. Those with the old one that are not ready leave first, since it may be what
// ails them, and the others while all serve.
func (p *pass) rolling(had map[string]ring.Member) string {
	if p.wanted == "" {
		return "" // of one that is being deleted, or cannot go on, no worker is replaced
	}
	replicas := int(p.dataset.Spec.Workers.Replicas)
	fine, ready, unready := 0, "", ""
	for i := range p.pods {
		pod := &p.pods[i]
		if ordinal(p.dataset, pod.Name) >= replicas || !p.serves(pod) {
			continue
		}
		if p.stale(pod) || podReady(pod) {
			fine++
		}
		switch {
		case !p.stale(pod):
		case had[pod.Name].State == ring.Leaving:
			return pod.Name
		case podReady(pod):
			ready = pod.Name
		default:
			unready = pod.Name
		}
	}
	if fine < replicas {
		return ""
	}
	return cmp.Or(unready, ready)
}

// read says whether somebody may read from a worker: one that is not ready gives what it holds all the same, unless it
// does not answer.
func (p *pass) read(pod *corev1.Pod) bool {
	return podReady(pod) || p.serves(pod) && p.status[pod.Name].Cached > 0
}

// alone says whether the only worker there is has nobody to hand over to, nor will have: there is to be one, or no node has
// room for the others beside it, which ask for what is wanted already.
func (p *pass) alone() bool {
	others := int(p.dataset.Spec.Workers.Replicas) - 1
	for i := range p.pods {
		if pod := &p.pods[i]; ordinal(p.dataset, pod.Name) < int(p.dataset.Spec.Workers.Replicas) && !p.stale(pod) && unscheduled(pod) != nil {
			others--
		}
	}
	return others <= 0 && len(p.members.Members) <= 1
}

func (p *pass) stale(pod *corev1.Pod) bool { return pod.Annotations[annotationWorker] != p.wanted }

// workers keeps the StatefulSet, which starts all pods at once and stops one only when told to: pods with an
// old template are deleted here, and the number of replicas goes down here, both after hand-over.
func (r *Reconciler) workers(ctx context.Context, p *pass) error {
	d := p.dataset
	image, replicas := r.Image, d.Spec.Workers.Replicas
	if p.set != nil {
		if p.set.Annotations[v1alpha1.AnnotationRollout] == d.Annotations[v1alpha1.AnnotationRollout] && len(p.set.Spec.Template.Spec.Containers) > 0 {
			// An upgrade of the controller leaves workers alone until the user asks.
			image = p.set.Spec.Template.Spec.Containers[0].Image
		}
		switch have := ptr.Deref(p.set.Spec.Replicas, 1); {
		case have <= replicas:
			p.scaleIn = time.Time{}
		case p.scaleIn.IsZero():
			p.scaleIn = p.now
			fallthrough
		default:
			if !r.surplusMayStop(p) || !p.handedOver(replicas) {
				replicas = have
				p.again = r.Poll / 5
			}
		}
	}
	labels := selector(d)
	template := corev1.PodTemplateSpec{Spec: r.podSpec(p, image)}
	template.Labels, template.Annotations = podMeta(d)
	meta := p.object(v1alpha1.WorkersName(d.Name), v1alpha1.ComponentWorker)
	maps.Copy(template.Labels, meta.Labels)
	if upstreams(d) > 0 {
		template.Labels[v1alpha1.LabelReader] = "true" // for the policies of those
	}
	template.Annotations[annotationWorker] = p.wanted
	if d.Spec.Write.Policy == v1alpha1.WriteBack {
		template.Annotations[annotationWrite] = string(v1alpha1.WriteBack)
	}
	meta.Annotations = map[string]string{v1alpha1.AnnotationRollout: d.Annotations[v1alpha1.AnnotationRollout]}
	set := &appsv1.StatefulSet{ObjectMeta: meta, Spec: appsv1.StatefulSetSpec{
		ServiceName: v1alpha1.WorkersName(d.Name), Replicas: &replicas, Template: template,
		Selector:            &metav1.LabelSelector{MatchLabels: labels},
		PodManagementPolicy: appsv1.ParallelPodManagement,
		UpdateStrategy:      appsv1.StatefulSetUpdateStrategy{Type: appsv1.OnDeleteStatefulSetStrategyType},
	}}
	if err := r.apply(ctx, p, r.client, v1alpha1.ConditionWorkersReady, set); err != nil {
		return err
	}
	p.set = set
	return r.roll(ctx, p)
}

// handedOver says whether every member that is one too many may go, and tells what is lost.
func (p *pass) handedOver(replicas int32) bool {
	var handed, dropped int64
	for _, m := range p.members.Members {
		if ordinal(p.dataset, m.ID) < int(replicas) {
			continue
		}
		if m.State == ring.Leaving && !p.mayGo(m) {
			return false
		}
		if h := p.status[m.ID].HandOver; h != nil {
			handed += h.Handed
			dropped += h.Dropped
		}
	}
	p.note("ScaledIn", "ScaleIn", "to %d workers: %s handed over, %s dropped%s", replicas, humanize.IBytes(uint64(handed)), humanize.IBytes(uint64(dropped)), p.why(dropped))
	return true
}

func (p *pass) why(dropped int64) string {
	because := "the other workers have no room"
	switch {
	case dropped == 0:
		return ""
	case writable(p.dataset):
		because = "workers of a Dataset that takes puts hand nothing over"
	}
	return " since " + because + "; they read it from the bucket again when it is asked for"
}

// mayGo says whether a leaving member has handed over what it can, or cannot.
func (p *pass) mayGo(m ring.Member) bool {
	since, ok := p.leaving[m.ID]
	if !ok {
		since = p.now
		p.leaving[m.ID] = since
	}
	pod := p.pod(m.ID)
	gone := pod == nil || !p.serves(pod)
	h := p.status[m.ID].HandOver
	done := h != nil && h.Done && h.Epoch == p.members.Epoch
	if gone || done || p.now.Sub(since) > handOverWithin {
		return true
	}
	return false
}

// roll deletes the pods that carry an old template and have handed over, or that nobody reads from.
func (r *Reconciler) roll(ctx context.Context, p *pass) error {
	state := make(map[string]ring.Member)
	for _, m := range p.members.Members {
		state[m.ID] = m
		if m.State != ring.Leaving {
			delete(p.leaving, m.ID)
		}
	}
	alone := p.alone()
	for i := range p.pods {
		pod := &p.pods[i]
		if !p.stale(pod) || !pod.DeletionTimestamp.IsZero() || ordinal(p.dataset, pod.Name) >= int(p.dataset.Spec.Workers.Replicas) {
			continue
		}
		m := state[pod.Name]
		if p.read(pod) && !alone && (m.State != ring.Leaving || !p.mayGo(m)) {
			p.again = r.Poll / 5
			continue
		}
		if mayHold(pod) && !r.mayStop(p, "a restart of workers", p.leaving[pod.Name]) {
			continue
		}
		if err := client.IgnoreNotFound(r.client.Delete(ctx, pod, client.Preconditions{UID: &pod.UID})); err != nil {
			return err
		}
		lost := ""
		if h := p.status[pod.Name].HandOver; h != nil && h.Dropped > 0 {
			lost = fmt.Sprintf("; %s dropped%s", humanize.IBytes(uint64(h.Dropped)), p.why(h.Dropped))
		}
		p.event(pod, corev1.EventTypeNormal, "WorkerUpdated", "Rollout", "worker %s is restarted with a new configuration%s", pod.Name, lost)
		p.again = r.Poll / 5
		if p.back() {
			return nil // the others are looked at again without it
		}
	}
	return nil
}

// replace removes worker pods that do not answer, on nodes that do not either, so that the set makes them elsewhere: a write-
// through worker holds nothing that the bucket does not, and of a write-back worker others hold it too until
// the bucket does. The kubelet, which would confirm the end of the pod, is the one that does not answer.
func (r *Reconciler) replace(ctx context.Context, p *pass) error {
	for i := range p.pods {
		pod := &p.pods[i]
		c := unreachable(p.nodes[pod.Spec.NodeName])
		if c == nil || p.serves(pod) {
			continue
		}
		since := c.LastTransitionTime.Time
		if absent := p.absent[pod.Name]; absent.After(since) {
			since = absent // it answered until then
		}
		if left := since.Add(unreachableAfter).Sub(p.now); left > 0 {
			if p.again == 0 || p.again > left {
				p.again = left
			}
			continue
		}
		if !p.replaceable(pod, since) {
			p.soon(r.Poll / 5)
			p.event(pod, corev1.EventTypeWarning, "WorkerUnreachable", "Replace", "node %s of worker %s does not answer; it may hold writes that the bucket does not have, so it is not replaced yet: bring the node back; %s", pod.Spec.NodeName, pod.Name, WayOut(p.dataset))
			continue
		}
		err := r.client.Delete(ctx, pod, client.GracePeriodSeconds(0), client.Preconditions{UID: &pod.UID})
		if client.IgnoreNotFound(err) != nil {
			return err
		}
		p.event(pod, corev1.EventTypeWarning, "WorkerReplaced", "Replace", "node %s does not answer since %s: worker %s is started elsewhere", pod.Spec.NodeName, c.LastTransitionTime.UTC().Format(time.RFC3339), pod.Name)
	}
	return nil
}

// secrets are the names of the Secrets that the workers read.
func secrets(d *v1alpha1.Dataset) []string {
	var names []string
	for _, m := range d.Spec.Mounts {
		name := m.ReaderSecret(d.Namespace)
		if ref := m.CredentialsSecretRef; ref != nil {
			name = ref.Name
		}
		if name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// upstreams is how many of the Dataset's mounts are of other Datasets.
func upstreams(d *v1alpha1.Dataset) (n int64) {
	for i := range d.Spec.Mounts {
		if d.Spec.Mounts[i].Scheme() == v1alpha1.SchemeDataset {
			n++
		}
	}
	return n
}

// credentialsDir is where a worker sees a Secret.
func credentialsDir(secret string) string { return path.Join(credentials, secret) }

// forPeople replaces the folders of a worker's pod in its messages by the Secrets that they show.
func forPeople(d *v1alpha1.Dataset, text string) string {
	for _, s := range secrets(d) {
		name := fmt.Sprintf("secret %q", s)
		text = strings.NewReplacer("folder "+credentialsDir(s), name, credentialsDir(s), name).Replace(text)
	}
	return text
}
