package worker

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// Clock is the time as the worker sees it, apart from the deadlines of connections, which the kernel
// keeps. Tests drive it by hand.
type Clock interface {
	Now() time.Time
	// After is time.After.
	After(d time.Duration) <-chan time.Time
}

// Deps are what a Worker takes from outside. The zero value is what a real worker uses.
type Deps struct {
	Logger *slog.Logger
	Clock  Clock
	// OpenSource opens a mount's source; nil means scheme.Open.
	OpenSource func(context.Context, source.Config) (source.Source, error)
	// Dial connects to other workers; nil means a net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Worker serves one dataset's blocks.
type Worker struct{}

// New opens the store and the listeners, so that Addr and ControlAddr are known; Serve does the rest.
func New(ctx context.Context, c Config, d Deps) (*Worker, error) { panic("being built") }

// Run makes a Worker and serves until ctx ends.
func Run(ctx context.Context, c Config, d Deps) error {
	w, err := New(ctx, c, d)
	if err != nil {
		return err
	}
	return w.Serve(ctx)
}

// Serve serves until ctx ends, then finishes what is under way for a bounded time and returns nil.
func (w *Worker) Serve(ctx context.Context) error { panic("being built") }

// Close ends Serve and waits for it.
func (w *Worker) Close() error { return nil }

// Addr is the address of the block protocol, ControlAddr that of HTTP.
func (w *Worker) Addr() net.Addr        { return nil }
func (w *Worker) ControlAddr() net.Addr { return nil }
