package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
)

// pollInterval is how often the membership file and the lister's snapshot are looked at.
const pollInterval = time.Second

// view is one membership list. It is immutable; replaced is closed when a newer one takes its place.
type view struct {
	ring.Membership
	encoded  []byte
	replaced chan struct{}
	// before is the membership as if nobody left; empty when nobody does.
	before ring.Membership
	// sooner are the members that were there before this worker came, then those before the last of them, and
	// so on: who came just before may not have a block yet that it owns. Empty when they held nothing then.
	sooner []ring.Membership
}

// former are the members that may hold a block though they do not own it: those that own it no longer only
// because they leave, and, where this worker is new, those that owned it before this worker came.
func (v *view) former(o ring.Object, block int64, copies int, isNew bool) []ring.Member {
	var found []ring.Member
	for _, m := range v.before.Owners(o, block, copies) {
		if v.leaves(m.ID) {
			found = append(found, m)
		}
	}
	if !isNew {
		return found
	}
	asked := 0
	for _, before := range v.sooner {
		for _, m := range before.Owners(o, block, copies) {
			if asked < maxFormer && !slices.ContainsFunc(found, func(f ring.Member) bool { return f.ID == m.ID }) {
				found = append(found, m)
				asked++
			}
		}
	}
	return found
}

// maxFormer bounds how many that were there before are asked for one block: the bucket is not that slow.
const maxFormer = 4

// newFor is how long after its start a worker asks those that were there before it. What has moved to it and
// was not asked for within that time they have likely evicted, or nobody wants.
const newFor = time.Hour

func (w *Worker) isNew() bool { return w.clock.Now().Sub(w.started) < newFor }

func (v *view) leaves(id string) bool {
	return slices.ContainsFunc(v.Members, func(m ring.Member) bool { return m.ID == id && m.State == ring.Leaving })
}

// owners are the members that hold a block, in order, and this worker's place among them (-1: none).
func (v *view) owners(self string, o ring.Object, block int64, copies int) ([]ring.Member, int) {
	owners := v.Owners(o, block, copies)
	for i, m := range owners {
		if m.ID == self {
			return owners, i
		}
	}
	return owners, -1
}

// members keeps the newest list of the membership file.
type members struct {
	self    string // this worker's id
	path    string
	current atomic.Pointer[view]
	look    chan struct{} // somebody wants the file read at once

	mu   sync.Mutex // guards changes of current
	told bool       // the list in force was told by the controller: the file may be an older one
}

func newView(m ring.Membership, self string) (*view, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	v := &view{Membership: m, encoded: b, replaced: make(chan struct{})}
	if slices.ContainsFunc(m.Members, func(m ring.Member) bool { return m.State == ring.Leaving }) {
		v.before = ring.Membership{Epoch: m.Epoch, Members: slices.Clone(m.Members)}
		for i := range v.before.Members {
			v.before.Members[i].State = ring.Ready
		}
	}
	i := slices.IndexFunc(m.Members, func(m ring.Member) bool { return m.ID == self })
	if i >= 0 && m.Members[i].Joined > 0 {
		var joined []uint64
		for _, o := range m.Members {
			if o.Joined > 0 && o.Joined <= m.Members[i].Joined {
				joined = append(joined, o.Joined)
			}
		}
		slices.Sort(joined)
		joined = slices.Compact(joined)
		slices.Reverse(joined)
		for _, epoch := range joined[:min(len(joined), maxFormer)] {
			before := ring.Membership{Epoch: m.Epoch}
			for _, o := range m.Members {
				if o.Joined < epoch {
					o.State = ring.Ready // as it was then
					before.Members = append(before.Members, o)
				}
			}
			v.sooner = append(v.sooner, before)
		}
	}
	return v, nil
}

// view is the list in force; before the first one is read it is empty, with epoch 0.
func (m *members) view() *view { return m.current.Load() }

// reload reads the file. The list in force stays when the file is missing, malformed, or does not have a
// greater epoch: an epoch names one list, and placement must never go back.
func (m *members) reload() error {
	next, err := ring.Load(m.path)
	if err != nil {
		return err
	}
	v, err := newView(next, m.self)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.view()
	switch {
	case bytes.Equal(v.encoded, old.encoded):
		m.told = false
		return nil
	case next.Epoch < old.Epoch && m.told:
		return nil
	case next.Epoch <= old.Epoch:
		return fmt.Errorf("membership file %s: its list differs but its epoch %d is not greater than %d, the one in force: raise the epoch with every change", m.path, next.Epoch, old.Epoch)
	}
	m.told = false
	m.current.Store(v)
	close(old.replaced)
	return nil
}

// told takes a list from the controller, which is quicker than the file. An older one, or the one in force,
// changes nothing.
func (w *Worker) told(r *http.Request) error {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return failed(http.StatusBadRequest, "membership: %w", err)
	}
	next, err := ring.Parse(b)
	if err != nil {
		return failed(http.StatusBadRequest, "%w", err)
	}
	m := &w.members
	v, err := newView(next, m.self)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.view()
	if next.Epoch > old.Epoch {
		m.told = true
		m.current.Store(v)
		close(old.replaced)
		w.log.Info("membership told", "epoch", v.Epoch, "members", len(v.Members))
	}
	return nil
}

// keepMembers follows the membership file until ctx ends.
func (w *Worker) keepMembers(ctx context.Context) error {
	if w.config.MembershipFile == "" {
		return nil
	}
	for {
		before := w.members.view().Epoch
		err := w.members.reload()
		w.problems.set(problemMembers, err)
		if v := w.members.view(); v.Epoch != before {
			w.log.Info("membership changed", "epoch", v.Epoch, "members", len(v.Members))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.members.look:
		case <-w.clock.After(pollInterval):
		}
	}
}
