package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/csi/packets"
)

// ErrGone: there is no node service at the other end any more.
var ErrGone = errors.New("the node service is gone")

const (
	// answerTimeout is how long an answer may take that needs a mount to be made.
	answerTimeout = 20 * time.Second
	// registerTimeout is how long one may take for which a file's open waits.
	registerTimeout = 5 * time.Second
	// leaveTimeout is less than the two seconds that the kubelet leaves a container at its end.
	leaveTimeout = 1500 * time.Millisecond
)

// Conn is a server's connection to the node service. Close ends it, and what this process serves counts as unserved.
type Conn struct{ *packets.Link[answer] }

type answer struct {
	reply Reply
	fds   []int
}

// Dial connects to the node service at a socket.
func Dial(ctx context.Context, path string) (*Conn, error) {
	l, err := packets.Dial(ctx, path,
		func(c *net.UnixConn) (a answer, err error) {
			a.fds, err = receive(c, &a.reply, packets.CloseAll)
			return a, err
		},
		func(a answer) { packets.CloseAll(a.fds) }, ErrGone)
	if err != nil {
		return nil, fmt.Errorf("node service: %w", err)
	}
	return &Conn{l}, nil
}

// ask makes a request; the descriptors stay the caller's.
func (c *Conn) ask(r Request, timeout time.Duration, fds ...int) (Reply, []int, error) {
	fail := func(err error) (Reply, []int, error) {
		return Reply{}, nil, fmt.Errorf("node service: %s: %w", r.Op, err)
	}
	next, err := c.Turn()
	if err != nil {
		return fail(err)
	}
	defer next()
	a, err := c.Ask(timeout, func(nc *net.UnixConn) error { return send(nc, r, fds) })
	switch {
	case err != nil:
		return fail(err)
	case a.reply.Error == "":
		return a.reply, a.fds, nil
	}
	packets.CloseAll(a.fds)
	if a.reply.Errno != 0 {
		return fail(fmt.Errorf("%s: %w", a.reply.Error, syscall.Errno(a.reply.Errno)))
	}
	return fail(errors.New(a.reply.Error))
}

// do makes a request whose answer has no descriptors.
func (c *Conn) do(r Request, timeout time.Duration, fds ...int) (Reply, error) {
	reply, got, err := c.ask(r, timeout, fds...)
	packets.CloseAll(got)
	return reply, err
}

// Volumes lists the mounts of this pod.
func (c *Conn) Volumes() ([]Volume, error) {
	r, err := c.do(Request{Op: OpVolumes}, answerTimeout)
	return r.Volumes, err
}

// Claim returns the connection of a mount, to be served from now on by this process. table and settings are
// nil for one that nobody has served, and are what a predecessor gave otherwise.
func (c *Conn) Claim(volume string, fresh bool) (conn, table, settings *os.File, err error) {
	_, fds, err := c.ask(Request{Op: OpClaim, Volume: volume, Fresh: fresh}, answerTimeout)
	if err != nil {
		return nil, nil, nil, err
	}
	if len(fds) != 1 && len(fds) != 3 {
		packets.CloseAll(fds)
		c.End()
		return nil, nil, nil, fmt.Errorf("node service: claim: %w: %d descriptors", errProtocol, len(fds))
	}
	conn = os.NewFile(uintptr(fds[0]), "/dev/fuse")
	if len(fds) == 3 {
		table, settings = os.NewFile(uintptr(fds[1]), "open-files"), os.NewFile(uintptr(fds[2]), "settings")
	}
	return conn, table, settings, nil
}

// Serve says that this process serves a mount. kept says whether the node service has the mount's connection,
// without which there is no successor and no passthrough.
func (c *Conn) Serve(volume string, table, settings *os.File) (kept bool, err error) {
	r, err := c.do(Request{Op: OpServe, Volume: volume}, answerTimeout, int(table.Fd()), int(settings.Fd()))
	return r.Kept, err
}

// Register registers a file for passthrough. The kernel's refusal is a syscall.Errno.
func (c *Conn) Register(volume string, fd int) (int32, error) {
	r, err := c.do(Request{Op: OpRegister, Volume: volume}, registerTimeout, fd)
	return r.ID, err
}

// Unregister ends what Register began.
func (c *Conn) Unregister(volume string, id int32) error {
	_, err := c.do(Request{Op: OpUnregister, Volume: volume, ID: id}, registerTimeout)
	return err
}

// Ready says whether all mounts of this pod are served, by an error that says which is not.
func (c *Conn) Ready() error {
	_, err := c.do(Request{Op: OpReady}, registerTimeout)
	return err
}

// Leave ends the mounts that this process serves: who still uses them gets errors, and nobody waits.
func (c *Conn) Leave() error {
	_, err := c.do(Request{Op: OpLeave}, leaveTimeout)
	return err
}

// DialWorker connects to a worker's socket through the node service at path, over a connection of its own.
func DialWorker(ctx context.Context, path, addr string) (net.Conn, error) {
	c, err := Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, c.End)()
	_, fds, err := c.ask(Request{Op: OpDial, Addr: addr}, registerTimeout)
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		packets.CloseAll(fds)
		return nil, fmt.Errorf("node service: dial: %w: %d descriptors", errProtocol, len(fds))
	}
	unix.CloseOnExec(fds[0])
	f := os.NewFile(uintptr(fds[0]), addr)
	defer f.Close()
	return net.FileConn(f)
}
