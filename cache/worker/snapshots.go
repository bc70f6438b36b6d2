package worker

import (
	"errors"
	"fmt"
	"maps"
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
// to (wire.RemindEvery). Beyond maxSnapshots those go that nobody reminded of lately, and any once all take more than a
// part of the worker's memory: a reader gives its own back.
const (
	keepUnused   = 30 * time.Minute
	lately       = 3 * wire.RemindEvery / 2
	maxSnapshots = 8
	snapshotPart = 16
)

// snapshot is a held snapshot with the sources of its mounts. It is closed when it was dropped from the
// set and its last user released it.
type snapshot struct {
	*catalog.Snapshot
	sources []*scheme.Source
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
	memory int64 // the worker's

	mu      sync.Mutex
	held    map[wire.Digest]*snapshot
	current *snapshot
	misses  map[wire.Digest]int // how often all others were asked for one that none gave
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

// find is the file of an object version, in whichever snapshot has it: errNoSnapshot if none is held, and
// source.ErrNotFound if it is in none. It walks all of them.
func (s *snapshots) find(o ring.Object) (file, error) {
	s.mu.Lock()
	held := slices.Collect(maps.Values(s.held))
	for _, n := range held {
		n.users++
	}
	s.mu.Unlock()
	err := errNoSnapshot
	var found file
	for _, n := range held {
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
func (s *snapshots) put(snap *catalog.Snapshot, from *sources) *snapshot {
	s.mu.Lock()
	if have := s.held[snap.Digest()]; have != nil {
		have.users++
		have.used = s.now()
		s.mu.Unlock()
		snap.Close()
		return have
	}
	defer s.mu.Unlock()
	n := &snapshot{Snapshot: snap, sources: from.forSnapshot(snap), set: s, users: 1, used: s.now()}
	s.held[snap.Digest()] = n
	return n
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

// expire drops the snapshots that are of no use any more and returns their names.
func (s *snapshots) expire() []wire.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var dropped []wire.Digest
	drop := func(n *snapshot) {
		delete(s.held, n.Digest())
		dropped = append(dropped, n.Digest())
		n.dropped = true
		if n.users == 0 {
			n.Close()
		}
	}
	for {
		var oldest *snapshot
		for _, n := range s.held {
			if n != s.current && n.users == 0 && (oldest == nil || n.used.Before(oldest.used)) {
				oldest = n
			}
		}
		if oldest == nil {
			return dropped
		}
		least := keepUnused
		switch {
		case len(s.held) > maxSnapshots && s.bytes() > s.memory/snapshotPart:
			least = 0
		case len(s.held) > maxSnapshots:
			least = lately
		}
		if s.now().Sub(oldest.used) < least {
			return dropped
		}
		drop(oldest)
	}
}

// bytes is what all of them take. The caller holds s.mu.
func (s *snapshots) bytes() (n int64) {
	for _, h := range s.held {
		n += int64(len(h.Encoded()))
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
		return fmt.Errorf("%w %x: worker %s does not hold it", wire.ErrUnknownSnapshot, d[:6], w.config.ID)
	}
	if err := w.problems.ready(); err != nil {
		// Its words only: whoever asks shall wait or ask another, not take this worker's bucket for lost.
		return fmt.Errorf("%w: worker %s: %v", wire.ErrUnknownSnapshot, w.config.ID, err)
	}
	return fmt.Errorf("%w: worker %s has none yet", wire.ErrUnknownSnapshot, w.config.ID)
}

// miss notes that every other worker was asked for a snapshot, and none gave it.
func (s *snapshots) miss(d wire.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.misses) >= 64 { // digests are the readers' to choose
		clear(s.misses)
	}
	if s.misses == nil {
		s.misses = make(map[wire.Digest]int)
	}
	s.misses[d]++
}

// asked is how often all were asked for a snapshot that none gave.
func (s *snapshots) asked(d wire.Digest) int {
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
