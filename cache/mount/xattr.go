package mount

import (
	"context"
	"encoding/hex"
	"fmt"
	"math/bits"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
)

// Extended attributes tell where a file is from, and how much of it the tier holds.
const (
	// XattrSource is the object: scheme://bucket/key.
	XattrSource = "user.stepcache.source"
	// XattrVersion is the object's version, as the snapshot binds it.
	XattrVersion = "user.stepcache.version"
	// XattrResident is how much of the file the tier holds: "bytes/size". Only if the reader knows.
	XattrResident = "user.stepcache.resident"
	// XattrDataset is the dataset's name, and XattrSnapshot the snapshot's digest, in hex; directories have
	// them too.
	XattrDataset  = "user.stepcache.dataset"
	XattrSnapshot = "user.stepcache.snapshot"
)

// residentTimeout bounds the question for a file's residency.
const residentTimeout = 5 * time.Second

func (f *fileSystem) xattrs(n *catalog.Node) []string {
	names := []string{XattrDataset, XattrSnapshot}
	if n.Dir {
		return names
	}
	names = append(names, XattrSource, XattrVersion)
	if _, ok := f.reader.(Resident); ok {
		names = append(names, XattrResident)
	}
	return names
}

// ListXAttr lists the names, each with a NUL byte behind it.
func (f *fileSystem) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	_, n, ok := f.node(h.NodeId)
	if !ok {
		return 0, f.fail(unix.ESTALE)
	}
	return give(dest, strings.Join(f.xattrs(&n), "\x00")+"\x00")
}

// GetXAttr reads one. Attributes of other kinds (security, ACLs) do not exist.
func (f *fileSystem) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	i, n, ok := f.node(h.NodeId)
	if !ok {
		return 0, f.fail(unix.ESTALE)
	}
	known := false
	for _, x := range f.xattrs(&n) {
		known = known || x == name
	}
	if !known {
		return 0, fuse.ENODATA // No failure: programs ask for what may not be there.
	}
	switch name {
	case XattrDataset:
		return give(dest, f.opt.Dataset)
	case XattrSnapshot:
		d := f.snap.Digest()
		return give(dest, hex.EncodeToString(d[:]))
	case XattrSource:
		return give(dest, f.object(i))
	case XattrVersion:
		_, o, _ := f.snap.Object(i)
		return give(dest, o.Version)
	}
	ctx, stop := f.requestContext(cancel, h.Pid)
	defer stop()
	ctx, done := context.WithTimeoutCause(ctx, residentTimeout, errTimeout)
	defer done()
	bitmap, err := f.reader.(Resident).Resident(ctx, i)
	if err != nil {
		return 0, f.failed(ctx, "residency", i, err)
	}
	return give(dest, fmt.Sprintf("%d/%d", residentBytes(bitmap, n.Size), n.Size))
}

// residentBytes adds up the blocks of a bitmap; the last block may be short.
func residentBytes(bitmap []byte, size int64) (sum int64) {
	blocks := (size + ring.BlockSize - 1) / ring.BlockSize
	for k, b := range bitmap {
		for ; b != 0; b &= b - 1 {
			block := int64(k)*8 + int64(bits.TrailingZeros8(b))
			if block < blocks {
				sum += min(ring.BlockSize, size-block*ring.BlockSize)
			}
		}
	}
	return sum
}

// give copies a value, or says how long it is.
func give(dest []byte, v string) (uint32, fuse.Status) {
	if len(v) > len(dest) {
		return uint32(len(v)), fuse.ERANGE
	}
	return uint32(copy(dest, v)), fuse.OK
}
