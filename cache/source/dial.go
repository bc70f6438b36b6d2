package source

import (
	"errors"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// deadAfter is how long a peer may leave unacknowledged what it was sent, or not read on. A connection that something on
// the way has forgotten is told of by nobody, and a list over it would be waited for as long as a store may take for one.
const deadAfter = 30 * time.Second

// Dialer connects to stores, within timeout.
func Dialer(timeout time.Duration) *net.Dialer {
	return &net.Dialer{Timeout: timeout, KeepAlive: 15 * time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) {
			set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds()))
		})
		return errors.Join(err, set)
	}}
}

// CredentialsProxy takes the proxy for those requests for credentials alone that go over TLS, to a token service. The others
// are for what the machine or its platform has at an address that no proxy reaches.
func CredentialsProxy(proxy func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(r *http.Request) (*url.URL, error) {
		if r.URL.Scheme != "https" {
			return nil, nil
		}
		return proxy(r)
	}
}
