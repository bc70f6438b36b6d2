package objects

import (
	"context"
	"errors"
	"maps"
	"sync"
	"syscall"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
)

// standing is what the other members were last heard to follow, where writes are acknowledged before the bucket has
// them. It is guarded by the mutex of the epochs that it is part of.
//
// It tells two things. That this worker's list is in force: another may be the owner of its names only once all but a
// few have told that one that they follow a newer list, and so do not confirm this worker's any more. And when a list
// is closed: every member of it is settled, so that nobody asks those that left before what they hold.
type standing struct {
	heard map[string]word // by id
	// departed are members of lists before this one, by id; none once this one is closed. over: every member has told
	// that it is closed, so that nobody can be told of them any more either.
	departed     map[string]ring.Member
	closed, over bool
	mine         standpoint // what this worker told last of itself
}

// word is what a member told last, or that it refused to be asked: nothing listens at its address.
type word struct {
	at      time.Time // when it was asked
	refused bool
	standpoint
}

// standpoint is which list a worker follows, which it is settled under, and which is closed as far as it knows; zero:
// none.
type standpoint struct {
	Epoch, Settled, Closed uint64
}

func (p *standing) init() {
	p.heard = make(map[string]word)
	p.departed = make(map[string]ring.Member)
}

// follow takes the place of one list by the next.
func (p *standing) follow(old, list ring.Membership) {
	for _, m := range old.Members {
		p.departed[m.ID] = m
	}
	is := make(map[string]bool)
	for _, m := range list.Members {
		delete(p.departed, m.ID)
		is[m.ID] = true
	}
	maps.DeleteFunc(p.heard, func(id string, _ word) bool { return !is[id] })
	p.closed, p.over = false, false
}

// confirm says whether one less than copies of the other members have told within hungAfter that they follow no newer
// list than this. Those that nothing listens for do not count: where all are gone there is nobody to ask.
func (p *standing) confirm(list ring.Membership, self string, copies int, now time.Time) bool {
	others, have := 0, 0
	for _, m := range list.Members {
		if m.ID == self {
			continue
		}
		w, ok := p.heard[m.ID]
		lately := ok && now.Sub(w.at) <= hungAfter
		if !lately || !w.refused {
			others++
		}
		if lately && !w.refused && w.Epoch <= list.Epoch {
			have++
		}
	}
	return have >= min(copies-1, others)
}

// answered notes what m told that was asked under the list with that epoch.
func (e *epochs) answered(m ring.Member, epoch uint64, told standpoint, err error, began time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	refused := errors.Is(err, syscall.ECONNREFUSED)
	if err != nil && !refused || e.list.Epoch != epoch || e.peers.heard[m.ID].at.After(began) {
		return
	}
	for _, o := range e.list.Members {
		if memberKey(o) == memberKey(m) && o.ID != e.self {
			e.peers.heard[m.ID] = word{at: began, refused: refused, standpoint: told}
		}
	}
}

// cutOff says whether this worker hung, or cannot reach those that would tell it of another list.
func (e *epochs) cutOff(now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return now.Sub(e.looked) > hungAfter || !e.peers.confirm(e.list, e.self, e.copies, now)
}

// says is what this worker tells of itself: at which list it stands now, and the rest as it was found last.
func (e *epochs) says() standpoint {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.settled && e.peers.mine.Epoch == e.list.Epoch {
		return e.peers.mine
	}
	return standpoint{Epoch: e.list.Epoch}
}

// close notes where this worker stands, and whether the list is closed. held says whether what it knew to be pending
// under the state s is held by members.
func (e *epochs) close(s state, held bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	epoch, p := e.list.Epoch, &e.peers
	if epoch == 0 || s.Epoch != epoch || s.turn != e.turn {
		return
	}
	p.mine = standpoint{Epoch: epoch}
	if e.settled && (held || p.closed) {
		p.mine.Settled = epoch
	}
	settled, closed := true, true
	for _, m := range e.list.Members {
		if w := p.heard[m.ID]; m.ID == e.self {
			settled = settled && p.mine.Settled == epoch
		} else {
			settled, closed = settled && w.Settled == epoch, closed && w.Closed == epoch
		}
	}
	if settled && !p.closed {
		p.closed = true
		clear(p.departed)
	}
	if p.closed {
		p.mine.Closed = epoch
		p.over = p.over || closed
	}
}

// over says whether the list with that epoch is in force, and nobody asks those that left before it any more.
func (e *epochs) over(epoch uint64) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.list.Epoch == epoch && e.peers.over
}

// learn takes members of former lists that another worker tells of, under the list with that epoch: they are asked
// too before it is settled.
func (e *epochs) learn(epoch uint64, departed []ring.Member) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.list.Epoch != epoch || e.peers.closed {
		return
	}
	is := make(map[string]bool)
	for _, m := range e.list.Members {
		is[m.ID] = true
	}
	for _, m := range departed {
		if _, known := e.peers.departed[m.ID]; known || is[m.ID] || m.ID == e.self {
			continue
		}
		e.peers.departed[m.ID] = m
		e.ask[memberKey(m)] = m
		e.learned[memberKey(m)] = true
	}
}

// keepConfirmed asks other members which list they follow until ctx ends: all of them until the list is closed,
// then some, others every time.
func (n *Names) keepConfirmed(ctx context.Context) {
	for turn := 0; ; turn++ {
		n.confirm(ctx, turn)
		select {
		case <-ctx.Done():
			return
		case <-n.c.Clock.After(lookEvery):
		}
	}
}

func (n *Names) confirm(ctx context.Context, turn int) {
	e := &n.epochs
	e.mu.Lock()
	epoch, over := e.list.Epoch, e.peers.over
	var others []ring.Member
	for _, m := range e.list.Members {
		if m.ID != e.self {
			others = append(others, m)
		}
	}
	e.mu.Unlock()
	if most := n.back.copies; over && len(others) > most { // one to spare
		first := turn * most % len(others)
		others = append(others[first:], others[:first]...)[:most]
	}
	var wg sync.WaitGroup
	places := make(chan struct{}, askAtOnce)
	for _, m := range others {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			within, cancel := context.WithTimeout(ctx, askTimeout)
			defer cancel()
			began := n.c.Clock.Now()
			told, err := n.peers.epoch(within, m, epoch)
			if err == nil {
				e.heard(told.Epoch, n.c.Clock.Now())
			}
			e.answered(m, epoch, told, err, began)
		})
	}
	wg.Wait()
	s := e.now()
	e.close(s, s.settled && (over || n.back.allHeld(s.Membership)))
}
