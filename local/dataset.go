package local

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	s3      *s3      // nil: it is read-only
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
	d.folder.Snapshots = filepath.Join(d.folder.Dir, "snapshots")
	for _, dir := range []string{d.folder.Dir, d.folder.KeysDir()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	var err error
	if d.base, err = configure(set, object, d.secretsDir()); err != nil {
		return nil, err
	}
	d.base.Memory, d.base.KeysDir, d.base.MembershipFile = memory, d.folder.KeysDir(), d.folder.MembershipFile()
	if err := wire.WriteKeys(d.folder.KeysDir(), wire.GenerateKeys()); err != nil {
		return nil, err
	}
	if object.Spec.Access == v1alpha1.ReadWrite {
		if err := d.makeWritable(); err != nil {
			return nil, err
		}
	}
	return d, d.folder.Write()
}

// secretsDir holds the files of the Dataset's Secrets.
func (d *dataset) secretsDir() string { return filepath.Join(d.folder.Dir, "secrets") }

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
		p, err := d.runWorker(i)
		if err != nil {
			return err
		}
		d.workers.keep(fmt.Sprintf("dataset %s: worker %d", name(d.object), i), p, func() (*process.Process, error) {
			if err := d.move(i); err != nil {
				return nil, err
			}
			return d.runWorker(i)
		})
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
	if d.s3 != nil {
		c.Gateway = d.s3.config(i)
	}
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

// waitReady waits until every worker has the listing, and says how the listing gets on. Where puts are taken there is
// none: the workers reach the bucket then.
func (d *dataset) waitReady(ctx context.Context) error {
	const poll, firstWord, nextWord = 50 * time.Millisecond, 2 * time.Second, 5 * time.Second
	start := time.Now()
	spoke := start.Add(firstWord - nextWord)
	since, files, said := start, int64(0), ""
	for {
		status, err := d.control.Status(ctx)
		r := d.judge(status, err)
		if r.ready {
			workers := count(int64(len(status)), "worker")
			if d.s3 != nil {
				d.tier.logf("dataset %s: %s", name(d.object), workers)
				return nil
			}
			d.tier.logf("dataset %s: %s, %s", name(d.object), count(status[0].Files, "file"), workers)
			d.warn(status[0])
			return nil
		}
		now := time.Now()
		// A listing that goes on is a sign of life, also where the bucket answers badly at times.
		if r.problem == "" || r.files > files {
			since, files = now, r.files
		}
		limit, flag := d.tier.options.Problems, ""
		if r.silent {
			limit = max(limit, startTimeout)
		} else if d.tier.options.Flags {
			flag = " (--give-up)"
		}
		waited := now.Sub(since) > limit
		switch {
		case slices.Contains(final, r.reason):
			return fmt.Errorf("dataset %s: %s", name(d.object), r.problem)
		case waited && r.silent:
			return fmt.Errorf("dataset %s: %s%s", name(d.object), r.problem, d.tails("w*.log"))
		case waited:
			return fmt.Errorf("dataset %s: given up after %v%s: %s", name(d.object), limit, flag, r.problem)
		}
		word := "not ready yet, waiting for up to " + limit.String() + flag + ": " + r.problem
		about := cmp.Or(r.reason, r.problem) // the words may differ with every connection
		if r.problem == "" {
			word = fmt.Sprintf("listing the bucket: %s so far", count(r.files, "file"))
			about = word
		}
		if now.Sub(spoke) > nextWord && about != said {
			spoke, said = now, about
			d.tier.logf("dataset %s: %s", name(d.object), word)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(poll):
		}
	}
}

// startTimeout is how long a worker may take to answer at all. One that ends is started again meanwhile.
const startTimeout = 30 * time.Second

// readiness is how far the workers are.
type readiness struct {
	ready   bool
	files   int64  // listed so far
	problem string // what keeps them from serving; empty while they list
	silent  bool   // it is that a worker does not answer: its log may say why
	reason  string // its kind: a worker's Reason
}

// final are the Reasons that end only when somebody corrects the manifests or the bucket.
var final = []string{wire.Denied.String(), wire.NoBucket.String(), wire.Unversioned.String(), wire.Invalid.String()}

func (d *dataset) judge(status []wire.WorkerStatus, err error) readiness {
	r := readiness{ready: err == nil && len(status) == int(d.object.Spec.Workers.Replicas)}
	listed := slices.ContainsFunc(status, func(s wire.WorkerStatus) bool { return s.Snapshot != "" })
	for _, s := range status {
		r.ready = r.ready && (s.Snapshot != "" || d.s3 != nil && s.Reason == "")
		r.files = max(r.files, s.Files)
		p := d.forPeople(s.Problem)
		// A worker that waits for another one's listing repeats what that said, or finds it not started yet.
		if r.problem == "" && (listed || !strings.Contains(p, wire.FollowingProblem)) {
			r.problem, r.reason = p, s.Reason
		}
	}
	if r.problem == "" && err != nil {
		r.problem, r.silent = err.Error(), true
	}
	return r
}

// forPeople is a worker's problem as somebody sees it who knows the manifests and not the run's folder;
// empty when the worker only waits for the listing.
func (d *dataset) forPeople(problem string) string {
	if strings.HasSuffix(problem, wire.ListingProblem) {
		return ""
	}
	problem = strings.TrimPrefix(problem, wire.ListingProblem+"; ")
	problem = strings.TrimPrefix(problem, "dataset "+name(d.object)+": ")
	problem = strings.TrimPrefix(problem, "list: ") // said twice
	return strings.ReplaceAll(problem, d.secretsDir()+"/", "Secret ")
}

// warn says what of the listing a person should know.
func (d *dataset) warn(s wire.WorkerStatus) {
	if s.Files == 0 {
		var sources []string
		for _, m := range d.object.Spec.Mounts {
			sources = append(sources, m.Source)
		}
		d.tier.logf("dataset %s: there is no object below %s; is the prefix right?", name(d.object), strings.Join(sources, " and "))
	}
	for _, reason := range slices.Sorted(maps.Keys(s.Skipped)) {
		d.tier.logf("dataset %s: %s cannot be shown as files: %s", name(d.object), count(s.Skipped[reason], "key"), reason)
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

// mostFailures is how many failed reads are told.
const mostFailures = 10

// tellFailures says why reads through the mount failed: programs are told a number, such as "Input/output error", and
// the mount's log goes with the run.
func (d *dataset) tellFailures() {
	text, err := os.ReadFile(filepath.Join(d.folder.Dir, mountLog))
	if err != nil {
		return
	}
	told := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		_, why, failed := strings.Cut(strings.TrimSpace(line), " level=ERROR msg=")
		if !failed || told[why] {
			continue
		}
		told[why] = true
		if len(told) <= mostFailures {
			d.tier.logf("dataset %s: mount: %s", name(d.object), why)
		}
	}
	if n := len(told) - mostFailures; n > 0 {
		d.tier.logf("dataset %s: mount: and %d failures more", name(d.object), n)
	}
}

// mountLog is what the mount's process says.
const mountLog = "mount.log"

// mount runs the process that serves the dataset at its target.
func (d *dataset) mount(ctx context.Context) error {
	log := filepath.Join(d.folder.Dir, mountLog)
	start := func() (*process.Process, error) {
		return process.Start(exec.Command(d.tier.options.Program, "mount", "--tier", d.folder.Dir, d.target), log)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, mountTimeout, fmt.Errorf("not mounted after %v", mountTimeout))
	defer cancel()
	p, err := start()
	if err != nil {
		return err
	}
	for {
		at, err := mountinfo.At(d.target)
		if err == nil && len(at) > 0 && at[0].Type == mount.FSType {
			break
		}
		select {
		case <-p.Done():
			// Nothing that a second try would mend: it says what is in its way.
			lines := strings.Split(p.Tail(), "\n")
			return fmt.Errorf("dataset %s: cannot mount: %s", name(d.object), strings.TrimPrefix(lines[len(lines)-1], "stepcache: "))
		case <-ctx.Done():
			tail := p.Tail()
			stopping, cancel := context.WithTimeout(context.Background(), stopTimeout)
			defer cancel()
			p.Stop(stopping)
			return fmt.Errorf("dataset %s: mount at %s: %w\n%s", name(d.object), d.target, context.Cause(ctx), tail)
		case <-time.After(10 * time.Millisecond):
		}
	}
	d.mounts = newKeeper(d.tier.logf)
	d.mounts.keep(fmt.Sprintf("dataset %s: mount", name(d.object)), p, start)
	return nil
}

// mountTimeout bounds what takes milliseconds on an idle machine.
const mountTimeout = time.Minute

// pollLoad is how often the workers are asked how far a load is.
const pollLoad = 200 * time.Millisecond

// loadID names a DataLoad to the workers.
func loadID(l *v1alpha1.DataLoad) string { return l.Namespace + "." + l.Name }

// load runs one DataLoad.
func (d *dataset) load(ctx context.Context, l *v1alpha1.DataLoad, progress func(client.LoadSum)) error {
	if d.s3 != nil {
		return fmt.Errorf("dataset %s: access: ReadWrite, so that there is no listing to load from", name(d.object))
	}
	r := wire.LoadRequest{ID: loadID(l), Copies: int(l.CopiesOf(d.object)), Pin: l.Spec.Pin, Paths: l.Patterns()}
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
	d.tellFailures()
	if d.control != nil {
		d.control.Close()
	}
}
