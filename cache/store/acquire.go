package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// Block is one block in use: its bytes stay until Release. Whoever is served from heap (not Resident)
// holds a part of the bounded buffers until then: release it before acquiring another.
type Block struct {
	s        *Store
	b        *block
	sums     []uint64
	file     *os.File
	heap     *buffer
	released atomic.Bool
}

// flight is one fill under way. Guarded by Store.mu but for done.
type flight struct {
	b       *block
	done    chan struct{} // closed once the flight ended
	cancel  context.CancelFunc
	waiters int
	left    bool // the last waiter left: nobody may join any more
	ended   bool
	err     error
	heap    *buffer  // the result, when it is not resident
	file    *os.File // and when it is: each waiter has a use of it
	sums    []uint64
	// joined is closed when somebody else than who began it waits; nil where nobody wants to know.
	joined chan struct{}
	// stays says that it goes on for a while after its last waiter's deadline, and unwanted cancels it where nobody
	// comes back; nil while somebody waits.
	stays    bool
	unwanted *time.Timer
}

const (
	// lingers is for how long a fill goes on of which the last waiter's time was up: who is slow because the bucket is
	// comes again, and would never get the block if it was begun anew each time.
	lingers = 30 * time.Second
	// maxLingering bounds how many do so at once: whoever waited for one holds nothing for it any more.
	maxLingering = 16
)

// join adds a waiter. The caller holds s.mu.
func (s *Store) join(fl *flight) {
	s.linger(fl, nil)
	if fl.waiters == 1 && fl.joined != nil {
		close(fl.joined)
		fl.joined = nil
	}
	fl.waiters++
}

// linger sets what ends a fill that nobody waits for, nil for nothing. The caller holds s.mu.
func (s *Store) linger(fl *flight, end *time.Timer) {
	if fl.unwanted != nil {
		fl.unwanted.Stop()
		s.lingering--
	}
	if fl.unwanted = end; end != nil {
		s.lingering++
	}
}

// A block that is not there is got in one of five ways. Whoever wants it meanwhile shares the fill, whichever began it.
//
//	               who gets it so                             room is made         and where there is none
//	AcquirePlaced  a worker, from the bucket                  with the first piece from heap
//	Begin          a worker, several adjacent ones as well    with the first piece from heap
//	AcquireSummed  a worker, from another that held it before after the fill       from heap
//	Acquire        a worker, of an object that it has open    after the fill       from heap
//	Place          who has the bytes: a put, a node's cache   before the fill      ErrNoRoom, and no fill
//
// Room is made late where an answer may not come: others would have been evicted for nothing.

// Acquire returns the block in use, filling it if it is absent. All callers that want the block while a
// fill is under way share it; one whose context ends leaves the others' fill running, and the last one to
// leave cancels it, or, where that one's deadline was the end, it goes on for up to half a minute. An error of the fill
// goes to all who wait then; later callers try again. When the policy refuses the block or nothing can be evicted for
// it, it comes from heap.
func (s *Store) Acquire(ctx context.Context, o ring.Object, n int64, fill Fill) (*Block, error) {
	return s.acquire(ctx, o, n, true, func(ctx context.Context, fl *flight) {
		s.run(ctx, fl, func(ctx context.Context, p []byte) ([]uint64, error) { return nil, fill(ctx, p) })
	})
}

// AcquireSummed is Acquire for who receives a block together with its sums. The fill ends with its last waiter, also at
// a deadline: what waits for another worker is bounded by those who wait here.
func (s *Store) AcquireSummed(ctx context.Context, o ring.Object, n int64, fill FillSummed) (*Block, error) {
	return s.acquire(ctx, o, n, false, func(ctx context.Context, fl *flight) { s.run(ctx, fl, fill) })
}

// acquire returns the block in use; fly makes the flight of one that is absent, which stays or not.
func (s *Store) acquire(ctx context.Context, o ring.Object, n int64, stays bool, fly func(context.Context, *flight)) (*Block, error) {
	if err := checkBlock(o, n); err != nil {
		return nil, err
	}
	missing := false // the file was gone from the file system although it should be there
	for {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("block %d of object %s: %w", n, name(o.ID), err)
		}
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return nil, ErrClosed
		}
		ob, err := s.object(o)
		if err != nil {
			s.mu.Unlock()
			return nil, err
		}
		b := ob.blocks[n]
		var busy <-chan struct{}
		switch {
		case ob.closing != nil:
			busy = ob.closing
		case b != nil && b.state == evicting:
			busy = b.done
		case b != nil && b.flight != nil && b.flight.left:
			busy = b.flight.done
		}
		if busy != nil {
			s.mu.Unlock()
			select {
			case <-busy:
			case <-ctx.Done():
			}
			continue
		}
		if b != nil && b.state == resident && b.flight == nil {
			s.stats.Hits++
			sums := s.use(b)
			s.mu.Unlock()
			h, err := s.handle(b, sums)
			if err == nil || !s.vanished(ob, err, &missing) {
				return h, wrap(b, err)
			}
			continue
		}
		joined := b != nil && b.flight != nil
		if joined {
			s.stats.Shared++
		} else {
			b = s.start(ctx, ob, n, b, stays, fly)
		}
		fl := b.flight
		s.join(fl)
		s.mu.Unlock()

		got, err := s.await(ctx, fl)
		if joined && errors.Is(err, ErrNoRoom) {
			continue // another one's Place; this one may do without room
		}
		return got, err
	}
}

// await waits for a flight as one of its waiters.
func (s *Store) await(ctx context.Context, fl *flight) (*Block, error) {
	select {
	case <-fl.done:
	case <-ctx.Done():
		s.leave(fl, errors.Is(ctx.Err(), context.DeadlineExceeded))
		return nil, wrap(fl.b, ctx.Err())
	}
	if fl.err != nil {
		return nil, fl.err
	}
	return &Block{s: s, b: fl.b, sums: fl.sums, heap: fl.heap, file: fl.file}, nil
}

func wrap(b *block, err error) error {
	if err != nil {
		err = fmt.Errorf("block %d of %s: %w", b.n, b.obj, err)
	}
	return err
}

// vanished says whether a file could not be opened because it is no longer there, so that the block must be
// filled again: the object was dropped since it was looked up, or somebody removed the file, which is put
// up with once.
func (s *Store) vanished(o *object, err error, before *bool) bool {
	if !errors.Is(err, os.ErrNotExist) {
		return false
	}
	s.mu.Lock()
	gone := o.gone
	s.mu.Unlock()
	if gone {
		return true
	}
	if *before {
		return false
	}
	*before = true
	s.log.Warn("store: a file vanished, its blocks are fetched again", "file", s.path(o.id))
	s.drop(o)
	return true
}

// Lookup returns the block in use if it is resident; it fills nothing.
func (s *Store) Lookup(o ring.Object, n int64) (*Block, bool) {
	s.mu.Lock()
	ob := s.objects[o.ID]
	if s.closed || ob == nil || ob.size != o.Size || ob.closing != nil {
		s.mu.Unlock()
		return nil, false
	}
	b := ob.blocks[n]
	if b == nil || b.state != resident || b.flight != nil {
		s.mu.Unlock()
		return nil, false
	}
	s.stats.Hits++
	sums := s.use(b)
	s.mu.Unlock()
	h, err := s.handle(b, sums)
	return h, err == nil
}

// use takes a reference to a resident block and tells the policy.
func (s *Store) use(b *block) []uint64 {
	b.refs++
	b.obj.refs++
	s.policyAccess(b)
	return b.sums
}

// handle makes the handle of a reference already taken; on an error the reference is given back.
func (s *Store) handle(b *block, sums []uint64) (*Block, error) {
	f, err := s.openFile(b.obj, false)
	if err != nil {
		s.unuse(b, false)
		return nil, openError(err)
	}
	return &Block{s: s, b: b, sums: sums, file: f}, nil
}

func openError(err error) error {
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		return fmt.Errorf("%w: raise the limit of open files (ulimit -n)", err)
	}
	return err
}

// unuse gives a reference back, and with it one use of the file.
func (s *Store) unuse(b *block, opened bool) {
	o := b.obj
	s.mu.Lock()
	b.refs--
	o.refs--
	var f *os.File
	if opened {
		f = s.unuseFile(o)
	}
	s.settle(o)
	gone := o.gone
	s.mu.Unlock()
	s.shut(o, f)
	if gone {
		s.reap(o)
	}
}

// start begins the flight of a block that is absent (b is nil) or corrupt.
func (s *Store) start(ctx context.Context, o *object, n int64, b *block, stays bool, fly func(context.Context, *flight)) *block {
	if b == nil {
		b = &block{obj: o, n: n, size: int32(blockLen(o.size, n)), state: filling}
		o.blocks[n] = b
	}
	// The fill outlives the caller that began it, but keeps its values (traces); Close ends it too.
	fctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(s.ctx, cancel)
	fl := &flight{b: b, done: make(chan struct{}), cancel: cancel, stays: stays}
	b.flight = fl
	s.stats.Misses++
	s.hands.run(&s.wg, func() {
		defer stop()
		defer cancel()
		fly(fctx, fl)
	})
	return b
}

// leave takes one waiter off a flight. The last one cancels the fill, unless it may come back.
func (s *Store) leave(fl *flight, back bool) {
	s.mu.Lock()
	if !fl.ended {
		fl.waiters--
		switch {
		case fl.waiters > 0:
		case back && fl.stays && s.lingering < maxLingering:
			s.linger(fl, time.AfterFunc(s.lingers, func() { s.abandon(fl) }))
		default:
			fl.left = true
			fl.cancel()
		}
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	// It ended meanwhile and left this waiter a reference.
	switch {
	case fl.err != nil:
	case fl.heap != nil:
		fl.heap.release()
	default:
		s.unuse(fl.b, true)
	}
}

// abandon cancels a fill that nobody waits for.
func (s *Store) abandon(fl *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !fl.ended && fl.waiters == 0 {
		fl.left = true
		fl.cancel()
	}
}

// run fills, admits and writes one block.
func (s *Store) run(ctx context.Context, fl *flight, fill FillSummed) {
	b := fl.b
	var sums []uint64
	buf, err := s.buffers.get(ctx, int(b.size))
	if err == nil {
		if sums, err = fill(ctx, buf.p); err != nil {
			buf.release()
		}
	}
	if err != nil {
		if s.ctx.Err() != nil {
			err = errors.Join(ErrClosed, err)
		}
		s.end(fl, nil, nil, wrap(b, err))
		return
	}
	if len(sums) != checksum.Count(len(buf.p)) {
		sums = checksum.All(buf.p)
	}
	if s.reserve(b) && s.write(b, buf.p) {
		s.end(fl, nil, sums, nil)
		buf.release()
		return
	}
	s.end(fl, buf, sums, nil)
}

// end publishes a flight's result: an error, a buffer, or a block that was written.
func (s *Store) end(fl *flight, heap *buffer, sums []uint64, err error) {
	b, o := fl.b, fl.b.obj
	var unused *os.File
	s.mu.Lock()
	fl.ended, fl.err, fl.heap, fl.sums = true, err, heap, sums
	s.linger(fl, nil)
	b.flight = nil
	switch {
	case err == nil && heap == nil:
		b.sums = sums
		// The waiters take the file over from write: small blocks feel one more open and close.
		fl.file = o.file
		o.fileRefs += fl.waiters
		unused = s.unuseFile(o)
		if o.gone {
			s.setState(b, corrupt) // those who waited get it, nobody else finds it
		} else {
			s.setState(b, resident)
			s.journal.add(b)
		}
		b.refs += int32(fl.waiters)
		o.refs += fl.waiters
		s.settle(o)
	case b.reserved:
		// A corrupt block that could not be repaired stays what it was.
		s.setState(b, corrupt)
		s.setOut(b)
		s.settle(o)
	default:
		if o.blocks[b.n] == b {
			s.remove(b)
		}
		s.tidy(o)
	}
	if heap != nil {
		s.stats.Uncached++
		heap.hold(fl.waiters)
	}
	gone := o.gone
	s.mu.Unlock()
	s.shut(o, unused)
	if heap != nil {
		heap.release()
	}
	close(fl.done)
	if gone {
		s.reap(o)
	}
}

// write puts a reserved block's bytes into the file, and leaves it in use for end. When the file system refuses, the
// reservation is given back with whatever was written, and it returns false.
func (s *Store) write(b *block, p []byte) bool {
	f, err := s.openFile(b.obj, true)
	if err == nil {
		if _, err = f.WriteAt(p, b.off()); err != nil {
			s.closeFile(b.obj)
		}
	}
	return s.wrote(b, err == nil, err)
}

// wrote ends what reserve began. Unless it went well, the reservation is given back with whatever was written;
// refused is what the file system said.
func (s *Store) wrote(b *block, well bool, refused error) bool {
	o := b.obj
	s.mu.Lock()
	defer s.mu.Unlock()
	o.writers--
	s.writing--
	s.changes++
	defer s.idle.Broadcast()
	if well {
		return true
	}
	if refused != nil {
		s.noSpace(o, refused)
	}
	if b.state == corrupt {
		return false // still reserved, still corrupt
	}
	s.policyRemove(b)
	s.punch(b)
	return false
}

// Len is the block's length in bytes.
func (b *Block) Len() int { return int(b.b.size) }

// Sums are those of the block (package checksum). They must not be changed.
func (b *Block) Sums() []uint64 { return b.sums }

// Resident is false when the block is served from heap and nobody will find it again.
func (b *Block) Resident() bool { return b.heap == nil }

// File is the file that holds the block and the block's offset in it; nil when it is served from heap. The
// file belongs to the store and is valid until Release.
func (b *Block) File() (*os.File, int64) {
	if b.file == nil {
		return nil, 0
	}
	return b.file, b.b.off()
}

// Reopen opens the file that holds the block anew, for reading, with an offset of its own: io.Copy from it
// to a connection is done by the kernel. The caller closes it before Release. It is os.ErrNotExist for a
// block that is served from heap, or where /proc is not mounted.
func (b *Block) Reopen() (*os.File, error) {
	if b.file == nil {
		return nil, os.ErrNotExist
	}
	f, err := openAgain(b.file)
	if err != nil {
		return nil, openError(err)
	}
	return f, nil
}

func openAgain(f *os.File) (*os.File, error) {
	path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		switch err {
		case nil:
			return os.NewFile(uintptr(fd), f.Name()), nil
		case unix.EINTR:
		default:
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// Bytes is the content of a block that is served from heap, nil otherwise. It must not be changed.
func (b *Block) Bytes() []byte {
	if b.heap == nil {
		return nil
	}
	return b.heap.p
}

// ReadAt reads at an offset within the block, as io.ReaderAt says.
func (b *Block) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("offset %d: %w", off, ErrInvalid)
	}
	left := int64(b.Len()) - off
	if left <= 0 && len(p) > 0 {
		return 0, io.EOF
	}
	short := int64(len(p)) > left
	if short {
		p = p[:left]
	}
	var k int
	var err error
	if b.heap != nil {
		k = copy(p, b.heap.p[off:])
	} else {
		k, err = b.file.ReadAt(p, b.b.off()+off)
	}
	if err == io.EOF && k < len(p) {
		err = io.ErrUnexpectedEOF // somebody cut the file short: Verify will tell
	} else if err == io.EOF {
		err = nil
	}
	if err == nil && short {
		err = io.EOF
	}
	return k, err
}

// Release ends the use of the block. More than one call does no harm.
func (b *Block) Release() {
	if !b.released.CompareAndSwap(false, true) {
		return
	}
	if b.heap != nil {
		b.heap.release()
		return
	}
	b.s.unuse(b.b, true)
}
