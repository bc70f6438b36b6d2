package objects

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/objects/journal"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// member is one of the members w0, w1 and so on.
func member(n int) ring.Member {
	return ring.Member{ID: fmt.Sprintf("w%d", n), Addr: fmt.Sprintf("w%d:1", n), State: ring.Ready}
}

func listOf(epoch uint64, members ...int) (l ring.Membership) {
	l.Epoch = epoch
	for _, n := range members {
		l.Members = append(l.Members, member(n))
	}
	return l
}

// settledUnder are the epochs of worker w0, settled under a list just now.
func settledUnder(l ring.Membership, copies int, now time.Time) *epochs {
	e := &epochs{
		self: "w0", back: true, copies: copies, list: l, past: []ring.Membership{l}, settled: true, looked: now,
		ask: make(map[string]ring.Member), learned: make(map[string]bool), changed: make(chan struct{}),
	}
	e.peers.init()
	return e
}

// A worker serves its names only while enough others have told of late that they follow no newer list: of those, one is
// heard by whoever would own the names next.
func TestAWorkerIsSureOnlyWhileOthersConfirmIt(t *testing.T) {
	start := time.Unix(1000, 0)
	all := func(ring.Membership) bool { return true }
	hangs, refuses := errors.New("no answer"), syscall.ECONNREFUSED
	for _, c := range []struct {
		name    string
		members []int
		copies  int
		answers map[int]any // by member: the epoch that it follows, or an error
		after   time.Duration
		want    bool
	}{
		{"alone", []int{0}, 2, nil, 0, true},
		{"one of two", []int{0, 1, 2}, 2, map[int]any{1: 7, 2: hangs}, 0, true},
		{"of late", []int{0, 1, 2}, 2, map[int]any{1: 7}, hungAfter, true},
		{"not of late", []int{0, 1, 2}, 2, map[int]any{1: 7}, hungAfter + 1, false},
		{"none answers", []int{0, 1, 2}, 2, map[int]any{1: hangs, 2: hangs}, 0, false},
		{"one that follows an older list", []int{0, 1, 2}, 2, map[int]any{1: 6, 2: hangs}, 0, true},
		{"one that follows a newer list", []int{0, 1, 2}, 2, map[int]any{1: 8, 2: hangs}, 0, false},
		{"one of two that have to", []int{0, 1, 2}, 3, map[int]any{1: 7, 2: hangs}, 0, false},
		{"both", []int{0, 1, 2}, 3, map[int]any{1: 7, 2: 7}, 0, true},
		{"nothing listens for the other", []int{0, 1}, 2, map[int]any{1: refuses}, 0, true},
		{"nothing listened for the other", []int{0, 1}, 2, map[int]any{1: refuses}, hungAfter + 1, false},
		{"the other hangs", []int{0, 1}, 2, map[int]any{1: hangs}, 0, false},
	} {
		e := settledUnder(listOf(7, c.members...), c.copies, start)
		for n, a := range c.answers {
			var told standpoint
			err, _ := a.(error)
			if epoch, ok := a.(int); ok {
				told.Epoch = uint64(epoch)
			}
			e.answered(member(n), 7, told, err, start)
		}
		now := start.Add(c.after)
		e.looked = now
		if _, ok := e.sure(now, all); ok != c.want {
			t.Errorf("%s: sure: %v", c.name, ok)
		}
		if e.cutOff(now) == c.want {
			t.Errorf("%s: cut off: %v", c.name, !c.want)
		}
	}
}

// Members of former lists are asked what they hold until every member is settled without them, and owners count on that
// nobody asks them only once all have told that they know.
func TestAListIsClosedOnceAllMembersAreSettled(t *testing.T) {
	now := time.Unix(1000, 0)
	e := settledUnder(listOf(7, 0, 1, 2), 2, now)
	e.follow(listOf(8, 0, 1), now)
	departed := func() int { _, d := e.all(); return len(d) }
	if departed() != 1 {
		t.Fatalf("%d members have left", departed())
	}
	e.settled = true
	tell := func(settled, closed uint64) {
		e.answered(member(1), 8, standpoint{8, settled, closed}, nil, now)
	}
	tell(7, 7)
	e.close(e.now(), true)
	if departed() != 1 || e.says() != (standpoint{8, 8, 0}) {
		t.Errorf("another is not settled: %d have left, says %+v", departed(), e.says())
	}
	now = now.Add(time.Second)
	tell(8, 0)
	e.close(e.now(), false)
	if departed() != 1 || e.says() != (standpoint{8, 0, 0}) {
		t.Errorf("what is pending is not held: %d have left, says %+v", departed(), e.says())
	}
	e.close(e.now(), true)
	if departed() != 0 || e.says() != (standpoint{8, 8, 8}) || e.over(8) {
		t.Errorf("closed: %d have left, says %+v, over %v", departed(), e.says(), e.over(8))
	}
	e.learn(8, []ring.Member{member(2)})
	if departed() != 0 || len(e.learned) != 0 {
		t.Errorf("learned of one that nobody asks any more: %d have left, %v", departed(), e.learned)
	}
	now = now.Add(time.Second)
	tell(8, 8)
	if e.close(e.now(), true); !e.over(8) || e.over(7) {
		t.Error("all know, and it is not over")
	}
	e.follow(listOf(9, 0, 1, 3), now)
	if e.over(9) || e.says() != (standpoint{Epoch: 9}) {
		t.Errorf("over under the next list: %v, says %+v", e.over(9), e.says())
	}
	// One that has seen no list before learns of those that left.
	e.learn(9, []ring.Member{member(2), member(1), member(0)})
	if _, ok := e.ask[memberKey(member(2))]; departed() != 1 || !ok || !e.learned[memberKey(member(2))] {
		t.Errorf("%d have left, %v are asked", departed(), e.ask)
	}
}

// A member that does not answer is waited for until nothing that it does counts any more, and one that may only be slow
// for longer.
func TestHowLongAMemberThatDoesNotAnswerIsWaitedFor(t *testing.T) {
	start := time.Unix(1000, 0)
	const never = -1
	for _, c := range []struct {
		name       string
		back, left bool
		told       time.Duration // after the list came
		want       time.Duration
	}{
		{"all go through", false, false, never, HandOverTime},
		{"it may be slow", true, false, never, HandOverTime},
		{"it may be slow, and was confirmed right before", true, false, HandOverTime - 1, HandOverTime + hungAfter},
		{"it said that it stops", true, true, never, hungAfter + 1},
		{"it said that it stops, and another confirmed it right before", true, true, time.Second, hungAfter + time.Second + 1},
	} {
		e := epochs{back: c.back, since: start}
		if c.told != never {
			e.toldAt = start.Add(c.told)
		}
		if e.waited(start.Add(c.want-1), c.left) || !e.waited(start.Add(c.want), c.left) {
			t.Errorf("%s: not %v", c.name, c.want)
		}
	}
}

// Whoever leaves for good need not tell, and only who stopped otherwise, and so may be back, counts as not heard.
func TestWhoNeedNotTell(t *testing.T) {
	start := time.Unix(1000, 0)
	for _, c := range []struct {
		name       string
		back, left bool
		state      ring.State
		after      time.Duration
		want       bool
	}{
		{"all go through", false, false, ring.Ready, HandOverTime, true},
		{"all go through, and it may be slow", false, false, ring.Ready, HandOverTime - 1, false},
		{"it was leaving, and said that it stops", true, true, ring.Leaving, hungAfter + 1, true},
		{"it was leaving, and may be slow", true, true, ring.Leaving, hungAfter, false},
		{"it was leaving, and did not say that it stops", true, false, ring.Leaving, 2 * HandOverTime, false},
		{"it said that it stops, and may be back", true, true, ring.Ready, 2 * HandOverTime, false},
	} {
		e := epochs{back: c.back, since: start}
		if got := e.excused(ring.Member{ID: "w", State: c.state}, start.Add(c.after), c.left); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// A member that told of entries and then stopped with nothing left holds none of them, and is not asked for ever.
func TestWhoStoppedMeanwhileIsNotAskedAgain(t *testing.T) {
	for _, c := range []struct {
		name  string
		dial  error
		bye   bool
		state ring.State
		again bool
	}{
		{"nothing listens there any more", syscall.ECONNREFUSED, true, ring.Ready, false},
		{"it did not say that it stops", syscall.ECONNREFUSED, false, ring.Ready, true},
		{"it left for good", syscall.EHOSTUNREACH, true, ring.Leaving, false},
		{"it may be back", syscall.EHOSTUNREACH, true, ring.Ready, true},
	} {
		m := ring.Member{ID: "w1", Addr: "127.0.0.1:1", State: c.state}
		n := &Names{log: slog.New(slog.DiscardHandler), c: Config{
			Self: "w0", Clock: systemClock{}, Keys: wire.GenerateKeys,
			Dial: func(context.Context, string, string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Err: c.dial}
			},
		}}
		n.peers = newPeers(n)
		b := &back{n: n, byes: map[string]bool{m.ID: c.bye}, gathered: map[string]gathered{
			memberKey(m): {member: m, epoch: 7, records: []journal.Record{{Key: "k"}}, still: map[record]bool{{"k", journal.Seq{}}: true}},
		}}
		failed := b.gatherAgain(t.Context(), 7, nil)
		n.peers.shut()
		if (len(failed) > 0) != c.again {
			t.Errorf("%s: asked again: %v", c.name, failed)
		}
		if g := b.gathered[memberKey(m)]; len(g.still) > 0 && !c.again {
			t.Errorf("%s: it holds %v still", c.name, g.still)
		}
	}
}
