package csi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/csi/keeper"
	"github.com/stepcache/stepcache/sidecar"
)

// Everything here mounts. So the tests run in a mount namespace of their own, as a child of what `go test` started:
// whatever happens to them, no mount of theirs is left on the machine. Node services and keepers that are to be
// killed are children of that child.

const (
	// envInside is the folder of a process that is in the namespace.
	envInside = "STEPCACHE_CSI_TEST_INSIDE"
	envChild  = "STEPCACHE_CSI_TEST_CHILD"
)

func TestMain(m *testing.M) {
	if what := os.Getenv(envChild); what != "" {
		os.Exit(child(what))
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // tests that mount skip
	}
	if os.Getenv(envInside) == "" {
		os.Exit(inside())
	}
	base := os.Getenv(envInside)
	if os.Getenv(envSuite) == "" {
		// As that which is mounted for workers: of no other is a file taken.
		if err := unix.Mount(storeSource, filepath.Join(base, "shm"), "tmpfs", 0, ""); err != nil {
			fmt.Fprintln(os.Stderr, "a tmpfs for tests:", err)
			os.Exit(1)
		}
	}
	os.Setenv("TMPDIR", base)
	code := m.Run()
	if os.Getenv(envSuite) == "" {
		abortBelow(base)
	}
	os.Exit(code)
}

// inside runs this binary again in a mount namespace that goes with it, and removes its folder whatever became of
// it.
func inside() int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "tests in a mount namespace of their own:", err)
		return 1
	}
	// Unix sockets are below it, whose paths are short.
	parent := os.TempDir()
	if len(parent) > 20 {
		parent = "/tmp"
	}
	base, err := os.MkdirTemp(parent, "csi-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(base)
	exe, err := os.Executable()
	if err := errors.Join(err, os.Mkdir(filepath.Join(base, "shm"), 0o700)); err != nil {
		return fail(err)
	}
	c := exec.Command(exe, os.Args[1:]...)
	c.Env = append(os.Environ(), envInside+"="+base)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if err := c.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() > 0 {
			return exit.ExitCode()
		}
		return fail(err)
	}
	return 0
}

// abortBelow takes away what is mounted below a folder. A connection that is held, but not served, is aborted
// first, so that whoever waits for it ends.
func abortBelow(base string) {
	all, _ := mountinfo.Below(base)
	for _, m := range all {
		if m.Type == mount.FSType {
			abort(m.Minor)
		}
		_ = unix.Unmount(m.Point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
}

var fusectl = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "ctl-")
	if err != nil {
		return "", err
	}
	return dir, unix.Mount("none", dir, "fusectl", 0, "")
})

func abort(minor uint32) {
	if ctl, err := fusectl(); err == nil {
		_ = os.WriteFile(filepath.Join(ctl, fmt.Sprint(minor), "abort"), []byte("1"), 0o200)
	}
}

// order is what a child is told.
type order struct {
	// Keeper is the keeper's socket.
	Keeper string
	// Of a node service's Config.
	NodeName, KubeletDir, SocketDir, CacheDir string
	Seeds                                     []string
	// Events is the file for what it tells the node's object.
	Events string
	// Of a sidecar.
	Socket, Tier string
	Datasets     []string
}

// child is a node service or a keeper, until SIGTERM.
func child(what string) int {
	var o order
	if err := json.Unmarshal([]byte(os.Getenv(envChild+"_ORDER")), &o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("process", what)
	var err error
	switch what {
	case "node":
		err = Run(ctx, Config{
			NodeName: o.NodeName, KubeletDir: o.KubeletDir, SocketDir: o.SocketDir, CacheDir: o.CacheDir,
			Seeds: func(string, string) []string { return o.Seeds }, Logger: log, Node: fileNode{o.Events},
			KeeperWait: 2 * time.Second, Linger: time.Hour,
		})
	case "sidecar":
		err = sidecar.ServeLent(ctx, sidecar.LentOptions{
			Socket: o.Socket, Tier: o.Tier, Datasets: o.Datasets, Node: o.NodeName, BufferBytes: 32 << 20, Logger: log,
		})
	case "keeper":
		err = keeper.Run(ctx, o.Keeper, log)
	default:
		err = fmt.Errorf("no such child: %s", what)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// fileNode writes what it is told into a file.
type fileNode struct{ path string }

func (n fileNode) add(text string) error {
	f, err := os.OpenFile(n.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, text)
	return errors.Join(err, f.Close())
}

func (n fileNode) Ready(_ context.Context, ready bool) error {
	return n.add(fmt.Sprintf("ready %v", ready))
}

func (n fileNode) Event(_ context.Context, reason, text string) error {
	return n.add("event " + reason + ": " + text)
}

// process is a child that is running.
type process struct {
	cmd *exec.Cmd
	out *output
}

// output collects what a child says.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func start(t *testing.T, what string, o order, change ...func(*exec.Cmd)) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: exec.Command(exe), out: &output{}}
	p.cmd.Env = append(os.Environ(), envChild+"="+what, envChild+"_ORDER="+string(b))
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	for _, c := range change {
		c(p.cmd)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("%s %d said:\n%s", what, p.cmd.Process.Pid, p.out)
		}
	})
	return p
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func (p *process) terminate(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, p.out)
	}
}

// eventually waits for something that normally takes milliseconds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// gate is a TCP proxy in front of a worker that can hold back what the worker says.
type gate struct {
	listener net.Listener
	to       string

	asked counter // bytes that the worker was sent

	mu   sync.Mutex
	open chan struct{} // closed while open
}

// counter counts what is written to it.
type counter struct{ atomic.Int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.Add(int64(len(p)))
	return len(p), nil
}

func newGate(t *testing.T, to string) *gate {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{listener: l, to: to, open: make(chan struct{})}
	close(g.open)
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { g.serve(ctx, c) })
		}
	})
	t.Cleanup(func() { cancel(); l.Close(); wg.Wait() })
	return g
}

func (g *gate) addr() string { return g.listener.Addr().String() }

func (g *gate) serve(ctx context.Context, c net.Conn) {
	defer c.Close()
	w, err := new(net.Dialer).DialContext(ctx, "tcp", g.to)
	if err != nil {
		return
	}
	defer w.Close()
	defer context.AfterFunc(ctx, func() { c.Close(); w.Close() })()
	go func() { _, _ = io.Copy(io.MultiWriter(w, &g.asked), c); w.Close() }()
	b := make([]byte, 64<<10)
	for {
		n, err := w.Read(b)
		if err != nil {
			return
		}
		g.mu.Lock()
		open := g.open
		g.mu.Unlock()
		select {
		case <-open:
		case <-ctx.Done():
			return
		}
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
	}
}

// hold lets nothing through until release.
func (g *gate) hold() {
	g.mu.Lock()
	g.open = make(chan struct{})
	g.mu.Unlock()
	g.asked.Store(0)
}

// awaits waits until a read of the mount with that device waits for the worker, which is held back: then its server has the
// request whole, and the kernel does not fail it as the server is killed.
func (g *gate) awaits(t *testing.T, d device) {
	t.Helper()
	eventually(t, "a read waits", func() bool { return g.asked.Load() > 0 && waiting(t, d) > 0 })
}

func (g *gate) release() {
	g.mu.Lock()
	close(g.open)
	g.mu.Unlock()
}
