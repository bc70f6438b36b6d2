package store

import "github.com/stepcache/stepcache/cache/ring"

// The policy judges a block by how often it was wanted. Of what was just written nobody has wanted anything yet,
// although it is about to be read: in a cache that is full of what is read often it would be the first to go. So
// objects can be kept beside the policy until others have come after them, and are judged then, with the uses that
// they had meanwhile.

// freshShare is the part of what pins leave that is for objects kept beside the policy: the others are for what is read.
const freshShare = 2

// Keep keeps an object that was just written, or is to be read soon for another reason, beside the policy: until
// others that were kept later fill a half of what pins leave, as many bytes as the quota were wanted that were not
// here, or nothing else is left that could be evicted.
func (s *Store) Keep(o ring.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ob := s.objects[o.ID]
	if s.closed || ob == nil || ob.size != o.Size || ob.gone || ob.closing != nil || ob.fresh != nil || ob.charged == 0 {
		return
	}
	for _, b := range ob.blocks {
		s.policyRemove(b)
	}
	ob.fresh, ob.freshAt, ob.freshBytes = s.fresh.PushBack(ob), s.missed, ob.charged
	s.freshBytes += ob.freshBytes
	s.trimFresh()
}

// trimFresh has the policy judge what was kept beside it for long enough.
func (s *Store) trimFresh() {
	for e := s.fresh.Front(); e != nil; e = s.fresh.Front() {
		o := e.Value.(*object)
		if s.freshBytes <= (s.limit-s.pinned)/freshShare && s.missed-o.freshAt < s.quota {
			return
		}
		s.judge(o)
	}
}

// judge ends that o is kept beside the policy.
func (s *Store) judge(o *object) {
	s.unfresh(o)
	var back int64
	for _, b := range o.blocks {
		if b.reserved && !b.inPolicy && !o.pinned(b.n) {
			s.setOut(b)
			back += s.weight(int(b.size))
		}
	}
	s.giveBack(back)
	s.settle(o)
	s.tidy(o)
}

// unfresh forgets that o is kept.
func (s *Store) unfresh(o *object) {
	if o.fresh != nil {
		s.fresh.Remove(o.fresh)
		s.freshBytes -= o.freshBytes
		o.fresh, o.freshBytes = nil, 0
	}
}

// giveBack gives the policy the room of blocks that it is to hold from now on, before the blocks: it would weigh each
// against what it holds otherwise, and let go at once what was not read yet.
func (s *Store) giveBack(bytes int64) {
	if t := s.target(0) + bytes; bytes > 0 && t > s.max {
		s.setMaximum(t)
	}
}
