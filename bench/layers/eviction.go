package main

import (
	"container/list"
	"context"
	"fmt"
	"math/rand/v2"
)

// evictionGroup: how much of a trace the store finds resident, beside a plain LRU that holds as many blocks.
func (b *bench) evictionGroup() group {
	const size = 64 << 10
	capacity := int(max(b.o.bytes/4/size, 256)) // 16 MiB at least: a store is not smaller
	loop := func(uint64) []uint64 {
		n := capacity + capacity/8
		var trace []uint64
		for range 12 {
			for k := range n {
				trace = append(trace, uint64(k))
			}
		}
		return trace
	}
	zipf := func(seed uint64) []uint64 {
		z := rand.NewZipf(rand.New(rand.NewPCG(seed, 1)), 1.01, 1, uint64(10*capacity))
		trace := make([]uint64, 12*capacity)
		for k := range trace {
			trace[k] = z.Uint64()
		}
		return trace
	}
	of := func(name, reference string, trace func(seed uint64) []uint64) *row {
		seed := uint64(0)
		r := &row{layer: "eviction", name: name, unit: percent, reference: reference}
		var current []uint64
		// The store decides how many blocks its quota holds; the LRU is then given as many. So the store's run
		// comes first, untimed, and both figures are told afterwards.
		var hits float64
		var held int
		r.prepare = func(ctx context.Context) (err error) {
			seed++
			current = trace(seed)
			hits, held, err = b.trace(ctx, current, size, int64(capacity)*size)
			return err
		}
		r.run = func(context.Context) (float64, error) { return hits, nil }
		r.of = &base{name: "plain LRU", beside: true, run: func(context.Context) (float64, error) { return lru(current, held), nil }}
		return r
	}
	return group{rows: []*row{
		of("hits of a loop over 9/8 of the cache", "72 % (LRU 0 %)", loop),
		of("hits of a Zipf trace (s 1.01) over 10 times the cache", "not below LRU", zipf),
	}}
}

// trace runs a trace of objects of one block through a store and returns the share that was found resident,
// in percent, after a first quarter that fills the cache, and the most blocks that it held.
func (b *bench) trace(ctx context.Context, trace []uint64, size, quota int64) (hits float64, held int, err error) {
	var s scope
	defer s.close()
	st, _, err := b.openStore(ctx, &s, false, quota)
	if err != nil {
		return 0, 0, err
	}
	found, from := 0, len(trace)/4
	for k, n := range trace {
		filled := false
		bl, err := st.Acquire(ctx, object(n, size), 0, func(context.Context, []byte) error { filled = true; return nil })
		if err != nil {
			return 0, 0, fmt.Errorf("block %d of the trace: %w", k, err)
		}
		bl.Release()
		if !filled && k >= from {
			found++
		}
		if k%64 == 0 {
			held = max(held, int(st.Stats().Blocks))
		}
	}
	return 100 * float64(found) / float64(len(trace)-from), held, nil
}

// lru is the same for a plain LRU of so many blocks.
func lru(trace []uint64, capacity int) float64 {
	order, at := list.New(), map[uint64]*list.Element{}
	found, from := 0, len(trace)/4
	for k, n := range trace {
		if e := at[n]; e != nil {
			order.MoveToFront(e)
			if k >= from {
				found++
			}
			continue
		}
		if order.Len() >= capacity {
			oldest := order.Back()
			delete(at, order.Remove(oldest).(uint64))
		}
		at[n] = order.PushFront(n)
	}
	return 100 * float64(found) / float64(len(trace)-from)
}
