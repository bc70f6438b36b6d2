package webhook

import (
	"context"
	"encoding/json"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

const (
	// argoWorkflow is the label of every pod of Argo Workflows; its value is the workflow's name.
	argoWorkflow = "workflows.argoproj.io/workflow"
	// argoTemplate is the variable that holds the step's template, its inputs resolved, in every init
	// container, or where there is none in supervisor or main.
	argoTemplate = "ARGO_TEMPLATE"
	// argoOffloaded is the length from which Argo keeps the template elsewhere: the variable then tells
	// nothing.
	argoOffloaded = 131072
)

// step is what a pod's ARGO_TEMPLATE tells of its inputs.
type step struct {
	objects []object
	// script is the source of a script template, which the pod itself does not show.
	script string
}

// object is an input artifact in a bucket: an object, or all below a key.
type object struct {
	scheme           v1alpha1.Scheme
	endpoint, bucket string
	key              string
}

type argoBucket struct {
	Endpoint string `json:"endpoint"`
	Bucket   string `json:"bucket"`
	Key      string `json:"key"`
}

type argoLocation struct {
	S3  *argoBucket `json:"s3"`
	OSS *argoBucket `json:"oss"`
}

// parseStep reads a value of ARGO_TEMPLATE. What cannot be read is unknown, which is no error: false.
func parseStep(value string) (step, bool) {
	if len(value) >= argoOffloaded || value == "offloaded" {
		return step{}, false
	}
	var t struct {
		Inputs struct {
			Artifacts []argoLocation `json:"artifacts"`
		} `json:"inputs"`
		ArchiveLocation *argoLocation `json:"archiveLocation"`
		Script          *struct {
			Source string `json:"source"`
		} `json:"script"`
	}
	if err := json.Unmarshal([]byte(value), &t); err != nil {
		return step{}, false
	}
	var s step
	archive := argoLocation{}
	if t.ArchiveLocation != nil {
		archive = *t.ArchiveLocation
	}
	for _, a := range t.Inputs.Artifacts {
		s.add(v1alpha1.SchemeS3, a.S3, archive.S3)
		s.add(v1alpha1.SchemeOSS, a.OSS, archive.OSS)
	}
	if t.Script != nil {
		s.script = t.Script.Source
	}
	return s, true
}

// add notes an artifact, whose bucket may be the archive's.
func (s *step) add(scheme v1alpha1.Scheme, a, archive *argoBucket) {
	if a == nil || a.Key == "" {
		return
	}
	o := object{scheme, a.Endpoint, a.Bucket, a.Key}
	if archive != nil && o.bucket == "" {
		o.bucket = archive.Bucket
		if o.endpoint == "" {
			o.endpoint = archive.Endpoint
		}
	}
	if o.bucket != "" {
		s.objects = append(s.objects, o)
	}
}

// stepOf finds and reads a pod's ARGO_TEMPLATE.
func stepOf(pod *corev1.Pod) (step, bool) {
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			for _, e := range list[i].Env {
				if e.Name == argoTemplate && e.Value != "" {
					return parseStep(e.Value)
				}
			}
		}
	}
	return step{}, false
}

// tier is the Dataset whose S3 endpoint the object is loaded from, by the endpoint's name in the cluster.
func (o object) tier() (types.NamespacedName, bool) {
	name, port, err := net.SplitHostPort(host(o.endpoint))
	if o.scheme != v1alpha1.SchemeS3 || err != nil || port != strconv.Itoa(v1alpha1.PortGateway) {
		return types.NamespacedName{}, false
	}
	labels := strings.Split(name, ".")
	if len(labels) < 3 || labels[2] != "svc" {
		return types.NamespacedName{}, false
	}
	d := types.NamespacedName{Namespace: labels[1], Name: o.bucket}
	return d, labels[0] == v1alpha1.S3Name(o.bucket)
}

// loads adds to what a pod reads the input artifacts that it loads from the S3 endpoints of Datasets that it may
// read. What is not known of them is left out: only placement rests on it.
func (j *Injector) loads(ctx context.Context, namespace string, pod *corev1.Pod, needs []*need) []*need {
	s, _ := stepOf(pod)
	for _, o := range s.objects[:min(len(s.objects), maxPaths)] {
		name, ok := o.tier()
		if !ok {
			continue
		}
		all, err := j.Cluster.Datasets(ctx, name.Namespace)
		if err != nil {
			return needs
		}
		k := slices.IndexFunc(all, func(d *v1alpha1.Dataset) bool { return d.Name == name.Name })
		if k < 0 || all[k].Spec.Access != v1alpha1.ReadWrite || !all[k].SharesWith(namespace) {
			continue
		}
		i := slices.IndexFunc(needs, func(n *need) bool { return n.String() == name.String() })
		if i < 0 {
			i, needs = len(needs), append(needs, &need{dataset: all[k]})
		}
		needs[i].keys = append(needs[i].keys, o.key)
	}
	return needs
}

// in returns where the object would be in the Dataset: no path if it is not of its buckets; two where only
// the listing can tell a folder from an object.
func (o object) in(d *v1alpha1.Dataset) []string {
	var paths []string
	for i := range d.Spec.Mounts {
		m := &d.Spec.Mounts[i]
		rest, ok := strings.CutPrefix(m.Source, string(m.Scheme())+"://")
		if !ok || !o.sameStore(m) {
			continue
		}
		bucket, prefix, _ := strings.Cut(rest, "/")
		if bucket != o.bucket {
			continue
		}
		key := strings.Trim(o.key, "/")
		folder := strings.Trim(prefix, "/")
		switch {
		case key == folder && folder != "":
			// The mount itself: a folder, or the single object that is shown under its last segment.
			paths = append(paths, m.Path, path.Join(m.Path, path.Base(key)))
		case folder == "" || strings.HasPrefix(key, folder+"/"):
			paths = append(paths, path.Join(m.Path, strings.TrimPrefix(strings.TrimPrefix(key, folder), "/")))
		case strings.HasPrefix(folder, key+"/"):
			paths = append(paths, m.Path) // the artifact is a folder above the mount
		}
	}
	return paths
}

// sameStore says whether an artifact and a mount may be of one object store. OSS answers the S3 protocol,
// too, so that an s3 artifact may lie in an oss:// bucket.
func (o object) sameStore(m *v1alpha1.Mount) bool {
	if !m.Bucket() {
		return false
	}
	if m.Scheme() == v1alpha1.SchemeOSS && o.scheme == v1alpha1.SchemeS3 {
		return strings.Contains(o.endpoint, "aliyuncs.com")
	}
	if m.Scheme() != o.scheme {
		return false
	}
	// Inside and outside a provider's network one store has two names: only names outside of it are compared.
	a, b := host(o.endpoint), host(m.Endpoint)
	return a == "" || b == "" || a == b || provider(a) && provider(b)
}

func host(endpoint string) string {
	_, rest, ok := strings.Cut(endpoint, "://")
	if !ok {
		rest = endpoint
	}
	return strings.ToLower(strings.TrimSuffix(rest, "/"))
}

func provider(host string) bool {
	return strings.HasSuffix(host, ".aliyuncs.com") || strings.HasSuffix(host, ".amazonaws.com")
}
