package meminfo

import (
	"math"
	"runtime/debug"
	"sync"
)

// heap is how far this process's limit of the heap was moved.
var heap struct {
	sync.Mutex
	limit int64 // without that
	by    int64
}

// MoveHeap moves the heap's limit (GOMEMLIMIT) by so many bytes and returns what it is then, math.MaxInt64 where there is
// none. Less is for who takes memory that the collector does not see out of the heap's share; more for who has memory
// of its own set aside for what it keeps in the heap. It never becomes less than a quarter of what it was.
func MoveHeap(by int64) (limit int64) {
	heap.Lock()
	defer heap.Unlock()
	if heap.by == 0 {
		heap.limit = debug.SetMemoryLimit(-1)
	}
	heap.by += by
	if heap.limit == math.MaxInt64 {
		return heap.limit
	}
	limit = max(heap.limit+heap.by, heap.limit/4)
	debug.SetMemoryLimit(limit)
	return limit
}
