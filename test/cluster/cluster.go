package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Cluster is the one cluster of a state folder.
type Cluster struct {
	state  string // absolute
	source string // this folder in the checkout
	// name begins the names of network namespaces and control groups. It follows from the state folder, so
	// that clusters of two folders can stand side by side.
	name  string
	began time.Time
}

func open() (*Cluster, error) {
	state, err := stateFolder()
	if err != nil {
		return nil, err
	}
	_, here, _, _ := runtime.Caller(0)
	return &Cluster{state: state, source: filepath.Dir(here), name: clusterName(state), began: time.Now()}, nil
}

func clusterName(state string) string {
	sum := sha256.Sum256([]byte(state))
	return fmt.Sprintf("stepcache-%x", sum[:3])
}

func (c *Cluster) bin(name string) string { return filepath.Join(c.state, "bin", name) }
func (c *Cluster) log(name string) string { return filepath.Join(c.state, "log", name+".log") }
func (c *Cluster) run(name string) string { return filepath.Join(c.state, "run", name) }
func (c *Cluster) say(format string, a ...any) {
	fmt.Printf("%5.1fs  %s\n", time.Since(c.began).Seconds(), fmt.Sprintf(format, a...))
}

// locked runs f while no other command changes the cluster.
func (c *Cluster) locked(f func() error) error {
	if os.Geteuid() != 0 {
		return errors.New("it needs root: network namespaces, mounts and control groups are made; run it with sudo")
	}
	for _, hidden := range []string{"/run/", "/proc/", "/sys/", "/var/lib/", "/var/log/"} {
		if strings.HasPrefix(c.state+"/", hidden) {
			return fmt.Errorf("the state folder %s lies under %s, where each node has its own files; set STEPCACHE_CLUSTER_STATE to another", c.state, hidden)
		}
	}
	if err := os.MkdirAll(c.state, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(c.state, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		fmt.Fprintln(os.Stderr, "cluster: waiting for another command on this cluster")
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
			return fmt.Errorf("lock %s: %w", lock.Name(), err)
		}
	}
	return f()
}

// Up builds what is missing and starts what does not run. A cluster of other programs than the checkout now
// asks for is replaced.
func (c *Cluster) Up(ctx context.Context) error {
	if err := c.installPackages(ctx); err != nil {
		return err
	}
	if err := c.Build(ctx); err != nil {
		return err
	}
	key, err := c.key()
	if err != nil {
		return err
	}
	have, _ := os.ReadFile(c.run("key"))
	if string(have) != key || !c.controlPlaneRuns() {
		if err := c.Down(ctx); err != nil {
			return err
		}
		if err := c.prepare(); err != nil {
			return err
		}
		if err := c.startControlPlane(ctx); err != nil {
			return err
		}
	}
	if err := c.startNodesAndAddons(ctx); err != nil {
		return err
	}
	c.say("ready: %s", c.kubeconfig("admin"))
	return os.WriteFile(c.run("key"), []byte(key), 0o644)
}

func (c *Cluster) controlPlaneRuns() bool {
	return !slices.ContainsFunc(controlPlane, func(name string) bool { return !c.running(name) })
}

// perCluster are the folders of the state that end with a cluster. Logs stay until the next one.
var perCluster = []string{"run", "pki", "nodes", loadedFolder}

// prepare makes the folders of a new cluster, after Down.
func (c *Cluster) prepare() error {
	if err := os.RemoveAll(filepath.Join(c.state, "log")); err != nil {
		return err
	}
	for _, dir := range append(perCluster, "log") {
		if err := os.MkdirAll(filepath.Join(c.state, dir), 0o755); err != nil {
			return err
		}
	}
	return c.makeKeys()
}

func (c *Cluster) startNodesAndAddons(ctx context.Context) error {
	started := make(chan error, len(nodes))
	for _, n := range nodes {
		go func() { started <- c.StartNode(ctx, n.name) }()
	}
	// The objects can be written while the nodes start; their pods wait for a node.
	err := c.applyAddons(ctx)
	for range nodes {
		err = errors.Join(err, <-started)
	}
	if err != nil {
		return err
	}
	return c.addonsReady(ctx)
}

// Down ends everything, also what a crashed command left. Builds, images and logs stay.
func (c *Cluster) Down(context.Context) error {
	var errs []error
	for _, n := range nodes {
		errs = append(errs, c.endNode(n.name))
	}
	errs = append(errs, c.endNetwork(), removeGroups(c.name), c.leftovers())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, dir := range perCluster {
		if err := os.RemoveAll(filepath.Join(c.state, dir)); err != nil {
			return fmt.Errorf("remove the cluster's files: %w", err)
		}
	}
	return nil
}

// leftovers names mounts that remain below the state folder. There are none: nodes mount in namespaces of
// their own.
func (c *Cluster) leftovers() error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], c.state+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", f[4], err)
			}
		}
	}
	return nil
}

// Status prints each part and fails when one is missing.
func (c *Cluster) Status(ctx context.Context) error {
	var missing []string
	report := func(name string, ok bool) {
		state := "running"
		if !ok {
			state = "not running"
			missing = append(missing, name)
		}
		fmt.Printf("%-20s %s\n", name, state)
	}
	for _, name := range controlPlane {
		report(name, c.running(name))
	}
	for _, n := range nodes {
		report(n.name, c.running(n.name))
	}
	if c.running("apiserver") {
		if out, err := c.kubectl(ctx, "get", "nodes,pods", "-A", "-o", "wide"); err == nil {
			fmt.Printf("\n%s", out)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("not running: %s; `cluster up` starts it", strings.Join(missing, ", "))
	}
	return nil
}

// kubectlCache is what kubectl remembers of this cluster's API; the next one's is another.
func (c *Cluster) kubectlCache() string { return c.run("kubectl-cache") }

// kubectl runs kubectl in the cluster's network and returns what it printed.
func (c *Cluster) kubectl(ctx context.Context, args ...string) (string, error) {
	return c.kubectlWith(ctx, "", args...)
}

// kubectlWith is kubectl with an input, such as manifests for `apply -f -`.
func (c *Cluster) kubectlWith(ctx context.Context, input string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.bin("kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.kubeconfig("admin"), "KUBECACHEDIR="+c.kubectlCache())
	cmd.Stdin = strings.NewReader(input)
	var out, problems strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &problems
	err := c.inNetwork(c.name, func() error { return cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(problems.String()))
	}
	return out.String(), nil
}

// until calls f until it returns no error, for at most the given time; the error then is f's last.
func until(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %v: %w", limit, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
