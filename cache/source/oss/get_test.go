package oss

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/oss/osstest"
)

// bytesOf is n bytes that do not repeat.
func bytesOf(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b)
	return b
}

func read(t *testing.T, b source.Source, o source.Object, off, length int64) ([]byte, error) {
	t.Helper()
	body, err := b.Get(t.Context(), o, off, length)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

func mustStat(t *testing.T, b *Bucket, key string) source.Object {
	t.Helper()
	o, err := b.Stat(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// TestRangedGetWithDigest: the CRC64 of the whole object comes with a part of it, and reading the part
// does not compare the two.
func TestRangedGetWithDigest(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{})
	want := bytesOf(300_000)
	if _, err := s.Put(testBucket, "k", want); err != nil {
		t.Fatal(err)
	}
	o := mustStat(t, b, "k")
	for _, r := range [][2]int64{{0, 300_000}, {0, 1}, {299_999, 1}, {1, 299_998}, {65_536, 65_536}} {
		body, err := b.Get(t.Context(), o, r[0], r[1])
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		if err != nil || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
			t.Errorf("%v: %d bytes, %v", r, len(got), err)
		}
		crc := crcDigest(crc64.Checksum(want, ecma))
		if body.Digest.Algorithm != source.CRC64ECMA || !bytes.Equal(body.Digest.Sum, crc.Sum) || !bytes.Equal(o.Digest.Sum, crc.Sum) {
			t.Errorf("%v: digests %x and %x, want %x", r, body.Digest.Sum, o.Digest.Sum, crc.Sum)
		}
		body.Close()
	}
	if n := s.Count("GetObject"); n != 5 {
		t.Errorf("5 reads took %d requests", n)
	}
	for _, seen := range s.Seen() {
		if seen.Op == "GetObject" && (seen.Header.Get("If-Match") == "" || seen.Header.Get("Range") == "") {
			t.Errorf("a read was not bound to version and range: %v", seen.Header)
		}
	}
	for _, r := range [][2]int64{{-1, 2}, {0, -1}, {0, 300_001}, {300_001, 0}, {1 << 62, 1 << 62}, {2, 1<<63 - 1}} {
		if _, err := b.Get(t.Context(), o, r[0], r[1]); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("range %v: %v", r, err)
		}
	}
	if got, err := read(t, b, o, 300_000, 0); err != nil || len(got) != 0 || s.Count("GetObject") != 5 {
		t.Errorf("empty range: %d bytes, %v, %d requests", len(got), err, s.Count("GetObject"))
	}
}

// TestFaultyAnswers: whatever the store or something before it does to an answer, the bytes are right or
// the error is of the right kind.
func TestFaultyAnswers(t *testing.T) {
	want := bytesOf(200_000)
	for _, c := range []struct {
		name  string
		fault osstest.Fault
		want  error
		says  string
	}{
		{"503", osstest.Fault{Kind: osstest.Unavailable}, source.ErrUnavailable, "503 ServiceUnavailable"},
		{"throttled", osstest.Fault{Kind: osstest.SlowDown}, source.ErrThrottled, "QpsLimitExceeded"},
		{"500", osstest.Fault{Kind: osstest.InternalError}, source.ErrUnavailable, "500"},
		{"reset", osstest.Fault{Kind: osstest.Reset}, source.ErrUnavailable, ""},
		{"reset in the body", osstest.Fault{Kind: osstest.Reset, After: 50_000}, source.ErrUnavailable, "after"},
		{"stalled", osstest.Fault{Kind: osstest.Stall}, source.ErrUnavailable, "no sign of life"},
		{"stalled in the body", osstest.Fault{Kind: osstest.Stall, After: 50_000}, source.ErrUnavailable, "no sign of life"},
		{"truncated", osstest.Fault{Kind: osstest.Truncate, After: 99_999}, source.ErrUnavailable, "ended early, after 99999 bytes"},
		{"truncated at once", osstest.Fault{Kind: osstest.Truncate}, source.ErrUnavailable, "ended early, after 0 bytes"},
		{"another version", osstest.Fault{Kind: osstest.WrongETag}, source.ErrChanged, "version"},
		{"no ETag", osstest.Fault{Kind: osstest.NoETag}, source.ErrUnversioned, "allowUnversioned"},
		{"range ignored", osstest.Fault{Kind: osstest.IgnoreRange}, source.ErrInvalid, "proxy"},
		{"condition ignored", osstest.Fault{Kind: osstest.IgnoreIfMatch}, nil, ""}, // the same version: fine
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s, b := start(t, osstest.Options{}, deps{})
			var stalling source.Source = b
			if c.fault.Kind == osstest.Stall {
				stalling = source.Stall(b, 2*time.Second, 2*time.Second)
			}
			if _, err := s.Put(testBucket, "k", want); err != nil {
				t.Fatal(err)
			}
			o := mustStat(t, b, "k")
			c.fault.Op = "GetObject"
			struck := s.Inject(c.fault)
			got, err := read(t, stalling, o, 100_000, 100_000)
			struck.Remove()
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if err == nil && !bytes.Equal(got, want[100_000:]) {
				t.Error("wrong bytes")
			}
			if err != nil && (!strings.Contains(err.Error(), b.URL()+"/k") || source.Temporary(err) != source.Temporary(c.want)) {
				t.Errorf("%v", err)
			}
			// net/http itself repeats a read on a connection that turns out to have been closed while idle.
			if n := struck.Hits(); n != 1 && !(c.name == "reset" && n == 2) {
				t.Errorf("the fault struck %d times", n)
			}
			if got, err := read(t, b, o, 100_000, 100_000); err != nil || !bytes.Equal(got, want[100_000:]) {
				t.Errorf("next read: %d bytes, %v", len(got), err)
			}
		})
	}
}

// TestOverwrittenObject: a version that is gone is never read as another.
func TestOverwrittenObject(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{})
	if _, err := s.Put(testBucket, "k", []byte("first")); err != nil {
		t.Fatal(err)
	}
	o := mustStat(t, b, "k")
	if _, err := s.Put(testBucket, "k", []byte("other")); err != nil {
		t.Fatal(err)
	}
	if _, err := read(t, b, o, 0, 5); !errors.Is(err, source.ErrChanged) {
		t.Errorf("overwritten: %v", err)
	}
	// A cache before the store that ignores the condition.
	s.Inject(osstest.Fault{Kind: osstest.IgnoreIfMatch, Op: "GetObject", Times: 1})
	if _, err := read(t, b, o, 0, 5); !errors.Is(err, source.ErrChanged) {
		t.Errorf("overwritten, condition ignored: %v", err)
	}
	if err := b.Delete(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	if _, err := read(t, b, o, 0, 5); !errors.Is(err, source.ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
}

// TestUnversioned: a store without ETags is refused, or bound by time and size where the mount allows it.
func TestUnversioned(t *testing.T) {
	s := osstest.StartT(t, osstest.Options{})
	if _, err := s.Put(testBucket, "k", []byte("content")); err != nil {
		t.Fatal(err)
	}
	for _, op := range []string{"HeadObject", "GetObject"} {
		s.Inject(osstest.Fault{Kind: osstest.NoETag, Op: op})
	}
	config := configOf(t, s)
	b, err := Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Stat(t.Context(), "k"); !errors.Is(err, source.ErrUnversioned) || !strings.Contains(err.Error(), "allowUnversioned") {
		t.Errorf("stat: %v", err)
	}
	config.AllowUnversioned = true
	if b, err = Open(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	o := mustStat(t, b, "k")
	if got, err := read(t, b, o, 0, 7); err != nil || string(got) != "content" {
		t.Errorf("get: %q, %v", got, err)
	}
	o.Version = timed + "100" // as if it had changed since
	if _, err := read(t, b, o, 0, 7); !errors.Is(err, source.ErrChanged) {
		t.Errorf("get of an older one: %v", err)
	}
}

// TestCancelledInTheBody: a reader that gives up gets its own error at once, not the store's.
func TestCancelledInTheBody(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{})
	if _, err := s.Put(testBucket, "k", bytesOf(100_000)); err != nil {
		t.Fatal(err)
	}
	o := mustStat(t, b, "k")
	s.Inject(osstest.Fault{Kind: osstest.Stall, Op: "GetObject", After: 50_000, Times: 1})
	ctx, cancel := context.WithCancel(t.Context())
	body, err := b.Get(ctx, o, 0, o.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if _, err := io.ReadFull(body, make([]byte, 50_000)); err != nil {
		t.Fatal(err)
	}
	cancel()
	n, err := body.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, context.Canceled) || source.Temporary(err) {
		t.Errorf("read %d bytes, %v", n, err)
	}
	// Before the header.
	s.Inject(osstest.Fault{Kind: osstest.Stall, Op: "GetObject", Times: 1})
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for s.Count("GetObject") < 2 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
	}()
	if _, err := b.Get(ctx, o, 0, o.Size); !errors.Is(err, context.Canceled) || source.Temporary(err) {
		t.Errorf("cancelled before the answer: %v", err)
	}
	// A deadline is the store's failure as well as its owner's.
	s.Inject(osstest.Fault{Kind: osstest.Stall, Op: "GetObject", Times: 1})
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := b.Get(ctx, o, 0, o.Size); !errors.Is(err, source.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
}

// TestConnectionsAreReused: a body that was read to its end gives its connection back.
func TestConnectionsAreReused(t *testing.T) {
	dials := make(chan string, 100)
	dialer := &net.Dialer{}
	s, b := start(t, osstest.Options{}, deps{dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		dials <- address
		return dialer.DialContext(ctx, network, address)
	}})
	if _, err := s.Put(testBucket, "k", bytesOf(100_000)); err != nil {
		t.Fatal(err)
	}
	o := mustStat(t, b, "k")
	for range 20 {
		if _, err := read(t, b, o, 10, 50_000); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(dials); n > 2 { // net/http may dial a second one while the first comes back
		t.Errorf("21 requests took %d connections", n)
	}
}

// TestVirtualHostedBucket: with a name for an endpoint the bucket is part of the host, and signed so.
func TestVirtualHostedBucket(t *testing.T) {
	const domain = "oss-cn-shanghai-internal.aliyuncs.com"
	s := osstest.StartT(t, osstest.Options{Region: "cn-shanghai", Domain: domain})
	if _, err := s.Put(testBucket, "a/b c", []byte("content")); err != nil {
		t.Fatal(err)
	}
	config := configOf(t, s)
	config.Endpoint, config.Region = "http://"+domain, ""
	b, err := open(config, deps{proxy: noProxy, dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if address != testBucket+"."+domain+":80" {
			return nil, errors.New("dialled " + address)
		}
		return (&net.Dialer{}).DialContext(ctx, network, s.Addr())
	}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := read(t, b, mustStat(t, b, "a/b c"), 3, 4); err != nil || string(got) != "tent" {
		t.Errorf("%q, %v", got, err)
	}
}

func noProxy(*http.Request) (*url.URL, error) { return nil, nil }

// TestFlippedBitIsTheDigestsToFind: corruption by the store is not seen by a ranged read; it is what the
// digest, of the true content, is for.
func TestFlippedBitIsTheDigestsToFind(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{})
	if _, err := s.Put(testBucket, "k", bytesOf(1000)); err != nil {
		t.Fatal(err)
	}
	s.Inject(osstest.Fault{Kind: osstest.FlipBit, Op: "GetObject", After: 500})
	body, err := b.Get(t.Context(), mustStat(t, b, "k"), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(crcDigest(crc64.Checksum(got, ecma)).Sum, body.Digest.Sum) {
		t.Error("the digest is of the corrupted bytes")
	}
}

// FuzzContentRange: what is taken for a range is written as one.
func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-99/100", "bytes 5-5/6", "bytes 0-0/*", "bytes */100", "bytes -5-9/10", "bytes 1-2-3/4", "bytes 0-99",
		"0-99/100", "bytes 9223372036854775807-9223372036854775807/9223372036854775807", "bytes 0-9223372036854775808/1", "bytes  1-2/3", "bytes +1-+2/+3", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, size, ok := contentRange(s)
		if !ok {
			return
		}
		again := fmt.Sprintf("bytes %d-%d/%d", first, last, size)
		if a, b, c, ok := contentRange(again); !ok || a != first || b != last || c != size {
			t.Errorf("%q is read as %q, which is read as %d %d %d %v", s, again, a, b, c, ok)
		}
		if first < 0 || last < first || size <= last {
			t.Errorf("%q is no range of an object: %d to %d of %d", s, first, last, size)
		}
	})
}
