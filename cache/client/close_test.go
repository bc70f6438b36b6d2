package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/wire"
)

// gateHandler is a logger that keeps who writes a certain line waiting.
type gateHandler struct {
	line    string
	once    sync.Once
	reached chan struct{} // closed when the first one writes the line
	open    chan struct{} // closed by the test
}

func newGate(line string) *gateHandler {
	return &gateHandler{line: line, reached: make(chan struct{}), open: make(chan struct{})}
}

func (*gateHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *gateHandler) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, h.line) {
		h.once.Do(func() { close(h.reached) })
		<-h.open
	}
	return nil
}

func (h *gateHandler) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h *gateHandler) WithGroup(string) slog.Handler      { return h }

// wait is for what normally happens within milliseconds.
func wait[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(testDeadline):
		t.Fatalf("%s did not happen within %v", what, testDeadline)
	}
	return v
}

// A fill runs on in the store's goroutine when the lease that it was for has been given up, and names its file
// in an error: from the snapshot, which Close unmaps.
func TestCloseWaitsForAFillThatTheStoreRunsOn(t *testing.T) {
	k := newTier(t, map[string][]byte{"g": content(2, 1<<20)})
	k.start("a")
	gate := newGate("worker did not serve a block")
	open := sync.OnceFunc(func() { close(gate.open) })
	st := openStore(t)
	c := k.dial(func(c *Config) { c.Store, c.Logger = st, slog.New(gate) })
	t.Cleanup(open) // before the cleanups that wait for the fill
	k.worker("a").stop()

	ctx, cancel := context.WithCancel(testContext(t))
	leased := make(chan error, 1)
	go func() {
		_, err := c.Lease(ctx, k.index("g"), testDeadline)
		leased <- err
	}()
	wait(t, "the fill's attempt", gate.reached)
	cancel()
	if err := wait(t, "the end of the lease", leased); !errors.Is(err, ErrNoLease) {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() { c.Close(); close(closed) }()
	select {
	case <-closed:
		t.Error("Close does not wait for the fill")
	case <-time.After(100 * time.Millisecond): // a Close that does not wait takes less
	}
	open()
	wait(t, "Close", closed)
	// The store ends with its last fill; a fill that used the snapshot would have crashed by then.
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}

// slowWriter is where a fill writes to, and hangs.
type slowWriter struct{ begun, free chan struct{} }

func (w slowWriter) WriteAt(p []byte, _ int64) (int, error) {
	close(w.begun)
	<-w.free
	return len(p), nil
}

// The store runs a fill on, or begins it, when keep has given up. A buffer goes on to its next block only when
// nobody writes from it, and nobody will.
func TestABufferIsNotGivenOnWhileTheStoreWritesFromIt(t *testing.T) {
	l := loan{p: make([]byte, 10)}
	w := slowWriter{begun: make(chan struct{}), free: make(chan struct{})}
	written := make(chan error, 1)
	go func() { written <- l.write(w) }()
	wait(t, "the write", w.begun)
	if l.mu.TryLock() {
		t.Fatal("the buffer can be taken back while it is written from")
	}
	ended := make(chan struct{})
	go func() { l.end(); close(ended) }()
	close(w.free)
	if err := wait(t, "the end of the write", written); err != nil {
		t.Fatal(err)
	}
	wait(t, "the end of the loan", ended)
	if err := l.write(slowWriter{}); !errors.Is(err, errClosed) {
		t.Fatalf("a fill that begins late: %v", err)
	}
}

// The clients of a node share its store, and so a fill. One of them may be closed, as that of a mount of an older
// snapshot is: the others' files are leased all the same.
func TestALeaseSurvivesTheClientThatBeganItsFill(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 3<<20)})
	k.start("a")
	st := openStore(t)
	hold := make(chan struct{})
	release := sync.OnceFunc(func() { close(hold) })
	t.Cleanup(release)
	k.worker("a").set(func(wire.Request) *answer { return &answer{wait: hold} })
	lease := func(c *Client) <-chan error {
		done := make(chan error, 1)
		go func() {
			l, err := c.Lease(ctx, k.index("f"), testDeadline)
			if err == nil {
				var got []byte
				if got, err = io.ReadAll(l.File); err == nil && !bytes.Equal(got, k.data["f"]) {
					err = errors.New("wrong bytes")
				}
				l.Release()
			}
			done <- err
		}()
		return done
	}
	first := k.dial(func(c *Config) { c.Store = st })
	one := lease(first)
	eventually(t, "the fill", func() bool { return st.Stats().Misses == 1 && len(k.worker("a").seen()) == 1 })
	two := lease(k.dial(func(c *Config) { c.Store = st }))
	eventually(t, "another client to wait for it", func() bool { return st.Stats().Shared == 1 })
	first.Close()
	if err := wait(t, "the end of the first lease", one); !errors.Is(err, ErrNoLease) {
		t.Error(err)
	}
	release()
	if err := wait(t, "the second lease", two); err != nil {
		t.Error(err)
	}
}
