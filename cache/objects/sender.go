package objects

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/gateway"
)

type senderKey struct{}

// WithSender notes over which connection the requests of a context come: from a client of the gateway, or
// from another worker. A connection of TLS is looked through.
func WithSender(ctx context.Context, nc net.Conn) context.Context {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		nc = t.NetConn()
	}
	return context.WithValue(ctx, senderKey{}, nc)
}

var errLeft = fmt.Errorf("%w: %w", gateway.ErrLeft, io.ErrUnexpectedEOF)

// waits fails when the sender of a request gave up, which closes its connection. A worker that hung finds
// requests in its connections that others have carried out since, and must do nothing of them: it would
// delete, or write over, what was acknowledged meanwhile. So every write is asked this right before the
// bucket, or another worker, is told of it. net/http notices too, but in its own time. That the connection
// was closed shows whatever of it is still to be read: TLS says farewell before.
func waits(ctx context.Context) error {
	if ctx.Err() != nil {
		return errLeft
	}
	sc, ok := ctx.Value(senderKey{}).(syscall.Conn)
	if !ok {
		return nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return errLeft // closed
	}
	closed := false
	err = rc.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, _ := unix.Poll(p, 0) // an error leaves it to net/http
		closed = n > 0 && p[0].Revents != 0
	})
	if err != nil || closed {
		return errLeft
	}
	return nil
}

// waited is the content of a write. It ends well only while whoever sends it waits for the answer.
type waited struct {
	ctx context.Context
	r   io.Reader
}

func (w waited) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if err == io.EOF {
		if gone := waits(w.ctx); gone != nil {
			err = gone
		}
	}
	return n, err
}

// bodyStall is how long another worker may take to send the next bytes of a put: longer than it gives its
// own client for them.
const bodyStall = 3 * time.Minute

// sent is the content of a put that was passed on.
type sent struct {
	content *unframer
	err     error
}

func contentOf(w http.ResponseWriter, r *http.Request) *sent {
	return &sent{content: newUnframer(stalling{r.Body, http.NewResponseController(w)})}
}

func (s *sent) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.content.Read(p)
	if err == io.EOF {
		// What comes after the last frame is the end of the body: nothing else may be left in the connection.
		if _, err = io.Copy(io.Discard, s.content.r); err == nil {
			err = io.EOF
		}
	}
	s.err = err
	return n, err
}

// stalling is the body of a request that ends when nothing comes.
type stalling struct {
	r io.Reader
	c *http.ResponseController
}

func (s stalling) Read(p []byte) (int, error) {
	if err := s.c.SetReadDeadline(time.Now().Add(bodyStall)); err != nil {
		return 0, err
	}
	return s.r.Read(p)
}
