package controllers_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/controllers"
	"github.com/stepcache/stepcache/controllers/dataset"
	"github.com/stepcache/stepcache/controllers/envtest"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/tier/upstream"
)

// cluster has all rights; rights are those of an installation's controller.
var cluster, rights *rest.Config

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	c, stop, err := envtest.Start(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	cluster = c
	code := 1
	if rights, err = envtest.Rights(context.Background(), c); err == nil {
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, err)
	}
	if err := stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// clock is the controllers' time: the real one, and what a test adds to it.
type clock struct{ ahead atomic.Int64 }

func (c *clock) Now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// quick is a worker's clock whose waits are a fiftieth of what they are.
type quick struct{}

func (quick) Now() time.Time                         { return time.Now() }
func (quick) After(d time.Duration) <-chan time.Time { return time.After(d / 50) }

// world is a namespace with controllers and a test that plays the rest of a cluster: the StatefulSet
// controller, the binder of claims, the garbage collector, and kubelets that run real workers in this process.
type world struct {
	*testing.T
	client.Client
	ns     string
	clock  *clock
	image  string
	bucket *bucket.Server
	subnet string
	ips    int // addresses given to pods
	dir    string

	stopManager func()
	requests    requests
	dialling    atomic.Int32 // workers that are cut off

	mu      sync.Mutex
	workers map[string]*running // by pod name
	// pending leaves pods without a node and address; the test writes their status itself.
	pending bool
	// podless keeps StatefulSets from getting pods.
	podless bool
	// deaf keeps killed pods' workers from starting again.
	deaf bool
	// lags is what workers say that the bucket does not have, by pod name, once teller, which tells the
	// controllers the workers' answers, is there.
	lags   map[string]wire.Unflushed
	teller string
}

type running struct {
	uid    string
	dir    string
	ip     string
	cancel context.CancelFunc
	done   chan struct{}
	worker *worker.Worker
	// sources are closed after it.
	sources *upstream.Opener
}

var subnets atomic.Int32

func newWorld(t *testing.T) *world {
	t.Helper()
	t.Parallel()
	c, err := client.New(cluster, client.Options{Scheme: controllers.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "stepcache-controllers-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) }) // after what is registered below has ended the workers
	w := &world{
		T: t, Client: c, clock: &clock{}, image: "stepcache:v1", dir: dir, workers: make(map[string]*running),
		// Every pod has an address of its own on the loopback device, since workers' ports are fixed.
		subnet: fmt.Sprintf("127.%d.%d", 1+os.Getpid()%250, 1+subnets.Add(1)),
		bucket: bucket.StartT(t, bucket.Options{}),
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "t-", Labels: map[string]string{
		"pod-security.kubernetes.io/enforce": "restricted", // the workers must be admitted
	}}}
	w.must(c.Create(t.Context(), ns))
	w.ns = ns.Name
	for i := range 3 {
		w.node(i, corev1.ConditionTrue)
	}
	ctx, cancel := context.WithCancel(context.Background())
	played := make(chan struct{})
	go func() {
		defer close(played)
		for w.play(ctx); ctx.Err() == nil; w.play(ctx) {
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	w.start()
	t.Cleanup(func() {
		w.stopManager()
		cancel()
		<-played
		w.mu.Lock()
		for _, r := range w.workers {
			r.stop()
		}
		w.mu.Unlock()
	})
	return w
}

// start runs the controllers; again after stopManager.
func (w *world) start() {
	w.Helper()
	log := logr.FromSlogHandler(slog.NewTextHandler(testLog{w.T}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	counted := rest.CopyConfig(rights)
	counted.Wrap(w.requests.count)
	m, err := controllers.New(counted, controllers.Options{
		Dataset: dataset.Options{
			Namespace: "stepcache-system", Image: w.image, Store: dataset.StoreCSI, Poll: time.Second, Clock: w.clock, Only: w.ns, Dial: w.control,
		},
		LoadPoll: 100 * time.Millisecond, Metrics: "0", Probes: "0", Logger: log,
	})
	if err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Start(ctx) }()
	var once sync.Once
	w.stopManager = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				w.Errorf("manager: %v", err)
			}
		})
	}
}

// requests are what the controllers have asked the API server for, as "METHOD path".
type requests struct {
	mu  sync.Mutex
	all []string
	// refuse is what an older API server, or a policy, takes for invalid.
	refuse string
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (q *requests) count(next http.RoundTripper) http.RoundTripper {
	return roundTrip(func(r *http.Request) (*http.Response, error) {
		q.mu.Lock()
		q.all = append(q.all, r.Method+" "+r.URL.Path)
		refuse := q.refuse
		q.mu.Unlock()
		if refuse != "" && r.Body != nil {
			b, err := io.ReadAll(r.Body)
			r.Body.Close()
			if err != nil {
				return nil, err
			}
			if bytes.Contains(b, []byte(refuse)) {
				status, _ := json.Marshal(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: metav1.StatusReasonInvalid, Code: http.StatusUnprocessableEntity, Message: "it holds what is not supported"})
				return &http.Response{StatusCode: http.StatusUnprocessableEntity, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(status)), Request: r}, nil
			}
			r = r.Clone(r.Context())
			r.Body = io.NopCloser(bytes.NewReader(b))
		}
		return next.RoundTrip(r)
	})
}

// refusing has the API server not take what holds a text; nothing: it takes all again.
func (q *requests) refusing(text string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.refuse = text
}

// since are the requests after the first n, and how many there are in all.
func (q *requests) since(n int) ([]string, int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.all[n:]), len(q.all)
}

// testLog writes to the test's log.
type testLog struct{ testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	defer func() { _ = recover() }() // the test is over
	l.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// eventually waits until f has nothing to complain of.
func (w *world) eventually(what string, f func() error) {
	w.Helper()
	envtest.Eventually(w, what, f)
}

func (w *world) nodeName(i int) string { return fmt.Sprintf("%s-node-%d", w.ns, i) }

func (w *world) node(i int, ready corev1.ConditionStatus) {
	w.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: w.nodeName(i), Labels: map[string]string{v1alpha1.LabelNodeReady: "true"}}}
	if err := w.Create(w.Context(), n); err != nil && !apierrors.IsAlreadyExists(err) {
		w.Fatal(err)
	}
	w.must(w.Get(w.Context(), client.ObjectKeyFromObject(n), n))
	n.Status.Conditions = []corev1.NodeCondition{{
		Type: corev1.NodeReady, Status: ready, Reason: "NodeStatusUnknown", LastTransitionTime: metav1.NewTime(w.clock.Now()),
	}}
	w.must(w.Status().Update(w.Context(), n))
}

// play does once what the rest of a cluster does. What fails is tried again.
func (w *world) play(ctx context.Context) {
	envtest.CollectPods(ctx, w, client.InNamespace(w.ns))
	w.collect(ctx)
	claims := &corev1.PersistentVolumeClaimList{}
	_ = w.List(ctx, claims, client.InNamespace(w.ns))
	for i := range claims.Items {
		if c := &claims.Items[i]; c.Status.Phase != corev1.ClaimBound && c.Spec.VolumeName != "" {
			c.Status.Phase = corev1.ClaimBound
			_ = w.Status().Update(ctx, c)
		}
	}
	sets := &appsv1.StatefulSetList{}
	_ = w.List(ctx, sets, client.InNamespace(w.ns))
	pods := &corev1.PodList{}
	if w.List(ctx, pods, client.InNamespace(w.ns), client.MatchingLabels{v1alpha1.LabelComponent: v1alpha1.ComponentWorker}) != nil {
		return
	}
	have := make(map[string]*corev1.Pod)
	for i := range pods.Items {
		pod := &pods.Items[i]
		have[pod.Name] = pod
		if !slices.ContainsFunc(sets.Items, func(s appsv1.StatefulSet) bool { return strings.HasPrefix(pod.Name, s.Name+"-") }) && pod.DeletionTimestamp.IsZero() {
			_ = w.Delete(ctx, pod)
		}
	}
	for i := range sets.Items {
		s := &sets.Items[i]
		for n := range int(*s.Spec.Replicas) {
			if name := fmt.Sprintf("%s-%d", s.Name, n); have[name] == nil {
				w.makePod(ctx, s, name, n)
			}
		}
		for name, pod := range have {
			var n int
			if _, err := fmt.Sscanf(strings.TrimPrefix(name, s.Name+"-"), "%d", &n); err == nil && n >= int(*s.Spec.Replicas) && pod.DeletionTimestamp.IsZero() {
				_ = w.Delete(ctx, pod)
			}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, r := range w.workers {
		if pod := have[name]; pod == nil || string(pod.UID) != r.uid {
			r.stop()
			delete(w.workers, name)
		}
	}
	if w.pending {
		return
	}
	for _, pod := range have {
		w.kubelet(ctx, pod)
	}
}

// kinds are those of a Dataset's objects in its namespace.
func kinds() []client.ObjectList {
	return []client.ObjectList{
		&appsv1.StatefulSetList{}, &corev1.ConfigMapList{}, &corev1.SecretList{}, &corev1.ServiceList{},
		&corev1.PersistentVolumeClaimList{}, &policyv1.PodDisruptionBudgetList{}, &networkingv1.NetworkPolicyList{},
	}
}

// belongings are the objects of a Dataset in its namespace.
func (w *world) belongings(ctx context.Context, name string) (all []client.Object) {
	for _, list := range kinds() {
		_ = w.List(ctx, list, client.InNamespace(w.ns), client.MatchingLabels{v1alpha1.LabelDataset: name})
		_ = meta.EachListItem(list, func(o runtime.Object) error {
			all = append(all, o.(client.Object))
			return nil
		})
	}
	return all
}

// collect does once what the garbage collector does where Datasets are deleted with propagation policy Foreground: it
// deletes what they own, whatever their other finalizers wait for, and then takes its own finalizer off.
func (w *world) collect(ctx context.Context) {
	all := &v1alpha1.DatasetList{}
	_ = w.List(ctx, all, client.InNamespace(w.ns))
	for i := range all.Items {
		d := &all.Items[i]
		if !slices.Contains(d.Finalizers, metav1.FinalizerDeleteDependents) {
			continue
		}
		left := false
		for _, o := range w.belongings(ctx, d.Name) {
			if slices.ContainsFunc(o.GetOwnerReferences(), func(r metav1.OwnerReference) bool { return r.UID == d.UID }) {
				left = true
				_ = w.Delete(ctx, o)
			}
		}
		if !left {
			d.Finalizers = slices.DeleteFunc(d.Finalizers, func(f string) bool { return f == metav1.FinalizerDeleteDependents })
			_ = w.Update(ctx, d)
		}
	}
}

func (w *world) makePod(ctx context.Context, s *appsv1.StatefulSet, name string, n int) {
	w.mu.Lock()
	pending, podless := w.pending, w.podless
	w.mu.Unlock()
	if podless {
		return
	}
	pod := &corev1.Pod{ObjectMeta: *s.Spec.Template.ObjectMeta.DeepCopy(), Spec: *s.Spec.Template.Spec.DeepCopy()}
	pod.Name, pod.Namespace = name, w.ns
	if !pending {
		pod.Spec.NodeName = w.schedule(ctx, n)
	}
	if err := w.Create(ctx, pod); err != nil && ctx.Err() == nil && !apierrors.IsAlreadyExists(err) {
		w.Errorf("pod %s not admitted: %v", name, err)
	}
}

// schedule picks a ready node, by number.
func (w *world) schedule(ctx context.Context, n int) string {
	for i := range 3 {
		node := &corev1.Node{}
		name := w.nodeName((n + i) % 3)
		if w.Get(ctx, client.ObjectKey{Name: name}, node) == nil && node.Status.Conditions[0].Status == corev1.ConditionTrue {
			return name
		}
	}
	return w.nodeName(n % 3)
}

// kubelet runs one pod's worker and tells how it is. Callers hold mu.
func (w *world) kubelet(ctx context.Context, pod *corev1.Pod) {
	node := &corev1.Node{}
	if w.Get(ctx, client.ObjectKey{Name: pod.Spec.NodeName}, node) != nil || node.Status.Conditions[0].Status != corev1.ConditionTrue {
		return // it does not answer, and its pods neither end nor change
	}
	r := w.workers[pod.Name]
	if !pod.DeletionTimestamp.IsZero() {
		if r != nil {
			r.stop()
			delete(w.workers, pod.Name)
		}
		_ = w.Delete(ctx, pod, client.GracePeriodSeconds(0))
		return
	}
	if r == nil {
		if w.deaf {
			return
		}
		if r = w.run(ctx, pod); r == nil {
			return
		}
		w.workers[pod.Name] = r
	}
	_, _ = w.project(ctx, pod, r.dir)
	ready := corev1.ConditionFalse
	select {
	case <-r.done:
	default:
		if r.worker.Status().Reason == "" {
			ready = corev1.ConditionTrue
		}
	}
	before := pod.DeepCopy()
	pod.Status.Phase, pod.Status.PodIP = corev1.PodRunning, r.ip
	pod.Status.PodIPs = []corev1.PodIP{{IP: r.ip}}
	meta := metav1.NewTime(w.clock.Now())
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: ready, LastTransitionTime: meta}}
	if len(before.Status.Conditions) == 1 && before.Status.Conditions[0].Status == ready && before.Status.PodIP == r.ip {
		return
	}
	_ = w.Status().Patch(ctx, pod, client.MergeFrom(before))
}

// project writes what a pod's volumes show below dir, and returns the worker's configuration.
func (w *world) project(ctx context.Context, pod *corev1.Pod, dir string) (worker.Config, error) {
	paths := make(map[string]string) // by path in the pod
	for _, m := range pod.Spec.Containers[0].VolumeMounts {
		paths[m.MountPath] = filepath.Join(dir, m.Name)
		for _, v := range pod.Spec.Volumes {
			if v.Name != m.Name {
				continue
			}
			data := map[string][]byte{}
			switch {
			case v.ConfigMap != nil:
				cm := &corev1.ConfigMap{}
				if err := w.Get(ctx, client.ObjectKey{Namespace: w.ns, Name: v.ConfigMap.Name}, cm); err != nil {
					return worker.Config{}, err
				}
				for k, s := range cm.Data {
					data[k] = []byte(s)
				}
			case v.Secret != nil:
				s := &corev1.Secret{}
				err := w.Get(ctx, client.ObjectKey{Namespace: w.ns, Name: v.Secret.SecretName}, s)
				if err != nil && (v.Secret.Optional == nil || !*v.Secret.Optional || !apierrors.IsNotFound(err)) {
					return worker.Config{}, err
				}
				data = s.Data
			}
			if err := writeAll(paths[m.MountPath], data); err != nil {
				return worker.Config{}, err
			}
		}
	}
	b, err := os.ReadFile(filepath.Join(paths["/etc/stepcache/worker"], "worker.json"))
	if err != nil {
		return worker.Config{}, err
	}
	var c worker.Config
	if err := json.Unmarshal(b, &c); err != nil {
		return worker.Config{}, err
	}
	real := func(path string) string {
		for at, dir := range paths {
			if rest, ok := strings.CutPrefix(path, at); ok && (rest == "" || rest[0] == '/') {
				return dir + rest
			}
		}
		return path + " is not mounted"
	}
	c.ID, c.Dir, c.KeysDir, c.MembershipFile, c.Socket = pod.Name, real(c.Dir), real(c.KeysDir), real(c.MembershipFile), ""
	if c.Gateway != nil {
		c.Gateway.Credentials = real(c.Gateway.Credentials)
	}
	for i := range c.Mounts {
		if c.Mounts[i].CredentialsDir != "" {
			c.Mounts[i].CredentialsDir = real(c.Mounts[i].CredentialsDir)
		}
	}
	return c, nil
}

// writeAll makes a folder hold exactly these files, each replaced at once.
func writeAll(dir string, files map[string][]byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, b := range files {
		path := filepath.Join(dir, name)
		if have, err := os.ReadFile(path); err == nil && string(have) == string(b) {
			continue
		}
		if err := os.WriteFile(path+".new", b, 0o600); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
	}
	return nil
}

// run starts a pod's worker; nil when what it mounts is not there yet. Callers hold mu.
func (w *world) run(ctx context.Context, pod *corev1.Pod) *running {
	r := &running{uid: string(pod.UID), dir: filepath.Join(w.dir, string(pod.UID)), done: make(chan struct{})}
	c, err := w.project(ctx, pod, r.dir)
	if err != nil {
		return nil // what it mounts is not there yet
	}
	// A pod that is made anew has another address.
	r.ip = fmt.Sprintf("%s.%d", w.subnet, 1+w.ips%250)
	w.ips++
	c.Listen, c.Control = r.ip+c.Listen, r.ip+c.Control
	if c.Gateway != nil {
		c.Gateway.Listen = r.ip + c.Gateway.Listen
	}
	log := slog.New(slog.DiscardHandler)
	r.sources = &upstream.Opener{Logger: log, Dial: w.dial}
	wk, err := worker.New(context.Background(), c, worker.Deps{Clock: quick{}, Logger: log, OpenSource: r.sources.Open})
	if err != nil {
		w.Errorf("worker %s: %v", pod.Name, err)
		return nil
	}
	var wctx context.Context
	wctx, r.cancel = context.WithCancel(context.Background())
	r.worker = wk
	go func() {
		defer close(r.done)
		if err := wk.Serve(wctx); err != nil {
			w.Errorf("worker %s: %v", pod.Name, err)
		}
	}()
	return r
}

// dial connects to a worker by its address, or to some worker of a Dataset by its Service's name.
func (w *world) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if service, ok := strings.CutSuffix(addr, "-worker."+w.ns+".svc:7070"); ok {
		cm := &corev1.ConfigMap{}
		if err := w.Get(ctx, client.ObjectKey{Namespace: w.ns, Name: v1alpha1.TierName(service)}, cm); err != nil {
			return nil, err
		}
		m, err := ring.Parse([]byte(cm.Data[v1alpha1.KeyMembership]))
		if err != nil || len(m.Members) == 0 {
			return nil, fmt.Errorf("service %s has no endpoints: %v", addr, err)
		}
		addr = m.Members[0].Addr
	}
	return (&net.Dialer{}).DialContext(ctx, network, addr)
}

func (r *running) stop() {
	r.cancel()
	<-r.done
	r.sources.Close()
	os.RemoveAll(r.dir)
}

// set changes how the cluster is played.
func (w *world) set(f func(w *world)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(w)
}

// secret is the credentials of the bucket.
func (w *world) secret(name string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: name}, StringData: map[string]string{
		"accessKeyID": w.bucket.AccessKey, "accessKeySecret": w.bucket.SecretKey,
	}}
}

// dataset is a Dataset of the bucket named data.
func (w *world) dataset(name string, replicas int32) *v1alpha1.Dataset {
	return &v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: name}, Spec: v1alpha1.DatasetSpec{
		Mounts: []v1alpha1.Mount{{
			Source: "s3://data/", Path: "/", Endpoint: w.bucket.Endpoint(), Region: w.bucket.Region,
			CredentialsSecretRef: &v1alpha1.CredentialsRef{Name: "access-key"},
		}},
		Workers: v1alpha1.Workers{Replicas: replicas, Memory: resource.MustParse("64Mi")},
	}}
}

// ready makes a Dataset over n files of size bytes and waits until it is ready.
func (w *world) ready(name string, replicas int32, n, size int) *v1alpha1.Dataset {
	w.Helper()
	p := make([]byte, size)
	for i := range n {
		rand.Read(p)
		w.bucket.PutT(w.T, "data", fmt.Sprintf("dir%d/file%d", i%2, i), p)
	}
	if err := w.Create(w.Context(), w.secret("access-key")); err != nil && !apierrors.IsAlreadyExists(err) {
		w.Fatal(err)
	}
	d := w.dataset(name, replicas)
	w.must(w.Create(w.Context(), d))
	return w.waitReady(d)
}

func (w *world) waitReady(d *v1alpha1.Dataset) *v1alpha1.Dataset {
	w.Helper()
	w.eventually("dataset "+d.Name+" is ready", func() error {
		if err := w.Get(w.Context(), client.ObjectKeyFromObject(d), d); err != nil {
			return err
		}
		if d.Status.Phase != v1alpha1.DatasetReady || d.Status.ObservedGeneration != d.Generation || d.Status.Workers.Ready != d.Spec.Workers.Replicas || d.Status.Workers.Replicas != d.Spec.Workers.Replicas {
			return fmt.Errorf("status %s", asJSON(d.Status))
		}
		return nil
	})
	return d
}

func asJSON(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}

// condition waits until a condition has a status and reason and its message holds all parts.
func (w *world) condition(o client.Object, kind string, status metav1.ConditionStatus, reason string, parts ...string) {
	w.Helper()
	w.eventually(fmt.Sprintf("%s is %s for %s", kind, status, reason), func() error {
		if err := w.Get(w.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			return err
		}
		var list []metav1.Condition
		switch o := o.(type) {
		case *v1alpha1.Dataset:
			list = o.Status.Conditions
		case *v1alpha1.DataLoad:
			list = o.Status.Conditions
		}
		c := meta.FindStatusCondition(list, kind)
		if c == nil || c.Status != status || c.Reason != reason {
			return fmt.Errorf("conditions %s", asJSON(list))
		}
		for _, p := range parts {
			if !strings.Contains(c.Message, p) {
				return fmt.Errorf("message %q does not say %q", c.Message, p)
			}
		}
		return nil
	})
}

// event waits for an Event with a reason whose note holds all parts.
func (w *world) event(reason string, parts ...string) {
	w.Helper()
	w.eventually("event "+reason, func() error {
		list := &eventsv1.EventList{}
		if err := w.List(w.Context(), list, client.InNamespace(w.ns)); err != nil {
			return err
		}
		var notes []string
	next:
		for _, e := range list.Items {
			notes = append(notes, e.Reason+": "+e.Note)
			if e.Reason != reason {
				continue
			}
			for _, p := range parts {
				if !strings.Contains(e.Note, p) {
					continue next
				}
			}
			return nil
		}
		return fmt.Errorf("events %q", notes)
	})
}

// update changes an object, again when somebody else did meanwhile.
func update[T client.Object](w *world, o T, change func(T)) {
	w.Helper()
	w.eventually("update", func() error {
		if err := w.Get(w.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			return err
		}
		change(o)
		return w.Update(w.Context(), o)
	})
}

// members is the membership as it is written.
func (w *world) members(d *v1alpha1.Dataset) ring.Membership {
	w.Helper()
	cm := &corev1.ConfigMap{}
	w.must(w.Get(w.Context(), client.ObjectKey{Namespace: w.ns, Name: v1alpha1.TierName(d.Name)}, cm))
	m, err := ring.Parse([]byte(cm.Data[v1alpha1.KeyMembership]))
	w.must(err)
	return m
}

// statuses are what the running workers say of themselves, by name.
func (w *world) statuses() map[string]wire.WorkerStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make(map[string]wire.WorkerStatus)
	for name, r := range w.workers {
		out[name] = r.worker.Status()
	}
	return out
}
