package store

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MountTmpfs mounts a tmpfs for a store with a quota of that many bytes over dir, which is made if missing.
// It asks for huge pages and for memory that is never swapped, and does without what this kernel lacks; the
// note says which, and is empty if nothing is lacking. A tmpfs that a former process left mounted there is
// kept, with what it holds, and given the size. It needs CAP_SYS_ADMIN.
func MountTmpfs(dir string, quota int64) (note string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	// Room for what the quota counts otherwise or not at all: page tables of the tmpfs, files beside the store's.
	size := quota + quota/64 + 16<<20
	base := fmt.Sprintf("size=%d,mode=0700,nr_inodes=0", size)
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if mounted, err := isTmpfsMount(dir); err != nil {
		return "", err
	} else if mounted {
		if err := unix.Mount("stepcache", dir, "tmpfs", unix.MS_REMOUNT|flags, fmt.Sprintf("size=%d", size)); err != nil {
			return "", fmt.Errorf("cannot give the tmpfs that is mounted at %s a size of %d bytes (it may hold more): unmount it: %w", dir, size, err)
		}
		return "kept the tmpfs that was mounted at " + dir, nil
	}
	tries := []struct{ options, lacks string }{
		{",huge=within_size,noswap", ""},
		{",huge=within_size", "noswap"},
		{",noswap", "huge=within_size"},
		{"", "huge=within_size and noswap"},
	}
	for _, t := range tries {
		err = unix.Mount("stepcache", dir, "tmpfs", flags, base+t.options)
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
	return "", fmt.Errorf("cannot mount a tmpfs at %s with %s: %w", dir, base, err)
}

// isTmpfsMount says whether dir is where a tmpfs is mounted.
func isTmpfsMount(dir string) (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return false, fmt.Errorf("folder %s: %w", dir, err)
	}
	own, err := isMount(dir)
	return own && fs.Type == unix.TMPFS_MAGIC, err
}

// isMount says whether another file system begins at dir than the one of the folder above.
func isMount(dir string) (bool, error) {
	var here, above unix.Stat_t
	if err := errors.Join(unix.Stat(dir, &here), unix.Stat(dir+"/..", &above)); err != nil {
		return false, fmt.Errorf("folder %s: %w", dir, err)
	}
	return here.Dev != above.Dev, nil
}

// Unmount takes such a mount away, at once for everybody who looks and for good when the last user of its
// files is gone. A folder where nothing is mounted is no error.
func Unmount(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot unmount %s: %w", dir, err)
	}
	return nil
}
