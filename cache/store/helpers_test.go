package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

const mib = 1 << 20

// wait bounds everything that normally takes milliseconds.
const wait = 60 * time.Second

// memDir is a folder in memory that the test owns; on machines without /dev/shm it is a plain one.
func memDir(t testing.TB) string {
	t.Helper()
	if dir, err := os.MkdirTemp("/dev/shm", "store-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}

// ownTmpfs is a tmpfs of the test's own, of that many bytes.
func ownTmpfs(t testing.TB, quota int64) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tmpfs")
	note, err := MountTmpfs(dir, quota)
	if err != nil {
		t.Skipf("needs the right to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	if note != "" {
		t.Log(note)
	}
	return dir
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func open(t testing.TB, o Options) *Store {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet()
	}
	s, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func anObject(i int, size int64) ring.Object {
	var n [16]byte
	binary.LittleEndian.PutUint64(n[:], uint64(i))
	binary.LittleEndian.PutUint64(n[8:], uint64(size))
	h := sha256.Sum256(n[:])
	return ring.Object{ID: source.ID(h[:16]), Size: size}
}

// pattern has no zero byte, so that a hole is always seen.
var pattern = func() []byte {
	r := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, 2*ring.BlockSize)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64()|0x0101010101010101)
	}
	return p
}()

// content is the bytes of one block: a piece of the pattern, and in every page which page it is.
func content(o ring.Object, n int64, p []byte) {
	h := sha256.Sum256(binary.LittleEndian.AppendUint64(o.ID[:], uint64(n)))
	copy(p, pattern[binary.LittleEndian.Uint32(h[:])%ring.BlockSize:])
	for i := 0; i+16 <= len(p); i += 4096 {
		for j := range 16 {
			p[i+j] = h[j]&^byte(i>>(12+j%2*8)) | 1
		}
	}
}

func filler(o ring.Object, n int64) Fill {
	return func(_ context.Context, p []byte) error {
		content(o, n, p)
		return nil
	}
}

func acquire(t testing.TB, s *Store, o ring.Object, n int64) *Block {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	b, err := s.Acquire(ctx, o, n, filler(o, n))
	if err != nil {
		t.Fatalf("acquire block %d: %v", n, err)
	}
	return b
}

// check reads a whole block and compares it with what it should be.
func check(t testing.TB, o ring.Object, n int64, b *Block) {
	t.Helper()
	want := make([]byte, blockLen(o.Size, n))
	content(o, n, want)
	got := make([]byte, b.Len())
	if k, err := b.ReadAt(got, 0); err != nil || k != len(want) {
		t.Errorf("object %s block %d: read %d of %d bytes: %v", name(o.ID), n, k, len(want), err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("object %s block %d: wrong bytes", name(o.ID), n)
	}
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(wait); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain")
		}
	}
}

// files counts the objects' files in a store's folder.
func files(t testing.TB, dir string) (n int) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if len(e.Name()) == 32 {
			n++
		}
	}
	return n
}

// checkBooks compares the store's counters with what they count. Nothing may be under way.
func checkBooks(t testing.TB, s *Store) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	used, inPolicy, pinned, pages, live := int64(baseCost)+s.orphans, int64(0), int64(0), int64(0), int64(0)
	var blocks, bytes, early int64
	for _, o := range s.objects {
		if o.early {
			early += s.roundUp(o.size)
		}
		var charged int64
		reserved, refs, outs := 0, 0, 0
		for n, b := range o.blocks {
			w := s.weight(int(b.size))
			if b.reserved {
				reserved++
				charged += w
				pages += s.roundUp(int64(b.size))
				if b.inPolicy {
					inPolicy += w
				}
			}
			if b.out {
				outs++
			}
			refs += int(b.refs)
			if b.state == resident {
				blocks++
				bytes += int64(b.size)
				live += recordLen(int(b.size))
			}
			if b.inPolicy && o.pinned(n) {
				t.Errorf("%s block %d is pinned and in the policy", o, n)
			}
			if _, ok := s.policy.GetEntryQuietly(b.key()); ok != b.inPolicy {
				t.Errorf("%s block %d: in the policy %v, noted %v", o, n, ok, b.inPolicy)
			}
		}
		if reserved != o.reserved || charged != o.charged || refs != o.refs || outs != len(o.outs) {
			t.Errorf("%s: reserved %d of %d, charged %d of %d, refs %d of %d, outs %d of %d", o, o.reserved, reserved, o.charged, charged, o.refs, refs, len(o.outs), outs)
		}
		for n := range o.pins {
			pinned += s.weight(blockLen(o.size, n))
		}
		used += charged
	}
	var fresh int64
	for e := s.fresh.Front(); e != nil; e = e.Next() {
		o := e.Value.(*object)
		fresh += o.freshBytes
		if o.fresh != e || o.gone || s.objects[o.id] != o {
			t.Errorf("%s is kept beside the policy, and is gone", o)
		}
	}
	if fresh != s.freshBytes {
		t.Errorf("%d bytes are kept beside the policy, %d are counted", fresh, s.freshBytes)
	}
	for o := range s.zombies {
		if o.early {
			early += s.roundUp(o.size)
		}
		used += o.charged
		for _, b := range o.blocks {
			if b.reserved {
				pages += s.roundUp(int64(b.size))
			}
		}
	}
	if used != s.used || inPolicy != s.inPolicy || pinned != s.pinned || pages != s.pages || live != s.live || s.evicting != 0 || s.writing != 0 {
		t.Errorf("used %d of %d, in policy %d of %d, pinned %d of %d, pages %d of %d, live %d of %d, evicting %d, writing %d",
			s.used, used, s.inPolicy, inPolicy, s.pinned, pinned, s.pages, pages, s.live, live, s.evicting, s.writing)
	}
	if blocks != s.stats.Blocks || bytes != s.stats.Bytes {
		t.Errorf("blocks %d of %d, bytes %d of %d", s.stats.Blocks, blocks, s.stats.Bytes, bytes)
	}
	if early != s.early {
		t.Errorf("%d bytes are leased early, %d are counted", early, s.early)
	}
	if s.used > s.quota {
		t.Errorf("%d bytes used of %d", s.used, s.quota)
	}
}

func load(t testing.TB, s *Store, o ring.Object) {
	t.Helper()
	for n := range ring.Blocks(o.Size) {
		b := acquire(t, s, o, n)
		check(t, o, n, b)
		b.Release()
	}
}
