package client

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/ring"
)

func TestClientsOfAProcessShareItsBuffers(t *testing.T) {
	const all, mounts = 8 * ring.BlockSize, 4
	ctx := testContext(t)
	files := make(map[string][]byte)
	for n := range mounts {
		files[fmt.Sprintf("f%d", n)] = content(uint64(n), 40<<20)
	}
	k := newTier(t, files)
	k.start("a")
	shared := NewBuffers(all)
	k.timing.rest = time.Hour // the first is looked at while the others read
	first := k.dial(func(c *Config) { c.BufferBytes, c.Buffers = all, shared })
	k.timing.rest = 20 * time.Millisecond
	clients := []*Client{first}
	for range mounts - 1 {
		clients = append(clients, k.dial(func(c *Config) { c.BufferBytes, c.Buffers = all, shared }))
	}
	read := func(n int) error {
		name := fmt.Sprintf("f%d", n)
		for off := int64(0); off < 40<<20; off += 1 << 20 {
			if err := checkRead(ctx, clients[n], k.index(name), files[name], off, 1<<20); err != nil {
				return err
			}
		}
		return nil
	}
	held := func(n int) int64 {
		taken, pooled := clients[n].cache.usage()
		return taken + pooled
	}

	if budget := first.Stats().Budget; budget != all {
		t.Fatalf("nobody reads, and one client's budget is %d", budget)
	}
	if err := read(0); err != nil {
		t.Fatal(err)
	}
	if held(0) <= all/mounts {
		t.Fatalf("the only reader has %d bytes: nothing to take from it", held(0))
	}
	var g errgroup.Group
	for n := 1; n < mounts; n++ {
		g.Go(func() error { return read(n) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "giving up what is the others'", func() bool { return held(0) <= all/2 })

	// Who rests has no part any more, nor who is closed.
	eventually(t, "the others' rest", func() bool { return first.Stats().Budget == all })
	if err := read(1); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the rest of all", func() bool { return clients[1].Stats().Budget == all && held(1) == 0 })
}

func TestPartsOfBuffers(t *testing.T) {
	s := NewBuffers(4 * ring.BlockSize)
	var b []*blocks
	want := func(blocks int64) {
		t.Helper()
		if part := s.part.Load(); part != blocks*ring.BlockSize {
			t.Errorf("a part is %d bytes, want %d blocks", part, blocks)
		}
	}
	want(4)
	for range 5 {
		b = append(b, newBlocks(3*ring.BlockSize, s))
	}
	buffers := make([][]byte, len(b))
	for n, least := range []int64{4, 2, 2, 2, 2} { // the least is what a file can be streamed with
		buffers[n], _, _ = b[n].spare(ring.BlockSize)
		want(least)
	}
	if budget := b[0].budget(); budget != 2*ring.BlockSize {
		t.Errorf("a budget of %d", budget)
	}
	for n := 1; n < len(b); n++ {
		b[n].giveBack(buffers[n], ring.BlockSize)
		b[n].rest()
		b[n].rest()
	}
	want(4)
	if budget := b[0].budget(); budget != 3*ring.BlockSize {
		t.Errorf("a budget of %d, beyond what one may have", budget)
	}
	// One that still has a buffer counts, however long.
	b[0].rest()
	b[0].rest()
	b[1].spare(ring.BlockSize)
	want(2)
	s.bound(1)
	want(1)
	s.bound(100 * ring.BlockSize)
	want(2)
	b[0].close()
	b[0].close()
	b[1].close()
	if len(s.using) != 0 {
		t.Errorf("%d closed clients have a part", len(s.using))
	}
}
