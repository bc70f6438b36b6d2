package source

import (
	"context"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// defaultRequests is how many requests are under way at once when a Config does not say.
const defaultRequests = 64

// limitChunk is how many bytes of a body are paid for at once.
const limitChunk = 64 << 10

// LimitOptions of Limit; zero fields mean the defaults of Config.
type LimitOptions struct {
	// Requests bounds the requests under way at once. A Get counts until its body is at its end or closed,
	// a Put until it returns.
	Requests int
	// BytesPerSecond bounds what all bodies together deliver; zero means no bound.
	BytesPerSecond int64
	// Meter counts how long requests waited to be sent; nil: nobody does.
	Meter *Meter
}

// Limit bounds the requests under way at once and the bytes read a second. Waiting ends with ctx. Who
// holds a body and asks for another needs two places: hold few, and close them.
func Limit(s Source, o LimitOptions) Source {
	if o.Requests <= 0 {
		o.Requests = defaultRequests
	}
	l := &limit{Source: s, pages: pager(s), slots: semaphore.NewWeighted(int64(o.Requests)), meter: o.Meter}
	if o.BytesPerSecond > 0 {
		// A burst of a tenth of a second, so that a pause is not made up for by a flood.
		l.rate = rate.NewLimiter(rate.Limit(o.BytesPerSecond), int(max(o.BytesPerSecond/10, limitChunk)))
	}
	return l
}

type limit struct {
	Source
	pages Pager
	slots *semaphore.Weighted
	meter *Meter        // nil: nobody counts
	rate  *rate.Limiter // nil: no bound
}

func (l *limit) pager() Pager {
	if l.pages == nil {
		return nil
	}
	return l
}

func (l *limit) acquire(ctx context.Context, op, key string) error {
	return l.enter(ctx, op, l.URL()+"/"+key)
}

// enter takes a place among the requests under way, which whoever got it gives back.
func (l *limit) enter(ctx context.Context, op, name string) error {
	if l.slots.TryAcquire(1) {
		return nil
	}
	start := time.Now()
	err := l.slots.Acquire(ctx, 1)
	if l.meter != nil {
		l.meter.waited.Add(int64(time.Since(start)))
	}
	if err != nil {
		return &Error{Op: op, Name: name, Kind: ContextKind(ctx), Err: err, Hint: "all of maxRequests were under way"}
	}
	return nil
}

// Page implements Pager.
func (l *limit) Page(ctx context.Context, q PageRequest) (Page, error) {
	if err := l.acquire(ctx, "list", q.Prefix); err != nil {
		return Page{}, err
	}
	defer l.slots.Release(1)
	return l.pages.Page(ctx, q)
}

// List implements Lister. A store without pages is listed in one request.
func (l *limit) List(ctx context.Context, prefix string, yield func(Object) error) error {
	if l.pages != nil {
		return ListPages(ctx, l, prefix, yield)
	}
	if err := l.acquire(ctx, "list", prefix); err != nil {
		return err
	}
	defer l.slots.Release(1)
	return l.Source.List(ctx, prefix, yield)
}

// Stat implements Stater.
func (l *limit) Stat(ctx context.Context, key string) (Object, error) {
	if err := l.acquire(ctx, "stat", key); err != nil {
		return Object{}, err
	}
	defer l.slots.Release(1)
	return l.Source.Stat(ctx, key)
}

// Put implements Putter.
func (l *limit) Put(ctx context.Context, key string, r io.Reader, size int64) (Object, error) {
	if err := l.acquire(ctx, "put", key); err != nil {
		return Object{}, err
	}
	defer l.slots.Release(1)
	return l.Source.Put(ctx, key, r, size)
}

// Delete implements Deleter.
func (l *limit) Delete(ctx context.Context, key string) error {
	if err := l.acquire(ctx, "delete", key); err != nil {
		return err
	}
	defer l.slots.Release(1)
	return l.Source.Delete(ctx, key)
}

// Get implements Getter.
func (l *limit) Get(ctx context.Context, o Object, off, length int64) (Body, error) {
	if err := l.acquire(ctx, "get", o.Key); err != nil {
		return Body{}, err
	}
	body, err := l.Source.Get(ctx, o, off, length)
	if err != nil {
		l.slots.Release(1)
		return Body{}, err
	}
	body.ReadCloser = &limitBody{ReadCloser: body.ReadCloser, limit: l, ctx: ctx, key: o.Key,
		release: sync.OnceFunc(func() { l.slots.Release(1) })}
	return body, nil
}

type limitBody struct {
	io.ReadCloser
	*limit
	ctx     context.Context
	key     string
	release func()
}

func (b *limitBody) Read(p []byte) (int, error) {
	if b.rate != nil && len(p) > limitChunk {
		p = p[:limitChunk]
	}
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.release()
	}
	if b.rate != nil && n > 0 {
		// Paid for afterwards, since only then is n known; the bytes left the store, so a reader that gives up
		// gets no refund.
		if werr := sleep(b.ctx, b.rate.ReserveN(time.Now(), n).Delay()); werr != nil {
			return 0, &Error{Op: "get", Name: b.URL() + "/" + b.key, Kind: ContextKind(b.ctx), Err: werr,
				Hint: "bytesPerSecond leaves too little for all that is read"}
		}
	}
	return n, err
}

func (b *limitBody) Close() error {
	b.release()
	return b.ReadCloser.Close()
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
