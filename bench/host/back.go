package host

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/meminfo"
)

const (
	// piece is what memory is let go of in: huge pages.
	piece = 2 << 20
	// ahead is how much is let go of before anybody has asked for it, look how often it is seen whether somebody took
	// some: there are readers that fill two gigabytes a second.
	ahead = 1 << 30
	look  = 20 * time.Millisecond
)

// Back makes the host of a virtual machine give as much memory as is about to be filled, until done is called. Many
// take back what the guest has left free for two seconds, and then each first touch of a page is theirs to serve, at
// 1.0 to 2.2 CPU seconds a GB where writing it is 0.04: whoever is measured first, or fills slowly, would pay for it.
// So as much is touched, and let go of as others take memory: what was freed last is what the kernel hands out next.
// Where no host does so this changes nothing. No more is touched than is free: nothing is to be pushed out for it.
//
// The folder is one for what is temporary; mounts says that this process may mount there. Without that, and on no
// tmpfs, memory stays as it is.
func Back(ctx context.Context, folder string, size int64, mounts bool) (done func(), err error) {
	none := func() {}
	if size = min(size, spare()); size < piece {
		return none, nil
	}
	dir, err := os.MkdirTemp(folder, "back")
	if err != nil {
		return none, err
	}
	remove := func() { _ = os.Remove(dir) }
	if mounts {
		// Huge pages, as a worker's: small ones come from where no host has taken any back.
		if err := mountTmpfs(dir, fmt.Sprintf("mode=0700,size=%d", size+piece), "huge=always"); err != nil {
			remove()
			return none, err
		}
		remove = func() { _, _ = unix.Unmount(dir, unix.MNT_DETACH), os.Remove(dir) }
	} else {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
			remove()
			return none, err
		}
		size = min(size, int64(fs.Bavail)*fs.Bsize/2)
	}
	f, err := os.Create(dir + "/memory")
	if err != nil {
		remove()
		return none, err
	}
	_ = os.Remove(f.Name())
	if err := touch(ctx, f, size); err != nil {
		f.Close()
		remove()
		return none, fmt.Errorf("have memory backed: %w", err)
	}
	h := &held{f, size, 0}
	h.letGo(ahead)
	h.level = free()
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		h.follow(stop)
		f.Close()
		remove()
	}()
	return func() { close(stop); <-ended }, nil
}

// touch writes so much of an empty file.
func touch(ctx context.Context, f *os.File, size int64) error {
	if err := f.Truncate(size); err != nil { // first, so that its pages may be huge
		return err
	}
	p := make([]byte, 256<<10)
	for off := int64(0); off < size; off += int64(len(p)) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := f.WriteAt(p[:min(int64(len(p)), size-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// held is memory that is backed and not let go of yet.
type held struct {
	file  *os.File
	size  int64
	level int64 // of free memory that it keeps
}

// follow lets go of as much as others take, until there is none or it is told to stop.
func (h *held) follow(stop <-chan struct{}) {
	t := time.NewTicker(look)
	defer t.Stop()
	for h.size > 0 {
		select {
		case <-stop:
			return
		case <-t.C:
			h.letGo(h.level - free())
		}
	}
}

// letGo frees at least so much, where there is as much.
func (h *held) letGo(n int64) {
	if n > 0 {
		h.size = max(h.size-n, 0) / piece * piece
		_ = h.file.Truncate(h.size) // of an open file in memory
	}
}

// free is how much memory nobody uses, in bytes.
func free() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return int64(uint64(info.Freeram) * uint64(info.Unit))
}

// spare is how much of that may be touched. Some is left, so that the kernel does not begin to look for more; and
// nothing goes beyond the limit of a container that this runs in, for which it would be ended.
func spare() int64 {
	n := free()
	if left, limited := meminfo.Room(); limited {
		n = min(n, left)
	}
	return n / 4 * 3
}
