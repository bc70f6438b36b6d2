package objects

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// version is one version of a name.
type version struct {
	object source.Object // its Key is the bucket's
	attrs  source.Attributes
}

func (v version) info(key string) gateway.Info {
	return gateway.Info{
		Key: key, Size: v.object.Size, ETag: v.object.Version, ModTime: v.object.ModTime,
		ContentType: v.attrs.ContentType, Headers: v.attrs.Headers, Metadata: v.attrs.Metadata,
	}
}

// blocks are the version's bytes, as the store names them.
func (p place) blocks(o source.Object) ring.Object {
	return ring.Object{ID: source.Identify(p.URL(), o), Size: o.Size}
}

// versions remembers the versions of names that this worker owns, and that a name has none. What is remembered is used only as the
// package comment says.
type versions struct {
	mu    sync.Mutex
	names map[string]*name
	gen   uint64 // the newest of any name
}

// maxNames bounds what is remembered: some hundred bytes each, more with metadata.
const maxNames = 64 << 10

// name is what is known of one name. Guarded by versions.mu.
type name struct {
	// gen grows as each write begins and ends, also where the name was forgotten since: what was asked of the bucket
	// before is not remembered.
	gen     uint64
	writers int
	known   *outcome // nil: not known
	at      time.Time
	turn    uint64 // of the membership when it was remembered: another owner may have written in between
	asking  *asking
	// holds is the version of which the store may hold blocks; none where it has no ID. It outlives known.
	holds ring.Object
}

// outcome is what the bucket told of a name: its version, or why there is none. What is remembered of those errors is
// source.ErrNotFound.
type outcome struct {
	found version
	err   error
}

// asking is a request to the bucket under way.
type asking struct {
	gen  uint64
	at   time.Time // when it was begun
	turn uint64
	done chan struct{}
	outcome
}

func (v *versions) name(key string) *name {
	n := v.names[key]
	if n == nil {
		if len(v.names) >= maxNames {
			v.forgetSome()
		}
		n = &name{}
		v.renew(n)
		v.names[key] = n
	}
	return n
}

func (v *versions) renew(n *name) {
	v.gen++
	n.gen = v.gen
}

// forgetSome makes room. Names in use stay, so the bound may be exceeded by as many as are.
func (v *versions) forgetSome() {
	dropped := 0
	for k, n := range v.names {
		if n.writers == 0 && n.asking == nil {
			delete(v.names, k)
			if dropped++; dropped >= maxNames/16 {
				return
			}
		}
	}
}

// resolve is the current version of a key, executed here. s is the membership as it was when the operation
// began, and owned says that this worker owns the key under it.
func (n *Names) resolve(ctx context.Context, key string, p place, s state, owned bool) (version, error) {
	if !owned || !s.settled {
		// Whatever is remembered, here or elsewhere, may be older than a write that was acknowledged.
		return n.ask(ctx, p)
	}
	v := &n.versions
	for {
		v.mu.Lock()
		e := v.name(key)
		now := n.c.Clock.Now()
		if e.known != nil && e.writers == 0 && now.Sub(e.at) < n.fresh && e.turn == s.turn && n.epochs.same(s) {
			known := *e.known
			v.mu.Unlock()
			return known.found, known.err
		}
		a := e.asking
		// One may be joined that is no older than what might be remembered.
		if a == nil || a.gen != e.gen || now.Sub(a.at) >= n.fresh || a.turn != s.turn {
			a = &asking{gen: e.gen, at: now, turn: s.turn, done: make(chan struct{})}
			e.asking = a
			v.mu.Unlock()
			return n.lead(ctx, key, p, s, a)
		}
		v.mu.Unlock()
		select {
		case <-a.done:
		case <-ctx.Done():
			return version{}, ctx.Err()
		}
		if a.err == nil || ctx.Err() == nil && !canceled(a.err) {
			return a.found, a.err
		}
		// Whoever led it left: this one asks itself.
	}
}

// lead asks the bucket for itself and whoever joined.
func (n *Names) lead(ctx context.Context, key string, p place, s state, a *asking) (version, error) {
	a.found, a.err = n.ask(ctx, p)
	v := &n.versions
	v.mu.Lock()
	e := v.name(key)
	if e.asking == a {
		e.asking = nil
	}
	var before, since ring.Object
	if e.gen == a.gen && e.writers == 0 && n.epochs.same(s) {
		e.known = nil
		if a.err == nil || errors.Is(a.err, source.ErrNotFound) {
			known := a.outcome
			e.known, e.at, e.turn = &known, a.at, s.turn
		}
		before, since = e.now(p, a.found, a.err)
	}
	v.mu.Unlock()
	n.replaced.drop(before, since)
	close(a.done)
	return a.found, a.err
}

// ask asks the bucket.
func (n *Names) ask(ctx context.Context, p place) (version, error) {
	o, attrs, err := p.writer.Describe(ctx, p.key)
	return version{o, attrs}, err
}

// forget drops what is remembered of a key, for a version that turned out to be gone.
func (n *Names) forget(key string) {
	v := &n.versions
	v.mu.Lock()
	defer v.mu.Unlock()
	if e := v.names[key]; e != nil {
		e.known = nil
		v.renew(e)
	}
}

// write is one write of a name under way.
type write struct {
	n     *Names
	key   string
	s     state
	owned bool
	gen   uint64
	e     *name
	now   *source.Object // what the name is since, where that is known: without a version nothing
}

// begin begins a write: from here on nothing is remembered of the name.
func (n *Names) begin(key string, s state, owned bool) *write {
	v := &n.versions
	v.mu.Lock()
	defer v.mu.Unlock()
	e := v.name(key)
	e.known = nil
	v.renew(e)
	e.writers++
	return &write{n: n, key: key, s: s, owned: owned, gen: e.gen, e: e}
}

// end ends a write that failed, or that leaves nothing to be remembered.
func (w *write) end() { w.finish(nil, time.Time{}) }

// finish ends a write. became, which may be nil, is what the name is now, as of at.
func (w *write) finish(became *version, at time.Time) {
	if became != nil {
		w.now = &became.object
	}
	p, err := w.n.locate(w.key)
	var before, since ring.Object
	defer func() { w.n.replaced.drop(before, since) }()
	v := &w.n.versions
	v.mu.Lock()
	defer v.mu.Unlock()
	alone := w.e.gen == w.gen && w.e.writers == 1
	if alone && w.now != nil && err == nil {
		var none error
		if w.now.Version == "" {
			none = source.ErrNotFound
		}
		before, since = w.e.now(p, version{object: *w.now}, none)
	}
	w.e.writers--
	v.renew(w.e)
	w.e.known = nil
	if became != nil && alone && w.owned && w.n.epochs.same(w.s) {
		w.e.known, w.e.at, w.e.turn = &outcome{found: *became}, at, w.s.turn
	}
}

// acknowledge waits until the write, which the bucket has committed by now, may be acknowledged.
func (w *write) acknowledge(ctx context.Context) error {
	n := w.n
	if w.owned && n.epochs.same(w.s) {
		return nil
	}
	n.counts.waited.Add(1)
	select {
	case <-n.c.Clock.After(n.fresh + n.fresh/16): // clocks do not run at quite the same rate
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
