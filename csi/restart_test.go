package csi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/wire"
)

// Here node services and keepers are processes that are killed, while the worker and the pods are this process.

// startNode starts a node service and registers it, as the kubelet does. It is the one that has the sockets then, and
// has labelled the node.
func (m *machine) startNode() (*process, *kubelet) {
	m.t.Helper()
	c := m.config().withDefaults()
	before, _ := os.Lstat(c.registrationSocket())
	labels := m.labels()
	p := start(m.t, "node", m.order())
	eventually(m.t, "the node service's sockets", func() bool {
		now, err := os.Lstat(c.registrationSocket())
		return err == nil && (before == nil || !os.SameFile(before, now)) || exited(p)
	})
	k := m.kubelet()
	k.register()
	eventually(m.t, "the label", func() bool { return m.labels() > labels })
	return p, k
}

// labels is how often the node was labelled.
func (m *machine) labels() int { return strings.Count(m.events(), "ready true\n") }

func exited(p *process) bool {
	var info unix.Siginfo // kill(2) takes one that nobody has waited for yet for alive
	err := unix.Waitid(unix.P_PID, p.cmd.Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err != nil || info.Signo != 0
}

func (m *machine) startKeeper() *process {
	m.t.Helper()
	path := m.config().withDefaults().Keeper
	before, _ := os.Lstat(path)
	p := start(m.t, "keeper", m.order())
	eventually(m.t, "the keeper's socket", func() bool {
		now, err := os.Lstat(path)
		return err == nil && (before == nil || !os.SameFile(before, now))
	})
	return p
}

// keeperSaid is what a keeper says of a mount.
var keeperSaid = regexp.MustCompile(`msg=(parked|dropped) .*name=(\S+)`)

// parked waits until a keeper has that many mounts. One may be parked again that is there.
func (p *process) parked(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d mounts at the keeper", n), func() bool {
		there := map[string]bool{}
		for _, m := range keeperSaid.FindAllStringSubmatch(p.out.String(), -1) {
			if there[m[2]] = true; m[1] == "dropped" {
				delete(there, m[2])
			}
		}
		return len(there) >= n
	})
}

// waiting is how many requests a file system has not answered.
func waiting(t *testing.T, d device) int {
	t.Helper()
	ctl, err := fusectl()
	if err != nil {
		t.Skipf("needs fusectl: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(ctl, fmt.Sprint(d.minor), "waiting"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// pieces are files that nobody has read yet, one for each time that a read must go to the worker.
func pieces() map[string][]byte {
	files := someFiles()
	for i := range 6 {
		name := fmt.Sprintf("piece-%d", i)
		files[name] = content(name, 600_000+i)
	}
	return files
}

func TestPodsDoNotNoticeThatTheNodeServiceIsKilled(t *testing.T) {
	needMounts(t)
	files := pieces()
	k := newTier(t, files)
	m := newMachine(t, k)
	keeper := m.startKeeper()
	first, kube := m.startNode()

	// A worker of this node, so that a file is open by passthrough.
	socket := kube.inline("worker-uid", v1alpha1.VolumeSocket, "0", nil)
	if _, err := kube.NodePublishVolume(testContext(t), socket); err != nil {
		t.Fatal(err)
	}
	k.stop()
	path := filepath.Join(m.base, "run", "worker-uid", v1alpha1.SocketName)
	k.start(path)
	k.publish(1, path)

	dir := kube.publish("step")
	d := deviceAt(t, dir)
	keeper.parked(t, 1)
	sameFile(t, filepath.Join(dir, "big"), files["big"])
	open := func(name string) *os.File {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	whole := func(f *os.File, name string) error {
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		h := sha256.New()
		n, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<40))
		if err != nil {
			return err
		}
		if want := sha256.Sum256(files[name]); !bytes.Equal(h.Sum(nil), want[:]) {
			return fmt.Errorf("%s: %d bytes that are not the object's %d", name, n, len(files[name]))
		}
		return nil
	}
	big := open("big")
	defer big.Close()
	if err := whole(big, "big"); err != nil {
		t.Fatal(err)
	}

	// inFlight starts a read of a piece, which the worker does not answer until released.
	inFlight := func(i int) (result chan error) {
		t.Helper()
		name := fmt.Sprintf("piece-%d", i)
		f := open(name)
		k.gate.hold()
		result = make(chan error, 1)
		go func() {
			err := whole(f, name)
			result <- errors.Join(err, f.Close())
		}()
		k.gate.awaits(t, d)
		return result
	}
	check := func(when string, result chan error) {
		t.Helper()
		if result != nil {
			k.gate.release()
			if err := <-result; err != nil {
				t.Errorf("%s: the read in flight: %v", when, err)
			}
		}
		if err := whole(big, "big"); err != nil {
			t.Errorf("%s: the handle from before: %v", when, err)
		}
		for name, want := range files {
			sameFile(t, filepath.Join(dir, name), want)
		}
		if got := deviceAt(t, dir); got != d {
			t.Errorf("%s: another file system", when)
		}
	}
	check("before", nil)

	result := inFlight(0)
	first.kill()
	second, kube := m.startNode()
	check("the node service was killed", result)
	if got := deviceAt(t, kube.publish("other")); got != d {
		t.Error("a new pod gets another mount than the one that was resumed")
	}

	// The keeper is replaced: the node service parks again at the next one.
	keeper.kill()
	check("the keeper was killed", nil)
	keeper = m.startKeeper()
	keeper.parked(t, 1)
	result = inFlight(1)
	second.kill()
	third, _ := m.startNode()
	check("the keeper, then the node service was killed", result)

	// An orderly update without a surge: the old one first.
	result = inFlight(2)
	third.terminate(t)
	fourth, kube := m.startNode()
	check("the node service was stopped", result)
	for _, pod := range []string{"step", "other", "worker-uid"} {
		if pod == "step" {
			big.Close()
		}
		kube.unpublish(pod)
	}
	fourth.terminate(t)
	eventually(t, "all mounts to go", func() bool { return fuseMounts(t, m.base) == 0 })
	if got := m.events(); strings.Contains(got, "event") {
		t.Errorf("events: %s", got)
	}
}

func TestALaterNodeServiceTakesOverFromAnEarlierOne(t *testing.T) {
	needMounts(t)
	files := pieces()
	k := newTier(t, files)
	k.publish(1, "")
	m := newMachine(t, k)
	keeper := m.startKeeper()
	first, kube := m.startNode()
	dir := kube.publish("step")
	keeper.parked(t, 1)
	// A reader that never stops, and must not see anything of it.
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	rounds := make(chan struct{})
	wg.Go(func() {
		for {
			for name, want := range files {
				got, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v", name, len(got), err)
					cancel()
				}
			}
			select {
			case rounds <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	})
	progress := func() {
		for range 2 {
			select {
			case <-rounds:
			case <-ctx.Done():
			}
		}
	}
	progress()
	second, kube := m.startNode() // both serve
	progress()
	first.terminate(t)
	progress()
	other := kube.publish("other")
	if deviceAt(t, other) != deviceAt(t, dir) {
		t.Error("a new pod gets another mount")
	}
	progress()
	cancel()
	wg.Wait()
	if got, want := m.events(), "ready true\nready true\n"; got != want {
		t.Errorf("the node was told %q: the one that went must not take the label from its successor", got)
	}
	kube.unpublish("step")
	kube.unpublish("other")
	second.terminate(t)
	if n := fuseMounts(t, m.base); n != 0 {
		t.Errorf("%d mounts are left", n)
	}
	if got := m.events(); !strings.HasSuffix(got, "ready false\n") {
		t.Errorf("the node was told %q", got)
	}
}

// An update may be undone while both node services are there: the later one goes, and the earlier one stays.
func TestAnEarlierNodeServiceTakesItsPlaceBackWhenTheLaterOneGoes(t *testing.T) {
	for _, c := range []struct {
		how   string
		end   func(*testing.T, *process)
		label string
	}{
		{"terminated", func(t *testing.T, p *process) { p.terminate(t) }, "ready false\n"},
		{"killed", func(_ *testing.T, p *process) { p.kill() }, ""},
	} {
		t.Run(c.how, func(t *testing.T) { takenBack(t, c.end, c.label) })
	}
}

func takenBack(t *testing.T, end func(*testing.T, *process), label string) {
	needMounts(t)
	files := someFiles()
	k := newTier(t, files)
	k.publish(1, "")
	m := newMachine(t, k)
	keeper := m.startKeeper()
	first, kube := m.startNode()
	dir := kube.publish("step")
	early := m.borrow(kube, "early")
	s := early.serve()
	early.served(s)
	keeper.parked(t, 2)

	second, kube := m.startNode()
	early.k = kube
	other := kube.publish("other")
	late := m.borrow(kube, "late") // its socket is the later one's
	s2 := late.serve()
	late.served(s2)
	keeper.parked(t, 3)
	// The later one ends a mount of which the earlier one has the connection, and makes it anew.
	missed := func(p *borrowing) { // or the next one is taken for serving before it does
		eventually(t, "the killed server is missed", func() bool { return p.ready() != nil })
	}
	s.kill()
	missed(early)
	s = early.serve()
	early.served(s)
	s.terminate(t)
	s = early.serve()
	early.served(s)
	keeper.parked(t, 3)

	end(t, second)
	eventually(t, "the earlier one's sockets", func() bool { // they may be the same files by their numbers
		return strings.Contains(first.out.String(), "serving again") || exited(first)
	})
	kube = m.kubelet()
	kube.register()
	for _, target := range []string{dir, other, kube.publish("new")} {
		if deviceAt(t, target) != deviceAt(t, dir) {
			t.Errorf("%s is another mount", target)
		}
		for name, want := range files {
			sameFile(t, filepath.Join(target, name), want)
		}
	}
	eventually(t, "the label again", func() bool { return m.events() == "ready true\nready true\n"+label+"ready true\n" })
	// What pods serve by themselves goes on, and has the earlier one for a successor of its server.
	for p, server := range map[*borrowing]*process{early: s, late: s2} {
		p.k = kube
		f := p.open("big")
		p.served(server)
		server.kill()
		missed(p)
		p.served(p.serve())
		if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, files["big"]) {
			t.Errorf("a file that pod %s had open: %d bytes, %v", p.uid, len(got), err)
		}
		p.check()
	}
	for _, pod := range []string{"step", "other", "new"} {
		kube.unpublish(pod)
	}
	early.unpublish()
	late.unpublish()
	first.terminate(t)
	if n := fuseMounts(t, m.base); n != 0 {
		t.Errorf("%d mounts are left", n)
	}
	if got := m.events(); !strings.HasSuffix(got, "ready false\n") || strings.Contains(got, "event") {
		t.Errorf("the node was told %q", got)
	}
}

func TestANewPodGetsANewMountWhenNodeServiceAndKeeperAreBothKilled(t *testing.T) {
	t.Run("the keeper is back first", func(t *testing.T) { bothKilled(t, false) })
	t.Run("the keeper is back later than it is waited for", func(t *testing.T) { bothKilled(t, true) })
}

func bothKilled(t *testing.T, late bool) {
	needMounts(t)
	files := someFiles()
	k := newTier(t, files)
	k.publish(1, "")
	m := newMachine(t, k)
	keeper := m.startKeeper()
	first, kube := m.startNode()
	dir := kube.publish("step")
	keeper.parked(t, 1)
	sameFile(t, filepath.Join(dir, "dir/x"), files["dir/x"])
	dead := deviceAt(t, dir)

	first.kill()
	keeper.kill()
	if _, err := os.ReadFile(filepath.Join(dir, "big")); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.EIO) {
		t.Errorf("a read of the dead mount: %v", err)
	}
	if !late {
		m.startKeeper()
	}
	second, kube := m.startNode()
	if late {
		m.startKeeper()
	}
	fresh := kube.publish("fresh") // the kubelet does not stage again
	for name, want := range files {
		sameFile(t, filepath.Join(fresh, name), want)
	}
	if deviceAt(t, fresh) == dead {
		t.Error("the dead mount was given to a new pod")
	}
	eventually(t, "an Event", func() bool { return strings.Contains(m.events(), "event MountLost") })
	if got := m.events(); !strings.Contains(got, testDataset) || !strings.Contains(got, "1 pods") || !strings.Contains(got, "UIDs: step") {
		t.Errorf("the Event does not say what is lost: %s", got)
	}
	if !strings.Contains(second.out.String(), "pods/step/") {
		t.Errorf("the log does not say which pod must be restarted:\n%s", second.out)
	}
	eventually(t, "nothing of the dead one to be left but at the pod", func() bool { // where the kubelet takes it away, or publishes again
		all, err := mountinfo.Below(filepath.Join(kube.dir, "plugins"))
		if err != nil {
			t.Fatal(err)
		}
		return !slices.ContainsFunc(all, func(m mountinfo.Mount) bool { return deviceOf(m) == dead })
	})
	if _, err := kube.NodeGetVolumeStats(testContext(t), &csi.NodeGetVolumeStatsRequest{VolumeId: testDataset, VolumePath: dir}, grpc.WaitForReady(true)); err == nil {
		t.Error("a dead mount has statistics")
	}
	kube.publish("step")
	if deviceAt(t, dir) != deviceAt(t, fresh) {
		t.Error("publishing again leaves the pod its dead mount")
	}
	sameFile(t, filepath.Join(dir, "big"), files["big"])
	kube.unpublish("step")
	kube.unpublish("fresh")
	second.terminate(t)
	if n := fuseMounts(t, m.base); n != 0 {
		t.Errorf("%d mounts are left", n)
	}
}

// Who waits for what a killed node service had read can be killed while the next one cannot resume the mount.
func TestReadersOfAMountThatCannotBeResumedCanBeKilled(t *testing.T) {
	needMounts(t)
	if !passesThrough(t) {
		t.Skip("needs Linux 6.9 or later, which sends requests again")
	}
	k := newTier(t, pieces())
	k.publish(1, "")
	m := newMachine(t, k)
	keeper := m.startKeeper()
	first, kube := m.startNode()
	dir := kube.publish("step")
	d := deviceAt(t, dir)
	keeper.parked(t, 1)
	k.gate.hold()
	// Read ahead would be the kernel's, for which one waits otherwise.
	reader := exec.Command("dd", "if="+filepath.Join(dir, "piece-0"), "of=/dev/null", "iflag=direct")
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() { _ = reader.Wait(); close(over) }()
	t.Cleanup(func() {
		_ = reader.Process.Kill()
		abort(d.minor)
		<-over
	})
	k.gate.awaits(t, d)
	first.kill()
	// The workers do not answer the next one, which has no snapshot either.
	if err := os.RemoveAll(filepath.Join(m.config().withDefaults().Dir, "snapshots")); err != nil {
		t.Fatal(err)
	}
	m.startNode()
	if err := reader.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-over:
	case <-time.After(time.Minute):
		t.Error("who waits for the killed node service cannot be killed")
	}
	k.gate.release()
}

// unresumable parks a mount that a pod has and nobody serves, nor can: its settings say too little.
func (m *machine) unresumable(n *node, shows, target string) (dir string) {
	m.t.Helper()
	dir = filepath.Join(n.s.mountsDir, "argo.genomes.unresumable")
	if err := os.Mkdir(dir, 0o755); err != nil {
		m.t.Fatal(err)
	}
	conn, err := mount.Attach(dir, testDataset)
	if err != nil {
		m.t.Fatal(err)
	}
	defer conn.Close()
	if err := errors.Join(os.MkdirAll(target, 0o755), unix.Mount(dir, target, "", unix.MS_BIND, "")); err != nil {
		m.t.Fatal(err)
	}
	d := deviceAt(m.t, dir)
	entry := note{
		Namespace: "argo", Dataset: "genomes", Keys: string(wire.FormatKeys(m.tier.keys.Read)), Copies: 1,
		Settings: mount.Settings{Dir: dir, Major: d.major, Minor: d.minor},
	}
	if _, err := hex.Decode(entry.Settings.Snapshot[:], []byte(shows)); err != nil {
		m.t.Fatal(err)
	}
	f, err := entry.write()
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	if err := n.s.keeping.current().Park(filepath.Base(dir), conn, f, f); err != nil {
		m.t.Fatal(err)
	}
	return dir
}

// keeps is how many mounts the keeper has.
func (n *node) keeps(t *testing.T) int {
	t.Helper()
	all, err := n.s.keeping.current().List()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		e.Close()
	}
	return len(all)
}

func TestAParkedMountThatCannotBeResumedGoesWithItsLastPod(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	dir := m.unresumable(n, k.current(), n.target("step"))
	n.s.keeping.adopt(testContext(t))
	if n.keeps(t) != 1 || fuseMounts(t, m.base) != 2 {
		t.Error("it is gone, and a pod has it")
	}
	n.unpublish("step")
	eventually(t, "nothing of it to be left", func() bool {
		if n.keeps(t) > 0 || fuseMounts(t, m.base) > 0 {
			return false // nobody would answer a look at it
		}
		_, err := os.Lstat(dir)
		return errors.Is(err, os.ErrNotExist)
	})
}

// A call that is repeated for a running pod leaves it the mount that it has, unless that is dead.
func TestARepeatedCallReplacesNoMountThatIsParkedOrResumed(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	m.unresumable(n, k.current(), n.target("parked"))
	d := deviceAt(t, n.target("parked"))
	if _, err := n.NodePublishVolume(testContext(t), n.request("parked")); status.Code(err) != codes.Unavailable {
		t.Errorf("a parked mount: %v", err)
	}
	if deviceAt(t, n.target("parked")) != d {
		t.Error("a parked mount was replaced")
	}

	// Not resumed yet when the call begins, and resumed while it waits for its turn.
	dir := n.publish("resumed")
	open, err := os.Open(filepath.Join(dir, "big")) // or another mount could have this one's number
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	before, err := mountinfo.At(dir)
	if err != nil {
		t.Fatal(err)
	}
	n.s.mu.Lock()
	set := n.s.sets[testDataset]
	mounts := set.mounts
	set.mounts, set.copies = nil, 0
	n.s.mu.Unlock()
	n.s.keeping.begin(mounts[0].id) // or it is resumed indeed
	set.turn <- struct{}{}
	done := make(chan error, 1)
	go func() {
		_, err := n.NodePublishVolume(testContext(t), n.request("resumed"))
		done <- err
	}()
	eventually(t, "the call has been let in", func() bool {
		n.s.mu.Lock()
		defer n.s.mu.Unlock()
		return set.copies > 0
	})
	n.s.mu.Lock()
	set.mounts = mounts
	n.s.mu.Unlock()
	n.s.keeping.finish(mounts[0].id)
	<-set.turn
	if err := <-done; err != nil {
		t.Error(err)
	}
	if after, err := mountinfo.At(dir); err != nil || !slices.Equal(after, before) {
		t.Errorf("a mount that was resumed meanwhile was replaced: %v, %v, before %v", after, err, before)
	}
	open.Close()
	n.unpublish("parked")
	n.unpublish("resumed")
}

// A mount whose snapshot no worker has is waited for; that is in the way of nothing else.
func TestTheHouseIsKeptWhileAMountIsBeingResumed(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)
	m.unresumable(n, strings.Repeat("ab", 32), n.target("step"))
	eventually(t, "it is being resumed", func() bool {
		n.s.keeping.mu.Lock()
		defer n.s.keeping.mu.Unlock()
		return len(n.s.keeping.resuming) > 0
	})
	// What another node service published is found by looking.
	p := &borrowing{t: t, m: m, k: n.kubelet, uid: "pod-1"}
	p.data = p.target("data")
	if err := os.MkdirAll(p.data, 0o755); err != nil {
		t.Fatal(err)
	}
	conn, err := mount.Attach(p.data, lentSource+p.uid+":"+testDataset)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	eventually(t, "another thing is seen to", func() bool { return p.volume(n.s) != nil })
	n.unpublish("step")
}

// A pod is never left Terminating by a mount that is dead, or that nobody serves at the moment.
func TestUnpublishNeverWaitsForAMount(t *testing.T) {
	needMounts(t)
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	keeper := m.startKeeper()
	first, kube := m.startNode()
	kube.publish("dead")
	kube.publish("unserved")
	keeper.parked(t, 1)
	first.kill() // from here on its mount is held, and does not answer
	// A node service for another folder of the same kubelet, so that it adopts nothing.
	other := newService(func() Config {
		c := m.config()
		c.Dir, c.Keeper = filepath.Join(m.base, "other"), filepath.Join(m.base, "none.sock")
		return c.withDefaults()
	}())
	unpublish := func(pod string) {
		if _, err := other.NodeUnpublishVolume(testContext(t), &csi.NodeUnpublishVolumeRequest{VolumeId: testDataset, TargetPath: kube.target(pod)}); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(kube.target(pod)); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
	unpublish("unserved")
	keeper.kill()
	unpublish("dead")
}

func TestWithoutAKeeperEverythingIsServedAndParkedOnceThereIsOne(t *testing.T) {
	needMounts(t)
	files := someFiles()
	k := newTier(t, files)
	k.publish(1, "")
	m := newMachine(t, k)
	first, kube := m.startNode() // waits a little for the keeper, then goes on
	dir := kube.publish("step")
	sameFile(t, filepath.Join(dir, "big"), files["big"])
	keeper := m.startKeeper()
	keeper.parked(t, 1)
	first.kill()
	second, kube := m.startNode()
	for name, want := range files {
		sameFile(t, filepath.Join(dir, name), want)
	}
	kube.unpublish("step")
	second.terminate(t)
}

// Of node services that start in the same instant one has both sockets.
func TestNodeServicesMakeTheirSocketsOneAfterTheOther(t *testing.T) {
	dir, err := os.MkdirTemp("", "s") // short, for the sockets' paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	config := Config{NodeName: "n", KubeletDir: dir, Dir: filepath.Join(dir, "d"), SocketDir: filepath.Join(dir, "s"), Logger: slog.New(slog.DiscardHandler)}.withDefaults()
	if err := os.Mkdir(config.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		var g, starts errgroup.Group
		services := make([]*service, 4)
		var mu sync.Mutex
		var all []*grpc.Server
		for i := range services {
			services[i] = newService(config)
			starts.Go(func() error {
				servers, err := services[i].serveAll(&g)
				mu.Lock()
				defer mu.Unlock()
				all = append(all, servers...)
				return err
			})
		}
		if err := starts.Wait(); err != nil {
			t.Error(err)
		}
		whole := 0
		for _, s := range services {
			if !s.superseded() {
				whole++
			}
		}
		if whole != 1 {
			t.Errorf("%d of %d node services have both sockets", whole, len(services))
		}
		for _, s := range all {
			s.Stop()
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	}
}
