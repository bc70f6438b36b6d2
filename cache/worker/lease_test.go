package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// receiver is a connection to a worker's socket.
type receiver struct {
	*net.UnixConn
	t  testing.TB
	id uint32
}

func (tr *tier) receive(i int) *receiver {
	tr.t.Helper()
	c, err := net.Dial("unixpacket", filepath.Join(tr.dir, fmt.Sprintf("w%d.sock", i)))
	if err != nil {
		tr.t.Fatal(err)
	}
	tr.t.Cleanup(func() { c.Close() })
	if err := wire.ClientHandshake(context.Background(), c, dataset, wire.RoleRead, tr.keys.Read[0]); err != nil {
		tr.t.Fatal(err)
	}
	return &receiver{UnixConn: c.(*net.UnixConn), t: tr.t}
}

func (c *receiver) ask(req wire.Request) (wire.Reply, *os.File, error) {
	rep, _, f, err := c.exchange(req)
	return rep, f, err
}

// exchange asks, and gives the answer with its payload.
func (c *receiver) exchange(req wire.Request) (wire.Reply, []byte, *os.File, error) {
	c.id++
	req.ID = c.id
	c.SetDeadline(time.Now().Add(patience))
	if err := wire.SendWithFD(c.UnixConn, wire.AppendRequest(nil, req), nil); err != nil {
		return wire.Reply{}, nil, nil, err
	}
	buf := make([]byte, wire.MaxPacket)
	n, f, err := wire.ReceiveWithFD(c.UnixConn, buf, nil)
	if err != nil {
		return wire.Reply{}, nil, nil, err
	}
	if f != nil {
		c.t.Cleanup(func() { f.Close() })
	}
	rep, p, err := wire.ReadFrame(bytes.NewReader(buf[:n]))
	if err == nil && rep.ID != req.ID {
		err = fmt.Errorf("answer %d to request %d", rep.ID, req.ID)
	}
	if err == nil {
		err = rep.Status.Err(string(p))
	}
	return rep, p, f, err
}

func TestALeaseHandsOutAWholeFile(t *testing.T) {
	noGoroutines(t)
	want := content(2*ring.BlockSize+5, 1)
	tr := newTier(t, map[string][]byte{"f": want, "empty": nil})
	tr.start(1)
	snap := tr.snapshot()
	c, i := tr.receive(0), index(t, snap, "/f")
	if _, _, err := c.ask(wire.Request{Op: wire.OpPing}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.ask(wire.Request{Op: wire.OpLease, Index: i}); !errors.Is(err, wire.ErrNotResident) {
		t.Fatalf("without waiting: %v", err)
	}
	rep, f, err := c.ask(wire.Request{Op: wire.OpLease, Index: i, WaitMillis: uint32(patience.Milliseconds())})
	if err != nil || f == nil || rep.Size != int64(len(want)) {
		t.Fatalf("%+v, %v, %v", rep, f, err)
	}
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if fl, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil || fl&unix.O_ACCMODE != unix.O_RDONLY {
		t.Errorf("flags %o, %v", fl, err)
	}
	w := tr.workers[0]
	eventually(t, "they are counted as opened", func() error { // after the answer
		if got := w.Status().OpenedBytes; got != int64(len(want)) {
			return fmt.Errorf("%d bytes", got)
		}
		return nil
	})
	second, _, err := tr.receive(0).ask(wire.Request{Op: wire.OpLease, Index: i})
	if err != nil {
		t.Fatalf("a second receiver: %v", err)
	}
	if n := w.store.Stats().Leases; n != 2 {
		t.Errorf("%d leases", n)
	}
	if _, _, err := c.ask(wire.Request{Op: wire.OpRelease, Off: second.Off + 7}); !errors.Is(err, source.ErrInvalid) {
		t.Errorf("released what it does not hold: %v", err)
	}
	if _, _, err := c.ask(wire.Request{Op: wire.OpRelease, Off: rep.Off}); err != nil {
		t.Errorf("release: %v", err)
	}
	if n := w.store.Stats().Leases; n != 1 {
		t.Errorf("%d leases after one was released", n)
	}
	if _, f, err := c.ask(wire.Request{Op: wire.OpLease, Index: index(t, snap, "/empty")}); err != nil || f == nil {
		t.Errorf("empty file: %v", err)
	}
	for name, req := range map[string]wire.Request{
		"directory": {Op: wire.OpLease, Index: 0}, "out of range": {Op: wire.OpLease, Index: 1 << 30}, "read": {Op: wire.OpRead, Index: i, Length: 1},
	} {
		if _, _, err := c.ask(req); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLeasesEndWithTheirConnection(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	c := tr.receive(0)
	if _, _, err := c.ask(wire.Request{Op: wire.OpLease, Index: i, WaitMillis: uint32(patience.Milliseconds())}); err != nil {
		t.Fatal(err)
	}
	c.Close()
	eventually(t, "the lease ended", func() error {
		if n := tr.workers[0].store.Stats().Leases; n != 0 {
			return fmt.Errorf("%d leases", n)
		}
		return nil
	})
}

func TestALeaseThatWaitsForAStalledBucketGivesUp(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1), "g": content(1000, 2)})
	tr.start(1)
	snap := tr.snapshot()
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error { <-ctx.Done(); return ctx.Err() })
	c := tr.receive(0)
	if _, _, err := c.ask(wire.Request{Op: wire.OpLease, Index: index(t, snap, "/f"), WaitMillis: 20}); !errors.Is(err, wire.ErrNotResident) {
		t.Fatal(err)
	}
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		return fmt.Errorf("%w: %s", source.ErrChanged, o.Key)
	})
	if _, _, err := c.ask(wire.Request{Op: wire.OpLease, Index: index(t, snap, "/g"), WaitMillis: uint32(patience.Milliseconds())}); !errors.Is(err, source.ErrChanged) {
		t.Fatal(err)
	}
}

func TestALeaseOfWhatIsNotOwnedOrDoesNotFit(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(3*ring.BlockSize, 1)})
	tr.config = func(_ int, c *Config) { c.Memory = 2*ring.BlockSize + 1<<20 }
	tr.start(2)
	snap := tr.snapshot()
	i, owners := index(t, snap, "/f"), tr.owners(snap, "/f", 0)
	req := wire.Request{Op: wire.OpLease, Index: i, WaitMillis: uint32(patience.Milliseconds())}
	if _, _, err := tr.receive(owners[1]).ask(req); !errors.Is(err, wire.ErrNotOwner) {
		t.Errorf("not the owner: %v", err)
	}
	if _, _, err := tr.receive(owners[0]).ask(req); !errors.Is(err, wire.ErrNotResident) {
		t.Errorf("does not fit: %v", err)
	}
}

func TestTheSocketIsReplacedAndRemoved(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": nil})
	path := filepath.Join(tr.dir, "w0.sock")
	// A crashed worker left one behind.
	old, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	old.Close()
	tr.start(1)
	tr.snapshot()
	tr.receive(0)
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", fi, err)
	}
	tr.stop(0)
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	// What a successor put there stays.
	a, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	made, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	a.Close()
	removeSocket(path, made)
	if c, err := net.Dial("unixpacket", path); err != nil {
		t.Errorf("the successor's socket: %v", err)
	} else {
		c.Close()
	}
	// A file of somebody else is not taken away.
	file := filepath.Join(tr.dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenSocket(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a file in the way: %v", err)
	}
}

func TestTheSocketNeedsAKey(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": nil})
	tr.start(1)
	c, err := net.Dial("unixpacket", filepath.Join(tr.dir, "w0.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := wire.ClientHandshake(context.Background(), c, dataset, wire.RoleRead, wire.GenerateKeys().Read[0]); !errors.Is(err, wire.ErrUnauthorized) {
		t.Errorf("a wrong key: %v", err)
	}
	// Garbage on an authenticated connection ends it.
	r := tr.receive(0)
	r.Write([]byte("garbage"))
	r.SetDeadline(time.Now().Add(patience))
	if n, err := r.Read(make([]byte, 10)); err == nil {
		t.Errorf("answered with %d bytes", n)
	}
}
