package objects_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/test/bucket"
)

// What the bucket refuses for good, though it was acknowledged.

// refuseKey has the bucket refuse requests with one of these methods for a key until accept. Those of uploads in parts it
// takes.
func (bt *backTier) refuseKey(key string, methods ...string) (accept func()) {
	var refuses atomic.Bool
	refuses.Store(true)
	bt.proxy.Set(func(r *http.Request) bucket.Fault {
		if refuses.Load() && strings.HasSuffix(r.URL.Path, "/"+key) && slices.Contains(methods, r.Method) && r.URL.Query().Get("uploadId") == "" {
			return bucket.Fault{Status: 403, Code: "AccessDenied"}
		}
		return bucket.Fault{}
	})
	return func() { refuses.Store(false) }
}

// isRefused puts until that is acknowledged, and waits until the bucket, which must not take it, has refused it.
func (bt *backTier) isRefused(owner int, key, value string) {
	bt.t.Helper()
	bt.mustPut(owner, key, []byte(value))
	eventually(bt.t, key+" is refused", func() error {
		if u := bt.workers[owner].inside.Status().Unflushed; u.Objects == 0 || !strings.Contains(u.Problem, key) {
			return errors.New(u.Problem)
		}
		return nil
	})
}

// deleted deletes a key: a worker may be busy, and nothing else is an excuse.
func (bt *backTier) deleted(i int, key string) {
	bt.t.Helper()
	eventually(bt.t, key+" is deleted", func() error {
		err := bt.client(i).RemoveObject(bt.t.Context(), "data", key, minio.RemoveObjectOptions{})
		if err != nil && code(err) != "SlowDown" {
			bt.t.Fatalf("delete %.40q through worker %d: %v", key, i, err)
		}
		return err
	})
}

// A key that the bucket can never have is written over and deleted, though the bucket refuses to delete it as well, and
// does not keep others from being written back.
func TestBackAKeyThatTheBucketNeverTakes(t *testing.T) {
	bt := newBackTier(t)
	bt.write.MaxAge = worker.Duration(time.Millisecond)
	bt.start(2)
	bt.writesBack()
	key := bt.keyOwnedBy(0, strings.Repeat("segment", 40))
	bt.isRefused(0, key, "1")
	bt.writesBack() // the first goes through, and shows that the bucket takes anything
	bt.mustPut(0, key, []byte("2"))
	bt.reads(1, key, "2")
	bt.deleted(1, key)
	bt.nothingHeld()
	for i := range 2 {
		if got, _, err := bt.get(i, key); err == nil {
			t.Errorf("worker %d reads %q of what was deleted", i, got)
		}
		if keys := bt.keys(i, "segment"); len(keys) > 0 {
			t.Errorf("worker %d lists %q", i, keys)
		}
		if u := bt.workers[i].inside.Status().Unflushed; u.Objects > 0 || u.Problem != "" {
			t.Errorf("worker %d: %+v", i, u)
		}
	}
}

// A write over what the bucket refuses takes its place once the bucket has the write. One that the bucket refuses too
// leaves everything as it was: neither is what was acknowledged lost, nor does what was there before come back.
func TestBackAWriteOverWhatTheBucketRefuses(t *testing.T) {
	bt := newBackTier(t)
	bt.start(2)
	bt.writesBack()
	key := bt.keyOwnedBy(0, "refused")
	bt.mustPut(0, key, []byte("old"))
	bt.inBucketSoon(key, []byte("old"), md5Hex("old"))
	bt.nothingHeld()
	accept := bt.refuseKey(key, http.MethodPut, http.MethodDelete)
	bt.isRefused(0, key, "new")
	still := func() {
		t.Helper()
		for i := range 2 {
			bt.reads(i, key, "new")
			if keys := bt.keys(i, "refused"); len(keys) != 1 {
				t.Errorf("worker %d lists %q", i, keys)
			}
		}
	}
	denied := func(what string, do func() error) {
		t.Helper()
		eventually(t, what, func() error {
			switch err := do(); code(err) {
			case "AccessDenied":
				return nil
			case "SlowDown":
				return err
			default:
				t.Fatalf("%s: %v", what, err)
				return nil
			}
		})
		still()
	}
	denied("a delete that is refused", func() error {
		return bt.client(1).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{})
	})
	from := bt.keyOwnedBy(1, "from")
	bt.mustPut(1, from, []byte("copied"))
	denied("a copy that is refused", func() error {
		_, err := bt.client(1).CopyObject(t.Context(), "data", from, "data", key, nil, minio.CopySrcOptions{}, minio.PutObjectOptions{})
		return err
	})
	// The bucket would compare with what it has, which is not what everybody sees.
	denied("a put on a condition", func() error {
		o := minio.PutObjectOptions{}
		o.SetMatchETag(md5Hex("old"))
		_, err := bt.put(1, key, []byte("conditional"), o)
		return err
	})
	accept()
	bt.inBucketSoon(key, []byte("new"), md5Hex("new"))
	bt.nothingHeld()

	bt.refuseKey(key, http.MethodPut)
	bt.isRefused(0, key, "newer")
	large := content(17<<20, 1) // in parts
	eventually(t, "a larger one takes its place", func() error {
		_, err := bt.put(1, key, large, minio.PutObjectOptions{})
		if err != nil && code(err) != "SlowDown" {
			t.Fatal(err)
		}
		return err
	})
	bt.nothingHeld()
	for i := range 2 {
		if got, _, err := bt.get(i, key); err != nil || !bytes.Equal(got, large) {
			t.Errorf("worker %d: %d bytes, %v", i, len(got), err)
		}
	}
	if got, _, err := bt.inBucket(key); err != nil || !bytes.Equal(got, large) {
		t.Errorf("the bucket has %d bytes, %v", len(got), err)
	}
}

// While a put comes it turns out that the bucket's ETags are not what they were: the put is told the one that it has there.
func TestBackETagsThatChangeWhileAPutComes(t *testing.T) {
	bt := newBackTier(t)
	bt.start(2)
	bt.writesBack()
	bt.nothingHeld()
	content := content(1<<20, 1)
	r, w := io.Pipe()
	defer w.Close()
	key := bt.keyOwnedBy(0, "slow")
	type result struct {
		info minio.UploadInfo
		err  error
	}
	done := make(chan result, 1)
	go func() {
		info, err := bt.client(0).PutObject(t.Context(), "data", key, r, int64(len(content)), "", "", minio.PutObjectOptions{})
		done <- result{info, err}
	}()
	half := len(content) / 2
	if _, err := w.Write(content[:half]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is held", func() error {
		if len(bt.inJournal(0)) == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	bt.proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method != http.MethodPut {
			return bucket.Fault{}
		}
		return bucket.Fault{Header: func(h http.Header) { h.Set("ETag", `"0123456789abcdef0123456789abcdef"`) }}
	})
	other := bt.keyOwnedBy(0, "other")
	eventually(t, "puts go through", func() error {
		before := bt.metric(0, "stepcache_objects_acknowledged_back_total")
		bt.mustPut(0, other, []byte("other"))
		if bt.metric(0, "stepcache_objects_acknowledged_back_total") > before {
			return errors.New("one was written back")
		}
		return nil
	})
	bt.proxy.Set(nil)
	if _, err := w.Write(content[half:]); err != nil {
		t.Fatal(err)
	}
	w.Close()
	got := <-done
	if got.err != nil || got.info.ETag != md5Hex(string(content)) {
		t.Errorf("ETag %q, %v", got.info.ETag, got.err)
	}
	bt.inBucketSoon(key, content, md5Hex(string(content)))
	for i := range 2 {
		if got, _, err := bt.get(i, key); err != nil || !bytes.Equal(got, content) {
			t.Errorf("worker %d: %d bytes, %v", i, len(got), err)
		}
	}
}

// What was deleted although the bucket had refused it does not come back from a holder that could not be told, when its
// owner starts again or is lost.
func TestBackWhatTheBucketRefusedAndWasDeletedDoesNotComeBack(t *testing.T) {
	for _, lost := range []bool{false, true} {
		name := "its owner starts again"
		if lost {
			name = "its owner is lost"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it waits most of the time
			bt := newBackTier(t).outside(3)
			key := bt.placed("old", []int{0, 1, 2}, func(key string) bool {
				bt.refuseKey(key, http.MethodPut)
				bt.mustPut(0, key, []byte("old"))
				return len(bt.inJournal(1)) > 0
			})
			goOn := bt.hangs(1)
			bt.deleted(0, key)
			if len(bt.inJournal(1)) == 0 {
				t.Error("the worker that hung holds no copy: the test shows nothing")
			}
			members := []int{1, 2}
			if lost {
				bt.lose(0)
			} else {
				bt.workers[0].outside.Kill()
				<-bt.workers[0].outside.Done()
				bt.spawn(0)
				members = append(members, 0)
			}
			goOn()
			bt.publish()
			for _, i := range members {
				bt.staysDeleted(i, key)
			}
			bt.nothingHeldBy(members...)
			if _, _, err := bt.inBucket(key); code(err) != "NoSuchKey" {
				t.Errorf("the bucket has what was deleted: %v", err)
			}
		})
	}
}
