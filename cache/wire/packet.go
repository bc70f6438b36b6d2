package wire

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/checksum"
)

// MaxPacket bounds one message of the SEQPACKET socket: a reply's header, its one sum and a message for
// people.
const MaxPacket = ReplySize + checksum.EncodedSize + MaxMessage

// SendWithFD sends b as one packet, with a descriptor of f if f is not nil. The caller keeps f.
func SendWithFD(conn *net.UnixConn, b []byte, f *os.File) error {
	if len(b) == 0 || len(b) > MaxPacket {
		return fmt.Errorf("packet of %d bytes: %w", len(b), ErrCorrupt)
	}
	if f != nil {
		// Not f.Fd(), which would put a pollable file into blocking mode.
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		var werr error
		err = raw.Control(func(fd uintptr) {
			_, _, werr = conn.WriteMsgUnix(b, unix.UnixRights(int(fd)), nil)
		})
		if err != nil {
			return err
		}
		return werr
	}
	_, _, err := conn.WriteMsgUnix(b, nil, nil)
	return err
}

// ReceiveWithFD receives one packet into b and the descriptor that came with it, if one did (nil
// otherwise), close-on-exec. It trusts nothing: a packet that does not fit b, more than one descriptor,
// or a descriptor that is not of a regular file opened for reading only is ErrCorrupt, and every
// descriptor received is closed. It is io.EOF when the peer has closed.
//
// inspect, unless it is nil, is called with each descriptor before anything else is done with it, also before it is
// closed, and may refuse it: a file whose server is the peer makes whoever looks at it or closes it wait for the peer.
func ReceiveWithFD(conn *net.UnixConn, b []byte, inspect func(fd int) error) (int, *os.File, error) {
	// Room for a few more than one, so that a surplus is seen (and closed) rather than cut off.
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(b, oob)
	fds, perr := rights(oob[:oobn])
	var refused error
	if inspect != nil {
		for _, fd := range fds {
			refused = errors.Join(refused, inspect(fd))
		}
	}
	closeAll := func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	if err != nil {
		closeAll()
		return 0, nil, err
	}
	if perr != nil || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		closeAll()
		return 0, nil, fmt.Errorf("%w: packet or its descriptors are too long", ErrCorrupt)
	}
	switch len(fds) {
	case 0:
		return n, nil, nil
	case 1:
		if refused != nil {
			closeAll()
			return 0, nil, fmt.Errorf("%w: a received descriptor: %w", ErrCorrupt, refused)
		}
		if err := checkReadOnly(fds[0]); err != nil {
			closeAll()
			return 0, nil, err
		}
		return n, os.NewFile(uintptr(fds[0]), "lease"), nil
	}
	closeAll()
	return 0, nil, fmt.Errorf("%w: %d descriptors in one packet", ErrCorrupt, len(fds))
}

// rights collects the descriptors of the control messages, also when one of them is malformed.
func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		f, perr := unix.ParseUnixRights(&msgs[i])
		if perr != nil {
			err = errors.Join(err, perr)
			continue
		}
		fds = append(fds, f...)
	}
	return fds, err
}

func checkReadOnly(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%w: fstat of a received descriptor: %w", ErrCorrupt, err)
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return fmt.Errorf("%w: received descriptor is not a regular file", ErrCorrupt)
	}
	fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("%w: flags of a received descriptor: %w", ErrCorrupt, err)
	}
	if fl&unix.O_ACCMODE != unix.O_RDONLY || fl&unix.O_PATH != 0 {
		return fmt.Errorf("%w: received descriptor is not opened for reading only", ErrCorrupt)
	}
	return nil
}

// PeerUID is the user id of the process at the other end of a Unix socket, as the kernel recorded it.
func PeerUID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, fmt.Errorf("credentials of the peer: %w", cerr)
	}
	return cred.Uid, nil
}
