package objects_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/test/bucket"
)

// nothingStaged waits until no worker holds anything for a put under way.
func (tr *tier) nothingStaged() {
	tr.t.Helper()
	for i, w := range tr.workers {
		eventually(tr.t, "worker "+w.m.ID+" has dropped what was staged", func() error {
			if n := tr.metric(i, "stepcache_store_pinned_bytes"); n != 0 {
				return fmt.Errorf("%d bytes are pinned", n)
			}
			return nil
		})
	}
}

// A client that breaks off leaves nothing, whether it spoke to the owner or to another worker.
func TestAPutThatBreaksOffLeavesNothing(t *testing.T) {
	tr := newTier(t, "").start(2)
	for n, size := range []int64{1 << 20, 36 << 20, 1 << 20} { // in one request, in parts, and one that goes on as it comes
		for i := range 2 {
			key, told := tr.keyOwnedBy(0, fmt.Sprintf("cut-%d-%d-%d", n, size, i)), ""
			if n == 2 {
				told = "AAAAAAAAAAAAAAAAAAAAAA=="
			}
			ctx, cancel := context.WithCancel(t.Context())
			body := io.MultiReader(bytes.NewReader(content(int(size)/2, 1)), readerFunc(func([]byte) (int, error) {
				cancel()
				<-ctx.Done()
				return 0, errors.New("the client broke off")
			}))
			_, err := tr.client(i).PutObject(ctx, "data", key, body, size, told, "", minio.PutObjectOptions{DisableContentSha256: true})
			if err == nil {
				t.Fatal("a put of half its bytes was acknowledged")
			}
			for j := range 2 {
				if _, _, err := tr.get(j, key); code(err) != "NoSuchKey" {
					t.Errorf("%s through worker %d: %v", key, j, err)
				}
			}
		}
	}
	tr.nothingStaged()
	eventually(t, "no parts are left", func() error {
		if u := tr.uploads(); len(u) > 0 {
			return fmt.Errorf("%q", u)
		}
		return nil
	})
	if keys := tr.keys(0, ""); len(keys) > 0 {
		t.Errorf("listed: %q", keys)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// A put whose content is not what its digest says is refused, and nothing of it is stored, through the owner
// and through another worker.
func TestABadDigestStoresNothing(t *testing.T) {
	tr := newTier(t, "").start(2)
	for i := range 2 {
		for _, size := range []int{1000, 20 << 20} {
			key := tr.keyOwnedBy(0, fmt.Sprintf("digest-%d-%d", i, size))
			p := content(size, i)
			_, err := tr.client(i).PutObject(t.Context(), "data", key, bytes.NewReader(p), int64(size), "AAAAAAAAAAAAAAAAAAAAAA==", "", minio.PutObjectOptions{DisableContentSha256: true})
			if code(err) != "BadDigest" {
				t.Errorf("%s: %v", key, err)
			}
			if _, _, err := tr.inBucket(key); code(err) != "NoSuchKey" {
				t.Errorf("%s in the bucket: %v", key, err)
			}
		}
	}
	for i, size := range []int{5 << 20, 20 << 20} {
		c, key := tr.client(i), fmt.Sprintf("digest-of-a-part-%d", size)
		upload, err := c.NewMultipartUpload(t.Context(), "data", key, minio.PutObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.PutObjectPart(t.Context(), "data", key, upload, 1, bytes.NewReader(content(size, i)), int64(size),
			minio.PutObjectPartOptions{Md5Base64: "AAAAAAAAAAAAAAAAAAAAAA==", DisableContentSha256: true})
		if code(err) != "BadDigest" {
			t.Errorf("%s: %v", key, err)
		}
		if parts, err := c.ListObjectParts(t.Context(), "data", key, upload, 0, 10); err != nil || len(parts.ObjectParts) > 0 {
			t.Errorf("%s: parts %+v, %v", key, parts.ObjectParts, err)
		}
		if err := c.AbortMultipartUpload(t.Context(), "data", key, upload); err != nil {
			t.Error(err)
		}
	}
	tr.nothingStaged()
	if u := tr.uploads(); len(u) > 0 {
		t.Errorf("parts are left: %q", u)
	}
}

// The MD5 that a client tells of its content goes with it to the bucket, whichever worker it spoke to, and the content is in
// the bucket and in the tier as it was put.
func TestTheMD5ThatAClientToldGoesToTheBucket(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint()).start(2)
	for _, size := range []int{1, 70_000, 5<<20 + 1, 16 << 20} {
		for i := range 2 {
			key, p := tr.keyOwnedBy(0, fmt.Sprintf("told-%d-%d", size, i)), content(size, i)
			sum := md5.Sum(p)
			told := base64.StdEncoding.EncodeToString(sum[:])
			var came atomic.Int64
			f.Set(func(r *http.Request) bucket.Fault {
				if r.Method == http.MethodPut {
					came.Add(1)
					if got, how := r.Header.Get("Content-Md5"), r.Header.Get("X-Amz-Content-Sha256"); got != told || strings.HasPrefix(how, "STREAMING-") != (size > 128<<10) {
						t.Errorf("%s came with the MD5 %q and as %s", key, got, how)
					}
				}
				return bucket.Fault{}
			})
			info, err := tr.client(i).PutObject(t.Context(), "data", key, bytes.NewReader(p), int64(size), told, "", minio.PutObjectOptions{})
			f.Set(nil)
			if err != nil || came.Load() != 1 {
				t.Fatalf("%s: %v, after %d requests", key, err, came.Load())
			}
			if got, at, err := tr.inBucket(key); err != nil || !bytes.Equal(got, p) || at.ETag != info.ETag {
				t.Errorf("%s in the bucket: %d bytes, ETag %s, acknowledged %s, %v", key, len(got), at.ETag, info.ETag, err)
			}
			for j := range 2 {
				if got, _, err := tr.get(j, key); err != nil || !bytes.Equal(got, p) {
					t.Errorf("%s through worker %d: %d bytes, %v", key, j, len(got), err)
				}
			}
		}
	}
	tr.nothingStaged()
}

// The bucket throttles and resets; puts, reads and listings go on where it lets them.
func TestABucketThatThrottlesAndResets(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint()).start(2)
	var n atomic.Int64
	f.Set(func(r *http.Request) bucket.Fault {
		switch n.Add(1) % 3 {
		case 0:
			return bucket.Fault{Status: 503, Code: "SlowDown"}
		case 1:
			return bucket.Fault{Reset: true}
		}
		return bucket.Fault{}
	})
	for k, size := range []int{0, 10_000, 20 << 20} {
		key := fmt.Sprintf("fault/%d", size)
		p := content(size, k)
		info := tr.mustPut(k%2, key, p)
		got, at, err := tr.get((k+1)%2, key)
		if err != nil || !bytes.Equal(got, p) || at.ETag != info.ETag {
			t.Errorf("%s: %d bytes, %v", key, len(got), err)
		}
	}
	if keys := tr.keys(1, "fault/"); len(keys) != 3 {
		t.Errorf("listed %q", keys)
	}
}

// Parts that the bucket refuses end the put, and those it took are removed.
func TestABucketThatRefusesAPart(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint()).start(2)
	f.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodPut && r.URL.Query().Get("partNumber") == "2" {
			return bucket.Fault{Status: 403, Code: "AccessDenied"}
		}
		return bucket.Fault{}
	})
	if _, err := tr.put(0, "refused", content(40<<20, 1), minio.PutObjectOptions{}); code(err) != "AccessDenied" {
		t.Errorf("%v", err)
	}
	f.Set(nil)
	tr.nothingStaged()
	if u := tr.uploads(); len(u) > 0 {
		t.Errorf("parts are left: %q", u)
	}
	if _, _, err := tr.get(1, "refused"); code(err) != "NoSuchKey" {
		t.Errorf("it is there: %v", err)
	}
	tr.mustPut(1, "refused", []byte("now"))
}

// Parts that cannot be removed when their put fails are removed once the bucket lets them.
func TestABucketThatRefusesToAbort(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint()).start(1)
	var aborts atomic.Int64
	f.Set(func(r *http.Request) bucket.Fault {
		q := r.URL.Query()
		if r.Method == http.MethodDelete && q.Has("uploadId") {
			aborts.Add(1)
			return bucket.Fault{Status: 403, Code: "AccessDenied"}
		}
		if r.Method == http.MethodPut && q.Get("partNumber") == "2" {
			return bucket.Fault{Status: 403, Code: "AccessDenied"}
		}
		return bucket.Fault{}
	})
	if _, err := tr.put(0, "refused", content(40<<20, 1), minio.PutObjectOptions{}); code(err) != "AccessDenied" {
		t.Errorf("%v", err)
	}
	eventually(t, "the abort is tried again", func() error {
		if n := aborts.Load(); n < 2 {
			return fmt.Errorf("%d requests", n)
		}
		return nil
	})
	if u, err := tr.withParts(); err != nil || len(u) != 1 {
		t.Errorf("parts are left of %q, %v", u, err)
	}
	f.Set(nil)
	eventually(t, "the parts are removed", func() error {
		if u := tr.uploads(); len(u) > 0 {
			return fmt.Errorf("%q", u)
		}
		return nil
	})
}

// An upload whose abort the bucket refuses for good is not asked for again and again.
func TestABucketThatNeverAborts(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint()).start(1)
	f.Set(func(r *http.Request) bucket.Fault {
		q := r.URL.Query()
		if r.Method == http.MethodDelete && q.Has("uploadId") {
			return bucket.Fault{Status: 405, Code: "MethodNotAllowed"}
		}
		if r.Method == http.MethodPut && q.Get("partNumber") == "2" {
			return bucket.Fault{Status: 403, Code: "AccessDenied"}
		}
		return bucket.Fault{}
	})
	if _, err := tr.put(0, "refused", content(40<<20, 1), minio.PutObjectOptions{}); code(err) != "AccessDenied" {
		t.Errorf("%v", err)
	}
	journal := filepath.Join(tr.path(tr.workers[0].m.ID), "uploads")
	eventually(t, "the upload is given up", func() error {
		text, err := os.ReadFile(journal)
		if !strings.Contains(string(text), `"ended":true`) {
			return fmt.Errorf("%v: the journal is %s", err, text)
		}
		return nil
	})
}

// What the bucket does not take is told in its own words, whether the client spoke to the owner or to another worker.
func TestWhatTheBucketRefusesIsTold(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint()).start(2)
	tr.mustPut(0, "conf", []byte("a file"))
	f.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/odd") {
			return bucket.Fault{Status: 422, Code: "OddName"}
		}
		return bucket.Fault{}
	})
	for i := range 2 {
		if _, err := tr.put(i, "odd", []byte("x"), minio.PutObjectOptions{}); code(err) != "OddName" || err.Error() != "injected" {
			t.Errorf("worker %d: %s: %v", i, code(err), err)
		}
		_, err := tr.put(i, "conf/x", []byte("x"), minio.PutObjectOptions{})
		if c := code(err); c == "" || c == "InvalidRequest" || !strings.Contains(err.Error(), "already exists as a file") {
			t.Errorf("worker %d: %s: %v", i, c, err)
		}
	}
}

func TestWrongCredentialsAndAMissingBucketAreTold(t *testing.T) {
	tr := newTier(t, "").start(1)
	tr.mustPut(0, "before", []byte("x"))
	secret := filepath.Join(tr.path("secret"), "accessKeySecret")
	right, err := os.ReadFile(secret)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(secret, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the wrong key is in use", func() error {
		if _, err := tr.put(0, "wrong", []byte("x"), minio.PutObjectOptions{}); code(err) != "AccessDenied" {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	if err := os.WriteFile(secret, right, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the right key is in use again", func() error {
		_, err := tr.put(0, "right", []byte("x"), minio.PutObjectOptions{})
		return err
	})
	other := newTier(t, "")
	other.mounts[0].URL = "s3://no-such-bucket/" + other.prefix
	other.add()
	other.publish()
	other.run(0)
	eventually(t, "a put says that there is no bucket", func() error {
		_, err := other.put(0, "k", []byte("x"), minio.PutObjectOptions{})
		if err == nil {
			t.Fatal("a put into a bucket that does not exist was acknowledged")
		}
		if !strings.Contains(err.Error(), "bucket not found") && code(err) != "NoSuchBucket" {
			return err
		}
		return nil
	})
}

// A store that is full, or too small for the object, keeps what it can; every byte is served all the same.
func TestAFullStore(t *testing.T) {
	tr := newTier(t, "")
	tr.memory = 16 << 20
	tr.start(2)
	want := map[string][]byte{}
	for n := range 12 {
		key := fmt.Sprintf("full/%d", n)
		want[key] = content(3<<20, n)
		tr.mustPut(n%2, key, want[key])
	}
	want["full/large"] = content(30<<20, 99)
	tr.mustPut(0, "full/large", want["full/large"])
	for key, p := range want {
		for i := range 2 {
			if got, _, err := tr.get(i, key); err != nil || !bytes.Equal(got, p) {
				t.Errorf("%s through worker %d: %d bytes, %v", key, i, len(got), err)
			}
		}
	}
	tr.nothingStaged()
}

// What others write to the bucket is seen within the time for which versions are remembered, and never mixed
// with what was there.
func TestWritersOutsideTheTier(t *testing.T) {
	tr := newTier(t, "").start(2)
	old, new := bytes.Repeat([]byte("o"), 9<<20), bytes.Repeat([]byte("n"), 9<<20)
	tr.mustPut(0, "outside", old)
	r, _, _, err := tr.client(1).GetObject(t.Context(), "data", "outside", minio.GetObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.direct.PutObject(t.Context(), tr.bucket, tr.prefix+"outside", bytes.NewReader(new), int64(len(new)), minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(r)
	r.Close()
	if err == nil && !bytes.Equal(p, old) {
		t.Error("a read that was begun before has other bytes")
	}
	for i := range 2 {
		eventually(t, "the new version is seen", func() error {
			got, _, err := tr.get(i, "outside")
			if err == nil && !bytes.Equal(got, old) && !bytes.Equal(got, new) {
				t.Fatal("two versions are mixed")
			}
			if err != nil || !bytes.Equal(got, new) {
				return fmt.Errorf("not yet: %v", err)
			}
			return nil
		})
	}
}

// generator yields n bytes that are not all the same.
type generator struct{ off, n int64 }

func (g *generator) Read(p []byte) (int, error) {
	if g.off == g.n {
		return 0, io.EOF
	}
	k := int(min(int64(len(p)), g.n-g.off))
	for i := range k {
		o := g.off + int64(i)
		p[i] = byte(o) ^ byte(o>>8)*3 ^ byte(o>>16)*7 ^ byte(o>>24)*13
	}
	g.off += int64(k)
	return k, nil
}

// A large object passes through a small worker in bounded memory. STEPCACHE_LARGE=5368709121 makes it 5 GiB
// and a byte, which takes a minute and as much memory for the bucket.
func TestALargeObjectPassesThroughASmallWorker(t *testing.T) {
	size := int64(96<<20 + 1)
	if s := os.Getenv("STEPCACHE_LARGE"); s != "" {
		if _, err := fmt.Sscan(s, &size); err != nil {
			t.Fatalf("STEPCACHE_LARGE=%q is no number", s)
		}
	}
	tr := newTier(t, "")
	tr.memory = 16 << 20
	tr.add()
	tr.publish()
	tr.spawn(0)
	tr.ready()
	sum := sha256.New()
	body := io.TeeReader(&generator{n: size}, sum)
	if _, err := tr.client(0).PutObject(t.Context(), "data", "large", body, size, "", "", minio.PutObjectOptions{DisableContentSha256: true}); err != nil {
		t.Fatal(err)
	}
	r, info, _, err := tr.client(0).GetObject(t.Context(), "data", "large", minio.GetObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	back := sha256.New()
	if n, err := io.Copy(back, r); err != nil || n != size || info.Size != size || !bytes.Equal(back.Sum(nil), sum.Sum(nil)) {
		t.Errorf("%d bytes of %d came back, equal %v, %v", n, size, bytes.Equal(back.Sum(nil), sum.Sum(nil)), err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tr.workers[0].outside.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	var anon int64
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			fmt.Sscan(v, &anon)
		}
	}
	const limit = 512 << 10 // KiB; the race detector takes several times what the worker does
	if anon == 0 || anon > limit {
		t.Errorf("the worker holds %d KiB", anon)
	}
}
