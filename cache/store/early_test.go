package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

func leaseEarly(t *testing.T, s *Store, o ring.Object) *Lease {
	t.Helper()
	return leaseBy(t, s.LeaseEarly, o)
}

// reads checks that a block can be read through the lease and is the object's.
func reads(t *testing.T, l *Lease, o ring.Object, n int64) {
	t.Helper()
	sums, ok := l.Sums(n)
	if !ok {
		t.Fatalf("block %d cannot be read", n)
	}
	want, got := make([]byte, blockLen(o.Size, n)), make([]byte, blockLen(o.Size, n))
	content(o, n, want)
	if _, err := l.File.ReadAt(got, n*ring.BlockSize); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) || !equalSums(sums, checksum.All(want)) {
		t.Errorf("block %d is not the object's", n)
	}
}

func equalSums(a, b []uint64) bool {
	for i := range a {
		if len(a) != len(b) || a[i] != b[i] {
			return false
		}
	}
	return len(a) == len(b)
}

func TestAnEarlyLeaseReadsWhatIsFilledAfterIt(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 2*ring.BlockSize+5)
	l := leaseEarly(t, s, o)
	if _, ok := l.Sums(1); ok {
		t.Error("a block that is not there can be read")
	}
	acquire(t, s, o, 1).Release()
	reads(t, l, o, 1)
	for _, n := range []int64{-1, 0, 2, 3} {
		if _, ok := l.Sums(n); ok {
			t.Errorf("block %d can be read", n)
		}
	}
	acquire(t, s, o, 0).Release()
	// Whatever comes, it stays.
	churn(t, s, 100)
	reads(t, l, o, 1)
	reads(t, l, o, 0)
	if st, err := l.File.Stat(); err != nil || st.Size() != o.Size {
		t.Errorf("%v, %v", st, err)
	}
	l.Release()
	if _, ok := l.Sums(1); ok {
		t.Error("a released lease tells of blocks")
	}
	checkBooks(t, s)
}

func TestAFileLeasedEarlyBecomesWhole(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 2*ring.BlockSize+5)
	l := leaseEarly(t, s, o)
	load(t, s, o)
	second := lease(t, s, o)
	for n := range int64(3) {
		reads(t, l, o, n)
		reads(t, second, o, n)
	}
	l.Release()
	reads(t, second, o, 0)
	checkBooks(t, s)
}

func TestAFileLeasedEarlyIsEvictedWhole(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 24 * mib})
	o := anObject(1, 2*ring.BlockSize)
	l := leaseEarly(t, s, o)
	acquire(t, s, o, 0).Release()
	r := startReader(t, "map", l.File)
	l.Release()
	churn(t, s, 100)
	if s.Residency(o).Blocks != 1 {
		t.Error("evicted while somebody outside has it open")
	}
	r.kill()
	eventually(t, func() bool { churn(t, s, 200); return s.Residency(o).Blocks == 0 })
	checkBooks(t, s)
}

func TestEarlyLeasesLeaveAnEighthOfTheQuota(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 24 * mib})
	a, b := anObject(1, 12*mib), anObject(2, 10*mib)
	first := leaseEarly(t, s, a)
	again := leaseEarly(t, s, a) // counted once
	if _, err := s.LeaseEarly(b); !errors.Is(err, ErrNoRoom) {
		t.Fatalf("%v", err)
	}
	if _, err := s.LeaseEarly(anObject(3, 22*mib)); !errors.Is(err, ErrNoRoom) {
		t.Errorf("more than that at once: %v", err)
	}
	first.Release()
	if _, err := s.LeaseEarly(b); !errors.Is(err, ErrNoRoom) {
		t.Errorf("while the other lease lives: %v", err)
	}
	again.Release()
	leaseEarly(t, s, b)
	load(t, s, a)
	leaseEarly(t, s, a) // a whole file is as any lease is
	checkBooks(t, s)
}

func TestAnEarlyLeaseThatNothingCameToLeavesNoFile(t *testing.T) {
	dir := memDir(t)
	s := open(t, Options{Dir: dir, Quota: 24 * mib})
	before := files(t, dir)
	o := anObject(1, 2*ring.BlockSize)
	l := leaseEarly(t, s, o)
	if _, err := s.Acquire(context.Background(), o, 0, func(context.Context, []byte) error { return errors.New("no such bucket") }); err == nil {
		t.Error("filled")
	}
	if _, ok := l.Sums(0); ok {
		t.Error("a block whose fill failed can be read")
	}
	l.Release()
	if n := files(t, dir); n != before {
		t.Errorf("%d files, before %d", n, before)
	}
	load(t, s, o)
	checkBooks(t, s)
}

func TestAnEarlyLeaseOfADroppedObjectTellsOfNoBlock(t *testing.T) {
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, 2*ring.BlockSize)
	l := leaseEarly(t, s, o)
	acquire(t, s, o, 0).Release()
	reads(t, l, o, 0)
	s.Drop(o)
	load(t, s, o) // into another file
	for n := range int64(2) {
		if _, ok := l.Sums(n); ok {
			t.Errorf("block %d, which is not in this file, can be read", n)
		}
	}
	l.Release()
	reads(t, leaseEarly(t, s, o), o, 1)
	checkBooks(t, s)
}
