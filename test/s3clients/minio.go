package s3clients

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// MinioGo runs in this process, with signed chunks or (over TLS) an unsigned payload, and with the trailers
// that some of its users switch on.
func MinioGo(t *testing.T, e Endpoint) {
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	if e.CA != "" {
		pem, err := os.ReadFile(e.CA)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	scheme, host, _ := strings.Cut(e.URL, "://")
	for name, trailing := range map[string]bool{"minio-go/": false, "minio-go with trailers/": true} {
		c, err := minio.New(host, &minio.Options{
			Creds: credentials.NewStaticV4(e.AccessKey, e.SecretKey, ""), Secure: scheme == "https", Transport: transport, TrailingHeaders: trailing, MaxRetries: 1,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(name, "/"), func(t *testing.T) { roundTrip(t, c, e.Bucket, name) })
	}
}

func roundTrip(t *testing.T, c *minio.Client, bucket, prefix string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	read := func(key string, o minio.GetObjectOptions) []byte {
		t.Helper()
		object, err := c.GetObject(ctx, bucket, prefix+key, o)
		if err != nil {
			t.Fatal(err)
		}
		defer object.Close()
		b, err := io.ReadAll(object)
		if err != nil {
			t.Fatalf("get %s: %v", key, err)
		}
		return b
	}
	small, large := Random(200_000), Random(11<<20)
	names := []string{"a/small", "a/b c+d&e%f?=ü日本", "a/deep/er/x", "empty"}
	for _, name := range names {
		data := small
		if name == "empty" {
			data = nil
		}
		info, err := c.PutObject(ctx, bucket, prefix+name, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{
			ContentType: "text/x-test", UserMetadata: map[string]string{"Origin": "step 1"}, CacheControl: "no-cache", SendContentMd5: name == "a/small",
		})
		if err != nil {
			t.Fatalf("put %q: %v", name, err)
		}
		if got := read(name, minio.GetObjectOptions{}); !bytes.Equal(got, data) {
			t.Errorf("%q: %d bytes came back, not the %d put", name, len(got), len(data))
		}
		stat, err := c.StatObject(ctx, bucket, prefix+name, minio.StatObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if stat.ETag != info.ETag || stat.Size != int64(len(data)) || stat.ContentType != "text/x-test" || stat.UserMetadata["Origin"] != "step 1" || stat.Metadata.Get("Cache-Control") != "no-cache" {
			t.Errorf("%q: stat says %+v", name, stat)
		}
	}

	info, err := c.PutObject(ctx, bucket, prefix+"a/large", bytes.NewReader(large), int64(len(large)), minio.PutObjectOptions{PartSize: 5 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(info.ETag, "-3") {
		t.Errorf("ETag of an object of three parts: %s", info.ETag)
	}
	if got := read("a/large", minio.GetObjectOptions{}); !bytes.Equal(got, large) {
		t.Error("the object of three parts came back otherwise")
	}
	for _, r := range [][2]int64{{0, 99}, {5<<20 - 1, 5 << 20}, {0, -7}, {int64(len(large)) - 10, 0}} {
		var o minio.GetObjectOptions
		if err := o.SetRange(r[0], r[1]); err != nil {
			t.Fatal(err)
		}
		from, to := r[0], r[1]+1
		switch {
		case r[1] < 0:
			from, to = int64(len(large))+r[1], int64(len(large))
		case r[1] == 0:
			to = int64(len(large))
		}
		if got := read("a/large", o); !bytes.Equal(got, large[from:to]) {
			t.Errorf("range %v: %d bytes, not those of [%d,%d)", r, len(got), from, to)
		}
	}

	list := func(o minio.ListObjectsOptions) (names []string) {
		t.Helper()
		o.Prefix = prefix + o.Prefix
		if o.StartAfter != "" {
			o.StartAfter = prefix + o.StartAfter
		}
		for o := range c.ListObjects(ctx, bucket, o) {
			if o.Err != nil {
				t.Fatal(o.Err)
			}
			names = append(names, strings.TrimPrefix(o.Key, prefix))
		}
		return names
	}
	all := append(slices.Clone(names), "a/large")
	slices.Sort(all)
	for _, v1 := range []bool{false, true} {
		for _, most := range []int{0, 1, 2} {
			if got := list(minio.ListObjectsOptions{Recursive: true, MaxKeys: most, UseV1: v1}); !slices.Equal(got, all) {
				t.Errorf("list, v1 %v, pages of %d: %q", v1, most, got)
			}
			got := list(minio.ListObjectsOptions{Prefix: "a/", MaxKeys: most, UseV1: v1})
			if slices.Sort(got); !slices.Equal(got, []string{"a/b c+d&e%f?=ü日本", "a/deep/", "a/large", "a/small"}) {
				t.Errorf("list below a/, v1 %v, pages of %d: %q", v1, most, got)
			}
		}
	}
	if got := list(minio.ListObjectsOptions{StartAfter: "a/large", Recursive: true}); !slices.Equal(got, []string{"a/small", "empty"}) {
		t.Errorf("list after a/large: %q", got)
	}

	copied, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: bucket, Object: prefix + "copy of"}, minio.CopySrcOptions{Bucket: bucket, Object: prefix + "a/b c+d&e%f?=ü日本"})
	if err != nil {
		t.Fatal(err)
	}
	stat, err := c.StatObject(ctx, bucket, prefix+"copy of", minio.StatObjectOptions{})
	if err != nil || stat.ETag != copied.ETag || stat.UserMetadata["Origin"] != "step 1" || stat.ContentType != "text/x-test" {
		t.Errorf("copy: %+v, %v", stat, err)
	}
	if got := read("copy of", minio.GetObjectOptions{}); !bytes.Equal(got, small) {
		t.Error("the copy has other bytes")
	}
	if _, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: bucket, Object: prefix + "copy of", ReplaceMetadata: true, UserMetadata: map[string]string{"Origin": "step 2"}}, minio.CopySrcOptions{Bucket: bucket, Object: prefix + "copy of"}); err != nil {
		t.Fatal(err)
	}
	if stat, err := c.StatObject(ctx, bucket, prefix+"copy of", minio.StatObjectOptions{}); err != nil || stat.UserMetadata["Origin"] != "step 2" {
		t.Errorf("metadata replaced: %+v, %v", stat, err)
	}
	// Parts that are copied: x-amz-copy-source-range.
	if _, err := c.ComposeObject(ctx, minio.CopyDestOptions{Bucket: bucket, Object: prefix + "composed"},
		minio.CopySrcOptions{Bucket: bucket, Object: prefix + "a/large", MatchRange: true, Start: 1, End: 6 << 20},
		minio.CopySrcOptions{Bucket: bucket, Object: prefix + "a/small"}); err != nil {
		t.Fatal(err)
	}
	if got := read("composed", minio.GetObjectOptions{}); !bytes.Equal(got, append(slices.Clone(large[1:6<<20+1]), small...)) {
		t.Error("the composed object has other bytes")
	}

	if err := c.RemoveObject(ctx, bucket, prefix+"empty", minio.RemoveObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.RemoveObject(ctx, bucket, prefix+"empty", minio.RemoveObjectOptions{}); err != nil {
		t.Errorf("the second delete: %v", err)
	}
	if _, err := c.StatObject(ctx, bucket, prefix+"empty", minio.StatObjectOptions{}); minio.ToErrorResponse(err).Code != "NoSuchKey" {
		t.Errorf("stat of what was deleted: %v", err)
	}
	for e := range c.RemoveObjects(ctx, bucket, c.ListObjects(ctx, bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true}), minio.RemoveObjectsOptions{}) {
		t.Errorf("bulk delete: %v", e)
	}
	if got := list(minio.ListObjectsOptions{Recursive: true}); len(got) != 0 {
		t.Errorf("left after the bulk delete: %q", got)
	}
}
