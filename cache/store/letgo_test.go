package store

import (
	"context"
	"testing"
)

// Eight readers, one a little behind the other, read new data through a cache that is full of what was read many
// times before: each block is fetched about once, not once for each of them (2.9 to 3.1 times, with the policy
// alone; 1.4 to 1.6 as it is).
func TestReadersOfNewDataShareItOnACacheThatWasHot(t *testing.T) {
	const (
		size    = 64 << 10
		held    = 100
		readers = 8
		lag     = 3
		fresh   = 300
	)
	s := open(t, Options{Dir: memDir(t), Quota: max(minQuota, baseCost+int64(held)*(size+inodeCost+3*recordLen(size)+entryCost))})
	fetched := 0
	read := func(i int) {
		b, err := s.Acquire(context.Background(), anObject(i, size), 0, func(context.Context, []byte) error {
			if i >= held {
				fetched++
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		b.Release()
	}
	n := int((s.quota-baseCost)/s.weight(size)) * 9 / 10
	for range 20 {
		for i := range n {
			read(i)
		}
	}
	for at := range fresh + readers*lag {
		for r := range readers {
			if i := at - r*lag; i >= 0 && i < fresh {
				read(held + i)
			}
		}
	}
	t.Logf("%d readers fetched new data %.2f times", readers, float64(fetched)/fresh)
	checkBooks(t, s)
	if fetched > 2*fresh+fresh/4 {
		t.Errorf("%d readers fetched %d blocks %d times", readers, fresh, fetched)
	}
}

// What was let go is remembered within a bound, the last of it, and once.
func TestLetGoIsBounded(t *testing.T) {
	var l letGo
	k := func(i int) key { return key{anObject(i, 1).ID, 0} }
	for i := range 3 * maxLetGo {
		l.note(k(i), int64(i))
		l.note(k(0), int64(i)) // again and again
	}
	if len(l.at) > maxLetGo || len(l.order) > maxLetGo {
		t.Errorf("%d remembered, in a ring of %d", len(l.at), len(l.order))
	}
	if l.take(k(1), 0) {
		t.Error("the oldest is still remembered")
	}
	last := 3*maxLetGo - 1
	if l.take(k(last), int64(last)+1) {
		t.Error("used too long ago, and taken for hot")
	}
	if !l.take(k(0), int64(last)) || l.take(k(0), 0) {
		t.Error("the last use does not count, or counts twice")
	}
}
