package client

import (
	"unsafe"

	"golang.org/x/sys/unix"

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
