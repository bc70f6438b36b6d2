package gateway_test

import (
	"bufio"
	"net"
	"strings"
	"testing"
	"time"
)

// dial opens a connection of its own to the gateway, which no wait outlasts.
func (f *fixture) dial(t testing.TB) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c
}

// raw sends bytes and returns the answer's first line.
func (f *fixture) raw(t testing.TB, text string) string {
	t.Helper()
	c := f.dial(t)
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return line
}
