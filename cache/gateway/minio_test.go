package gateway_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/gateway"
)

const (
	accessKey, secretKey = "WRITER", "writer-secret"
	readKey, readSecret  = "READER", "reader-secret"
	bucket               = "results"
)

// fixture is a gateway on a real connection.
type fixture struct {
	*testing.T
	m      *memory
	other  *memory
	server *httptest.Server
	url    string
	logged *bytes.Buffer
}

type option func(*gateway.Config, *httptest.Server)

func overTLS(_ *gateway.Config, s *httptest.Server) { s.EnableHTTP2 = true }

func serve(t *testing.T, options ...option) *fixture {
	f := &fixture{T: t, m: newMemory(), other: newMemory(), logged: new(bytes.Buffer)}
	config := gateway.Config{
		Buckets: map[string]gateway.Objects{bucket: f.m, "other": f.other, "frozen": readOnly{f.m}},
		Keys: func() []gateway.Credential {
			return []gateway.Credential{{AccessKey: accessKey, SecretKey: secretKey, Write: true}, {AccessKey: readKey, SecretKey: readSecret}}
		},
		Domain: "s3.test",
		Logger: slog.New(slog.NewTextHandler(f.logged, nil)),
	}
	f.server = httptest.NewUnstartedServer(nil)
	for _, o := range options {
		o(&config, f.server)
	}
	h, err := gateway.New(config)
	if err != nil {
		t.Fatal(err)
	}
	f.server.Config.Handler = h
	if f.server.EnableHTTP2 {
		f.server.StartTLS()
	} else {
		f.server.Start()
	}
	f.url = f.server.URL
	t.Cleanup(func() {
		f.server.CloseClientConnections()
		f.server.Close()
	})
	return f
}

func (f *fixture) client(t *testing.T, key, secret string, trailing bool) *minio.Client {
	t.Helper()
	host, _ := strings.CutPrefix(f.url, "http://")
	host, secure := strings.CutPrefix(host, "https://")
	c, err := minio.New(host, &minio.Options{
		Creds: credentials.NewStaticV4(key, secret, ""), Secure: secure, Transport: f.server.Client().Transport, TrailingHeaders: trailing, MaxRetries: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	r.Read(b)
	return b
}

func TestMinioGoRoundTrip(t *testing.T) {
	for _, c := range []struct {
		name     string
		options  []option
		trailing bool
	}{
		{"plain HTTP: signed chunks", nil, false},
		{"plain HTTP: signed chunks and trailer", nil, true},
		{"TLS: unsigned payload", []option{overTLS}, false},
		{"TLS: unsigned payload and trailer", []option{overTLS}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := serve(t, c.options...)
			roundTrip(t, f.client(t, accessKey, secretKey, c.trailing))
			if got := f.m.state(); got != "0 objects, 0 uploads, 0 parts" {
				t.Errorf("left behind: %s", got)
			}
		})
	}
}

func roundTrip(t *testing.T, c *minio.Client) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	read := func(key string, o minio.GetObjectOptions) []byte {
		t.Helper()
		object, err := c.GetObject(ctx, bucket, key, o)
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
	small, large := random(200_000), random(11<<20)
	names := []string{"a/small", "a/b c+d&e%f?=ü日本", "a/deep/er/x", "empty"}
	for _, name := range names {
		data := small
		if name == "empty" {
			data = nil
		}
		info, err := c.PutObject(ctx, bucket, name, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{
			ContentType: "text/x-test", UserMetadata: map[string]string{"Origin": "step 1"}, CacheControl: "no-cache", SendContentMd5: name == "a/small",
		})
		if err != nil {
			t.Fatalf("put %q: %v", name, err)
		}
		if got := read(name, minio.GetObjectOptions{}); !bytes.Equal(got, data) {
			t.Errorf("%q: %d bytes came back, not the %d put", name, len(got), len(data))
		}
		stat, err := c.StatObject(ctx, bucket, name, minio.StatObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if stat.ETag != info.ETag || stat.Size != int64(len(data)) || stat.ContentType != "text/x-test" || stat.UserMetadata["Origin"] != "step 1" || stat.Metadata.Get("Cache-Control") != "no-cache" {
			t.Errorf("%q: stat says %+v", name, stat)
		}
	}

	info, err := c.PutObject(ctx, bucket, "a/large", bytes.NewReader(large), int64(len(large)), minio.PutObjectOptions{PartSize: 5 << 20})
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
		for o := range c.ListObjects(ctx, bucket, o) {
			if o.Err != nil {
				t.Fatal(o.Err)
			}
			names = append(names, o.Key)
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

	copied, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: bucket, Object: "copy of"}, minio.CopySrcOptions{Bucket: bucket, Object: "a/b c+d&e%f?=ü日本"})
	if err != nil {
		t.Fatal(err)
	}
	stat, err := c.StatObject(ctx, bucket, "copy of", minio.StatObjectOptions{})
	if err != nil || stat.ETag != copied.ETag || stat.UserMetadata["Origin"] != "step 1" || stat.ContentType != "text/x-test" {
		t.Errorf("copy: %+v, %v", stat, err)
	}
	if got := read("copy of", minio.GetObjectOptions{}); !bytes.Equal(got, small) {
		t.Error("the copy has other bytes")
	}
	if _, err := c.CopyObject(ctx, minio.CopyDestOptions{Bucket: bucket, Object: "copy of", ReplaceMetadata: true, UserMetadata: map[string]string{"Origin": "step 2"}}, minio.CopySrcOptions{Bucket: bucket, Object: "copy of"}); err != nil {
		t.Fatal(err)
	}
	if stat, err := c.StatObject(ctx, bucket, "copy of", minio.StatObjectOptions{}); err != nil || stat.UserMetadata["Origin"] != "step 2" {
		t.Errorf("metadata replaced: %+v, %v", stat, err)
	}
	// Parts that are copied: x-amz-copy-source-range.
	if _, err := c.ComposeObject(ctx, minio.CopyDestOptions{Bucket: bucket, Object: "composed"},
		minio.CopySrcOptions{Bucket: bucket, Object: "a/large", MatchRange: true, Start: 1, End: 6 << 20},
		minio.CopySrcOptions{Bucket: bucket, Object: "a/small"}); err != nil {
		t.Fatal(err)
	}
	if got := read("composed", minio.GetObjectOptions{}); !bytes.Equal(got, append(slices.Clone(large[1:6<<20+1]), small...)) {
		t.Error("the composed object has other bytes")
	}

	if err := c.RemoveObject(ctx, bucket, "empty", minio.RemoveObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.RemoveObject(ctx, bucket, "empty", minio.RemoveObjectOptions{}); err != nil {
		t.Errorf("the second delete: %v", err)
	}
	if _, err := c.StatObject(ctx, bucket, "empty", minio.StatObjectOptions{}); minio.ToErrorResponse(err).Code != "NoSuchKey" {
		t.Errorf("stat of what was deleted: %v", err)
	}
	for e := range c.RemoveObjects(ctx, bucket, c.ListObjects(ctx, bucket, minio.ListObjectsOptions{Recursive: true}), minio.RemoveObjectsOptions{}) {
		t.Errorf("bulk delete: %v", e)
	}
	if got := list(minio.ListObjectsOptions{Recursive: true}); len(got) != 0 {
		t.Errorf("left after the bulk delete: %q", got)
	}
}

// codeOf is the code of a minio-go error.
func codeOf(err error) string {
	var r minio.ErrorResponse
	if errors.As(err, &r) {
		return r.Code
	}
	if err != nil {
		return err.Error()
	}
	return "none"
}

var _ http.Handler = http.NotFoundHandler()
