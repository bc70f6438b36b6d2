package objects

import (
	"context"
	"net/http"
	"slices"
	"strconv"

	"github.com/stepcache/stepcache/cache/objects/journal"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// What a worker holds that is no member any more, and that could not be told.

// maxRelease bounds one question about what may be dropped.
const maxRelease = 1000

// record names one of the journal's.
type record struct {
	Key string
	Seq journal.Seq
}

// release drops what this worker holds, while it is no member, and the owners of the names need no more.
func (b *back) release(ctx context.Context) {
	s := b.n.epochs.now()
	if s.Epoch == 0 || slices.ContainsFunc(s.Members, func(m ring.Member) bool { return m.ID == b.n.c.Self }) {
		return
	}
	ask := make(map[string][]record)
	owners := make(map[string]ring.Member)
	for _, key := range b.j.Keys() {
		m, err := b.n.owner(s, key)
		if err != nil || b.n.peers.known(m) != nil {
			continue
		}
		for _, r := range b.j.Of(key) {
			if len(ask[m.ID]) < maxRelease { // the rest next time
				ask[m.ID], owners[m.ID] = append(ask[m.ID], record{key, r.Seq}), m
			}
		}
	}
	for id, records := range ask {
		within, cancel := context.WithTimeout(ctx, askTimeout)
		var needless []bool
		err := b.n.peers.ask(within, owners[id], s.Epoch, http.MethodPost, "/release", nil, records, &needless)
		cancel()
		if err != nil {
			b.n.log.Debug("an owner does not tell what of its names need not be held here any more", "member", id, "error", err)
			continue
		}
		for i, r := range records[:min(len(records), len(needless))] {
			if !needless[i] {
				continue
			}
			if err := b.j.Forget(r.Key, r.Seq); err != nil {
				b.n.log.Warn("what need not be held any more cannot be dropped", "key", r.Key, "error", err)
			}
		}
	}
}

// serveRelease tells a worker that is no member which of its records of this worker's names are of no use.
func (b *back) serveRelease(w http.ResponseWriter, r *http.Request) {
	theirs, err := strconv.ParseUint(r.Header.Get(wire.HeaderEpoch), 10, 64)
	if err != nil {
		refuse(w, http.StatusBadRequest, "invalid", "no epoch")
		return
	}
	var records []record
	if err := decode(r, &records); err != nil {
		failed(w, err)
		return
	}
	if s := b.n.epochs.now(); s.Epoch != theirs {
		answer(w, http.StatusConflict, refusal{Kind: "stale", Text: "another membership", Epoch: s.Epoch})
		return
	}
	needless := make([]bool, len(records))
	for i, rec := range records {
		needless[i] = b.needless(rec, theirs)
	}
	answer(w, http.StatusOK, needless)
}

// needless says whether one record of somebody that is no member may go: the bucket has it, or enough members hold that
// or what came after it.
func (b *back) needless(r record, epoch uint64) bool {
	list := b.n.epochs.now()
	b.mu.Lock()
	yes := true
	if p := b.names[r.Key]; p != nil && len(p.entries) > 0 && r.Seq.Compare(p.floor) > 0 {
		yes = slices.ContainsFunc(p.entries, func(e *unsent) bool {
			return e.acked && e.Seq.Compare(r.Seq) >= 0 && e.members(list) >= b.copies
		})
	}
	b.mu.Unlock()
	// All along: what is pending of a name that moves is forgotten here.
	now, ok := b.sure(r.Key)
	return yes && ok && now.Epoch == epoch && list.Epoch == epoch
}

// members is how many members hold an entry, this worker included. The caller holds the mutex.
func (e *unsent) members(list state) (n int) {
	if e.local {
		n++
	}
	for _, m := range e.at {
		if isMember(list, m) {
			n++
		}
	}
	return n
}
