package csi

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/wire"
)

func someFiles() map[string][]byte {
	return map[string][]byte{
		"big": content("big", 9<<20+123), "small": content("small", 5000), "empty": nil, "dir/x": content("x", 70_000),
	}
}

func TestPodsShareOneMountOfASnapshot(t *testing.T) {
	needMounts(t)
	files := someFiles()
	k := newTier(t, files)
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	told := &memoryNode{}
	n := m.run(func(c *Config) { c.Node = told })
	eventually(t, "the node's label", func() bool { return slices.Contains(told.all(), "ready true") })

	if _, err := n.NodeStageVolume(testContext(t), &csi.NodeStageVolumeRequest{
		VolumeId: testDataset, StagingTargetPath: filepath.Join(m.base, "staging"), VolumeCapability: capability(""), VolumeContext: n.context(""), Secrets: n.secret,
	}); err != nil {
		t.Fatal(err)
	}
	// Pods that come at once, and calls that are repeated.
	var wg sync.WaitGroup
	for _, pod := range []string{"a", "b", "c"} {
		wg.Go(func() {
			for range 3 {
				if _, err := n.NodePublishVolume(testContext(t), n.request(pod)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, pod := range []string{"a", "b", "c"} {
		dir := n.target(pod)
		for name, want := range files {
			sameFile(t, filepath.Join(dir, name), want)
		}
		if d := deviceAt(t, dir); d != deviceAt(t, n.target("a")) {
			t.Errorf("pod %s has a file system of its own", pod)
		}
		at, _ := mountinfo.At(dir)
		if len(at) != 1 || !strings.Contains(","+at[0].Options+",", ",ro,") {
			t.Errorf("pod %s has %v", pod, at)
		}
		if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("a file can be made: %v", err)
		}
	}
	if n := fuseMounts(t, m.base); n != 4 {
		t.Errorf("%d mounts, not one and three binds", n)
	}
	st, err := n.NodeGetVolumeStats(testContext(t), &csi.NodeGetVolumeStatsRequest{VolumeId: testDataset, VolumePath: n.target("a")})
	if err != nil {
		t.Fatal(err)
	}
	var bytes int64
	for _, p := range files {
		bytes += int64(len(p))
	}
	if u := st.Usage; u[0].Used != bytes || u[1].Used != int64(len(files)) {
		t.Errorf("stats say %v, not %d bytes in %d files", u, bytes, len(files))
	}

	// A mount without a pod stays for a while, then goes.
	open, err := os.Open(filepath.Join(n.target("a"), "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	for _, pod := range []string{"a", "b", "c"} {
		n.unpublish(pod)
		n.unpublish(pod)
	}
	if _, err := n.NodeUnstageVolume(testContext(t), &csi.NodeUnstageVolumeRequest{VolumeId: testDataset, StagingTargetPath: filepath.Join(m.base, "staging")}); err != nil {
		t.Error(err)
	}
	if err := n.s.reap(time.Hour); err != nil {
		t.Fatal(err)
	}
	if n := fuseMounts(t, m.base); n != 1 {
		t.Errorf("%d mounts without a pod, before their time is over", n)
	}
	open.Close()
	n.s.mu.Lock()
	for _, m := range n.s.sets[testDataset].mounts {
		m.unused = m.unused.Add(-2 * time.Hour)
	}
	n.s.mu.Unlock()
	if err := n.s.reap(time.Hour); err != nil {
		t.Fatal(err)
	}
	if n := fuseMounts(t, m.base); n != 0 {
		t.Errorf("%d mounts are left", n)
	}
	eventually(t, "the folder to go", func() bool { return len(below(t, n.s.mountsDir)) == 0 })
	if err := n.stop(); err != nil {
		t.Error(err)
	}
	if said := told.all(); !slices.Equal(said, []string{"ready true", "ready false"}) {
		t.Errorf("the node was told %q", said)
	}
	for _, path := range []string{n.s.config.csiSocket(), n.s.config.registrationSocket()} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

func below(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestRunningPodsKeepTheirSnapshotAndNewPodsGetTheCurrentOne(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	old := n.publish("old")
	k.write("added", []byte("later"))
	k.refresh()
	fresh := n.publish("fresh")
	if deviceAt(t, old) == deviceAt(t, fresh) {
		t.Error("one file system shows both snapshots")
	}
	if _, err := os.Stat(filepath.Join(old, "added")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the running pod sees the new file: %v", err)
	}
	sameFile(t, filepath.Join(fresh, "added"), []byte("later"))
	// The kubelet repeats a call for the running pod, when its container is started again.
	if n.publish("old"); deviceAt(t, old) == deviceAt(t, fresh) {
		t.Error("a running pod was moved to another snapshot")
	}
	// An old snapshot goes with its last pod.
	n.unpublish("old")
	if err := n.s.reap(time.Hour); err != nil {
		t.Fatal(err)
	}
	// The service looks by itself too, and may be ending the mount right now.
	eventually(t, "only the current mount and its bind to be left", func() bool { return fuseMounts(t, m.base) == 2 })
	// Workers that are away: what the node has serves new pods.
	k.stop()
	n.s.patience = 100 * time.Millisecond
	other := n.publish("other")
	if deviceAt(t, other) != deviceAt(t, fresh) {
		t.Error("another file system")
	}
	for _, pod := range []string{"fresh", "other"} {
		n.unpublish(pod)
	}
}

func TestOnlyAKeyThatTheWorkersTakeOpensADataset(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	wrong := map[string]string{v1alpha1.KeyRead: string(wire.FormatKeys(wire.GenerateKeys().Read))}
	try := func(what string, want codes.Code, change func(*csi.NodePublishVolumeRequest)) {
		t.Helper()
		r := n.request("pod")
		change(r)
		_, err := n.NodePublishVolume(testContext(t), r)
		if status.Code(err) != want {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		if err != nil {
			if at, _ := mountinfo.At(r.TargetPath); len(at) != 0 {
				t.Errorf("%s: mounted all the same", what)
			}
			return
		}
		n.unpublish("pod")
	}
	inline := func(namespace string, secret map[string]string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) {
			r.VolumeContext[attributeEphemeral], r.VolumeContext[attributePodNamespace], r.Secrets = "true", namespace, secret
		}
	}
	for _, when := range []string{"nobody has it", "another pod has it"} {
		try(when+", wrong key", codes.PermissionDenied, func(r *csi.NodePublishVolumeRequest) { r.Secrets = wrong })
		try(when+", no key", codes.PermissionDenied, func(r *csi.NodePublishVolumeRequest) { r.Secrets = nil })
		try(when+", inline, no key", codes.PermissionDenied, inline("argo", nil))
		try(when+", inline, wrong key of another namespace", codes.PermissionDenied, inline("evil", wrong))
		try(when+", inline, a Secret of a namespace that it is shared with", codes.OK, inline("friends", k.secret()))
		try(when+", inline, own namespace", codes.OK, inline("argo", k.secret()))
		n.publish("holder")
	}
	n.unpublish("holder")

	// Rotation: workers with new keys only. A pod with the new Secret mends the mount that is there.
	n.publish("running")
	n.s.patience = time.Minute // the workers' answer counts, however slow they are
	old := k.secret()
	k.stop()
	k.useKeys(wire.GenerateKeys())
	k.start("")
	try("the old key after a rotation", codes.PermissionDenied, func(r *csi.NodePublishVolumeRequest) { r.Secrets = old })
	n.secret = k.secret()
	dir := n.publish("new")
	sameFile(t, filepath.Join(dir, "big"), someFiles()["big"])
	sameFile(t, filepath.Join(n.target("running"), "dir/x"), someFiles()["dir/x"])
	try("the old key, again", codes.PermissionDenied, func(r *csi.NodePublishVolumeRequest) { r.Secrets = old })

	// The same in two steps, with a pod that has both keys in between.
	old = k.secret()
	newer := wire.GenerateKeys()
	both := newer
	both.Read = append(slices.Clone(newer.Read), k.keys.Read...)
	restart := func(keys wire.Keys) {
		k.stop()
		k.useKeys(keys)
		k.start("")
	}
	restart(both)
	n.secret = k.secret()
	n.publish("both")
	try("an old key that is taken still", codes.OK, inline("friends", old))
	n.s.mu.Lock()
	keys := n.s.sets[testDataset].keys
	n.s.mu.Unlock()
	if !slices.Equal(keys, both.Read) {
		t.Error("a pod with the old key takes the new one from the mount")
	}
	restart(newer)
	try("an old key that was withdrawn", codes.PermissionDenied, inline("evil", old))
	for _, pod := range []string{"running", "new", "both"} {
		n.unpublish(pod)
	}
}

func TestBadVolumesAreRefusedWithAReason(t *testing.T) {
	good := string(wire.FormatKeys(wire.GenerateKeys().Read))
	many := strings.Repeat(good, maxKeys+1)
	for _, c := range []struct {
		want       string
		attributes map[string]string
		secret     map[string]string
	}{
		{"not one of dataset, store, socket, lent and lender", map[string]string{"volume": "disk"}, nil},
		{"only be an inline volume", map[string]string{"volume": "store", "size": "10000000"}, nil},
		{"only be an inline volume", map[string]string{"volume": "socket", attributePodUID: "u"}, nil},
		{"podInfoOnMount", map[string]string{"volume": "store", "size": "10000000", attributeEphemeral: "true"}, nil},
		{"podInfoOnMount", map[string]string{"dataset": "d", attributeEphemeral: "true"}, nil},
		{"is not a uid", map[string]string{"volume": "socket", attributeEphemeral: "true", attributePodUID: "../../etc"}, nil},
		{"whole number", map[string]string{"volume": "store", attributeEphemeral: "true", attributePodUID: "u"}, nil},
		{"whole number", map[string]string{"volume": "store", attributeEphemeral: "true", attributePodUID: "u", "size": "800Mi"}, nil},
		{"whole number", map[string]string{"volume": "store", attributeEphemeral: "true", attributePodUID: "u", "size": "-5"}, nil},
		{"whole number", map[string]string{"volume": "store", attributeEphemeral: "true", attributePodUID: "u", "size": "100"}, nil},
		{"whole number", map[string]string{"volume": "store", attributeEphemeral: "true", attributePodUID: "u", "size": "99999999999999999999"}, nil},
		{"namespace is missing", map[string]string{"dataset": "d"}, nil},
		{"dataset is missing", map[string]string{"namespace": "n"}, nil},
		{"is not a name", map[string]string{"namespace": "n", "dataset": "../x"}, nil},
		{"is not a name", map[string]string{"namespace": "n.svc.evil.example:1", "dataset": "d"}, nil},
		{"no read key; the PersistentVolume's nodePublishSecretRef must name the Secret n/d-reader", map[string]string{"namespace": "n", "dataset": "d"}, nil},
		{`set nodePublishSecretRef of the volume to the Secret "d-reader"`, map[string]string{"dataset": "d", attributeEphemeral: "true", attributePodNamespace: "n"}, nil},
		{"64 hex digits", map[string]string{"namespace": "n", "dataset": "d"}, map[string]string{"read": "abc"}},
		{"has 9 keys", map[string]string{"namespace": "n", "dataset": "d"}, map[string]string{"read": many}},
		{"whole number", map[string]string{"namespace": "n", "dataset": "d", "copies": "many"}, map[string]string{"read": good}},
		{"whole number", map[string]string{"namespace": "n", "dataset": "d", "nodeMemory": "2Gi"}, map[string]string{"read": good}},
	} {
		_, err := parseVolume(c.attributes, c.secret)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q", c.attributes, err, c.want)
		}
		if code := status.Code(err); code != codes.InvalidArgument && code != codes.PermissionDenied {
			t.Errorf("%v: code %v", c.attributes, code)
		}
		if err != nil && strings.Contains(err.Error(), good[:20]) {
			t.Errorf("%v: the error tells the key", c.attributes)
		}
	}
	v, err := parseVolume(map[string]string{"dataset": "d", attributeEphemeral: "true", attributePodNamespace: "n", "copies": "9", "nodeMemory": "9"},
		map[string]string{"read": good, "copies": "2"})
	if err != nil || v.name() != "n/d" || v.copies != 2 || v.memory != -1 {
		t.Errorf("an inline volume's own attributes count: %+v %v", v, err)
	}
	v, err = parseVolume(map[string]string{"namespace": "n", "dataset": "d", "copies": "3", "nodeMemory": "0"}, map[string]string{"read": good})
	if err != nil || v.copies != 3 || v.memory != 0 {
		t.Errorf("%+v %v", v, err)
	}
}

func TestRequestsThatNoKubeletMakes(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	ctx := testContext(t)
	r := n.request("pod")
	r.VolumeCapability = &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}}
	if _, err := n.NodePublishVolume(ctx, r); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	r = n.request("pod")
	r.TargetPath = "relative/path"
	if _, err := n.NodePublishVolume(ctx, r); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	unlock, err := n.s.lock(n.target("pod"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.NodePublishVolume(ctx, n.request("pod")); status.Code(err) != codes.Aborted {
		t.Error(err)
	}
	unlock()
	// What is not ours and not empty stays.
	full := filepath.Join(n.target("full"), "file")
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(full, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: n.target("full")}); err == nil {
		t.Error("a folder with files was removed")
	}
	if _, err := os.Stat(full); err != nil {
		t.Error(err)
	}
	// A mount of something else is in the way.
	if err := unix.Mount("other", n.target("full"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := n.NodePublishVolume(ctx, n.inline("full", v1alpha1.VolumeStore, "1000", map[string]string{v1alpha1.AttributeSize: "10000000"})); status.Code(err) != codes.FailedPrecondition {
		t.Error(err)
	}
	if _, err := n.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "v", VolumePath: n.target("full")}); status.Code(err) != codes.NotFound {
		t.Error(err)
	}
	p, err := n.identity.Probe(ctx, &csi.ProbeRequest{})
	if err != nil || !p.GetReady().GetValue() {
		t.Error(p, err)
	}
}

// A mount that does not come about leaves what came of its snapshot, and takes away what came of those before. Whole ones
// stay: which of them parked mounts show nobody knows before there is a keeper.
func TestUnfinishedSnapshotsThatNobodyGoesOnWithGo(t *testing.T) {
	s := newService(Config{
		Dir: t.TempDir(), Logger: quiet(), Seeds: func(string, string) []string { return []string{"127.0.0.1:1"} },
	}.withDefaults())
	if err := os.Mkdir(s.snapshotDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-youth - time.Minute)
	for name, made := range map[string]time.Time{"new-1": past, "new-2": time.Now(), "1.snapshot": past} {
		path := filepath.Join(s.snapshotDir(), name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, made, made)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	set := &dataset{namespace: "argo", name: "genomes", keys: wire.GenerateKeys().Read, turn: make(chan struct{}, 1)}
	if _, err := s.mount(ctx, set, catalog.Digest{1}); err == nil {
		t.Fatal("mounted")
	}
	for name, want := range map[string]bool{"new-1": false, "new-2": true, "1.snapshot": true} {
		if _, err := os.Stat(filepath.Join(s.snapshotDir(), name)); (err == nil) != want {
			t.Errorf("%s: kept %v, want %v", name, err == nil, want)
		}
	}
}
