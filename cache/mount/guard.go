package mount

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A mount that is left behind looks, in mountinfo, like one that is served, and touching one to find out hangs
// when its descriptor is parked. So whoever serves a mount holds a name that goes away with its process: an
// abstract socket address made of the connection's number. It belongs to the network namespace, so it keeps
// apart what people start on one machine, not pods: there the node service knows its own mounts.

// holdGuard takes the name; nil when that is not possible (a predecessor still has it).
func holdGuard(d device) *os.File {
	if d == (device{}) {
		return nil // somebody else's mount, who looks after it
	}
	fd, err := bindGuard(d)
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), "guard")
}

// guarded says whether somebody has the name.
func guarded(d device) bool {
	fd, err := bindGuard(d)
	if err == nil {
		unix.Close(fd)
	}
	return errors.Is(err, unix.EADDRINUSE)
}

func bindGuard(d device) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	name := fmt.Sprintf("@stepcache-mount-%d:%d", d.major, d.minor)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
