package csi

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

func TestNodeObjectIsLabelledAndLeftAsItWas(t *testing.T) {
	ctx := context.Background()
	client := fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName, Labels: map[string]string{"zone": "a", v1alpha1.LabelNodeReady: "false"}}})
	at := time.Unix(1_700_000_000, 0)
	n := NodeObject{Client: client, Name: nodeName, Now: func() time.Time { return at }}
	labels := func() map[string]string {
		o, err := client.CoreV1().Nodes().Get(ctx, nodeName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return o.Labels
	}
	for range 2 {
		if err := n.Ready(ctx, true); err != nil {
			t.Fatal(err)
		}
	}
	if got := labels(); got[v1alpha1.LabelNodeReady] != "true" || got["zone"] != "a" {
		t.Errorf("labels %v", got)
	}
	for range 2 {
		if err := n.Ready(ctx, false); err != nil {
			t.Fatal(err)
		}
	}
	if got := labels(); len(got) != 1 || got["zone"] != "a" {
		t.Errorf("labels %v", got)
	}
	if err := n.Event(ctx, "MountLost", "text"); err != nil {
		t.Fatal(err)
	}
	events, err := client.CoreV1().Events("default").List(ctx, metav1.ListOptions{})
	if err != nil || len(events.Items) != 1 {
		t.Fatal(events, err)
	}
	e := events.Items[0]
	if e.InvolvedObject.Kind != "Node" || e.InvolvedObject.Name != nodeName || e.Reason != "MountLost" || e.Message != "text" || e.Type != "Warning" || !e.FirstTimestamp.Time.Equal(at) {
		t.Errorf("event %+v", e)
	}
	n.Name = "other"
	if err := n.Ready(ctx, true); !apierrors.IsNotFound(err) || !strings.Contains(err.Error(), "label node other") {
		t.Error(err)
	}
}

// flakyNode refuses at first.
type flakyNode struct {
	memoryNode
	refuse int
}

func (n *flakyNode) Ready(ctx context.Context, ready bool) error {
	n.mu.Lock()
	refuse := n.refuse > 0
	n.refuse--
	n.mu.Unlock()
	if refuse {
		return errors.New("no API server at the moment")
	}
	return n.memoryNode.Ready(ctx, ready)
}

func TestTheLabelComesOnceTheKubeletKnowsTheDriverAndTheAPIServerAnswers(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	m.keep()
	told := &flakyNode{refuse: 1}
	n := m.run(func(c *Config) { c.Node, c.Listen = told, "127.0.0.1:0" })
	eventually(t, "the label", func() bool { return slices.Equal(told.all(), []string{"ready true"}) })
	_ = n
}

func TestTheLabelIsSaidAgain(t *testing.T) {
	m := &machine{t: t, base: shortDir(t)} // no node service runs on it
	synctest.Test(t, func(t *testing.T) {
		told := &flakyNode{}
		c := m.config()
		c.Node = told
		s := newService(c.withDefaults())
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.announce(ctx)
		said := func(what string, n int) {
			t.Helper()
			synctest.Wait()
			if got := told.all(); len(got) != n || slices.Contains(got, "ready false") {
				t.Errorf("%s: the node was told %v", what, got)
			}
		}
		register := func() {
			if _, err := s.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(2 * announceAgain)
		said("before the kubelet knows the driver", 0)
		register()
		said("registered", 1)
		register()
		said("registered again", 2)
		time.Sleep(announceAgain)
		said("later", 3)
		told.mu.Lock()
		told.refuse = 2
		told.mu.Unlock()
		time.Sleep(announceAgain)
		said("refused", 3)
		time.Sleep(3 * time.Second)
		said("after two tries", 4)
		time.Sleep(announceAgain)
		said("later", 5)
		// Another node service takes the place.
		mine, err := os.Stat(m.base)
		if err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		s.made = []made{{path: os.DevNull, info: mine}}
		s.mu.Unlock()
		time.Sleep(2 * announceAgain)
		said("superseded", 5)
	})
}

// A kubelet with another folder than the one that this process was told never comes.
func TestAKubeletThatDoesNotComeIsTold(t *testing.T) {
	for _, registered := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var log output
			s := newService(Config{KubeletDir: "/the/kubelets", Logger: slog.New(slog.NewTextHandler(&log, nil))}.withDefaults())
			s.registered.Store(registered)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go s.expect(ctx)
			time.Sleep(2 * expected)
			synctest.Wait()
			if told := strings.Contains(log.String(), "/the/kubelets, set --kubelet-dir"); told == registered {
				t.Errorf("registered %v: %s", registered, log.String())
			}
		})
	}
}

// With a link to its folder the kubelet finds the sockets, and then names paths that are not in this container.
func TestATargetInTheContainersOwnFilesNamesTheKubeletsFolder(t *testing.T) {
	needMounts(t)
	m := newMachine(t, newTier(t, someFiles()))
	m.keep()
	n := m.run(nil)
	image := t.TempDir()
	if err := unix.Mount("none", image, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(image, unix.MNT_DETACH) })
	r := n.inline("worker-1", v1alpha1.VolumeSocket, "0", nil)
	r.TargetPath = filepath.Join(image, "kubelet", "pods", "mount")
	if _, err := n.NodePublishVolume(testContext(t), r); err == nil || !strings.Contains(err.Error(), "--kubelet-dir") {
		t.Errorf("published at %s: %v", r.TargetPath, err)
	}
}

func TestHealthAndMetrics(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(func(c *Config) { c.Listen, c.NodeMemory = "127.0.0.1:0", 4*leastSlice })
	get := func(path string) (int, string) {
		t.Helper()
		r, err := http.Get("http://" + n.s.metrics.addr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, text := get(path); code != http.StatusOK {
			t.Errorf("%s: %d %s", path, code, text)
		}
	}
	dir := n.publish("a")
	n.publish("b")
	if _, err := os.Lstat(filepath.Join(dir, strings.Repeat("x", 300))); err == nil {
		t.Error("a name that is too long is there")
	}
	_, text := get("/metrics")
	for _, want := range []string{
		`stepcache_node_mounts{dataset="argo/genomes"} 1`, `stepcache_node_pods{dataset="argo/genomes"} 2`, `stepcache_node_keeper_connected 1`,
		`stepcache_node_cache_unassigned_bytes 6.7`, `stepcache_mount_lookups_total{`, `stepcache_mount_errors_total{dataset="argo/genomes",errno="EIO"} 0`, `stepcache_client_events_total{dataset="argo/genomes",event="corrupt"} 0`, `stepcache_node_call_seconds_count{code="OK",method="NodePublishVolume"} 2`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	n.unpublish("a")
	n.unpublish("b")
	if err := n.s.reap(-1); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the mount to be gone", func() bool {
		_, text := get("/metrics")
		return !strings.Contains(text, "stepcache_node_mounts{")
	})
	// What a mount counted stays, and the next one goes on from there, under the same names.
	counted := func() (series []string, lookups float64) {
		_, text := get("/metrics")
		for line := range strings.Lines(text) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			if !strings.HasPrefix(name, "stepcache_mount_") && !strings.HasPrefix(name, "stepcache_client_") {
				continue
			}
			series = append(series, name)
			if strings.HasPrefix(name, "stepcache_mount_lookups_total{") {
				n, err := strconv.ParseFloat(value, 64)
				if err != nil {
					t.Fatal(err)
				}
				lookups = n
			}
		}
		return series, lookups
	}
	series, before := counted()
	if before == 0 {
		t.Error("what an ended mount counted is gone")
	}
	if _, err := os.Stat(filepath.Join(n.publish("c"), "nobody")); err == nil {
		t.Error("a file that is not there is found")
	}
	again, after := counted()
	if !slices.Equal(again, series) || after <= before {
		t.Errorf("the next mount has other series, or counts from %v to %v anew:\n%q\n%q", before, after, series, again)
	}
	n.unpublish("c")
	if err := n.s.reap(-1); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the metrics of a Dataset that is gone for long to go", func() bool {
		n.s.metrics.forget(time.Now().Add(sumsKept))
		_, text := get("/metrics")
		return !strings.Contains(text, `dataset="`)
	})
}

func TestConfigIsChecked(t *testing.T) {
	for _, c := range []struct {
		want string
		c    Config
	}{
		{"no node name", Config{}},
		{"node memory", Config{NodeName: "n", NodeMemory: -1}},
		{"absolute path", Config{NodeName: "n", KubeletDir: "kubelet"}},
		{"107", Config{NodeName: "n", KubeletDir: "/" + strings.Repeat("x", 80)}},
	} {
		if err := c.c.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.c, err, c.want)
		}
		if err := Run(context.Background(), c.c); err == nil {
			t.Errorf("%+v: it runs", c.c)
		}
	}
	if err := (Config{NodeName: "n"}).Validate(); err != nil {
		t.Error(err)
	}
}
