// Package local runs the tiers of Datasets as processes on this machine, from the manifests that a
// cluster takes: no container, no cluster, and nothing left behind.
//
// It owns the run's state folder, the worker and mount processes, their restarts, and the order in which
// things come up and go away. A run's folder holds a lock while the run lives; what a killed run left (its
// folder, tmpfs and mounts) is removed by the next one. Concurrency: a Tier's methods are for one
// goroutine, its supervision is its own. Failure: Start undoes what it did and says what to change; a
// worker that dies later is started again and the membership's epoch grows.
//
// It may import api, tier and cache/...
package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/stepcache/stepcache/api/manifest"
	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/meminfo"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/tier"
)

// stopTimeout is what a process is given to end by itself.
const stopTimeout = 15 * time.Second

// Options of Start.
type Options struct {
	// Manifests are files, or folders of them, of YAML or JSON: Datasets, DataLoads, Secrets; "-" is
	// standard input.
	Manifests []string
	// Mount is the folder below which each Dataset appears under its name; empty: nothing is mounted.
	Mount string
	// Program is the stepcache binary that workers and mounts run.
	Program string
	// Workers is the most workers a Dataset gets here; zero: 4. Memory is the most memory that all workers
	// of all Datasets hold together, in bytes; zero: half of what the machine has available.
	Workers int
	Memory  int64
	// Gather gives the workers that Workers leaves of a Dataset the memory of all that its manifest wants, so that the
	// tier holds what that one would.
	Gather bool
	// Flags says that Workers, Memory and Problems are the user's --workers, --memory and --give-up, which are then named
	// as the way out.
	Flags bool
	// S3Domain, when not empty, is a host name that leads to this machine with all names below it: the S3
	// endpoints are told to clients under it, and answer virtual-host style too.
	S3Domain string
	// Log gets a line for what a person should know: progress, restarts, what was scaled down.
	Log io.Writer
	// Problems is how long what may pass (nobody answers at the bucket's address) may keep a worker from serving before
	// Start gives up; zero: 10 s. What is not mended by waiting (wrong credentials, no bucket) ends Start at once.
	Problems time.Duration
}

// Tier is a run: the tiers of all Datasets of the manifests.
type Tier struct {
	options  Options
	state    *state
	datasets []*dataset
	loads    []*v1alpha1.DataLoad // in the order in which they run
}

// Start brings the tiers up, mounts them, and returns when every Dataset can be read. Warm runs the
// DataLoads. After an error everything is undone.
func Start(ctx context.Context, o Options) (t *Tier, err error) {
	if o.Log == nil {
		o.Log = io.Discard
	}
	if o.Workers == 0 {
		o.Workers = 4
	}
	if o.Problems == 0 {
		o.Problems = 10 * time.Second
	}
	set, err := manifest.Read(o.Manifests...)
	if err != nil {
		return nil, err
	}
	t = &Tier{options: o, loads: set.Loads()}
	for _, kind := range slices.Sorted(maps.Keys(set.Ignored)) {
		t.logf("not used: %s of %s", count(int64(set.Ignored[kind]), "object"), kind)
	}
	if len(set.Datasets) == 0 {
		return nil, fmt.Errorf("%s: no Dataset of %s in it; write one, or name another file or folder", strings.Join(o.Manifests, ", "), v1alpha1.GroupVersion)
	}
	if o.Mount != "" {
		if err := mount.Supported(); err != nil {
			return nil, fmt.Errorf("cannot mount at %s: %w; without --mount, `stepcache get` and `ls` read the dataset", o.Mount, err)
		}
	}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	if t.state, err = openState(); err != nil {
		return t, err
	}
	if o.Mount != "" {
		if t.options.Mount, err = t.state.mountFolder(o.Mount); err != nil {
			return t, err
		}
	}
	shares, err := t.memoryShares(set.Datasets)
	if err != nil {
		return t, err
	}
	for i := range set.Datasets {
		d, err := t.newDataset(set.Datasets[i], set, shares[i])
		if err != nil {
			return t, err
		}
		if o.Mount != "" && slices.ContainsFunc(t.datasets, func(other *dataset) bool { return other.object.Name == d.object.Name }) {
			return t, fmt.Errorf("two Datasets are named %s and would be mounted at the same folder: run their namespaces one at a time", d.object.Name)
		}
		t.datasets = append(t.datasets, d)
		if o.Mount != "" {
			d.target = filepath.Join(t.options.Mount, d.object.Name)
			if err := t.state.claim(d.target); err != nil {
				return t, err
			}
		}
	}
	for _, d := range t.datasets {
		if err := d.start(); err != nil {
			return t, err
		}
	}
	for _, d := range t.datasets {
		if err := d.waitReady(ctx); err != nil {
			return t, err
		}
		if d.s3 != nil {
			t.logf("dataset %s: S3 endpoint %s, bucket %s; for clients: . %s", name(d.object), d.s3.endpoint(0), d.object.Name, d.s3.envFile())
		}
	}
	if o.Mount != "" {
		for _, d := range t.datasets {
			if err := d.mount(ctx); err != nil {
				return t, err
			}
		}
	}
	return t, nil
}

// memoryShares decides what one worker of each Dataset may hold here, so that manifests made for a
// cluster also run on one machine; it says what it changed.
func (t *Tier) memoryShares(datasets []*v1alpha1.Dataset) ([]int64, error) {
	machine, err := meminfo.Read()
	if err != nil {
		return nil, err
	}
	available := machine.Available
	limit := t.options.Memory
	if limit == 0 {
		limit = available / 2
	} else if limit > available {
		return nil, fmt.Errorf("--memory %s is more than the %s that this machine has available", humanize.IBytes(uint64(limit)), humanize.IBytes(uint64(available)))
	}
	byWorkers, byMemory, raise := "", "", ""
	if t.options.Flags {
		byWorkers, byMemory, raise = " (--workers)", " (--memory)", ", or raise --memory"
	}
	var total int64
	shares := make([]int64, len(datasets))
	for i := range datasets {
		w := &datasets[i].Spec.Workers
		memory := w.MemoryBytes()
		if n := int32(t.options.Workers); w.Replicas > n {
			gathered := ""
			if t.options.Gather {
				memory = (w.TotalBytes() + int64(n) - 1) / int64(n)
				gathered = fmt.Sprintf(", with %s each", humanize.IBytes(uint64(memory)))
			}
			t.logf("dataset %s: %s on this machine instead of %d%s%s", name(datasets[i]), count(int64(n), "worker"), w.Replicas, gathered, byWorkers)
			w.Replicas = n
			w.Copies = min(w.Copies, n)
		}
		shares[i] = memory
		total += memory * int64(w.Replicas)
	}
	if total <= limit {
		return shares, nil
	}
	const least = 16 << 20 // as the API's own minimum
	for i := range shares {
		scaled := int64(float64(shares[i]) * float64(limit) / float64(total))
		if scaled < least {
			return nil, fmt.Errorf("the Datasets want %s of memory, and %s is to be had: lower spec.workers%s", humanize.IBytes(uint64(total)), humanize.IBytes(uint64(limit)), raise)
		}
		t.logf("dataset %s: %s a worker on this machine instead of %s%s", name(datasets[i]), humanize.IBytes(uint64(scaled)), humanize.IBytes(uint64(shares[i])), byMemory)
		shares[i] = scaled
	}
	return shares, nil
}

// count is a number of things for people.
func count(n int64, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

func (t *Tier) logf(format string, args ...any) { fmt.Fprintf(t.options.Log, format+"\n", args...) }

// Warm runs the DataLoads one after the other, those that others wait for first. done gets nil for each that
// completed, or why it failed, which does not keep the command from running, since reads still go through; only a
// load that pins, and so promises that the bytes stay, is an error of Warm.
func (t *Tier) Warm(ctx context.Context, progress func(load string, s client.LoadSum), done func(load string, failed error)) error {
	for _, l := range t.loads {
		id := l.Namespace + "/" + l.Name
		i := slices.IndexFunc(t.datasets, func(d *dataset) bool {
			return d.object.Namespace == l.Namespace && d.object.Name == l.Spec.DatasetRef.Name
		}) // found: manifests with a reference to nothing are refused
		if l.Spec.Schedule != "" {
			t.logf("dataload %s: run once; local mode does not keep its schedule %q", id, l.Spec.Schedule)
		}
		err := t.datasets[i].load(ctx, l, func(s client.LoadSum) { progress(id, s) })
		if err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("dataload %s: %w", id, context.Cause(ctx))
			}
			if l.Spec.Pin {
				return fmt.Errorf("dataload %s: %w", id, err)
			}
			// The load's own name, and whose it is, is said already.
			text := strings.TrimPrefix(err.Error(), "dataset "+name(t.datasets[i].object)+": ")
			text = strings.ReplaceAll(text, "load "+loadID(l)+": ", "")
			err = errors.New(text + "; the steps read the rest from the bucket")
		}
		done(id, err)
	}
	return nil
}

// Env is what a command run beside the tier needs: STEPCACHE_TIER, and with a mount STEPCACHE_MOUNT,
// STEPCACHE_DATASET_NAME for each Dataset, and STEPCACHE_DATASET where there is one only. One that is
// writable also gives STEPCACHE_S3_ENDPOINT, STEPCACHE_S3_BUCKET, and STEPCACHE_S3_CREDENTIALS, the folder of
// its access keys.
func (t *Tier) Env() []string {
	dir := t.state.dir
	if len(t.datasets) == 1 {
		dir = t.datasets[0].folder.Dir
	}
	env := []string{tier.Env + "=" + dir}
	if len(t.datasets) == 1 && t.datasets[0].s3 != nil {
		s := t.datasets[0].s3
		env = append(env, "STEPCACHE_S3_ENDPOINT="+s.endpoint(0), "STEPCACHE_S3_BUCKET="+s.bucket, "STEPCACHE_S3_CREDENTIALS="+s.dir)
	}
	if t.options.Mount == "" {
		return env
	}
	env = append(env, "STEPCACHE_MOUNT="+t.options.Mount)
	for _, d := range t.datasets {
		env = append(env, "STEPCACHE_DATASET_"+envName(d.object.Name)+"="+d.target)
		if len(t.datasets) == 1 {
			env = append(env, "STEPCACHE_DATASET="+d.target)
		}
	}
	return env
}

// envName is the name of a Dataset as a part of an environment variable's.
func envName(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '-' || r == '.' {
			return '_'
		}
		return r
	}, strings.ToUpper(s))
}

// Report is what the run's tiers did.
type Report struct {
	Dataset string              `json:"dataset"`
	Mounted string              `json:"mounted,omitempty"`
	Status  []wire.WorkerStatus `json:"workers"`
	// Restarts is how often a worker was started again: what it had counted before is lost.
	Restarts int64 `json:"restarts,omitempty"`
}

// Report asks the workers.
func (t *Tier) Report(ctx context.Context) ([]Report, error) {
	var out []Report
	var errs []error
	for _, d := range t.datasets {
		s, err := d.control.Status(ctx)
		if err != nil {
			errs = append(errs, err)
		}
		out = append(out, Report{Dataset: name(d.object), Mounted: d.target, Status: s, Restarts: d.workers.again.Load()})
	}
	return out, errors.Join(errs...)
}

// Close stops everything and removes what the run made. It may be called more than once.
func (t *Tier) Close() {
	if t.state == nil {
		return
	}
	for _, d := range slices.Backward(t.datasets) {
		d.close()
	}
	t.state.close()
	t.state = nil
}

func name(d *v1alpha1.Dataset) string { return d.Namespace + "/" + d.Name }
