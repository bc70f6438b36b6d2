package dataset

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"fmt"
	"maps"
	"net"
	"path"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/worker"
)

const (
	// s3Dir is where a worker sees the access keys of its S3 endpoint.
	s3Dir = "/etc/stepcache/s3"
	// s3Region is what clients sign with; the endpoint has no other.
	s3Region = "us-east-1"
	// annotationRepository names the entry of a ConfigMap that Argo takes where a workflow's
	// artifactRepositoryRef names only the ConfigMap.
	annotationRepository = "workflows.argoproj.io/default-artifact-repository"
)

func writable(d *v1alpha1.Dataset) bool { return d.Spec.Access == v1alpha1.ReadWrite }

// gatewayConfig adds to the workers' configuration what a Dataset that takes puts needs.
func gatewayConfig(d *v1alpha1.Dataset, c *worker.Config) {
	if !writable(d) {
		return
	}
	c.Gateway = &worker.GatewayConfig{Listen: fmt.Sprintf(":%d", v1alpha1.PortGateway), Bucket: d.Name, Region: s3Region, Credentials: s3Dir}
	c.Write = worker.WriteConfig{Policy: string(d.Spec.Write.Policy), Exclusive: d.Spec.Write.Exclusive}
	if d.Spec.Write.Policy == v1alpha1.WriteBack {
		c.Write.Copies = int(d.Spec.Workers.Copies)
	}
}

// s3Address is host:port of the S3 endpoint, as pods of any namespace resolve it.
func s3Address(d *v1alpha1.Dataset) string {
	return net.JoinHostPort(v1alpha1.S3Name(d.Name)+"."+d.Namespace+".svc", strconv.Itoa(v1alpha1.PortGateway))
}

// gateway keeps what clients of a Dataset that takes puts find it by: a Service, a Secret with access keys, and
// a ConfigMap that Argo takes for an artifact repository.
func (r *Reconciler) gateway(ctx context.Context, p *pass) error {
	d := p.dataset
	if !writable(d) {
		return nil
	}
	if err := r.accessKeys(ctx, p); err != nil {
		return err
	}
	name := v1alpha1.S3Name(d.Name)
	if err := r.endpoint(ctx, p); err != nil {
		return err
	}
	entry, err := yaml.Marshal(map[string]any{"s3": map[string]any{
		"endpoint": s3Address(d), "bucket": d.Name, "region": s3Region, "insecure": true,
		"accessKeySecret": map[string]string{"name": name, "key": v1alpha1.KeyAccessKeyID},
		"secretKeySecret": map[string]string{"name": name, "key": v1alpha1.KeySecretAccessKey},
		// Below the first mount, since nothing else takes puts, and a folder for each workflow, so that its
		// artifacts are found, listed and deleted together.
		"keyFormat": strings.TrimPrefix(path.Join(d.Spec.Mounts[0].Path, "{{workflow.namespace}}/{{workflow.name}}/{{pod.name}}"), "/"),
	}})
	if err != nil {
		return err
	}
	repository := &corev1.ConfigMap{ObjectMeta: p.object(name, v1alpha1.ComponentWorker), Data: map[string]string{d.Name: string(entry)}}
	repository.Annotations = map[string]string{annotationRepository: d.Name}
	return r.apply(ctx, p, r.client, v1alpha1.ConditionWorkersReady, repository)
}

// endpoint keeps the Service. A client is sent to the worker of its own node where there is one: what that one
// holds does not cross the network, and what it gets from the owner crosses it once, where by way of a third
// worker it would twice.
func (r *Reconciler) endpoint(ctx context.Context, p *pass) error {
	apply := func(traffic *string) (*string, error) {
		s := &corev1.Service{ObjectMeta: p.object(v1alpha1.S3Name(p.dataset.Name), v1alpha1.ComponentWorker), Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, Selector: selector(p.dataset), TrafficDistribution: traffic,
			Ports: []corev1.ServicePort{{Name: "s3", Port: v1alpha1.PortGateway, TargetPort: intstr.FromString("s3")}},
		}}
		err := r.apply(ctx, p, r.client, v1alpha1.ConditionWorkersReady, s)
		return s.Spec.TrafficDistribution, err
	}
	if !r.noSameNode.Load() {
		took, err := apply(ptr.To(corev1.ServiceTrafficDistributionPreferSameNode))
		// Before Kubernetes 1.34 the value is refused, and before 1.30 the field is passed over.
		old := apierrors.IsInvalid(err) || err == nil && took == nil
		if !old {
			return err
		}
		r.noSameNode.Store(true)
	}
	_, err := apply(nil)
	return err
}

// accessKeys keeps the Secret with the endpoint's access keys. A key that is there stays, whoever made it, so
// that nobody is locked out without having asked for it; one that is deleted is made anew, which is how a user
// rotates it.
func (r *Reconciler) accessKeys(ctx context.Context, p *pass) error {
	want := &corev1.Secret{ObjectMeta: p.object(v1alpha1.S3Name(p.dataset.Name), v1alpha1.ComponentWorker), Type: corev1.SecretTypeOpaque}
	have := &corev1.Secret{}
	err := r.live.Get(ctx, client.ObjectKeyFromObject(want), have)
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	want.Data = maps.Clone(have.Data)
	if want.Data == nil {
		want.Data = make(map[string][]byte)
	}
	for _, k := range []struct {
		name   string
		length int
	}{
		{v1alpha1.KeyAccessKeyID, 20}, {v1alpha1.KeySecretAccessKey, 40},
		{v1alpha1.KeyReadOnlyAccessKeyID, 20}, {v1alpha1.KeyReadOnlySecretAccessKey, 40},
	} {
		if len(want.Data[k.name]) == 0 {
			want.Data[k.name] = accessKey(k.length)
		}
	}
	want.Data["endpoint"] = []byte("http://" + s3Address(p.dataset))
	want.Data["bucket"] = []byte(p.dataset.Name)
	want.Data["region"] = []byte(s3Region)
	p.access = want.Data
	return r.apply(ctx, p, r.live, v1alpha1.ConditionWorkersReady, want)
}

// sharedAccess is what clients of other namespaces get of the Secret: they may read, as over a mount.
func sharedAccess(p *pass) map[string][]byte {
	return map[string][]byte{
		"endpoint": p.access["endpoint"], "bucket": p.access["bucket"], "region": p.access["region"],
		v1alpha1.KeyAccessKeyID:     p.access[v1alpha1.KeyReadOnlyAccessKeyID],
		v1alpha1.KeySecretAccessKey: p.access[v1alpha1.KeyReadOnlySecretAccessKey],
	}
}

// accessKey is a random text that needs no escaping in a URL, an XML document or a shell: five bits a letter.
func accessKey(length int) []byte {
	b := make([]byte, length*5/8)
	rand.Read(b) // never fails
	return []byte(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b))
}
