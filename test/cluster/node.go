package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/template"
	"time"

	"golang.org/x/sys/unix"
)

// A node is a process that is the first of its own process ids, mounts, host name and IPC, in its own
// network: it runs containerd, kubelet and kube-proxy (nodeinit.go). Killing it ends all that is on the node.

var (
	//go:embed manifests/containerd.toml
	containerdConfig []byte
	//go:embed manifests/kubelet.yaml
	kubeletConfig string
	//go:embed manifests/cni.json
	cniConfig string
)

// nodeFolder holds a node's files.
func (c *Cluster) nodeFolder(name string, elem ...string) string {
	return filepath.Join(append([]string{c.state, "nodes", name}, elem...)...)
}

// StartNode starts a node that does not run, mends one that is frozen or cut, and waits until it is ready.
func (c *Cluster) StartNode(ctx context.Context, name string) error {
	n, _ := nodeNamed(name)
	if !c.running("apiserver") {
		return errors.New("the cluster is not up; `cluster up` starts it")
	}
	if c.running(name) {
		if err := errors.Join(c.ResumeNode(ctx, name), c.JoinNode(ctx, name)); err != nil {
			return err
		}
	} else {
		if err := c.endNode(name); err != nil {
			return err
		}
		if err := c.makeNode(n); err != nil {
			return fmt.Errorf("node %s: %w", name, err)
		}
		program, err := os.Executable()
		if err != nil {
			return err
		}
		cmd := exec.Command(program, nodeInitArg, name)
		cmd.Env = append(os.Environ(), "STEPCACHE_CLUSTER_STATE="+c.state)
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		}
		if err := c.start(name, c.nodeNetwork(name), cmd); err != nil {
			return err
		}
		if err := c.join(name); err != nil {
			return err
		}
	}
	if err := c.nodeReady(ctx, name); err != nil {
		return fmt.Errorf("node %s is not ready: %w\n%s\n%s", name, err, c.tail(name), c.tail(name+"-kubelet"))
	}
	c.say("node %s ready", name)
	return nil
}

// nodeReady waits until the kubelet that runs now has said that it is ready: what the API server knows of a
// node that was killed a moment ago is old.
func (c *Cluster) nodeReady(ctx context.Context, name string) error {
	info, err := os.Stat(c.pidFile(name))
	if err != nil {
		return err
	}
	return until(ctx, 3*time.Minute, func(ctx context.Context) error {
		if !c.running(name) {
			return errors.New("its first process has ended")
		}
		out, err := c.kubectl(ctx, "get", "node", name, "-o",
			`jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.lastHeartbeatTime}{end}`)
		if err != nil {
			return err
		}
		status, text, _ := strings.Cut(out, " ")
		beat, err := time.Parse(time.RFC3339, text)
		if status != "True" || err != nil || beat.Before(info.ModTime().Truncate(time.Second)) {
			return fmt.Errorf("its condition Ready is %q", out)
		}
		return nil
	})
}

// makeNode makes a node's network, folders, control groups and configuration.
func (c *Cluster) makeNode(n node) error {
	if err := c.makeNodeNetwork(n); err != nil {
		return err
	}
	for _, dir := range []string{"kubelet", "containerd", "pod-logs", "cni"} {
		if err := os.MkdirAll(c.nodeFolder(n.name, dir), 0o755); err != nil {
			return err
		}
	}
	values := map[string]string{"Name": n.name, "PodCIDR": n.pods, "ControlGroup": "/" + c.name + "/" + n.name, "DNS": controlPlaneIP, "PKI": c.pki("")}
	kubelet, err := expand(kubeletConfig, values)
	if err != nil {
		return err
	}
	cni, err := expand(cniConfig, values)
	if err != nil {
		return err
	}
	conf, err := expand(string(containerdConfig), map[string]string{"CNI": c.nodeFolder(n.name, "cni"), "Pause": pauseImage})
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(c.nodeFolder(n.name, "kubelet.yaml"), kubelet, 0o644),
		os.WriteFile(c.nodeFolder(n.name, "cni", "10-pods.conflist"), cni, 0o644),
		os.WriteFile(c.nodeFolder(n.name, "containerd.toml"), conf, 0o644),
		os.WriteFile(c.nodeFolder(n.name, "proxy.yaml"), proxyConfig(n.name, n.ip, c.kubeconfig("proxy")), 0o644),
		c.makeControlGroups(n.name))
}

func expand(text string, values map[string]string) ([]byte, error) {
	t, err := template.New("").Option("missingkey=error").Parse(text)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = t.Execute(&b, values)
	return b.Bytes(), err
}

// KillNode ends a node at once. The API server finds out as it would of a real one: by its silence.
func (c *Cluster) KillNode(_ context.Context, name string) error {
	if !c.running(name) {
		return fmt.Errorf("node %s does not run", name)
	}
	return c.endNode(name)
}

// endNode kills a node, whatever is left of it, and removes its network and control groups. Its files stay
// for its next start.
func (c *Cluster) endNode(name string) error {
	// A frozen process does not even die.
	if err := c.freeze(name, false); err != nil {
		return err
	}
	if err := c.kill(name); err != nil {
		return err
	}
	if hasNetwork(c.name) {
		// With the network its end of the link would go too, but only some time later, and then take the name
		// from the node's next one.
		_ = ip(c.name, "link del "+name) // an error: there is none
	}
	return errors.Join(removeNetwork(c.nodeNetwork(name)), removeGroups(filepath.Join(c.name, name)))
}

// PauseNode freezes a node: connections to it stay open and are not answered.
func (c *Cluster) PauseNode(_ context.Context, name string) error {
	if !c.running(name) {
		return fmt.Errorf("node %s does not run", name)
	}
	return c.freeze(name, true)
}

// ResumeNode ends PauseNode.
func (c *Cluster) ResumeNode(_ context.Context, name string) error { return c.freeze(name, false) }

// CutNode takes a node off the network.
func (c *Cluster) CutNode(_ context.Context, name string) error {
	return ip(c.name, "link set "+name+" down")
}

// JoinNode ends CutNode. The routes to the node's pods were removed with the link.
func (c *Cluster) JoinNode(_ context.Context, name string) error {
	n, _ := nodeNamed(name)
	return ip(c.name, "link set "+name+" up", "route replace "+n.pods+" via "+n.ip)
}

// ExecInNode becomes a command inside a node.
func (c *Cluster) ExecInNode(name string, args []string) error {
	if _, ok := nodeNamed(name); !ok {
		return fmt.Errorf("there is no node %q: name one of %s", name, strings.Join(nodeNames(), ", "))
	}
	pid := c.pid(name)
	if pid == 0 {
		return fmt.Errorf("node %s does not run", name)
	}
	enter := []string{"nsenter", "--target", fmt.Sprint(pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--"}
	return become(append(enter, args...), func() error {
		return errors.Join(c.leadPath(), os.Setenv("CONTAINERD_NAMESPACE", "k8s.io"))
	})
}

// inNode runs a command inside a node and returns what it printed.
func (c *Cluster) inNode(ctx context.Context, name string, args ...string) (string, error) {
	enter := []string{"--target", fmt.Sprint(c.pid(name)), "--mount", "--uts", "--ipc", "--net", "--pid", "--"}
	out, err := exec.CommandContext(ctx, "nsenter", append(enter, args...)...).CombinedOutput()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n") // the last says what, before it come warnings
		return string(out), fmt.Errorf("on node %s: %s: %w: %s", name, strings.Join(args, " "), err, lines[len(lines)-1])
	}
	return string(out), nil
}

// Exec becomes a command in the cluster's network that resolves names by the cluster's DNS. KUBECONFIG and
// PATH lead to the cluster and to its kubectl.
func (c *Cluster) Exec(args []string) error {
	resolv := c.run("resolv.conf")
	if _, err := os.Stat(resolv); err != nil {
		return errors.New("the cluster is not up; `cluster up` starts it")
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args = append([]string{program}, args[1:]...)
	return become(args, func() error {
		if err := enter(namespacePath(c.name), unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("a mount namespace for /etc/resolv.conf: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return err
		}
		if err := unix.Mount(resolv, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("put the cluster's DNS into /etc/resolv.conf: %w", err)
		}
		return errors.Join(
			os.Setenv("KUBECONFIG", c.kubeconfig("admin")),
			os.Setenv("KUBECACHEDIR", c.kubectlCache()),
			// By this a test breaks nodes; see goHome.
			os.Setenv("STEPCACHE_CLUSTER", self), os.Setenv("STEPCACHE_CLUSTER_STATE", c.state),
			c.leadPath())
	})
}

// goHome starts this command again in the mounts and the network of the machine, if it was started by a command of
// exec-in-lab: networks and mounts that were made in there would end with it, and nobody else would see them.
func (c *Cluster) goHome() error {
	if os.Getenv("STEPCACHE_CLUSTER") == "" || os.Getenv("STEPCACHE_CLUSTER_HOME") != "" {
		return nil
	}
	pid := c.pid("apiserver") // in the mounts that `up` was started in
	if pid == 0 {
		return nil
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	return become(append([]string{program}, os.Args[1:]...), func() error {
		// A thread that shares its folders with others cannot change its mounts.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("leave the cluster's network: %w", err)
		}
		return errors.Join(
			enter(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.CLONE_NEWNS),
			os.Chdir(dir),
			os.Setenv("STEPCACHE_CLUSTER_HOME", "1"))
	})
}

// leadPath makes the cluster's programs the first that are found.
func (c *Cluster) leadPath() error {
	return os.Setenv("PATH", c.bin("")+string(os.PathListSeparator)+os.Getenv("PATH"))
}

// Control groups. The cluster's lie in a group of its own in every hierarchy (version 1).

const cgroups = "/sys/fs/cgroup"

// hierarchies are the folders of the control-group hierarchies.
func hierarchies() ([]string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(cgroups, &st); err != nil {
		return nil, err
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return nil, errors.New("this machine has control groups of version 2 only, which these nodes do not know yet: use another cluster (kind, for example) by setting KUBECONFIG")
	}
	found, err := filepath.Glob(cgroups + "/*/cgroup.procs")
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, f := range found {
		dir := filepath.Dir(f)
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.CGROUP_SUPER_MAGIC && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	if !slices.Contains(dirs, cgroups+"/freezer") || !slices.Contains(dirs, cgroups+"/memory") {
		return nil, fmt.Errorf("the control groups memory and freezer are not mounted below %s", cgroups)
	}
	return dirs, nil
}

// makeControlGroups makes a node's group in every hierarchy.
func (c *Cluster) makeControlGroups(name string) error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		group := filepath.Join(dir, c.name, name)
		if err := os.MkdirAll(group, 0o755); err != nil {
			return fmt.Errorf("make a control group: %w", err)
		}
		if filepath.Base(dir) != "cpuset" {
			continue
		}
		// A new group has no processors and no memory, and then nothing can run in it.
		for _, g := range []string{filepath.Dir(group), group} {
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				all, err := os.ReadFile(filepath.Join(filepath.Dir(g), file))
				if err == nil {
					err = os.WriteFile(filepath.Join(g, file), bytes.TrimSpace(all), 0)
				}
				if err != nil {
					return fmt.Errorf("set up control group %s: %w", g, err)
				}
			}
		}
	}
	return os.MkdirAll(c.freezer(name, "system"), 0o755)
}

func (c *Cluster) freezer(name string, elem ...string) string {
	return filepath.Join(append([]string{cgroups, "freezer", c.name, name}, elem...)...)
}

// join puts a node's first process, and so all it starts itself, where freeze reaches it; pods are below
// the node's group anyway.
func (c *Cluster) join(name string) error {
	return os.WriteFile(c.freezer(name, "system", "cgroup.procs"), fmt.Append(nil, c.pid(name)), 0)
}

// freeze stops or continues every process of a node.
func (c *Cluster) freeze(name string, frozen bool) error {
	state := "THAWED"
	if frozen {
		state = "FROZEN"
	}
	err := os.WriteFile(c.freezer(name, "freezer.state"), []byte(state), 0)
	if errors.Is(err, os.ErrNotExist) && !frozen {
		return nil
	}
	return err
}

// removeGroups removes a control group and those below from every hierarchy, once their processes have
// ended.
func removeGroups(group string) error {
	dirs, err := filepath.Glob(filepath.Join(cgroups, "*", group))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, until(context.Background(), 30*time.Second, func(context.Context) error { return removeGroup(dir) }))
	}
	return errors.Join(errs...)
}

func removeGroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeGroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove control group %s: %w", dir, err)
	}
	return nil
}
