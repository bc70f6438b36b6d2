package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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

// Conn is a server's connection to the node service.
type Conn struct {
	conn    *net.UnixConn
	turn    chan struct{} // one request at a time
	answers chan answer
	done    chan struct{}
	once    sync.Once
	ended   chan struct{} // closed by read
}

type answer struct {
	reply Reply
	fds   []int
}

// Dial connects to the node service at a socket.
func Dial(ctx context.Context, path string) (*Conn, error) {
	nc, err := new(net.Dialer).DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("node service: %w", err)
	}
	c := &Conn{conn: nc.(*net.UnixConn), turn: make(chan struct{}, 1), answers: make(chan answer), done: make(chan struct{}), ended: make(chan struct{})}
	go c.read() // ends with the connection; Close waits for it
	return c, nil
}

// read hands out what arrives; it also notices the node service's end while nobody asks for anything.
func (c *Conn) read() {
	defer close(c.ended)
	defer c.end()
	for {
		var a answer
		var err error
		if a.fds, err = receive(c.conn, &a.reply); err != nil {
			return
		}
		select {
		case c.answers <- a:
		case <-c.done:
			closeAll(a.fds)
			return
		}
	}
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Close ends the connection, and what this process serves counts as unserved.
func (c *Conn) Close() {
	c.end()
	<-c.ended
}

func (c *Conn) end() {
	c.once.Do(func() {
		close(c.done)
		c.conn.Close()
	})
}

// ask makes a request; the descriptors stay the caller's.
func (c *Conn) ask(r Request, timeout time.Duration, fds ...int) (Reply, []int, error) {
	fail := func(err error) (Reply, []int, error) {
		return Reply{}, nil, fmt.Errorf("node service: %s: %w", r.Op, err)
	}
	select {
	case c.turn <- struct{}{}:
	case <-c.done:
		return fail(ErrGone)
	}
	defer func() { <-c.turn }()
	err := c.conn.SetWriteDeadline(time.Now().Add(timeout))
	if err == nil {
		err = send(c.conn, r, fds)
	}
	if err != nil {
		c.end()
		return fail(fmt.Errorf("%w: %w", ErrGone, err))
	}
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case a := <-c.answers:
		if a.reply.Error == "" {
			return a.reply, a.fds, nil
		}
		closeAll(a.fds)
		if a.reply.Errno != 0 {
			return fail(fmt.Errorf("%s: %w", a.reply.Error, syscall.Errno(a.reply.Errno)))
		}
		return fail(errors.New(a.reply.Error))
	case <-c.done:
		return fail(ErrGone)
	case <-t.C: // a late answer would be taken for the next request's
		c.end()
		return fail(fmt.Errorf("%w: no answer within %v", ErrGone, timeout))
	}
}

// do makes a request whose answer has no descriptors.
func (c *Conn) do(r Request, timeout time.Duration, fds ...int) (Reply, error) {
	reply, got, err := c.ask(r, timeout, fds...)
	closeAll(got)
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
		closeAll(fds)
		c.end()
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
	defer context.AfterFunc(ctx, c.end)()
	_, fds, err := c.ask(Request{Op: OpDial, Addr: addr}, registerTimeout)
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		closeAll(fds)
		return nil, fmt.Errorf("node service: dial: %w: %d descriptors", errProtocol, len(fds))
	}
	unix.CloseOnExec(fds[0])
	f := os.NewFile(uintptr(fds[0]), addr)
	defer f.Close()
	return net.FileConn(f)
}
