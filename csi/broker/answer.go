package broker

import (
	"errors"
	"io"
	"net"
	"time"

	"github.com/stepcache/stepcache/csi/packets"
)

// writeTimeout is how long a server may leave an answer unread.
const writeTimeout = 10 * time.Second

// Answer answers the requests of one connection until it ends or breaks the protocol. The connection is the
// caller's to close, from another goroutine to end this. drop closes the descriptors of a packet that is no request.
func Answer(c *net.UnixConn, handle func(*Request) Reply, drop func(fds []int)) error {
	for {
		var r Request
		fds, err := receive(c, &r, drop)
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		r.FDs = fds
		reply := handle(&r)
		packets.CloseAll(r.FDs)
		files := make([]int, len(reply.Files))
		for i, f := range reply.Files {
			files[i] = int(f.Fd())
		}
		err = c.SetWriteDeadline(time.Now().Add(writeTimeout))
		if err == nil {
			err = send(c, reply, files)
		}
		for _, f := range reply.Files {
			f.Close()
		}
		if err != nil {
			return err
		}
	}
}
