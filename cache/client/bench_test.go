package client

import (
	"math/rand/v2"
	"testing"
)

// Over loopback, from a worker that serves out of its heap: what the protocol and the client cost.
func benchClient(b *testing.B, size int) (*tier, *Client, uint32) {
	k := newTier(b, map[string][]byte{"f": content(1, size)})
	k.start("a")
	c := k.dial(func(c *Config) { c.BufferBytes = 64 << 20 })
	return k, c, k.index("f")
}

func BenchmarkSequentialReads(b *testing.B) {
	const size = 256 << 20
	_, c, i := benchClient(b, size)
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	off := int64(0)
	for b.Loop() {
		if _, err := c.ReadAt(b.Context(), i, p, off); err != nil {
			b.Fatal(err)
		}
		off = (off + int64(len(p))) % size
	}
}

func BenchmarkRandomSmallReads(b *testing.B) {
	const size = 256 << 20
	_, c, i := benchClient(b, size)
	p := make([]byte, 4096)
	rnd := rand.New(rand.NewPCG(1, 1))
	for b.Loop() {
		if _, err := c.ReadAt(b.Context(), i, p, rnd.Int64N(size-4096)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadsFromMemory(b *testing.B) {
	_, c, i := benchClient(b, 4<<20)
	p := make([]byte, 4096)
	rnd := rand.New(rand.NewPCG(1, 1))
	for b.Loop() {
		if _, err := c.ReadAt(b.Context(), i, p, rnd.Int64N(4<<20-4096)); err != nil {
			b.Fatal(err)
		}
	}
}
