package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/stepcache/stepcache/cache/source"
)

// script is a store whose gets do what a test says. Times are those of a synctest bubble.
type script struct {
	content []byte
	get     func(ctx context.Context, try int, off, length int64) (io.Reader, error)
	stat    func(ctx context.Context, try int) error
	tries   atomic.Int32
	opened  atomic.Int32
	closed  atomic.Int32
}

func (s *script) URL() string { return "s3://bucket" }
func (s *script) List(context.Context, string, func(source.Object) error) error {
	return errors.ErrUnsupported
}
func (s *script) Stat(ctx context.Context, key string) (source.Object, error) {
	return source.Object{Key: key}, s.stat(ctx, int(s.tries.Add(1)))
}
func (s *script) Put(_ context.Context, key string, r io.Reader, _ int64) (source.Object, error) {
	n, err := io.Copy(io.Discard, r)
	return source.Object{Key: key, Size: n}, err
}
func (s *script) Delete(ctx context.Context, _ string) error { return s.stat(ctx, int(s.tries.Add(1))) }
func (s *script) Get(ctx context.Context, _ source.Object, off, length int64) (source.Body, error) {
	r, err := s.get(ctx, int(s.tries.Add(1)), off, length)
	if err != nil {
		return source.Body{}, err
	}
	s.opened.Add(1)
	return source.Body{ReadCloser: &scriptBody{r, s}}, nil
}

type scriptBody struct {
	io.Reader
	s *script
}

func (b *scriptBody) Close() error { b.s.closed.Add(1); return nil }

func temporary(after time.Duration) error {
	return &source.Error{Op: "get", Name: "s3://bucket/k", Kind: source.ErrThrottled, After: after}
}

func (s *script) object() source.Object {
	return source.Object{Key: "k", Size: int64(len(s.content)), Version: "v"}
}

// broken yields the n bytes from off and then an error.
func (s *script) broken(off, n int64, err error) io.Reader {
	return io.MultiReader(bytes.NewReader(s.content[off:off+n]), errReader{err})
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

func readAll(ctx context.Context, s source.Source, o source.Object, off, length int64) ([]byte, error) {
	b, err := s.Get(ctx, o, off, length)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	return io.ReadAll(b)
}

func TestRetryGivesUpInTimeAndSaysSoAtALowRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := &script{stat: func(context.Context, int) error { return temporary(0) }}
		r := source.Retry(s, source.RetryOptions{Elapsed: 15 * time.Second, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		start := time.Now()
		_, err := r.Stat(t.Context(), "k")
		took := time.Since(start)
		if !errors.Is(err, source.ErrThrottled) || !strings.Contains(err.Error(), "gave up after") {
			t.Errorf("%v", err)
		}
		if took > 15*time.Second || took < 8*time.Second {
			t.Errorf("took %v", took)
		}
		if n := s.tries.Load(); n < 5 || n > 40 {
			t.Errorf("%d tries in %v", n, took)
		}
		if n := strings.Count(log.String(), "\n"); n < 2 || n > 4 {
			t.Errorf("%d log lines for %v of retries:\n%s", n, took, log.String())
		}
	})
}

func TestRetryObeysRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{stat: func(_ context.Context, try int) error {
			if try == 1 {
				return temporary(7 * time.Second)
			}
			return nil
		}}
		start := time.Now()
		if err := source.Retry(s, source.RetryOptions{}).Delete(t.Context(), "k"); err != nil || time.Since(start) != 7*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		// One that does not fit into the time is not waited for.
		s = &script{stat: func(context.Context, int) error { return temporary(time.Hour) }}
		start = time.Now()
		if err := source.Retry(s, source.RetryOptions{}).Delete(t.Context(), "k"); !errors.Is(err, source.ErrThrottled) || time.Since(start) != 0 {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestRetryLeavesFinalErrorsAndEndedContextsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, kind := range []error{source.ErrNotFound, source.ErrChanged, source.ErrDenied, source.ErrInvalid, errors.New("other")} {
			s := &script{stat: func(context.Context, int) error { return kind }}
			if _, err := source.Retry(s, source.RetryOptions{}).Stat(t.Context(), "k"); !errors.Is(err, kind) || s.tries.Load() != 1 {
				t.Errorf("%v: %v after %d tries", kind, err, s.tries.Load())
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		s := &script{stat: func(context.Context, int) error { return temporary(0) }}
		start := time.Now()
		if _, err := source.Retry(s, source.RetryOptions{}).Stat(ctx, "k"); !errors.Is(err, source.ErrThrottled) || time.Since(start) > 3*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		// A try that hangs ends with the time for all tries.
		s = &script{stat: func(ctx context.Context, _ int) error {
			<-ctx.Done()
			return &source.Error{Kind: source.ContextKind(ctx), Err: ctx.Err()}
		}}
		start = time.Now()
		if _, err := source.Retry(s, source.RetryOptions{}).Stat(t.Context(), "k"); !errors.Is(err, source.ErrUnavailable) || time.Since(start) != 20*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestRetryResumesABodyWhereItBroke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{content: bytes.Repeat([]byte("stepcache"), 100_000)}
		var offs []int64
		s.get = func(_ context.Context, try int, off, length int64) (io.Reader, error) {
			offs = append(offs, off)
			switch try {
			case 1:
				return s.broken(off, 1000, temporary(0)), nil
			case 2:
				return nil, temporary(0)
			case 3:
				return s.broken(off, 0, temporary(0)), nil // accepted, then broken at once
			case 4:
				return bytes.NewReader(s.content[off : off+500]), nil // ends early without an error
			}
			return bytes.NewReader(s.content[off : off+length]), nil
		}
		got, err := readAll(t.Context(), source.Retry(s, source.RetryOptions{}), s.object(), 100, 800_000)
		if err != nil || !bytes.Equal(got, s.content[100:800_100]) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if want := "[100 1100 1100 1100 1600]"; fmt.Sprint(offs) != want {
			t.Errorf("asked from %v, want %v", offs, want)
		}
		if s.opened.Load() != s.closed.Load() {
			t.Errorf("%d bodies opened, %d closed", s.opened.Load(), s.closed.Load())
		}
	})
}

func TestRetryOfABodyKeepsFinalErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{content: make([]byte, 10_000)}
		changed := &source.Error{Op: "get", Name: "k", Kind: source.ErrChanged}
		s.get = func(_ context.Context, try int, off, _ int64) (io.Reader, error) {
			if try == 1 {
				return s.broken(off, 1000, temporary(0)), nil
			}
			return nil, changed
		}
		got, err := readAll(t.Context(), source.Retry(s, source.RetryOptions{}), s.object(), 0, 10_000)
		if !errors.Is(err, source.ErrChanged) || len(got) != 1000 {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		b, err := source.Retry(s, source.RetryOptions{}).Get(t.Context(), s.object(), 0, 10_000)
		if !errors.Is(err, source.ErrChanged) {
			t.Errorf("%v, %v", b, err)
		}
	})
}

// A store that sends a few bytes a connection is not asked once for each few bytes.
func TestRetryBoundsTheBreaksOfOneBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{content: make([]byte, 4<<20)}
		s.get = func(_ context.Context, _ int, off, length int64) (io.Reader, error) {
			return s.broken(off, min(length, 100), temporary(0)), nil
		}
		_, err := readAll(t.Context(), source.Retry(s, source.RetryOptions{}), s.object(), 0, 4<<20)
		if !errors.Is(err, source.ErrThrottled) || s.tries.Load() > 10 {
			t.Errorf("%d requests, %v", s.tries.Load(), err)
		}
		// A large body that breaks once in a while is read to its end.
		s = &script{content: make([]byte, 40<<20)}
		s.get = func(_ context.Context, _ int, off, length int64) (io.Reader, error) {
			return s.broken(off, min(length, 2<<20), temporary(0)), nil
		}
		if got, err := readAll(t.Context(), source.Retry(s, source.RetryOptions{}), s.object(), 0, 40<<20); err != nil || len(got) != 40<<20 {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}

// The reader's own pauses count neither as a stall nor against the time for retries.
func TestPausesOfTheReaderAreNoStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{content: make([]byte, 10_000)}
		s.get = func(ctx context.Context, try int, off, length int64) (io.Reader, error) {
			if try == 1 {
				return io.MultiReader(bytes.NewReader(s.content[:5000]), ctxReader{ctx}, errReader{temporary(0)}), nil
			}
			return bytes.NewReader(s.content[off : off+length]), nil
		}
		b, err := source.Retry(source.Stall(s, time.Second, time.Second), source.RetryOptions{}).Get(t.Context(), s.object(), 0, 10_000)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		got := make([]byte, 10_000)
		if _, err := io.ReadFull(b, got[:100]); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if n, err := io.ReadFull(b, got[100:]); err != nil || s.tries.Load() != 2 {
			t.Errorf("%d bytes, %d requests, %v", n, s.tries.Load(), err)
		}
	})
}

// ctxReader fails if its context has ended.
type ctxReader struct{ ctx context.Context }

func (c ctxReader) Read([]byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, errors.New("the context ended during a pause")
	}
	return 0, io.EOF
}

// hangReader never yields a byte.
type hangReader struct{ ctx context.Context }

func (h hangReader) Read([]byte) (int, error) {
	<-h.ctx.Done()
	return 0, &source.Error{Op: "get", Name: "k", Kind: source.ContextKind(h.ctx), Err: h.ctx.Err()}
}

func TestStallEndsWhatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{content: make([]byte, 10_000)}
		s.stat = func(ctx context.Context, _ int) error { _, err := hangReader{ctx}.Read(nil); return err }
		s.get = func(ctx context.Context, try int, off, length int64) (io.Reader, error) {
			switch try {
			case 1: // no answer
				_, err := hangReader{ctx}.Read(nil)
				return nil, err
			case 2: // an answer without end
				return io.MultiReader(bytes.NewReader(s.content[:100]), hangReader{ctx}), nil
			}
			return bytes.NewReader(s.content[off : off+length]), nil
		}
		stall := source.Stall(s, 6*time.Second, time.Minute)
		start := time.Now()
		_, err := readAll(t.Context(), stall, s.object(), 0, 10_000)
		if !errors.Is(err, source.ErrUnavailable) || time.Since(start) != 6*time.Second {
			t.Errorf("no answer: %v after %v", err, time.Since(start))
		}
		got, err := readAll(t.Context(), stall, s.object(), 0, 10_000)
		if !errors.Is(err, source.ErrUnavailable) || len(got) != 100 {
			t.Errorf("no end: %d bytes, %v", len(got), err)
		}
		s.tries.Store(0)
		if got, err := readAll(t.Context(), source.Retry(stall, source.RetryOptions{}), s.object(), 0, 10_000); err != nil || len(got) != 10_000 {
			t.Errorf("with retry: %d bytes, %v", len(got), err)
		}
		if _, err := stall.Stat(t.Context(), "k"); !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), "6s") {
			t.Errorf("stat: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := stall.Stat(ctx, "k"); !errors.Is(err, context.Canceled) {
			t.Errorf("canceled by its owner: %v", err)
		}
	})
}

// bulk is a Writer that deletes many at once, and no more.
type bulk struct {
	*script
	source.Pager
	source.Writer
	deleted func(context.Context) error
}

func (b bulk) Delete(ctx context.Context, key string) error { return b.script.Delete(ctx, key) }

func (b bulk) DeleteAll(ctx context.Context, _ []string) (map[string]bool, error) {
	return nil, b.deleted(ctx)
}

type pager func(context.Context, source.PageRequest) (source.Page, error)

func (f pager) Page(ctx context.Context, q source.PageRequest) (source.Page, error) { return f(ctx, q) }

// A store may have much to look through before it answers a list or a bulk delete. One that is away is not waited for
// that long, and one that never answers is given up.
func TestSlowAnswersAreWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var answer func(context.Context) error
		store := bulk{deleted: func(ctx context.Context) error { return answer(ctx) }, script: &script{}}
		store.Pager = pager(func(ctx context.Context, q source.PageRequest) (source.Page, error) {
			return source.Page{Objects: []source.Object{{Key: "k"}}}, answer(ctx)
		})
		s := source.Retry(source.Limit(source.Stall(store, 6*time.Second, time.Minute), source.LimitOptions{}), source.RetryOptions{Logger: slog.New(slog.DiscardHandler)})
		w, _ := source.WriterOf(s)
		deleter, _ := source.BulkDeleterOf(w)
		pages, _ := source.PagerOf(s)
		sleep := func(ctx context.Context, d time.Duration) error {
			select {
			case <-time.After(d):
				return nil
			case <-ctx.Done():
				return &source.Error{Kind: source.ContextKind(ctx), Err: ctx.Err()}
			}
		}
		for name, c := range map[string]struct {
			answer      func(context.Context) error
			least, most time.Duration
			fails       string
		}{
			"slow": {func(ctx context.Context) error { return sleep(ctx, 50*time.Second) }, 50 * time.Second, 50 * time.Second, ""},
			"slow, in several requests": {func(ctx context.Context) error {
				for range 5 {
					if err := sleep(ctx, 50*time.Second); err != nil {
						return err
					}
					httptrace.ContextClientTrace(ctx).GotFirstResponseByte()
				}
				return nil
			}, 250 * time.Second, 250 * time.Second, ""},
			"never":          {func(ctx context.Context) error { return sleep(ctx, time.Hour) }, 2 * time.Minute, 2 * time.Minute, "no sign of life for 1m0s"},
			"nobody there":   {func(context.Context) error { return &source.Error{Kind: source.ErrUnavailable} }, 10 * time.Second, 20 * time.Second, "gave up"},
			"late, then not": {lateThenNot(func(ctx context.Context) error { return sleep(ctx, time.Hour) }), time.Minute, 80 * time.Second, ""},
			"over a connection that was dead": {lateThenNot(func(ctx context.Context) error {
				return errors.Join(sleep(ctx, 30*time.Second), &source.Error{Kind: source.ErrUnavailable})
			}), 30 * time.Second, 30 * time.Second, ""},
		} {
			for what, do := range map[string]func(context.Context) error{
				"list": func(ctx context.Context) error { _, err := pages.Page(ctx, source.PageRequest{}); return err },
				"delete": func(ctx context.Context) error {
					_, err := deleter.DeleteAll(ctx, []string{"k"})
					return err
				},
			} {
				answer = c.answer
				start, tries := time.Now(), 0
				err := do(source.NotifyTries(t.Context(), func(error) { tries++ }))
				took := time.Since(start)
				if (err != nil) != (c.fails != "") || err != nil && (!errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), c.fails)) {
					t.Errorf("%s, %s: %v", name, what, err)
				}
				if took < c.least || took > c.most {
					t.Errorf("%s, %s: took %v", name, what, took)
				}
				if name == "never" && (tries != 1 || strings.Contains(err.Error(), "delete markers") != (what == "list")) {
					t.Errorf("%s, %s: told of %d tries, and then %v", name, what, tries, err)
				}
			}
		}
	})
}

// lateThenNot answers every second time at once, and otherwise late.
func lateThenNot(late func(context.Context) error) func(context.Context) error {
	tries := 0
	return func(ctx context.Context) error {
		if tries++; tries%2 == 0 {
			return nil
		}
		return late(ctx)
	}
}

func TestLimitBoundsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{content: make([]byte, 10)}
		s.get = func(context.Context, int, int64, int64) (io.Reader, error) { return bytes.NewReader(s.content), nil }
		m := source.NewMeter("s3://bucket")
		l := source.Limit(source.Measure(s, m), source.LimitOptions{Requests: 2, Meter: m})
		var bodies []source.Body
		for range 2 {
			b, err := l.Get(t.Context(), s.object(), 0, 10)
			if err != nil {
				t.Fatal(err)
			}
			bodies = append(bodies, b)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.Get(ctx, s.object(), 0, 10); !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), "maxRequests") {
			t.Errorf("a third request: %v", err)
		}
		bodies[0].Close()
		bodies[0].Close()                                // gives its place back once
		if _, err := io.ReadAll(bodies[1]); err != nil { // so does the end of a body
			t.Fatal(err)
		}
		var most, now atomic.Int32
		s.stat = func(context.Context, int) error {
			most.Store(max(most.Load(), now.Add(1)))
			time.Sleep(time.Second)
			now.Add(-1)
			return nil
		}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := l.Stat(t.Context(), "k"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if most.Load() != 2 {
			t.Errorf("%d requests at once", most.Load())
		}
		// One second of the third request, and 0, 1, 2, 3 and 4 of two each; the store saw none of it.
		if c := m.Counts(); c.Waited != 21 || c.Seconds["stat"] != 10 {
			t.Errorf("waited for %v s, and for the store %v s", c.Waited, c.Seconds["stat"])
		}
	})
}

func TestLimitBoundsBandwidth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{content: make([]byte, 4<<20)}
		s.get = func(_ context.Context, _ int, off, length int64) (io.Reader, error) {
			return bytes.NewReader(s.content[off : off+length]), nil
		}
		l := source.Limit(s, source.LimitOptions{BytesPerSecond: 4 << 20})
		start := time.Now()
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				if _, err := readAll(t.Context(), l, s.object(), 0, 4<<20); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(start); took < 4800*time.Millisecond || took > 5100*time.Millisecond {
			t.Errorf("20 MiB at 4 MiB/s took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if _, err := readAll(ctx, l, s.object(), 0, 4<<20); !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), "bytesPerSecond") {
			t.Errorf("too slow for its deadline: %v", err)
		}
	})
}

func TestMeasureCounts(t *testing.T) {
	s := &script{content: make([]byte, 1000)}
	s.get = func(_ context.Context, try int, off, length int64) (io.Reader, error) {
		switch try {
		case 1:
			return nil, temporary(0)
		case 2:
			return s.broken(off, 100, &source.Error{Kind: source.ErrUnavailable}), nil
		}
		return bytes.NewReader(s.content[off : off+length]), nil
	}
	s.stat = func(context.Context, int) error { return errors.New("odd") }
	m := source.NewMeter("s3://bucket")
	src := source.Measure(s, m)
	for range 3 {
		_, _ = readAll(t.Context(), src, s.object(), 0, 1000) // the first two fail, as counted below
	}
	_, _ = src.Stat(t.Context(), "k") // fails, as counted below
	if _, err := src.Put(t.Context(), "k", strings.NewReader("12345"), 5); err != nil {
		t.Fatal(err)
	}
	c := m.Counts()
	if c.Requests["get"] != 3 || c.Requests["stat"] != 1 || c.Requests["put"] != 1 || c.Total() != 5 || c.Read != 1100 || c.Written != 5 ||
		c.Errors["throttled"] != 1 || c.Errors["unavailable"] != 1 || c.Errors["other"] != 1 || len(c.Errors) != 3 {
		t.Errorf("%+v", c)
	}
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(m); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, metric := range f.Metric {
			got[f.GetName()] += metric.GetCounter().GetValue()
		}
	}
	if got["stepcache_source_requests_total"] != 5 || got["stepcache_source_read_bytes_total"] != 1100 || got["stepcache_source_errors_total"] != 3 {
		t.Errorf("%v", got)
	}
}

// Pages are retried each alone, and counted, through every decorator.
func TestDecoratorsListInPages(t *testing.T) {
	var list []string
	for i := range 5000 {
		list = append(list, fmt.Sprintf("%02d/%d", i%50, i))
	}
	k := sorted(list, 100)
	var n atomic.Int32
	k.fault = func(source.PageRequest) error {
		if n.Add(1)%3 == 0 {
			return temporary(time.Nanosecond)
		}
		return nil
	}
	type pagedSource struct {
		*script
		source.Pager
	}
	m := source.NewMeter("s3://bucket")
	var src source.Source = pagedSource{&script{}, k}
	src = source.Retry(source.Limit(source.Measure(source.Stall(src, time.Minute, time.Minute), m), source.LimitOptions{Requests: 3}), source.RetryOptions{Logger: slog.New(slog.DiscardHandler)})
	listed := 0
	if err := src.List(t.Context(), "", func(source.Object) error { listed++; return nil }); err != nil || listed != 5000 {
		t.Errorf("%d listed, %v", listed, err)
	}
	if c := m.Counts(); c.Requests["list"] != k.pages.Load() || c.Errors["throttled"] == 0 {
		t.Errorf("%+v for %d pages", c, k.pages.Load())
	}
}
