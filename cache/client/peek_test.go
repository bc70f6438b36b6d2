package client

import (
	"bytes"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
)

func TestPeekGivesWhatIsInMemoryAndKeepsItUntilRelease(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 9<<20+5), "other": content(2, 40<<20)})
	k.start("a")
	c := k.dial(func(c *Config) { c.BufferBytes = 16 << 20 })
	f, want := k.index("f"), k.data["f"]
	if v := c.Peek(f, 0, make([]byte, 1)); v != nil {
		t.Fatal("bytes that nobody has read")
	}
	if err := checkRead(ctx, c, f, want, 0, len(want)); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct{ off, n int }{{0, 1}, {5, 1 << 20}, {4<<20 - 7, 100}, {0, 8 << 20}, {8 << 20, 1<<20 + 5}, {9<<20 + 4, 1}} {
		v := c.Peek(f, int64(r.off), make([]byte, r.n))
		if v == nil {
			t.Fatalf("%d bytes at %d are not there", r.n, r.off)
		}
		if got := bytes.Join(v.Pieces, nil); !bytes.Equal(got, want[r.off:r.off+r.n]) {
			t.Fatalf("%d bytes at %d are wrong", r.n, r.off)
		}
		v.Release()
	}
	for _, r := range []struct{ off, n int }{{-1, 1}, {0, 0}, {9<<20 + 4, 2}, {9<<20 + 5, 1}, {0, 9 << 20}} {
		if v := c.Peek(f, int64(r.off), make([]byte, r.n)); v != nil {
			t.Fatalf("%d bytes at %d of a file of %d", r.n, r.off, len(want))
		}
	}
	for _, i := range []uint32{0, 1 << 30} {
		if v := c.Peek(i, 0, make([]byte, 1)); v != nil {
			t.Fatalf("node %d is no file", i)
		}
	}

	v := c.Peek(f, 1<<20, make([]byte, 5<<20))
	c.Forget(f)
	for off := int64(0); off < 40<<20; off += 1 << 20 {
		if err := checkRead(ctx, c, k.index("other"), k.data["other"], off, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(bytes.Join(v.Pieces, nil), want[1<<20:6<<20]) {
		t.Fatal("bytes changed before they were given back")
	}
	v.Release()
	if v := c.Peek(f, 1<<20, make([]byte, 1)); v != nil {
		t.Fatal("a forgotten file is still there after its last view")
	}
	c.Close()
	if v := c.Peek(k.index("other"), 0, make([]byte, 1)); v != nil {
		t.Fatal("bytes of a closed client")
	}
}

func TestPeekIsAReadToReadAhead(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 40<<20)})
	k.start("a")
	c := k.dial(nil)
	f, peeks := k.index("f"), 0
	for off := int64(0); off < 40<<20; off += 1 << 20 {
		if v := c.Peek(f, off, make([]byte, 1<<20)); v != nil {
			peeks++
			if !bytes.Equal(bytes.Join(v.Pieces, nil), k.data["f"][off:off+1<<20]) {
				t.Fatal("wrong bytes")
			}
			v.Release()
		} else if err := checkRead(ctx, c, f, k.data["f"], off, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	// Of each block at most one read had to wait.
	if s := c.Stats(); peeks < 30 || s.ReadAhead < 9 || s.WorkerBytes != 40<<20 {
		t.Fatalf("%d of 40 reads found their bytes: %+v", peeks, s)
	}
}

func TestMemoryThatWasReadIsUsedAgainBeforeMoreIsTaken(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 200<<20)})
	k.start("a")
	const budget = 160 << 20
	c := k.dial(func(c *Config) { c.BufferBytes = budget })
	for off := int64(0); off < 200<<20; off += 1 << 20 {
		if err := checkRead(ctx, c, k.index("f"), k.data["f"], off, 1<<20); err != nil {
			t.Fatal(err)
		}
		if taken, pooled := c.cache.usage(); taken+pooled > budget/4+(maxWindow+2)*ring.BlockSize {
			t.Fatalf("%d bytes of memory for one reader", taken+pooled)
		}
	}
	if s := c.Stats(); s.WorkerBytes != 200<<20 {
		t.Fatalf("%d bytes received", s.WorkerBytes)
	}
}
