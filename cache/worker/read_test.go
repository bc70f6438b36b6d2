package worker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

func TestReadFilesOfEverySize(t *testing.T) {
	noGoroutines(t)
	files := map[string][]byte{}
	for i, n := range []int64{1, 4095, checksum.Size, checksum.Size + 1, ring.BlockSize - 1, ring.BlockSize, ring.BlockSize + 1, 2*ring.BlockSize + 3*checksum.Size + 5} {
		files[fmt.Sprintf("d/f%d", i)] = content(n, byte(i))
	}
	// Holes at the end, within it and in whole blocks are zeros that are in the object.
	sparse := make([]byte, 4*ring.BlockSize+checksum.Size+1)
	copy(sparse, content(5000, 50))
	copy(sparse[2*ring.BlockSize+checksum.Size-7:], content(5000, 51))
	files["d/sparse"] = sparse
	tr := newTier(t, files)
	tr.start(1)
	snap := tr.snapshot()
	c := tr.dial(0)
	for round := range 2 { // cold and resident
		for name, want := range files {
			got, err := c.file(index(t, snap, "/"+name), int64(len(want)), 0)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("round %d, %s: %d bytes, %v; want %d", round, name, len(got), err, len(want))
			}
		}
	}
	// Ranges within a block.
	big := files["d/f7"]
	i := index(t, snap, "/d/f7")
	for _, r := range [][2]int{{0, checksum.Size}, {ring.BlockSize + checksum.Size, 2 * checksum.Size}, {2*ring.BlockSize + 3*checksum.Size, 5}} {
		got, err := c.read(i, int64(r[0]), r[1], 0)
		if err != nil || !bytes.Equal(got, big[r[0]:r[0]+r[1]]) {
			t.Errorf("range %v: %v", r, err)
		}
	}
	s := tr.workers[0].Status()
	var total int64
	for _, p := range files {
		total += int64(len(p))
	}
	if s.SourceBytes != total {
		t.Errorf("%d bytes came from the source, want %d", s.SourceBytes, total)
	}
}

// TestHostileRequestsAreInvalid sends requests that decode and make no sense.
func TestHostileRequestsAreInvalid(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(ring.BlockSize+100, 1), "d/empty": nil})
	tr.start(1)
	snap := tr.snapshot()
	f, dir, empty := index(t, snap, "/f"), index(t, snap, "/d"), index(t, snap, "/d/empty")
	c := tr.dial(0)
	eventually(t, "the worker has listed the bucket", func() error {
		_, _, err := c.ask(wire.Request{Op: wire.OpSnapshot})
		return err
	})
	for name, req := range map[string]wire.Request{
		"directory":           {Op: wire.OpRead, Index: dir, Length: 1},
		"root":                {Op: wire.OpRead, Index: 0, Length: 1},
		"index out of range":  {Op: wire.OpRead, Index: math.MaxUint32, Length: 1},
		"empty file":          {Op: wire.OpRead, Index: empty, Length: 1},
		"no length":           {Op: wire.OpRead, Index: f},
		"negative length":     {Op: wire.OpRead, Index: f, Length: -1},
		"least length":        {Op: wire.OpRead, Index: f, Length: math.MinInt32},
		"huge length":         {Op: wire.OpRead, Index: f, Length: math.MaxInt32},
		"more than a block":   {Op: wire.OpRead, Index: f, Length: ring.BlockSize + 100},
		"negative offset":     {Op: wire.OpRead, Index: f, Off: -checksum.Size, Length: checksum.Size},
		"offset at the end":   {Op: wire.OpRead, Index: f, Off: ring.BlockSize + 100, Length: 1},
		"offset overflow":     {Op: wire.OpRead, Index: f, Off: math.MaxInt64 - 10, Length: 100},
		"two blocks":          {Op: wire.OpRead, Index: f, Off: ring.BlockSize - checksum.Size, Length: checksum.Size + 100},
		"misaligned start":    {Op: wire.OpRead, Index: f, Off: 1, Length: checksum.Size - 1},
		"misaligned end":      {Op: wire.OpRead, Index: f, Length: 1},
		"beyond the end":      {Op: wire.OpRead, Index: f, Off: ring.BlockSize, Length: 101},
		"unknown operation":   {Op: 99},
		"lease over tcp":      {Op: wire.OpLease, Index: f},
		"hand over negative":  {Op: wire.OpHandOver, Index: f, Off: -1, Length: 1},
		"hand over beyond":    {Op: wire.OpHandOver, Index: f, Off: 1 << 40, Length: 1},
		"resident directory":  {Op: wire.OpResident, Index: dir},
		"snapshot negative":   {Op: wire.OpSnapshot, Off: -1},
		"snapshot beyond":     {Op: wire.OpSnapshot, Off: 1 << 40, Length: 1},
		"snapshot huge piece": {Op: wire.OpSnapshot, Length: math.MaxInt32},
	} {
		if _, _, err := c.ask(req); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := c.ask(wire.Request{Op: wire.OpRead, Snapshot: wire.Digest{1}, Index: f, Length: 1}); !errors.Is(err, wire.ErrUnknownSnapshot) {
		t.Errorf("unknown snapshot: %v", err)
	}
	if gets, _ := tr.gates[0].counts(); gets != 0 {
		t.Errorf("hostile requests reached the source %d times", gets)
	}
	// A frame that does not decode ends its own connection only.
	bad := tr.dial(0)
	bad.Write(bytes.Repeat([]byte{0x55}, wire.RequestSize))
	bad.SetReadDeadline(time.Now().Add(patience))
	if _, err := bad.r.ReadByte(); err != io.EOF {
		t.Errorf("garbage: %v", err)
	}
	if _, _, err := c.ask(wire.Request{Op: wire.OpPing}); err != nil {
		t.Errorf("another connection: %v", err)
	}
}

func TestOneReaderPerBlockGoesToTheSource(t *testing.T) {
	const size = 3*ring.BlockSize + 17
	tr := newTier(t, map[string][]byte{"f": content(size, 1)})
	tr.start(1)
	snap := tr.snapshot()
	var wg sync.WaitGroup
	for range 8 {
		c := tr.dial(0)
		wg.Go(func() {
			got, err := c.file(index(t, snap, "/f"), size, 0)
			if err != nil || !bytes.Equal(got, content(size, 1)) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	wg.Wait()
	if s := tr.workers[0].Status(); s.SourceBytes != size {
		t.Errorf("%d bytes left the source, want %d", s.SourceBytes, size)
	}
}

func TestNotOwnerAndReadThrough(t *testing.T) {
	want := content(ring.BlockSize+5, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(2)
	snap := tr.snapshot()
	i := index(t, snap, "/f")
	other := tr.owners(snap, "/f", 0)[1]
	c := tr.dial(other)
	if _, err := c.read(i, 0, ring.BlockSize, 0); !errors.Is(err, wire.ErrNotOwner) {
		t.Fatalf("not the owner: %v", err)
	}
	if _, err := c.read(i, 0, ring.BlockSize, wire.FlagResidentOnly); !errors.Is(err, wire.ErrNotResident) {
		t.Fatalf("not resident: %v", err)
	}
	if gets, _ := tr.gates[other].counts(); gets != 0 {
		t.Fatalf("it went to the source %d times", gets)
	}
	if p, err := c.read(i, 0, ring.BlockSize, wire.FlagReadThrough); err != nil || !bytes.Equal(p, want[:ring.BlockSize]) {
		t.Fatalf("read through: %v", err)
	}
	// What it holds, it serves.
	if p, err := c.read(i, 0, ring.BlockSize, 0); err != nil || !bytes.Equal(p, want[:ring.BlockSize]) {
		t.Fatalf("resident though not owned: %v", err)
	}
	rep, bitmap, err := c.ask(wire.Request{Op: wire.OpResident, Index: i})
	if err != nil || len(bitmap) != 1 || bitmap[0] != 1 || rep.Epoch != 1 {
		t.Errorf("bitmap %v at epoch %d, %v", bitmap, rep.Epoch, err)
	}
}

func TestCopiesComeFromTheFirstOwner(t *testing.T) {
	want := content(2*ring.BlockSize, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.config = func(_ int, c *Config) { c.Copies = 2 }
	tr.start(3)
	snap := tr.snapshot()
	i, owners := index(t, snap, "/f"), tr.owners(snap, "/f", 0)
	if p, err := tr.dial(owners[1]).file(i, int64(len(want)), 0); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("second owner: %v", err)
	}
	for place, wantBytes := range []int64{int64(len(want)), 0, 0} {
		if s := tr.workers[owners[place]].Status(); s.SourceBytes != wantBytes {
			t.Errorf("owner %d read %d bytes from the bucket, want %d", place, s.SourceBytes, wantBytes)
		}
	}
	for place, want := range []int64{0, int64(len(want))} { // what the first sent to the second went to no reader
		eventually(t, "served bytes are counted", func() error {
			if got := tr.workers[owners[place]].Status().ServedBytes; got != want {
				return fmt.Errorf("owner %d sent %d bytes to readers, want %d", place, got, want)
			}
			return nil
		})
	}
	if _, err := tr.dial(owners[2]).read(i, 0, ring.BlockSize, 0); !errors.Is(err, wire.ErrNotOwner) {
		t.Errorf("third: %v", err)
	}
	// Both hold it now: the first may go.
	tr.stop(owners[0])
	if p, err := tr.dial(owners[1]).file(i, int64(len(want)), 0); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("second owner alone: %v", err)
	}
}

func TestCopyFallsBackToTheBucketWhenTheFirstOwnerIsDead(t *testing.T) {
	want := content(ring.BlockSize, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.config = func(_ int, c *Config) { c.Copies = 2 }
	tr.start(2)
	snap := tr.snapshot()
	i, owners := index(t, snap, "/f"), tr.owners(snap, "/f", 0)
	tr.stop(owners[0])
	if p, err := tr.dial(owners[1]).read(i, 0, len(want), 0); err != nil || !bytes.Equal(p, want) {
		t.Fatal(err)
	}
}

// TestPeersThatDisagreeNeverWaitForEachOther: two workers with different lists each take the other for
// the earlier owner of the same block.
func TestPeersThatDisagreeNeverWaitForEachOther(t *testing.T) {
	want := content(100, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(2)
	snap := tr.snapshot()
	i := index(t, snap, "/f")
	w := tr.workers[0]
	s, _ := w.snapshots.get(wire.Digest{})
	f, _ := s.file(i)
	s.release()
	w.asking.add(blockKey{f.ring.ID, 0})
	if _, err := tr.dial(0).read(i, 0, 100, wire.FlagPeer); !errors.Is(err, wire.ErrNotResident) {
		t.Fatalf("a peer's question about a block that is asked for elsewhere: %v", err)
	}
	w.asking.remove(blockKey{f.ring.ID, 0})
	if p, err := tr.dial(0).read(i, 0, 100, wire.FlagPeer); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("afterwards: %v", err)
	}
}

// TestAStalledBucketLeavesPingsAndResidentBlocks: the worker answers while the source does not.
func TestAStalledBucketLeavesPingsAndResidentBlocks(t *testing.T) {
	noGoroutines(t)
	tr := newTier(t, map[string][]byte{"warm": content(1000, 1), "cold": content(1000, 2)})
	tr.start(1)
	snap := tr.snapshot()
	c := tr.dial(0)
	warm, cold := index(t, snap, "/warm"), index(t, snap, "/cold")
	if _, err := c.read(warm, 0, 1000, 0); err != nil {
		t.Fatal(err)
	}
	stalled, free := make(chan struct{}), make(chan struct{})
	var once sync.Once
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		once.Do(func() { close(stalled) })
		select {
		case <-free:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	// Both on one connection: the answer to the stalled read comes last.
	c.SetDeadline(time.Now().Add(patience))
	c.Write(wire.AppendRequest(nil, wire.Request{Op: wire.OpRead, ID: 1000, Index: cold, Length: 1000}))
	<-stalled
	for range 3 {
		if _, _, err := c.ask(wire.Request{Op: wire.OpPing}); err != nil {
			t.Fatalf("ping: %v", err)
		}
	}
	if _, err := c.read(warm, 0, 1000, 0); err != nil {
		t.Fatalf("resident block: %v", err)
	}
	close(free)
	rep, p, err := wire.ReadFrame(c.r)
	if err != nil || rep.ID != 1000 || rep.Status != wire.OK || !bytes.Equal(p, content(1000, 2)) {
		t.Fatalf("the stalled read: %+v, %v", rep, err)
	}
	// A reader that leaves takes its fill with it.
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error { <-ctx.Done(); return ctx.Err() })
	tr.workers[0].store.Drop(mustRing(t, tr, cold))
	leaving := tr.dial(0)
	leaving.Write(wire.AppendRequest(nil, wire.Request{Op: wire.OpRead, ID: 1, Index: cold, Length: 1000}))
	eventually(t, "the fill began", func() error {
		if gets, _ := tr.gates[0].counts(); gets < 3 {
			return fmt.Errorf("%d requests", gets)
		}
		return nil
	})
	leaving.Close()
	eventually(t, "the fill ended with its reader", func() error {
		if n := len(tr.workers[0].requests); n > 0 {
			return fmt.Errorf("%d requests under way", n)
		}
		return nil
	})
}

func mustRing(t testing.TB, tr *tier, i uint32) ring.Object {
	t.Helper()
	r, ok := tr.snapshot().Ring(i)
	if !ok {
		t.Fatal("no such file")
	}
	return r
}

// TestAReadThatWaitsTooLongIsLate: WaitMillis bounds the answer.
func TestAReadThatWaitsTooLongIsLate(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error { <-ctx.Done(); return ctx.Err() })
	_, _, err := tr.dial(0).ask(wire.Request{Op: wire.OpRead, Index: i, Length: 1000, WaitMillis: 1000})
	if !errors.Is(err, wire.ErrLate) {
		t.Fatal(err)
	}
}

func TestASlowReaderDoesNotHoldUpOthers(t *testing.T) {
	const size = 8 * ring.BlockSize
	tr := newTier(t, map[string][]byte{"f": content(size, 1)})
	tr.config = func(_ int, c *Config) { c.Memory = ring.BlockSize + 1<<20 } // most blocks are served from heap
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	// It asks for everything, many times over, and takes nothing.
	slow := tr.dial(0)
	slow.Conn.(*net.TCPConn).SetReadBuffer(4096)
	var b []byte
	for n := range 2 * maxConnRequests {
		b = wire.AppendRequest(b, wire.Request{Op: wire.OpRead, ID: uint32(n), Index: i, Off: blockOff(int64(n % 8)), Length: ring.BlockSize})
	}
	go slow.Write(b) // the worker may stop reading: its answers are not taken
	eventually(t, "its requests are under way", func() error {
		if n := len(tr.workers[0].requests); n < 8 {
			return fmt.Errorf("%d requests", n)
		}
		return nil
	})
	got, err := tr.dial(0).file(i, size, 0)
	if err != nil || !bytes.Equal(got, content(size, 1)) {
		t.Fatalf("another reader: %d bytes, %v", len(got), err)
	}
}

// takesLittle is a connection whose peer takes so much in the time of a deadline, and nothing once it has had most.
type takesLittle struct {
	net.Conn
	little, most int
	got          []byte
	over         bool // its deadline
}

func (c *takesLittle) SetWriteDeadline(time.Time) error { c.over = false; return nil }
func (c *takesLittle) Close() error                     { return nil }
func (c *takesLittle) RemoteAddr() net.Addr             { return &net.TCPAddr{} }

func (c *takesLittle) Write(p []byte) (int, error) {
	if c.over {
		return 0, os.ErrDeadlineExceeded
	}
	n := min(c.little, len(p), c.most-len(c.got))
	c.got = append(c.got, p[:n]...)
	if n < len(p) {
		c.over = true
		return n, os.ErrDeadlineExceeded
	}
	return n, nil
}

// TestAReaderThatTakesLittleIsNotCutOff: only one that takes nothing is.
func TestAReaderThatTakesLittleIsNotCutOff(t *testing.T) {
	want := content(ring.BlockSize, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	w := tr.workers[0]
	i := index(t, tr.snapshot(), "/f")
	answer := func(to net.Conn) error {
		c := &conn{Conn: to, worker: w, cancel: func() {}, turn: make(chan struct{}, 1), budget: newBudget(w.connBudget), pins: newBudget(connPins)}
		return c.read(context.Background(), wire.Request{Op: wire.OpRead, Index: i, Length: ring.BlockSize})
	}
	to := &takesLittle{little: 200_000, most: math.MaxInt}
	if err := answer(to); err != nil {
		t.Fatal(err)
	}
	if _, p, err := wire.ReadFrame(bufio.NewReader(bytes.NewReader(to.got))); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("%d bytes, %v", len(p), err)
	}
	if err := answer(&takesLittle{little: 200_000, most: ring.BlockSize / 2}); !errors.Is(err, errWrite) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("one that takes nothing any more: %v", err)
	}
}

// TestASlowReaderPinsLittle: what waits to be sent on one connection is bounded, the rest may be evicted.
func TestASlowReaderPinsLittle(t *testing.T) {
	const blocks = connPins/ring.BlockSize + 1
	tr := newTier(t, map[string][]byte{"f": content(blocks*ring.BlockSize, 1)})
	tr.start(1)
	w := tr.workers[0]
	i := index(t, tr.snapshot(), "/f")
	if _, err := tr.dial(0).file(i, blocks*ring.BlockSize, 0); err != nil {
		t.Fatal(err)
	}
	snap, f, err := w.resolve(wire.Request{Index: i})
	if err != nil {
		t.Fatal(err)
	}
	snap.release()
	c := &conn{worker: w, budget: newBudget(w.connBudget), pins: newBudget(connPins)}
	var release []func()
	for block := range int64(blocks - 1) {
		b, done, unpin, err := c.acquire(context.Background(), f, block, 0)
		if err != nil {
			t.Fatal(err)
		}
		release = append(release, func() { b.Release(); done(); unpin() })
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		for c.pins.s.TryAcquire(0) && ctx.Err() == nil { // not while somebody waits
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, _, _, err := c.acquire(ctx, f, blocks-1, 0); !errors.Is(err, wire.ErrOverloaded) {
		t.Fatalf("one more: %v", err)
	}
	<-waited
	release[0]()
	b, done, unpin, err := c.acquire(context.Background(), f, blocks-1, 0)
	if err != nil {
		t.Fatal(err)
	}
	release[0] = func() { b.Release(); done(); unpin() }
	for _, r := range release {
		r()
	}
}

// takesNothing is a connection whose peer takes nothing until it is closed.
type takesNothing struct {
	net.Conn
	asked  chan<- struct{}
	closed <-chan struct{}
}

func (c *takesNothing) SetWriteDeadline(time.Time) error { return nil }
func (c *takesNothing) Close() error                     { return nil }
func (c *takesNothing) RemoteAddr() net.Addr             { return &net.TCPAddr{} }

func (c *takesNothing) Write([]byte) (int, error) {
	c.asked <- struct{}{}
	<-c.closed
	return 0, net.ErrClosed
}

// TestACrowdOfSlowReadersTakesLittleHeap, and another reader has its answer meanwhile.
func TestACrowdOfSlowReadersTakesLittleHeap(t *testing.T) {
	const readers = 300
	want := content(ring.BlockSize, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	w := tr.workers[0]
	i := index(t, tr.snapshot(), "/f")
	if _, err := tr.dial(0).file(i, ring.BlockSize, 0); err != nil {
		t.Fatal(err)
	}
	heap := func() uint64 {
		runtime.GC()
		runtime.GC() // what pools keep goes with the second
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	asked, closed := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(closed)
	for range readers {
		c := &conn{
			Conn: &takesNothing{asked: asked, closed: closed}, worker: w, cancel: func() {}, turn: make(chan struct{}, 1),
			budget: newBudget(w.connBudget), pins: newBudget(connPins),
		}
		wg.Go(func() {
			if err := c.read(context.Background(), wire.Request{Op: wire.OpRead, Index: i, Length: ring.BlockSize}); !errors.Is(err, errWrite) {
				t.Error(err)
			}
		})
	}
	for range readers {
		<-asked
	}
	if grown := int64(heap() - before); grown > 2*(maxChunks*chunkSize+readers*smallChunk) {
		t.Errorf("%d readers that take nothing hold %d MiB of heap", readers, grown>>20)
	}
	if p, err := tr.dial(0).file(i, ring.BlockSize, 0); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("another reader: %d bytes, %v", len(p), err)
	}
}

// TestTooManyRequestsOnOneConnection is answered, not queued without end.
func TestTooManyRequestsOnOneConnection(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	free := make(chan struct{})
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		select {
		case <-free:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	c := tr.dial(0)
	c.SetDeadline(time.Now().Add(patience))
	for n := range uint32(maxConnRequests + 1) {
		c.Write(wire.AppendRequest(nil, wire.Request{Op: wire.OpRead, ID: n, Index: i, Length: 1000}))
	}
	rep, _, err := wire.ReadFrame(c.r)
	if err != nil || rep.Status != wire.Overloaded || rep.ID != maxConnRequests {
		t.Fatalf("%+v, %v", rep, err)
	}
	close(free)
	for range maxConnRequests {
		if rep, _, err := wire.ReadFrame(c.r); err != nil || rep.Status != wire.OK {
			t.Fatalf("%+v, %v", rep, err)
		}
	}
}

func TestAChangedObjectIsChangedNeverAMixture(t *testing.T) {
	want := content(2*ring.BlockSize, 1)
	tr := newTier(t, map[string][]byte{"f": want, "g": want})
	tr.start(1)
	snap := tr.snapshot()
	c := tr.dial(0)
	f, g := index(t, snap, "/f"), index(t, snap, "/g")
	if _, err := c.read(f, 0, ring.BlockSize, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tr.root, "f"), content(2*ring.BlockSize, 9), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(tr.root, "g")); err != nil {
		t.Fatal(err)
	}
	if p, err := c.read(f, 0, ring.BlockSize, 0); err != nil || !bytes.Equal(p, want[:ring.BlockSize]) {
		t.Errorf("what is held of the version is served: %v", err)
	}
	if _, err := c.read(f, ring.BlockSize, ring.BlockSize, 0); !errors.Is(err, source.ErrChanged) || !strings.Contains(err.Error(), "/f") {
		t.Errorf("overwritten: %v", err)
	}
	if _, err := c.read(g, 0, ring.BlockSize, 0); !errors.Is(err, source.ErrNotFound) && !errors.Is(err, source.ErrChanged) {
		t.Errorf("deleted: %v", err)
	}
}

// TestBitsFlippedInTheStoreAreRefetched: the receiver notices, asks again with FlagVerify, and gets the
// right bytes.
func TestBitsFlippedInTheStoreAreRefetched(t *testing.T) {
	want := content(ring.BlockSize+1000, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.config = func(_ int, c *Config) { c.ScrubBytesPerSecond = -1 }
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	c := tr.dial(0)
	if _, err := c.file(i, int64(len(want)), 0); err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(tr.dir, "w0"), int64(len(want)), 70000)
	_, err := c.read(i, 0, ring.BlockSize, 0)
	if !errors.Is(err, wire.ErrCorrupt) {
		t.Fatalf("the receiver did not notice: %v", err)
	}
	p, err := c.read(i, 0, ring.BlockSize, wire.FlagVerify)
	if err != nil || !bytes.Equal(p, want[:ring.BlockSize]) {
		t.Fatalf("asked to verify: %v", err)
	}
	if s := tr.workers[0].Status(); s.Refetched != 1 {
		t.Errorf("%d blocks counted as refetched", s.Refetched)
	}
	if p, err := c.file(i, int64(len(want)), 0); err != nil || !bytes.Equal(p, want) {
		t.Errorf("afterwards: %v", err)
	}
}

// flip inverts a bit in the store's file of the given length.
func flip(t testing.TB, dir string, size, off int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || fi.Size() != size || e.IsDir() {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dir, e.Name()), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, off); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x10
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("the store has no file of %d bytes", size)
}

func TestKeysRotate(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(10, 1)})
	tr.start(1)
	tr.snapshot()
	old, next := tr.keys, wire.GenerateKeys()
	i := index(t, tr.snapshot(), "/f")
	before := dial(t, tr.workers[0], old.Read[0])
	socket := tr.receive(0)
	try := func(key wire.Key) error {
		c, err := net.Dial("tcp", tr.workers[0].Addr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		return wire.ClientHandshake(context.Background(), c, dataset, wire.RoleRead, key)
	}
	both := next
	both.Read = append(both.Read, old.Read...)
	both.Control = append(both.Control, old.Control...)
	if err := wire.WriteKeys(filepath.Join(tr.dir, "keys"), both); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new key works", func() error { return try(next.Read[0]) })
	if err := try(old.Read[0]); err != nil {
		t.Errorf("the old key during the rotation: %v", err)
	}
	if _, err := before.read(i, 0, 10, 0); err != nil {
		t.Errorf("a connection of the old key during the rotation: %v", err)
	}
	during := dial(t, tr.workers[0], next.Read[0])
	if err := wire.WriteKeys(filepath.Join(tr.dir, "keys"), next); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old key is refused", func() error {
		if err := try(old.Read[0]); !errors.Is(err, wire.ErrUnauthorized) {
			return fmt.Errorf("got %v", err)
		}
		return nil
	})
	if err := try(wire.GenerateKeys().Read[0]); !errors.Is(err, wire.ErrUnauthorized) {
		t.Errorf("a wrong key: %v", err)
	}
	// A key that was taken away serves on nowhere.
	eventually(t, "a connection that the old key opened ends", func() error {
		if _, err := before.read(i, 0, 10, 0); err == nil {
			return errors.New("it serves")
		}
		return nil
	})
	eventually(t, "the old key leases nothing any more", func() error {
		if _, _, err := socket.ask(wire.Request{Op: wire.OpLease, Index: i}); !errors.Is(err, source.ErrDenied) {
			return fmt.Errorf("got %v", err)
		}
		return nil
	})
	if _, err := during.read(i, 0, 10, 0); err != nil {
		t.Errorf("a connection of the new key: %v", err)
	}
}

// TestAFileCutShortInTheStoresFolderCostsOneConnection: somebody truncated it; it is found out and fetched again.
func TestAFileCutShortInTheStoresFolderCostsOneConnection(t *testing.T) {
	const size = 3 * chunkSize
	want := content(size, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	snap := tr.snapshot()
	i := index(t, snap, "/f")
	if _, err := tr.dial(0).read(i, 0, size, 0); err != nil {
		t.Fatal(err)
	}
	r, _ := snap.Ring(i)
	if err := os.Truncate(filepath.Join(tr.configOf(0).Dir, hex.EncodeToString(r.ID[:])), chunkSize+10); err != nil {
		t.Fatal(err)
	}
	if p, err := tr.dial(0).read(i, 0, size, 0); err == nil && !bytes.Equal(p, want) {
		t.Fatal("wrong bytes")
	}
	if p, err := tr.dial(0).read(i, 0, size, 0); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("it was not fetched again: %v", err)
	}
}

func TestConnectionsAreAsManyAsMemoryAndDescriptorsAllow(t *testing.T) {
	for _, c := range []struct {
		memory      int64
		descriptors uint64
		want        int
	}{
		{64 << 20, 1 << 20, minConns},
		{24 << 30, 1 << 20, 12 << 10},
		{1 << 40, unix.RLIM_INFINITY, maxConns},
		{1 << 40, 1024, 512},
	} {
		if n := connLimit(c.memory, c.descriptors); n != c.want {
			t.Errorf("%d with a cache of %d bytes and %d descriptors, want %d", n, c.memory, c.descriptors, c.want)
		}
	}
}
