package objects

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// sender is the worker that a request came from, as its connection shows it.
type sender struct {
	conn    net.Conn
	control *http.ResponseController
}

type senderKey struct{}

func senderOf(r *http.Request) *sender { return r.Context().Value(senderKey{}).(*sender) }

// withConn notes which connection a request came over.
func withConn(r *http.Request, nc net.Conn) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), senderKey{}, &sender{conn: nc}))
}

var errLeft = fmt.Errorf("%w: the worker that asked gave up", io.ErrUnexpectedEOF)

// waits fails when the sender of a request gave up, which closes its connection. A worker that hung finds
// requests in its connections that others have carried out since, and must do nothing of them: it would
// delete, or write over, what was acknowledged meanwhile. So every write is asked this right before the
// bucket is told of it. net/http notices too, but in its own time. All of the body has been read.
func (s *sender) waits(ctx context.Context) error {
	if ctx.Err() != nil {
		return errLeft
	}
	sc, ok := s.conn.(syscall.Conn)
	if !ok {
		return nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return errLeft // closed
	}
	var n int
	var got error
	err = rc.Control(func(fd uintptr) {
		var one [1]byte
		n, _, got = unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	})
	if err == nil && (n > 0 || errors.Is(got, unix.EAGAIN) || errors.Is(got, unix.EINTR)) {
		return nil
	}
	return errLeft
}

// bodyStall is how long another worker may take to send the next bytes of a put: longer than it gives its
// own client for them.
const bodyStall = 3 * time.Minute

// sent is the content of a put that was passed on. It ends well only while the sender waits for the put.
type sent struct {
	r       *http.Request
	content *unframer
	err     error
}

func contentOf(r *http.Request) *sent {
	return &sent{r: r, content: newUnframer(stalling{r.Body, senderOf(r).control})}
}

func (s *sent) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.content.Read(p)
	if err == io.EOF {
		// What comes after the last frame is the end of the body: nothing else may be left in the connection.
		if _, err = io.Copy(io.Discard, s.content.r); err == nil {
			if err = senderOf(s.r).waits(s.r.Context()); err == nil {
				err = io.EOF
			}
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
