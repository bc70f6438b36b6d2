package worker

import (
	"errors"
	"math"
	"testing"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// FuzzRange: a range that a reader may ask for lies in one block and in the file, and the block's sums cover
// exactly its bytes; whatever else is asked for is refused.
func FuzzRange(f *testing.F) {
	const b, s = ring.BlockSize, checksum.Size
	for _, r := range []struct {
		size, off int64
		length    int32
	}{
		{1, 0, 1}, {0, 0, 0}, {s, 0, s}, {s + 1, s, 1}, {s + 1, 0, s}, {b, 0, b}, {b + 1, b, 1}, {2 * b, b - s, 2 * s},
		{2 * b, b - s, s}, {b, 1, s}, {b, 0, s + 1}, {3*b + 5, 3 * b, 5}, {b, -s, s}, {b, 0, -1}, {math.MaxInt64, math.MaxInt64 - 1, 1},
		{math.MaxInt64, math.MaxInt64 - 7, math.MaxInt32}, {b, math.MinInt64, math.MinInt32}, {-1, 0, 1},
	} {
		f.Add(r.size, r.off, r.length)
	}
	f.Fuzz(func(t *testing.T, size, off int64, length int32) {
		err := checkRange(size, off, length)
		n := int64(length)
		within := off >= 0 && n > 0 && off < size && n <= size-off
		if err != nil {
			if !errors.Is(err, source.ErrInvalid) {
				t.Errorf("not told as invalid: %v", err)
			}
			if within && off%s == 0 && (n%s == 0 || off+n == size) && off%b+n <= b {
				t.Errorf("bytes %d+%d of %d refused: %v", off, n, size, err)
			}
			return
		}
		if !within {
			t.Fatalf("bytes %d+%d of %d allowed", off, n, size)
		}
		// As conn.read takes the block and its sums.
		block := off / b
		first, count := int((off-blockOff(block))/s), checksum.Count(int(length))
		if have := checksum.Count(int(blockLen(size, block))); block >= ring.Blocks(size) || first+count > have {
			t.Fatalf("bytes %d+%d of %d: sums %d+%d of %d in block %d", off, n, size, first, count, have, block)
		}
		if end := off + n; off%s != 0 || end%s != 0 && end != size {
			t.Fatalf("bytes %d+%d of %d: not covered by whole sums", off, n, size)
		}
	})
}

func TestAQuestionToAPeerEndsBeforeItsReaderGivesUp(t *testing.T) {
	if peerTimeout <= wire.SourceTimeout || peerTimeout >= wire.WorkerTimeout {
		t.Errorf("a peer is waited for for %v, between its bucket's %v and the reader's %v it should be", peerTimeout, wire.SourceTimeout, wire.WorkerTimeout)
	}
}
