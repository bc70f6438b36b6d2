package host

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// Abort ends the FUSE connections of all mounts at a folder and below it: requests that nobody answers fail, so that
// whoever waits for them goes on, or can be killed.
func Abort(dir string) {
	mounts, err := mountinfo.Below(dir)
	if err != nil {
		return
	}
	const control = "/sys/fs/fuse/connections"
	if entries, err := os.ReadDir(control); err == nil && len(entries) == 0 {
		_ = unix.Mount("fusectl", control, "fusectl", 0, "") // without it nothing can be aborted
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Type, "fuse") {
			_ = os.WriteFile(fmt.Sprintf("%s/%d/abort", control, m.Minor), []byte("1"), 0) // one that has ended is no longer there
		}
	}
}
