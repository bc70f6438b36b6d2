package webhook

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Cluster is what the webhook knows of the cluster, all of it in memory. What is not there is not an error
// but false; an error means that the answer is not known.
type Cluster interface {
	// Datasets are those of a namespace. They must not be changed.
	Datasets(ctx context.Context, namespace string) ([]*v1alpha1.Dataset, error)
	// NamespaceLabels are the labels of a namespace; nil if there is no such namespace.
	NamespaceLabels(ctx context.Context, namespace string) (map[string]string, error)
	// NodeService says whether any node has a ready node service.
	NodeService(ctx context.Context) (bool, error)
}

// Injector gives pods their data.
type Injector struct {
	Cluster Cluster
	// Image is that of the containers it adds, and PullPolicy says when it is pulled; empty: the cluster's
	// default.
	Image      string
	PullPolicy corev1.PullPolicy
	// PullSecrets are added to the pod's own imagePullSecrets where it gets containers: names of Secrets in the
	// pod's namespace, which the kubelet passes over where they are not there.
	PullSecrets []string
	// StageLimit is the size in bytes up to which a Dataset is staged whole.
	StageLimit int64
	// NewID makes the name of a pod's folder of mounts on its node: no two pods may share one.
	NewID func() string
}

// denied is an error for the author of a pod.
type denied struct{ error }

func deny(format string, a ...any) error { return denied{fmt.Errorf(format, a...)} }

// need is a Dataset that a pod reads.
type need struct {
	dataset *v1alpha1.Dataset
	// volumes are the indexes of the pod's volumes that are this Dataset's; claims of others that it replaces
	// are among them.
	volumes []int
	// at is where AnnotationMounts wants it, in every container.
	at []string
	// keys are the artifacts that it loads from the Dataset's S3 endpoint.
	keys []string
}

func (n *need) String() string { return n.dataset.Namespace + "/" + n.dataset.Name }

// Inject gives a pod that asks for it its data, and returns what it reads. An error that is a denial is for
// the pod's author.
func (j *Injector) Inject(ctx context.Context, namespace string, p *patch) (needs []*need, warnings []string, err error) {
	asked, ok, err := asks(p.pod)
	if err != nil {
		return nil, nil, denied{err}
	}
	if !ok {
		return nil, nil, nil
	}
	if done, err := injected(p.pod); done || err != nil {
		return nil, nil, err
	}
	if needs, err = j.needs(ctx, namespace, p.pod); err != nil {
		return nil, nil, err
	}
	if len(needs) == 0 {
		if _, ours := p.pod.Labels[v1alpha1.LabelInject]; ours {
			warnings = append(warnings, fmt.Sprintf("label %s is set, but no volume uses the claim of a Dataset of namespace %s and annotation %s is absent: the pod gets no data",
				v1alpha1.LabelInject, namespace, v1alpha1.AnnotationMounts))
		}
		return nil, warnings, nil
	}
	labels, err := j.Cluster.NamespaceLabels(ctx, namespace)
	if err != nil {
		return nil, nil, err
	}
	nodeService, err := j.Cluster.NodeService(ctx)
	if err != nil {
		return nil, nil, err
	}
	m, err := choose(asked, p.pod, namespace, labels, nodeService)
	if err != nil {
		return nil, nil, denied{err}
	}
	if m == csi && !nodeService {
		warnings = append(warnings, "no node has a ready node service: the pod waits until one has, or use the mode sidecar or stage")
	}
	for _, n := range needs {
		if err := permitted(n.dataset, namespace, m); err != nil {
			return nil, nil, err
		}
		for _, i := range n.volumes {
			c := p.pod.Spec.Volumes[i].PersistentVolumeClaim
			if c == nil || c.ClaimName == v1alpha1.ClaimName(n.dataset.Name) {
				continue
			}
			if err := replaceable(n.dataset, c.ClaimName); err != nil {
				return nil, nil, err
			}
		}
	}
	switch m {
	case csi:
		err = j.viaClaim(namespace, p, needs)
	case sidecar:
		if lends(p.pod, labels, nodeService) {
			err = j.viaLent(p, needs)
		} else {
			err = j.viaSidecar(p, needs)
		}
	case stage:
		var more []string
		more, err = j.viaStage(namespace, p, needs)
		warnings = append(warnings, more...)
	}
	if err != nil {
		return nil, nil, err
	}
	p.annotate(AnnotationInjected, string(m))
	if m != csi {
		p.label(v1alpha1.LabelReader, "true")
		p.pullSecrets(j.PullSecrets)
		pastMesh(p)
	}
	return needs, warnings, nil
}

// Replace gives a pod that asks for nothing the claims of Datasets for those that they replace. It does
// so only where the claims can be mounted and the Datasets serve.
func (j *Injector) Replace(ctx context.Context, namespace string, p *patch) (warnings []string, err error) {
	if _, ok, err := asks(p.pod); ok || err != nil {
		return nil, nil // Inject's
	}
	replaced, err := j.claims(ctx, namespace)
	if err != nil {
		return nil, err
	}
	for i := range p.pod.Spec.Volumes {
		c := p.pod.Spec.Volumes[i].PersistentVolumeClaim
		if c == nil {
			continue
		}
		d := replaced[c.ClaimName]
		if d == nil || d.DeletionTimestamp != nil || c.ClaimName == v1alpha1.ClaimName(d.Name) {
			continue
		}
		if err := replaceable(d, c.ClaimName); err != nil {
			warnings = append(warnings, err.Error()+": the pod keeps the claim that it has")
			continue
		}
		if ok, err := j.Cluster.NodeService(ctx); err != nil || !ok {
			return warnings, err // the claim that the pod has works; ours would not
		}
		labels, err := j.Cluster.NamespaceLabels(ctx, namespace)
		if err != nil {
			return warnings, err
		}
		if serverless(p.pod, labels) {
			warnings = append(warnings, fmt.Sprintf("claim %s is not replaced by Dataset %s/%s, whose volume cannot be on a serverless node: the pod keeps the claim that it has; with label %s: auto it gets the Dataset there",
				c.ClaimName, d.Namespace, d.Name, v1alpha1.LabelInject))
			continue
		}
		if windows(p.pod) {
			warnings = append(warnings, fmt.Sprintf("claim %s is not replaced by Dataset %s/%s, whose volume cannot be on a Windows node: the pod keeps the claim that it has", c.ClaimName, d.Namespace, d.Name))
			continue
		}
		if !serves(d, time.Now()) {
			warnings = append(warnings, fmt.Sprintf("claim %s is not replaced by Dataset %s/%s, which is %s and serves nobody now: the pod keeps the claim that it has; kubectl describe dset %s says why",
				c.ClaimName, d.Namespace, d.Name, cmp.Or(d.Status.Phase, v1alpha1.DatasetPending), d.Name))
			continue
		}
		p.source(i, volumeOf(namespace, p, d))
		p.annotate(AnnotationInjected, string(csi))
	}
	return warnings, nil
}

// servedLately is how long a Dataset that served may be without a worker: its only one is moved, say, or was too busy to
// answer the controller. Pods wait for it in that time.
const servedLately = 2 * time.Minute

// serves says whether pods that mount the Dataset can start. A Dataset of which a worker is moved or missing, or whose
// bucket does not answer, is Degraded: the other workers serve, and what is cached.
func serves(d *v1alpha1.Dataset, now time.Time) bool {
	switch d.Status.Phase {
	case v1alpha1.DatasetReady, v1alpha1.DatasetDegraded:
		return true
	case v1alpha1.DatasetPending:
		ready := meta.FindStatusCondition(d.Status.Conditions, v1alpha1.ConditionReady)
		return d.Status.Snapshot != "" && !claimTaken(d) && ready != nil && now.Sub(ready.LastTransitionTime.Time) < servedLately
	}
	return false
}

// kept says whether the pod has no more of the Dataset than claims that were not replaced: it reads nothing of it.
func kept(pod *corev1.Pod, n *need) bool {
	return !slices.ContainsFunc(n.volumes, func(i int) bool {
		c := pod.Spec.Volumes[i].PersistentVolumeClaim
		return c == nil || c.ClaimName == v1alpha1.ClaimName(n.dataset.Name)
	})
}

// replaceable says why pods cannot get the Dataset in the place of a claim: who has written to the claim so
// far would fail halfway, since a Dataset's mount is read-only also where the tier accepts puts.
func replaceable(d *v1alpha1.Dataset, claim string) error {
	if d.Spec.Access == v1alpha1.ReadWrite {
		return deny("claim %s cannot be replaced by Dataset %s/%s, which has access: ReadWrite and whose claim is read-only all the same: take the claim out of spec.replaces and write through the Dataset's S3 endpoint, or let a Dataset with access: ReadOnly replace it",
			claim, d.Namespace, d.Name)
	}
	return nil
}

// injected says whether the pod was patched before.
func injected(pod *corev1.Pod) (bool, error) {
	_, says := pod.Annotations[AnnotationInjected]
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if !slices.Contains([]string{keeperName, sidecarName, stageName}, c.Name) {
			continue
		}
		if !says {
			return false, deny("the name %s of a container is the webhook's own: give the container another", c.Name)
		}
		return true, nil
	}
	return false, nil
}

// claims maps the claims of a namespace to the Datasets that pods get for them.
func (j *Injector) claims(ctx context.Context, namespace string) (map[string]*v1alpha1.Dataset, error) {
	all, err := j.Cluster.Datasets(ctx, namespace)
	if err != nil {
		return nil, err
	}
	m := make(map[string]*v1alpha1.Dataset)
	for _, d := range all {
		for _, r := range d.Spec.Replaces {
			// Validation refuses a second Dataset that replaces the claim; the older one has it anyway.
			if o := m[r.ClaimName]; o == nil || d.CreationTimestamp.Before(&o.CreationTimestamp) {
				m[r.ClaimName] = d
			}
		}
	}
	for _, d := range all {
		if !claimTaken(d) {
			m[v1alpha1.ClaimName(d.Name)] = d
		}
	}
	return m, nil
}

// claimTaken says whether the claim of the Dataset's name is somebody else's: pods that mount it keep it, and nobody gets
// it for the Dataset's data.
func claimTaken(d *v1alpha1.Dataset) bool {
	c := meta.FindStatusCondition(d.Status.Conditions, v1alpha1.ConditionVolumeReady)
	return c != nil && c.Status == metav1.ConditionFalse && c.Reason == v1alpha1.ReasonNameTaken
}

// needs finds what the pod reads, in the order of its volumes and its annotation.
func (j *Injector) needs(ctx context.Context, namespace string, pod *corev1.Pod) ([]*need, error) {
	claims, err := j.claims(ctx, namespace)
	if err != nil {
		return nil, err
	}
	var needs []*need
	of := func(d *v1alpha1.Dataset) *need {
		i := slices.IndexFunc(needs, func(n *need) bool {
			return n.dataset.Name == d.Name && n.dataset.Namespace == d.Namespace
		})
		if i < 0 {
			i, needs = len(needs), append(needs, &need{dataset: d})
		}
		return needs[i]
	}
	find := func(name types.NamespacedName) (*v1alpha1.Dataset, error) {
		all, err := j.Cluster.Datasets(ctx, name.Namespace)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(all, func(d *v1alpha1.Dataset) bool { return d.Name == name.Name })
		if i >= 0 && (name.Namespace == namespace || all[i].SharesWith(namespace)) {
			return all[i], nil
		}
		if name.Namespace != namespace {
			// One answer for both, so that nobody learns what there is in another namespace.
			return nil, deny("there is no Dataset %s that is shared with namespace %s: its owner adds the namespace to spec.shareWith", name, namespace)
		}
		var names []string
		for _, d := range all {
			names = append(names, d.Name)
		}
		slices.Sort(names)
		return nil, deny("namespace %s has no Dataset %q: create it, or correct annotation %s (there is: %s)",
			namespace, name.Name, v1alpha1.AnnotationMounts, listed(names))
	}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		switch {
		case v.PersistentVolumeClaim != nil:
			if d := claims[v.PersistentVolumeClaim.ClaimName]; d != nil {
				n := of(d)
				n.volumes = append(n.volumes, i)
			}
		case v.CSI != nil && v.CSI.Driver == v1alpha1.DriverName:
			a := v.CSI.VolumeAttributes
			if kind := a[v1alpha1.AttributeVolume]; kind != "" && kind != v1alpha1.VolumeDataset {
				continue
			}
			name := types.NamespacedName{Namespace: a[v1alpha1.AttributeNamespace], Name: a[v1alpha1.AttributeDataset]}
			if name.Namespace == "" {
				name.Namespace = namespace
			}
			d, err := find(name)
			if err != nil {
				return nil, err
			}
			n := of(d)
			n.volumes = append(n.volumes, i)
		}
	}
	value, ok := pod.Annotations[v1alpha1.AnnotationMounts]
	if !ok {
		return needs, nil
	}
	mounts, err := parseMounts(value, namespace)
	if err != nil {
		return nil, denied{err}
	}
	for _, m := range mounts {
		d, err := find(m.dataset)
		if err != nil {
			return nil, err
		}
		n := of(d)
		n.at = append(n.at, m.path)
	}
	return needs, nil
}

func listed(names []string) string {
	switch {
	case len(names) == 0:
		return "none"
	case len(names) > 10:
		return strings.Join(names[:10], ", ") + " and others"
	}
	return strings.Join(names, ", ")
}

// permitted says why a pod of the namespace cannot get the Dataset in the mode.
func permitted(d *v1alpha1.Dataset, namespace string, m mode) error {
	name := d.Namespace + "/" + d.Name
	switch {
	case d.DeletionTimestamp != nil:
		return deny("Dataset %s is being deleted and takes no new pods", name)
	case m == csi:
		return nil
	case d.Namespace != namespace:
		return deny("Dataset %s is of another namespace, which the mode %s cannot read since its keys are there: use the mode csi, or a Dataset of this namespace with the source dataset://%s", name, m, name)
	case m == stage && d.Spec.Access == v1alpha1.ReadWrite:
		return deny("Dataset %s has access: ReadWrite and so no listing that the mode %s could copy: use the mode csi or sidecar", name, m)
	}
	return nil
}

// viaClaim gives the pod claims, or for Datasets of other namespaces inline volumes of the driver.
func (j *Injector) viaClaim(namespace string, p *patch, needs []*need) error {
	byClaim := func(i int) bool { return p.pod.Spec.Volumes[i].PersistentVolumeClaim != nil }
	for _, n := range needs {
		if n.dataset.Namespace == namespace && claimTaken(n.dataset) && (len(n.volumes) == 0 || slices.ContainsFunc(n.volumes, byClaim)) {
			return deny("Dataset %s has no claim that pods could mount, since claim %s is somebody else's: make the Dataset under another name, or use the mode sidecar or stage", n, v1alpha1.ClaimName(n.dataset.Name))
		}
	}
	return j.give(p, needs, func(n *need, i int) {
		v := &p.pod.Spec.Volumes[i]
		if c := v.PersistentVolumeClaim; c != nil && c.ClaimName != v1alpha1.ClaimName(n.dataset.Name) {
			p.source(i, volumeOf(namespace, p, n.dataset))
		}
	}, func(n *need) corev1.VolumeSource { return volumeOf(namespace, p, n.dataset) })
}

// volumeOf is the claim of a Dataset, or an inline volume of the driver where the Dataset is of another namespace or the
// pod has the claim already: before Kubernetes 1.35 the kubelet waits for ever for the second of two volumes of one
// claim (github.com/kubernetes/kubernetes issue 132921).
func volumeOf(namespace string, p *patch, d *v1alpha1.Dataset) corev1.VolumeSource {
	secret := v1alpha1.ReaderName(d.Name)
	if d.Namespace != namespace {
		secret = v1alpha1.SharedReaderName(d.Namespace, d.Name)
	} else if name := v1alpha1.ClaimName(d.Name); !slices.ContainsFunc(p.pod.Spec.Volumes, func(v corev1.Volume) bool {
		return v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == name
	}) {
		return corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name, ReadOnly: true}}
	}
	// A claim's volume has this affinity of its own; an inline one does not, and would wait for ever.
	p.require(v1alpha1.NodesForPods()...)
	readOnly := true
	return corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
		Driver: v1alpha1.DriverName, ReadOnly: &readOnly,
		// The kubelet hands the key over; it takes it from the pod's own namespace only.
		NodePublishSecretRef: &corev1.LocalObjectReference{Name: secret},
		VolumeAttributes: map[string]string{
			v1alpha1.AttributeVolume:    v1alpha1.VolumeDataset,
			v1alpha1.AttributeNamespace: d.Namespace,
			v1alpha1.AttributeDataset:   d.Name,
		},
	}}
}

// give lets old change each volume that the pod has of a Dataset, and adds a volume where the annotation
// wants one and there is none; then it mounts them where the annotation says.
func (j *Injector) give(p *patch, needs []*need, old func(*need, int), source func(*need) corev1.VolumeSource) error {
	for _, n := range needs {
		for _, i := range n.volumes {
			old(n, i)
		}
		if len(n.at) == 0 {
			continue
		}
		var name string
		if len(n.volumes) > 0 {
			name = p.pod.Spec.Volumes[n.volumes[0]].Name
		} else {
			name = freeName(p.pod, "stepcache-"+n.dataset.Name)
			n.volumes = append(n.volumes, len(p.pod.Spec.Volumes))
			p.volume(corev1.Volume{Name: name, VolumeSource: source(n)})
		}
		for _, at := range n.at {
			if err := mountEverywhere(p, n, name, at); err != nil {
				return err
			}
		}
	}
	return nil
}

// freeName is the name, or with a number behind it where the pod has a volume of that name.
func freeName(pod *corev1.Pod, name string) string {
	for i := 1; ; i++ {
		free := name
		if i > 1 {
			free = fmt.Sprintf("%s-%d", name, i)
		}
		if !slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == free }) {
			return free
		}
	}
}

// mountEverywhere mounts a volume at the path in every container that is the user's.
func mountEverywhere(p *patch, n *need, volume, at string) error {
	for _, c := range p.containers() {
		if argoOwn(p.pod, c) {
			continue
		}
		has := false
		for _, m := range c.VolumeMounts {
			switch old := path.Clean(m.MountPath); {
			case old == at && m.Name == volume && m.SubPath == "" && m.SubPathExpr == "":
				has = true
			case old == at:
				return deny("annotation %s wants Dataset %s at %s, where container %s already mounts volume %s: choose another path", v1alpha1.AnnotationMounts, n, at, c.Name, m.Name)
			case below(at, old):
				return deny("annotation %s wants Dataset %s at %s, but container %s mounts volume %s below it, at %s, and a Dataset is read-only: choose another path", v1alpha1.AnnotationMounts, n, at, c.Name, m.Name, m.MountPath)
			case below(old, at) && m.ReadOnly:
				return deny("annotation %s wants Dataset %s at %s, but container %s mounts volume %s read-only above it, at %s: choose another path", v1alpha1.AnnotationMounts, n, at, c.Name, m.Name, m.MountPath)
			}
		}
		if !has {
			p.mount(c, corev1.VolumeMount{Name: volume, MountPath: at, ReadOnly: true})
		}
	}
	return nil
}

// argoOwn says whether a container is Argo's, not the step's.
func argoOwn(pod *corev1.Pod, c container) bool {
	if _, argo := pod.Labels[argoWorkflow]; !argo {
		return false
	}
	return c.Name == "wait" || c.Name == "supervisor" || c.init && c.Name == "init" ||
		c.init && strings.HasPrefix(c.Name, "init-artifact-") || strings.HasPrefix(c.Name, "artifact-plugin-")
}

var errNoImage = errors.New("the webhook was started without --image: it cannot add containers to pods")
