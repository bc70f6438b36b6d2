package store

import (
	"fmt"
	"slices"

	"github.com/stepcache/stepcache/cache/ring"
)

// Pin keeps a block from eviction for an owner, until Unpin of that owner. It may come before the block is
// resident: what the pin promises is that once filled it stays, and that the pins together fit, or ErrFull.
// Pins do not outlive the process: their owner sets them again.
func (s *Store) Pin(o ring.Object, n int64, owner string) error {
	if err := checkBlock(o, n); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	ob, err := s.object(o)
	if err != nil {
		return err
	}
	for ob.closing != nil && !ob.gone { // what is dropped leaves its pins behind
		s.wait(ob.closing)
		if ob, err = s.object(o); err != nil {
			return err
		}
	}
	owners := ob.pins[n]
	if slices.Contains(owners, owner) {
		return nil
	}
	if len(owners) == 0 {
		w := s.weight(blockLen(o.Size, n))
		if room := s.quota - baseCost - s.zombie; s.pinned+w > room {
			s.tidy(ob)
			return fmt.Errorf("object %s: pinning %d more bytes beside %d pinned exceeds the %d bytes of the quota that can be pinned; raise the quota or unpin a load: %w",
				name(o.ID), w, s.pinned, room, ErrFull)
		}
		s.pinned += w
		if b := ob.blocks[n]; b != nil {
			s.policyRemove(b)
		}
	}
	if ob.pins == nil {
		ob.pins = make(map[int64][]string)
	}
	ob.pins[n] = append(owners, owner)
	if s.owners[owner] == nil {
		s.owners[owner] = make(map[key]struct{})
	}
	s.owners[owner][key{o.ID, n}] = struct{}{}
	return nil
}

// Unpin ends all pins of an owner. What is resident then stays until something else needs the room.
func (s *Store) Unpin(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var back int64
	for k := range s.owners[owner] {
		if o := s.objects[k.id]; o != nil && o.fresh == nil && len(o.pins[k.n]) == 1 {
			if b := o.blocks[k.n]; b != nil && b.reserved && !b.inPolicy {
				back += s.weight(int(b.size))
			}
		}
	}
	s.giveBack(back)
	for k := range s.owners[owner] {
		o := s.objects[k.id]
		if o == nil {
			continue
		}
		left := slices.DeleteFunc(o.pins[k.n], func(x string) bool { return x == owner })
		if len(left) > 0 {
			o.pins[k.n] = left
			continue
		}
		delete(o.pins, k.n)
		s.pinned -= s.weight(blockLen(o.size, k.n))
		if b := o.blocks[k.n]; b != nil && b.reserved {
			s.setOut(b)
		}
		s.settle(o)
		s.tidy(o)
	}
	delete(s.owners, owner)
}

// Room says whether a block can be kept without evicting another: it is held already or on its way, pinned, or there
// is room for it beside what the caller has promised to others.
func (s *Store) Room(o ring.Object, n, promised int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ob := s.objects[o.ID]; ob != nil {
		if b := ob.blocks[n]; b != nil && (b.state == resident || b.flight != nil) || len(ob.pins[n]) > 0 {
			return true
		}
	}
	return s.used+promised+s.weight(blockLen(o.Size, n)) <= s.limit
}
