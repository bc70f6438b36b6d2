package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The cluster's network: one namespace that holds the control plane and a bridge, and one for each node.
// None has a way out, so nothing here can reach or be reached from elsewhere.
const (
	controlPlaneIP = "10.89.0.1"
	apiServer      = "https://" + controlPlaneIP + ":6443"
	serviceCIDR    = "10.96.0.0/16"
	podCIDR        = "10.244.0.0/16"
)

type node struct {
	name string
	zone string
	ip   string
	pods string // its part of podCIDR
}

// n1 also runs the pods that the cluster itself needs (addons.go): tests kill the others.
var nodes = []node{
	{"n1", "a", "10.89.0.11", "10.244.1.0/24"},
	{"n2", "b", "10.89.0.12", "10.244.2.0/24"},
	{"n3", "c", "10.89.0.13", "10.244.3.0/24"},
}

func nodeNamed(name string) (node, bool) {
	for _, n := range nodes {
		if n.name == name {
			return n, true
		}
	}
	return node{}, false
}

func nodeNames() []string {
	var names []string
	for _, n := range nodes {
		names = append(names, n.name)
	}
	return names
}

// nodeNetwork names a node's network namespace.
func (c *Cluster) nodeNetwork(name string) string { return c.name + "-" + name }

func namespacePath(name string) string { return filepath.Join("/run/netns", name) }

func hasNetwork(name string) bool {
	_, err := os.Stat(namespacePath(name))
	return err == nil
}

// ip runs lines of iproute2's batch language in a network namespace.
func ip(namespace string, lines ...string) error {
	cmd := exec.Command("ip", "-n", namespace, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("network %s: %w: %s", namespace, err, strings.TrimSpace(string(out)))
	}
	return nil
}

func addNetwork(name string) error {
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		return fmt.Errorf("make the network namespace %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// makeNetwork makes the control plane's network. Its default route leads nowhere; it only lets connections
// to Service addresses start, which kube-proxy then turns to a pod.
func (c *Cluster) makeNetwork() error {
	if err := addNetwork(c.name); err != nil {
		return err
	}
	err := ip(c.name,
		"link set lo up",
		"link add nodes type bridge",
		"addr add "+controlPlaneIP+"/24 dev nodes",
		"link set nodes up",
		"route add default dev nodes")
	if err != nil {
		return err
	}
	return c.inNetwork(c.name, forward)
}

// makeNodeNetwork makes a node's network and its link to the others.
func (c *Cluster) makeNodeNetwork(n node) error {
	inside := c.nodeNetwork(n.name)
	if err := addNetwork(inside); err != nil {
		return err
	}
	lines := []string{"link set lo up", "addr add " + n.ip + "/24 dev eth0", "link set eth0 up", "route add default via " + controlPlaneIP}
	for _, other := range nodes {
		if other.name != n.name {
			lines = append(lines, "route add "+other.pods+" via "+other.ip)
		}
	}
	return errors.Join(
		ip(c.name,
			"link add "+n.name+" type veth peer name eth0 netns "+inside,
			"link set "+n.name+" master nodes up",
			"route replace "+n.pods+" via "+n.ip),
		ip(inside, lines...),
		c.inNetwork(inside, forward))
}

// forward lets the current network namespace pass packets on. Bridged packets stay out of kube-proxy's
// rules: they were translated at the node that sent them.
func forward() error {
	// /proc/sys/net shows the namespace of the reading thread.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return fmt.Errorf("let packets pass between pods: %w", err)
	}
	err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("0"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// inNetwork runs f on a thread that is in the network namespace meanwhile; processes that f starts are in it
// too. Goroutines that f starts are not.
func (c *Cluster) inNetwork(name string, f func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := enter(namespacePath(name), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the cluster's network: %w; is the cluster up?", err)
	}
	err = f()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread stays locked to this goroutine: nothing else ever runs in the wrong network.
		return errors.Join(err, fmt.Errorf("leave the cluster's network: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

// enter moves the current thread into a namespace.
func enter(path string, kind int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), kind); err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	return nil
}

// endNetwork ends whatever still runs in the control plane's network, also a forgotten exec-in-lab, and
// removes the network.
func (c *Cluster) endNetwork() error { return removeNetwork(c.name) }

func removeNetwork(name string) error {
	if !hasNetwork(name) {
		return nil
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		out, err := exec.Command("ip", "netns", "pids", name).Output()
		if err != nil {
			return fmt.Errorf("list the processes in the network %s: %w", name, err)
		}
		pids := strings.Fields(string(out))
		if len(pids) == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %s in the network %s do not end", strings.Join(pids, ", "), name)
		}
		for _, text := range pids {
			if pid, err := strconv.Atoi(text); err == nil && pid != os.Getpid() {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
		return fmt.Errorf("remove the network namespace %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
