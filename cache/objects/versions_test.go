package objects

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// described is a bucket of one object, which is described by a function.
type described struct {
	source.Source
	source.Writer
	version func() string
}

func (described) URL() string { return "s3://bucket" }

func (d described) Describe(context.Context, string) (source.Object, source.Attributes, error) {
	return source.Object{Key: "k", Version: d.version(), Size: 1}, source.Attributes{}, nil
}

// What the bucket is asked before a write, and answers once the name was forgotten to make room, is not remembered.
func TestAnAnswerFromBeforeAWriteOfAForgottenNameIsNotRemembered(t *testing.T) {
	n := &Names{c: Config{Clock: systemClock{}}, fresh: time.Hour}
	n.versions.names = make(map[string]*name)
	n.replaced.reading, n.replaced.dead = make(map[ring.Object]int), make(map[ring.Object]bool)
	n.epochs.settled = true
	s := state{settled: true}
	version := "old"
	asked, answer := make(chan struct{}), make(chan struct{})
	slow := described{version: func() string {
		found := version
		close(asked)
		<-answer
		return found
	}}
	bucket := described{version: func() string { return version }}
	n.opened.Store(&[]*mount{{Source: bucket, writer: bucket}})
	read := func(d described) string {
		t.Helper()
		v, err := n.resolve(t.Context(), "k", place{&mount{Source: d, writer: d}, "k"}, s, true)
		if err != nil {
			t.Error(err)
		}
		return v.object.Version
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		read(slow)
	}()
	<-asked
	w := n.begin("k", s, true)
	version = "new"
	w.end() // acknowledged
	if got := read(bucket); got != "new" {
		t.Errorf("a read after the write: %q", got)
	}
	n.versions.mu.Lock()
	for i := 0; n.versions.names["k"] != nil; i++ {
		n.versions.name(fmt.Sprint("other", i))
	}
	n.versions.mu.Unlock()
	close(answer)
	<-ended
	if got := read(bucket); got != "new" {
		t.Errorf("a read after the write, once the name was forgotten: %q", got)
	}
}

// missing is a bucket without objects.
type missing struct {
	described
	asked *int
}

func (m missing) Describe(context.Context, string) (source.Object, source.Attributes, error) {
	*m.asked++
	return source.Object{}, source.Attributes{}, fmt.Errorf("k: %w", source.ErrNotFound)
}

// That there is nothing of a name is remembered like a version of it: for as long, and until it is written.
func TestThatThereIsNothingIsRemembered(t *testing.T) {
	clock := &later{at: time.Now()}
	n := &Names{c: Config{Clock: clock}, fresh: time.Second}
	n.versions.names = make(map[string]*name)
	n.replaced.reading, n.replaced.dead = make(map[ring.Object]int), make(map[ring.Object]bool)
	n.epochs.settled = true
	asked := 0
	bucket := missing{asked: &asked}
	n.opened.Store(&[]*mount{{Source: bucket, writer: bucket}})
	p := place{&mount{Source: bucket, writer: bucket}, "k"}
	for _, c := range []struct {
		when  string
		s     state
		owned bool
		asked int
		do    func()
	}{
		{"at first", state{settled: true}, true, 1, func() {}},
		{"soon", state{settled: true}, true, 1, func() { clock.at = clock.at.Add(time.Second - 1) }},
		{"later", state{settled: true}, true, 2, func() { clock.at = clock.at.Add(1) }},
		{"after a write", state{settled: true}, true, 3, func() { n.begin("k", state{settled: true}, true).end() }},
		{"at another worker", state{settled: true}, false, 4, func() {}},
		{"while others may own it", state{}, true, 5, func() {}},
	} {
		c.do()
		if _, err := n.resolve(t.Context(), "k", p, c.s, c.owned); !errors.Is(err, source.ErrNotFound) || asked != c.asked {
			t.Errorf("%s: %v; the bucket was asked %d times, not %d", c.when, err, asked, c.asked)
		}
	}
}

type later struct{ at time.Time }

func (l *later) Now() time.Time                     { return l.at }
func (*later) After(time.Duration) <-chan time.Time { return nil }
