package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
)

// heap is the live heap in bytes.
func heap() int64 {
	var m runtime.MemStats
	for range 2 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestQuotaHoldsWhileTenTimesItIsReadThroughConcurrently(t *testing.T) {
	const quota, buffers = 24 * mib, 16 * mib
	s := open(t, Options{Dir: ownTmpfs(t, quota), Quota: quota, BufferBytes: buffers})
	before := heap()
	var objects []ring.Object
	var total int64
	for i := 0; total < 10*quota; i++ {
		size := []int64{16 << 10, 300_000, 3 * mib, 9*mib + 1}[i%4]
		objects = append(objects, anObject(i, size))
		total += size
	}
	stop := make(chan struct{})
	var watch, readers sync.WaitGroup
	watch.Go(func() {
		look := time.NewTicker(time.Millisecond)
		defer look.Stop()
		for {
			select {
			case <-stop:
				return
			case <-look.C:
			}
			if st := s.Stats(); st.Used > st.Quota {
				t.Errorf("above the quota: %+v", st)
				return
			}
			if used, err := s.fsUsed(); err != nil || used > quota {
				t.Errorf("the tmpfs holds %d bytes of a quota of %d: %v", used, int64(quota), err)
				return
			}
		}
	})
	var next atomic.Int64
	for range 8 {
		readers.Go(func() {
			for i := next.Add(1) - 1; int(i) < len(objects); i = next.Add(1) - 1 {
				load(t, s, objects[i])
				load(t, s, objects[int(i)/2]) // some come again
			}
		})
	}
	readers.Wait()
	close(stop)
	watch.Wait()
	if st := s.Stats(); st.Evicted == 0 || st.Used < quota/2 {
		t.Errorf("the cache was hardly used: %+v", st)
	}
	if grown := heap() - before; grown > buffers+4*mib {
		t.Errorf("the heap grew by %d bytes", grown)
	}
	checkBooks(t, s)
}

func TestFileSystemFullBelowTheQuotaIsNoErrorToReaders(t *testing.T) {
	dir := ownTmpfs(t, 16*mib) // with its slack 32 MiB and a bit
	s := open(t, Options{Dir: dir, Quota: 64 * mib, Logger: quiet()})
	other := filepath.Join(dir, "somebody-else")
	if err := os.WriteFile(other, make([]byte, 12*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for i := range 20 {
			load(t, s, anObject(i, 3*mib))
		}
	}
	st := s.Stats()
	if st.NoSpace == 0 || st.Blocks == 0 {
		t.Fatalf("the file system was not full: %+v", st)
	}
	if st.NoSpace > 10 {
		t.Errorf("it ran into the wall again and again: %+v", st)
	}
	checkBooks(t, s)
	// Once the other one is gone its room is used.
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		for i := range 20 {
			load(t, s, anObject(i, 3*mib))
		}
	}
	if after := s.Stats(); after.Bytes < st.Bytes+6*mib {
		t.Errorf("%d bytes held while it was full, %d after", st.Bytes, after.Bytes)
	}
	checkBooks(t, s)
}

// Bytes held in memory for each byte cached: pages as the file system says, kernel inodes, and the Go heap.
func TestBytesPerCachedByte(t *testing.T) {
	for _, c := range []struct {
		size, count int
		most        float64
	}{{4 << 10, 20000, 1.5}, {16 << 10, 4000, 1.3}, {256 << 10, 400, 1.05}, {ring.BlockSize, 40, 1.02}} {
		t.Run(fmt.Sprintf("%dKiB", c.size>>10), func(t *testing.T) {
			s := open(t, Options{Dir: ownTmpfs(t, 256*mib), Quota: 256 * mib, BufferBytes: ring.BlockSize})
			acquire(t, s, anObject(-1, int64(c.size)), 0).Release() // its buffer is not the objects'
			fill := func(context.Context, []byte) error { return nil }
			h, p := heap(), usedBy(t, s)
			for i := range c.count {
				b, err := s.Acquire(context.Background(), anObject(i, int64(c.size)), 0, fill)
				if err != nil {
					t.Fatal(err)
				}
				b.Release()
			}
			h, p = heap()-h, usedBy(t, s)-p
			if st := s.Stats(); st.Blocks != int64(c.count)+1 {
				t.Fatalf("%+v", st)
			}
			inodes := int64(c.count) * inodeCost
			content := int64(c.count * c.size)
			ratio := float64(h+p+inodes) / float64(content)
			t.Logf("%d bytes of heap an object, ratio %.4f", h/int64(c.count), ratio)
			if ratio > c.most {
				t.Errorf("%.3f bytes for each byte cached, at most %.2f", ratio, c.most)
			}
			// And what the quota counts is not less than what is there.
			if used := s.Stats().Used; used < p+inodes+h {
				t.Errorf("the quota counts %d bytes, the tmpfs holds %d, its inodes %d and the heap %d", used, p, inodes, h)
			}
		})
	}
}

func usedBy(t *testing.T, s *Store) int64 {
	t.Helper()
	used, err := s.fsUsed()
	if err != nil {
		t.Fatal(err)
	}
	return used
}

// Everything at once, and whatever a reader gets is right.
func TestConcurrentUseOfEverythingGivesRightBytes(t *testing.T) {
	const quota = 12 * mib
	s := open(t, Options{Dir: memDir(t), Quota: quota, BufferBytes: 16 * mib})
	sizes := []int64{1, 5000, 70_000, mib + 3, 400_000, ring.BlockSize + 9}
	one := func(r *rand.Rand) ring.Object { i := r.IntN(30); return anObject(i, sizes[i%len(sizes)]) }
	stop, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg, back sync.WaitGroup
	back.Go(func() {
		bad := func(o ring.Object, n int64) { t.Errorf("block %d of %v is corrupt", n, o) }
		if err := s.Scrub(stop, 1<<30, bad); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 7))
			for range 100 {
				o := one(r)
				n := r.Int64N(ring.Blocks(o.Size))
				switch k := r.IntN(20); {
				case k < 12:
					var b *Block
					var err error
					if k%2 == 0 {
						b, err = s.Acquire(context.Background(), o, n, filler(o, n))
					} else {
						b, err = s.AcquirePlaced(context.Background(), o, n, placer(o, n))
					}
					if err != nil {
						t.Error(err)
						return
					}
					check(t, o, n, b)
					if k == 0 && !s.Verify(b) {
						t.Error("good bytes do not verify")
					}
					b.Release()
				case k < 14: // a caller that may leave
					ctx, cancel := context.WithCancel(context.Background())
					go cancel()
					if b, err := s.AcquirePlaced(ctx, o, n, placer(o, n)); err == nil {
						check(t, o, n, b)
						b.Release()
					} else if !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
					cancel()
				case k < 15:
					if b, ok := s.Lookup(o, n); ok {
						check(t, o, n, b)
						b.Release()
					}
				case k < 16:
					s.Drop(o)
				case k < 18:
					l, err := s.Lease(o)
					if err != nil {
						break
					}
					p := make([]byte, o.Size)
					if _, err := l.File.ReadAt(p, 0); err != nil {
						t.Error(err)
					}
					want := make([]byte, blockLen(o.Size, n))
					content(o, n, want)
					if string(want) != string(p[n*ring.BlockSize:][:len(want)]) {
						t.Error("wrong bytes through a lease")
					}
					l.Release()
				case k < 19:
					if err := s.Pin(o, n, fmt.Sprint(g)); err != nil && !errors.Is(err, ErrFull) {
						t.Error(err)
					}
				default:
					s.Unpin(fmt.Sprint(g))
				}
				if st := s.Stats(); st.Used > st.Quota {
					t.Errorf("above the quota: %+v", st)
				}
			}
			s.Unpin(fmt.Sprint(g))
		})
	}
	wg.Wait()
	cancel()
	back.Wait()
	eventually(t, func() bool { // fills that were left go on to their end
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, o := range s.objects {
			for _, b := range o.blocks {
				if b.flight != nil {
					return false
				}
			}
		}
		return true
	})
	checkBooks(t, s)
	if st := s.Stats(); st.Corrupt != 0 || st.Pinned != 0 || st.Leases != 0 || st.Zombie != 0 {
		t.Errorf("%+v", st)
	}
	s = reopen(t, s, quota)
	for i := range 30 {
		load(t, s, anObject(i, sizes[i%len(sizes)]))
	}
	checkBooks(t, s)
}

// The heap's limit is that of a process whose store is empty: what the entries take is the quota's.
func TestTheHeapsLimitFollowsTheEntries(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(1 << 40))
	raised := func() int64 { return debug.SetMemoryLimit(-1) - 1<<40 }
	const blocks = 3 * entriesStep / entryCost
	dir := ownTmpfs(t, 512*mib)
	options := Options{Dir: dir, Quota: 512 * mib, BufferBytes: ring.BlockSize}
	s := open(t, options)
	for i := range blocks {
		load(t, s, anObject(i, 1))
	}
	if n := raised(); n <= 2*entriesStep || n > 3*entriesStep {
		t.Errorf("raised by %d bytes for %d blocks", n, blocks)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := raised(); n != 0 {
		t.Errorf("raised by %d bytes by a store that is closed", n)
	}
	s = open(t, options)
	if n := raised(); n != blocks*entryCost {
		t.Errorf("raised by %d bytes for the %d blocks of a former process", n, blocks)
	}
	for i := range blocks / 2 {
		s.Drop(anObject(i, 1))
	}
	if n := raised(); n < blocks/2*entryCost || n > blocks/2*entryCost+entriesStep {
		t.Errorf("raised by %d bytes for %d blocks", n, blocks/2)
	}
}
