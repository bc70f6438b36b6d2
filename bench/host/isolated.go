package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// scratchEnv names the folder that the parent process made and will remove.
const scratchEnv = "STEPCACHE_BENCH_SCRATCH"

// Isolated runs f with an empty folder that is gone afterwards; as root in this program started once more, with
// the same arguments, in a mount namespace whose mounts end with it. There the folder is a tmpfs of 4 KiB pages,
// and mounts says that f may mount what it likes. Elsewhere the folder is on /dev/shm, whatever its pages are.
//
// A child that fails has said why: Isolated then ends the program with its status.
func Isolated(ctx context.Context, f func(ctx context.Context, dir string, mounts bool) error) error {
	if dir := os.Getenv(scratchEnv); dir != "" {
		if err := smallPages(dir); err != nil {
			// A namespace alone is not the right to mount.
			fmt.Fprintf(os.Stderr, "%v: what mounts is skipped\n", err)
			return f(ctx, dir, false)
		}
		defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
		return f(ctx, dir, true)
	}
	parent := ""
	if os.Geteuid() != 0 {
		parent = "/dev/shm" // what cannot be mounted must be in memory already
	}
	dir, err := os.MkdirTemp(parent, "scb")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if os.Geteuid() != 0 {
		return f(ctx, dir, false)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	child := exec.Command(self, os.Args[1:]...)
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.Env = append(os.Environ(), scratchEnv+"="+dir)
	// A parent that is killed takes the child along. The signal is sent when the thread that forked ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	child.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	if err := child.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "no mount namespace of its own (%v): what mounts is skipped\n", err)
		return f(ctx, dir, false)
	}
	stop := context.AfterFunc(ctx, func() { _ = child.Process.Signal(syscall.SIGTERM) })
	defer stop()
	err = child.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		os.RemoveAll(dir)
		os.Exit(exit.ExitCode())
	}
	return err
}

// smallPages mounts a tmpfs of 4 KiB pages at a folder.
func smallPages(dir string) error {
	// Half of the memory is tmpfs's default; benches check for themselves that there is enough.
	return mountTmpfs(dir, "nr_inodes=0,mode=0755,size=90%", "huge=never")
}

// mountTmpfs mounts a tmpfs at a folder, with pages as asked for unless the kernel has only small ones for it.
func mountTmpfs(dir, options, pages string) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	err := unix.Mount("stepcache-bench", dir, "tmpfs", flags, options+","+pages)
	if errors.Is(err, unix.EINVAL) { // a kernel without huge pages on tmpfs
		err = unix.Mount("stepcache-bench", dir, "tmpfs", flags, options)
	}
	if err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	return nil
}
