package config

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/go-logr/logr"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	kclient "sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/controllers"
	"github.com/stepcache/stepcache/controllers/dataset"
	nodeservice "github.com/stepcache/stepcache/csi"
	"github.com/stepcache/stepcache/test/ports"
	"github.com/stepcache/stepcache/webhook"
)

// asked is a series that a panel or an alert asks for.
type asked struct {
	Metric   string
	Matchers []struct{ Name, Type, Value string }
	By       []string
}

// scraped are labels that the scrape adds, and of which program they are; TestScrapedPods makes them.
var scraped = map[string]func(component string) bool{
	"component": always, "node": always, "namespace": always, "pod": always, "job": always, "instance": always,
	"dataset": func(component string) bool { return component == "worker" },
}

func always(string) bool { return true }

// expressions are those of the dashboard and of the alerts, by where they stand.
func expressions(t *testing.T) (exprs, where []string) {
	t.Helper()
	var board struct {
		Panels []struct {
			ID      int
			Title   string
			Type    string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
		Templating struct{ List []struct{ Definition string } }
	}
	b, err := os.ReadFile("components/grafana/stepcache.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	variables := strings.NewReplacer("$__rate_interval", "5m", "$dataset", ".*")
	ids := map[int]bool{}
	taken := map[[2]int]string{}
	for _, p := range board.Panels {
		if ids[p.ID] {
			t.Errorf("panel %q: its id %d is another's", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if o := taken[[2]int{x, y}]; o != "" {
					t.Fatalf("panel %q lies over %q", p.Title, o)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %q goes over the edge", p.Title)
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q asks for nothing", p.Title)
		}
		for _, e := range p.Targets {
			exprs, where = append(exprs, variables.Replace(e.Expr)), append(where, "panel "+p.Title)
		}
	}
	for _, v := range board.Templating.List {
		if m := regexp.MustCompile(`^label_values\((\w+), (\w+)\)$`).FindStringSubmatch(v.Definition); m != nil {
			exprs, where = append(exprs, "sum by ("+m[2]+") ("+m[1]+")"), append(where, "variable "+m[2])
		}
	}
	var alerts struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if b, err = os.ReadFile("components/prometheus/plain/alerts.yaml"); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, &alerts); err != nil {
		t.Fatal(err)
	}
	for _, g := range alerts.Groups {
		for _, r := range g.Rules {
			exprs, where = append(exprs, r.Expr), append(where, "alert "+r.Alert)
		}
	}
	return exprs, where
}

// missing says what of the asked there is not in the families of the programs; "" where all is.
func missing(a asked, of map[string]map[string]*dto.MetricFamily) string {
	if a.Metric == "up" { // Prometheus's own
		for _, l := range a.labels() {
			if scraped[l] == nil {
				return "up has no label " + l
			}
		}
		return ""
	}
	name := a.Metric
	var why []string
	for _, component := range []string{"controllers", "worker", "node"} {
		f := of[component][name]
		if f == nil {
			for _, part := range []string{"_bucket", "_count", "_sum"} {
				if base, ok := strings.CutSuffix(name, part); ok && of[component][base].GetType() == dto.MetricType_HISTOGRAM {
					f = of[component][base]
				}
			}
		}
		if f == nil {
			continue
		}
		w := lacks(a, component, f)
		if w == "" {
			return ""
		}
		why = append(why, w)
	}
	if why == nil {
		return "no program exports " + name
	}
	return strings.Join(why, "; ")
}

func (a asked) labels() []string {
	all := slices.Clone(a.By)
	for _, m := range a.Matchers {
		all = append(all, m.Name)
	}
	return all
}

// lacks says what no series of the family has.
func lacks(a asked, component string, f *dto.MetricFamily) string {
	value := func(m *dto.Metric, label string) (string, bool) {
		for _, p := range m.Label {
			if p.GetName() == label {
				return p.GetValue(), true
			}
		}
		return "", false
	}
	for _, l := range a.labels() {
		if by := scraped[l]; by != nil && by(component) || l == "le" && f.GetType() == dto.MetricType_HISTOGRAM {
			continue
		}
		if !slices.ContainsFunc(f.Metric, func(m *dto.Metric) bool { _, ok := value(m, l); return ok }) {
			return fmt.Sprintf("%s of %s has no label %s", f.GetName(), component, l)
		}
	}
	if slices.ContainsFunc(f.Metric, func(s *dto.Metric) bool {
		for _, m := range a.Matchers {
			v, own := value(s, m.Name)
			if own && (m.Type == "=" && v != m.Value || m.Type == "=~" && !regexp.MustCompile("^(?:"+m.Value+")$").MatchString(v)) {
				return false
			}
		}
		return true
	}) {
		return ""
	}
	return fmt.Sprintf("no series of %s matches %v", f.GetName(), a.Matchers)
}

// Every metric, label and label value that the dashboard and the alerts ask for is exported by the programs:
// controller and webhook over a real API server, a worker that served and refused reads, the node service with
// a mount in a pod, and a worker with an S3 endpoint whose bucket does not answer.
func TestMetricsExist(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the node service mounts")
	}
	if err := mount.Supported(); err != nil {
		t.Skip(err)
	}
	exprs, where := expressions(t)
	var found [][]asked
	ask(t, &found, exprs, "selectors")
	of := map[string]map[string]*dto.MetricFamily{}
	of["worker"], of["node"] = workerAndNode(t)
	for name, f := range writableWorker(t) {
		if of["worker"][name] == nil {
			of["worker"][name] = f
		}
	}
	of["controllers"] = controlPlane(t, cluster(t))

	seen := map[string]bool{}
	for i := range found {
		if len(found[i]) == 0 {
			t.Errorf("%s: %s asks for no series", where[i], exprs[i])
		}
		for _, a := range found[i] {
			seen[a.Metric] = true
			if why := missing(a, of); why != "" {
				t.Errorf("%s: %s", where[i], why)
			}
		}
	}
	if len(seen) < 30 {
		t.Errorf("only %d metrics are asked for: are the expressions read?", len(seen))
	}
	// The comparison can fail.
	for _, bad := range []asked{
		{Metric: "stepcache_worker_served_byte_total"},
		{Metric: "stepcache_worker_served_bytes_total", By: []string{"kind"}},
		{Metric: "stepcache_node_keeper_connected", By: []string{"dataset"}}, // the node's pods have none
		{Metric: "stepcache_source_requests_total", Matchers: []struct{ Name, Type, Value string }{{"op", "=", "read"}}},
		{Metric: "stepcache_gateway_requests_total", Matchers: []struct{ Name, Type, Value string }{{"code", "=~", "5|03"}}},
		{Metric: "up", By: []string{"kind"}},
	} {
		if missing(bad, of) == "" {
			t.Errorf("%+v is said to exist", bad)
		}
	}
}

// Where a component has no pod at all, a sum over its pods has no series, which equals nothing.
func TestAlertsOfAComponentFireWithoutAnyPodOfIt(t *testing.T) {
	exprs, where := expressions(t)
	n := 0
	for i, e := range exprs {
		if m := regexp.MustCompile(`sum\(up\{component="\w+"\}\)`).FindString(e); m != "" {
			n++
			if e != "("+m+" or vector(0)) == 0" {
				t.Errorf("%s: %s", where[i], e)
			}
		}
	}
	if n != 2 { // webhook and controller
		t.Errorf("%d alerts count the pods that answer", n)
	}
}

func parse(t *testing.T, r io.Reader) map[string]*dto.MetricFamily {
	t.Helper()
	p := expfmt.NewTextParser(model.UTF8Validation)
	all, err := p.TextToMetricFamilies(r)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func scrape(t *testing.T, addr string) map[string]*dto.MetricFamily {
	t.Helper()
	r, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		t.Fatalf("metrics of %s: %s", addr, r.Status)
	}
	return parse(t, r.Body)
}

func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// start runs something until the test ends.
func start(t *testing.T, what string, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
	})
}

// workerAndNode are a worker and a node service of one Dataset, of which a pod read one file, and failed to
// read another that had changed in the bucket.
func workerAndNode(t *testing.T) (ofWorker, ofNode map[string]*dto.MetricFamily) {
	t.Helper()
	dir, err := os.MkdirTemp("", "c") // sockets are below it, whose paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if below, err := mountinfo.Below(dir); err == nil {
			for _, m := range below {
				_, _ = mountinfo.Detach(m.Point, nil)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	quiet := slog.New(slog.DiscardHandler)
	bucket := filepath.Join(dir, "bucket")
	for _, sub := range []string{"bucket", "store", "keys", "kubelet", "sockets", "cache"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(bucket, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("good", "as it was")
	write("changes", "as it was")
	keys := wire.GenerateKeys()
	if err := wire.WriteKeys(filepath.Join(dir, "keys"), keys); err != nil {
		t.Fatal(err)
	}
	w, err := worker.New(t.Context(), worker.Config{
		Dataset: "argo/genomes", ID: "genomes-worker-0", Memory: 64 << 20, Dir: filepath.Join(dir, "store"), KeysDir: filepath.Join(dir, "keys"),
		Listen: "127.0.0.1:0", Control: "127.0.0.1:0",
		Mounts: []worker.Mount{{Path: "/", Config: source.Config{URL: "file://" + bucket}}},
	}, worker.Deps{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	start(t, "worker", w.Serve)
	eventually(t, "the worker's listing", func() error {
		if w.Status().Snapshot == "" {
			return errors.New(w.Status().Problem)
		}
		return nil
	})

	listen := ports.Free(t, 1)[0]
	c := nodeservice.Config{
		NodeName: "n1", KubeletDir: filepath.Join(dir, "kubelet"), SocketDir: filepath.Join(dir, "sockets"), CacheDir: filepath.Join(dir, "cache"),
		KeeperWait: time.Millisecond, Listen: listen, Logger: quiet,
		Seeds: func(string, string) []string { return []string{w.Addr().String()} },
	}
	start(t, "node service", func(ctx context.Context) error { return nodeservice.Run(ctx, c) })
	conn, err := grpc.NewClient("unix:"+filepath.Join(c.KubeletDir, "plugins", v1alpha1.DriverName, "csi.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	kubelet := csi.NewNodeClient(conn)
	target := filepath.Join(c.KubeletDir, "pods", "p", "mount")
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := kubelet.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: "argo/genomes", TargetPath: target, Readonly: true,
		VolumeCapability: &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY},
		},
		VolumeContext: map[string]string{v1alpha1.AttributeNamespace: "argo", v1alpha1.AttributeDataset: "genomes"},
		Secrets:       map[string]string{v1alpha1.KeyRead: string(wire.FormatKeys(keys.Read))},
	}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := kubelet.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "argo/genomes", TargetPath: target}); err != nil {
			t.Error(err)
		}
	})
	if b, err := os.ReadFile(filepath.Join(target, "good")); err != nil || string(b) != "as it was" {
		t.Fatalf("%q, %v", b, err)
	}
	write("changes", "otherwise and longer")
	if b, err := os.ReadFile(filepath.Join(target, "changes")); err == nil {
		t.Fatalf("read %q of an object that changed", b)
	}
	return scrape(t, w.ControlAddr().String()), scrape(t, listen)
}

// writableWorker is a worker of a Dataset that takes puts, whose bucket nobody serves, after one request.
func writableWorker(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	dir := t.TempDir()
	for _, sub := range []string{"keys", "s3"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{"accessKeyID": "KEY", "secretAccessKey": "secret"} {
		if err := os.WriteFile(filepath.Join(dir, "s3", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := wire.WriteKeys(filepath.Join(dir, "keys"), wire.GenerateKeys()); err != nil {
		t.Fatal(err)
	}
	w, err := worker.New(t.Context(), worker.Config{
		Dataset: "argo/results", ID: "results-worker-0", Memory: 64 << 20, Dir: filepath.Join(dir, "store"), KeysDir: filepath.Join(dir, "keys"),
		Listen: "127.0.0.1:0", Control: "127.0.0.1:0",
		Mounts:  []worker.Mount{{Path: "/", Config: source.Config{URL: "s3://results/", Endpoint: "http://127.0.0.1:1", Region: "us-east-1", Anonymous: true}}},
		Gateway: &worker.GatewayConfig{Listen: "127.0.0.1:0", Bucket: "results", Credentials: filepath.Join(dir, "s3")},
	}, worker.Deps{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	start(t, "worker with an S3 endpoint", w.Serve)
	s3, err := minio.New(w.GatewayAddr().String(), &minio.Options{Creds: credentials.NewStaticV4("KEY", "secret", ""), MaxRetries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s3.StatObject(t.Context(), "results", "a", minio.StatObjectOptions{}); minio.ToErrorResponse(err).StatusCode != http.StatusServiceUnavailable {
		t.Fatalf("without a bucket: %v", err)
	}
	var all map[string]*dto.MetricFamily
	eventually(t, "the request is counted", func() error {
		all = scrape(t, w.ControlAddr().String())
		if all["stepcache_gateway_request_seconds"] == nil { // it is the last one that a request brings
			return errors.New("not yet")
		}
		return nil
	})
	return all
}

// controlPlane are the metrics of controller and webhook, which share a registry in this process.
func controlPlane(t *testing.T, cluster *rest.Config) map[string]*dto.MetricFamily {
	t.Helper()
	c, err := kclient.New(cluster, kclient.Options{Scheme: controllers.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []kclient.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "stepcache-system"}},
		&v1alpha1.Dataset{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "genomes"}, Spec: v1alpha1.DatasetSpec{
			Mounts:  []v1alpha1.Mount{{Source: "s3://inputs/", Path: "/", Endpoint: "http://127.0.0.1:1", Region: "us-east-1", Anonymous: true}},
			Workers: v1alpha1.Workers{Replicas: 1, Memory: resource.MustParse("256Mi")},
		}},
		&v1alpha1.DataLoad{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "warm"}, Spec: v1alpha1.DataLoadSpec{DatasetRef: v1alpha1.Reference{Name: "genomes"}}},
	} {
		if err := c.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	m, err := controllers.New(cluster, controllers.Options{
		Dataset:  dataset.Options{Namespace: "stepcache-system", Image: "stepcache:test", Store: dataset.StoreEmptyDir, Poll: time.Second},
		LoadPoll: time.Second, Metrics: "0", Probes: "0", Logger: logr.Discard(),
	})
	if err != nil {
		t.Fatal(err)
	}
	start(t, "controller", m.Start)
	port := ports.FreeNumber(t)
	h, err := webhook.New(cluster, webhook.Options{
		Namespace: "stepcache-system", Image: "stepcache:test", StageLimit: 1 << 30, Host: "127.0.0.1", Port: port, Metrics: "0", Probes: "0",
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	start(t, "webhook", h.Start)
	// Of a call without a body there is a latency, too.
	client := &http.Client{Timeout: patience, Transport: insecureTransport()}
	eventually(t, "the webhook answers", func() error {
		r, err := client.Post(fmt.Sprintf("https://127.0.0.1:%d%s", port, webhook.PathInject), "application/json", strings.NewReader("{}"))
		if err != nil {
			return err
		}
		return r.Body.Close()
	})
	var all map[string]*dto.MetricFamily
	eventually(t, "the state of the objects", func() error {
		families, err := metrics.Registry.Gather()
		if err != nil {
			return err
		}
		all = map[string]*dto.MetricFamily{}
		for _, f := range families {
			all[f.GetName()] = f
		}
		for _, name := range []string{"stepcache_dataset_condition", "stepcache_dataload_phase", "controller_runtime_reconcile_errors_total"} {
			if all[name] == nil {
				return fmt.Errorf("no %s yet", name)
			}
		}
		return nil
	})
	return all
}

// insecureTransport is for a certificate that nobody but the API server is told of.
func insecureTransport() *http.Transport {
	return &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
}
