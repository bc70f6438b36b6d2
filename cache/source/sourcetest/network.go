package sourcetest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/test/bucket"
)

// proxied opens the same bucket through a proxy that injects faults.
func (s *suite) proxied(t *testing.T) (source.Source, *bucket.FaultProxy) {
	t.Helper()
	if s.Config.Endpoint == "" {
		t.Skip("the store has no network")
	}
	f := bucket.FaultsAt(t, s.Config.Endpoint)
	c := s.Config
	c.Endpoint = f.Endpoint()
	src, err := s.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return src, f
}

func always(f bucket.Fault) func(*http.Request) bucket.Fault {
	return func(*http.Request) bucket.Fault { return f }
}

func testOneRequestARead(t *testing.T, s *suite) {
	src, f := s.proxied(t)
	want := content(30, 1<<20)
	o := s.put(t, "k", want)
	before := f.Requests()
	for i := range int64(8) {
		if got, err := read(t.Context(), src, o, i<<17, 1<<17); err != nil || !bytes.Equal(got, want[i<<17:(i+1)<<17]) {
			t.Errorf("read %d: %d bytes, %v", i, len(got), err)
		}
	}
	if n := f.Requests() - before; n != 8 {
		t.Errorf("8 ranged reads took %d requests", n)
	}
}

func testStoreFaults(t *testing.T, s *suite) {
	src, f := s.proxied(t)
	want := content(31, 300_000)
	o := s.put(t, "k", want)
	for name, c := range map[string]struct {
		fault bucket.Fault
		kind  error
	}{
		"slow down":         {bucket.Fault{Status: 503, Code: "SlowDown", RetryAfter: "7"}, source.ErrThrottled},
		"too many requests": {bucket.Fault{Status: 429, Code: "TooManyRequests"}, source.ErrThrottled},
		"500":               {bucket.Fault{Status: 500, Code: "InternalError"}, source.ErrUnavailable},
		"502 of a proxy":    {bucket.Fault{Status: 502, Code: "BadGateway"}, source.ErrUnavailable},
		"reset":             {bucket.Fault{Reset: true}, source.ErrUnavailable},
		"403":               {bucket.Fault{Status: 403, Code: "AccessDenied"}, source.ErrDenied},
		"412":               {bucket.Fault{Status: 412, Code: "PreconditionFailed"}, source.ErrChanged},
	} {
		f.Set(always(c.fault))
		_, err := read(t.Context(), src, o, 0, o.Size)
		wantKind(t, err, c.kind, "k")
		if c.fault.RetryAfter != "" {
			if e := (*source.Error)(nil); !errors.As(err, &e) || e.After != 7*time.Second {
				t.Errorf("%s: Retry-After is lost: %+v", name, e)
			}
		}
		wantKind(t, src.List(t.Context(), "", func(source.Object) error { return nil }), c.kind)
	}
	f.Set(nil)
	if got, err := read(t.Context(), src, o, 0, o.Size); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after the faults: %d bytes, %v", len(got), err)
	}
}

func testTruncatedBody(t *testing.T, s *suite) {
	src, f := s.proxied(t)
	want := content(32, 300_000)
	o := s.put(t, "k", want)
	f.Set(always(bucket.Fault{Truncate: 100_000}))
	for _, r := range [][2]int64{{0, 300_000}, {50_000, 200_000}} {
		got, err := read(t.Context(), src, o, r[0], r[1])
		wantKind(t, err, source.ErrUnavailable, "k")
		if !bytes.Equal(got, want[r[0]:r[0]+int64(len(got))]) {
			t.Error("wrong bytes before the end")
		}
	}
	// Cut off in the listing, it is no short listing.
	f.Set(always(bucket.Fault{Truncate: 60}))
	wantKind(t, src.List(t.Context(), "", func(source.Object) error { return nil }), source.ErrUnavailable)
}

// A store, or a cache before it, that ignores what was asked must not yield other bytes.
func testAnswerToAnotherQuestion(t *testing.T, s *suite) {
	src, f := s.proxied(t)
	want := content(33, 300_000)
	o := s.put(t, "k", want)
	for name, header := range map[string]func(http.Header){
		"another version":     func(h http.Header) { h.Set("ETag", `"00000000000000000000000000000000"`) },
		"no version":          func(h http.Header) { h.Del("ETag") },
		"another range":       func(h http.Header) { h.Set("Content-Range", "bytes 5-104/300000") },
		"no range":            func(h http.Header) { h.Del("Content-Range") },
		"another size":        func(h http.Header) { h.Set("Content-Range", "bytes 100-199/300001") },
		"a range that is odd": func(h http.Header) { h.Set("Content-Range", "nonsense") },
	} {
		f.Set(always(bucket.Fault{Header: header}))
		got, err := read(t.Context(), src, o, 100, 100)
		if err == nil || len(got) > 0 || source.Temporary(err) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// A bit flipped by the bucket is seen with the digest that it publishes, and only with that.
func testFlippedBitShowsInDigest(t *testing.T, s *suite) {
	src, f := s.proxied(t)
	want := content(34, 10_000)
	o := s.put(t, "k", want)
	f.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodGet {
			return bucket.Fault{Flip: 5000}
		}
		return bucket.Fault{}
	})
	b, err := src.Get(t.Context(), o, 0, o.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	got, err := io.ReadAll(b)
	if err != nil || len(got) != len(want) || bytes.Equal(got, want) {
		t.Fatalf("%d bytes, equal %v, %v", len(got), bytes.Equal(got, want), err)
	}
	if b.Digest.Algorithm == source.None {
		t.Error("no digest to see it with")
	} else if bytes.Equal(b.Digest.Sum, sum(t, b.Digest.Algorithm, got)) {
		t.Error("the digest does not show it")
	}
}

func testStallEndsWithContext(t *testing.T, s *suite) {
	src, f := s.proxied(t)
	o := s.put(t, "k", content(35, 1000))
	f.Set(always(bucket.Fault{Stall: true}))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := read(ctx, src, o, 0, 1000)
	wantKind(t, err, source.ErrUnavailable, "k")
	wantKind(t, src.List(ctx, "", func(source.Object) error { return nil }), source.ErrUnavailable)
	_, err = src.Put(ctx, "k", strings.NewReader("x"), 1)
	wantKind(t, err, source.ErrUnavailable)
	// Without a deadline of the caller's, Stall ends the wait and Retry goes on.
	var asked atomic.Int32
	f.Set(func(*http.Request) bucket.Fault { return bucket.Fault{Stall: asked.Add(1) == 1} })
	patient := source.Retry(source.Stall(src, 2*time.Second, 2*time.Second), source.RetryOptions{Elapsed: time.Minute})
	if got, err := read(t.Context(), patient, o, 0, 1000); err != nil || len(got) != 1000 {
		t.Errorf("after a stall: %d bytes, %v", len(got), err)
	}
}

// Everything at once, with the decorators: the right bytes come through.
func testRetryThroughFaults(t *testing.T, s *suite) {
	src, f := s.proxied(t)
	want := content(36, 6<<20)
	o := s.put(t, "k", want)
	var n atomic.Int64
	f.Set(func(r *http.Request) bucket.Fault {
		switch n.Add(1) % 5 {
		case 0:
			return bucket.Fault{Status: 503, Code: "SlowDown"}
		case 1:
			return bucket.Fault{Reset: true}
		case 2:
			return bucket.Fault{Truncate: 1 << 20}
		case 3:
			return bucket.Fault{Status: 500, Code: "InternalError"}
		}
		return bucket.Fault{Truncate: 3 << 20}
	})
	meter := source.NewMeter(src.URL())
	patient := source.Retry(source.Limit(source.Measure(src, meter), source.LimitOptions{Requests: 2}), source.RetryOptions{Elapsed: 2 * time.Minute})
	got, err := read(t.Context(), patient, o, 0, o.Size)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, equal %v, %v", len(got), bytes.Equal(got, want), err)
	}
	if c := meter.Counts(); c.Read != o.Size || c.Errors["throttled"] == 0 || c.Errors["unavailable"] == 0 {
		t.Errorf("what was there was fetched again, or errors were not counted: %+v", c)
	}
	listed := 0
	if err := patient.List(t.Context(), "", func(source.Object) error { listed++; return nil }); err != nil || listed != 1 {
		t.Errorf("listed %d, %v", listed, err)
	}
}

// A Put repeats by itself what the store refused, part by part.
func testPutThroughFaults(t *testing.T, s *suite) {
	src, f := s.proxied(t)
	want := content(37, s.large())
	var n atomic.Int64
	f.Set(func(r *http.Request) bucket.Fault {
		if n.Add(1)%2 == 0 {
			return bucket.Fault{}
		}
		return bucket.Fault{Status: 503, Code: "SlowDown"}
	})
	o, err := src.Put(t.Context(), "k", onlyReader{bytes.NewReader(want)}, -1)
	if err != nil {
		t.Fatal(err)
	}
	f.Set(nil)
	if got, err := read(t.Context(), src, o, 0, o.Size); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, equal %v, %v", len(got), bytes.Equal(got, want), err)
	}
	s.noLeftovers(t)
}

func testPlainStoreNamedWithoutHTTP(t *testing.T, s *suite) {
	if !strings.HasPrefix(s.Config.Endpoint, "http://") {
		t.Skip("the store has no plain endpoint")
	}
	c := s.Config
	c.Endpoint = strings.TrimPrefix(c.Endpoint, "http://")
	src, err := s.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	_, err = src.Stat(t.Context(), "k")
	wantKind(t, err, source.ErrInvalid, "http://")
}
