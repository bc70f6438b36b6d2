package store

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// What is read of a block is compared with the sums that cover it, wherever it begins and ends, and nothing else is.
func TestARangeIsComparedWithTheSumsThatCoverIt(t *testing.T) {
	const size = 3*checksum.Size + 100 // of the last block
	s := open(t, Options{Dir: memDir(t), Quota: 32 * mib})
	o := anObject(1, ring.BlockSize+size)
	load(t, s, o)
	want := make([]byte, size)
	content(o, 1, want)
	flip(t, s.path(o.ID), ring.BlockSize+checksum.Size+5)
	b := acquire(t, s, o, 1)
	defer b.Release()
	for _, r := range []struct {
		off, length int64
		bad         bool
	}{
		{0, size, true}, {0, 0, false}, {size, 0, false}, {0, checksum.Size, false}, {checksum.Size, checksum.Size, true},
		{checksum.Size - 1, 1, false}, {checksum.Size - 1, 2, true}, {2*checksum.Size - 1, 1, true}, {2 * checksum.Size, checksum.Size + 100, false},
		{2*checksum.Size + 7, checksum.Size, false}, {checksum.Size + 9, 3, true}, {3*checksum.Size + 1, 99, false}, {10, 20, false},
	} {
		err := b.Check(r.off, r.length)
		if errors.Is(err, checksum.ErrMismatch) != r.bad || (err != nil) != r.bad {
			t.Errorf("%d bytes at %d: %v", r.length, r.off, err)
		}
		p := make([]byte, r.length)
		err = b.ReadChecked(p, r.off)
		if errors.Is(err, checksum.ErrMismatch) != r.bad || err == nil && !bytes.Equal(p, want[r.off:r.off+r.length]) {
			t.Errorf("%d bytes at %d read: %v", r.length, r.off, err)
		}
	}
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, size + 1}, {size, 1}, {size + 1, 0}} {
		if err := b.Check(r[0], r[1]); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d bytes at %d: %v", r[1], r[0], err)
		}
	}
	if err := os.Truncate(s.path(o.ID), ring.BlockSize+10); err != nil {
		t.Fatal(err)
	}
	if err := b.Check(0, 5); err == nil {
		t.Error("a file that was cut short passes")
	}
}
