package client

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/stepcache/stepcache/cache/ring"
)

// mapping returns what the kernel tells of the mapping that the bytes begin in.
func mapping(t *testing.T, p []byte) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	at, found := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), false
	for line := range strings.Lines(string(text)) {
		var from, to uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 {
			found = from <= at && at < to
		} else if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && found {
			return flags
		}
	}
	t.Fatalf("no mapping has the address %x", at)
	return ""
}

func TestBlocksAskForHugePages(t *testing.T) {
	if _, err := os.Stat("/sys/kernel/mm/transparent_hugepage"); err != nil {
		t.Skip("the kernel has no transparent huge pages")
	}
	b := newBlocks(4 * ring.BlockSize)
	for range 3 {
		p, _, ok := b.spare(ring.BlockSize)
		if !ok {
			t.Fatal("no buffer")
		}
		for _, part := range [][]byte{p, p[len(p)/2:], p[len(p)-1:]} {
			if flags := mapping(t, part); !strings.Contains(flags, " hg") {
				t.Errorf("a block's memory has the flags %s", flags)
			}
		}
		for i := range p {
			if p[i] != 0 {
				t.Fatalf("byte %d of fresh memory is %d", i, p[i])
			}
			p[i] = 1
		}
	}
	if p := fresh(ring.BlockSize / 2); len(p) != ring.BlockSize/2 {
		t.Errorf("%d bytes", len(p))
	}
}
