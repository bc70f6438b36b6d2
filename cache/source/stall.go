package source

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptrace"
	"time"
)

// Stall makes a request that shows no sign of life for d fail with ErrUnavailable, so that it can be
// tried again elsewhere: a connection whose peer is gone answers nothing, for minutes. For a page of a
// list and a bulk delete it is slow, since a store may have much to look through before it answers. It
// belongs below Limit, whose queue is no stall. Puts are not watched: how long a store takes to complete
// a large object is its own affair.
func Stall(s Source, d, slow time.Duration) Source {
	return &stall{Source: s, pages: pager(s), limit: d, slow: slow}
}

type stall struct {
	Source
	pages       Pager
	limit, slow time.Duration
}

// errSilent is the cause where a request showed no sign of life.
var errSilent = errors.New("no sign of life")

func (s *stall) pager() Pager {
	if s.pages == nil {
		return nil
	}
	return s
}

func silent(op, name string, d time.Duration) error {
	return &Error{Op: op, Name: name, Kind: ErrUnavailable, Err: fmt.Errorf("%w for %v", errSilent, d)}
}

// watch runs f with a context that ends when no request of f is answered for d, and says so where that was the reason.
func (s *stall) watch(ctx context.Context, op, name string, d time.Duration, f func(context.Context) error) error {
	own, cancel := context.WithCancel(ctx)
	defer cancel()
	timer := time.AfterFunc(d, cancel)
	defer timer.Stop()
	// A page may be several requests, where the store answers that there is more and lists nothing.
	err := f(httptrace.WithClientTrace(own, &httptrace.ClientTrace{GotFirstResponseByte: func() { timer.Reset(d) }}))
	if err != nil && own.Err() != nil && ctx.Err() == nil {
		return silent(op, name, d)
	}
	return err
}

// Page implements Pager.
func (s *stall) Page(ctx context.Context, q PageRequest) (page Page, err error) {
	err = s.watch(ctx, "list", s.URL()+"/"+q.Prefix, s.slow, func(ctx context.Context) error {
		page, err = s.pages.Page(ctx, q)
		return err
	})
	if e := (*Error)(nil); errors.Is(err, errSilent) && errors.As(err, &e) {
		e.Hint = "where versions were deleted in great numbers a list has their delete markers to pass: have a lifecycle rule of the bucket remove expired ones"
	}
	return page, err
}

// List implements Lister.
func (s *stall) List(ctx context.Context, prefix string, yield func(Object) error) error {
	if s.pages != nil {
		return ListPages(ctx, s, prefix, yield)
	}
	return s.Source.List(ctx, prefix, yield)
}

// Stat implements Stater.
func (s *stall) Stat(ctx context.Context, key string) (o Object, err error) {
	err = s.watch(ctx, "stat", s.URL()+"/"+key, s.limit, func(ctx context.Context) error {
		o, err = s.Source.Stat(ctx, key)
		return err
	})
	return o, err
}

// Delete implements Deleter.
func (s *stall) Delete(ctx context.Context, key string) error {
	return s.watch(ctx, "delete", s.URL()+"/"+key, s.limit, func(ctx context.Context) error { return s.Source.Delete(ctx, key) })
}

// Get implements Getter.
func (s *stall) Get(ctx context.Context, o Object, off, length int64) (Body, error) {
	own, cancel := context.WithCancel(ctx)
	timer := time.AfterFunc(s.limit, cancel)
	body, err := s.Source.Get(own, o, off, length)
	if err != nil {
		timer.Stop()
		if own.Err() != nil && ctx.Err() == nil {
			err = silent("get", s.URL()+"/"+o.Key, s.limit)
		}
		cancel()
		return Body{}, err
	}
	timer.Stop()
	body.ReadCloser = &stallBody{Body: body, stall: s, ctx: ctx, own: own, cancel: cancel, timer: timer, key: o.Key}
	return body, nil
}

// stallBody watches each Read; the time between reads is the reader's own.
type stallBody struct {
	Body
	*stall
	ctx, own context.Context
	cancel   context.CancelFunc
	timer    *time.Timer
	key      string
}

func (b *stallBody) Read(p []byte) (int, error) {
	b.timer.Reset(b.limit)
	n, err := b.Body.Read(p)
	b.timer.Stop()
	if n == 0 && err != nil && b.own.Err() != nil && b.ctx.Err() == nil {
		err = silent("get", b.URL()+"/"+b.key, b.limit)
	}
	return n, err
}

func (b *stallBody) Close() error {
	b.timer.Stop()
	b.cancel()
	return b.Body.Close()
}
