package gateway_test

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/xml"
	"maps"
	"net/url"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source"
)

// What a client says of its content before it is handed on with it; what it says afterwards, or of its chunks, cannot be.
func TestWhatTheClientSaysOfItsContentBeforehandIsHandedOn(t *testing.T) {
	f := serve(t)
	data := random(100_000)
	m, h := md5.Sum(data), sha256.Sum256(data)
	b64 := base64.StdEncoding.EncodeToString
	var begun struct {
		UploadID string `xml:"UploadId"`
	}
	if err := xml.Unmarshal(f.must(t, call{method: "POST", path: object, query: url.Values{"uploads": {""}}}).body, &begun); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what   string
		header map[string]string
		in     string
		chunks *signedChunks
		want   source.Sums
	}{
		{"a digest of the payload", nil, "", nil, source.Sums{SHA256: h[:]}},
		{"and an MD5", map[string]string{"content-md5": b64(m[:])}, "", nil, source.Sums{MD5: m[:], SHA256: h[:]}},
		{"the digest twice", map[string]string{"x-amz-checksum-sha256": b64(h[:])}, "", nil, source.Sums{SHA256: h[:]}},
		{"nothing", nil, "UNSIGNED-PAYLOAD", nil, source.Sums{}},
		{"a CRC32", map[string]string{"x-amz-checksum-crc32": crc(data)}, "UNSIGNED-PAYLOAD", nil, source.Sums{}},
		{"an MD5 as a checksum", map[string]string{"x-amz-checksum-md5": b64(m[:])}, "UNSIGNED-PAYLOAD", nil, source.Sums{MD5: m[:]}},
		{"chunks", nil, streaming, &signedChunks{size: 40_000}, source.Sums{}},
		{"chunks and an MD5", map[string]string{"content-md5": b64(m[:])}, streaming, &signedChunks{size: 40_000}, source.Sums{MD5: m[:]}},
		{"a trailer", map[string]string{"x-amz-trailer": "x-amz-checksum-sha256"}, streamingTrailer,
			&signedChunks{size: 40_000, trailers: []string{"x-amz-checksum-sha256:" + b64(h[:])}}, source.Sums{}},
	} {
		for _, query := range []url.Values{nil, {"uploadId": {begun.UploadID}, "partNumber": {"1"}}} {
			put := call{method: "PUT", path: object, query: query, body: data, header: c.header, payload: c.in}
			if c.chunks != nil {
				put.chunks = c.chunks.encode
			}
			f.m.told = source.Sums{MD5: []byte("nothing was put")}
			f.must(t, put)
			if d := cmp.Diff(c.want, f.m.told); d != "" {
				t.Errorf("%s, %v:\n%s", c.what, query, d)
			}
		}
	}
}

// What AWS's presigner for JavaScript signs is the checksum of the body that it does not have; the others are kept to.
func TestAPresignedChecksumOfNothingIsOfNoBody(t *testing.T) {
	f := serve(t)
	data := random(1000)
	b64 := base64.StdEncoding.EncodeToString
	none := sha256.Sum256(nil)
	for _, query := range []url.Values{
		{"x-amz-checksum-crc32": {crc(nil)}, "x-amz-sdk-checksum-algorithm": {"CRC32"}},
		{"x-amz-checksum-sha256": {b64(none[:])}},
		{"x-amz-checksum-crc32": {crc(data)}},
	} {
		f.must(t, call{method: "PUT", path: object, query: maps.Clone(query), body: data, presign: "60"})
		if v, err := f.m.get("a/b"); err != nil || !bytes.Equal(v.data, data) {
			t.Errorf("%v: other bytes: %v", query, err)
		}
		f.must(t, call{method: "DELETE", path: object})
	}
	var begun struct {
		UploadID string `xml:"UploadId"`
	}
	if err := xml.Unmarshal(f.must(t, call{method: "POST", path: object, query: url.Values{"uploads": {""}}}).body, &begun); err != nil {
		t.Fatal(err)
	}
	f.must(t, call{method: "PUT", path: object, query: url.Values{"uploadId": {begun.UploadID}, "partNumber": {"1"}, "x-amz-checksum-crc32": {crc(nil)}}, body: data, presign: "60"})
}
