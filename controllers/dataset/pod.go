package dataset

import (
	"fmt"
	"maps"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/objects"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/tier/upstream"
)

// Where a worker's pod has its files.
const (
	configDir   = "/etc/stepcache/worker"
	configFile  = "worker.json"
	tierDir     = "/etc/stepcache/tier"
	keysDir     = "/etc/stepcache/keys"
	credentials = "/etc/stepcache/credentials"
	storeDir    = "/var/lib/stepcache"
	socketDir   = "/run/stepcache"
)

// What service meshes ask of a pod: whether to inject their proxy, and Istio also whether the node's, of its ambient mode,
// is to take the pod's connections.
const (
	injectIstio   = "sidecar.istio.io/inject"
	ambientIstio  = "istio.io/dataplane-mode"
	injectLinkerd = "linkerd.io/inject"
)

// user is who workers run as; its group owns their volumes.
const user = 65532

const mi = 1 << 20

// footprint is the memory of a worker's pod in bytes.
//
// Everything that can be charged to the pod is in it, so that a full cache is a clean "no space" and never
// an OOM kill, after which the pod could not even start again, its tmpfs being charged to it still:
//
//   - store, the size of the tmpfs: the quota, within which the store counts pages, kernel inodes, its journal and its
//     entries in the heap (1 KiB for each cached block, of small files a fifth of the quota), and room for the
//     snapshots that are kept beside it (worker.SnapshotRoom: an eighth of the quota, 64 MiB to 1 GiB; a million
//     files take 130 MB). A snapshot that does not fit is served from heap.
//   - heap, without those entries: buffers for fills and uncached reads (64 MiB to 256, a sixteenth of the quota), for
//     connections, the runtime and what the collector has not collected yet, for which there is 1/64 of the quota
//     more, and once more the room of a snapshot, which is built in heap when the bucket is listed: one that takes more
//     than there is memory for is not made, and a problem of the worker tells how much memory it wants. GOMEMLIMIT is set
//     below it, and moved by the store as its entries grow, so that the collector works harder before the kernel kills.
//
// TestAFullCacheIsNeverAnOOMKill holds a real worker to it in a control group: of 449 MiB at a quota of 64 MiB
// it held 234 at most, of 1,552 MiB at 1 GiB 1,200.
func footprint(quota int64) (store, heap int64) {
	room := worker.SnapshotRoom(quota)
	return quota + room, 256*mi + quota/64 + room
}

// memoryOf is the footprint of the Dataset's workers: with other Datasets as sources they also hold those'
// snapshots and what is on its way from them; those that take puts hold what is on its way to the bucket.
func memoryOf(d *v1alpha1.Dataset) (store, heap int64) {
	quota := d.Spec.Workers.MemoryBytes()
	store, heap = footprint(quota)
	if writable(d) {
		heap += objects.Buffers
	}
	return store, heap + upstreams(d)*(upstream.Buffers+store-quota)
}

// resources are what a worker has. The CPU that it asks for is what it is left with when all CPUs are busy: a node's pods
// ask for no more together than it has. A quarter of one serves some 250 MB/s then; where a node's network is faster
// and its steps take every CPU, spec.workers.cpu asks for more. It is limited only where the Dataset says so: the CPUs
// that nobody takes are the worker's.
func resources(d *v1alpha1.Dataset, memory resource.Quantity) corev1.ResourceRequirements {
	cpu := resource.MustParse("250m")
	if q := d.Spec.Workers.CPU; q != nil {
		cpu = *q
	}
	limits := corev1.ResourceList{corev1.ResourceMemory: memory}
	if q := d.Spec.Workers.CPULimit; q != nil {
		limits[corev1.ResourceCPU] = *q
		if q.Cmp(cpu) < 0 {
			cpu = *q
		}
	}
	return corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceMemory: memory, corev1.ResourceCPU: cpu}, Limits: limits}
}

// apart adds that no two pods with the labels stand on one node: two copies there are one.
func apart(a *corev1.Affinity, labels map[string]string) *corev1.Affinity {
	a = a.DeepCopy()
	if a == nil {
		a = &corev1.Affinity{}
	}
	if a.PodAntiAffinity == nil {
		a.PodAntiAffinity = &corev1.PodAntiAffinity{}
	}
	a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution = append(a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution,
		corev1.PodAffinityTerm{TopologyKey: corev1.LabelHostname, LabelSelector: &metav1.LabelSelector{MatchLabels: labels}})
	return a
}

// served adds to an affinity that a pod is only where the node service is or may come, which its volumes wait for.
func served(a *corev1.Affinity) *corev1.Affinity {
	a = a.DeepCopy()
	if a == nil {
		a = &corev1.Affinity{}
	}
	if a.NodeAffinity == nil {
		a.NodeAffinity = &corev1.NodeAffinity{}
	}
	required := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	if required == nil {
		required = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: v1alpha1.NodesForPods()}}}
		a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution = required
		return a
	}
	for i := range required.NodeSelectorTerms {
		t := &required.NodeSelectorTerms[i]
		if len(t.MatchExpressions)+len(t.MatchFields) > 0 { // an empty term matches no node: with a requirement it would
			t.MatchExpressions = append(t.MatchExpressions, v1alpha1.NodesForPods()...)
		}
	}
	return a
}

// podMeta is what users and others read of the workers' pods, beside what the controller says of them. A service
// mesh's proxy in front of a worker would refuse the controller and the node service, which are outside of the mesh, and
// what one on the node forwards comes to a port that the workers' policy does not open: the workers stay out of it too,
// unless the Dataset's author says otherwise.
func podMeta(d *v1alpha1.Dataset) (labels, annotations map[string]string) {
	labels, annotations = make(map[string]string), make(map[string]string)
	if t := d.Spec.Workers.Template; t != nil {
		for k, v := range t.Metadata.Labels {
			labels[k] = string(v)
		}
		maps.Copy(annotations, t.Metadata.Annotations)
	}
	// Istio reads both of the first, and the label first.
	if _, ok := annotations[injectIstio]; !ok && labels[injectIstio] == "" {
		labels[injectIstio] = "false"
	}
	if labels[ambientIstio] == "" {
		labels[ambientIstio] = "none"
	}
	if annotations[injectLinkerd] == "" {
		annotations[injectLinkerd] = "disabled"
	}
	return labels, annotations
}

// podSpec is the workers' pod: admitted under the restricted level, without an API token.
func (r *Reconciler) podSpec(p *pass, image string) corev1.PodSpec {
	d := p.dataset
	store, heap := memoryOf(d)
	memory := *resource.NewQuantity(store+heap, resource.BinarySI)

	volumes := []corev1.Volume{
		{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: v1alpha1.WorkersName(d.Name)}}}},
		{Name: "tier", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: v1alpha1.TierName(d.Name)}}}},
		{Name: "keys", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{
			SecretName: v1alpha1.KeysName(d.Name), DefaultMode: ptr.To[int32](0o440)}}},
	}
	mounts := []corev1.VolumeMount{
		{Name: "config", MountPath: configDir, ReadOnly: true},
		{Name: "tier", MountPath: tierDir, ReadOnly: true},
		{Name: "keys", MountPath: keysDir, ReadOnly: true},
		{Name: "store", MountPath: storeDir},
	}
	csi := func(kind string, more map[string]string) corev1.VolumeSource {
		attributes := map[string]string{v1alpha1.AttributeVolume: kind, v1alpha1.AttributeDataset: d.Name, v1alpha1.AttributeNamespace: d.Namespace}
		for k, v := range more {
			attributes[k] = v
		}
		return corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: v1alpha1.DriverName, VolumeAttributes: attributes}}
	}
	if r.Store == StoreCSI {
		volumes = append(volumes,
			corev1.Volume{Name: "store", VolumeSource: csi(v1alpha1.VolumeStore, map[string]string{v1alpha1.AttributeSize: strconv.FormatInt(store, 10)})},
			corev1.Volume{Name: "socket", VolumeSource: csi(v1alpha1.VolumeSocket, nil)})
		mounts = append(mounts, corev1.VolumeMount{Name: "socket", MountPath: socketDir})
	} else {
		volumes = append(volumes, corev1.Volume{Name: "store", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{
			Medium: corev1.StorageMediumMemory, SizeLimit: resource.NewQuantity(store, resource.BinarySI)}}})
	}
	ports := []corev1.ContainerPort{
		{Name: "data", ContainerPort: v1alpha1.PortData},
		{Name: "control", ContainerPort: v1alpha1.PortControl},
	}
	if writable(d) {
		ports = append(ports, corev1.ContainerPort{Name: "s3", ContainerPort: v1alpha1.PortGateway})
		volumes = append(volumes, corev1.Volume{Name: "s3", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{
			SecretName: v1alpha1.S3Name(d.Name), DefaultMode: ptr.To[int32](0o440)}}})
		mounts = append(mounts, corev1.VolumeMount{Name: "s3", MountPath: s3Dir, ReadOnly: true})
	}
	for i, name := range secrets(d) {
		// Optional, so that the worker starts, and says what is missing, and goes on once it is there.
		volume := fmt.Sprintf("credentials-%d", i)
		volumes = append(volumes, corev1.Volume{Name: volume, VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{
			SecretName: name, Optional: ptr.To(true), DefaultMode: ptr.To[int32](0o440)}}})
		mounts = append(mounts, corev1.VolumeMount{Name: volume, MountPath: credentialsDir(name), ReadOnly: true})
	}

	probe := func(path string, period, failures int32) *corev1.Probe {
		return &corev1.Probe{PeriodSeconds: period, FailureThreshold: failures, TimeoutSeconds: 5, ProbeHandler: corev1.ProbeHandler{
			HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromString("control")}}}
	}
	spec := corev1.PodSpec{
		AutomountServiceAccountToken:  ptr.To(false),
		EnableServiceLinks:            ptr.To(false),
		TerminationGracePeriodSeconds: ptr.To[int64](30),
		SecurityContext: &corev1.PodSecurityContext{
			RunAsNonRoot: ptr.To(true), RunAsUser: ptr.To[int64](user), RunAsGroup: ptr.To[int64](user), FSGroup: ptr.To[int64](user),
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		TopologySpreadConstraints: []corev1.TopologySpreadConstraint{{
			MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.ScheduleAnyway,
			LabelSelector: &metav1.LabelSelector{MatchLabels: selector(d)},
		}},
		Volumes: volumes,
		Containers: []corev1.Container{{
			Name: "worker", Image: image,
			Args: []string{"worker", "--config", configDir + "/" + configFile, "--id", "$(POD_NAME)"},
			Env: append([]corev1.EnvVar{
				{Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}},
				{Name: "GOMEMLIMIT", Value: strconv.FormatInt(heap*3/4, 10)},
			}, r.Env...),
			Ports:     ports,
			Resources: resources(d, memory),
			// On a node where many pods start at once a worker that is well may not answer for a minute, and a
			// restart then costs its readers more than waiting does: they go round one that hangs by themselves.
			// A worker that verifies what it finds in its memory after a restart takes a while to listen.
			StartupProbe:   probe("/healthz", 2, 300),
			LivenessProbe:  probe("/healthz", 10, 30),
			ReadinessProbe: probe("/readyz", 3, 2),
			VolumeMounts:   mounts,
			SecurityContext: &corev1.SecurityContext{
				AllowPrivilegeEscalation: ptr.To(false), ReadOnlyRootFilesystem: ptr.To(true),
				Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			},
		}},
	}
	if t := d.Spec.Workers.Template; t != nil {
		spec.NodeSelector = t.Spec.NodeSelector
		spec.Affinity = t.Spec.Affinity
		spec.Tolerations = t.Spec.Tolerations
		spec.SchedulerName = t.Spec.SchedulerName
		spec.PriorityClassName = t.Spec.PriorityClassName
		spec.ServiceAccountName = t.Spec.ServiceAccountName
		spec.ImagePullSecrets = t.Spec.ImagePullSecrets
	}
	if r.Store == StoreCSI {
		spec.Affinity = served(spec.Affinity)
	}
	if d.Spec.Write.Policy == v1alpha1.WriteBack {
		spec.TerminationGracePeriodSeconds = ptr.To[int64](flushGrace)
		spec.Affinity = apart(spec.Affinity, selector(d))
	}
	return spec
}
