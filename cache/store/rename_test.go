package store

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
)

func fillWith(want []byte) Fill {
	return func(_ context.Context, p []byte) error { copy(p, want); return nil }
}

// stageT makes a wholly resident, pinned object under a staging ID.
func stageT(t *testing.T, s *Store, size int64, owner string) (ring.Object, []byte) {
	t.Helper()
	o := ring.Object{ID: Staging(), Size: size}
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i * 7)
	}
	for n := range ring.Blocks(size) {
		if err := s.Pin(o, n, owner); err != nil {
			t.Fatal(err)
		}
		b, err := s.Acquire(t.Context(), o, n, fillWith(want[n*ring.BlockSize:]))
		if err != nil || !b.Resident() {
			t.Fatalf("block %d: %v", n, err)
		}
		b.Release()
	}
	return o, want
}

func TestRename(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), Options{Dir: dir, Quota: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	from, want := stageT(t, s, ring.BlockSize+1000, "put")
	to := ring.Object{ID: [16]byte{1, 2, 3}, Size: from.Size}
	used := s.Stats().Used

	b, _ := s.Lookup(from, 0)
	if s.Rename(from, to) {
		t.Fatal("an object in use was renamed")
	}
	b.Release()
	if s.Rename(from, ring.Object{ID: to.ID, Size: to.Size + 1}) {
		t.Fatal("renamed to another size")
	}
	if !s.Rename(from, to) {
		t.Fatal("not renamed")
	}
	if s.Rename(from, to) || s.Residency(from).Blocks != 0 || !s.Residency(to).Whole || s.Stats().Used != used {
		t.Errorf("after the rename: from %+v, to %+v, used %d, before %d", s.Residency(from), s.Residency(to), s.Stats().Used, used)
	}
	check := func(s *Store) {
		t.Helper()
		got := make([]byte, 0, len(want))
		for n := range ring.Blocks(to.Size) {
			b, ok := s.Lookup(to, n)
			if !ok {
				t.Fatalf("block %d is not there", n)
			}
			p := make([]byte, b.Len())
			if _, err := b.ReadAt(p, 0); err != nil {
				t.Fatal(err)
			}
			got = append(got, p...)
			b.Release()
		}
		if !bytes.Equal(got, want) {
			t.Error("other bytes than were staged")
		}
	}
	check(s)
	if p := s.Stats().Pinned; p == 0 {
		t.Error("the pins did not come along")
	}
	s.Unpin("put")
	if p := s.Stats().Pinned; p != 0 {
		t.Errorf("%d bytes stay pinned", p)
	}
	check(s)

	// To another one that is held: refused, and both stay.
	other, _ := stageT(t, s, to.Size, "second")
	if s.Rename(other, to) {
		t.Error("renamed over an object")
	}
	check(s)
	if !s.Residency(other).Whole {
		t.Error("what was not renamed is gone")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// What was renamed is found again, what was still being written is not.
	s, err = Open(t.Context(), Options{Dir: dir, Quota: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	check(s)
	if r := s.Residency(other); r.Blocks != 0 {
		t.Errorf("a staged object was recovered: %+v", r)
	}
	if n := s.Stats().Objects; n != 1 {
		t.Errorf("%d objects recovered", n)
	}
	s.Drop(to)
	if p := s.Stats().Blocks; p != 0 {
		t.Errorf("%d blocks after the drop", p)
	}
}

// Objects are staged and renamed while others read, drop and evict what they become, in a store that has no
// room for all. Nobody reads another's bytes, and in the end nothing is held, pinned or left in the folder.
func TestRenamesBesideReadersInAFullStore(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), Options{Dir: dir, Quota: 24 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const names = 6
	object := func(n int) ring.Object {
		return ring.Object{ID: [16]byte{9, byte(n)}, Size: ring.BlockSize/2*int64(n) + 1}
	}
	// What the bytes of an object are is what its name says.
	var bytesOf [names][]byte
	for n := range names {
		bytesOf[n] = bytes.Repeat([]byte{byte(n)}, ring.BlockSize)
	}
	fill := func(n int) Fill { return fillWith(bytesOf[n]) }
	var renamed atomic.Int64
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Go(func() { // puts
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for range 25 {
				n := r.IntN(names)
				to := object(n)
				from := ring.Object{ID: Staging(), Size: to.Size}
				owner, whole := fmt.Sprintf("%x", from.ID), true
				for b := range ring.Blocks(from.Size) {
					if err := s.Pin(from, b, owner); err != nil {
						whole = false
						break
					}
					h, err := s.Acquire(t.Context(), from, b, fill(n))
					if err != nil {
						t.Error(err)
						return
					}
					whole = whole && h.Resident()
					h.Release()
				}
				if whole && r.IntN(8) > 0 && s.Rename(from, to) {
					renamed.Add(1)
				}
				s.Unpin(owner)
				s.Drop(from)
			}
		})
		wg.Go(func() { // reads and drops
			r := rand.New(rand.NewPCG(uint64(w), 2))
			var buf [512]byte
			for range 120 {
				n := r.IntN(names)
				o := object(n)
				if r.IntN(6) == 0 {
					s.Drop(o)
					continue
				}
				h, err := s.Acquire(t.Context(), o, r.Int64N(ring.Blocks(o.Size)), fill(n))
				if err != nil {
					t.Error(err)
					return
				}
				p := buf[:min(len(buf), h.Len())]
				if _, err := h.ReadAt(p, int64(h.Len()-len(p))); err != nil {
					t.Error(err)
				}
				for _, c := range p {
					if c != byte(n) {
						t.Errorf("object %d has a byte of %d", n, c)
						break
					}
				}
				h.Release()
			}
		})
	}
	wg.Wait()
	if renamed.Load() == 0 {
		t.Error("nothing was renamed: the test shows nothing")
	}
	for n := range names {
		s.Drop(object(n))
	}
	if st := s.Stats(); st.Blocks != 0 || st.Objects != 0 || st.Pinned != 0 || st.Bytes != 0 {
		t.Errorf("left: %+v", st)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, ok := parseName(e.Name()); ok {
			t.Errorf("left in the folder: %s", e.Name())
		}
	}
}
