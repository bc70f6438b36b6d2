package gateway_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

// The calls of the s3 driver of Argo Workflows, with the options that it gives them.
func TestArgosS3Driver(t *testing.T) {
	for name, options := range map[string][]option{"plain HTTP": nil, "TLS": {overTLS}} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, options...)
			c := f.client(t, accessKey, secretKey, false)
			ctx := t.Context()
			put := minio.PutObjectOptions{SendContentMd5: true}

			// GET location: is the bucket there?
			if there, err := c.BucketExists(ctx, bucket); err != nil || !there {
				t.Fatalf("bucket: %v %v", there, err)
			}
			if there, err := c.BucketExists(ctx, "unknown"); err != nil || there {
				t.Errorf("a bucket that is not there: %v %v", there, err)
			}

			// Save a file and load it.
			dir := t.TempDir()
			file, back := filepath.Join(dir, "main.tgz"), filepath.Join(dir, "back")
			data := random(300_000)
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
			key := "my-workflow/my-pod-123/out.tgz"
			if _, err := c.FPutObject(ctx, bucket, key, file, put); err != nil {
				t.Fatal(err)
			}
			if err := c.FGetObject(ctx, bucket, key, back, minio.GetObjectOptions{}); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
				t.Errorf("loaded otherwise: %v", err)
			}
			// A large one goes in parts, each with its Content-MD5.
			large := random(20 << 20)
			if err := os.WriteFile(file, large, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := c.FPutObject(ctx, bucket, "large", file, put); err != nil {
				t.Fatal(err)
			}
			if v, err := f.m.get("large"); err != nil || !bytes.Equal(v.data, large) || !strings.HasSuffix(v.info.ETag, "-2") {
				t.Errorf("saved in parts otherwise: %v", err)
			}
			// A stream whose length is not known.
			if _, err := c.PutObject(ctx, bucket, "stream", io.MultiReader(bytes.NewReader(large)), -1, minio.PutObjectOptions{PartSize: 16 << 20}); err != nil {
				t.Fatal(err)
			}
			if v, err := f.m.get("stream"); err != nil || !bytes.Equal(v.data, large) {
				t.Errorf("streamed otherwise: %v", err)
			}

			// A key that is no object: NoSuchKey begins the fallback to a directory.
			err := c.FGetObject(ctx, bucket, "results", back, minio.GetObjectOptions{})
			if codeOf(err) != "NoSuchKey" {
				t.Errorf("no object: %v", err)
			}
			if _, err := c.StatObject(ctx, bucket, "results", minio.StatObjectOptions{}); codeOf(err) != "NoSuchKey" {
				t.Errorf("no object: %v", err)
			}
			var want []string
			for _, name := range []string{"results/1", "results/deep/2", "results/deep/3", "results-of-others"} {
				if _, err := c.PutObject(ctx, bucket, name, bytes.NewReader(data), int64(len(data)), put); err != nil {
					t.Fatal(err)
				}
				if strings.HasPrefix(name, "results/") {
					want = append(want, name)
				}
			}
			var got []string
			for o := range c.ListObjects(ctx, bucket, minio.ListObjectsOptions{Prefix: "results/", Recursive: true}) {
				if o.Err != nil {
					t.Fatal(o.Err)
				}
				got = append(got, o.Key)
			}
			if !slices.Equal(got, want) {
				t.Errorf("the directory lists %q", got)
			}
			for o := range c.ListObjects(ctx, bucket, minio.ListObjectsOptions{Prefix: "results/", Recursive: false, MaxKeys: 1}) {
				if o.Err != nil {
					t.Fatal(o.Err)
				}
			}
			for range c.ListObjects(ctx, bucket, minio.ListObjectsOptions{Prefix: "main.log/", Recursive: true}) {
				t.Error("an empty directory has an entry")
			}

			// The UI reads a stream.
			object, err := c.GetObject(ctx, bucket, key, minio.GetObjectOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer object.Close()
			if _, err := object.Seek(100_000, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(object); err != nil || !bytes.Equal(got, data[100_000:]) {
				t.Errorf("a stream from the middle: %d bytes, %v", len(got), err)
			}

			// Garbage collection, twice.
			for range 2 {
				for _, name := range append(want, key, "large", "stream", "results-of-others") {
					if err := c.RemoveObject(ctx, bucket, name, minio.RemoveObjectOptions{}); err != nil {
						t.Errorf("delete %s: %v", name, err)
					}
				}
			}
			f.isEmpty(t)

			// What it tries again: its list has SlowDown, InternalError and the 5xx.
			for kind, code := range map[error]string{source.ErrThrottled: "SlowDown", gateway.ErrBusy: "SlowDown", source.ErrUnavailable: "ServiceUnavailable", errDisk: "InternalError"} {
				f.m.setFail(func(string) error { return kind })
				if _, err := c.PutObject(ctx, bucket, "x", bytes.NewReader(data), int64(len(data)), put); codeOf(err) != code {
					t.Errorf("%v: %v", kind, err)
				}
			}
		})
	}
}
