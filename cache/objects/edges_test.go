package objects_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/objects"
	"github.com/stepcache/stepcache/test/bucket"
)

// agree fails unless every worker and the bucket have the same version of a key, and returns its bytes; nil
// when there is none.
func (tr *tier) agree(key string) []byte {
	tr.t.Helper()
	want, at, err := tr.inBucket(key)
	if err != nil && code(err) != "NoSuchKey" {
		tr.t.Fatal(err)
	}
	for i := range tr.workers {
		got, info, gerr := tr.get(i, key)
		if err != nil {
			if code(gerr) != "NoSuchKey" {
				tr.t.Errorf("%s: not in the bucket, but through worker %d: %d bytes, %v", key, i, len(got), gerr)
			}
			continue
		}
		if gerr != nil || !bytes.Equal(got, want) || info.ETag != at.ETag {
			tr.t.Errorf("%s: the bucket has %d bytes with ETag %s, worker %d %d with %s, %v", key, len(want), at.ETag, i, len(got), info.ETag, gerr)
		}
	}
	if err != nil {
		return nil
	}
	return want
}

// Many write and delete one name at once through two workers. In the end all see the same version, a whole
// one, and nothing is left of the others.
func TestPutsAndDeletesOfOneNameAtOnce(t *testing.T) {
	tr := newTier(t, "").start(2)
	sizes := []int{0, 1, 100 << 10, 4<<20 + 3, 17 << 20}
	for round := range 3 {
		key := tr.keyOwnedBy(round%2, "busy")
		var wg sync.WaitGroup
		for n := range 12 {
			wg.Go(func() {
				var err error
				if n%4 == 3 {
					err = tr.client(n/4%2).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{})
				} else {
					size := sizes[(n+round)%len(sizes)]
					_, err = tr.put(n%2, key, content(size, n), minio.PutObjectOptions{})
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		got := tr.agree(key)
		whole := got == nil
		for n := range 12 {
			whole = whole || bytes.Equal(got, content(sizes[(n+round)%len(sizes)], n))
		}
		if !whole {
			t.Errorf("%d bytes that nobody put", len(got))
		}
	}
	tr.nothingStaged()
	if u := tr.uploads(); len(u) > 0 {
		t.Errorf("parts are left: %q", u)
	}
}

// A copy onto itself replaces what is kept with an object, and not its bytes, even where its ETag stays.
func TestACopyOntoItself(t *testing.T) {
	tr := newTier(t, "").start(2)
	for _, size := range []int{0, 1000, 17 << 20} {
		key := tr.keyOwnedBy(0, fmt.Sprint("self-", size))
		p := content(size, size)
		if _, err := tr.put(0, key, p, minio.PutObjectOptions{ContentType: "text/old", UserMetadata: map[string]string{"A": "old"}}); err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			want := fmt.Sprint("new-", i)
			info, err := tr.client(i).CopyObject(t.Context(), "data", key, "data", key,
				map[string]string{"x-amz-metadata-directive": "REPLACE", "Content-Type": "text/" + want, "x-amz-meta-a": want}, minio.CopySrcOptions{}, minio.PutObjectOptions{})
			if err != nil {
				t.Fatalf("%s: %v", key, err)
			}
			for j := range 2 {
				got, at, err := tr.get(j, key)
				if err != nil || !bytes.Equal(got, p) || at.ETag != info.ETag || at.ContentType != "text/"+want || at.UserMetadata["A"] != want {
					t.Errorf("%s through worker %d: %d bytes, %+v, copied as %s, %v", key, j, len(got), at, info.ETag, err)
				}
			}
			tr.agree(key)
		}
	}
}

// What HEAD, GET, a range and a listing say of an object is one thing, through every worker, at once and
// after what is remembered was asked again, and is what the bucket says.
func TestHeadGetAndListingsAgree(t *testing.T) {
	tr := newTier(t, "").start(2)
	type seen struct {
		size              int64
		etag, kind, extra string
	}
	of := func(o minio.ObjectInfo) seen {
		return seen{o.Size, o.ETag, o.ContentType, fmt.Sprint(o.UserMetadata, o.Metadata.Get("Cache-Control"))}
	}
	bucketHas := map[string]minio.ObjectInfo{}
	check := func(key string) {
		at := bucketHas[key]
		for i := range 2 {
			head, err := tr.client(i).StatObject(t.Context(), "data", key, minio.StatObjectOptions{})
			if err != nil || of(head) != of(at) {
				t.Errorf("HEAD through worker %d: %+v, want %+v, %v", i, of(head), of(at), err)
			}
			_, get, err := tr.get(i, key)
			if err != nil || of(get) != of(at) {
				t.Errorf("GET through worker %d: %+v, want %+v, %v", i, of(get), of(at), err)
			}
			if d := head.LastModified.Sub(at.LastModified).Abs(); d > patience {
				t.Errorf("last modified through worker %d: %v, in the bucket %v", i, head.LastModified, at.LastModified)
			}
			for o := range tr.client(i).ListObjectsIter(t.Context(), "data", minio.ListObjectsOptions{Prefix: key}) {
				if o.Err != nil || o.Key == key && (o.ETag != at.ETag || o.Size != at.Size) {
					t.Errorf("listed through worker %d: %+v", i, o)
				}
			}
		}
	}
	for n, size := range []int{0, 1, 5 << 20, 17 << 20} {
		key := tr.keyOwnedBy(n%2, fmt.Sprint("same-", size))
		// With what a header may hold, and without a type.
		if _, err := tr.put(1, key, content(size, n), minio.PutObjectOptions{UserMetadata: map[string]string{"Spaces": "a  b", "Signs": "x=1; y=\"2\""}, CacheControl: "max-age=1"}); err != nil {
			t.Fatal(err)
		}
		_, at, err := tr.inBucket(key)
		if err != nil {
			t.Fatal(err)
		}
		bucketHas[key] = at
		check(key)
	}
	time.Sleep(objects.Fresh + 100*time.Millisecond) // what is remembered is too old by then
	for key := range bucketHas {
		check(key)
	}
}

// Ranges that begin and end at, before and after every edge of a block, of an object that is in the tier and
// of one that is fetched for them.
func TestRangesAtTheEdgesOfBlocks(t *testing.T) {
	const size, block = 8<<20 + 3, 4 << 20
	tr := newTier(t, "").start(2)
	p := content(size, 5)
	tr.mustPut(0, "staged", p)
	if _, err := tr.direct.PutObject(t.Context(), tr.bucket, tr.prefix+"outside", bytes.NewReader(p), size, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	edges := []int64{0, 1, block - 1, block, block + 1, 2*block - 1, 2 * block, size - 1}
	for n, key := range []string{"staged", "outside"} {
		for _, from := range edges {
			for _, to := range edges {
				if to < from {
					continue
				}
				var o minio.GetObjectOptions
				if err := o.SetRange(from, to); err != nil {
					t.Fatal(err)
				}
				body, info, h, err := tr.client(int(from+to+int64(n))%2).GetObject(t.Context(), "data", key, o)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(body)
				body.Close()
				if err != nil || !bytes.Equal(got, p[from:to+1]) || h.Get("Content-Range") != fmt.Sprintf("bytes %d-%d/%d", from, to, size) {
					t.Errorf("%s, bytes %d to %d: %d bytes, %+v, %v", key, from, to, len(got), info, err)
				}
			}
		}
	}
}

// Completions that are wrong make no object, and leave the upload to be completed well.
func TestCompletionsThatAreWrong(t *testing.T) {
	tr := newTier(t, "").start(2)
	ctx := t.Context()
	const key = "parts"
	c := tr.client(0)
	upload, err := c.NewMultipartUpload(ctx, "data", key, minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var parts []minio.CompletePart
	var whole []byte
	for n, size := range []int{5 << 20, 5<<20 + 1, 10} {
		p := content(size, n)
		whole = append(whole, p...)
		part, err := tr.client(n%2).PutObjectPart(ctx, "data", key, upload, 2*n+1, bytes.NewReader(p), int64(size), minio.PutObjectPartOptions{})
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, minio.CompletePart{PartNumber: 2*n + 1, ETag: part.ETag})
	}
	another, err := c.NewMultipartUpload(ctx, "data", "another", minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	a, b, last := parts[0], parts[1], parts[2]
	for _, w := range []struct {
		name, key, upload string
		parts             []minio.CompletePart
		want              string
	}{
		{"in another order", key, upload, []minio.CompletePart{b, a, last}, "InvalidPartOrder"},
		{"one twice", key, upload, []minio.CompletePart{a, a, last}, "InvalidPartOrder"},
		{"one that was not put", key, upload, []minio.CompletePart{a, {PartNumber: 2, ETag: b.ETag}, last}, "InvalidPart"},
		{"another's ETag", key, upload, []minio.CompletePart{a, {PartNumber: b.PartNumber, ETag: a.ETag}, last}, "InvalidPart"},
		{"a small one before the last", key, upload, []minio.CompletePart{a, last, {PartNumber: 7, ETag: b.ETag}}, "InvalidPart EntityTooSmall"},
		{"none", key, upload, nil, "MalformedXML"},
		{"another key", "elsewhere", upload, parts, "NoSuchUpload"},
		{"another upload", key, another, parts, "NoSuchUpload"},
		{"no upload", key, "none", parts, "NoSuchUpload"},
	} {
		for i := range 2 {
			_, err := tr.client(i).CompleteMultipartUpload(ctx, "data", w.key, w.upload, w.parts, minio.PutObjectOptions{})
			if err == nil || !strings.Contains(w.want, code(err)) {
				t.Errorf("%s: %v, want %s", w.name, err, w.want)
			}
		}
	}
	if keys := tr.keys(1, ""); len(keys) > 0 {
		t.Errorf("listed: %q", keys)
	}
	if _, err := tr.client(1).CompleteMultipartUpload(ctx, "data", key, upload, parts, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := tr.agree(key); !bytes.Equal(got, whole) {
		t.Errorf("%d bytes", len(got))
	}
	if err := c.AbortMultipartUpload(ctx, "data", "another", another); err != nil {
		t.Error(err)
	}
	if u := tr.uploads(); len(u) > 0 {
		t.Errorf("uploads left: %q", u)
	}
}

// Who may only read writes nothing, in no way that the protocol has, also where another worker owns the name.
func TestReadersWriteNothing(t *testing.T) {
	tr := newTier(t, "").start(2)
	ctx := t.Context()
	for i := range 2 {
		key := tr.keyOwnedBy(1, fmt.Sprint("kept-", i))
		tr.mustPut(i, key, []byte("kept"))
		upload, err := tr.client(i).NewMultipartUpload(ctx, "data", "upload", minio.PutObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		c, err := minio.NewCore(tr.workers[i].gateway, &minio.Options{
			Creds: credentials.NewStaticV4(readKey, readSec, ""), Region: "us-east-1", BucketLookup: minio.BucketLookupPath, MaxRetries: 1,
		})
		if err != nil {
			t.Fatal(err)
		}
		if info, err := c.StatObject(ctx, "data", key, minio.StatObjectOptions{}); err != nil || info.Size != 4 {
			t.Errorf("it cannot read: %v", err)
		}
		var r minio.RemoveObjectError
		for r = range c.RemoveObjects(ctx, "data", oneObject(key), minio.RemoveObjectsOptions{}) {
		}
		_, put := c.PutObject(ctx, "data", key, bytes.NewReader([]byte("other")), 5, "", "", minio.PutObjectOptions{})
		_, part := c.PutObjectPart(ctx, "data", "upload", upload, 1, bytes.NewReader([]byte("p")), 1, minio.PutObjectPartOptions{})
		_, create := c.NewMultipartUpload(ctx, "data", "x", minio.PutObjectOptions{})
		_, complete := c.CompleteMultipartUpload(ctx, "data", "upload", upload, []minio.CompletePart{{PartNumber: 1, ETag: strings.Repeat("0", 32)}}, minio.PutObjectOptions{})
		_, onto := c.CopyObject(ctx, "data", key, "data", "x", nil, minio.CopySrcOptions{}, minio.PutObjectOptions{})
		for what, err := range map[string]error{
			"put": put, "part": part, "create": create, "complete": complete, "copy": onto, "bulk delete": r.Err,
			"delete": c.RemoveObject(ctx, "data", key, minio.RemoveObjectOptions{}), "abort": c.AbortMultipartUpload(ctx, "data", "upload", upload),
		} {
			if code(err) != "AccessDenied" {
				t.Errorf("%s: %v", what, err)
			}
		}
		if got := tr.agree(key); string(got) != "kept" {
			t.Errorf("%q", got)
		}
		if err := tr.client(i).AbortMultipartUpload(ctx, "data", "upload", upload); err != nil {
			t.Errorf("the upload: %v", err)
		}
	}
}

func oneObject(key string) <-chan minio.ObjectInfo {
	c := make(chan minio.ObjectInfo, 1)
	c <- minio.ObjectInfo{Key: key}
	close(c)
	return c
}

// What lies beside a dataset's prefix in its bucket is not listed, read, copied, written or deleted through it.
func TestNothingBesideThePrefixIsReached(t *testing.T) {
	tr := newTier(t, "").start(2)
	ctx := t.Context()
	beside := []string{"secret", "artifacts-2/secret", "other/secret", "artifact"}
	for _, key := range beside {
		if _, err := tr.direct.PutObject(ctx, tr.bucket, key, strings.NewReader("secret"), 6, minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	outside := minio.Core{Client: tr.direct}
	upload, err := outside.NewMultipartUpload(ctx, tr.bucket, "other/upload", minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tr.mustPut(0, "mine", []byte("mine"))
	tr.mustPut(0, "artifacts/secret", []byte("mine too")) // the prefix again, below itself
	for i := range 2 {
		c := tr.client(i)
		for _, prefix := range []string{"", "..", "../", "../other/", "/", "//", "./", "-2/", "%2e%2e/", "../artifacts/"} {
			for _, delimiter := range []string{"", "/"} {
				r, err := c.ListObjectsV2("data", prefix, "", "", delimiter, 1000)
				if err != nil {
					continue // refused
				}
				for _, o := range r.Contents {
					if o.Key != "mine" && o.Key != "artifacts/secret" {
						t.Errorf("prefix %q lists %q", prefix, o.Key)
					}
				}
				for _, p := range r.CommonPrefixes {
					if p.Prefix != "artifacts/" {
						t.Errorf("prefix %q lists %q", prefix, p.Prefix)
					}
				}
			}
			if r, err := c.ListMultipartUploads(ctx, "data", prefix, "", "", "", 100); err == nil && len(r.Uploads) > 0 {
				t.Errorf("prefix %q lists uploads %+v", prefix, r.Uploads)
			}
		}
		for _, key := range []string{"secret", "../secret", "../other/secret", "-2/secret", "/../secret", "x/../../secret", "artifacts/../../secret", "..%2fsecret", "other/secret"} {
			if got, _, err := tr.get(i, key); err == nil {
				t.Errorf("get %q: %q", key, got)
			}
			if _, err := c.CopyObject(ctx, "data", key, "data", "copied", nil, minio.CopySrcOptions{}, minio.PutObjectOptions{}); err == nil {
				t.Errorf("%q was copied", key)
			}
			_ = c.RemoveObject(ctx, "data", key, minio.RemoveObjectOptions{}) // of a key that is not there it succeeds
		}
		for _, key := range []string{"../other/upload", "other/upload"} {
			if _, err := c.PutObjectPart(ctx, "data", key, upload, 1, strings.NewReader("x"), 1, minio.PutObjectPartOptions{}); err == nil {
				t.Errorf("a part was put to an upload beside the prefix as %q", key)
			}
			if err := c.AbortMultipartUpload(ctx, "data", key, upload); err == nil {
				t.Errorf("an upload beside the prefix was aborted as %q", key)
			}
		}
	}
	for _, key := range beside {
		o, err := tr.direct.StatObject(ctx, tr.bucket, key, minio.StatObjectOptions{})
		if err != nil || o.Size != 6 {
			t.Errorf("%s in the bucket: %+v, %v", key, o, err)
		}
	}
	if u := tr.uploads(); len(u) != 1 || u[0] != "other/upload" {
		t.Errorf("uploads in the bucket: %q", u)
	}
	if got := tr.agree("artifacts/secret"); string(got) != "mine too" {
		t.Errorf("%q", got)
	}
}

// paused is a body that stops in its middle until it is told to go on.
type paused struct {
	first, rest io.Reader
	there       chan struct{} // closed at the middle
	goOn        chan struct{}
	once        sync.Once
}

func newPaused(p []byte) *paused {
	return &paused{first: bytes.NewReader(p[:len(p)/2]), rest: bytes.NewReader(p[len(p)/2:]), there: make(chan struct{}), goOn: make(chan struct{})}
}

func (p *paused) Read(b []byte) (int, error) {
	if n, err := p.first.Read(b); err == nil {
		return n, nil
	}
	p.once.Do(func() { close(p.there) })
	<-p.goOn
	return p.rest.Read(b)
}

// The owner of a name is killed, or hangs, in the middle of a put that came through another worker. The
// client is told, in a stated time; nothing is visible and nothing leaked; its next try succeeds.
func TestAnOwnerThatDiesOrHangsInTheMiddleOfAPut(t *testing.T) {
	t.Parallel() // it waits most of the time
	tr := newTier(t, "").spawned(2)
	const size = 20 << 20 // in parts
	for _, how := range []string{"hangs", "dies"} {
		key := tr.keyOwnedBy(1, how)
		eventually(t, "the owner is asked again", func() error {
			before := tr.metric(1, "stepcache_objects_puts_total")
			_, err := tr.put(0, tr.keyOwnedBy(1, "probe"), []byte("x"), minio.PutObjectOptions{})
			if err == nil && tr.metric(1, "stepcache_objects_puts_total") == before {
				err = errors.New("the put was not passed on")
			}
			return err
		})
		old, p := content(size, 1), content(size, 2)
		body := newPaused(old)
		done := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := tr.client(0).PutObject(ctx, "data", key, body, int64(size), "", "", minio.PutObjectOptions{DisableContentSha256: true})
			done <- err
		}()
		<-body.there
		goOn := func() {}
		if how == "hangs" {
			goOn = tr.hangs(1)
		} else {
			tr.workers[1].outside.Kill()
			<-tr.workers[1].outside.Done()
		}
		close(body.goOn)
		// It succeeds only if none of it had been passed on yet.
		err := <-done
		got, _, berr := tr.inBucket(key)
		if err == nil && !bytes.Equal(got, old) || err != nil && code(berr) != "NoSuchKey" {
			t.Errorf("%s: the put says %v, the bucket has %d bytes, %v", key, err, len(got), berr)
		}
		if _, err := tr.put(0, key, p, minio.PutObjectOptions{}); err != nil {
			t.Errorf("%s again: %v", key, err)
		}
		goOn()
		if how == "dies" {
			tr.spawn(1)
		}
		tr.ready()
		tr.nothingStaged()
		eventually(t, "no parts are left", func() error {
			if u := tr.uploads(); len(u) > 0 {
				return fmt.Errorf("%q", u)
			}
			return nil
		})
		if got = tr.agree(key); !bytes.Equal(got, p) {
			t.Errorf("%s: %d bytes, not those of the last put", key, len(got))
		}
	}
	// Of a put that was cut off the store holds no file, and counts none.
	eventually(t, "the store holds what it counts and nothing else", func() error {
		held := tr.metric(1, "stepcache_store_objects")
		entries, err := os.ReadDir(tr.path("w1"))
		if err != nil {
			return err
		}
		files := int64(0)
		for _, e := range entries {
			if len(e.Name()) == 32 {
				files++
			}
			if strings.HasPrefix(e.Name(), fmt.Sprintf("%x", "STAGING\x00")) {
				return fmt.Errorf("a file of a put that was cut off is left: %s", e.Name())
			}
		}
		if files != held {
			return fmt.Errorf("%d files of objects, %d objects are counted", files, held)
		}
		return nil
	})
}

// A put goes through a worker that is not the owner any more by the time it ends, and through an owner that
// is told to stop meanwhile: it is acknowledged and whole, or fails and leaves nothing.
func TestAPutWhoseOwnerIsStoppedOnTheWay(t *testing.T) {
	tr := newTier(t, "").start(3)
	key := tr.keyOwnedBy(1, "k")
	old := content(20<<20, 1)
	body := newPaused(old)
	done := make(chan error, 1)
	go func() {
		_, err := tr.client(0).PutObject(t.Context(), "data", key, body, int64(len(old)), "", "", minio.PutObjectOptions{DisableContentSha256: true})
		done <- err
	}()
	<-body.there
	tr.workers[1].state = "gone"
	tr.publish()
	stopped, w := make(chan struct{}), tr.workers[1]
	go func() {
		defer close(stopped)
		w.inside.Close()
		if err := <-w.done; err != nil {
			t.Errorf("the owner that was stopped: %v", err)
		}
	}()
	close(body.goOn)
	err := <-done
	<-stopped
	tr.workers = append(tr.workers[:1], tr.workers[2])
	got := tr.agree(key)
	if err == nil && !bytes.Equal(got, old) || err != nil && got != nil && !bytes.Equal(got, old) {
		t.Errorf("%d bytes, the put said %v", len(got), err)
	}
	tr.mustPut(1, key, []byte("next"))
	if got := tr.agree(key); string(got) != "next" {
		t.Errorf("%q", got)
	}
	tr.nothingStaged()
	if u := tr.uploads(); len(u) > 0 {
		t.Errorf("parts are left: %q", u)
	}
}

// A put whose bucket commits it, and never says so, is not lost and not torn: it is acknowledged in the end.
func TestABucketWhoseAnswersAreLost(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint()).start(2)
	seen := map[string]bool{}
	var mu sync.Mutex
	f.Set(func(r *http.Request) bucket.Fault {
		mu.Lock()
		defer mu.Unlock()
		id := r.Method + r.URL.Path + r.URL.RawQuery
		if seen[id] || r.Method == http.MethodGet || r.Method == http.MethodHead {
			return bucket.Fault{}
		}
		seen[id] = true
		// Once the bucket has done it.
		return bucket.Fault{Header: func(http.Header) { panic(http.ErrAbortHandler) }}
	})
	for n, size := range []int{0, 1000, 17 << 20} {
		key := fmt.Sprint("lost-", size)
		p := content(size, n)
		info := tr.mustPut(n%2, key, p)
		if got := tr.agree(key); !bytes.Equal(got, p) {
			t.Errorf("%s: %d bytes", key, len(got))
		}
		if _, at, err := tr.inBucket(key); err != nil || at.ETag != info.ETag {
			t.Errorf("%s: acknowledged with ETag %s, the bucket has %s, %v", key, info.ETag, at.ETag, err)
		}
		if err := tr.client(n%2).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{}); err != nil {
			t.Errorf("delete %s: %v", key, err)
		}
	}
	if u := tr.uploads(); len(u) > 3 { // one for each try to begin one whose answer was lost
		t.Errorf("parts are left: %q", u)
	}
}
