package objects

import (
	"context"
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
