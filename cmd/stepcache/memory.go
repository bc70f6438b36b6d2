package main

import (
	"os"
	"runtime/debug"

	"github.com/stepcache/stepcache/cache/mount/meminfo"
)

// heapRoom is what a process that serves mounts may use beside so many bytes that are kept elsewhere, in bytes: three
// quarters of what the limit of its container leaves. The rest is for what the collector does not see: stacks of
// threads, tables of open files, page caches that are in use. limited is false where there is no limit.
func heapRoom(beside int64) (room int64, limited bool) {
	limit, limited := meminfo.Limit()
	return max(limit-beside, 0) / 4 * 3, limited
}

// keepHeap has the collector work harder before the heap outgrows its room, as GOMEMLIMIT does, which goes before: by
// itself it lets the heap become twice what is in use, and the container would be killed.
func keepHeap(room int64) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(room)
	}
}

// leastBuffers is the least that a mount's reader is given: enough to stream one file.
const leastBuffers = 32 << 20

// share is what each of n readers may have of the room, at most what was asked for: half of it is for them.
func share(asked, room int64, n int) int64 {
	return min(asked, max(room/2/int64(n), leastBuffers))
}
