package trial

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/local/process"
)

// Names of the contenders that are not other projects.
const (
	Native = "native"
	Direct = "direct"
	Own    = "stepcache"
)

// contender is one way to read a dataset.
type contender interface {
	name() string
	// version says what is measured; empty: nothing to say.
	version(ctx context.Context) string
	// fresh begins with nothing cached.
	fresh(ctx context.Context, d *Data) (session, error)
}

// session is a contender at work on one dataset: it keeps what it has cached from mount to mount.
type session interface {
	// mount takes away the mounts that there are and makes so many, of which the kernel knows nothing yet.
	mount(ctx context.Context, n int) error
	// where tells a reader where to read.
	where(j *Job)
	// groups are the process groups that serve the mounts, and those of the workers behind them.
	groups() (mounts, workers []int)
	// close ends and removes all of it, however it behaves.
	close()
}

// stopTimeout is what a mount's process is given to end by itself.
const stopTimeout = 10 * time.Second

// nativeFiles are the files themselves.
type nativeFiles struct{}

func (nativeFiles) name() string                   { return Native }
func (nativeFiles) version(context.Context) string { return "a tmpfs" }
func (nativeFiles) fresh(_ context.Context, d *Data) (session, error) {
	return &folder{dir: d.Native}, nil
}

type folder struct {
	dir string
	n   int
}

func (f *folder) mount(_ context.Context, n int) error { f.n = n; return nil }
func (f *folder) groups() (mounts, workers []int)      { return nil, nil }
func (f *folder) close()                               {}
func (f *folder) where(j *Job) {
	j.Dirs = nil
	for range f.n {
		j.Dirs = append(j.Dirs, f.dir)
	}
}

// direct is the bucket itself, by the S3 client library, with ranges of a large object read at the same time.
type direct struct{}

func (direct) name() string                   { return Direct }
func (direct) version(context.Context) string { return "minio-go, 8 MiB ranges, 16 at once" }
func (direct) fresh(_ context.Context, d *Data) (session, error) {
	return &bucketReader{d.Bucket}, nil
}

type bucketReader struct{ bucket *Bucket }

func (*bucketReader) mount(context.Context, int) error { return nil }
func (*bucketReader) groups() (mounts, workers []int)  { return nil, nil }
func (*bucketReader) close()                           {}
func (b *bucketReader) where(j *Job)                   { j.Bucket = b.bucket }

// mounts are the mounts of a session, each served by a process of its own.
type mounts struct {
	scratch string // a folder of the session
	// command makes the command that mounts at a folder and serves until it is told to end; k numbers the
	// mounts of one session.
	command func(dir string, k int) *exec.Cmd
	// settle is how long a mount that has been read from is left alone before another takes its place.
	settle time.Duration

	dirs      []string
	processes []*process.Process
	made      int
}

func (m *mounts) mount(ctx context.Context, n int) error {
	if len(m.processes) > 0 && m.settle > 0 {
		select {
		case <-time.After(m.settle):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	m.unmount()
	for k := range n {
		m.made++
		dir := filepath.Join(m.scratch, fmt.Sprintf("m%d", m.made))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		p, err := process.Start(m.command(dir, k), filepath.Join(m.scratch, "log"))
		if err != nil {
			return err
		}
		m.dirs, m.processes = append(m.dirs, dir), append(m.processes, p)
	}
	for k := range n {
		if err := mounted(ctx, m.dirs[k], m.processes[k]); err != nil {
			return err
		}
	}
	return nil
}

// mounted waits until a FUSE file system is at dir. It looks at the list of mounts only: a look at the mount itself
// may hang.
func mounted(ctx context.Context, dir string, p *process.Process) error {
	for {
		at, err := mountinfo.At(dir)
		if err != nil || len(at) > 0 && strings.HasPrefix(at[0].Type, "fuse") {
			return err
		}
		select {
		case <-p.Done():
			if at, err := mountinfo.At(dir); err == nil && len(at) > 0 {
				return nil // it serves from a process of its own
			}
			return fmt.Errorf("it ended: %v: %s", p.Err(), p.Tail())
		case <-ctx.Done():
			return fmt.Errorf("%w: %s", context.Cause(ctx), p.Tail())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (m *mounts) where(j *Job) { j.Dirs = m.dirs }

func (m *mounts) pids() (pids []int) {
	for _, p := range m.processes {
		pids = append(pids, p.Pid())
	}
	return pids
}

// unmount takes all mounts away: politely, and where that takes too long, by force.
func (m *mounts) unmount() {
	for _, dir := range m.dirs {
		_ = unix.Unmount(dir, 0) // served processes end by themselves with their mount
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	for k, p := range m.processes {
		p.Signal(unix.SIGTERM)
		select {
		case <-p.Done():
		case <-ctx.Done():
			m.force(k)
		}
		m.force(k)
		_ = os.Remove(m.dirs[k])
	}
	m.dirs, m.processes = nil, nil
}

// force ends a mount that may hang: requests under way fail, so that whoever waits for them can be killed.
func (m *mounts) force(k int) {
	host.Abort(m.dirs[k])
	_, _ = mountinfo.Detach(m.dirs[k], nil)
	select {
	case <-m.processes[k].Done():
	default:
		m.processes[k].Signal(unix.SIGKILL)
		select {
		case <-m.processes[k].Done():
		case <-time.After(stopTimeout): // the kernel holds it; nothing more can be done
		}
	}
	// What it has started and left.
	_ = unix.Kill(-m.processes[k].Pid(), unix.SIGKILL)
}

// hang says that somebody did not answer in time.
type hang struct{ error }

func isHang(err error) bool { return errors.As(err, &hang{}) }
