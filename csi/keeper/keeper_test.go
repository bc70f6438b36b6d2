package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// run starts a keeper; stop ends it and waits.
func run(t *testing.T, path string) (stop func()) {
	t.Helper()
	return runWith(t, path, slog.New(slog.DiscardHandler))
}

func runWith(t *testing.T, path string, log *slog.Logger) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, path, log) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	eventually(t, "the socket", func() bool { _, err := os.Lstat(path); return err == nil })
	return stop
}

// writer is what a log is written to.
type writer func(p []byte)

func (w writer) Write(p []byte) (int, error) {
	w(p)
	return len(p), nil
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func socket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "k") // not below TMPDIR: a socket's path has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "keeper.sock")
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

// pipe returns both ends: whether somebody has the write end is seen at the read end.
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

func names(t *testing.T, c *Conn) string {
	t.Helper()
	all, err := c.List()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range all {
		fmt.Fprintf(&b, "%s:%d ", e.Name, len(e.Files))
		e.Close()
	}
	return strings.TrimSpace(b.String())
}

func TestWhatIsParkedOutlivesItsOwner(t *testing.T) {
	path := socket(t)
	run(t, path)
	c := dial(t, path)
	r, w := pipe(t)
	if err := c.Park("a", w, w); err != nil {
		t.Fatal(err)
	}
	if err := c.Park("b", w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	c.Close()

	c = dial(t, path)
	if got := names(t, c); got != "a:2 b:1" {
		t.Fatalf("list %q", got)
	}
	all, err := c.List()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := all[1].Files[0].Write([]byte("x")); err != nil {
		t.Error(err)
	}
	b := make([]byte, 1)
	if _, err := r.Read(b); err != nil || b[0] != 'x' {
		t.Errorf("%q %v", b, err)
	}
	for _, e := range all {
		e.Close()
	}
	for _, name := range []string{"a", "b", "b", "never"} {
		if err := c.Drop(name); err != nil {
			t.Error(err)
		}
	}
	ends(t, r)
	if got := names(t, c); got != "" {
		t.Errorf("list %q", got)
	}
}

func TestParkingAgainReplaces(t *testing.T) {
	path := socket(t)
	stop := run(t, path)
	c := dial(t, path)
	r1, w1 := pipe(t)
	r2, w2 := pipe(t)
	if err := c.Park("a", w1); err != nil {
		t.Fatal(err)
	}
	w1.Close()
	if err := c.Park("a", w2); err != nil {
		t.Fatal(err)
	}
	w2.Close()
	ends(t, r1)
	stop()
	ends(t, r2)
	<-c.Done()
	if err := c.Park("b", r1); !errors.Is(err, ErrGone) {
		t.Errorf("park at a keeper that is gone: %v", err)
	}
	if _, err := c.List(); !errors.Is(err, ErrGone) {
		t.Errorf("list of a keeper that is gone: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestASuccessorTakesTheSocket(t *testing.T) {
	path := socket(t)
	stop := run(t, path)
	before, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	run(t, path)
	eventually(t, "another socket", func() bool { now, err := os.Lstat(path); return err == nil && !os.SameFile(before, now) })
	stop()
	if got := names(t, dial(t, path)); got != "" {
		t.Errorf("list %q", got)
	}
}

func TestBadClientsLoseTheirConnectionOnly(t *testing.T) {
	path := socket(t)
	run(t, path)
	good := dial(t, path)
	r, w := pipe(t)
	if err := good.Park("kept", w); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what   string
		packet []byte
		files  int
	}{
		{"an unknown kind", []byte("Xname"), 1},
		{"a packet that is too long", append([]byte("P"), make([]byte, 4000)...), 1},
		{"too many descriptors", []byte("Pname"), MaxFiles + 1},
	} {
		conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		files := make([]*os.File, c.files)
		for i := range files {
			files[i] = w
		}
		if c.what == "a packet that is too long" {
			_, err = conn.Write(c.packet)
		} else {
			err = send(conn, c.packet[0], string(c.packet[1:]), files)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 100)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %d bytes, %v", c.what, n, err)
		}
		conn.Close()
	}
	// What can be refused is, and the connection goes on.
	for _, c := range []struct{ name, want string }{{"", "name"}, {strings.Repeat("x", MaxName+1), "name"}, {"a\x00b", "name"}} {
		if err := good.Park(c.name, w); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("name %q: %v", c.name, err)
		}
	}
	if err := good.Park("nothing"); err == nil || !strings.Contains(err.Error(), "carries descriptors") {
		t.Error(err)
	}
	if err := good.Park("much", make([]*os.File, MaxFiles+1)...); err == nil {
		t.Error("too many files were parked")
	}
	if got := names(t, good); got != "kept:1" {
		t.Errorf("list %q", got)
	}
	if err := good.Drop("kept"); err != nil {
		t.Error(err)
	}
	w.Close()
	ends(t, r)
}

// A connection for which there is no descriptor ends nothing.
func TestAConnectionThatCannotBeAcceptedEndsNothing(t *testing.T) {
	path := socket(t)
	tried := make(chan struct{})
	once := sync.OnceFunc(func() { close(tried) })
	runWith(t, path, slog.New(slog.NewTextHandler(writer(func(p []byte) {
		if strings.Contains(string(p), "not accepted") {
			once()
		}
	}), nil)))
	good := dial(t, path)
	_, w := pipe(t)
	if err := good.Park("kept", w); err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	next, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	scarce := limit
	scarce.Cur = uint64(next) + 1 // which this end of the connection takes
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &scarce); err != nil {
		t.Fatal(err)
	}
	restore := sync.OnceFunc(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	})
	defer restore()
	late := dial(t, path)
	select {
	case <-tried:
	case <-time.After(time.Minute):
		t.Error("the keeper had a descriptor for it")
	}
	restore()
	if got := names(t, late); got != "kept:1" {
		t.Errorf("list %q", got)
	}
}

func TestManyAtOnce(t *testing.T) {
	path := socket(t)
	run(t, path)
	_, w := pipe(t)
	var wg sync.WaitGroup
	for k := range 4 {
		c := dial(t, path)
		for n := range 4 {
			wg.Go(func() {
				for i := range 20 {
					name := fmt.Sprintf("%d-%d-%d", k, n, i)
					if err := c.Park(name, w); err != nil {
						t.Error(err)
						return
					}
					all, err := c.List()
					if err != nil {
						t.Error(err)
						return
					}
					found := false
					for _, e := range all {
						found = found || e.Name == name
						e.Close()
					}
					if !found {
						t.Errorf("%s is not listed", name)
					}
					if err := c.Drop(name); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	wg.Wait()
	if got := names(t, dial(t, path)); got != "" {
		t.Errorf("list %q", got)
	}
}

func TestWhatIsInTheWayIsAnError(t *testing.T) {
	path := socket(t)
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run(context.Background(), path, nil); err == nil || !strings.Contains(err.Error(), "something else") {
		t.Error(err)
	}
	if _, err := Dial(context.Background(), path); err == nil {
		t.Error("connected to a file")
	}
}
