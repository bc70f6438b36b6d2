package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/ring"
)

// emptyName is the one file that all leases of zero-byte objects open.
const emptyName = "empty"

// Lease is a read-only descriptor of an object. While it lives nothing of the file is evicted; afterwards it is
// evicted only once nobody outside has a copy of the descriptor or a mapping of it, and then as a whole.
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
	ob := s.settled(o)
	switch {
	case s.closed:
		s.mu.Unlock()
		return nil, ErrClosed
	case ob == nil || ob.size != o.Size || ob.gone || !ob.whole():
		s.mu.Unlock()
		return nil, fmt.Errorf("object %s: %w", name(o.ID), ErrNotWhole)
	}
	return s.lend(ob)
}

// LeaseEarly is Lease of an object that need not be whole, nor held at all: what is filled from now on can be read
// through the descriptor as well. Its receiver must ask Sums for each block before it reads of it, and should compare
// what it reads with them: anything else is zeros. Since nothing of such a file can be evicted while somebody reads
// it, they may take seven eighths of the quota, counted in full from the beginning: beyond that it is ErrNoRoom.
func (s *Store) LeaseEarly(o ring.Object) (*Lease, error) {
	l, err := s.Lease(o)
	if !errors.Is(err, ErrNotWhole) {
		return l, err
	}
	s.mu.Lock()
	dropped := s.settled(o)
	switch {
	case s.closed:
		s.mu.Unlock()
		return nil, ErrClosed
	case dropped != nil && dropped.gone:
		s.mu.Unlock()
		return nil, fmt.Errorf("object %s is being dropped: %w", name(o.ID), ErrNotWhole)
	}
	ob, err := s.object(o)
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	if size := s.roundUp(o.Size); !ob.early {
		if s.early+size > s.quota/8*7 {
			s.tidy(ob)
			s.mu.Unlock()
			return nil, fmt.Errorf("object %s of %d bytes: %w", name(o.ID), o.Size, ErrNoRoom)
		}
		ob.early = true
		s.early += size
	}
	return s.lend(ob)
}

// settled is the object of that ID once nobody looks at or unlinks its file; nil if there is none. It unlocks while it
// waits, but not for one that is being dropped, which may take as long as a fill.
func (s *Store) settled(o ring.Object) *object {
	ob := s.objects[o.ID]
	for ob != nil && ob.closing != nil && !ob.gone {
		s.wait(ob.closing)
		ob = s.objects[o.ID]
	}
	return ob
}

// lend opens o's file for a lease. The mutex is held and given up.
func (s *Store) lend(o *object) (*Lease, error) {
	o.leases++
	o.lent = true
	s.leases++
	for _, b := range o.blocks {
		s.policyAccess(b)
	}
	absent := !o.exists
	s.mu.Unlock()
	var err error
	if absent {
		if _, err = s.openFile(o, true); err == nil {
			s.closeFile(o)
		}
	}
	var f *os.File
	if err == nil {
		f, err = openFast(s.path(o.id), os.O_RDONLY)
	}
	if err == nil {
		s.mu.Lock()
		gone := o.gone
		s.mu.Unlock()
		if gone { // the path may be another object's file by now
			f.Close()
			err = ErrNotWhole
		}
	}
	if err != nil {
		s.unlease(o)
		return nil, fmt.Errorf("object %s: %w", name(o.id), openError(err))
	}
	return &Lease{File: f, s: s, o: o}, nil
}

// Sums are those of block n (package checksum), which must not be changed, and true, if the block can be read through
// File now. Then it can be until Release: nothing of a leased file is evicted, and what turns out to be corrupt is
// mended in place.
func (l *Lease) Sums(n int64) ([]uint64, bool) {
	if l.o == nil {
		return nil, false
	}
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	b := l.o.blocks[n]
	if l.o.gone || b == nil || b.state != resident || l.released.Load() {
		return nil, false
	}
	l.s.policyAccess(b)
	return b.sums, true
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
	if o.leases == 0 && o.early {
		o.early = false
		s.early -= s.roundUp(o.size)
	}
	gone := o.gone
	if !gone {
		s.sweep(o)
	}
	s.mu.Unlock()
	if gone {
		s.reap(o)
	}
}

// Drop forgets an object at once: the next Acquire fills it anew, into a new file. Blocks and leases in
// use keep the bytes they have, which count against the quota until the last reader is gone; a fill under
// way goes to those who wait for it, and until it ends whoever wants the object anew waits. Pins stay, for
// what is filled next.
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
	for o.closing != nil && !o.gone {
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
	if o.writers > 0 {
		// A fill takes as long as the bucket, and whoever drops keeps others waiting.
		s.wg.Go(func() { s.forget(o) })
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	s.forget(o)
}

// forget takes a dropped object away once nothing writes to its file.
func (s *Store) forget(o *object) {
	s.mu.Lock()
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
