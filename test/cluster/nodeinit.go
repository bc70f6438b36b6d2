package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// nodeInitArg makes this program a node's first process.
const nodeInitArg = "node-init"

// runNodeInit gives the node its own view of the machine, runs containerd, kubelet and kube-proxy, starts
// them again when they end, and reaps what pods leave behind. It never returns.
func runNodeInit(name string) {
	log.SetFlags(log.Ltime)
	c, err := open()
	if err != nil {
		log.Fatal(err)
	}
	n, ok := nodeNamed(name)
	if !ok {
		log.Fatalf("there is no node %q", name)
	}
	if err := c.mountNode(n); err != nil {
		log.Fatal(err)
	}
	// A service that is asked to end must not take the node along.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	os.Setenv("PATH", c.bin("")+":/usr/sbin:/usr/bin:/sbin:/bin")

	i := newReaper(c, name)
	i.service("containerd", "containerd", "--config", c.nodeFolder(name, "containerd.toml"))
	i.await("/run/containerd/containerd.sock")
	images, err := filepath.Glob(filepath.Join(c.images(), "*.tar"))
	if err != nil {
		log.Fatal(err)
	}
	// No pod starts without the pause image; the others may come later, since kubelet tries again.
	i.importImage(c.archive("pause"))
	i.service("kubelet", "kubelet", "--config", c.nodeFolder(name, "kubelet.yaml"), "--kubeconfig", c.kubeconfig(name),
		"--hostname-override", name, "--node-ip", n.ip, "--root-dir", "/var/lib/kubelet", "--cert-dir", "/var/lib/kubelet/pki",
		"--node-labels", "topology.kubernetes.io/region=lab,topology.kubernetes.io/zone="+n.zone, "--v", "2")
	i.service("proxy", "kube-proxy", "--config", c.nodeFolder(name, "proxy.yaml"))
	loaded, _ := filepath.Glob(filepath.Join(c.loadedImages(), "*.tar"))
	for _, archive := range append(images, loaded...) {
		i.importImage(archive)
	}
	if err := os.WriteFile(c.nodeFolder(name, "images-done"), nil, 0o644); err != nil {
		log.Print(err)
	}
	log.Print("running")
	select {}
}

// mountNode gives the node its own /proc, /sys, /run, /var/lib and /var/log. Nothing of it is seen outside.
func (c *Cluster) mountNode(n node) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Sethostname([]byte(n.name)); err != nil {
		return err
	}
	groups := c.nodeFolder(n.name, "cgroup")
	kept := func(name, target string) func() error {
		dir := c.nodeFolder(n.name, name)
		return func() error {
			if err := os.MkdirAll(target, 0o755); err != nil {
				return err
			}
			return unix.Mount(dir, target, "", unix.MS_BIND, "")
		}
	}
	memory := func(target string) func() error {
		return func() error { return unix.Mount("node", target, "tmpfs", 0, "mode=755") }
	}
	// A folder that pods may share mounts through is a peer group of its own: else each mount of a pod would
	// appear a second time, where the folder was bound from.
	shared := func(target string) func() error {
		return func() error {
			return errors.Join(unix.Mount("", target, "", unix.MS_PRIVATE, ""), unix.Mount("", target, "", unix.MS_SHARED, ""))
		}
	}
	steps := []struct {
		name string
		do   func() error
	}{
		{"private mounts", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		{"/proc", func() error {
			return unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}},
		// A new /sys shows the node's network; the control groups are carried over.
		{"keep control groups", func() error {
			return errors.Join(os.MkdirAll(groups, 0o755), unix.Mount(cgroups, groups, "", unix.MS_BIND|unix.MS_REC, ""))
		}},
		{"/sys", func() error { return unix.Mount("sysfs", "/sys", "sysfs", 0, "") }},
		{"control groups", func() error { return unix.Mount(groups, cgroups, "", unix.MS_BIND|unix.MS_REC, "") }},
		{"control groups", func() error { return unix.Unmount(groups, unix.MNT_DETACH) }},
		{"/run", memory("/run")},
		{"/var/lib", memory("/var/lib")},
		{"/var/log", memory("/var/log")},
		{"/var/lib/kubelet", kept("kubelet", "/var/lib/kubelet")},
		{"/var/lib/containerd", kept("containerd", "/var/lib/containerd")},
		{"/var/log/pods", kept("pod-logs", "/var/log/pods")},
		{"shared mounts", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") }},
		{"/run", shared("/run")},
		{"/var/lib/kubelet", shared("/var/lib/kubelet")},
		{"folders", func() error {
			for _, dir := range []string{"/run/containerd", "/run/netns", "/run/lock", "/var/log/containers"} {
				if err := os.MkdirAll(dir, 0o755); err != nil {
					return err
				}
			}
			return nil
		}},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("node %s: %s: %w", n.name, s.name, err)
		}
	}
	return nil
}

// reaper starts processes and waits for all that end, as a first process must. Nothing else in this process
// waits for a child.
type reaper struct {
	c    *Cluster
	node string

	mu    sync.Mutex
	ended map[int]func(syscall.WaitStatus) // of the running processes that run started
}

func newReaper(c *Cluster, node string) *reaper {
	i := &reaper{c: c, node: node, ended: map[int]func(syscall.WaitStatus){}}
	go i.reap()
	return i
}

func (i *reaper) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err != nil {
			time.Sleep(100 * time.Millisecond) // nothing runs yet
			continue
		}
		i.mu.Lock()
		ended := i.ended[pid] // nil: something that a container left behind
		delete(i.ended, pid)
		i.mu.Unlock()
		if ended != nil {
			ended(status)
		}
	}
}

// run starts a program; ended is called, and must not block, when it has ended.
func (i *reaper) run(logName, program string, args []string, ended func(syscall.WaitStatus)) error {
	out, err := os.OpenFile(i.c.log(i.node+"-"+logName), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(i.c.bin(program), args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// Locked until the process is registered: it may end before.
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	i.ended[cmd.Process.Pid] = ended
	return nil
}

// service runs a program for the node's life.
func (i *reaper) service(logName, program string, args ...string) {
	var start func()
	start = func() {
		err := i.run(logName, program, args, func(status syscall.WaitStatus) {
			log.Printf("%s ended (%v); started again in a second", program, describe(status))
			time.AfterFunc(time.Second, start)
		})
		if err != nil {
			log.Printf("%s: %v", program, err)
			time.AfterFunc(time.Second, start)
		}
	}
	start()
}

func describe(status syscall.WaitStatus) string {
	if status.Signaled() {
		return status.Signal().String()
	}
	return fmt.Sprintf("status %d", status.ExitStatus())
}

// await waits until a file exists.
func (i *reaper) await(file string) {
	for {
		if _, err := os.Stat(file); err == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// importImage puts an archive into containerd, unless this node has it already.
func (i *reaper) importImage(archive string) {
	info, err := os.Stat(archive)
	if err != nil {
		log.Printf("image %s: %v", archive, err)
		return
	}
	stamp := fmt.Sprint(info.Size(), " ", info.ModTime().UnixNano())
	mark := filepath.Join("/var/lib/containerd", "imported-"+filepath.Base(archive))
	if have, _ := os.ReadFile(mark); string(have) == stamp {
		return
	}
	done := make(chan syscall.WaitStatus, 1)
	err = i.run("images", "ctr", importArgs(archive), func(s syscall.WaitStatus) { done <- s })
	if err != nil {
		log.Printf("image %s: %v", archive, err)
		return
	}
	if status := <-done; status.ExitStatus() != 0 {
		log.Printf("image %s: import ended with %s; see %s", archive, describe(status), i.c.log(i.node+"-images"))
		return
	}
	if err := os.WriteFile(mark, []byte(stamp), 0o644); err != nil {
		log.Printf("image %s: %v", archive, err)
	}
}

func importArgs(archive string) []string {
	return []string{"--namespace", "k8s.io", "images", "import", "--local", archive}
}

// become replaces this process by a command, after prepare changed the current thread's namespaces.
func become(args []string, prepare func() error) error {
	runtime.LockOSThread()
	if prepare != nil {
		if err := prepare(); err != nil {
			return err
		}
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	if err := unix.Exec(program, args, os.Environ()); err != nil {
		return fmt.Errorf("run %s: %w", program, err)
	}
	return nil
}
