package sidecar

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stepcache/stepcache/csi/broker"
)

// A socket that is there and not to be reached is told from one that is not there.
func TestWhyTheNodeServiceIsNotReached(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	says := func(want string) {
		t.Helper()
		if err := ReadyLent(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ready: %v; want %q", err, want)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r, w := io.Pipe()
		defer r.Close()
		go func() { // ends with ctx
			a := &attendant{o: LentOptions{Socket: path, Logger: slog.New(slog.NewTextHandler(w, nil))}}
			_, _ = a.dial(ctx)
			w.Close()
		}()
		if line, err := bufio.NewReader(r).ReadString('\n'); err != nil || !strings.Contains(line, want) {
			t.Errorf("%s %v; want %q", line, err, want)
		}
	}
	says("no node service on this node")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	says("gVisor, Kata")
	if got := unreached(&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EACCES)}); !strings.Contains(got, "SELinux") || !strings.Contains(got, "csi or stage") {
		t.Error(got)
	}
}

// A node service that is being replaced is not the kernel's refusal, which would be for good.
func TestABrokenConnectionIsNoRefusalOfPassthrough(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := broker.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	// What is sent breaks (EPIPE) before anything else says that the connection has ended.
	if err := peer.CloseRead(); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	m := &lentMount{a: &attendant{o: LentOptions{Logger: slog.New(slog.DiscardHandler)}, conn: conn}, volume: "v"}
	_, err = m.Register(int(file.Fd()))
	if errno := syscall.Errno(0); !errors.Is(err, broker.ErrGone) || errors.As(err, &errno) {
		t.Errorf("%v (errno %d)", err, errno)
	}
}
