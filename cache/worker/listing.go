package worker

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// maxSnapshotBytes bounds what is pulled from a peer: some fifty million files.
const maxSnapshotBytes = 8 << 30

// refreshRequest asks keepSnapshot to list the bucket now. The answer comes once, on reply.
type refreshRequest struct {
	reply chan refreshResult // buffered
}

type refreshResult struct {
	digest wire.Digest
	err    error
}

// errNotLister answers a refresh that reached a worker which does not list.
var errNotLister = errors.New("another worker lists the bucket")

// keepSnapshot opens the sources, then keeps the current snapshot: the lister lists the bucket, the
// others follow the lister. It is the only one that changes which snapshot is current.
func (w *Worker) keepSnapshot(ctx context.Context) error {
	w.problems.set(problemSnapshot, errNoSnapshot)
	src, err := w.openSources(ctx)
	if err != nil {
		return nil // ctx ended
	}
	w.sources.Store(src)
	for _, o := range src.sources {
		// Of two mounts of one bucket, the metrics tell the first; Status adds both up.
		if err := w.registry.Register(o.Meter); err != nil {
			w.log.Debug("source without metrics", "source", o.URL(), "error", err)
		}
	}
	w.loadSnapshots(src)

	k := &snapshotKeeper{w: w, src: src, wait: newBackoff(), tried: make(map[wire.Digest]time.Time)}
	for {
		next := k.step(ctx)
		w.peers.keep(w.members.view().Members)
		for _, d := range w.snapshots.expire() {
			os.Remove(w.snapshotPath(d))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.clock.After(next):
		case <-w.members.view().replaced:
		case r := <-w.refreshes:
			r.reply <- k.refresh(ctx)
		case d := <-w.wanted:
			k.fetch(ctx, d)
		}
	}
}

// snapshotKeeper is the state of keepSnapshot's loop.
type snapshotKeeper struct {
	w      *Worker
	src    *sources
	lister bool // this worker was the lister at the last step
	listed time.Time
	// tried is when each snapshot that a reader wanted was last asked for.
	tried map[wire.Digest]time.Time
	wait  interface {
		NextBackOff() time.Duration
		Reset()
	}
}

// step does what is due and says when to come again.
func (k *snapshotKeeper) step(ctx context.Context) time.Duration {
	w := k.w
	v := w.members.view()
	m, ok := v.Lister(w.config.Dataset)
	if !ok || m.ID != w.config.ID {
		k.lister = false
		w.snapshots.setSettled(true)
		if !ok || !k.follow(ctx, v, m) {
			return pollInterval
		}
	} else if !k.lister {
		// A lister that restarts, or that has just become it, first asks the others what is current, so
		// that neither its restart nor a move of the task lists the bucket again.
		w.snapshots.setSettled(false)
		k.newest(ctx, v)
		k.lister = true
	}
	cur, ok := w.snapshots.get(wire.Digest{})
	if ok {
		// A listing that found nothing new leaves the old snapshot, with its old time, in place.
		since := cur.Created()
		if k.listed.After(since) {
			since = k.listed
		}
		age := w.clock.Now().Sub(since)
		cur.release()
		w.snapshots.setSettled(true)
		every := time.Duration(w.config.Refresh)
		if every == 0 || age < every {
			return pollInterval
		}
	}
	if r := k.list(ctx); r.err != nil {
		return k.wait.NextBackOff()
	}
	k.wait.Reset()
	return pollInterval
}

// refresh lists the bucket because somebody asked.
func (k *snapshotKeeper) refresh(ctx context.Context) refreshResult {
	if m, ok := k.w.members.view().Lister(k.w.config.Dataset); !ok || m.ID != k.w.config.ID {
		return refreshResult{err: errNotLister}
	}
	return k.list(ctx)
}

// list lists the bucket into a new current snapshot.
func (k *snapshotKeeper) list(ctx context.Context) refreshResult {
	w := k.w
	w.log.Info("listing the bucket")
	start := w.clock.Now()
	if cur, ok := w.snapshots.get(wire.Digest{}); ok {
		cur.release()
	} else {
		// The tries of one listing may go on for a while, and whoever waits for the first should know why.
		ctx = source.NotifyTries(ctx, func(err error) {
			w.problems.set(problemSnapshot, fmt.Errorf("dataset %s: list: %w", w.config.Dataset, err))
		})
	}
	snap, err := catalog.List(ctx, k.src.mounts, k.src.plain(), func(files, bytes int64) {
		w.listed.Store(files)
	})
	if err != nil {
		err = fmt.Errorf("dataset %s: list: %w", w.config.Dataset, err)
		if ctx.Err() == nil {
			kind := problemRefresh
			if cur, ok := w.snapshots.get(wire.Digest{}); ok {
				cur.release() // the old one serves on
			} else {
				kind = problemSnapshot
			}
			w.problems.set(kind, err)
		}
		return refreshResult{err: err}
	}
	w.log.Info("listed the bucket", "files", snap.Files(), "bytes", snap.Bytes(), "took", w.clock.Now().Sub(start))
	k.listed = start
	d := snap.Digest()
	if mapped, err := w.saveSnapshot(snap); err != nil {
		// It serves from heap then; only a restart lists again.
		w.log.Warn("snapshot not saved", "error", err)
	} else {
		snap.Close()
		snap = mapped
	}
	k.adopt(snap)
	w.snapshots.setSettled(true)
	return refreshResult{digest: d}
}

// adopt makes snap the current snapshot.
func (k *snapshotKeeper) adopt(snap *catalog.Snapshot) {
	w := k.w
	n := w.snapshots.put(snap, k.src)
	w.snapshots.setCurrent(n)
	d := n.Digest()
	n.release()
	w.problems.set(problemSnapshot, nil)
	w.problems.set(problemRefresh, nil)
	if err := w.saveCurrent(d); err != nil {
		w.log.Warn("current snapshot not noted", "error", err)
	}
}

// follow takes over the lister's current snapshot. While the lister does not answer, a worker without any
// snapshot takes another's. The first one of a new release finds nobody who understands it, and has to list itself
// (alone): until it has a snapshot none of the others is replaced.
func (k *snapshotKeeper) follow(ctx context.Context, v *view, lister ring.Member) (alone bool) {
	w := k.w
	err := k.pullCurrent(ctx, lister)
	if err == nil {
		w.problems.set(problemSnapshot, nil)
		w.problems.set(problemRefresh, nil) // of a time when this worker was the lister
		return false
	}
	if cur, ok := w.snapshots.get(wire.Digest{}); ok {
		cur.release()
		w.problems.set(problemSnapshot, nil)
		return false
	}
	alone = errors.Is(err, wire.ErrVersion)
	for _, m := range v.Members {
		if m.ID == w.config.ID || m.ID == lister.ID {
			continue
		}
		other := k.pullCurrent(ctx, m)
		if other == nil {
			return false
		}
		alone = alone && errors.Is(other, wire.ErrVersion)
	}
	if alone {
		w.log.Info("the other workers are of another release, whose protocol differs: listing without them")
		return true
	}
	w.problems.set(problemSnapshot, fmt.Errorf("dataset %s: %s %s, which lists: %w", w.config.Dataset, wire.FollowingProblem, lister.ID, err))
	return false
}

// newest makes the newest of what this worker and its peers hold current, if it is of the mounts as they
// are configured now.
func (k *snapshotKeeper) newest(ctx context.Context, v *view) {
	w := k.w
	for _, m := range v.Members {
		if m.ID == w.config.ID {
			continue
		}
		if err := k.pullNewer(ctx, m); err != nil {
			w.log.Debug("peer has no snapshot to take over", "peer", m.ID, "error", err)
		}
	}
	if cur, ok := w.snapshots.get(wire.Digest{}); ok {
		if !k.src.matches(cur.Snapshot) {
			w.log.Info("the mounts were changed: listing anew")
			w.snapshots.clearCurrent()
		} else {
			w.problems.set(problemSnapshot, nil)
		}
		cur.release()
	}
}

// pullCurrent makes m's current snapshot this worker's.
func (k *snapshotKeeper) pullCurrent(ctx context.Context, m ring.Member) error {
	return k.pull(ctx, m, func(*catalog.Snapshot) bool { return true })
}

// pullNewer does so only if it is newer than this worker's and of the same mounts.
func (k *snapshotKeeper) pullNewer(ctx context.Context, m ring.Member) error {
	return k.pull(ctx, m, func(theirs *catalog.Snapshot) bool {
		if !k.src.matches(theirs) {
			return false
		}
		cur, ok := k.w.snapshots.get(wire.Digest{})
		if !ok {
			return true
		}
		defer cur.release()
		return theirs.Created().After(cur.Created())
	})
}

func (k *snapshotKeeper) pull(ctx context.Context, m ring.Member, wanted func(*catalog.Snapshot) bool) error {
	w := k.w
	ask, cancel := context.WithTimeout(ctx, wire.DialTimeout)
	head, _, err := w.peers.frame(ask, m, wire.Request{Op: wire.OpSnapshot, Epoch: w.members.view().Epoch})
	cancel()
	if err != nil {
		return err
	}
	if cur, ok := w.snapshots.get(wire.Digest{}); ok {
		same := cur.Digest() == head.Body
		cur.release()
		if same {
			return nil
		}
	}
	if n, ok := w.snapshots.get(head.Body); ok {
		if wanted(n.Snapshot) {
			w.snapshots.setCurrent(n)
			if err := w.saveCurrent(head.Body); err != nil {
				w.log.Warn("current snapshot not noted", "error", err)
			}
		}
		n.release()
		return nil
	}
	snap, err := w.pullSnapshot(ctx, m, head.Body, head.Size)
	if err != nil {
		return err
	}
	if !wanted(snap) {
		snap.Close()
		return nil
	}
	w.log.Info("took over a snapshot", "from", m.ID, "digest", hex.EncodeToString(head.Body[:]), "files", snap.Files())
	k.adopt(snap)
	return nil
}

// fetchAgain is how long a snapshot that no peer had is not asked for again.
const fetchAgain = 5 * time.Second

// wantSnapshot asks keepSnapshot to get a snapshot from a peer: readers of an old one come to a worker
// that was added or lost its memory since.
func (w *Worker) wantSnapshot(d wire.Digest) {
	if d == (wire.Digest{}) {
		return
	}
	select {
	case w.wanted <- d:
	default: // it asks again
	}
}

// fetch gets a snapshot that is not the current one from any peer that holds it.
func (k *snapshotKeeper) fetch(ctx context.Context, d wire.Digest) {
	w := k.w
	now := w.clock.Now()
	if last, ok := k.tried[d]; ok && now.Sub(last) < fetchAgain {
		return
	}
	if len(k.tried) >= 64 { // digests are the readers' to choose
		clear(k.tried)
	}
	k.tried[d] = now
	if n, ok := w.snapshots.get(d); ok {
		n.release()
		return
	}
	for _, m := range w.members.view().Members {
		if m.ID == w.config.ID {
			continue
		}
		ask, cancel := context.WithTimeout(ctx, wire.DialTimeout)
		head, _, err := w.peers.frame(ask, m, wire.Request{Op: wire.OpSnapshot, Snapshot: d})
		cancel()
		if err != nil {
			continue
		}
		snap, err := w.pullSnapshot(ctx, m, d, head.Size)
		if err != nil {
			w.log.Warn("snapshot not taken over", "from", m.ID, "error", err)
			continue
		}
		w.snapshots.put(snap, k.src).release()
		return
	}
	if ctx.Err() == nil {
		w.snapshots.miss(d)
	}
}

// pullSnapshot fetches a snapshot by its digest into this worker's folder.
func (w *Worker) pullSnapshot(ctx context.Context, m ring.Member, d wire.Digest, size int64) (*catalog.Snapshot, error) {
	if size <= 0 || size > maxSnapshotBytes {
		return nil, fmt.Errorf("%w: snapshot of %d bytes from worker %s", wire.ErrCorrupt, size, m.ID)
	}
	snap, err := w.receiveSnapshot(d, func(to io.Writer) error {
		for off := int64(0); off < size; {
			ask, cancel := context.WithTimeout(ctx, wire.WorkerTimeout)
			n := min(size-off, wire.MaxPayload)
			rep, p, err := w.peers.frame(ask, m, wire.Request{Op: wire.OpSnapshot, Snapshot: d, Off: off, Length: int32(n)})
			cancel()
			if err != nil {
				return err
			}
			if rep.Size != size || int64(len(p)) != n {
				return fmt.Errorf("%w: it changed its length", wire.ErrCorrupt)
			}
			if _, err := to.Write(p); err != nil {
				return err
			}
			off += n
		}
		return nil
	}, func(*catalog.Snapshot) error { return nil })
	if err != nil {
		return nil, fmt.Errorf("snapshot from worker %s: %w", m.ID, err)
	}
	return snap, nil
}

// receiveSnapshot has a snapshot written, and keeps it in this worker's folder if it is the one of that name and check
// has nothing against it.
func (w *Worker) receiveSnapshot(d wire.Digest, write func(io.Writer) error, check func(*catalog.Snapshot) error) (*catalog.Snapshot, error) {
	if err := os.MkdirAll(w.snapshotDir(), 0o700); err != nil {
		return nil, err
	}
	tmp, err := os.CreateTemp(w.snapshotDir(), "pull-*")
	if err != nil {
		return nil, err
	}
	defer os.Remove(tmp.Name()) // already renamed when all went well
	defer tmp.Close()
	if err := write(tmp); err != nil {
		return nil, err
	}
	if err := tmp.Close(); err != nil {
		return nil, err
	}
	snap, err := catalog.OpenFile(tmp.Name())
	if err != nil {
		return nil, err
	}
	if snap.Digest() != d {
		err = fmt.Errorf("%w: it is not the one asked for", wire.ErrCorrupt)
	}
	if err == nil {
		err = check(snap)
	}
	if err == nil {
		err = os.Rename(tmp.Name(), w.snapshotPath(d))
	}
	if err != nil {
		snap.Close()
		return nil, err
	}
	return snap, nil
}

// What is kept in Dir: snapshots/HEX.snap, and the name of the current one in snapshots/current.

func (w *Worker) snapshotDir() string { return filepath.Join(w.config.Dir, "snapshots") }

func (w *Worker) snapshotPath(d wire.Digest) string {
	return filepath.Join(w.snapshotDir(), hex.EncodeToString(d[:])+".snap")
}

// saveSnapshot writes snap to its file and opens that, so that the heap need not hold it.
func (w *Worker) saveSnapshot(snap *catalog.Snapshot) (*catalog.Snapshot, error) {
	if err := os.MkdirAll(w.snapshotDir(), 0o700); err != nil {
		return nil, err
	}
	path := w.snapshotPath(snap.Digest())
	if err := replaceFile(path, snap.Encoded()); err != nil {
		return nil, err
	}
	return catalog.OpenFile(path)
}

func (w *Worker) saveCurrent(d wire.Digest) error {
	return replaceFile(filepath.Join(w.snapshotDir(), "current"), []byte(hex.EncodeToString(d[:])+"\n"))
}

// replaceFile writes a file that a reader sees whole or not at all.
func replaceFile(path string, b []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "new-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if _, err := tmp.Write(b); err != nil {
		tmp.Close()
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// loadSnapshots opens what an earlier run left in Dir. What does not open is removed.
func (w *Worker) loadSnapshots(src *sources) {
	entries, err := os.ReadDir(w.snapshotDir())
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			w.log.Warn("saved snapshots not read", "error", err)
		}
		return
	}
	current, err := os.ReadFile(filepath.Join(w.snapshotDir(), "current"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.log.Warn("current snapshot not known", "error", err)
	}
	for _, e := range entries {
		path := filepath.Join(w.snapshotDir(), e.Name())
		name, ok := strings.CutSuffix(e.Name(), ".snap")
		if !ok {
			if e.Name() != "current" {
				os.Remove(path) // left behind by a crash in the middle of a write
			}
			continue
		}
		snap, err := catalog.OpenFile(path)
		if err == nil && w.snapshotPath(snap.Digest()) != path {
			snap.Close()
			err = errors.New("its digest is not its name")
		}
		if err != nil {
			w.log.Warn("saved snapshot is of no use", "file", path, "error", err)
			os.Remove(path)
			continue
		}
		n := w.snapshots.put(snap, src)
		if name == strings.TrimSpace(string(current)) && src.matches(n.Snapshot) {
			w.snapshots.setCurrent(n)
			w.problems.set(problemSnapshot, nil)
		}
		n.release()
	}
}
