package store

import (
	"fmt"
	"sync"

	"github.com/stepcache/stepcache/cache/checksum"
)

// pieces are the buffers that blocks are read into to be compared.
var pieces = sync.Pool{New: func() any { b := make([]byte, checksum.Size); return &b }}

// Check reads length bytes at an offset within the block, with the rest of what their sums cover, and compares. The
// error wraps checksum.ErrMismatch where the bytes differ; after any, Verify has the block fetched again.
func (b *Block) Check(off, length int64) error { return b.compare(nil, off, length) }

// ReadChecked fills p with bytes at an offset within the block that were compared as by Check. What p has after an
// error is of no use.
func (b *Block) ReadChecked(p []byte, off int64) error { return b.compare(p, off, int64(len(p))) }

// compare is Check that leaves what it compared in into, unless that is nil.
func (b *Block) compare(into []byte, off, length int64) error {
	if off < 0 || length < 0 || length > int64(b.Len())-off {
		return fmt.Errorf("%d bytes at %d of a block of %d: %w", length, off, b.Len(), ErrInvalid)
	}
	if len(b.sums) != checksum.Count(b.Len()) {
		return fmt.Errorf("%w: %d sums for %d bytes", checksum.ErrMismatch, len(b.sums), b.Len())
	}
	buf := pieces.Get().(*[]byte)
	defer pieces.Put(buf)
	for at := off - off%checksum.Size; at < off+length; at += checksum.Size {
		p := (*buf)[:min(checksum.Size, int64(b.Len())-at)]
		_, err := b.ReadAt(p, at)
		if err == nil {
			i := at / checksum.Size
			err = checksum.Check(p, b.sums[i:i+1])
		}
		if err != nil {
			return fmt.Errorf("bytes from %d on of block %d of object %s: %w", at, b.b.n, name(b.b.obj.id), err)
		}
		if into != nil {
			copy(into[max(0, at-off):], p[max(0, off-at):])
		}
	}
	return nil
}
