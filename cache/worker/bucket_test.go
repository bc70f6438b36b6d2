package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/bucket"
)

// overBucket points a tier at a bucket behind endpoint, with the server's credentials in a Secret's folder.
func overBucket(t testing.TB, s *bucket.Server, endpoint, prefix string) (tr *tier, secret string) {
	t.Helper()
	tr = newTier(t, nil)
	secret = filepath.Join(tr.dir, "secret")
	if err := os.MkdirAll(secret, 0o700); err != nil {
		t.Fatal(err)
	}
	putSecret(t, secret, s)
	tr.mounts = []Mount{{Path: "/", Config: source.Config{URL: "s3://data/" + prefix, Endpoint: endpoint, Region: s.Region, CredentialsDir: secret}}}
	return tr, secret
}

func putSecret(t testing.TB, dir string, s *bucket.Server) {
	t.Helper()
	for name, v := range map[string]string{"accessKeyID": s.AccessKey, "accessKeySecret": s.SecretKey} {
		if err := replaceFile(filepath.Join(dir, name), []byte(v)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEightReadersOfAColdObjectFetchItFromTheBucketOnce counts at the bucket's own limiter.
func TestEightReadersOfAColdObjectFetchItFromTheBucketOnce(t *testing.T) {
	const size = 24<<20 + 12345
	s := bucket.StartT(t, bucket.Options{})
	want := content(size, 1)
	s.PutT(t, "data", "big", want)
	tr, _ := overBucket(t, s, s.Endpoint(), "")
	tr.start(2)
	snap := tr.snapshot()
	i, owner := index(t, snap, "/big"), tr.owners(snap, "/big", 0)[0]
	before := s.Sent()
	var wg sync.WaitGroup
	for range 8 {
		c := tr.dial(owner)
		wg.Go(func() {
			got, err := c.file(i, size, 0)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	wg.Wait()
	if sent := s.Sent() - before; sent > size*102/100 || sent < size {
		t.Errorf("the bucket sent %d bytes of an object of %d", sent, size)
	}
	// It was put in one part, so that its ETag is the MD5 of the whole.
	eventually(t, "the object is verified", func() error {
		if st := tr.workers[owner].Status(); st.Verified != 1 || st.Unverified != 0 || st.Corrupt != 0 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
}

func TestBitsFlippedByTheBucketAreFoundOnceTheObjectIsWhole(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	want := content(2*ring.BlockSize, 1)
	s.PutT(t, "data", "f", want)
	proxy := bucket.Faults(t, s)
	var flips atomic.Int32
	proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/f") && flips.Add(1) == 1 {
			return bucket.Fault{Flip: 1000}
		}
		return bucket.Fault{}
	})
	tr, _ := overBucket(t, s, proxy.Endpoint(), "")
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	c := tr.dial(0)
	if _, err := c.file(i, int64(len(want)), 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it was found, fetched again and verified", func() error {
		if st := tr.workers[0].Status(); st.Corrupt != 1 || st.Verified != 1 {
			return fmt.Errorf("corrupt %d, verified %d, unverified %d", st.Corrupt, st.Verified, st.Unverified)
		}
		return nil
	})
	if got, err := c.file(i, int64(len(want)), wire.FlagResidentOnly); err != nil || !bytes.Equal(got, want) {
		t.Errorf("afterwards: %v", err)
	}
}

// TestAnObjectWithoutADigestIsCountedAsUnverified: local files publish none.
func TestAnObjectWithoutADigestIsCountedAsUnverified(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(1)
	if _, err := tr.dial(0).read(index(t, tr.snapshot(), "/f"), 0, 1000, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "unverified", func() error {
		if st := tr.workers[0].Status(); st.Unverified != 1 || st.Verified != 0 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
}

// TestAnObjectThatNoWorkerHasWholeIsCountedAsUnverified: once, however many blocks are read, and by one of its owners.
func TestAnObjectThatNoWorkerHasWholeIsCountedAsUnverified(t *testing.T) {
	const size = ring.StripeThreshold + 1
	tr := newTier(t, map[string][]byte{"f": nil})
	if err := os.Truncate(filepath.Join(tr.root, "f"), size); err != nil {
		t.Fatal(err)
	}
	tr.start(2)
	snap := tr.snapshot()
	i := index(t, snap, "/f")
	var read [2]int
	for block := range ring.Blocks(size) {
		owner := tr.owners(snap, "/f", block)[0]
		if read[owner]++; read[owner] > 3 {
			continue
		}
		if _, err := tr.dial(owner).read(i, blockOff(block), int(blockLen(size, block)), 0); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := tr.workers[0].Status(), tr.workers[1].Status(); a.Unverified+b.Unverified != 1 {
		t.Errorf("it is counted %d and %d times", a.Unverified, b.Unverified)
	}
}

// TestAMissingSecretIsNamedAndRecovers: the worker starts without credentials, says which key of which
// folder is missing, and serves once it is there.
func TestAMissingSecretIsNamedAndRecovers(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	s.PutT(t, "data", "p/f", content(1000, 1))
	tr, secret := overBucket(t, s, s.Endpoint(), "p/")
	if err := os.Remove(filepath.Join(secret, "accessKeyID")); err != nil {
		t.Fatal(err)
	}
	tr.start(1)
	eventually(t, "the missing key is named", func() error {
		code, text := tr.get(0, wire.PathReady)
		if code != http.StatusServiceUnavailable || !strings.Contains(text, "accessKeyID") || !strings.Contains(text, secret) {
			return fmt.Errorf("%d %s", code, text)
		}
		return nil
	})
	if p := tr.workers[0].Status().Problem; !strings.Contains(p, "accessKeyID") {
		t.Errorf("status says %q", p)
	}
	putSecret(t, secret, s)
	i := index(t, tr.snapshot(), "/f")
	if _, err := tr.dial(0).read(i, 0, 1000, 0); err != nil {
		t.Error(err)
	}
}

// TestARefusalOfReadsIsToldAndRecovers: the credentials stop working after the listing.
func TestARefusalOfReadsIsToldAndRecovers(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	s.PutT(t, "data", "f", content(1000, 1))
	proxy := bucket.Faults(t, s)
	tr, _ := overBucket(t, s, proxy.Endpoint(), "")
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	proxy.Set(func(r *http.Request) bucket.Fault {
		return bucket.Fault{Status: http.StatusForbidden, Code: "AccessDenied"}
	})
	c := tr.dial(0)
	if _, err := c.read(i, 0, 1000, 0); !errors.Is(err, source.ErrDenied) {
		t.Fatal(err)
	}
	eventually(t, "not ready", func() error {
		if code, text := tr.get(0, wire.PathReady); code != http.StatusServiceUnavailable || !strings.Contains(text, "denied") {
			return fmt.Errorf("%d %s", code, text)
		}
		return nil
	})
	proxy.Set(nil)
	eventually(t, "ready again, though nobody asked", func() error {
		if code, text := tr.get(0, wire.PathReady); code != http.StatusOK {
			return errors.New(text)
		}
		return nil
	})
}

// TestABucketThatIsAwayIsToldAndServedOnWithout: it keeps nobody from what is held, and is over once it is back.
func TestABucketThatIsAwayIsToldAndServedOnWithout(t *testing.T) {
	tr := newTier(t, map[string][]byte{"held": content(1000, 1), "other": content(1000, 2), "third": content(1000, 3)})
	tr.start(1)
	snap := tr.snapshot()
	held, other := index(t, snap, "/held"), index(t, snap, "/other")
	c := tr.dial(0)
	if _, err := c.read(held, 0, 1000, 0); err != nil {
		t.Fatal(err)
	}
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		return fmt.Errorf("%w: %s: connection refused", source.ErrUnavailable, o.Key)
	})
	if _, err := c.read(other, 0, 1000, 0); !errors.Is(err, source.ErrUnavailable) {
		t.Fatal(err)
	}
	eventually(t, "it is told", func() error {
		if s := tr.workers[0].Status(); !strings.Contains(s.Problem, "other: connection refused") || s.Reason != wire.Unavailable.String() || !s.Serves {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	if code, text := tr.get(0, wire.PathReady); code != http.StatusOK {
		t.Errorf("not ready: %s", text)
	}
	if _, err := c.read(held, 0, 1000, 0); err != nil {
		t.Errorf("what is held: %v", err)
	}
	tr.gates[0].set(nil)
	eventually(t, "it is over, though nobody asked", func() error {
		if s := tr.workers[0].Status(); s.Problem != "" || s.Reason != "" || s.Serves {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// TestABucketThatIsAwayHidesNoneThatRefuses: the one is served on without, the other not.
func TestABucketThatIsAwayHidesNoneThatRefuses(t *testing.T) {
	tr := newTier(t, map[string][]byte{"away/a": content(1000, 1), "refuses/r": content(1000, 2)})
	tr.mounts = nil
	for _, m := range []string{"away", "refuses"} {
		tr.mounts = append(tr.mounts, Mount{Config: source.Config{URL: "file://" + filepath.Join(tr.root, m)}, Path: "/" + m})
	}
	tr.start(1)
	snap := tr.snapshot()
	kinds := map[string]error{"a": source.ErrUnavailable, "r": source.ErrDenied}
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error { return kinds[o.Key] })
	c := tr.dial(0)
	if _, err := c.read(index(t, snap, "/away/a"), 0, 1000, 0); !errors.Is(err, source.ErrUnavailable) {
		t.Fatal(err)
	}
	eventually(t, "one is away", func() error {
		if tr.workers[0].problems.of(problemAway) == nil {
			return errors.New("not told yet")
		}
		return nil
	})
	if _, err := c.read(index(t, snap, "/refuses/r"), 0, 1000, 0); !errors.Is(err, source.ErrDenied) {
		t.Fatal(err)
	}
	eventually(t, "the other refuses", func() error {
		if err := tr.workers[0].problems.ready(); !errors.Is(err, source.ErrDenied) {
			return fmt.Errorf("ready: %v", err)
		}
		return nil
	})
}

// TestOneObjectThatFailsIsNoProblem: only its own readers are concerned.
func TestOneObjectThatFailsIsNoProblem(t *testing.T) {
	for _, kind := range []error{source.ErrDenied, source.ErrUnavailable} {
		tr := newTier(t, map[string][]byte{"a/secret": content(1000, 1), "b/open": content(1000, 2)})
		tr.start(1)
		snap := tr.snapshot()
		probed := make(chan struct{}, 100)
		tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
			if strings.HasSuffix(o.Key, "secret") {
				return fmt.Errorf("%w: %s", kind, o.Key)
			}
			probed <- struct{}{}
			return nil
		})
		if _, err := tr.dial(0).read(index(t, snap, "/a/secret"), 0, 1000, 0); !errors.Is(err, kind) {
			t.Fatal(err)
		}
		<-probed
		eventually(t, "the failure is looked into", func() error {
			if tr.workers[0].doubted.Load() != nil {
				return errors.New("not yet")
			}
			return nil
		})
		if s := tr.workers[0].Status(); s.Problem != "" {
			t.Errorf("%v: %s", kind, s.Problem)
		}
		if code, text := tr.get(0, wire.PathReady); code != http.StatusOK {
			t.Errorf("not ready: %s", text)
		}
	}
}

// What comes slowly is not thrown away: a bucket that takes longer for what a load has under way than it may be silent
// sends every byte once.
func TestALoadFromABucketThatIsSlowFinishes(t *testing.T) {
	const size = 16 * ring.BlockSize
	s := bucket.StartT(t, bucket.Options{BytesPerSecond: 8 << 20})
	want := content(size, 1)
	s.PutT(t, "data", "big", want)
	tr, _ := overBucket(t, s, s.Endpoint(), "")
	tr.start(1)
	tr.workers[0].sourceTimeout = 5 * time.Second // of the 8 that all blocks together take
	i := index(t, tr.snapshot(), "/big")
	before := s.Sent()
	tr.load(wire.LoadRequest{ID: "l"})
	if st := tr.waitLoad(0, "l"); !st.Done || st.Resident != size || st.FailedFiles != 0 {
		t.Errorf("%+v", st)
	}
	if sent := s.Sent() - before; sent > size*13/10 {
		t.Errorf("the bucket sent %d bytes of an object of %d", sent, int64(size))
	}
	if p, err := tr.dial(0).file(i, size, wire.FlagResidentOnly); err != nil || !bytes.Equal(p, want) {
		t.Errorf("%d bytes, %v", len(p), err)
	}
}

// A block that takes longer than its reader waits is not begun anew when the reader comes again.
func TestAReaderOfASlowBucketFindsItsBlockOnTheWay(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{BytesPerSecond: 2 << 20})
	want := content(ring.BlockSize, 1)
	s.PutT(t, "data", "f", want)
	tr, _ := overBucket(t, s, s.Endpoint(), "")
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	c := tr.dial(0)
	before := s.Sent()
	eventually(t, "it has come", func() error {
		_, p, err := c.ask(wire.Request{Op: wire.OpRead, Index: i, Length: ring.BlockSize, WaitMillis: 500})
		if err == nil && !bytes.Equal(p, want) {
			t.Fatal("other bytes")
		}
		return err
	})
	if sent := s.Sent() - before; sent > ring.BlockSize*13/10 {
		t.Errorf("the bucket sent %d bytes of an object of %d", sent, int64(ring.BlockSize))
	}
}

// TestABucketThatFailsForAWhile: 503, resets and truncated bodies cost time only.
func TestABucketThatFailsForAWhile(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	want := content(3*ring.BlockSize, 1)
	s.PutT(t, "data", "f", want)
	proxy := bucket.Faults(t, s)
	var n atomic.Int32
	faults := []bucket.Fault{{Status: http.StatusServiceUnavailable, Code: "SlowDown"}, {Reset: true}, {Truncate: 100_000}}
	proxy.Set(func(r *http.Request) bucket.Fault {
		if k := int(n.Add(1)) - 1; strings.HasSuffix(r.URL.Path, "/f") && k < len(faults) {
			return faults[k]
		}
		return bucket.Fault{}
	})
	tr, _ := overBucket(t, s, proxy.Endpoint(), "")
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	n.Store(0)
	got, err := tr.dial(0).file(i, int64(len(want)), 0)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}
