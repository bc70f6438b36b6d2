package local

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/stepcache/stepcache/api/manifest"
	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/local/process"
	"github.com/stepcache/stepcache/tier"
)

// snapshotRoom is what a worker's tmpfs has beside its quota, for listings of the bucket (a million
// files take about 130 MB).
const snapshotRoom = 512 << 20

// node is the name of this machine among the members' nodes: all workers hand out descriptors.
const node = "localhost"

// dataset is one Dataset's tier.
type dataset struct {
	tier    *Tier
	object  *v1alpha1.Dataset
	folder  tier.Folder
	base    worker.Config // of every worker
	control *client.Control
	target  string   // where it is mounted; empty: nowhere
	dirs    []string // the workers' folders
	mounts  *keeper  // nil: not mounted
	workers *keeper  // nil: not started

	mu      sync.Mutex // guards members, which workers that start again change
	members ring.Membership
}

func (t *Tier) newDataset(object *v1alpha1.Dataset, set *manifest.Set, memory int64) (*dataset, error) {
	d := &dataset{tier: t, object: object}
	d.folder = tier.Folder{
		Dir: filepath.Join(t.state.dir, fmt.Sprintf("d%d", len(t.datasets))), Dataset: name(object), Node: node,
		Copies: int(object.Spec.Workers.Copies),
	}
	for _, dir := range []string{d.folder.Dir, d.folder.KeysDir()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	var err error
	if d.base, err = configure(set, object, filepath.Join(d.folder.Dir, "secrets")); err != nil {
		return nil, err
	}
	d.base.Memory, d.base.KeysDir, d.base.MembershipFile = memory, d.folder.KeysDir(), d.folder.MembershipFile()
	if err := wire.WriteKeys(d.folder.KeysDir(), wire.GenerateKeys()); err != nil {
		return nil, err
	}
	return d, d.folder.Write()
}

// start runs the workers.
func (d *dataset) start() error {
	n := int(d.object.Spec.Workers.Replicas)
	d.members = ring.Membership{Epoch: 1}
	for i := range n {
		m := ring.Member{ID: fmt.Sprintf("%s-%d", d.object.Name, i), Node: node, State: ring.Ready,
			Socket: filepath.Join(d.folder.Dir, fmt.Sprintf("w%d.sock", i))}
		if err := addresses(&m); err != nil {
			return err
		}
		d.members.Members = append(d.members.Members, m)
	}
	if err := d.writeMembers(); err != nil {
		return err
	}
	d.workers = newKeeper(d.tier.logf)
	for i := range n {
		dir, err := d.makeStore(i)
		if err != nil {
			return err
		}
		d.dirs = append(d.dirs, dir)
		first := true
		err = d.workers.keep(fmt.Sprintf("dataset %s: worker %d", name(d.object), i), func() (*process.Process, error) {
			if !first {
				if err := d.move(i); err != nil {
					return nil, err
				}
			}
			first = false
			return d.runWorker(i)
		})
		if err != nil {
			return err
		}
	}
	var err error
	d.control, err = d.folder.Control()
	return err
}

// makeStore gives worker i its folder: a tmpfs of its own where that is allowed, with huge pages where the
// kernel has them, else a folder in shared memory.
func (d *dataset) makeStore(i int) (string, error) {
	dir := filepath.Join(d.folder.Dir, fmt.Sprintf("w%d", i))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	note, err := store.MountTmpfs(dir, d.base.Memory+snapshotRoom)
	if err == nil {
		if note != "" && i == 0 {
			d.tier.logf("dataset %s: %s", name(d.object), note)
		}
		return dir, nil
	}
	if i == 0 {
		d.tier.logf("dataset %s: the workers' memory is in /dev/shm, on small pages: %v", name(d.object), err)
	}
	shared, shmErr := d.tier.state.shared()
	if shmErr != nil {
		return "", fmt.Errorf("dataset %s: no memory for a worker: neither a tmpfs (%w) nor a folder in /dev/shm (%w)", name(d.object), err, shmErr)
	}
	return shared, nil
}

// addresses picks free ports for a member.
func addresses(m *ring.Member) error {
	for _, addr := range []*string{&m.Addr, &m.Control} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("find a free port: %w", err)
		}
		*addr = l.Addr().String()
		defer l.Close() // held until both are known, so that they differ
	}
	return nil
}

func (d *dataset) writeMembers() error {
	b, err := json.Marshal(d.members)
	if err != nil {
		return err
	}
	// Readers poll the file: it must never be half written.
	path := d.folder.MembershipFile()
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// runWorker starts worker i as the membership says.
func (d *dataset) runWorker(i int) (*process.Process, error) {
	d.mu.Lock()
	m := d.members.Members[i]
	d.mu.Unlock()
	c := d.base
	c.ID, c.Listen, c.Control, c.Socket = m.ID, m.Addr, m.Control, m.Socket
	c.Dir = d.dirs[i]
	b, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	config := filepath.Join(d.folder.Dir, fmt.Sprintf("w%d.json", i))
	if err := os.WriteFile(config, b, 0o600); err != nil {
		return nil, err
	}
	return process.Start(exec.Command(d.tier.options.Program, "worker", "--config", config),
		filepath.Join(d.folder.Dir, fmt.Sprintf("w%d.log", i)))
}

// move gives worker i new ports, at a new epoch: its old ones may be taken by now.
func (d *dataset) move(i int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.members.Epoch++
	if err := addresses(&d.members.Members[i]); err != nil {
		return err
	}
	return d.writeMembers()
}

// waitReady waits until every worker has the listing.
func (d *dataset) waitReady(ctx context.Context) error {
	const poll = 50 * time.Millisecond
	var problem string
	var since, spoke time.Time
	for {
		status, err := d.control.Status(ctx)
		ready := err == nil && len(status) == int(d.object.Spec.Workers.Replicas)
		var said string
		for _, s := range status {
			if s.Snapshot == "" {
				ready = false
			}
			if s.Problem != "" && said == "" {
				said = s.Problem
			}
		}
		if ready {
			d.tier.logf("dataset %s: %d files, %d workers", name(d.object), status[0].Files, len(status))
			return nil
		}
		if said == "" && err != nil {
			said = err.Error()
		}
		now := time.Now()
		if said == "" || problem == "" {
			since = now
		}
		problem = said
		// A worker that has not opened its ports yet is not ready within the first moments.
		if problem != "" && now.Sub(since) > d.tier.options.Problems {
			return fmt.Errorf("dataset %s: %s%s", name(d.object), problem, d.tails("w*.log"))
		}
		if problem != "" && now.Sub(since) > 2*time.Second && now.Sub(spoke) > 5*time.Second {
			spoke = now
			d.tier.logf("dataset %s: not ready yet: %s", name(d.object), problem)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(poll):
		}
	}
}

// tails is the last line of each log of this tier's processes.
func (d *dataset) tails(pattern string) string {
	logs, _ := filepath.Glob(filepath.Join(d.folder.Dir, pattern))
	var b strings.Builder
	for _, log := range logs {
		text, err := os.ReadFile(log)
		if err != nil || len(text) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		fmt.Fprintf(&b, "\n  %s: %s", strings.TrimSuffix(filepath.Base(log), ".log"), lines[len(lines)-1])
	}
	return b.String()
}

// mount runs the process that serves the dataset at dir/name.
func (d *dataset) mount(ctx context.Context, dir string) error {
	d.target = filepath.Join(dir, d.object.Name)
	if err := d.tier.state.mounting(d.target); err != nil {
		return err
	}
	d.mounts = newKeeper(d.tier.logf)
	log := filepath.Join(d.folder.Dir, "mount.log")
	err := d.mounts.keep(fmt.Sprintf("dataset %s: mount", name(d.object)), func() (*process.Process, error) {
		return process.Start(exec.Command(d.tier.options.Program, "mount", "--tier", d.folder.Dir, d.target), log)
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		at, err := mountinfo.At(d.target)
		if err != nil || len(at) > 0 && at[0].Type == mount.FSType {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("dataset %s: mount at %s: %w%s", name(d.object), d.target, context.Cause(ctx), d.tails("mount.log"))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// pollLoad is how often the workers are asked how far a load is.
const pollLoad = 200 * time.Millisecond

// load runs one DataLoad.
func (d *dataset) load(ctx context.Context, l *v1alpha1.DataLoad, progress func(client.LoadSum)) error {
	r := wire.LoadRequest{ID: l.Namespace + "." + l.Name, Copies: int(l.CopiesOf(d.object)), Pin: l.Spec.Pin, Paths: l.Patterns()}
	if err := d.control.Load(ctx, r); err != nil {
		return err
	}
	_, err := d.control.Wait(ctx, r, pollLoad, progress)
	return err
}

// close ends the mount first, so that no reader is without its workers, then the workers.
func (d *dataset) close() {
	for _, k := range []*keeper{d.mounts, d.workers} {
		if k != nil {
			k.close()
		}
	}
	if d.control != nil {
		d.control.Close()
	}
}
