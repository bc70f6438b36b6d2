package store

import (
	"container/list"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/meminfo"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// state of a block that is in its object's map; an absent block is in no map.
type state uint8

const (
	// filling: a flight is under way and nothing is reserved yet.
	filling state = iota
	// writing: reserved, its bytes are being written.
	writing
	// resident: its bytes are on the file system and matched their sums.
	resident
	// corrupt: its bytes no longer match. They stay reserved, until a new fill repairs them in place
	// (which no reader of the file can mistake for anything but the right bytes) or they are evicted.
	corrupt
	// evicting: being punched out; done is closed when that ended.
	evicting
)

// block is one block of an object. All fields are guarded by Store.mu.
type block struct {
	obj      *object
	n        int64
	size     int32
	state    state
	inPolicy bool
	out      bool // in obj.outs
	reserved bool // its weight is part of Store.used
	// weightless: it is in the policy, which does not judge it yet.
	weightless bool
	refs       int32
	used       int64    // when last, by Store.read
	uses       uint8    // while it was not in the policy, which is told when it is
	sums       []uint64 // immutable once set
	flight     *flight
	done       chan struct{}
}

func (b *block) key() key { return key{b.obj.id, b.n} }

func (b *block) off() int64 { return b.n * ring.BlockSize }

// object is one object version of which something is held, filled or pinned. Guarded by Store.mu.
type object struct {
	id     source.ID
	size   int64
	blocks map[int64]*block
	pins   map[int64][]string // owners; nil when nothing is pinned
	// outs are reserved blocks that the policy let go while they could not be evicted; settle gives them
	// back to it.
	outs []*block

	resident int64 // blocks in that state
	bytes    int64 // of content of resident blocks
	reserved int   // blocks that are reserved
	charged  int64 // their weight
	refs     int   // of all blocks
	writers  int   // blocks being written
	punches  int   // blocks being evicted

	exists   bool     // the file was made and has its full size
	file     *os.File // open while fileRefs > 0
	fileRefs int
	shutting int // descriptors of ours that are being closed: they still look like somebody's

	fresh      *list.Element // of Store.fresh; nil: the policy judges its blocks
	freshAt    int64         // since when, by Store.missed
	freshBytes int64

	leases int
	lent   bool // a descriptor of this very file left the store: it may only be unlinked
	early  bool // and it did before the object was whole
	held   bool // and somebody outside still had it open when last looked
	// closing is open while the file is being unlinked or looked at for that: whoever wants to touch the
	// file waits for it and then looks again.
	closing chan struct{}
	gone    bool     // dropped: in no map any more
	last    *os.File // of a dropped object: tells when the last outside reader closed it
	reaping bool
}

func (o *object) String() string { return "object " + name(o.id) }

func (o *object) pinned(n int64) bool { return len(o.pins[n]) > 0 }

func (o *object) whole() bool { return o.resident == ring.Blocks(o.size) }

// blockLen is the length of block n of an object of that size.
func blockLen(size, n int64) int {
	return int(min(size-n*ring.BlockSize, ring.BlockSize))
}

func checkBlock(o ring.Object, n int64) error {
	if o.Size < 0 || n < 0 || n >= ring.Blocks(o.Size) {
		return fmt.Errorf("object %s has %d blocks, block %d asked for: %w", name(o.ID), ring.Blocks(max(o.Size, 0)), n, ErrInvalid)
	}
	return nil
}

// weight is what a block of that many bytes holds of the quota: its pages, the share of an inode, its journal record
// three times, since the journal may be half garbage while it is being rewritten, and its entry in the heap.
func (s *Store) weight(size int) int64 {
	return s.roundUp(int64(size)) + inodeCost + 3*recordLen(size) + entryCost
}

func (s *Store) roundUp(n int64) int64 { return (n + s.unit - 1) / s.unit * s.unit }

// charge reserves b's weight.
func (s *Store) charge(b *block) {
	w := s.weight(int(b.size))
	b.reserved = true
	b.obj.reserved++
	b.obj.charged += w
	s.used += w
	s.entries++
	if n := s.entries * entryCost; n >= s.inHeap+entriesStep {
		s.raiseHeap(n)
	}
	s.pages += s.roundUp(int64(b.size))
	if b.inPolicy {
		s.inPolicy += w
	}
	s.changes++
}

// uncharge gives b's weight back.
func (s *Store) uncharge(b *block) {
	w := s.weight(int(b.size))
	if b.inPolicy {
		s.inPolicy -= w
	}
	b.reserved = false
	b.obj.reserved--
	b.obj.charged -= w
	s.used -= w
	s.entries--
	if n := s.entries * entryCost; n <= s.inHeap-entriesStep {
		s.raiseHeap(n)
	}
	s.pages -= s.roundUp(int64(b.size))
	s.changes++
}

// raiseHeap keeps the heap's limit so many bytes above what it is without a store: what the blocks' entries take, which
// the quota counts, so that the file system holds as much less.
func (s *Store) raiseHeap(n int64) {
	meminfo.MoveHeap(n - s.inHeap)
	s.inHeap = n
}

// setState moves b between states and keeps the counts of resident blocks.
func (s *Store) setState(b *block, to state) {
	o := b.obj
	if b.state == resident {
		o.resident--
		o.bytes -= int64(b.size)
		s.stats.Blocks--
		s.stats.Bytes -= int64(b.size)
		s.live -= recordLen(int(b.size))
		if o.resident == 0 {
			s.stats.Objects--
		}
	}
	b.state = to
	if to == resident {
		o.resident++
		o.bytes += int64(b.size)
		s.stats.Blocks++
		s.stats.Bytes += int64(b.size)
		s.live += recordLen(int(b.size))
		if o.resident == 1 {
			s.stats.Objects++
		}
	}
}

// remove takes b out of its object: its bytes are gone.
func (s *Store) remove(b *block) {
	o := b.obj
	s.policyRemove(b)
	if b.reserved {
		s.setState(b, evicting)
		s.uncharge(b)
	}
	if b.out {
		b.out = false
		o.outs = slices.DeleteFunc(o.outs, func(x *block) bool { return x == b })
	}
	delete(o.blocks, b.n)
}

// object returns the object of that ID, making its entry if there is none.
func (s *Store) object(o ring.Object) (*object, error) {
	ob := s.objects[o.ID]
	if ob == nil {
		ob = &object{id: o.ID, size: o.Size, blocks: make(map[int64]*block, 1)}
		s.objects[o.ID] = ob
	}
	if ob.size != o.Size {
		return nil, fmt.Errorf("%s has %d bytes, not %d: %w", ob, ob.size, o.Size, ErrInvalid)
	}
	return ob, nil
}

// tidy forgets an object that nothing is left of.
func (s *Store) tidy(o *object) {
	if len(o.blocks) == 0 && len(o.pins) == 0 && o.leases == 0 && o.closing == nil && !o.exists && !o.gone {
		s.unfresh(o)
		delete(s.objects, o.id)
	}
}

// wait unlocks until c is closed.
func (s *Store) wait(c <-chan struct{}) {
	s.mu.Unlock()
	<-c
	s.mu.Lock()
}

// openFile returns o's file, open for reading and writing, until closeFile. It makes the file if create
// is set. Files are open only while somebody uses them, so that hundreds of thousands of small objects
// take no descriptors.
func (s *Store) openFile(o *object, create bool) (*os.File, error) {
	s.mu.Lock()
	if o.file != nil {
		o.fileRefs++
		f := o.file
		s.mu.Unlock()
		return f, nil
	}
	s.mu.Unlock()

	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE
	}
	f, err := openFast(s.path(o.id), flags)
	if err == nil && create {
		// The full size first: a huge-page tmpfs gives huge pages only within the file's size.
		err = f.Truncate(o.size)
	}

	s.mu.Lock()
	if create && f != nil {
		o.exists = true
	}
	other := f // to be closed
	switch {
	case err != nil:
	case o.file != nil:
		f = o.file
		o.fileRefs++
	case o.gone:
		// Dropped meanwhile: the path may be another object's file by now.
		err = os.ErrNotExist
	default:
		o.file, other = f, nil
		o.fileRefs++
	}
	if other != nil {
		o.shutting++
	}
	s.mu.Unlock()
	s.shut(o, other)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// openFast opens a regular file. os.OpenFile would try it on the poller first, which refuses regular files
// after half a dozen system calls: most of the cost of reading a small object.
func openFast(path string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		switch err {
		case nil:
			return os.NewFile(uintptr(fd), path), nil
		case unix.EINTR:
		default:
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// closeFile ends one use of o's file.
func (s *Store) closeFile(o *object) {
	s.mu.Lock()
	f := s.unuseFile(o)
	s.mu.Unlock()
	s.shut(o, f)
}

// unuseFile is closeFile for a caller that holds the mutex and calls shut after it.
func (s *Store) unuseFile(o *object) *os.File {
	o.fileRefs--
	if o.fileRefs > 0 {
		return nil
	}
	f := o.file
	o.file = nil
	o.shutting++
	return f
}

// shut closes a descriptor that o.shutting counts; nil is none.
func (s *Store) shut(o *object, f *os.File) {
	if f == nil {
		return
	}
	f.Close()
	s.mu.Lock()
	o.shutting--
	s.settle(o)
	gone := o.gone
	s.mu.Unlock()
	if gone {
		s.reap(o)
	}
}

// open says whether this process has o's file open for its own use.
func (o *object) open() bool { return o.fileRefs > 0 || o.shutting > 0 }
