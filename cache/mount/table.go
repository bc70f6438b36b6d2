package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
)

// table is what the kernel holds of the mount's files, and a successor cannot ask it for: how many handles of a
// file are open, and the backing id that they read through, if they do. It lives in a memfd, which is parked
// with the connection, and grows by the pages that are touched.
//
// Two processes share it while one hands over to the other. So every use of it is between lock and unlock, which
// hold a mutex against this process and a file lock (of an open file description of our own) against others.
// Nothing that waits is done between them.
type table struct {
	file *os.File // the memfd, for parking
	own  *os.File // the same, opened again: locks of copies of one descriptor do not exclude each other
	mem  []byte
	n    int

	mu     chan struct{} // a mutex that gives up
	closed bool

	// Of a live mount: the memory of names of this process, and what the mount takes of it.
	names *nameMemory
	named int64
}

// header precedes the entries.
type header struct {
	magic, entries, next uint64
	ring                 [ringSlots]uint64
}

const (
	tableMagic  = uint64(0x01_6c_62_74_63_73_00_00) // "sctbl", version 1
	ringSlots   = 1024
	offTable    = int(unsafe.Sizeof(header{}))
	entrySize   = int(unsafe.Sizeof(slot{}))
	lockTimeout = 10 * time.Second
)

// slot is one file's entry.
type slot struct {
	backing int32  // the backing id that is registered for it, or 0
	opens   uint32 // handles; with a backing id all of them read through it, without none does
}

func tableSize(entries int) int { return offTable + entries*entrySize }

// newTable makes an empty one.
func newTable(entries int) (*table, error) {
	fd, err := unix.MemfdCreate("stepcache-mount", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make the table of open files: %w", err)
	}
	f := os.NewFile(uintptr(fd), "open-files")
	if err = unix.Ftruncate(fd, int64(tableSize(entries))); err == nil {
		// Whoever holds a copy must not be able to make a read of it fault.
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make the table of open files: %w", err)
	}
	t, err := mapTable(f, entries)
	if err != nil {
		return nil, err
	}
	t.head().magic, t.head().entries = tableMagic, uint64(entries)
	return t, nil
}

// openTable uses one that another process made. f is the table's, or closed.
func openTable(f *os.File, entries int) (*table, error) {
	bad := func(what string) (*table, error) {
		f.Close()
		return nil, fmt.Errorf("parked table of open files: %s", what)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return bad(err.Error())
	}
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return bad("not a sealed memfd")
	}
	if st.Size != int64(tableSize(entries)) {
		return bad(fmt.Sprintf("its size is %d bytes, not the %d that fit the snapshot", st.Size, tableSize(entries)))
	}
	t, err := mapTable(f, entries)
	if err != nil {
		return nil, err
	}
	if h := t.head(); h.magic != tableMagic || h.entries != uint64(entries) {
		t.close()
		return nil, errors.New("parked table of open files: not one, or of another version")
	}
	return t, nil
}

func mapTable(f *os.File, entries int) (*table, error) {
	fail := func(err error) (*table, error) {
		f.Close()
		return nil, fmt.Errorf("map the table of open files: %w", err)
	}
	own, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	mem, err := unix.Mmap(own, 0, tableSize(entries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(own)
		return fail(err)
	}
	return &table{file: f, own: os.NewFile(uintptr(own), "open-files"), mem: mem, n: entries, mu: make(chan struct{}, 1)}, nil
}

func (t *table) head() *header { return (*header)(unsafe.Pointer(&t.mem[0])) }

// close waits for its turn; who comes after it gets os.ErrClosed.
func (t *table) close() {
	t.mu <- struct{}{}
	defer func() { <-t.mu }()
	if t.closed {
		return
	}
	t.closed = true
	if t.names != nil {
		t.names.take(-t.named)
	}
	_ = unix.Munmap(t.mem)
	t.own.Close()
	t.file.Close()
}

// errTableBusy: another process has kept the lock for very long; it was stopped, perhaps.
var errTableBusy = errors.New("the table of open files is locked by another process")

// lock waits for its turn, for lockTimeout at most, or until ctx ends.
func (t *table) lock(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, lockTimeout, errTableBusy)
	defer cancel()
	select {
	case t.mu <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if t.closed {
		<-t.mu
		return os.ErrClosed
	}
	for wait := 10 * time.Microsecond; ; wait = min(2*wait, 5*time.Millisecond) {
		l := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
		err := unix.FcntlFlock(t.own.Fd(), unix.F_OFD_SETLK, &l)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EINTR) {
			<-t.mu
			return fmt.Errorf("lock the table of open files: %w", err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			<-t.mu
			return context.Cause(ctx)
		}
	}
}

func (t *table) unlock() {
	l := unix.Flock_t{Type: unix.F_UNLCK, Len: 1}
	_ = unix.FcntlFlock(t.own.Fd(), unix.F_OFD_SETLK, &l)
	<-t.mu
}

// at returns the entry of a file. Only between lock and unlock.
func (t *table) at(i catalog.Index) *slot {
	return (*slot)(unsafe.Pointer(&t.mem[offTable+int(i)*entrySize]))
}

// unanswered is the bit that the kernel sets in the number of a request that it sends again, because whoever
// read it did not answer.
const unanswered = 1 << 63

// once says whether a request that counts has not been counted yet. One that the kernel sends again may have
// been counted by a process that died before it answered, or be under way here; the last ones that were
// counted are in the ring.
func (t *table) once(unique uint64) bool {
	h := t.head()
	unique &^= unanswered
	if slices.Contains(h.ring[:], unique) {
		return false
	}
	h.ring[h.next%ringSlots] = unique
	h.next++
	return true
}

// successionByte is a byte, far behind the table's end, that the server in charge has locked.
const successionByte = 1 << 40

// succeed takes charge, unless another process has it. It is given up with the process.
func (t *table) succeed() bool {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: successionByte, Len: 1}
	return unix.FcntlFlock(t.own.Fd(), unix.F_OFD_SETLK, &l) == nil
}

// each calls f for every file that has an entry. Only between lock and unlock. It skips the holes of the file,
// since looking at one fills it.
func (t *table) each(f func(i catalog.Index, s *slot)) {
	fd, size := int(t.own.Fd()), int64(len(t.mem))
	for end := int64(0); end < size; {
		start, err := unix.Seek(fd, end, unix.SEEK_DATA)
		if err != nil {
			return // ENXIO: no more data
		}
		if end, err = unix.Seek(fd, start, unix.SEEK_HOLE); err != nil {
			end = size
		}
		first := max(0, (start-int64(offTable))/int64(entrySize))
		last := min(int64(t.n), (end-int64(offTable)+int64(entrySize)-1)/int64(entrySize))
		for i := first; i < last; i++ {
			if s := t.at(catalog.Index(i)); *s != (slot{}) {
				f(catalog.Index(i), s)
			}
		}
	}
}
