package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
)

// Here are the parts of a mount that one process makes, because it may, and another serves, which needs no right
// for that: Attach, Register, Unregister, ReadAhead and Resend are the first one's, Serve is the other's.

// Attach mounts a connection at dir that nobody serves yet, and returns its descriptor: whoever touches dir
// waits until somebody serves it, or until all copies of the descriptor are closed. source is what mountinfo
// says. It needs CAP_SYS_ADMIN.
//
// The file system is read-only for good (its superblock is), whatever its server answers: this is what keeps a
// server from having the kernel open a file for writing that it registered, and without nosuid and nodev its
// answers could make programs and devices of its own.
func Attach(dir, source string) (*os.File, error) {
	conn, err := openDevice()
	if err != nil {
		return nil, err
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d,default_permissions,allow_other", conn.Fd(), maxWrite)
	if err := unix.Mount(strings.Map(plain, source), dir, FSType, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RDONLY, data); err != nil {
		conn.Close()
		return nil, fmt.Errorf("mount %s at %s: %w", source, dir, err)
	}
	return conn, nil
}

// Serve serves a connection that Attach made and nobody has served before; one that somebody has is Resume's.
// The descriptor becomes the Server's, or is closed with an error. The Server does not know where it is mounted:
// Unmount is for whoever attached it.
func Serve(ctx context.Context, conn *os.File, snap *catalog.Snapshot, r Reader, o Options) (*Server, error) {
	return serveTree(ctx, conn, snap.Len(), func(*table) (tree, Reader) { return snap, r }, o.withDefaults())
}

// ServeNames is Serve of the names of a writable dataset.
func ServeNames(ctx context.Context, conn *os.File, n Names, o Options) (*Server, error) {
	o = o.withDefaults()
	return serveTree(ctx, conn, liveSlots, func(t *table) (tree, Reader) { l := newLive(n, t, o); return l, l }, o)
}

func serveTree(ctx context.Context, conn *os.File, entries int, show func(*table) (tree, Reader), o Options) (*Server, error) {
	fail := func(err error) (*Server, error) {
		conn.Close()
		return nil, fmt.Errorf("serve dataset %q: %w", o.Dataset, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if err := checkDevice(conn); err != nil {
		return fail(err)
	}
	table, err := newTable(entries)
	if err != nil {
		return fail(err)
	}
	snap, r := show(table)
	m, err := serve("", conn, table, snap, r, o, nil)
	if err != nil {
		return nil, fmt.Errorf("serve dataset %q: %w", o.Dataset, err)
	}
	return m, nil
}

// checkDevice refuses what is no connection with the kernel's FUSE.
func checkDevice(conn *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(conn.Fd()), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(st.Rdev) != 10 || unix.Minor(st.Rdev) != 229 {
		return errors.New("the descriptor is not one of /dev/fuse")
	}
	return nil
}

// Alive says whether a connection can still be served: its file system is mounted somewhere, or in use, and
// nobody has aborted it.
func Alive(conn *os.File) bool {
	alive := false
	_ = control(conn, func(fd int) error {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			_, err := unix.Poll(p, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			alive = err == nil && p[0].Revents&(unix.POLLERR|unix.POLLNVAL) == 0
			return err
		}
	})
	return alive
}

// ReadAhead raises what the kernel reads ahead in a mount, given its device. It counts from when the mount is
// served on; before, the kernel lowers it again.
func ReadAhead(major, minor uint32) error {
	name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", major, minor)
	return os.WriteFile(name, []byte(strconv.Itoa(readAhead>>10)), 0o644)
}

// Resend puts the requests that a server has read and not answered back into the queue. There they can be
// interrupted: who waits for one that was read cannot even be killed.
func Resend(conn *os.File) error {
	return control(conn, func(int) error { return resend(conn) })
}

// A Registrar registers files for passthrough with the kernel on behalf of a process that has not the right to.
// An error that is a syscall.Errno is the kernel's refusal, after which no more files are registered, unless it is
// one that passes (no memory, no descriptor); any other means that this file is not registered now.
type Registrar interface {
	Register(fd int) (id int32, err error)
	// Unregister ends what Register began, if not now then later.
	Unregister(id int32)
}

// lentRegistrar is a Registrar as the file system uses it.
type lentRegistrar struct{ Registrar }

func (r lentRegistrar) RegisterBackingFd(m *fuse.BackingMap) (int32, syscall.Errno) {
	id, err := r.Register(int(m.Fd))
	var errno syscall.Errno
	switch {
	case err == nil:
		return id, 0
	case errors.As(err, &errno) && errno != 0:
		return 0, errno
	}
	return 0, unix.EAGAIN // which the kernel never says
}

func (r lentRegistrar) UnregisterBackingFd(id int32) syscall.Errno {
	r.Unregister(id)
	return 0
}

const (
	ioctlBackingOpen  = 0x4010e501
	ioctlBackingClose = 0x4004e502
)

// Register registers an open file with a connection, so that the connection's server may answer an open with
// the id. It needs CAP_SYS_ADMIN, and trusts the caller to have looked at what file it is: the kernel opens it
// again with this process's rights, for whoever opens a file of the mount.
func Register(conn *os.File, fd int) (id int32, err error) {
	err = control(conn, func(c int) error {
		m := fuse.BackingMap{Fd: int32(fd)}
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c), ioctlBackingOpen, uintptr(unsafe.Pointer(&m)))
		if errno != 0 {
			return errno
		}
		id = int32(r)
		return nil
	})
	return id, err
}

// Unregister ends what Register began; handles that read the file keep it.
func Unregister(conn *os.File, id int32) error {
	return control(conn, func(c int) error {
		v := uint32(id)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c), ioctlBackingClose, uintptr(unsafe.Pointer(&v))); errno != 0 {
			return errno
		}
		return nil
	})
}

// control keeps the descriptor open while f uses it.
func control(conn *os.File, f func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}
