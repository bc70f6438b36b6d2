package objects

import (
	"errors"
	"sync"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
)

// A version that was deleted or replaced is of no use to anybody who comes later. Its blocks are dropped once this
// worker knows: at the owner of the name with the write itself, at another with the owner's next answer. That is for
// the room that they take, and nothing depends on it: blocks belong to a version, and are never taken for another's.

// now notes what the name is, as the bucket or its owner told, and returns the version of which blocks may be held
// that it is not any more, and the one of which they may be held now. The caller holds the mutex of versions, and gives
// both to replaced.drop after it.
func (e *name) now(p place, v version, err error) (before, since ring.Object) {
	switch {
	case errors.Is(err, source.ErrNotFound):
		before, e.holds = e.holds, ring.Object{}
	case err != nil || v.object.Version == "":
	case v.object.Size < 0: // it is another, and what its blocks are is not known
		before, e.holds = e.holds, ring.Object{}
	case p.blocks(v.object) != e.holds:
		before, e.holds = e.holds, p.blocks(v.object)
	}
	return before, e.holds
}

// told notes what the owner of a name told of it.
func (n *Names) told(key string, v version, err error) {
	p, perr := n.locate(key)
	if perr != nil || err != nil && !errors.Is(err, source.ErrNotFound) {
		return
	}
	var before, since ring.Object
	n.versions.mu.Lock()
	if err == nil || n.versions.names[key] != nil { // those that are not there would take others' room
		before, since = n.versions.name(key).now(p, v, err)
	}
	n.versions.mu.Unlock()
	n.replaced.drop(before, since)
}

// replaced drops versions that are not any more, once nobody reads them through this worker's own endpoint.
type replaced struct {
	store *store.Store

	mu      sync.Mutex
	reading map[ring.Object]int
	dead    map[ring.Object]bool // of those that are read
}

func (r *replaced) open(o ring.Object) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reading[o]++
}

func (r *replaced) close(o ring.Object) {
	r.mu.Lock()
	r.reading[o]--
	drop := false
	if r.reading[o] == 0 {
		drop = r.dead[o]
		delete(r.reading, o)
		delete(r.dead, o)
	}
	r.mu.Unlock()
	if drop {
		r.store.Drop(o)
	}
}

// drop drops a version that a name is not any more, unless that has no ID. since is what it is now, maybe again.
func (r *replaced) drop(o, since ring.Object) {
	r.mu.Lock()
	delete(r.dead, since)
	if o == (ring.Object{}) {
		r.mu.Unlock()
		return
	}
	read := r.reading[o] > 0
	if read {
		r.dead[o] = true
	}
	r.mu.Unlock()
	if !read {
		r.store.Drop(o)
	}
}
