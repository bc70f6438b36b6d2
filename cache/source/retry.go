package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// RetryOptions of Retry and Try. Time comes from package time: tests run in a testing/synctest bubble,
// whose clock is fake, which leaves no second clock to be passed about.
type RetryOptions struct {
	// Elapsed bounds the time for which one operation is tried without any progress; zero means 20 s. An
	// operation on a body that does come, however slowly, is not ended by it, nor is a page of a list or a bulk delete:
	// Stall ends its tries, and one that it ended is followed by another.
	Elapsed time.Duration
	// Slack is how much longer than Elapsed a try that has begun may take, for Try only: a request that
	// sends many bytes takes its time.
	Slack time.Duration
	// Logger is told, once every LogEvery for all operations together, that the store does not answer or
	// asks to slow down, so that long waits are not silent. nil: slog.Default().
	Logger *slog.Logger
	// LogEvery is the least time between two such lines; zero means 5 s.
	LogEvery time.Duration
}

// The waits between tries, each with half of jitter either way. The first is short because most resets
// are one connection's.
const (
	firstWait = 50 * time.Millisecond
	maxWait   = 3 * time.Second
)

// Try calls f until it succeeds, fails for good (not Temporary), ctx ends, or o.Elapsed is over; then
// it returns the last error of f. The ctx that f gets ends with o.Elapsed and o.Slack. Waits grow from 50 ms to 3 s
// with jitter; a store's Retry-After is obeyed where it fits into the time left.
func Try(ctx context.Context, o RetryOptions, f func(ctx context.Context) error) error {
	t := newTrier(o)
	ctx, cancel := context.WithTimeout(ctx, t.Elapsed+t.Slack)
	defer cancel()
	return t.try(ctx, t.Elapsed, func() error { return f(ctx) })
}

// NotifyTries returns a context whose operations tell f of each try that failed and is repeated. Like the
// operations themselves, f may be called at once from several goroutines.
func NotifyTries(ctx context.Context, f func(error)) context.Context {
	return context.WithValue(ctx, triesKey{}, f)
}

type triesKey struct{}

// trier is RetryOptions with defaults filled in, and when it last logged.
type trier struct {
	RetryOptions
	mu     sync.Mutex
	logged time.Time
	silent int // failures since
}

func newTrier(o RetryOptions) *trier {
	if o.Elapsed <= 0 {
		o.Elapsed = 20 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.LogEvery <= 0 {
		o.LogEvery = 5 * time.Second
	}
	return &trier{RetryOptions: o}
}

func (t *trier) try(ctx context.Context, elapsed time.Duration, f func() error) error {
	waits := backoff.NewExponentialBackOff()
	waits.InitialInterval, waits.MaxInterval, waits.Multiplier, waits.RandomizationFactor = firstWait, maxWait, 2, 0.5
	start, tries := time.Now(), 0
	var last error
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		tries++
		last = f()
		var e *Error
		switch {
		case last == nil:
			return struct{}{}, nil
		case !Temporary(last) || ctx.Err() != nil:
			return struct{}{}, backoff.Permanent(last)
		case errors.As(last, &e) && e.After > 0:
			return struct{}{}, &backoff.RetryAfterError{Duration: e.After}
		}
		return struct{}{}, last
	}, backoff.WithBackOff(waits), backoff.WithMaxElapsedTime(max(elapsed, 1)), backoff.WithNotify(func(_ error, wait time.Duration) {
		t.failed(ctx, last, wait)
	}))
	if err == nil {
		return nil
	}
	if Temporary(last) && tries > 1 {
		return fmt.Errorf("%w (gave up after %d tries in %v)", last, tries, time.Since(start).Round(time.Millisecond))
	}
	return last
}

// failed tells of a try that is followed by another.
func (t *trier) failed(ctx context.Context, err error, wait time.Duration) {
	if f, ok := ctx.Value(triesKey{}).(func(error)); ok {
		f(err)
	}
	t.log(err, wait)
}

func (t *trier) log(err error, wait time.Duration) {
	t.mu.Lock()
	now := time.Now()
	if !t.logged.IsZero() && now.Sub(t.logged) < t.LogEvery {
		t.silent++
		t.mu.Unlock()
		return
	}
	silent := t.silent
	t.logged, t.silent = now, 0
	t.mu.Unlock()
	t.Logger.Warn("the object store does not answer well, trying again", "error", err, "wait", wait.Round(time.Millisecond), "failuresNotLogged", silent)
}

// Retry repeats what failed with a Temporary error: List page by page, Stat, Delete, and Get, whose body
// goes on where it broke, at the same version. A Put is passed on: its stream cannot be read twice.
func Retry(s Source, o RetryOptions) Source {
	return &retry{Source: s, pages: pager(s), trier: newTrier(o)}
}

type retry struct {
	Source
	pages Pager
	*trier
}

func (r *retry) pager() Pager {
	if r.pages == nil {
		return nil
	}
	return r
}

func (r *retry) run(ctx context.Context, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, r.Elapsed)
	defer cancel()
	return r.try(ctx, r.Elapsed, func() error { return f(ctx) })
}

// patient is run for what a store may take its time over, of which Stall knows how much: a try that lasts is not ended
// here, and one that was, or whose connection died, is followed by another although Elapsed is over.
func (r *retry) patient(ctx context.Context, f func(ctx context.Context) error) error {
	tries := 0
	try := func() error { return r.try(ctx, r.Elapsed, func() error { tries++; return f(ctx) }) }
	err := try()
	if !errors.Is(err, errSilent) && (tries > 1 || !Temporary(err)) || ctx.Err() != nil {
		return err
	}
	r.failed(ctx, err, 0)
	return try()
}

// Page implements Pager.
func (r *retry) Page(ctx context.Context, q PageRequest) (page Page, err error) {
	err = r.patient(ctx, func(ctx context.Context) error {
		page, err = r.pages.Page(ctx, q)
		return err
	})
	return page, err
}

// List implements Lister.
func (r *retry) List(ctx context.Context, prefix string, yield func(Object) error) error {
	if r.pages != nil {
		return ListPages(ctx, r, prefix, yield)
	}
	return r.Source.List(ctx, prefix, yield)
}

// Stat implements Stater.
func (r *retry) Stat(ctx context.Context, key string) (o Object, err error) {
	err = r.run(ctx, func(ctx context.Context) error {
		o, err = r.Source.Stat(ctx, key)
		return err
	})
	return o, err
}

// Delete implements Deleter.
func (r *retry) Delete(ctx context.Context, key string) error {
	return r.run(ctx, func(ctx context.Context) error { return r.Source.Delete(ctx, key) })
}

// Get implements Getter.
func (r *retry) Get(ctx context.Context, o Object, off, length int64) (Body, error) {
	b := &resumed{retry: r, ctx: ctx, object: o, off: off, left: length, credit: maxBreaks}
	if err := b.attempt(b.open); err != nil {
		return Body{}, err
	}
	return Body{ReadCloser: b, Digest: b.body.Digest}, nil
}

// A body may break maxBreaks times, and once more for each breakCost bytes that came meanwhile: a store
// that sends a few bytes a connection must not be asked a million times for one block.
const (
	maxBreaks = 8
	breakCost = 1 << 20
)

// resumed is a body that goes on where it broke, at the same version.
type resumed struct {
	*retry
	ctx       context.Context
	object    Object
	off, left int64
	credit    int
	came      int64 // bytes since credit was last given
	body      Body  // ReadCloser is nil when closed
	cancel    context.CancelFunc
	broken    error // why body must be opened again
	err       error // final
}

// attempt tries f for Elapsed; the ctx that f gets ends with that.
func (b *resumed) attempt(f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(b.ctx, b.Elapsed)
	defer cancel()
	return b.try(ctx, b.Elapsed, func() error {
		err := f(ctx)
		if err != nil && ctx.Err() != nil && b.ctx.Err() == nil {
			// The body's context is not ctx, so the store's error tells of a cancellation.
			return b.slow()
		}
		return err
	})
}

func (b *resumed) slow() error {
	return &Error{Op: "get", Name: b.URL() + "/" + b.object.Key, Kind: ErrUnavailable, Err: fmt.Errorf("no answer within %v", b.Elapsed)}
}

// open opens the rest. The body outlives ctx, which ends only the wait for its beginning.
func (b *resumed) open(ctx context.Context) error {
	b.shut()
	own, cancel := context.WithCancel(b.ctx)
	stop := context.AfterFunc(ctx, cancel)
	body, err := b.Source.Get(own, b.object, b.off, b.left)
	if err != nil {
		cancel()
		return err
	}
	b.body, b.cancel = body, cancel
	if !stop() {
		b.shut()
		return ctx.Err()
	}
	return nil
}

// resume opens the rest and reads the first bytes of it, since a connection that is accepted and then
// breaks at once is no progress.
func (b *resumed) resume(p []byte) (n int, err error) {
	err = b.attempt(func(ctx context.Context) error {
		if err := b.open(ctx); err != nil {
			return err
		}
		stop := context.AfterFunc(ctx, b.cancel)
		n, err = b.read(p)
		if !stop() && b.broken == nil {
			b.broken = b.slow()
		}
		if n > 0 {
			return nil
		}
		return err
	})
	return n, err
}

// read reads from the current body and notes in broken that it needs another.
func (b *resumed) read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	if int64(n) < b.left && errors.Is(err, io.EOF) {
		err = &Error{Op: "get", Name: b.URL() + "/" + b.object.Key, Kind: ErrUnavailable, Err: io.ErrUnexpectedEOF}
	}
	if err != nil && Temporary(err) {
		b.broken = err
	} else {
		b.broken = nil
	}
	return n, err
}

// Read implements io.Reader.
func (b *resumed) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.left == 0 {
		b.err = io.EOF
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), b.left)]
	if len(p) == 0 {
		return 0, nil
	}
	var n int
	var err error
	if b.broken == nil {
		n, err = b.read(p)
	}
	if n == 0 && b.broken != nil {
		if b.credit == 0 {
			b.err = fmt.Errorf("%w (the body broke more than %d times)", b.broken, maxBreaks)
			return 0, b.err
		}
		b.credit--
		b.log(b.broken, 0)
		n, err = b.resume(p)
	}
	b.off, b.left, b.came = b.off+int64(n), b.left-int64(n), b.came+int64(n)
	if b.came >= breakCost {
		b.credit, b.came = min(b.credit+int(b.came/breakCost), maxBreaks), b.came%breakCost
	}
	switch {
	case n > 0:
		if err != nil && b.broken == nil && b.left > 0 {
			b.err = err
		}
		return n, nil
	case err != nil:
		b.err = err
	}
	return 0, err
}

// Close implements io.Closer.
func (b *resumed) Close() error {
	b.shut()
	if b.err == nil {
		b.err = &Error{Op: "get", Name: b.URL() + "/" + b.object.Key, Kind: ErrInvalid, Err: errors.New("read after close")}
	}
	return nil
}

func (b *resumed) shut() {
	if b.body.ReadCloser != nil {
		_ = b.body.Close() // it is whole or it broke; what matters is known
		b.cancel()
		b.body.ReadCloser = nil
	}
}
