package worker

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// maxSnapshotBytes bounds what is pulled from a peer: some fifty million files.
const maxSnapshotBytes = 8 << 30

// largeAgain is the least pause after a listing for which there is no room: to count it takes as many requests.
const largeAgain = 10 * time.Minute

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
// others follow the lister. It is the only one that changes which snapshot is current. A writable dataset
// has none, since its names are asked for as they are now: what was listed before is kept for those who read it.
func (w *Worker) keepSnapshot(ctx context.Context) error {
	src, err := w.openSources(ctx)
	if err != nil {
		return nil // ctx ended
	}
	w.sources.Store(src)
	for i, o := range src.sources {
		// Of mounts of one bucket, which has one URL, only the path tells whose figures these are.
		of := prometheus.WrapRegistererWith(prometheus.Labels{"mount": src.mounts[i].Path}, w.registry)
		if err := of.Register(o.Meter); err != nil {
			w.log.Warn("source without metrics", "source", o.URL(), "mount", src.mounts[i].Path, "error", err)
		}
	}
	w.loadSnapshots(src)
	if w.gateway != nil {
		var meeting sync.WaitGroup
		meeting.Go(func() { w.meetBuckets(ctx, src) })
		defer meeting.Wait()
	}

	k := &snapshotKeeper{w: w, src: src, wait: newBackoff(), tried: make(map[wire.Digest]time.Time)}
	for {
		if w.gateway == nil {
			k.step(ctx)
		}
		w.peers.keep(w.members.view().Members)
		w.removeSnapshots(w.snapshots.expire())
		select {
		case <-ctx.Done():
			return nil
		case <-w.clock.After(pollInterval):
		case <-k.rest:
			k.rest = nil
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
	// listed is when the current snapshot's last listing by this worker began; zero: another made it.
	listed time.Time
	// tried is when each snapshot that a reader wanted was last asked for.
	tried map[wire.Digest]time.Time
	// rest tells when what failed may be tried again unasked, whatever else wakes the loop before; nil: at once.
	rest <-chan time.Time
	wait *backoff.ExponentialBackOff
	// behind is since when the lister's snapshot is not to be had; said is what of that is told.
	behind time.Time
	said   wire.Status
}

// step does what is due.
func (k *snapshotKeeper) step(ctx context.Context) {
	w := k.w
	v := w.members.view()
	m, ok := v.Lister(w.config.Dataset)
	lister := ok && m.ID == w.config.ID
	if lister != k.lister {
		k.rest, k.wait = nil, newBackoff()
	}
	if !lister {
		k.lister = false
		w.snapshots.setSettled(true)
		if !ok || k.rest != nil || !k.follow(ctx, v, m) {
			return
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
		// A listing that found nothing new leaves the old snapshot, with its old time, in place; and only its own
		// time is not moved when somebody sets the clock.
		since := k.listed
		if since.IsZero() {
			since = cur.Created()
		}
		age := w.clock.Now().Sub(since)
		cur.release()
		w.snapshots.setSettled(true)
		every := time.Duration(w.config.Refresh)
		if every == 0 || age >= 0 && age < every {
			return
		}
	}
	if k.rest == nil {
		k.list(ctx)
	}
}

// pause has nothing tried again unasked for a while, and no sooner than after least.
func (k *snapshotKeeper) pause(least time.Duration) {
	k.rest = k.w.clock.After(max(k.wait.NextBackOff(), least))
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
	cur, current := w.snapshots.get(wire.Digest{})
	if current {
		k.move(cur)
		cur.release()
	} else {
		// The tries of one listing may go on for a while, and whoever waits for the first should know why.
		ctx = source.NotifyTries(ctx, func(err error) {
			w.problems.set(problemSnapshot, fmt.Errorf("dataset %s: list: %w", w.config.Dataset, err))
		})
	}
	least := time.Duration(0)
	room, limited := w.buildRoom()
	most := int64(0)
	if limited {
		most = max(1, room)
	}
	snap, err := catalog.List(ctx, k.src.mounts, k.src.plain(), most, func(files, bytes int64) {
		w.listed.Store(files)
	})
	if large := (*catalog.LargeError)(nil); errors.As(err, &large) {
		err = fmt.Errorf("%w: set workers.memory to %dGi or more, or make several datasets of its prefixes", err, memoryFor(w.config.Memory, large.Need-room))
		least = largeAgain
	}
	if err != nil {
		err = fmt.Errorf("dataset %s: list: %w", w.config.Dataset, err)
		if ctx.Err() == nil {
			kind := problemSnapshot
			if current { // it serves on
				kind, least = problemRefresh, max(least, w.clock.Now().Sub(start))
				k.wait.MaxInterval = max(k.wait.MaxInterval, time.Duration(w.config.Refresh))
			}
			w.problems.set(kind, err)
			k.pause(least)
		}
		return refreshResult{err: err}
	}
	if limited {
		debug.FreeOSMemory() // of what it was made with, before it is written beside that
	}
	k.rest = nil
	k.wait.Reset()
	w.log.Info("listed the bucket", "files", snap.Files(), "bytes", snap.Bytes(), "took", w.clock.Now().Sub(start))
	k.listed = start
	d := snap.Digest()
	n, ok := w.snapshots.get(d)
	if ok {
		snap.Close() // nothing is new
	} else {
		in := inFolder
		if mapped, err := w.saveSnapshot(snap); err != nil {
			// It serves from heap then; only a restart lists again.
			w.log.Warn("snapshot not saved", "error", err)
			in = inHeap
		} else {
			snap.Close()
			snap = mapped
		}
		n = w.snapshots.put(snap, in, k.src)
	}
	k.adopt(n)
	w.snapshots.setSettled(true)
	return refreshResult{digest: d}
}

// move brings the current snapshot into the folder if it is in heap, where the next one is built.
func (k *snapshotKeeper) move(cur *snapshot) {
	if cur.medium != inHeap {
		return
	}
	mapped, err := k.w.saveSnapshot(cur.Snapshot)
	if err != nil {
		k.w.log.Warn("snapshot not saved", "error", err)
		return
	}
	k.w.snapshots.moved(cur, mapped)
}

// adopt makes a held snapshot the current one and releases it.
func (k *snapshotKeeper) adopt(n *snapshot) {
	w := k.w
	w.snapshots.setCurrent(n)
	d := n.Digest()
	n.release()
	if err := w.saveCurrent(d); err != nil {
		w.log.Warn("current snapshot not noted", "error", err)
	}
	w.problems.set(problemSnapshot, nil)
	w.problems.set(problemRefresh, nil)
}

// follow takes over the lister's current snapshot. While the lister does not answer, a worker without any
// snapshot takes another's. The first one of a new release finds nobody who understands it, and has to list itself
// (alone): until it has a snapshot none of the others is replaced.
func (k *snapshotKeeper) follow(ctx context.Context, v *view, lister ring.Member) (alone bool) {
	w := k.w
	err := k.pullCurrent(ctx, lister)
	if err == nil {
		k.behind, k.said = time.Time{}, wire.OK
		k.wait.Reset()
		w.problems.set(problemSnapshot, nil)
		w.problems.set(problemRefresh, nil)
		return false
	}
	if ctx.Err() != nil {
		return false
	}
	if k.behind.IsZero() {
		k.behind = w.clock.Now()
	}
	passes := unready(err) || errors.Is(err, wire.ErrVersion)
	if !passes {
		k.pause(0) // it would be received anew each time
	}
	if cur, ok := w.snapshots.get(wire.Digest{}); ok {
		cur.release()
		w.problems.set(problemSnapshot, nil)
		// Its first words stay: later ones differ by ports only.
		if s := wire.StatusOf(err); s != k.said && (!passes || w.clock.Now().Sub(k.behind) >= behindPatience) {
			k.said = s
			w.problems.set(problemRefresh, fmt.Errorf("dataset %s: the old listing is served, since that of worker %s, which lists, is not taken over: %w", w.config.Dataset, lister.ID, err))
		}
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

// behindPatience is how long a lister that is not ready is nothing to tell of: more than its restart takes.
const behindPatience = handOverPatience

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
			k.adopt(n)
			k.listed = time.Time{}
		} else {
			n.release()
		}
		return nil
	}
	snap, in, err := w.pullSnapshot(ctx, m, head.Body, head.Size, true)
	if err != nil {
		return err
	}
	if !wanted(snap) {
		snap.Close()
		w.removeSnapshots([]wire.Digest{head.Body})
		return nil
	}
	w.log.Info("took over a snapshot", "from", m.ID, "digest", hex.EncodeToString(head.Body[:]), "files", snap.Files())
	k.adopt(w.snapshots.put(snap, in, k.src))
	k.listed = time.Time{}
	return nil
}

// fetchAgain is how long a snapshot that no peer had is not asked for again.
const fetchAgain = 5 * time.Second

// maxTried is how many are asked for in that time: digests are the readers' to choose.
const maxTried = 64

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
	if len(k.tried) >= maxTried {
		maps.DeleteFunc(k.tried, func(_ wire.Digest, last time.Time) bool { return now.Sub(last) >= fetchAgain })
		if len(k.tried) >= maxTried {
			return
		}
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
		snap, in, err := w.pullSnapshot(ctx, m, d, head.Size, false)
		if errors.Is(err, errNoRoom) {
			w.log.Info("an old snapshot that is read is not kept", "error", err)
			w.snapshots.miss(d, err)
			return
		}
		if err != nil {
			w.log.Warn("snapshot not taken over", "from", m.ID, "error", err)
			continue
		}
		w.snapshots.put(snap, in, k.src).release()
		return
	}
	if ctx.Err() == nil {
		w.snapshots.miss(d, nil)
	}
}

// errNoRoom: a snapshot has no room beside those in use.
var errNoRoom = errors.New("no room for the snapshot")

// reserve takes room for a snapshot that is about to come; see snapshots.reserve.
func (w *Worker) reserve(size int64, in medium, current bool) (end func(), err error) {
	dropped, end, ok := w.snapshots.reserve(size, in, current)
	w.removeSnapshots(dropped)
	if !ok {
		return nil, fmt.Errorf("%w of %d bytes beside those in use: worker %s has %d bytes for snapshots; raise the workers' memory", errNoRoom, size, w.config.ID, SnapshotRoom(w.config.Memory))
	}
	return end, nil
}

// pullSnapshot fetches a snapshot by its digest into this worker's folder. One that is to be current, and that the folder
// does not take, is kept in heap where that has room.
func (w *Worker) pullSnapshot(ctx context.Context, m ring.Member, d wire.Digest, size int64, current bool) (snap *catalog.Snapshot, in medium, err error) {
	if size <= 0 || size > maxSnapshotBytes {
		return nil, in, fmt.Errorf("%w: snapshot of %d bytes from worker %s", wire.ErrCorrupt, size, m.ID)
	}
	write := func(to io.Writer) error {
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
	}
	end, err := w.reserve(size, inFolder, current)
	if err != nil {
		return nil, in, fmt.Errorf("snapshot from worker %s: %w", m.ID, err)
	}
	receive := func() error {
		snap, err = w.receiveSnapshot(d, write, func(*catalog.Snapshot) error { return nil })
		return err
	}
	if current {
		err = w.intoFolder(receive)
	} else {
		err = receive()
	}
	end()
	var folder *fs.PathError
	if current && errors.As(err, &folder) {
		full := err
		if end, err = w.reserve(size, inHeap, current); err == nil {
			in = inHeap
			snap, err = heapSnapshot(d, size, write)
			end()
		}
		if err == nil {
			w.log.Warn("snapshot is kept in heap", "error", full)
		} else {
			err = fmt.Errorf("%w; and %w", full, err)
		}
	}
	if err != nil {
		return nil, in, fmt.Errorf("snapshot from worker %s: %w", m.ID, err)
	}
	return snap, in, nil
}

// heapSnapshot has a snapshot written into heap.
func heapSnapshot(d wire.Digest, size int64, write func(io.Writer) error) (*catalog.Snapshot, error) {
	b := bytes.NewBuffer(make([]byte, 0, size))
	if err := write(b); err != nil {
		return nil, err
	}
	snap, err := catalog.Open(b.Bytes())
	if err == nil {
		err = named(snap, d)
	}
	return snap, err
}

// named is an error unless the snapshot has that name.
func named(snap *catalog.Snapshot, d wire.Digest) error {
	if snap.Digest() != d {
		return fmt.Errorf("%w: it is not the one asked for", wire.ErrCorrupt)
	}
	return nil
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
	if err = named(snap, d); err == nil {
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
	end, err := w.reserve(int64(len(snap.Encoded())), inFolder, true)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := os.MkdirAll(w.snapshotDir(), 0o700); err != nil {
		return nil, err
	}
	path := w.snapshotPath(snap.Digest())
	if err := w.intoFolder(func() error { return replaceFile(path, snap.Encoded()) }); err != nil {
		return nil, err
	}
	return catalog.OpenFile(path)
}

// intoFolder has the current snapshot written, once more where the folder had no room beside the others.
func (w *Worker) intoFolder(write func() error) error {
	err := write()
	if errors.Is(err, unix.ENOSPC) {
		if dropped := w.snapshots.clear(); len(dropped) > 0 {
			w.log.Warn("old snapshots are dropped for the current one", "dropped", len(dropped), "error", err)
			w.removeSnapshots(dropped)
			err = write()
		}
	}
	return err
}

// removeSnapshots removes the files of dropped snapshots.
func (w *Worker) removeSnapshots(dropped []wire.Digest) {
	for _, d := range dropped {
		os.Remove(w.snapshotPath(d))
	}
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
	var cur *snapshot
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
		n := w.snapshots.put(snap, inFolder, src)
		defer n.release()
		if name == strings.TrimSpace(string(current)) && src.matches(n.Snapshot) {
			cur = n
		}
	}
	if cur != nil && w.gateway == nil { // once all are there, for who hands them over
		w.snapshots.setCurrent(cur)
		w.problems.set(problemSnapshot, nil)
	}
}
