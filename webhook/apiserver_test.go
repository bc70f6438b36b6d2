package webhook

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	kclient "sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/controllers/envtest"
	"github.com/stepcache/stepcache/test/ports"
)

// patience bounds what normally takes milliseconds.
const patience = 2 * time.Minute

const system = "stepcache-system"

// apiServer is a real one, and what its answers warned of.
type apiServer struct {
	t       *testing.T
	ctx     context.Context
	cluster *rest.Config
	c       kclient.Client

	mu       sync.Mutex
	warnings []string
}

func (a *apiServer) HandleWarningHeader(_ int, _ string, text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.warnings = append(a.warnings, text)
}

func (a *apiServer) warned() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := strings.Join(a.warnings, "\n")
	a.warnings = nil
	return all
}

func startAPIServer(t *testing.T) *apiServer {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a kube-apiserver, which -short leaves out")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	cluster, stop, err := envtest.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := stop(); err != nil {
			t.Errorf("API server: %v", err)
		}
	})
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	a := &apiServer{t: t, ctx: ctx, cluster: cluster}
	mine := rest.CopyConfig(cluster)
	mine.WarningHandler = a
	if a.c, err = kclient.New(mine, kclient.Options{Scheme: scheme}); err != nil {
		t.Fatal(err)
	}
	for name, labels := range map[string]map[string]string{
		system: nil, "ref": nil, "argo": {v1alpha1.LabelWatched: "true"}, "unwatched": nil,
		"strict": {labelEnforce: "restricted"},
	} {
		a.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
	}
	return a
}

func (a *apiServer) create(objects ...kclient.Object) {
	a.t.Helper()
	for _, o := range objects {
		if err := a.c.Create(a.ctx, o); err != nil {
			a.t.Fatalf("%T %s: %v", o, o.GetName(), err)
		}
	}
}

// manifests applies a file of config/webhook, each object changed before.
func (a *apiServer) manifests(file string, change func(*unstructured.Unstructured)) {
	a.t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "config", "webhook", file))
	if err != nil {
		a.t.Fatal(err)
	}
	for d := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(b), 4096); ; {
		u := &unstructured.Unstructured{}
		if err := d.Decode(&u.Object); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			a.t.Fatalf("%s: %v", file, err)
		}
		if u.Object == nil {
			continue
		}
		if change != nil {
			change(u)
		}
		a.create(u)
	}
}

// configurations applies config/webhook/manifests.yaml, with an address in the place of the Service, for which
// there is no network here.
func (a *apiServer) configurations(port int) {
	a.manifests("manifests.yaml", func(u *unstructured.Unstructured) {
		hooks, _, _ := unstructured.NestedSlice(u.Object, "webhooks")
		for _, h := range hooks {
			hook := h.(map[string]any)
			service, _, _ := unstructured.NestedMap(hook, "clientConfig", "service")
			hook["clientConfig"] = map[string]any{"url": "https://localhost:" + strconv.Itoa(port) + service["path"].(string)}
			hook["timeoutSeconds"] = int64(30) // this machine may be busy
		}
		u.Object["webhooks"] = hooks
	})
}

// await waits until something is so; ok says why not.
func (a *apiServer) await(what string, ok func() error) {
	a.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			a.t.Fatalf("%s: %v", what, err)
		}
	}
}

func (a *apiServer) pod(namespace string, raw []byte) (*unstructured.Unstructured, error) {
	a.t.Helper()
	u := &unstructured.Unstructured{}
	if err := json.Unmarshal(raw, &u.Object); err != nil {
		a.t.Fatal(err)
	}
	// This API server knows every field that there is.
	unstructured.RemoveNestedField(u.Object, "spec", "fromTheFuture")
	if cs, ok, _ := unstructured.NestedSlice(u.Object, "spec", "containers"); ok {
		for _, c := range cs {
			delete(c.(map[string]any), "futureField")
		}
		_ = unstructured.SetNestedSlice(u.Object, cs, "spec", "containers")
	}
	u.SetNamespace(namespace)
	u.SetName("")
	u.SetGenerateName("p-")
	u.SetOwnerReferences(nil)
	return u, a.c.Create(a.ctx, u)
}

func (a *apiServer) typed(u *unstructured.Unstructured) *corev1.Pod {
	a.t.Helper()
	pod := &corev1.Pod{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, pod); err != nil {
		a.t.Fatal(err)
	}
	return pod
}

// replica runs a webhook process's manager with the rights that config/webhook gives, until stop.
func (a *apiServer) replica(o Options) (port int, stop func()) {
	a.t.Helper()
	port = ports.FreeNumber(a.t)
	limited := rest.CopyConfig(a.cluster)
	limited.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + system + ":stepcache-webhook", Groups: []string{"system:serviceaccounts", "system:authenticated"}}
	o.Namespace, o.Host, o.Port, o.Hosts, o.Metrics, o.Probes, o.Again = system, "localhost", port, []string{"localhost"}, "0", "0", true
	o.Image, o.StageLimit = "stepcache:test", 1<<30
	m, err := New(limited, o)
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(a.ctx)
	done := make(chan error, 1)
	go func() { done <- m.Start(ctx) }()
	return port, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			a.t.Errorf("webhook: %v", err)
		}
	})
}

// genomesWorker is one real worker of argo/genomes, in a membership with one that is dead, and the objects
// that the controller would make for it.
// It returns which host owns a file.
func (a *apiServer) genomesWorker(d *v1alpha1.Dataset) func(file string) string {
	a.t.Helper()
	m, keys, secret, list := runGenomes(a.t, d)
	a.create(secret, list)
	if err := a.c.Status().Update(a.ctx, d); err != nil {
		a.t.Fatal(err)
	}
	reader, err := client.Dial(a.ctx, client.Config{Dataset: "argo/genomes", Membership: m, Keys: keys, Logger: quiet()})
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { reader.Close() })
	return func(file string) string {
		a.t.Helper()
		i, ok := reader.Snapshot().Lookup(file)
		if !ok {
			a.t.Fatalf("no file %s", file)
		}
		o, _ := reader.Snapshot().Ring(i)
		return strings.Replace(m.Owners(o, 0, 1)[0].Node, "n", "host", 1)
	}
}

func (a *apiServer) node(name, host string) {
	a.t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: host, v1alpha1.LabelNodeReady: "true"}}}
	a.create(n)
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	if err := a.c.Status().Update(a.ctx, n); err != nil {
		a.t.Fatal(err)
	}
	// A new node is not ready until somebody takes the taint away; nobody does here, and nothing minds.
}

// The webhook as an installation has it: its rights, its configurations, its certificates, called by a real
// API server.
func TestAgainstAPIServer(t *testing.T) {
	a := startAPIServer(t)
	for _, f := range []string{"service_account.yaml", "role.yaml", "role_binding.yaml"} {
		a.manifests(f, nil)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	ctrl.SetLogger(logr.FromSlogHandler(slog.DiscardHandler))
	port, stop := a.replica(Options{Logger: log})
	defer stop()
	a.configurations(port)
	a.node("n1", "host1")
	a.node("n2", "host2")
	d := dataset("argo", "genomes", func(d *v1alpha1.Dataset) { d.Spec.Replaces = []v1alpha1.Replaced{{ClaimName: "oss-data"}} })
	a.await("Dataset let in", func() error { // once the validating configuration has its bundle, or does not count
		err := a.c.Create(a.ctx, d)
		if apierrors.IsAlreadyExists(err) {
			return nil
		}
		return err
	})
	// From here on nothing is let in that nobody answered for.
	a.await("the configurations trust the webhook", func() error {
		mutating := &admissionregistrationv1.MutatingWebhookConfiguration{}
		for _, name := range []string{InjectConfiguration, LocalityConfiguration} {
			if err := a.c.Get(a.ctx, types.NamespacedName{Name: name}, mutating); err != nil {
				return err
			}
			if len(mutating.Webhooks[0].ClientConfig.CABundle) == 0 {
				return fmt.Errorf("%s has no bundle", name)
			}
		}
		validating := &admissionregistrationv1.ValidatingWebhookConfiguration{}
		if err := a.c.Get(a.ctx, types.NamespacedName{Name: ValidationConfiguration}, validating); err != nil {
			return err
		}
		if len(validating.Webhooks[0].ClientConfig.CABundle) == 0 {
			return fmt.Errorf("%s has no bundle", ValidationConfiguration)
		}
		return nil
	})
	a.await("a pod gets its data", func() error {
		u, err := a.pod("argo", readPod(t, "plain"))
		if err == nil && a.typed(u).Annotations[AnnotationInjected] != "csi" {
			t.Fatalf("let in without its data: %v", u.Object)
		}
		return err
	})
	owner := a.genomesWorker(d)
	fluidPod := func(claim string) []byte {
		return readPod(t, "argo-v3.7", put("labels", labelFluid, "true"), func(pod map[string]any) {
			pod["spec"].(map[string]any)["volumes"].([]any)[2].(map[string]any)["persistentVolumeClaim"].(map[string]any)["claimName"] = claim
		})
	}

	t.Run("placed by file", func(t *testing.T) {
		a.await("snapshot", func() error {
			u, err := a.pod("argo", readPod(t, "argo-v3.7", inject("csi")))
			if err != nil {
				return err
			}
			pod := a.typed(u)
			if pod.Spec.Volumes[2].PersistentVolumeClaim.ClaimName != "genomes" {
				t.Fatalf("the claim is not replaced: %+v", pod.Spec.Volumes[2])
			}
			if pod.Spec.Affinity == nil {
				return errors.New("no affinity")
			}
			top := pod.Spec.Affinity.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution[0]
			if top.Weight != 100 || len(top.Preference.MatchExpressions[0].Values) != 1 {
				return errors.New("not by file yet")
			}
			if host := top.Preference.MatchExpressions[0].Values[0]; host != owner("/shards/0001.bin") {
				t.Fatalf("drawn to %s, not to %s", host, owner("/shards/0001.bin"))
			}
			return nil
		})
	})
	t.Run("workflow without a label", func(t *testing.T) {
		u, err := a.pod("argo", readPod(t, "argo-v3.7"))
		if err != nil {
			t.Fatal(err)
		}
		if pod := a.typed(u); pod.Spec.Volumes[2].PersistentVolumeClaim.ClaimName != "genomes" || pod.Spec.Affinity == nil {
			t.Errorf("not replaced or not placed: %+v %+v", pod.Spec.Volumes[2], pod.Spec.Affinity)
		}
		if u, err = a.pod("unwatched", readPod(t, "argo-v3.7")); err != nil {
			t.Fatal(err)
		}
		if pod := a.typed(u); pod.Annotations[AnnotationInjected] != "" {
			t.Errorf("a namespace that nobody watches: %v", pod.Annotations)
		}
	})
	t.Run("labels of Fluid", func(t *testing.T) {
		for _, l := range []struct{ key, value, mode string }{
			{labelFluid, "true", "csi"}, {labelFluidTarget, "eci", "stage"}, {labelFluid, "false", ""},
		} {
			u, err := a.pod("argo", readPod(t, "plain", inject(""), put("labels", l.key, l.value), put("annotations", AnnotationStagePaths, "/shards/0001.bin")))
			if err != nil {
				t.Errorf("%s=%s: %v", l.key, l.value, err)
			} else if got := a.typed(u).Annotations[AnnotationInjected]; got != l.mode {
				t.Errorf("%s=%s: injected %q, want %q", l.key, l.value, got, l.mode)
			}
		}
		a.create(dataset("ref", "hg38", func(d *v1alpha1.Dataset) { d.Spec.Locality = v1alpha1.LocalityNone }))
		for _, p := range []struct{ namespace, claim, mode string }{
			{"argo", "oss-data", "csi"}, {"argo", "fluids", ""}, {"ref", "hg38", "csi"}, {"unwatched", "fluids", ""},
		} {
			a.await("the Dataset is known", func() error {
				u, err := a.pod(p.namespace, fluidPod(p.claim))
				if err == nil && a.typed(u).Annotations[AnnotationInjected] != p.mode {
					err = fmt.Errorf("claim %s in namespace %s: injected %q, want %q", p.claim, p.namespace, a.typed(u).Annotations[AnnotationInjected], p.mode)
				}
				return err
			})
		}
	})
	t.Run("pods of the system", func(t *testing.T) {
		for _, ns := range []string{system, "kube-system"} {
			if _, err := a.pod(ns, readPod(t, "plain", mounts("nothing=/data"))); err != nil {
				t.Errorf("%s: %v", ns, err)
			}
		}
	})
	t.Run("denial", func(t *testing.T) {
		_, err := a.pod("argo", readPod(t, "plain", mounts("genome=/data")))
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), `namespace argo has no Dataset "genome"`) {
			t.Errorf("%v", err)
		}
		a.warned()
		if _, err := a.pod("argo", readPod(t, "plain", mounts(""))); err != nil {
			t.Error(err)
		}
		if w := a.warned(); !strings.Contains(w, "the pod gets no data") {
			t.Errorf("warned of %q", w)
		}
	})
	t.Run("every mode is a valid pod", func(t *testing.T) {
		for _, name := range []string{"argo-v3.7", "argo-v4-initless", "plain"} {
			for _, m := range []string{"csi", "sidecar", "stage"} {
				u, err := a.pod("argo", readPod(t, name, inject(m), put("annotations", AnnotationStagePaths, "/shards/0001.bin")))
				if err != nil {
					t.Errorf("%s, %s: %v", name, m, err)
				} else if got := a.typed(u).Annotations[AnnotationInjected]; got != m {
					t.Errorf("%s, %s: injected %q", name, m, got)
				}
			}
		}
	})
	t.Run("restricted", func(t *testing.T) {
		a.create(dataset("strict", "genomes"))
		user := int64(1000)
		yes, no := true, false
		pod := &corev1.Pod{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{v1alpha1.LabelInject: "stage"}, Annotations: map[string]string{v1alpha1.AnnotationMounts: "genomes=/data"}},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "busybox", SecurityContext: &corev1.SecurityContext{
				RunAsUser: &user, RunAsNonRoot: &yes, AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}}}},
		}
		create := func(mode string) error {
			p := pod.DeepCopy()
			p.Labels[v1alpha1.LabelInject] = mode
			raw, err := json.Marshal(p)
			if err != nil {
				t.Fatal(err)
			}
			u, err := a.pod("strict", raw)
			if err == nil && a.typed(u).Annotations[AnnotationInjected] != mode {
				t.Errorf("%s: %v", mode, a.typed(u).Annotations)
			}
			return err
		}
		a.await("the Dataset is known", func() error { return create("stage") })
		// The API server enforces the level: it looks at the pod as it is with what was added.
		if err := create("sidecar"); err != nil {
			t.Errorf("sidecar: %v", err)
		}
		level := &corev1.Namespace{}
		if err := a.c.Get(a.ctx, types.NamespacedName{Name: "strict"}, level); err != nil || level.Labels[labelEnforce] != "restricted" {
			t.Fatal(err, level.Labels)
		}
		pod.Labels["alibabacloud.com/eci"] = "true" // where nothing lends it its mounts
		if err := create("sidecar"); err == nil || !strings.Contains(err.Error(), "use stage") {
			t.Errorf("privileged sidecar: %v", err)
		}
	})
	t.Run("validation", func(t *testing.T) {
		local := dataset("argo", "local", func(d *v1alpha1.Dataset) {
			d.Spec.Mounts = []v1alpha1.Mount{{Source: "file:///data", Path: "/"}}
		})
		if err := a.c.Create(a.ctx, local); err == nil || !strings.Contains(err.Error(), "local mode") {
			t.Errorf("file://: %v", err)
		}
		if err := a.c.Create(a.ctx, dataset("argo", "second", func(d *v1alpha1.Dataset) { d.Spec.Replaces = []v1alpha1.Replaced{{ClaimName: "oss-data"}} })); err == nil || !strings.Contains(err.Error(), "Dataset genomes replaces this claim already") {
			t.Errorf("a claim replaced twice: %v", err)
		}
		if err := a.c.Create(a.ctx, dataset("argo", "writable", func(d *v1alpha1.Dataset) {
			d.Spec.Access, d.Spec.Replaces = v1alpha1.ReadWrite, []v1alpha1.Replaced{{ClaimName: "results"}}
		})); err == nil || !strings.Contains(err.Error(), "claim results cannot be replaced") {
			t.Errorf("a claim replaced by a writable Dataset: %v", err)
		}
		a.warned()
		l := &v1alpha1.DataLoad{ObjectMeta: metav1.ObjectMeta{Namespace: "argo", Name: "warm"}, Spec: v1alpha1.DataLoadSpec{DatasetRef: v1alpha1.Reference{Name: "genome"}}}
		if err := a.c.Create(a.ctx, l); err != nil {
			t.Error(err)
		}
		if w := a.warned(); !strings.Contains(w, "there is no Dataset genome in namespace argo yet (there is: genomes)") {
			t.Errorf("warned of %q", w)
		}
	})
	t.Run("artifacts through the tier, and no claim", func(t *testing.T) {
		m := members("n1", "n2")
		list, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		a.create(
			dataset("argo", "results", func(d *v1alpha1.Dataset) { d.Spec.Access = v1alpha1.ReadWrite }),
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "argo", Name: v1alpha1.TierName("results"), Labels: map[string]string{v1alpha1.LabelDataset: "results"}}, Data: map[string]string{v1alpha1.KeyMembership: string(list)}},
		)
		want := map[string]int32{"host1": 50, "host2": 50}
		want[strings.Replace(m.NameOwners("argo/results", "w/p/out", 1)[0].Node, "n", "host", 1)] = 100
		a.await("drawn to the artifact's owner", func() error {
			u, err := a.pod("argo", stepPod(t, "results-s3.argo.svc:9000", "results", "w/p/out"))
			if err != nil {
				return err
			}
			if got := preferred(a.typed(u)); !maps.Equal(got, want) {
				return fmt.Errorf("drawn to %v", got)
			}
			return nil
		})
		// Of others nobody asks.
		u, err := a.pod("argo", stepPod(t, "minio.argo.svc:9000", "results", "w/p/out"))
		if err != nil {
			t.Fatal(err)
		}
		if pod := a.typed(u); pod.Spec.Affinity != nil {
			t.Errorf("affinity %+v", pod.Spec.Affinity)
		}
	})
	t.Run("nobody answers", func(t *testing.T) {
		stop()
		_, err := a.pod("argo", readPod(t, "plain"))
		if err == nil || !strings.Contains(err.Error(), "failed calling webhook") || !strings.Contains(err.Error(), "connection refused") { // which Argo tries again
			t.Errorf("a labelled pod: %v", err)
		}
		u, err := a.pod("argo", readPod(t, "argo-v3.7"))
		if err != nil {
			t.Fatalf("a workflow's pod without a label: %v", err)
		}
		if pod := a.typed(u); pod.Spec.Volumes[2].PersistentVolumeClaim.ClaimName != "oss-data" {
			t.Errorf("%+v", pod.Spec.Volumes[2])
		}
		if _, err := a.pod("argo", readPod(t, "plain", inject(""))); err != nil {
			t.Errorf("a pod that does not ask: %v", err)
		}
		if _, err := a.pod("argo", stepPod(t, "results-s3.argo.svc:9000", "results", "w/p/out")); err != nil {
			t.Errorf("a workflow's pod that loads artifacts: %v", err)
		}
		// Fluid's own pods do not depend on us, and those that may be ours are not let in without their data.
		if _, err := a.pod("unwatched", fluidPod("fluids")); err != nil {
			t.Errorf("a pod of Fluid's: %v", err)
		}
		if _, err := a.pod("argo", fluidPod("oss-data")); err == nil {
			t.Error("a pod with a label of Fluid and the claim that a Dataset replaces is let in")
		}
		if _, err := a.pod("unwatched", readPod(t, "plain", inject(""), put("labels", labelFluid, "true"))); err == nil {
			t.Error("a pod with a label of Fluid and our annotation is let in")
		}
	})
	t.Run("certificates", a.certificates)
}

// Two replicas over the lives of several certificates: whatever one shows, the configurations trust.
func (a *apiServer) certificates(t *testing.T) {
	now := time.Now()
	secret := types.NamespacedName{Namespace: system, Name: "certs-test"}
	replicas := make([]*Certs, 2)
	for i := range replicas {
		replicas[i] = &Certs{
			Client: a.c, Secret: secret, Hosts: []string{"stepcache-webhook.stepcache-system.svc", "localhost"},
			Mutating: []string{InjectConfiguration, LocalityConfiguration, "not-installed"}, Validating: []string{ValidationConfiguration, "not-installed"},
			Now: func() time.Time { return now }, Logger: quiet(),
		}
	}
	if _, err := replicas[0].Certificate(nil); err == nil {
		t.Error("a certificate before there is one")
	}
	bundles := func() [][]byte {
		t.Helper()
		var all [][]byte
		for _, name := range []string{InjectConfiguration, LocalityConfiguration} {
			c := &admissionregistrationv1.MutatingWebhookConfiguration{}
			if err := a.c.Get(a.ctx, types.NamespacedName{Name: name}, c); err != nil {
				t.Fatal(err)
			}
			for _, w := range c.Webhooks {
				all = append(all, w.ClientConfig.CABundle)
			}
		}
		c := &admissionregistrationv1.ValidatingWebhookConfiguration{}
		if err := a.c.Get(a.ctx, types.NamespacedName{Name: ValidationConfiguration}, c); err != nil {
			t.Fatal(err)
		}
		for _, w := range c.Webhooks {
			all = append(all, w.ClientConfig.CABundle)
		}
		return all
	}
	leaf := func(c *Certs) *x509.Certificate {
		t.Helper()
		pair, err := c.Certificate(&tls.ClientHelloInfo{})
		if err != nil {
			t.Fatal(err)
		}
		l, err := x509.ParseCertificate(pair.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	trusted := func(when string) {
		t.Helper()
		for k, b := range bundles() {
			roots := x509.NewCertPool()
			if !roots.AppendCertsFromPEM(b) {
				t.Fatalf("%s: configuration %d has no bundle", when, k)
			}
			for i, r := range replicas {
				if _, err := leaf(r).Verify(x509.VerifyOptions{Roots: roots, DNSName: "stepcache-webhook.stepcache-system.svc", CurrentTime: now}); err != nil {
					t.Errorf("%s: replica %d is not trusted by configuration %d: %v", when, i, k, err)
				}
			}
		}
	}
	sync1 := func(r *Certs) {
		t.Helper()
		if err := r.Sync(a.ctx); err != nil {
			t.Fatal(err)
		}
	}
	// Both at once, from nothing.
	var wg sync.WaitGroup
	for _, r := range replicas {
		wg.Go(func() {
			if err := r.Sync(a.ctx); err != nil {
				t.Errorf("at once: %v", err)
			}
		})
	}
	wg.Wait()
	sync1(replicas[0])
	sync1(replicas[1])
	trusted("first")
	if !leaf(replicas[0]).Equal(leaf(replicas[1])) {
		t.Fatal("two replicas show two certificates")
	}
	first := leaf(replicas[0])

	// The serving certificate is replaced in time; the other replica, which has not heard of it, is trusted too.
	now = now.Add(servingLife * 7 / 10)
	sync1(replicas[0])
	trusted("one replica renewed")
	if leaf(replicas[0]).Equal(first) || !leaf(replicas[1]).Equal(first) {
		t.Fatal("replica 0 should have renewed, replica 1 not have heard of it")
	}
	sync1(replicas[1])
	if !leaf(replicas[0]).Equal(leaf(replicas[1])) {
		t.Error("replica 1 did not take the new one")
	}

	// The authority: first trusted, then signing, then alone.
	count := func() int { return bytes.Count(bundles()[0], []byte("BEGIN CERTIFICATE")) }
	for end := now.Add(authorityLife); count() < 2; {
		if now = now.Add(servingLife / 3); now.After(end) {
			t.Fatal("the authority is not replaced in its life")
		}
		sync1(replicas[0])
		sync1(replicas[1])
		trusted("on the way")
	}
	before := leaf(replicas[0])
	now = now.Add(settle / 2)
	sync1(replicas[0])
	if !leaf(replicas[0]).Equal(before) {
		t.Error("signed by an authority that not every API server may have heard of")
	}
	now = now.Add(settle)
	sync1(replicas[0])
	trusted("one replica shows the new authority's")
	if leaf(replicas[0]).Equal(before) || count() != 2 {
		t.Errorf("%d authorities, the same certificate: %v", count(), leaf(replicas[0]).Equal(before))
	}
	sync1(replicas[1])
	trusted("both do")
	now = now.Add(2 * settle)
	sync1(replicas[0])
	sync1(replicas[1])
	trusted("the old authority is gone")
	if count() != 1 {
		t.Errorf("%d authorities", count())
	}

	// Somebody takes the bundle out of a configuration, or breaks the Secret, or everything ended long ago.
	c := &admissionregistrationv1.MutatingWebhookConfiguration{}
	if err := a.c.Get(a.ctx, types.NamespacedName{Name: InjectConfiguration}, c); err != nil {
		t.Fatal(err)
	}
	c.Webhooks[0].ClientConfig.CABundle = nil
	if err := a.c.Update(a.ctx, c); err != nil {
		t.Fatal(err)
	}
	sync1(replicas[1])
	trusted("a bundle put back")
	for _, key := range []string{keyBundle, keyAuthorityKey, keyServing, keyServingKey} {
		s := &corev1.Secret{}
		if err := a.c.Get(a.ctx, secret, s); err != nil {
			t.Fatal(err)
		}
		s.Data[key] = []byte("-----BEGIN NOTHING-----\n")
		if err := a.c.Update(a.ctx, s); err != nil {
			t.Fatal(err)
		}
		sync1(replicas[0])
		sync1(replicas[1])
		trusted("after " + key + " broke")
	}
	now = now.Add(2 * authorityLife)
	sync1(replicas[0])
	sync1(replicas[1])
	trusted("after a long sleep")
	if !slices.Contains(leaf(replicas[0]).DNSNames, "localhost") {
		t.Errorf("names %v", leaf(replicas[0]).DNSNames)
	}
}
