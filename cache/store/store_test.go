package store

import (
	"io"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
)

func TestBlocksOfAwkwardSizesAreHeldWhole(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 64 * mib})
	for i, size := range []int64{1, 4095, 4096, 4097, SumSize, SumSize + 1, ring.BlockSize - 1, ring.BlockSize, ring.BlockSize + 1, 2*ring.BlockSize + 17} {
		o := object_(i, size)
		load(t, s, o)
		r := s.Residency(o)
		if !r.Whole || r.Bytes != size || r.Blocks != ring.Blocks(size) {
			t.Errorf("size %d: residency %+v", size, r)
		}
		for n := range ring.Blocks(size) {
			b, ok := s.Lookup(o, n)
			if !ok || !b.Resident() || b.Bytes() != nil {
				t.Fatalf("size %d block %d: not found resident", size, n)
			}
			check(t, o, n, b)
			f, off := b.File()
			p := make([]byte, b.Len())
			if _, err := f.ReadAt(p, off); err != nil && err != io.EOF {
				t.Error(err)
			}
			if want := sumsOf(p); len(want) != len(b.Sums()) || want[0] != b.Sums()[0] {
				t.Error("sums do not match the file")
			}
			if k, err := b.ReadAt(make([]byte, 2), int64(b.Len())-1); k != 1 || err != io.EOF {
				t.Errorf("read over the end: %d, %v", k, err)
			}
			b.Release()
			b.Release()
		}
	}
	if st := s.Stats(); st.Uncached != 0 || st.Evicted != 0 || st.Used > st.Quota {
		t.Errorf("%+v", st)
	}
}

func TestQuotaHoldsWhileTenTimesItIsReadThroughSmoke(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	for i := range 80 {
		load(t, s, object_(i, 5*mib))
		if st := s.Stats(); st.Used > st.Quota {
			t.Fatalf("%+v", st)
		}
	}
	t.Logf("%+v", s.Stats())
}
