package host

import (
	"context"
	"errors"
	"math"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// memory is a folder in memory.
func memory(t *testing.T) string {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		t.Skip("needs a tmpfs at /dev/shm")
	}
	dir, err := os.MkdirTemp("/dev/shm", "back-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// empty fails where something was left in a folder.
func empty(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if left, err := mountinfo.Below(dir); err != nil || len(left) > 0 {
		t.Errorf("mounts left: %v, %v", left, err)
	}
}

// Nothing is left of backed memory once it is done with, whether it was all taken or not.
func TestBack(t *testing.T) {
	dir, err := mountinfo.Resolve(memory(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, mounts := range []bool{false, true} {
		if mounts && os.Geteuid() != 0 {
			t.Log("mounts need root")
			continue
		}
		for _, size := range []int64{-1, 0, 4096, 8<<20 + 4096} {
			done, err := Back(t.Context(), dir, size, mounts)
			if err != nil {
				t.Fatalf("%d bytes, mounts %v: %v", size, mounts, err)
			}
			done()
			empty(t, dir)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if done, err := Back(ctx, dir, 8<<20, mounts); !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted: %v", err)
		} else {
			done()
		}
		empty(t, dir)
		if _, err := Back(t.Context(), dir+"/none", 8<<20, mounts); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a folder that is not there: %v", err)
		}
	}
}

// What is held is let go of as the machine's free memory falls, and no further.
func TestLetGo(t *testing.T) {
	f, err := os.Create(memory(t) + "/held")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := func() int64 {
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	h := &held{file: f, size: 8 * piece}
	if err := touch(t.Context(), f, h.size); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ wanted, left int64 }{{-1, 8}, {0, 8}, {1, 7}, {2*piece - 1, 5}, {2 * piece, 3}} {
		if h.letGo(c.wanted); size() != c.left*piece {
			t.Errorf("after %d bytes were taken: %d held, want %d", c.wanted, size(), c.left*piece)
		}
	}
	stop := make(chan struct{})
	close(stop)
	h.follow(stop) // free memory is above no level
	if size() != 3*piece {
		t.Errorf("nobody took anything: %d held", size())
	}
	h.level = math.MaxInt64
	h.follow(nil)
	if size() != 0 {
		t.Errorf("all was taken: %d held", size())
	}
	if spare() <= 0 || spare() > free() {
		t.Errorf("%d of %d free bytes may be touched", spare(), free())
	}
}
