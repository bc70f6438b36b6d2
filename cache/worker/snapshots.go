package worker

import (
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
)

// Old snapshots are kept while mounts read by them: as long as they were asked for within keepUnused, which readers see
// to (wire.RemindEvery). Beyond maxSnapshots those go that nobody reminded of lately, and any whose room the current one
// needs: a reader gives its own back, once there is room.
const (
	keepUnused   = 30 * time.Minute
	lately       = 3 * wire.RemindEvery / 2
	maxSnapshots = 8
)

// SnapshotRoom is what a worker of so much memory has for snapshots beside it, in bytes: once in its folder, where they
// are kept and may take a quarter of that memory as well, and once in heap, where one is built, or is kept that the folder
// does not take.
func SnapshotRoom(memory int64) int64 { return min(max(memory/8, 64<<20), 1<<30) }

// buildRoom is how many bytes a snapshot may take while it is made: what the control group has left now, but for a
// sixteenth. limited is false where that is not known.
func (w *Worker) buildRoom() (room int64, limited bool) {
	debug.FreeOSMemory() // what is left is in use
	left, limit, limited := w.deps.Memory()
	// What a container that ended left in memory counts for the pod alone, whose group is not to be seen from within.
	return min(left, limit-w.store.Stats().Used) / 16 * 15, limited
}

// memoryFor is the memory in GiB with which a worker has so many bytes more.
func memoryFor(memory, more int64) int64 { return (memory + more*16/15 + 1<<30 - 1) >> 30 }

// medium is where the bytes of a snapshot are.
type medium int

const (
	inFolder medium = iota
	inHeap
)

// snapshot is a held snapshot with the sources of its mounts. It is closed when it was dropped from the
// set and its last user released it.
type snapshot struct {
	*catalog.Snapshot
	sources []*scheme.Source
	medium  medium
	set     *snapshots
	users   int       // guarded by set.mu
	used    time.Time // guarded by set.mu
	dropped bool      // guarded by set.mu
}

// file is one file of a snapshot with what is needed to read it. It does not refer to the snapshot's
// memory, so that it may outlive it. Of what was read by its name it has object and ring only.
type file struct {
	object source.Object
	ring   ring.Object
	source *scheme.Source
	// snapshot and index name it to other workers.
	snapshot wire.Digest
	index    catalog.Index
}

func (f file) String() string {
	if f.source == nil {
		return f.object.Key
	}
	return f.source.URL() + "/" + f.object.Key
}

// file is the file with the given index.
func (s *snapshot) file(i catalog.Index) (file, bool) {
	mount, o, ok := s.Object(i)
	if !ok {
		return file{}, false
	}
	r, ok := s.Ring(i)
	if !ok {
		return file{}, false
	}
	return file{object: o, ring: r, source: s.sources[mount], snapshot: s.Digest(), index: i}, true
}

func (s *snapshot) release() {
	s.set.mu.Lock()
	s.users--
	last := s.users == 0 && s.dropped
	s.set.mu.Unlock()
	if last {
		s.Close()
	}
}

// snapshots are the snapshots that this worker holds, one of them current.
type snapshots struct {
	now    func() time.Time
	room   int64 // SnapshotRoom
	memory int64 // the worker's

	mu      sync.Mutex
	held    map[wire.Digest]*snapshot
	coming  [2]int64 // bytes of room that reserve gave, by medium
	current *snapshot
	misses  map[wire.Digest]miss
	// settled is set once this worker, if it is the lister, has made sure that no peer has a newer
	// snapshot; until then it does not tell others that its own is the current one.
	settled bool
}

// get is the snapshot of that name, or the current one for a zero digest; release it after use.
func (s *snapshots) get(d wire.Digest) (*snapshot, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := s.current
	if d != (wire.Digest{}) {
		found = s.held[d]
	}
	if found == nil {
		return nil, false
	}
	found.users++
	found.used = s.now()
	return found, true
}

// all are the snapshots that are held, the current one first; release them after use.
func (s *snapshots) all() []*snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := slices.Collect(maps.Values(s.held))
	for i, n := range held {
		n.users++
		if n == s.current {
			held[0], held[i] = held[i], held[0]
		}
	}
	return held
}

// find is the file of an object version, in whichever snapshot has it: errNoSnapshot if none is held, and
// source.ErrNotFound if it is in none. It walks all of them.
func (s *snapshots) find(o ring.Object) (file, error) {
	err := errNoSnapshot
	var found file
	for _, n := range s.all() {
		if err != nil {
			err = fmt.Errorf("%w: in no snapshot that is held", source.ErrNotFound)
			n.Walk(0, func(i catalog.Index) bool {
				if node, _ := n.Node(i); node.Size != o.Size { // identities are hashes, sizes are at hand
					return true
				}
				if r, ok := n.Ring(i); !ok || r.ID != o.ID {
					return true
				}
				found, _ = n.file(i)
				err = nil
				return false
			})
		}
		n.release()
	}
	return found, err
}

// put adds snap, or closes it if one of the same name is held, and returns the held one, to be released.
func (s *snapshots) put(snap *catalog.Snapshot, in medium, from *sources) *snapshot {
	s.mu.Lock()
	if have := s.held[snap.Digest()]; have != nil {
		have.users++
		have.used = s.now()
		s.mu.Unlock()
		snap.Close()
		return have
	}
	defer s.mu.Unlock()
	n := &snapshot{Snapshot: snap, sources: from.forSnapshot(snap), medium: in, set: s, users: 1, used: s.now()}
	s.held[snap.Digest()] = n
	return n
}

// moved has the same snapshot, which is in the folder now, take n's place. The caller uses n.
func (s *snapshots) moved(n *snapshot, snap *catalog.Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	to := &snapshot{Snapshot: snap, sources: n.sources, medium: inFolder, set: s, used: n.used}
	s.held[snap.Digest()] = to
	if s.current == n {
		s.current = to
	}
	n.dropped = true
}

// setCurrent makes a held snapshot the current one.
func (s *snapshots) setCurrent(n *snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = n
	n.used = s.now()
}

func (s *snapshots) setSettled(v bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settled = v
}

// tellable is the current snapshot if others may take it as such; release it after use.
func (s *snapshots) tellable() (*snapshot, bool) {
	s.mu.Lock()
	settled := s.settled
	s.mu.Unlock()
	if !settled {
		return nil, false
	}
	return s.get(wire.Digest{})
}

// idle are the snapshots that may be dropped, in the order in which they are: those that nobody reminded of lately by
// when somebody did, then the others by when they were listed. The caller holds s.mu.
func (s *snapshots) idle() []*snapshot {
	now := s.now()
	var idle []*snapshot
	for _, n := range s.held {
		if n != s.current && n.users == 0 {
			idle = append(idle, n)
		}
	}
	slices.SortFunc(idle, func(a, b *snapshot) int {
		if now.Sub(a.used) < lately && now.Sub(b.used) < lately {
			return a.Created().Compare(b.Created())
		}
		return a.used.Compare(b.used)
	})
	return idle
}

// drop takes away a snapshot that nobody uses; its file is the caller's to remove. The caller holds s.mu.
func (s *snapshots) drop(n *snapshot) wire.Digest {
	delete(s.held, n.Digest())
	n.dropped = true
	n.Close()
	return n.Digest()
}

// expire drops the snapshots that are of no use any more, or have no room, and returns their names.
func (s *snapshots) expire() (dropped []wire.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.idle() {
		unused := s.now().Sub(n.used)
		if unused >= keepUnused || unused >= lately && len(s.held) > maxSnapshots || s.bytes(n.medium) > s.most(n.medium) {
			dropped = append(dropped, s.drop(n))
		}
	}
	return dropped
}

// most is what those of a medium may take. In the folder the cache makes room for them, but not for any number; for two
// whatever they take, since a refresh must not end the one that everybody reads.
func (s *snapshots) most(in medium) int64 {
	if in == inHeap {
		return s.room
	}
	least := int64(0)
	if s.current != nil {
		least = 2 * int64(len(s.current.Encoded()))
	}
	return max(s.room, s.memory/4, least)
}

// reserve takes room for a snapshot of so many bytes that is about to come, until end is called after put. One that is
// to be current takes it from any that is idle, and the file system alone says that the folder has none. Another takes it
// only from those that nobody reminded of lately: those that are read would push each other out, and be given back by
// their readers, for ever. Without room nothing is dropped. The files of what was are the caller's to remove.
func (s *snapshots) reserve(size int64, in medium, current bool) (dropped []wire.Digest, end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var leave []*snapshot
	over := s.bytes(in) + size - s.most(in)
	for _, n := range s.idle() {
		if over <= 0 || !current && s.now().Sub(n.used) < lately {
			break
		}
		if n.medium == in {
			leave = append(leave, n)
			over -= int64(len(n.Encoded()))
		}
	}
	if over > 0 && !(current && in == inFolder) {
		return nil, nil, false
	}
	for _, n := range leave {
		dropped = append(dropped, s.drop(n))
	}
	s.coming[in] += size
	return dropped, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.coming[in] -= size
	}, true
}

// clear drops what nobody uses of the folder but for the current one. The files are the caller's to remove.
func (s *snapshots) clear() (dropped []wire.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.idle() {
		if n.medium == inFolder {
			dropped = append(dropped, s.drop(n))
		}
	}
	return dropped
}

// bytes is what all of a medium take, with those that come. The caller holds s.mu.
func (s *snapshots) bytes(in medium) int64 {
	n := s.coming[in]
	for _, h := range s.held {
		if h.medium == in {
			n += int64(len(h.Encoded()))
		}
	}
	return n
}

// closeAll closes every snapshot at the end, when nobody uses one any more.
func (s *snapshots) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, n := range s.held {
		delete(s.held, d)
		n.dropped = true
		if n.users == 0 {
			n.Close()
		}
	}
	s.current = nil
}

var errNoSnapshot = errors.New(wire.ListingProblem)

// unknownSnapshot is the error of a request for a snapshot that is not here.
func (w *Worker) unknownSnapshot(d wire.Digest) error {
	if d != (wire.Digest{}) {
		err := fmt.Errorf("%w %x: worker %s does not hold it", wire.ErrUnknownSnapshot, d[:6], w.config.ID)
		for _, why := range []error{w.snapshots.missed(d).why, w.problems.of(problemRefresh)} {
			if why != nil {
				err = fmt.Errorf("%w: %v", err, why)
			}
		}
		return err
	}
	if w.gateway != nil {
		return fmt.Errorf("%w: worker %s: dataset %s takes puts (access: ReadWrite) and has no snapshot: ask for its names as they are now", source.ErrInvalid, w.config.ID, w.config.Dataset)
	}
	if err := w.problems.ready(); err != nil {
		// Its words only: whoever asks shall wait or ask another, not take this worker's bucket for lost.
		return fmt.Errorf("%w: worker %s: %v", wire.ErrUnknownSnapshot, w.config.ID, err)
	}
	return fmt.Errorf("%w: worker %s has none yet", wire.ErrUnknownSnapshot, w.config.ID)
}

// miss notes that every other worker was asked for a snapshot, and none gave it.
func (s *snapshots) miss(d wire.Digest, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.misses) >= 64 { // digests are the readers' to choose
		clear(s.misses)
	}
	if s.misses == nil {
		s.misses = make(map[wire.Digest]miss)
	}
	s.misses[d] = miss{s.misses[d].times + 1, why}
}

// miss is how often all others were asked for a snapshot that is not had, and why it is not if somebody has it.
type miss struct {
	times int
	why   error
}

func (s *snapshots) missed(d wire.Digest) miss {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.misses[d]
}

// clearCurrent forgets which snapshot is current.
func (s *snapshots) clearCurrent() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = nil
}
