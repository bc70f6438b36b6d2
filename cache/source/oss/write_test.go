package oss

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/oss/osstest"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
)

func TestWriter(t *testing.T) {
	_, b := start(t, osstest.Options{}, deps{})
	sourcetest.Writer(t, b, false)
}

// A conditional put whose answer is lost is tried again, and meets an object with its very bytes: its own, and
// so it succeeded, or another writer's, and so it did not. Two writers are never told both that they were first.
func TestOfTwoConditionalPutsOfTheSameBytesOneIsTold(t *testing.T) {
	for size, op := range map[int]string{0: "PutObject", 5000: "PutObject", 3*smallPart + 1: "CompleteMultipartUpload"} {
		s, b := start(t, osstest.Options{}, deps{part: smallPart})
		attributes := source.Attributes{Metadata: map[string]string{"k": "v"}}
		put := func(key string) (source.Object, error) {
			return b.PutObject(t.Context(), key, bytes.NewReader(bytesOf(size)), int64(size), source.WriteOptions{Attributes: attributes, IfAbsent: true})
		}
		f := s.Inject(osstest.Fault{Kind: osstest.LoseAnswer, Op: op, Times: 1})
		o, err := put("k")
		if err != nil || f.Hits() != 1 {
			t.Errorf("%d bytes: done, and not told: %v", size, err)
		}
		at, a, err := b.Describe(t.Context(), "k")
		if err != nil || at.Version != o.Version || !maps.Equal(a.Metadata, attributes.Metadata) {
			t.Errorf("%d bytes: described as %+v with %v, %v; put as %+v", size, at, a, err, o)
		}
		f = s.Inject(osstest.Fault{Kind: osstest.Reset, Op: op, Times: 1})
		if _, err := put("k"); !errors.Is(err, source.ErrChanged) || f.Hits() != 1 {
			t.Errorf("%d bytes: another was first with the same bytes: %v", size, err)
		}
		if left := s.Uploads(testBucket); left != 0 {
			t.Errorf("%d uploads are left", left)
		}
	}
}

// With versioning OSS puts over whatever is there, so nobody is told that a put was conditional: no request is made where
// that is known before, and otherwise the answer tells.
func TestAConditionalPutIntoABucketWithVersioningIsRefused(t *testing.T) {
	for _, status := range []string{"Enabled", "Suspended"} {
		for _, size := range []int{5000, 3*smallPart + 1} {
			s, b := start(t, osstest.Options{}, deps{part: smallPart})
			put := func(key string) error {
				_, err := b.PutObject(t.Context(), key, bytes.NewReader(bytesOf(size)), int64(size), source.WriteOptions{IfAbsent: true})
				return err
			}
			refused := func(what string, err error) {
				t.Helper()
				if !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "versioning") {
					t.Errorf("%s, %d bytes, %s: %v", status, size, what, err)
				}
			}
			for _, key := range []string{"a", "b"} {
				if err := put(key); err != nil {
					t.Fatal(err)
				}
			}
			if n := s.Count("GetBucketVersioning"); n != 1 {
				t.Errorf("it was asked %d times", n)
			}
			s.SetVersioning(testBucket, status)
			refused("turned on since", put("a")) // as the answer tells
			refused("known by an answer", put("c"))
			if _, ok := s.Object(testBucket, "c"); ok {
				t.Error("it was put all the same")
			}
			var err error
			if b, err = open(configOf(t, s), deps{part: smallPart}); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				refused("asked", put("c"))
			}
			_, err = b.CompleteUpload(t.Context(), "c", "none", nil, source.WriteOptions{IfAbsent: true})
			refused("completed", err)
			if _, ok := s.Object(testBucket, "c"); ok || s.Count("GetBucketVersioning") != 2 {
				t.Errorf("there: %v, asked %d times", ok, s.Count("GetBucketVersioning"))
			}
			if _, err := b.PutObject(t.Context(), "c", bytes.NewReader(bytesOf(size)), int64(size), source.WriteOptions{}); err != nil {
				t.Errorf("without a condition: %v", err)
			}
		}
	}
}

// Credentials that may not ask do not make a bucket one with versioning, nor one without; a store that does not answer
// is asked again.
func TestWhoMayNotAskForVersioning(t *testing.T) {
	put := func(b *Bucket, key string) error {
		_, err := b.PutObject(t.Context(), key, strings.NewReader("x"), 1, source.WriteOptions{IfAbsent: true})
		return err
	}
	s, b := start(t, osstest.Options{}, deps{})
	s.Inject(osstest.Fault{Kind: osstest.Unavailable, Op: "GetBucketVersioning", Times: 2})
	s.Inject(osstest.Fault{Kind: osstest.Refused, Op: "GetBucketVersioning"})
	if err := put(b, "k"); err != nil {
		t.Error(err)
	}
	if err := put(b, "k"); !errors.Is(err, source.ErrChanged) {
		t.Errorf("it is there: %v", err)
	}
	if n := s.Count("GetBucketVersioning"); n != 3 {
		t.Errorf("it was asked %d times", n)
	}
	s.SetVersioning(testBucket, "Enabled")
	complete := func(b *Bucket, key string) error {
		upload, err := b.BeginUpload(t.Context(), key, source.Attributes{})
		if err != nil {
			return err
		}
		part, err := b.PutPart(t.Context(), key, upload, 1, strings.NewReader("x"), 1, source.Sums{})
		if err != nil {
			return err
		}
		_, err = b.CompleteUpload(t.Context(), key, upload, []source.Part{part}, source.WriteOptions{IfAbsent: true})
		return err
	}
	for _, write := range []func(*Bucket, string) error{put, put, complete} { // of these none is told that it was first
		b, err := open(configOf(t, s), deps{})
		if err != nil {
			t.Fatal(err)
		}
		if err := write(b, "lock"); !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "versioning") {
			t.Errorf("%v", err)
		}
	}
}

// Who began an upload for a put is told whether it is gone, so that somebody aborts one that is not.
func TestAPutTellsWhetherItsUploadIsGone(t *testing.T) {
	denied := func(op string) osstest.Fault { return osstest.Fault{Kind: osstest.Refused, Op: op} }
	for _, c := range []struct {
		what   string
		faults []osstest.Fault
		fails  bool
		gone   bool
		left   int
	}{
		{"it succeeds", []osstest.Fault{denied("AbortMultipartUpload")}, false, true, 0},
		{"it fails", []osstest.Fault{denied("UploadPart")}, true, true, 0},
		{"it fails and cannot abort", []osstest.Fault{denied("UploadPart"), denied("AbortMultipartUpload")}, true, false, 1},
		{"it finds its very bytes there", []osstest.Fault{{Kind: osstest.LoseAnswer, Op: "CompleteMultipartUpload", Times: 1}}, false, false, 0},
	} {
		s, b := start(t, osstest.Options{}, deps{part: smallPart})
		content := bytesOf(3*smallPart + 1)
		if _, err := s.Put(testBucket, "k", content); err != nil {
			t.Fatal(err)
		}
		for _, f := range c.faults {
			s.Inject(f)
		}
		var begun string
		told := 0
		_, err := b.PutObject(t.Context(), "k", bytes.NewReader(content), int64(len(content)), source.WriteOptions{
			Begun: func(upload string) { begun = upload },
			Ended: func(upload string, gone bool) {
				if told++; upload != begun || gone != c.gone {
					t.Errorf("%s: ended %q of %q, gone %v", c.what, upload, begun, gone)
				}
			},
		})
		if told != 1 || (err != nil) != c.fails {
			t.Errorf("%s: told %d times, %v", c.what, told, err)
		}
		if n := s.Uploads(testBucket); n != c.left {
			t.Errorf("%s: %d uploads are left", c.what, n)
		}
	}
}

// A store that fails after it began to answer says so under a status of success. That is tried again, and what was there
// before is never told as what was made; nor is what something before the store answers.
func TestAFailureUnderAStatusOfSuccess(t *testing.T) {
	const failure = `<?xml version="1.0"?><Error><Code>InternalError</Code><Message>the store's own words</Message></Error>`
	from := source.Object{Key: "from", Size: 10, Version: "v"}
	for what, c := range map[string]struct {
		done string
		make func(context.Context, *Bucket) (source.Object, error)
	}{
		"copy": {`<CopyObjectResult><ETag>"made"</ETag></CopyObjectResult>`, func(ctx context.Context, b *Bucket) (source.Object, error) {
			return b.Copy(ctx, from, "k", source.WriteOptions{})
		}},
		"complete": {`<CompleteMultipartUploadResult><ETag>"made"</ETag></CompleteMultipartUploadResult>`,
			func(ctx context.Context, b *Bucket) (source.Object, error) {
				return b.CompleteUpload(ctx, "k", "u", []source.Part{{Number: 1, Version: "v"}}, source.WriteOptions{})
			}},
	} {
		var asked atomic.Int32
		answers := []string{failure, failure, c.done}
		b := withHandler(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.Header().Set("ETag", `"old"`)
				w.Header().Set("Last-Modified", time.Unix(1e9, 0).UTC().Format(http.TimeFormat))
				w.Header().Set("Content-Length", "10")
				return
			}
			fmt.Fprint(w, answers[min(int(asked.Add(1)), len(answers))-1])
		})
		failed := 0
		o, err := c.make(source.NotifyTries(t.Context(), func(err error) {
			if failed++; !source.Temporary(err) || !strings.Contains(err.Error(), "InternalError") {
				t.Errorf("%s: %v", what, err)
			}
		}), b)
		if err != nil || o.Version != "made" || asked.Load() != 3 || failed != 2 {
			t.Errorf("%s: %+v after %d requests of which %d failed, %v", what, o, asked.Load(), failed, err)
		}
		answers = []string{"<html>log in</html>"}
		if o, err := c.make(t.Context(), b); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("%s: a page of HTML: %+v, %v", what, o, err)
		}
	}
}

// What marks a put as this one is in the place of a user's own metadata of that name.
func TestAUsersMetadataIsNoMark(t *testing.T) {
	b := withHandler(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet { // whether it has versioning: this store does not know
			return
		}
		if got := r.Header.Values("X-Oss-Meta-Stepcache-Put"); len(got) != 1 || got[0] == "mine" {
			t.Errorf("marked as %q", got)
		}
		w.Header().Set("ETag", `"v"`)
	})
	for range 20 { // a map gives its entries in another order each time
		if _, err := b.PutObject(t.Context(), "k", strings.NewReader("x"), 1, source.WriteOptions{
			Attributes: source.Attributes{Metadata: map[string]string{"stepcache-put": "mine"}}, IfAbsent: true}); err != nil {
			t.Fatal(err)
		}
	}
}
