package objects_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/worker"
)

// crashPuts is how many puts the crash test makes: 1,000 with STEPCACHE_CRASH_PUTS=1000, which takes about a
// minute and a half; 80 otherwise.
func crashPuts(t *testing.T) int {
	s := os.Getenv("STEPCACHE_CRASH_PUTS")
	if s == "" {
		return 80
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("STEPCACHE_CRASH_PUTS=%q is no number", s)
	}
	return n
}

// hung is when a put that gets no answer has failed the test: it waits for a bucket at most some times 20 s.
const hung = 2 * time.Minute

// Workers are killed at random points of puts and start again in their folders. What was acknowledged is in
// the bucket, or is recovered and then in the bucket; nothing is torn; what was not acknowledged is absent or whole; no parts are left.
func TestWorkersAreKilledAtRandomPointsOfPuts(t *testing.T) {
	for _, policy := range []string{worker.WriteThrough, worker.WriteBack} {
		t.Run(policy, func(t *testing.T) {
			killAtRandomPoints(t, policy)
		})
	}
}

func killAtRandomPoints(t *testing.T, policy string) {
	total := crashPuts(t)
	tr := newTier(t, "")
	tr.write = worker.WriteConfig{Policy: policy, Copies: 2}
	for range 3 {
		tr.add()
	}
	tr.publish()
	for i := range 3 {
		tr.spawn(i)
	}
	tr.ready()
	type put struct {
		key  string
		size int
		etag string // acknowledged; empty: it was not
	}
	var mu sync.Mutex
	var puts []put
	var begun, failed atomic.Int64
	var wg sync.WaitGroup
	const clients = 6
	for c := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(c), 3))
			for {
				n := int(begun.Add(1))
				if n > total {
					return
				}
				size := r.IntN(200 << 10)
				switch {
				case n%50 == 7:
					size = 17<<20 + r.IntN(8<<20) // goes in parts
				case n%10 == 3:
					size = r.IntN(6 << 20)
				case n%20 == 4:
					size = 0
				}
				p := put{key: fmt.Sprintf("crash/%d", n), size: size}
				ctx, cancel := context.WithTimeout(t.Context(), hung)
				c := tr.client(r.IntN(3))
				body, told := content(size, n), ""
				if n%3 == 0 { // and then it is on its way to the bucket while it comes
					sum := md5.Sum(body)
					told = base64.StdEncoding.EncodeToString(sum[:])
				}
				info, err := c.PutObject(ctx, "data", p.key, bytes.NewReader(body), int64(size), told, "", minio.PutObjectOptions{})
				if ctx.Err() != nil {
					tr.quit()
					t.Errorf("put %s got no answer within %v: %v", p.key, hung, err)
				}
				cancel()
				if err == nil {
					p.etag = info.ETag
				} else {
					failed.Add(1)
				}
				mu.Lock()
				puts = append(puts, p)
				mu.Unlock()
			}
		})
	}
	r := rand.New(rand.NewPCG(9, 9))
	kills := max(6, total/25)
	for k := 1; k <= kills; k++ {
		for at := int64(k * total / (kills + 1)); begun.Load() < at; {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond) // at another point of the puts under way
		i := r.IntN(3)
		tr.workers[i].outside.Kill()
		<-tr.workers[i].outside.Done()
		tr.spawn(i)
	}
	wg.Wait()
	tr.ready()
	if policy == worker.WriteBack {
		eventually(t, "nobody holds anything for the bucket", func() error {
			f, err := filepath.Glob(tr.path("w*/unflushed/*"))
			if err == nil && len(f) > 0 {
				err = fmt.Errorf("%d files, such as %s", len(f), f[0])
			}
			return err
		})
	}
	acknowledged := 0
	for _, p := range puts {
		var n int
		fmt.Sscanf(p.key, "crash/%d", &n)
		want := content(p.size, n)
		got, at, err := tr.inBucket(p.key)
		there := err == nil
		if err != nil && code(err) != "NoSuchKey" {
			t.Fatal(err)
		}
		if there && !bytes.Equal(got, want) {
			t.Errorf("%s is torn: %d bytes of %d", p.key, len(got), p.size)
		}
		if p.etag == "" {
			continue
		}
		acknowledged++
		if !there || at.ETag != p.etag {
			t.Errorf("%s was acknowledged with ETag %s, the bucket has %s, %v", p.key, p.etag, at.ETag, err)
		}
		if got, _, err := tr.get(n%3, p.key); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s through worker %d: %d bytes, %v", p.key, n%3, len(got), err)
		}
	}
	t.Logf("%d puts, %d acknowledged, %d failed, %d kills", len(puts), acknowledged, failed.Load(), kills)
	if acknowledged < total/4 {
		t.Errorf("only %d of %d puts were acknowledged", acknowledged, total)
	}
	eventually(t, "the parts of puts that were cut off are removed", func() error {
		u, err := tr.withParts()
		if err == nil && len(u) > 0 {
			err = fmt.Errorf("%q", u)
		}
		return err
	})
}

// withParts are the keys of unfinished uploads that have parts. Who dies after the bucket began an upload and before its
// answer came leaves one that has none, of which nobody knows whether it is another client's.
func (tr *tier) withParts() (keys []string, err error) {
	core := minio.Core{Client: tr.direct}
	r, err := core.ListMultipartUploads(tr.t.Context(), tr.bucket, "", "", "", "", 1000)
	if err != nil {
		return nil, err
	}
	for _, u := range r.Uploads {
		parts, err := core.ListObjectParts(tr.t.Context(), tr.bucket, u.Key, u.UploadID, 0, 1)
		switch {
		case code(err) == "NoSuchUpload": // meanwhile
		case err != nil:
			return nil, err
		case len(parts.ObjectParts) > 0:
			keys = append(keys, u.Key)
		}
	}
	return keys, nil
}
