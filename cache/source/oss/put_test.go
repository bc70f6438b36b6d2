package oss

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/oss/osstest"
)

// smallPart is OSS's least part, so that little content makes many.
const smallPart = 100 << 10

func TestPutSizes(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{part: smallPart})
	for _, n := range []int{0, 1, smallPart - 1, smallPart, smallPart + 1, 2*smallPart - 1, 2 * smallPart, 2*smallPart + 1, 9*smallPart + 7} {
		want := bytesOf(n)
		for _, size := range []int64{int64(n), -1} {
			key := fmt.Sprintf("%d of %d", n, size)
			// A reader that gives little at a time.
			o, err := b.Put(t.Context(), key, iotest.OneByteReader(bytes.NewReader(want)), size)
			if n > 2*smallPart {
				o, err = b.Put(t.Context(), key, iotest.HalfReader(bytes.NewReader(want)), size)
			}
			if err != nil {
				t.Fatalf("%s: %v", key, err)
			}
			got, _ := s.Object(testBucket, key)
			if !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes are stored, of other content", key, len(got))
			}
			st := mustStat(t, b, key)
			if o.Version == "" || o.Version != st.Version || o.Size != st.Size || o.Size != int64(n) ||
				!bytes.Equal(o.Digest.Sum, crcDigest(crc64.Checksum(want, ecma)).Sum) || o.ModTime.IsZero() {
				t.Errorf("%s: put says %+v, stat %+v", key, o, st)
			}
		}
	}
	if n := s.Uploads(testBucket); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
	for _, seen := range s.Seen() {
		if (seen.Op == "PutObject" || seen.Op == "UploadPart") && seen.Header.Get("Content-MD5") == "" {
			t.Errorf("%s of %s without a digest", seen.Op, seen.Key)
		}
	}
}

// TestPutThatFails: no object appears, one that was there stays, and no parts are left.
func TestPutThatFails(t *testing.T) {
	content := bytesOf(5*smallPart + 5)
	broken := errors.New("the step died")
	for _, c := range []struct {
		name  string
		r     func() io.Reader
		size  int64
		fault osstest.Fault
		want  error
	}{
		{"reader fails at once", func() io.Reader { return iotest.ErrReader(broken) }, -1, osstest.Fault{}, broken},
		{"reader fails later", func() io.Reader { return io.MultiReader(bytes.NewReader(content), iotest.ErrReader(broken)) }, -1, osstest.Fault{}, broken},
		// As the body of an upload whose client died.
		{"reader breaks off", func() io.Reader {
			return io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(io.ErrUnexpectedEOF))
		}, -1, osstest.Fault{}, io.ErrUnexpectedEOF},
		{"reader breaks off later", func() io.Reader {
			return io.MultiReader(bytes.NewReader(content), iotest.ErrReader(io.ErrUnexpectedEOF))
		}, -1, osstest.Fault{}, io.ErrUnexpectedEOF},
		{"reader gives nothing", func() io.Reader { return readerFunc(func([]byte) (int, error) { return 0, nil }) }, -1, osstest.Fault{}, io.ErrNoProgress},
		{"reader is short", func() io.Reader { return bytes.NewReader(content) }, int64(len(content)) + 1, osstest.Fault{}, source.ErrInvalid},
		{"reader is long", func() io.Reader { return bytes.NewReader(content) }, int64(len(content)) - 1, osstest.Fault{}, source.ErrInvalid},
		{"small reader is short", func() io.Reader { return strings.NewReader("abc") }, 4, osstest.Fault{}, source.ErrInvalid},
		{"small reader is long", func() io.Reader { return strings.NewReader("abc") }, 2, osstest.Fault{}, source.ErrInvalid},
		{"reader is not empty", func() io.Reader { return strings.NewReader("abc") }, 0, osstest.Fault{}, source.ErrInvalid},
		{"a part is refused", func() io.Reader { return bytes.NewReader(content) }, -1,
			osstest.Fault{Kind: osstest.Refused, Op: "UploadPart", Skip: 2, Times: 1}, source.ErrDenied},
		{"completion is refused", func() io.Reader { return bytes.NewReader(content) }, -1,
			osstest.Fault{Kind: osstest.Refused, Op: "CompleteMultipartUpload"}, source.ErrDenied},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s, b := start(t, osstest.Options{}, deps{part: smallPart})
			if _, err := s.Put(testBucket, "before", []byte("kept")); err != nil {
				t.Fatal(err)
			}
			for _, key := range []string{"before", "new"} {
				if c.fault.Op != "" {
					defer s.Inject(c.fault).Remove()
				}
				if o, err := b.Put(t.Context(), key, c.r(), c.size); !errors.Is(err, c.want) || !strings.Contains(err.Error(), key) {
					t.Errorf("put %s: %+v, %v", key, o, err)
				}
			}
			if got, ok := s.Object(testBucket, "before"); !ok || string(got) != "kept" {
				t.Errorf("the object from before is now %d bytes, there %v", len(got), ok)
			}
			if _, ok := s.Object(testBucket, "new"); ok {
				t.Error("an object has appeared")
			}
			if n := s.Uploads(testBucket); n != 0 {
				t.Errorf("%d uploads are left", n)
			}
		})
	}
}

// TestPutCancelled: the parts are removed although the context has ended.
func TestPutCancelled(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{part: smallPart})
	ctx, cancel := context.WithCancel(t.Context())
	r := io.MultiReader(bytes.NewReader(bytesOf(3*smallPart)), readerFunc(func(p []byte) (int, error) {
		cancel()
		return len(p), nil // and goes on for ever
	}))
	if _, err := b.Put(ctx, "k", r, -1); !errors.Is(err, context.Canceled) || source.Temporary(err) {
		t.Errorf("put: %v", err)
	}
	if _, ok := s.Object(testBucket, "k"); ok || s.Uploads(testBucket) != 0 {
		t.Errorf("object there: %v, uploads left: %d", ok, s.Uploads(testBucket))
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestPutThroughFaults: what the bucket does to single requests is overcome, since their bytes are held.
func TestPutThroughFaults(t *testing.T) {
	for _, kind := range []osstest.Kind{osstest.Unavailable, osstest.SlowDown, osstest.InternalError, osstest.Reset,
		osstest.FlipRequest, osstest.LoseAnswer} {
		for _, op := range []string{"PutObject", "InitiateMultipartUpload", "UploadPart", "CompleteMultipartUpload"} {
			if kind == osstest.FlipRequest && op != "PutObject" && op != "UploadPart" {
				continue // has no content to protect
			}
			t.Run(fmt.Sprint(op, kind), func(t *testing.T) {
				t.Parallel()
				s, b := start(t, osstest.Options{}, deps{part: smallPart})
				n := 4*smallPart + 1
				if op == "PutObject" {
					n = 5000
				}
				want := bytesOf(n)
				f := s.Inject(osstest.Fault{Kind: kind, Op: op, Times: 2, After: min(1000, int64(kind)/int64(osstest.FlipRequest)*1000)})
				o, err := b.Put(t.Context(), "k", bytes.NewReader(want), -1)
				if err != nil {
					t.Fatal(err)
				}
				got, _ := s.Object(testBucket, "k")
				if !bytes.Equal(got, want) || o.Size != int64(n) || o.Version != mustStat(t, b, "k").Version {
					t.Errorf("%d bytes are stored, put says %+v", len(got), o)
				}
				if f.Hits() == 0 {
					t.Error("the fault did not strike")
				}
				// An upload whose beginning was not answered has no name to remove it by, nor any parts.
				if left := s.Uploads(testBucket); left != 0 && !(op == "InitiateMultipartUpload" && kind == osstest.LoseAnswer) {
					t.Errorf("%d uploads are left", left)
				}
			})
		}
	}
}

// TestPutIsWhatTheStoreHolds: a store that says it holds other bytes is not believed to hold these.
func TestPutIsWhatTheStoreHolds(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{part: smallPart})
	s.Inject(osstest.Fault{Kind: osstest.WrongDigest, Op: "CompleteMultipartUpload"})
	_, err := b.Put(t.Context(), "k", bytes.NewReader(bytesOf(2*smallPart)), -1)
	if !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), "other bytes") {
		t.Errorf("put: %v", err)
	}
	if _, ok := s.Object(testBucket, "k"); ok {
		t.Error("the object is still there")
	}
}

// TestPutMemoryIsConstant: a long body of unknown length takes no more memory than the parts under way.
func TestPutMemoryIsConstant(t *testing.T) {
	s := osstest.StartT(t, osstest.Options{Dir: t.TempDir()}) // the server's copy is on disk
	s.MakeBucket(testBucket)
	b, err := open(configOf(t, s), deps{part: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	const n = 48 << 20
	var peak uint64
	zeros := readerFunc(func(p []byte) (int, error) { clear(p); return len(p), nil })
	seen := 0
	sampled := readerFunc(func(p []byte) (int, error) {
		if seen++; seen%12 == 0 {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak = max(peak, m.HeapAlloc)
		}
		return zeros(p)
	})
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := b.Put(t.Context(), "k", io.LimitReader(sampled, n), -1); err != nil {
		t.Fatal(err)
	}
	if used := int64(peak) - int64(before.HeapAlloc); used > 24<<20 {
		t.Errorf("a put of %d MiB in parts of 1 MiB held %d MiB", n>>20, used>>20)
	}
}

func TestPartSizes(t *testing.T) {
	for size, want := range map[int64]int64{
		-1: partSize, partSize * 2: partSize, partSize * maxParts: partSize, partSize*maxParts + 1: partSize + 1<<20,
		5 << 40: 525 << 20,
	} {
		got := int64(partOf(size, partSize))
		if got != want || size > 0 && (size+got-1)/got > maxParts {
			t.Errorf("an object of %d bytes goes in parts of %d, want %d", size, got, want)
		}
	}
}

// TestBadKeys: what OSS cannot hold is refused before a request is made of it.
func TestBadKeys(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{})
	for _, key := range []string{"", strings.Repeat("k", 1024), "\xff\xfe"} {
		_, err1 := b.Put(t.Context(), key, strings.NewReader("x"), 1)
		_, err2 := b.Stat(t.Context(), key)
		_, err3 := b.Get(t.Context(), source.Object{Key: key, Size: 1, Version: "v"}, 0, 1)
		err4 := b.Delete(t.Context(), key)
		for _, err := range []error{err1, err2, err3, err4} {
			if !errors.Is(err, source.ErrInvalid) || len(err.Error()) > 300 {
				t.Errorf("key %.20q: %v", key, err)
			}
		}
	}
	if n := len(s.Seen()); n != 0 {
		t.Errorf("%d requests were made", n)
	}
}
