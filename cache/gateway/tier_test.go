package gateway_test

import (
	"context"
	"testing"

	"github.com/minio/minio-go/v7"

	s3server "github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/s3clients"
	"github.com/stepcache/stepcache/test/workers"
)

// The same clients against two real workers over a real bucket: half of the names are the other worker's.
func TestRealClientsOfATier(t *testing.T) {
	server, err := s3server.Start(context.Background(), s3server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	if err := server.MakeBucket(t.Context(), "artifacts"); err != nil {
		t.Fatal(err)
	}
	endpoint := workers.Start(t, server, "artifacts", "", 2)[0]
	s3clients.RoundTrips(t, s3clients.Endpoint{URL: "http://" + endpoint, Bucket: workers.Bucket, Region: "us-east-1", AccessKey: workers.AccessKey, SecretKey: workers.SecretKey})

	direct, err := server.Client()
	if err != nil {
		t.Fatal(err)
	}
	for o := range direct.ListObjects(t.Context(), "artifacts", minio.ListObjectsOptions{Recursive: true}) {
		t.Errorf("left in the bucket: %s %v", o.Key, o.Err)
	}
	for u := range direct.ListIncompleteUploads(t.Context(), "artifacts", "", true) {
		t.Errorf("an upload left in the bucket: %s %v", u.Key, u.Err)
	}
}
