package objects

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"sync"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/objects/journal"
	"github.com/stepcache/stepcache/cache/ring"
)

// What is pending of any name, as a listing has to know it, and a read whose owner does not answer.

// ask asks every member, and gives the newest of each name that is not in the bucket, with who can be asked for it.
// upto, when not empty, is the name after which there may be more. What was acknowledged before it is called is among
// it, or in the bucket.
func (b *back) ask(ctx context.Context, query url.Values) (newest map[string]journal.Record, at map[string]ring.Member, upto string, err error) {
	for try := 1; ; try++ {
		var p *tally
		p, err = b.askOnce(ctx, query)
		if err == nil {
			for key := range p.newest {
				if p.upto != "" && key > p.upto {
					delete(p.newest, key)
				}
			}
			return p.newest, p.at, p.upto, nil
		}
		var stale *errStale
		ok := errors.As(err, &stale)
		if !ok || try == routeTries {
			if ok {
				err = fmt.Errorf("%w: the workers do not follow the same membership: %w", gateway.ErrBusy, err)
			}
			return nil, nil, "", err
		}
		b.n.epochs.heard(stale.epoch, b.n.c.Clock.Now())
		b.n.epochs.wait(ctx, stale.epoch, catchUp)
		if err := ctx.Err(); err != nil {
			return nil, nil, "", err
		}
	}
}

// tally is what the answers to one question say together.
type tally struct {
	b *back
	s state
	// knows are the owners that told all that is pending of their names: newest is that, and at who told it.
	knows  map[string]bool
	newest map[string]journal.Record
	at     map[string]ring.Member
	upto   string
	// Of the names of other owners: the newest that anybody holds, who does, and up to where the bucket has it.
	held   map[string]journal.Record
	by     map[string]ring.Member
	floors map[string]journal.Seq
	// missing are members that did not tell, or came without memory; why is of the last of them.
	missing int
	why     error
}

// known says whether every name's owner told.
func (t *tally) known() bool {
	return !slices.ContainsFunc(t.s.Members, func(m ring.Member) bool { return m.State == ring.Ready && !t.knows[m.ID] })
}

// askOnce goes by what the owners know where they tell. Of the names of one that does not, since it cannot be reached
// or does not know yet, it takes what the members hold: all that was acknowledged is held by as many as are wanted, so
// that one of those that answer has it; and what the bucket has by now, and some member still holds, is told by one of
// them as well, which has a mark (see settleCopies).
//
// Members do not answer at one instant. One may tell what it holds right before it is told to drop it, another that had
// the mark right after that is dropped too, since nobody holds anything any more. So they are asked again: what was held
// all that time was held when the marks were asked for. What is not held any more is in the bucket.
func (b *back) askOnce(ctx context.Context, query url.Values) (*tally, error) {
	first, err := b.askAll(ctx, query)
	if err != nil || first.known() {
		return first, err
	}
	enough := func(t *tally) error {
		if t.missing <= b.copies-1 || t.known() {
			return nil
		}
		return fmt.Errorf("%w: %d workers that may hold what is not in the bucket yet cannot be asked: %w", gateway.ErrBusy, t.missing, t.why)
	}
	if err := enough(first); err != nil || len(first.held) == 0 {
		return first, err
	}
	second, err := b.askAll(ctx, query)
	if err != nil {
		return nil, err
	}
	if second.s.Epoch != first.s.Epoch {
		return nil, &errStale{epoch: second.s.Epoch}
	}
	if err := enough(second); err != nil {
		return nil, err
	}
	// What an owner told once is as good as what it tells now.
	for key, r := range second.newest {
		if !first.knows[first.owner(key)] {
			first.newest[key], first.at[key] = r, second.at[key]
		}
	}
	for key, r := range second.held {
		before := first.held[key]
		if first.knows[first.owner(key)] || before.Seq.Compare(r.Seq) > 0 || first.floors[key].Compare(r.Seq) >= 0 || second.floors[key].Compare(r.Seq) >= 0 {
			continue
		}
		first.newest[key], first.at[key] = r, second.by[key]
	}
	if second.upto != "" && (first.upto == "" || second.upto < first.upto) {
		first.upto = second.upto
	}
	return first, nil
}

// askAll asks the members once, and those of former lists that may hold something still.
func (b *back) askAll(ctx context.Context, query url.Values) (*tally, error) {
	s, departed := b.n.epochs.all()
	if !slices.ContainsFunc(s.Members, func(m ring.Member) bool { return m.State == ring.Ready }) {
		return nil, fmt.Errorf("%w: dataset %s: no worker is Ready under membership epoch %d", gateway.ErrBusy, b.n.c.Dataset, s.Epoch)
	}
	members := slices.Clone(s.Members)
	for _, m := range departed {
		if m.ID != b.n.c.Self && !b.left(m) {
			members = append(members, m)
		}
	}
	if !slices.ContainsFunc(members, func(m ring.Member) bool { return m.ID == b.n.c.Self }) {
		members = append(members, ring.Member{ID: b.n.c.Self}) // it has left itself, and may be one of two that hold something
	}
	type reply struct {
		h   heldJSON
		err error
	}
	replies := make([]reply, len(members))
	var wg sync.WaitGroup
	places := make(chan struct{}, askAtOnce)
	for i, m := range members {
		if m.ID == b.n.c.Self {
			replies[i].h = b.tells(s, query)
			continue
		}
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			within, cancel := context.WithTimeout(ctx, catchUp+askTimeout)
			defer cancel()
			if replies[i].err = b.n.peers.known(m); replies[i].err == nil {
				replies[i].h, replies[i].err = b.n.peers.held(within, m, s.Epoch, query)
			}
		})
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if now := b.n.epochs.now(); now.Epoch != s.Epoch {
		return nil, &errStale{epoch: now.Epoch}
	}
	t := &tally{
		b: b, s: s, knows: make(map[string]bool), newest: make(map[string]journal.Record), at: make(map[string]ring.Member),
		held: make(map[string]journal.Record), by: make(map[string]ring.Member), floors: make(map[string]journal.Seq),
	}
	for i, a := range replies {
		if stale := (*errStale)(nil); errors.As(a.err, &stale) {
			return nil, stale
		}
		t.knows[members[i].ID] = a.err == nil && a.h.Knows
	}
	for i, a := range replies {
		t.add(members[i], a.h, a.err)
	}
	return t, nil
}

// add takes one member's answer.
func (t *tally) add(m ring.Member, h heldJSON, err error) {
	if err != nil {
		if !t.b.left(m) {
			t.missing, t.why = t.missing+1, err
		}
		return
	}
	if h.Blank {
		t.missing, t.why = t.missing+1, fmt.Errorf("worker %s came without the memory of a former life", m.ID)
	}
	if h.Upto != "" && (t.upto == "" || h.Upto < t.upto) {
		t.upto = h.Upto
	}
	for _, r := range h.Own {
		if t.owner(r.Key) == m.ID {
			t.newest[r.Key], t.at[r.Key] = r, m
		}
	}
	for _, r := range h.Records {
		switch {
		case t.knows[t.owner(r.Key)] || m.Joined > r.Seq.Epoch:
		case r.Mark:
			if t.floors[r.Key].Compare(r.Seq) < 0 {
				t.floors[r.Key] = r.Seq
			}
		default:
			if have, ok := t.held[r.Key]; !ok || have.Seq.Compare(r.Seq) < 0 {
				t.held[r.Key], t.by[r.Key] = r, m
			}
		}
	}
}

func (t *tally) owner(key string) string {
	if o := t.s.NameOwners(t.b.n.c.Dataset, key, 1); len(o) > 0 {
		return o[0].ID
	}
	return ""
}
