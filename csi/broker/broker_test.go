package broker

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/csi/packets"
)

// answering is a node service at a socket.
func answering(t *testing.T, handle func(*Request) Reply) (path string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "b") // a socket's path has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "node.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []*net.UnixConn
	wg.Go(func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() { _ = Answer(c, handle, packets.CloseAll); c.Close() })
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
		os.RemoveAll(dir)
	})
	return path
}

func dial(t *testing.T, path string) *Conn {
	t.Helper()
	c, err := Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// ends waits until nobody has the write end any more.
func ends(t *testing.T, r *os.File) {
	t.Helper()
	if err := r.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the descriptor is still held: %v", err)
	}
}

func TestQuestionsAndAnswers(t *testing.T) {
	r, w := pipe(t)
	path := answering(t, func(q *Request) Reply {
		switch q.Op {
		case OpVolumes:
			return Reply{Volumes: []Volume{{Name: "a", Dataset: "argo/genomes", Served: true}}}
		case OpClaim:
			f, err := os.Open("/dev/null")
			if err != nil {
				return Reply{Error: err.Error()}
			}
			if q.Fresh {
				return Reply{Files: []*os.File{f}}
			}
			return Reply{Error: "not " + q.Volume, Files: []*os.File{f}} // which must not leak
		case OpServe:
			return Reply{Kept: len(q.FDs) == 2}
		case OpRegister:
			if q.Volume == "refused" {
				return Reply{Error: "the kernel refused", Errno: int(syscall.EPERM)}
			}
			return Reply{ID: int32(40 + len(q.FDs))}
		case OpUnregister:
			return Reply{Error: "unregister " + q.Volume}
		}
		return Reply{}
	})
	c := dial(t, path)
	v, err := c.Volumes()
	if err != nil || len(v) != 1 || v[0] != (Volume{"a", "argo/genomes", true}) {
		t.Errorf("%v %v", v, err)
	}
	if _, _, _, err := c.Claim("a", false); err == nil || !strings.Contains(err.Error(), "not a") {
		t.Error(err)
	}
	conn, table, settings, err := c.Claim("a", true)
	if err != nil || table != nil || settings != nil {
		t.Fatal(err)
	}
	conn.Close()
	if kept, err := c.Serve("a", w, w); err != nil || !kept {
		t.Error(kept, err)
	}
	if id, err := c.Register("a", int(w.Fd())); err != nil || id != 41 {
		t.Error(id, err)
	}
	var errno syscall.Errno
	if _, err := c.Register("refused", int(w.Fd())); !errors.As(err, &errno) || errno != syscall.EPERM {
		t.Error(err)
	}
	if err := c.Unregister("b", 1); err == nil || errors.As(err, &errno) || !strings.Contains(err.Error(), "unregister b") {
		t.Error(err)
	}
	if err := errors.Join(c.Ready(), c.Leave()); err != nil {
		t.Error(err)
	}
	w.Close()
	ends(t, r) // all that was sent is closed
}

func TestEndsAreSeen(t *testing.T) {
	hold := make(chan struct{})
	path := answering(t, func(q *Request) Reply {
		if q.Op == OpReady {
			<-hold
		}
		return Reply{}
	})
	defer close(hold)
	if _, err := Dial(context.Background(), path+"x"); err == nil {
		t.Error("connected to nothing")
	}
	c := dial(t, path)
	// No answer in time: the next one would be taken for another's.
	if err := c.Ready(); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
	<-c.Done()
	if _, err := c.Volumes(); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
}

func TestBadPacketsEndTheConnection(t *testing.T) {
	r, w := pipe(t)
	path := answering(t, func(*Request) Reply { t.Error("it was answered"); return Reply{} })
	for what, write := range map[string]func(*net.UnixConn) error{
		"no JSON": func(c *net.UnixConn) error { return send(c, "text", []int{int(w.Fd())}) },
		"too many descriptors": func(c *net.UnixConn) error {
			return send(c, Request{Op: OpServe}, []int{int(w.Fd()), int(w.Fd()), int(w.Fd()), int(w.Fd())})
		},
		"far too many": func(c *net.UnixConn) error {
			fds := make([]int, 200)
			for i := range fds {
				fds[i] = int(w.Fd())
			}
			return send(c, Request{Op: OpServe}, fds)
		},
		"too long": func(c *net.UnixConn) error { _, err := c.Write(make([]byte, maxPacket+1)); return err },
	} {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		if err := write(c); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 10)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %d bytes, %v", what, n, err)
		}
		c.Close()
	}
	w.Close()
	ends(t, r)
}

func TestIdentify(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path              string
		flags             int
		regular, readOnly bool
	}{
		{path, unix.O_RDONLY, true, true}, {path, unix.O_RDWR, true, false}, {path, unix.O_WRONLY, true, false},
		{path, unix.O_PATH, true, false}, {dir, unix.O_RDONLY, false, true}, {dir, unix.O_PATH, false, false},
	} {
		fd, err := unix.Open(c.path, c.flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		id, err := Identify(fd)
		unix.Close(fd)
		if err != nil || id.Regular() != c.regular || id.ReadOnly != c.readOnly || id.Major != unix.Major(st.Dev) || id.Minor != unix.Minor(st.Dev) {
			t.Errorf("%s %#x: %+v %v", c.path, c.flags, id, err)
		}
	}
	if _, err := Identify(-1); err == nil {
		t.Error("-1 was identified")
	}
}
