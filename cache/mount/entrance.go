package mount

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
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
// file is opened by names that the kernel knows, and not at all if it would have to ask (RESOLVE_CACHED); in NoOpen mode it
// does not ask at open and close either. Reading ahead starts requests in the background and waits for none of them; it
// waits for room among them at most, and that ends by a signal that kills. By a file's handle (open_by_handle_at) it
// could be opened as well, but that makes the kernel forget its name, and ask for it at the next open.
//
// What it needs: that the kernel has been told of ENOSYS to opens, closes (settle) and opens of directories, and has the
// root's attributes, all of which whoever lists a folder and reads two of its files has seen to; and that it reads ahead
// without waiting (see canRead).

// errRefused: the kernel does none of it here, whatever the file.
var errRefused = errors.New("the kernel refuses")

// entrance is this process's own use of the mount: a copy of it that lies nowhere, so that whoever unmounts it does not
// find it busy. The file system ends with the last of its copies.
type entrance struct {
	fd   int
	step int64 // what the kernel reads ahead at most in one go, in bytes
}

// enter makes an entrance. An error is errRefused, or says that it cannot be now.
func (m *Server) enter() (*entrance, error) {
	if m.dir == "" || m.dev == (device{}) {
		return nil, fmt.Errorf("%w: another process has mounted it", errRefused)
	}
	// Whatever else may lie there is not to be touched: it could hang.
	at, err := mountinfo.At(m.dir)
	if err != nil {
		return nil, err
	}
	if len(at) == 0 || (device{at[0].Major, at[0].Minor}) != m.dev {
		return nil, fmt.Errorf("%w: the mount is not at %s any more", errRefused, m.dir)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.dir, unix.OPEN_TREE_CLONE|unix.O_CLOEXEC)
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return nil, fmt.Errorf("%w: copying the mount at %s (open_tree) needs CAP_SYS_ADMIN: %w", errRefused, m.dir, err)
	case err != nil:
		return nil, err
	}
	return &entrance{fd, m.dev.readAhead()}, nil
}

func (e *entrance) close() { unix.Close(e.fd) }

// canRead says whether a kernel with these flags of FUSE takes what is read ahead here as it must: without asking this
// process, which would wait for itself, at the opening of a directory, and without waiting for what it reads ahead.
func canRead(flags uint64) bool {
	const all = fuse.CAP_NO_OPENDIR_SUPPORT | fuse.CAP_NO_OPEN_SUPPORT | fuse.CAP_ASYNC_READ
	return flags&all == all
}

// openTries is how often a file is opened, since the kernel also says that it does not know a name when anything on the
// machine is mounted or unmounted meanwhile.
const openTries = 10

// open opens the file of that name, relative to the mount's root, if the kernel knows it; the error is EAGAIN where it
// does not, or has no room now.
func (e *entrance) open(name string) (fd int, err error) {
	const resolveCached = 0x20 // RESOLVE_CACHED of linux/openat2.h, since Linux 5.12
	how := unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC, Resolve: resolveCached | unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV,
	}
	for range openTries {
		if fd, err = unix.Openat2(e.fd, name, &how); !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBADF):
		err = fmt.Errorf("%w to open a file only if that asks for nothing (Linux 5.12 or later): %w", errRefused, err)
	}
	return fd, err
}

// readAhead has the kernel read an open file of that size from its start.
func (e *entrance) readAhead(fd int, size int64) (err error) {
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
