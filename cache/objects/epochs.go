package objects

import (
	"context"
	"errors"
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

func (e *epochs) tell() {
	close(e.changed)
	e.changed = make(chan struct{})
}

func memberKey(m ring.Member) string { return m.ID + " " + m.Addr }

// follow takes a list. Members of the lists before are asked too, until one is settled: they may not know
// of this one, and serve.
func (e *epochs) follow(list ring.Membership, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if list.Epoch <= e.list.Epoch {
		return
	}
	e.unsettle()
	for _, l := range [][]ring.Member{e.list.Members, list.Members} {
		for _, m := range l {
			if m.ID != e.self {
				e.ask[memberKey(m)] = m
			}
		}
	}
	e.list, e.since = list, now
	e.settled = len(e.ask) == 0 && e.behind <= list.Epoch && !e.left
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
	epoch, since := e.list.Epoch, e.since
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
	told := make([]bool, len(ask))
	for i, m := range ask {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			within, cancel := context.WithTimeout(ctx, askTimeout)
			defer cancel()
			theirs, err := n.peers.epoch(within, m, epoch)
			switch {
			case err == nil:
				e.heard(theirs, n.c.Clock.Now())
				told[i] = theirs == epoch
			case errors.Is(err, syscall.ECONNREFUSED):
				told[i] = true // nothing listens there any more
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
	gone := now.Sub(since) >= HandOverTime
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.list.Epoch != epoch {
		return // the questions were about another list
	}
	for i, m := range ask {
		if told[i] || gone {
			delete(e.ask, memberKey(m))
		}
	}
	// A list that nobody shows for so long does not exist.
	behind := e.behind > e.list.Epoch && now.Sub(e.behindSince) < HandOverTime
	if len(e.ask) == 0 && !behind && !e.settled && !e.left {
		e.settled = true
		e.tell()
		n.log.Debug("membership settled", "epoch", epoch)
	}
}
