package objects_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source/s3"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/test/bucket"
)

// backTier is a tier that writes back, over a bucket that a test can have refuse writes.
type backTier struct {
	*tier
	proxy   *bucket.FaultProxy
	refuses atomic.Pointer[bucket.Fault]
}

func newBackTier(t *testing.T) *backTier {
	t.Helper()
	proxy := bucket.Faults(t, theServer(t))
	bt := &backTier{tier: newTier(t, proxy.Endpoint()), proxy: proxy}
	bt.write = worker.WriteConfig{
		Policy: worker.WriteBack, Copies: 2, FlushWithin: worker.Duration(10 * time.Second),
		MaxAge: worker.Duration(time.Hour), // that a slow machine lags behind is not what is tested
	}
	proxy.Set(func(r *http.Request) bucket.Fault {
		if f := bt.refuses.Load(); f != nil && r.Method != http.MethodGet && r.Method != http.MethodHead {
			return *f
		}
		return bucket.Fault{}
	})
	return bt
}

func (bt *backTier) refuse(f bucket.Fault) { bt.refuses.Store(&f) }

func (bt *backTier) throttle() { bt.refuse(bucket.Fault{Status: 503, Code: "SlowDown"}) }

func (bt *backTier) accept() { bt.refuses.Store(nil) }

// mustPut puts until that is acknowledged: on a slow machine another worker may seem not to answer for a moment, and
// then a put goes through, to a bucket that may refuse it.
func (bt *backTier) mustPut(i int, key string, p []byte) {
	bt.mustPutAs(i, key, p, minio.PutObjectOptions{})
}

func (bt *backTier) mustPutAs(i int, key string, p []byte, as minio.PutObjectOptions) (info minio.UploadInfo) {
	bt.t.Helper()
	eventually(bt.t, "put "+key, func() (err error) {
		info, err = bt.put(i, key, p, as)
		return err
	})
	return info
}

// writesBack waits until every worker has seen a put of a name that it owns acknowledged before the bucket had it.
func (bt *backTier) writesBack() *backTier {
	t := bt.t
	t.Helper()
	for i, w := range bt.workers {
		if w.state == "gone" {
			continue
		}
		key := bt.keyOwnedBy(i, "learn")
		eventually(t, "worker "+w.m.ID+" writes back", func() error {
			before := bt.metric(i, "stepcache_objects_acknowledged_back_total")
			if _, err := bt.put(i, key, []byte("learn"), minio.PutObjectOptions{}); err != nil {
				return err
			}
			if bt.metric(i, "stepcache_objects_acknowledged_back_total") == before {
				return errors.New("a put went through")
			}
			return nil
		})
	}
	return bt
}

// outside are n workers in processes of their own that write back.
func (bt *backTier) outside(n int) *backTier {
	bt.t.Helper()
	for range n {
		bt.add()
	}
	bt.publish()
	for i := range n {
		bt.spawn(i)
	}
	bt.ready()
	return bt.writesBack()
}

// journals are the files in which workers hold what the bucket does not have.
func (bt *backTier) journals() (files []string) {
	bt.t.Helper()
	for i := range bt.workers {
		files = append(files, bt.inJournal(i)...)
	}
	return files
}

// inJournal are the files of worker i.
func (bt *backTier) inJournal(i int) []string {
	bt.t.Helper()
	found, err := filepath.Glob(filepath.Join(bt.path(bt.workers[i].m.ID), "unflushed", "*"))
	if err != nil {
		bt.t.Fatal(err)
	}
	return found
}

// allInBucketSoon waits until the bucket has what was put, by key.
func (bt *backTier) allInBucketSoon(puts map[string][]byte) {
	bt.t.Helper()
	for key, p := range puts {
		bt.inBucketSoon(key, p, md5Hex(string(p)))
	}
}

// inBucketSoon waits until the bucket has an object as it was acknowledged.
func (bt *backTier) inBucketSoon(key string, want []byte, etag string) {
	bt.t.Helper()
	eventually(bt.t, key+" is in the bucket", func() error {
		got, at, err := bt.inBucket(key)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want) || at.ETag != etag {
			return fmt.Errorf("%d bytes of %d, ETag %s, acknowledged %s", len(got), len(want), at.ETag, etag)
		}
		return nil
	})
}

func (bt *backTier) nothingHeld() {
	bt.t.Helper()
	eventually(bt.t, "nobody holds anything for the bucket", func() error {
		if f := bt.journals(); len(f) > 0 {
			return fmt.Errorf("%q", f)
		}
		return nil
	})
}

// An object is acknowledged while the bucket takes nothing, is read, described and listed through every worker
// as it was put, is held by two workers, and is in the bucket with the ETag that was acknowledged once that
// takes it.
func TestBackReadsWhatTheBucketDoesNotHaveYet(t *testing.T) {
	bt := newBackTier(t)
	bt.start(3)
	bt.writesBack()
	bt.nothingHeld()
	bt.mustPut(0, "dir/before", []byte("in the bucket"))
	bt.inBucketSoon("dir/before", []byte("in the bucket"), md5Hex("in the bucket"))
	bt.nothingHeld()
	bt.throttle()
	p := content(5<<20, 3)
	etag := md5Hex(string(p))
	key := bt.keyOwnedBy(1, "dir/new")
	info := bt.mustPutAs(0, key, p, minio.PutObjectOptions{ContentType: "text/x", UserMetadata: map[string]string{"Who": "me"}, CacheControl: "no-store"})
	if info.ETag != etag {
		t.Fatalf("ETag %s", info.ETag)
	}
	if _, _, err := bt.inBucket(key); code(err) != "NoSuchKey" {
		t.Fatalf("the bucket has it: %v", err)
	}
	if f := bt.journals(); len(f) < 2 {
		t.Errorf("held in %q", f)
	}
	for i := range bt.workers {
		got, at, err := bt.get(i, key)
		if err != nil || !bytes.Equal(got, p) || at.ETag != etag || at.ContentType != "text/x" || at.UserMetadata["Who"] != "me" || at.Metadata.Get("Cache-Control") != "no-store" {
			t.Errorf("worker %d: %d bytes, %v, %+v", i, len(got), err, at)
		}
		o := minio.GetObjectOptions{}
		o.SetRange(4<<20-10, 4<<20+9) // across blocks
		r, _, _, err := bt.client(i).GetObject(t.Context(), "data", key, o)
		if err != nil {
			t.Fatal(err)
		}
		part, err := io.ReadAll(r)
		r.Close()
		if err != nil || !bytes.Equal(part, p[4<<20-10:4<<20+10]) {
			t.Errorf("worker %d: a range of %d bytes, %v", i, len(part), err)
		}
		if keys := bt.keys(i, "dir/"); len(keys) != 2 || keys[0] != "dir/before" || keys[1] != key {
			t.Errorf("worker %d lists %q", i, keys)
		}
	}
	u := bt.workers[1].inside.Status().Unflushed
	if u.Objects != 1 || u.Bytes != int64(len(p)) || u.Oldest.IsZero() {
		t.Errorf("the owner's status: %+v", u)
	}
	bt.accept()
	bt.inBucketSoon(key, p, etag)
	bt.nothingHeld()
	_, at, err := bt.inBucket(key)
	if err != nil || at.ContentType != "text/x" || at.UserMetadata["Who"] != "me" || at.Metadata.Get("Cache-Control") != "no-store" {
		t.Errorf("%v, %+v", err, at)
	}
	for i := range bt.workers {
		if u := bt.workers[i].inside.Status().Unflushed; u.Objects != 0 || u.Bytes != 0 || u.Problem != "" {
			t.Errorf("worker %d: %+v", i, u)
		}
		if got, _, err := bt.get(i, key); err != nil || !bytes.Equal(got, p) {
			t.Errorf("worker %d: %d bytes, %v", i, len(got), err)
		}
	}
}

// What is acknowledged with a header whose value only browsers understand is brought to the bucket, and holds up nothing
// that is done to its name.
func TestBackAnExpiresThatIsNoDate(t *testing.T) {
	bt := newBackTier(t)
	bt.start(2)
	bt.writesBack()
	b, err := s3.Open(t.Context(), bt.mounts[0].Config)
	if err != nil {
		t.Fatal(err)
	}
	for i, expires := range []string{"0", "-1"} {
		key := bt.keyOwnedBy(i, "expired")
		bt.mustPutAs(0, key, []byte("x"), minio.PutObjectOptions{UserMetadata: map[string]string{"Expires": expires}})
		bt.nothingHeld()
		if _, a, err := b.Describe(t.Context(), bt.prefix+key); err != nil || a.Headers["Expires"] != expires {
			t.Errorf("Expires %q: the bucket has %+v, %v", expires, a, err)
		}
		if err := bt.client(1).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{}); err != nil {
			t.Errorf("Expires %q: %v", expires, err)
		}
	}
}

// Listings in pages of every size, with and without delimiter, are those of a bucket that has everything.
func TestBackListsPagesOfBoth(t *testing.T) {
	bt := newBackTier(t)
	bt.start(2)
	bt.writesBack()
	defer bt.accept() // workers that stop bring to the bucket what they hold
	var want []string
	for i := range 24 {
		if i == 12 {
			bt.nothingHeld()
			bt.throttle()
		}
		// Keys of both kinds between each other, in folders of both, and beside them.
		key := fmt.Sprintf("p/%c%s%d", 'a'+i*7%12, []string{"/", "-", "/x/"}[i%3], i)
		bt.mustPut(i%2, key, []byte(key))
		want = append(want, key)
	}
	for i := range 2 {
		for _, max := range []int{1, 2, 3, 7, 1000} {
			for _, delimiter := range []string{"", "/"} {
				expected := map[string]bool{}
				for _, k := range want {
					if j := strings.Index(k[2:], delimiter); delimiter != "" && j >= 0 {
						k = k[:2+j+1]
					}
					expected[k] = true
				}
				got := map[string]bool{}
				token := ""
				for page := 0; ; page++ {
					r, err := bt.client(i).ListObjectsV2("data", "p/", "", token, delimiter, max)
					if err != nil {
						t.Fatal(err)
					}
					last := ""
					for _, o := range r.Contents {
						if got[o.Key] || o.Key <= last {
							t.Errorf("pages of %d: %s again, or after %s", max, o.Key, last)
						}
						got[o.Key], last = true, o.Key
					}
					for _, p := range r.CommonPrefixes {
						got[p.Prefix] = true
					}
					if !r.IsTruncated {
						break
					}
					if page > 100 {
						t.Fatal("the listing does not end")
					}
					token = r.NextContinuationToken
				}
				if len(got) != len(expected) {
					t.Errorf("pages of %d, delimiter %q: %d entries, want %d", max, delimiter, len(got), len(expected))
				}
				for k := range expected {
					if !got[k] {
						t.Errorf("pages of %d, delimiter %q: %s is missing", max, delimiter, k)
					}
				}
			}
		}
	}
}

// A delete comes after what was put before it, and a copy has what was put before it, though the bucket had
// neither when they were asked for.
func TestBackKeepsTheOrderOfOtherWrites(t *testing.T) {
	bt := newBackTier(t)
	bt.start(2)
	bt.writesBack()
	bt.throttle()
	bt.mustPut(0, "deleted", []byte("1"))
	bt.mustPut(1, "deleted", []byte("2"))
	bt.mustPut(0, "from", []byte("copied"))
	bt.mustPut(0, "large", []byte("small"))
	large := content(9<<20, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := bt.client(1).RemoveObject(t.Context(), "data", "deleted", minio.RemoveObjectOptions{}); err != nil {
			t.Errorf("delete: %v", err)
		}
	})
	wg.Go(func() {
		if _, err := bt.client(1).CopyObject(t.Context(), "data", "from", "data", "to", nil, minio.CopySrcOptions{}, minio.PutObjectOptions{}); err != nil {
			t.Errorf("copy: %v", err)
		}
	})
	wg.Go(func() { // too large to be written back
		if _, err := bt.put(1, "large", large, minio.PutObjectOptions{}); err != nil {
			t.Errorf("put: %v", err)
		}
	})
	bt.reads(0, "from", "copied") // and what was acknowledged is read meanwhile
	bt.accept()
	wg.Wait()
	for i := range 2 {
		if _, _, err := bt.get(i, "deleted"); code(err) != "NoSuchKey" {
			t.Errorf("worker %d has what was deleted: %v", i, err)
		}
		bt.reads(i, "to", "copied")
		bt.reads(i, "large", string(large))
	}
	bt.nothingHeld()
	if _, _, err := bt.inBucket("deleted"); code(err) != "NoSuchKey" {
		t.Errorf("the bucket has what was deleted: %v", err)
	}
	if got, _, err := bt.inBucket("large"); err != nil || !bytes.Equal(got, large) {
		t.Errorf("the bucket has %d bytes, %v", len(got), err)
	}
	// Conditions are the bucket's to decide, after what is pending.
	bt.throttle()
	bt.mustPut(0, "lock", []byte("mine"))
	wg.Go(func() {
		o := minio.PutObjectOptions{}
		o.SetMatchETagExcept("*")
		if _, err := bt.put(1, "lock", []byte("other's"), o); code(err) != "PreconditionFailed" {
			t.Errorf("a put on the condition that there is none: %v", err)
		}
	})
	bt.accept()
	wg.Wait()
	bt.reads(1, "lock", "mine")
}

// When workers hold as much as they may, puts go through: they get what the bucket says, and nothing is lost.
func TestBackWithAFullJournalGoesThrough(t *testing.T) {
	bt := newBackTier(t)
	bt.write.MaxUnflushed = 4 << 20
	bt.start(2)
	bt.writesBack()
	bt.nothingHeld()
	bt.refuse(bucket.Fault{Status: 403, Code: "AccessDenied"})
	acked := map[string][]byte{}
	refused := 0
	for k := range 8 {
		key := fmt.Sprintf("full-%d", k)
		p := content(900<<10, k)
		switch _, err := bt.put(k%2, key, p, minio.PutObjectOptions{}); {
		case err == nil:
			acked[key] = p
		case code(err) == "AccessDenied":
			refused++
		default:
			t.Errorf("%s: %v", key, err)
		}
	}
	if len(acked) == 0 || refused == 0 {
		t.Errorf("%d acknowledged, %d refused", len(acked), refused)
	}
	eventually(t, "the status says why", func() error {
		for _, w := range bt.workers {
			if u := w.inside.Status().Unflushed; u.Objects > 0 && strings.Contains(u.Problem, "denied") {
				return nil
			}
		}
		return errors.New("it does not")
	})
	bt.accept()
	bt.allInBucketSoon(acked)
	bt.nothingHeld()
}

// When the bucket lags behind for too long, puts wait for it, and get what it says.
func TestBackThatLagsGoesThrough(t *testing.T) {
	bt := newBackTier(t)
	bt.write.MaxAge = worker.Duration(time.Millisecond)
	bt.start(2)
	key := bt.keyOwnedBy(0, "lags")
	other := bt.keyOwnedBy(0, "other")
	eventually(t, "one is acknowledged before the bucket has it", func() error {
		bt.accept()
		if _, err := bt.put(0, key, []byte("learn"), minio.PutObjectOptions{}); err != nil {
			return err
		}
		bt.nothingHeld()
		bt.refuse(bucket.Fault{Status: 403, Code: "AccessDenied"})
		_, err := bt.put(0, key, []byte("2"), minio.PutObjectOptions{})
		return err
	})
	eventually(t, "a put is told what the bucket says", func() error {
		if _, err := bt.put(0, other, []byte("3"), minio.PutObjectOptions{}); code(err) != "AccessDenied" {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	bt.reads(1, key, "2")
	bt.accept()
	bt.inBucketSoon(key, []byte("2"), md5Hex("2"))
}

// Workers that are all killed while the bucket takes nothing find what they acknowledged again.
func TestBackOutlivesTheProcesses(t *testing.T) {
	bt := newBackTier(t).outside(3)
	bt.throttle()
	acked := map[string][]byte{}
	for k := range 12 {
		key := fmt.Sprintf("kept-%d", k%9) // some are written over
		acked[key] = content(1000*k, k)
		bt.mustPut(k%3, key, acked[key])
	}
	for _, w := range bt.workers {
		w.outside.Kill()
		<-w.outside.Done()
	}
	for i := range bt.workers {
		bt.spawn(i)
	}
	bt.ready()
	for key, p := range acked {
		for i := range bt.workers {
			eventually(t, "it is read", func() error {
				got, _, err := bt.get(i, key)
				if err == nil && !bytes.Equal(got, p) {
					t.Fatalf("%s through worker %d: %d bytes of %d", key, i, len(got), len(p))
				}
				return err
			})
		}
	}
	if keys := bt.keys(1, "kept-"); len(keys) != 9 {
		t.Errorf("listed: %q", keys)
	}
	bt.accept()
	bt.allInBucketSoon(acked)
	bt.nothingHeld()
}

// lose kills worker i and its memory for good.
func (bt *backTier) lose(i int) {
	bt.t.Helper()
	w := bt.workers[i]
	w.outside.Kill()
	<-w.outside.Done()
	if err := os.RemoveAll(bt.path(w.m.ID)); err != nil {
		bt.t.Fatal(err)
	}
	w.state = "gone"
}

// A worker is lost with its memory while the bucket takes nothing: the others have what it acknowledged, read it,
// and bring it to the bucket.
func TestBackSurvivesTheLossOfAWorker(t *testing.T) {
	bt := newBackTier(t).outside(3)
	bt.throttle()
	acked := map[string][]byte{}
	for k := range 12 {
		key := fmt.Sprintf("lost-%d", k%9)
		acked[key] = content(1+100_000*k, k)
		bt.mustPut(k%3, key, acked[key])
	}
	bt.lose(1)
	bt.publish()
	for key, p := range acked {
		for _, i := range []int{0, 2} {
			eventually(t, "it is read", func() error {
				got, _, err := bt.get(i, key)
				if err == nil && !bytes.Equal(got, p) {
					t.Fatalf("%s through worker %d: %d bytes of %d", key, i, len(got), len(p))
				}
				return err
			})
		}
	}
	bt.accept()
	bt.allInBucketSoon(acked)
	bt.nothingHeld()
	bt.mustPut(0, "lost-0", []byte("after"))
	bt.reads(2, "lost-0", "after")
}

// A worker that hung while the bucket got what it held a copy of, and while the name was deleted, brings nothing
// back, although the name's owner is lost since.
func TestBackAnOldCopyDoesNotComeBack(t *testing.T) {
	t.Parallel()
	bt := newBackTier(t).outside(3)
	bt.throttle()
	// A name whose copy is at worker 1.
	owner := func(key string, n int) string {
		m := ring.Membership{}
		for _, w := range bt.workers {
			m.Members = append(m.Members, w.m)
		}
		return m.NameOwners(dataset, key, 0)[n].ID
	}
	key := ""
	for n := 0; key == ""; n++ {
		if k := fmt.Sprintf("old-%d", n); owner(k, 0) == "w0" && owner(k, 1) == "w1" {
			key = k
		}
	}
	bt.mustPut(0, key, []byte("old"))
	goOn := bt.hangs(1)
	bt.accept()
	bt.inBucketSoon(key, []byte("old"), md5Hex("old"))
	eventually(t, "it is deleted", func() error {
		return bt.client(0).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{})
	})
	bt.lose(0)
	goOn()
	bt.publish()
	for i := 1; i < 3; i++ {
		bt.staysDeleted(i, key)
	}
	bt.nothingHeldBy(1, 2)
	if _, _, err := bt.inBucket(key); code(err) != "NoSuchKey" {
		t.Errorf("the bucket has what was deleted: %v", err)
	}
}

// What an owner held when it left the list was brought to the bucket by the next one, which was not the last write of
// the name: it does not count, with its own holder neither, when that comes back.
func TestBackAnOwnerThatComesBackForgetsWhatItHeld(t *testing.T) {
	bt := newBackTier(t)
	l := bt.linked()
	bt.start(3)
	bt.writesBack()
	key := bt.keyOwnedBy(0, "left")
	bt.throttle()
	bt.mustPut(1, key, []byte("old"))
	bt.workers[0].state = "gone"
	list := bt.next()
	for i := range bt.workers {
		bt.tell(i, list)
	}
	// Once the next owner answers the former one, that sends nothing any more.
	eventually(t, "the former owner passes on", func() error {
		before := bt.metric(0, "stepcache_objects_forwarded_total")
		if got, _, err := bt.get(0, key); err != nil || string(got) != "old" {
			return fmt.Errorf("%q, %v", got, err)
		}
		if bt.metric(0, "stepcache_objects_forwarded_total") == before {
			return errors.New("not yet")
		}
		return nil
	})
	for i := 1; i < 3; i++ {
		l.set(true, i, 0) // it cannot be told to drop what it holds
	}
	bt.accept()
	bt.inBucketSoon(key, []byte("old"), md5Hex("old"))
	eventually(t, "it is deleted", func() error {
		return bt.client(1).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{})
	})
	if len(bt.inJournal(0)) == 0 {
		t.Fatal("the worker that left holds nothing: the test shows nothing")
	}
	for i := 1; i < 3; i++ {
		l.set(false, i, 0)
	}
	bt.workers[0].state, bt.workers[0].m.Joined = "", bt.epoch+1
	list = bt.next()
	for i := range bt.workers {
		bt.tell(i, list)
	}
	mine := bt.keyOwnedBy(0, "other")
	eventually(t, "the worker serves its names again", func() error {
		_, err := bt.put(0, mine, []byte("1"), minio.PutObjectOptions{})
		return err
	})
	for i := range bt.workers {
		if got, _, err := bt.get(i, key); code(err) != "NoSuchKey" {
			t.Errorf("worker %d reads %q of what was deleted, %v", i, got, err)
		}
	}
	bt.nothingHeld()
	if _, _, err := bt.inBucket(key); code(err) != "NoSuchKey" {
		t.Errorf("the bucket has what was deleted: %v", err)
	}
}

// staysDeleted waits until a worker serves a name, of which nothing may have come back.
func (bt *backTier) staysDeleted(i int, key string) {
	bt.t.Helper()
	eventually(bt.t, "names are served", func() error {
		_, _, err := bt.get(i, key)
		if err == nil {
			bt.t.Fatal("what was deleted is back")
		}
		if code(err) != "NoSuchKey" {
			return err
		}
		return nil
	})
}

func (bt *backTier) nothingHeldBy(workers ...int) {
	bt.t.Helper()
	eventually(bt.t, "the workers hold nothing for the bucket", func() error {
		for _, i := range workers {
			if f, _ := filepath.Glob(filepath.Join(bt.path(bt.workers[i].m.ID), "unflushed", "*")); len(f) > 0 {
				return fmt.Errorf("%q", f)
			}
		}
		return nil
	})
}

// A worker that is told to stop takes no writes any more, is not ready, and ends once the bucket has what it
// acknowledged.
func TestBackStopsOnceTheBucketHasEverything(t *testing.T) {
	bt := newBackTier(t)
	bt.write.FlushWithin = worker.Duration(2 * patience)
	bt.start(2)
	bt.writesBack()
	bt.throttle()
	defer bt.accept()
	key := bt.keyOwnedBy(0, "stop")
	bt.mustPut(0, key, []byte("1"))
	w := bt.workers[0].inside
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		w.Close()
	}()
	eventually(t, "writes are refused", func() error {
		if _, err := bt.put(0, bt.keyOwnedBy(0, "late"), []byte("2"), minio.PutObjectOptions{}); code(err) != "SlowDown" {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	resp, err := http.Get("http://" + bt.workers[0].m.Control + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("ready: status %d", resp.StatusCode)
	}
	bt.reads(1, key, "1")
	select {
	case <-closed:
		t.Fatal("it has stopped, and the bucket does not have what it acknowledged")
	default:
	}
	bt.accept()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Fatal("it does not stop")
	}
	if got, _, err := bt.inBucket(key); err != nil || string(got) != "1" {
		t.Errorf("the bucket has %q, %v", got, err)
	}
}

// throttleAndRefuse has the bucket throttle every other put, and refuse most of those of one key, and some deletes of it,
// as if for good, until takeAll: then it only throttles.
func (bt *backTier) throttleAndRefuse(key string) (takeAll func()) {
	var n, of atomic.Int64
	var all atomic.Bool
	bt.proxy.Set(func(r *http.Request) bucket.Fault {
		refuses := strings.HasSuffix(r.URL.Path, "/"+key) && !all.Load()
		switch {
		case refuses && r.Method == http.MethodPut && of.Add(1)%8 != 0, refuses && r.Method == http.MethodDelete && of.Add(1)%4 == 0:
			return bucket.Fault{Status: 403, Code: "AccessDenied"}
		case r.Method == http.MethodPut && n.Add(1)%2 == 0:
			return bucket.Fault{Status: 503, Code: "SlowDown"}
		}
		return bucket.Fault{}
	})
	return func() { all.Store(true) }
}

// Reads and listings see every acknowledged write, in its order, while the bucket throttles, refuses one name, and names
// are written over and deleted at once; what the bucket has in the end is the last of them.
func TestBackHistoriesWithABucketThatThrottles(t *testing.T) {
	bt := newBackTier(t)
	takeAll := bt.throttleAndRefuse("key-2")
	bt.start(3)
	bt.writesBack()
	acked := func() (n int64) {
		for i := range bt.workers {
			n += bt.metric(i, "stepcache_objects_acknowledged_back_total")
		}
		return n
	}
	before := acked()
	h := newHistory(bt.tier)
	var wg sync.WaitGroup
	h.clients(&wg, 6, 30, 3, func(r *rand.Rand) int { return r.IntN(3) })
	wg.Wait()
	takeAll()
	h.check()
	bt.nothingHeld()
	if acked() == before {
		t.Error("no write was acknowledged before the bucket had it: the test shows nothing")
	}
	// What the bucket has in the end is what the workers say, of every name.
	for k := range 3 {
		key := fmt.Sprintf("key-%d", k)
		there, _, terr := bt.inBucket(key)
		got, _, err := bt.get(k, key)
		if code(terr) != code(err) || !bytes.Equal(there, got) {
			t.Errorf("%s: the bucket has %q, %v; read: %q, %v", key, there, terr, got, err)
		}
	}
}

// Reads and listings see every acknowledged write while the bucket throttles and the membership changes, which each
// worker learns at another time: owners leave and come back while what they acknowledged is pending.
func TestBackHistoriesWhileTheMembershipChanges(t *testing.T) {
	bt := newBackTier(t)
	bt.write.FlushWithin = worker.Duration(time.Second)
	takeAll := bt.throttleAndRefuse("key-2")
	const workers, clients, each, changes, keys = 4, 6, 30, 4, 3
	bt.start(workers)
	bt.writesBack()
	acked := func() (n int64) {
		for i := range bt.workers {
			n += bt.metric(i, "stepcache_objects_acknowledged_back_total")
		}
		return n
	}
	before := acked()
	h := newHistory(bt.tier)
	var wg sync.WaitGroup
	var begun atomic.Int64
	h.clients(&wg, clients, each, keys, func(r *rand.Rand) int {
		begun.Add(1)
		return r.IntN(workers)
	})
	r := rand.New(rand.NewPCG(1, 2))
	after := func(ops int64) {
		for at := min(begun.Load()+ops, clients*each); begun.Load() < at; {
			time.Sleep(time.Millisecond)
		}
	}
	for change := range changes {
		after(clients * each / (changes + 2))
		// The owner of a name that is written, so that names move.
		w := bt.workers[bt.owner(fmt.Sprintf("key-%d", change%keys))]
		for _, o := range bt.workers {
			switch {
			case o.state == "gone":
				o.state, o.m.Joined = "", bt.epoch+1
			case o.m.State == ring.Leaving:
				o.m.State = ring.Ready
			}
		}
		if change%2 == 0 {
			w.m.State = ring.Leaving
		} else {
			w.state = "gone"
		}
		list := bt.next()
		for _, i := range r.Perm(workers) {
			after(1) // between workers that disagree
			bt.tell(i, list)
		}
	}
	wg.Wait()
	takeAll()
	h.check()
	if acked() == before {
		t.Error("no write was acknowledged before the bucket had it: the test shows nothing")
	}
	var members []int
	for i, w := range bt.workers {
		if w.state != "gone" {
			members = append(members, i)
		}
	}
	bt.nothingHeldBy(members...)
	done, failed := 0, 0
	for k := range keys {
		key := fmt.Sprintf("key-%d", k)
		for _, o := range h.ops[key] {
			if o.write && !o.maybe {
				done++
			} else if o.write {
				failed++
			}
		}
		there, _, terr := bt.inBucket(key)
		for _, i := range members {
			eventually(t, "it is read", func() error {
				got, _, err := bt.get(i, key)
				if code(err) == "SlowDown" {
					return err // the last list is not settled yet
				}
				if code(terr) != code(err) || !bytes.Equal(there, got) {
					t.Errorf("%s: the bucket has %q, %v; worker %d reads %q, %v", key, there, terr, i, got, err)
				}
				return nil
			})
		}
	}
	t.Logf("%d writes acknowledged, %d of them before the bucket had them, %d failed", done, acked()-before, failed)
	if done < 10 {
		t.Errorf("only %d writes were acknowledged", done)
	}
}
