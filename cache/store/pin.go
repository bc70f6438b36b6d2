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
	for {
		ends := s.unpinning[owner]
		if ob.closing != nil && !ob.gone { // what is dropped leaves its pins behind
			ends = ob.closing
		}
		if ends == nil {
			break
		}
		s.wait(ends)
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

// unpinAtOnce is how many pins are ended before others have their turn: about a millisecond's.
const unpinAtOnce = 256

// Unpin ends all pins of an owner. What is resident then stays until something else needs the room. A pin that the
// owner sets meanwhile comes after it.
func (s *Store) Unpin(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.unpinning[owner] != nil {
		s.wait(s.unpinning[owner])
	}
	done := make(chan struct{})
	s.unpinning[owner] = done
	for len(s.owners[owner]) > 0 {
		s.unpinSome(owner)
		s.mu.Unlock()
		s.mu.Lock()
	}
	delete(s.owners, owner)
	delete(s.unpinning, owner)
	close(done)
}

func (s *Store) unpinSome(owner string) {
	pins := s.owners[owner]
	some := make([]key, 0, min(len(pins), unpinAtOnce))
	var back int64
	for k := range pins {
		if len(some) == cap(some) {
			break
		}
		some = append(some, k)
		if o := s.objects[k.id]; o != nil && o.fresh == nil && len(o.pins[k.n]) == 1 {
			if b := o.blocks[k.n]; b != nil && b.reserved && !b.inPolicy {
				back += s.weight(int(b.size))
			}
		}
	}
	s.giveBack(back)
	for _, k := range some {
		delete(pins, k)
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
