package webhook

import (
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"gomodules.xyz/jsonpatch/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// patch collects the JSON Patch operations on one pod. It changes the pod along, so that a later
// operation knows what an earlier one made: a list that was absent, an index that moved.
type patch struct {
	pod *corev1.Pod
	ops []jsonpatch.Operation
}

func (p *patch) add(path string, value any) {
	p.ops = append(p.ops, jsonpatch.NewOperation("add", path, value))
}

// escape makes a key fit for a JSON Pointer.
func escape(key string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(key)
}

func (p *patch) annotate(key, value string) {
	p.pod.Annotations = p.set("/metadata/annotations", p.pod.Annotations, key, value)
}

func (p *patch) label(key, value string) {
	p.pod.Labels = p.set("/metadata/labels", p.pod.Labels, key, value)
}

func (p *patch) set(path string, m map[string]string, key, value string) map[string]string {
	switch old, has := m[key]; {
	case has && old == value:
		return m
	case m == nil:
		m = map[string]string{key: value}
		p.add(path, maps.Clone(m))
	default:
		m[key] = value
		p.add(path+"/"+escape(key), value)
	}
	return m
}

// source gives volume i another source under its old name.
func (p *patch) source(i int, s corev1.VolumeSource) {
	v := corev1.Volume{Name: p.pod.Spec.Volumes[i].Name, VolumeSource: s}
	p.pod.Spec.Volumes[i] = v
	p.ops = append(p.ops, jsonpatch.NewOperation("replace", "/spec/volumes/"+strconv.Itoa(i), v))
}

func (p *patch) volume(v corev1.Volume) {
	if len(p.pod.Spec.Volumes) == 0 {
		p.add("/spec/volumes", []corev1.Volume{v})
	} else {
		p.add("/spec/volumes/-", v)
	}
	p.pod.Spec.Volumes = append(p.pod.Spec.Volumes, v)
}

// pullSecrets appends those that the pod does not name.
func (p *patch) pullSecrets(names []string) {
	for _, name := range names {
		ref := corev1.LocalObjectReference{Name: name}
		if slices.Contains(p.pod.Spec.ImagePullSecrets, ref) {
			continue
		}
		if len(p.pod.Spec.ImagePullSecrets) == 0 {
			p.add("/spec/imagePullSecrets", []corev1.LocalObjectReference{ref})
		} else {
			p.add("/spec/imagePullSecrets/-", ref)
		}
		p.pod.Spec.ImagePullSecrets = append(p.pod.Spec.ImagePullSecrets, ref)
	}
}

// container is one of the pod's, with its place.
type container struct {
	*corev1.Container
	path string
	init bool
}

// containers are all of the pod's, init containers first.
func (p *patch) containers() []container {
	var all []container
	for i := range p.pod.Spec.InitContainers {
		all = append(all, container{&p.pod.Spec.InitContainers[i], "/spec/initContainers/" + strconv.Itoa(i), true})
	}
	for i := range p.pod.Spec.Containers {
		all = append(all, container{&p.pod.Spec.Containers[i], "/spec/containers/" + strconv.Itoa(i), false})
	}
	return all
}

func (p *patch) mount(c container, m corev1.VolumeMount) {
	if len(c.VolumeMounts) == 0 {
		p.add(c.path+"/volumeMounts", []corev1.VolumeMount{m})
	} else {
		p.add(c.path+"/volumeMounts/-", m)
	}
	c.VolumeMounts = append(c.VolumeMounts, m)
}

// first puts init containers in front of all others. Paths of containers that were taken before are void.
func (p *patch) first(cs ...corev1.Container) {
	if len(p.pod.Spec.InitContainers) == 0 {
		p.add("/spec/initContainers", slices.Clone(cs))
	} else {
		for i, c := range cs {
			p.add("/spec/initContainers/"+strconv.Itoa(i), c)
		}
	}
	p.pod.Spec.InitContainers = slices.Concat(cs, p.pod.Spec.InitContainers)
}

// grow adds to what the pod as a whole asks for or may have, where it says so.
func (p *patch) grow(kind string, of corev1.ResourceList, name corev1.ResourceName, more resource.Quantity) {
	if q, ok := of[name]; ok {
		q.Add(more)
		of[name] = q
		p.add("/spec/resources/"+kind+"/"+escape(string(name)), q)
	}
}

// prefer appends preferred node affinity.
func (p *patch) prefer(terms []corev1.PreferredSchedulingTerm) {
	node := p.nodeAffinity()
	const path = "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution"
	if len(node.PreferredDuringSchedulingIgnoredDuringExecution) == 0 {
		p.add(path, slices.Clone(terms))
	} else {
		for _, t := range terms {
			p.add(path+"/-", t)
		}
	}
	node.PreferredDuringSchedulingIgnoredDuringExecution = append(node.PreferredDuringSchedulingIgnoredDuringExecution, terms...)
}

// require narrows the pod to nodes that match all of rs, too. The terms of required affinity are alternatives, so
// each of them gets them.
func (p *patch) require(rs ...corev1.NodeSelectorRequirement) {
	node := p.nodeAffinity()
	const path = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution"
	old := node.RequiredDuringSchedulingIgnoredDuringExecution
	if old == nil || len(old.NodeSelectorTerms) == 0 {
		s := &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: rs}}}
		node.RequiredDuringSchedulingIgnoredDuringExecution = s
		p.add(path, s.DeepCopy())
		return
	}
	for i := range old.NodeSelectorTerms {
		t := &old.NodeSelectorTerms[i]
		if len(t.MatchExpressions) == 0 && len(t.MatchFields) == 0 {
			continue // an empty term matches no node: with a requirement it would
		}
		at := path + "/nodeSelectorTerms/" + strconv.Itoa(i) + "/matchExpressions"
		for _, r := range rs {
			switch {
			case slices.ContainsFunc(t.MatchExpressions, func(o corev1.NodeSelectorRequirement) bool { return reflect.DeepEqual(o, r) }):
				continue
			case len(t.MatchExpressions) == 0:
				p.add(at, []corev1.NodeSelectorRequirement{r})
			default:
				p.add(at+"/-", r)
			}
			t.MatchExpressions = append(t.MatchExpressions, r)
		}
	}
}

func (p *patch) nodeAffinity() *corev1.NodeAffinity {
	if p.pod.Spec.Affinity == nil {
		p.pod.Spec.Affinity = &corev1.Affinity{}
		p.add("/spec/affinity", struct{}{})
	}
	if p.pod.Spec.Affinity.NodeAffinity == nil {
		p.pod.Spec.Affinity.NodeAffinity = &corev1.NodeAffinity{}
		p.add("/spec/affinity/nodeAffinity", struct{}{})
	}
	return p.pod.Spec.Affinity.NodeAffinity
}
