package objects_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/test/bucket"
)

// upload is an upload in parts under way.
type upload struct {
	tr      *tier
	key, id string
	parts   []minio.CompletePart
}

func (tr *tier) upload(key string) *upload {
	tr.t.Helper()
	id, err := tr.client(0).NewMultipartUpload(tr.t.Context(), "data", key, minio.PutObjectOptions{})
	if err != nil {
		tr.t.Fatal(err)
	}
	return &upload{tr: tr, key: key, id: id}
}

// part puts a part through worker i.
func (u *upload) part(i, number int, p []byte) {
	u.tr.t.Helper()
	part, err := u.tr.client(i).PutObjectPart(u.tr.t.Context(), "data", u.key, u.id, number, bytes.NewReader(p), int64(len(p)), minio.PutObjectPartOptions{})
	if err != nil {
		u.tr.t.Fatalf("part %d of %q through worker %d: %v", number, u.key, i, err)
	}
	u.parts = slices.DeleteFunc(u.parts, func(o minio.CompletePart) bool { return o.PartNumber == number })
	u.parts = append(u.parts, minio.CompletePart{PartNumber: number, ETag: part.ETag})
}

func (u *upload) complete(i int) error {
	slices.SortFunc(u.parts, func(a, b minio.CompletePart) int { return a.PartNumber - b.PartNumber })
	_, err := u.tr.client(i).CompleteMultipartUpload(u.tr.t.Context(), "data", u.key, u.id, u.parts, minio.PutObjectOptions{})
	return err
}

// A client that is slow to send a large part holds up nobody else's: it is passed on as it comes, and takes the memory of
// what is held of it only.
func TestALargePartThatComesSlowlyHoldsUpNoOther(t *testing.T) {
	tr := newTier(t, "").start(1)
	u := tr.upload("large")
	slow, feed := io.Pipe()
	began, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := tr.client(0).PutObjectPart(t.Context(), "data", u.key, u.id, 1, slow, 64<<20, minio.PutObjectPartOptions{DisableContentSha256: true})
		ended <- err
	}()
	go func() {
		_, _ = feed.Write(make([]byte, 8<<20)) // more than lies in buffers on the way
		close(began)
	}()
	<-began
	defer time.AfterFunc(patience, func() { feed.CloseWithError(errors.New("nothing else went on")) }).Stop()
	u.part(0, 2, content(32<<20, 2))
	select {
	case err := <-ended:
		t.Errorf("the slow part ended meanwhile: %v", err)
	default:
	}
	feed.CloseWithError(errors.New("given up"))
	if err := <-ended; err == nil {
		t.Error("a part that was given up was put")
	}
}

// readsAll reads an object a few times through every worker.
func (tr *tier) readsAll(key string, want []byte) {
	tr.t.Helper()
	for range 2 {
		for i := range tr.workers {
			if got, _, err := tr.get(i, key); err != nil || !bytes.Equal(got, want) {
				tr.t.Fatalf("%s through worker %d: %d bytes, %v", key, i, len(got), err)
			}
		}
	}
}

// partsDropped waits until the workers hold as many objects as before.
func (tr *tier) partsDropped(before []int64, more int64) {
	tr.t.Helper()
	for i := range tr.workers {
		eventually(tr.t, "the parts are dropped", func() error {
			if n := tr.metric(i, "stepcache_store_objects"); n > before[i]+more {
				return fmt.Errorf("worker %d holds %d objects, %d before", i, n, before[i])
			}
			return nil
		})
	}
}

func (tr *tier) held() (out []int64) {
	for i := range tr.workers {
		out = append(out, tr.metric(i, "stepcache_store_objects"))
	}
	return out
}

// An object that was put in parts is not fetched back, whichever workers they came through, in whatever order and sizes,
// some of them more than once; also where the tier is full of other data.
func TestAnUploadInPartsIsNotFetchedBack(t *testing.T) {
	for name, full := range map[string]bool{"there is room": false, "the tier is full": true} {
		t.Run(name, func(t *testing.T) {
			tr := newTier(t, "")
			tr.memory = 80 << 20
			tr.start(2)
			if full {
				tr.full()
			}
			held := tr.held()
			for n, sizes := range [][]int{{5 << 20, 5 << 20, 1234}, {8 << 20, 4}, {5<<20 + 3, 7<<20 - 1, 5 << 20}, {10}, {17 << 20}} {
				var whole []byte
				var parts [][]byte
				for k, size := range sizes {
					parts = append(parts, content(size, 10*n+k))
					whole = append(whole, parts[k]...)
				}
				u := tr.upload(fmt.Sprintf("parts-%d", n))
				before := tr.fromBucket()
				u.part(1, 1, content(6<<20, 77)) // to be replaced
				for k, p := range slices.Backward(parts) {
					u.part((n+k)%2, k+1, p)
				}
				if err := u.complete(n % 2); err != nil {
					t.Fatal(err)
				}
				tr.readsAll(u.key, whole)
				if n := tr.fromBucket() - before; n != 0 {
					t.Errorf("%s: the bucket sent %d bytes of %d", u.key, n, len(whole))
				}
				if full {
					continue
				}
				// Each worker has the object at most, and nothing of its parts, also not of the one that was replaced through
				// another worker.
				tr.partsDropped(held, int64(n+1))
			}
			tr.nothingStaged()
		})
	}
}

// What a worker that is gone, or hangs, held of an upload comes from the bucket, and so does what lies behind it.
func TestPartsThatAreNotHeldAnyMoreComeFromTheBucket(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint())
	for range 3 {
		tr.add()
	}
	tr.publish()
	tr.run(0)
	tr.run(1)
	tr.spawn(2)
	tr.ready()
	for n, how := range []string{"hangs", "dies"} {
		try := 0
		// Once more where another worker seemed not to answer for a moment: what it holds comes from the bucket too then.
		eventually(t, how, func() error {
			try++
			var whole []byte
			u := tr.upload(tr.keyOwnedBy(n, fmt.Sprint(how, try)))
			for k, i := range []int{0, 1, 2, 1} {
				p := content(5<<20+k, 10*n+k)
				whole = append(whole, p...)
				u.part(i, k+1, p)
			}
			var again func()
			if how == "hangs" {
				again = tr.hangs(2)
			} else {
				tr.workers[2].outside.Kill()
				<-tr.workers[2].outside.Done()
				again = func() { tr.spawn(2) }
			}
			var gets atomic.Int64
			f.Set(func(r *http.Request) bucket.Fault {
				if r.Method == http.MethodGet && r.Header.Get("Range") != "" {
					gets.Add(1)
				}
				return bucket.Fault{}
			})
			if err := u.complete(0); err != nil {
				t.Fatalf("%s: %v", how, err)
			}
			for range 2 {
				for i := range 2 {
					if got, _, err := tr.get(i, u.key); err != nil || !bytes.Equal(got, whole) {
						t.Fatalf("%s: through worker %d: %d bytes, %v", how, i, len(got), err)
					}
				}
			}
			asked := gets.Load()
			again()
			tr.ready()
			// Five blocks and a bit, of which two are held whole.
			if asked == 0 || asked > 4 {
				return fmt.Errorf("the bucket was asked for %d blocks", asked)
			}
			return nil
		})
	}
}

// Of an upload that is larger than what is kept of an object nothing is held, nor of one that was aborted.
func TestPartsOfWhatIsTooLargeOrAbortedAreNotHeld(t *testing.T) {
	tr := newTier(t, "")
	tr.memory = 40 << 20
	tr.start(1)
	held := tr.held()
	u := tr.upload("large")
	var whole []byte
	for k := range 3 {
		p := content(5<<20, k)
		whole = append(whole, p...)
		u.part(0, k+1, p)
	}
	tr.partsDropped(held, 0)
	if err := u.complete(0); err != nil {
		t.Fatal(err)
	}
	tr.readsAll(u.key, whole)

	held = tr.held()
	u = tr.upload("aborted")
	u.part(0, 1, content(5<<20, 1))
	if n := tr.held()[0]; n != held[0]+1 {
		t.Errorf("%d objects are held with a part, %d before", n, held[0])
	}
	if err := tr.client(0).AbortMultipartUpload(t.Context(), "data", u.key, u.id); err != nil {
		t.Fatal(err)
	}
	tr.partsDropped(held, 0)
	if err := u.complete(0); code(err) != "NoSuchUpload" {
		t.Errorf("an upload that was aborted is completed: %v", err)
	}
	tr.nothingStaged()
}
