package wire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func packets(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	x, y := ends(t, "unixpacket")
	return x.(*net.UnixConn), y.(*net.UnixConn)
}

func file(t *testing.T, flag int) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func openFiles(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func TestDescriptorTravelsWithItsPacket(t *testing.T) {
	a, b := packets(t)
	frame := AppendFrame(nil, Reply{ID: 4, Off: 9}, nil)
	if err := SendWithFD(a, frame, file(t, os.O_RDONLY)); err != nil {
		t.Fatal(err)
	}
	if err := SendWithFD(a, frame, nil); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, MaxPacket)
	n, f, err := ReceiveWithFD(b, buf, nil)
	if err != nil || n != len(frame) || f == nil {
		t.Fatalf("%d bytes, %v, %v", n, f, err)
	}
	defer f.Close()
	if content, err := io.ReadAll(f); err != nil || string(content) != "content" {
		t.Errorf("%q, %v", content, err)
	}
	if fl, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || fl&unix.FD_CLOEXEC == 0 {
		t.Errorf("not close-on-exec: %v, %v", fl, err)
	}
	if _, f, err := ReceiveWithFD(b, buf, nil); err != nil || f != nil {
		t.Errorf("packet without a descriptor: %v, %v", f, err)
	}
	a.Close()
	if _, _, err := ReceiveWithFD(b, buf, nil); !errors.Is(err, io.EOF) {
		t.Errorf("after the peer closed: %v", err)
	}
}

func TestHostileDescriptorsAreRefusedAndClosed(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	ro := file(t, os.O_RDONLY)
	opath, err := unix.Open(ro.Name(), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(opath)
	for name, fds := range map[string][]int{
		"writable":  {int(file(t, os.O_RDWR).Fd())},
		"directory": {int(dir.Fd())},
		"device":    {int(null.Fd())},
		"path only": {opath},
		"two":       {int(ro.Fd()), int(ro.Fd())},
		"many":      {int(ro.Fd()), int(ro.Fd()), int(ro.Fd()), int(ro.Fd()), int(ro.Fd()), int(ro.Fd()), int(ro.Fd())},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := packets(t)
			before := openFiles(t)
			if _, _, err := a.WriteMsgUnix([]byte("x"), unix.UnixRights(fds...), nil); err != nil {
				t.Fatal(err)
			}
			if _, f, err := ReceiveWithFD(b, make([]byte, MaxPacket), nil); !errors.Is(err, ErrCorrupt) || f != nil {
				t.Errorf("got %v, %v", f, err)
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d descriptors open, %d before", after, before)
			}
		})
	}
	// Each is inspected, also of those that are refused anyway, while it is still open.
	for fds, want := range map[int]error{1: errors.New("a mount of its own"), 2: ErrCorrupt} {
		a, b := packets(t)
		sent := []int{int(ro.Fd()), int(ro.Fd())}[:fds]
		if _, _, err := a.WriteMsgUnix([]byte("x"), unix.UnixRights(sent...), nil); err != nil {
			t.Fatal(err)
		}
		before, inspected := openFiles(t), 0
		_, f, err := ReceiveWithFD(b, make([]byte, MaxPacket), func(fd int) error {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil {
				t.Error(err)
			}
			inspected++
			return want
		})
		if !errors.Is(err, ErrCorrupt) || !errors.Is(err, want) || f != nil || inspected != fds {
			t.Errorf("%d descriptors: %v, %v, %d inspected", fds, f, err, inspected)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d descriptors open, %d before", after, before)
		}
	}
	t.Run("too long a packet", func(t *testing.T) {
		a, b := packets(t)
		before := openFiles(t)
		if err := SendWithFD(a, make([]byte, 100), ro); err != nil {
			t.Fatal(err)
		}
		if _, _, err := ReceiveWithFD(b, make([]byte, 50), nil); !errors.Is(err, ErrCorrupt) {
			t.Errorf("got %v", err)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d descriptors open, %d before", after, before)
		}
	})
	t.Run("the longest message", func(t *testing.T) {
		a, b := packets(t)
		text := Text(strings.Repeat("x", 2*MaxMessage))
		if err := SendWithFD(a, AppendFrame(nil, Reply{Status: Internal}, text), nil); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, MaxPacket)
		n, _, err := ReceiveWithFD(b, buf, nil)
		if err != nil {
			t.Fatal(err)
		}
		if rep, got, err := ReadFrame(bytes.NewReader(buf[:n])); err != nil || rep.Status != Internal || !bytes.Equal(got, text) {
			t.Errorf("status %v, %d bytes of %d: %v", rep.Status, len(got), len(text), err)
		}
	})
	if a, _ := packets(t); SendWithFD(a, make([]byte, MaxPacket+1), nil) == nil {
		t.Error("a packet that nobody can receive was sent")
	}
}

func TestPeerUID(t *testing.T) {
	a, _ := packets(t)
	if uid, err := PeerUID(a); err != nil || int(uid) != os.Getuid() {
		t.Errorf("%d, %v", uid, err)
	}
}
