package store

import (
	"container/list"
	"context"
	"math/rand/v2"
	"testing"
)

// hits replays a trace of objects of one size through a store that holds the given number of them.
func hits(t *testing.T, trace []int, held int) (store, lru float64) {
	t.Helper()
	const size = 4096
	s := open(t, Options{Dir: memDir(t), Quota: max(minQuota, baseCost+int64(held)*(size+inodeCost+3*recordLen(size)+entryCost))})
	if n := (s.quota - baseCost) / s.weight(size); n > int64(held) {
		t.Fatalf("it holds %d", n)
	}
	fill := func(context.Context, []byte) error { return nil }
	var found int
	for _, i := range trace {
		b, err := s.Acquire(context.Background(), anObject(i, size), 0, fill)
		if err != nil {
			t.Fatal(err)
		}
		b.Release()
	}
	found = int(s.Stats().Hits)
	checkBooks(t, s)

	// The same trace through a plain LRU.
	order, where := list.New(), make(map[int]*list.Element)
	var again int
	for _, i := range trace {
		if e := where[i]; e != nil {
			again++
			order.MoveToFront(e)
			continue
		}
		where[i] = order.PushFront(i)
		if order.Len() > held {
			delete(where, order.Remove(order.Back()).(int))
		}
	}
	return float64(found) / float64(len(trace)), float64(again) / float64(len(trace))
}

func TestALoopSlightlyLargerThanTheCacheHitsMoreThanHalf(t *testing.T) {
	var trace []int
	for range 30 {
		for i := range 550 {
			trace = append(trace, i)
		}
	}
	store, lru := hits(t, trace, 500)
	t.Logf("hit ratio of a loop over 1.1 times the cache: %.3f, plain LRU %.3f", store, lru)
	if store < 0.5 {
		t.Errorf("hit ratio %.3f", store)
	}
}

func TestAZipfTraceHitsNoLessThanLRU(t *testing.T) {
	z := rand.NewZipf(rand.New(rand.NewPCG(3, 4)), 1.1, 1, 10_000)
	trace := make([]int, 20_000)
	for i := range trace {
		trace[i] = int(z.Uint64())
	}
	store, lru := hits(t, trace, 500)
	t.Logf("hit ratio of a Zipf trace: %.3f, plain LRU %.3f", store, lru)
	if store < lru-0.02 {
		t.Errorf("hit ratio %.3f, plain LRU %.3f", store, lru)
	}
}

// Files that are read once do not push out those that are read again and again.
func TestAScanDoesNotPushOutWhatIsUsed(t *testing.T) {
	var trace []int
	for range 10 {
		for i := range 200 {
			trace = append(trace, i)
		}
	}
	for i := range 5000 {
		trace = append(trace, 1000+i)
	}
	before := len(trace)
	for i := range 200 {
		trace = append(trace, i)
	}
	all, _ := hits(t, trace, 250)
	head, _ := hits(t, trace[:before], 250)
	if again := all*float64(len(trace)) - head*float64(before); again < 150 {
		t.Errorf("%.0f of 200 still there after a scan of twenty times the cache", again)
	}
}
