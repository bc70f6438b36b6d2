package gateway_test

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

func TestPutsOnConditions(t *testing.T) {
	f := serve(t)
	put := func(body string, header ...string) string {
		h := map[string]string{}
		for i := 0; i < len(header); i += 2 {
			h[header[i]] = header[i+1]
		}
		a := f.do(t, call{method: "PUT", path: object, body: []byte(body), header: h})
		return fmt.Sprint(a.status, a.code)
	}
	is := func(want string) {
		t.Helper()
		if v, err := f.m.get("a/b"); err != nil || string(v.data) != want {
			t.Errorf("the object is not %q: %v", want, err)
		}
	}
	if got := put("0", "if-match", `"x"`); got != "404NoSuchKey" {
		t.Errorf("if-match without an object: %s", got)
	}
	if got := put("1", "if-none-match", "*"); got != "200" {
		t.Errorf("the first: %s", got)
	}
	if got := put("2", "if-none-match", "*"); got != "412PreconditionFailed" {
		t.Errorf("the second: %s", got)
	}
	is("1")
	v, _ := f.m.get("a/b")
	if got := put("3", "if-match", `"other"`); got != "412PreconditionFailed" {
		t.Errorf("on another ETag: %s", got)
	}
	is("1")
	if got := put("4", "if-match", `"`+v.info.ETag+`"`); got != "200" {
		t.Errorf("on its ETag: %s", got)
	}
	is("4")
}

// The size that comes with the completion of an upload is that of the parts it names, which are listed in pages: that of
// all parts, or of another object, completes nothing.
func TestACompletionWithASize(t *testing.T) {
	f := serve(t)
	upload, err := f.m.Create(t.Context(), "a/b", gateway.PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var list bytes.Buffer
	size := 0
	list.WriteString("<CompleteMultipartUpload>")
	for i := range 1100 {
		data := make([]byte, i%10)
		part, err := f.m.PutPart(t.Context(), "a/b", upload, i+1, int64(len(data)), bytes.NewReader(data), source.Sums{})
		if err != nil {
			t.Fatal(err)
		}
		if i%100 == 9 {
			continue // one that is not used
		}
		size += len(data)
		fmt.Fprintf(&list, "<Part><PartNumber>%d</PartNumber><ETag>%s</ETag></Part>", part.Number, part.ETag)
	}
	list.WriteString("</CompleteMultipartUpload>")
	complete := func(size, body string) call {
		return call{method: "POST", path: object, query: url.Values{"uploadId": {upload}}, body: []byte(body), header: map[string]string{"x-amz-mp-object-size": size}}
	}
	right := fmt.Sprint(size)
	missing := strings.Replace(list.String(), "</Complete", "<Part><PartNumber>2000</PartNumber><ETag>x</ETag></Part></Complete", 1)
	f.refuses(t, []refuse{
		{"a byte too few", complete(fmt.Sprint(size-1), list.String()), 400, "InvalidRequest"},
		{"all parts", complete(fmt.Sprint(size+11*9), list.String()), 400, "InvalidRequest"},
		{"no number", complete("x", list.String()), 400, "InvalidRequest"},
		{"less than nothing", complete("-1", list.String()), 400, "InvalidRequest"},
		{"a part that was not put", complete(right, missing), 400, "InvalidPart"},
	})
	f.must(t, complete(right, list.String()))
	if v, err := f.m.get("a/b"); err != nil || len(v.data) != size {
		t.Errorf("the object: %v", err)
	}
	if a := f.do(t, complete(right, list.String())); a.code != "NoSuchUpload" {
		t.Errorf("again: %s", a)
	}
}

// S3 ignores parameters that begin with x-: SDKs name the operation so, and others add what an access log is to show.
func TestParametersThatSayNothingOfTheObject(t *testing.T) {
	f := serve(t)
	f.must(t, call{method: "PUT", path: object, query: url.Values{"x-id": {"PutObject"}, "X-Job": {"7"}}, body: []byte("x")})
	if v, err := f.m.get("a/b"); err != nil || string(v.data) != "x" {
		t.Error("the object was not put")
	}
	f.must(t, call{method: "DELETE", path: object, query: url.Values{"x-id": {"DeleteObject"}, "versionId": {"null"}}})
	if _, err := f.m.get("a/b"); err == nil {
		t.Error("the object was not deleted")
	}
}

func TestCopies(t *testing.T) {
	f := serve(t)
	data := random(100_000)
	a := f.must(t, call{method: "PUT", path: object, body: data, header: map[string]string{"content-type": "text/x", "x-amz-meta-a": "1", "cache-control": "no-cache"}})
	etag := a.header.Get("ETag")
	v, _ := f.m.get("a/b")
	at := func(d time.Duration) string { return v.info.ModTime.Add(d).Format(http.TimeFormat) }
	copied := func(to, from string, header ...string) answer {
		t.Helper()
		h := map[string]string{"x-amz-copy-source": from}
		for i := 0; i < len(header); i += 2 {
			h[header[i]] = header[i+1]
		}
		return f.do(t, call{method: "PUT", path: to, header: h})
	}
	for _, from := range []string{object, object[1:], "/results/a%2Fb", "/results/a/%62", object + "?versionId=null"} {
		delete(f.m.objects, "copy")
		if a := copied("/"+bucket+"/copy", from); a.status != 200 || !bytes.Contains(a.body, []byte("<CopyObjectResult")) {
			t.Errorf("copy of %s: %s", from, a)
		}
		if c, err := f.m.get("copy"); err != nil || !bytes.Equal(c.data, data) || c.info.ContentType != "text/x" || c.info.Metadata["a"] != "1" || c.info.Headers["Cache-Control"] != "no-cache" {
			t.Errorf("copy of %s: %v", from, err)
		}
	}
	// A directive replaces what the copy says of itself.
	if a := copied("/"+bucket+"/copy", object, "x-amz-metadata-directive", "REPLACE", "x-amz-meta-b", "2", "content-type", "text/y"); a.status != 200 {
		t.Errorf("replacing: %s", a)
	}
	if c, _ := f.m.get("copy"); c.info.ContentType != "text/y" || len(c.info.Metadata) != 1 || c.info.Metadata["b"] != "2" || len(c.info.Headers) != 0 {
		t.Errorf("replaced: %+v", c.info)
	}
	if a := copied(object, object, "x-amz-metadata-directive", "REPLACE", "x-amz-meta-c", "3"); a.status != 200 {
		t.Errorf("replacing in place: %s", a)
	}
	if c, _ := f.m.get("a/b"); !bytes.Equal(c.data, data) || c.info.Metadata["c"] != "3" {
		t.Error("replaced in place, but otherwise")
	}
	v, _ = f.m.get("a/b")
	// Between buckets the bytes go through the gateway.
	if a := copied("/other/x", object); a.status != 200 {
		t.Errorf("to another bucket: %s", a)
	}
	if c, err := f.other.get("x"); err != nil || !bytes.Equal(c.data, data) || c.info.Metadata["c"] != "3" {
		t.Errorf("in the other bucket: %v", err)
	}
	f.put(t, "empty", nil)
	if a := copied("/other/empty", "/results/empty"); a.status != 200 {
		t.Errorf("an empty one to another bucket: %s", a)
	}
	before := f.m.state() + f.other.state()
	for _, c := range []struct {
		name, value string
		code        string
	}{
		{"x-amz-copy-source-if-match", `"other"`, "PreconditionFailed"},
		{"x-amz-copy-source-if-none-match", etag, "PreconditionFailed"},
		{"x-amz-copy-source-if-modified-since", at(time.Hour), "PreconditionFailed"},
		{"x-amz-copy-source-if-unmodified-since", at(-time.Hour), "PreconditionFailed"},
		{"x-amz-copy-source-if-match", etag, ""},
		{"x-amz-copy-source-if-unmodified-since", at(0), ""},
	} {
		if a := copied("/other/x", object, c.name, c.value); a.code != c.code {
			t.Errorf("%s %s: %s", c.name, c.value, a)
		}
	}
	for from, code := range map[string]string{"/results/none": "NoSuchKey", "/unknown/a": "NoSuchBucket", object + "?versionId=7": "NoSuchVersion", object + "?versionId=": "InvalidArgument", "/frozen/a/b": ""} {
		if a := copied("/other/x", from); a.code != code {
			t.Errorf("from %s: %s", from, a)
		}
	}
	if a := copied("/frozen/x", object); a.code != "AccessDenied" {
		t.Errorf("into a read-only Dataset: %s", a)
	}
	if now := f.m.state() + f.other.state(); now != before {
		t.Errorf("copies that were refused stored: %s, before %s", now, before)
	}
	// A source that fails on the way stores nothing, of this bucket's names neither.
	f.m.setFail(func(op string) error {
		if op == "read half" {
			return source.ErrUnavailable
		}
		return nil
	})
	if a := copied("/other/broken", object); a.code != "ServiceUnavailable" {
		t.Errorf("a source that fails: %s", a)
	}
	if _, err := f.other.get("broken"); err == nil {
		t.Error("half a copy was stored")
	}
}

// Signers put what a copy is of into a presigned address.
func TestPresignedCopies(t *testing.T) {
	f := serve(t)
	data := random(1000)
	f.put(t, "a/b", data)
	f.put(t, "copy", []byte("old"))
	var begun struct{ UploadId string }
	if err := xml.Unmarshal(f.must(t, call{method: "POST", path: object, query: url.Values{"uploads": {""}}}).body, &begun); err != nil {
		t.Fatal(err)
	}
	a := f.must(t, call{method: "PUT", path: "/" + bucket + "/copy", query: url.Values{"x-amz-copy-source": {object}}, presign: "60"})
	if v, err := f.m.get("copy"); err != nil || !bytes.Equal(v.data, data) || !bytes.Contains(a.body, []byte("<CopyObjectResult")) {
		t.Errorf("other bytes, or no copy's answer: %v, %s", err, a)
	}
	a = f.must(t, call{method: "PUT", path: object, query: url.Values{"uploadId": {begun.UploadId}, "partNumber": {"1"}, "x-amz-copy-source": {object}}, presign: "60"})
	if !bytes.Contains(a.body, []byte("<CopyPartResult")) {
		t.Errorf("a part: %s", a)
	}
	for _, operation := range []string{"CopyObject", "UploadPartCopy"} {
		if n := f.count(t)["requests_total "+operation+" 200"]; n != 1 {
			t.Errorf("counted as %s: %v", operation, n)
		}
	}
}

// changing changes an object between Stat and Copy, for the first changes of them.
type changing struct {
	*memory
	changes atomic.Int32
}

func (c *changing) Copy(ctx context.Context, from gateway.Info, to string, o gateway.PutOptions) (gateway.Info, error) {
	if c.changes.Add(-1) >= 0 {
		if _, err := c.memory.Put(ctx, from.Key, 3, strings.NewReader(fmt.Sprintf("%03d", c.changes.Load())), gateway.PutOptions{}); err != nil {
			return gateway.Info{}, err
		}
	}
	return c.memory.Copy(ctx, from, to, o)
}

func TestACopyWhoseSourceChanges(t *testing.T) {
	c := &changing{memory: newMemory()}
	f := serve(t, withObjects(c))
	f.put(t, "a/b", []byte("old"))
	copy := call{method: "PUT", path: "/" + bucket + "/copy", header: map[string]string{"x-amz-copy-source": object}}
	c.changes.Store(2)
	if a := f.do(t, copy); a.status != 200 {
		t.Errorf("two changes: %s", a)
	}
	if v, err := c.get("copy"); err != nil || string(v.data) != "000" {
		t.Errorf("two changes: not the last version: %v", err)
	}
	c.changes.Store(1000)
	if a := f.do(t, copy); a.code != "ServiceUnavailable" {
		t.Errorf("endless changes: %s", a)
	}
}

func TestMultipartProtocol(t *testing.T) {
	f := serve(t)
	q := func(pairs ...string) url.Values {
		v := url.Values{}
		for i := 0; i < len(pairs); i += 2 {
			v.Set(pairs[i], pairs[i+1])
		}
		return v
	}
	begin := func(key string) string {
		var created struct {
			XMLName               xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ InitiateMultipartUploadResult"`
			Bucket, Key, UploadId string
		}
		a := f.must(t, call{method: "POST", path: "/" + bucket + "/" + key, query: q("uploads", ""), header: map[string]string{"content-type": "text/x", "x-amz-meta-a": "1", "x-amz-checksum-algorithm": "CRC32"}})
		if err := xml.Unmarshal(a.body, &created); err != nil || created.Bucket != bucket || created.Key != key || created.UploadId == "" {
			t.Fatalf("create: %v %+v", err, created)
		}
		return created.UploadId
	}
	id := begin("a/b")
	parts := [][]byte{random(60_000), random(50_000), random(40_000)}
	var etags []string
	for i, data := range parts {
		a := f.must(t, call{method: "PUT", path: object, query: q("uploadId", id, "partNumber", fmt.Sprint(i*10+1)), body: data, header: map[string]string{"x-amz-checksum-crc32": crc(data)}})
		if a.header.Get("X-Amz-Checksum-Crc32") != crc(data) {
			t.Error("the checksum that was verified is not in the answer")
		}
		etags = append(etags, a.header.Get("ETag"))
	}
	if a := f.do(t, call{method: "GET", path: object}); a.code != "NoSuchKey" {
		t.Errorf("before it is completed: %s", a)
	}
	// Pages of parts.
	var seen []int
	for marker, more := "0", true; more; {
		var page struct {
			XMLName              xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListPartsResult"`
			UploadId             string
			NextPartNumberMarker string
			IsTruncated          bool
			Part                 []struct {
				PartNumber int
				ETag       string
				Size       int64
			}
		}
		a := f.must(t, call{method: "GET", path: object, query: q("uploadId", id, "max-parts", "2", "part-number-marker", marker)})
		if err := xml.Unmarshal(a.body, &page); err != nil || page.UploadId != id {
			t.Fatalf("parts: %v %s", err, a.body)
		}
		for _, p := range page.Part {
			if p.ETag != etags[len(seen)] || p.Size != int64(len(parts[len(seen)])) {
				t.Errorf("part %+v", p)
			}
			seen = append(seen, p.PartNumber)
		}
		marker, more = page.NextPartNumberMarker, page.IsTruncated
	}
	if !slices.Equal(seen, []int{1, 11, 21}) {
		t.Errorf("parts listed: %v", seen)
	}
	list := "<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">"
	for i, etag := range etags {
		list += fmt.Sprintf("<Part><ChecksumCRC32>AAAAAA==</ChecksumCRC32><PartNumber>%d</PartNumber><ETag>%s</ETag></Part>", i*10+1, strings.ReplaceAll(etag, `"`, "&quot;"))
	}
	list += "</CompleteMultipartUpload>\r\n"
	complete := call{method: "POST", path: object, query: q("uploadId", id), body: []byte(list), header: map[string]string{"if-none-match": "*"}}
	a := f.must(t, complete)
	var done struct {
		XMLName                     xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ CompleteMultipartUploadResult"`
		Location, Bucket, Key, ETag string
	}
	if err := xml.Unmarshal(a.body, &done); err != nil || !strings.HasSuffix(done.ETag, `-3"`) || done.Location != f.url+object {
		t.Errorf("complete: %v %+v", err, done)
	}
	if v, err := f.m.get("a/b"); err != nil || !bytes.Equal(v.data, slices.Concat(parts...)) || v.info.ContentType != "text/x" || v.info.Metadata["a"] != "1" {
		t.Errorf("the object: %v", err)
	}

	// Uploads under way, by prefix, by level, in pages; and one that is aborted.
	ids := map[string]string{}
	for _, key := range []string{"a/1", "a/2", "b", "c/d/1", "c/e"} {
		ids[key] = begin(key)
	}
	uploads := func(pairs ...string) (found []string) {
		t.Helper()
		query := q(append([]string{"uploads", ""}, pairs...)...)
		for {
			var page struct {
				XMLName                           xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListMultipartUploadsResult"`
				NextKeyMarker, NextUploadIdMarker string
				IsTruncated                       bool
				Upload                            []struct{ Key, UploadId string }
				CommonPrefixes                    []struct{ Prefix string }
			}
			a := f.must(t, call{method: "GET", path: "/" + bucket, query: query})
			if err := xml.Unmarshal(a.body, &page); err != nil {
				t.Fatal(err)
			}
			for _, u := range page.Upload {
				if u.UploadId != ids[u.Key] {
					t.Errorf("upload %+v", u)
				}
				found = append(found, u.Key)
			}
			for _, p := range page.CommonPrefixes {
				found = append(found, p.Prefix)
			}
			if !page.IsTruncated {
				slices.Sort(found)
				return found
			}
			query.Set("key-marker", page.NextKeyMarker)
			query.Set("upload-id-marker", page.NextUploadIdMarker)
		}
	}
	for _, size := range []string{"1", "2", "1000"} {
		if got := uploads("max-uploads", size); !slices.Equal(got, []string{"a/1", "a/2", "b", "c/d/1", "c/e"}) {
			t.Errorf("uploads in pages of %s: %q", size, got)
		}
		if got := uploads("max-uploads", size, "delimiter", "/"); !slices.Equal(got, []string{"a/", "b", "c/"}) {
			t.Errorf("uploads by level in pages of %s: %q", size, got)
		}
	}
	if got := uploads("prefix", "c/", "delimiter", "/"); !slices.Equal(got, []string{"c/d/", "c/e"}) {
		t.Errorf("uploads below c/: %q", got)
	}
	if a := f.do(t, call{method: "DELETE", path: "/" + bucket + "/b", query: q("uploadId", ids["b"])}); a.status != 204 {
		t.Errorf("abort: %s", a)
	}
	if got := uploads("prefix", "b"); len(got) != 0 {
		t.Errorf("after the abort: %q", got)
	}
	// Completion on a condition that does not hold.
	complete.query = q("uploadId", ids["a/1"])
	complete.path = "/" + bucket + "/a/1"
	f.must(t, call{method: "PUT", path: complete.path, query: q("uploadId", ids["a/1"], "partNumber", "1"), body: parts[0]})
	complete.body = []byte("<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>" + strings.Trim(etags[0], `"`) + "</ETag></Part></CompleteMultipartUpload>")
	f.put(t, "a/1", []byte("there already"))
	if a := f.do(t, complete); a.code != "PreconditionFailed" {
		t.Errorf("completion where there is an object already: %s", a)
	}
	// A copied part and its range.
	copy := call{method: "PUT", path: "/" + bucket + "/a/2", query: q("uploadId", ids["a/2"], "partNumber", "1"), header: map[string]string{"x-amz-copy-source": object, "x-amz-copy-source-range": "bytes=10-19"}}
	if a := f.must(t, copy); !bytes.Contains(a.body, []byte("<CopyPartResult")) {
		t.Errorf("copied part: %s", a)
	}
	if got := f.m.uploads[ids["a/2"]].parts[1].data; !bytes.Equal(got, parts[0][10:20]) {
		t.Error("the copied part has other bytes")
	}
	for _, r := range []string{"bytes=10-", "bytes=-10", "10-19", "bytes=19-10", "bytes=0-150000"} {
		copy.header["x-amz-copy-source-range"] = r
		if a := f.do(t, copy); a.code != "InvalidArgument" {
			t.Errorf("copied part of %s: %s", r, a)
		}
	}
}

// many has more uploads under way than it lists.
type many struct{ *memory }

func (m many) Uploads(ctx context.Context, prefix string) ([]gateway.Upload, bool, error) {
	found, _, err := m.memory.Uploads(ctx, prefix)
	return found, true, err
}

// Where not all uploads can be listed, their list has no end that could be taken for one.
func TestMoreUploadsThanCanBeListed(t *testing.T) {
	m := many{newMemory()}
	f := serve(t, withObjects(m))
	for _, key := range []string{"a/1", "a/2", "b", "c"} {
		if _, err := m.Create(t.Context(), key, gateway.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ delimiter, most, want string }{
		{"", "1", "a/1 a/2 b c"}, {"", "4", "a/1 a/2 b c"}, {"", "1000", "a/1 a/2 b c"}, {"/", "1", "a/ b c"}, {"/", "3", "a/ b c"},
	} {
		var got []string
		query := url.Values{"uploads": {""}, "delimiter": {c.delimiter}, "max-uploads": {c.most}}
		for pages := 0; ; pages++ {
			a := f.do(t, call{method: "GET", path: "/" + bucket, query: query})
			if a.status != 200 || pages > 4 {
				if a.code != "InvalidRequest" || !bytes.Contains(a.body, []byte("a longer prefix")) {
					t.Errorf("in the end: %s", a)
				}
				break
			}
			var page struct {
				NextKeyMarker, NextUploadIdMarker string
				IsTruncated                       bool
				Upload                            []struct{ Key string }
				CommonPrefixes                    []struct{ Prefix string }
			}
			if err := xml.Unmarshal(a.body, &page); err != nil {
				t.Fatal(err)
			}
			for _, p := range page.CommonPrefixes {
				got = append(got, p.Prefix)
			}
			for _, u := range page.Upload {
				got = append(got, u.Key)
			}
			if !page.IsTruncated {
				t.Errorf("%+v: ends without a word", c)
				break
			}
			query.Set("key-marker", page.NextKeyMarker)
			query.Set("upload-id-marker", page.NextUploadIdMarker)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%+v: listed %q", c, got)
		}
	}
	if a := f.do(t, call{method: "GET", path: "/" + bucket, query: url.Values{"uploads": {""}, "prefix": {"none"}}}); a.code != "InvalidRequest" || !bytes.Contains(a.body, []byte("at the bucket")) {
		t.Errorf("none of those that are listed is below the prefix: %s", a)
	}
	if a := f.must(t, call{method: "GET", path: "/" + bucket, query: url.Values{"uploads": {""}, "max-uploads": {"0"}}}); bytes.Contains(a.body, []byte("<IsTruncated>true<")) {
		t.Errorf("a page of nothing: %s", a)
	}
}

// withObjects serves o under the bucket's name.
func withObjects(o gateway.Objects) option {
	return func(c *gateway.Config, _ *server) { c.Buckets = map[string]gateway.Objects{bucket: o} }
}

// careless stores without having read to the end.
type careless struct{ *memory }

func (c careless) Put(ctx context.Context, key string, size int64, r io.Reader, o gateway.PutOptions) (gateway.Info, error) {
	data := make([]byte, size)
	if _, err := io.ReadFull(r, data); err != nil {
		return gateway.Info{}, err
	}
	return c.memory.Put(ctx, key, size, bytes.NewReader(data), o)
}

// Objects that commit before the body's end are found out, not trusted.
func TestAPutThatNobodyVerified(t *testing.T) {
	f := serve(t, withObjects(careless{newMemory()}))
	s := signedChunks{size: 100, unsigned: true, trailers: []string{"x-amz-checksum-crc32:AAAAAA=="}}
	a := f.do(t, call{method: "PUT", path: object, body: random(1000), payload: unsignedTrailer, header: map[string]string{"x-amz-trailer": "x-amz-checksum-crc32"}, chunks: s.encode})
	if a.code != "InternalError" || !strings.Contains(f.logged.String(), "not read to its end") {
		t.Errorf("answered %s, logged %s", a, f.logged)
	}
}
