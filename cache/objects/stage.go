package objects

import (
	"context"
	"encoding/hex"
	"io"
	"sync"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/store"
)

// stager puts the bytes of puts under way into the store.
type stager struct {
	store *store.Store
	quota int64
	bytes atomic.Int64 // of all that are staged now
}

const (
	// stageShare is the part of the quota that one object may take, stageAll the part of all objects that
	// are being put: they are pinned, and what readers use must not be driven out by them.
	stageShare = 4
	stageAll   = 2
)

// staged is one object being put into the store under an ID of its own. It is for one goroutine. A nil one
// keeps nothing.
type staged struct {
	*stager
	object ring.Object
	owner  string
	buf    []byte  // of the block that is being filled
	whole  *[]byte // what buf is of, when it goes round
	block  int64
	failed bool
}

// room takes room for an object; false when it is too large to be kept, or others take the room.
func (s *stager) room(size int64) bool {
	if size <= 0 || size > s.quota/stageShare {
		return false
	}
	if s.bytes.Add(size) > s.quota/stageAll {
		s.bytes.Add(-size)
		return false
	}
	return true
}

// begin returns nil when there is no room for the object.
func (s *stager) begin(size int64) *staged {
	if !s.room(size) {
		return nil
	}
	id := store.Staging()
	return &staged{stager: s, object: ring.Object{ID: id, Size: size}, owner: "put " + hex.EncodeToString(id[8:])}
}

// write takes the next bytes. A store that cannot keep them fails the staging, not the put.
func (t *staged) write(ctx context.Context, p []byte) {
	for t != nil && !t.failed && len(p) > 0 {
		length := min(ring.BlockSize, t.object.Size-t.block*ring.BlockSize)
		if length <= 0 {
			t.failed = true // longer than was said: the put fails as well
			return
		}
		if t.buf == nil {
			if length > smallBlock {
				t.whole, _ = blocks.Get().(*[]byte)
			}
			if t.whole == nil || int64(cap(*t.whole)) < length {
				p := make([]byte, length)
				t.whole = &p
			}
			t.buf = (*t.whole)[:0]
		}
		n := min(int(length)-len(t.buf), len(p))
		t.buf = append(t.buf, p[:n]...)
		p = p[n:]
		if int64(len(t.buf)) == length {
			t.failed = !t.keep(ctx)
			t.buf = t.buf[:0]
			t.block++
		}
	}
}

// keep puts one block into the store.
func (t *staged) keep(ctx context.Context) bool {
	// Pinned, or the policy would weigh what nobody has read yet against what everybody does.
	if t.store.Pin(t.object, t.block, t.owner) != nil {
		return false
	}
	p := t.buf
	b, err := t.store.Place(ctx, t.object, t.block, func(_ context.Context, w io.WriterAt) ([]uint64, error) {
		_, err := w.WriteAt(p, 0)
		return checksum.All(p), err
	})
	if err != nil {
		return false
	}
	b.Release()
	return true
}

// done ends the use of the object and of the memory.
func (t *staged) done() {
	t.bytes.Add(-t.object.Size)
	if t.whole != nil && cap(*t.whole) > smallBlock && !t.failed { // or the store may still be reading it
		blocks.Put(t.whole)
	}
	t.object.Size, t.buf, t.whole = 0, nil, nil
}

// smallBlock is what is not worth a buffer that goes round.
const smallBlock = 64 << 10

// blocks are buffers of blocks, each as long as the first that it was for.
var blocks sync.Pool

// finish gives what is staged its ID, and says whether the store holds it whole.
func (t *staged) finish(as ring.Object) bool {
	if t == nil {
		return false
	}
	kept := !t.failed && t.block == ring.Blocks(t.object.Size) && t.store.Rename(t.object, as)
	if kept {
		t.store.Keep(as) // it is about to be read
	}
	t.end()
	return kept
}

// finishPart leaves what is staged in the store under its own ID, and says whether that holds it whole.
func (t *staged) finishPart() (ring.Object, bool) {
	if t == nil || t.failed || t.block != ring.Blocks(t.object.Size) {
		return ring.Object{}, false
	}
	o := t.object
	t.store.Keep(o)
	t.store.Unpin(t.owner)
	t.done()
	return o, true
}

// end drops what was not finished.
func (t *staged) end() {
	if t == nil || t.object.Size == 0 {
		return
	}
	t.store.Unpin(t.owner)
	t.store.Drop(t.object)
	t.done()
}

// expected is a version whose bytes are about to be read, and are not here yet: whoever fetches them first, they stay.
type expected struct {
	*stager
	object ring.Object
	owner  string
}

// expect returns nil when there is no room for the object.
func (s *stager) expect(o ring.Object) *expected {
	if !s.room(o.Size) {
		return nil
	}
	e := &expected{stager: s, object: o, owner: "expect " + hex.EncodeToString(o.ID[:])}
	for block := range ring.Blocks(o.Size) {
		if s.store.Pin(o, block, e.owner) != nil {
			e.end()
			return nil
		}
	}
	return e
}

// end leaves what is here to its readers, and to those who need room.
func (e *expected) end() {
	e.store.Keep(e.object)
	e.store.Unpin(e.owner)
	e.bytes.Add(-e.object.Size)
}
