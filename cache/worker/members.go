package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
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
	path    string
	current atomic.Pointer[view]
}

func newView(m ring.Membership) (*view, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	return &view{Membership: m, encoded: b, replaced: make(chan struct{})}, nil
}

// view is the list in force; before the first one is read it is empty, with epoch 0.
func (m *members) view() *view { return m.current.Load() }

// reload reads the file. The list in force stays when the file is missing, malformed, or does not have a
// greater epoch: an epoch names one list, and placement must never go back. Only run calls it.
func (m *members) reload() error {
	next, err := ring.Load(m.path)
	if err != nil {
		return err
	}
	v, err := newView(next)
	if err != nil {
		return err
	}
	old := m.view()
	if bytes.Equal(v.encoded, old.encoded) {
		return nil
	}
	if next.Epoch <= old.Epoch {
		return fmt.Errorf("membership file %s: its list differs but its epoch %d is not greater than %d, the one in force: raise the epoch with every change", m.path, next.Epoch, old.Epoch)
	}
	m.current.Store(v)
	close(old.replaced)
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
		case <-w.clock.After(pollInterval):
		}
	}
}
