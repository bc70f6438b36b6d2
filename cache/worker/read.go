package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// peerTimeout bounds one question to the earlier owners of a block. The peer has given up a bucket that sends nothing
// by then (wire.SourceTimeout), and this worker's reader waits for wire.WorkerTimeout.
const peerTimeout = wire.SourceTimeout + (wire.WorkerTimeout-wire.SourceTimeout)/2

func blockOff(block int64) int64 { return block * ring.BlockSize }

func blockLen(size, block int64) int64 { return min(ring.BlockSize, size-blockOff(block)) }

// checkRange says whether [off, off+length) may be read from a file of the given size: within one block,
// on the boundaries of sums.
func checkRange(size, off int64, length int32) error {
	switch {
	case length <= 0 || length > ring.BlockSize:
		return fmt.Errorf("%w: length %d is not within 1 and %d", source.ErrInvalid, length, ring.BlockSize)
	case off < 0 || off >= size || int64(length) > size-off:
		return fmt.Errorf("%w: bytes %d to %d of a file of %d", source.ErrInvalid, off, off+int64(length), size)
	case off/ring.BlockSize != (off+int64(length)-1)/ring.BlockSize:
		return fmt.Errorf("%w: bytes %d to %d are in two blocks", source.ErrInvalid, off, off+int64(length))
	case off%checksum.Size != 0 || (off+int64(length) != size && length%checksum.Size != 0):
		return fmt.Errorf("%w: bytes %d to %d do not start and end on a multiple of %d", source.ErrInvalid, off, off+int64(length), checksum.Size)
	}
	return nil
}

// blockKey names a block of an object version.
type blockKey struct {
	id    source.ID
	block int64
}

// acquire returns a block in use, filling it as the flags and this worker's place among its owners say.
// budget bounds what one reader may hold uncached; the caller calls done after it released the block.
func (w *Worker) acquire(ctx context.Context, f file, block int64, flags wire.Flag, budget budget) (b *store.Block, done func(), err error) {
	none := func() {}
	if b, ok := w.store.Lookup(f.ring, block); ok {
		if flags&wire.FlagVerify == 0 || w.store.Verify(b) {
			return b, none, nil
		}
		b.Release()
		w.log.Warn("block failed its checksum in memory, fetching it again", "object", f.String(), "block", block)
	}
	if flags&wire.FlagResidentOnly != 0 {
		return nil, none, fmt.Errorf("%w: block %d of %s", wire.ErrNotResident, block, f)
	}
	if flags&wire.FlagGuess != 0 {
		end, err := w.guess(f, block)
		if err != nil {
			return nil, none, err
		}
		defer end()
	}
	v := w.members.view()
	owners, place := v.owners(w.config.ID, f.ring, block, w.config.Copies)
	return w.fill(ctx, f, block, owners, place, flags, budget)
}

// maxGuesses is how many blocks are fetched at once that nobody asked for: fewer than the requests that a
// source has under way, so that what somebody waits for never waits for them.
const maxGuesses = 48

// guess begins a fill for a reader that only guesses it will want the block, unless the block would take the
// place of another, counting what the guesses under way will take, or they are too many. The caller ends it.
func (w *Worker) guess(f file, block int64) (end func(), err error) {
	select {
	case w.guesses <- struct{}{}:
	default:
		return nil, fmt.Errorf("%w: %d blocks are fetched already that nobody asked for", wire.ErrOverloaded, maxGuesses)
	}
	kept, ok := w.promise(f, block, w.config.Memory/guessRoom)
	end = func() {
		kept()
		<-w.guesses
	}
	if !ok {
		end()
		return nil, fmt.Errorf("%w: no room for block %d of %s but that of others", wire.ErrNotResident, block, f)
	}
	return end, nil
}

// promise notes that a block is about to be fetched that may take the place of no other, until end is called: many are
// at once, and each takes its room only when it has arrived. It says whether there is room for it, beside so much.
func (w *Worker) promise(f file, block, beside int64) (end func(), ok bool) {
	size := blockLen(f.ring.Size, block)
	promised := w.promised.Add(size)
	return func() { w.promised.Add(-size) }, w.store.Room(f.ring, block, promised-size+beside)
}

// guessRoom is the part of the quota that guesses leave free: fills that are under way for readers have not
// taken their room yet.
const guessRoom = 32

// fill acquires a block that is not resident; owners are its owners in order and place is this worker's
// among them.
func (w *Worker) fill(ctx context.Context, f file, block int64, owners []ring.Member, place int, flags wire.Flag, budget budget) (b *store.Block, done func(), err error) {
	none := func() {}
	key := blockKey{f.ring.ID, block}
	size := blockLen(f.ring.Size, block)
	var earlier []ring.Member
	switch {
	case flags&wire.FlagPeer != 0:
		if w.asking.has(key) {
			// This worker is itself waiting for an answer about the block, maybe from the very sender,
			// because the two have different membership lists. Whoever asks here goes to the bucket.
			return nil, none, fmt.Errorf("%w: block %d of %s: worker %s asks another worker for it", wire.ErrNotResident, block, f, w.config.ID)
		}
	case flags&wire.FlagReadThrough != 0 || place == 0:
	case place > 0:
		earlier = owners[:place]
	default:
		return nil, none, fmt.Errorf("%w: block %d of %s under membership epoch %d", wire.ErrNotOwner, block, f, w.members.view().Epoch)
	}

	var holders int // the first of earlier are asked for what they hold only
	if flags&wire.FlagPeer == 0 && place >= 0 {
		if former := w.members.view().former(f.ring, block, len(owners), w.isNew()); len(former) > 0 {
			holders = len(former)
			earlier = append(former, earlier...)
		}
	}

	// Room is taken before the fill, because a block that cannot be kept is held in heap until its reader
	// has it. A block that becomes resident needs none.
	if err := budget.take(ctx, size); err != nil {
		return nil, none, fmt.Errorf("%w: block %d of %s: this reader does not take what it asked for: %w", wire.ErrOverloaded, block, f, err)
	}
	done = func() { budget.give(size) }
	release := func() {}
	if len(earlier) > 0 {
		// Fills that wait for other workers may hold half of the store's buffers only: the other half is
		// left to fills from the bucket, which other workers' fills wait for.
		if err := w.peerFills.Acquire(ctx, size); err != nil {
			done()
			return nil, none, fmt.Errorf("%w: block %d of %s: %w", wire.ErrOverloaded, block, f, err)
		}
		release = sync.OnceFunc(func() { w.peerFills.Release(size) })
		defer release()
		w.asking.add(key)
		defer w.asking.remove(key)
	}
	fromSource := func(ctx context.Context, to io.WriterAt) ([]uint64, error) {
		sums, err := w.readSource(ctx, f, block, to)
		if err == nil {
			w.digests.dirty(f.ring.ID)
		}
		return sums, err
	}
	if len(earlier) == 0 {
		b, err = w.store.AcquirePlaced(ctx, f.ring, block, fromSource)
	} else {
		b, err = w.store.AcquireSummed(ctx, f.ring, block, func(ctx context.Context, p []byte) ([]uint64, error) {
			err := w.readPeers(ctx, earlier, holders, f, block, p)
			if errors.Is(err, errNoPeer) {
				release() // from here on it waits for the bucket
				return fromSource(ctx, bytesAt(p))
			}
			if err == nil {
				w.digests.dirty(f.ring.ID)
			}
			return nil, err
		})
	}
	if err != nil {
		done()
		return nil, none, err
	}
	if b.Resident() {
		done()
		done = none
		w.checkWhole(f)
	}
	return b, done, nil
}

// bytesAt are bytes that can be written to.
type bytesAt []byte

func (m bytesAt) WriteAt(p []byte, off int64) (int, error) {
	n := copy(m[off:], p)
	if n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// errNoPeer: no earlier owner could give the block.
var errNoPeer = errors.New("no earlier owner has the block")

// readPeers asks the earlier owners of a block for it, each to act as its first owner, but the first few,
// which are no owners any more and give what they hold only. The error wraps
// errNoPeer when the bucket should be asked instead.
func (w *Worker) readPeers(ctx context.Context, earlier []ring.Member, holders int, f file, block int64, p []byte) error {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	var last error
	for i, m := range earlier {
		req := wire.Request{
			Op: wire.OpRead, Flags: wire.FlagPeer, Epoch: w.members.view().Epoch,
			Snapshot: f.snapshot, Index: f.index, Off: blockOff(block), Length: int32(len(p)),
		}
		if i < holders {
			req.Flags |= wire.FlagResidentOnly
		}
		last = w.peers.read(ctx, m, req, p)
		if last == nil {
			w.counts.peerBytes.Add(int64(len(p)))
			return nil
		}
		// What the bucket said of the object version is final; whatever else is wrong is the peer's.
		if errors.Is(last, source.ErrChanged) || errors.Is(last, source.ErrNotFound) {
			return last
		}
		w.log.Debug("an earlier owner did not give a block", "peer", m.ID, "object", f.String(), "block", block, "error", last)
		if errors.Is(last, wire.ErrCorrupt) {
			w.counts.corruptPeer.Add(1)
		}
	}
	return fmt.Errorf("%w: %w", errNoPeer, last)
}

// blockSet are the blocks that this worker asks a peer for.
type blockSet struct {
	mu sync.Mutex
	n  map[blockKey]int
}

func (s *blockSet) add(k blockKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n[k]++
}

func (s *blockSet) remove(k blockKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n[k]--; s.n[k] == 0 {
		delete(s.n, k)
	}
}

func (s *blockSet) has(k blockKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n[k] > 0
}

// waitOf is how long a request's sender waits for the answer.
func waitOf(req wire.Request) time.Duration {
	d := time.Duration(req.WaitMillis) * time.Millisecond
	if d <= 0 || d > wire.WorkerTimeout {
		return wire.WorkerTimeout
	}
	return d
}
