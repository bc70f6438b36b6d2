package bucket_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/test/bucket"
)

func client(t *testing.T, endpoint, secret string) *minio.Client {
	t.Helper()
	c, err := minio.New(strings.TrimPrefix(endpoint, "http://"), &minio.Options{
		Creds: credentials.NewStaticV4(bucket.AccessKey, secret, ""), Region: bucket.Region,
		BucketLookup: minio.BucketLookupPath, MaxRetries: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func get(c *minio.Client) ([]byte, error) {
	o, err := c.GetObject(context.Background(), "data", "k", minio.GetObjectOptions{})
	if err != nil {
		return nil, err
	}
	defer o.Close()
	return io.ReadAll(o)
}

// The server is what the conformance of every source rests on: it must refuse what a bucket refuses.
func TestServerChecksSignatures(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	want := bytes.Repeat([]byte("stepcache"), 1000)
	s.PutT(t, "data", "k", want)
	if got, err := get(client(t, s.Endpoint(), bucket.SecretKey)); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	if n := s.Sent(); n < int64(len(want)) {
		t.Errorf("sent %d bytes, fewer than the object's %d", n, len(want))
	}
	var answer minio.ErrorResponse
	if _, err := get(client(t, s.Endpoint(), "wrong")); !errors.As(err, &answer) || answer.Code != "SignatureDoesNotMatch" {
		t.Errorf("a wrong secret: %v", err)
	}
}

func TestFaultProxyDoesWhatItIsTold(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	want := bytes.Repeat([]byte("stepcache"), 1000)
	s.PutT(t, "data", "k", want)
	f := bucket.Faults(t, s)
	c := client(t, f.Endpoint(), bucket.SecretKey)
	if got, err := get(c); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("untouched: got %d bytes, %v", len(got), err)
	}
	for name, fault := range map[string]bucket.Fault{
		"reset": {Reset: true}, "truncated": {Truncate: 100}, "503": {Status: 503, Code: "SlowDown"},
	} {
		f.Set(func(*http.Request) bucket.Fault { return fault })
		if _, err := get(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	f.Set(func(*http.Request) bucket.Fault { return bucket.Fault{Flip: 9} })
	got, err := get(c)
	if err != nil || len(got) != len(want) || bytes.Equal(got, want) || got[8] != want[8]^1 {
		t.Errorf("flip: %d bytes, %v", len(got), err)
	}
}
