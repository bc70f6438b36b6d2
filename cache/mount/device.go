package mount

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

const (
	devFuse = "/dev/fuse"
	// maxWrite is the size of the largest request; for reads it is max_read that counts, and go-fuse wants them
	// equal. It is what a kernel takes without further settings.
	maxWrite = 1 << 20
	// maxBackground bounds the requests of read-ahead that are under way, in the kernel.
	maxBackground = 64
	// directFiles times maxDirect bounds the direct reads that are under way, here: the kernel sends as many as there are
	// readers, and for each go-fuse has a buffer of its size before anything could make it wait. Bounded in the kernel, as
	// CAP_ASYNC_DIO has it, readers could not be killed while they wait. Files take turns in groups of their own, so
	// that one whose bytes do not come holds up few others.
	directFiles = 8
	maxDirect   = 32
	// readAhead is how far the kernel reads ahead of a sequential reader.
	readAhead = 1 << 20
)

// Supported says whether this process can mount at all, and if not, what is missing and how to get it.
func Supported() error {
	conn, err := openDevice() // fusermount3 opens it as the user, too
	if err != nil {
		return err
	}
	conn.Close()
	if hasCap(unix.CAP_SYS_ADMIN) {
		return nil
	}
	_, err = fusermount()
	return err
}

// openDevice opens /dev/fuse, blocking: os.OpenFile would make it non-blocking for every copy of it.
func openDevice() (*os.File, error) {
	fd, err := unix.Open(devFuse, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, deviceError(&fs.PathError{Op: "open", Path: devFuse, Err: err})
	}
	return os.NewFile(uintptr(fd), devFuse), nil
}

// deviceError explains why /dev/fuse could not be opened.
func deviceError(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("cannot mount: no FUSE here: %w; load the kernel module (modprobe fuse), and give a container the device (docker run --device /dev/fuse)", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("cannot mount: no right to use FUSE: %w; be root, or make the device accessible (chmod 666 /dev/fuse), and allow it to a container (docker run --device /dev/fuse)", err)
	}
	return fmt.Errorf("cannot mount: %w", err)
}

// fusermount finds the helper that mounts for users who are not root.
func fusermount() (string, error) {
	for _, name := range []string{"fusermount3", "fusermount"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
		if p, err := exec.LookPath("/bin/" + name); err == nil {
			return p, nil
		}
	}
	return "", errors.New("cannot mount: neither the right to mount (CAP_SYS_ADMIN) nor fusermount3 is there; be root (in a container: --cap-add SYS_ADMIN), or install fuse3 (apt-get install fuse3, yum install fuse3)")
}

// hasCap says whether this process has a capability.
func hasCap(c uint) bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&head, &data[0]) == nil && data[c/32].Effective&(1<<(c%32)) != 0
}

// mountOptions are the kernel's, but for those that belong to a descriptor and a user. default_permissions lets
// the kernel check modes by itself, so that access(2) and chdir(2) cost no request.
func mountOptions(o Options, shows catalog.Digest) (source string, options []string) {
	options = []string{fmt.Sprintf("max_read=%d", maxWrite), "default_permissions"}
	if !o.Private {
		options = append(options, "allow_other")
	}
	source = "stepcache"
	if o.Dataset != "" {
		source += ":" + strings.Map(plain, o.Dataset)
	}
	return source + "@" + hex.EncodeToString(shows[:4]), options
}

// plain keeps a name from being taken for options.
func plain(r rune) rune {
	if r <= ' ' || r == ',' || r == '\\' || r == 0x7f {
		return '_'
	}
	return r
}

// attach mounts a new connection at dir and returns its descriptor.
func attach(ctx context.Context, dir string, source string, options []string) (*os.File, error) {
	if !hasCap(unix.CAP_SYS_ADMIN) {
		return fusermountMount(ctx, dir, source, options)
	}
	conn, err := openDevice()
	if err != nil {
		return nil, err
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,%s", conn.Fd(), os.Geteuid(), os.Getegid(),
		strings.Join(options, ","))
	err = unix.Mount(source, dir, FSType, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RDONLY, data)
	if err == nil {
		return conn, nil
	}
	conn.Close()
	if errors.Is(err, unix.EPERM) {
		// The capability may not count here (a user namespace, seccomp); the helper's may.
		if conn, herr := fusermountMount(ctx, dir, source, options); herr == nil {
			return conn, nil
		}
		return nil, fmt.Errorf("%w; the right to mount (CAP_SYS_ADMIN) does not count here: a container needs --cap-add SYS_ADMIN and a seccomp and AppArmor profile that allow mount", err)
	}
	return nil, err
}

// fusermountMount has the helper mount: it opens the device and sends the descriptor over a socket.
func fusermountMount(ctx context.Context, dir, source string, options []string) (*os.File, error) {
	bin, err := fusermount()
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount"), os.NewFile(uintptr(pair[1]), "fusermount")
	defer ours.Close()
	if os.Getuid() != 0 && !userAllowOther() {
		// The helper would refuse. What this user starts can read the mount all the same.
		options = slices.DeleteFunc(slices.Clone(options), func(o string) bool { return o == "allow_other" })
	}
	options = append([]string{"nosuid", "nodev", "ro", "fsname=" + source, "subtype=" + subtype}, options...)
	cmd := exec.CommandContext(ctx, bin, "-o", strings.Join(options, ","), "--", dir)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	out, err := cmd.CombinedOutput()
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", bin, err, strings.TrimSpace(string(out)))
	}
	b, oob := make([]byte, 16), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(ours.Fd()), b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("%s: no descriptor: %w", bin, err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("%s: no descriptor (%v)", bin, err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("%s: no descriptor (%v)", bin, err)
	}
	return os.NewFile(uintptr(fds[0]), devFuse), nil
}

// userAllowOther says whether users who are not root may let others into their mounts.
func userAllowOther() bool {
	b, _ := os.ReadFile("/etc/fuse.conf")
	for line := range strings.Lines(string(b)) {
		if strings.TrimSpace(line) == "user_allow_other" {
			return true
		}
	}
	return false
}

// fusermountUnmount has the helper unmount.
func fusermountUnmount(dir string) (busy bool, err error) {
	bin, err := fusermount()
	if err != nil {
		return false, err
	}
	if exec.Command(bin, "-u", "--", dir).Run() == nil {
		return false, nil
	}
	out, err := exec.Command(bin, "-u", "-z", "--", dir).CombinedOutput()
	if err != nil {
		return false, fmt.Errorf("%s: %w: %s", bin, err, strings.TrimSpace(string(out)))
	}
	return true, nil
}

// detach takes away the mount at dir that went wrong.
func detach(dir string) {
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); errors.Is(err, unix.EPERM) {
		_, _ = fusermountUnmount(dir)
	}
}

// clearLeftover frees dir of mounts of ours that nobody serves any more. A mount that some process serves is
// left alone, and an error.
func clearLeftover(dir string, log *slog.Logger) error {
	served := false
	n, err := mountinfo.Detach(dir, func(m mountinfo.Mount) bool {
		if m.Type != FSType {
			return true
		}
		served = guarded(device{m.Major, m.Minor})
		return served
	})
	switch {
	case errors.Is(err, unix.EPERM):
		if _, err := fusermountUnmount(dir); err != nil {
			return fmt.Errorf("a mount of a process that is gone is left at %s: %w", dir, err)
		}
		n = 1
	case err != nil:
		return err
	case served:
		return fmt.Errorf("%s is mounted already, and served by another process; stop that one, or unmount it (umount -l %s)", dir, dir)
	}
	if n > 0 {
		log.Warn("took away a mount that a process left behind", "dir", dir, "mounts", n)
	}
	at, err := mountinfo.At(dir)
	if err != nil {
		return err
	}
	if len(at) > 0 && strings.HasPrefix(at[0].Type, "fuse") {
		return fmt.Errorf("%s is a mount of another kind (%s) already; unmount it first", dir, at[0].Type)
	}
	return nil
}

// serverOptions are go-fuse's. Its splicing is off: replies are vectors, which go out with one writev, while a
// full one would not fit a pipe. Ids may be mapped: a runtime does that to all volumes of a pod with a user namespace of
// its own. The kernel wants default_permissions for it.
func (f *fileSystem) serverOptions(maxWrite int) *fuse.MountOptions {
	return &fuse.MountOptions{
		Name:                     subtype,
		MaxWrite:                 maxWrite,
		MaxReadAhead:             readAhead,
		MaxBackground:            maxBackground,
		DisableSplice:            true,
		ExplicitDataCacheControl: true,
		IDMappedMount:            true,
		Logger:                   slog.NewLogLogger(f.log.Handler(), slog.LevelInfo),
		PanicHandler: func(v any) fuse.Status {
			f.log.Error("bug: a request of the file system panicked", "panic", v, "stack", stack())
			return fuse.EIO
		},
	}
}

// start serves a connection from its beginning. It leaves conn to the caller, and fills in what a successor
// needs to know.
func start(f *fileSystem, conn *os.File, s *Settings) (*fuse.Server, error) {
	fd, err := unix.FcntlInt(conn.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	srv, err := fuse.NewServer(f, fmt.Sprintf("/dev/fd/%d", fd), f.serverOptions(s.MaxWrite))
	if err != nil {
		return nil, err // The descriptor is closed.
	}
	k := *srv.KernelSettings()
	k.Length = uint32(unsafe.Sizeof(k))
	s.Kernel = append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(&k)), k.Length)...)
	return srv, nil
}

// restart serves a connection that another process has served before. The kernel says INIT once for a
// connection, so go-fuse is given the recorded one, over a socket; then the connection takes the place of the
// socket, under the same number.
func restart(f *fileSystem, conn *os.File, s *Settings) (*fuse.Server, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pair[1])
	if _, err := unix.Write(pair[1], s.Kernel); err != nil {
		unix.Close(pair[0])
		return nil, err
	}
	srv, err := fuse.NewServer(f, fmt.Sprintf("/dev/fd/%d", pair[0]), f.serverOptions(s.MaxWrite))
	if err != nil {
		return nil, err
	}
	if err := unix.Dup3(int(conn.Fd()), pair[0], unix.O_CLOEXEC); err != nil {
		// With the peer closed, Serve reads the end of the file and closes the descriptor.
		unix.Close(pair[1])
		return nil, err
	}
	return srv, nil
}

// resend asks the kernel for the requests that the last server read and never answered; without it their
// senders wait for ever. go-fuse has no call for it. Kernels before 6.9 do not know it.
func resend(conn *os.File) error {
	const notifyResend = 7
	msg := struct {
		length uint32
		code   int32
		unique uint64
	}{16, notifyResend, 0}
	_, err := unix.Write(int(conn.Fd()), unsafe.Slice((*byte)(unsafe.Pointer(&msg)), 16))
	return err
}

// over says whether a connection is at its end.
func over(conn *os.File) bool {
	p := []unix.PollFd{{}}
	err := control(conn, func(fd int) error {
		p[0].Fd = int32(fd)
		_, err := unix.Poll(p, 0)
		return err
	})
	return err == nil && p[0].Revents&unix.POLLERR != 0
}
