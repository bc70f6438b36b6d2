package csi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/csi/broker"
	"github.com/stepcache/stepcache/csi/packets"
	folder "github.com/stepcache/stepcache/tier"
)

// borrowing is a pod with a sidecar that serves the Dataset's mount. Its sidecar is a process with no right at all.
type borrowing struct {
	t            *testing.T
	m            *machine
	k            *kubelet
	uid          string
	data, socket string // the volumes' targets
	tier         string
	hostUsers    bool // the pod has no user namespace of its own
}

// nobody is the sidecar's user.
const nobody = 65532

func (m *machine) borrow(k *kubelet, uid string) *borrowing {
	m.t.Helper()
	p := &borrowing{t: m.t, m: m, k: k, uid: uid, tier: filepath.Join(m.base, "tier-"+uid), hostUsers: true}
	p.data, p.socket = p.target("data"), p.target("node")
	// What the projected volume has, for any user.
	f := folder.Folder{Dir: filepath.Join(p.tier, "genomes"), Dataset: testDataset, Copies: 1}
	if err := errors.Join(os.MkdirAll(f.KeysDir(), 0o755), f.Write(), wire.WriteKeys(f.KeysDir(), wire.Keys{Read: m.tier.keys.Read})); err != nil {
		m.t.Fatal(err)
	}
	p.members("")
	if err := filepath.WalkDir(p.tier, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chmod(path, 0o755))
	}); err != nil {
		m.t.Fatal(err)
	}
	p.publish()
	// A container has the volume at a path of its own; here all folders above it are in the way.
	for dir := filepath.Dir(p.socket); len(dir) > len("/tmp"); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	return p
}

// lending is a node service beside a keeper, and a pod for whose mount nobody serves yet.
func lending(t *testing.T) (*node, *borrowing) {
	t.Helper()
	needMounts(t)
	m := newMachine(t, newTier(t, someFiles()))
	m.keep()
	n := m.run(nil)
	return n, m.borrow(n.kubelet, "pod-1")
}

// open opens a file of the pod's mount, until the test ends.
func (p *borrowing) open(name string) *os.File {
	p.t.Helper()
	f, err := os.Open(filepath.Join(p.data, name))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { f.Close() })
	return f
}

func (p *borrowing) members(socket string) {
	p.t.Helper()
	k := p.m.tier
	k.publish(1, socket)
	b, err := json.Marshal(ring.Membership{Epoch: 1, Members: []ring.Member{{
		ID: k.config.ID, Node: nodeName, Addr: k.gate.addr(), Control: k.worker.ControlAddr().String(), Socket: socket, State: ring.Ready,
	}}})
	if err == nil {
		err = os.WriteFile(filepath.Join(p.tier, "genomes", "membership.json"), b, 0o644)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *borrowing) target(volume string) string {
	return filepath.Join(p.k.dir, "pods", p.uid, "volumes", "kubernetes.io~csi", volume, "mount")
}

func (p *borrowing) request(volume, kind string) *csi.NodePublishVolumeRequest {
	r := p.k.inline(p.uid, kind, "", map[string]string{v1alpha1.AttributeDataset: "genomes"})
	r.TargetPath, r.VolumeId = p.target(volume), fmt.Sprintf("csi-%s-%s", p.uid, volume)
	return r
}

// publish is the kubelet's, which may repeat it.
func (p *borrowing) publish() {
	p.t.Helper()
	for _, r := range []*csi.NodePublishVolumeRequest{p.request("data", v1alpha1.VolumeLent), p.request("node", v1alpha1.VolumeLender)} {
		if _, err := p.k.NodePublishVolume(testContext(p.t), r, grpc.WaitForReady(true)); err != nil {
			p.t.Fatal(err)
		}
	}
}

func (p *borrowing) unpublish() {
	p.t.Helper()
	for _, target := range []string{p.data, p.socket} {
		if _, err := p.k.NodeUnpublishVolume(testContext(p.t), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: target}, grpc.WaitForReady(true)); err != nil {
			p.t.Fatal(err)
		}
	}
	left, err := mountinfo.Below(filepath.Join(p.k.dir, "pods", p.uid))
	if err != nil || len(left) > 0 {
		p.t.Errorf("left: %v %v", left, err)
	}
	for _, target := range []string{p.data, p.socket} {
		if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
			p.t.Errorf("%s is left: %v", target, err)
		}
	}
}

func (p *borrowing) sock() string { return filepath.Join(p.socket, v1alpha1.LenderSocketName) }

// serve starts the sidecar: another user than root, no capability, none to be had.
func (p *borrowing) serve() *process { return p.serveBy(p.sock()) }

// serveBy starts a sidecar that finds the node service at that socket.
func (p *borrowing) serveBy(sock string) *process {
	p.t.Helper()
	o := order{NodeName: nodeName, Socket: sock, Tier: p.tier, Datasets: []string{testDataset}}
	return start(p.t, "sidecar", o, func(c *exec.Cmd) {
		c.Path = "/proc/self/exe" // its folder is root's
		c.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
		if p.hostUsers {
			return
		}
		ids := []syscall.SysProcIDMap{{HostID: 200000, Size: 65536}}
		c.SysProcAttr.Cloneflags, c.SysProcAttr.GidMappingsEnableSetgroups = unix.CLONE_NEWUSER, true
		c.SysProcAttr.UidMappings, c.SysProcAttr.GidMappings = ids, ids
	})
}

func (p *borrowing) ready() error {
	c, err := broker.Dial(context.Background(), p.sock())
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Ready()
}

// served waits until a sidecar serves.
func (p *borrowing) served(s *process) {
	p.t.Helper()
	var err error
	eventually(p.t, "the mount is served", func() bool {
		if exited(s) {
			p.t.Fatalf("the sidecar ended:\n%s", s.out)
		}
		err = p.ready()
		return err == nil
	})
}

func (p *borrowing) check() {
	p.t.Helper()
	for name, want := range someFiles() {
		sameFile(p.t, filepath.Join(p.data, name), want)
	}
}

// fails wants a look at the mount to be an error at once.
func (p *borrowing) fails() {
	p.t.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := os.ReadDir(p.data)
		done <- err
	}()
	select {
	case err := <-done:
		if !isDead(err) {
			p.t.Errorf("a mount that nobody serves: %v", err)
		}
	case <-time.After(time.Minute):
		p.t.Error("who looks at a mount that nobody serves waits")
	}
}

func (p *borrowing) volume(s *service) *lent {
	s.lender.mu.Lock()
	defer s.lender.mu.Unlock()
	return s.lender.volumes[p.data]
}

func TestLentMountIsServedWithoutAnyRight(t *testing.T) {
	n, p := lending(t)
	p.fails() // an error, not an empty folder, and nobody waits
	if err := p.ready(); err == nil {
		t.Error("ready before anybody serves")
	}
	s := p.serve()
	p.served(s)
	p.check()
	p.publish() // the kubelet was restarted
	p.check()
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid)); err != nil || !strings.Contains(string(b), "CapEff:\t0000000000000000") || !strings.Contains(string(b), fmt.Sprintf("Uid:\t%d", nobody)) {
		t.Errorf("the sidecar is not as unprivileged as this test says: %v\n%s", err, b)
	}
	// Nobody writes, whatever the server would answer.
	if err := os.WriteFile(filepath.Join(p.data, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("a write: %v", err)
	}
	at, err := mountinfo.At(p.data)
	if err != nil || !strings.HasPrefix(at[0].SuperOptions, "ro") || !strings.Contains(at[0].Options, "nosuid,nodev") {
		t.Errorf("mounted %+v %v", at, err)
	}
	st, err := n.NodeGetVolumeStats(testContext(t), &csi.NodeGetVolumeStatsRequest{VolumeId: "v", VolumePath: p.data})
	if err != nil || len(st.Usage) != 2 {
		t.Errorf("stats %v %v", st, err)
	}
	// The end as the kubelet makes it. Whoever still reads gets an error.
	p.open("big")
	s.terminate(t)
	p.fails()
	p.unpublish()
}

// What a killed server had open goes on when it is started again, and what it was about to answer is answered.
func TestKilledServerOfALentMountIsSucceeded(t *testing.T) {
	_, p := lending(t)
	k := p.m.tier
	s := p.serve()
	p.served(s)
	f := p.open("big")
	k.gate.hold() // the read that follows is under way when the server dies
	answers := make(chan error, 1)
	go func() {
		b, err := io.ReadAll(f)
		if err == nil && string(b) != string(someFiles()["big"]) {
			err = fmt.Errorf("%d bytes that are not the file's", len(b))
		}
		answers <- err
	}()
	d := deviceAt(t, p.data)
	k.gate.awaits(t, d)
	s.kill()
	k.gate.release()
	s = p.serve()
	select {
	case err := <-answers:
		if err != nil {
			t.Errorf("a read over the server's death: %v\n%s", err, s.out)
		}
	case <-time.After(time.Minute):
		t.Fatalf("a read hangs:\n%s", s.out)
	}
	p.served(s)
	if deviceAt(t, p.data) != d {
		t.Error("the successor has another mount")
	}
	p.check()
	s.terminate(t)
	p.unpublish()
}

// A node service that goes as it is told of the first mount, and has it at the keeper by then: the server goes on, and
// tells the next one.
func TestServerOutlivesANodeServiceThatGoesAsItBegins(t *testing.T) {
	_, p := lending(t)
	var told atomic.Int32
	s := p.serveBy(p.proxy(func(serve bool) (on, back bool) {
		return true, !serve || told.Add(1) > 1
	}))
	eventually(t, "the server tells the next node service", func() bool {
		if exited(s) {
			t.Fatalf("the sidecar ended:\n%s", s.out)
		}
		return told.Load() > 1
	})
	p.served(s)
	p.check()
	f := p.open("big")
	s.kill()
	eventually(t, "the killed server is missed", func() bool { return p.ready() != nil })
	s = p.serve()
	p.served(s)
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, someFiles()["big"]) {
		t.Errorf("a file that was open: %d bytes, %v", len(got), err)
	}
	s.terminate(t)
	p.unpublish()
}

// One that goes before it is told leaves a mount that nobody else has: the server is started again before anybody uses it.
func TestServerOfAMountThatNobodyElseHasIsStartedAgain(t *testing.T) {
	n, p := lending(t)
	var told atomic.Int32
	s := p.serveBy(p.proxy(func(serve bool) (on, back bool) {
		if !serve || told.Add(1) > 1 {
			return true, true
		}
		v := p.volume(n.s)
		n.s.lender.mu.Lock()
		defer n.s.lender.mu.Unlock()
		v.forget()
		return false, false
	}))
	eventually(t, "the sidecar's end", func() bool { return exited(s) })
	if !strings.Contains(s.out.String(), "nobody has the connection") {
		t.Errorf("it said:\n%s", s.out)
	}
	s = p.serve()
	p.served(s)
	p.check()
	s.terminate(t)
	p.unpublish()
}

// proxy is a socket at which the packets of a server are handed to the node service, and back what that answers, as fate
// says of each request; otherwise the connection ends. serve: it tells of a mount that is served.
func (p *borrowing) proxy(fate func(serve bool) (on, back bool)) (sock string) {
	p.t.Helper()
	sock = filepath.Join(p.tier, "node.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: sock, Net: "unixpacket"})
	if err == nil {
		err = os.Chmod(sock, 0o666)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { l.Close() })
	go func() { // ends with the listener
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go passOn(c, p.sock(), fate)
		}
	}()
	return sock
}

func passOn(c *net.UnixConn, to string, fate func(serve bool) (on, back bool)) {
	defer c.Close()
	node, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: to, Net: "unixpacket"})
	if err != nil {
		return
	}
	defer node.Close()
	b := make([]byte, 20<<10)
	for {
		size, fds, err := packets.Receive(c, b, broker.MaxFiles, io.ErrUnexpectedEOF, packets.CloseAll)
		if err != nil || size == 0 {
			return
		}
		on, back := fate(bytes.Contains(b[:size], []byte(`"op":"serve"`)))
		if on {
			err = packets.Send(node, b[:size], fds)
		}
		packets.CloseAll(fds)
		if err != nil || !on {
			return
		}
		size, fds, err = packets.Receive(node, b, broker.MaxFiles, io.ErrUnexpectedEOF, packets.CloseAll)
		if err == nil && back {
			err = packets.Send(c, b[:size], fds)
		}
		packets.CloseAll(fds)
		if err != nil || size == 0 || !back {
			return
		}
	}
}

// A server that was killed while its pod ends has no successor: who waits for it is freed, and nothing is left.
func TestKilledServerOfALentMountLeavesNothing(t *testing.T) {
	n, p := lending(t)
	k := p.m.tier
	s := p.serve()
	p.served(s)
	f := p.open("big")
	k.gate.hold()
	answers := make(chan error, 1)
	go func() {
		_, err := io.ReadAll(f)
		answers <- err
	}()
	d := deviceAt(t, p.data)
	k.gate.awaits(t, d)
	s.kill()
	k.gate.release()
	p.unpublish()
	select {
	case err := <-answers:
		if err == nil {
			t.Error("read to its end with nobody to serve it")
		}
	case <-time.After(time.Minute):
		t.Fatal("who waited for the killed server waits still")
	}
	eventually(t, "the keeper forgets it", func() bool {
		all, err := n.s.keeping.current().List()
		for _, e := range all {
			e.Close()
		}
		return err == nil && len(all) == 0
	})
}

// With no server for too long a mount is ended, so that nothing waits for ever; a server that comes after all
// gets a new one.
func TestLentMountWithoutAServerEnds(t *testing.T) {
	n, p := lending(t)
	s := p.serve()
	p.served(s)
	n.s.lender.watch()
	p.check()
	s.kill()
	eventually(t, "the server's end is seen", func() bool {
		v := p.volume(n.s)
		n.s.lender.mu.Lock()
		defer n.s.lender.mu.Unlock()
		return v.server == nil
	})
	n.s.lender.watch() // not yet
	v := p.volume(n.s)
	n.s.lender.mu.Lock()
	kept := v.conn != nil
	v.since = v.since.Add(-lostAfter)
	n.s.lender.mu.Unlock()
	if !kept {
		t.Fatal("given up at once")
	}
	n.s.lender.watch()
	p.fails()
	s = p.serve()
	p.served(s)
	p.check()
	s.terminate(t)
	p.unpublish()
}

// Node services come and go while the sidecar serves on, and whichever is there helps its successor.
func TestLentMountsOutliveNodeServices(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	keeper := m.startKeeper()
	first, kube := m.startNode()
	p := m.borrow(kube, "pod-1")
	s := p.serve()
	p.served(s)
	keeper.parked(t, 1)
	f := p.open("big")
	d := deviceAt(t, p.data)

	// Killed: for a while there is none.
	first.kill()
	p.check()
	second, kube := m.startNode()
	p.k = kube
	p.served(s)
	// Beside each other, as in a DaemonSet's surge.
	third, kube := m.startNode()
	p.k = kube
	second.terminate(t)
	p.served(s)
	p.check()

	// Both at once: what the keeper has is enough for the next two.
	third.kill()
	s.kill()
	fourth, kube := m.startNode()
	p.k = kube
	s = p.serve()
	p.served(s)
	if deviceAt(t, p.data) != d {
		t.Error("the mount was made anew")
	}
	b, err := io.ReadAll(f)
	if err != nil || string(b) != string(someFiles()["big"]) {
		t.Errorf("a file that was open all the time: %d bytes, %v", len(b), err)
	}
	p.check()
	s.terminate(t)
	p.unpublish()
	fourth.terminate(t)
}

// Two node services may be there side by side for longer than a mount may be without a server: the later one is told who
// serves, and ends nothing.
func TestALaterNodeServiceKeepsTheMountsThatPodsServe(t *testing.T) {
	first, p := lending(t)
	m := p.m
	s := p.serve()
	p.served(s)
	f := p.open("big")
	second := m.run(nil)
	p.k = second.kubelet
	p.served(s)
	// A call that the earlier one has still to answer has it look.
	if err := first.s.lender.look(); err != nil {
		t.Fatal(err)
	}
	p.served(s)
	v := p.volume(second.s)
	second.s.lender.mu.Lock()
	v.since = v.since.Add(-lostAfter)
	second.s.lender.mu.Unlock()
	second.s.lender.watch()
	p.check()
	if b, err := io.ReadAll(f); err != nil || !bytes.Equal(b, someFiles()["big"]) {
		t.Errorf("a file that was open all the time: %d bytes, %v", len(b), err)
	}
	s.terminate(t)
	p.unpublish()
}

func passesThrough(t *testing.T) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 9
}

// Files of a worker of this node are read from where they are: the node service connects the sidecar to the worker
// and registers what it gets there.
func TestLentMountsPassThrough(t *testing.T) {
	for name, hostUsers := range map[string]bool{"users of the node": true, "a user namespace": false} {
		t.Run(name, func(t *testing.T) { lentMountsPassThrough(t, hostUsers) })
	}
}

func lentMountsPassThrough(t *testing.T, hostUsers bool) {
	needMounts(t)
	if !passesThrough(t) {
		t.Skip("this kernel passes no files through (Linux 6.9 does)")
	}
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	k.stop()
	// The worker's memory is a volume of ours, as it is its socket's folder.
	store := n.inline("worker-1", v1alpha1.VolumeStore, "0", map[string]string{v1alpha1.AttributeSize: decimal(256 << 20)})
	store.TargetPath = filepath.Join(k.state, "store")
	if err := os.RemoveAll(store.TargetPath); err != nil {
		t.Fatal(err)
	}
	socket := n.inline("worker-1", v1alpha1.VolumeSocket, "0", nil)
	for _, r := range []*csi.NodePublishVolumeRequest{store, socket} {
		if _, err := n.NodePublishVolume(testContext(t), r); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { k.stop(); _, _ = mountinfo.Detach(store.TargetPath, nil) })
	path := filepath.Join(m.base, "run", "worker-1", v1alpha1.SocketName)
	k.start(path)
	p := m.borrow(n.kubelet, "pod-1")
	p.hostUsers = hostUsers
	p.members(path)
	s := p.serve()
	p.served(s)
	registered := func() int {
		v := p.volume(n.s)
		n.s.lender.mu.Lock()
		defer n.s.lender.mu.Unlock()
		return len(v.registered)
	}
	p.check()
	eventually(t, "a file is registered", func() bool {
		sameFile(t, filepath.Join(p.data, "big"), someFiles()["big"])
		return t.Failed() || registered() > 0
	})
	// Open over the server's death: the successor knows how.
	f := p.open("big")
	s.kill()
	s = p.serve()
	p.served(s)
	sameFile(t, filepath.Join(p.data, "big"), someFiles()["big"])
	if b, err := io.ReadAll(f); err != nil || string(b) != string(someFiles()["big"]) {
		t.Errorf("%d bytes %v", len(b), err)
	}
	f.Close()
	eventually(t, "the file is unregistered when it was idle", func() bool { return registered() == 0 })
	s.terminate(t)
	p.unpublish()
}

func TestBadVolumesOfBorrowersAreRefused(t *testing.T) {
	n, p := lending(t)
	for what, change := range map[string]func(map[string]string){
		"not inline":         func(a map[string]string) { a[attributeEphemeral] = "false" },
		"no pod":             func(a map[string]string) { delete(a, attributePodUID) },
		"a pod that is none": func(a map[string]string) { a[attributePodUID] = "../x" },
		"no Dataset":         func(a map[string]string) { delete(a, v1alpha1.AttributeDataset) },
		"a path for a name":  func(a map[string]string) { a[v1alpha1.AttributeDataset] = "a/b" },
		"a list for a name":  func(a map[string]string) { a[v1alpha1.AttributeDataset] = "a,suid" },
		"no namespace":       func(a map[string]string) { delete(a, attributePodNamespace) },
	} {
		r := p.request("bad", v1alpha1.VolumeLent)
		change(r.VolumeContext)
		if _, err := n.NodePublishVolume(testContext(t), r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range maxLent - 1 {
		if _, err := n.NodePublishVolume(testContext(t), p.request(fmt.Sprintf("more-%d", i), v1alpha1.VolumeLent)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.NodePublishVolume(testContext(t), p.request("too-many", v1alpha1.VolumeLent)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one too many: %v", err)
	}
	p.publish() // those that are there are there
	for i := range maxLent - 1 {
		if _, err := n.NodeUnpublishVolume(testContext(t), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: p.target(fmt.Sprintf("more-%d", i))}); err != nil {
			t.Error(err)
		}
	}
	p.unpublish()
}

// A pod that speaks to the node service by itself gets nothing but its own mounts, and harms nobody.
func TestHostilePodsGetNothing(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	other := m.borrow(n.kubelet, "pod-2")
	s2 := other.serve()
	other.served(s2)
	p := m.borrow(n.kubelet, "pod-1")
	c, err := broker.Dial(testContext(t), p.sock())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	volumes, err := c.Volumes()
	if err != nil || len(volumes) != 1 || volumes[0].Dataset != testDataset {
		t.Fatalf("volumes %v %v", volumes, err)
	}
	mine := volumes[0].Name
	if _, _, _, err := c.Claim(lentName(other.data), false); err == nil {
		t.Error("got another pod's mount")
	}
	fuse, table, settings, err := c.Claim(mine, false)
	if err != nil || table != nil || settings != nil {
		t.Fatal(err)
	}
	defer fuse.Close()
	open := func(path string, flags int) *os.File {
		t.Helper()
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), path)
		t.Cleanup(func() { f.Close() })
		return f
	}
	memory := func() *os.File {
		t.Helper()
		fd, err := unix.MemfdCreate("hostile", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "hostile")
		t.Cleanup(func() { f.Close() })
		return f
	}
	pipe, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	defer w.Close()
	if _, err := c.Register(mine, int(memory().Fd())); err == nil {
		t.Error("registered before it served")
	}
	for _, files := range [][2]*os.File{{pipe, memory()}, {memory(), open("/etc/passwd", unix.O_RDONLY)}, {open("/", unix.O_RDONLY), fuse}} {
		if _, err := c.Serve(mine, files[0], files[1]); err == nil || !strings.Contains(err.Error(), "descriptors of memory") {
			t.Errorf("%s, %s: %v", files[0].Name(), files[1].Name(), err)
		}
	}
	if kept, err := c.Serve(mine, memory(), memory()); err != nil || !kept {
		t.Fatal(kept, err)
	}

	// A store of a worker, in which there is a file.
	store := n.inline("worker-1", v1alpha1.VolumeStore, "0", map[string]string{v1alpha1.AttributeSize: decimal(1 << 20)})
	if _, err := n.NodePublishVolume(testContext(t), store); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(store.TargetPath, "object")
	if err := os.WriteFile(file, []byte("bytes"), 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(n.publish("step"), "big")
	for what, f := range map[string]*os.File{
		"its own memory":                  memory(),
		"a file of the node":              open("/etc/passwd", unix.O_RDONLY),
		"what it may not read":            open("/etc/passwd", unix.O_PATH),
		"a folder":                        open(store.TargetPath, unix.O_RDONLY),
		"a worker's file, for writing":    open(file, unix.O_RDWR),
		"a worker's file, by its path":    open(file, unix.O_PATH),
		"a pipe":                          pipe,
		"the mount's own connection":      fuse,
		"a file of the node's own mount":  open(foreign, unix.O_RDONLY),
		"that file, so that it is polled": open(foreign, unix.O_RDONLY|unix.O_NONBLOCK),
	} {
		var errno unix.Errno
		if _, err := c.Register(mine, int(f.Fd())); err == nil || errors.As(err, &errno) || errors.Is(err, broker.ErrGone) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if passesThrough(t) {
		// The connection was never answered INIT on, so the kernel has a word of its own here.
		var errno unix.Errno
		if _, err := c.Register(mine, int(open(file, unix.O_RDONLY).Fd())); err != nil && !errors.As(err, &errno) {
			t.Errorf("a worker's file: %v", err)
		}
	}
	for _, addr := range []string{
		"", "relative/worker.sock", n.s.config.Keeper, n.s.config.csiSocket(), "/run/" + v1alpha1.SocketName,
		filepath.Join(n.s.config.SocketDir, "..", v1alpha1.SocketName), other.sock(),
	} {
		if nc, err := broker.DialWorker(testContext(t), p.sock(), addr); err == nil {
			nc.Close()
			t.Errorf("connected to %q", addr)
		}
	}
	// What is no request at all costs its connection, and nothing else.
	for what, packet := range map[string][]byte{"no JSON": []byte("{"), "too much": make([]byte, 20<<10), "nothing": {}} {
		nc, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p.sock(), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		if len(packet) == 0 {
			_ = nc.CloseWrite()
		} else if _, err := nc.Write(packet); err != nil {
			t.Fatal(err)
		}
		if err := nc.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if n, err := nc.Read(make([]byte, 100)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %d bytes, %v", what, n, err)
		}
		nc.Close()
	}
	if err := c.Leave(); err != nil {
		t.Error(err)
	}
	p.fails()
	n.unpublish("worker-1")
	n.unpublish("step")
	p.unpublish()
	other.check()
	s2.terminate(t)
	other.unpublish()
}

// A file whose server is the pod that sends it, and does not answer: neither looking at it nor closing it may hold
// the node service up.
func TestAPodCannotFillTheLog(t *testing.T) {
	needMounts(t)
	m := newMachine(t, newTier(t, someFiles()))
	m.keep()
	var log output
	n := m.run(func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	p := m.borrow(n.kubelet, "pod-1")
	const attempts = 200
	for range attempts {
		nc, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p.sock(), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := nc.Write([]byte("{")); err != nil {
			t.Fatal(err)
		}
		if _, err := nc.Read(make([]byte, 1)); err == nil {
			t.Error("an answer to what is no request")
		}
		nc.Close()
	}
	if lines := strings.Count(log.String(), "pod-1"); lines == 0 || lines > attempts/2 {
		t.Errorf("%d lines for %d connections:\n%s", lines, attempts, log.String())
	}
}

func TestFileOfAMountThatDoesNotAnswerHoldsNobodyUp(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	// packet sends what is no request, over a connection of its own.
	packet := func(p *borrowing, text string, fds ...int) {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p.sock(), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := packets.Send(c, []byte(text), fds); err != nil {
			t.Fatal(err)
		}
	}
	for what, send := range map[string]func(p *borrowing, fd int){
		"to be registered": func(p *borrowing, fd int) {
			c, err := broker.Dial(testContext(t), p.sock())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			volumes, err := c.Volumes()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Register(volumes[0].Name, fd); err == nil || errors.Is(err, broker.ErrGone) {
				t.Errorf("registered, or no answer: %v", err)
			}
			if _, err := c.Volumes(); err != nil {
				t.Errorf("no more answers: %v", err)
			}
		},
		"one of too many": func(p *borrowing, fd int) { packet(p, `{"op":"volumes"}`, fd, fd, fd, fd) },
		"with no request": func(p *borrowing, fd int) { packet(p, "{", fd) },
		"as a worker's":   func(p *borrowing, fd int) { p.lease(n, fd) },
	} {
		t.Run(what, func(t *testing.T) {
			p := m.borrow(n.kubelet, "pod-1")
			s := p.serve()
			p.served(s)
			fd, err := unix.Open(filepath.Join(p.data, "big"), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := s.cmd.Process.Signal(unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			for { // it has not stopped yet when kill(2) returns
				err := unix.Waitid(unix.P_PID, s.cmd.Process.Pid, nil, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil)
				if err == nil {
					break
				}
				if err != unix.EINTR {
					t.Fatalf("the sidecar does not stop: %v", err)
				}
			}
			send(p, fd)
			p.fails() // it has ended its own mount by that
			s.kill()
			p.unpublish()
		})
	}
}

// lease gives a file to the node service as a worker of this node would.
func (p *borrowing) lease(n *node, fd int) {
	t, k := p.t, p.m.tier
	t.Helper()
	const uid = "worker-uid"
	if _, err := n.NodePublishVolume(testContext(t), n.inline(uid, v1alpha1.VolumeSocket, "0", nil)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(p.m.base, "run", uid, v1alpha1.SocketName)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			c, err := l.AcceptUnix()
			if err != nil {
				return err
			}
			defer c.Close()
			if _, _, err := wire.ServerHandshake(c, testDataset, k.keys); err != nil {
				return err
			}
			b := make([]byte, wire.MaxPacket)
			size, err := c.Read(b)
			if err != nil {
				return err
			}
			r, err := wire.DecodeRequest(b[:size])
			if err != nil {
				return err
			}
			err = packets.Send(c, wire.AppendFrame(nil, wire.Reply{ID: r.ID, Index: r.Index, Off: 1}, nil), []int{fd})
			_, _ = c.Read(b) // until it is refused
			return err
		}()
	}()
	k.publish(2, path)
	dir := n.publish("step")
	asked := false
	eventually(t, "the node service asks for the file", func() bool {
		sameFile(t, filepath.Join(dir, "big"), someFiles()["big"])
		select {
		case err = <-done:
			asked = true
		default:
		}
		return asked || t.Failed()
	})
	if err != nil {
		t.Error(err)
	}
	l.Close()
	k.publish(3, "")
	n.unpublish("step")
	n.unpublish(uid)
}

// What somebody puts into the folder of the socket is in nobody's way, and not followed.
func TestSocketOfALenderFollowsNoLinks(t *testing.T) {
	n, p := lending(t)
	m := p.m
	precious := filepath.Join(m.base, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{v1alpha1.LenderSocketName, ".new"} {
		path := filepath.Join(p.socket, name)
		if err := errors.Join(os.RemoveAll(path), os.Symlink(precious, path)); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	n = m.run(nil)
	p.k = n.kubelet
	if err := p.ready(); err == nil || !strings.Contains(err.Error(), "not served yet") {
		t.Errorf("the new node service's socket: %v", err)
	}
	if b, err := os.ReadFile(precious); err != nil || string(b) != "x" {
		t.Errorf("%q %v", b, err)
	}
	if st, err := os.Stat(precious); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	p.unpublish()
}

// A pod's folder may lose its mount between being seen and being listened in. Nothing is made in what is below then,
// which could not be removed any more.
func TestNothingIsMadeBelowAMountThatIsGone(t *testing.T) {
	dir := t.TempDir()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	here := device{unix.Major(st.Dev), unix.Minor(st.Dev)}
	if l, err := listenIn(dir, device{here.major, here.minor + 1}); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			l.Close()
		}
		t.Errorf("listening below a mount that is gone: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left in the folder: %v, %v", left, err)
	}
	l, err := listenIn(dir, here)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
