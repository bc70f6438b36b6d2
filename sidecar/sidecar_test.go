package sidecar

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/csi/keeper"
	"github.com/stepcache/stepcache/tier"
)

// role makes the test binary a keeper or a server: they are processes, so that they can be killed.
const role = "STEPCACHE_TEST_SIDECAR"

func TestMain(m *testing.M) {
	if os.Getenv(role) == "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var err error
	if dir := os.Args[1]; os.Getenv(role) == "keep" {
		err = Keep(ctx, dir, log)
	} else {
		err = Serve(ctx, Options{Dir: dir, Tier: os.Args[2], Datasets: os.Args[3:], BufferBytes: 32 << 20, Logger: log})
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// patience bounds what normally takes milliseconds.
const patience = 90 * time.Second

func needMount(t *testing.T) {
	t.Helper()
	if err := mount.Supported(); err != nil {
		t.Skipf("no FUSE mount here: %v", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount for others and to detach")
	}
	if apart() {
		t.Skip("needs the node's user namespace")
	}
}

// pod is a pod's folders, and a tier of one Dataset, argo/genomes.
type pod struct {
	t         *testing.T
	base, dir string
	tier      string
	files     map[string][]byte
}

func newPod(t *testing.T) *pod {
	t.Helper()
	base, err := os.MkdirTemp("/tmp", "sc") // short, whatever TMPDIR is: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	p := &pod{t: t, base: base, dir: filepath.Join(base, "pods", "one"), tier: filepath.Join(base, "tier"), files: map[string][]byte{}}
	t.Cleanup(func() {
		if below, err := mountinfo.Below(base); err == nil {
			for _, m := range below {
				_, _ = mountinfo.Detach(m.Point, nil)
			}
		}
		_ = os.RemoveAll(base)
	})
	for _, dir := range []string{filepath.Join(p.dir, "genomes"), filepath.Join(base, "bucket"), filepath.Join(base, "store")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	rng := rand.NewChaCha8([32]byte{1})
	for name, size := range map[string]int{"small": 100, "large": 9<<20 + 1} {
		b := make([]byte, size)
		_, _ = rng.Read(b)
		p.files[name] = b
		p.write(filepath.Join(base, "bucket", name), b)
	}
	return p
}

func (p *pod) write(path string, b []byte) {
	p.t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// workers starts the tier.
func (p *pod) workers() (stop func()) { return p.workersOf("genomes") }

func (p *pod) workersOf(name string) (stop func()) {
	p.t.Helper()
	keys := wire.GenerateKeys()
	folder := tier.Folder{Dir: filepath.Join(p.tier, name), Dataset: "argo/" + name, Copies: 1}
	if err := errors.Join(os.MkdirAll(folder.KeysDir(), 0o755), folder.Write(), wire.WriteKeys(folder.KeysDir(), keys)); err != nil {
		p.t.Fatal(err)
	}
	w, err := worker.New(context.Background(), worker.Config{
		Dataset: folder.Dataset, ID: "w0", Memory: 64 << 20, Dir: filepath.Join(p.base, "store", name), KeysDir: folder.KeysDir(),
		Listen: "127.0.0.1:0", Control: "127.0.0.1:0",
		Mounts: []worker.Mount{{Path: "/", Config: source.Config{URL: "file://" + filepath.Join(p.base, "bucket")}}},
	}, worker.Deps{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		<-done
		w.Close()
	})
	p.t.Cleanup(stop)
	p.membersOf(name, ring.Member{ID: "w0", Addr: w.Addr().String(), Control: w.ControlAddr().String(), State: ring.Ready})
	return stop
}

func (p *pod) members(m ...ring.Member) { p.membersOf("genomes", m...) }

func (p *pod) membersOf(name string, m ...ring.Member) {
	p.t.Helper()
	b, err := json.Marshal(ring.Membership{Epoch: 1, Members: m})
	if err != nil {
		p.t.Fatal(err)
	}
	p.write(filepath.Join(p.tier, name, "membership.json"), b)
}

// process is a keeper or a server.
type process struct {
	*exec.Cmd
	t    *testing.T
	out  *bytes.Buffer
	done chan struct{}
}

func start(t *testing.T, as string, args ...string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.Command(self, args...), t: t, out: &bytes.Buffer{}, done: make(chan struct{})}
	p.Env = append(os.Environ(), role+"="+as)
	p.Stdout, p.Stderr = p.out, p.out
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = p.Wait(); close(p.done) }()
	t.Cleanup(p.kill)
	return p
}

func (p *pod) keep() *process  { return start(p.t, "keep", p.dir) }
func (p *pod) serve() *process { return p.serveAll("argo/genomes") }

func (p *pod) serveAll(datasets ...string) *process {
	return start(p.t, "serve", append([]string{p.dir, p.tier}, datasets...)...)
}

func (p *process) kill() {
	_ = p.Process.Kill()
	<-p.done
}

// term ends the process as the kubelet does, and wants it to end well.
func (p *process) term() {
	p.t.Helper()
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("still there after SIGTERM:\n%s", p.out)
	}
	if code := p.ProcessState.ExitCode(); code != 0 {
		p.t.Fatalf("exit status %d:\n%s", code, p.out)
	}
}

// await waits until something is so.
func await(t *testing.T, what string, ok func() bool, of ...*process) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		for _, p := range of {
			select {
			case <-p.done:
				t.Fatalf("%s: a process ended:\n%s", what, p.out)
			default:
			}
		}
		if time.Now().After(end) {
			for _, p := range of {
				t.Logf("%s", p.out)
			}
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// unready takes away what a server that was killed has said.
func (p *pod) unready() {
	p.t.Helper()
	if err := os.Remove(filepath.Join(p.dir, readyFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		p.t.Fatal(err)
	}
}

func (p *pod) ready(of ...*process) {
	p.t.Helper()
	await(p.t, "ready", func() bool { return Ready(p.dir) == nil }, of...)
}

// parked is how many mounts the keeper has; negative: it does not say.
func (p *pod) parked() int {
	c, err := keeper.Dial(context.Background(), filepath.Join(p.dir, socketFile))
	if err != nil {
		return -1
	}
	defer c.Close()
	all, err := c.List()
	for _, e := range all {
		e.Close()
	}
	if err != nil {
		return -1
	}
	return len(all)
}

// large opens the large file of the mount, until the test ends.
func (p *pod) large() *os.File {
	p.t.Helper()
	f, err := os.Open(filepath.Join(p.dir, "genomes", "large"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { f.Close() })
	return f
}

func (p *pod) check() {
	p.t.Helper()
	for name, want := range p.files {
		got, err := os.ReadFile(filepath.Join(p.dir, "genomes", name))
		if err != nil || !bytes.Equal(got, want) {
			p.t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
		}
	}
}

func (p *pod) mounted() bool {
	p.t.Helper()
	below, err := mountinfo.Below(p.base)
	if err != nil {
		p.t.Fatal(err)
	}
	return len(below) > 0
}

// detach takes a Dataset's mount away behind the server's back.
func (p *pod) detach(name string) {
	p.t.Helper()
	if _, err := mountinfo.Detach(filepath.Join(p.dir, name), nil); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pod) nothingLeft() {
	p.t.Helper()
	if p.mounted() {
		p.t.Error("a mount is left")
	}
	if _, err := os.Lstat(p.dir); !errors.Is(err, os.ErrNotExist) {
		entries, _ := os.ReadDir(p.dir)
		p.t.Errorf("the folder is left: %v %v", err, entries)
	}
}

func TestServesAndLeavesNothing(t *testing.T) {
	needMount(t)
	p := newPod(t)
	p.workers()
	if Ready(p.dir) == nil {
		t.Error("ready before anything began")
	}
	k, s := p.keep(), p.serve()
	p.ready(k, s)
	p.check()
	// A reader that is still there does not keep the pod from ending.
	p.large()
	s.term()
	if p.mounted() {
		t.Error("the server left its mount")
	}
	if n := p.parked(); n != 0 {
		t.Errorf("%d mounts are kept after the server's end: whoever has one open waits for ever", n)
	}
	if Ready(p.dir) == nil {
		t.Error("ready though the server ended")
	}
	k.term()
	p.nothingLeft()
}

// The files stay open and a read under way goes on, whoever serves.
func TestKilledServerIsSucceeded(t *testing.T) {
	needMount(t)
	p := newPod(t)
	p.workers()
	k, s := p.keep(), p.serve()
	p.ready(k, s)
	f := p.large()
	head := make([]byte, 10)
	if _, err := io.ReadFull(f, head); err != nil {
		t.Fatal(err)
	}
	parked := func() bool { return p.parked() == 1 }
	await(t, "parked", parked, k, s)
	s.kill()
	// What nobody has read yet waits for the successor.
	type answer struct {
		b   []byte
		err error
	}
	answers := make(chan answer, 2)
	go func() {
		b, err := io.ReadAll(f)
		answers <- answer{append(head, b...), err}
	}()
	go func() {
		b, err := os.ReadFile(filepath.Join(p.dir, "genomes", "small"))
		answers <- answer{b, err}
	}()
	s = p.serve()
	for range 2 {
		select {
		case a := <-answers:
			if a.err != nil || !bytes.Equal(a.b, p.files["large"]) && !bytes.Equal(a.b, p.files["small"]) {
				t.Errorf("%d bytes, %v\n%s", len(a.b), a.err, s.out)
			}
		case <-time.After(patience):
			t.Fatalf("a read hangs:\n%s", s.out)
		}
	}
	p.ready(k, s)
	p.check()

	// So it is when the keeper was killed in between: the server parks again at the next.
	k.kill()
	k = p.keep()
	await(t, "parked again", parked, k, s)
	s.kill()
	s = p.serve()
	p.ready(k, s)
	p.check()
	s.term()
	k.term()
	p.nothingLeft()
}

// A successor whose workers have another snapshot, and the old one no more, serves that: who had the old one open gets
// an error, and nobody waits for ever.
func TestSuccessorOfAMountWhoseSnapshotIsGoneMakesItAnew(t *testing.T) {
	needMount(t)
	p := newPod(t)
	stop := p.workers()
	k, s := p.keep(), p.serve()
	p.ready(k, s)
	f := p.large()
	s.kill()
	p.unready()
	stop()
	if err := os.RemoveAll(filepath.Join(p.base, "store")); err != nil {
		t.Fatal(err)
	}
	p.files["added"] = []byte("later")
	p.write(filepath.Join(p.base, "bucket", "added"), p.files["added"])
	p.workers()
	s = p.serve()
	p.ready(k, s)
	p.check()
	if _, err := io.ReadAll(f); err == nil {
		t.Error("a file of the snapshot that is gone was read to its end")
	}
	s.term()
	k.term()
}

// A mount that has ended is no mount to go on with, nor is one that lies somewhere else: it is made anew, in one start.
func TestSuccessorMakesAnewWhatHasEnded(t *testing.T) {
	needMount(t)
	for how, end := range map[string]func(p *pod, s *process){
		"by its server": func(_ *pod, s *process) { s.term() },
		"killed, and unmounted": func(p *pod, s *process) {
			s.kill()
			p.detach("genomes")
		},
		"killed, and aborted": func(p *pod, s *process) {
			s.kill()
			// The file that is open keeps it mounted.
			if err := unix.Unmount(filepath.Join(p.dir, "genomes"), unix.MNT_FORCE); !errors.Is(err, unix.EBUSY) {
				p.t.Fatalf("abort: %v", err)
			}
		},
	} {
		t.Run(how, func(t *testing.T) {
			p := newPod(t)
			p.workers()
			k, s := p.keep(), p.serve()
			p.ready(k, s)
			f := p.large()
			end(p, s)
			p.unready()
			s = p.serve()
			p.ready(k, s)
			p.check()
			read := make(chan error, 1)
			go func() {
				_, err := io.ReadAll(f)
				read <- err
			}()
			select {
			case err := <-read:
				if err == nil {
					t.Error("a file of the mount that ended was read to its end")
				}
			case <-time.After(patience):
				t.Errorf("who has the mount that ended open waits for ever:\n%s", s.out)
			}
			f.Close()
			s.term()
			k.term()
			p.nothingLeft()
		})
	}
}

// A server that ends because of one Dataset leaves the others to its successor.
func TestSuccessorGoesOnWithTheOtherDatasets(t *testing.T) {
	needMount(t)
	p := newPod(t)
	p.workers()
	p.workersOf("other")
	both := []string{"argo/genomes", "argo/other"}
	k, s := p.keep(), p.serveAll(both...)
	p.ready(k, s)
	f := p.large()
	p.detach("other")
	select {
	case <-s.done:
	case <-time.After(patience):
		t.Fatalf("a server whose mount was taken away goes on:\n%s", s.out)
	}
	s = p.serveAll(both...)
	p.ready(k, s)
	if b, err := io.ReadAll(f); err != nil || !bytes.Equal(b, p.files["large"]) {
		t.Errorf("a file of the other Dataset: %d bytes, %v", len(b), err)
	}
	p.check()
	f.Close()
	s.term()
	k.term()
	p.nothingLeft()
}

// A server that is killed while its pod ends has no successor; the pod must go all the same.
func TestKilledServerLeavesNothing(t *testing.T) {
	needMount(t)
	p := newPod(t)
	p.workers()
	k, s := p.keep(), p.serve()
	p.ready(k, s)
	s.kill()
	if !p.mounted() {
		t.Fatal("the mount went away by itself: this tests nothing")
	}
	k.term()
	p.nothingLeft()
}

func TestDeadPodsAreSwept(t *testing.T) {
	needMount(t)
	dead := newPod(t)
	dead.workers()
	k, s := dead.keep(), dead.serve()
	dead.ready(k, s)
	// Another pod of the node, alive.
	alive := *dead
	alive.dir = filepath.Join(dead.base, "pods", "alive")
	if err := os.MkdirAll(filepath.Join(alive.dir, "genomes"), 0o755); err != nil {
		t.Fatal(err)
	}
	k2, s2 := alive.keep(), alive.serve()
	alive.ready(k2, s2)
	s.kill()
	k.kill()
	long := time.Now().Add(-time.Hour)
	old := func(dir string) {
		t.Helper()
		if err := os.Chtimes(dir, long, long); err != nil {
			t.Fatal(err)
		}
	}

	third := *dead
	third.dir = filepath.Join(dead.base, "pods", "third")
	up := func(k *process) {
		t.Helper()
		await(t, "third keeper", func() bool { _, err := os.Lstat(filepath.Join(third.dir, socketFile)); return err == nil }, k)
	}
	k3 := third.keep()
	up(k3)
	if _, err := os.Lstat(dead.dir); err != nil {
		t.Errorf("a folder that may be in the making is swept: %v", err)
	}
	k3.term()
	old(dead.dir)
	old(alive.dir)
	k3 = third.keep()
	up(k3)
	await(t, "swept", func() bool { _, err := os.Lstat(dead.dir); return errors.Is(err, os.ErrNotExist) }, k3)
	alive.check()
	k3.term()
	s2.term()
	k2.term()
	alive.nothingLeft()
}

// A node service looks after its node: while either of the two lives the folder stays, and then it goes.
func TestWhatBothLeftIsSweptOnTheNode(t *testing.T) {
	needMount(t)
	p := newPod(t)
	p.workers()
	k, s := p.keep(), p.serve()
	p.ready(k, s)
	k.kill()
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(p.dir, long, long); err != nil {
		t.Fatal(err)
	}
	base, log := filepath.Dir(p.dir), slog.New(slog.DiscardHandler)
	sweep(base, "", time.Now(), log)
	p.check()
	s.kill()
	if err := os.Chtimes(p.dir, long, long); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		SweepUntil(ctx, base, log)
	}()
	await(t, "swept", func() bool { _, err := os.Lstat(p.dir); return errors.Is(err, os.ErrNotExist) })
	cancel()
	<-done
	p.nothingLeft()
}

func TestEndsWhileItWaits(t *testing.T) {
	needMount(t)
	p := newPod(t)
	p.workers()
	p.members() // nobody is there
	// Both have set up their ends once the keeper listens and the server has taken an old one's word away.
	p.write(filepath.Join(p.dir, readyFile), nil)
	k, s := p.keep(), p.serve()
	await(t, "keeper", func() bool { _, err := os.Lstat(filepath.Join(p.dir, socketFile)); return err == nil }, k, s)
	await(t, "server", func() bool { return Ready(p.dir) != nil }, k, s)
	s.term()
	k.term()
	p.nothingLeft()
}

// It would be ready, and no other container have what it mounts.
func TestServeRefusesAUserNamespace(t *testing.T) {
	needMount(t)
	p := newPod(t)
	k := p.keep()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p.workers()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s := exec.CommandContext(ctx, self, p.dir, p.tier, "argo/genomes")
	s.Env = append(os.Environ(), role+"=serve")
	ids := []syscall.SysProcIDMap{{HostID: 0, Size: 65536}}
	s.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	s.Stdout, s.Stderr = &out, &out
	if err := s.Start(); err != nil {
		t.Skipf("needs user namespaces: %v", err)
	}
	if err := s.Wait(); err == nil || !strings.Contains(out.String(), "hostUsers") || !strings.Contains(out.String(), "stage") {
		t.Errorf("%v\n%s", err, &out)
	}
	k.term()
	p.nothingLeft()
}

func TestServeRefuses(t *testing.T) {
	needMount(t)
	p := newPod(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	k := p.keep()
	await(t, "keeper", func() bool { _, err := os.Lstat(filepath.Join(p.dir, socketFile)); return err == nil }, k)
	for _, c := range []struct {
		o    Options
		says string
	}{
		{Options{Dir: p.dir, Tier: p.tier}, "no Dataset"},
		{Options{Dir: p.dir, Tier: p.tier, Datasets: []string{"argo/genomes"}}, "not the folder of a tier"},
	} {
		c.o.Logger = log
		if err := Serve(ctx, c.o); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: %v", c.o.Datasets, err)
		}
	}
	p.workers()
	if err := os.Rename(filepath.Join(p.tier, "genomes"), filepath.Join(p.tier, "other")); err != nil {
		t.Fatal(err)
	}
	err := Serve(ctx, Options{Dir: p.dir, Tier: p.tier, Datasets: []string{"argo/other"}, Logger: log})
	if err == nil || !strings.Contains(err.Error(), "is the folder of Dataset argo/genomes") {
		t.Errorf("another Dataset's folder: %v", err)
	}
	if err := Keep(ctx, p.dir, log); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("a second keeper: %v", err)
	}
}
