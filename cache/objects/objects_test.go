package objects_test

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"
)

// Every worker serves every name: what is put through one is read, listed and stated through the others at
// once, with the bucket's own ETag, and is in the bucket.
func TestWhatIsPutThroughOneWorkerIsReadThroughAll(t *testing.T) {
	tr := newTier(t, "").start(3)
	sizes := []int{0, 1, 64 << 10, 4<<20 + 1, 17<<20 + 7}
	var want []string
	for n, size := range sizes {
		key := fmt.Sprintf("run/%d/out %d", n%2, size)
		want = append(want, key)
		p := content(size, n)
		info, err := tr.put(n%3, key, p, minio.PutObjectOptions{ContentType: "text/x-test", UserMetadata: map[string]string{"Step": "map"}, CacheControl: "no-cache"})
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		there, at, err := tr.inBucket(key)
		if err != nil || !bytes.Equal(there, p) || at.ETag != info.ETag {
			t.Fatalf("%s in the bucket: %d bytes, ETag %s, acknowledged %s, %v", key, len(there), at.ETag, info.ETag, err)
		}
		if at.ContentType != "text/x-test" || at.UserMetadata["Step"] != "map" || at.Metadata.Get("Cache-Control") != "no-cache" {
			t.Errorf("%s in the bucket: %+v", key, at)
		}
		for i := range 3 {
			got, info2, err := tr.get(i, key)
			if err != nil || !bytes.Equal(got, p) {
				t.Fatalf("%s through worker %d: %d bytes, %v", key, i, len(got), err)
			}
			if info2.ETag != info.ETag || info2.ContentType != "text/x-test" || info2.UserMetadata["Step"] != "map" || info2.Metadata.Get("Cache-Control") != "no-cache" {
				t.Errorf("%s through worker %d: %+v", key, i, info2)
			}
			if keys := tr.keys(i, "run/"); !slices.Contains(keys, key) {
				t.Errorf("%s is not in the listing of worker %d: %q", key, i, keys)
			}
		}
	}
	slices.Sort(want)
	if keys := tr.keys(0, ""); !slices.Equal(keys, want) {
		t.Errorf("listed %q, want %q", keys, want)
	}
	for n, key := range want {
		if err := tr.client(n%3).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{}); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			if _, _, err := tr.get(i, key); code(err) != "NoSuchKey" {
				t.Errorf("%s after its deletion through worker %d: %v", key, i, err)
			}
		}
		if _, _, err := tr.inBucket(key); code(err) != "NoSuchKey" {
			t.Errorf("%s in the bucket after its deletion: %v", key, err)
		}
		if err := tr.client(n%3).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{}); err != nil {
			t.Errorf("a second deletion: %v", err)
		}
	}
	if u := tr.uploads(); len(u) > 0 {
		t.Errorf("uploads left: %q", u)
	}
}

// What was put is in the tier: its readers ask the bucket for no byte.
func TestThePutWarmsTheTier(t *testing.T) {
	tr := newTier(t, "").start(2)
	p := content(20<<20, 1)
	tr.mustPut(0, "warm", p)
	before := theServer(t).Sent()
	for i := range 2 {
		if got, _, err := tr.get(i, "warm"); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	if sent := theServer(t).Sent() - before; sent > 1<<20 {
		t.Errorf("the bucket sent %d bytes for an object that was just put", sent)
	}
}

func TestUploadInParts(t *testing.T) {
	tr := newTier(t, "").start(3)
	ctx := t.Context()
	const key = "large/parts"
	upload, err := tr.client(0).NewMultipartUpload(ctx, "data", key, minio.PutObjectOptions{ContentType: "text/x-parts", UserMetadata: map[string]string{"A": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	var whole []byte
	var parts []minio.CompletePart
	for n, size := range []int{5 << 20, 20 << 20, 1234} { // one that is held, one that is streamed, the last
		p := content(size, n)
		whole = append(whole, p...)
		part, err := tr.client(n%3).PutObjectPart(ctx, "data", key, upload, n+1, bytes.NewReader(p), int64(size), minio.PutObjectPartOptions{})
		if err != nil {
			t.Fatalf("part %d: %v", n+1, err)
		}
		parts = append(parts, minio.CompletePart{PartNumber: n + 1, ETag: part.ETag})
	}
	if _, _, err := tr.get(1, key); code(err) != "NoSuchKey" {
		t.Errorf("before it is complete: %v", err)
	}
	list, err := tr.client(1).ListObjectParts(ctx, "data", key, upload, 0, 100)
	if err != nil || len(list.ObjectParts) != 3 || list.ObjectParts[1].Size != 20<<20 {
		t.Errorf("parts: %+v, %v", list.ObjectParts, err)
	}
	if u, err := tr.client(2).ListMultipartUploads(ctx, "data", "large/", "", "", "", 10); err != nil || len(u.Uploads) != 1 || u.Uploads[0].Key != key {
		t.Errorf("uploads: %+v, %v", u.Uploads, err)
	}
	bad := slices.Clone(parts)
	bad[1].ETag = strings.Repeat("0", 32)
	if _, err := tr.client(0).CompleteMultipartUpload(ctx, "data", key, upload, bad, minio.PutObjectOptions{}); code(err) != "InvalidPart" {
		t.Errorf("a part that was not put: %v", err)
	}
	info, err := tr.client(2).CompleteMultipartUpload(ctx, "data", key, upload, parts, minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		got, at, err := tr.get(i, key)
		if err != nil || !bytes.Equal(got, whole) || at.ETag != info.ETag || at.ContentType != "text/x-parts" || at.UserMetadata["A"] != "b" {
			t.Errorf("through worker %d: %d bytes, %+v, %v", i, len(got), at, err)
		}
	}
	if _, at, err := tr.inBucket(key); err != nil || at.ETag != info.ETag || !strings.HasSuffix(at.ETag, "-3") {
		t.Errorf("in the bucket: %+v, %v", at, err)
	}
	if again, err := tr.client(1).CompleteMultipartUpload(ctx, "data", key, upload, parts, minio.PutObjectOptions{}); err != nil || again.ETag != info.ETag {
		t.Errorf("completed again: %+v, %v", again, err)
	}

	upload, err = tr.client(0).NewMultipartUpload(ctx, "data", "aborted", minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.client(1).PutObjectPart(ctx, "data", "aborted", upload, 1, bytes.NewReader(whole[:5<<20]), 5<<20, minio.PutObjectPartOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := tr.client(2).AbortMultipartUpload(ctx, "data", "aborted", upload); err != nil {
		t.Fatal(err)
	}
	if _, err := tr.client(1).PutObjectPart(ctx, "data", "aborted", upload, 2, bytes.NewReader(whole[:1]), 1, minio.PutObjectPartOptions{}); code(err) != "NoSuchUpload" {
		t.Errorf("a part of an aborted upload: %v", err)
	}
	if u := tr.uploads(); len(u) > 0 {
		t.Errorf("uploads left: %q", u)
	}
}

func TestCopy(t *testing.T) {
	tr := newTier(t, "").start(3)
	ctx := t.Context()
	p := content(5<<20, 3)
	if _, err := tr.put(0, "from", p, minio.PutObjectOptions{ContentType: "text/x-from", UserMetadata: map[string]string{"K": "v"}}); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		to := fmt.Sprintf("copies/%d", i)
		c := tr.client(i)
		if _, err := c.CopyObject(ctx, "data", "from", "data", to, nil, minio.CopySrcOptions{}, minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
		got, at, err := tr.get((i+1)%3, to)
		if err != nil || !bytes.Equal(got, p) || at.ContentType != "text/x-from" || at.UserMetadata["K"] != "v" {
			t.Errorf("%s: %d bytes, %+v, %v", to, len(got), at, err)
		}
	}
	c := tr.client(1)
	if _, err := c.CopyObject(ctx, "data", "missing", "data", "to", nil, minio.CopySrcOptions{}, minio.PutObjectOptions{}); code(err) != "NoSuchKey" {
		t.Errorf("a copy of nothing: %v", err)
	}
}

func TestConditionalPuts(t *testing.T) {
	tr := newTier(t, "").start(2)
	var absent, match minio.PutObjectOptions
	absent.SetMatchETagExcept("*")
	first, err := tr.put(0, "once", []byte("a"), absent)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.put(1, "once", []byte("b"), absent); code(err) != "PreconditionFailed" {
		t.Errorf("a second put of what must not exist: %v", err)
	}
	match.SetMatchETag("0123456789abcdef0123456789abcdef")
	if _, err := tr.put(1, "once", []byte("b"), match); code(err) != "PreconditionFailed" {
		t.Errorf("a put over another version: %v", err)
	}
	match = minio.PutObjectOptions{}
	match.SetMatchETag(first.ETag)
	if _, err := tr.put(1, "once", []byte("c"), match); err != nil {
		t.Errorf("a put over the version it names: %v", err)
	}
	if got, _, _ := tr.get(0, "once"); string(got) != "c" {
		t.Errorf("it is %q", got)
	}
	// Of many at once, one succeeds.
	won := make(chan string, 16)
	for i := range 16 {
		go func() {
			body := fmt.Sprint(i)
			if _, err := tr.put(i%2, "race", []byte(body), absent); err != nil {
				if code(err) != "PreconditionFailed" {
					t.Errorf("%v", err)
				}
				body = ""
			}
			won <- body
		}()
	}
	var winner []string
	for range 16 {
		if b := <-won; b != "" {
			winner = append(winner, b)
		}
	}
	if got, _, err := tr.get(1, "race"); len(winner) != 1 || string(got) != winner[0] {
		t.Errorf("%q won, it is %q, %v", winner, got, err)
	}
}

func TestOddNames(t *testing.T) {
	tr := newTier(t, "").start(2)
	for n, key := range []string{
		"a b", "plus+and%25", "ü/ñ/日本", "q?x=1&y#z", "dir/", "dir/sub/two", "-.~_!*'()", `back\slash`, "=eq;semi:colon@at",
		strings.Repeat("k", 200) + "/" + strings.Repeat("l", 200), "new\tab",
	} {
		p := content(100+n, n)
		if strings.HasSuffix(key, "/") {
			p = nil // a marker
		}
		_, err := tr.put(n%2, key, p, minio.PutObjectOptions{})
		if err != nil {
			t.Errorf("put %q: %v", key, err)
			continue
		}
		got, _, err := tr.get((n+1)%2, key)
		if err != nil || !bytes.Equal(got, p) {
			t.Errorf("get %q: %d bytes, %v", key, len(got), err)
		}
	}
	for _, key := range []string{"../up", "a/../../up", "./here", "a/./b"} {
		if _, err := tr.put(0, key, []byte("x"), minio.PutObjectOptions{}); err == nil {
			t.Errorf("put %q was accepted", key)
		}
	}
	for o := range tr.direct.ListObjects(t.Context(), tr.bucket, minio.ListObjectsOptions{Recursive: true}) {
		if !strings.HasPrefix(o.Key, tr.prefix) {
			t.Errorf("%q was put above the prefix", o.Key)
		}
	}
}

func TestRanges(t *testing.T) {
	tr := newTier(t, "").start(2)
	p := content(9<<20+5, 1)
	tr.mustPut(0, "ranges", p)
	for _, r := range [][2]int64{{0, 0}, {0, int64(len(p)) - 1}, {4<<20 - 1, 4 << 20}, {1, 9 << 20}, {int64(len(p)) - 1, int64(len(p)) - 1}, {5 << 20, 6 << 20}} {
		for i := range 2 {
			var o minio.GetObjectOptions
			if err := o.SetRange(r[0], r[1]); err != nil {
				t.Fatal(err)
			}
			body, _, _, err := tr.client(i).GetObject(t.Context(), "data", "ranges", o)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(body)
			body.Close()
			if err != nil || !bytes.Equal(got, p[r[0]:r[1]+1]) {
				t.Errorf("bytes %d to %d: %d bytes, %v", r[0], r[1], len(got), err)
			}
		}
	}
}
