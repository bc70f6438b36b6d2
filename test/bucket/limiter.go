package bucket

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// chunk is how many bytes the limiter passes on at once.
const chunk = 64 << 10

// Limiter is a TCP proxy whose connections share one bandwidth towards the clients, and that waits
// before the first byte of every answer. What clients send is not limited.
type Limiter struct {
	listener net.Listener
	dial     func() (net.Conn, error)
	rate     *rate.Limiter // nil: no limit
	first    time.Duration
	sent     atomic.Int64
	answers  atomic.Int64
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup
}

// Limit listens on a free port of the loopback interface in front of the given address.
func Limit(network, address string, bytesPerSecond int64, first time.Duration) (*Limiter, error) {
	return limitAt("", network, address, bytesPerSecond, first)
}

// limitAt listens on a given address; empty: a free port of the loopback interface.
func limitAt(listen, network, address string, bytesPerSecond int64, first time.Duration) (*Limiter, error) {
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, err
	}
	l := &Limiter{listener: ln, first: first, dial: func() (net.Conn, error) { return net.Dial(network, address) }}
	if bytesPerSecond > 0 {
		l.rate = rate.NewLimiter(rate.Limit(bytesPerSecond), 4*chunk)
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Go(l.accept)
	return l, nil
}

// Addr is the host:port it listens on.
func (l *Limiter) Addr() string { return l.listener.Addr().String() }

// Sent counts the bytes passed to clients.
func (l *Limiter) Sent() int64 { return l.sent.Load() }

// Answers counts the answers begun.
func (l *Limiter) Answers() int64 { return l.answers.Load() }

// Close ends every connection and waits for them.
func (l *Limiter) Close() {
	l.cancel()
	_ = l.listener.Close()
	l.wg.Wait()
}

func (l *Limiter) accept() {
	for {
		c, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.wg.Go(func() { l.serve(c) })
	}
}

func (l *Limiter) serve(client net.Conn) {
	defer client.Close()
	server, err := l.dial()
	if err != nil {
		return
	}
	defer server.Close()
	stop := context.AfterFunc(l.ctx, func() { client.Close(); server.Close() })
	defer stop()
	// asked is set by bytes of the client and cleared by the first bytes of the answer to them.
	var asked atomic.Bool
	l.wg.Go(func() {
		defer server.Close()
		buf := make([]byte, chunk)
		for {
			n, err := client.Read(buf)
			if n > 0 {
				asked.Store(true)
				if _, err := server.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	})
	buf := make([]byte, chunk)
	for {
		n, err := server.Read(buf)
		if n > 0 && l.pass(client, buf[:n], &asked) != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

func (l *Limiter) pass(client io.Writer, p []byte, asked *atomic.Bool) error {
	if asked.Swap(false) {
		l.answers.Add(1)
		if l.first > 0 {
			select {
			case <-time.After(l.first):
			case <-l.ctx.Done():
				return l.ctx.Err()
			}
		}
	}
	if l.rate != nil {
		if err := l.rate.WaitN(l.ctx, len(p)); err != nil {
			return errors.New("closed")
		}
	}
	// Counted before, since a client that has the bytes may ask at once; what did not pass is taken off again.
	l.sent.Add(int64(len(p)))
	n, err := client.Write(p)
	l.sent.Add(int64(n - len(p)))
	return err
}
