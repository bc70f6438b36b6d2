package client

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// mapping returns what the kernel tells of the mapping that the bytes begin in.
func mapping(t *testing.T, p []byte) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	at, found := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), false
	for line := range strings.Lines(string(text)) {
		var from, to uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 {
			found = from <= at && at < to
		} else if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && found {
			return flags
		}
	}
	t.Fatalf("no mapping has the address %x", at)
	return ""
}

func TestBlocksAskForHugePages(t *testing.T) {
	if _, err := os.Stat("/sys/kernel/mm/transparent_hugepage"); err != nil {
		t.Skip("the kernel has no transparent huge pages")
	}
	b := newBlocks(4*ring.BlockSize, NewBuffers(4*ring.BlockSize))
	for range 3 {
		p, _, ok := b.spare(ring.BlockSize)
		if !ok {
			t.Fatal("no buffer")
		}
		for _, part := range [][]byte{p, p[len(p)/2:], p[len(p)-1:]} {
			if flags := mapping(t, part); !strings.Contains(flags, " hg") {
				t.Errorf("a block's memory has the flags %s", flags)
			}
		}
		for i := range p {
			if p[i] != 0 {
				t.Fatalf("byte %d of fresh memory is %d", i, p[i])
			}
			p[i] = 1
		}
	}
	if p := fresh(ring.BlockSize / 2); len(p) != ring.BlockSize/2 {
		t.Errorf("%d bytes", len(p))
	}
}

// rested waits until the client has no more memory than so much.
func rested(t *testing.T, c *Client, most int64) {
	t.Helper()
	for end := time.Now().Add(testDeadline); ; time.Sleep(5 * time.Millisecond) {
		taken, pooled := c.cache.usage()
		if taken+pooled <= most {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d bytes in use and %d for reuse with nobody reading", taken, pooled)
		}
	}
}

func TestMemoryIsGivenBackWhenNobodyReads(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 40<<20)})
	k.timing.rest = 20 * time.Millisecond
	k.start("a")
	c := k.dial(nil)
	f := k.index("f")
	readOn := func(to int64) {
		t.Helper()
		for off := int64(0); off < to; off += 1 << 20 {
			if err := checkRead(ctx, c, f, k.data["f"], off, 1<<20); err != nil {
				t.Fatal(err)
			}
		}
	}
	readOn(20 << 20) // what was read, and what was read ahead
	rested(t, c, 0)

	// What somebody still looks at stays, however long.
	readOn(1 << 20)
	v := c.Peek(f, 0, make([]byte, 1<<20))
	for ; v == nil; v = c.Peek(f, 0, make([]byte, 1<<20)) { // given back right before
		readOn(1 << 20)
	}
	rested(t, c, ring.BlockSize)
	time.Sleep(3 * k.timing.rest)
	if taken, _ := c.cache.usage(); taken != ring.BlockSize {
		t.Fatalf("%d bytes with one block in use", taken)
	}
	if !bytes.Equal(bytes.Join(v.Pieces, nil), k.data["f"][:1<<20]) {
		t.Fatal("wrong bytes")
	}
	v.Release()
	rested(t, c, 0)

	readOn(40 << 20)
	if s := c.Stats(); s.WorkerBytes < 40<<20 {
		t.Fatalf("%+v", s)
	}
}

func TestRestLeavesWhatIsInUse(t *testing.T) {
	b := newBlocks(8*ring.BlockSize, NewBuffers(8*ring.BlockSize))
	add := func(block int64, ahead *stream) *extent {
		e, made := b.add(t.Context(), blockKey{1, block}, 0, 1, checksum.Size, ahead)
		if !made {
			t.Fatal("no room")
		}
		return e
	}
	arrive := func(e *extent) {
		b.finish(e, nil)
		b.release(e) // the fetch's
	}
	there := func(block int64) bool { return b.holds(blockKey{1, block}, 0, 1) }
	rest := func() {
		b.rest()
		b.rest()
		b.rest()
	}

	// A reader waits for the first block; the second was read ahead for it.
	e := add(0, nil)
	arrive(add(1, &stream{}))
	if rest(); !there(0) || !there(1) {
		t.Fatal("what a reader that waits will want is gone")
	}
	arrive(e)
	if b.rest(); !there(0) || !there(1) {
		t.Fatal("gone, though one came since")
	}
	// The reader holds the first one.
	if rest(); !there(0) || e.buf == nil || there(1) {
		t.Fatal("what a reader holds is gone, or what nobody came for is not")
	}
	if taken, _ := b.usage(); taken != checksum.Size {
		t.Fatalf("%d bytes", taken)
	}
	b.release(e)
	for range 5 {
		e := b.find(blockKey{1, 0}, 0, 1)
		if e == nil {
			t.Fatal("gone, though it was used")
		}
		b.release(e)
		b.rest()
	}
	if n := b.rest(); n != checksum.Size || there(0) {
		t.Fatalf("%d bytes went", n)
	}
	if taken, pooled := b.usage(); taken != 0 || pooled != 0 || len(b.extents) != 0 || b.coming != 0 || b.ahead != 0 || b.spentBy != 0 {
		t.Fatalf("%d bytes in use, %d for reuse", taken, pooled)
	}
}
