package sidecar

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stepcache/stepcache/csi/broker"
)

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
