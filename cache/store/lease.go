package store

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/ring"
)

// emptyName is the one file that all leases of zero-byte objects open.
const emptyName = "empty"

// Lease is a read-only descriptor of a wholly resident object. While it lives the file is not evicted;
// afterwards it is evicted only once nobody outside has a copy of the descriptor or a mapping of it.
type Lease struct {
	// File may be passed to other processes. Release closes this copy of it.
	File *os.File

	s        *Store
	o        *object
	released atomic.Bool
}

// Lease opens an object that the store holds whole: ErrNotWhole if it does not, ErrNoLease if this store
// cannot give leases.
func (s *Store) Lease(o ring.Object) (*Lease, error) {
	if s.noLease != "" {
		return nil, fmt.Errorf("object %s: %s: %w", name(o.ID), s.noLease, ErrNoLease)
	}
	if o.Size == 0 {
		f, err := os.Open(filepath.Join(s.dir, emptyName))
		if err != nil {
			return nil, fmt.Errorf("object %s: %w", name(o.ID), openError(err))
		}
		return &Lease{File: f, s: s}, nil
	}
	s.mu.Lock()
	ob := s.objects[o.ID]
	for ob != nil && ob.closing != nil {
		s.wait(ob.closing)
		ob = s.objects[o.ID]
	}
	switch {
	case s.closed:
		s.mu.Unlock()
		return nil, ErrClosed
	case ob == nil || ob.size != o.Size || ob.gone || !ob.whole():
		s.mu.Unlock()
		return nil, fmt.Errorf("object %s: %w", name(o.ID), ErrNotWhole)
	}
	ob.leases++
	ob.lent = true
	s.leases++
	for _, b := range ob.blocks {
		s.policyAccess(b)
	}
	s.mu.Unlock()
	f, err := openFast(s.path(o.ID), os.O_RDONLY)
	if err == nil {
		s.mu.Lock()
		gone := ob.gone
		s.mu.Unlock()
		if gone { // the path may be another object's file by now
			f.Close()
			err = ErrNotWhole
		}
	}
	if err != nil {
		s.unlease(ob)
		return nil, fmt.Errorf("object %s: %w", name(o.ID), openError(err))
	}
	return &Lease{File: f, s: s, o: ob}, nil
}

// Release ends the lease. More than one call does no harm.
func (l *Lease) Release() {
	if !l.released.CompareAndSwap(false, true) {
		return
	}
	l.File.Close()
	if l.o != nil {
		l.s.unlease(l.o)
	}
}

func (s *Store) unlease(o *object) {
	s.mu.Lock()
	o.leases--
	s.leases--
	s.settle(o)
	gone := o.gone
	s.tidy(o)
	s.mu.Unlock()
	if gone {
		s.reap(o)
	}
}

// Drop forgets an object at once: the next Acquire fills it anew, into a new file. Blocks and leases in
// use keep the bytes they have, which count against the quota until the last reader is gone; a fill under
// way goes to those who wait for it. Pins stay, for what is filled next.
func (s *Store) Drop(o ring.Object) {
	s.mu.Lock()
	ob := s.objects[o.ID]
	s.mu.Unlock()
	if ob != nil && ob.size == o.Size {
		s.drop(ob)
	}
}

func (s *Store) drop(o *object) {
	s.mu.Lock()
	for o.closing != nil {
		s.wait(o.closing)
	}
	if s.closed || o.gone || s.objects[o.id] != o {
		s.mu.Unlock()
		return
	}
	o.gone = true // from here nothing new is reserved in it
	o.closing = make(chan struct{})
	s.unfresh(o)
	for _, b := range o.blocks {
		s.policyRemove(b)
	}
	for o.writers > 0 || o.punches > 0 {
		s.idle.Wait()
	}
	exists := o.exists
	s.mu.Unlock()

	var last *os.File
	if exists {
		last, _ = openFast(s.path(o.id), os.O_RDONLY) // absent: somebody removed it, nobody can tell us more
		if err := os.Remove(s.path(o.id)); err != nil && !os.IsNotExist(err) {
			s.log.Error("store: cannot remove a dropped object", "file", s.path(o.id), "error", err)
		}
	}

	s.mu.Lock()
	s.journal.gone(o)
	for _, b := range o.blocks {
		if b.state == resident {
			s.setState(b, corrupt) // out of the counts of what can be had
		}
	}
	o.outs = nil
	s.zombie += o.charged
	if !s.closed {
		o.last, last = last, nil
		s.zombies[o] = struct{}{}
	}
	delete(s.held, o)
	delete(s.objects, o.id)
	if len(o.pins) > 0 {
		s.objects[o.id] = &object{id: o.id, size: o.size, blocks: make(map[int64]*block), pins: o.pins}
		o.pins = nil
	}
	close(o.closing)
	o.closing = nil
	s.changes++
	s.mu.Unlock()
	if last != nil {
		last.Close() // Close has been here
	}
	s.reap(o)
}

// reap gives back what a dropped object held once nobody has its file open, and says whether it did.
func (s *Store) reap(o *object) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.zombies[o]; !ok || s.closed || o.reaping || o.refs > 0 || o.open() || o.leases > 0 {
		return false
	}
	o.reaping = true
	s.mu.Unlock()
	free := o.last == nil || exclusive(o.last)
	s.mu.Lock()
	o.reaping = false
	s.idle.Broadcast() // Close waits for it
	if _, ok := s.zombies[o]; !ok || !free {
		return false
	}
	if o.last != nil {
		o.last.Close() // the file is unlinked: nothing to wait for
	}
	delete(s.zombies, o)
	s.zombie -= o.charged
	for _, b := range o.blocks {
		if b.reserved {
			s.uncharge(b)
		}
	}
	s.idle.Broadcast()
	return true
}
