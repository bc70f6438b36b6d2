// Package ports finds ports for tests whose servers are told where to listen, or listen there again after they
// were stopped.
//
// It owns nothing: a port is free when it is looked for, and until somebody else takes it. Concurrency: functions are
// for a test's goroutine; tests may run at the same time. Failure: the test fails. It imports nothing of this project.
package ports

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
)

var next atomic.Int64

// Free are n addresses on the loopback device at which nobody listens. They are none of those that the kernel gives to
// whoever asks for any: such a one may be another test's by the time that it is listened at, or the near end of a
// connection. Where the kernel gives away all of them, it is asked.
func Free(t testing.TB, n int) []string {
	t.Helper()
	const first = 10000
	low := 0
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		fmt.Sscan(string(b), &low)
	}
	next.CompareAndSwap(0, int64(os.Getpid())*7919) // processes begin far from each other
	var out []string
	for tries := 0; len(out) < n; tries++ {
		address := "127.0.0.1:0"
		if low >= first+5000 && tries < low-first {
			address = fmt.Sprintf("127.0.0.1:%d", first+next.Add(1)%int64(low-first))
		}
		l, err := net.Listen("tcp", address)
		if errors.Is(err, syscall.EADDRINUSE) && address != "127.0.0.1:0" {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // held until all are known, so that they differ
		out = append(out, l.Addr().String())
	}
	return out
}

// FreeNumber is the number of a port at which nobody listens on the loopback device.
func FreeNumber(t testing.TB) int {
	t.Helper()
	address, err := net.ResolveTCPAddr("tcp", Free(t, 1)[0])
	if err != nil {
		t.Fatal(err)
	}
	return address.Port
}
