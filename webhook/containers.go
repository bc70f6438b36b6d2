package webhook

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// Names of what is added to pods.
const (
	keeperName  = "stepcache-keeper"
	sidecarName = "stepcache-sidecar"
	stageName   = "stepcache-stage"
	hostVolume  = "stepcache-host"
	nodeVolume  = "stepcache-node"
)

// Places in the containers that are added.
const (
	tierDir  = "/etc/stepcache/tier"
	stageDir = "/run/stepcache/data"
	// hostDir is a folder of the node: the sidecar's mounts are below sidecars/ID, and below workers are the
	// sockets at which workers of the node hand out descriptors, where the node service made them.
	hostDir = "/run/stepcache"
	// nodeDir has the node service's socket, in a sidecar that it lends its mounts.
	nodeDir = "/run/stepcache/node"
)

// viaLent has a FUSE server in the pod serve mounts that the node service makes for it. It needs no right, and so
// is let in at every pod security level. One container does: the node service keeps its mounts over a restart,
// and takes them away with the pod whatever became of it.
func (j *Injector) viaLent(p *patch, needs []*need) error {
	if j.Image == "" {
		return errNoImage
	}
	// The volumes would wait for ever on a node without.
	p.require(v1alpha1.NodesForPods()...)
	readOnly := true
	source := func(n *need) corev1.VolumeSource {
		return corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
			Driver: v1alpha1.DriverName, ReadOnly: &readOnly,
			VolumeAttributes: map[string]string{v1alpha1.AttributeVolume: v1alpha1.VolumeLent, v1alpha1.AttributeDataset: n.dataset.Name},
		}}
	}
	if err := j.give(p, needs, func(n *need, i int) { p.source(i, source(n)) }, source); err != nil {
		return err
	}
	name := freeName(p.pod, nodeVolume)
	p.volume(corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
		Driver: v1alpha1.DriverName, ReadOnly: &readOnly,
		VolumeAttributes: map[string]string{v1alpha1.AttributeVolume: v1alpha1.VolumeLender},
	}}})
	socket := path.Join(nodeDir, v1alpha1.LenderSocketName)
	mounts := []corev1.VolumeMount{{Name: name, MountPath: nodeDir, ReadOnly: true}}
	server := j.server(p, needs, mounts, "--node-socket", socket)
	server.SecurityContext = unprivileged()
	p.first(fit(p, server)...)
	return nil
}

// server is the container that serves the Datasets; at says where, to it and to its probe.
func (j *Injector) server(p *patch, needs []*need, mounts []corev1.VolumeMount, at ...string) corev1.Container {
	args := append(append([]string{"sidecar"}, at...), "--tier", tierDir)
	for _, n := range needs {
		mounts = append(mounts, j.tier(p, n.dataset))
		args = append(args, "--dataset", n.String())
	}
	always := corev1.ContainerRestartPolicyAlways
	c := j.container(sidecarName, args...)
	c.RestartPolicy = &always
	c.VolumeMounts = mounts
	c.Env = []corev1.EnvVar{{Name: "NODE_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "spec.nodeName"}}}}
	c.Resources = resources("100m", "1", "192Mi", "512Mi")
	c.StartupProbe = &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: append([]string{"/stepcache", "sidecar", "--check"}, at...)}},
		PeriodSeconds: 1, TimeoutSeconds: 10, FailureThreshold: 1800, // the bucket may have to be listed first
	}
	return c
}

// unprivileged is what the pod security level "restricted" asks of a container.
func unprivileged() *corev1.SecurityContext {
	user, yes, no := int64(65532), true, false
	return &corev1.SecurityContext{
		RunAsUser: &user, RunAsNonRoot: &yes, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
		Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
}

// viaSidecar has a FUSE server in the pod mount the Datasets, where no node service does it for one.
//
// The mounts are in a folder of the node (hostPath) and not in an emptyDir: the kubelet cannot take an
// emptyDir away on which a FUSE server died, so that the pod would be Terminating for ever, and it counts
// the files in an emptyDir as the pod's own disk usage. Two containers share the folder: the sidecar
// serves the mounts, the keeper, which is first and so stopped last, unmounts them whatever became of
// the sidecar.
func (j *Injector) viaSidecar(p *patch, needs []*need) error {
	if j.Image == "" {
		return errNoImage
	}
	dir := path.Join(hostDir, "sidecars", j.NewID())
	create := corev1.HostPathDirectoryOrCreate
	source := func(n *need) corev1.VolumeSource {
		return corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path.Join(dir, n.dataset.Name), Type: &create}}
	}
	if err := j.give(p, needs, func(n *need, i int) { p.source(i, source(n)) }, source); err != nil {
		return err
	}
	p.volume(corev1.Volume{Name: freeName(p.pod, hostVolume), VolumeSource: corev1.VolumeSource{
		HostPath: &corev1.HostPathVolumeSource{Path: hostDir, Type: &create},
	}})
	shared := corev1.MountPropagationBidirectional
	mounts := []corev1.VolumeMount{{Name: p.pod.Spec.Volumes[len(p.pod.Spec.Volumes)-1].Name, MountPath: hostDir, MountPropagation: &shared}}
	keeper := j.container(keeperName, "sidecar", "--keep", "--dir", dir)
	keeper.VolumeMounts = slices.Clone(mounts)
	keeper.Resources = resources("10m", "100m", "32Mi", "128Mi")
	server := j.server(p, needs, mounts, "--dir", dir)
	always := corev1.ContainerRestartPolicyAlways
	root, yes, no := int64(0), true, false
	for _, c := range []*corev1.Container{&keeper, &server} {
		c.RestartPolicy = &always
		c.SecurityContext = &corev1.SecurityContext{
			Privileged: &yes, RunAsUser: &root, RunAsNonRoot: &no, ReadOnlyRootFilesystem: &yes, AllowPrivilegeEscalation: &yes,
		}
	}
	p.first(fit(p, keeper, server)...)
	return nil
}

// viaStage has an init container copy what the step reads.
func (j *Injector) viaStage(namespace string, p *patch, needs []*need) (warnings []string, err error) {
	if j.Image == "" {
		return nil, errNoImage
	}
	paths, hints, warnings, err := j.stagePaths(namespace, p.pod, needs)
	if err != nil {
		return nil, err
	}
	empty := func(*need) corev1.VolumeSource { return corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}} }
	if err := j.give(p, needs, func(n *need, i int) { p.source(i, empty(n)) }, empty); err != nil {
		return nil, err
	}
	args := []string{"stage", "--tier", tierDir, "--limit", strconv.FormatInt(j.StageLimit, 10)}
	var mounts []corev1.VolumeMount
	for k, n := range needs {
		mounts = append(mounts, j.tier(p, n.dataset))
		for _, i := range n.volumes {
			name := p.pod.Spec.Volumes[i].Name
			mounts = append(mounts, corev1.VolumeMount{Name: name, MountPath: path.Join(stageDir, name)})
			args = append(args, "--copy", n.String()+"="+path.Join(stageDir, name))
		}
		for _, pattern := range paths[k] {
			args = append(args, "--path", n.String()+"="+pattern)
		}
		for _, pattern := range hints[k] {
			args = append(args, "--if-present", n.String()+"="+pattern)
		}
	}
	c := j.container(stageName, args...)
	c.VolumeMounts = mounts
	// Next to nothing of the CPU: a pod's share is what its hungriest container asks for, so a step that asks for
	// more copies with that, and a hundred steps that do not cannot starve the worker that serves them all.
	c.Resources = resources("10m", "1", "192Mi", "512Mi")
	c.TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError
	c.SecurityContext = unprivileged()
	p.first(fit(p, c)...)
	return warnings, nil
}

// stagePaths says what of each Dataset is copied: patterns that must match something, and others that need
// not. Neither: all of it. A step that finds a part of its files where it expects all may not notice, so
// what it reads is guessed only where the choice is between that and a denial.
func (j *Injector) stagePaths(namespace string, pod *corev1.Pod, needs []*need) (paths, hints [][]string, warnings []string, err error) {
	var asked []stagePath
	if value, ok := pod.Annotations[AnnotationStagePaths]; ok {
		if asked, err = parseStagePaths(value, namespace); err != nil {
			return nil, nil, nil, denied{err}
		}
	}
	known, _ := stepOf(pod)
	paths, hints = make([][]string, len(needs)), make([][]string, len(needs))
	for k, n := range needs {
		name := types.NamespacedName{Namespace: n.dataset.Namespace, Name: n.dataset.Name}
		for _, a := range asked {
			switch a.dataset {
			case name:
				paths[k] = append(paths[k], a.pattern)
			case types.NamespacedName{}:
				// It need not be in every Dataset, but in the only one.
				if len(needs) == 1 {
					paths[k] = append(paths[k], a.pattern)
				} else {
					hints[k] = append(hints[k], a.pattern)
				}
			}
		}
		if len(paths[k])+len(hints[k]) > 0 {
			continue
		}
		if paths[k] = subPaths(pod, n); len(paths[k]) > 0 {
			continue
		}
		if n.dataset.Status.Bytes <= j.StageLimit {
			continue // all of it: no guess can leave anything out
		}
		for _, o := range known.objects {
			for _, at := range o.in(n.dataset) {
				hints[k] = append(hints[k], escapePattern(at))
			}
		}
		if len(hints[k]) == 0 {
			return nil, nil, nil, deny("Dataset %s has %s, more than the %s that are staged whole: name the files that the step reads in annotation %s, such as /shards/0001*, or use the mode csi or sidecar",
				n, size(n.dataset.Status.Bytes), size(j.StageLimit), AnnotationStagePaths)
		}
		warnings = append(warnings, fmt.Sprintf("of Dataset %s only the step's input artifacts are staged; name all that it reads in annotation %s", n, AnnotationStagePaths))
	}
	for _, a := range asked {
		if (a.dataset != types.NamespacedName{}) && !slices.ContainsFunc(needs, func(n *need) bool {
			return n.dataset.Name == a.dataset.Name && n.dataset.Namespace == a.dataset.Namespace
		}) {
			return nil, nil, nil, deny("annotation %s names Dataset %s, which the pod does not mount", AnnotationStagePaths, a.dataset)
		}
	}
	return paths, hints, warnings, nil
}

// subPaths are the folders of the Dataset that the pod mounts; nil if any mount is of all.
func subPaths(pod *corev1.Pod, n *need) []string {
	if len(n.at) > 0 {
		return nil
	}
	var patterns []string
	for _, i := range n.volumes {
		for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
			for _, m := range c.VolumeMounts {
				if m.Name != pod.Spec.Volumes[i].Name {
					continue
				}
				sub := strings.Trim(path.Clean("/"+m.SubPath), "/")
				if sub == "" || m.SubPathExpr != "" {
					return nil
				}
				if pattern := "/" + escapePattern(sub); !slices.Contains(patterns, pattern) {
					patterns = append(patterns, pattern)
				}
			}
		}
	}
	return patterns
}

// tier adds the volume that tells a reader of its workers, and returns its mount.
func (j *Injector) tier(p *patch, d *v1alpha1.Dataset) corev1.VolumeMount {
	mode := int32(0o444)
	name := freeName(p.pod, "stepcache-tier-"+d.Name)
	p.volume(corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		DefaultMode: &mode,
		Sources: []corev1.VolumeProjection{
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: v1alpha1.TierName(d.Name)}}},
			{Secret: &corev1.SecretProjection{
				LocalObjectReference: corev1.LocalObjectReference{Name: v1alpha1.ReaderName(d.Name)},
				Items:                []corev1.KeyToPath{{Key: v1alpha1.KeyRead, Path: "keys/" + v1alpha1.KeyRead}},
			}},
		},
	}}})
	return corev1.VolumeMount{Name: name, MountPath: path.Join(tierDir, d.Name), ReadOnly: true}
}

// Annotations of service meshes: the outbound ports of a pod that they leave alone, with commas between.
const (
	istioPorts   = "traffic.sidecar.istio.io/excludeOutboundPorts"
	linkerdPorts = "config.linkerd.io/skip-outbound-ports"
)

// pastMesh lets what is added reach the workers in a pod of a service mesh. It runs before the mesh's proxy, to which
// the mesh's CNI plugin has all of the pod's connections redirected from the start: the pod would never start
// (github.com/istio/istio issue 23802, github.com/linkerd/linkerd2 issue 4788). Readers connect to the workers' data
// port alone. The meshes' webhooks are called before ours, by the order of their configurations' names, so that ports
// which they take from the namespace are on the pod by now and stay. Those of Linkerd's CNI plugin's own configuration
// do not: it takes a pod's in their place.
func pastMesh(p *patch) {
	port := strconv.Itoa(v1alpha1.PortData)
	for _, key := range []string{istioPorts, linkerdPorts} {
		ports := strings.FieldsFunc(p.pod.Annotations[key], func(r rune) bool { return r == ',' || r == ' ' })
		if !slices.Contains(ports, port) {
			p.annotate(key, strings.Join(append(ports, port), ","))
		}
	}
}

func (j *Injector) container(name string, args ...string) corev1.Container {
	return corev1.Container{Name: name, Image: j.Image, ImagePullPolicy: j.PullPolicy, Command: []string{"/stepcache"}, Args: args}
}

func resources(cpu, mostCPU, memory, mostMemory string) corev1.ResourceRequirements {
	of := func(cpu, memory string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	}
	return corev1.ResourceRequirements{Requests: of(cpu, memory), Limits: of(mostCPU, mostMemory)}
}

// fit has the containers that are added ask for resources in the way of the pod's own. A pod of the QoS class Guaranteed
// stays so, and keeps the CPUs that it has for itself. A limit of the CPU, which costs speed, is only for pods that have
// it everywhere: a quota may ask for it. It is as many times ours as the pod's largest has CPUs. And what the pod as a
// whole may have, which was measured for its own containers, grows by theirs.
func fit(p *patch, added ...corev1.Container) []corev1.Container {
	own := slices.Concat(p.pod.Spec.InitContainers, p.pod.Spec.Containers)
	whole := p.pod.Spec.Resources
	largest := int64(1000)
	limited := !slices.ContainsFunc(own, func(c corev1.Container) bool {
		largest = max(largest, c.Resources.Limits.Cpu().MilliValue())
		return c.Resources.Limits.Cpu().IsZero()
	})
	equal := whole != nil && guaranteed(*whole) ||
		whole == nil && !slices.ContainsFunc(own, func(c corev1.Container) bool { return !guaranteed(c.Resources) })
	for _, c := range added {
		limits := c.Resources.Limits
		switch {
		case equal:
			maps.Copy(c.Resources.Requests, limits)
		case limited:
			limits[corev1.ResourceCPU] = *resource.NewMilliQuantity(limits.Cpu().MilliValue()*largest/1000, resource.DecimalSI)
		default:
			delete(limits, corev1.ResourceCPU)
		}
		if whole == nil {
			continue
		}
		for name, q := range c.Resources.Requests {
			p.grow("requests", whole.Requests, name, q)
			if limit, ok := limits[name]; ok {
				q = limit
			}
			p.grow("limits", whole.Limits, name, q)
		}
	}
	return added
}

// guaranteed says whether requests are equal to limits, as the QoS class Guaranteed wants it.
func guaranteed(r corev1.ResourceRequirements) bool {
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		limit := r.Limits[name]
		if request, ok := r.Requests[name]; limit.IsZero() || ok && request.Cmp(limit) != 0 {
			return false
		}
	}
	return true
}

// size writes bytes for people.
func size(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
