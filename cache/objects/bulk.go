package objects

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

const (
	// bulkKeys is the most that are deleted with one request, as the protocol has it.
	bulkKeys = 1000
	// deletesAtOnce bounds the requests of a bulk delete under way.
	deletesAtOnce = 16
)

// deleteJSON is a bulk delete as it travels, and outcomesJSON the answer: one for each key.
type deleteJSON struct{ Keys []string }

type outcomesJSON struct{ Failed map[string]refusal }

// DeleteMany implements gateway.BulkWriter: keys go to their owners, and each owner deletes its own with one request
// to the bucket where that can. What does not go that way is deleted one by one.
func (n *Names) DeleteMany(ctx context.Context, keys []string) map[string]error {
	failed := make(map[string]error)
	var rest []string
	groups := make(map[string][]string) // by owner
	members := make(map[string]ring.Member)
	s := n.epochs.now()
	seen := make(map[string]bool)
	for _, key := range keys {
		if seen[key] {
			continue
		}
		seen[key] = true
		m, err := n.owner(s, key)
		if _, lerr := n.locate(key); err != nil || lerr != nil || n.back != nil {
			rest = append(rest, key)
			continue
		}
		members[m.ID] = m
		groups[m.ID] = append(groups[m.ID], key)
	}
	type result struct {
		rest   []string
		failed map[string]error
	}
	results := make(chan result, len(keys))
	var g errgroup.Group
	g.SetLimit(deletesAtOnce)
	for id, keys := range groups {
		for len(keys) > 0 {
			some := keys[:min(len(keys), bulkKeys)]
			keys = keys[len(some):]
			g.Go(func() error {
				var r result
				r.failed, r.rest = n.deleteAt(ctx, members[id], s, some)
				results <- r
				return nil
			})
		}
	}
	_ = g.Wait() // they fail by key
	close(results)
	for r := range results {
		for key, err := range r.failed {
			failed[key] = err
		}
		rest = append(rest, r.rest...)
	}
	for key, err := range n.deleteEach(rest, func(key string) error { return n.Delete(ctx, key) }) {
		failed[key] = err
	}
	return failed
}

// deleteEach deletes keys one by one, a few at once.
func (n *Names) deleteEach(keys []string, one func(key string) error) map[string]error {
	errs := make([]error, len(keys))
	var g errgroup.Group
	g.SetLimit(deletesAtOnce)
	for i, key := range keys {
		g.Go(func() error {
			errs[i] = one(key)
			return nil
		})
	}
	_ = g.Wait()
	failed := make(map[string]error)
	for i, key := range keys {
		if errs[i] != nil {
			failed[key] = errs[i]
		}
	}
	return failed
}

// deleteAt has the owner of keys delete them. rest are those that it did not take: they are to be deleted as single
// ones are, which find another way.
func (n *Names) deleteAt(ctx context.Context, m ring.Member, s state, keys []string) (failed map[string]error, rest []string) {
	if m.ID == n.c.Self {
		return n.removeAll(ctx, keys, s), nil
	}
	if n.peers.known(m) != nil {
		return nil, keys
	}
	n.counts.forwarded.Add(int64(len(keys)))
	var out outcomesJSON
	err := n.peers.ask(ctx, m, s.Epoch, http.MethodPost, "/delete", nil, deleteJSON{keys}, &out)
	if err != nil {
		// It may have been done: a deletion is done twice without harm.
		n.log.Debug("keys are deleted one by one", "worker", m.ID, "keys", len(keys), "error", err)
		return nil, keys
	}
	failed = make(map[string]error, len(out.Failed))
	for key, r := range out.Failed {
		failed[key] = remote(m, r)
	}
	return failed, nil
}

// removeAll executes the deletion of keys that this worker owns under s.
func (n *Names) removeAll(ctx context.Context, keys []string, s state) map[string]error {
	failed := make(map[string]error)
	byMount := make(map[*mount][]place)
	for _, key := range keys {
		if p, err := n.locate(key); err != nil {
			failed[key] = err
		} else {
			byMount[p.mount] = append(byMount[p.mount], p)
		}
	}
	for m, places := range byMount {
		bulk, ok := source.BulkDeleterOf(m.writer)
		if !ok || len(places) == 1 {
			for key, err := range n.deleteEach(names(places), func(key string) error {
				p, err := n.locate(key)
				if err != nil {
					return err
				}
				return n.remove(ctx, key, p, s, true)
			}) {
				failed[key] = err
			}
			continue
		}
		for key, err := range n.removeBulk(ctx, bulk, places, s) {
			failed[key] = err
		}
	}
	return failed
}

func names(places []place) []string {
	out := make([]string, len(places))
	for i, p := range places {
		out[i] = p.name()
	}
	return out
}

// removeBulk is remove for many keys of one mount.
func (n *Names) removeBulk(ctx context.Context, bulk source.BulkDeleter, places []place, s state) map[string]error {
	if err := waits(ctx); err != nil {
		failed := make(map[string]error)
		for _, p := range places {
			failed[p.name()] = fmt.Errorf("delete %q: %w", p.name(), err)
		}
		return failed
	}
	writes := make(map[string]*write, len(places))
	keys := make([]string, len(places)) // in the bucket
	for i, p := range places {
		writes[p.name()], keys[i] = n.begin(p.name(), s, true), p.key
	}
	gone, err := bulk.DeleteAll(ctx, keys)
	if err != nil {
		gone = nil
	}
	var left []string
	var last *write
	for _, p := range places {
		w := writes[p.name()]
		if gone[p.key] {
			n.counts.deletes.Add(1)
			w.now = &source.Object{}
			last = w
		} else {
			left = append(left, p.name())
		}
		w.end()
	}
	failed := n.deleteEach(left, func(key string) error {
		if err != nil && (ctx.Err() != nil || errors.Is(err, source.ErrDenied) || source.Temporary(err)) {
			return fmt.Errorf("delete %q: %w", key, err) // each of them would fail alike, and has been tried
		}
		p, err := n.locate(key)
		if err != nil {
			return err
		}
		return n.remove(ctx, key, p, s, true)
	})
	if last != nil {
		// They were all begun under one membership: what holds of one holds of all.
		if err := last.acknowledge(ctx); err != nil {
			for _, p := range places {
				if gone[p.key] {
					failed[p.name()] = acknowledged(p.name(), err)
				}
			}
		}
	}
	return failed
}

// serveDelete executes the deletion of keys that this worker owns under the sender's epoch: of all of them, or of none.
func (n *Names) serveDelete(w http.ResponseWriter, r *http.Request) {
	s, ok := n.follows(w, r)
	if !ok {
		return
	}
	var asked deleteJSON
	if err := decode(r, &asked); err != nil {
		failed(w, err)
		return
	}
	if len(asked.Keys) > bulkKeys {
		failed(w, fmt.Errorf("%w: %d keys to be deleted at once", source.ErrInvalid, len(asked.Keys)))
		return
	}
	for _, key := range asked.Keys {
		if m, err := n.owner(s, key); err != nil || m.ID != n.c.Self {
			answer(w, http.StatusConflict, refusal{Kind: "stale", Text: "another membership", Epoch: s.Epoch})
			return
		}
	}
	out := outcomesJSON{Failed: map[string]refusal{}}
	for key, err := range n.removeAll(r.Context(), asked.Keys, s) {
		out.Failed[key] = refusalOf(err)
	}
	answer(w, http.StatusOK, out)
}
