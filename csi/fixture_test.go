package csi

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/csi/keeper"
	"github.com/stepcache/stepcache/test/ports"
)

const nodeName = "node-1"

func needMounts(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount in a namespace of its own")
	}
	if err := mount.Supported(); err != nil {
		t.Skip(err)
	}
}

// shortDir is a folder with a short path: Unix sockets are below it.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "n")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		abortBelow(dir)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func content(name string, n int) []byte {
	h := fnv.New64a()
	h.Write([]byte(name))
	r := rand.NewChaCha8([32]byte(binaryName(h.Sum64())))
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

func binaryName(v uint64) []byte { return fmt.Appendf(nil, "%032x", v) }

// tier is one worker of the Dataset argo/genomes, in this process.
type tier struct {
	t      *testing.T
	dir    string // of the files
	state  string
	keys   wire.Keys
	worker *worker.Worker
	config worker.Config
	gate   *gate
	done   chan error
}

const testDataset = "argo/genomes"

func newTier(t *testing.T, files map[string][]byte) *tier {
	t.Helper()
	k := &tier{t: t, dir: t.TempDir(), keys: wire.GenerateKeys()}
	var err error
	if k.state, err = os.MkdirTemp(filepath.Join(os.TempDir(), "shm"), "w"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(k.state) })
	for name, p := range files {
		k.write(name, p)
	}
	k.useKeys(k.keys)
	k.start("")
	t.Cleanup(k.stop)
	return k
}

func (k *tier) write(name string, p []byte) {
	k.t.Helper()
	path := filepath.Join(k.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		k.t.Fatal(err)
	}
	if err := os.WriteFile(path, p, 0o644); err != nil {
		k.t.Fatal(err)
	}
}

// useKeys gives workers that start from now on other keys.
func (k *tier) useKeys(keys wire.Keys) {
	k.t.Helper()
	k.keys = keys
	if err := wire.WriteKeys(filepath.Join(k.state, "keys"), keys); err != nil {
		k.t.Fatal(err)
	}
}

func (k *tier) start(socket string) {
	k.t.Helper()
	listen := k.config.Listen // as it was, since readers know it
	if listen == "" {
		listen = ports.Free(k.t, 1)[0]
	}
	k.config = worker.Config{
		Dataset: testDataset, ID: "genomes-worker-0", Memory: 128 << 20, Dir: filepath.Join(k.state, "store"),
		Mounts:  []worker.Mount{{Config: source.Config{URL: "file://" + k.dir}, Path: "/"}},
		KeysDir: filepath.Join(k.state, "keys"), MembershipFile: filepath.Join(k.state, "members.json"),
		Listen: listen, Control: "127.0.0.1:0", Socket: socket,
	}
	w, err := worker.New(context.Background(), k.config, worker.Deps{Logger: quiet()})
	if err != nil {
		k.t.Fatal(err)
	}
	k.worker, k.done = w, make(chan error, 1)
	k.config.Listen = w.Addr().String()
	go func() { k.done <- w.Serve(context.Background()) }()
	if k.gate == nil {
		k.gate = newGate(k.t, k.config.Listen)
	}
}

// publish writes the membership; socket is the short path.
func (k *tier) publish(epoch uint64, socket string) {
	k.t.Helper()
	list := ring.Membership{Epoch: epoch, Members: []ring.Member{{
		ID: k.config.ID, Node: nodeName, Addr: k.gate.addr(), Control: k.worker.ControlAddr().String(), Socket: socket, State: ring.Ready,
	}}}
	b, err := json.Marshal(list)
	if err != nil {
		k.t.Fatal(err)
	}
	path := filepath.Join(k.state, "members.json")
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		k.t.Fatal(err)
	}
	// A reader hears of the list with the next answer of the worker, and one that has all that it reads asks for nothing.
	ctl := k.control(list)
	defer ctl.Close()
	if err := ctl.Tell(testContext(k.t)); err != nil {
		k.t.Fatal(err)
	}
}

func (k *tier) stop() {
	if k.worker == nil {
		return
	}
	k.worker.Close()
	if err := <-k.done; err != nil {
		k.t.Errorf("worker: %v", err)
	}
	k.worker = nil
}

func (k *tier) control(list ring.Membership) *client.Control {
	k.t.Helper()
	ctl, err := client.NewControl(client.ControlConfig{Dataset: testDataset, Keys: k.keys, Membership: list})
	if err != nil {
		k.t.Fatal(err)
	}
	return ctl
}

// refresh has the worker list the files again, and waits for the new snapshot.
func (k *tier) refresh() {
	k.t.Helper()
	ctl := k.control(ring.Membership{Epoch: 1, Members: []ring.Member{{
		ID: k.config.ID, Addr: k.config.Listen, Control: k.worker.ControlAddr().String(), State: ring.Ready,
	}}})
	defer ctl.Close()
	before := k.current()
	if _, err := ctl.Refresh(testContext(k.t)); err != nil {
		k.t.Fatal(err)
	}
	eventually(k.t, "a new snapshot", func() bool { return k.current() != before })
}

func (k *tier) current() string {
	k.t.Helper()
	d, err := client.Current(testContext(k.t), client.Config{Dataset: testDataset, Seeds: []string{k.config.Listen}, Keys: k.keys, Logger: quiet()})
	if err != nil {
		k.t.Fatal(err)
	}
	return fmt.Sprintf("%x", d)
}

func (k *tier) secret() map[string]string {
	return map[string]string{v1alpha1.KeyRead: string(wire.FormatKeys(k.keys.Read))}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// memoryNode is a Node that remembers.
type memoryNode struct {
	mu   sync.Mutex
	said []string
}

func (n *memoryNode) say(s string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.said = append(n.said, s)
	return nil
}

func (n *memoryNode) Ready(_ context.Context, ready bool) error {
	return n.say(fmt.Sprintf("ready %v", ready))
}

func (n *memoryNode) Event(_ context.Context, reason, text string) error {
	return n.say("event " + reason + ": " + text)
}

func (n *memoryNode) all() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.said...)
}

// machine is where node services run: the kubelet's folder.
type machine struct {
	t    *testing.T
	base string
	tier *tier
}

func newMachine(t *testing.T, k *tier) *machine {
	return &machine{t: t, base: shortDir(t), tier: k}
}

func (m *machine) config() Config {
	return Config{
		NodeName: nodeName, KubeletDir: filepath.Join(m.base, "kubelet"), SocketDir: filepath.Join(m.base, "run"), CacheDir: filepath.Join(m.base, "cache"),
		Seeds: func(string, string) []string { return []string{m.tier.gate.addr()} }, Logger: slog.New(slog.NewTextHandler(m.t.Output(), nil)), Linger: time.Hour,
	}
}

func (m *machine) order() order {
	c := m.config().withDefaults()
	return order{
		Keeper: c.Keeper, NodeName: c.NodeName, KubeletDir: c.KubeletDir, SocketDir: c.SocketDir, CacheDir: c.CacheDir,
		Seeds: []string{m.tier.gate.addr()}, Events: filepath.Join(m.base, "events"),
	}
}

func (m *machine) events() string {
	b, _ := os.ReadFile(filepath.Join(m.base, "events"))
	return string(b)
}

// keep runs a keeper in this process.
func (m *machine) keep() {
	m.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	path := m.config().withDefaults().Keeper
	go func() { done <- keeper.Run(ctx, path, quiet()) }()
	m.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			m.t.Error(err)
		}
	})
	eventually(m.t, "the keeper's socket", func() bool { _, err := os.Lstat(path); return err == nil })
}

// node is a node service in this process.
type node struct {
	*kubelet
	s    *service
	stop func() error
}

// run starts one, as a kubelet sees it.
func (m *machine) run(change func(*Config)) *node {
	m.t.Helper()
	c := m.config()
	if change != nil {
		change(&c)
	}
	if err := c.Validate(); err != nil {
		m.t.Fatal(err)
	}
	s := newService(c.withDefaults())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	n := &node{s: s, stop: sync.OnceValue(func() error { cancel(); return <-done })}
	m.t.Cleanup(func() {
		if err := n.stop(); err != nil {
			m.t.Errorf("node service: %v", err)
		}
	})
	eventually(m.t, "the node service's sockets", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.made) == 2
	})
	n.kubelet = m.kubelet()
	n.register()
	return n
}

// kubelet calls a node service as the kubelet does.
type kubelet struct {
	csi.NodeClient
	identity csi.IdentityClient
	t        *testing.T
	dir      string
	registry registration.RegistrationClient
	secret   map[string]string
}

func (m *machine) kubelet() *kubelet {
	m.t.Helper()
	c := m.config().withDefaults()
	dial := func(path string) *grpc.ClientConn {
		conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
		if err != nil {
			m.t.Fatal(err)
		}
		m.t.Cleanup(func() { conn.Close() })
		return conn
	}
	conn := dial(c.csiSocket())
	return &kubelet{
		NodeClient: csi.NewNodeClient(conn), identity: csi.NewIdentityClient(conn), t: m.t, dir: c.KubeletDir,
		registry: registration.NewRegistrationClient(dial(c.registrationSocket())), secret: m.tier.secret(),
	}
}

// register is what a kubelet does with a registration socket.
func (k *kubelet) register() {
	k.t.Helper()
	info, err := k.registry.GetInfo(testContext(k.t), &registration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		k.t.Fatal(err)
	}
	if info.Type != registration.CSIPlugin || info.Name != v1alpha1.DriverName {
		k.t.Errorf("registration says %v", info)
	}
	if _, err := os.Lstat(info.Endpoint); err != nil {
		k.t.Error(err)
	}
	if _, err := k.registry.NotifyRegistrationStatus(testContext(k.t), &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
		k.t.Fatal(err)
	}
}

func capability(group string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{VolumeMountGroup: group}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY},
	}
}

func (k *kubelet) target(pod string) string {
	return filepath.Join(k.dir, "pods", pod, "volumes", "kubernetes.io~csi", "data", "mount")
}

func (k *kubelet) context(pod string) map[string]string {
	return map[string]string{
		v1alpha1.AttributeNamespace: "argo", v1alpha1.AttributeDataset: "genomes",
		attributePodNamespace: "argo", attributePodName: pod, attributePodUID: pod, attributeEphemeral: "false",
	}
}

func (k *kubelet) request(pod string) *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: testDataset, StagingTargetPath: filepath.Join(k.dir, "staging"), TargetPath: k.target(pod),
		VolumeCapability: capability(""), Readonly: true, VolumeContext: k.context(pod), Secrets: k.secret,
	}
}

// publish gives a pod the Dataset's claim.
func (k *kubelet) publish(pod string) string {
	k.t.Helper()
	r := k.request(pod)
	if _, err := k.NodePublishVolume(testContext(k.t), r, grpc.WaitForReady(true)); err != nil {
		k.t.Fatalf("publish for pod %s: %v", pod, err)
	}
	return r.TargetPath
}

// inline is a request for an inline volume.
func (k *kubelet) inline(pod, kind, group string, more map[string]string) *csi.NodePublishVolumeRequest {
	r := k.request(pod)
	r.VolumeId, r.StagingTargetPath, r.Secrets = "csi-"+fmt.Sprintf("%064x", len(pod)), "", nil
	r.VolumeCapability = capability(group)
	r.VolumeContext = map[string]string{
		v1alpha1.AttributeVolume: kind, attributeEphemeral: "true",
		attributePodNamespace: "argo", attributePodName: pod, attributePodUID: pod,
	}
	for name, v := range more {
		r.VolumeContext[name] = v
	}
	return r
}

func (k *kubelet) unpublish(pod string) {
	k.t.Helper()
	target := k.target(pod)
	if _, err := k.NodeUnpublishVolume(testContext(k.t), &csi.NodeUnpublishVolumeRequest{VolumeId: testDataset, TargetPath: target}, grpc.WaitForReady(true)); err != nil {
		k.t.Fatalf("unpublish of pod %s: %v", pod, err)
	}
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		k.t.Errorf("unpublish left %s: %v", target, err)
	}
}

// deviceAt is the file system that is mounted at a path.
func deviceAt(t *testing.T, path string) device {
	t.Helper()
	at, err := mountinfo.At(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(at) == 0 {
		t.Fatalf("nothing is mounted at %s", path)
	}
	return deviceOf(at[0])
}

// fuseMounts counts the mounts of ours below a folder.
func fuseMounts(t *testing.T, base string) (n int) {
	t.Helper()
	all, err := mountinfo.Below(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.Type == mount.FSType {
			n++
		}
	}
	return n
}

func sameFile(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes that are not the object's %d", path, len(got), len(want))
	}
}

func decimal(n int64) string { return strconv.FormatInt(n, 10) }
