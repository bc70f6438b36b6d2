package gateway_test

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

// count is what has been counted, by name and labels without what all names begin with.
func (f *fixture) count(t testing.TB) map[string]float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(f.counts); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]float64{}
	for _, family := range families {
		name, ours := strings.CutPrefix(family.GetName(), "stepcache_gateway_")
		if !ours || family.GetHelp() == "" {
			t.Errorf("%s, %q", family.GetName(), family.GetHelp())
		}
		for _, m := range family.Metric {
			series := name
			values := map[string]string{}
			for _, l := range m.Label {
				values[l.GetName()] = l.GetValue()
			}
			for _, l := range []string{"operation", "code", "error"} {
				if values[l] != "" {
					series += " " + values[l]
				}
			}
			found[series] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return found
}

func TestEveryRequestIsCountedOnce(t *testing.T) {
	f := serve(t)
	data := random(100_000)
	want := map[string]float64{}
	after := func(operation, code string) {
		want["requests_total "+operation+" "+code]++
		want["request_seconds "+operation]++
	}
	path := "/" + bucket
	upload := ""
	first := ""
	for _, c := range []struct {
		call
		operation, code, err string
		then                 func(answer)
	}{
		{call: call{method: "GET", path: "/"}, operation: "ListBuckets", code: "200"},
		{call: call{method: "HEAD", path: path}, operation: "HeadBucket", code: "200"},
		{call: call{method: "GET", path: path, query: url.Values{"location": {""}}}, operation: "GetBucketLocation", code: "200"},
		{call: call{method: "GET", path: path}, operation: "ListObjects", code: "200"},
		{call: call{method: "GET", path: path, query: url.Values{"list-type": {"2"}}}, operation: "ListObjectsV2", code: "200"},
		{call: call{method: "GET", path: path, query: url.Values{"list-type": {"7"}}}, operation: "ListObjects", code: "400", err: "InvalidArgument"},
		{call: call{method: "PUT", path: object, body: data}, operation: "PutObject", code: "200"},
		{call: call{method: "PUT", path: object, body: data, header: map[string]string{"content-md5": zeroMD5}}, operation: "PutObject", code: "400", err: "BadDigest"},
		{call: call{method: "PUT", path: object, body: data, key: accessKey, secret: "wrong"}, operation: "PutObject", code: "403", err: "SignatureDoesNotMatch"},
		{call: call{method: "PUT", path: "/nobody/a/b", body: data}, operation: "PutObject", code: "404", err: "NoSuchBucket"},
		{call: call{method: "PUT", path: "/results/a/../b", body: data}, operation: "PutObject", code: "400", err: "InvalidArgument"},
		{call: call{method: "GET", path: object}, operation: "GetObject", code: "200"},
		{call: call{method: "GET", path: object, header: map[string]string{"range": "bytes=0-99"}}, operation: "GetObject", code: "206"},
		{call: call{method: "GET", path: object, header: map[string]string{"if-none-match": "*"}}, operation: "GetObject", code: "304"},
		{call: call{method: "HEAD", path: object}, operation: "HeadObject", code: "200"},
		{call: call{method: "HEAD", path: path + "/none"}, operation: "HeadObject", code: "404", err: "NoSuchKey"},
		{call: call{method: "PUT", path: object + "2", header: map[string]string{"x-amz-copy-source": object}}, operation: "CopyObject", code: "200"},
		{call: call{method: "POST", path: object, query: url.Values{"uploads": {""}}}, operation: "CreateMultipartUpload", code: "200",
			then: func(a answer) { upload = between(string(a.body), "<UploadId>", "</UploadId>") }},
		{call: call{method: "GET", path: path, query: url.Values{"uploads": {""}}}, operation: "ListMultipartUploads", code: "200"},
		{call: call{method: "PUT", path: object, query: url.Values{"uploadId": {"ID"}, "partNumber": {"1"}}, body: data}, operation: "UploadPart", code: "200",
			then: func(a answer) { first = a.header.Get("ETag") }},
		{call: call{method: "PUT", path: object, query: url.Values{"uploadId": {"ID"}, "partNumber": {"2"}}, header: map[string]string{"x-amz-copy-source": object}}, operation: "UploadPartCopy", code: "200"},
		{call: call{method: "GET", path: object, query: url.Values{"uploadId": {"ID"}}}, operation: "ListParts", code: "200"},
		{call: call{method: "POST", path: object, query: url.Values{"uploadId": {"ID"}}, body: []byte("ETAG")}, operation: "CompleteMultipartUpload", code: "200"},
		{call: call{method: "DELETE", path: object, query: url.Values{"uploadId": {"ID"}}}, operation: "AbortMultipartUpload", code: "404", err: "NoSuchUpload"},
		{call: call{method: "DELETE", path: object}, operation: "DeleteObject", code: "204"},
		{call: call{method: "POST", path: path, query: url.Values{"delete": {""}}, body: []byte(`<Delete><Object><Key>a/b2</Key></Object><Object><Key>../b2</Key></Object></Delete>`)}, operation: "DeleteObjects", code: "200", err: "InvalidArgument"},
		{call: call{method: "PUT", path: path}, operation: "CreateBucket", code: "409", err: "BucketAlreadyOwnedByYou"},
		{call: call{method: "PUT", path: "/new"}, operation: "CreateBucket", code: "403", err: "AccessDenied"},
		{call: call{method: "DELETE", path: path}, operation: "DeleteBucket", code: "501", err: "NotImplemented"},
		{call: call{method: "GET", path: path, query: url.Values{"versioning": {""}}}, operation: "other", code: "200"},
		{call: call{method: "PATCH", path: path}, operation: "other", code: "405", err: "MethodNotAllowed"},
		{call: call{method: "BREW", path: object, key: "nobody", secret: "x"}, operation: "other", code: "403", err: "InvalidAccessKeyId"},
	} {
		if c.query.Get("uploadId") == "ID" {
			c.query.Set("uploadId", upload)
		}
		if string(c.body) == "ETAG" {
			c.body = fmt.Appendf(nil, "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>%s</ETag></Part></CompleteMultipartUpload>", first)
		}
		a := f.do(t, c.call)
		if fmt.Sprint(a.status) != c.code {
			t.Errorf("%s: %s", c.operation, a)
		}
		if c.then != nil {
			c.then(a)
		}
		after(c.operation, c.code)
		if c.err != "" {
			want["errors_total "+c.err]++
		}
		want["received_bytes_total"] += float64(len(c.body))
		want["sent_bytes_total"] += float64(len(a.body))
		f.eventually(t, want)
	}
}

func between(s, begin, end string) string {
	_, s, _ = strings.Cut(s, begin)
	s, _, _ = strings.Cut(s, end)
	return s
}

// eventually waits until want is what has been counted: a handler ends after its client has the answer.
func (f *fixture) eventually(t testing.TB, want map[string]float64) {
	t.Helper()
	want["requests"] += 0
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		got := f.count(t)
		if maps.Equal(got, want) {
			return
		}
		if time.Now().After(end) {
			for _, series := range slices.Sorted(maps.Keys(got)) {
				if got[series] != want[series] {
					t.Errorf("%s: %v, want %v", series, got[series], want[series])
				}
			}
			for series := range want {
				if _, there := got[series]; !there {
					t.Errorf("%s is not there", series)
				}
			}
			t.FailNow()
		}
	}
}

func TestAnAnswerThatBreaksOffIsCounted(t *testing.T) {
	f := serve(t)
	data := random(1 << 20)
	f.put(t, "a/b", data)
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
	io.Copy(io.Discard, response.Body)
	response.Body.Close()
	f.eventually(t, map[string]float64{
		"requests_total PutObject 200": 1, "request_seconds PutObject": 1, "received_bytes_total": 1 << 20,
		"requests_total GetObject cut": 1, "request_seconds GetObject": 1, "sent_bytes_total": 1 << 19, "errors_total ServiceUnavailable": 1,
	})
}

// What is under way is counted while it is: a large object takes minutes.
func TestBytesAreCountedAsTheyPass(t *testing.T) {
	read, write := io.Pipe()
	f := serve(t)
	r := f.request(t, call{method: "PUT", path: object, payload: "UNSIGNED-PAYLOAD"})
	r.Body, r.ContentLength = read, 1<<20
	ended := make(chan error, 1)
	go func() {
		response, err := f.server.Client().Do(r)
		if err == nil {
			err = response.Body.Close()
		}
		ended <- err
	}()
	half := make([]byte, 1<<19)
	if _, err := write.Write(half); err != nil {
		t.Fatal(err)
	}
	f.eventually(t, map[string]float64{"requests": 1, "received_bytes_total": 1 << 19, "sent_bytes_total": 0})
	if _, err := write.Write(half); err != nil {
		t.Fatal(err)
	}
	write.Close()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	f.eventually(t, map[string]float64{
		"received_bytes_total": 1 << 20, "sent_bytes_total": 0, "requests_total PutObject 200": 1, "request_seconds PutObject": 1,
	})
}

// No client can make up a label's value.
func TestLabelsAreBounded(t *testing.T) {
	f := serve(t)
	for i := range 50 {
		word := fmt.Sprintf("X%d", i)
		for _, c := range []call{
			{method: word, path: "/" + word + "/" + word}, {method: "GET", path: "/" + word, query: url.Values{word: {word}}},
			{method: "GET", path: object, key: word, secret: word}, {method: "POST", path: object, query: url.Values{word: {""}}},
		} {
			c.after = func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", word) }
			f.do(t, c)
		}
	}
	if series := slices.Sorted(maps.Keys(f.count(t))); len(series) > 20 || bytes.Contains(fmt.Append(nil, series), []byte("X1")) {
		t.Errorf("%d series: %s", len(series), series)
	}
}

var _ prometheus.Collector = (*gateway.Metrics)(nil)
