package store

import (
	"context"
	"slices"
	"testing"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// Sums that come with a block are those that it is checked with from then on, so that what happens to its bytes
// between their sender and the store's memory is found; a wrong number of them is as good as none.
func TestSumsThatComeWithABlockGoWithIt(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 2*ring.BlockSize+checksum.Size+1)
	get := func(n int64, spoil bool, sums func(p []byte) []uint64) *Block {
		t.Helper()
		b, err := s.AcquireSummed(context.Background(), o, n, func(_ context.Context, p []byte) ([]uint64, error) {
			content(o, n, p)
			given := sums(p)
			if spoil {
				p[len(p)-1] ^= 1
			}
			return given, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	first := make([]byte, ring.BlockSize)
	content(o, 0, first)
	good := get(0, false, checksum.All)
	defer good.Release()
	if !s.Verify(good) || !slices.Equal(good.Sums(), checksum.All(first)) {
		t.Error("a good block does not verify")
	}
	few := get(2, false, func(p []byte) []uint64 { return checksum.All(p)[:1] })
	defer few.Release()
	if !s.Verify(few) || len(few.Sums()) != 2 {
		t.Errorf("a block that came with a sum too few: %d", len(few.Sums()))
	}
	bad := get(1, true, checksum.All)
	defer bad.Release()
	if s.Verify(bad) {
		t.Error("bytes that changed after they were compared with their sums were not found")
	}
	checkBooks(t, s)
}
