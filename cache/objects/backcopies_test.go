package objects_test

import (
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/test/bucket"
)

// With three copies two workers may be lost at once, with their memory.
func TestBackWithThreeCopiesSurvivesTheLossOfTwoWorkers(t *testing.T) {
	bt := newBackTier(t)
	bt.write.Copies = 3
	bt.outside(4)
	bt.nothingHeld()
	bt.throttle()
	acked := map[string][]byte{}
	for k := range 12 {
		key := fmt.Sprintf("three-%d", k)
		acked[key] = content(1+50_000*k, k)
		bt.mustPut(k%4, key, acked[key])
		holds := 0
		for i := range bt.workers {
			if len(bt.inJournal(i)) > 0 {
				holds++
			}
		}
		if holds < 3 {
			t.Fatalf("%s is acknowledged, and %d workers hold anything", key, holds)
		}
	}
	bt.lose(0)
	bt.lose(1)
	bt.publish()
	for key, p := range acked {
		for _, i := range []int{2, 3} {
			eventually(t, "it is read", func() error {
				got, _, err := bt.get(i, key)
				if err == nil && string(got) != string(p) {
					t.Fatalf("%s through worker %d: %d bytes of %d", key, i, len(got), len(p))
				}
				return err
			})
		}
	}
	bt.accept()
	bt.allInBucketSoon(acked)
	bt.nothingHeldBy(2, 3)
}

// The bytes of a copy change in its owner's memory: that is found whoever reads it, and what comes to the bucket and to
// readers is another worker's copy.
func TestBackACorruptCopyIsReplacedAndNeverFlushed(t *testing.T) {
	bt := newBackTier(t)
	bt.start(3)
	bt.writesBack()
	bt.nothingHeld()
	var refuses atomic.Bool
	refuses.Store(true)
	bt.proxy.Set(func(r *http.Request) bucket.Fault {
		// An owner asks what the bucket has before it reads what it brings there.
		if refuses.Load() && (r.Method == http.MethodPut || r.Method == http.MethodHead) {
			return bucket.Fault{Status: 503, Code: "SlowDown"}
		}
		return bucket.Fault{}
	})
	keys := map[string][]byte{}
	damage := func(i int, key string, p []byte) {
		t.Helper()
		bt.mustPut(0, key, p)
		for _, name := range bt.inJournal(i) {
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			head := make([]byte, 16)
			if _, err := f.ReadAt(head, 0); err == nil && string(head) == string(p[:16]) {
				if _, err := f.WriteAt([]byte{p[len(p)/2] ^ 1}, int64(len(p)/2)); err != nil {
					t.Fatal(err)
				}
				keys[key] = p
			}
			f.Close()
		}
		if keys[key] == nil {
			t.Fatalf("no copy of %s is found with worker %d", key, i)
		}
	}
	damage(0, bt.keyOwnedBy(0, "corrupt"), content(300<<10, 1))
	damage(1, bt.keyOwnedBy(1, "corrupt"), content(5<<20, 2))
	for key, p := range keys {
		for i := range 3 {
			eventually(t, "it is read", func() error {
				got, _, err := bt.get(i, key)
				if err == nil && string(got) != string(p) {
					t.Fatalf("%s through worker %d: other bytes", key, i)
				}
				return err
			})
		}
	}
	refuses.Store(false)
	bt.allInBucketSoon(keys)
	bt.nothingHeld()
}

// A worker that is out of the list and is told to stop while the bucket takes nothing ends once members hold what it
// held, long before it would give up.
func TestBackAWorkerThatLeftEndsOnceMembersHoldWhatItHolds(t *testing.T) {
	bt := newBackTier(t)
	bt.write.FlushWithin = worker.Duration(time.Hour)
	bt.start(4)
	bt.writesBack()
	bt.nothingHeld()
	bt.throttle()
	defer bt.accept() // the others stop too
	key := bt.keyOwnedBy(0, "ends")
	bt.mustPut(1, key, []byte("held"))
	bt.workers[0].state = "gone"
	bt.tellAll()
	closed := make(chan struct{})
	w := bt.workers[0].inside
	go func() {
		defer close(closed)
		w.Close()
	}()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Fatal("it does not stop")
	}
	holds := 0
	for i := 1; i < 4; i++ {
		holds += min(1, len(bt.inJournal(i)))
		eventually(t, "it is read", func() error {
			got, _, err := bt.get(i, key)
			if err == nil && string(got) != "held" {
				t.Fatalf("worker %d reads %q", i, got)
			}
			return err
		})
	}
	if holds < 2 {
		t.Errorf("%d members hold it", holds)
	}
	bt.accept()
	bt.inBucketSoon(key, []byte("held"), md5Hex("held"))
}

// A bucket that does not know conditions is given objects without, and one that has other bytes by then is not written
// over by a request that comes late.
func TestBackBringsObjectsToTheBucketOnCondition(t *testing.T) {
	bt := newBackTier(t)
	bt.start(2)
	bt.writesBack()
	bt.nothingHeld()
	var mu sync.Mutex
	conditions := map[string][]string{}
	bt.proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodPut {
			mu.Lock()
			defer mu.Unlock()
			conditions[r.URL.Path] = append(conditions[r.URL.Path], strings.Trim(r.Header.Get("If-Match")+r.Header.Get("If-None-Match"), `"`))
		}
		return bucket.Fault{}
	})
	key, n := "", 0
	eventually(t, "puts are brought to the bucket on condition", func() error { // one may go through on a slow machine
		n++
		key = bt.keyOwnedBy(0, fmt.Sprint("condition-", n))
		for _, v := range []string{"1", "2"} {
			bt.mustPut(0, key, []byte(v))
			bt.inBucketSoon(key, []byte(v), md5Hex(v))
		}
		mu.Lock()
		defer mu.Unlock()
		got := conditions["/"+bt.bucket+"/"+bt.prefix+key]
		if want := []string{"*", md5Hex("1")}; !slices.Equal(got, want) {
			return fmt.Errorf("conditions %q, want %q", got, want)
		}
		return nil
	})
	bt.nothingHeld()
	// Another one writes between the question what the bucket has and the put.
	other := []byte("other's")
	var once atomic.Bool
	bt.proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodPut && once.CompareAndSwap(false, true) {
			if _, err := bt.direct.PutObject(t.Context(), bt.bucket, bt.prefix+key, strings.NewReader(string(other)), int64(len(other)), minio.PutObjectOptions{}); err != nil {
				t.Error(err)
			}
		}
		return bucket.Fault{}
	})
	bt.mustPut(0, key, []byte("3"))
	bt.inBucketSoon(key, []byte("3"), md5Hex("3")) // it was there before, and is brought there again
	if !once.Load() {
		t.Error("nobody wrote in between")
	}
	bt.nothingHeld()
	// What a load balancer says is not the store's word: the put waits until the store decides its condition.
	refuse := func(status int, code string, times int) (left func() int, unconditional *atomic.Int32) {
		var refused atomic.Int32
		unconditional = new(atomic.Int32)
		bt.proxy.Set(func(r *http.Request) bucket.Fault {
			switch {
			case r.Method != http.MethodPut:
			case r.Header.Get("If-Match")+r.Header.Get("If-None-Match") == "":
				unconditional.Add(1)
			case refused.Add(1) <= int32(times):
				return bucket.Fault{Status: status, Code: code}
			}
			return bucket.Fault{}
		})
		return func() int { return times - int(refused.Load()) }, unconditional
	}
	takes := func(owner int, key, v string) {
		t.Helper()
		bt.mustPut(owner, key, []byte(v))
		bt.inBucketSoon(key, []byte(v), md5Hex(v))
	}
	eventually(t, "no put without condition", func() error { // one may go through
		left, unconditional := refuse(400, "400 Bad Request", 4)
		takes(0, key, "balanced")
		if left() > 0 || unconditional.Load() > 0 {
			return fmt.Errorf("%d more on condition were to be refused, %d had none", left(), unconditional.Load())
		}
		return nil
	})
	bt.nothingHeld()
	// Where the store itself refuses some it is given those without, and the others on condition still.
	for n := range 4 {
		eventually(t, "two puts without condition", func() error {
			left, unconditional := refuse(400, "InvalidArgument", 2)
			for i := range 3 {
				takes(0, key, fmt.Sprint("doubtful-", n, i))
			}
			if left() >= 0 || unconditional.Load() != 2 {
				return fmt.Errorf("%d more on condition were to be refused, %d had none", left(), unconditional.Load())
			}
			return nil
		})
	}
	bt.nothingHeld()
	// A bucket that knows no conditions is not asked for any after a while.
	const never = 1 << 20
	left, unconditional := refuse(501, "NotImplemented", never)
	for _, k := range []string{key, bt.keyOwnedBy(0, "none"), bt.keyOwnedBy(1, "none")} {
		for _, v := range []string{"4", "5"} {
			takes(1, k, v)
		}
	}
	for i := range 6 {
		takes(0, key, fmt.Sprint("over-", i))
	}
	bt.nothingHeld()
	tried := never - left()
	takes(0, key, "at last")
	if tried == 0 || never-left() != tried {
		t.Errorf("of %d puts without condition the last was tried with one: %d, then %d", unconditional.Load(), tried, never-left())
	}
	bt.nothingHeld()
}
