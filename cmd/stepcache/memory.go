package main

import (
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/meminfo"
)

const (
	// leastHeap is what a process that serves mounts needs beside its readers' buffers.
	leastHeap = 64 << 20
	// leastBuffers is the least that a reader is given: enough to stream a file.
	leastBuffers = 8 << 20
	// mostBuffers is what each reader is given where nothing else is said.
	mostBuffers = 128 << 20
)

// keepMemory fits what a process that serves mounts may use to the limit of its container, if there is one: beside, in
// bytes, what it keeps outside its heap, and buffers, what each reader may have. They come back smaller where there is no
// room for them, which is told, since who is beyond the limit is killed. shared is what all readers have together; nil
// without a limit.
//
// Of what is left beside, three quarters are for the heap, and the rest for what the collector does not see: stacks of
// threads, tables of open files, page caches in use. The collector works harder before the heap outgrows that, as with
// GOMEMLIMIT, which goes before: by itself it lets the heap become twice what is in use.
func keepMemory(beside, buffers int64, log *slog.Logger) (fittingBeside, fittingBuffers int64, shared *client.Buffers) {
	if buffers == 0 {
		buffers = mostBuffers
	}
	limit, limited := meminfo.Limit()
	if !limited {
		return beside, buffers, nil
	}
	askedBeside, asked := beside, buffers
	heap, beside, buffers, together := fit(limit, beside, buffers)
	keepHeap(heap)
	log.Info("within the container's memory limit", "limit", limit, "heap", heap, "buffers", buffers, "together", together,
		"beside", beside)
	if beside < askedBeside || buffers < asked {
		log.Warn("the container's memory limit has no room for what was asked for: raise it (resources.limits.memory)",
			"limit", limit, "askedBuffers", asked, "buffers", buffers, "askedBeside", askedBeside, "beside", beside)
	}
	return beside, buffers, client.NewBuffers(together)
}

// keepSnapshots is keepMemory for a process that holds Datasets' snapshots: it returns how many bytes they may have, half
// of the limit. While one is pulled half of that may be outside the heap.
func keepSnapshots(log *slog.Logger) (snapshots int64) {
	limit, limited := meminfo.Limit()
	if !limited {
		return 0
	}
	snapshots = limit / 2
	heap := limit / 8 * 5
	keepHeap(heap)
	log.Info("within the container's memory limit", "limit", limit, "heap", heap, "snapshots", snapshots)
	return snapshots
}

func keepHeap(most int64) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(most)
	}
}

// fit is keepMemory's arithmetic. Half of the heap is for the buffers of all readers together, but that one may have what
// it asked for where that leaves the least; what is beside may leave no less than one reader needs.
func fit(limit, beside, buffers int64) (heap, fittingBeside, fittingBuffers, together int64) {
	beside = max(min(beside, limit-(leastHeap+buffers)*4/3), 0)
	heap = (limit - beside) / 4 * 3
	buffers = min(buffers, max(heap-leastHeap, leastBuffers))
	return heap, beside, buffers, max(heap/2, buffers)
}
