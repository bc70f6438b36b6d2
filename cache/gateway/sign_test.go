package gateway_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// call is one request, signed by hand so that any part of it can be wrong. Real clients' signatures are
// checked elsewhere.
type call struct {
	method, path string // the path as on the wire
	query        url.Values
	header       map[string]string
	body         []byte
	key, secret  string
	at           time.Time
	payload      string // x-amz-content-sha256; empty: the body's digest
	presign      string // X-Amz-Expires: the signature goes into the query
	host         string
	// chunks encodes the body as aws-chunked once the request's signature is known.
	chunks func(s seed, body []byte) []byte
	// after changes the signed request.
	after func(*http.Request)
}

// seed is what chunks' signatures follow from.
type seed struct {
	key                    []byte
	date, scope, signature string
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	io.WriteString(h, text)
	return h.Sum(nil)
}

func encodePath(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if strings.IndexByte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.~/", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

func encodeQuery(q url.Values) string { return strings.ReplaceAll(q.Encode(), "+", "%20") }

func (f *fixture) request(t testing.TB, c call) *http.Request {
	t.Helper()
	if c.key == "" {
		c.key, c.secret = accessKey, secretKey
	}
	if c.at.IsZero() {
		c.at = time.Now()
	}
	if c.payload == "" {
		c.payload = sum(c.body)
	}
	path, err := url.PathUnescape(c.path)
	if err != nil {
		t.Fatal(err)
	}
	at := c.at.UTC().Format("20060102T150405Z")
	scope := at[:8] + "/us-east-1/s3/aws4_request"
	key := []byte("AWS4" + c.secret)
	for part := range strings.SplitSeq(scope, "/") {
		key = mac(key, part)
	}
	if c.query == nil {
		c.query = url.Values{}
	}
	host := c.host
	if host == "" {
		_, host, _ = strings.Cut(f.url, "://")
	}
	headers := map[string]string{"host": host}
	for name, value := range c.header {
		headers[strings.ToLower(name)] = value
	}
	if c.presign == "" {
		headers["x-amz-date"], headers["x-amz-content-sha256"] = at, c.payload
	} else {
		c.payload = "UNSIGNED-PAYLOAD"
	}
	if c.chunks != nil {
		headers["x-amz-decoded-content-length"] = fmt.Sprint(len(c.body))
		if n, ok := c.header["x-amz-decoded-content-length"]; ok {
			headers["x-amz-decoded-content-length"] = n
		}
	}
	var names []string
	for name := range headers {
		names = append(names, name)
	}
	slices.Sort(names)
	signedNames := strings.Join(names, ";")
	if c.presign != "" {
		for name, value := range map[string]string{
			"Algorithm": "AWS4-HMAC-SHA256", "Credential": c.key + "/" + scope, "Date": at, "Expires": c.presign, "SignedHeaders": signedNames,
		} {
			c.query.Set("X-Amz-"+name, value)
		}
	}
	canonical := c.method + "\n" + encodePath(path) + "\n" + encodeQuery(c.query) + "\n"
	for _, name := range names {
		canonical += name + ":" + strings.Join(strings.Fields(headers[name]), " ") + "\n"
	}
	canonical += "\n" + signedNames + "\n" + c.payload
	signature := hex.EncodeToString(mac(key, "AWS4-HMAC-SHA256\n"+at+"\n"+scope+"\n"+sum([]byte(canonical))))
	body := c.body
	if c.chunks != nil {
		body = c.chunks(seed{key, at, scope, signature}, body)
	}
	r, err := http.NewRequestWithContext(t.Context(), c.method, f.url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if c.presign != "" {
		c.query.Set("X-Amz-Signature", signature)
	} else {
		r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential="+c.key+"/"+scope+", SignedHeaders="+signedNames+", Signature="+signature)
	}
	r.URL.Path, r.URL.RawPath, r.URL.RawQuery, r.Host = path, c.path, encodeQuery(c.query), host
	for name, value := range headers {
		if name != "host" {
			r.Header.Set(name, value)
		}
	}
	if c.after != nil {
		c.after(r)
	}
	return r
}

// answer is what came back.
type answer struct {
	status int
	header http.Header
	body   []byte
	code   string // of an error document
}

func (a answer) String() string {
	return fmt.Sprintf("%d %s %s", a.status, a.code, a.body[:min(len(a.body), 300)])
}

func (f *fixture) do(t testing.TB, c call) answer {
	t.Helper()
	response, err := f.server.Client().Do(f.request(t, c))
	if err != nil {
		t.Fatal(err)
	}
	return read(t, response)
}

func read(t testing.TB, response *http.Response) answer {
	t.Helper()
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := answer{status: response.StatusCode, header: response.Header, body: body}
	var e struct {
		XMLName xml.Name `xml:"Error"`
		Code    string
	}
	if xml.Unmarshal(body, &e) == nil {
		a.code = e.Code
	}
	return a
}

// must does a call that has to succeed.
func (f *fixture) must(t testing.TB, c call) answer {
	t.Helper()
	a := f.do(t, c)
	if a.status >= 300 || a.code != "" {
		t.Fatalf("%s %s: %s", c.method, c.path, a)
	}
	return a
}

func (f *fixture) put(t testing.TB, key string, body []byte) answer {
	t.Helper()
	return f.must(t, call{method: "PUT", path: "/" + bucket + "/" + encodePath(key), body: body})
}

// signedChunks is aws-chunked with a signature a chunk, and signed trailers if there are any.
type signedChunks struct {
	size     int
	trailers []string                 // name:value
	unsigned bool                     // no signatures at all
	tamper   func(text []byte) []byte // of the whole encoding
}

func (c signedChunks) encode(s seed, body []byte) []byte {
	const empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	var out bytes.Buffer
	previous := s.signature
	for {
		n := min(len(body), c.size)
		chunk := body[:n]
		body = body[n:]
		fmt.Fprintf(&out, "%x", n)
		if !c.unsigned {
			previous = hex.EncodeToString(mac(s.key, strings.Join([]string{"AWS4-HMAC-SHA256-PAYLOAD", s.date, s.scope, previous, empty, sum(chunk)}, "\n")))
			fmt.Fprintf(&out, ";chunk-signature=%s", previous)
		}
		out.WriteString("\r\n")
		out.Write(chunk)
		if n == 0 {
			break
		}
		out.WriteString("\r\n")
	}
	text := ""
	for _, trailer := range c.trailers {
		out.WriteString(trailer + "\r\n")
		text += trailer + "\n"
	}
	if len(c.trailers) > 0 && !c.unsigned {
		signature := hex.EncodeToString(mac(s.key, strings.Join([]string{"AWS4-HMAC-SHA256-TRAILER", s.date, s.scope, previous, sum([]byte(text))}, "\n")))
		out.WriteString("x-amz-trailer-signature:" + signature + "\r\n")
	}
	out.WriteString("\r\n")
	if c.tamper != nil {
		return c.tamper(out.Bytes())
	}
	return out.Bytes()
}
