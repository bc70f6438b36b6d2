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

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/store"
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

// What is kept in the node's store is copied out of a buffer that is somebody else's once keep has returned,
// though others may have the store run the fill on.
func TestKeepCopiesNothingOutOfABufferThatIsAnothers(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1<<20), "g": content(2, ring.BlockSize)})
	k.start("a")
	st, err := store.Open(testContext(t), store.Options{Dir: t.TempDir(), Quota: 64 << 20, BufferBytes: ring.BlockSize, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	c := k.dial(func(c *Config) { c.Store = st })
	f, _ := k.snap.Ring(k.index("f"))
	g, _ := k.snap.Ring(k.index("g"))

	// The store's only buffer is taken.
	var wg sync.WaitGroup
	taken, free := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(free) })
	t.Cleanup(func() { release(); wg.Wait() })
	wg.Go(func() {
		b, err := st.Acquire(context.Background(), g, 0, func(_ context.Context, p []byte) error {
			close(taken)
			<-free
			copy(p, k.data["g"])
			return nil
		})
		if err != nil {
			t.Error(err)
			return
		}
		b.Release()
	})
	wait(t, "the first fill", taken)

	buf := bytes.Clone(k.data["f"])
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		c.keep(piece{index: k.index("f"), object: f, n: len(buf)}, buf, nil)
	}()
	eventually(t, "the fill of keep", func() bool { return st.Stats().Misses == 2 })
	// Another reader of the node's store waits for it too, so that it goes on without keep.
	got := make(chan []byte, 1)
	go func() {
		for {
			b, err := st.Acquire(context.Background(), f, 0, func(_ context.Context, p []byte) error {
				copy(p, k.data["f"])
				return nil
			})
			if errors.Is(err, errClosed) {
				continue // who would have filled it left
			}
			if err != nil {
				t.Error(err)
				got <- nil
				return
			}
			p := make([]byte, b.Len())
			_, err = b.ReadAt(p, 0)
			b.Release()
			if err != nil {
				t.Error(err)
			}
			got <- p
			return
		}
	}()
	eventually(t, "the other reader", func() bool { return st.Stats().Shared == 1 })
	c.Close()
	wait(t, "the end of keep", kept)
	for i := range buf {
		buf[i] = 0xee // as its next user does
	}
	release()
	if p := wait(t, "the other reader's block", got); !bytes.Equal(p, k.data["f"]) {
		t.Error("the node's store holds another block's bytes as this one's")
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
