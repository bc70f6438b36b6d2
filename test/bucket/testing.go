package bucket

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"github.com/minio/minio-go/v7"
)

// StartT runs a server for the length of a test.
func StartT(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// PutT puts an object past the limits and returns its ETag, making the bucket where it is missing.
func (s *Server) PutT(t testing.TB, bucket, key string, content []byte) string {
	t.Helper()
	c, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	ok, err := c.BucketExists(ctx, bucket)
	if err == nil && !ok {
		err = s.MakeBucket(ctx, bucket)
	}
	if err != nil {
		t.Fatal(err)
	}
	// With the digest in the header and no digests of chunks the body goes as it is; chunk signatures make an
	// empty object's body one that this server takes for the next request.
	sum := sha256.Sum256(content)
	info, err := minio.Core{Client: c}.PutObject(ctx, bucket, key, bytes.NewReader(content), int64(len(content)), "", hex.EncodeToString(sum[:]), minio.PutObjectOptions{DisableContentSha256: true})
	if err != nil {
		t.Fatalf("put %s/%s: %v", bucket, key, err)
	}
	return info.ETag
}
