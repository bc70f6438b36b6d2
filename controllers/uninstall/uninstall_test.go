package uninstall_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/controllers"
	"github.com/stepcache/stepcache/controllers/dataset"
	"github.com/stepcache/stepcache/controllers/envtest"
	"github.com/stepcache/stepcache/controllers/node"
	"github.com/stepcache/stepcache/controllers/uninstall"
)

// cluster is an API server of this package's own: an uninstallation is of all of it. So its tests follow each
// other.
var cluster *rest.Config

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	c, stop, err := envtest.Start(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	cluster = c
	code := m.Run()
	if err := stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

const system = "stepcache-system"

// world is an installation.
type world struct {
	*testing.T
	client.Client
	objects []*unstructured.Unstructured // what the manifests hold
	ns      string
	stop    func() // ends the controller
}

var worlds int

// newWorld installs everything from config/, with a controller that runs or one that does not.
func newWorld(t *testing.T) *world {
	t.Helper()
	c, err := client.New(cluster, client.Options{Scheme: controllers.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	worlds++
	w := &world{T: t, Client: c, objects: manifests(t), ns: fmt.Sprintf("user-%d", worlds)}
	ctx, cancel := context.WithCancel(context.Background())
	played := make(chan struct{})
	go func() {
		defer close(played)
		for ctx.Err() == nil {
			w.play(ctx)
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-played })
	for _, first := range []bool{true, false} {
		for _, o := range w.objects {
			if kind := o.GetKind(); (kind == "Namespace" || kind == "CustomResourceDefinition") == first && !strings.Contains(kind, "WebhookConfiguration") {
				w.apply(o)
			}
		}
	}
	// The webhook itself gives them their authority; without one the server would not take them in this test.
	for _, o := range w.objects {
		if strings.Contains(o.GetKind(), "WebhookConfiguration") {
			w.apply(o)
		}
	}
	for _, name := range []string{w.ns, w.ns + "-other"} {
		w.must(w.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}))
	}
	w.must(client.IgnoreAlreadyExists(w.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}})))
	n := &corev1.Node{}
	w.must(w.Get(t.Context(), client.ObjectKey{Name: "node"}, n))
	n.Labels = map[string]string{v1alpha1.LabelNodeReady: "true", "kept": "yes"}
	w.must(w.Update(t.Context(), n))
	w.eventually("the definitions are served", func() error { return w.List(t.Context(), &v1alpha1.DatasetList{}) })
	m, err := controllers.New(cluster, controllers.Options{
		Dataset: dataset.Options{Namespace: system, Image: "stepcache:v1", Poll: time.Second, Store: dataset.StoreCSI, Only: w.ns},
		Metrics: "0", Probes: "0", Logger: logr.Discard(),
	})
	w.must(err)
	w.must(node.New(m.GetClient(), dataset.Options{Namespace: system}).SetupWithManager(m))
	mctx, mcancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Start(mctx) }()
	var once sync.Once
	w.stop = func() { once.Do(func() { mcancel(); <-done }) }
	t.Cleanup(w.stop)
	// Its pod, which ends with its Deployment.
	pod := w.pod("stepcache-controller", map[string]string{v1alpha1.LabelComponent: v1alpha1.ComponentController}, corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}})
	pod.Namespace = system
	w.must(w.Create(t.Context(), pod))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			if apierrors.IsNotFound(w.Get(ctx, client.ObjectKey{Namespace: system, Name: pod.Name}, &appsv1.Deployment{})) {
				w.stop()
				_ = w.Delete(ctx, pod, client.GracePeriodSeconds(0))
				return
			}
			time.Sleep(30 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return w
}

// manifests are all objects that some kustomization of config/ installs.
func manifests(t *testing.T) []*unstructured.Unstructured {
	t.Helper()
	var all []*unstructured.Unstructured
	err := filepath.WalkDir("../../config", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == "components" {
			return fs.SkipDir // their objects are in the installation's namespace, and go with it
		}
		if err != nil || d.IsDir() || filepath.Ext(path) != ".yaml" || d.Name() == "kustomization.yaml" {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, doc := range strings.Split("\n"+string(b), "\n---") {
			o := &unstructured.Unstructured{}
			if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			if o.GetKind() == "" {
				continue
			}
			if o.GetNamespace() == "" && namespaced(o.GetKind()) {
				o.SetNamespace(system)
			}
			all = append(all, o)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func namespaced(kind string) bool {
	switch kind {
	case "Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "CSIDriver", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration",
		"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding":
		return false
	}
	return true
}

func (w *world) apply(o *unstructured.Unstructured) {
	w.Helper()
	w.eventually("apply "+o.GetKind()+" "+o.GetName(), func() error {
		err := w.Create(w.Context(), o.DeepCopy())
		if meta.IsNoMatchError(err) {
			return nil // of an operator that this cluster does not have
		}
		return client.IgnoreAlreadyExists(err)
	})
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) eventually(what string, f func() error) {
	w.Helper()
	envtest.Eventually(w, what, f)
}

// play does once what the rest of a cluster's control plane does: it collects pods, lets go what it protects,
// and ends namespaces.
func (w *world) play(ctx context.Context) {
	envtest.CollectPods(ctx, w)
	pods := &corev1.PodList{}
	_ = w.List(ctx, pods, client.InNamespace(system))
	for i := range pods.Items {
		p := &pods.Items[i]
		if o := metav1.GetControllerOf(p); o != nil && o.Kind == "DaemonSet" && apierrors.IsNotFound(w.Get(ctx, client.ObjectKey{Namespace: system, Name: o.Name}, &appsv1.DaemonSet{})) {
			_ = w.Delete(ctx, p, client.GracePeriodSeconds(0))
		}
	}
	claims := &corev1.PersistentVolumeClaimList{}
	_ = w.List(ctx, claims)
	for i := range claims.Items {
		if c := &claims.Items[i]; !c.DeletionTimestamp.IsZero() {
			c.Finalizers = nil
			_ = w.Update(ctx, c)
		}
	}
	volumes := &corev1.PersistentVolumeList{}
	_ = w.List(ctx, volumes)
	for i := range volumes.Items {
		if v := &volumes.Items[i]; !v.DeletionTimestamp.IsZero() {
			v.Finalizers = nil
			_ = w.Update(ctx, v)
		}
	}
	namespaces := &corev1.NamespaceList{}
	_ = w.List(ctx, namespaces)
	for i := range namespaces.Items {
		if n := &namespaces.Items[i]; !n.DeletionTimestamp.IsZero() {
			set, err := kubernetes.NewForConfig(cluster)
			if err != nil {
				continue
			}
			for _, list := range []client.Object{&corev1.Secret{}, &corev1.ConfigMap{}, &corev1.ServiceAccount{}} {
				_ = w.DeleteAllOf(ctx, list, client.InNamespace(n.Name))
			}
			n.Spec.Finalizers = nil
			_, _ = set.CoreV1().Namespaces().Finalize(ctx, n, metav1.UpdateOptions{})
		}
	}
}

// controllerRuns writes what its Deployment would say.
func (w *world) controllerRuns(replicas int32) {
	w.Helper()
	w.eventually("deployment", func() error {
		d := &appsv1.Deployment{}
		if err := w.Get(w.Context(), client.ObjectKey{Namespace: system, Name: "stepcache-controller"}, d); err != nil {
			return err
		}
		d.Status.Replicas, d.Status.ReadyReplicas, d.Status.AvailableReplicas = replicas, replicas, replicas
		return w.Status().Update(w.Context(), d)
	})
}

// data makes a Dataset that is shared and a load of it, and waits until the controller has made all of their
// objects.
func (w *world) data() {
	w.Helper()
	d := &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes"}, Spec: v1alpha1.DatasetSpec{
		Mounts:    []v1alpha1.Mount{{Source: "s3://data/", Path: "/", Endpoint: "http://127.0.0.1:1", Region: "r", Anonymous: true}},
		Workers:   v1alpha1.Workers{Replicas: 1, Memory: resource.MustParse("16Mi")},
		ShareWith: []v1alpha1.Namespace{v1alpha1.Namespace(w.ns + "-other")},
	}}
	w.must(w.Create(w.Context(), d))
	artifacts := d.DeepCopy()
	artifacts.ObjectMeta = metav1.ObjectMeta{Namespace: w.ns, Name: "artifacts"}
	artifacts.Spec.Access = v1alpha1.ReadWrite
	w.must(w.Create(w.Context(), artifacts))
	l := &v1alpha1.DataLoad{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "warm"}, Spec: v1alpha1.DataLoadSpec{DatasetRef: v1alpha1.Reference{Name: "genomes"}}}
	w.must(w.Create(w.Context(), l))
	for _, o := range []client.Object{
		&appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes-worker"}},
		&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.VolumeName(w.ns, "genomes")}},
		&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "genomes"}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns + "-other", Name: w.ns + ".genomes-reader"}},
		&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "artifacts"}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns + "-other", Name: w.ns + ".artifacts-reader"}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns + "-other", Name: w.ns + ".artifacts-s3"}},
	} {
		w.eventually(o.GetName()+" is there", func() error { return w.Get(w.Context(), client.ObjectKeyFromObject(o), o) })
	}
	w.eventually("the load is held", func() error {
		w.must(w.Get(w.Context(), client.ObjectKeyFromObject(l), l))
		if len(l.Finalizers) == 0 {
			return fmt.Errorf("no finalizer")
		}
		return nil
	})
	// What its StatefulSet would make.
	w.must(w.Create(w.Context(), w.pod("genomes-worker-0", map[string]string{
		v1alpha1.LabelComponent: v1alpha1.ComponentWorker, v1alpha1.LabelDataset: "genomes", "app.kubernetes.io/managed-by": "stepcache",
	}, corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: v1alpha1.DriverName, VolumeAttributes: map[string]string{"volume": "store"}}})))
}

func (w *world) pod(name string, labels map[string]string, v corev1.VolumeSource) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: name, Labels: labels}, Spec: corev1.PodSpec{
		Containers: []corev1.Container{{Name: "main", Image: "busybox"}},
		Volumes:    []corev1.Volume{{Name: "v", VolumeSource: v}},
	}}
}

// output is what an uninstallation says, as it says it.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// uninstall runs one beside the test.
func (w *world) uninstall(ctx context.Context, change func(*uninstall.Options)) (*output, <-chan error) {
	out := &output{}
	o := uninstall.Options{Namespace: system, Poll: 50 * time.Millisecond, Out: out}
	if change != nil {
		change(&o)
	}
	done := make(chan error, 1)
	go func() {
		// Its error names what it waits for, which a test that hangs does not.
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		done <- uninstall.Run(ctx, w.Client, o)
	}()
	return out, done
}

func (w *world) says(out *output, text string) {
	w.Helper()
	w.eventually("it says "+text, func() error {
		if !strings.Contains(out.String(), text) {
			return fmt.Errorf("it says:\n%s", out)
		}
		return nil
	})
}

// clean fails the test where anything of the installation or its Datasets is left.
func (w *world) clean() {
	w.Helper()
	for _, o := range w.objects {
		have := o.DeepCopy()
		err := w.Get(w.Context(), client.ObjectKeyFromObject(o), have)
		if !apierrors.IsNotFound(err) && !meta.IsNoMatchError(err) {
			w.Errorf("%s %s is left: %v", o.GetKind(), o.GetName(), err)
		}
	}
	for _, ns := range []string{w.ns, w.ns + "-other"} {
		for _, kind := range []string{"v1/Secret", "v1/ConfigMap", "v1/Service", "v1/PersistentVolumeClaim", "v1/Pod", "apps/v1/StatefulSet", "policy/v1/PodDisruptionBudget", "networking.k8s.io/v1/NetworkPolicy", "v1/PersistentVolume"} {
			i := strings.LastIndex(kind, "/")
			list := &unstructured.UnstructuredList{}
			list.SetAPIVersion(kind[:i])
			list.SetKind(kind[i+1:] + "List")
			w.must(w.List(w.Context(), list, client.InNamespace(ns), client.HasLabels{v1alpha1.LabelDataset}))
			for _, o := range list.Items {
				w.Errorf("%s %s/%s is left", o.GetKind(), o.GetNamespace(), o.GetName())
			}
		}
		n := &corev1.Namespace{}
		w.must(w.Get(w.Context(), client.ObjectKey{Name: ns}, n))
		for l := range n.Labels {
			if strings.HasPrefix(l, v1alpha1.Group) {
				w.Errorf("namespace %s has label %s still", ns, l)
			}
		}
	}
	node := &corev1.Node{}
	w.must(w.Get(w.Context(), client.ObjectKey{Name: "node"}, node))
	if _, ok := node.Labels[v1alpha1.LabelNodeReady]; ok || node.Labels["kept"] != "yes" {
		w.Errorf("the node's labels are %v", node.Labels)
	}
}

func TestUninstallWaitsForPodsAndLeavesNothing(t *testing.T) {
	w := newWorld(t)
	w.controllerRuns(1)
	w.data()
	byClaim := w.pod("reader", nil, corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "genomes"}})
	w.must(w.Create(t.Context(), byClaim))

	// A dry run names all and changes nothing.
	out, done := w.uninstall(t.Context(), func(o *uninstall.Options) { o.DryRun = true })
	w.must(<-done)
	for _, want := range []string{
		"would delete DataLoad " + w.ns + "/warm", "would delete Dataset " + w.ns + "/genomes", "would wait for 1 pods (" + w.ns + "/reader)",
		"would delete Secret " + w.ns + "-other/" + w.ns + ".genomes-reader", "would delete Secret " + w.ns + "-other/" + w.ns + ".artifacts-s3", "would delete PersistentVolume",
		"would delete MutatingWebhookConfiguration stepcache-inject", "would delete DaemonSet " + system + "/stepcache-node",
		"would take label data.stepcache.dev/node-ready from Node node", "would delete CustomResourceDefinition datasets", "would delete Namespace " + system, "nothing was changed",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the dry run does not say %q:\n%s", want, out)
		}
	}
	if strings.Contains(out.String(), "deleted ") {
		t.Errorf("a dry run deleted:\n%s", out)
	}
	for _, kind := range []string{"StatefulSet", "Service", "ConfigMap"} {
		if strings.Contains(out.String(), "would delete "+kind+" "+w.ns+"/") {
			t.Errorf("the dry run names a %s that goes with its Dataset:\n%s", kind, out)
		}
	}
	d := &v1alpha1.Dataset{}
	w.must(w.Get(t.Context(), client.ObjectKey{Namespace: w.ns, Name: "genomes"}, d))
	if !d.DeletionTimestamp.IsZero() {
		t.Fatal("a dry run deleted the Dataset")
	}

	// It waits for the pod, and can be stopped.
	ctx, cancel := context.WithCancel(t.Context())
	out, done = w.uninstall(ctx, nil)
	w.says(out, "waiting for 1 pods ("+w.ns+"/reader) that use Dataset "+w.ns+"/genomes")
	cancel()
	if err := <-done; err == nil || !strings.Contains(err.Error(), w.ns+"/reader") || !strings.Contains(err.Error(), "run it again") {
		t.Errorf("stopped: %v", err)
	}
	for _, o := range w.objects {
		if strings.Contains(o.GetKind(), "WebhookConfiguration") || o.GetKind() == "DaemonSet" {
			if err := w.Get(t.Context(), client.ObjectKeyFromObject(o), o.DeepCopy()); err != nil {
				t.Errorf("%s %s is gone before the Datasets: %v", o.GetKind(), o.GetName(), err)
			}
		}
	}

	// It goes on where it stopped, and the controller does its part.
	out, done = w.uninstall(t.Context(), nil)
	w.says(out, "waiting for 1 pods")
	w.must(w.Delete(t.Context(), byClaim, client.GracePeriodSeconds(0)))
	w.must(<-done)
	if strings.Contains(out.String(), "no controller runs") {
		t.Errorf("it did not leave the controller its part:\n%s", out)
	}
	w.clean()

	// Once more: nothing is left to do.
	out, done = w.uninstall(t.Context(), nil)
	w.must(<-done)
	if !strings.Contains(out.String(), "nothing of an installation was left") {
		t.Errorf("the second time it said:\n%s", out)
	}
}

func TestUninstallWithADeadControllerAndPodsThatItDeletes(t *testing.T) {
	w := newWorld(t)
	w.data()
	inline := w.pod("inline", nil, corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: v1alpha1.DriverName,
		NodePublishSecretRef: &corev1.LocalObjectReference{Name: w.ns + ".genomes-reader"},
		VolumeAttributes:     map[string]string{v1alpha1.AttributeDataset: "genomes", v1alpha1.AttributeNamespace: w.ns}}})
	inline.Namespace = w.ns + "-other"
	w.must(w.Create(t.Context(), inline))
	w.stop()
	w.controllerRuns(0)
	out, done := w.uninstall(t.Context(), func(o *uninstall.Options) { o.DeletePods = true })
	w.must(<-done)
	for _, want := range []string{"no controller runs", "deleted Pod " + w.ns + "-other/inline", "deleted Namespace " + system} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	w.clean()
}

// To delete the pods of a Deployment again and again would never end.
func TestUninstallLeavesPodsThatWouldBeMadeAnew(t *testing.T) {
	w := newWorld(t)
	w.data()
	w.stop()
	w.controllerRuns(0)
	yes := true
	pods := metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	set := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "web-1", OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: "web", UID: "1", Controller: &yes}}},
		Spec: appsv1.ReplicaSetSpec{Selector: &pods, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: pods.MatchLabels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "busybox"}}},
		}},
	}
	w.must(w.Create(t.Context(), set))
	claim := corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "genomes"}}
	theirs, lone := w.pod("web-1-a", nil, claim), w.pod("lone", nil, claim)
	theirs.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: set.Name, UID: set.UID, Controller: &yes}}
	w.must(w.Create(t.Context(), theirs))
	w.must(w.Create(t.Context(), lone))

	out, done := w.uninstall(t.Context(), func(o *uninstall.Options) { o.DeletePods, o.DryRun = true, true })
	w.must(<-done)
	w.says(out, "those of Deployment "+w.ns+"/web would be made anew")

	out, done = w.uninstall(t.Context(), func(o *uninstall.Options) { o.DeletePods = true })
	w.says(out, "1 pods ("+w.ns+"/web-1-a) that use Dataset "+w.ns+"/genomes; those of Deployment "+w.ns+"/web would be made anew: scale it to 0")
	if text := out.String(); !strings.Contains(text, "deleted Pod "+w.ns+"/lone") || strings.Contains(text, "deleted Pod "+w.ns+"/web") {
		t.Errorf("it said:\n%s", text)
	}
	// Without its set the pod is one as others.
	w.must(w.Delete(t.Context(), set))
	w.must(<-done)
	w.clean()
}

// What workers acknowledged and the bucket does not have is not lost by the way.
func TestUninstallWithADeadControllerAsksBeforeItLosesWrites(t *testing.T) {
	w := newWorld(t)
	w.stop()
	d := &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "artifacts", Finalizers: []string{v1alpha1.Finalizer}}, Spec: v1alpha1.DatasetSpec{
		Mounts:  []v1alpha1.Mount{{Source: "s3://data/", Path: "/", Endpoint: "http://127.0.0.1:1", Region: "r", Anonymous: true}},
		Workers: v1alpha1.Workers{Replicas: 2, Copies: 2, Memory: resource.MustParse("16Mi")},
		Access:  v1alpha1.ReadWrite, Write: v1alpha1.Write{Policy: v1alpha1.WriteBack},
	}}
	w.must(w.Create(t.Context(), d))
	w.controllerRuns(0)
	out, done := w.uninstall(t.Context(), nil)
	w.says(out, "may hold what the bucket does not have")
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
	way := fmt.Sprintf("kubectl annotate dset -n %s artifacts --overwrite data.stepcache.dev/accept-loss=%d", w.ns, d.Generation)
	w.says(out, way)
	w.eventually("the annotation", func() error {
		w.must(w.Get(t.Context(), client.ObjectKeyFromObject(d), d))
		metav1.SetMetaDataAnnotation(&d.ObjectMeta, v1alpha1.AnnotationAcceptLoss, fmt.Sprint(d.Generation))
		return w.Update(t.Context(), d)
	})
	w.must(<-done)
	w.clean()
}

// config/README.md offers nodes of another kind a node service of their own.
func TestUninstallTakesEveryNodeServiceAway(t *testing.T) {
	w := newWorld(t)
	w.stop()
	yes := true
	for _, o := range slices.Clone(w.objects) {
		if o.GetKind() != "DaemonSet" {
			continue
		}
		set := o.DeepCopy()
		set.SetName(o.GetName() + "-gpu")
		w.must(w.Create(t.Context(), set))
		w.objects = append(w.objects, set)
		pod := w.pod(set.GetName()+"-abcde", set.GetLabels(), corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}})
		pod.Namespace = system
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "DaemonSet", Name: set.GetName(), UID: set.GetUID(), Controller: &yes}}
		w.must(w.Create(t.Context(), pod))
	}
	out, done := w.uninstall(t.Context(), nil)
	w.must(<-done)
	text := out.String()
	node, keeper := strings.Index(text, "deleted DaemonSet "+system+"/stepcache-node-gpu"), strings.Index(text, "deleted DaemonSet "+system+"/stepcache-keeper")
	if node < 0 || keeper < node {
		t.Errorf("not every node service before every keeper:\n%s", text)
	}
	w.clean()
}

func TestUninstallKeepsANamespaceThatOthersUse(t *testing.T) {
	w := newWorld(t)
	p := w.pod("theirs", nil, corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}})
	p.Namespace = system
	w.must(w.Create(t.Context(), p))
	w.stop()
	out, done := w.uninstall(t.Context(), nil)
	w.must(<-done)
	if !strings.Contains(out.String(), "namespace "+system+" stays, since pod theirs") {
		t.Errorf("it says:\n%s", out)
	}
	w.must(w.Get(t.Context(), client.ObjectKeyFromObject(p), p))
	for _, o := range w.objects {
		if o.GetKind() == "Namespace" {
			continue
		}
		if err := w.Get(t.Context(), client.ObjectKeyFromObject(o), o.DeepCopy()); !apierrors.IsNotFound(err) && !meta.IsNoMatchError(err) {
			t.Errorf("%s %s is left: %v", o.GetKind(), o.GetName(), err)
		}
	}
	w.must(w.Delete(t.Context(), p, client.GracePeriodSeconds(0)))
	_, done = w.uninstall(t.Context(), nil)
	w.must(<-done)
	w.clean()
}
