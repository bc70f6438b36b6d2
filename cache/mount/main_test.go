package mount

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// A test that hangs in a mount cannot even be killed. So a watchdog aborts the connections of this process's
// mounts before the test's own time-out comes, and whatever is left at the end is taken away.

// childEnv names what this binary does when a test runs it as a child.
const childEnv = "STEPCACHE_MOUNT_TEST_CHILD"

// connections is where fusectl is; empty if it cannot be.
var connections string

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		os.Exit(child(what))
	}
	base, err := os.MkdirTemp("", "mount-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Setenv("TMPDIR", base) // t.TempDir goes there: every mount of ours is below it
	if Supported() == nil && hasCap(unix.CAP_SYS_ADMIN) {
		ctl := filepath.Join(base, "fusectl")
		if os.Mkdir(ctl, 0o700) == nil && unix.Mount("none", ctl, "fusectl", 0, "") == nil {
			connections = ctl
		}
	}
	dog := time.AfterFunc(watchdogAfter(), func() {
		fmt.Fprintln(os.Stderr, "watchdog: the tests take too long; aborting their mounts")
		abortAll(base)
	})
	code := m.Run()
	dog.Stop()
	abortAll(base)
	if connections != "" {
		_ = unix.Unmount(connections, unix.MNT_DETACH)
	}
	_ = os.RemoveAll(base)
	os.Exit(code)
}

// watchdogAfter is somewhat before the time at which the testing package would panic.
func watchdogAfter() time.Duration {
	for _, a := range os.Args {
		if v, ok := strings.CutPrefix(a, "-test.timeout="); ok {
			if d, err := time.ParseDuration(v); err == nil && d > 0 {
				return d * 4 / 5
			}
		}
	}
	return 8 * time.Minute
}

// abortAll ends every connection mounted below a folder, and takes the mounts away.
func abortAll(below string) {
	mounts, err := mountinfo.Below(below)
	if err != nil {
		return
	}
	for _, m := range mounts {
		if m.Type != FSType {
			continue
		}
		abort(m.Minor)
		_ = unix.Unmount(m.Point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	for _, m := range mounts {
		if m.Type == "tmpfs" {
			_ = unix.Unmount(m.Point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
}

func abort(minor uint32) {
	if connections != "" {
		_ = os.WriteFile(filepath.Join(connections, strconv.FormatUint(uint64(minor), 10), "abort"), []byte("1"), 0o200)
	}
}
