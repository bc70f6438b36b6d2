package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/source"
)

// patience bounds waits that normally take milliseconds.
const patience = 60 * time.Second

// files is a dataset's content by path, without the leading slash.
type files map[string][]byte

// content makes bytes that are the same in every process, and differ from block to block and file to file.
func content(name string, size int) []byte {
	var seed [32]byte
	copy(seed[:], name)
	seed[31] = byte(size)
	b := make([]byte, size)
	_, _ = rand.NewChaCha8(seed).Read(b)
	return b
}

var created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

const bucketURL = "s3://bucket"

// snapshotOf lists content as a bucket would.
func snapshotOf(t testing.TB, all files) *catalog.Snapshot {
	t.Helper()
	s, err := buildSnapshot(all)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range s.Skipped() {
		t.Fatalf("the fixture has names that cannot be shown: %+v", k)
	}
	return s
}

func buildSnapshot(all files) (*catalog.Snapshot, error) {
	b := catalog.NewBuilder([]catalog.Mount{{URL: bucketURL, Prefix: "", Path: "/"}})
	for name, data := range all {
		o := source.Object{Key: name, Size: int64(len(data)), Version: fmt.Sprintf("v-%x", len(name)), ModTime: created.Add(-time.Hour)}
		if err := b.Add(0, o); err != nil {
			return nil, err
		}
	}
	enc, err := b.Encode(created)
	if err != nil {
		return nil, err
	}
	return catalog.Open(enc)
}

// memory is a Reader over real bytes.
type memory struct {
	snap  *catalog.Snapshot
	all   files
	reads atomic.Int64
	// before is called ahead of every read, and its error returned; may be nil.
	before atomic.Pointer[func(ctx context.Context, path string, off int64) error]

	mu     sync.Mutex
	forgot map[catalog.Index]int
}

func newMemory(s *catalog.Snapshot, all files) *memory {
	return &memory{snap: s, all: all, forgot: map[catalog.Index]int{}}
}

func (m *memory) hook(f func(ctx context.Context, path string, off int64) error) { m.before.Store(&f) }

func (m *memory) ReadAt(ctx context.Context, i catalog.Index, p []byte, off int64) (int, error) {
	m.reads.Add(1)
	path := strings.TrimPrefix(m.snap.Path(i), "/")
	if f := m.before.Load(); f != nil {
		if err := (*f)(ctx, path, off); err != nil {
			return 0, err
		}
	}
	if err := ctx.Err(); err != nil {
		return 0, context.Cause(ctx)
	}
	data := m.all[path]
	if off > int64(len(data)) {
		return 0, io.EOF
	}
	n := copy(p, data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) Forget(i catalog.Index) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgot[i]++
}

func (m *memory) forgotten(i catalog.Index) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.forgot[i]
}

// leasing is a Reader that also leases, from files in a folder of tmpfs.
type leasing struct {
	*memory
	dir string
	// lease is called ahead of every lease, and its error returned; may be nil.
	lease atomic.Pointer[func(ctx context.Context, path string, wait time.Duration) error]

	taken, given atomic.Int64
	lost         atomic.Pointer[chan struct{}] // of new leases; may be nil
}

var errNoLease = errors.New("no lease")

func newLeasing(t testing.TB, s *catalog.Snapshot, all files) *leasing {
	t.Helper()
	return &leasing{memory: newMemory(s, all), dir: tmpfs(t)}
}

// tmpfs mounts one for a test.
func tmpfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=700"); err != nil {
		t.Skipf("needs the right to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

type fileLease struct {
	f     *os.File
	given *atomic.Int64
	lost  chan struct{}
}

func (l *fileLease) File() *os.File        { return l.f }
func (l *fileLease) Lost() <-chan struct{} { return l.lost }
func (l *fileLease) Release()              { l.f.Close(); l.given.Add(1) }

func (l *leasing) Lease(ctx context.Context, i catalog.Index, wait time.Duration) (Lease, error) {
	path := strings.TrimPrefix(l.snap.Path(i), "/")
	if f := l.lease.Load(); f != nil {
		if err := (*f)(ctx, path, wait); err != nil {
			return nil, err
		}
	}
	name := filepath.Join(l.dir, fmt.Sprint(i))
	if _, err := os.Stat(name); err != nil {
		tmp := fmt.Sprintf("%s.%d", name, l.taken.Add(1<<32))
		if err := os.WriteFile(tmp, l.all[path], 0o600); err != nil {
			return nil, err
		}
		if err := os.Rename(tmp, name); err != nil {
			return nil, err
		}
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	l.taken.Add(1)
	given := &fileLease{f: f, given: &l.given}
	if lost := l.lost.Load(); lost != nil {
		given.lost = *lost
	}
	return given, nil
}

// needFUSE skips a test where there is no FUSE.
func needFUSE(t testing.TB) {
	t.Helper()
	if err := Supported(); err != nil {
		t.Skip(err)
	}
	if !hasCap(unix.CAP_SYS_ADMIN) {
		t.Skip("needs root (CAP_SYS_ADMIN): the test mounts")
	}
}

// needPassthrough skips a test where the kernel has none.
func needPassthrough(t testing.TB, m *Server) {
	t.Helper()
	if !m.fs.pass.available() {
		t.Skip("needs a kernel with FUSE passthrough (Linux 6.9 or later) and CAP_SYS_ADMIN")
	}
}

// logs collects log lines.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logs) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// mounted mounts for a test, and takes it away whatever happens.
func mounted(t testing.TB, s *catalog.Snapshot, r Reader, o Options) *Server {
	t.Helper()
	return mountedAt(t, t.TempDir(), s, r, o)
}

func mountedAt(t testing.TB, dir string, s *catalog.Snapshot, r Reader, o Options) *Server {
	t.Helper()
	needFUSE(t)
	if o.Logger == nil {
		l := &logs{}
		o.Logger = l.logger()
		t.Cleanup(func() {
			if t.Failed() {
				t.Log("the mount's log:\n" + l.String())
			}
		})
	}
	if o.Dataset == "" {
		o.Dataset = "test"
	}
	m, err := Mount(context.Background(), dir, s, r, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, m) })
	return m
}

// end takes a mount away: nobody may use it any more.
func end(t testing.TB, m *Server) {
	at, _ := mountinfo.At(m.dir)
	for _, a := range at {
		if a.Type == FSType {
			if t.Failed() {
				abort(a.Minor)
			}
			_ = unix.Unmount(m.dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
	select {
	case <-m.Done():
	case <-time.After(patience):
		t.Errorf("the mount at %s did not end", m.dir)
		abort(m.dev.minor)
	}
}

// eventually waits for a condition that comes true soon.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func hexOf(b []byte) string { return fmt.Sprintf("%x", b) }
