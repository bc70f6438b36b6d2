package objects

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/stepcache/stepcache/cache/objects/journal"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// What members tell each other about what they hold.

// maxHeld bounds an answer about what a member holds.
const maxHeld = 64 << 20

// heldJSON is what a member holds.
type heldJSON struct {
	Records []journal.Record
	// Knows: the member knows all that is pending of the names that it owns. Own is the newest that was acknowledged
	// of each, and Records has nothing of them.
	Knows bool             `json:",omitempty"`
	Own   []journal.Record `json:",omitempty"`
	// Blank: it came without the memory of a former life, and was not settled since.
	Blank bool `json:",omitempty"`
	// Departed are members of former lists that it has to ask, or that others may.
	Departed []ring.Member `json:",omitempty"`
	// Upto, when not empty, is the last name told of, since there were too many.
	Upto string
}

// held asks m what it holds.
func (p *peers) held(ctx context.Context, m ring.Member, epoch uint64, query url.Values) (h heldJSON, err error) {
	req, err := p.request(ctx, http.MethodGet, m, "/held", query, epoch, nil)
	if err != nil {
		return h, err
	}
	err = p.do(ctx, m, req, func(resp *http.Response) error {
		return json.NewDecoder(io.LimitReader(resp.Body, maxHeld)).Decode(&h)
	})
	return h, err
}

// backRoutes are the requests of other workers about what is pending.
func (n *Names) backRoutes(mux *http.ServeMux) {
	b := n.back
	mux.HandleFunc("PUT /hold", n.serveHold)
	mux.HandleFunc("GET /held", b.serveHeld)
	mux.HandleFunc("POST /release", b.serveRelease)
	mux.HandleFunc("POST /mark", b.word(b.j.Mark))
	mux.HandleFunc("POST /forget", b.word(b.j.Forget))
	mux.HandleFunc("POST /bye", func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		b.byes[r.URL.Query().Get("from")] = true
		b.mu.Unlock()
		answer(w, http.StatusOK, struct{}{})
	})
	// The owner of a name is asked to bring it to the bucket, from where it is copied to another.
	mux.HandleFunc("POST /settled", owned(n, func(w http.ResponseWriter, r *http.Request, key string, p place, s state) (version, error) {
		return version{}, b.settled(r.Context(), key, s)
	}))
}

// settled returns once nothing of a name is pending.
func (b *back) settled(ctx context.Context, key string, s state) error {
	t, err := b.through(ctx, key, s, false)
	if err == nil {
		t.done()
	}
	return err
}

func (b *back) word(do func(string, journal.Seq) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		epoch, err1 := strconv.ParseUint(q.Get("epoch"), 10, 64)
		n, err2 := strconv.ParseUint(q.Get("n"), 10, 64)
		var err error
		if err1 != nil || err2 != nil || checkKey(q.Get("key")) != nil {
			err = fmt.Errorf("%w: a word of another worker about %q", source.ErrInvalid, q.Get("key"))
		} else {
			err = do(q.Get("key"), journal.Seq{Epoch: epoch, N: n})
		}
		if err != nil {
			failed(w, err)
			return
		}
		answer(w, http.StatusOK, struct{}{})
	}
}

// serveHeld tells what this worker's journal has: of the names that the member owner owns, or from a prefix on.
// It is told under one membership, that of who asks.
func (b *back) serveHeld(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if limit, err := strconv.Atoi(q.Get("limit")); !q.Has("owner") && (err != nil || limit < 1) {
		refuse(w, http.StatusBadRequest, "invalid", "no limit")
		return
	}
	s, ok := b.n.follows(w, r)
	if !ok {
		return
	}
	var h heldJSON
	if owner := q.Get("owner"); owner != "" {
		if err := b.sendsNothing(r.Context(), s, owner); err != nil {
			return // the sender is gone
		}
		h = b.holds(s, owner)
		_, h.Departed = b.n.epochs.all()
	} else {
		h = b.tells(s, q)
	}
	if now := b.n.epochs.now(); now.Epoch != s.Epoch {
		answer(w, http.StatusConflict, refusal{Kind: "stale", Text: "another membership", Epoch: now.Epoch})
		return
	}
	answer(w, http.StatusOK, h)
}

// holds is what this worker's journal has of the names that a member owns.
func (b *back) holds(s state, owner string) (h heldJSON) {
	for _, key := range b.j.Keys() {
		if o := s.NameOwners(b.n.c.Dataset, key, 1); len(o) > 0 && o[0].ID == owner {
			h.Records = append(h.Records, bare(b.j.Of(key))...)
		}
	}
	return h
}

// bare are records without their sums, which are of no use elsewhere.
func bare(records []journal.Record) []journal.Record {
	for i := range records {
		records[i].Sums = nil
	}
	return records
}

// tells is what this worker knows and holds, as a query asks for it.
func (b *back) tells(s state, q url.Values) (h heldJSON) {
	limit, _ := strconv.Atoi(q.Get("limit"))
	asked := func(key string) bool {
		return (!q.Has("key") || key == q.Get("key")) && strings.HasPrefix(key, q.Get("prefix")) && key > q.Get("after")
	}
	before, knows := b.n.epochs.knows(b.n.c.Clock.Now())
	own := make(map[string]journal.Record)
	b.mu.Lock()
	for key, p := range b.names {
		if e := p.acked(); e != nil && asked(key) && b.owns(s.Membership, key) {
			own[key] = bare([]journal.Record{e.Record})[0]
		}
	}
	b.mu.Unlock()
	after, still := b.n.epochs.knows(b.n.c.Clock.Now())
	h.Knows = knows && still && before.turn == after.turn && after.Epoch == s.Epoch
	_, err := os.Stat(b.settledPath())
	h.Blank = err != nil
	held := make(map[string][]journal.Record)
	for _, key := range b.j.Keys() {
		if asked(key) && !(h.Knows && b.owns(s.Membership, key)) {
			held[key] = bare(b.j.Of(key))
		}
	}
	if !h.Knows { // what it knows all the same may be held only by others that have left
		for key, r := range own {
			if !slices.ContainsFunc(held[key], func(o journal.Record) bool { return o.Seq == r.Seq && !o.Mark }) {
				held[key] = append(held[key], r)
			}
		}
		clear(own)
	}
	keys := slices.AppendSeq(slices.Collect(maps.Keys(own)), maps.Keys(held))
	slices.Sort(keys)
	if len(keys) > limit {
		keys = keys[:limit]
		h.Upto = keys[limit-1]
	}
	for _, key := range keys {
		h.Records = append(h.Records, held[key]...)
		if r, ok := own[key]; ok {
			h.Own = append(h.Own, r)
		}
	}
	return h
}

// allHeld says whether members hold all that this worker knows to be pending of its names, and enough of them know
// what is not pending any more although others may hold it: then it does not matter what those hold or know that are
// members no more.
func (b *back) allHeld(list ring.Membership) bool {
	s := state{Membership: list}
	b.mu.Lock()
	defer b.mu.Unlock()
	for key, p := range b.names {
		if !b.owns(list, key) {
			continue
		}
		if len(p.entries) == 0 && (p.kept || len(p.stale) > 0 && p.marked(list) < min(b.copies, len(list.Members))-1) {
			return false
		}
		for _, e := range p.entries {
			if e.members(s) == 0 {
				return false
			}
		}
	}
	return true
}

// gather notes what m holds of this worker's names, under the list with that epoch.
func (b *back) gather(ctx context.Context, m ring.Member, epoch uint64) error {
	h, err := b.n.peers.held(ctx, m, epoch, url.Values{"owner": {b.n.c.Self}})
	if err != nil {
		return err
	}
	b.n.epochs.learn(epoch, h.Departed)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gathered[memberKey(m)] = gathered{member: m, epoch: epoch, records: h.Records}
	return nil
}

// gatherAgain asks those that told of entries again, now that all but the missing have told, and gives those that do not
// answer. Members do not tell at one instant (see askOnce): one may have told of an entry before a later one of the same
// name came to the bucket, and another, which held that, after it was dropped. What nobody holds any more is there.
func (b *back) gatherAgain(ctx context.Context, epoch uint64, missing map[string]ring.Member) (failed []ring.Member) {
	b.mu.Lock()
	maps.DeleteFunc(b.gathered, func(key string, g gathered) bool {
		_, ok := missing[key]
		return ok || g.epoch != epoch
	})
	var again []ring.Member
	for _, g := range b.gathered {
		if slices.ContainsFunc(g.records, func(r journal.Record) bool { return !r.Mark }) {
			again = append(again, g.member)
		}
	}
	b.mu.Unlock()
	errs := make([]error, len(again))
	var wg sync.WaitGroup
	places := make(chan struct{}, askAtOnce)
	for i, m := range again {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			within, cancel := context.WithTimeout(ctx, 2*askTimeout)
			defer cancel()
			h, err := b.n.peers.held(within, m, epoch, url.Values{"owner": {b.n.c.Self}})
			if err != nil && b.left(m) && (errors.Is(err, syscall.ECONNREFUSED) || m.State == ring.Leaving) {
				h, err = heldJSON{}, nil // it stopped meanwhile, and holds nothing any more (see excused)
			}
			if errs[i] = err; err != nil {
				return
			}
			b.n.epochs.learn(epoch, h.Departed)
			b.mu.Lock()
			defer b.mu.Unlock()
			g := b.gathered[memberKey(m)]
			g.still = make(map[record]bool)
			for _, r := range h.Records {
				if r.Mark {
					g.records = append(g.records, r)
				} else {
					g.still[record{r.Key, r.Seq}] = true
				}
			}
			b.gathered[memberKey(m)] = g
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			failed = append(failed, again[i])
			b.n.log.Debug("a member does not tell again what it holds", "member", again[i].ID, "error", err)
		}
	}
	return failed
}

// maySettle says whether this worker knows all that is pending of its names although that many members could not
// be asked: what was acknowledged is held by as many as are wanted, and one that came without memory counts as one
// that could not be asked.
//
// Of those only known are members of lists that this worker has seen itself. Of the others it must not be more either,
// or they could go on among themselves.
func (b *back) maySettle(missing map[string]ring.Member, known int) bool {
	if _, err := os.Stat(b.settledPath()); err != nil {
		known++
	}
	if max(known, len(missing)) <= b.copies-1 {
		return true
	}
	var ids []string
	for _, m := range missing {
		ids = append(ids, m.ID)
	}
	slices.Sort(ids)
	err := fmt.Errorf("worker %s does not serve the names that came to it, since too many workers may hold what was acknowledged of them and do not answer: %s; bring them back, or restart all the workers that say so to go on with the loss of what only they hold", b.n.c.Self, strings.Join(ids, ", "))
	b.mu.Lock()
	first := b.blocked == nil
	b.blocked = err
	b.mu.Unlock()
	if first {
		b.n.log.Info("waits for other workers", "reason", err)
	}
	return false
}

// settledPath is a file that says that what this worker's journal held, when it was settled last, is in it.
func (b *back) settledPath() string { return filepath.Join(b.n.c.Dir, journalName+".settled") }

// adopt takes what is pending of the names that this worker owns under a list that is settled now. kept says of
// which names it was the owner all along, whose state it has. missing could not be asked, and may hold anything.
func (b *back) adopt(list ring.Membership, kept func(key string) bool, missing []ring.Member) {
	type held struct {
		by ring.Member // with an empty id: this worker
		journal.Record
	}
	// If this worker left the list and came back, others went on with its names: what it held counts as little as
	// that of others that came back.
	self := ring.Member{Joined: b.self(state{Membership: list}).Joined}
	b.mu.Lock()
	all := b.gathered
	b.gathered = make(map[string]gathered)
	known := slices.Collect(maps.Keys(b.names))
	b.mu.Unlock()
	byKey := make(map[string][]held)
	still := make(map[record]bool)
	for _, key := range append(b.j.Keys(), known...) {
		if _, ok := byKey[key]; !ok {
			byKey[key] = nil
			for _, r := range b.j.Of(key) {
				byKey[key] = append(byKey[key], held{self, r})
				still[record{key, r.Seq}] = !r.Mark
			}
		}
	}
	for _, g := range all {
		maps.Copy(still, g.still)
	}
	for _, g := range all {
		for _, r := range g.records {
			if of := (record{r.Key, r.Seq}); !r.Mark && !g.still[of] {
				if still[of] {
					continue // it was dropped there since others hold it
				}
				r.Mark = true // the bucket has it by now
			}
			byKey[r.Key] = append(byKey[r.Key], held{g.member, r})
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	found := 0
	for key, records := range byKey {
		st := b.names[key]
		if !b.owns(list, key) {
			if st != nil && st.through == 0 && st.committing == 0 {
				st.gen++
				st.tell()
				if st.flushing {
					b.enqueue(st) // forgotten then: its next owner asks until nothing is sent of it any more
				} else {
					delete(b.names, key)
				}
			}
			continue
		}
		for _, r := range records {
			b.last = max(b.last, r.Seq.N)
		}
		if kept(key) {
			for _, r := range records {
				if r.by.ID != "" {
					b.heardOf(r.by, r.Record)
				}
			}
			continue
		}
		if len(records) == 0 && st == nil {
			continue
		}
		st = b.name(key)
		st.gen++
		stale := make(map[string]ring.Member)
		for _, e := range st.entries { // copies may be on their way
			maps.Copy(stale, e.tried)
		}
		st.entries, st.floor, st.dropped, st.kept, st.checks = nil, journal.Seq{}, journal.Seq{}, false, true
		st.stale, st.marks = stale, make(map[string]ring.Member)
		st.tries, st.next = 0, b.n.c.Clock.Now()
		var old journal.Seq // the newest of what does not count
		for _, r := range records {
			switch {
			case r.by.Joined > r.Seq.Epoch: // it came back: what it held was settled without it
				if r.by.ID != "" {
					st.stale[r.by.ID] = r.by
				}
				if old.Compare(r.Seq) < 0 {
					old = r.Seq
				}
			case r.Mark:
				if st.floor.Compare(r.Seq) < 0 {
					st.floor = r.Seq
				}
			}
			if r.by.ID == "" {
				st.kept = true
			}
		}
		for _, r := range records {
			switch {
			case r.by.Joined > r.Seq.Epoch:
			case r.Mark || r.Seq.Compare(st.floor) <= 0:
				if r.by.ID != "" {
					st.stale[r.by.ID] = r.by
				}
			default:
				i, ok := slices.BinarySearchFunc(st.entries, r.Seq, func(e *unsent, s journal.Seq) int { return e.Seq.Compare(s) })
				if !ok {
					e := &unsent{Record: r.Record, acked: true, at: make(map[string]ring.Member), tried: make(map[string]ring.Member)}
					st.entries = slices.Insert(st.entries, i, e)
					found++
				}
				if r.by.ID != "" {
					st.entries[i].at[r.by.ID] = r.by
				} else {
					st.entries[i].local = true
					st.entries[i].Record = r.Record // with its sums
				}
			}
		}
		if len(st.entries) == 0 && st.floor.Compare(old) < 0 {
			st.floor = old
		}
		if len(records) > 0 {
			for _, m := range missing {
				st.stale[m.ID] = m
			}
		}
		st.tell()
		b.enqueue(st)
	}
	if found > 0 {
		b.n.log.Info("took over what is not in the bucket yet", "epoch", list.Epoch, "versions", found)
	}
}

// left says whether a member that nobody listens for stopped with nothing left.
func (b *back) left(m ring.Member) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.byes[m.ID]
}

// met notes that a member is there, whatever it said before.
func (b *back) met(id string) {
	b.mu.Lock()
	delete(b.byes, id)
	b.mu.Unlock()
	for _, m := range b.n.epochs.now().Members {
		if m.ID == id {
			b.n.peers.isUp(m)
		}
	}
}

// meet asks members that could not be asked when the membership was settled, and are back.
func (b *back) meet(ctx context.Context) {
	e := &b.n.epochs
	e.mu.Lock()
	var back []ring.Member
	if e.settled {
		for _, m := range e.missing {
			if slices.ContainsFunc(e.list.Members, func(o ring.Member) bool { return memberKey(o) == memberKey(m) }) {
				back = append(back, m)
			}
		}
	}
	epoch := e.list.Epoch
	e.mu.Unlock()
	var wg sync.WaitGroup
	for _, m := range back {
		if b.n.peers.known(m) != nil {
			continue
		}
		wg.Go(func() {
			within, cancel := context.WithTimeout(ctx, askTimeout)
			defer cancel()
			h, err := b.n.peers.held(within, m, epoch, url.Values{"owner": {b.n.c.Self}})
			if err != nil {
				return // later
			}
			b.mu.Lock()
			for _, r := range h.Records {
				b.heardOf(m, r)
			}
			b.mu.Unlock()
			e.mu.Lock()
			if e.list.Epoch == epoch {
				delete(e.missing, memberKey(m))
			}
			e.mu.Unlock()
		})
	}
	wg.Wait()
}

// heardOf takes what a member holds of a name whose state this worker has: that is what counts. The caller holds
// the mutex.
func (b *back) heardOf(m ring.Member, r journal.Record) {
	st := b.name(r.Key)
	if len(st.entries) > 0 || st.committing > 0 {
		for _, e := range st.entries {
			if e.Seq == r.Seq && !r.Mark {
				e.at[m.ID] = m
				return
			}
		}
		st.stale[m.ID] = m // told once the bucket has the newest
		return
	}
	// In the bucket, or never acknowledged.
	if st.floor.Compare(r.Seq) < 0 {
		st.floor = r.Seq
	}
	st.stale[m.ID] = m
	b.enqueue(st)
}

// isSettled notes that this worker's journal has all that it should.
func (b *back) isSettled() {
	b.mu.Lock()
	b.blocked = nil
	b.mu.Unlock()
	if err := os.WriteFile(b.settledPath(), nil, 0o600); err != nil {
		b.n.log.Warn("it cannot be noted that this worker knows what is pending", "error", err)
	}
}
