package s3_test

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
	"github.com/stepcache/stepcache/cache/source/s3"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
	"github.com/stepcache/stepcache/test/bucket"
)

func TestWriter(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	b, err := s3.Open(t.Context(), fixture(t, s))
	if err != nil {
		t.Fatal(err)
	}
	sourcetest.Writer(t, b, true)
}

// A conditional put whose answer is lost is tried again, and meets an object with its very bytes: its own, and
// so it succeeded, or another writer's, and so it did not. Two writers are never told both that they were first.
func TestOfTwoConditionalPutsOfTheSameBytesOneIsTold(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	config := fixture(t, s)
	other, err := s3.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	f := bucket.Faults(t, s)
	config.Endpoint = f.Endpoint()
	b, err := s3.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	full := map[string]string{"k": strings.Repeat("v", 2040)}
	for _, c := range []struct {
		what     string
		size     int
		mine     bool
		metadata map[string]string
		want     error
	}{
		{"whole, mine", 10, true, map[string]string{"k": "v"}, nil},
		{"whole, another's", 10, false, map[string]string{"k": "v"}, source.ErrChanged},
		{"empty, mine", 0, true, nil, nil},
		{"empty, another's", 0, false, nil, source.ErrChanged},
		{"in parts, mine", 20 << 20, true, map[string]string{"k": "v"}, nil},
		{"in parts, another's", 20 << 20, false, map[string]string{"k": "v"}, source.ErrChanged},
		// No room for what would tell: the cautious answer.
		{"whole, mine, with all the metadata there may be", 10, true, full, source.ErrChanged},
	} {
		for _, replaces := range []bool{false, true} {
			key := fmt.Sprintf("%s/%v", c.what, replaces)
			put := func(w source.Writer) (source.Object, error) {
				return w.PutObject(t.Context(), key, bytes.NewReader(make([]byte, c.size)), int64(c.size), source.WriteOptions{
					Attributes: source.Attributes{Metadata: c.metadata}, IfAbsent: true})
			}
			if replaces {
				before, err := other.PutObject(t.Context(), key, strings.NewReader("before"), 6, source.WriteOptions{})
				if err != nil {
					t.Fatal(err)
				}
				put = func(w source.Writer) (source.Object, error) {
					return w.PutObject(t.Context(), key, bytes.NewReader(make([]byte, c.size)), int64(c.size), source.WriteOptions{
						Attributes: source.Attributes{Metadata: c.metadata}, IfMatch: before.Version})
				}
			}
			var lost atomic.Bool
			f.Set(func(r *http.Request) bucket.Fault {
				q := r.URL.Query()
				commits := r.Method == http.MethodPut && !q.Has("uploadId") || r.Method == http.MethodPost && q.Has("uploadId")
				if !commits || lost.Swap(true) {
					return bucket.Fault{}
				}
				if c.mine {
					return bucket.Fault{Header: func(http.Header) { panic(http.ErrAbortHandler) }} // done, and not told
				}
				if _, err := put(other); err != nil {
					t.Errorf("%s: another's put: %v", key, err)
				}
				return bucket.Fault{Reset: true}
			})
			o, err := put(b)
			f.Set(nil)
			if !lost.Load() || !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Errorf("%s: %v, want %v", key, err, c.want)
			}
			at, attributes, derr := b.Describe(t.Context(), key)
			if derr != nil || err == nil && at.Version != o.Version || at.Size != int64(c.size) || !maps.Equal(attributes.Metadata, c.metadata) {
				t.Errorf("%s: described as %+v with %d metadata, %v; put as %+v", key, at, len(attributes.Metadata), derr, o)
			}
			if left, err := other.Uploads(t.Context(), "", "", 10); err != nil || len(left) > 0 {
				t.Errorf("%s: uploads are left: %v, %v", key, left, err)
			}
		}
	}
}

// Who began an upload for a put is told whether it is gone, so that somebody aborts one that is not.
func TestAPutTellsWhetherItsUploadIsGone(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	config := fixture(t, s)
	f := bucket.Faults(t, s)
	config.Endpoint = f.Endpoint()
	b, err := s3.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	denied := bucket.Fault{Status: 403, Code: "AccessDenied"}
	for _, c := range []struct {
		what        string
		part, abort bucket.Fault
		gone        bool
	}{
		{"it succeeds", bucket.Fault{}, denied, true},
		{"it fails", denied, bucket.Fault{}, true},
		{"it fails and there is no upload", denied, bucket.Fault{Status: 404, Code: "NoSuchUpload"}, true},
		{"it fails and cannot abort", denied, denied, false},
	} {
		f.Set(func(r *http.Request) bucket.Fault {
			switch q := r.URL.Query(); {
			case r.Method == http.MethodPut && q.Get("partNumber") == "2":
				return c.part
			case r.Method == http.MethodDelete && q.Has("uploadId"):
				return c.abort
			}
			return bucket.Fault{}
		})
		var begun string
		told := 0
		_, err := b.PutObject(t.Context(), "k", bytes.NewReader(make([]byte, 20<<20)), 20<<20, source.WriteOptions{
			Begun: func(upload string) { begun = upload },
			Ended: func(upload string, gone bool) {
				if told++; upload != begun || gone != c.gone {
					t.Errorf("%s: ended %q of %q, gone %v", c.what, upload, begun, gone)
				}
			},
		})
		if told != 1 || (err == nil) != (c.part.Status == 0) {
			t.Errorf("%s: told %d times, %v", c.what, told, err)
		}
	}
}

// A store that fails after it began to answer says so under a status of success. That is tried again, and what was there
// before is never told as what was made.
func TestAFailureUnderAStatusOfSuccess(t *testing.T) {
	const failed = `<?xml version="1.0"?><Error><Code>InternalError</Code><Message>the store's own words</Message></Error>`
	from := source.Object{Key: "from", Size: 10, Version: etag}
	for what, c := range map[string]struct {
		done string
		make func(context.Context, *s3.Bucket) (source.Object, error)
	}{
		"copy": {`<CopyObjectResult><ETag>"made"</ETag></CopyObjectResult>`, func(ctx context.Context, b *s3.Bucket) (source.Object, error) {
			return b.Copy(ctx, from, "k", source.WriteOptions{})
		}},
		"complete": {`<CompleteMultipartUploadResult><Bucket>bucket</Bucket><Key>k</Key><ETag>"made"</ETag></CompleteMultipartUploadResult>`,
			func(ctx context.Context, b *s3.Bucket) (source.Object, error) {
				return b.CompleteUpload(ctx, "k", "u", []source.Part{{Number: 1, Version: etag}}, source.WriteOptions{})
			}},
	} {
		var asked atomic.Int32
		b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.Header().Set("ETag", `"old"`)
				w.Header().Set("Last-Modified", time.Unix(1e9, 0).UTC().Format(http.TimeFormat))
				w.Header().Set("Content-Length", "10")
				return
			}
			if asked.Add(1) <= 2 {
				fmt.Fprint(w, failed)
				return
			}
			fmt.Fprint(w, c.done)
		})
		var errs []error
		o, err := c.make(source.NotifyTries(t.Context(), func(err error) { errs = append(errs, err) }), b)
		if err != nil || o.Version != "made" || asked.Load() != 3 {
			t.Errorf("%s: %+v after %d requests, %v", what, o, asked.Load(), err)
		}
		for _, err := range errs {
			if !source.Temporary(err) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if len(errs) != 2 {
			t.Errorf("%s: %d tries failed", what, len(errs))
		}
	}
}

// What marks a put as this one is in the place of a user's own metadata of that name.
func TestAUsersMetadataIsNoMark(t *testing.T) {
	b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Values("X-Amz-Meta-Stepcache-Put"); len(got) != 1 || got[0] == "mine" {
			t.Errorf("marked as %q", got)
		}
		w.Header().Set("ETag", `"`+etag+`"`)
	})
	for range 20 { // a map gives its entries in another order each time
		if _, err := b.PutObject(t.Context(), "k", strings.NewReader("x"), 1, source.WriteOptions{
			Attributes: source.Attributes{Metadata: map[string]string{"stepcache-put": "mine"}}, IfAbsent: true}); err != nil {
			t.Fatal(err)
		}
	}
}
