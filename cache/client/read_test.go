package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// awkward are the sizes at which something may be off by one.
var awkward = []int{0, 1, 4095, 4096, 65535, 65536, 65537, 1 << 20, 4<<20 - 1, 4 << 20, 4<<20 + 1, 9 << 20}

func awkwardFiles() map[string][]byte {
	files := make(map[string][]byte)
	for k, n := range awkward {
		files[fmt.Sprintf("dir/size-%d", n)] = content(uint64(k+1), n)
	}
	return files
}

func TestReadsOfEveryAwkwardSizeEqualTheSource(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, awkwardFiles())
	k.start("a", "b", "c")
	for _, buffers := range []int64{4 << 20, 0} {
		c := k.dial(func(c *Config) { c.BufferBytes = buffers })
		rnd := rand.New(rand.NewPCG(1, uint64(buffers)))
		for name, want := range k.data {
			i := k.index(name)
			// The edges, a whole read, and random ones.
			offs := []int64{0, 1, 4095, 65535, 65536, int64(len(want)) - 1, int64(len(want)), int64(len(want)) + 1}
			for _, off := range offs {
				for _, n := range []int{0, 1, 4096, 65537} {
					if off < 0 {
						continue
					}
					if err := checkRead(ctx, c, i, want, off, n); err != nil {
						t.Fatalf("%s: %v", name, err)
					}
				}
			}
			if err := checkRead(ctx, c, i, want, 0, len(want)+10); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for range 30 {
				off := rnd.Int64N(int64(len(want)) + 1)
				n := 1 << rnd.IntN(23)
				n = rnd.IntN(n + 1)
				if err := checkRead(ctx, c, i, want, off, n); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
		}
		if _, err := c.ReadAt(ctx, k.index("dir/size-1"), make([]byte, 1), -1); !errors.Is(err, source.ErrInvalid) {
			t.Fatalf("negative offset: %v", err)
		}
		if _, err := c.ReadAt(ctx, 0, make([]byte, 1), 0); !errors.Is(err, source.ErrInvalid) {
			t.Fatalf("read of a directory: %v", err)
		}
		if s := c.Stats(); s.Fallbacks != 0 || s.Corrupt != 0 {
			t.Fatalf("a healthy tier caused %+v", s)
		}
	}
}

// The faults come after numbers of reads, not after times, in an order drawn from a seed.
func TestRandomReadsWhileWorkersAreKilledRestartedPausedAndAdded(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, awkwardFiles())
	k.timing = impatient()
	k.start("a", "b", "c", "d")
	c := k.dial(func(c *Config) { c.BufferBytes = 16 << 20 })

	var names []string
	for name := range k.data {
		names = append(names, name)
	}
	rnd := rand.New(rand.NewPCG(7, 7))
	down := map[string]string{}
	added := 0
	disturb := func() string {
		ids := []string{"b", "c", "d"} // a stays
		id := ids[rnd.IntN(len(ids))]
		w := k.worker(id)
		switch down[id] {
		case "killed":
			w.restart()
			delete(down, id)
			return "restart " + id
		case "paused":
			w.resume()
			delete(down, id)
			return "resume " + id
		}
		switch rnd.IntN(4) {
		case 0:
			w.pause()
			down[id] = "paused"
			return "pause " + id
		case 1:
			if added < 3 {
				added++
				k.start(fmt.Sprintf("new-%d", added)) // at a new epoch
				return "add"
			}
			fallthrough
		default:
			w.stop()
			down[id] = "killed"
			return "kill " + id
		}
	}
	for round := range 14 {
		what := disturb()
		var g errgroup.Group
		for reader := range 6 {
			rnd := rand.New(rand.NewPCG(uint64(round), uint64(reader)))
			g.Go(func() error {
				for range 8 {
					name := names[rnd.IntN(len(names))]
					want := k.data[name]
					off := rnd.Int64N(int64(len(want)) + 1)
					if err := checkRead(ctx, c, k.index(name), want, off, rnd.IntN(1<<20)); err != nil {
						return fmt.Errorf("%s: %w", name, err)
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatalf("after %q in round %d: %v", what, round, err)
		}
	}
	for id, state := range down {
		if state == "paused" {
			k.worker(id).resume()
		}
	}
	if s := c.Stats(); s.Corrupt != 0 || s.Epoch != k.membership().Epoch && added == 0 {
		t.Fatalf("%+v", s)
	}
}

func TestBytesEqualWhenEveryWorkerButOneHangs(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 9<<20)})
	k.timing = impatient()
	k.start("a", "b", "c")
	c := k.dial(nil)
	ws := k.owners("f", 0)
	ws[0].pause()
	ws[1].pause()
	defer ws[0].resume()
	defer ws[1].resume()
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 9<<20); err != nil {
		t.Fatal(err)
	}
	for _, r := range ws[2].seen() {
		if r.Flags&wire.FlagReadThrough == 0 {
			t.Fatalf("a worker that owns nothing was asked without the flag: %+v", r)
		}
	}
	// A hung worker is not asked again for each block: the rest is quick. It comes back when it answers.
	ws[0].resume()
	before := len(ws[0].seen())
	eventually(t, "the owner coming back", func() bool {
		c.Forget(k.index("f"))
		if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 4096); err != nil {
			t.Fatal(err)
		}
		return len(ws[0].seen()) > before
	})
}

func TestAWorkerThatAnswersWronglyNeverGivesAWrongByte(t *testing.T) {
	for what, a := range map[string]*answer{
		"another file":        {change: func(r *wire.Reply) { r.Index++ }},
		"another offset":      {change: func(r *wire.Reply) { r.Off += checksum.Size }},
		"too few bytes":       {change: func(r *wire.Reply) { r.Length -= checksum.Size; r.Sums = r.Sums[1:] }},
		"garbage":             {raw: []byte(strings.Repeat("garbage ", 100))},
		"nothing but closing": {drop: true},
		"an unknown status":   {status: 200, text: "what?"},
		"a fault":             {status: wire.Internal, text: "out of memory"},
		"a flipped bit":       {flip: 70000},
	} {
		t.Run(strings.ReplaceAll(what, " ", "-"), func(t *testing.T) {
			ctx := testContext(t)
			k := newTier(t, map[string][]byte{"f": content(1, 5<<20)})
			k.start("a", "b")
			c := k.dial(nil)
			bad := k.owners("f", 0)[0]
			bad.set(func(wire.Request) *answer { return a })
			for range 2 {
				if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 5<<20); err != nil {
					t.Fatal(err)
				}
				c.Forget(k.index("f"))
			}
			if s := c.Stats(); s.Fallbacks == 0 {
				t.Fatalf("the other worker was not asked: %+v", s)
			}
			if s := c.Stats(); (s.Corrupt > 0) != (a.flip > 0 || a.raw != nil) {
				t.Fatalf("corrupt payloads: %d", s.Corrupt)
			}
			// Alone, and wrong at first only, it is asked again.
			var n atomic.Int64
			bad.set(func(wire.Request) *answer {
				if n.Add(1) == 1 {
					return a
				}
				return nil
			})
			k.owners("f", 0)[1].stop()
			if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 5<<20); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestCorruptPayloadIsAskedForAgainWithVerification(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 5<<20)})
	k.start("a")
	c := k.dial(nil)
	w := k.worker("a")
	w.set(func(r wire.Request) *answer {
		if r.Off == 0 && r.Flags&wire.FlagVerify == 0 {
			return &answer{flip: 4 << 20}
		}
		return nil
	})
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 5<<20); err != nil {
		t.Fatal(err)
	}
	if s := c.Stats(); s.Corrupt != 1 || s.Refetched != 1 || s.Fallbacks != 0 {
		t.Fatalf("%+v", s)
	}
}

func TestChangedAndDeletedObjectsEndTheReadAndSayWhich(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"dir/f": content(1, 5<<20)})
	k.start("a", "b")
	c := k.dial(nil)
	for status, want := range map[wire.Status]error{wire.Changed: source.ErrChanged, wire.NotFound: source.ErrNotFound} {
		for _, w := range k.owners("dir/f", 0) {
			w.set(func(wire.Request) *answer { return &answer{status: status, text: "etag differs"} })
		}
		n, err := c.ReadAt(ctx, k.index("dir/f"), make([]byte, 100), 4<<20)
		if n != 0 || !errors.Is(err, want) {
			t.Fatalf("%d, %v", n, err)
		}
		for _, part := range []string{testDataset, "/dir/f", "s3://bucket/dir/f", "spec.refresh", "etag differs"} {
			if !strings.Contains(err.Error(), part) {
				t.Fatalf("error %q does not say %q", err, part)
			}
		}
	}
	if n := len(k.owners("dir/f", 0)[1].seen()); n != 0 {
		t.Fatalf("a final answer was questioned %d times", n)
	}
	// What is in memory stays readable: it is of the right version.
	for _, w := range k.owners("dir/f", 0) {
		w.set(nil)
	}
	if err := checkRead(ctx, c, k.index("dir/f"), k.data["dir/f"], 4<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	k.owners("dir/f", 0)[0].set(func(wire.Request) *answer { return &answer{status: wire.Changed} })
	if err := checkRead(ctx, c, k.index("dir/f"), k.data["dir/f"], 4<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	// A read over both ends without a mixture passing for a success.
	if n, err := c.ReadAt(ctx, k.index("dir/f"), make([]byte, 5<<20), 0); err == nil || n > 0 {
		t.Fatalf("%d bytes, %v", n, err)
	}
}

// The bucket has lost what another owner still holds.
func TestAChangedObjectIsReadWhileACopyIsHeld(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 1<<20)})
	k.start("a", "b", "c")
	c := k.dial(func(c *Config) { c.Copies = 2 })
	owners := k.owners("f", 0)
	var held atomic.Bool
	owners[1].set(func(r wire.Request) *answer {
		if r.Flags&wire.FlagResidentOnly == 0 {
			return &answer{status: wire.Internal, text: "it would ask the bucket"}
		}
		if !held.Load() {
			return &answer{status: wire.NotResident}
		}
		return nil
	})
	for status, want := range map[wire.Status]error{wire.Changed: source.ErrChanged, wire.NotFound: source.ErrNotFound} {
		owners[0].set(func(wire.Request) *answer { return &answer{status: status, text: "etag differs"} })
		held.Store(false)
		if _, err := c.ReadAt(ctx, k.index("f"), make([]byte, 100), 0); !errors.Is(err, want) || !strings.Contains(err.Error(), "etag differs") {
			t.Fatalf("nobody holds it: %v", err)
		}
		held.Store(true)
		if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
			t.Fatal(err)
		}
		c.Forget(k.index("f"))
	}
	if n := len(owners[2].seen()); n != 0 {
		t.Fatalf("a worker that is no owner was asked %d times", n)
	}
}

func TestOneDeniedWorkerDoesNotEndAReadAndAllDeniedDo(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 1<<20)})
	k.start("a", "b", "c")
	c := k.dial(nil)
	ws := k.owners("f", 0)
	denied := func(wire.Request) *answer { return &answer{status: wire.Denied, text: "secret has no key"} }
	ws[0].set(denied)
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	ws[1].set(denied)
	ws[2].set(denied)
	c.Forget(k.index("f"))
	_, err := c.ReadAt(ctx, k.index("f"), make([]byte, 10), 0)
	if !errors.Is(err, source.ErrDenied) || !strings.Contains(err.Error(), "secret has no key") {
		t.Fatal(err)
	}
	// Also when another worker is gone: its answer is not waited for to the deadline.
	ws[2].stop()
	_, err = c.ReadAt(ctx, k.index("f"), make([]byte, 10), 0)
	if !errors.Is(err, source.ErrDenied) {
		t.Fatal(err)
	}
}

func TestOverloadedWorkerIsAskedAgainBeforeAnother(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 1<<20)})
	k.start("a", "b")
	c := k.dial(nil)
	ws := k.owners("f", 0)
	var n atomic.Int64
	busy := func(wire.Request) *answer {
		if n.Add(1) <= 3 {
			return &answer{status: wire.Overloaded, text: "queue full"}
		}
		return nil
	}
	ws[0].set(busy)
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if len(ws[1].seen()) != 0 || len(ws[0].seen()) != 4 {
		t.Fatalf("asked %d and %d times", len(ws[0].seen()), len(ws[1].seen()))
	}
	// One that stays overloaded loses the read to the other.
	ws[0].set(func(wire.Request) *answer { return &answer{status: wire.Overloaded} })
	c.Forget(k.index("f"))
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
		t.Fatal(err)
	}
}

func TestAStaleEpochLearnsTheNewOwnerFromTheReply(t *testing.T) {
	ctx := testContext(t)
	files := make(map[string][]byte)
	for n := range 32 {
		files[fmt.Sprintf("f%d", n)] = content(uint64(n), 200_000)
	}
	k := newTier(t, files)
	k.start("a")
	c := k.dial(nil)
	old := c.Stats().Epoch
	k.start("b", "c") // the client is not told
	for name, want := range files {
		if err := checkRead(ctx, c, k.index(name), want, 0, len(want)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the newer membership", func() bool { return c.Stats().Epoch > old })
	for name, want := range files {
		c.Forget(k.index(name))
		if err := checkRead(ctx, c, k.index(name), want, 0, len(want)); err != nil {
			t.Fatal(err)
		}
	}
	if len(k.worker("b").seen()) == 0 || len(k.worker("c").seen()) == 0 {
		t.Fatal("new owners were not asked")
	}
	// Members that left are forgotten with the next list, and what they owned moves.
	k.worker("a").stop()
	k.mu.Lock()
	delete(k.workers, "a")
	k.mu.Unlock()
	k.setMembers()
	for name, want := range files {
		c.Forget(k.index(name))
		if err := checkRead(ctx, c, k.index(name), want, 0, len(want)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAWorkerThatAnnouncesAnEpochItDoesNotHaveIsNotAskedForever(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 1<<20)})
	k.start("a")
	c := k.dial(nil)
	w := k.worker("a")
	eventually(t, "the first list", func() bool { return c.Stats().Epoch == k.membership().Epoch })
	w.mu.Lock()
	before := w.members.Load()
	w.mu.Unlock()
	w.tier.mu.Lock()
	w.epochDelta = 5
	w.tier.mu.Unlock()
	for range 50 {
		c.Forget(k.index("f"))
		if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 1000); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.members.Load() - before; n > 2 {
		t.Fatalf("asked %d times", n)
	}
}

func TestAnOwnerWithoutTheSnapshotIsGivenTimeBeforeOthersReadThrough(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 1<<20)})
	k.start("a", "b", "c")
	c := k.dial(nil)
	ws := k.owners("f", 0)
	var n atomic.Int64
	unknown := func(wire.Request) *answer { return &answer{status: wire.UnknownSnapshot, text: "restarted"} }
	ws[0].set(func(r wire.Request) *answer {
		if n.Add(1) < settle {
			return unknown(r)
		}
		return nil
	})
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if len(ws[1].seen())+len(ws[2].seen()) > 0 {
		t.Fatal("another worker read through what the owner was about to serve")
	}
	// A copy may be asked at once.
	n.Store(0)
	c2 := k.dial(func(c *Config) { c.Copies = 2 })
	ws[1].set(func(wire.Request) *answer { return &answer{} }) // it knows of the copies
	if err := checkRead(ctx, c2, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if len(ws[1].seen()) != 1 || n.Load() != 1 {
		t.Fatalf("asked %d and %d times", n.Load(), len(ws[1].seen()))
	}
	// One that never gets it holds up one read, and no other.
	ws[0].set(func(r wire.Request) *answer { n.Add(1); return unknown(r) })
	ws[1].set(nil)
	for range 5 {
		n.Store(0)
		c.Forget(k.index("f"))
		if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if n.Load() != 1 {
		t.Fatalf("asked %d times", n.Load())
	}
}

func TestABucketThatStallsEndsTheReadAtTheDeadlineWithTheReason(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1<<20)})
	k.start("a", "b")
	timing := quick()
	timing.client = 1000 * timing.retry // nobody answers before it: the deadline is what is tested
	c, err := dial(testContext(t), k.config(), timing)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, w := range k.owners("f", 0) {
		w.set(func(wire.Request) *answer { return &answer{status: wire.Unavailable, text: "bucket: 503"} })
	}
	_, err = c.ReadAt(testContext(t), k.index("f"), make([]byte, 10), 0)
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), "bucket: 503") {
		t.Fatal(err)
	}
	// What the bucket said is told, not that those who were asked later had no time to learn it.
	var said atomic.Int64
	for _, w := range k.owners("f", 0) {
		w.set(func(wire.Request) *answer {
			if said.Add(1) <= 4 { // the read before may have requests under way
				return &answer{status: wire.Unavailable, text: "bucket: 503"}
			}
			return &answer{status: wire.Late, text: "its time is up"}
		})
	}
	_, err = c.ReadAt(testContext(t), k.index("f"), make([]byte, 10), 0)
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), "bucket: 503") {
		t.Fatal(err)
	}
	for _, w := range k.owners("f", 0) {
		w.set(func(wire.Request) *answer { return &answer{never: true} })
	}
	_, err = c.ReadAt(testContext(t), k.index("f"), make([]byte, 10), 0)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "/f") {
		t.Fatal(err)
	}
	// A reader that gives up first leaves at once, and its block can be had afterwards.
	ctx, cancel := context.WithCancelCause(testContext(t))
	started := make(chan struct{}, 100)
	for _, w := range k.owners("f", 0) {
		w.set(func(wire.Request) *answer { started <- struct{}{}; return &answer{never: true} })
	}
	done := make(chan error)
	go func() {
		_, err := c.ReadAt(ctx, k.index("f"), make([]byte, 10), 0)
		done <- err
	}()
	<-started
	cancel(errTest)
	if err := <-done; !errors.Is(err, errTest) {
		t.Fatal(err)
	}
	for _, w := range k.owners("f", 0) {
		w.set(nil)
	}
	if err := checkRead(testContext(t), c, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
		t.Fatal(err)
	}
}

// The time of a fetch is that of the reader that it was begun for, or of nobody: who joins it has a time of his own,
// all of it and no more.
func TestAReaderThatJoinsAFetchHasItsOwnTime(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, checksum.Size)})
	k.start("a")
	// A fetch that was begun long ago: its time ends after this reader joined it.
	join := func(c *Client) (e *extent, done chan error) {
		e, _ = c.cache.add(c.ctx, blockKey{index: k.index("f")}, 0, 1, checksum.Size, nil)
		done = make(chan error, 1)
		go func() { done <- checkRead(ctx, c, k.index("f"), k.data["f"], 0, checksum.Size) }()
		eventually(t, "a reader that waits for it", func() bool { return c.Stats().Joins == 1 })
		return e, done
	}
	over := fmt.Errorf("its time is over: %w", context.DeadlineExceeded)

	c := k.dial(nil)
	e, done := join(c)
	c.cache.finish(e, over)
	c.cache.release(e)
	if err := <-done; err != nil {
		t.Fatalf("the worker was well and the reader had time: %v", err)
	}

	// What it waits for next is another's fetch again, which takes longer than the reader may wait.
	k.timing.client = time.Second
	c = k.dial(nil)
	e, done = join(c)
	c.cache.mu.Lock()
	c.cache.forget(e)
	c.cache.mu.Unlock()
	next, _ := c.cache.add(c.ctx, e.key, 0, 1, checksum.Size, nil)
	c.cache.finish(e, over)
	c.cache.release(e)
	if err := <-done; !errors.Is(err, over) {
		t.Fatalf("the reader's time is over: %v", err)
	}
	c.cache.finish(next, nil)
	c.cache.release(next)
	c.cache.release(next)

	// A guess whose time is over ends as a fetch does, for who joined it.
	k.timing.client = 100 * time.Millisecond
	c = k.dial(nil)
	k.worker("a").set(func(wire.Request) *answer { return &answer{never: true} })
	o, _ := k.snap.Ring(k.index("f"))
	w := piece{index: k.index("f"), object: o, n: checksum.Size, urgent: make(chan struct{})}
	if err := c.guess(ctx, w, make([]byte, w.n)); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestABlockIsFetchedOnceHoweverManyReadIt(t *testing.T) {
	ctx := testContext(t)
	const size = 24 << 20
	k := newTier(t, map[string][]byte{"f": content(1, size)})
	k.start("a", "b", "c")
	c := k.dial(nil)
	var g errgroup.Group
	for range 8 {
		g.Go(func() error {
			for off := int64(0); off < size; off += 1 << 20 {
				if err := checkRead(ctx, c, k.index("f"), k.data["f"], off, 1<<20); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	got := make(map[int64]int)
	for _, r := range k.owners("f", 0)[0].seen() {
		for off := r.Off; off < r.Off+int64(r.Length); off += checksum.Size {
			got[off]++
		}
	}
	for off, n := range got {
		if n > 1 {
			t.Fatalf("the bytes at %d were fetched %d times", off, n)
		}
	}
	if len(got) != size/checksum.Size {
		t.Fatalf("%d chunks", len(got))
	}
}

func TestRandomSmallReadsFetchSmallRangesAndSequentialOnesWholeBlocks(t *testing.T) {
	ctx := testContext(t)
	const size = 128 << 20
	k := newTier(t, map[string][]byte{"f": content(1, size)})
	k.start("a")
	c := k.dial(nil)
	w := k.worker("a")
	rnd := rand.New(rand.NewPCG(3, 3))
	for range 200 {
		if err := checkRead(ctx, c, k.index("f"), k.data["f"], rnd.Int64N(size), 4096); err != nil {
			t.Fatal(err)
		}
	}
	large := 0
	for _, r := range w.seen() {
		if r.Length > 2*checksum.Size {
			large++
		}
	}
	if large > 2 { // 16 streams of 1 MiB reach over a sixteenth of the file, so chance finds a few in order
		t.Fatalf("%d of 200 random reads fetched more than two chunks", large)
	}

	before := len(w.seen())
	base := int64(32 << 20)
	for off := base; off < base+32<<20; off += 128 << 10 {
		if err := checkRead(ctx, c, k.index("f"), k.data["f"], off, 128<<10); err != nil {
			t.Fatal(err)
		}
	}
	s := c.Stats()
	if n := len(w.seen()) - before; n > 8+8+4 {
		t.Fatalf("%d requests for 8 blocks read in order", n)
	}
	if s.ReadAhead == 0 {
		t.Fatal("nothing was read ahead")
	}
}

func TestSeveralStreamsOfOneFileAreEachReadAhead(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 80<<20)})
	k.start("a")
	c := k.dial(nil)
	// Four readers take turns, each in order.
	for step := int64(0); step < 12<<20; step += 512 << 10 {
		for reader := range int64(4) {
			if err := checkRead(ctx, c, k.index("f"), k.data["f"], reader*(20<<20)+step, 512<<10); err != nil {
				t.Fatal(err)
			}
		}
	}
	if s := c.Stats(); s.ReadAhead < 6 || s.Misses > 4*3 {
		t.Fatalf("read ahead %d, missed %d", s.ReadAhead, s.Misses)
	}
}

func TestMemoryStaysWithinTheBudgetWithManyStreams(t *testing.T) {
	ctx := testContext(t)
	files := make(map[string][]byte)
	for n := range 12 {
		files[fmt.Sprintf("f%d", n)] = content(uint64(n), 9<<20)
	}
	k := newTier(t, files)
	k.start("a", "b")
	const budget = 20 << 20
	c := k.dial(func(c *Config) { c.BufferBytes = budget })
	var over atomic.Int64
	for _, id := range []string{"a", "b"} {
		k.worker(id).set(func(wire.Request) *answer {
			s := c.Stats()
			if n := s.Buffered + s.Pooled; n > budget {
				over.Store(n)
			}
			return nil
		})
	}
	var g errgroup.Group
	for name, want := range files {
		g.Go(func() error {
			for off := int64(0); off < int64(len(want)); off += 1 << 20 {
				if err := checkRead(ctx, c, k.index(name), want, off, 1<<20); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := over.Load(); n > 0 {
		t.Fatalf("%d bytes of buffers, the budget is %d", n, int64(budget))
	}
	if n := c.Stats().Pooled + c.Stats().Buffered; n > budget {
		t.Fatalf("%d bytes of buffers at the end", n)
	}
}

func TestReadersThatAreStuckDoNotStopOthers(t *testing.T) {
	ctx := testContext(t)
	files := map[string][]byte{"good": content(1, 9<<20)}
	for n := range 6 {
		files[fmt.Sprintf("stuck%d", n)] = content(uint64(n), 5<<20)
	}
	k := newTier(t, files)
	k.start("a")
	const budget = 12 << 20
	c := k.dial(func(c *Config) { c.BufferBytes = budget })
	open := make(chan struct{})
	good := k.index("good")
	k.worker("a").set(func(r wire.Request) *answer {
		if r.Index != good {
			return &answer{wait: open}
		}
		return nil
	})
	var wg sync.WaitGroup
	for n := range 6 {
		name := fmt.Sprintf("stuck%d", n)
		wg.Go(func() {
			if err := checkRead(ctx, c, k.index(name), files[name], 0, 5<<20); err != nil {
				t.Error(err)
			}
		})
	}
	// They hold so much of the memory that another block does not fit.
	eventually(t, "filling the buffers", func() bool { s := c.Stats(); return s.Buffered+ring.BlockSize > budget && s.Direct > 0 })
	for off := int64(0); off < 9<<20; off += 300_000 {
		if err := checkRead(ctx, c, good, files["good"], off, 300_000); err != nil {
			t.Fatal(err)
		}
	}
	close(open)
	wg.Wait()
}

func TestDemandGoesBeforeReadAhead(t *testing.T) {
	var s slots
	ctx := testContext(t)
	// Read-ahead leaves two blocks' worth.
	var held []*slot
	never := make(chan struct{})
	for range aheadBytes / ring.BlockSize {
		h, err := s.acquire(ctx, ring.BlockSize, never)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, h)
	}
	result := make(chan string, 10)
	wait := func(name string, urgent chan struct{}) {
		go func() {
			if _, err := s.acquire(ctx, ring.BlockSize, urgent); err != nil {
				t.Error(err)
			}
			result <- name
		}()
	}
	urgent := make(chan struct{})
	wait("ahead", urgent)
	eventually(t, "read-ahead waiting", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.ahead.Len() == 1 })
	for range 2 {
		if _, err := s.acquire(ctx, ring.BlockSize, now); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := s.try(1); ok {
		t.Fatal("more in flight than allowed")
	}
	wait("demand", now)
	eventually(t, "demand waiting", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.demand.Len() == 1 })
	held[0].release()
	held[0].release() // once is enough
	if got := <-result; got != "demand" {
		t.Fatal(got)
	}
	// Somebody came to wait for what is read ahead: it is demand from now on.
	close(urgent)
	eventually(t, "promotion", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.demand.Len() == 1 && s.ahead.Len() == 0 })
	held[1].yield() // waits for the bucket: its share goes to others
	if got := <-result; got != "ahead" {
		t.Fatal(got)
	}
	// Who gives up is out of the way.
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.acquire(gone, ring.BlockSize, now); err == nil {
		t.Fatal("acquired without room")
	}
	if s.demand.Len() != 0 {
		t.Fatal("a waiter was left behind")
	}
}

func TestASlowFirstCopyIsHedgedWithTheSecondOnlyIfItHoldsTheBlock(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 9<<20), "g": content(2, 9<<20)})
	k.start("a", "b", "c")
	c := k.dial(func(c *Config) { c.Copies = 2 })
	if _, ok := c.latency.hedge(1 << 20); ok {
		t.Fatal("a hedge without experience")
	}
	experienced(c)
	open := make(chan struct{})
	ws := k.owners("f", 0)
	ws[0].set(func(wire.Request) *answer { return &answer{wait: open} })
	// Both connections are up, as after some use: a hedge never waits for one.
	for _, w := range ws[:2] {
		if _, err := c.members.view().peers[w.id].get(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 1<<20, 100_000); err != nil {
		t.Fatal(err)
	}
	s := c.Stats()
	if s.Hedges == 0 || s.HedgeWins == 0 {
		t.Fatalf("%+v", s)
	}
	for _, r := range ws[1].seen() {
		if r.Flags != wire.FlagResidentOnly {
			t.Fatalf("hedge with flags %b", r.Flags)
		}
	}
	// The second does not hold it: the first is waited for.
	ws[1].set(func(wire.Request) *answer { return &answer{status: wire.NotResident} })
	done := make(chan error)
	go func() { done <- checkRead(ctx, c, k.index("f"), k.data["f"], 3<<20, 100_000) }()
	eventually(t, "the refusal", func() bool { return len(ws[1].seen()) >= 2 })
	close(open)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := c.Stats(); got.HedgeWins != s.HedgeWins {
		t.Fatal("a refusal counted as a win")
	}
}

func TestHedgesAreBoundedToAShareOfTheRequests(t *testing.T) {
	var l latency
	for range 1000 {
		l.observe(1, 1)
	}
	n := 0
	for l.pay() {
		n++
	}
	if n != hedgeBurst {
		t.Fatalf("%d hedges saved up", n)
	}
}

func TestGoroutinesAndReadersEndWithClose(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 9<<20)})
	k.start("a", "b", "c")
	open := make(chan struct{})
	defer close(open)
	started := make(chan struct{}, 100)
	for _, id := range []string{"a", "b", "c"} {
		k.worker(id).set(func(wire.Request) *answer { started <- struct{}{}; return &answer{wait: open} })
	}
	k.owners("f", 0)[2].stop() // one that is redialled
	c, err := dial(testContext(t), k.config(), quick())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 4)
	for n := range 4 {
		go func() {
			_, err := c.ReadAt(context.Background(), k.index("f"), make([]byte, 1<<20), int64(n)<<20)
			done <- err
		}()
	}
	<-started
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if err := <-done; err == nil {
			t.Fatal("a read ended without an error")
		}
	}
	if _, err := c.ReadAt(context.Background(), k.index("f"), make([]byte, 1), 0); !errors.Is(err, errClosed) {
		t.Fatal(err)
	}
	c.Forget(k.index("f"))
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if n, stacks := ours(); n > 0 {
		t.Fatalf("%d goroutines left:\n%s", n, stacks)
	}
}

func TestForgetDropsTheFileAndEndsItsReadAhead(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 64<<20), "g": content(2, 1<<20)})
	k.start("a")
	c := k.dial(nil)
	open := make(chan struct{})
	defer close(open)
	k.worker("a").set(func(r wire.Request) *answer {
		if r.Off >= 4<<20 {
			return &answer{wait: open}
		}
		return nil
	})
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	eventually(t, "read-ahead", func() bool { return c.Stats().Buffered > 4<<20 })
	c.Forget(k.index("f"))
	eventually(t, "giving the buffers back", func() bool { return c.Stats().Buffered == 0 })
}

func TestReadAtReportsEOFLikeAReaderAt(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 100_000), "empty": nil})
	k.start("a")
	c := k.dial(nil)
	r := io.NewSectionReader(readerAt{ctx, c, k.index("f")}, 0, 100_000)
	got, err := io.ReadAll(r)
	if err != nil || string(got) != string(k.data["f"]) {
		t.Fatal(len(got), err)
	}
	if n, err := c.ReadAt(ctx, k.index("empty"), make([]byte, 1), 0); n != 0 || err != io.EOF {
		t.Fatal(n, err)
	}
}

type readerAt struct {
	ctx context.Context
	c   *Client
	i   uint32
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) { return r.c.ReadAt(r.ctx, r.i, p, off) }
