package gateway_test

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
)

// Whatever a body holds in place of signed chunks, it is refused with a code or it is what was signed.
func FuzzSignedChunks(f *testing.F) {
	data := random(2000)
	at := time.Now()
	keys := func() []gateway.Credential {
		return []gateway.Credential{{AccessKey: accessKey, SecretKey: secretKey, Write: true}}
	}
	encode := signedChunks{size: 700, trailers: []string{"x-amz-checksum-crc32:" + crc(data)}}
	f.Add(0, 0, []byte(nil))
	f.Add(20, 3, []byte("\r\n"))
	f.Add(3000, 2000, []byte("0\r\n\r\n"))
	f.Add(0, 4, []byte("ffffffffffffffff;"))
	f.Add(800, 100, bytes.Repeat([]byte("a"), 2000))
	f.Fuzz(func(t *testing.T, from, n int, insert []byte) {
		x := &fixture{m: newMemory(), url: "http://gateway"}
		h, err := gateway.New(gateway.Config{Buckets: map[string]gateway.Objects{bucket: x.m}, Keys: keys, Clock: func() time.Time { return at }})
		if err != nil {
			t.Fatal(err)
		}
		c := call{method: "PUT", path: object, body: data, payload: streamingTrailer, at: at, header: map[string]string{"x-amz-trailer": "x-amz-checksum-crc32"}}
		changed := false
		c.chunks = func(s seed, body []byte) []byte {
			text := encode.encode(s, body)
			from := min(max(from, 0), len(text))
			to := from + min(max(n, 0), len(text)-from)
			edited := bytes.Join([][]byte{text[:from], insert, text[to:]}, nil)
			changed = !bytes.Equal(edited, text)
			return edited
		}
		w := &record{h: http.Header{}}
		h.ServeHTTP(w, x.request(t, c))
		a := read(t, &http.Response{StatusCode: w.status, Header: w.h, Body: io.NopCloser(&w.body)})
		v, err := x.m.get("a/b")
		switch {
		case a.status == 200 && (err != nil || !bytes.Equal(v.data, data)):
			t.Errorf("stored otherwise than signed: %v", err)
		case a.status != 200 && err == nil:
			t.Errorf("answered %s, and stored", a)
		case a.status != 200 && !changed:
			t.Errorf("what was signed is refused: %s", a)
		case a.status >= 500 || a.status != 200 && a.code == "":
			t.Errorf("answered %s", a)
		}
	})
}

// record is a response in memory that knows deadlines, which the gateway insists on.
type record struct {
	h      http.Header
	status int
	body   bytes.Buffer
}

func (r *record) Header() http.Header              { return r.h }
func (r *record) Write(p []byte) (int, error)      { return r.body.Write(p) }
func (r *record) WriteHeader(status int)           { r.status = status }
func (r *record) SetReadDeadline(time.Time) error  { return nil }
func (r *record) SetWriteDeadline(time.Time) error { return nil }

// Whatever request comes without a right signature, it is answered with a code and stores nothing.
func FuzzUnsignedRequests(f *testing.F) {
	for _, seed := range []string{
		"GET /results/a?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=WRITER/20260101/us-east-1/s3/aws4_request&X-Amz-Date=20260101T000000Z&X-Amz-Expires=60&X-Amz-SignedHeaders=host&X-Amz-Signature=0 HTTP/1.1\r\nHost: x\r\n\r\n",
		"PUT /results/a HTTP/1.1\r\nHost: results.s3.test\r\nAuthorization: AWS4-HMAC-SHA256 Credential=WRITER/20260101/us-east-1/s3/aws4_request, SignedHeaders=host;x-amz-date, Signature=0\r\nX-Amz-Date: 20260101T000000Z\r\nX-Amz-Content-Sha256: UNSIGNED-PAYLOAD\r\nContent-Length: 1\r\n\r\nx",
		"POST /results?delete HTTP/1.1\r\nHost: x\r\nAuthorization: AWS4-HMAC-SHA256 Credential=////,SignedHeaders=;;host,Signature=\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET //?a;b&%zz HTTP/1.1\r\nHost: :\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	keys := func() []gateway.Credential {
		return []gateway.Credential{{AccessKey: accessKey, SecretKey: secretKey, Write: true}}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(text)))
		if err != nil {
			return
		}
		m := newMemory()
		h, err := gateway.New(gateway.Config{Buckets: map[string]gateway.Objects{bucket: m}, Keys: keys, Domains: []string{"s3.test"}, Clock: func() time.Time { return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) }})
		if err != nil {
			t.Fatal(err)
		}
		w := &record{h: http.Header{}}
		h.ServeHTTP(w, r)
		if w.status < 400 || w.status >= 500 || m.state() != "0 objects, 0 uploads, 0 parts" {
			t.Errorf("answered %d %s, stored %s", w.status, w.body.Bytes(), m.state())
		}
	})
}
