package objects_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/bucket"
)

// fromBucket is how many bytes of objects the bucket sent to all workers.
func (tr *tier) fromBucket() (sum int64) {
	tr.t.Helper()
	const name = "stepcache_source_read_bytes_total{"
	for _, w := range tr.workers {
		resp, err := http.Get("http://" + w.m.Control + wire.PathMetrics)
		if err != nil {
			tr.t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Contains(b, []byte(name)) {
			tr.t.Fatalf("metrics of worker %s: %d bytes, %v", w.m.ID, len(b), err)
		}
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, name) {
				f, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' ')+1:]), 64)
				if err != nil {
					tr.t.Fatal(err)
				}
				sum += int64(f)
			}
		}
	}
	return sum
}

// full fills a tier with what is in its bucket, and reads that a few times.
func (tr *tier) full() (keys []string) {
	tr.t.Helper()
	p := content(1<<20, 99)
	for k := range int(tr.memory*int64(len(tr.workers))>>20) + 8 {
		key := fmt.Sprintf("others/%d", k)
		keys = append(keys, key)
		if _, err := tr.direct.PutObject(tr.t.Context(), tr.bucket, tr.prefix+key, bytes.NewReader(p), int64(len(p)), minio.PutObjectOptions{}); err != nil {
			tr.t.Fatal(err)
		}
	}
	for range 3 {
		for _, key := range keys {
			for i := range tr.workers {
				if got, _, err := tr.get(i, key); err != nil || !bytes.Equal(got, p) {
					tr.t.Fatalf("%s: %d bytes, %v", key, len(got), err)
				}
			}
		}
	}
	for i := range tr.workers {
		if used := tr.metric(i, "stepcache_store_used_bytes"); used < tr.memory*9/10 {
			tr.t.Fatalf("worker %d holds %d bytes of %d: it is not full", i, used, tr.memory)
		}
	}
	return keys
}

// What is put into a tier that is full of other data is read from the tier, also after others were read, and gives its
// room back when it is deleted.
func TestWhatIsPutIntoAFullTierIsReadFromIt(t *testing.T) {
	tr := newTier(t, "")
	tr.memory = 32 << 20
	tr.start(2)
	others := tr.full()
	bodies := map[string][]byte{}
	for k := range 10 {
		key := fmt.Sprintf("new/%d", k)
		bodies[key] = content([]int{1000, 300 << 10, 1 << 20, 4<<20 + 1}[k%4], k)
		tr.mustPut(k%2, key, bodies[key])
		// Others are read in between, by less than the tier holds: after that, it would be the policy's to judge.
		if _, _, err := tr.get(k%2, others[7*k%len(others)]); err != nil {
			t.Fatal(err)
		}
	}
	before := tr.fromBucket()
	for key, p := range bodies {
		for range 2 {
			for i := range 2 {
				if got, _, err := tr.get(i, key); err != nil || !bytes.Equal(got, p) {
					t.Fatalf("%s through worker %d: %d bytes, %v", key, i, len(got), err)
				}
			}
		}
	}
	if n := tr.fromBucket() - before; n != 0 {
		t.Errorf("the bucket sent %d bytes of what was just put", n)
	}

	// Each deletion frees the room at the owner at once, at the other worker when that hears of it.
	for key, p := range bodies {
		owner := tr.owner(key)
		before := tr.metric(owner, "stepcache_store_used_bytes")
		if err := tr.client(1-owner).RemoveObject(t.Context(), "data", key, minio.RemoveObjectOptions{}); err != nil {
			t.Fatal(err)
		}
		// Who has sent the last byte of it to a reader may not have closed it yet.
		eventually(t, "the owner drops "+key, func() error {
			if now := tr.metric(owner, "stepcache_store_used_bytes"); now > before-int64(len(p)) {
				return fmt.Errorf("%s has %d bytes; its owner holds %d after it was deleted, %d before", key, len(p), now, before)
			}
			return nil
		})
		if _, _, err := tr.get(1-owner, key); code(err) != "NoSuchKey" {
			t.Errorf("%s after its deletion: %v", key, err)
		}
	}
}

// A version that is replaced gives its room back, and whoever is reading it reads it to its end first.
func TestAVersionThatIsReplacedIsReadToItsEndAndThenDropped(t *testing.T) {
	tr := newTier(t, "").start(2)
	key := tr.keyOwnedBy(0, "k")
	first, second := content(30<<20, 1), content(1<<20, 2)
	empty := tr.metric(0, "stepcache_store_used_bytes")
	tr.mustPut(0, key, first)
	held := tr.metric(0, "stepcache_store_used_bytes")
	if held < empty+int64(len(first)) {
		t.Fatalf("%d bytes are held of one that was put, %d before", held, empty)
	}
	body, _, _, err := tr.client(0).GetObject(t.Context(), "data", key, minio.GetObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	got := make([]byte, 1<<20)
	if _, err := io.ReadFull(body, got); err != nil { // more is on its way than sockets hold
		t.Fatal(err)
	}
	tr.mustPut(1, key, second)
	if now, _, err := tr.get(0, key); err != nil || !bytes.Equal(now, second) {
		t.Errorf("after it was replaced: %d bytes, %v", len(now), err)
	}
	rest, err := io.ReadAll(body)
	if got = append(got, rest...); err != nil || !bytes.Equal(got, first) {
		t.Errorf("who was reading the first version got %d bytes, %v", len(got), err)
	}
	eventually(t, "the first version's room is free", func() error {
		if now := tr.metric(0, "stepcache_store_used_bytes"); now > held-int64(len(first))+int64(len(second))+1<<20 {
			return fmt.Errorf("%d bytes are held, %d before", now, held)
		}
		return nil
	})

	// The same bytes again are the same version: they stay.
	before := tr.fromBucket()
	tr.mustPut(1, key, second)
	if now, _, err := tr.get(0, key); err != nil || !bytes.Equal(now, second) {
		t.Errorf("put again: %d bytes, %v", len(now), err)
	}
	if n := tr.fromBucket() - before; n != 0 {
		t.Errorf("the bucket sent %d bytes of what was put twice", n)
	}

	// Replaced by somebody else, it is dropped once the bucket says so.
	held = tr.metric(0, "stepcache_store_used_bytes")
	if _, err := tr.direct.PutObject(t.Context(), tr.bucket, tr.prefix+key, strings.NewReader("x"), 1, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the bucket is asked again", func() error {
		if now, _, err := tr.get(0, key); err != nil || string(now) != "x" {
			return fmt.Errorf("%d bytes, %v", len(now), err)
		}
		return nil
	})
	eventually(t, "the second version's room is free", func() error {
		if now := tr.metric(0, "stepcache_store_used_bytes"); now > held-int64(len(second))/2 {
			return fmt.Errorf("%d bytes are held after it was replaced in the bucket, %d before", now, held)
		}
		return nil
	})
}

// A reader has the version fetched that is replaced, from a bucket that sends no more of it: nobody else waits for that.
func TestAVersionThatIsReplacedWhileItIsFetchedKeepsNobodyWaiting(t *testing.T) {
	proxy := bucket.Faults(t, theServer(t))
	tr := newTier(t, proxy.Endpoint())
	const key = "k"
	if _, err := tr.direct.PutObject(t.Context(), tr.bucket, tr.prefix+key, bytes.NewReader(content(3<<20, 1)), 3<<20, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	var gets, stalled atomic.Int64
	proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/"+key) {
			return bucket.Fault{}
		}
		if gets.Add(1) == 1 {
			return bucket.Fault{Truncate: 1 << 20}
		}
		stalled.Add(1)
		return bucket.Fault{Stall: true}
	})
	tr.start(1)
	if _, err := tr.client(0).StatObject(t.Context(), "data", key, minio.StatObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		p, _, err := tr.get(0, key)
		if err == nil && string(p) != "new" {
			err = fmt.Errorf("%d bytes", len(p))
		}
		read <- err
	}()
	eventually(t, "the fill has begun and stops", func() error {
		if stalled.Load() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	tr.mustPut(0, key, []byte("new"))
	if info, err := tr.client(0).StatObject(t.Context(), "data", key, minio.StatObjectOptions{}); err != nil || info.Size != 3 {
		t.Errorf("%d bytes, %v", info.Size, err)
	}
	// By the fourth request that gets no answer the fill has failed.
	if n := stalled.Load(); n > 3 {
		t.Errorf("the bucket was asked %d times until the fill was waited for no more", n)
	}
	proxy.Set(func(*http.Request) bucket.Fault { return bucket.Fault{} })
	if err := <-read; err != nil {
		t.Errorf("who had asked for the version that was replaced got no other: %v", err)
	}
}
