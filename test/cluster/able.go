package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// What a machine must have: builds and images, and three nodes with what tests run on them.
const (
	needDisk   = 12 << 30
	needMemory = 6 << 30
)

// Able says, before hours are spent on builds, everything that keeps this machine from running the cluster: it
// tries each thing that the cluster does, in namespaces that end with the trial.
func (c *Cluster) Able(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("it is not root") // all the rest would fail for it
	}
	var errs []error
	for _, try := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"packages", c.installPackages},
		{"control groups", c.tryGroups},
		{"namespaces of its own for a process", apart("true")},
		{"mounts in a namespace", apart("mount -t tmpfs able /mnt && mkdir /mnt/l /mnt/u /mnt/w /mnt/m && mount -t proc able /proc && mount -t sysfs able /sys")},
		{"overlay mounts, for containers", apart("mount -t tmpfs able /mnt && mkdir /mnt/l /mnt/u /mnt/w /mnt/m && mount -t overlay able -o lowerdir=/mnt/l,upperdir=/mnt/u,workdir=/mnt/w /mnt/m")},
		{"virtual networks", apart("ip link add name able type bridge && ip link add name able0 type veth peer name able1 && ip link set able0 master able && ip link set able up && echo 1 > /proc/sys/net/ipv4/ip_forward")},
		{"nftables, for Services", apart("nft 'add table ip able; add chain ip able c { type nat hook prerouting priority 0; }; add rule ip able c ip daddr 10.96.0.1 dnat to 10.0.0.1'")},
		{"FUSE", tryFUSE},
		{"room on disk", c.tryDisk},
		{"memory", tryMemory},
	} {
		if err := try.do(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", try.name, err))
		}
	}
	return errors.Join(errs...)
}

// apart tries a script in namespaces of its own, as a node has them.
func apart(script string) func(context.Context) error {
	return func(ctx context.Context) error {
		cmd := exec.CommandContext(ctx, "sh", "-c", "set -e; mount --make-rprivate /; "+script)
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w %s", err, strings.Join(strings.Fields(string(out)), " "))
		}
		return nil
	}
}

// tryGroups makes a control group in every hierarchy, and removes it.
func (c *Cluster) tryGroups(context.Context) error {
	dirs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		group := filepath.Join(dir, c.name+"-able")
		if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := os.Remove(group); err != nil {
			return err
		}
	}
	return nil
}

func tryFUSE(context.Context) error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// tryDisk counts what is built already as room.
func (c *Cluster) tryDisk(context.Context) error {
	if _, err := os.Stat(c.bin("kube-apiserver")); err == nil {
		return nil
	}
	dir := c.state
	for {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		dir = filepath.Dir(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if free := st.Bavail * uint64(st.Bsize); free < needDisk {
		return fmt.Errorf("%s has %d MiB free, and builds and images take %d; STEPCACHE_CLUSTER_STATE names another place", dir, free>>20, needDisk>>20)
	}
	return nil
}

func tryMemory(context.Context) error {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 && kib<<10 < needMemory {
			return fmt.Errorf("%d MiB are available, and three nodes with their pods take %d", kib>>10, needMemory>>20)
		}
	}
	return nil
}
