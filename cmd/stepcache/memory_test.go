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

func TestFitIntoAContainer(t *testing.T) {
	const mib = 1 << 20
	for name, c := range map[string]struct {
		limit, beside, buffers     int64
		heap, left, each, together int64
	}{
		"all fits":                     {2048 * mib, 0, 128 * mib, 1536 * mib, 0, 128 * mib, 768 * mib},
		"beside as large as the limit": {2048 * mib, 2048 * mib, 128 * mib, 192 * mib, 1792 * mib, 128 * mib, 128 * mib},
		"beside larger":                {2048 * mib, 4096 * mib, 128 * mib, 192 * mib, 1792 * mib, 128 * mib, 128 * mib},
		"buffers larger":               {512 * mib, 0, 1024 * mib, 384 * mib, 0, 320 * mib, 320 * mib},
		"a sidecar":                    {512 * mib, 0, 128 * mib, 384 * mib, 0, 128 * mib, 192 * mib},
		"next to no memory":            {64 * mib, 64 * mib, 128 * mib, 48 * mib, 0, leastBuffers, 24 * mib},
	} {
		if heap, left, each, together := fit(c.limit, c.beside, c.buffers); heap != c.heap || left != c.left || each != c.each || together != c.together {
			t.Errorf("%s: heap %d, beside %d, buffers %d, together %d", name, heap/mib, left/mib, each/mib, together/mib)
		}
	}
}

// Every command that serves mounts or holds snapshots heeds the limit, and says so.
func TestMemoryLimitOfTheContainerIsHeeded(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may mount what a container sees")
	}
	dir := tempDir(t)
	for name, c := range map[string]struct {
		args  []string
		heap  string
		warns bool
	}{
		// There is nothing to listen on, so that it ends.
		"node": {[]string{"node", "--node-name", "n", "--kubelet-dir", dir, "--keeper-wait", "1ms", "--listen", "127.0.0.1:99999"}, "heap=1610612736 buffers=134217728 together=805306368 beside=0", false},
		"node with too much memory": {[]string{"node", "--node-memory", "4GiB", "--node-name", "n", "--kubelet-dir", dir, "--keeper-wait", "1ms", "--listen", "127.0.0.1:99999"},
			"heap=201326592 buffers=134217728 together=134217728 beside=1879048192", true},
		// There is no tier.
		"sidecar": {[]string{"sidecar", "--dir", dir + "/none/x", "--tier", dir + "/none", "--buffer", "2GiB", "--dataset", "a/b", "--dataset", "a/c"},
			"heap=1610612736 buffers=1543503872 together=1543503872 beside=0", true},
		// There is no cluster.
		"webhook": {[]string{"webhook", "--namespace", "system", "--image", "stepcache:test"}, "heap=1342177280 snapshots=1073741824", false},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := program(t, dir, c.args...)
			inContainer(cmd, "2147483648")
			cmd.Env = append(cmd.Env, "KUBECONFIG="+dir+"/none")
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.ExitCode() == noContainer {
				t.Skip("this root may not mount what a container sees")
			}
			if !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("%v", err)
			}
			if !strings.Contains(string(out), "limit=2147483648 "+c.heap) || strings.Contains(string(out), "resources.limits.memory") != c.warns {
				t.Errorf("it said:\n%s", out)
			}
		})
	}
}

// noContainer is the exit status of inContainer's script where it may not mount.
const noContainer = 99

// inContainer has a program see the memory limit of a container, and a /run of its own.
func inContainer(cmd *exec.Cmd, limit string) {
	const script = `mount -t tmpfs none /run && mount -t tmpfs none /sys/fs/cgroup && echo "$1" >/sys/fs/cgroup/memory.max && echo 1 >/sys/fs/cgroup/memory.current || exit 99
shift
exec "$@"`
	cmd.Args = append([]string{"unshare", "--mount", "sh", "-c", script, "sh", limit, cmd.Path}, cmd.Args[1:]...)
	cmd.Path, cmd.Err = exec.LookPath("unshare")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = append(cmd.Env, "GOMEMLIMIT=")
}

func TestHeapIsKeptWithinItsRoom(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(math.MaxInt64))
	t.Setenv("GOMEMLIMIT", "1GiB")
	if keepHeap(123 << 20); debug.SetMemoryLimit(-1) != math.MaxInt64 {
		t.Error("GOMEMLIMIT was not heeded")
	}
	t.Setenv("GOMEMLIMIT", "")
	if keepHeap(123 << 20); debug.SetMemoryLimit(-1) != 123<<20 {
		t.Errorf("the heap's limit is %d", debug.SetMemoryLimit(-1))
	}
}
