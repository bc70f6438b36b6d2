package mount

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// How the kernel is made to take a file's bytes before a reader asks for them: this process has it read ahead
// (posix_fadvise, WILLNEED) through the mount, and answers that from what it offers.
//
// The kernel has a call for it, NOTIFY_STORE, but within that it waits for a page that some reader has locked, and
// heeds no signal: a process that is killed right then, with that reader's request unanswered, never ends, keeps the
// connection open, and so hangs every user of the mount, and a container that restarts. Nothing here waits so. A
// file is opened by its node id (open_by_handle_at): the kernel finds what it knows already, and asks for nothing. In
// NoOpen mode it does not ask at open and close either. Reading ahead starts requests in the background and waits
// for none of them; it waits for room among them at most, and that ends by a signal that kills.

// errRefused: the kernel does none of it here, whatever the file.
var errRefused = errors.New("the kernel refuses")

// entrance is this process's own use of the mount, which is busy as long as it is open.
type entrance struct {
	fd   int
	step int64 // what the kernel reads ahead at most in one go, in bytes
}

// enter opens the mount as others do.
func (m *Server) enter() (*entrance, error) {
	fail := func(err error) (*entrance, error) {
		return nil, fmt.Errorf("the mount at %q cannot be read by its own server: %w", m.dir, err)
	}
	if m.dir == "" || m.dev == (device{}) {
		return fail(errors.New("it was mounted by another process"))
	}
	// Whatever else may lie there is not to be touched: it could hang.
	at, err := mountinfo.At(m.dir)
	if err != nil {
		return fail(err)
	}
	if len(at) == 0 || (device{at[0].Major, at[0].Minor}) != m.dev {
		return fail(errors.New("it is not there any more"))
	}
	fd, err := unix.Open(m.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	return &entrance{fd, m.dev.readAhead()}, nil
}

func (e *entrance) close() { unix.Close(e.fd) }

// readAhead has the kernel read a file that it knows, from its start.
func (e *entrance) readAhead(id uint64, size int64) error {
	// What the kernel makes of a node (fs/fuse/inode.c): its id, the upper half first, and its generation.
	const fileID, words = 0x81, 3 // FILEID_INO64_GEN of linux/exportfs.h
	h := make([]byte, 0, words*4)
	h = binary.NativeEndian.AppendUint32(h, uint32(id>>32))
	h = binary.NativeEndian.AppendUint32(h, uint32(id))
	h = binary.NativeEndian.AppendUint32(h, generation)
	fd, err := unix.OpenByHandleAt(e.fd, unix.NewFileHandle(fileID, h), unix.O_RDONLY|unix.O_CLOEXEC)
	switch {
	case errors.Is(err, unix.ESTALE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.EINTR):
		return err // it does not know the file (any more), or has no room now
	case err != nil:
		return fmt.Errorf("%w to open a file by its handle, for which it wants CAP_DAC_READ_SEARCH: %w", errRefused, err)
	}
	defer unix.Close(fd)
	for off := int64(0); off < size && err == nil; off += e.step {
		err = unix.Fadvise(fd, off, e.step, unix.FADV_WILLNEED)
	}
	return err
}

// leastReadAhead is what the kernel reads ahead of a FUSE mount that was not told otherwise.
const leastReadAhead = 128 << 10

// readAhead is what the kernel reads ahead of the file system with this number, in bytes.
func (d device) readAhead() int64 {
	text, err := os.ReadFile(d.readAheadFile())
	if err != nil {
		return leastReadAhead
	}
	kib, err := strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64)
	if err != nil {
		return leastReadAhead
	}
	return max(kib<<10, leastReadAhead)
}

// offers are the bytes of files that the kernel is about to ask for.
type offers struct {
	n     atomic.Int64 // of files, so that others take no lock
	mu    sync.Mutex
	files map[catalog.Index]*offer
}

// offer is a file's. Guarded by offers.mu, but for taken.
type offer struct {
	b     []byte
	left  int64 // of bytes that no answer had yet
	users int   // answers that are being written
	taken chan struct{}
}

// put offers all bytes of a file; b stays as it is until withdraw. There is no other offer of it.
func (s *offers) put(i catalog.Index, b []byte) *offer {
	o := &offer{b: b, left: int64(len(b)), taken: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files == nil {
		s.files = make(map[catalog.Index]*offer)
	}
	s.files[i] = o
	s.n.Add(1)
	return o
}

// withdraw ends an offer. It says whether nobody uses its bytes any more.
func (s *offers) withdraw(i catalog.Index) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.files[i]
	delete(s.files, i)
	s.n.Add(-1)
	return o.users == 0
}

// peek answers a read of n bytes from off, which are within the file, if they are offered.
func (s *offers) peek(i catalog.Index, off int64, n int) *peeked {
	if s.n.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.files[i]
	if o == nil {
		return nil
	}
	o.users++
	return &peeked{[][]byte{o.b[off:][:n]}, n, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		o.users--
		if o.left -= int64(n); o.left <= 0 && o.left+int64(n) > 0 {
			close(o.taken)
		}
	}}
}
