package gateway_test

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

func TestRangesOfAnObject(t *testing.T) {
	f := serve(t)
	data := []byte("0123456789")
	f.put(t, "a/b", data)
	f.put(t, "empty", nil)
	for _, c := range []struct {
		key, header string
		status      int
		body        string
		contents    string // Content-Range
	}{
		{"a/b", "", 200, "0123456789", ""},
		{"a/b", "bytes=0-0", 206, "0", "bytes 0-0/10"},
		{"a/b", "bytes=2-4", 206, "234", "bytes 2-4/10"},
		{"a/b", "bytes=7-", 206, "789", "bytes 7-9/10"},
		{"a/b", "bytes=7-100", 206, "789", "bytes 7-9/10"},
		{"a/b", "bytes=7-99999999999999999999", 206, "789", "bytes 7-9/10"},
		{"a/b", "bytes=-3", 206, "789", "bytes 7-9/10"},
		{"a/b", "bytes=-100", 206, "0123456789", "bytes 0-9/10"},
		{"a/b", "bytes=10-", 416, "", "bytes */10"},
		{"a/b", "bytes=99999999999999999999-", 416, "", "bytes */10"},
		{"a/b", "bytes=-0", 416, "", "bytes */10"},
		{"empty", "bytes=0-", 416, "", "bytes */0"},
		{"empty", "bytes=-1", 416, "", "bytes */0"},
		{"empty", "", 200, "", ""},
		// Ranges that are none are ignored.
		{"a/b", "bytes=4-2", 200, "0123456789", ""},
		{"a/b", "bytes=0-1,4-5", 200, "0123456789", ""},
		{"a/b", "bytes=a-b", 200, "0123456789", ""},
		{"a/b", "bytes=-", 200, "0123456789", ""},
		{"a/b", "bytes=--1", 200, "0123456789", ""},
		{"a/b", "bytes=+1-2", 200, "0123456789", ""},
		{"a/b", "lines=0-1", 200, "0123456789", ""},
		{"a/b", "bytes", 200, "0123456789", ""},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			a := f.do(t, call{method: method, path: "/" + bucket + "/" + c.key, header: map[string]string{"range": c.header}})
			if a.status != c.status || a.header.Get("Content-Range") != c.contents {
				t.Errorf("%s %s %q: %d, Content-Range %q", method, c.key, c.header, a.status, a.header.Get("Content-Range"))
			}
			if c.status != 416 && method == "GET" && string(a.body) != c.body {
				t.Errorf("GET %s %q: %q", c.key, c.header, a.body)
			}
			if length := a.header.Get("Content-Length"); c.status != 416 && length != fmt.Sprint(len(c.body)) {
				t.Errorf("%s %s %q: Content-Length %s", method, c.key, c.header, length)
			}
			if method == "HEAD" && len(a.body) > 0 {
				t.Errorf("HEAD has a body: %s", a)
			}
			if method == "GET" && c.status == 416 && a.code != "InvalidRange" {
				t.Errorf("GET %s %q: %s", c.key, c.header, a)
			}
		}
	}
}

func TestConditionsOfReads(t *testing.T) {
	f := serve(t)
	data := []byte("0123456789")
	a := f.put(t, "a/b", data)
	etag := a.header.Get("ETag")
	v, err := f.m.get("a/b")
	if err != nil {
		t.Fatal(err)
	}
	at := func(d time.Duration) string { return v.info.ModTime.Add(d).Format(http.TimeFormat) }
	for _, c := range []struct {
		status int
		header map[string]string
	}{
		{200, map[string]string{"if-match": etag}},
		{200, map[string]string{"if-match": strings.Trim(etag, `"`)}},
		{200, map[string]string{"if-match": `"other", ` + etag}},
		{200, map[string]string{"if-match": "*"}},
		{412, map[string]string{"if-match": `"other"`}},
		{304, map[string]string{"if-none-match": etag}},
		{304, map[string]string{"if-none-match": "W/" + etag}},
		{304, map[string]string{"if-none-match": "*"}},
		{200, map[string]string{"if-none-match": `"other"`}},
		{304, map[string]string{"if-modified-since": at(0)}},
		{304, map[string]string{"if-modified-since": at(time.Hour)}},
		{200, map[string]string{"if-modified-since": at(-time.Second)}},
		{200, map[string]string{"if-unmodified-since": at(0)}},
		{412, map[string]string{"if-unmodified-since": at(-time.Second)}},
		{200, map[string]string{"if-modified-since": "yesterday", "if-unmodified-since": "yesterday"}},
		// An ETag's condition outweighs the date's.
		{200, map[string]string{"if-match": etag, "if-unmodified-since": at(-time.Hour)}},
		{304, map[string]string{"if-none-match": etag, "if-modified-since": at(-time.Hour)}},
		{200, map[string]string{"if-none-match": `"other"`, "if-modified-since": at(time.Hour)}},
		{412, map[string]string{"if-match": `"other"`, "if-none-match": etag}},
		{206, map[string]string{"range": "bytes=0-1", "if-range": etag}},
		{200, map[string]string{"range": "bytes=0-1", "if-range": `"other"`}},
		{412, map[string]string{"range": "bytes=0-1", "if-match": `"other"`}},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			a := f.do(t, call{method: method, path: object, header: c.header})
			if a.status != c.status {
				t.Errorf("%s %v: %d, not %d", method, c.header, a.status, c.status)
			}
			if c.status == 304 && (a.header.Get("ETag") != etag || len(a.body) > 0) {
				t.Errorf("%s %v: 304 with ETag %s and body %q", method, c.header, a.header.Get("ETag"), a.body)
			}
			if c.status == 412 && method == "GET" && a.code != "PreconditionFailed" {
				t.Errorf("%v: %s", c.header, a)
			}
		}
	}
}

func TestHeadersOfAnObject(t *testing.T) {
	f := serve(t)
	f.must(t, call{method: "PUT", path: object, body: []byte("x"), header: map[string]string{
		"content-type": "text/x-test", "cache-control": "no-cache", "content-disposition": "attachment", "content-encoding": "aws-chunked,gzip",
		"content-language": "de", "expires": "Thu, 01 Jan 2026 00:00:00 GMT", "x-amz-meta-origin": "step  1", "x-amz-meta-UPPER": "y",
	}})
	want := map[string]string{
		"Content-Type": "text/x-test", "Cache-Control": "no-cache", "Content-Disposition": "attachment", "Content-Encoding": "gzip",
		"Content-Language": "de", "Expires": "Thu, 01 Jan 2026 00:00:00 GMT", "X-Amz-Meta-Origin": "step  1", "X-Amz-Meta-Upper": "y",
		"Accept-Ranges": "bytes", "Content-Length": "1", "ETag": `"9dd4e461268c8034f5c8564e155c67a6"`, "Last-Modified": "Fri, 02 Jan 2026 03:04:06 GMT",
	}
	for _, method := range []string{"GET", "HEAD"} {
		a := f.must(t, call{method: method, path: object, header: map[string]string{"accept-encoding": "identity"}})
		for name, value := range want {
			if got := a.header.Get(name); got != value {
				t.Errorf("%s: %s is %q, not %q", method, name, got, value)
			}
		}
	}
	a := f.must(t, call{method: "GET", path: object, query: url.Values{
		"response-content-type": {"text/y"}, "response-cache-control": {"max-age=1"}, "response-content-disposition": {"inline\r\nSet-Cookie: a=b"},
		"response-content-encoding": {"identity"}, "response-content-language": {"en"}, "response-expires": {"never"},
	}})
	for name, value := range map[string]string{"Content-Type": "text/y", "Cache-Control": "max-age=1", "Content-Language": "en", "Content-Encoding": "identity", "Expires": "never", "Set-Cookie": ""} {
		if got := a.header.Get(name); got != value {
			t.Errorf("overridden %s is %q, not %q", name, got, value)
		}
	}
	f.put(t, "untyped", []byte("<html>"))
	if a := f.must(t, call{method: "GET", path: "/" + bucket + "/untyped"}); a.header.Get("Content-Type") != "binary/octet-stream" {
		t.Errorf("an object without a type is given %q", a.header.Get("Content-Type"))
	}
	// An object is one part.
	if a := f.do(t, call{method: "GET", path: object, header: map[string]string{"accept-encoding": "identity"}, query: url.Values{"partNumber": {"1"}}}); a.status != 206 || string(a.body) != "x" || a.header.Get("Content-Range") != "bytes 0-0/1" {
		t.Errorf("part 1: %s", a)
	}
	if a := f.do(t, call{method: "GET", path: object, header: map[string]string{"accept-encoding": "identity"}, query: url.Values{"partNumber": {"2"}}}); a.code != "InvalidPartNumber" {
		t.Errorf("part 2: %s", a)
	}
	if a := f.must(t, call{method: "GET", path: object, header: map[string]string{"accept-encoding": "identity"}, query: url.Values{"versionId": {"null"}}}); string(a.body) != "x" {
		t.Errorf("version null: %s", a)
	}
}

type page struct {
	XMLName               xml.Name
	Prefix, Delimiter     string
	Marker, NextMarker    string
	NextContinuationToken string
	StartAfter            string
	EncodingType          string
	KeyCount, MaxKeys     int
	IsTruncated           bool
	Contents              []struct {
		Key, LastModified, ETag, StorageClass string
		Size                                  int64
		Owner                                 *struct{ ID string }
	}
	CommonPrefixes []struct{ Prefix string }
}

func (p page) names() (names []string) {
	for _, o := range p.Contents {
		names = append(names, o.Key)
	}
	for _, c := range p.CommonPrefixes {
		names = append(names, c.Prefix)
	}
	slices.Sort(names)
	return names
}

func (f *fixture) list(t *testing.T, pairs ...string) page {
	t.Helper()
	q := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		q.Set(pairs[i], pairs[i+1])
	}
	a := f.must(t, call{method: "GET", path: "/" + bucket, query: q})
	var p page
	if err := xml.Unmarshal(a.body, &p); err != nil {
		t.Fatalf("%v: %s", err, a.body)
	}
	if p.XMLName.Space != "http://s3.amazonaws.com/doc/2006-03-01/" || p.XMLName.Local != "ListBucketResult" {
		t.Errorf("the document is %v", p.XMLName)
	}
	return p
}

func TestListings(t *testing.T) {
	f := serve(t)
	keys := []string{"a b+c", "dir/1", "dir/2", "dir/sub/3", "tab\t", "z<&>"}
	for _, key := range keys {
		f.put(t, key, []byte(key))
	}
	same := func(got page, want ...string) {
		t.Helper()
		if !slices.Equal(got.names(), want) {
			t.Errorf("listed %q, not %q", got.names(), want)
		}
	}
	v1 := f.list(t)
	same(v1, keys...)
	if o := v1.Contents[0]; o.Owner == nil || o.Size != 5 || o.StorageClass != "STANDARD" || len(o.ETag) != 34 || o.LastModified != "2026-01-02T03:04:06.000Z" {
		t.Errorf("version 1: %+v", o)
	}
	v2 := f.list(t, "list-type", "2")
	same(v2, keys...)
	if v2.KeyCount != 6 || v2.MaxKeys != 1000 || v2.IsTruncated || v2.Contents[0].Owner != nil {
		t.Errorf("version 2: %+v", v2)
	}
	if o := f.list(t, "list-type", "2", "fetch-owner", "true").Contents[0]; o.Owner == nil {
		t.Error("fetch-owner fetches no owner")
	}
	same(f.list(t, "delimiter", "/"), "a b+c", "dir/", "tab\t", "z<&>")
	same(f.list(t, "delimiter", "/", "prefix", "dir/"), "dir/1", "dir/2", "dir/sub/")
	same(f.list(t, "delimiter", "/", "prefix", "dir"), "dir/")
	same(f.list(t, "delimiter", "+"), "a b+", "dir/1", "dir/2", "dir/sub/3", "tab\t", "z<&>")
	same(f.list(t, "prefix", "none"))
	same(f.list(t, "marker", "dir/2"), "dir/sub/3", "tab\t", "z<&>")
	same(f.list(t, "marker", "dir/", "delimiter", "/"), "tab\t", "z<&>")
	same(f.list(t, "list-type", "2", "start-after", "dir/2"), "dir/sub/3", "tab\t", "z<&>")
	same(f.list(t, "list-type", "2", "max-keys", "0"))
	if p := f.list(t, "max-keys", "5000"); p.MaxKeys != 1000 {
		t.Errorf("max-keys 5000 gives %d", p.MaxKeys)
	}
	url := f.list(t, "encoding-type", "url", "prefix", "a b", "delimiter", "%")
	same(url, "a%20b%2Bc")
	if url.Prefix != "a%20b" || url.Delimiter != "%25" || url.EncodingType != "url" {
		t.Errorf("encoded: %+v", url)
	}
	// Pages, by either version.
	for _, size := range []string{"1", "2", "3", "4"} {
		var got1, got2 []string
		for q := []string{"delimiter", "/", "max-keys", size}; ; {
			p := f.list(t, q...)
			if got1 = append(got1, p.names()...); !p.IsTruncated {
				break
			}
			q = []string{"delimiter", "/", "max-keys", size, "marker", p.NextMarker}
		}
		for q := []string{"list-type", "2", "delimiter", "/", "max-keys", size}; ; {
			p := f.list(t, q...)
			if got2 = append(got2, p.names()...); !p.IsTruncated {
				break
			}
			q = []string{"list-type", "2", "delimiter", "/", "max-keys", size, "start-after", "ignored", "continuation-token", p.NextContinuationToken}
		}
		if want := []string{"a b+c", "dir/", "tab\t", "z<&>"}; !slices.Equal(got1, want) || !slices.Equal(got2, want) {
			t.Errorf("pages of %s: %q and %q", size, got1, got2)
		}
	}
}

// A bucket may hold names that no request could give: a listing shows them, and goes on after them.
func TestListingsGoOnPastNamesThatAreNoKeysHere(t *testing.T) {
	f := serve(t)
	long := "b" + strings.Repeat("x", gateway.MaxKey)
	keys := []string{"a\x01", "ab", "b\x02/c", long, "\xff", "\xff\xff"}
	for _, key := range keys {
		f.m.objects[key] = &version{info: gateway.Info{Key: key, ETag: "x"}}
	}
	for _, delimiter := range []string{"", "/"} {
		want := slices.Clone(keys)
		if delimiter != "" {
			want[2] = "b\x02/"
		}
		for _, v := range [][]string{{"list-type", "2"}, {"list-type", ""}} {
			var got []string
			for q := append(v, "encoding-type", "url", "delimiter", delimiter, "max-keys", "1"); ; {
				p := f.list(t, q...)
				for _, name := range p.names() {
					name, err := url.PathUnescape(name)
					if err != nil {
						t.Fatal(err)
					}
					got = append(got, name)
				}
				if !p.IsTruncated {
					break
				}
				marker, err := url.PathUnescape(p.NextMarker)
				if err != nil {
					t.Fatal(err)
				}
				if q = append(q, "marker", marker); marker == "" {
					q = append(q, "continuation-token", p.NextContinuationToken)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%q, delimiter %q: listed %.9q, not %.9q", v, delimiter, got, want)
			}
		}
	}
	// Version 1 without an encoding: the marker would be another name, and what lies between skipped.
	f.refuses(t, []refuse{{"a marker that XML cannot carry", call{method: "GET", path: "/" + bucket, query: url.Values{"max-keys": {"1"}}}, 400, "InvalidArgument"}})
	if p := f.list(t, "max-keys", "2"); p.NextMarker != "ab" || len(p.Contents) != 2 {
		t.Errorf("a page that ends at another: %+v", p)
	}
}

func TestFailuresOfObjectsHaveTheirCodes(t *testing.T) {
	for _, c := range []struct {
		err    error
		status int
		code   string
		logged bool
	}{
		{source.ErrNotFound, 404, "NoSuchKey", false},
		{source.ErrNoBucket, 404, "NoSuchBucket", false},
		{source.ErrDenied, 403, "AccessDenied", false},
		{source.ErrThrottled, 503, "SlowDown", true},
		{source.ErrUnavailable, 503, "ServiceUnavailable", true},
		{source.ErrChanged, 503, "ServiceUnavailable", true},
		{source.ErrUnversioned, 400, "InvalidRequest", false},
		{source.ErrInvalid, 400, "InvalidRequest", true},
		{source.ErrReadOnly, 403, "AccessDenied", false},
		{gateway.ErrBusy, 503, "SlowDown", true},
		{gateway.ErrTooLarge, 400, "EntityTooLarge", false},
		{gateway.ErrPartTooSmall, 400, "EntityTooSmall", false},
		{gateway.ErrPrecondition, 412, "PreconditionFailed", false},
		{errDisk, 500, "InternalError", true},
	} {
		f := serve(t)
		f.put(t, "a/b", []byte("x"))
		f.m.setFail(func(op string) error {
			if op == "read half" {
				return nil
			}
			return &source.Error{Op: op, Name: "s3://bucket/a/b", Kind: c.err}
		})
		for _, call := range []call{
			{method: "GET", path: object}, {method: "PUT", path: object, body: []byte("y")}, {method: "DELETE", path: object}, {method: "GET", path: "/" + bucket},
			{method: "PUT", path: object + "2", header: map[string]string{"x-amz-copy-source": object}},
		} {
			a := f.do(t, call)
			if a.status != c.status || a.code != c.code {
				t.Errorf("%v: %s answered %s, not %s", c.err, call.method, a, c.code)
			}
			if bytes.Contains(a.body, []byte("s3://")) {
				t.Errorf("the answer tells of the bucket: %s", a)
			}
		}
		if a := f.do(t, call{method: "HEAD", path: object}); a.status != c.status || len(a.body) > 0 {
			t.Errorf("%v: HEAD answered %s", c.err, a)
		}
		if logged := strings.Contains(f.logged.String(), "s3://bucket/a/b"); logged != c.logged {
			t.Errorf("%v: logged is %v: %s", c.err, logged, f.logged)
		}
		f.m.setFail(nil)
		if v, err := f.m.get("a/b"); err != nil || string(v.data) != "x" {
			t.Errorf("%v: the object was changed", c.err)
		}
	}
}

func TestWhatTheBucketRefusesIsTold(t *testing.T) {
	f := serve(t)
	f.put(t, "a/b", []byte("x"))
	for _, c := range []struct {
		err           source.Error
		status        int
		code, message string
	}{
		{source.Error{Kind: source.ErrInvalid, Refusal: &source.Refusal{Status: 409, Code: "ObjectParentIsFile", Message: "Object parent <already> exists, 100%d."}},
			409, "ObjectParentIsFile", "Object parent &lt;already&gt; exists, 100%d."},
		{source.Error{Kind: source.ErrInvalid, Refusal: &source.Refusal{Status: 400, Code: "Odd"}},
			400, "Odd", "The bucket behind this Dataset refused the request."},
		// Codes that clients know stay what they are.
		{source.Error{Kind: source.ErrNotFound, Refusal: &source.Refusal{Status: 400, Code: "Odd"}}, 404, "NoSuchKey", "The specified key does not exist."},
	} {
		f.m.setFail(func(string) error { return &c.err })
		a := f.do(t, call{method: "PUT", path: object, body: []byte("y")})
		if a.status != c.status || a.code != c.code || !bytes.Contains(a.body, []byte("<Message>"+c.message+"</Message>")) {
			t.Errorf("%v: %s %s", &c.err, a, a.body)
		}
	}
	if logged := f.logged.String(); strings.Contains(logged, "failed") {
		t.Errorf("the client was told, and yet: %s", logged)
	}
}

func TestAReadThatFailsOnTheWay(t *testing.T) {
	f := serve(t)
	f.put(t, "a/b", random(1<<20))
	f.m.setFail(func(op string) error {
		if op == "read" {
			return source.ErrUnavailable
		}
		return nil
	})
	a := f.do(t, call{method: "GET", path: object, header: map[string]string{"range": "bytes=0-99"}})
	if a.status != 503 || a.header.Get("Content-Range") != "" || a.header.Get("Content-Type") != "application/xml" {
		t.Errorf("before the first byte: %s %v", a, a.header)
	}
	f.m.setFail(func(op string) error {
		if op == "read half" {
			return source.ErrUnavailable
		}
		return nil
	})
	response, err := f.server.Client().Do(f.request(t, call{method: "GET", path: object}))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if n, err := new(bytes.Buffer).ReadFrom(response.Body); err == nil {
		t.Errorf("after half of the bytes: the client took %d of %d bytes for the whole", n, response.ContentLength)
	}
}

func TestVirtualHostStyle(t *testing.T) {
	f := serve(t)
	for _, host := range []string{bucket + ".s3.test", bucket + ".s3.test:9000", "RESULTS.S3.TEST", bucket + ".test."} {
		f.must(t, call{method: "PUT", path: "/a/b", host: host, body: []byte(host)})
		if v, err := f.m.get("a/b"); err != nil || string(v.data) != host {
			t.Errorf("%s: not stored: %v", host, err)
		}
		if a := f.must(t, call{method: "GET", path: "/", host: host, query: url.Values{"location": {""}}}); !bytes.Contains(a.body, []byte("LocationConstraint")) {
			t.Errorf("%s: %s", host, a)
		}
	}
	if a := f.do(t, call{method: "GET", path: "/a/b", host: "unknown.s3.test"}); a.code != "NoSuchBucket" {
		t.Errorf("another bucket's host: %s", a)
	}
	if a := f.must(t, call{method: "GET", path: object, host: "s3.test"}); len(a.body) == 0 {
		t.Errorf("path style at the domain itself: %s", a)
	}
	// An endpoint by its address, or under another name, is path style whatever that looks like.
	for _, host := range []string{"127.0.0.1:9000", "[::1]:9000", bucket + ".s3.test.example", "xs3.testing.", ".test", ""} {
		if a := f.must(t, call{method: "GET", path: object, host: host}); len(a.body) == 0 {
			t.Errorf("path style at %q: %s", host, a)
		}
	}
}

func TestDomainsThatAreNone(t *testing.T) {
	keys := func() []gateway.Credential { return nil }
	for _, d := range []string{"", ".", "*.s3.test", "http://s3.test", "s3.test:9000", "s3.test/", ".s3.test", "s3.test.", "127.0.0.1", "::1", "-s3.test", "s3 .test", strings.Repeat("a", 64), strings.Repeat("a.", 127)} {
		if _, err := gateway.New(gateway.Config{Keys: keys, Domains: []string{"s3.test", d}}); err == nil || !strings.Contains(err.Error(), "without scheme") {
			t.Errorf("domain %q: %v", d, err)
		}
	}
	for _, d := range []string{"localhost", "S3.test", "data-s3.argo.svc.cluster.local"} {
		if _, err := gateway.New(gateway.Config{Keys: keys, Domains: []string{d}}); err != nil {
			t.Errorf("domain %q: %v", d, err)
		}
	}
}

func TestSubresourcesThatWereNeverSet(t *testing.T) {
	f := serve(t)
	f.put(t, "a/b", []byte("x"))
	for name, want := range map[string]string{
		"location": "<LocationConstraint", "versioning": "<VersioningConfiguration", "acl": "FULL_CONTROL", "requestPayment": "<Payer>BucketOwner", "logging": "<BucketLoggingStatus",
		"notification": "<NotificationConfiguration", "accelerate": "<AccelerateConfiguration", "tagging": "NoSuchTagSet", "policy": "NoSuchBucketPolicy", "lifecycle": "NoSuchLifecycleConfiguration",
		"cors": "NoSuchCORSConfiguration", "encryption": "ServerSideEncryptionConfigurationNotFoundError", "object-lock": "ObjectLockConfigurationNotFoundError",
		"website": "NoSuchWebsiteConfiguration", "replication": "ReplicationConfigurationNotFoundError", "publicAccessBlock": "NoSuchPublicAccessBlockConfiguration",
		"ownershipControls": "OwnershipControlsNotFoundError", "policyStatus": "NoSuchBucketPolicy", "uploads": "<ListMultipartUploadsResult",
	} {
		a := f.do(t, call{method: "GET", path: "/" + bucket, query: url.Values{name: {""}}, key: readKey, secret: readSecret})
		if !bytes.Contains(a.body, []byte(want)) || strings.HasPrefix(want, "<") != (a.status == 200) && want != "FULL_CONTROL" {
			t.Errorf("?%s: %s", name, a)
		}
	}
	for name, want := range map[string]string{"acl": "FULL_CONTROL", "tagging": "<TagSet>", "retention": "NoSuchObjectLockConfiguration", "legal-hold": "NoSuchObjectLockConfiguration"} {
		if a := f.do(t, call{method: "GET", path: object, query: url.Values{name: {""}}}); !bytes.Contains(a.body, []byte(want)) {
			t.Errorf("object ?%s: %s", name, a)
		}
		if a := f.do(t, call{method: "GET", path: "/" + bucket + "/none", query: url.Values{name: {""}}}); a.code != "NoSuchKey" {
			t.Errorf("?%s of what is not there: %s", name, a)
		}
	}
	a := f.must(t, call{method: "GET", path: "/"})
	for _, want := range []string{"<Name>results</Name>", "<Name>other</Name>", "<Name>frozen</Name>", "<CreationDate>"} {
		if !bytes.Contains(a.body, []byte(want)) {
			t.Errorf("the list of buckets has no %s: %s", want, a.body)
		}
	}
	if a := f.must(t, call{method: "HEAD", path: "/" + bucket}); a.header.Get("X-Amz-Bucket-Region") != "us-east-1" {
		t.Errorf("HEAD of the bucket: %v", a.header)
	}
	if a := f.do(t, call{method: "HEAD", path: "/unknown"}); a.status != 404 {
		t.Errorf("HEAD of an unknown bucket: %s", a)
	}
	if a := f.do(t, call{method: "OPTIONS", path: object}); a.code != "AccessForbidden" {
		t.Errorf("OPTIONS: %s", a)
	}
}

func TestRegionOfTheBucket(t *testing.T) {
	f := serve(t, func(c *gateway.Config, _ *httptest.Server) { c.Region = "eu-central-1" })
	if a := f.must(t, call{method: "GET", path: "/" + bucket, query: url.Values{"location": {""}}}); !bytes.Contains(a.body, []byte(">eu-central-1</LocationConstraint>")) {
		t.Errorf("location: %s", a.body)
	}
}

func TestKeysAreReadAnew(t *testing.T) {
	now := []gateway.Credential{{AccessKey: accessKey, SecretKey: "old", Write: true}}
	f := serve(t, func(c *gateway.Config, _ *httptest.Server) { c.Keys = func() []gateway.Credential { return now } })
	put := func(secret string) string {
		a := f.do(t, call{method: "PUT", path: object, body: []byte("x"), key: accessKey, secret: secret})
		return a.code
	}
	if got := put("old"); got != "" {
		t.Errorf("before the rotation: %s", got)
	}
	// The same name with two secrets, as while a rotation is under way.
	now = append(now, gateway.Credential{AccessKey: accessKey, SecretKey: "new", Write: true})
	if got := put("old") + put("new"); got != "" {
		t.Errorf("in the rotation: %s", got)
	}
	now = now[1:]
	if got := put("old"); got != "SignatureDoesNotMatch" {
		t.Errorf("after the rotation the old secret: %q", got)
	}
	now = []gateway.Credential{{}, {AccessKey: "x"}}
	for _, key := range []string{"", "x"} {
		if a := f.do(t, call{method: "PUT", path: object, key: key + " ", secret: "", after: func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), "Credential="+key+" /", "Credential="+key+"/", 1))
		}}); a.code != "InvalidAccessKeyId" {
			t.Errorf("a key without a secret lets %q in: %s", key, a)
		}
	}
}

func TestConfigsThatServeNothing(t *testing.T) {
	keys := func() []gateway.Credential { return nil }
	for name, c := range map[string]gateway.Config{
		"no keys":               {Buckets: map[string]gateway.Objects{"a": newMemory()}},
		"a bucket with no name": {Keys: keys, Buckets: map[string]gateway.Objects{"": newMemory()}},
		"a bucket with a slash": {Keys: keys, Buckets: map[string]gateway.Objects{"a/b": newMemory()}},
		"a bucket of nothing":   {Keys: keys, Buckets: map[string]gateway.Objects{"a": nil}},
	} {
		if _, err := gateway.New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A version that is replaced after it was told, and before its first byte was sent, costs the reader nothing:
// it gets the next one, whole. What is gone by then is not there; what is never there as told is an error.
func TestAVersionIsReplacedBeforeItsFirstByteIsSent(t *testing.T) {
	for _, kind := range []error{source.ErrChanged, source.ErrNotFound} {
		f := serve(t)
		replace := func(op string, times int, with func()) (opened func() int) {
			var n atomic.Int64
			f.m.setFail(func(got string) error {
				if got == "open" {
					n.Add(1)
				}
				if got == op && times > 0 {
					times--
					with()
					return kind
				}
				return nil
			})
			return func() int { return int(n.Load()) }
		}
		begin := func() {
			f.m.setFail(nil)
			f.must(t, call{method: "PUT", path: object, body: []byte("the old one"), header: map[string]string{"x-amz-meta-old": "yes", "cache-control": "no-store"}})
		}
		begin()
		opened := replace("read", 1, func() {
			f.m.mu.Lock()
			defer f.m.mu.Unlock()
			f.m.objects["a/b"] = &version{data: []byte("new"), info: gateway.Info{Key: "a/b", Size: 3, ETag: "new-1", ContentType: "text/new"}}
		})
		a := f.do(t, call{method: "GET", path: object})
		if a.status != 200 || string(a.body) != "new" || a.header.Get("Etag") != `"new-1"` || a.header.Get("Content-Type") != "text/new" || a.header.Get("X-Amz-Id-2") == "" {
			t.Errorf("%v: replaced: %s %q %v", kind, a, a.body, a.header)
		}
		if a.header.Get("X-Amz-Meta-Old") != "" || a.header.Get("Cache-Control") != "" || opened() != 2 {
			t.Errorf("%v: replaced: headers of the version before, or opened %d times: %v", kind, opened(), a.header)
		}
		begin()
		etag := f.do(t, call{method: "HEAD", path: object}).header.Get("Etag")
		replace("read", 1, func() {
			f.m.mu.Lock()
			defer f.m.mu.Unlock()
			f.m.objects["a/b"] = &version{data: []byte("new"), info: gateway.Info{Key: "a/b", Size: 3, ETag: "new-1"}}
		})
		if a := f.do(t, call{method: "GET", path: object, header: map[string]string{"if-match": etag}}); a.status != 412 {
			t.Errorf("%v: the version that was asked for is replaced: %s", kind, a)
		}
		begin()
		replace("read", 1, func() {
			f.m.mu.Lock()
			defer f.m.mu.Unlock()
			delete(f.m.objects, "a/b")
		})
		if a := f.do(t, call{method: "GET", path: object}); a.status != 404 || a.code != "NoSuchKey" {
			t.Errorf("%v: deleted: %s", kind, a)
		}
		begin()
		opened = replace("read", 100, func() {})
		if a := f.do(t, call{method: "GET", path: object}); a.status < 400 || opened() != 2 {
			t.Errorf("%v: never as told: %s, opened %d times", kind, a, opened())
		}
		begin()
		f.put(t, "a/b", random(1<<20))
		opened = replace("read half", 1, func() {})
		response, err := f.server.Client().Do(f.request(t, call{method: "GET", path: object}))
		if err == nil {
			_, err = io.ReadAll(response.Body)
			response.Body.Close()
		}
		if err == nil || opened() != 1 {
			t.Errorf("%v: in the middle: a part was taken for the whole (%v), opened %d times", kind, err, opened())
		}
	}
}
