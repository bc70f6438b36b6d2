package controllers_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/controllers/envtest"
)

// repository is an entry of a ConfigMap as Argo reads it.
type repository struct {
	S3 struct {
		Endpoint, Bucket, Region, KeyFormat string
		Insecure                            bool
		AccessKeySecret, SecretKeySecret    struct{ Name, Key string }
	}
}

// repository is what Argo would find for artifactRepositoryRef: {configMap: NAME-s3}.
func (w *world) repository(d *v1alpha1.Dataset) (r repository) {
	w.Helper()
	cm := &corev1.ConfigMap{}
	w.must(w.Get(w.Context(), client.ObjectKey{Namespace: w.ns, Name: d.Name + "-s3"}, cm))
	entry := cm.Data[cm.Annotations["workflows.argoproj.io/default-artifact-repository"]]
	if err := yaml.UnmarshalStrict([]byte(entry), &r); err != nil {
		w.Fatalf("%v in %q", err, entry)
	}
	return r
}

// s3 is a client of one worker's endpoint with keys of the Secret.
func (w *world) s3(worker, id, secret string) *minio.Client {
	w.Helper()
	w.mu.Lock()
	ip := w.workers[worker].ip
	w.mu.Unlock()
	c, err := minio.New(ip+":9000", &minio.Options{Creds: credentials.NewStaticV4(id, secret, ""), Region: "us-east-1", BucketLookup: minio.BucketLookupPath})
	w.must(err)
	return c
}

func TestWritableDatasetIsAnArtifactRepository(t *testing.T) {
	w := newWorld(t)
	w.bucket.PutT(t, "data", "old", []byte("old"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("artifacts", 2)
	d.Spec.Access = v1alpha1.ReadWrite
	d.Spec.ShareWith = []v1alpha1.Namespace{"elsewhere"}
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)

	// Nothing is listed, and whatever goes by a listing says so.
	w.condition(d, v1alpha1.ConditionSourced, metav1.ConditionTrue, "Reachable")
	if st := d.Status; st.Snapshot != "" || st.Files != 0 || st.Bytes != 0 || st.CachedPercentage != 0 {
		t.Errorf("status %s", asJSON(st))
	}
	view := w.dataset("view", 1)
	view.Spec.Mounts = []v1alpha1.Mount{{Source: "dataset://" + w.ns + "/artifacts", Path: "/"}}
	w.must(w.Create(t.Context(), view))
	w.condition(view, v1alpha1.ConditionSourced, metav1.ConditionFalse, "InvalidSpec", "access: ReadWrite")
	w.must(w.Delete(t.Context(), view))
	w.gone(view)
	l := &v1alpha1.DataLoad{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "all"}}
	l.Spec.DatasetRef.Name = "artifacts"
	w.must(w.Create(t.Context(), l))
	w.condition(l, v1alpha1.ConditionFailed, metav1.ConditionTrue, "NotLoaded", "access: ReadWrite")

	svc := &corev1.Service{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "artifacts-s3"}, svc))
	if svc.Spec.ClusterIP == "" || svc.Spec.ClusterIP == corev1.ClusterIPNone || svc.Spec.Ports[0].Port != 9000 || svc.Spec.PublishNotReadyAddresses ||
		svc.Spec.TrafficDistribution == nil || *svc.Spec.TrafficDistribution != "PreferSameNode" {
		t.Errorf("service %s", asJSON(svc.Spec))
	}
	set := &appsv1.StatefulSet{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "artifacts-worker"}, set))
	if ports := asJSON(set.Spec.Template.Spec.Containers[0].Ports); !strings.Contains(ports, `"name":"s3","containerPort":9000`) {
		t.Errorf("ports %s", ports)
	}
	r := w.repository(d)
	if r.S3.Endpoint != "artifacts-s3."+w.ns+".svc:9000" || r.S3.Bucket != "artifacts" || !r.S3.Insecure || r.S3.KeyFormat != "{{workflow.namespace}}/{{workflow.name}}/{{pod.name}}" {
		t.Errorf("repository %+v", r)
	}

	// Only the Dataset's namespace and those that it is shared with reach the endpoint.
	np := &networkingv1.NetworkPolicy{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "artifacts-worker"}, np))
	rule := ""
	for _, in := range np.Spec.Ingress {
		for _, p := range in.Ports {
			if p.Port.StrVal == "s3" {
				rule += asJSON(in.From)
			}
		}
	}
	if want := `[{"podSelector":{}},{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"elsewhere"}}}]`; rule != want {
		t.Errorf("the endpoint is open to %s, want %s", rule, want)
	}

	keys := func() map[string]string {
		s, out := &corev1.Secret{}, map[string]string{}
		w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: r.S3.AccessKeySecret.Name}, s))
		for k, v := range s.Data {
			out[k] = string(v)
		}
		return out
	}
	k := keys()
	if k["endpoint"] != "http://"+r.S3.Endpoint || k["bucket"] != "artifacts" || k["region"] != r.S3.Region || r.S3.SecretKeySecret.Name != "artifacts-s3" {
		t.Errorf("the Secret has endpoint %s, bucket %s, region %s", k["endpoint"], k["bucket"], k["region"])
	}
	put := func(c *minio.Client, key, body string) error {
		_, err := c.PutObject(t.Context(), "artifacts", key, strings.NewReader(body), int64(len(body)), minio.PutObjectOptions{})
		return err
	}
	get := func(c *minio.Client, key string) (string, error) {
		o, err := c.GetObject(t.Context(), "artifacts", key, minio.GetObjectOptions{})
		if err != nil {
			return "", err
		}
		defer o.Close()
		b, err := io.ReadAll(o)
		return string(b), err
	}
	a := w.s3("artifacts-worker-0", k[r.S3.AccessKeySecret.Key], k[r.S3.SecretKeySecret.Key])
	b := w.s3("artifacts-worker-1", k["readOnlyAccessKeyID"], k["readOnlySecretAccessKey"])
	w.must(put(a, "w/p/out.tgz", "artifact"))
	for key, want := range map[string]string{"w/p/out.tgz": "artifact", "old": "old"} {
		if got, err := get(b, key); err != nil || got != want {
			t.Errorf("%s: %q, %v", key, got, err)
		}
	}
	direct, err := w.bucket.Client()
	w.must(err)
	o, err := direct.GetObject(t.Context(), "data", "w/p/out.tgz", minio.GetObjectOptions{})
	w.must(err)
	if got, err := io.ReadAll(o); err != nil || string(got) != "artifact" {
		t.Errorf("the bucket has %q: %v", got, err)
	}
	if err := put(b, "w/p/no", "x"); minio.ToErrorResponse(err).Code != "AccessDenied" {
		t.Errorf("a put with the read-only keys: %v", err)
	}

	// The keys stay as they are, however often the controller starts; one that is deleted is made anew, and the
	// workers take it.
	w.stopManager()
	w.start()
	w.poke(d)
	w.waitReady(d)
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "artifacts-s3"}}
	if now := keys(); fmt.Sprint(now) != fmt.Sprint(k) {
		t.Error("keys changed by themselves")
	}
	update(w, s, func(s *corev1.Secret) { delete(s.Data, "secretAccessKey"); s.Data["theirs"] = []byte("1") })
	w.poke(d)
	w.eventually("the key is made anew", func() error {
		now := keys()
		if len(now["secretAccessKey"]) != 40 || now["secretAccessKey"] == k["secretAccessKey"] {
			return errors.New("it is not")
		}
		if now["accessKeyID"] != k["accessKeyID"] || now["readOnlySecretAccessKey"] != k["readOnlySecretAccessKey"] || now["theirs"] != "1" {
			t.Error("what was not deleted changed")
		}
		return nil
	})
	fresh := w.s3("artifacts-worker-0", k["accessKeyID"], keys()["secretAccessKey"])
	w.eventually("the workers take it", func() error { return put(fresh, "again", "x") })
	w.eventually("the old one ends", func() error {
		if err := put(a, "late", "x"); minio.ToErrorResponse(err).Code != "SignatureDoesNotMatch" {
			return fmt.Errorf("put: %v", err)
		}
		return nil
	})
	// A Dataset that only reads has none of it.
	other := w.dataset("genomes", 1)
	w.must(w.Create(t.Context(), other))
	w.waitReady(other)
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes-s3"}, svc); err == nil {
		t.Error("a read-only Dataset has an S3 endpoint")
	}
}

func TestArtifactsOfADatasetWithAFolderHaveKeysBelowIt(t *testing.T) {
	w := newWorld(t)
	w.bucket.PutT(t, "data", "old", []byte("old"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("artifacts", 1)
	d.Spec.Access = v1alpha1.ReadWrite
	d.Spec.Mounts[0].Path = "/runs"
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)
	if got := w.repository(d).S3.KeyFormat; got != "runs/{{workflow.namespace}}/{{workflow.name}}/{{pod.name}}" {
		t.Errorf("key format %q", got)
	}
}

func TestWritableDatasetWhoseNameIsNoBucketsIsRefused(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"ab", "xn--a", "a--x-s3", "a-s3alias"} {
		d := w.dataset(name, 1)
		d.Spec.Access = v1alpha1.ReadWrite
		if err := w.Create(t.Context(), d); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "is also the name of its bucket: at least 3 characters") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A Dataset that only reads has no bucket of its name.
	w.must(w.Create(t.Context(), w.dataset("ab", 1), client.DryRunAll))
}

// Before Kubernetes 1.34 a Service cannot prefer the client's node; it is one like any other then, and is not tried
// again in every pass.
// An object that a rule came after must get its status and lose its finalizer: its namespace would never go.
func TestDatasetsFromBeforeARuleOfNamesGetTheirStatusAndGo(t *testing.T) {
	w := newWorld(t)
	b, err := os.ReadFile("../config/crd/data.stepcache.dev_datasets.yaml")
	w.must(err)
	crd := &unstructured.Unstructured{}
	w.must(yaml.Unmarshal(b, &crd.Object))
	// Another group, since other tests want the rules.
	const group = "before.example.com"
	crd.SetName("datasets." + group)
	crd.Object["spec"].(map[string]any)["group"] = group
	openapi := crd.Object["spec"].(map[string]any)["versions"].([]any)[0].(map[string]any)["schema"].(map[string]any)["openAPIV3Schema"].(map[string]any)
	const rules = "x-kubernetes-validations"
	of := openapi[rules]
	delete(openapi, rules)
	patch, err := json.Marshal([]map[string]any{{"op": "add", "path": "/spec/versions/0/schema/openAPIV3Schema/" + rules, "value": of}})
	w.must(err)
	w.must(w.Create(t.Context(), crd))
	t.Cleanup(func() { w.must(w.Delete(context.Background(), crd)) })

	named := func(name string, access v1alpha1.Access) *unstructured.Unstructured {
		d := w.dataset(name, 1)
		d.Spec.Access = access
		d.Finalizers = []string{"example.com/kept"}
		object, err := runtime.DefaultUnstructuredConverter.ToUnstructured(d)
		w.must(err)
		delete(object, "status")
		u := &unstructured.Unstructured{Object: object}
		u.SetGroupVersionKind(schema.GroupVersionKind{Group: group, Version: v1alpha1.GroupVersion.Version, Kind: v1alpha1.KindDataset})
		return u
	}
	old := []*unstructured.Unstructured{named("ab", v1alpha1.ReadWrite), named("9a", v1alpha1.ReadOnly)}
	for _, u := range old {
		envtest.Eventually(t, "the kind is served", func() error { return w.Create(t.Context(), u) })
	}
	w.must(w.Patch(t.Context(), crd, client.RawPatch(types.JSONPatchType, patch)))
	for name, access := range map[string]v1alpha1.Access{"cd": v1alpha1.ReadWrite, "9c": v1alpha1.ReadOnly} {
		envtest.Eventually(t, "new ones are refused", func() error {
			if err := w.Create(t.Context(), named(name, access), client.DryRunAll); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "the name of a Dataset") {
				return fmt.Errorf("%s: %v", name, err)
			}
			return nil
		})
	}
	for _, u := range old {
		u.Object["status"] = map[string]any{"phase": string(v1alpha1.DatasetReady)}
		w.must(w.Status().Update(t.Context(), u))
		u.SetFinalizers(nil)
		w.must(w.Update(t.Context(), u))
		w.must(w.Delete(t.Context(), u))
	}
}

func TestAnOlderAPIServerGetsAServiceThatItKnows(t *testing.T) {
	w := newWorld(t)
	w.requests.refusing("PreferSameNode")
	w.bucket.PutT(t, "data", "old", []byte("old"))
	w.must(w.Create(t.Context(), w.secret("access-key")))
	d := w.dataset("artifacts", 1)
	d.Spec.Access = v1alpha1.ReadWrite
	w.must(w.Create(t.Context(), d))
	w.waitReady(d)
	svc := &corev1.Service{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "artifacts-s3"}, svc))
	if svc.Spec.TrafficDistribution != nil {
		t.Errorf("traffic distribution %s", *svc.Spec.TrafficDistribution)
	}
	made := "POST /api/v1/namespaces/" + w.ns + "/services"
	all, n := w.requests.since(0)
	if !slices.Contains(all, made) {
		t.Fatalf("no Service was made: %q", all)
	}
	w.passes(d, 5)
	if all, _ := w.requests.since(n); slices.Contains(all, made) {
		t.Errorf("a Service was made again: %q", all)
	}
}
