package store

import (
	"errors"
	"os"
	"syscall"

	"github.com/maypok86/otter/v2"
	"golang.org/x/sys/unix"
)

// The policy is otter (W-TinyLFU), used as a plain data structure: every call is made under Store.mu and
// its executor runs what it is given on the spot, so that an eviction is seen (OnDeletion) before the call
// that caused it returns. The policy only chooses; bytes are freed afterwards, outside the mutex.
//
// It holds the blocks that may be evicted. Pinned blocks are not in it, nor are those that it chose while
// they were in use: these come back with their last use. Its maximum is what the quota leaves for it, and
// is lowered when that shrank (pins, zombies) and raised again once it grew by a part worth it, since each
// change restarts the policy's own tuning.

func (s *Store) newPolicy() *otter.Cache[key, *block] {
	return otter.Must(&otter.Options[key, *block]{
		MaximumWeight: uint64(s.max),
		Weigher: func(_ key, b *block) uint32 {
			if b.weightless {
				return 0
			}
			return uint32(s.weight(int(b.size)))
		},
		Executor: func(f func()) { f() },
		OnDeletion: func(e otter.DeletionEvent[key, *block]) {
			if e.Cause == otter.CauseOverflow {
				s.leftPolicy(e.Value)
				s.letGo.note(e.Value.key(), e.Value.used)
				s.victims = append(s.victims, e.Value)
			}
		},
	})
}

func (s *Store) leftPolicy(b *block) {
	if b.inPolicy {
		b.inPolicy = false
		if b.reserved {
			s.inPolicy -= s.weight(int(b.size))
		}
	}
}

// policyAdd puts b into the policy, which may evict others for it, or b itself.
func (s *Store) policyAdd(b *block) {
	if b.inPolicy {
		return
	}
	if t := s.target(0); t > s.max+s.quota/64 || (t > s.max && t == s.limit-baseCost) {
		s.setMaximum(t)
	}
	b.inPolicy = true
	if b.reserved {
		s.inPolicy += s.weight(int(b.size))
	}
	uses := b.uses
	if b.flight != nil && b.flight.waiters > 1 { // wanted by so many at once
		uses = uint8(min(b.flight.waiters, hot))
	}
	if !b.reserved && s.letGo.take(b.key(), s.read-s.quota/soon) {
		uses = hot
	}
	if b.uses = 0; uses > 0 {
		// Without a weight it is not judged yet.
		b.weightless = true
		s.policy.Set(b.key(), b)
		for range uses {
			s.policy.GetIfPresent(b.key())
		}
		b.weightless = false
	}
	s.policy.Set(b.key(), b)
}

func (s *Store) policyRemove(b *block) {
	if b.inPolicy {
		s.leftPolicy(b)
		s.policy.Invalidate(b.key())
	}
}

func (s *Store) policyAccess(b *block) {
	s.touch(b)
	if b.inPolicy {
		s.policy.GetIfPresent(b.key())
	} else if b.uses < hot {
		b.uses++
	}
}

// hot is the most uses that the policy knows of.
const hot = 15

// touch notes a use.
func (s *Store) touch(b *block) {
	s.read += int64(b.size)
	b.used = s.read
}

// target is the maximum that the policy can have when need bytes are wanted beside it.
func (s *Store) target(need int64) int64 {
	return s.limit - (s.used - s.inPolicy - s.evicting) - need
}

func (s *Store) setMaximum(n int64) {
	s.max = n
	s.policy.SetMaximum(uint64(max(n, 1)))
}

// reserve makes room for b and takes it. False means that the policy refused b or that nothing could be
// evicted for it.
func (s *Store) reserve(b *block) bool {
	o := b.obj
	w := s.weight(int(b.size))
	polls := 0
	s.mu.Lock()
	defer s.mu.Unlock()
	s.touch(b)
	s.missed += int64(b.size)
	s.trimFresh()
	if s.used+w > s.limit-s.limit/16 {
		// Full: whatever came free outside counts from now on.
		s.probeSpace()
		s.poll(2)
	}
	if !b.reserved && !o.pinned(b.n) && !o.gone && !s.closed {
		s.policyAdd(b)
	}
	for {
		s.evictVictims()
		switch {
		case s.closed || o.gone:
			s.policyRemove(b)
			return false
		case o.closing != nil:
			s.wait(o.closing)
			continue
		case b.reserved: // a repair in place
			s.beginWrite(b)
			return true
		case !b.inPolicy && !o.pinned(b.n):
			return false
		}
		short := s.used + w - s.limit
		if short <= 0 {
			s.charge(b)
			s.setState(b, writing)
			s.beginWrite(b)
			return true
		}
		if short <= s.evicting {
			s.idle.Wait()
			continue
		}
		if polls < 4 {
			polls++
			if s.poll(16) {
				continue
			}
		}
		var pinned int64
		if o.pinned(b.n) {
			pinned = w
		}
		t := s.target(pinned)
		if t >= s.max || s.max <= 0 {
			if e := s.fresh.Front(); e != nil {
				s.judge(e.Value.(*object))
				continue
			}
			s.policyRemove(b)
			return false
		}
		s.setMaximum(t)
	}
}

func (s *Store) beginWrite(b *block) {
	b.obj.writers++
	s.writing++
	s.changes++
}

// evictVictims frees what the policy let go. It unlocks while it does.
func (s *Store) evictVictims() {
	for len(s.victims) > 0 {
		b := s.victims[len(s.victims)-1]
		s.victims[len(s.victims)-1] = nil
		s.victims = s.victims[:len(s.victims)-1]
		s.evict(b)
	}
	s.victims = nil
}

// evict frees one block that is in no policy, or notes that it is in use.
func (s *Store) evict(b *block) {
	o := b.obj
	if !b.reserved || b.inPolicy || b.state == evicting || o.gone {
		return
	}
	if b.refs > 0 || b.flight != nil || o.pinned(b.n) || o.fresh != nil || o.leases > 0 || o.held || o.closing != nil {
		s.setOut(b)
		return
	}
	if !s.onlyWhole(o) && o.reserved > 1 {
		s.punch(b)
		return
	}
	// The whole file goes: its last block, or a file that must not be punched.
	if o.refs > 0 || o.writers > 0 || o.punches > 0 || o.open() || s.anyBusy(o) {
		s.setOut(b)
		return
	}
	s.unlink(o)
	if b.reserved && !b.inPolicy { // still there: somebody outside has it open
		s.setOut(b)
	}
}

// onlyWhole says whether o's file must not be punched.
func (s *Store) onlyWhole(o *object) bool { return o.lent || s.wholeOnly }

// anyBusy says whether a reserved block of o is pinned or being repaired.
func (s *Store) anyBusy(o *object) bool {
	for n := range o.pins {
		if b := o.blocks[n]; b != nil && b.reserved {
			return true
		}
	}
	for _, b := range o.blocks {
		if b.reserved && b.flight != nil {
			return true
		}
	}
	return false
}

// setOut notes that b is neither in the policy nor evicted.
func (s *Store) setOut(b *block) {
	if !b.out && b.reserved && !b.inPolicy {
		b.out = true
		b.obj.outs = append(b.obj.outs, b)
	}
}

// settle gives blocks that were in use when the policy let them go back to it, once they are not.
func (s *Store) settle(o *object) {
	if len(o.outs) == 0 || o.gone || o.leases > 0 || o.held || o.closing != nil {
		return
	}
	if s.onlyWhole(o) && (o.refs > 0 || o.writers > 0) {
		return
	}
	outs := o.outs
	o.outs = nil
	for _, b := range outs {
		b.out = false
		switch {
		case !b.reserved || b.inPolicy:
		case b.refs > 0 || b.flight != nil || b.state == evicting:
			s.setOut(b)
		case o.pinned(b.n) || o.fresh != nil:
		case b.state == corrupt:
			s.victims = append(s.victims, b) // the next one that needs room takes it
		default:
			s.policyAdd(b)
		}
	}
}

// punch frees the pages of one block of a file that never left the store, or that no lease has told of: its fill came
// to nothing. It unlocks while it does.
func (s *Store) punch(b *block) {
	o := b.obj
	w := s.weight(int(b.size))
	before := b.state
	evicted := before == resident
	s.setState(b, evicting)
	b.done = make(chan struct{})
	o.punches++
	s.evicting += w
	s.mu.Unlock()

	f, err := s.openFile(o, false)
	if err == nil {
		before = corrupt // whatever comes of it
		// Up to the end of the page: a hole that ends within one only zeroes its part of it.
		err = punchHole(f, b.off(), s.roundUp(int64(b.size)))
		s.closeFile(o)
	}

	s.mu.Lock()
	o.punches--
	s.evicting -= w
	switch {
	case err == nil, errors.Is(err, os.ErrNotExist):
		if evicted {
			s.stats.Evicted++
			s.journal.del(b)
		}
		s.remove(b)
		s.sweep(o)
	default:
		// Its pages are still there, and so it stays reserved; the next one who uses the object brings it
		// back to the policy.
		s.log.Error("store: cannot evict", "object", name(o.id), "block", b.n, "error", err)
		s.setState(b, before)
		s.setOut(b)
	}
	close(b.done)
	s.idle.Broadcast()
}

func punchHole(f *os.File, off, length int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}

// sweep unlinks a file that no block is left in, or none ever came to, and settles or forgets the object.
func (s *Store) sweep(o *object) {
	if o.exists && o.reserved == 0 && o.refs == 0 && !o.open() && o.writers == 0 && o.punches == 0 &&
		o.leases == 0 && o.closing == nil && !o.gone && !o.held {
		s.unlink(o)
		return
	}
	s.settle(o)
	s.tidy(o)
}

// unlink removes the file of an object that nobody in this process uses, with all its blocks. If it was
// lent and somebody still has it open, its pages would not be freed: it is kept, and looked at again when
// room is needed. It unlocks while it works.
func (s *Store) unlink(o *object) {
	o.closing = make(chan struct{})
	w, lent := o.charged, o.lent
	s.evicting += w
	s.mu.Unlock()

	kept := false
	var err error
	if lent {
		var f *os.File
		if f, err = openFast(s.path(o.id), os.O_RDONLY); err == nil {
			kept = !exclusive(f)
			f.Close()
		}
	}
	if !kept {
		if err = os.Remove(s.path(o.id)); errors.Is(err, os.ErrNotExist) {
			err = nil
		}
	}

	s.mu.Lock()
	s.evicting -= w
	if err != nil {
		s.log.Error("store: cannot evict", "object", name(o.id), "error", err)
	}
	if kept || err != nil {
		o.held = true
		s.held[o] = struct{}{}
	} else {
		o.exists, o.lent, o.held = false, false, false
		delete(s.held, o)
		s.journal.gone(o)
		for _, b := range o.outs {
			b.out = false
		}
		o.outs = nil
		for _, b := range o.blocks {
			if b.reserved {
				if b.state == resident {
					s.stats.Evicted++
				}
				s.remove(b)
			}
		}
		s.changes++
	}
	close(o.closing)
	o.closing = nil
	s.idle.Broadcast()
	s.tidy(o)
}

// exclusive says whether f is the only open description of its file in the system: no descriptor, no
// mapping, no FUSE backing file and no message on its way holds another. The kernel grants a write lease
// (fcntl F_SETLEASE) under just that condition.
func exclusive(f *os.File) bool {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return false
	}
	unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return true
}

// poll looks again at up to n files of each kind that somebody outside had open, and says whether room
// became free. It unlocks while it looks.
func (s *Store) poll(n int) bool {
	freed := s.pollOrphans()
	for _, o := range some(s.zombies, n) {
		s.mu.Unlock()
		freed = s.reap(o) || freed
		s.mu.Lock()
	}
	for _, o := range some(s.held, n) {
		if o.gone || !o.held || o.refs > 0 || o.open() || o.closing != nil {
			continue
		}
		o.closing = make(chan struct{})
		s.mu.Unlock()
		f, err := openFast(s.path(o.id), os.O_RDONLY)
		free := err != nil // then unlinking it is tried again
		if err == nil {
			free = exclusive(f)
			f.Close()
		}
		s.mu.Lock()
		close(o.closing)
		o.closing = nil
		if free {
			o.held = false
			delete(s.held, o)
			s.sweep(o)
			freed = true
		}
	}
	return freed
}

// some returns up to n of the objects, not always the same ones.
func some(objects map[*object]struct{}, n int) []*object {
	if len(objects) == 0 {
		return nil
	}
	list := make([]*object, 0, min(n, len(objects)))
	for o := range objects {
		if len(list) == n {
			break
		}
		list = append(list, o)
	}
	return list
}

// pollOrphans sees whether readers of a former life have closed what they held. The file system's own
// figure only says so while no page comes or goes.
func (s *Store) pollOrphans() bool {
	if s.orphans == 0 || s.writing > 0 || s.evicting > 0 {
		return false
	}
	if s.polls++; s.polls%64 != 1 {
		return false // it reads the whole folder
	}
	before, journal := s.changes, s.journal.bytes.Load()
	s.mu.Unlock()
	used, err := s.fsUsed()
	used -= s.othersUsed()
	s.mu.Lock()
	journal = min(journal, s.journal.bytes.Load())
	if err != nil || s.changes != before {
		return false
	}
	left := min(max(0, used-s.pages-s.roundUp(journal)), s.orphans)
	freed := s.orphans - left
	s.orphans, s.zombie, s.used = left, s.zombie-freed, s.used-freed
	return freed > 0
}

// noSpace lowers the limit to what the file system turned out to have room for.
func (s *Store) noSpace(o *object, err error) {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) && !errors.Is(err, syscall.ENOMEM) {
		s.log.Error("store: cannot write, blocks are served uncached", "object", name(o.id), "error", err)
		return
	}
	s.stats.NoSpace++
	if s.limit == s.quota {
		s.log.Warn("store: the file system is full below the quota; others use it, or it is too small", "dir", s.dir, "used", s.used, "quota", s.quota)
	}
	s.limit = max(min(s.limit, s.used-s.unit), minQuota)
}

// probeSpace raises the limit again as far as the file system has room.
func (s *Store) probeSpace() {
	if s.limit == s.quota {
		return
	}
	s.mu.Unlock()
	var st unix.Statfs_t
	err := unix.Statfs(s.dir, &st)
	s.mu.Lock()
	if err == nil {
		// Half of what is free: whoever filled the file system may go on doing so.
		s.limit = max(s.limit, min(s.quota, s.used+int64(st.Bavail)*st.Bsize/2))
	}
}
