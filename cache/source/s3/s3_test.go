package s3_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/s3"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
	"github.com/stepcache/stepcache/test/bucket"
)

func open(ctx context.Context, c source.Config) (source.Source, error) {
	b, err := s3.Open(ctx, c)
	if err != nil {
		return nil, err
	}
	return b, nil
}

var buckets atomic.Int64

// fixture makes a bucket on the server and the config that opens it.
func fixture(t *testing.T, s *bucket.Server) source.Config {
	t.Helper()
	name := fmt.Sprintf("bucket-%d", buckets.Add(1))
	if err := s.MakeBucket(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for key, value := range map[string]string{"accessKeyID": s.AccessKey, "accessKeySecret": s.SecretKey} {
		if err := os.WriteFile(filepath.Join(dir, key), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return source.Config{URL: "s3://" + name, Endpoint: s.Direct(), Region: s.Region, CredentialsDir: dir}
}

func TestConformance(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	client, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	sourcetest.Run(t, func(t *testing.T) sourcetest.Fixture {
		c := fixture(t, s)
		_, name, _, err := source.Split(c.URL)
		if err != nil {
			t.Fatal(err)
		}
		return sourcetest.Fixture{Config: c, Open: open, Digest: source.CRC64NVME,
			NoKey: func(key string) string { // this server keeps objects as files
				if strings.Contains(key, "//") || strings.HasPrefix(key, "/") || strings.Contains(key, "./") {
					return "it cleans paths"
				}
				return ""
			},
			PutByHand: func(t *testing.T, key string, content []byte) {
				_, err := client.PutObject(context.Background(), name, key, bytes.NewReader(content), int64(len(content)), minio.PutObjectOptions{})
				if err != nil {
					t.Fatal(err)
				}
			},
			Leftovers: func(t *testing.T) int {
				n := 0
				for u := range client.ListIncompleteUploads(context.Background(), name, "", true) {
					if u.Err != nil {
						t.Fatal(u.Err)
					}
					n++
				}
				return n
			},
		}
	})
}
