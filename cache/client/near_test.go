package client

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

func TestAColdFileIsReadWhereItsWorkerKeepsIt(t *testing.T) {
	ctx := testContext(t)
	want := content(7, 5*ring.BlockSize+12345)
	k := overFolder(t, map[string][]byte{"f": want, "small": content(8, ring.BlockSize)})
	k.start("a")
	k.settled()
	clients := []*Client{k.dial(nil), k.dial(nil)}
	var g errgroup.Group
	for n, c := range clients {
		i, ok := c.Snapshot().Lookup("/f")
		if !ok {
			t.Fatal("no file")
		}
		g.Go(func() error { // in order, in pieces that divide nothing
			for off := int64(0); off < int64(len(want)); off += 777_777 {
				if err := checkRead(ctx, c, i, want, off, 777_777); err != nil {
					return err
				}
			}
			return nil
		})
		g.Go(func() error { // here and there
			r := rand.New(rand.NewPCG(uint64(n), 1))
			for range 200 {
				n := 1 + r.IntN(300_000)
				if err := checkRead(ctx, c, i, want, r.Int64N(int64(len(want))), n); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	status := k.workers["a"].Status()
	if status.SourceBytes != int64(len(want)) {
		t.Errorf("%d bytes left the bucket, the file has %d", status.SourceBytes, len(want))
	}
	for _, c := range clients {
		if s := c.Stats(); s.WorkerBytes != 0 || s.NearBytes < int64(len(want)) || s.Corrupt != 0 || s.Buffered != 0 {
			t.Errorf("%+v", s)
		}
		i, _ := c.Snapshot().Lookup("/small")
		if err := checkRead(ctx, c, i, content(8, ring.BlockSize), 0, ring.BlockSize); err != nil {
			t.Error(err)
		}
		if s := c.Stats(); s.WorkerBytes != ring.BlockSize {
			t.Errorf("%d bytes of a small file came over the network", s.WorkerBytes)
		}
	}
	// Whoever has closed the file gives it back, and so does one that ends.
	i, _ := clients[0].Snapshot().Lookup("/f")
	clients[0].Forget(i)
	eventually(t, "the first gives the file back", func() bool { return lentTo(clients[0]) == 0 })
	if n := lentTo(clients[1]); n != 1 {
		t.Errorf("%d files are lent to the other", n)
	}
	if err := checkRead(ctx, clients[0], i, want, 5, 100); err != nil {
		t.Error(err)
	}
	for _, c := range clients {
		c.Close()
	}
	if n := lentTo(clients[0]) + lentTo(clients[1]); n != 0 {
		t.Errorf("%d files are lent to clients that are closed", n)
	}
	k.stop("a")
	if n, stacks := ours(); n > 0 {
		t.Fatalf("%d goroutines left:\n%s", n, stacks)
	}
}

func TestPeekGivesWhatTheWorkerKeeps(t *testing.T) {
	ctx := testContext(t)
	want := content(6, 3*ring.BlockSize+9)
	k := overFolder(t, map[string][]byte{"f": want})
	k.start("a")
	k.settled()
	c := k.dial(nil)
	i, _ := c.Snapshot().Lookup("/f")
	if v := c.Peek(i, 0, make([]byte, 10)); v != nil {
		t.Fatal("bytes that nobody has asked for")
	}
	if err := checkRead(ctx, c, i, want, 0, len(want)); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct{ off, n int }{{0, 1}, {5, 1 << 20}, {ring.BlockSize - 7, 100}, {ring.BlockSize, 2 * ring.BlockSize}, {3*ring.BlockSize - 1, 10}} {
		p := make([]byte, r.n)
		v := c.Peek(i, int64(r.off), p)
		if v == nil {
			t.Fatalf("%d bytes at %d are not there", r.n, r.off)
		}
		if got := bytes.Join(v.Pieces, nil); !bytes.Equal(got, want[r.off:r.off+r.n]) {
			t.Errorf("%d bytes at %d are wrong", r.n, r.off)
		}
		v.Release()
	}
	if s := c.Stats(); s.WorkerBytes != 0 || s.Corrupt != 0 {
		t.Errorf("%+v", s)
	}
	c.Forget(i)
	if v := c.Peek(i, 0, make([]byte, 10)); v != nil {
		t.Error("bytes of a file that was given back")
	}
}

func lentTo(c *Client) int {
	c.nears.mu.Lock()
	defer c.nears.mu.Unlock()
	return c.nears.lent
}

func TestAFileThatNobodyReadsIsGivenBack(t *testing.T) {
	ctx := testContext(t)
	want := content(1, 2*ring.BlockSize)
	k := overFolder(t, map[string][]byte{"f": want})
	k.start("a")
	k.settled()
	c := k.dial(nil)
	c.timing.nearIdle = time.Millisecond
	begun := time.Now()
	var hours atomic.Int64
	c.now = func() time.Time { return begun.Add(time.Duration(hours.Load()) * time.Hour) }
	i, _ := c.Snapshot().Lookup("/f")
	for range 3 {
		if err := checkRead(ctx, c, i, want, ring.BlockSize-5, 10); err != nil {
			t.Fatal(err)
		}
		if n := lentTo(c); n != 1 {
			t.Errorf("%d files are lent", n)
		}
		hours.Add(1)
		eventually(t, "it is given back", func() bool { return lentTo(c) == 0 })
	}
	if s := c.Stats(); s.NearBytes != 30 || s.Corrupt != 0 {
		t.Errorf("%+v", s)
	}
}

// The worker that lends the file is stopped: the reader goes on with another, and comes back once it is there again.
func TestAReaderGoesOnWhenTheWorkerThatLendsTheFileIsGone(t *testing.T) {
	ctx := testContext(t)
	want := content(3, 4*ring.BlockSize+5)
	k := overFolder(t, map[string][]byte{"f": want})
	k.start("a", "b")
	k.settled()
	c := k.dial(nil)
	var far atomic.Int64
	c.now = func() time.Time { return time.Now().Add(time.Duration(far.Load())) } // before anybody reads
	i, _ := c.Snapshot().Lookup("/f")
	o, _ := c.Snapshot().Ring(i)
	owner := k.membership().Owners(o, 0, 1)[0].ID
	if err := checkRead(ctx, c, i, want, 0, 100); err != nil {
		t.Fatal(err)
	}
	if s := c.Stats(); s.NearBytes != 100 {
		t.Fatalf("%+v", s)
	}
	k.stop(owner)
	if err := checkRead(ctx, c, i, want, 0, len(want)); err != nil {
		t.Fatal(err)
	}
	if s := c.Stats(); s.WorkerBytes == 0 || s.Corrupt != 0 {
		t.Errorf("%+v", s)
	}
	k.start(owner)
	k.settled()
	eventually(t, "it is read where the worker keeps it again", func() bool {
		far.Add(int64(nearAgainMax))
		c.Forget(i)
		before := c.Stats().NearBytes
		if err := checkRead(ctx, c, i, want, 0, len(want)); err != nil {
			t.Fatal(err)
		}
		return c.Stats().NearBytes >= before+int64(len(want))
	})
}

func TestAFileThatChangedWhileItIsRead(t *testing.T) {
	ctx := testContext(t)
	want := content(3, 2*ring.BlockSize)
	k := overFolder(t, map[string][]byte{"f": want, "gone": want})
	k.start("a")
	k.settled()
	c := k.dial(nil)
	folder := k.mounts[0].URL[len("file://"):]
	for name, end := range map[string]func(path string) error{
		"f":    func(path string) error { return os.WriteFile(path, content(4, 2*ring.BlockSize), 0o600) },
		"gone": os.Remove,
	} {
		i, _ := c.Snapshot().Lookup("/" + name)
		if err := checkRead(ctx, c, i, want, 0, 1000); err != nil {
			t.Fatal(err)
		}
		if err := end(filepath.Join(folder, name)); err != nil {
			t.Fatal(err)
		}
		n, err := c.ReadAt(ctx, i, make([]byte, ring.BlockSize), ring.BlockSize)
		if n != 0 || !errors.Is(err, source.ErrChanged) && !errors.Is(err, source.ErrNotFound) {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
		if err := checkRead(ctx, c, i, want, 0, 1000); err != nil {
			t.Errorf("%s: what the tier holds: %v", name, err)
		}
	}
}

// Whatever a worker's socket does, the reader gets the file's bytes, over the network if it must.
func TestABadLoanIsReadOverTheNetwork(t *testing.T) {
	good := func(data []byte) func(r wire.Request) (wire.Reply, []byte) {
		return func(r wire.Request) (wire.Reply, []byte) {
			sums := checksum.All(data[r.Off:][:r.Length])
			return wire.Reply{Index: r.Index, Off: r.Off}, checksum.Encode(nil, sums)
		}
	}
	for name, test := range map[string]struct {
		file    func(data []byte) []byte // what is lent; nil: the file
		block   func(data []byte) func(r wire.Request) (wire.Reply, []byte)
		near    bool // it is read where it is
		corrupt int64
	}{
		"good": {block: good, near: true},
		"zeros": {block: good, corrupt: 1, file: func(data []byte) []byte {
			return make([]byte, len(data))
		}},
		"another file": {block: good, corrupt: 1, file: func(data []byte) []byte {
			return content(99, len(data))
		}},
		"a bad bit": {block: good, corrupt: 1, file: func(data []byte) []byte {
			p := append([]byte(nil), data...)
			p[ring.BlockSize+70_000] ^= 1
			return p
		}},
		"a short file": {block: good, file: func(data []byte) []byte { return data[:len(data)-1] }},
		"no answer":    {block: func([]byte) func(r wire.Request) (wire.Reply, []byte) { return nil }},
		"no sums": {block: func([]byte) func(r wire.Request) (wire.Reply, []byte) {
			return func(r wire.Request) (wire.Reply, []byte) { return wire.Reply{Index: r.Index, Off: r.Off}, nil }
		}},
		"changed in the bucket, and held elsewhere": {block: func([]byte) func(r wire.Request) (wire.Reply, []byte) {
			return func(wire.Request) (wire.Reply, []byte) {
				return wire.Reply{Status: wire.Changed}, []byte("etag differs")
			}
		}},
		"another block": {block: func(data []byte) func(r wire.Request) (wire.Reply, []byte) {
			return func(r wire.Request) (wire.Reply, []byte) {
				reply, p := good(data)(r)
				reply.Off += ring.BlockSize
				return reply, p
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := testContext(t)
			data := content(2, 2*ring.BlockSize+1)
			k := newTier(t, map[string][]byte{"f": data})
			k.start("a")
			lentData := data
			if test.file != nil {
				lentData = test.file(data)
			}
			path := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(path, lentData, 0o600); err != nil {
				t.Fatal(err)
			}
			var asked atomic.Int64
			l := lend(t, k.keys, func(r wire.Request) (*os.File, error) {
				asked.Add(1)
				if r.Flags != wire.FlagEarly {
					return nil, fmt.Errorf("flags %d: %w", r.Flags, source.ErrInvalid)
				}
				return os.Open(path)
			})
			l.block = test.block(data)
			k.worker("a").socket = l.path
			k.setMembers()
			if l.block == nil {
				k.timing.near = 50 * time.Millisecond
			}
			c := k.dial(nil)
			clock := time.Now()
			c.now = func() time.Time { return clock }
			i := k.index("f")
			for off := 0; off < len(data); off += 1 << 20 {
				if err := checkRead(ctx, c, i, data, int64(off), 1<<20); err != nil {
					t.Fatal(err)
				}
			}
			s := c.Stats()
			if test.near != (s.WorkerBytes == 0) || s.Corrupt < test.corrupt {
				t.Errorf("%+v", s)
			}
			if asked.Load() != 1 {
				t.Errorf("asked %d times for a file that cannot be read this way", asked.Load())
			}
			if !test.near {
				eventually(t, "it is given back", func() bool { return l.released.Load() == 1 })
			}
		})
	}
}

// What the worker has no room for is read over the network, block by block, and the rest where the worker keeps it.
func TestABlockThatTheWorkerDoesNotKeepIsReadOverTheNetwork(t *testing.T) {
	ctx := testContext(t)
	data := content(2, 4*ring.BlockSize+1)
	k := newTier(t, map[string][]byte{"f": data})
	k.start("a")
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	l := lend(t, k.keys, func(wire.Request) (*os.File, error) { return os.Open(path) })
	var full atomic.Bool
	var asked [5]atomic.Int64
	full.Store(true)
	l.block = func(r wire.Request) (wire.Reply, []byte) {
		block := r.Off / ring.BlockSize
		asked[block].Add(1)
		if full.Load() && block%2 == 1 {
			return wire.Reply{Status: wire.NotResident, Index: r.Index}, wire.Text("full")
		}
		return wire.Reply{Index: r.Index, Off: r.Off}, checksum.Encode(nil, checksum.All(data[r.Off:][:r.Length]))
	}
	k.worker("a").socket = l.path
	k.setMembers()
	c := k.dial(nil)
	begun := time.Now()
	var later atomic.Int64
	c.now = func() time.Time { return begun.Add(time.Duration(later.Load())) }
	i := k.index("f")
	for off := 0; off < len(data); off += 1 << 20 {
		if err := checkRead(ctx, c, i, data, int64(off), 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if s := c.Stats(); s.WorkerBytes != 2*ring.BlockSize || s.NearBytes != 2*ring.BlockSize+1 {
		t.Errorf("%+v", s)
	}
	for block := range asked {
		if n := asked[block].Load(); n != 1 {
			t.Errorf("asked %d times for block %d", n, block)
		}
	}
	// It is asked again when some time has passed: there may be room now, or somebody else has it there.
	full.Store(false)
	later.Store(int64(nearAgain))
	c.cache.forgetFile(i, int64(len(data)))
	if err := checkRead(ctx, c, i, data, 0, len(data)); err != nil {
		t.Fatal(err)
	}
	if s := c.Stats(); s.WorkerBytes != 2*ring.BlockSize || lentTo(c) != 1 {
		t.Errorf("%+v, %d files lent", s, lentTo(c))
	}
}

// A file beyond what the worker can lend is read all the same.
func TestAFileThatIsTooLargeToLend(t *testing.T) {
	ctx := testContext(t)
	want := content(5, 3*ring.BlockSize)
	k := overFolder(t, map[string][]byte{"f": want})
	k.memory = 3 * ring.BlockSize
	k.start("a")
	k.settled()
	c := k.dial(nil)
	i, _ := c.Snapshot().Lookup("/f")
	for range 2 {
		if err := checkRead(ctx, c, i, want, 0, len(want)); err != nil {
			t.Fatal(err)
		}
	}
	if s := c.Stats(); s.NearBytes != 0 || s.WorkerBytes == 0 {
		t.Errorf("%+v", s)
	}
}
