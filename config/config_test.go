// Package config holds the manifests of an installation; its tests apply them to a real API server, and
// compare what dashboards and alerts ask for with what the programs export.
package config

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	kclient "sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/controllers/envtest"
)

// patience bounds what normally takes milliseconds.
const patience = 3 * time.Minute

// insideNamespace is set in the process that has a mount namespace of its own.
const insideNamespace = "STEPCACHE_CONFIG_TEST_INSIDE"

// The node service mounts: so the tests run in a mount namespace that goes with them.
func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	if os.Geteuid() != 0 || os.Getenv(insideNamespace) != "" {
		os.Exit(m.Run())
	}
	exe, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	c := exec.Command(exe, os.Args[1:]...)
	c.Env = append(os.Environ(), insideNamespace+"=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err = c.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(max(exit.ExitCode(), 1))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tests in a mount namespace of their own:", err)
		os.Exit(1)
	}
}

// program is tools/manifests, built once.
var program = sync.OnceValues(func() (string, error) {
	out, err := filepath.Abs("../.bin/manifests")
	if err != nil {
		return "", err
	}
	c := exec.Command("go", "build", "-o", out, ".")
	c.Dir = "../tools/manifests"
	if b, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build tools/manifests: %w\n%s", err, b)
	}
	return out, nil
})

// manifests runs tools/manifests.
func manifests(t *testing.T, in any, args ...string) ([]byte, error) {
	t.Helper()
	exe, err := program()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(exe, args...)
	switch in := in.(type) {
	case nil:
	case []byte:
		c.Stdin = bytes.NewReader(in)
	default:
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		c.Stdin = bytes.NewReader(b)
	}
	var out, said bytes.Buffer
	c.Stdout, c.Stderr = &out, &said
	if err := c.Run(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, said.String())
	}
	return out.Bytes(), nil
}

func ask(t *testing.T, answer, in any, args ...string) {
	t.Helper()
	b, err := manifests(t, in, args...)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, answer); err != nil {
		t.Fatal(err)
	}
}

// build is what `kubectl apply -k` would apply.
func build(t *testing.T, dir string) []*unstructured.Unstructured {
	t.Helper()
	b, err := manifests(t, nil, "build", dir)
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	var all []*unstructured.Unstructured
	for d := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(b), 4096); ; {
		u := &unstructured.Unstructured{}
		if err := d.Decode(&u.Object); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		all = append(all, u)
	}
	if len(all) == 0 {
		t.Fatalf("%s holds nothing", dir)
	}
	return all
}

// cluster is one API server for all tests.
func cluster(t *testing.T) *rest.Config {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a kube-apiserver, which -short leaves out")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	c, stop, err := envtest.Start(ctx)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := stop(); err != nil {
			t.Errorf("API server: %v", err)
		}
	})
	return c
}

const operatorGroup = "monitoring.coreos.com"

// Everything is accepted by an API server that takes no unknown field, in the order in which it is built, twice
// (an upgrade), and alone as well as in the kustomization that README.md shows, with all of its patches.
func TestInstallationIsAccepted(t *testing.T) {
	own := t.TempDir()
	here, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	rel := func(dir string) string {
		r, err := filepath.Rel(own, filepath.Join(here, dir))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(readme), "```yaml\n")
	text, _, ok := strings.Cut(text, "```")
	if !ok {
		t.Fatal("README.md shows no kustomization")
	}
	const target = "```yaml\n- target:"
	_, overlay, _ := strings.Cut(string(readme), target)
	overlay, _, ok = strings.Cut(overlay, "```")
	if !ok {
		t.Fatal("README.md shows no patch for a network that the API server is not part of")
	}
	text += strings.TrimPrefix(target, "```yaml\n") + overlay
	const ours = "github.com/stepcache/stepcache/config"
	if strings.Count(text, ours) != 3 {
		t.Errorf("README.md's kustomization names %d folders of this one, want 3", strings.Count(text, ours))
	}
	text = strings.Replace(strings.ReplaceAll(text, ours, rel(".")), "images:", "- "+rel("components/prometheus/plain")+"\nimages:", 1)
	if err := os.WriteFile(filepath.Join(own, "kustomization.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	all := build(t, own)
	images, operators := 0, 0
	for _, u := range all {
		if u.GroupVersionKind().Group == operatorGroup {
			operators++ // tools/manifests has compared their fields with the operator's definitions
		}
		b, err := u.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("stepcache/stepcache:dev")) {
			t.Errorf("%s %s keeps the image of a development build", u.GetKind(), u.GetName())
		}
		images += bytes.Count(b, []byte(`"registry.example/stepcache:v1"`))
		switch u.GetKind() + "/" + u.GetName() {
		case "DaemonSet/stepcache-node":
			if !bytes.Contains(b, []byte(`{"name":"NODE_MEMORY","value":"4294967296"}`)) || !bytes.Contains(b, []byte(`"limits":{"memory":"6Gi"}`)) {
				t.Errorf("the node service is not patched: %s", b)
			}
		case "Deployment/stepcache-webhook":
			if !bytes.Contains(b, []byte(`"args":["webhook","--image-pull-secret=registry"]`)) {
				t.Errorf("the webhook is not patched: %s", b)
			}
			if !bytes.Contains(b, []byte(`"hostNetwork":true`)) {
				t.Errorf("the webhook is not on the network of its node: %s", b)
			}
		}
	}
	// Controller, webhook, node service and keeper. The first two read from their own pods what workers and
	// injected containers run.
	if images != 4 {
		t.Errorf("the image of the installation is named %d times, want 4", images)
	}
	if operators != 3 {
		t.Errorf("%d objects of the Prometheus operator, want 3", operators)
	}

	c, err := kclient.New(cluster(t), kclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	strict := kclient.WithFieldValidation(c, kclient.FieldValidation("Strict"))
	for _, dir := range []string{"default", "components/prometheus/plain", "components/grafana", own, own} {
		for _, u := range build(t, dir) {
			if u.GroupVersionKind().Group == operatorGroup {
				continue
			}
			if err := strict.Apply(t.Context(), kclient.ApplyConfigurationFromUnstructured(u), kclient.FieldOwner("kubectl"), kclient.ForceOwnership); err != nil {
				t.Errorf("%s: %s %s: %v", dir, u.GetKind(), u.GetName(), err)
			}
		}
	}
}

// On a node where many pods start at once, the default of a second is what a process that is well does not answer within.
func TestProbesBearABusyNode(t *testing.T) {
	probes := 0
	for _, u := range build(t, "default") {
		var o struct {
			Spec struct {
				Template corev1.PodTemplateSpec `json:"template"`
			} `json:"spec"`
		}
		if u.GroupVersionKind().Group != "apps" {
			continue
		}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &o); err != nil {
			t.Fatal(err)
		}
		for _, c := range o.Spec.Template.Spec.Containers {
			for _, p := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe} {
				if p == nil {
					continue
				}
				probes++
				if p.TimeoutSeconds < 5 {
					t.Errorf("%s: a probe of %s gives up after %d s", u.GetName(), c.Name, p.TimeoutSeconds)
				}
			}
			// It serves every mount of its node.
			if p := c.LivenessProbe; c.Name == "node" && p.PeriodSeconds*p.FailureThreshold < 300 {
				t.Errorf("the node service is restarted after %d probes, one in %d s", p.FailureThreshold, p.PeriodSeconds)
			}
		}
	}
	if probes != 6 {
		t.Errorf("%d probes", probes)
	}
}

// README.md names what an upgrade replaces: all workloads but those whose pods stay.
func TestHealthChecksAreOfWhatAnUpgradeReplaces(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(readme), "```yaml\nhealthChecks:\n")
	text, _, _ = strings.Cut(text, "```")
	got := strings.Split(strings.TrimSpace(text), "\n")
	var want []string
	for _, u := range build(t, "default") {
		strategy, _, _ := unstructured.NestedString(u.Object, "spec", "updateStrategy", "type")
		if u.GroupVersionKind().Group == "apps" && strategy != "OnDelete" {
			want = append(want, fmt.Sprintf("- {apiVersion: %s, kind: %s, name: %s, namespace: %s}", u.GetAPIVersion(), u.GetKind(), u.GetName(), u.GetNamespace()))
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("README.md has the health checks\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A misspelled field would be dropped by the API server without a word, were it not compared.
func TestUnknownFieldsOfTheOperatorAreFound(t *testing.T) {
	dir := t.TempDir()
	b, err := os.ReadFile("components/prometheus/operator/pod_monitors.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"kustomization.yaml": "resources: [m.yaml]\n",
		"m.yaml":             strings.Replace(string(b), "podMetricsEndpoints", "podMetricsEndpoint", 1),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := manifests(t, nil, "build", dir); err == nil || !strings.Contains(err.Error(), "podMetricsEndpoint") {
		t.Errorf("a field that there is not: %v", err)
	}
}

// Both ways of giving Prometheus its alerts give the same.
func TestAlertsAreTheSameForBoth(t *testing.T) {
	text, err := os.ReadFile("components/prometheus/plain/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := manifests(t, text, "rules"); err != nil {
		t.Error(err)
	}
	var plain struct{ Groups []any }
	if err := yaml.Unmarshal(text, &plain); err != nil {
		t.Fatal(err)
	}
	for _, u := range build(t, "components/prometheus/operator") {
		if u.GetKind() != "PrometheusRule" {
			continue
		}
		groups, _, _ := unstructured.NestedSlice(u.Object, "spec", "groups")
		if !reflect.DeepEqual(groups, plain.Groups) {
			t.Errorf("operator and plain differ (-operator +plain):\n%s", cmp.Diff(groups, plain.Groups))
		}
		return
	}
	t.Error("no PrometheusRule")
}

// snake is the spelling of a Prometheus configuration for a field of the operator's.
var snake = strings.NewReplacer("sourceLabels", "source_labels", "targetLabel", "target_label")

// What both ways of scraping make of pods as they are: which are scraped, and with which labels.
func TestScrapedPods(t *testing.T) {
	pod := func(namespace, component, dataset, port string) map[string]string {
		m := map[string]string{
			"__meta_kubernetes_namespace": namespace, "__meta_kubernetes_pod_name": "p", "__meta_kubernetes_pod_node_name": "n1",
			"__meta_kubernetes_pod_container_port_name": port,
		}
		if component != "" {
			m["__meta_kubernetes_pod_label_data_stepcache_dev_component"] = component
		}
		if dataset != "" {
			m["__meta_kubernetes_pod_label_data_stepcache_dev_dataset"] = dataset
		}
		return m
	}
	pods := []map[string]string{
		pod("stepcache-system", "controller", "", "metrics"), pod("stepcache-system", "webhook", "", "metrics"), pod("stepcache-system", "node", "", "metrics"),
		pod("argo", "worker", "genomes", "control"),
		pod("argo", "worker", "genomes", "data"), pod("stepcache-system", "webhook", "", "https"), pod("stepcache-system", "keeper", "", ""), pod("argo", "", "", "metrics"),
	}
	var config struct {
		ScrapeConfigs []struct {
			RelabelConfigs []any `json:"relabel_configs"`
		} `json:"scrape_configs"`
	}
	text, err := os.ReadFile("components/prometheus/plain/scrape.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	var got []map[string]string
	ask(t, &got, map[string]any{"configs": config.ScrapeConfigs[0].RelabelConfigs, "targets": pods}, "relabel")
	system := func(component string) map[string]string {
		return map[string]string{"namespace": "stepcache-system", "pod": "p", "node": "n1", "component": component}
	}
	worker := map[string]string{"namespace": "argo", "pod": "p", "node": "n1", "component": "worker", "dataset": "argo/genomes"}
	want := []map[string]string{system("controller"), system("webhook"), system("node"), worker, nil, nil, nil, nil}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("plain (-want +got):\n%s", d)
	}

	// The operator adds namespace and pod, and chooses by the selectors and ports that TestMonitorsFindPods
	// compares.
	for _, u := range build(t, "components/prometheus/operator") {
		if u.GetKind() != "PodMonitor" {
			continue
		}
		ends, _, _ := unstructured.NestedSlice(u.Object, "spec", "podMetricsEndpoints")
		b, err := json.Marshal(ends[0].(map[string]any)["relabelings"])
		if err != nil {
			t.Fatal(err)
		}
		target, want := pods[2], system("node")
		if u.GetName() == "stepcache-workers" {
			target, want = pods[3], worker
		}
		want = map[string]string{"node": want["node"], "component": want["component"], "dataset": want["dataset"]}
		if want["dataset"] == "" {
			delete(want, "dataset")
		}
		var got []map[string]string
		ask(t, &got, map[string]any{"configs": json.RawMessage(snake.Replace(string(b))), "targets": []any{target}}, "relabel")
		if d := cmp.Diff([]map[string]string{want}, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", u.GetName(), d)
		}
	}
}

// The pods of the installation have the labels and the ports that are scraped. A worker's are in
// controllers/dataset, and TestMetricsExist reads its metrics from that port.
func TestMonitorsFindPods(t *testing.T) {
	found := map[string]bool{}
	for _, u := range build(t, "default") {
		labels, _, _ := unstructured.NestedStringMap(u.Object, "spec", "template", "metadata", "labels")
		containers, _, _ := unstructured.NestedSlice(u.Object, "spec", "template", "spec", "containers")
		for _, c := range containers {
			ports, _ := c.(map[string]any)["ports"].([]any)
			for _, p := range ports {
				if p.(map[string]any)["name"] == "metrics" {
					found[labels["data.stepcache.dev/component"]] = true
				}
			}
		}
	}
	for _, component := range []string{"controller", "webhook", "node"} {
		if !found[component] {
			t.Errorf("%s has no port named metrics in a pod that is labelled so", component)
		}
	}
}

// A pod of a DaemonSet that could never run stays Pending on its node, and no update goes on past it. Every other node
// has one, tainted ones too.
func TestWhereTheNodeServiceRuns(t *testing.T) {
	linux := func(more map[string]string) map[string]string {
		l := map[string]string{corev1.LabelOSStable: "linux"}
		maps.Copy(l, more)
		return l
	}
	nodes := map[string]struct {
		labels map[string]string
		runs   bool
	}{
		"plain":            {linux(nil), true},
		"with other types": {linux(map[string]string{"type": "gpu", "eks.amazonaws.com/compute-type": "ec2", "kubernetes.io/role": "node"}), true},
		"Windows":          {map[string]string{corev1.LabelOSStable: "windows"}, false},
		"Fargate":          {linux(map[string]string{"eks.amazonaws.com/compute-type": "fargate"}), false},
		"virtual kubelet":  {linux(map[string]string{"type": "virtual-kubelet"}), false},
		"virtual agent":    {linux(map[string]string{"kubernetes.io/role": "agent-virtual"}), false},
		"virtual node":     {linux(map[string]string{"alibabacloud.com/virtual-node": "true"}), false},
	}
	found := 0
	var first *corev1.NodeSelector
	for _, u := range build(t, "default") {
		if u.GetKind() != "DaemonSet" {
			continue
		}
		found++
		var d appsv1.DaemonSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &d); err != nil {
			t.Fatal(err)
		}
		spec := d.Spec.Template.Spec
		if !slices.Contains(spec.Tolerations, corev1.Toleration{Operator: corev1.TolerationOpExists}) {
			t.Errorf("%s does not tolerate every taint", d.Name)
		}
		required := spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
		if first == nil {
			first = required
		}
		if diff := cmp.Diff(first, required); diff != "" {
			t.Errorf("the DaemonSets run on different nodes:\n%s", diff)
		}
		terms := required.NodeSelectorTerms
		if len(terms) != 1 {
			t.Fatalf("%s has %d alternatives", d.Name, len(terms))
		}
		// Pods go nowhere where it does not run: it asks for no less, and for what it asks beyond that nodes are labelled.
		for _, r := range v1alpha1.NodesForPods() {
			if r.Key != v1alpha1.LabelNodeReady && !slices.ContainsFunc(terms[0].MatchExpressions, func(o corev1.NodeSelectorRequirement) bool { return reflect.DeepEqual(o, r) }) {
				t.Errorf("%s does not ask for %v, which pods with Datasets do", d.Name, r)
			}
		}
		for name, node := range nodes {
			if runs := matches(t, terms[0], node.labels); runs != node.runs {
				t.Errorf("%s on a node that is %s: %v, want %v", d.Name, name, runs, node.runs)
			}
		}
		if u := d.Spec.UpdateStrategy.RollingUpdate; u != nil {
			if n, err := intstr.GetScaledValueFromIntOrPercent(u.MaxSurge, 3, true); err != nil || n < 2 {
				t.Errorf("%s: a surge of %d of three nodes is held up by one that is not ready (%v)", d.Name, n, err)
			}
		}
	}
	if found != 2 {
		t.Errorf("%d DaemonSets", found)
	}
}

// The node service and the keeper meet in the kubelet's folder, as they are and with the patches that README.md has for
// another one.
func TestTheKubeletsFolder(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(readme), "### The kubelet's folder\n")
	_, text, _ = strings.Cut(text, "```yaml\n")
	text, _, ok := strings.Cut(text, "```")
	if !ok {
		t.Fatal("README.md shows no patches")
	}
	here, err := filepath.Abs("node")
	if err != nil {
		t.Fatal(err)
	}
	own := t.TempDir()
	rel, err := filepath.Rel(own, here)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(own, "kustomization.yaml"), []byte("resources: ["+rel+"]\n"+text), 0o644); err != nil {
		t.Fatal(err)
	}
	const usual = "/var/lib/kubelet"
	for dir, folder := range map[string]string{"node": usual, own: "/var/lib/k0s/kubelet"} {
		found := 0
		for _, u := range build(t, dir) {
			var d appsv1.DaemonSet
			if u.GetKind() != "DaemonSet" {
				continue
			} else if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &d); err != nil {
				t.Fatal(err)
			}
			found++
			spec := d.Spec.Template.Spec
			c := spec.Containers[0]
			onNode, inside, drivers := spec.Volumes[0].HostPath.Path, c.VolumeMounts[0].MountPath, filepath.Join("plugins", v1alpha1.DriverName)
			if spec.Volumes[0].Name != c.VolumeMounts[0].Name {
				t.Fatalf("%s: another volume is mounted first: %+v", d.Name, c.VolumeMounts)
			}
			switch d.Name {
			case "stepcache-node":
				told := usual
				for _, a := range c.Args {
					if v, ok := strings.CutPrefix(a, "--kubelet-dir="); ok {
						told = v
					}
				}
				if onNode != folder || inside != folder || told != folder {
					t.Errorf("%s: %s of the node is mounted at %s, --kubelet-dir is %s; want %s", d.Name, onNode, inside, told, folder)
				}
			case "stepcache-keeper":
				if onNode != filepath.Join(folder, drivers) || inside != filepath.Join(usual, drivers) || !slices.Equal(c.Args, []string{"keeper"}) {
					t.Errorf("%s %v: %s of the node is mounted at %s", d.Name, c.Args, onNode, inside)
				}
			}
		}
		if found != 2 {
			t.Errorf("%s has %d DaemonSets", dir, found)
		}
	}
}

// Where SELinux enforces, a container that is not privileged may not make a socket in the kubelet's folder, nor use what
// one that is has opened. The keeper needs no more than that.
func TestTheKeeperMayHoldWhatTheNodeServiceOpens(t *testing.T) {
	for _, u := range build(t, "node") {
		if u.GetKind() != "DaemonSet" {
			continue
		}
		var d appsv1.DaemonSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &d); err != nil {
			t.Fatal(err)
		}
		spec := d.Spec.Template.Spec
		c := spec.Containers[0].SecurityContext
		if c.Privileged == nil || !*c.Privileged || c.ReadOnlyRootFilesystem == nil || !*c.ReadOnlyRootFilesystem {
			t.Errorf("%s: %+v", d.Name, c)
		}
		if spec.HostNetwork || spec.HostPID || spec.HostIPC {
			t.Errorf("%s is in a namespace of the node", d.Name)
		}
		if own := spec.AutomountServiceAccountToken; d.Name == "stepcache-keeper" && (own == nil || *own || len(spec.Volumes) != 1) {
			t.Errorf("%s has more than its folder: %+v", d.Name, spec.Volumes)
		}
	}
}

func matches(t *testing.T, term corev1.NodeSelectorTerm, node map[string]string) bool {
	t.Helper()
	for _, e := range term.MatchExpressions {
		op, ok := map[corev1.NodeSelectorOperator]selection.Operator{corev1.NodeSelectorOpIn: selection.In, corev1.NodeSelectorOpNotIn: selection.NotIn}[e.Operator]
		if !ok {
			t.Fatalf("an operator that this test does not know: %s", e.Operator)
		}
		r, err := labels.NewRequirement(e.Key, op, e.Values)
		if err != nil {
			t.Fatal(err)
		}
		if !r.Matches(labels.Set(node)) {
			return false
		}
	}
	return true
}

// GKE admits the priority classes of the system only where a quota selects them.
func TestAQuotaLetsTheSystemsPriorityClassesIn(t *testing.T) {
	wanted, selected := map[string]bool{}, map[string]bool{}
	for _, u := range build(t, "default") {
		if class, ok, _ := unstructured.NestedString(u.Object, "spec", "template", "spec", "priorityClassName"); ok {
			wanted[u.GetNamespace()+"/"+class] = true
		}
		if u.GetKind() != "ResourceQuota" {
			continue
		}
		var q corev1.ResourceQuota
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &q); err != nil {
			t.Fatal(err)
		}
		for _, e := range q.Spec.ScopeSelector.MatchExpressions {
			if e.ScopeName == corev1.ResourceQuotaScopePriorityClass && e.Operator == corev1.ScopeSelectorOpIn {
				for _, class := range e.Values {
					selected[q.Namespace+"/"+class] = true
				}
			}
		}
	}
	if !maps.Equal(wanted, selected) || len(wanted) != 2 {
		t.Errorf("pods want %v, the quota selects %v", wanted, selected)
	}
}

// The cluster's own roles take over what roles with these labels allow; admin and edit also have what view has.
func TestTheClustersRolesTakeInEveryKind(t *testing.T) {
	verbs := map[string][]string{
		"view":  {"get", "list", "watch"},
		"edit":  {"create", "update", "patch", "delete", "deletecollection"},
		"admin": {"create", "update", "patch", "delete", "deletecollection"},
	}
	kinds := 0
	all := build(t, "default")
	for _, u := range all {
		if u.GetKind() != "CustomResourceDefinition" {
			continue
		}
		kinds++
		kind, _, _ := unstructured.NestedString(u.Object, "spec", "names", "plural")
		for role, want := range verbs {
			have := map[string]bool{}
			for _, r := range all {
				if r.GetKind() != "ClusterRole" || r.GetLabels()["rbac.authorization.k8s.io/aggregate-to-"+role] != "true" {
					continue
				}
				var c rbacv1.ClusterRole
				if err := runtime.DefaultUnstructuredConverter.FromUnstructured(r.Object, &c); err != nil {
					t.Fatal(err)
				}
				for _, rule := range c.Rules {
					for _, verb := range rule.Verbs {
						have[verb] = have[verb] || slices.Contains(rule.Resources, kind)
					}
				}
			}
			for _, verb := range want {
				if !have[verb] {
					t.Errorf("role %s may not %s %s", role, verb, kind)
				}
			}
		}
	}
	if kinds != 2 {
		t.Errorf("%d kinds, want 2", kinds)
	}
}

// The token of one node's service lets nobody change other nodes, nor more of its own than the label.
func TestTheNodeServiceChangesItsNodesLabelOnly(t *testing.T) {
	ctx := t.Context()
	config := cluster(t)
	admin, err := kclient.New(config, kclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range build(t, "node") {
		switch u.GetKind() {
		case "ClusterRole", "ClusterRoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding":
			if err := admin.Apply(ctx, kclient.ApplyConfigurationFromUnstructured(u), kclient.FieldOwner("kubectl")); err != nil {
				t.Fatalf("%s %s: %v", u.GetKind(), u.GetName(), err)
			}
		}
	}
	for _, name := range []string{"own", "other"} {
		n := &corev1.Node{}
		n.Name, n.Labels = name, map[string]string{"zone": "a"}
		if err := admin.Create(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	service := func(extra map[string][]string) kclient.Client {
		as := rest.CopyConfig(config)
		as.Impersonate = rest.ImpersonationConfig{
			UserName: "system:serviceaccount:stepcache-system:stepcache-node",
			Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:stepcache-system", "system:authenticated"}, Extra: extra,
		}
		c, err := kclient.New(as, kclient.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	patch := func(c kclient.Client, node, patch string) error {
		n := &corev1.Node{}
		n.Name = node
		return c.Patch(ctx, n, kclient.RawPatch(types.MergePatchType, []byte(patch)))
	}
	bound := service(map[string][]string{"authentication.kubernetes.io/node-name": {"own"}, "authentication.kubernetes.io/pod-name": {"stepcache-node-x"}})
	unbound := service(nil)
	ready, gone := `{"metadata":{"labels":{"data.stepcache.dev/node-ready":"true"}}}`, `{"metadata":{"labels":{"data.stepcache.dev/node-ready":null}}}`
	// The policy counts a moment after it is there.
	until := time.Now().Add(patience)
	for patch(bound, "other", ready) == nil {
		if time.Now().After(until) {
			t.Fatal("another node may be labelled")
		}
		time.Sleep(100 * time.Millisecond)
	}
	for name, c := range map[string]struct {
		as          kclient.Client
		node, patch string
		says        string
	}{
		"label":                    {bound, "own", ready, ""},
		"no label":                 {bound, "own", gone, ""},
		"label, without a node":    {unbound, "other", ready, ""},
		"no label, without a node": {unbound, "other", gone, ""},
		"another node":             {bound, "other", ready, "of another node"},
		"another label":            {bound, "own", `{"metadata":{"labels":{"more":"x"}}}`, "node-ready only"},
		"a label's value":          {bound, "own", `{"metadata":{"labels":{"zone":"b"}}}`, "node-ready only"},
		"a label away":             {bound, "own", `{"metadata":{"labels":{"zone":null}}}`, "node-ready only"},
		"an annotation":            {bound, "own", `{"metadata":{"annotations":{"a":"b"}}}`, "node-ready only"},
		"a finalizer":              {bound, "own", `{"metadata":{"finalizers":["a.b/c"]}}`, "node-ready only"},
		"an owner":                 {bound, "own", `{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Node","name":"x","uid":"y"}]}}`, "node-ready only"},
		"a taint":                  {bound, "own", `{"spec":{"taints":[{"key":"a","effect":"NoExecute"}]}}`, "node-ready only"},
		"no pods":                  {bound, "own", `{"spec":{"unschedulable":true}}`, "node-ready only"},
		"a taint, without a node":  {unbound, "own", `{"spec":{"taints":[{"key":"a","effect":"NoExecute"}]}}`, "node-ready only"},
		"a taint of others":        {admin, "own", `{"spec":{"taints":[{"key":"others","effect":"NoSchedule"}]}}`, ""},
	} {
		err := patch(c.as, c.node, c.patch)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}
