package worker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// maxLoads bounds the loads that are remembered; of finished ones the oldest is forgotten first.
	maxLoads    = 1000
	maxLoadID   = 253
	maxPatterns = 1000
)

// loads are the loads of this worker, by id.
type loads struct {
	w *Worker

	mu      sync.Mutex
	byID    map[string]*load
	running sync.WaitGroup
	stopped bool
	holds   map[string]bool // the owners of pins that last while a load is under way
}

// hold pins what an unpinned load is to bring in until release. Somebody asked for it, so that it goes before
// what was merely read often, which the store would keep instead. What does not fit beside other pins is left
// to the store.
func (l *loads) hold(snap *snapshot, items []item, owner string) (release func()) {
	owner += "/under way"
	l.mu.Lock()
	if l.holds == nil {
		l.holds = make(map[string]bool)
	}
	l.holds[owner] = true
	l.mu.Unlock()
	for _, it := range items {
		r, _ := snap.Ring(it.index)
		l.mu.Lock() // so that nothing is pinned any more after giveWay
		held := l.holds[owner]
		if held {
			held = l.w.store.Pin(r, int64(it.block), owner) == nil
		}
		l.mu.Unlock()
		if !held {
			break
		}
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.holds, owner)
		l.w.store.Unpin(owner)
	}
}

// giveWay ends the pins of hold, for pins that are to last; false when there are none.
func (l *loads) giveWay() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	any := len(l.holds) > 0
	for owner := range l.holds {
		delete(l.holds, owner)
		l.w.store.Unpin(owner)
	}
	return any
}

// statusError is an error of the control endpoint with its HTTP status.
type statusError struct {
	code int
	err  error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func failed(code int, format string, a ...any) error {
	return &statusError{code, fmt.Errorf(format, a...)}
}

// normalize checks a request and fills in what it leaves out.
func (w *Worker) normalize(r wire.LoadRequest) (wire.LoadRequest, error) {
	if r.ID == "" || len(r.ID) > maxLoadID || strings.ContainsAny(r.ID, "/?#%\n") {
		return r, failed(http.StatusBadRequest, "load id %q: use 1 to %d characters without / ? # %%", r.ID, maxLoadID)
	}
	if w.gateway != nil {
		return r, failed(http.StatusBadRequest, "load %s: dataset %s takes puts (access: ReadWrite): it has no listing to load from, and its workers hold what is put and read", r.ID, w.config.Dataset)
	}
	if r.Copies < 0 {
		return r, failed(http.StatusBadRequest, "load %s: copies is %d: set 1 or more", r.ID, r.Copies)
	}
	if r.Copies == 0 {
		r.Copies = w.config.Copies
	}
	if len(r.Paths) > maxPatterns {
		return r, failed(http.StatusBadRequest, "load %s: more than %d paths", r.ID, maxPatterns)
	}
	if _, err := parseDigest(r.Snapshot); err != nil {
		return r, failed(http.StatusBadRequest, "load %s: %w", r.ID, err)
	}
	paths := slices.Clone(r.Paths)
	for i, p := range paths {
		if !strings.HasPrefix(p, "/") {
			paths[i] = "/" + p
		}
		if err := catalog.CheckPattern(paths[i]); err != nil {
			return r, failed(http.StatusBadRequest, "load %s: %w", r.ID, err)
		}
	}
	r.Paths = paths
	return r, nil
}

// start begins a load. The same request under the same id is the same load; another one is refused.
func (l *loads) start(ctx context.Context, req wire.LoadRequest) (wire.LoadStatus, error) {
	req, err := l.w.normalize(req)
	if err != nil {
		return wire.LoadStatus{}, err
	}
	l.mu.Lock()
	if have := l.byID[req.ID]; have != nil {
		l.mu.Unlock()
		if !reflect.DeepEqual(have.req, req) {
			return wire.LoadStatus{}, failed(http.StatusConflict, "load %s exists with other settings: delete it first or choose another id", req.ID)
		}
		return have.current(), nil
	}
	if l.stopped {
		l.mu.Unlock()
		return wire.LoadStatus{}, failed(http.StatusServiceUnavailable, "worker %s is stopping", l.w.config.ID)
	}
	var forgotten *load
	if len(l.byID) >= maxLoads {
		if forgotten = l.oldest(); forgotten == nil {
			l.mu.Unlock()
			return wire.LoadStatus{}, failed(http.StatusTooManyRequests, "there are %d loads under way: delete some", maxLoads)
		}
		delete(l.byID, forgotten.req.ID)
	}
	lctx, cancel := context.WithCancel(ctx)
	n := &load{w: l.w, req: req, cancel: cancel, ended: make(chan struct{})}
	n.status = wire.LoadStatus{ID: req.ID, Snapshot: req.Snapshot, Started: l.w.clock.Now()}
	l.byID[req.ID] = n
	l.running.Add(1)
	l.mu.Unlock()
	go func() {
		defer l.running.Done()
		defer close(n.ended)
		defer cancel()
		n.run(lctx)
	}()
	if forgotten != nil {
		forgotten.cancel()
	}
	return n.current(), nil
}

// oldest is the unpinned finished load that started first. Callers hold mu.
func (l *loads) oldest() *load {
	var found *load
	for _, n := range l.byID {
		s := n.current()
		if n.req.Pin || s.Finished.IsZero() {
			continue
		}
		if found == nil || s.Started.Before(found.current().Started) {
			found = n
		}
	}
	return found
}

// get is the status of one load.
func (l *loads) get(id string) (wire.LoadStatus, error) {
	l.mu.Lock()
	n := l.byID[id]
	l.mu.Unlock()
	if n == nil {
		return wire.LoadStatus{}, failed(http.StatusNotFound, "worker %s has no load %q", l.w.config.ID, id)
	}
	n.refresh()
	return n.current(), nil
}

// remove ends a load, waits for its end and takes its pins away.
func (l *loads) remove(ctx context.Context, id string) error {
	l.mu.Lock()
	n := l.byID[id]
	l.mu.Unlock()
	if n == nil {
		return failed(http.StatusNotFound, "worker %s has no load %q", l.w.config.ID, id)
	}
	n.cancel()
	select {
	case <-n.ended:
	case <-ctx.Done():
		return failed(http.StatusServiceUnavailable, "load %s is still ending: ask again", id)
	}
	l.mu.Lock()
	if l.byID[id] == n {
		delete(l.byID, id)
	}
	l.mu.Unlock()
	return nil
}

// close ends all loads and waits for them.
func (l *loads) close() {
	l.mu.Lock()
	l.stopped = true
	for _, n := range l.byID {
		n.cancel()
	}
	l.mu.Unlock()
	l.running.Wait()
}

// errUnfit: the load cannot be held by this worker's memory.
var errUnfit = errors.New("does not fit this worker's memory")
