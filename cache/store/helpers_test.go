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

func object_(i int, size int64) ring.Object {
	var n [16]byte
	binary.LittleEndian.PutUint64(n[:], uint64(i))
	binary.LittleEndian.PutUint64(n[8:], uint64(size))
	h := sha256.Sum256(n[:])
	return ring.Object{ID: source.ID(h[:16]), Size: size}
}

// content is the bytes of one block: no zero byte in it, so that a hole is always seen.
func content(o ring.Object, n int64, p []byte) {
	r := rand.New(rand.NewPCG(binary.LittleEndian.Uint64(o.ID[:]), uint64(n)))
	var w [8]byte
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(w[:], r.Uint64()|0x0101010101010101)
		copy(p[i:], w[:])
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

func load(t testing.TB, s *Store, o ring.Object) {
	t.Helper()
	for n := range ring.Blocks(o.Size) {
		b := acquire(t, s, o, n)
		check(t, o, n, b)
		b.Release()
	}
}
