package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/local"
	"github.com/stepcache/stepcache/local/process"
	"github.com/stepcache/stepcache/tier"
)

// stopTimeout is what a mount is given to end by itself.
const stopTimeout = 15 * time.Second

// dataset is a running tier of one worker.
type dataset struct {
	tier   *local.Tier
	folder tier.Folder
	log    *bytes.Buffer
}

// start brings up the tier of a Dataset with one mount, given in the manifest's own words, with an
// optional Secret before it.
func (b *bench) start(ctx context.Context, secret, mount string, memory int64) (*dataset, error) {
	const least = 64 << 20
	text := fmt.Sprintf(`%sapiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: bench}
spec:
  mounts:
  - {path: /, %s}
  workers: {replicas: 1, memory: %d}
`, secret, mount, max(memory, least))
	file := filepath.Join(b.dir, "dataset.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	d := &dataset{log: &bytes.Buffer{}}
	var err error
	d.tier, err = local.Start(ctx, local.Options{Manifests: []string{file}, Program: b.o.stepcache, Workers: 1,
		Memory: max(memory, least), Log: d.log, Problems: time.Minute})
	if err != nil {
		return nil, fmt.Errorf("tier: %w\n%s", err, d.log)
	}
	for _, v := range d.tier.Env() {
		if dir, ok := strings.CutPrefix(v, tier.Env+"="); ok {
			if d.folder, err = tier.Open(dir); err != nil {
				d.close()
				return nil, err
			}
		}
	}
	return d, nil
}

func (d *dataset) close() { d.tier.Close() }

// fromFolder is a Dataset's mount of a local folder.
func fromFolder(dir string) string { return "source: \"file://" + dir + "\"" }

// load makes everything resident and returns how long that took, from the request to the last byte.
func (d *dataset) load(ctx context.Context) (time.Duration, error) {
	control, err := d.folder.Control()
	if err != nil {
		return 0, err
	}
	defer control.Close()
	r := wire.LoadRequest{ID: "bench"}
	start := time.Now()
	if err := control.Load(ctx, r); err != nil {
		return 0, err
	}
	// Asked rarely, since the answers take from what is measured: when it was done is told by the worker's clock, which
	// is this machine's.
	sum, err := control.Wait(ctx, r, 50*time.Millisecond, nil)
	if err == nil && sum.Resident != sum.Total {
		err = fmt.Errorf("the load left %d of %d bytes", sum.Total-sum.Resident, sum.Total)
	}
	return sum.Finished.Sub(start), err
}

// elsewhere is the tier as a reader on another machine sees it: it shares no socket with the worker, so
// that all bytes come over TCP.
func (b *bench) elsewhere(ctx context.Context, d *dataset) (tier.Folder, error) {
	f := d.folder
	keys, err := wire.LoadKeys(f.KeysDir())
	if err != nil {
		return f, err
	}
	members, err := os.ReadFile(f.MembershipFile())
	if err != nil {
		return f, err
	}
	m, err := ring.Parse(members)
	if err != nil {
		return f, err
	}
	for i := range m.Members {
		m.Members[i].Socket = ""
	}
	if members, err = json.Marshal(m); err != nil {
		return f, err
	}
	if f.Dir, err = os.MkdirTemp(b.dir, "t"); err != nil {
		return f, err
	}
	f.Node = "elsewhere"
	err = errors.Join(f.Write(), os.WriteFile(f.MembershipFile(), members, 0o600), os.Mkdir(f.KeysDir(), 0o700))
	if err != nil {
		return f, err
	}
	if err := wire.WriteKeys(f.KeysDir(), keys); err != nil {
		return f, err
	}
	return f, b.noLease(ctx, f)
}

// noLease checks that a reader there cannot get a descriptor: its figures would be those of this machine.
func (b *bench) noLease(ctx context.Context, f tier.Folder) error {
	c, err := f.Dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	for i := range uint32(c.Snapshot().Len()) {
		if n, _ := c.Snapshot().Node(i); n.Dir || n.Size == 0 {
			continue
		}
		l, err := c.Lease(ctx, i, 0)
		if err == nil {
			l.Release()
			return errors.New("a reader that is to be on another node was leased a file")
		}
		if !errors.Is(err, client.ErrNoLease) {
			return err
		}
		return nil
	}
	return errors.New("no file to lease")
}

// view is a folder through which a dataset can be read: a process that serves a mount.
type view struct {
	b      *bench
	folder tier.Folder
	args   []string

	dir     string
	process *process.Process
}

// view makes one that is gone with s. Nothing is mounted yet.
func (b *bench) view(s *scope, f tier.Folder, args ...string) *view {
	v := &view{b: b, folder: f, args: args}
	s.add(v.close)
	return v
}

// renew mounts anew, so that the kernel and the mount's process know nothing of the files yet.
func (v *view) renew(ctx context.Context) error {
	v.close()
	var err error
	if v.dir, err = os.MkdirTemp(v.b.dir, "m"); err != nil {
		return err
	}
	args := append([]string{"mount", "--tier", v.folder.Dir}, v.args...)
	v.process, err = process.Start(exec.Command(v.b.o.stepcache, append(args, v.dir)...), v.b.dir+"/mount.log")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		at, err := mountinfo.At(v.dir)
		if err != nil || len(at) > 0 && at[0].Type == mount.FSType {
			return err
		}
		select {
		case <-v.process.Done():
			return fmt.Errorf("mount: %w: %s", v.process.Err(), v.process.Tail())
		case <-ctx.Done():
			return fmt.Errorf("mount: %w: %s", context.Cause(ctx), v.process.Tail())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// need mounts where nothing is mounted, or nobody serves it any more.
func (v *view) need(ctx context.Context) error {
	if v.process != nil {
		select {
		case <-v.process.Done():
		default:
			return nil
		}
	}
	return v.renew(ctx)
}

func (v *view) close() {
	if v.process == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	v.process.Stop(ctx)
	v.process = nil
	_ = unix.Unmount(v.dir, unix.MNT_DETACH) // of a process that had to be killed
	_ = os.Remove(v.dir)
}

// same compares a file of the view with the original, so that no row measures the reading of wrong bytes.
func (v *view) same(ctx context.Context, name, original string) error {
	if err := v.renew(ctx); err != nil {
		return err
	}
	defer v.close()
	got, err := crc32c(ctx, v.dir+"/"+name)
	if err != nil {
		return err
	}
	want, err := crc32c(ctx, original)
	if err == nil && got != want {
		err = fmt.Errorf("WRONG BYTES in %s of the mount", name)
	}
	return err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crc32c(ctx context.Context, path string) (uint32, error) {
	fd, err := access.Open(path)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	p, sum := make([]byte, access.Chunk), uint32(0)
	for {
		n, err := unix.Read(fd, p)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", path, err)
		}
		if n == 0 || ctx.Err() != nil {
			return sum, context.Cause(ctx)
		}
		sum = crc32.Update(sum, castagnoli, p[:n])
	}
}
