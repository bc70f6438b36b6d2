package objects_test

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/test/bucket"
)

// flip inverts a bit of every file of that many bytes that worker i's store holds.
func (tr *tier) flip(i int, size, off int64) {
	tr.t.Helper()
	flipped := 0
	entries, err := os.ReadDir(tr.path(tr.workers[i].m.ID))
	if err != nil {
		tr.t.Fatal(err)
	}
	for _, e := range entries {
		if fi, err := e.Info(); err != nil || fi.Size() != size || e.IsDir() {
			continue
		}
		tr.flipFile(filepath.Join(tr.path(tr.workers[i].m.ID), e.Name()), off)
		flipped++
	}
	if flipped == 0 {
		tr.t.Fatalf("worker %d holds no file of %d bytes", i, size)
	}
}

func (tr *tier) flipFile(path string, off int64) {
	tr.t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		tr.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err = f.ReadAt(b, off); err == nil {
		b[0] ^= 0x10
		_, err = f.WriteAt(b, off)
	}
	if err != nil {
		tr.t.Fatal(err)
	}
}

// names is a reader that follows the names, as a mount does.
func (tr *tier) names() *client.Names {
	tr.t.Helper()
	keys, err := wire.LoadKeys(tr.path("keys"))
	if err != nil {
		tr.t.Fatal(err)
	}
	n, err := client.DialNames(tr.t.Context(), client.Config{Dataset: dataset, MembershipFile: tr.path("members.json"), Keys: keys})
	if err != nil {
		tr.t.Fatal(err)
	}
	tr.t.Cleanup(func() { n.Close() })
	return n
}

// Bits that flip in a worker's memory reach no reader, and no other worker: what is held is compared with its sums
// before it is sent, and fetched again.
func TestBitsFlippedInTheStoreReachNoReader(t *testing.T) {
	tr := newTier(t, "")
	tr.scrub = -1 // or it may find them first
	tr.start(3)
	names := tr.names()
	const off = ring.BlockSize + checksum.Size + 7
	p := content(ring.BlockSize+3*checksum.Size+100, 1)
	key := tr.keyOwnedBy(0, "flipped")
	etag := tr.mustPut(1, key, p).ETag
	tr.readsAll(key, p)
	get := func(i int, from, to int64) ([]byte, error) {
		o := minio.GetObjectOptions{}
		if err := o.SetRange(from, to-1); err != nil {
			return nil, err
		}
		client := tr.client(i)
		r, _, _, err := client.GetObject(t.Context(), "data", key, o)
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	}
	for how, reads := range map[string]struct {
		at   int
		read func(from, to int64) ([]byte, error)
	}{
		"S3 of the owner": {0, func(from, to int64) ([]byte, error) { return get(0, from, to) }},
		"S3 of another":   {1, func(from, to int64) ([]byte, error) { return get(1, from, to) }},
		"names, the owner": {0, func(from, to int64) ([]byte, error) {
			got := make([]byte, to-from)
			_, err := names.ReadAt(t.Context(), key, etag, got, from)
			return got, err
		}},
	} {
		for _, r := range [][2]int64{{0, int64(len(p))}, {off, off + 1}, {off - 100, off + 100}, {ring.BlockSize + 5, off + checksum.Size}} {
			before := tr.metric(reads.at, "stepcache_store_corrupt_total")
			tr.flip(reads.at, int64(len(p)), off)
			if got, err := reads.read(r[0], r[1]); err != nil || !bytes.Equal(got, p[r[0]:r[1]]) {
				t.Errorf("%s: bytes %d to %d: %d bytes that may be others, %v", how, r[0], r[1], len(got), err)
			}
			if n := tr.metric(reads.at, "stepcache_store_corrupt_total") - before; n != 1 {
				t.Errorf("%s: bytes %d to %d: %d blocks were found", how, r[0], r[1], n)
			}
			tr.readsAll(key, p) // it is mended
		}
	}
	// Its owner finds it as well when another worker wants it.
	key = tr.keyOwnedBy(0, "other")
	p = content(200_001, 2)
	tr.mustPut(0, key, p)
	tr.flip(0, int64(len(p)), 70_000)
	before := tr.metric(0, "stepcache_store_corrupt_total")
	tr.reads(1, key, string(p))
	if n := tr.metric(0, "stepcache_store_corrupt_total") - before; n != 1 {
		t.Errorf("the owner found %d blocks", n)
	}
	tr.reads(0, key, string(p))
}

// A bit that flips in a part before its upload is completed is in no object that is made of it.
func TestBitsFlippedInAPartAreInNoObject(t *testing.T) {
	tr := newTier(t, "")
	tr.scrub = -1
	tr.start(2)
	for n, owner := range []int{0, 1} {
		parts := [][]byte{content(5<<20+1, 2*n), content(5<<20+2, 2*n+1)}
		u := tr.upload(tr.keyOwnedBy(owner, "flipped-part"))
		for i, p := range parts {
			u.part(i, i+1, p)
		}
		before := tr.metric(0, "stepcache_store_corrupt_total")
		tr.flip(0, int64(len(parts[0])), ring.BlockSize+70_000)
		if err := u.complete(0); err != nil {
			t.Fatal(err)
		}
		tr.readsAll(u.key, bytes.Join(parts, nil))
		if n := tr.metric(0, "stepcache_store_corrupt_total") - before; n != 1 {
			t.Errorf("%d blocks were found, of a part of an object of worker %d", n, owner)
		}
	}
}

// Of what the bucket does not have yet, bits that flip in the store are mended from the journal. Where no sound copy is
// left, readers are told an error, and the bucket is told nothing.
func TestBackBitsFlippedEverywhereReachNobody(t *testing.T) {
	bt := newBackTier(t)
	bt.scrub = -1
	bt.write.FlushWithin = worker.Duration(time.Second) // it never succeeds
	bt.start(2)
	bt.writesBack()
	bt.nothingHeld()
	bt.refuse(bucket.Fault{Status: 403, Code: "AccessDenied"})
	key := bt.keyOwnedBy(0, "lost")
	p := content(200_003, 1)
	bt.mustPut(0, key, p)
	bt.readsAll(key, p)
	for i := range 2 {
		bt.flip(i, int64(len(p)), 70_000)
	}
	bt.readsAll(key, p)
	for i := range 2 {
		bt.flip(i, int64(len(p)), 70_000)
		for _, path := range bt.inJournal(i) {
			bt.flipFile(path, 70_000)
		}
	}
	if got, _, err := bt.get(0, key); err == nil {
		t.Errorf("%d bytes are read, the right ones: %v", len(got), bytes.Equal(got, p))
	}
	var asked atomic.Int64
	bt.proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodHead && strings.HasSuffix(r.URL.Path, key) {
			asked.Add(1)
		}
		return bucket.Fault{}
	})
	eventually(t, "it is tried again to bring it to the bucket", func() error {
		if asked.Load() < 2 {
			return fmt.Errorf("%d times", asked.Load())
		}
		return nil
	})
	if got, _, err := bt.inBucket(key); code(err) != "NoSuchKey" {
		t.Errorf("the bucket has %d bytes, %v", len(got), err)
	}
}

// An object that was read by its name is compared with the digest that the bucket publishes once it is whole, wherever
// it is: one that came with other bytes is dropped, and what has no digest is counted.
func TestWhatIsReadByNameIsComparedWithTheBucketsDigest(t *testing.T) {
	proxy := bucket.Faults(t, theServer(t))
	tr := newTier(t, proxy.Endpoint())
	tr.start(2)
	checked := func(i int, verified, unverified, corrupt int64) {
		t.Helper()
		eventually(t, fmt.Sprintf("worker %d has checked it", i), func() error {
			if s := tr.workers[i].inside.Status(); s.Verified != verified || s.Unverified != unverified || s.Corrupt != corrupt {
				return fmt.Errorf("verified %d, unverified %d, corrupt %d", s.Verified, s.Unverified, s.Corrupt)
			}
			return nil
		})
	}
	direct := func(key string, p []byte) {
		t.Helper()
		o := minio.PutObjectOptions{PartSize: 5 << 20}
		if _, err := tr.direct.PutObject(t.Context(), tr.bucket, tr.prefix+key, bytes.NewReader(p), int64(len(p)), o); err != nil {
			t.Fatal(err)
		}
	}
	spoiled := tr.keyOwnedBy(0, "spoiled")
	p := content(ring.BlockSize+1000, 1)
	direct(spoiled, p)
	var flips atomic.Int32
	proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, spoiled) && flips.Add(1) == 1 {
			return bucket.Fault{Flip: 1000}
		}
		return bucket.Fault{}
	})
	if got, _, err := tr.get(1, spoiled); err != nil || len(got) != len(p) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	checked(0, 0, 0, 1)
	checked(1, 0, 0, 1)
	tr.readsAll(spoiled, p)
	checked(0, 1, 0, 1)
	checked(1, 1, 0, 1)

	// What is put through the tier came from nowhere; another worker compares what it gets of it.
	key := tr.keyOwnedBy(0, "put")
	tr.mustPut(0, key, p)
	tr.readsAll(key, p)
	checked(1, 2, 0, 1)
	checked(0, 1, 0, 1)

	// Without these an object that was put in parts has no digest.
	proxy.Set(func(*http.Request) bucket.Fault {
		return bucket.Fault{Header: func(h http.Header) {
			maps.DeleteFunc(h, func(name string, _ []string) bool { return strings.HasPrefix(name, "X-Amz-Checksum-") })
		}}
	})
	key = tr.keyOwnedBy(0, "in parts")
	p = content(6<<20, 2)
	direct(key, p)
	tr.reads(0, key, string(p))
	checked(0, 1, 1, 1)
}

// What another worker acknowledged, and the bucket does not have yet, is compared with the MD5 that is its ETag.
func TestBackWhatAnotherWorkerHoldsIsComparedWithItsETag(t *testing.T) {
	bt := newBackTier(t)
	bt.start(2)
	bt.writesBack()
	bt.nothingHeld()
	bt.refuse(bucket.Fault{Status: 403, Code: "AccessDenied"})
	defer bt.accept()
	before := bt.workers[1].inside.Status()
	key := bt.keyOwnedBy(0, "pending")
	bt.mustPut(0, key, content(200_000, 1))
	bt.reads(1, key, string(content(200_000, 1)))
	eventually(t, "it is compared", func() error {
		if s := bt.workers[1].inside.Status(); s.Verified != before.Verified+1 || s.Unverified != before.Unverified || s.Corrupt != 0 {
			return fmt.Errorf("verified %d, unverified %d, corrupt %d", s.Verified-before.Verified, s.Unverified-before.Unverified, s.Corrupt)
		}
		return nil
	})
}
