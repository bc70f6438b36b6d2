package sourcetest

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"errors"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"strings"
	"testing"

	"github.com/minio/crc64nvme"

	"github.com/stepcache/stepcache/cache/source"
)

// put puts content and checks what Put says of it.
func (s *suite) put(t *testing.T, key string, content []byte) source.Object {
	t.Helper()
	o, err := s.src.Put(t.Context(), key, bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatalf("put %s: %v", name(s.src, key), err)
	}
	if o.Key != key || o.Size != int64(len(content)) || o.Version == "" {
		t.Fatalf("put %s of %d bytes answered %+v", name(s.src, key), len(content), o)
	}
	return o
}

func read(ctx context.Context, src source.Source, o source.Object, off, length int64) ([]byte, error) {
	b, err := src.Get(ctx, o, off, length)
	if err != nil {
		return nil, err
	}
	got, err := io.ReadAll(b)
	return got, errors.Join(err, b.Close())
}

// wantKind fails unless err wraps exactly the wanted sentinel error and names what it is about.
func wantKind(t *testing.T, err, want error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %q", want)
		return
	}
	for _, kind := range []error{source.ErrNotFound, source.ErrNoBucket, source.ErrChanged, source.ErrDenied, source.ErrUnversioned,
		source.ErrThrottled, source.ErrUnavailable, source.ErrInvalid, source.ErrReadOnly} {
		if errors.Is(err, kind) != (kind == want) {
			t.Errorf("is %q: %v, in: %v", kind, kind != want, err)
		}
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error does not say %q: %v", p, err)
		}
	}
}

func testPutStatGet(t *testing.T, s *suite) {
	want := content(1, 100_000)
	put := s.put(t, "a/b.bin", want)
	o, err := s.src.Stat(t.Context(), "a/b.bin")
	if err != nil {
		t.Fatal(err)
	}
	if o.Key != put.Key || o.Size != put.Size || o.Version != put.Version || o.ModTime.IsZero() {
		t.Errorf("stat says %+v, put said %+v", o, put)
	}
	for _, r := range [][2]int64{{0, 100_000}, {0, 1}, {99_999, 1}, {4095, 4098}, {0, 99_999}, {1, 99_999}, {100_000, 0}, {0, 0}} {
		got, err := read(t.Context(), s.src, o, r[0], r[1])
		if err != nil || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
			t.Errorf("range %d+%d: %d bytes, %v", r[0], r[1], len(got), err)
		}
	}
	for _, r := range [][2]int64{{-1, 2}, {0, -1}, {0, 100_001}, {100_000, 1}, {1 << 62, 1 << 62}} {
		_, err := read(t.Context(), s.src, o, r[0], r[1])
		wantKind(t, err, source.ErrInvalid, "a/b.bin")
	}
	// A body that is closed early leaves the source of use.
	b, err := s.src.Get(t.Context(), o, 0, o.Size)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(b, make([]byte, 10)); err != nil {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

func testDigest(t *testing.T, s *suite) {
	want := content(2, 50_000)
	s.put(t, "d", want)
	o, err := s.src.Stat(t.Context(), "d")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.src.Get(t.Context(), o, 0, o.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for where, d := range map[string]source.Digest{"stat": o.Digest, "get": b.Digest} {
		if d.Algorithm != s.Digest {
			t.Errorf("%s publishes digest %v, want algorithm %v", where, d, s.Digest)
		}
		if d.Algorithm != source.None && !bytes.Equal(d.Sum, sum(t, d.Algorithm, want)) {
			t.Errorf("%s says %x, is %x", where, d.Sum, sum(t, d.Algorithm, want))
		}
	}
	// The digest that comes with a part is of the whole all the same, if there is one.
	part, err := s.src.Get(t.Context(), o, 100, 200)
	if err != nil {
		t.Fatal(err)
	}
	defer part.Close()
	if d := part.Digest; d.Algorithm != source.None && !bytes.Equal(d.Sum, sum(t, d.Algorithm, want)) {
		t.Errorf("a ranged get says %v %x, is %x", d.Algorithm, d.Sum, sum(t, d.Algorithm, want))
	}
}

// sum is the digest of b.
func sum(t *testing.T, a source.Algorithm, b []byte) []byte {
	t.Helper()
	var h hash.Hash
	switch a {
	case source.MD5:
		h = md5.New()
	case source.CRC64ECMA:
		h = crc64.New(crc64.MakeTable(crc64.ECMA))
	case source.CRC64NVME:
		h = crc64nvme.New()
	case source.CRC32C:
		h = crc32.New(crc32.MakeTable(crc32.Castagnoli))
	case source.CRC32:
		h = crc32.NewIEEE()
	case source.SHA256:
		h = sha256.New()
	default:
		t.Fatalf("unknown algorithm %d", a)
	}
	h.Write(b)
	return h.Sum(nil)
}

func testAwkwardSizes(t *testing.T, s *suite) {
	for _, n := range []int{0, 1, 4095, 4<<20 - 1, 4 << 20, 4<<20 + 1} {
		want := content(uint64(n), n)
		s.put(t, "size", want)
		o, err := s.src.Stat(t.Context(), "size")
		if err != nil || o.Size != int64(n) {
			t.Fatalf("stat of %d bytes: %+v, %v", n, o, err)
		}
		if got, err := read(t.Context(), s.src, o, 0, o.Size); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: read %d, %v", n, len(got), err)
		}
	}
}

// oddKeys are legal keys that break careless code.
func oddKeys() []string {
	return []string{"a b", "plus+and%20percent%", "why?really#not", "tab\tand\nnewline", "ümlaut/日本/🙂", "quote\"'&<>", "back\\slash",
		"a/b/c.d", ".hidden", "..two", "star*[x]", "~", "colon:semi;", "trailing ", " leading",
		strings.Repeat(strings.Repeat("k", 199)+"/", 5) + strings.Repeat("e", 24), // 1,024 bytes
		"marker/", "a//b", "/rooted", "dir/../up", "./dot"}
}

func testOddKeys(t *testing.T, s *suite) {
	want := map[string]source.Object{}
	for i, key := range oddKeys() {
		if s.NoKey != nil && s.NoKey(key) != "" {
			continue
		}
		body := content(uint64(i), 100+i)
		if strings.HasSuffix(key, "/") {
			body = nil // a directory marker
		}
		o, err := s.src.Put(t.Context(), key, bytes.NewReader(body), int64(len(body)))
		if err != nil {
			t.Errorf("put %q: %v", key, err)
			continue
		}
		got, err := s.src.Stat(t.Context(), key)
		if err != nil || got.Version != o.Version {
			t.Errorf("stat %q: %+v, %v", key, got, err)
			continue
		}
		off := min(1, got.Size)
		if b, err := read(t.Context(), s.src, got, off, got.Size-off); err != nil || !bytes.Equal(b, body[off:]) {
			t.Errorf("get %q: %d bytes, %v", key, len(b), err)
		}
		want[key] = got
	}
	for _, o := range s.list(t, "") {
		if w, ok := want[o.Key]; !ok || w.Version != o.Version || w.Size != o.Size {
			t.Errorf("listed %+v, stat says %+v", o, w)
		}
		delete(want, o.Key)
		if err := s.src.Delete(t.Context(), o.Key); err != nil {
			t.Errorf("delete %q: %v", o.Key, err)
		}
	}
	for key := range want {
		t.Errorf("not listed: %q", key)
	}
	if left := s.list(t, ""); len(left) > 0 {
		t.Errorf("left after deletion: %v", left)
	}
	if _, err := s.src.Stat(t.Context(), strings.Repeat("k", 1025)); err == nil {
		t.Error("a name of 1,025 bytes is found")
	}
}

func testMissing(t *testing.T, s *suite) {
	_, err := s.src.Stat(t.Context(), "no/such")
	wantKind(t, err, source.ErrNotFound, s.src.URL(), "no/such")
	_, err = read(t.Context(), s.src, source.Object{Key: "no/such", Size: 10, Version: "0123456789abcdef0123456789abcdef"}, 0, 10)
	wantKind(t, err, source.ErrNotFound, s.src.URL(), "no/such")
	if err := s.src.Delete(t.Context(), "no/such"); err != nil {
		t.Errorf("delete of what is not there: %v", err)
	}
}

func testDeleteIsIdempotent(t *testing.T, s *suite) {
	o := s.put(t, "gone", content(3, 1000))
	for range 2 {
		if err := s.src.Delete(t.Context(), "gone"); err != nil {
			t.Error(err)
		}
	}
	_, err := s.src.Stat(t.Context(), "gone")
	wantKind(t, err, source.ErrNotFound)
	_, err = read(t.Context(), s.src, o, 0, 1000)
	wantKind(t, err, source.ErrNotFound, "gone")
}

func testChangedUnderReader(t *testing.T, s *suite) {
	if s.PutByHand == nil {
		t.Skip("the fixture cannot put past the source")
	}
	before, after := content(4, 9<<20), content(5, 9<<20)
	o := s.put(t, "k", before)
	b, err := s.src.Get(t.Context(), o, 0, o.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	head := make([]byte, 1000)
	if _, err := io.ReadFull(b, head); err != nil {
		t.Fatal(err)
	}
	s.PutByHand(t, "k", after)
	// What was being read goes on at its version, or fails.
	rest, err := io.ReadAll(b)
	if got := append(head, rest...); !bytes.Equal(got, before[:len(got)]) || err == nil && len(got) != len(before) {
		t.Errorf("read %d bytes that are not the version's, %v", len(got), err)
	}
	for _, r := range [][2]int64{{0, o.Size}, {0, 1}, {4 << 20, 4 << 20}, {o.Size - 1, 1}} {
		got, err := read(t.Context(), s.src, o, r[0], r[1])
		wantKind(t, err, source.ErrChanged, "k")
		if len(got) > 0 {
			t.Errorf("%d bytes of a version that is gone", len(got))
		}
	}
	now, err := s.src.Stat(t.Context(), "k")
	if err != nil || now.Version == o.Version {
		t.Errorf("stat after the change: %+v, %v", now, err)
	}
	// Shorter than the range: a store may look at the range first.
	s.PutByHand(t, "k", after[:10])
	_, err = read(t.Context(), s.src, o, 8<<20, 100)
	wantKind(t, err, source.ErrChanged, "k")
}

func testCanceled(t *testing.T, s *suite) {
	o := s.put(t, "k", content(6, 1000))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, statErr := s.src.Stat(ctx, "k")
	_, getErr := read(ctx, s.src, o, 0, 1000)
	_, putErr := s.src.Put(ctx, "never", bytes.NewReader(content(7, 1000)), 1000)
	listErr := s.src.List(ctx, "", func(source.Object) error { return nil })
	for op, err := range map[string]error{"stat": statErr, "get": getErr, "put": putErr, "list": listErr} {
		if !errors.Is(err, context.Canceled) || source.Temporary(err) {
			t.Errorf("%s with a canceled context: %v", op, err)
		}
	}
	_, err := s.src.Stat(t.Context(), "never")
	wantKind(t, err, source.ErrNotFound)
}
