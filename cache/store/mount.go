package store

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// MountTmpfs mounts a tmpfs for a store with a quota of that many bytes over dir, which is made if missing.
// It asks for huge pages and for memory that is never swapped, and does without what this kernel lacks; the
// note says which, and is empty if nothing is lacking. It needs CAP_SYS_ADMIN.
func MountTmpfs(dir string, quota int64) (note string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	// Room for what the quota counts otherwise or not at all: page tables of the tmpfs, files beside the store's.
	size := quota + quota/64 + 16<<20
	base := fmt.Sprintf("size=%d,mode=0700,nr_inodes=0", size)
	tries := []struct{ options, lacks string }{
		{",huge=within_size,noswap", ""},
		{",huge=within_size", "noswap"},
		{",noswap", "huge=within_size"},
		{"", "huge=within_size and noswap"},
	}
	for _, t := range tries {
		err = unix.Mount("stepcache", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, base+t.options)
		if err == nil {
			if t.lacks != "" {
				note = "this kernel mounts no tmpfs with " + t.lacks + "; the cache is slower or may be swapped out"
			}
			return note, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	if errors.Is(err, unix.EPERM) {
		return "", fmt.Errorf("cannot mount a tmpfs at %s: needs root (CAP_SYS_ADMIN); use a folder in /dev/shm instead: %w", dir, err)
	}
	return "", fmt.Errorf("cannot mount a tmpfs at %s with %s: %w", dir, strings.TrimSuffix(base, ","), err)
}

// Unmount takes such a mount away, at once for everybody who looks and for good when the last user of its
// files is gone. A folder where nothing is mounted is no error.
func Unmount(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot unmount %s: %w", dir, err)
	}
	return nil
}
