package worker

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// headerForwarded marks a refresh that one worker passes on to the one that lists, once.
const headerForwarded = "Stepcache-Forwarded"

// handler is the control endpoint. ctx is what loads run under.
func (w *Worker) handler(ctx context.Context) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathHealth, func(rw http.ResponseWriter, r *http.Request) {
		io.WriteString(rw, "ok\n")
	})
	mux.HandleFunc("GET "+wire.PathReady, func(rw http.ResponseWriter, r *http.Request) {
		if err := w.problems.ready(); err != nil {
			http.Error(rw, err.Error(), http.StatusServiceUnavailable)
			return
		}
		io.WriteString(rw, "ready\n")
	})
	mux.Handle("GET "+wire.PathMetrics, promhttp.HandlerFor(w.registry, promhttp.HandlerOpts{}))
	signed := func(pattern string, h func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(rw http.ResponseWriter, r *http.Request) { w.signed(rw, r, h) })
	}
	signed("GET "+wire.PathStatus, func(r *http.Request) (any, error) { return w.Status(), nil })
	signed("POST "+wire.PathRefresh, func(r *http.Request) (any, error) { return w.refresh(r) })
	signed("POST "+wire.PathMembers, func(r *http.Request) (any, error) { return nil, w.told(r) })
	signed("POST "+wire.PathLoads, func(r *http.Request) (any, error) {
		var req wire.LoadRequest
		d := json.NewDecoder(r.Body)
		d.DisallowUnknownFields()
		if err := d.Decode(&req); err != nil {
			return nil, failed(http.StatusBadRequest, "load request: %w", err)
		}
		return w.loads.start(ctx, req)
	})
	signed("GET "+wire.PathLoads+"/{id}", func(r *http.Request) (any, error) { return w.loads.get(r.PathValue("id")) })
	signed("DELETE "+wire.PathLoads+"/{id}", func(r *http.Request) (any, error) {
		return nil, w.loads.remove(r.Context(), r.PathValue("id"))
	})
	return mux
}

// signed answers a request that must be signed with the control key.
func (w *Worker) signed(rw http.ResponseWriter, r *http.Request, h func(r *http.Request) (any, error)) {
	now := w.clock.Now()
	err := wire.VerifyRequest(r, w.keys.Keys(), w.config.ID, now)
	if err == nil {
		err = w.nonces.Use(r, now)
	}
	if err != nil {
		code := http.StatusBadRequest
		switch {
		case errors.Is(err, wire.ErrUnauthorized):
			code = http.StatusUnauthorized
		case errors.Is(err, wire.ErrOverloaded):
			code = http.StatusTooManyRequests
		}
		w.counts.refused.Add(1)
		writeJSON(rw, code, map[string]string{"error": err.Error()})
		return
	}
	answer, err := h(r)
	var se *statusError
	switch {
	case errors.As(err, &se):
		writeJSON(rw, se.code, map[string]string{"error": err.Error()})
	case err != nil:
		writeJSON(rw, http.StatusInternalServerError, map[string]string{"error": err.Error()})
	case answer == nil:
		rw.WriteHeader(http.StatusNoContent)
	default:
		writeJSON(rw, http.StatusOK, answer)
	}
}

func writeJSON(rw http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code, b = http.StatusInternalServerError, []byte(`{"error":"answer not encoded"}`)
	}
	rw.Header().Set("Content-Type", "application/json")
	rw.WriteHeader(code)
	rw.Write(append(b, '\n')) // the client may be gone
}

// Status is what this worker says of itself.
func (w *Worker) Status() wire.WorkerStatus {
	st := w.store.Stats()
	s := wire.WorkerStatus{
		Dataset: w.config.Dataset, ID: w.config.ID, Epoch: w.members.view().Epoch,
		Quota: st.Quota, Used: st.Used, Pinned: st.Pinned, Cached: st.Bytes, HandOver: w.handedOver.Load(),
		ServedBytes: w.counts.served.Load(), OpenedBytes: w.counts.opened.Load(),
		Verified: w.counts.verified.Load(), Unverified: w.counts.unverified.Load(), Corrupt: w.counts.corrupt.Load(),
		Refetched: w.counts.corruptPeer.Load() + int64(st.Corrupt),
	}
	if snap, ok := w.snapshots.get(wire.Digest{}); ok {
		d := snap.Digest()
		s.Snapshot, s.Files, s.Bytes = hex.EncodeToString(d[:]), snap.Files(), snap.Bytes()
		for _, k := range snap.Skipped() {
			if s.Skipped == nil {
				s.Skipped = make(map[string]int64)
			}
			s.Skipped[k.Reason] += k.Count
		}
		snap.release()
	} else {
		s.Files = w.listed.Load() // so far
	}
	if src := w.sources.Load(); src != nil {
		for _, o := range src.sources {
			c := o.Meter.Counts()
			s.SourceBytes += c.Read
			s.SourceRequests += c.Total()
		}
	}
	if err := w.keys.Err(); err != nil {
		w.problems.set(problemKeys, err)
	} else {
		w.problems.set(problemKeys, nil)
	}
	if w.gateway != nil {
		s.Unflushed = w.gateway.names.Unflushed()
		c := w.gateway.names.Counts()
		s.ServedBytes += c.Read + c.Followed
	}
	s.Problem = w.problems.String()
	if err := w.problems.ready(); err != nil {
		s.Reason = wire.StatusOf(err).String()
	} else if err := w.problems.of(problemAway); err != nil {
		s.Reason, s.Serves = wire.StatusOf(err).String(), true
	}
	return s
}

// refresh lists the bucket anew. A worker that does not list passes the request on to the one that does.
func (w *Worker) refresh(r *http.Request) (any, error) {
	if w.gateway != nil {
		return nil, failed(http.StatusBadRequest, "%w", w.unknownSnapshot(wire.Digest{}))
	}
	req := refreshRequest{reply: make(chan refreshResult, 1)}
	select {
	case w.refreshes <- req:
	case <-r.Context().Done():
		return nil, r.Context().Err()
	case <-w.stopping:
		return nil, failed(http.StatusServiceUnavailable, "worker %s is stopping", w.config.ID)
	}
	var res refreshResult
	select {
	case res = <-req.reply:
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	if errors.Is(res.err, errNotLister) {
		return w.forwardRefresh(r)
	}
	if res.err != nil {
		return nil, failed(http.StatusBadGateway, "%w", res.err)
	}
	return refreshed{hex.EncodeToString(res.digest[:])}, nil
}

// refreshed answers PathRefresh.
type refreshed struct {
	Snapshot string `json:"snapshot"`
}

func (w *Worker) forwardRefresh(r *http.Request) (any, error) {
	m, ok := w.members.view().Lister(w.config.Dataset)
	if !ok || m.Control == "" || m.ID == w.config.ID || r.Header.Get(headerForwarded) != "" {
		return nil, failed(http.StatusServiceUnavailable, "worker %s: which worker lists the bucket is being settled: ask again", w.config.ID)
	}
	// During a rotation the lister may know only the older key: each is tried, the current one first.
	err := fmt.Errorf("worker %s has no control key", w.config.ID)
	code := http.StatusServiceUnavailable
	for _, key := range w.keys.Keys().Control {
		var b []byte
		if code, b, err = w.askRefresh(r.Context(), m, key); err == nil {
			return json.RawMessage(b), nil
		}
		if code != http.StatusUnauthorized {
			break
		}
	}
	return nil, failed(code, "%w", err)
}

// askRefresh asks the worker that lists for a refresh; code is the status to answer with after an error.
func (w *Worker) askRefresh(ctx context.Context, m ring.Member, key wire.Key) (code int, answer []byte, err error) {
	out, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+m.Control+wire.PathRefresh, nil)
	if err != nil {
		return http.StatusInternalServerError, nil, fmt.Errorf("worker %s: %w", m.ID, err)
	}
	out.Header.Set(headerForwarded, w.config.ID)
	if err := wire.SignRequest(out, key, m.ID, w.clock.Now()); err != nil {
		return http.StatusInternalServerError, nil, err
	}
	resp, err := w.http.Do(out)
	if err != nil {
		return http.StatusBadGateway, nil, fmt.Errorf("worker %s, which lists the bucket: %w", m.ID, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, wire.MaxBody))
	if err != nil {
		return http.StatusBadGateway, nil, fmt.Errorf("worker %s, which lists the bucket: %w", m.ID, err)
	}
	if resp.StatusCode != http.StatusOK {
		return resp.StatusCode, nil, fmt.Errorf("worker %s, which lists the bucket: %s", m.ID, strings.TrimSpace(string(b)))
	}
	return 0, b, nil
}

// maxControlConns bounds the connections of the control endpoint: the probes, the controller and a few people
// need some of them. One that says nothing is closed soon.
const maxControlConns = 256

// limited refuses connections beyond those it has slots for.
type limited struct {
	net.Listener
	slots   chan struct{}
	refused *atomic.Int64
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			l.refused.Add(1)
			c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// serveControl serves HTTP until ctx ends.
func (w *Worker) serveControl(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler: w.handler(ctx), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() {
		within, cancel := context.WithTimeout(context.Background(), drainTimeout)
		defer cancel()
		if srv.Shutdown(within) != nil {
			srv.Close()
		}
		close(w.controlEnded)
	})
	defer stop()
	err := srv.Serve(&limited{l, make(chan struct{}, maxControlConns), &w.counts.refused})
	if ctx.Err() != nil {
		<-w.controlEnded
		return nil
	}
	return fmt.Errorf("control endpoint: %w", err)
}
