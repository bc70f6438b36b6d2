package osstest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	sdk1 "github.com/aliyun/aliyun-oss-go-sdk/oss"
	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source/oss/osstest"
)

// TestFolderOutlivesServer: what a server kept in a folder the next one serves, and nothing else is left
// in it.
func TestFolderOutlivesServer(t *testing.T) {
	dir := t.TempDir()
	part := bytes.Repeat([]byte("0123456789"), 20<<10)
	want := map[string]string{}
	for round := range 2 {
		s := osstest.StartT(t, osstest.Options{Region: region, Dir: dir, Credentials: []osstest.Credential{plain}})
		s.MakeBucket(name)
		b := bucket1(t, s, plain)
		for key, content := range want {
			r, err := b.GetObject(key, sdk1.Range(0, int64(len(content))-1))
			if err != nil {
				t.Fatalf("round %d: %q: %v", round, key, err)
			}
			got, err := io.ReadAll(r)
			r.Close()
			if err != nil || string(got) != content {
				t.Errorf("round %d: %q: %d bytes, %v", round, key, len(got), err)
			}
		}
		for _, key := range []string{"a/b c", "overwritten", "deleted"} {
			content := key + strings.Repeat("!", round)
			if err := b.PutObject(key, strings.NewReader(content)); err != nil {
				t.Fatal(err)
			}
			want[key] = content
		}
		if err := b.DeleteObject("deleted"); err != nil {
			t.Fatal(err)
		}
		delete(want, "deleted")
		up, err := b.InitiateMultipartUpload("parts")
		if err != nil {
			t.Fatal(err)
		}
		var parts []sdk1.UploadPart
		for i := range 2 {
			p, err := b.UploadPart(up, bytes.NewReader(part), int64(len(part)), i+1)
			if err != nil {
				t.Fatal(err)
			}
			parts = append(parts, p)
		}
		if _, err := b.CompleteMultipartUpload(up, parts); err != nil {
			t.Fatal(err)
		}
		want["parts"] = string(part) + string(part)
		s.Close()
	}
	files, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil || len(files) != 2*len(want) {
		t.Errorf("%d objects are kept in %d files: %v", len(want), len(files), files)
	}
	// A record that is no record is said, not skipped.
	if err := os.WriteFile(filepath.Join(dir, name, "x.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := osstest.Start(osstest.Options{Dir: dir}); err == nil {
		s.Close()
		t.Error("a broken record was passed over")
	}
}

// TestRanges: OSS's two ways to take a range that is not within the object.
func TestRanges(t *testing.T) {
	s := osstest.StartT(t, osstest.Options{})
	s.MakePublicBucket(name)
	if _, err := s.Put(name, "k", []byte("0123456789")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(name, "empty", nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		key, header string
		standard    bool
		status      int
		body        string
	}{
		{"k", "bytes=0-0", false, 206, "0"},
		{"k", "bytes=2-5", false, 206, "2345"},
		{"k", "bytes=7-", false, 206, "789"},
		{"k", "bytes=-3", false, 206, "789"},
		{"k", "bytes=7-20", false, 200, "0123456789"},
		{"k", "bytes=7-20", true, 206, "789"},
		{"k", "bytes=10-", false, 200, "0123456789"},
		{"k", "bytes=10-", true, 416, "InvalidRange"},
		{"k", "bytes=10-12", true, 416, "InvalidRange"},
		{"k", "bytes=-20", false, 200, "0123456789"},
		{"k", "bytes=-20", true, 206, "0123456789"},
		{"k", "bytes=-0", true, 416, "InvalidRange"},
		{"k", "bytes=5-2", true, 200, "0123456789"},
		{"k", "bytes=0-1,3-4", true, 200, "0123456789"},
		{"k", "bytes=a-b", true, 200, "0123456789"},
		{"k", "bytes=-", true, 200, "0123456789"},
		{"k", "bytes=+1-2", true, 200, "0123456789"},
		{"k", "bytes=0-99999999999999999999", true, 200, "0123456789"},
		{"k", "lines=0-1", true, 200, "0123456789"},
		{"empty", "bytes=0-0", false, 200, ""},
		{"empty", "bytes=0-0", true, 416, "InvalidRange"},
		{"empty", "bytes=-1", true, 416, "InvalidRange"},
	} {
		status, body := get(t, s.Endpoint()+"/"+name+"/"+c.key, func(r *http.Request) {
			r.Header.Set("Range", c.header)
			if c.standard {
				r.Header.Set("x-oss-range-behavior", "standard")
			}
		})
		if got := body; status != c.status || got != c.body && code(got) != c.body {
			t.Errorf("%s %q standard=%v: %d %q, want %d %q", c.key, c.header, c.standard, status, body, c.status, c.body)
		}
	}
}

func TestConditions(t *testing.T) {
	s := osstest.StartT(t, osstest.Options{})
	s.MakePublicBucket(name)
	etag, err := s.Put(name, "k", []byte("content"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		header, value string
		status        int
	}{
		{"If-Match", `"` + etag + `"`, 200}, {"If-Match", etag, 200}, {"If-Match", strings.ToLower(etag), 200}, {"If-Match", "*", 200},
		{"If-Match", `"other"`, 412},
		{"If-None-Match", `"` + etag + `"`, 304}, {"If-None-Match", `"other"`, 200},
		{"If-Modified-Since", "Mon, 02 Jan 2006 15:04:05 GMT", 200}, {"If-Modified-Since", "Fri, 02 Jan 2150 15:04:05 GMT", 304},
		{"If-Unmodified-Since", "Mon, 02 Jan 2006 15:04:05 GMT", 412}, {"If-Unmodified-Since", "Fri, 02 Jan 2150 15:04:05 GMT", 200},
	} {
		status, body := get(t, s.Endpoint()+"/"+name+"/k", func(r *http.Request) { r.Header.Set(c.header, c.value) })
		if status != c.status || status == 200 && body != "content" {
			t.Errorf("%s: %s: %d %q, want %d", c.header, c.value, status, body, c.status)
		}
	}
}

// TestListing: prefix, delimiter, start-after and pages give what S3 and OSS give.
func TestListing(t *testing.T) {
	s := start(t)
	for _, key := range []string{"a", "a/", "a/1", "a/2", "a0", "b/x/1", "b/x/2", "b/y/1", "c", "é/1", "new\nline"} {
		if _, err := s.Put(name, key, nil); err != nil {
			t.Fatal(err)
		}
	}
	b := bucket1(t, s, plain)
	for _, c := range []struct {
		prefix, delimiter, after string
		max                      int
		want                     [][]string // pages
	}{
		{"", "", "", 1000, [][]string{{"a", "a/", "a/1", "a/2", "a0", "b/x/1", "b/x/2", "b/y/1", "c", "new\nline", "é/1"}}},
		{"", "/", "", 1000, [][]string{{"a", "a0", "c", "new\nline", "a/>", "b/>", "é/>"}}},
		{"", "/", "", 2, [][]string{{"a", "a/>"}, {"a0", "b/>"}, {"c", "new\nline"}, {"é/>"}}},
		{"b/", "/", "", 1, [][]string{{"b/x/>"}, {"b/y/>"}}},
		{"a/", "/", "", 1000, [][]string{{"a/", "a/1", "a/2"}}},
		{"a/", "", "a/1", 1000, [][]string{{"a/2"}}},
		{"", "", "b/x/1", 2, [][]string{{"b/x/2", "b/y/1"}, {"c", "new\nline"}, {"é/1"}}},
		{"", "/", "b/x/1", 1000, [][]string{{"c", "new\nline", "b/>", "é/>"}}},
		{"b", "", "", 3, [][]string{{"b/x/1", "b/x/2", "b/y/1"}}},
		{"none", "/", "", 1000, [][]string{nil}},
	} {
		var got [][]string
		token := ""
		for {
			options := []sdk1.Option{sdk1.Prefix(c.prefix), sdk1.Delimiter(c.delimiter), sdk1.StartAfter(c.after), sdk1.MaxKeys(c.max)}
			if token != "" {
				options = append(options, sdk1.ContinuationToken(token))
			}
			out, err := b.ListObjectsV2(options...)
			if err != nil {
				t.Fatal(err)
			}
			var page []string
			for _, o := range out.Objects {
				page = append(page, o.Key)
			}
			for _, p := range out.CommonPrefixes {
				page = append(page, p+">")
			}
			got = append(got, page)
			if token = out.NextContinuationToken; !out.IsTruncated {
				break
			}
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("prefix %q delimiter %q after %q max %d:\n%s", c.prefix, c.delimiter, c.after, c.max, d)
		}
	}
	for _, options := range [][]sdk1.Option{{sdk1.MaxKeys(0)}, {sdk1.MaxKeys(1001)}, {sdk1.ContinuationToken("%%%")}} {
		if _, err := b.ListObjectsV2(options...); code1(err) != "InvalidArgument" {
			t.Errorf("%v", err)
		}
	}
}

// TestMultipartRules: what OSS refuses about parts.
func TestMultipartRules(t *testing.T) {
	s := start(t)
	b := bucket1(t, s, plain)
	begin := func() sdk1.InitiateMultipartUploadResult {
		up, err := b.InitiateMultipartUpload("k")
		if err != nil {
			t.Fatal(err)
		}
		return up
	}
	send := func(up sdk1.InitiateMultipartUploadResult, number, size int) sdk1.UploadPart {
		p, err := b.UploadPart(up, bytes.NewReader(make([]byte, size)), int64(size), number)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	up := begin()
	small := []sdk1.UploadPart{send(up, 1, 1000), send(up, 2, 1000)}
	if _, err := b.CompleteMultipartUpload(up, small); code1(err) != "EntityTooSmall" {
		t.Errorf("small parts: %v", err)
	}
	if _, err := b.CompleteMultipartUpload(up, []sdk1.UploadPart{{PartNumber: 3, ETag: small[0].ETag}}); code1(err) != "InvalidPart" {
		t.Errorf("a part that was not sent: %v", err)
	}
	if _, err := b.CompleteMultipartUpload(up, []sdk1.UploadPart{{PartNumber: 1, ETag: `"0"`}}); code1(err) != "InvalidPart" {
		t.Errorf("another ETag: %v", err)
	}
	if _, err := b.CompleteMultipartUpload(up, nil); code1(err) != "MalformedXML" {
		t.Errorf("no parts: %v", err)
	}
	if _, err := b.UploadPart(up, strings.NewReader("x"), 1, 10001); code1(err) != "InvalidArgument" {
		t.Errorf("part 10001: %v", err)
	}
	if err := b.AbortMultipartUpload(up); err != nil {
		t.Error(err)
	}
	for what, err := range map[string]error{
		"abort":  b.AbortMultipartUpload(up),
		"upload": func() error { _, err := b.UploadPart(up, strings.NewReader("x"), 1, 1); return err }(),
		"complete": func() error {
			_, err := b.CompleteMultipartUpload(up, small)
			return err
		}(),
	} {
		if code1(err) != "NoSuchUpload" {
			t.Errorf("%s after abort: %v", what, err)
		}
	}
	if _, ok := s.Object(name, "k"); ok || s.Uploads(name) != 0 {
		t.Errorf("object there %v, uploads %d", ok, s.Uploads(name))
	}
}

// TestBrokenUpload: a body that ends early or is not what its digest says is not stored.
func TestBrokenUpload(t *testing.T) {
	s := start(t)
	b := bucket1(t, s, plain)
	if err := b.PutObject("digest", strings.NewReader("content"), sdk1.ContentMD5("AAAAAAAAAAAAAAAAAAAAAA==")); code1(err) != "InvalidDigest" {
		t.Errorf("wrong digest: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := io.MultiReader(strings.NewReader("beginning"), readerFunc(func([]byte) (int, error) { cancel(); return 0, errors.New("died") }))
	if err := b.PutObject("early", &io.LimitedReader{R: r, N: 1000}, sdk1.WithContext(ctx)); err == nil {
		t.Error("an upload that broke was accepted")
	}
	for _, key := range []string{"digest", "early"} {
		if content, ok := s.Object(name, key); ok {
			t.Errorf("%s was stored: %q", key, content)
		}
	}
	strict := osstest.StartT(t, osstest.Options{Region: region, Credentials: []osstest.Credential{plain}, StrictNames: true})
	strict.MakeBucket(name)
	for _, key := range []string{"/leading", `\leading`, strings.Repeat("k", 1024)} {
		if err := bucket1(t, strict, plain).PutObject(key, strings.NewReader("x")); code1(err) != "InvalidObjectName" {
			t.Errorf("key %.10q: %v", key, err)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestFaultsCount: a fault strikes the requests it names, as often as it says, after as many as it says.
func TestFaultsCount(t *testing.T) {
	s := start(t)
	b := bucket1(t, s, plain)
	for _, key := range []string{"a", "b"} {
		if _, err := s.Put(name, key, []byte(key)); err != nil {
			t.Fatal(err)
		}
	}
	f := s.Inject(osstest.Fault{Kind: osstest.Unavailable, Op: "GetObject", Key: "a", Skip: 1, Times: 2})
	var codes []string
	for range 5 {
		codes = append(codes, code1(do1(b, "a")))
	}
	if d := cmp.Diff([]string{"", "ServiceUnavailable", "ServiceUnavailable", "", ""}, codes); d != "" || f.Hits() != 2 {
		t.Errorf("%d hits %s", f.Hits(), d)
	}
	if got := code1(do1(b, "b")); got != "" {
		t.Errorf("another object: %s", got)
	}
	f = s.Inject(osstest.Fault{Kind: osstest.InternalError})
	if got := code1(do1(b, "b")); got != "InternalError" {
		t.Errorf("any request: %s", got)
	}
	f.Remove()
	if got := code1(do1(b, "b")); got != "" {
		t.Errorf("after removal: %s", got)
	}
	if n := s.Count("GetObject"); n != 8 {
		t.Errorf("%d requests seen", n)
	}
}
