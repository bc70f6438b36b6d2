package source

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"golang.org/x/sync/errgroup"
)

// pagers is how many pages are asked for at once. A store answers a page of 1,000 keys in 0.1 to 0.2 s,
// so that eight list a million keys in about 20 s.
const pagers = 8

// minPages is how many pages a part lists before it is cut.
const minPages = 8

// maxDepth bounds how many levels of folders are looked at for a place to split a listing.
const maxDepth = 16

// decorator is implemented by this package's decorators: pager is nil when what they wrap has no pages.
type decorator interface{ pager() Pager }

// pager returns the Pager that s is, or nil.
func pager(s Source) Pager {
	if d, ok := s.(decorator); ok {
		return d.pager()
	}
	p, _ := s.(Pager)
	return p
}

// span is a part of a listing: the keys above after up to and including last; last "" means to the end.
type span struct{ after, last string }

// ListPages lists everything below prefix through p, with a few pages under way at once. It starts as
// one listing, which for a small bucket is one request. While it could use more requests at once, the
// part of a listing that is still ahead is cut at common prefixes: at keys, so that no part is listed
// twice and none is missed however the prefixes lie, and into no more parts than can be listed at once,
// so that a bucket of a million folders with one object each costs no more pages than any other. Memory
// holds the pages under way and one being yielded.
func ListPages(ctx context.Context, p Pager, prefix string, yield func(Object) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(ctx)
	l := &lister{Pager: p, prefix: prefix, group: g, found: make(chan []Object), idle: make(chan struct{}, pagers)}
	for range pagers - 1 { // the first part is listed at once
		l.idle <- struct{}{}
	}
	g.Go(func() error { return l.list(gctx, span{}) })
	var listErr error
	go func() {
		listErr = g.Wait()
		close(l.found)
	}()
	var yieldErr error
	for objects := range l.found {
		for _, o := range objects {
			if yieldErr != nil {
				break // only to let the listers end
			}
			if yieldErr = yield(o); yieldErr != nil {
				cancel()
			}
		}
	}
	if yieldErr != nil {
		return yieldErr
	}
	return listErr
}

type lister struct {
	Pager
	prefix string
	group  *errgroup.Group
	found  chan []Object
	idle   chan struct{} // a token for each part that could be listed besides those that are
}

func (l *lister) list(ctx context.Context, s span) error {
	defer func() { l.idle <- struct{}{} }()
	// A cut costs one page to find places and about one for each part, of which the last page is partly
	// another's. So a part is cut only once it has shown to be worth it; the first, at once.
	wait, pause := minPages, minPages // pages to go before the next look for a place to cut
	if s == (span{}) {
		wait = 0
	}
	for {
		page, err := l.Page(ctx, PageRequest{Prefix: l.prefix, After: s.after})
		if err != nil {
			return err
		}
		objects, done, err := l.cut(page, &s)
		if err != nil {
			return err
		}
		if len(objects) > 0 {
			select {
			case l.found <- objects:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if done {
			return nil
		}
		if wait > 0 {
			wait--
			continue
		}
		split, err := l.split(ctx, &s, objects)
		switch {
		case Temporary(err) && ctx.Err() == nil:
			pause = math.MaxInt // a listing in one part is better than none
		case err != nil:
			return err
		case split:
			pause = minPages
		default:
			pause = min(pause*2, 64)
		}
		wait = pause
	}
}

// cut checks a page and cuts off what is past the part's end. Paging by key is sound only in the order
// of keys: a store that lists otherwise would be listed in part, so it is refused.
func (l *lister) cut(page Page, s *span) (objects []Object, done bool, err error) {
	for i, o := range page.Objects {
		if !strings.HasPrefix(o.Key, l.prefix) || o.Key <= s.after {
			return nil, false, &Error{Op: "list", Name: fmt.Sprintf("%q", l.prefix), Kind: ErrInvalid,
				Err:  fmt.Errorf("the store lists %q after %q", o.Key, s.after),
				Hint: "the store must list in the order of keys and know start-after"}
		}
		if s.last != "" && o.Key > s.last {
			return page.Objects[:i], true, nil
		}
		s.after = o.Key
	}
	if page.More && len(page.Objects) == 0 {
		return nil, false, &Error{Op: "list", Name: fmt.Sprintf("%q", l.prefix), Kind: ErrInvalid,
			Err: errors.New("the store says that there are more keys but lists none")}
	}
	return page.Objects, !page.More || s.after == s.last, nil
}

// split gives what is ahead of a part to idle listers, as far as there are any, and keeps the first bit.
func (l *lister) split(ctx context.Context, s *span, listed []Object) (bool, error) {
	tokens := 0
	for tokens < pagers {
		select {
		case <-l.idle:
			tokens++
			continue
		default:
		}
		break
	}
	if tokens == 0 {
		return false, nil
	}
	defer func() {
		for range tokens {
			l.idle <- struct{}{}
		}
	}()
	places, level, more, err := l.places(ctx, *s)
	if err != nil {
		return false, err
	}
	n := min(tokens, len(places))
	if more {
		// There are many folders ahead. Where they hold as little as those just listed, the places found lie
		// close together, and parts of less than two pages cost more than they help.
		n = min(n, len(places)*perFolder(listed, level)/2000)
	}
	if n == 0 {
		return false, nil
	}
	parts := make([]span, n)
	for i := range parts {
		// The i-th of n evenly spaced places; the first bit, before the first place, stays with s.
		parts[i].after = places[i*len(places)/n]
		if i > 0 {
			parts[i-1].last = parts[i].after
		}
	}
	parts[n-1].last, s.last = s.last, parts[0].after
	for _, part := range parts {
		tokens--
		l.group.Go(func() error { return l.list(ctx, part) })
	}
	return true, nil
}

// perFolder is how many of the listed keys are in one folder of the level, on average.
func perFolder(listed []Object, level string) int {
	folders, last := 0, ""
	for _, o := range listed {
		rest, ok := strings.CutPrefix(o.Key, level)
		if folder, _, below := strings.Cut(rest, "/"); !ok || !below || folder != last || folders == 0 {
			folders, last = folders+1, folder
		}
	}
	return len(listed) / max(folders, 1)
}

// places finds common prefixes ahead, at the shallowest level that has any: the parts between those are
// the largest. more says that there are others behind them.
func (l *lister) places(ctx context.Context, s span) (places []string, level string, more bool, err error) {
	level = l.prefix
	for range maxDepth {
		page, err := l.Page(ctx, PageRequest{Prefix: level, After: s.after, Delimited: true})
		if err != nil {
			return nil, "", false, err
		}
		for _, p := range page.Prefixes {
			if p > s.after && (s.last == "" || p < s.last) && (len(places) == 0 || p > places[len(places)-1]) {
				places = append(places, p)
			}
		}
		if len(places) > 0 {
			return places, level, page.More, nil
		}
		i := strings.IndexByte(s.after[len(level):], '/')
		if i < 0 {
			break
		}
		level = s.after[:len(level)+i+1]
	}
	return nil, "", false, nil
}
