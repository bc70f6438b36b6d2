package objects

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// drainTimeout is how long requests under way may go on after ServeConn was told to end.
const drainTimeout = 5 * time.Second

// ServeConn answers the requests of another worker on a connection that has proved the write key, until
// that closes it, valid says that its key is no longer one, or ctx ends; what is under way then is finished
// for a bounded time. A deadline that nc was written to with before does not count any more.
func (n *Names) ServeConn(ctx context.Context, nc net.Conn, valid func() bool) {
	Serve(ctx, nc, valid, n.handler)
}

// Serve is ServeConn for requests that handler answers.
func Serve(ctx context.Context, nc net.Conn, valid func() bool, handler http.Handler) {
	// Other workers also keep connections that they made to spare: the first request may come long after the reply
	// that opened nc to them, with its deadline. net/http writes with that until it has answered once, and drops
	// the error when it says that it takes a body, which both ends would then wait for.
	if err := nc.SetWriteDeadline(time.Time{}); err != nil {
		return // closed
	}
	l := &oneConn{conn: nc, gone: make(chan struct{})}
	var busy atomic.Bool
	srv := &http.Server{
		ReadHeaderTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ConnContext: WithSender,
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateClosed || s == http.StateHijacked {
				l.end()
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			busy.Store(true)
			defer busy.Store(false)
			if ctx.Err() != nil {
				panic(http.ErrAbortHandler) // the sender tries elsewhere
			}
			if !valid() {
				w.Header().Set("Connection", "close")
				refuse(w, http.StatusUnauthorized, "denied", "the key of this connection is not one of the dataset's any more")
				return
			}
			handler.ServeHTTP(w, r)
		}),
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		// Shutdown would wait for a connection that has not carried a request yet.
		srv.SetKeepAlivesEnabled(false)
		if busy.Load() {
			select {
			case <-l.gone:
			case <-time.After(drainTimeout):
			}
		}
		nc.Close()
	})
	_ = srv.Serve(l) // it ends with the connection
	if !stop() {
		<-ended
	}
	<-l.gone
}

// oneConn is a listener that gives one connection, and ends with it.
type oneConn struct {
	conn net.Conn
	gone chan struct{}
	once sync.Once

	mu    sync.Mutex
	given bool
}

func (l *oneConn) end() { l.once.Do(func() { close(l.gone) }) }

func (l *oneConn) Accept() (net.Conn, error) {
	l.mu.Lock()
	first := !l.given
	l.given = true
	l.mu.Unlock()
	if first {
		return l.conn, nil
	}
	<-l.gone
	return nil, net.ErrClosed
}

// Close is called when the server is told to end. A connection that was not taken ends here.
func (l *oneConn) Close() error {
	l.mu.Lock()
	taken := l.given
	l.given = true
	l.mu.Unlock()
	if !taken {
		l.conn.Close()
		l.end()
	}
	return nil
}

func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// routes are the requests of other workers.
func (n *Names) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ping", func(w http.ResponseWriter, r *http.Request) {})
	mux.HandleFunc("GET /epoch", n.serveEpoch)
	mux.HandleFunc("GET /block", n.serveBlock)
	mux.HandleFunc("GET /object", owned(n, func(w http.ResponseWriter, r *http.Request, key string, p place, s state) (version, error) {
		return n.stat(r.Context(), key, p, s, true)
	}))
	mux.HandleFunc("DELETE /object", owned(n, func(w http.ResponseWriter, r *http.Request, key string, p place, s state) (version, error) {
		return version{}, n.remove(r.Context(), key, p, s, true)
	}))
	mux.HandleFunc("PUT /put", owned(n, func(w http.ResponseWriter, r *http.Request, key string, p place, s state) (version, error) {
		size, err := strconv.ParseInt(r.URL.Query().Get("size"), 10, 64)
		var o optionsJSON
		if err == nil {
			var text []byte
			if text, err = base64.StdEncoding.DecodeString(r.Header.Get(headerOptions)); err == nil {
				err = json.Unmarshal(text, &o)
			}
		}
		if err != nil || size < 0 {
			return version{}, fmt.Errorf("%w: a put of another worker: %v", source.ErrInvalid, err)
		}
		return n.put(r.Context(), key, p, s, true, size, waited{r.Context(), contentOf(w, r)}, o)
	}))
	mux.HandleFunc("POST /copy", owned(n, func(w http.ResponseWriter, r *http.Request, key string, p place, s state) (version, error) {
		var c copyJSON
		if err := decode(r, &c); err != nil {
			return version{}, err
		}
		return n.copy(r.Context(), key, p, s, true, c)
	}))
	mux.HandleFunc("POST /delete", n.serveDelete)
	mux.HandleFunc("POST /complete", owned(n, func(w http.ResponseWriter, r *http.Request, key string, p place, s state) (version, error) {
		var c completeJSON
		if err := decode(r, &c); err != nil {
			return version{}, err
		}
		return n.complete(r.Context(), key, p, s, true, c)
	}))
	n.partRoutes(mux)
	if n.back != nil {
		n.backRoutes(mux)
	}
	return mux
}

// maxRequest bounds a request in JSON: one of 10,000 parts.
const maxRequest = 4 << 20

// decode reads a request.
func decode(r *http.Request, into any) error {
	if err := json.NewDecoder(io.LimitReader(r.Body, maxRequest)).Decode(into); err != nil {
		return fmt.Errorf("%w: a request of another worker: %w", source.ErrInvalid, err)
	}
	return nil
}

func refuse(w http.ResponseWriter, code int, kind, text string) {
	answer(w, code, refusal{Kind: kind, Text: text})
}

func answer(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code, b = http.StatusInternalServerError, []byte(`{"kind":"internal","text":"answer not encoded"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	w.Write(b) // the other worker may be gone
}

func failed(w http.ResponseWriter, err error) {
	answer(w, http.StatusUnprocessableEntity, refusalOf(err))
}

// follows is the membership, when it is the sender's; else the request is answered.
func (n *Names) follows(w http.ResponseWriter, r *http.Request) (state, bool) {
	theirs, err := strconv.ParseUint(r.Header.Get(wire.HeaderEpoch), 10, 64)
	if err != nil {
		refuse(w, http.StatusBadRequest, "invalid", "no epoch")
		return state{}, false
	}
	n.epochs.heard(theirs, n.c.Clock.Now())
	n.epochs.wait(r.Context(), theirs, catchUp)
	s := n.epochs.now()
	if s.Epoch != theirs {
		answer(w, http.StatusConflict, refusal{Kind: "stale", Text: "another membership", Epoch: s.Epoch})
		return state{}, false
	}
	return s, true
}

// owned serves an operation on a name that this worker owns under the sender's epoch, which must be this
// worker's. It is executed here: what was passed on is never passed on again.
func owned(n *Names, do func(w http.ResponseWriter, r *http.Request, key string, p place, s state) (version, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		key := r.URL.Query().Get("key")
		s, ok := n.follows(w, r)
		if !ok {
			return
		}
		m, err := n.owner(s, key)
		if err != nil || m.ID != n.c.Self {
			answer(w, http.StatusConflict, refusal{Kind: "stale", Text: "another membership", Epoch: s.Epoch})
			return
		}
		p, err := n.locate(key)
		var v version
		if err == nil {
			if r.Method == http.MethodPut {
				http.NewResponseController(w).EnableFullDuplex() // see drain; HTTP/1 always can
			}
			v, err = do(w, r, key, p, s)
		}
		if moved := (*errMoved)(nil); errors.As(err, &moved) {
			answer(w, http.StatusConflict, refusal{Kind: "stale", Text: "another membership", Epoch: moved.epoch})
			drain(w, r)
			return
		}
		if err != nil {
			failed(w, err)
			drain(w, r)
			return
		}
		answer(w, http.StatusOK, versionJSON{v.object, v.attrs})
	}
}

// drain sends the answer to a put whose body is not at its end, and takes the rest until the sender has it:
// a connection that was closed at once would be reset under an answer that was not read yet.
func drain(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPut {
		return
	}
	c := http.NewResponseController(w)
	if c.Flush() == nil && c.SetReadDeadline(time.Now().Add(drainTimeout)) == nil {
		io.Copy(io.Discard, r.Body) // until the sender closes the connection
	}
}

// serveEpoch tells which epoch this worker follows, as all its decisions do.
func (n *Names) serveEpoch(w http.ResponseWriter, r *http.Request) {
	if theirs, err := strconv.ParseUint(r.Header.Get(wire.HeaderEpoch), 10, 64); err == nil {
		n.epochs.heard(theirs, n.c.Clock.Now())
	}
	if n.back != nil {
		n.back.met(r.URL.Query().Get("from"))
	}
	says := n.epochs.says()
	fmt.Fprintf(w, "%d %d %d", says.Epoch, says.Settled, says.Closed)
}

// serveBlock sends one block of a version, with its checksums. Whose name it is does not matter: the
// version is the sender's to know.
func (n *Names) serveBlock(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	key := q.Get("key")
	size, err1 := strconv.ParseInt(q.Get("size"), 10, 64)
	block, err2 := strconv.ParseInt(q.Get("block"), 10, 64)
	p, err := n.locate(key)
	if err == nil && (err1 != nil || err2 != nil || size < 0 || block < 0 || block >= ring.Blocks(size) || q.Get("version") == "") {
		err = fmt.Errorf("%w: a request for a block of %q", source.ErrInvalid, key)
	}
	if err != nil {
		failed(w, err)
		return
	}
	o := source.Object{Key: p.key, Size: size, Version: q.Get("version")}
	// The sender compares it as well, but only here can it be fetched anew where it is held.
	length := min(ring.BlockSize, size-block*ring.BlockSize)
	b, err := n.acquireSound(r.Context(), key, p, found{version: version{object: o}}, p.blocks(o), block, 0, length)
	if err != nil {
		if errors.Is(err, source.ErrChanged) || errors.Is(err, source.ErrNotFound) {
			n.forget(key)
		}
		failed(w, err)
		return
	}
	defer b.Release()
	n.sendBlock(w, key, b)
}

// sendBlock sends a block after its checksums.
func (n *Names) sendBlock(w http.ResponseWriter, key string, b *store.Block) {
	head := checksum.Encode(nil, b.Sums())
	w.Header().Set("Content-Length", strconv.Itoa(len(head)+b.Len()))
	// A worker takes a block at once, or is as good as gone: it must not keep others from memory.
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(blockTimeout))
	if _, err := w.Write(head); err != nil {
		return
	}
	if p := b.Bytes(); p != nil {
		w.Write(p) // an error ends the connection
		return
	}
	if err := send(w, b, 0, int64(b.Len())); err != nil {
		n.log.Debug("block not sent", "key", key, "error", err)
		panic(http.ErrAbortHandler)
	}
}

// blockTimeout bounds the way of one block to another worker.
const blockTimeout = 10 * time.Second
