package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// lender is a Registrar that has the right, and may be told to refuse.
type lender struct {
	conn         *os.File
	refuse       atomic.Pointer[error]
	registered   atomic.Int32
	unregistered atomic.Int32
}

func (l *lender) Register(fd int) (int32, error) {
	if err := l.refuse.Load(); err != nil {
		return 0, *err
	}
	id, err := Register(l.conn, fd)
	if err == nil {
		l.registered.Add(1)
	}
	return id, err
}

func (l *lender) Unregister(id int32) {
	if Unregister(l.conn, id) == nil {
		l.unregistered.Add(1)
	}
}

func needAttach(t *testing.T) {
	t.Helper()
	needFUSE(t)
	if !hasCap(unix.CAP_SYS_ADMIN) {
		t.Skip("needs CAP_SYS_ADMIN to attach a connection")
	}
}

// attached is a connection that one side has mounted and kept a copy of, for the other side to serve.
func attached(t *testing.T) (dir string, kept, given *os.File) {
	t.Helper()
	dir = t.TempDir()
	given, err := Attach(dir, "lent:a,suid b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) })
	if kept, err = dup(given); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kept.Close() })
	return dir, kept, given
}

// servedAt serves it in this process.
func servedAt(t *testing.T, dir string, given *os.File, r *leasing, o Options) *Server {
	t.Helper()
	m, err := Serve(context.Background(), given, r.snap, r, o)
	if err != nil {
		t.Fatal(err)
	}
	servesItself(t, dir, m)
	return m
}

// servesItself has the server of a lent connection do what one of its own mount does for programs such as this one,
// which serve what they use; it must end with the mount.
func servesItself(t *testing.T, dir string, m *Server) {
	t.Helper()
	t.Cleanup(func() {
		_ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		select {
		case <-m.Done():
		case <-time.After(patience):
			t.Error("the server does not end with the mount")
		}
	})
	s := Server{dir: dir, fs: m.fs}
	s.settle()
}

func TestLentConnectionIsServedAndPassesThrough(t *testing.T) {
	needAttach(t)
	all := files{"big": content("big", 5<<20+1), "two": content("two", 2<<20), "three": content("three", 3<<20), "small": content("small", 1000)}
	r := newLeasing(t, snapshotOf(t, all), all)
	dir, kept, given := attached(t)
	at, err := mountinfo.At(dir)
	if err != nil || len(at) != 1 || at[0].Type != FSType || at[0].Source != "lent:a_suid_b" || !strings.HasPrefix(at[0].SuperOptions, "ro") || !strings.Contains(at[0].Options, "nosuid,nodev") {
		t.Fatalf("mounted %+v %v", at, err)
	}
	if !Alive(kept) {
		t.Error("dead before it is served")
	}
	l := &lender{conn: kept}
	m := servedAt(t, dir, given, r, Options{Mode: Passthrough, IdleTime: time.Hour, Registrar: l})
	needPassthrough(t, m)
	if m.Dir() != "" {
		t.Errorf("it knows where it is mounted: %s", m.Dir())
	}
	// Not now, which says nothing of later.
	busy := errors.New("the lender is not there")
	l.refuse.Store(&busy)
	for name, want := range all {
		if err := sameBytes(filepath.Join(dir, name), want); err != nil {
			t.Error(err)
		}
	}
	if st := m.Stats(); !st.Passthrough || st.PassthroughOpens != 0 || st.Leased != 0 {
		t.Errorf("without a lender: %+v", st)
	}
	l.refuse.Store(nil)
	checkQuiet(t, m) // a file that still counts as open stays as it is
	for name, want := range all {
		if err := sameBytes(filepath.Join(dir, name), want); err != nil {
			t.Error(err)
		}
	}
	if st := m.Stats(); st.PassthroughOpens != 3 || l.registered.Load() != 3 {
		t.Errorf("%d registered: %+v", l.registered.Load(), st)
	}
	// The kernel tells of a last close after close(2) has returned.
	eventually(t, "all three are unregistered", func() bool {
		m.fs.pass.sweep(time.Now(), 0)
		return l.unregistered.Load() == 3
	})
	// The kernel's own refusal is for good.
	no := error(unix.EPERM)
	l.refuse.Store(&no)
	if err := sameBytes(filepath.Join(dir, "big"), all["big"]); err != nil {
		t.Error(err)
	}
	if m.Stats().Passthrough {
		t.Error("the kernel refused, and is asked again")
	}
	if err := Resend(kept); err != nil {
		t.Errorf("send requests again: %v", err)
	}
	p, err := m.Park()
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	_ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	<-m.Done()
	if Alive(kept) {
		t.Error("alive after its end")
	}
}

func TestServeRefusesWhatIsNoConnection(t *testing.T) {
	all := files{"f": content("f", 10)}
	s := snapshotOf(t, all)
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Serve(context.Background(), file, s, newMemory(s, all), Options{}); err == nil || !strings.Contains(err.Error(), "not one of /dev/fuse") {
		t.Errorf("/dev/null: %v", err)
	}
	if err := file.Close(); !errors.Is(err, os.ErrClosed) {
		t.Error("the descriptor is left open")
	}
}
