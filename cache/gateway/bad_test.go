package gateway_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"hash/crc32"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

// refuse is a call that must be refused, with nothing stored.
type refuse struct {
	name   string
	c      call
	status int
	code   string
}

func (f *fixture) refuses(t *testing.T, cases []refuse) {
	t.Helper()
	before, beforeOther := f.m.state(), f.other.state()
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			a := f.do(t, c.c)
			if a.status != c.status || a.code != c.code {
				t.Errorf("answered %s, not %d %s", a, c.status, c.code)
			}
			if a.header.Get("X-Amz-Request-Id") == "" {
				t.Error("the answer has no request id")
			}
		})
	}
	if now := f.m.state(); now != before {
		t.Errorf("stored: %s, before %s", now, before)
	}
	if now := f.other.state(); now != beforeOther {
		t.Errorf("stored in the other bucket: %s, before %s", now, beforeOther)
	}
	if f.logged.Len() > 0 {
		t.Errorf("a client's mistake was logged: %s", f.logged)
	}
}

const object = "/" + bucket + "/a/b"

func TestSignaturesThatAreWrong(t *testing.T) {
	f := serve(t)
	data := []byte("some bytes")
	now := time.Now()
	credential := func(old, new string) func(*http.Request) {
		return func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), old, new, 1))
		}
	}
	day := now.UTC().Format("20060102")
	f.refuses(t, []refuse{
		{"a secret that is another", call{method: "PUT", path: object, body: data, key: accessKey, secret: "other"}, 403, "SignatureDoesNotMatch"},
		{"credentials of another Dataset", call{method: "PUT", path: object, body: data, key: "OTHER-DATASET", secret: "its secret"}, 403, "InvalidAccessKeyId"},
		{"no signature", call{method: "PUT", path: object, body: data, after: func(r *http.Request) { r.Header.Del("Authorization") }}, 403, "AccessDenied"},
		{"signature version 2", call{method: "PUT", path: object, body: data, after: func(r *http.Request) { r.Header.Set("Authorization", "AWS WRITER:c2lnbmF0dXJl") }}, 400, "InvalidRequest"},
		{"another algorithm", call{method: "PUT", path: object, body: data, after: credential("AWS4-HMAC-SHA256 ", "AWS4-ECDSA-P256-SHA256 ")}, 400, "InvalidRequest"},
		{"an authorization of no sense", call{method: "PUT", path: object, body: data, after: func(r *http.Request) { r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential") }}, 400, "AuthorizationHeaderMalformed"},
		{"a credential with too few parts", call{method: "PUT", path: object, body: data, after: credential("/us-east-1/s3/aws4_request", "/s3")}, 400, "AuthorizationHeaderMalformed"},
		{"another service", call{method: "PUT", path: object, body: data, after: credential("/s3/", "/sts/")}, 400, "AuthorizationHeaderMalformed"},
		{"a credential of another day", call{method: "PUT", path: object, body: data, after: credential(day, "20200101")}, 400, "AuthorizationHeaderMalformed"},
		{"another region than was signed", call{method: "PUT", path: object, body: data, after: credential("us-east-1", "eu-west-1")}, 403, "SignatureDoesNotMatch"},
		{"a clock 16 minutes behind", call{method: "PUT", path: object, body: data, at: now.Add(-16 * time.Minute)}, 403, "RequestTimeTooSkewed"},
		{"a clock 16 minutes ahead", call{method: "PUT", path: object, body: data, at: now.Add(16 * time.Minute)}, 403, "RequestTimeTooSkewed"},
		{"no date", call{method: "PUT", path: object, body: data, after: func(r *http.Request) { r.Header.Del("X-Amz-Date") }}, 403, "AccessDenied"},
		{"no digest of the payload", call{method: "PUT", path: object, body: data, after: func(r *http.Request) { r.Header.Del("X-Amz-Content-Sha256") }}, 400, "InvalidRequest"},
		{"another method than was signed", call{method: "PUT", path: object, body: data, after: func(r *http.Request) { r.Method = "POST"; r.URL.RawQuery = "uploads=" }}, 403, "SignatureDoesNotMatch"},
		{"another key than was signed", call{method: "PUT", path: object, body: data, after: func(r *http.Request) { r.URL.Path, r.URL.RawPath = "/results/a/c", "" }}, 403, "SignatureDoesNotMatch"},
		{"another bucket than was signed", call{method: "PUT", path: object, body: data, after: func(r *http.Request) { r.URL.Path, r.URL.RawPath = "/other/a/b", "" }}, 403, "SignatureDoesNotMatch"},
		{"an x-amz header that was not signed", call{method: "PUT", path: object, after: func(r *http.Request) { r.Header.Set("X-Amz-Copy-Source", "/other/secret") }}, 403, "AccessDenied"},
		{"a signed header that was changed", call{method: "PUT", path: object, body: data, header: map[string]string{"x-amz-meta-a": "1"}, after: func(r *http.Request) { r.Header.Set("X-Amz-Meta-A", "2") }}, 403, "SignatureDoesNotMatch"},
		{"a host that was not signed", call{method: "PUT", path: object, body: data, after: credential("host;", "")}, 403, "AccessDenied"},
		{"a session token", call{method: "PUT", path: object, body: data, header: map[string]string{"x-amz-security-token": "token"}}, 400, "InvalidToken"},
		{"two signatures", call{method: "PUT", path: object, body: data, presign: "60", after: func(r *http.Request) { r.Header.Set("Authorization", "AWS4-HMAC-SHA256 x") }}, 400, "InvalidArgument"},
		{"read-only credentials put", call{method: "PUT", path: object, body: data, key: readKey, secret: readSecret}, 403, "AccessDenied"},
		{"read-only credentials delete", call{method: "DELETE", path: object, key: readKey, secret: readSecret}, 403, "AccessDenied"},
		{"read-only credentials delete many", call{method: "POST", path: "/" + bucket, query: url.Values{"delete": {""}}, key: readKey, secret: readSecret}, 403, "AccessDenied"},
		{"read-only credentials copy", call{method: "PUT", path: object, header: map[string]string{"x-amz-copy-source": "/results/x"}, key: readKey, secret: readSecret}, 403, "AccessDenied"},
		{"read-only credentials begin an upload", call{method: "POST", path: object, query: url.Values{"uploads": {""}}, key: readKey, secret: readSecret}, 403, "AccessDenied"},
		{"a put to a read-only Dataset", call{method: "PUT", path: "/frozen/a", body: data}, 403, "AccessDenied"},
		{"a delete in a read-only Dataset", call{method: "DELETE", path: "/frozen/a"}, 403, "AccessDenied"},
		{"a bucket that is none of this tier's", call{method: "PUT", path: "/unknown/a", body: data}, 404, "NoSuchBucket"},
		{"a bucket to be made", call{method: "PUT", path: "/unknown"}, 403, "AccessDenied"},
	})
}

func TestPresignedAddressesThatAreWrong(t *testing.T) {
	f := serve(t)
	data := []byte("some bytes")
	now := time.Now()
	query := func(name, value string) func(*http.Request) {
		return func(r *http.Request) {
			q := r.URL.Query()
			if q.Del(name); value != "" {
				q.Set(name, value)
			}
			r.URL.RawQuery = encodeQuery(q)
		}
	}
	put := call{method: "PUT", path: object, body: data, presign: "60"}
	with := func(edit func(*call)) call { c := put; edit(&c); return c }
	f.refuses(t, []refuse{
		{"expired", with(func(c *call) { c.at = now.Add(-2 * time.Minute) }), 403, "AccessDenied"},
		{"not valid yet", with(func(c *call) { c.at = now.Add(16 * time.Minute) }), 403, "AccessDenied"},
		{"expires that was stretched", with(func(c *call) { c.at = now.Add(-2 * time.Minute); c.after = query("X-Amz-Expires", "600") }), 403, "SignatureDoesNotMatch"},
		{"expires in more than a week", with(func(c *call) { c.presign = "604801" }), 400, "AuthorizationQueryParametersError"},
		{"expires in no time", with(func(c *call) { c.presign = "0" }), 400, "AuthorizationQueryParametersError"},
		{"expires that is no number", with(func(c *call) { c.presign = "1h" }), 400, "AuthorizationQueryParametersError"},
		{"without expires", with(func(c *call) { c.after = query("X-Amz-Expires", "") }), 400, "AuthorizationQueryParametersError"},
		{"without date", with(func(c *call) { c.after = query("X-Amz-Date", "") }), 400, "AuthorizationQueryParametersError"},
		{"another algorithm", with(func(c *call) { c.after = query("X-Amz-Algorithm", "AWS4-HMAC-SHA1") }), 400, "AuthorizationQueryParametersError"},
		{"another secret", with(func(c *call) { c.key, c.secret = accessKey, "other" }), 403, "SignatureDoesNotMatch"},
		{"another key", with(func(c *call) { c.after = func(r *http.Request) { r.URL.Path, r.URL.RawPath = object+"c", "" } }), 403, "SignatureDoesNotMatch"},
		{"a get's address to put", with(func(c *call) { c.method = "GET"; c.after = func(r *http.Request) { r.Method = "PUT" } }), 403, "SignatureDoesNotMatch"},
		{"a parameter added", with(func(c *call) { c.after = query("uploadId", "x") }), 403, "SignatureDoesNotMatch"},
		{"a copy made of a put", with(func(c *call) { c.after = func(r *http.Request) { r.Header.Set("X-Amz-Copy-Source", "/other/secret") } }), 403, "AccessDenied"},
		{"a checksum of other bytes", with(func(c *call) { c.query = url.Values{"x-amz-checksum-crc32": {crc([]byte("other"))}} }), 400, "BadDigest"},
		{"the checksum of nothing in a header", with(func(c *call) { c.header = map[string]string{"x-amz-checksum-crc32": crc(nil)} }), 400, "BadDigest"},
		{"two dates", with(func(c *call) { c.after = func(r *http.Request) { r.URL.RawQuery += "&X-Amz-Date=20200101T000000Z" } }), 400, "AuthorizationQueryParametersError"},
		{"version 2", with(func(c *call) {
			c.after = func(r *http.Request) { r.URL.RawQuery = "AWSAccessKeyId=WRITER&Signature=c2ln&Expires=1" }
		}), 400, "InvalidRequest"},
		{"read-only credentials", with(func(c *call) { c.key, c.secret = readKey, readSecret }), 403, "AccessDenied"},
	})
}

func crc(b []byte) string {
	s := crc32.ChecksumIEEE(b)
	return base64.StdEncoding.EncodeToString([]byte{byte(s >> 24), byte(s >> 16), byte(s >> 8), byte(s)})
}

const (
	streaming        = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
	streamingTrailer = streaming + "-TRAILER"
	unsignedTrailer  = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
	zeroMD5          = "AAAAAAAAAAAAAAAAAAAAAA=="
)

func TestBodiesThatAreWrong(t *testing.T) {
	f := serve(t)
	data := random(100_000)
	header := func(pairs ...string) map[string]string {
		h := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			h[pairs[i]] = pairs[i+1]
		}
		return h
	}
	plain := func(edit func(*call)) call {
		c := call{method: "PUT", path: object, body: data}
		edit(&c)
		return c
	}
	chunked := func(payload string, s signedChunks, pairs ...string) call {
		if s.size == 0 {
			s.size = 40_000
		}
		s.unsigned = payload == unsignedTrailer
		return call{method: "PUT", path: object, body: data, payload: payload, header: header(pairs...), chunks: s.encode}
	}
	cut := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:len(b)-n] } }
	replace := func(old, new string) func([]byte) []byte {
		return func(b []byte) []byte {
			if !bytes.Contains(b, []byte(old)) {
				t.Errorf("the encoding has no %q to replace", old)
			}
			return bytes.Replace(b, []byte(old), []byte(new), 1)
		}
	}
	flip := func(at int) func([]byte) []byte { return func(b []byte) []byte { b[at] ^= 1; return b } }
	right, wrong := "x-amz-checksum-crc32:"+crc(data), "x-amz-checksum-crc32:AAAAAA=="
	trailer := []string{"x-amz-trailer", "x-amz-checksum-crc32"}
	f.refuses(t, []refuse{
		{"bytes other than the digest's", plain(func(c *call) { c.payload = sum([]byte("other")) }), 400, "XAmzContentSHA256Mismatch"},
		{"a digest that is none", plain(func(c *call) { c.payload = "0123" }), 400, "InvalidArgument"},
		{"Content-MD5 of other bytes", plain(func(c *call) { c.header = header("content-md5", zeroMD5) }), 400, "BadDigest"},
		{"Content-MD5 that is none", plain(func(c *call) { c.header = header("content-md5", "AAAA") }), 400, "InvalidDigest"},
		{"unsigned payload, Content-MD5 of other bytes", plain(func(c *call) { c.payload = "UNSIGNED-PAYLOAD"; c.header = header("content-md5", zeroMD5) }), 400, "BadDigest"},
		{"CRC32 of other bytes", plain(func(c *call) { c.header = header("x-amz-checksum-crc32", "AAAAAA==") }), 400, "BadDigest"},
		{"CRC32C of other bytes", plain(func(c *call) { c.header = header("x-amz-checksum-crc32c", "AAAAAA==") }), 400, "BadDigest"},
		{"CRC64NVME of other bytes", plain(func(c *call) { c.header = header("x-amz-checksum-crc64nvme", "AAAAAAAAAAA=") }), 400, "BadDigest"},
		{"SHA1 of other bytes", plain(func(c *call) {
			c.header = header("x-amz-checksum-sha1", base64.StdEncoding.EncodeToString(make([]byte, 20)))
		}), 400, "BadDigest"},
		{"SHA256 of other bytes", plain(func(c *call) {
			c.header = header("x-amz-checksum-sha256", base64.StdEncoding.EncodeToString(make([]byte, 32)))
		}), 400, "BadDigest"},
		{"a checksum of the wrong length", plain(func(c *call) { c.header = header("x-amz-checksum-crc32", "AAA=") }), 400, "InvalidRequest"},
		{"a checksum that nobody here can compute", plain(func(c *call) { c.header = header("x-amz-checksum-xxhash64", "AAAAAAAAAAA=") }), 501, "NotImplemented"},
		{"two checksums", plain(func(c *call) {
			c.header = header("x-amz-checksum-crc32", crc(data), "x-amz-checksum-crc32c", "AAAAAA==")
		}), 400, "InvalidRequest"},
		{"a body without a length", plain(func(c *call) { c.after = func(r *http.Request) { r.ContentLength = -1 } }), 411, "MissingContentLength"},
		{"more metadata than 2 KiB", plain(func(c *call) { c.header = header("x-amz-meta-a", strings.Repeat("x", 2049)) }), 400, "MetadataTooLarge"},

		{"a first chunk's signature that is wrong", chunked(streaming, signedChunks{tamper: flip(30)}), 403, "SignatureDoesNotMatch"},
		{"a byte of a chunk that was changed", chunked(streaming, signedChunks{tamper: flip(50_000)}), 403, "SignatureDoesNotMatch"},
		{"a last chunk's signature that is wrong", chunked(streaming, signedChunks{tamper: func(b []byte) []byte { b[len(b)-6] ^= 1; return b }}), 403, "SignatureDoesNotMatch"},
		{"chunks without signatures where they are announced", chunked(streaming, signedChunks{tamper: func([]byte) []byte { return []byte("186a0\r\n" + string(data) + "\r\n0\r\n\r\n") }}), 403, "SignatureDoesNotMatch"},
		{"two chunks of one signature", chunked(streaming, signedChunks{size: 50_000, tamper: func(b []byte) []byte {
			half := len("c350;chunk-signature=") + 64 + 4 + 50_000
			return append(append([]byte{}, b[:half]...), b...)
		}}), 403, "SignatureDoesNotMatch"},
		{"a truncated chunk", chunked(streaming, signedChunks{tamper: cut(40_000)}), 400, "IncompleteBody"},
		{"no last chunk", chunked(streaming, signedChunks{tamper: cut(2 + 2 + 64 + len("0;chunk-signature="))}), 400, "IncompleteBody"},
		{"a chunk that is longer than its header says", chunked(streaming, signedChunks{tamper: replace("9c40;", "9c3f;")}), 400, "InvalidRequest"},
		{"a chunk of negative size", chunked(streaming, signedChunks{tamper: replace("9c40;", "-9c4;")}), 400, "InvalidRequest"},
		{"a chunk's size that is no number", chunked(streaming, signedChunks{tamper: replace("9c40;", "zzzz;")}), 400, "InvalidRequest"},
		{"a chunk's size past all numbers", chunked(streaming, signedChunks{tamper: replace("9c40;", "ffffffffffffffffff;")}), 400, "InvalidRequest"},
		{"a chunk's header without end", chunked(streaming, signedChunks{tamper: func([]byte) []byte { return bytes.Repeat([]byte("1"), 100_000) }}), 400, "InvalidRequest"},
		{"fewer bytes than the decoded length", chunked(streaming, signedChunks{}, "x-amz-decoded-content-length", "100001"), 400, "IncompleteBody"},
		{"more bytes than the decoded length", chunked(streaming, signedChunks{}, "x-amz-decoded-content-length", "99999"), 400, "IncompleteBody"},
		{"no decoded length", chunked(streaming, signedChunks{}, "x-amz-decoded-content-length", ""), 411, "MissingContentLength"},
		{"a trailer where none is announced", chunked(streaming, signedChunks{trailers: []string{right}}), 400, "MalformedTrailerError"},
		{"chunks of ECDSA", chunked("STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD", signedChunks{}), 501, "NotImplemented"},

		{"signed trailer: checksum of other bytes", chunked(streamingTrailer, signedChunks{trailers: []string{wrong}}, trailer...), 400, "BadDigest"},
		{"signed trailer that was changed", chunked(streamingTrailer, signedChunks{trailers: []string{wrong}, tamper: replace(wrong, right)}, trailer...), 403, "SignatureDoesNotMatch"},
		{"signed trailer without its signature", chunked(streamingTrailer, signedChunks{trailers: []string{right}, tamper: cut(2 + 2 + 64 + len("x-amz-trailer-signature:"))}, trailer...), 400, "IncompleteBody"},
		{"signed trailer that is missing", chunked(streamingTrailer, signedChunks{}, trailer...), 400, "IncompleteBody"},
		{"unsigned trailer: checksum of other bytes", chunked(unsignedTrailer, signedChunks{trailers: []string{wrong}}, trailer...), 400, "BadDigest"},
		{"unsigned trailer: a byte that was changed", chunked(unsignedTrailer, signedChunks{trailers: []string{right}, tamper: flip(500)}, trailer...), 400, "BadDigest"},
		{"unsigned trailer that is missing", chunked(unsignedTrailer, signedChunks{}, trailer...), 400, "MalformedTrailerError"},
		{"unsigned trailer that was not announced", chunked(unsignedTrailer, signedChunks{trailers: []string{right, "x-amz-checksum-sha1:AAAA"}}, trailer...), 400, "MalformedTrailerError"},
		{"unsigned trailer given twice", chunked(unsignedTrailer, signedChunks{trailers: []string{right, right}}, trailer...), 400, "MalformedTrailerError"},
		{"unsigned trailer of the wrong length", chunked(unsignedTrailer, signedChunks{trailers: []string{"x-amz-checksum-crc32:AAA="}}, trailer...), 400, "InvalidRequest"},
		{"trailers without end", chunked(unsignedTrailer, signedChunks{trailers: []string{right + strings.Repeat(" ", 10_000)}}, trailer...), 400, "MalformedTrailerError"},
		{"a trailer that is announced as nothing", chunked(unsignedTrailer, signedChunks{trailers: []string{right}}), 400, "MalformedTrailerError"},
		{"a trailer that is no checksum", chunked(unsignedTrailer, signedChunks{trailers: []string{right}}, "x-amz-trailer", "x-amz-meta-a"), 400, "InvalidRequest"},
		{"bytes after the last trailer", chunked(unsignedTrailer, signedChunks{trailers: []string{right}, tamper: func(b []byte) []byte { return append(b, "more"...) }}, trailer...), 400, "MalformedTrailerError"},
	})
	// The same encodings are taken when nothing is wrong with them.
	for _, c := range []call{
		chunked(streaming, signedChunks{}),
		chunked(streaming, signedChunks{size: 1 << 20}),
		chunked(streaming, signedChunks{size: 10}),
		chunked(streamingTrailer, signedChunks{trailers: []string{right}}, trailer...),
		chunked(unsignedTrailer, signedChunks{trailers: []string{right}}, trailer...),
		plain(func(c *call) { c.payload = "UNSIGNED-PAYLOAD" }),
		plain(func(c *call) { c.header = header("x-amz-checksum-crc32", crc(data)) }),
	} {
		f.m.Delete(t.Context(), "a/b")
		a := f.must(t, c)
		if v, err := f.m.get("a/b"); err != nil || !bytes.Equal(v.data, data) {
			t.Errorf("%s: not what was put: %v", c.payload, err)
		}
		if strings.Contains(c.payload, "TRAILER") && a.header.Get("X-Amz-Checksum-Crc32") != crc(data) {
			t.Errorf("%s: the checksum that was verified is not in the answer", c.payload)
		}
	}
}

func TestKeysThatAreNone(t *testing.T) {
	f := serve(t)
	data := []byte("x")
	long := strings.Repeat("k", gateway.MaxKey)
	var cases []refuse
	for name, key := range map[string]string{
		"a parent segment":            "a/../b",
		"parents above the bucket":    "../../etc/passwd",
		"an encoded parent":           "a/%2e%2e/b",
		"an encoded slash and parent": "..%2F..%2Fetc",
		"a trailing parent":           "a/..",
		"only a parent":               "..",
		"a segment that is a dot":     "a/./b",
		"an empty segment":            "a//b",
		"a leading slash":             "/a",
		"an encoded leading slash":    "%2Fa",
		"two trailing slashes":        "a//",
		"bytes that are not UTF-8":    "a%FFb",
		"a cut character":             "a%E6%97",
		"a surrogate":                 "%ED%A0%80",
		"an overlong dot":             "%C0%AE%C0%AE/a",
		"a NUL":                       "a%00b",
		"an escape character":         "a%1Bb",
		"no character of Unicode":     "a%EF%BF%BFb",
	} {
		cases = append(cases, refuse{"put: " + name, call{method: "PUT", path: "/" + bucket + "/" + key, body: data}, 400, "InvalidArgument"},
			refuse{"get: " + name, call{method: "GET", path: "/" + bucket + "/" + key}, 400, "InvalidArgument"},
			refuse{"copy from: " + name, call{method: "PUT", path: object, header: map[string]string{"x-amz-copy-source": "/" + bucket + "/" + key}}, 400, "InvalidArgument"})
	}
	cases = append(cases,
		refuse{"1,025 bytes", call{method: "PUT", path: "/" + bucket + "/" + long + "x", body: data}, 400, "KeyTooLongError"},
		refuse{"1,025 bytes in fewer characters", call{method: "PUT", path: "/" + bucket + "/" + strings.Repeat("%C3%BC", 512) + "xy", body: data}, 400, "KeyTooLongError"},
		refuse{"a slash before the bucket", call{method: "PUT", path: "//" + bucket + "/a", body: data}, 400, "InvalidURI"},
		refuse{"a copy's source that is not encoded", call{method: "PUT", path: object, header: map[string]string{"x-amz-copy-source": "/results/%zz"}}, 400, "InvalidArgument"},
		refuse{"a copy's source without a key", call{method: "PUT", path: object, header: map[string]string{"x-amz-copy-source": "/results"}}, 400, "InvalidArgument"},
		refuse{"a copy's source in an unknown bucket", call{method: "PUT", path: object, header: map[string]string{"x-amz-copy-source": "/unknown/a"}}, 404, "NoSuchBucket"},
	)
	f.refuses(t, cases)

	for path, key := range map[string]string{
		long:               long,
		"a+b":              "a+b",
		"a%2Bb":            "a+b",
		"a%20b":            "a b",
		"a%252Fb":          "a%2Fb",
		"a%2Fb":            "a/b",
		"...":              "...",
		"a/..b/c..":        "a/..b/c..",
		"folder/":          "folder/",
		"%7Etilde":         "~tilde",
		"a%3Fb%23c%26d%3D": "a?b#c&d=",
		"%E6%97%A5":        "日",
		"tab%09":           "tab\t",
		"a:b@c!$&'()*,;=":  "a:b@c!$&'()*,;=",
	} {
		f.must(t, call{method: "PUT", path: "/" + bucket + "/" + path, body: []byte(key)})
		if a := f.must(t, call{method: "GET", path: "/" + bucket + "/" + path}); string(a.body) != key {
			t.Errorf("%s: got %q", path, a.body)
		}
		if _, err := f.m.get(key); err != nil {
			t.Errorf("%s is not stored as %q", path, key)
		}
	}
	// What is no percent-encoding at all, net/http refuses.
	if line := f.raw(t, "GET /results/a%zz HTTP/1.1\r\nHost: x\r\n\r\n"); !strings.Contains(line, " 400 ") {
		t.Errorf("a path that is not encoded: %s", line)
	}
}

func TestMultipartRequestsThatAreWrong(t *testing.T) {
	f := serve(t)
	f.put(t, "a/b", []byte("x"))
	data := []byte("part")
	upload, err := f.m.Create(t.Context(), "a/b", gateway.PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	part, err := f.m.PutPart(t.Context(), "a/b", upload, 1, 4, bytes.NewReader(data), source.Sums{})
	if err != nil {
		t.Fatal(err)
	}
	q := func(pairs ...string) url.Values {
		v := url.Values{}
		for i := 0; i < len(pairs); i += 2 {
			v.Set(pairs[i], pairs[i+1])
		}
		return v
	}
	list := func(parts ...string) []byte {
		return []byte("<CompleteMultipartUpload>" + strings.Join(parts, "") + "</CompleteMultipartUpload>")
	}
	one := func(number any, etag string) string {
		return fmt.Sprintf("<Part><PartNumber>%v</PartNumber><ETag>%s</ETag></Part>", number, etag)
	}
	complete := func(body []byte) call {
		return call{method: "POST", path: object, query: q("uploadId", upload), body: body}
	}
	var many []string
	for i := range gateway.MaxParts + 1 {
		many = append(many, one(i+1, part.ETag))
	}
	f.refuses(t, []refuse{
		{"part 0", call{method: "PUT", path: object, query: q("partNumber", "0", "uploadId", upload), body: data}, 400, "InvalidArgument"},
		{"part 10001", call{method: "PUT", path: object, query: q("partNumber", "10001", "uploadId", upload), body: data}, 400, "InvalidArgument"},
		{"part -1", call{method: "PUT", path: object, query: q("partNumber", "-1", "uploadId", upload), body: data}, 400, "InvalidArgument"},
		{"part x", call{method: "PUT", path: object, query: q("partNumber", "x", "uploadId", upload), body: data}, 400, "InvalidArgument"},
		{"no part number: not a put of the object", call{method: "PUT", path: object, query: q("uploadId", upload), body: data}, 400, "InvalidArgument"},
		{"no upload: not a put of the object", call{method: "PUT", path: object, query: q("partNumber", "2"), body: data}, 400, "InvalidArgument"},
		{"a part of an unknown upload", call{method: "PUT", path: object, query: q("partNumber", "2", "uploadId", "none"), body: data}, 404, "NoSuchUpload"},
		{"a part of another key's upload", call{method: "PUT", path: object + "c", query: q("partNumber", "2", "uploadId", upload), body: data}, 404, "NoSuchUpload"},
		{"a part with a bad digest", call{method: "PUT", path: object, query: q("partNumber", "2", "uploadId", upload), body: data, header: map[string]string{"content-md5": zeroMD5}}, 400, "BadDigest"},
		{"a copied part beyond its source", call{method: "PUT", path: object, query: q("partNumber", "2", "uploadId", upload), header: map[string]string{"x-amz-copy-source": "/results/none"}}, 404, "NoSuchKey"},
		{"completion of an unknown upload", call{method: "POST", path: object, query: q("uploadId", "none"), body: list(one(1, part.ETag))}, 404, "NoSuchUpload"},
		{"no parts", complete(list()), 400, "MalformedXML"},
		{"10,001 parts", complete(list(many...)), 400, "MalformedXML"},
		{"parts out of order", complete(list(one(2, part.ETag), one(1, part.ETag))), 400, "InvalidPartOrder"},
		{"a part twice", complete(list(one(1, part.ETag), one(1, part.ETag))), 400, "InvalidPartOrder"},
		{"a part that was not put", complete(list(one(1, part.ETag), one(2, part.ETag))), 400, "InvalidPart"},
		{"a part with another ETag", complete(list(one(1, "0123"))), 400, "InvalidPart"},
		{"part number 10001", complete(list(one(10001, part.ETag))), 400, "InvalidArgument"},
		{"a part number that is none", complete(list(one("one", part.ETag))), 400, "MalformedXML"},
		{"XML that ends early", complete([]byte("<CompleteMultipartUpload><Part>")), 400, "MalformedXML"},
		{"XML that goes on", complete(append(list(one(1, part.ETag)), list(one(1, part.ETag))...)), 400, "MalformedXML"},
		{"another document", complete([]byte("<Delete></Delete>")), 400, "MalformedXML"},
		{"entities that grow", complete([]byte(`<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><CompleteMultipartUpload><Part><ETag>&b;</ETag></Part></CompleteMultipartUpload>`)), 400, "MalformedXML"},
		{"XML of more than 8 MiB", complete(bytes.Repeat([]byte(" "), 8<<20+1)), 400, "MaxMessageLengthExceeded"},
		{"XML of more than 8 MiB, length unknown", func() call {
			c := complete(bytes.Repeat([]byte(" "), 8<<20+1))
			c.payload = "UNSIGNED-PAYLOAD"
			c.after = func(r *http.Request) { r.ContentLength = -1 }
			return c
		}(), 400, "MaxMessageLengthExceeded"},
		{"abort of an unknown upload", call{method: "DELETE", path: object, query: q("uploadId", "none")}, 404, "NoSuchUpload"},
		{"abort on a condition", call{method: "DELETE", path: object, query: q("uploadId", upload), header: map[string]string{"x-amz-if-match-initiated-time": "Mon, 01 Jan 2024 00:00:00 GMT"}}, 501, "NotImplemented"},
		{"parts of an unknown upload", call{method: "GET", path: object, query: q("uploadId", "none")}, 404, "NoSuchUpload"},
		{"abort of no upload: not a delete of the object", call{method: "DELETE", path: object, query: q("uploadId", "")}, 404, "NoSuchUpload"},
		{"parts of no upload: not a get of the object", call{method: "GET", path: object, query: q("uploadId", "")}, 404, "NoSuchUpload"},
		{"a part of no upload", call{method: "PUT", path: object, query: q("partNumber", "2", "uploadId", ""), body: data}, 404, "NoSuchUpload"},
		{"completion of no upload", call{method: "POST", path: object, query: q("uploadId", ""), body: list(one(1, part.ETag))}, 404, "NoSuchUpload"},
	})
}

func TestBulkDeletesThatAreWrong(t *testing.T) {
	f := serve(t)
	f.put(t, "kept", []byte("x"))
	del := func(body string) call {
		return call{method: "POST", path: "/" + bucket, query: url.Values{"delete": {""}}, body: []byte(body)}
	}
	bad := del("<Delete><Object><Key>kept</Key></Object></Delete>")
	bad.header = map[string]string{"content-md5": zeroMD5}
	f.refuses(t, []refuse{
		{"no keys", del("<Delete></Delete>"), 400, "MalformedXML"},
		{"1,001 keys", del("<Delete>" + strings.Repeat("<Object><Key>kept</Key></Object>", 1001) + "</Delete>"), 400, "MalformedXML"},
		{"more than 2 MiB", del("<Delete>" + strings.Repeat(" ", 2<<20) + "</Delete>"), 400, "MaxMessageLengthExceeded"},
		{"no XML", del("kept"), 400, "MalformedXML"},
		{"another digest", bad, 400, "BadDigest"},
	})
	// Keys fail one by one.
	a := f.must(t, del("<Delete><Object><Key>../kept</Key></Object><Object><Key>kept</Key><VersionId>7</VersionId></Object><Object><Key>kept</Key><ETag>x</ETag></Object>"+
		"<Object><Key>kept</Key><Size>0</Size></Object><Object><Key>kept</Key><LastModifiedTime>Mon, 01 Jan 2024 00:00:00 GMT</LastModifiedTime></Object><Object><Key>none</Key></Object></Delete>"))
	for want, times := range map[string]int{"<Code>InvalidArgument</Code>": 1, "<Code>NoSuchVersion</Code>": 1, "<Code>NotImplemented</Code>": 3, "<Deleted><Key>none</Key></Deleted>": 1} {
		if bytes.Count(a.body, []byte(want)) != times {
			t.Errorf("not %d times %s in %s", times, want, a.body)
		}
	}
	if _, err := f.m.get("kept"); err != nil {
		t.Error("what could not be deleted was")
	}
}

func TestWhatIsNotSupportedIsRefused(t *testing.T) {
	f := serve(t)
	f.put(t, "a/b", []byte("x"))
	h := func(name, value string) map[string]string { return map[string]string{name: value} }
	var cases []refuse
	for _, name := range []string{"acl", "tagging", "retention", "legal-hold", "torrent", "restore", "select", "attributes", "renameObject", "annotation", "aFeatureOfTomorrow"} {
		cases = append(cases, refuse{"PUT ?" + name, call{method: "PUT", path: object, query: url.Values{name: {""}}, body: []byte("y")}, 501, "NotImplemented"},
			refuse{"DELETE ?" + name, call{method: "DELETE", path: object, query: url.Values{name: {""}}}, 501, "NotImplemented"})
	}
	for _, name := range []string{"acl", "policy", "lifecycle", "versioning", "cors", "encryption", "tagging", "replication", "website", "notification", "abac", "metadataJournalTable"} {
		cases = append(cases, refuse{"PUT bucket ?" + name, call{method: "PUT", path: "/" + bucket, query: url.Values{name: {""}}, body: []byte("y")}, 501, "NotImplemented"},
			refuse{"DELETE bucket ?" + name, call{method: "DELETE", path: "/" + bucket, query: url.Values{name: {""}}}, 501, "NotImplemented"})
	}
	cases = append(cases,
		refuse{"an annotation", call{method: "GET", path: object, query: url.Values{"annotation": {""}, "annotationName": {"a"}}}, 501, "NotImplemented"},
		refuse{"attribute-based access", call{method: "GET", path: "/" + bucket, query: url.Values{"abac": {""}}}, 501, "NotImplemented"},
		refuse{"tables of metadata", call{method: "GET", path: "/" + bucket, query: url.Values{"metadataConfiguration": {""}}}, 501, "NotImplemented"},
		refuse{"versions", call{method: "GET", path: "/" + bucket, query: url.Values{"versions": {""}}}, 501, "NotImplemented"},
		refuse{"a form's post", call{method: "POST", path: "/" + bucket}, 501, "NotImplemented"},
		refuse{"deletion of the bucket", call{method: "DELETE", path: "/" + bucket}, 501, "NotImplemented"},
		refuse{"creation of the bucket", call{method: "PUT", path: "/" + bucket}, 409, "BucketAlreadyOwnedByYou"},
		refuse{"PATCH", call{method: "PATCH", path: object}, 405, "MethodNotAllowed"},
		refuse{"POST of an object", call{method: "POST", path: object}, 405, "MethodNotAllowed"},
		refuse{"a version", call{method: "GET", path: object, query: url.Values{"versionId": {"7"}}}, 404, "NoSuchVersion"},
		refuse{"deletion of a version", call{method: "DELETE", path: object, query: url.Values{"versionId": {"7"}}}, 404, "NoSuchVersion"},
		refuse{"an empty version", call{method: "GET", path: object, query: url.Values{"versionId": {""}}}, 400, "InvalidArgument"},
		refuse{"deletion of an empty version", call{method: "DELETE", path: object, query: url.Values{"versionId": {""}}}, 400, "InvalidArgument"},
		refuse{"deletion on a condition", call{method: "DELETE", path: object, header: h("if-match", "x")}, 501, "NotImplemented"},
		refuse{"deletion on a size", call{method: "DELETE", path: object, header: h("x-amz-if-match-size", "0")}, 501, "NotImplemented"},
		refuse{"deletion on a time", call{method: "DELETE", path: object, header: h("x-amz-if-match-last-modified-time", "Mon, 01 Jan 2024 00:00:00 GMT")}, 501, "NotImplemented"},
		refuse{"deletion on a size, presigned", call{method: "DELETE", path: object, query: url.Values{"x-amz-if-match-size": {"0"}}, presign: "60"}, 501, "NotImplemented"},
		refuse{"a public ACL", call{method: "PUT", path: object, header: h("x-amz-acl", "public-read")}, 400, "AccessControlListNotSupported"},
		refuse{"a grant", call{method: "PUT", path: object, header: h("x-amz-grant-read", "id=1")}, 400, "AccessControlListNotSupported"},
		refuse{"tags", call{method: "PUT", path: object, header: h("x-amz-tagging", "a=b")}, 501, "NotImplemented"},
		refuse{"encryption by the bucket", call{method: "PUT", path: object, header: h("x-amz-server-side-encryption", "aws:kms")}, 501, "NotImplemented"},
		refuse{"encryption with a key of the client", call{method: "PUT", path: object, header: h("x-amz-server-side-encryption-customer-algorithm", "AES256")}, 501, "NotImplemented"},
		refuse{"a lock", call{method: "PUT", path: object, header: h("x-amz-object-lock-mode", "COMPLIANCE")}, 501, "NotImplemented"},
		refuse{"another storage class", call{method: "PUT", path: object, header: h("x-amz-storage-class", "GLACIER")}, 400, "InvalidStorageClass"},
		refuse{"appending", call{method: "PUT", path: object, header: h("x-amz-write-offset-bytes", "1")}, 501, "NotImplemented"},
		refuse{"a put unless an ETag is there", call{method: "PUT", path: object, header: h("if-none-match", `"x"`)}, 501, "NotImplemented"},
		refuse{"a metadata directive of no sense", call{method: "PUT", path: object + "c", header: map[string]string{"x-amz-copy-source": object, "x-amz-metadata-directive": "MERGE"}}, 400, "InvalidArgument"},
		refuse{"a copy to itself", call{method: "PUT", path: object, header: h("x-amz-copy-source", object)}, 400, "InvalidRequest"},
		refuse{"put at the root", call{method: "PUT", path: "/"}, 405, "MethodNotAllowed"},
		refuse{"list-type 3", call{method: "GET", path: "/" + bucket, query: url.Values{"list-type": {"3"}}}, 400, "InvalidArgument"},
		refuse{"encoding-type hex", call{method: "GET", path: "/" + bucket, query: url.Values{"encoding-type": {"hex"}}}, 400, "InvalidArgument"},
		refuse{"max-keys -1", call{method: "GET", path: "/" + bucket, query: url.Values{"max-keys": {"-1"}}}, 400, "InvalidArgument"},
		refuse{"max-keys x", call{method: "GET", path: "/" + bucket, query: url.Values{"max-keys": {"x"}}}, 400, "InvalidArgument"},
		refuse{"a continuation token that is none", call{method: "GET", path: "/" + bucket, query: url.Values{"list-type": {"2"}, "continuation-token": {"%"}}}, 400, "InvalidArgument"},
		refuse{"a prefix that is not UTF-8", call{method: "GET", path: "/" + bucket, query: url.Values{"prefix": {"\xff"}}}, 400, "InvalidArgument"},
	)
	f.refuses(t, cases)
	if v, err := f.m.get("a/b"); err != nil || string(v.data) != "x" {
		t.Error("the object was changed")
	}
}
