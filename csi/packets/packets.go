// Package packets is how processes of a node hand each other descriptors: packets over a SOCK_SEQPACKET socket,
// and a client's end of one, with one request at a time.
//
// It knows nothing of what the packets say. What arrives may be hostile: descriptors are numbers here, looked at
// by nobody, and every one that came is returned or dropped.
//
// Concurrency: everything is safe for concurrent use. Failure: a Link that breaks, and one whose answer is late, is
// over (Done). It may import golang.org/x/sys/unix and nothing of this module.
package packets

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Send sends one packet; the descriptors stay the caller's.
func Send(c *net.UnixConn, b []byte, fds []int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := c.WriteMsgUnix(b, oob, nil)
	return err
}

// Receive reads one packet into b. One that is longer, that has more than so many descriptors, or whose
// descriptors cannot be told is an error that wraps protocol; drop closes what came with it.
func Receive(c *net.UnixConn, b []byte, maxFDs int, protocol error, drop func([]int)) (n int, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(4*(maxFDs+1)))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if oobn > 0 {
		msgs, perr := unix.ParseSocketControlMessage(oob[:oobn])
		for i := range msgs {
			got, rerr := unix.ParseUnixRights(&msgs[i])
			if rerr != nil {
				perr = errors.Join(perr, rerr)
				continue
			}
			fds = append(fds, got...)
		}
		if err == nil && perr != nil {
			err = fmt.Errorf("%w: %w", protocol, perr)
		}
	}
	if err == nil && (flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(fds) > maxFDs) {
		err = fmt.Errorf("%w: a packet that is too long", protocol)
	}
	if err != nil {
		drop(fds)
		return 0, nil, err
	}
	return n, fds, nil
}

// CloseAll closes descriptors, but for those that are -1.
func CloseAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Link is a client's connection; P is what an answer is.
type Link[P any] struct {
	conn    *net.UnixConn
	receive func(*net.UnixConn) (P, error)
	drop    func(P) // closes what is in an answer that nobody takes
	gone    error
	turn    chan struct{}
	answers chan P
	done    chan struct{}
	once    sync.Once
	ended   chan struct{} // closed by read
}

// Dial connects to the socket at a path. gone is what the errors of a Link that is over wrap.
func Dial[P any](ctx context.Context, path string, receive func(*net.UnixConn) (P, error), drop func(P), gone error) (*Link[P], error) {
	nc, err := new(net.Dialer).DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, err
	}
	l := &Link[P]{
		conn: nc.(*net.UnixConn), receive: receive, drop: drop, gone: gone,
		turn: make(chan struct{}, 1), answers: make(chan P), done: make(chan struct{}), ended: make(chan struct{}),
	}
	go l.read() // ends with the connection; Close waits for it
	return l, nil
}

// read hands out what arrives; it also notices the other end's end while nobody asks for anything.
func (l *Link[P]) read() {
	defer close(l.ended)
	defer l.End()
	for {
		p, err := l.receive(l.conn)
		if err != nil {
			return
		}
		select {
		case l.answers <- p:
		case <-l.done:
			l.drop(p)
			return
		}
	}
}

// Done is closed when the connection has ended: the other end is gone, or Close or End was called.
func (l *Link[P]) Done() <-chan struct{} { return l.done }

// Close ends the connection.
func (l *Link[P]) Close() {
	l.End()
	<-l.ended
}

// End ends the connection and waits for nothing.
func (l *Link[P]) End() {
	l.once.Do(func() {
		close(l.done)
		l.conn.Close()
	})
}

// Turn waits until no other request is under way. next must be called when this one is answered.
func (l *Link[P]) Turn() (next func(), err error) {
	select {
	case l.turn <- struct{}{}:
		return func() { <-l.turn }, nil
	case <-l.done:
		return nil, l.gone
	}
}

// Ask sends a request by send, for which the caller has the turn, and waits for its answer, or its first.
func (l *Link[P]) Ask(timeout time.Duration, send func(*net.UnixConn) error) (P, error) {
	err := l.conn.SetWriteDeadline(time.Now().Add(timeout))
	if err == nil {
		err = send(l.conn)
	}
	if err != nil {
		l.End()
		var none P
		return none, fmt.Errorf("%w: %w", l.gone, err)
	}
	return l.Answer(timeout)
}

// Answer waits for one packet. A late one would be taken for the next request's, so the connection ends.
func (l *Link[P]) Answer(timeout time.Duration) (none P, err error) {
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case p := <-l.answers:
		return p, nil
	case <-l.done:
		return none, l.gone
	case <-t.C:
		l.End()
		return none, fmt.Errorf("%w: no answer within %v", l.gone, timeout)
	}
}
