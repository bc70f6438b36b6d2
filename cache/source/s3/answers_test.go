package s3_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/s3"
	"github.com/stepcache/stepcache/test/bucket"
)

// answering opens a bucket whose store is the handler, for answers that the real server never gives.
func answering(t *testing.T, c source.Config, h http.HandlerFunc) *s3.Bucket {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	c.URL, c.Endpoint, c.Anonymous = "s3://bucket", server.URL, true
	if c.Region == "" {
		c.Region = "us-east-1"
	}
	b, err := s3.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func get(ctx context.Context, b source.Source, o source.Object, off, length int64) ([]byte, source.Digest, error) {
	body, err := b.Get(ctx, o, off, length)
	if err != nil {
		return nil, source.Digest{}, err
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	return got, body.Digest, err
}

const etag = "0123456789abcdef0123456789abcdef"

// Keys reach the store as they are, whatever a client library would like to clean up.
func TestKeysAreSentVerbatim(t *testing.T) {
	var seen atomic.Value
	b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
		seen.Store(strings.TrimPrefix(r.URL.Path, "/bucket/"))
		w.Header().Set("ETag", `"`+etag+`"`)
		w.Header().Set("Last-Modified", time.Unix(1e9, 0).UTC().Format(http.TimeFormat))
		w.Header().Set("Content-Length", "1")
	})
	for _, key := range []string{"a//b", "/rooted", "dir/../up", "./dot", "a/", "..", "a b+c%20%", "x?y#z", "new\nline", "日本", "//"} {
		if _, err := b.Stat(t.Context(), key); err != nil || seen.Load() != key {
			t.Errorf("%q reached the store as %q, %v", key, seen.Load(), err)
		}
	}
}

func TestDigestIsOfTheWholeObjectOrNone(t *testing.T) {
	md5 := []byte("\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef")
	for name, c := range map[string]struct {
		header      map[string]string
		whole, part source.Digest
	}{
		"single part":    {map[string]string{"ETag": etag}, source.Digest{Algorithm: source.MD5, Sum: md5}, source.Digest{Algorithm: source.MD5, Sum: md5}},
		"several parts":  {map[string]string{"ETag": etag + "-2"}, source.Digest{}, source.Digest{}},
		"KMS":            {map[string]string{"ETag": etag, "x-amz-server-side-encryption": "aws:kms"}, source.Digest{}, source.Digest{}},
		"double KMS":     {map[string]string{"ETag": etag, "x-amz-server-side-encryption": "aws:kms:dsse"}, source.Digest{}, source.Digest{}},
		"the store's":    {map[string]string{"ETag": etag, "x-amz-server-side-encryption": "AES256"}, source.Digest{Algorithm: source.MD5, Sum: md5}, source.Digest{Algorithm: source.MD5, Sum: md5}},
		"customer's key": {map[string]string{"ETag": etag, "x-amz-server-side-encryption-customer-algorithm": "AES256"}, source.Digest{}, source.Digest{}},
		"not hex":        {map[string]string{"ETag": strings.Repeat("z", 32)}, source.Digest{}, source.Digest{}},
		"full checksum": {map[string]string{"ETag": etag + "-2", "x-amz-checksum-crc32c": "AQIDBA==", "x-amz-checksum-type": "FULL_OBJECT"},
			source.Digest{Algorithm: source.CRC32C, Sum: []byte{1, 2, 3, 4}}, source.Digest{}},
		"composite checksum": {map[string]string{"ETag": etag + "-2", "x-amz-checksum-crc32c": "AQIDBA==-2", "x-amz-checksum-type": "COMPOSITE"},
			source.Digest{}, source.Digest{}},
		"checksum of unknown type": {map[string]string{"ETag": etag + "-2", "x-amz-checksum-crc32c": "AQIDBA=="}, source.Digest{}, source.Digest{}},
		"broken checksum": {map[string]string{"ETag": etag, "x-amz-checksum-crc32c": "AQID", "x-amz-checksum-type": "FULL_OBJECT"},
			source.Digest{Algorithm: source.MD5, Sum: md5}, source.Digest{Algorithm: source.MD5, Sum: md5}},
	} {
		b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
			for k, v := range c.header {
				w.Header().Set(k, v)
			}
			w.Header().Set("ETag", `"`+c.header["ETag"]+`"`)
			http.ServeContent(w, r, "", time.Unix(1e9, 0), bytes.NewReader(make([]byte, 100)))
		})
		o, err := b.Stat(t.Context(), "k")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		_, whole, err := get(t.Context(), b, o, 0, 100)
		_, part, perr := get(t.Context(), b, o, 10, 20)
		if err != nil || perr != nil {
			t.Errorf("%s: %v, %v", name, err, perr)
		}
		if d := cmp.Diff([]source.Digest{c.whole, c.whole, c.part}, []source.Digest{o.Digest, whole, part}); d != "" {
			t.Errorf("%s: stat, whole, part:\n%s", name, d)
		}
	}
}

// A store that ignores If-Match or Range never yields other bytes than those asked for.
func TestStoreThatIgnoresWhatIsAsked(t *testing.T) {
	o := source.Object{Key: "k", Size: 1000, Version: etag}
	part := func(w http.ResponseWriter, n int) {
		w.Header().Set("Content-Range", "bytes 10-19/1000")
		w.WriteHeader(206)
		w.(http.Flusher).Flush()
		_, _ = w.Write(make([]byte, n))
	}
	for name, c := range map[string]struct {
		answer    func(w http.ResponseWriter)
		off, n    int64
		kind      error
		wantBytes int
	}{
		"all of it for a range": {func(w http.ResponseWriter) { _, _ = w.Write(make([]byte, 1000)) }, 10, 10, source.ErrInvalid, 0},
		"another version":       {func(w http.ResponseWriter) { w.Header().Set("ETag", `"other"`); _, _ = w.Write(make([]byte, 1000)) }, 0, 1000, source.ErrChanged, 0},
		"shorter":               {func(w http.ResponseWriter) { _, _ = w.Write(make([]byte, 999)) }, 0, 1000, source.ErrChanged, 0},
		"a part for the whole": {func(w http.ResponseWriter) {
			w.Header().Set("Content-Range", "bytes 0-999/1000")
			w.WriteHeader(206)
			_, _ = w.Write(make([]byte, 1000))
		}, 0, 1000, source.ErrInvalid, 0},
		"the wrong part": {func(w http.ResponseWriter) {
			w.Header().Set("Content-Range", "bytes 0-9/1000")
			w.WriteHeader(206)
			_, _ = w.Write(make([]byte, 10))
		}, 10, 10, source.ErrInvalid, 0},
		"a longer body": {func(w http.ResponseWriter) {
			w.Header().Set("Content-Range", "bytes 10-19/1000")
			w.WriteHeader(206)
			_, _ = w.Write(make([]byte, 30))
		}, 10, 10, source.ErrInvalid, 0},
		"no length": {func(w http.ResponseWriter) {
			w.(http.Flusher).Flush()
			_, _ = w.Write(make([]byte, 1000))
		}, 0, 1000, source.ErrInvalid, 0},
		"a part, no length":            {func(w http.ResponseWriter) { part(w, 10) }, 10, 10, nil, 10},
		"a part, no length, too long":  {func(w http.ResponseWriter) { part(w, 11) }, 10, 10, source.ErrInvalid, 0},
		"a part, no length, too short": {func(w http.ResponseWriter) { part(w, 9) }, 10, 10, source.ErrUnavailable, 9},
		"a page of HTML":               {func(w http.ResponseWriter) { w.Header().Del("ETag"); fmt.Fprint(w, "<html>log in</html>") }, 0, 1000, source.ErrUnversioned, 0},
	} {
		b := answering(t, source.Config{}, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("ETag", `"`+etag+`"`)
			w.Header().Set("Last-Modified", time.Unix(1e9, 0).UTC().Format(http.TimeFormat))
			c.answer(w)
		})
		got, _, err := get(t.Context(), b, o, c.off, c.n)
		if !errors.Is(err, c.kind) || len(got) != c.wantBytes {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// What is stored encoded is read as it is stored, also from a store that decodes it for who does not accept that. Of an
// object that is not, such a store tells no length to who does.
func TestStoreThatDecodes(t *testing.T) {
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	text := strings.Repeat("stepcache ", 1000)
	if _, err := io.WriteString(z, text); err != nil || z.Close() != nil {
		t.Fatal(err)
	}
	stubborn := false // decodes whatever is accepted
	b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"`+etag+`"`)
		w.Header().Set("Last-Modified", time.Unix(1e9, 0).UTC().Format(http.TimeFormat))
		encoded, accepted := strings.HasSuffix(r.URL.Path, "zipped"), r.Header.Get("Accept-Encoding") == "gzip"
		switch {
		case encoded && accepted && !stubborn:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(zipped.Bytes()))
		case !encoded && !accepted:
			http.ServeContent(w, r, "", time.Time{}, strings.NewReader(text))
		default:
			w.(http.Flusher).Flush()
			_, _ = io.WriteString(w, text)
		}
	})
	for key, want := range map[string]string{"zipped": zipped.String(), "plain": text} {
		o, err := b.Stat(t.Context(), key)
		if err != nil || o.Size != int64(len(want)) {
			t.Errorf("%s: %+v, %v, want %d bytes", key, o, err, len(want))
		}
		o = source.Object{Key: key, Size: int64(len(want)), Version: etag}
		if got, _, err := get(t.Context(), b, o, 0, o.Size); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v, want %d", key, len(got), err, len(want))
		}
		if got, _, err := get(t.Context(), b, o, 5, 20); err != nil || string(got) != want[5:25] {
			t.Errorf("a part of %s: %q, %v", key, got, err)
		}
	}
	stubborn = true
	o := source.Object{Key: "zipped", Size: int64(zipped.Len()), Version: etag}
	_, statErr := b.Stat(t.Context(), "zipped")
	_, _, getErr := get(t.Context(), b, o, 0, o.Size)
	_, _, partErr := get(t.Context(), b, o, 5, 20)
	for _, err := range []error{statErr, getErr, partErr} {
		if !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "Content-Encoding") {
			t.Errorf("a store that decodes all the same: %v", err)
		}
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	xml := func(status int, code, more string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			fmt.Fprintf(w, `<?xml version="1.0"?><Error><Code>%s</Code><Message>the store's own words</Message>%s</Error>`, code, more)
		}
	}
	for _, c := range []struct {
		answer http.HandlerFunc
		kind   error
		hint   string
	}{
		{xml(400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"), source.ErrInvalid, "set region: eu-west-3"},
		{xml(301, "PermanentRedirect", ""), source.ErrInvalid, "region"},
		{xml(403, "RequestTimeTooSkewed", ""), source.ErrDenied, "clock"},
		{xml(403, "InvalidObjectState", ""), source.ErrInvalid, "restore"},
		{xml(403, "AccessDenied", ""), source.ErrDenied, "anonymous"},
		{xml(404, "NoSuchBucket", ""), source.ErrNoBucket, "make the bucket"},
		{xml(404, "NoSuchKey", ""), source.ErrNotFound, "own words"},
		{xml(404, "XAdminUserNotFound", ""), source.ErrDenied, "anonymous"},
		{xml(404, "NoSuchAccount", ""), source.ErrInvalid, "own words"},
		{func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "default backend - 404", 404) }, source.ErrUnavailable, "the endpoint of an S3 store"},
		{xml(501, "NotImplemented", ""), source.ErrInvalid, "own words"},
		{xml(503, "ServiceUnavailable", ""), source.ErrUnavailable, "own words"},
		{xml(416, "InvalidRange", ""), source.ErrChanged, ""},
		{func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "Client sent an HTTP request to an HTTPS server.", 400)
		}, source.ErrInvalid, "leave http:// out"},
		{func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "<html>gateway", http.StatusGatewayTimeout)
		}, source.ErrUnavailable, ""},
	} {
		b := answering(t, source.Config{}, c.answer)
		_, _, err := get(t.Context(), b, source.Object{Key: "k", Size: 10, Version: etag}, 0, 5)
		if !errors.Is(err, c.kind) || !strings.Contains(fmt.Sprint(err), c.hint) || !strings.Contains(fmt.Sprint(err), b.URL()+"/k") {
			t.Errorf("want %v and %q: %v", c.kind, c.hint, err)
		}
	}
	for _, c := range []struct {
		answer http.HandlerFunc
		want   string
	}{
		{xml(400, "KeyTooLongError", ""), "KeyTooLongError: the store's own words"},
		{xml(403, "InvalidObjectState", ""), "InvalidObjectState: the store's own words"},
		{xml(400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"), ""},
		{xml(403, "AccessDenied", ""), ""},
		{xml(501, "NotImplemented", ""), ""},
		{func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<html>gateway", http.StatusBadRequest) }, ""},
		{func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(400)
			fmt.Fprintf(w, `<Error><Code>InvalidArgument</Code><Message>not of %s</Message></Error>`, r.Host)
		}, "InvalidArgument: "},
	} {
		b := answering(t, source.Config{}, c.answer)
		_, err := b.PutObject(t.Context(), "k", strings.NewReader("x"), 1, source.WriteOptions{})
		var told *source.Refusal
		if errors.As(err, &told) != (c.want != "") || told != nil && told.Error() != c.want {
			t.Errorf("want %q to be passed on, not %v, of: %v", c.want, told, err)
		}
	}
	refused, err := s3.Open(t.Context(), source.Config{URL: "s3://bucket", Endpoint: "http://127.0.0.1:1", Region: "r", Anonymous: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := refused.Stat(t.Context(), "k"); !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("nobody listens: %v", err)
	}
	closing := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	defer closing.Close()
	closed, err := s3.Open(t.Context(), source.Config{URL: "s3://bucket", Endpoint: closing.URL, Region: "r", Anonymous: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := closed.Stat(t.Context(), "k"); !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), "leave http:// out") {
		t.Errorf("a connection that is closed at once: %v", err)
	}
	tls := httptest.NewTLSServer(http.NotFoundHandler())
	defer tls.Close()
	untrusted, err := s3.Open(t.Context(), source.Config{URL: "s3://bucket", Endpoint: tls.URL, Region: "r", Anonymous: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := untrusted.Stat(t.Context(), "k"); !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a certificate of nobody: %v", err)
	}
}

// Why HEAD is refused is asked for where its answer, which has no body, cannot say so.
func TestHeadThatDoesNotSayWhy(t *testing.T) {
	xml := func(status int, code, more string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			fmt.Fprintf(w, `<Error><Code>%s</Code><Message>the store's own words</Message>%s</Error>`, code, more)
		}
	}
	for _, c := range []struct {
		head int
		get  http.HandlerFunc
		kind error
		want string
	}{
		{400, xml(400, "ExpiredToken", ""), source.ErrDenied, "ExpiredToken"},
		{400, xml(403, "RequestTimeTooSkewed", ""), source.ErrDenied, "clock"},
		{400, xml(400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"), source.ErrInvalid, "set region: eu-west-3"},
		{301, xml(301, "PermanentRedirect", "<Region>eu-west-3</Region>"), source.ErrInvalid, "set region: eu-west-3"},
		{400, xml(400, "InvalidRequest", ""), source.ErrInvalid, "own words"},
		{400, xml(404, "NoSuchBucket", ""), source.ErrNoBucket, "make the bucket"},
		{400, xml(503, "SlowDown", ""), source.ErrThrottled, "own words"},
		{400, xml(416, "InvalidRange", ""), source.ErrInvalid, "400 Bad Request to HEAD"},
		{400, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Last-Modified", time.Unix(1e9, 0).UTC().Format(http.TimeFormat))
			_, _ = w.Write(make([]byte, 1000))
		}, source.ErrInvalid, "400 Bad Request to HEAD"},
		{400, func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "Client sent an HTTP request to an HTTPS server.", 400)
		}, source.ErrInvalid, "leave http:// out"},
	} {
		b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.WriteHeader(c.head)
			} else {
				c.get(w, r)
			}
		})
		_, err := b.Stat(t.Context(), "k")
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "http://") != strings.Contains(c.want, "http://") {
			t.Errorf("want %v and %q: %v", c.kind, c.want, err)
		}
		var told *source.Refusal
		if errors.As(err, &told) != (c.want == "own words" && c.kind == source.ErrInvalid) {
			t.Errorf("%v is passed on of: %v", told, err)
		}
	}
	b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodHead {
			t.Errorf("%s %s, of what HEAD has said", r.Method, r.URL)
		}
		w.Header().Set("x-minio-error-code", "ExpiredToken")
		w.WriteHeader(400)
	})
	if _, err := b.Stat(t.Context(), "k"); !errors.Is(err, source.ErrDenied) {
		t.Errorf("a code in a header: %v", err)
	}
}

// That something is not there is said by the store alone: neither a proxy that has lost it nor a store that does not know
// the key any more makes a deletion done, or an object gone.
func TestNotFoundIsOfTheObject(t *testing.T) {
	xml := func(status int, code string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(status)
			if r.Method != http.MethodHead {
				fmt.Fprintf(w, `<Error><Code>%s</Code></Error>`, code)
			}
		}
	}
	untyped := func(w http.ResponseWriter, r *http.Request) { // as what a server takes for text
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(404)
		if r.Method != http.MethodHead {
			fmt.Fprint(w, `<Error><Code>NoSuchKey</Code></Error>`)
		}
	}
	empty := func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `<ListBucketResult><Name>bucket</Name></ListBucketResult>`)
	}
	for _, c := range []struct {
		name         string
		object, list http.HandlerFunc
		stat, delete error
	}{
		{"the key is not there", xml(404, "NoSuchKey"), empty, source.ErrNotFound, nil},
		{"the key is not there, and nothing may be listed", xml(404, "NoSuchKey"), xml(403, "AccessDenied"), source.ErrNotFound, nil},
		{"the key is not there, and the store does not list like this", xml(404, "NoSuchKey"), xml(400, "InvalidRequest"), source.ErrNotFound, nil},
		{"the key is not there, in an answer without a type", untyped, empty, source.ErrNotFound, nil},
		{"the bucket is not there", xml(404, "NoSuchBucket"), xml(404, "NoSuchBucket"), source.ErrNoBucket, source.ErrNoBucket},
		{"the access key is not known", xml(404, "XAdminUserNotFound"), xml(404, "XAdminUserNotFound"), source.ErrDenied, source.ErrDenied},
		{"a proxy without a store", http.NotFound, http.NotFound, source.ErrUnavailable, source.ErrUnavailable},
	} {
		b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Has("list-type") {
				c.list(w, r)
			} else {
				c.object(w, r)
			}
		})
		if _, err := b.Stat(t.Context(), "k"); !errors.Is(err, c.stat) {
			t.Errorf("%s: stat: %v", c.name, err)
		}
		if err := b.Delete(t.Context(), "k"); !errors.Is(err, c.delete) {
			t.Errorf("%s: delete: %v", c.name, err)
		}
	}
}

// Files put into the server's folder by hand have no ETag: they are refused, unless the mount says that
// size and time are enough.
func TestUnversionedObjects(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "stepcache-unversioned-")
	if err != nil {
		t.Skipf("no folder on /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := bucket.StartT(t, bucket.Options{Dir: dir})
	c := fixture(t, s)
	name := filepath.Join(dir, strings.TrimPrefix(c.URL, "s3://"), "k")
	if err := os.WriteFile(name, []byte("by hand"), 0o644); err != nil {
		t.Fatal(err)
	}
	strict, err := open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	var listed []source.Object
	list := func(src source.Source) source.Object {
		listed = nil
		if err := src.List(t.Context(), "", func(o source.Object) error { listed = append(listed, o); return nil }); err != nil || len(listed) != 1 {
			t.Fatalf("%v, %v", listed, err)
		}
		return listed[0]
	}
	o := list(strict)
	if o.Version != "" {
		t.Skipf("this server makes up the version %q of such a file", o.Version)
	}
	_, statErr := strict.Stat(t.Context(), "k")
	_, _, getErr := get(t.Context(), strict, o, 0, o.Size)
	for _, err := range []error{statErr, getErr} {
		if !errors.Is(err, source.ErrUnversioned) || !strings.Contains(err.Error(), "allowUnversioned") {
			t.Errorf("%v", err)
		}
	}
	c.AllowUnversioned = true
	lax, err := open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	o = list(lax)
	now, err := lax.Stat(t.Context(), "k")
	if err != nil || now.Version != o.Version || o.Version == "" {
		t.Errorf("stat says %+v, list said %+v, %v", now, o, err)
	}
	if got, _, err := get(t.Context(), lax, o, 0, o.Size); err != nil || string(got) != "by hand" {
		t.Errorf("%q, %v", got, err)
	}
	if got, _, err := get(t.Context(), lax, o, 3, 4); err != nil || string(got) != "hand" {
		t.Errorf("%q, %v", got, err)
	}
	if err := os.Chtimes(name, time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := get(t.Context(), lax, o, 0, o.Size); !errors.Is(err, source.ErrChanged) {
		t.Errorf("after a change: %v", err)
	}
}

// When the answer to the completion of an upload is lost, the object is there all the same, and the put
// that asks again must see that.
func TestPutWhoseCompletionIsLost(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	c := fixture(t, s)
	f := bucket.Faults(t, s)
	c.Endpoint = f.Endpoint()
	b, err := open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	var completions atomic.Int32
	f.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodPost && r.URL.Query().Has("uploadId") && completions.Add(1) == 1 {
			return bucket.Fault{Truncate: 1}
		}
		return bucket.Fault{}
	})
	want := bytes.Repeat([]byte("stepcache"), 4<<20)
	o, err := b.Put(t.Context(), "k", bytes.NewReader(want), int64(len(want)))
	if err != nil || completions.Load() < 2 {
		t.Fatalf("%+v after %d completions, %v", o, completions.Load(), err)
	}
	if got, _, err := get(t.Context(), b, o, 0, o.Size); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// The right region is used without being told, and a wrong one is corrected in words.
func TestRegion(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	c := fixture(t, s)
	c.Region = ""
	b, err := open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Put(t.Context(), "k", strings.NewReader("x"), 1); err != nil {
		t.Errorf("no region given: %v", err)
	}
	c.Region = "mars-north-1"
	if b, err = open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := b.List(t.Context(), "", func(source.Object) error { return nil }); !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "region") {
		t.Errorf("a wrong region: %v", err)
	}
}

// A large object passes through a Put in the memory of a few parts.
func TestPutHoldsFewPartsInMemory(t *testing.T) {
	var got atomic.Int64
	b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			t.Error(err)
		}
		switch q := r.URL.Query(); {
		case q.Has("uploads"):
			fmt.Fprint(w, `<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>`)
		case r.Method == http.MethodPut:
			got.Add(n)
			w.Header().Set("ETag", `"`+etag+`"`)
		default:
			fmt.Fprintf(w, `<CompleteMultipartUploadResult><Bucket>bucket</Bucket><Key>k</Key><ETag>"%s-1"</ETag></CompleteMultipartUploadResult>`, etag)
		}
	})
	const size = 384 << 20
	live := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, most, read := live(), uint64(0), 0
	content := readerFunc(func(p []byte) (int, error) {
		if read%(32<<20) == 0 {
			most = max(most, live())
		}
		n := min(len(p), size-read, 32<<20-read%(32<<20))
		read += n
		if n == 0 {
			return 0, io.EOF
		}
		return n, nil
	})
	o, err := b.Put(t.Context(), "k", content, -1)
	if err != nil || o.Size != size || got.Load() != size {
		t.Fatalf("%+v, %d bytes arrived, %v", o, got.Load(), err)
	}
	if grown := int64(most) - int64(before); grown > 128<<20 {
		t.Errorf("%d bytes live while putting %d", grown, size)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Of a bulk delete only those keys are gone that the store names so: not those that it refuses, nor those that it, or
// the client library, passes over.
func TestABulkDeleteTellsOnlyWhatTheStoreSaysIsGone(t *testing.T) {
	answer := func(b *s3.Bucket, keys ...string) []string {
		t.Helper()
		gone, err := b.DeleteAll(t.Context(), keys)
		if err != nil {
			t.Fatal(err)
		}
		return slices.Sorted(maps.Keys(gone))
	}
	var requests atomic.Int64
	b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if r.Method != http.MethodPost || !r.URL.Query().Has("delete") {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		io.WriteString(w, `<DeleteResult><Deleted><Key>a</Key></Deleted><Deleted><Key>d&amp;é</Key></Deleted>
			<Error><Key>b</Key><Code>AccessDenied</Code></Error><Error><Key>c</Key><Code>InvalidArgument</Code></Error></DeleteResult>`)
	})
	if gone := answer(b, "a", "b", "c", "d&é", "e"); !slices.Equal(gone, []string{"a", "d&é"}) || requests.Load() != 1 {
		t.Errorf("gone are %q, after %d requests", gone, requests.Load())
	}
	for status, want := range map[int]error{403: source.ErrDenied, 404: source.ErrNoBucket, 503: source.ErrThrottled, 200: source.ErrUnavailable} {
		b := answering(t, source.Config{}, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(status)
			code := map[int]string{403: "AccessDenied", 404: "NoSuchBucket", 503: "SlowDown"}[status]
			if status == 200 {
				io.WriteString(w, `<DeleteResult><Deleted><Key>a</K`) // cut off
				return
			}
			fmt.Fprintf(w, `<Error><Code>%s</Code></Error>`, code)
		})
		if gone, err := b.DeleteAll(t.Context(), []string{"a", "b"}); !errors.Is(err, want) || len(gone) > 0 {
			t.Errorf("status %d: %v, %v, want %v", status, gone, err, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if gone, err := b.DeleteAll(ctx, []string{"a", "b"}); err == nil || len(gone) > 0 {
		t.Errorf("given up: %v, %v", gone, err)
	}
}
