package gateway_test

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"net/http"
	"net/url"
	"runtime"
	"sort"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

// kept is a response in memory: requests by the thousand need no connection.
type kept struct {
	discard
	status int
	body   bytes.Buffer
}

func (k *kept) WriteHeader(status int)      { k.status = status }
func (k *kept) Write(p []byte) (int, error) { return k.body.Write(p) }

// direct does a request that has to succeed, without a connection.
func (f *fixture) direct(t testing.TB, c call) *kept {
	t.Helper()
	r := f.request(t, c)
	if r.ContentLength == 0 {
		r.Body = http.NoBody
	}
	k := &kept{discard: discard{http.Header{}}}
	f.server.Config.Handler.ServeHTTP(k, r)
	if k.status != http.StatusOK {
		t.Fatalf("%s %s: %d %s", c.method, c.path, k.status, k.body.Bytes())
	}
	return k
}

func TestAnUploadOfTenThousandParts(t *testing.T) {
	f := serve(t)
	upload := between(f.direct(t, call{method: "POST", path: object, query: url.Values{"uploads": {""}}}).body.String(), "<UploadId>", "</UploadId>")
	etags := make([]string, gateway.MaxParts)
	var want bytes.Buffer
	for i := range etags {
		fmt.Fprintf(&want, "%d,", i)
	}
	for i := range etags {
		n := (i*7919 + 1) % len(etags) // in no order, as clients send them
		r := f.direct(t, call{method: "PUT", path: object, query: url.Values{"uploadId": {upload}, "partNumber": {fmt.Sprint(n + 1)}}, body: fmt.Appendf(nil, "%d,", n)})
		etags[n] = r.Header().Get("ETag")
	}
	listed := 0
	for marker := "0"; ; {
		var page struct {
			IsTruncated          bool
			NextPartNumberMarker string
			Part                 []struct {
				PartNumber int
				ETag       string
			}
		}
		body := f.direct(t, call{method: "GET", path: object, query: url.Values{"uploadId": {upload}, "part-number-marker": {marker}}}).body.Bytes()
		if err := xml.Unmarshal(body, &page); err != nil {
			t.Fatal(err)
		}
		for _, p := range page.Part {
			if listed++; p.PartNumber != listed || p.ETag != etags[listed-1] {
				t.Fatalf("part %d is listed as %+v", listed, p)
			}
		}
		if marker = page.NextPartNumberMarker; !page.IsTruncated {
			break
		}
	}
	if listed != gateway.MaxParts {
		t.Errorf("%d parts are listed", listed)
	}
	var list strings.Builder
	list.WriteString("<CompleteMultipartUpload>")
	for i, etag := range etags {
		fmt.Fprintf(&list, "<Part><PartNumber>%d</PartNumber><ETag>%s</ETag></Part>", i+1, etag)
	}
	list.WriteString("</CompleteMultipartUpload>")
	a := f.must(t, call{method: "POST", path: object, query: url.Values{"uploadId": {upload}}, body: []byte(list.String())})
	if etag := between(string(a.body), "<ETag>", "</ETag>"); !strings.HasSuffix(strings.Trim(etag, `"&#34;`), "-10000") {
		t.Errorf("ETag %s", etag)
	}
	if a := f.must(t, call{method: "GET", path: object}); !bytes.Equal(a.body, want.Bytes()) {
		t.Errorf("%d bytes came back, of %d", len(a.body), want.Len())
	}
}

// numbered are so many objects that exist by arithmetic, a thousand in a folder.
type numbered struct {
	*memory
	n int
}

func (o numbered) key(i int) string { return fmt.Sprintf("d%04d/é %06d", i/1000, i) }

func (o numbered) List(ctx context.Context, prefix, delimiter, after string, most int) (gateway.Page, error) {
	if prefix != "" {
		return gateway.Page{}, source.ErrInvalid
	}
	entry := func(i int) string {
		if delimiter == "" {
			return o.key(i)
		}
		before, _, _ := strings.Cut(o.key(i), delimiter)
		return before + delimiter
	}
	var page gateway.Page
	for i := sort.Search(o.n, func(i int) bool { return entry(i) > after }); i < o.n; i++ {
		switch {
		case len(page.Objects)+len(page.Prefixes) == most:
			page.More = true
			return page, nil
		case delimiter == "":
			page.Objects = append(page.Objects, gateway.Info{Key: o.key(i), Size: int64(i), ETag: "0123456789abcdef0123456789abcdef"})
		default:
			page.Prefixes = append(page.Prefixes, entry(i))
		}
		if page.Next = entry(i); delimiter != "" {
			i += 999
		}
	}
	return page, nil
}

// Every key is listed once and in order, and the last page takes no more memory than the first.
func TestAListingOfManyPages(t *testing.T) {
	const keys = 100_000
	o := numbered{newMemory(), keys}
	f := serve(t, withObjects(o))
	for _, version := range []string{"1", "2"} {
		seen, pages := 0, 0
		last := ""
		var first, most uint64
		for query := (url.Values{"encoding-type": {"url"}}); ; {
			if version == "2" {
				query.Set("list-type", "2")
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			body := f.direct(t, call{method: "GET", path: "/" + bucket, query: query}).body.Bytes()
			runtime.ReadMemStats(&after)
			used := after.TotalAlloc - before.TotalAlloc
			if pages == 0 {
				first = used
			}
			most = max(most, used)
			pages++
			for _, part := range strings.Split(string(body), "<Key>")[1:] {
				text, _, _ := strings.Cut(part, "</Key>")
				key, err := url.PathUnescape(text)
				if err != nil || key != o.key(seen) || key <= last {
					t.Fatalf("key %d is %q after %q", seen, text, last)
				}
				last = key
				seen++
			}
			if !bytes.Contains(body, []byte("<IsTruncated>true<")) {
				break
			}
			if version == "2" {
				query.Set("continuation-token", between(string(body), "<NextContinuationToken>", "<"))
			} else {
				marker, err := url.PathUnescape(between(string(body), "<NextMarker>", "<"))
				if err != nil {
					t.Fatal(err)
				}
				query.Set("marker", marker)
			}
		}
		if seen != keys || pages != keys/1000 {
			t.Errorf("version %s: %d keys in %d pages", version, seen, pages)
		}
		if most > 2*first {
			t.Errorf("version %s: %d KiB for a page, %d KiB for the first", version, most>>10, first>>10)
		}
	}
	body := f.direct(t, call{method: "GET", path: "/" + bucket, query: url.Values{"list-type": {"2"}, "delimiter": {"/"}}}).body.Bytes()
	if n := bytes.Count(body, []byte("<CommonPrefixes>")); n != keys/1000 || bytes.Contains(body, []byte("<Contents>")) {
		t.Errorf("%d common prefixes", n)
	}
}
