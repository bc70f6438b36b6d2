package gateway_test

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sync/errgroup"

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

// Names that a file system, a URL, XML or a person may stumble over: put through one worker they are the same
// name at the other, in listings and in the bucket, and a thousand go with one request.
func TestOddNamesOfATier(t *testing.T) {
	server := s3server.StartT(t, s3server.Options{})
	if err := server.MakeBucket(t.Context(), "artifacts"); err != nil {
		t.Fatal(err)
	}
	endpoints := workers.Start(t, server, "artifacts", "", 2)
	var at [2]*minio.Client
	for i, e := range endpoints {
		var err error
		if at[i], err = minio.New(e, &minio.Options{Creds: credentials.NewStaticV4(workers.AccessKey, workers.SecretKey, ""), BucketLookup: minio.BucketLookupPath}); err != nil {
			t.Fatal(err)
		}
	}
	direct, err := server.Client()
	if err != nil {
		t.Fatal(err)
	}
	segment := strings.Repeat("s", 200) // the server keeps files, whose names it makes longer for a while
	names := []string{
		"with space", " blanks around ", "plus+plus", "percent%41", "percent%2Fslash", "100%", "amp&<>\"'", "quest?ion#hash", "semi;colon=eq,comma",
		"~!@$^*()[]{}|`", "back\\slash", "C:\\con", "..dots..", "a/..b/c", "...", ".hidden", "tab\ttab", "new\nline", "carriage\rreturn", "\u007fdelete", "\u0085next line",
		"\u00e9 composed", "e\u0301 decomposed", "日本語/キー", "🧬/😀", "עברית", "\u202eright to left", "zero\u200bwidth", "nbsp\u00a0", "\ufeffmark", "Case/X", "case/x",
		"null", "0", "-", "_", "*", "list-type=2&prefix=x", "?uploads", segment, strings.Repeat(segment+"1/", 5) + strings.Repeat("e", 1024-5*202), strings.Repeat("ü", 100),
	}
	odd := len(names)
	for i := odd; i < 1000; i++ {
		names = append(names, fmt.Sprintf("many/%d", i))
	}
	var group errgroup.Group
	group.SetLimit(16)
	for i, name := range names {
		group.Go(func() error {
			text := fmt.Sprintf("%d: %s", i, name)
			if _, err := at[i%2].PutObject(t.Context(), workers.Bucket, name, strings.NewReader(text), int64(len(text)), minio.PutObjectOptions{}); err != nil {
				return fmt.Errorf("put %q: %w", name, err)
			}
			if i >= odd {
				return nil
			}
			o, err := at[1-i%2].GetObject(t.Context(), workers.Bucket, name, minio.GetObjectOptions{})
			if err != nil {
				return fmt.Errorf("get %q: %w", name, err)
			}
			defer o.Close()
			if got, err := io.ReadAll(o); err != nil || string(got) != text {
				return fmt.Errorf("get %q: %q, %w", name, got, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	want := slices.Sorted(slices.Values(names))
	for what, c := range map[string]struct {
		*minio.Client
		bucket string
	}{"one worker": {at[0], workers.Bucket}, "the other": {at[1], workers.Bucket}, "the bucket": {direct, "artifacts"}} {
		for _, o := range []minio.ListObjectsOptions{{Recursive: true}, {Recursive: true, UseV1: true}, {Recursive: true, MaxKeys: 7}} {
			if what == "the bucket" && o.MaxKeys > 0 {
				continue
			}
			var got []string
			for e := range c.ListObjects(t.Context(), c.bucket, o) {
				if e.Err != nil {
					t.Fatalf("list of %s: %v", what, e.Err)
				}
				got = append(got, e.Key)
			}
			if what == "the bucket" {
				slices.Sort(got)
			}
			if !slices.Equal(got, want) {
				t.Errorf("list of %s %+v: %d names, of %d: %s", what, o, len(got), len(want), firstOther(got, want))
			}
		}
	}
	// One request, whose answer names no failure.
	before := server.Requests()
	objects := make(chan minio.ObjectInfo, len(names))
	for _, name := range names {
		objects <- minio.ObjectInfo{Key: name}
	}
	close(objects)
	for e := range at[0].RemoveObjects(t.Context(), workers.Bucket, objects, minio.RemoveObjectsOptions{}) {
		t.Errorf("delete %q: %v", e.ObjectName, e.Err)
	}
	t.Logf("%d requests to the bucket for %d deletes", server.Requests()-before, len(names))
	for o := range direct.ListObjects(t.Context(), "artifacts", minio.ListObjectsOptions{Recursive: true}) {
		t.Errorf("left in the bucket: %q %v", o.Key, o.Err)
	}
	for _, c := range at {
		for o := range c.ListObjects(t.Context(), workers.Bucket, minio.ListObjectsOptions{Recursive: true}) {
			t.Errorf("still listed: %q %v", o.Key, o.Err)
		}
	}
}

// firstOther is where two lists part.
func firstOther(got, want []string) string {
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			return fmt.Sprintf("from %d on %.300q, not %.300q", i, got[min(i, len(got)):min(i+3, len(got))], want[min(i, len(want)):min(i+3, len(want))])
		}
	}
	return "the same"
}
