package objects_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/test/bucket"
)

// What is pending moves with its name from one owner to the next, while some workers do not reach others.

// links lets a test cut the connections from some workers to others, not those of clients.
type links struct {
	tr *tier

	mu    sync.Mutex
	cut   map[[2]int]bool
	conns map[[2]int][]net.Conn
}

// linked has the tier's workers in this process connect by links.
func (tr *tier) linked() *links {
	l := &links{tr: tr, cut: map[[2]int]bool{}, conns: map[[2]int][]net.Conn{}}
	tr.deps = func(i int, d *worker.Deps) {
		d.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			for to, w := range tr.workers {
				if w.m.Addr != addr {
					continue
				}
				if l.cut[[2]int{i, to}] {
					c.Close()
					return nil, errors.New("the network is cut")
				}
				l.conns[[2]int{i, to}] = append(l.conns[[2]int{i, to}], c)
			}
			return c, nil
		}
	}
	return l
}

// set cuts, or mends, the connections that from makes to others.
func (l *links) set(cut bool, from int, to ...int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range to {
		k := [2]int{from, t}
		l.cut[k] = cut
		if cut {
			for _, c := range l.conns[k] {
				c.Close()
			}
			delete(l.conns, k)
		}
	}
}

// keyOrdered is a key whose order of owners begins with these workers.
func (tr *tier) keyOrdered(like string, workers ...int) string {
	m := tr.membership()
next:
	for n := 0; ; n++ {
		k := fmt.Sprintf("%s-%d", like, n)
		order := m.NameOwners(dataset, k, 0)
		for i, w := range workers {
			if order[i].ID != tr.workers[w].m.ID {
				continue next
			}
		}
		return k
	}
}

// placed puts what has copies under new keys until they are where the test wants them, which put says: on a slow machine
// a worker may seem not to answer for a moment, and another holds a copy then.
func (bt *backTier) placed(like string, order []int, put func(key string) bool) (key string) {
	bt.t.Helper()
	n := 0
	eventually(bt.t, "the copies are where the test wants them", func() error {
		bt.nothingHeld()
		n++
		key = bt.keyOrdered(fmt.Sprint(like, n), order...)
		if put(key) {
			return nil
		}
		bt.deleted(order[0], key)
		return errors.New("another worker holds one")
	})
	return key
}

// tellAll has all workers follow the next membership.
func (bt *backTier) tellAll() {
	bt.t.Helper()
	list := bt.next()
	for i := range bt.workers {
		bt.tell(i, list)
	}
}

// A name's owner leaves the list while what it acknowledged is pending; the next one brings that to the bucket, and the
// name is deleted. A worker that does not reach that one, and so is not settled, asks all that ever held something: what
// was deleted is not back, whether or not the former owner could be told to drop its copy.
func TestBackAListingThroughAWorkerThatIsNotSettled(t *testing.T) {
	for _, c := range []struct {
		name string
		told bool
	}{{"the former owner is told", true}, {"the former owner cannot be told", false}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bt := newBackTier(t)
			l := bt.linked()
			bt.start(4)
			bt.writesBack()
			const former, owner, lister = 0, 1, 2
			key := bt.placed("moves", []int{former, owner, 3}, func(key string) bool {
				bt.throttle()
				bt.mustPut(former, key, []byte("old"))
				if len(bt.inJournal(former)) == 0 || len(bt.inJournal(owner)) == 0 {
					bt.accept()
					return false
				}
				return true
			})
			l.set(true, lister, owner)
			bt.workers[former].state = "gone"
			bt.tellAll()
			eventually(t, "the next owner has taken over", func() error {
				got, _, err := bt.get(owner, key)
				if err == nil && string(got) != "old" {
					t.Fatalf("%q", got)
				}
				return err
			})
			if !c.told {
				l.set(true, owner, former)
			}
			bt.accept()
			eventually(t, "it is deleted", func() error {
				return bt.client(owner).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{})
			})
			if c.told {
				bt.nothingHeldBy(former)
			} else if len(bt.inJournal(former)) == 0 {
				t.Error("the former owner does not hold its copy: the test shows nothing")
			}
			for range 5 {
				var keys []string
				eventually(t, "it is listed", func() error {
					r, err := bt.client(lister).ListObjectsV2("data", "moves", "", "", "", 1000)
					for _, o := range r.Contents {
						keys = append(keys, o.Key)
					}
					return err
				})
				if len(keys) > 0 {
					t.Fatalf("what was deleted is listed: %q", keys)
				}
				eventually(t, "it is read", func() error {
					got, _, err := bt.get(lister, key)
					if err == nil {
						t.Fatalf("what was deleted is read: %q", got)
					}
					if code(err) == "NoSuchKey" {
						return nil
					}
					return err
				})
			}
		})
	}
}

// refuseLooks has the bucket take nothing until accept, and tell nothing either: an owner asks what it has before it
// brings something.
func (bt *backTier) refuseLooks() (accept func()) {
	var refuses atomic.Bool
	refuses.Store(true)
	bt.proxy.Set(func(r *http.Request) bucket.Fault {
		if refuses.Load() && (r.Method == http.MethodPut || r.Method == http.MethodHead) {
			return bucket.Fault{Status: 503, Code: "SlowDown"}
		}
		return bucket.Fault{}
	})
	return func() { refuses.Store(false) }
}

// Both workers that hold what is pending leave the list at once. The next owner knows of it and has not fetched it: all
// workers list it and read it, those that are settled too.
func TestBackWhatOnlyWorkersThatLeftHoldIsListedAndRead(t *testing.T) {
	bt := newBackTier(t)
	bt.linked()
	bt.start(4)
	bt.writesBack()
	bt.nothingHeld()
	key := bt.keyOrdered("left", 0, 1, 2)
	accept := bt.refuseLooks()
	bt.mustPut(0, key, []byte("held"))
	bt.workers[0].state, bt.workers[1].state = "gone", "gone"
	bt.tellAll()
	for _, i := range []int{2, 3} {
		for range 3 {
			eventually(t, "it is listed", func() error {
				r, err := bt.client(i).ListObjectsV2("data", "left", "", "", "", 1000)
				if err == nil && (len(r.Contents) != 1 || r.Contents[0].Key != key || r.Contents[0].ETag != `"`+md5Hex("held")+`"` && r.Contents[0].ETag != md5Hex("held")) {
					t.Fatalf("worker %d lists %+v", i, r.Contents)
				}
				return err
			})
			eventually(t, "it is read", func() error {
				got, _, err := bt.get(i, key)
				if err == nil && string(got) != "held" {
					t.Fatalf("worker %d reads %q", i, got)
				}
				return err
			})
		}
	}
	if len(bt.inJournal(2)) > 0 {
		t.Error("the owner holds it already: the test shows nothing of those that left")
	}
	accept()
	bt.inBucketSoon(key, []byte("held"), md5Hex("held"))
	bt.nothingHeld()
}

// Both workers that hold what is pending leave, and the next owner leaves too before it has heard them. Another, which
// had heard them then of its own names, owns the name after that: it asks them again.
func TestBackWhatOnlyWorkersThatLeftHoldMovesTwice(t *testing.T) {
	bt := newBackTier(t)
	l := bt.linked()
	bt.start(5)
	bt.writesBack()
	bt.nothingHeld()
	const next, last = 2, 3
	key := bt.keyOrdered("twice", 0, 1, next, last)
	accept := bt.refuseLooks()
	bt.mustPut(0, key, []byte("held"))
	l.set(true, next, 0, 1)
	bt.workers[0].state, bt.workers[1].state = "gone", "gone"
	bt.tellAll()
	// It has heard them once it serves a name that moved to it.
	bt.mustPut(last, bt.keyOrdered("other", last, 4), []byte("other"))
	bt.workers[next].state = "gone"
	bt.tellAll()
	for _, i := range []int{last, 4} {
		eventually(t, "it is read", func() error {
			got, _, err := bt.get(i, key)
			if err == nil && string(got) != "held" || code(err) == "NoSuchKey" {
				t.Fatalf("worker %d reads %q, %v", i, got, err)
			}
			return err
		})
	}
	accept()
	bt.inBucketSoon(key, []byte("held"), md5Hex("held"))
	bt.nothingHeld()
}

// An owner that learns from one that is to hold a put that there is a newer list acknowledges it under none: who owns the
// name next may have asked that one already what it holds.
func TestBackAnOwnerThatMeetsANewerListAcknowledgesNothing(t *testing.T) {
	bt := newBackTier(t)
	l := bt.linked()
	bt.start(3)
	bt.writesBack()
	bt.nothingHeld()
	const owner, holder, other = 0, 1, 2
	key := bt.keyOrdered("newer", owner, holder, other)
	bt.throttle()
	l.set(true, holder, owner, other) // it tells them nothing by itself
	list := bt.next()
	bt.tell(holder, list)
	if _, err := bt.put(owner, key, []byte("old"), minio.PutObjectOptions{}); code(err) != "SlowDown" {
		t.Errorf("put by an old list: %v", err)
	}
	l.set(false, holder, owner, other)
	bt.tell(owner, list)
	bt.tell(other, list)
	bt.mustPut(owner, key, []byte("new"))
	bt.accept()
	bt.inBucketSoon(key, []byte("new"), md5Hex("new"))
	bt.nothingHeld()
}

// One worker tells the next owner that it holds a version, and another, which held the version after that, tells when the
// bucket has that one and nobody holds anything any more. The older one is not taken for what is pending.
func TestBackMembersThatTellAtDifferentTimes(t *testing.T) {
	bt := newBackTier(t)
	l := bt.linked()
	bt.start(4)
	bt.writesBack()
	bt.nothingHeld()
	const former, next, early, late = 0, 1, 2, 3
	newer := bytes.Repeat([]byte("new"), 1000)
	begun, goOn := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(goOn) })
	t.Cleanup(release)
	var once sync.Once
	// The bucket does not take the newer one: it says so while the copies are put, and keeps it waiting after that.
	newest := func(take func() bucket.Fault) {
		bt.proxy.Set(func(r *http.Request) bucket.Fault {
			switch {
			case r.Method != http.MethodPut:
			case r.ContentLength < int64(len(newer)):
				return bucket.Fault{Status: 403, Code: "AccessDenied"} // which is not tried again for long
			default:
				return take()
			}
			return bucket.Fault{}
		})
	}
	key := bt.placed("versions", []int{former, next, early, late}, func(key string) bool {
		newest(func() bucket.Fault { return bucket.Fault{Status: 503, Code: "SlowDown"} })
		l.set(true, former, next)
		bt.mustPut(former, key, []byte("old"))
		l.set(true, former, early)
		bt.mustPut(former, key, newer)
		l.set(false, former, next, early)
		if len(bt.inJournal(next)) > 0 || len(bt.inJournal(early)) != 1 || len(bt.inJournal(late)) != 1 {
			bt.proxy.Set(nil)
			return false
		}
		return true
	})
	newest(func() bucket.Fault {
		once.Do(func() { close(begun) })
		<-goOn
		return bucket.Fault{}
	})
	eventually(t, "the former owner reaches it again", func() error {
		bt.mustPut(former, bt.keyOrdered("probe", former, early), []byte("probe"))
		if len(bt.inJournal(early)) < 2 {
			return errors.New("another holds it")
		}
		return nil
	})
	<-begun
	bt.workers[former].state = "gone"
	list := bt.next()
	bt.tell(early, list)
	bt.tell(next, list)
	time.Sleep(time.Second) // it asks at once: the test shows nothing where that takes longer
	release()
	bt.inBucketSoon(key, newer, md5Hex(string(newer)))
	eventually(t, "its copies are dropped", func() error {
		if len(bt.inJournal(early)) > 1 || len(bt.inJournal(late)) > 0 {
			return errors.New("not yet")
		}
		return nil
	})
	bt.tell(late, list)
	bt.tell(former, list)
	for _, i := range []int{next, early, late} {
		eventually(t, "it is read", func() error {
			got, _, err := bt.get(i, key)
			if err == nil && !bytes.Equal(got, newer) {
				t.Fatalf("worker %d reads %q", i, got)
			}
			return err
		})
	}
	bt.proxy.Set(nil)
	bt.nothingHeld()
	if got, _, err := bt.inBucket(key); err != nil || !bytes.Equal(got, newer) {
		t.Errorf("the bucket has %q, %v", got, err)
	}
}

// ownProxy gives worker i a way of its own to the bucket.
func (bt *backTier) ownProxy(i int) *bucket.FaultProxy {
	proxy := bucket.Faults(bt.t, theServer(bt.t))
	deps := bt.deps
	bt.deps = func(j int, d *worker.Deps) {
		deps(j, d)
		if j == i {
			d.OpenSource = func(ctx context.Context, c source.Config) (*scheme.Source, error) {
				c.Endpoint = proxy.Endpoint()
				return scheme.Open(ctx, c, scheme.Elapsed(wire.SourceTimeout))
			}
		}
	}
	return proxy
}

// An owner that is cut off from the others and from the list, but not from the bucket or from clients, brings nothing
// to the bucket and answers nothing once another may own its names; what that one acknowledged stays.
func TestBackAnOwnerThatIsCutOffBringsNothingToTheBucket(t *testing.T) {
	t.Parallel() // it waits most of the time
	bt := newBackTier(t)
	l := bt.linked()
	const cut, owner, other = 0, 1, 2
	proxy := bt.ownProxy(cut)
	var refuses atomic.Bool
	var puts, tries atomic.Int64
	proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method != http.MethodPut {
			return bucket.Fault{}
		}
		tries.Add(1)
		if refuses.Load() {
			return bucket.Fault{Status: 503, Code: "SlowDown"}
		}
		puts.Add(1)
		return bucket.Fault{}
	})
	bt.start(3)
	bt.writesBack()
	bt.nothingHeld()
	key := bt.keyOrdered("cut", cut, owner, other)
	refuses.Store(true)
	bt.mustPut(cut, key, []byte("old"))
	eventually(t, "its owner tries to bring it to the bucket", func() error {
		if tries.Load() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	l.set(true, cut, owner, other)
	l.set(true, owner, cut)
	l.set(true, other, cut)
	bt.workers[cut].state = "gone"
	list := bt.next()
	bt.tell(owner, list)
	bt.tell(other, list)
	// By the time that the others go on without it, it has stopped by itself.
	deadline := time.Now().Add(2 * patience)
	for {
		if _, err := bt.put(owner, key, []byte("new"), minio.PutObjectOptions{}); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the next owner does not take over: %v", err)
		}
	}
	puts.Store(0)
	refuses.Store(false)
	bt.inBucketSoon(key, []byte("new"), md5Hex("new"))
	if got, _, err := bt.get(cut, key); code(err) != "SlowDown" {
		t.Errorf("the worker that is cut off reads %q, %v", got, err)
	}
	if _, err := bt.put(cut, key, []byte("late"), minio.PutObjectOptions{}); code(err) != "SlowDown" {
		t.Errorf("the worker that is cut off was given a write: %v", err)
	}
	if err := bt.client(cut).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{}); code(err) != "SlowDown" {
		t.Errorf("the worker that is cut off deletes: %v", err)
	}
	if u := bt.workers[cut].inside.Status().Unflushed; u.Objects == 0 || u.Problem == "" {
		t.Errorf("its status: %+v", u)
	}
	if n := puts.Load(); n > 0 {
		t.Errorf("it has put %d objects into the bucket", n)
	}
	// It is told in the end.
	l.set(false, cut, owner, other)
	l.set(false, owner, cut)
	l.set(false, other, cut)
	bt.tell(cut, list)
	bt.nothingHeld()
	if got, _, err := bt.inBucket(key); err != nil || !bytes.Equal(got, []byte("new")) {
		t.Errorf("the bucket has %q, %v", got, err)
	}
	if n := puts.Load(); n > 0 {
		t.Errorf("it has put %d objects into the bucket", n)
	}
	for i := range 3 {
		eventually(t, "it is read", func() error {
			got, _, err := bt.get(i, key)
			if err == nil && string(got) != "new" {
				t.Fatalf("worker %d reads %q", i, got)
			}
			return err
		})
	}
}
