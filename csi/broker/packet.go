package broker

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/csi/packets"
)

// Op is what a request asks for.
type Op string

// Operations.
const (
	// OpVolumes lists the mounts of the pod.
	OpVolumes Op = "volumes"
	// OpClaim asks for a mount to serve. What comes is its connection alone, which nobody has served, or with
	// it the two files that a predecessor gave with OpServe. With Fresh it is a new one in any case: who uses
	// the old one gets errors.
	OpClaim Op = "claim"
	// OpServe says that this connection's process serves a mount, and gives two files for a successor: the
	// table of open files and the settings, which the node service does not look into.
	OpServe Op = "serve"
	// OpRegister registers a file for passthrough in a mount, OpUnregister ends that.
	OpRegister   Op = "register"
	OpUnregister Op = "unregister"
	// OpDial connects to a worker's socket by its path on the node.
	OpDial Op = "dial"
	// OpReady asks whether all mounts of the pod are served.
	OpReady Op = "ready"
	// OpLeave says that this process ends and has no successor: what it serves is over.
	OpLeave Op = "leave"
)

// MaxFiles is how many descriptors a packet may carry.
const MaxFiles = 3

const maxPacket = 16 << 10

var errProtocol = errors.New("not the broker's protocol")

// Request is one question to the node service.
type Request struct {
	Op     Op     `json:"op"`
	Volume string `json:"volume,omitempty"`
	Fresh  bool   `json:"fresh,omitempty"`
	ID     int32  `json:"id,omitempty"`
	Addr   string `json:"addr,omitempty"`

	// FDs came with it. They are closed once it is answered, but for those that the one who answers took by
	// putting -1 in their place.
	FDs []int `json:"-"`
}

// Volume is a mount of the pod.
type Volume struct {
	Name    string `json:"name"`
	Dataset string `json:"dataset"` // namespace/name
	// Served says that somebody has served it, so that OpClaim gives what is needed to go on.
	Served bool `json:"served,omitempty"`
}

// Reply is the answer. Its files are closed once they are sent.
type Reply struct {
	// Error is a text; Errno beside it is the kernel's word.
	Error   string   `json:"error,omitempty"`
	Errno   int      `json:"errno,omitempty"`
	ID      int32    `json:"id,omitempty"`
	Kept    bool     `json:"kept,omitempty"`
	Volumes []Volume `json:"volumes,omitempty"`

	Files []*os.File `json:"-"`
}

func send(c *net.UnixConn, v any, fds []int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxPacket {
		return fmt.Errorf("%w: a packet of %d bytes", errProtocol, len(b))
	}
	return packets.Send(c, b, fds)
}

// receive reads one packet. Every descriptor that came is returned, or dropped with an error.
func receive(c *net.UnixConn, v any, drop func([]int)) ([]int, error) {
	b := make([]byte, maxPacket)
	n, fds, err := packets.Receive(c, b, MaxFiles, errProtocol, drop)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b[:n], v); err != nil {
		drop(fds)
		return nil, fmt.Errorf("%w: %w", errProtocol, err)
	}
	return fds, nil
}

// Identity is what the kernel knows of a descriptor without asking anybody.
type Identity struct {
	Major, Minor uint32
	Mode         uint16
	ReadOnly     bool // open for reading, and for nothing else
}

// Identify looks at a descriptor of unknown origin.
func Identify(fd int) (Identity, error) {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return Identity{}, err
	}
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st); err != nil {
		return Identity{}, err
	}
	return Identity{
		Major: st.Dev_major, Minor: st.Dev_minor, Mode: st.Mode,
		ReadOnly: flags&unix.O_ACCMODE == unix.O_RDONLY && flags&unix.O_PATH == 0,
	}, nil
}

// Regular says whether it is of a regular file.
func (i Identity) Regular() bool { return i.Mode&unix.S_IFMT == unix.S_IFREG }
