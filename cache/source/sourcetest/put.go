package sourcetest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

// large is more than two parts of an object.
func (s *suite) large() int {
	part := s.Part
	if part == 0 {
		part = 16 << 20
	}
	return part/2*5 + 12345
}

func testPutStreams(t *testing.T, s *suite) {
	large := s.large()
	want := content(20, large)
	for key, size := range map[string]int64{"known": int64(large), "unknown": -1} {
		o, err := s.src.Put(t.Context(), key, onlyReader{bytes.NewReader(want)}, size)
		if err != nil || o.Size != int64(large) || o.Version == "" {
			t.Fatalf("put with %s size: %+v, %v", key, o, err)
		}
		now, err := s.src.Stat(t.Context(), key)
		if err != nil || now.Version != o.Version || now.Size != int64(large) {
			t.Errorf("stat says %+v, put said %+v, %v", now, o, err)
		}
		if got, err := read(t.Context(), s.src, o, 0, o.Size); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s size: read %d bytes, equal %v, %v", key, len(got), bytes.Equal(got, want), err)
		}
	}
	for _, n := range []int{0, 1000} {
		o, err := s.src.Put(t.Context(), "small", onlyReader{bytes.NewReader(want[:n])}, -1)
		if err != nil || o.Size != int64(n) {
			t.Errorf("put of %d bytes without a size: %+v, %v", n, o, err)
		}
	}
	s.noLeftovers(t)
}

// onlyReader hides what else a reader can do.
type onlyReader struct{ io.Reader }

var errContent = errors.New("the content broke")

// brokenReader yields n bytes and then calls end.
type brokenReader struct {
	n   int
	end func() error
}

func (b *brokenReader) Read(p []byte) (int, error) {
	if b.n == 0 {
		return 0, b.end()
	}
	n := min(len(p), b.n)
	b.n -= n
	return n, nil
}

// A put that fails leaves what was there before, and no parts.
func testFailedPutLeavesNothing(t *testing.T, s *suite) {
	before := content(21, 1000)
	s.put(t, "old", before)
	zeros := func(n int, end error) func(context.CancelFunc) io.Reader {
		return func(context.CancelFunc) io.Reader { return &brokenReader{n, func() error { return end }} }
	}
	large := s.large()
	both := []string{"old", "new"}
	bytesOf := func(context.CancelFunc) io.Reader { return bytes.NewReader(before) }
	for name, c := range map[string]struct {
		content func(context.CancelFunc) io.Reader
		size    int64
		want    error
		keys    []string // what fails after parts were sent costs them, so that one key must do
	}{
		"content breaks":       {zeros(1000, errContent), 2000, errContent, both},
		"content breaks late":  {zeros(large, errContent), -1, errContent, both},
		"content too short":    {bytesOf, 1001, source.ErrInvalid, both},
		"content much shorter": {zeros(large, io.EOF), int64(3 * large), source.ErrInvalid, both[:1]},
		"content too long":     {bytesOf, 999, source.ErrInvalid, both},
		"content longer late":  {zeros(large+1, io.EOF), int64(large), source.ErrInvalid, both[1:]},
		"canceled": {func(cancel context.CancelFunc) io.Reader {
			return &brokenReader{large, func() error { cancel(); return context.Canceled }}
		}, -1, context.Canceled, both[:1]},
	} {
		for _, key := range c.keys {
			ctx, cancel := context.WithCancel(t.Context())
			_, err := s.src.Put(ctx, key, c.content(cancel), c.size)
			cancel()
			if !errors.Is(err, c.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	_, err := s.src.Stat(t.Context(), "new")
	wantKind(t, err, source.ErrNotFound)
	o, err := s.src.Stat(t.Context(), "old")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := read(t.Context(), s.src, o, 0, o.Size); err != nil || !bytes.Equal(got, before) {
		t.Errorf("what was there before: %d bytes, %v", len(got), err)
	}
	s.noLeftovers(t)
}

func (s *suite) noLeftovers(t *testing.T) {
	t.Helper()
	if s.Leftovers != nil {
		if n := s.Leftovers(t); n != 0 {
			t.Errorf("%d unfinished uploads are left behind", n)
		}
	}
}
