package store

import (
	"crypto/rand"
	"os"
	"slices"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// stagingPrefix begins the IDs of objects whose version is not known yet. Nobody can ask for them after a
// restart, so recovery removes them. An ID of a version is a part of a SHA-256: no one begins so.
const stagingPrefix = "STAGING\x00"

// Staging is a new ID for an object that is being written and gets its own ID with Rename.
func Staging() (id source.ID) {
	copy(id[:], stagingPrefix)
	rand.Read(id[len(stagingPrefix):])
	return id
}

func staged(id source.ID) bool { return string(id[:len(stagingPrefix)]) == stagingPrefix }

// Rename gives an object that nobody uses another ID, with its blocks and pins. It is false, and nothing
// has changed, when from is not held or in use (a block, a lease or a fill of it is), has another size, or
// to is held already.
func (s *Store) Rename(from, to ring.Object) bool {
	s.mu.Lock()
	o := s.objects[from.ID]
	if s.closed || o == nil || o.size != from.Size || from.Size != to.Size || o.gone || o.closing != nil || !o.exists ||
		o.refs > 0 || o.writers > 0 || o.punches > 0 || o.open() || o.leases > 0 || o.lent || o.held || s.objects[to.ID] != nil {
		s.mu.Unlock()
		return false
	}
	for _, b := range o.blocks {
		if b.flight != nil || b.state != resident {
			s.mu.Unlock()
			return false
		}
	}
	// Whoever wants either of them waits until it is decided.
	o.closing = make(chan struct{})
	s.objects[to.ID] = o
	s.mu.Unlock()

	err := os.Rename(s.path(from.ID), s.path(to.ID))

	s.mu.Lock()
	delete(s.objects, to.ID)
	if err == nil {
		s.journal.gone(o)
		var again []*block // the policy knows blocks by their ID
		for _, b := range o.blocks {
			if b.inPolicy {
				again = append(again, b)
				s.policyRemove(b)
			}
		}
		for n, owners := range o.pins {
			for _, owner := range owners {
				delete(s.owners[owner], key{o.id, n})
				s.owners[owner][key{to.ID, n}] = struct{}{}
			}
		}
		delete(s.objects, from.ID)
		o.id = to.ID
		s.objects[to.ID] = o
		for _, b := range o.blocks {
			s.journal.add(b)
		}
		for _, b := range again {
			s.policyAdd(b)
		}
	} else {
		s.log.Error("store: cannot rename an object", "file", s.path(from.ID), "error", err)
	}
	close(o.closing)
	o.closing = nil
	s.settle(o)
	s.mu.Unlock()
	return err == nil
}

// dropStaged takes the objects that were being written when the process ended from what was found.
func dropStaged(objects []*found) []*found {
	return slices.DeleteFunc(objects, func(f *found) bool { return staged(f.id) })
}
