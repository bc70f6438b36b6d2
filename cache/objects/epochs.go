package objects

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
)

// epochs is which membership this worker follows and whether it is settled (see the package comment). Every
// decision of this package is by it, and so is what other workers are told: the worker's own list may be
// ahead for a moment.
type epochs struct {
	members Members
	self    string
	back    bool // a settled membership is one whose members have told what they hold, too
	copies  int  // how many hold what is acknowledged, where back is set

	mu sync.Mutex
	// turn grows whenever the membership stops being settled. What was begun at one turn and ends at the
	// same, settled, saw nothing else in between.
	turn    uint64
	list    ring.Membership
	settled bool
	since   time.Time
	// behind is the newest epoch that another worker was heard to follow, and when.
	behind      uint64
	behindSince time.Time
	// ask are the members that have not told yet that they follow the list, by id and address.
	ask     map[string]ring.Member
	left    bool          // this worker stops: it is not settled any more
	changed chan struct{} // closed and replaced with every change

	// past are the list that was settled last and those that came after it, the one in force included; empty
	// until one is settled. looked is when this worker looked at its membership last. missing are members that
	// could not be asked what they hold when it was settled: they are asked when they are back.
	past    []ring.Membership
	looked  time.Time
	missing map[string]ring.Member
	// toldAt is when the last of ask told that it follows the list. learned are those of ask that this worker has
	// never seen in a list: another one told of them.
	toldAt  time.Time
	learned map[string]bool
	peers   standing
}

// state is a membership as one operation sees it.
type state struct {
	ring.Membership
	settled bool
	turn    uint64
}

func (e *epochs) init(m Members, self string, now time.Time) {
	e.members, e.self = m, self
	e.ask = make(map[string]ring.Member)
	e.learned = make(map[string]bool)
	e.peers.init()
	e.changed = make(chan struct{})
	list, _ := m.List()
	e.follow(list, now)
}

func (e *epochs) now() state {
	e.mu.Lock()
	defer e.mu.Unlock()
	return state{e.list, e.settled, e.turn}
}

// same says whether nothing has changed since s, which was settled.
func (e *epochs) same(s state) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return s.settled && e.settled && e.turn == s.turn
}

func (e *epochs) unsettle() {
	if e.settled {
		e.settled = false
		e.turn++
	}
}

// leave ends that this worker is settled, for good.
func (e *epochs) leave() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unsettle()
	e.left = true
}

// sure is the membership, and whether this worker knows all that is pending of a name that it owns by every one
// of some lists: of the one that is settled, or of that and all that came after it, so that no other was its owner
// in between. A worker that hung, or that the others cannot be reached from, may have been replaced: it is not sure
// until it has looked, and has asked them, again.
func (e *epochs) sure(now time.Time, owns func(ring.Membership) bool) (state, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return state{e.list, e.settled, e.turn}, e.inForce(now) && e.kept(owns)
}

// knows is the membership, and whether this worker knows all that is pending of all the names that it owns.
func (e *epochs) knows(now time.Time) (state, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return state{e.list, e.settled, e.turn}, e.settled && e.inForce(now)
}

// inForce says whether no other list can have taken the place of the one that this worker follows, such that
// somebody goes by it without this worker. The caller holds the mutex.
func (e *epochs) inForce(now time.Time) bool {
	behind := e.behind > e.list.Epoch && now.Sub(e.behindSince) < HandOverTime
	return !e.left && !behind && now.Sub(e.looked) <= hungAfter && e.peers.confirm(e.list, e.self, e.copies, now)
}

// kept says whether one owns by every list since the settled one. The caller holds the mutex.
func (e *epochs) kept(owns func(ring.Membership) bool) bool {
	for _, l := range e.past {
		if !owns(l) {
			return false
		}
	}
	return len(e.past) > 0
}

// all is the membership, and the members of lists before it that somebody may still ask what they hold.
func (e *epochs) all() (state, []ring.Member) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return state{e.list, e.settled, e.turn}, slices.Collect(maps.Values(e.peers.departed))
}

// watch is closed with the next change.
func (e *epochs) watch() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.changed
}

// look notes that this worker looks at its membership. One that did not for long has hung, and may have been
// replaced: all are asked again.
func (e *epochs) look(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.looked.IsZero() && now.Sub(e.looked) > hungAfter {
		e.unsettle()
		e.past, e.since = nil, now
		e.askAll()
	}
	e.looked = now
}

func (e *epochs) tell() {
	close(e.changed)
	e.changed = make(chan struct{})
}

func memberKey(m ring.Member) string { return m.ID + " " + m.Addr }

// follow takes a list. Members of the lists before are asked too, until one is settled: they may not know
// of this one, and serve. Where they hold what is pending, it is until one is closed: they were asked by the lists
// before of other names than this worker owns now, and whose those were may not have heard them.
func (e *epochs) follow(list ring.Membership, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if list.Epoch <= e.list.Epoch {
		return
	}
	e.unsettle()
	e.peers.follow(e.list, list)
	asked := slices.Concat(e.list.Members, list.Members)
	if e.back {
		asked = slices.AppendSeq(asked, maps.Values(e.peers.departed))
	}
	for _, m := range asked {
		if m.ID != e.self {
			e.ask[memberKey(m)] = m
		}
	}
	if len(e.past) > 0 {
		if list.Epoch > e.list.Epoch+1 {
			// Others may have owned its names under a list that this worker has not seen: as if under one by
			// which it owns none.
			e.past = append(e.past, ring.Membership{Epoch: e.list.Epoch + 1})
		}
		e.past = append(e.past, list)
	}
	clear(e.learned)
	e.list, e.since, e.toldAt = list, now, time.Time{}
	e.settled = len(e.ask) == 0 && e.behind <= list.Epoch && !e.left && !e.back
	e.tell()
}

// heard notes that another worker follows the given epoch: a newer one means that this worker is behind.
func (e *epochs) heard(epoch uint64, now time.Time) {
	e.mu.Lock()
	behind := epoch > e.list.Epoch
	if behind {
		e.unsettle()
		e.behind, e.behindSince = max(e.behind, epoch), now
	}
	e.mu.Unlock()
	if behind {
		e.members.Look()
	}
}

// wait waits until this worker follows the epoch or a newer one, for d at most.
func (e *epochs) wait(ctx context.Context, epoch uint64, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		e.mu.Lock()
		have, changed := e.list.Epoch, e.changed
		e.mu.Unlock()
		if have >= epoch {
			return true
		}
		select {
		case <-changed:
		case <-t.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

const (
	// askEvery is how often members are asked which epoch they follow while it is not settled, lookEvery how
	// often a settled membership is looked at without being told of a change.
	askEvery  = 250 * time.Millisecond
	lookEvery = time.Second
	// askTimeout bounds one question.
	askTimeout = 3 * time.Second
	// askAtOnce bounds the questions under way.
	askAtOnce = 32
)

// keepEpochs follows the list of workers until ctx ends.
func (n *Names) keepEpochs(ctx context.Context) {
	e := &n.epochs
	for {
		list, replaced := n.c.Members.List()
		e.follow(list, n.c.Clock.Now())
		if n.back != nil {
			e.look(n.c.Clock.Now())
			n.back.meet(ctx)
			n.back.release(ctx)
		}
		n.peers.keep(e.now().Members)
		every := lookEvery
		if !e.now().settled {
			n.settleUntil(ctx, replaced)
			every = askEvery
		}
		select {
		case <-ctx.Done():
			return
		case <-replaced:
		case <-n.c.Clock.After(every):
		}
	}
}

// waited says whether a member that does not answer was waited for long enough; left, that it said before that it stops
// with nothing left. That one may have come back since, cut off from this worker, and so may hold something again. The
// caller holds the mutex.
func (e *epochs) waited(now time.Time, left bool) bool {
	long := now.Sub(e.since) >= HandOverTime
	if !e.back {
		return long
	}
	// It may have been confirmed by the last of those that do answer, right before.
	return (long || left) && now.Sub(e.since) > hungAfter && now.Sub(e.toldAt) > hungAfter
}

// excused says whether a member that does not answer need not tell: where nothing is pending elsewhere than in the
// bucket, and where it was leaving when it said that it stops with nothing left, since nobody gives such a member a copy.
// The caller holds the mutex.
func (e *epochs) excused(m ring.Member, now time.Time, left bool) bool {
	return e.waited(now, left) && (!e.back || left && m.State == ring.Leaving)
}

// askAll has all members asked, those of lists before that are not closed too. The caller holds the mutex.
func (e *epochs) askAll() {
	for _, m := range slices.AppendSeq(slices.Clone(e.list.Members), maps.Values(e.peers.departed)) {
		if m.ID != e.self {
			e.ask[memberKey(m)] = m
		}
	}
}

// outdated says whether there is a newer list than this worker follows. One that nobody shows for so long does not exist.
// The caller holds the mutex.
func (e *epochs) outdated(now time.Time) bool {
	return e.behind > e.list.Epoch && now.Sub(e.behindSince) < HandOverTime
}

// settleUntil is settle, which ends early when the list is replaced.
func (n *Names) settleUntil(ctx context.Context, replaced <-chan struct{}) {
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-replaced:
			cancel()
		case <-ctx.Done():
		}
	}()
	n.settle(ctx)
	cancel()
	<-watched
}

// settle asks once whoever has not told its epoch yet.
func (n *Names) settle(ctx context.Context) {
	e := &n.epochs
	e.mu.Lock()
	epoch := e.list.Epoch
	var ask []ring.Member
	for _, m := range e.ask {
		ask = append(ask, m)
	}
	e.mu.Unlock()
	if epoch == 0 {
		return // no list yet
	}
	var wg sync.WaitGroup
	places := make(chan struct{}, askAtOnce)
	told, lost, left := make([]bool, len(ask)), make([]bool, len(ask)), make([]bool, len(ask))
	for i, m := range ask {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			wait := askTimeout
			if n.back != nil {
				wait *= 2 // what it holds may be much
			}
			within, cancel := context.WithTimeout(ctx, wait)
			defer cancel()
			began := n.c.Clock.Now()
			theirs, err := n.peers.epoch(within, m, epoch)
			e.answered(m, epoch, theirs, err, began)
			left[i] = err != nil && n.back != nil && n.back.left(m)
			switch {
			case err == nil:
				e.heard(theirs.Epoch, n.c.Clock.Now())
				told[i] = theirs.Epoch == epoch
				if n.back != nil {
					n.peers.isUp(m)
				}
				if told[i] && n.back != nil {
					if err := n.back.gather(within, m, epoch); err != nil {
						told[i] = false
						n.log.Debug("a member does not tell what it holds", "member", m.ID, "error", err)
					}
				}
			case errors.Is(err, syscall.ECONNREFUSED):
				// Nothing listens there any more.
				told[i] = n.back == nil || left[i]
				lost[i] = true
			default:
				n.log.Debug("a member does not tell its epoch", "member", m.ID, "error", err)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return
	}
	now := n.c.Clock.Now()
	e.mu.Lock()
	if e.list.Epoch != epoch {
		e.mu.Unlock()
		return // the questions were about another list
	}
	if slices.Contains(told, true) {
		e.toldAt = now
	}
	missing := make(map[string]ring.Member)
	for i, m := range ask {
		switch {
		case told[i] || e.excused(m, now, left[i]):
			delete(e.ask, memberKey(m))
		case lost[i] || e.waited(now, left[i]):
			missing[memberKey(m)] = m
		}
	}
	settles := len(e.ask) == len(missing) && !e.outdated(now) && !e.settled && !e.left
	list := e.list
	known := 0
	for k := range missing {
		if !e.learned[k] {
			known++
		}
	}
	e.mu.Unlock()
	if !settles || n.back != nil && !n.back.maySettle(missing, known) {
		return
	}
	if n.back != nil { // only this goroutine changes the list
		failed := n.back.gatherAgain(ctx, epoch, missing)
		e.mu.Lock()
		for _, m := range failed {
			e.ask[memberKey(m)] = m
		}
		all := len(failed) == 0 && len(e.ask) == len(missing) && !e.outdated(n.c.Clock.Now()) // others may have been learned of
		e.mu.Unlock()
		if !all {
			return
		}
		n.back.adopt(list, func(key string) bool {
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.kept(func(l ring.Membership) bool { return n.back.owns(l, key) })
		}, slices.Collect(maps.Values(missing)))
		n.back.isSettled()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.left || e.outdated(n.c.Clock.Now()) {
		e.askAll() // what they told is used up
		return
	}
	clear(e.ask)
	e.settled, e.past, e.missing = true, []ring.Membership{list}, missing
	e.tell()
	n.log.Debug("membership settled", "epoch", epoch)
}
