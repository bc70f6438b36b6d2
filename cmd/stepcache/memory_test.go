package main

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
)

func TestShareOfAContainersMemory(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		asked, room int64
		n           int
		want        int64
	}{
		{128 * mib, 384 * mib, 1, 128 * mib},
		{128 * mib, 384 * mib, 3, 64 * mib},
		{128 * mib, 384 * mib, 100, leastBuffers},
		{8 * mib, 384 * mib, 100, 8 * mib},
		{128 * mib, 0, 1, leastBuffers},
	} {
		if got := share(c.asked, c.room, c.n); got != c.want {
			t.Errorf("share(%d, %d, %d) = %d, want %d", c.asked, c.room, c.n, got, c.want)
		}
	}
}

func TestHeapIsKeptWithinItsRoom(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(math.MaxInt64))
	t.Setenv("GOMEMLIMIT", "1GiB")
	if keepHeap(123 << 20); debug.SetMemoryLimit(-1) != math.MaxInt64 {
		t.Error("GOMEMLIMIT was not heeded")
	}
	t.Setenv("GOMEMLIMIT", "")
	if keepHeap(123 << 20); debug.SetMemoryLimit(-1) != 123<<20 {
		t.Errorf("the limit is %d", debug.SetMemoryLimit(-1))
	}
}

// What does not fit the container is told at the start, and not by the kernel in the middle of a step's work.
func TestNodeMemoryThatTheContainerHasNoRoomFor(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may mount control groups for a process")
	}
	dir := tempDir(t)
	for _, c := range []struct {
		memory string
		fits   bool
	}{{"4GiB", false}, {"2000MiB", false}, {"1GiB", true}} {
		// Where it fits there is nothing to listen on.
		cmd := program(t, dir, "node", "--node-name", "n", "--node-memory", c.memory, "--kubelet-dir", dir, "--keeper-wait", "1ms", "--listen", "256.0.0.1:0")
		inContainer(cmd, "2147483648")
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatalf("%s: %v\n%s", c.memory, err, out)
		}
		refused := strings.Contains(string(out), "resources.limits.memory")
		if refused == c.fits || refused && (exit.ExitCode() != 2 || !strings.Contains(string(out), "--node-memory "+c.memory)) {
			t.Errorf("%s: %v\n%s", c.memory, err, out)
		}
	}
}

// inContainer has a program see the memory limit of a container.
func inContainer(cmd *exec.Cmd, limit string) {
	const script = `mount -t tmpfs none /sys/fs/cgroup && echo "$1" >/sys/fs/cgroup/memory.max && echo 1 >/sys/fs/cgroup/memory.current || exit 99
shift
exec "$@"`
	cmd.Args = append([]string{"sh", "-c", script, "sh", limit}, append([]string{cmd.Path}, cmd.Args[1:]...)...)
	cmd.Path = "/bin/sh"
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
}
