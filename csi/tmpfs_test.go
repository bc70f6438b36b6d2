package csi

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

func TestStoreIsMemoryOfThePodsGroup(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	const size = 32 << 20
	r := n.inline("worker", v1alpha1.VolumeStore, "1234", map[string]string{v1alpha1.AttributeSize: decimal(size)})
	for range 2 { // the second is the kubelet's repetition, and must not lose what is in it
		if _, err := n.NodePublishVolume(testContext(t), r); err != nil {
			t.Fatal(err)
		}
		if at, err := mountinfo.At(r.TargetPath); err != nil || len(at) != 1 {
			t.Fatal(at, err)
		}
	}
	at, _ := mountinfo.At(r.TargetPath)
	for _, want := range []string{"nosuid", "nodev", "noexec"} {
		if !strings.Contains(","+at[0].Options+",", ","+want+",") {
			t.Errorf("options %s lack %s", at[0].Options, want)
		}
	}
	for _, want := range []string{"size=32768k", "gid=1234", "mode=2770"} {
		if !strings.Contains(","+at[0].SuperOptions+",", ","+want+",") {
			t.Errorf("options %s lack %s", at[0].SuperOptions, want)
		}
	}
	// A full store is a clean error.
	f, err := os.Create(filepath.Join(r.TargetPath, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var werr error
	for n := 0; werr == nil && n <= size; n += 1 << 20 {
		_, werr = f.Write(make([]byte, 1<<20))
	}
	if !errors.Is(werr, unix.ENOSPC) {
		t.Errorf("writing more than the size: %v", werr)
	}
	st, err := n.NodeGetVolumeStats(testContext(t), &csi.NodeGetVolumeStatsRequest{VolumeId: r.VolumeId, VolumePath: r.TargetPath})
	if err != nil || st.Usage[0].Total != size || st.Usage[0].Used < size/2 {
		t.Errorf("stats %v %v", st, err)
	}
	n.unpublish("worker")

	for _, group := range []string{"", "-1", "root", "4294967296"} {
		r := n.inline("worker", v1alpha1.VolumeStore, group, map[string]string{v1alpha1.AttributeSize: decimal(size)})
		if _, err := n.NodePublishVolume(testContext(t), r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("group %q: %v", group, err)
		}
		if _, err := os.Lstat(r.TargetPath); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("group %q: the folder is left", group)
		}
	}
}

// A worker on this node makes its socket in a volume, the node service finds it by the short path, and reads of a
// file that the worker holds pass this process by.
func TestFilesOfAWorkerOfThisNodeArePassedThrough(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	socket := n.inline("pod-uid-1", v1alpha1.VolumeSocket, "1234", nil)
	if _, err := n.NodePublishVolume(testContext(t), socket); err != nil {
		t.Fatal(err)
	}
	k.stop()
	path := filepath.Join(m.base, "run", "pod-uid-1", v1alpha1.SocketName) // in the pod its path is another
	k.start(path)
	if _, err := os.Lstat(filepath.Join(socket.TargetPath, v1alpha1.SocketName)); err != nil {
		t.Fatal(err)
	}
	k.publish(1, path)
	dir := n.publish("step")
	sameFile(t, filepath.Join(dir, "big"), someFiles()["big"])
	n.s.mu.Lock()
	server := n.s.sets[testDataset].mounts[0].server
	n.s.mu.Unlock()
	if s := server.Stats(); !s.Passthrough {
		t.Skip("this kernel passes no files through (Linux 6.9 does)")
	}
	eventually(t, "a passthrough open", func() bool {
		sameFile(t, filepath.Join(dir, "big"), someFiles()["big"])
		return t.Failed() || server.Stats().PassthroughOpens > 0
	})
	n.unpublish("step")
	n.unpublish("pod-uid-1")
	if got := below(t, filepath.Join(m.base, "run")); len(got) != 0 {
		t.Errorf("%v is left", got)
	}
}

func TestASocketIsOnlyWhatAWorkerMadeInItsFolder(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	listen := func(path string) {
		l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	outside := filepath.Join(m.base, "o.sock")
	listen(outside)
	publish := func(uid string) string {
		r := n.inline(uid, v1alpha1.VolumeSocket, "1234", nil)
		if _, err := n.NodePublishVolume(testContext(t), r); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.unpublish(uid) })
		return r.TargetPath
	}
	run := filepath.Join(m.base, "run")
	dial := func(path string) error {
		c, err := n.s.dialWorker(testContext(t), "unixpacket", path)
		if err == nil {
			c.Close()
		}
		return err
	}
	honest := publish("honest")
	listen(filepath.Join(honest, v1alpha1.SocketName))
	if err := dial(filepath.Join(run, "honest", v1alpha1.SocketName)); err != nil {
		t.Error(err)
	}
	// Published again, as after a restart of the kubelet: the same folder.
	publish("honest")
	if err := dial(filepath.Join(run, "honest", v1alpha1.SocketName)); err != nil {
		t.Error(err)
	}
	link := publish("link")
	if err := os.Symlink(outside, filepath.Join(link, v1alpha1.SocketName)); err != nil {
		t.Fatal(err)
	}
	file := publish("file")
	if err := os.WriteFile(filepath.Join(file, v1alpha1.SocketName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(run, "plain"), 0o755); err != nil {
		t.Fatal(err)
	}
	listen(filepath.Join(run, "plain", v1alpha1.SocketName))
	for _, path := range []string{
		outside, filepath.Join(run, "link", v1alpha1.SocketName), filepath.Join(run, "file", v1alpha1.SocketName),
		filepath.Join(run, "plain", v1alpha1.SocketName), filepath.Join(run, "none", v1alpha1.SocketName),
		filepath.Join(run, "honest", "other.sock"), filepath.Join(run, "honest", "..", "..", "o.sock"),
	} {
		if err := dial(path); err == nil {
			t.Errorf("connected to %s", path)
		}
	}
	// Nobody fills the node's memory through it.
	if err := os.WriteFile(filepath.Join(honest, "fill"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a megabyte in a socket's folder: %v", err)
	}
}

func TestSocketFoldersOfPodsThatWentMeanwhileAreTakenAway(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	for _, uid := range []string{"stays", "went"} {
		if _, err := n.NodePublishVolume(testContext(t), n.inline(uid, v1alpha1.VolumeSocket, "1234", nil)); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := mountinfo.Detach(n.target("went"), nil); err != nil { // as the kubelet does with orphans
		t.Fatal(err)
	}
	n = m.run(nil)
	if got := below(t, filepath.Join(m.base, "run")); len(got) != 1 || got[0] != "stays" {
		t.Errorf("socket folders: %v", got)
	}
	n.unpublish("stays")
}

func TestBudgetIsNeverExceeded(t *testing.T) {
	b := newBudget("/dev/null/no", 100*leastSlice, quiet())
	if n := b.take(0); n != 0 {
		t.Errorf("a cap of 0 got %d", n)
	}
	var taken int64
	for _, c := range []struct{ limit, want int64 }{
		{10 * leastSlice, 10 * leastSlice}, // its cap
		{-1, 45 * leastSlice},              // half of what is left
		{1 << 50, 45 * leastSlice / 2},     // no more than that, whatever its cap
		{21 * leastSlice, 45 * leastSlice / 4},
		{-1, 45 * leastSlice / 8}, {-1, 45 * leastSlice / 16}, {-1, 45 * leastSlice / 32},
		{-1, 0}, {5 * leastSlice, 0}, // too little left: stream
	} {
		got := b.take(c.limit)
		if got != c.want {
			t.Errorf("cap %d: %d, want %d", c.limit, got, c.want)
		}
		taken += got
	}
	if taken+b.left != b.total {
		t.Errorf("%d given and %d left of %d", taken, b.left, b.total)
	}
	b.giveBack(taken)
	// What cannot be made is not kept.
	if s := b.open(context.Background(), "d", -1); s != nil || b.left != b.total {
		t.Errorf("%v, %d left", s, b.left)
	}
}

func TestNodeCacheIsSharedAndGivenBack(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(func(c *Config) { c.NodeMemory = 4 * leastSlice })
	n.secret[v1alpha1.AttributeNodeMemory] = decimal(leastSlice)
	dir := n.publish("pod")
	sameFile(t, filepath.Join(dir, "big"), someFiles()["big"])
	n.s.mu.Lock()
	cache := n.s.sets[testDataset].cache
	n.s.mu.Unlock()
	if cache == nil || cache.store.Stats().Quota != leastSlice {
		t.Fatalf("cache %+v", cache)
	}
	eventually(t, "the file to be in the node's cache", func() bool { return cache.store.Stats().Used > 0 })
	n.unpublish("pod")
	if err := n.s.reap(-1); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the memory to be free", func() bool {
		n.s.budget.mu.Lock()
		defer n.s.budget.mu.Unlock()
		return n.s.budget.left == n.s.budget.total
	})
	if all, err := mountinfo.Below(m.base); err != nil || len(all) != 0 {
		t.Errorf("left: %v %v", all, err)
	}
}
