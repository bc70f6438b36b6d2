package client

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/meminfo"
	"github.com/stepcache/stepcache/cache/ring"
)

// hugePage is the length and alignment of the kernel's huge pages on amd64, and on arm64 with pages of 4 KiB.
const hugePage = 2 << 20

// fresh returns size bytes, all zero. Those for a block ask for huge pages: of small ones each first touch is a fault
// of its own, a thousand for a block, and copies into and out of the block look up each (bench/README.md, "Streaming
// from another node"). Where the kernel gives none they are small.
func fresh(size int) []byte {
	p := make([]byte, size)
	if size != ring.BlockSize {
		return p
	}
	// All huge pages that the block lies on, also those that it shares: the collector's memory has no alignment that
	// could be asked for, and blocks lie behind each other. Of what else lies there nothing changes but its pages.
	at := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
	from, to := at&^(hugePage-1), (at+uintptr(size)+hugePage-1)&^(hugePage-1)
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_HUGEPAGE)
	return p
}

// errTooLarge: a snapshot has no room in the memory of this container.
var errTooLarge = errors.New("the snapshot is too large for this container")

// inMemory is what the snapshots take that the clients of this process have in memory. The collector does not see it, so
// that where the heap is limited there is less for that.
var inMemory struct {
	sync.Mutex
	bytes int64
}

// reserve makes room for a snapshot of n bytes in memory until release. With those of the process's other clients it may
// take two thirds of the container's memory: beyond, the process would be killed, again and again.
func (c *Client) reserve(n int64) error {
	limit, limited := c.limit()
	if !limited {
		return nil
	}
	inMemory.Lock()
	defer inMemory.Unlock()
	if inMemory.bytes+n > limit/3*2 {
		return fmt.Errorf("%w: it takes %d MiB of its memory, of which the limit is %d MiB: raise that, or have the node service mount the Dataset",
			errTooLarge, n>>20, limit>>20)
	}
	c.reserved += n
	c.cache.shared.bound(keepFromHeap(n) / 2)
	return nil
}

// release ends what reserve began.
func (c *Client) release() {
	inMemory.Lock()
	defer inMemory.Unlock()
	if c.reserved > 0 {
		c.cache.shared.bound(keepFromHeap(-c.reserved) / 2)
		c.reserved = 0
	}
}

// keepFromHeap returns the heap's limit from now on. inMemory is locked.
func keepFromHeap(n int64) int64 {
	inMemory.bytes += n
	return meminfo.MoveHeap(-n)
}
