// Package mount shows a snapshot of a dataset, or the names of a writable one, as a read-only FUSE file system.
//
// # The model
//
// A mount is a catalog.Snapshot (names, sizes, times) and a Reader (bytes). Everything but bytes is answered
// from the snapshot, in memory. The file system keeps no state that a process could take with it when it dies:
// the node id of a file is its index in the snapshot plus one, a handle is just that number again, a directory
// is read by position. So a second process that has the snapshot can serve a mount that a first one made: see
// Park and Resume. The one thing that the kernel holds and a successor must know, which files are open and by
// what backing id, is in a memfd that travels along (table.go).
//
// The snapshot never changes, so the kernel is told to keep everything: entries, also absent ones, attributes,
// directories and pages. It asks once.
//
// # Names
//
// A writable dataset has no listing that holds: MountNames asks for each name, which the kernel keeps for a second,
// and for each folder when it is read (live.go). A node is one version of a name and never becomes another, so that
// pages stay right and an open file is one version; a name that has another version is another node. What the ids
// mean is written down beside the table, for a successor. Nothing is leased and nothing read ahead but by the kernel:
// inputs that do not change are read faster from a read-only dataset.
//
// # Two modes
//
// Passthrough: the kernel asks at open and tells at release. A file that a worker of this node holds whole can
// then be read without this process: a Leaser gives its descriptor, the kernel reads that. Large files gain.
//
// NoOpen: the kernel is told not to ask at open, nor at close, so that opening a file costs nothing, but there
// is no passthrough. Small files gain. See ChooseMode for which is taken when. Where a listed folder is being read,
// the rest of it is pushed into the page cache before it is asked for (push.go).
//
// # Rules
//
// Concurrency: a Mount is safe for concurrent use. It keeps the snapshot (catalog.Snapshot.Keep) until Wait returns,
// and the Reader should answer for as long; one that is closed earlier costs its readers an error.
//
// Failure: a read gives the right bytes or an errno within ReadTimeout, never a part of them: the kernel would
// take a short answer for the end of the file. Failed reads are logged, at a limited rate, since an errno
// cannot say what a user needs to know; what Mount, Park and the others return is not logged.
//
// It may import cache/catalog, cache/client, cache/ring and cache/source (for their sizes and errors), cache/wire
// (for the deadline), cache/meminfo and its own sub-packages.
package mount

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/wire"
)

// FSType is the type that a mount has in mountinfo.
const FSType = "fuse." + subtype

const subtype = "stepcache"

// Reader reads the files of the snapshot.
type Reader interface {
	// ReadAt is io.ReaderAt's for the file with the given index: len(p) bytes, or an error. Soon after ctx
	// ends it returns; once it has returned it leaves p alone.
	ReadAt(ctx context.Context, i catalog.Index, p []byte, off int64) (int, error)
	// Forget says that nobody has the file open any more. A hint: reads may still follow.
	Forget(i catalog.Index)
}

// Peeker is a Reader that may have bytes at hand: they go to the kernel from where they are.
type Peeker interface {
	// Peek returns the len(p) bytes from off of the file, which are within it, if it need not wait for them: its own, or
	// p with them. They stay as they are until release, which is called once. ok is false if it has not got them all.
	Peek(i catalog.Index, off int64, p []byte) (pieces [][]byte, release func(), ok bool)
}

// Leaser is a Reader that can hand out a descriptor of a file that this node holds whole.
type Leaser interface {
	// Lease returns a lease of the file with the given index, or an error when there can be none now. It
	// waits for the file to become whole, up to wait; with none it may still wait for some seconds, as long as ctx lasts,
	// where that is better for all who read the file.
	Lease(ctx context.Context, i catalog.Index, wait time.Duration) (Lease, error)
}

// Lease is a file that will not change nor go away until it is released, and still not while a descriptor of
// it is open.
type Lease interface {
	// File is open for reading only; it is the lease's, and closed by Release.
	File() *os.File
	// Lost is closed when who gave the lease is gone: then the file's memory is kept by nothing but this lease,
	// and it is released as soon as nobody has the file open. Nil if that cannot happen.
	Lost() <-chan struct{}
	Release()
}

// Holder is a Reader that can tell what the tier has in memory from what it would have to fetch.
type Holder interface {
	// ReadHeld reads all of a file, len(p) bytes, and compares them with their sums, if the tier holds them. Once
	// it has returned it leaves p alone.
	ReadHeld(ctx context.Context, i catalog.Index, p []byte) error
}

// Resident is a Reader that knows what the tier holds of a file.
type Resident interface {
	// Resident returns a bitmap of the resident blocks of a file, the least significant bit first.
	Resident(ctx context.Context, i catalog.Index) ([]byte, error)
}

// Options of a mount. The zero value is usable.
type Options struct {
	// Dataset is the dataset's name, for the extended attributes, logs and metrics.
	Dataset string
	// Mode is Auto unless one of the modes is forced.
	Mode Mode
	// Private keeps other users out. Without it they may read, if this is root or user_allow_other is set in
	// /etc/fuse.conf.
	Private bool
	// FileMode and DirMode are the permissions of files and directories; zero means 0444 and 0555.
	FileMode, DirMode uint32
	// UID and GID own the files; nil means those of this process.
	UID, GID *uint32
	// ReadTimeout bounds a read; zero means wire.FUSETimeout.
	ReadTimeout time.Duration
	// LeaseMin is the size below which a file is not worth a lease: the one read that fetches it is cheaper.
	// Zero means 1 MiB.
	LeaseMin int64
	// LeaseWaitMax is the size up to which an open waits for the file to become whole on this node; zero means
	// 256 MiB. Larger files are leased only when they are whole already, or where many read them soon will be.
	LeaseWaitMax int64
	// LeaseWait is how long an open waits for that; zero means 5 s, and it is at most half of ReadTimeout.
	LeaseWait time.Duration
	// Leases bounds the number of files that are open by passthrough, or kept ready for it, at once; each
	// costs a descriptor. Zero means 4,096. Files beyond it are read through the Reader.
	Leases int
	// IdleLeases of them, at most, are kept for IdleTime after the last close, so that opening the file again
	// costs nothing. Zero means 64 and 5 s; negative IdleLeases none.
	IdleLeases int
	IdleTime   time.Duration
	// Registrar registers files for passthrough where this process may not; nil means that it does so itself.
	Registrar Registrar
	// PushBytes bounds what is pushed of small files into the kernel's page cache before it is asked for, in the
	// mount's life; zero means 1 GiB, negative nothing. It is memory of this process's control group until the
	// kernel takes it back, which it does when memory is short.
	PushBytes int64
	// Logger takes what cannot be returned; nil means slog.Default.
	Logger *slog.Logger

	// For tests: what differs from interruptGrace, blindGrace, closeWait and pushPatience, what stands before the kernel,
	// what is called when a request goes on after a signal, the memory that can be had, and that for names.
	grace, blindGrace, closeWait, pushPatience time.Duration
	wrap                                       func(registrar) registrar
	goesOn                                     func()
	memoryLeft                                 func() int64
	nameMemory                                 *nameMemory
}

func (o Options) withDefaults() Options {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	dur := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	num := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	if o.FileMode == 0 {
		o.FileMode = 0o444
	}
	if o.DirMode == 0 {
		o.DirMode = 0o555
	}
	if o.UID == nil {
		id := uint32(os.Geteuid())
		o.UID = &id
	}
	if o.GID == nil {
		id := uint32(os.Getegid())
		o.GID = &id
	}
	dur(&o.ReadTimeout, wire.FUSETimeout)
	def(&o.LeaseMin, 1<<20)
	def(&o.PushBytes, 1<<30)
	def(&o.LeaseWaitMax, 256<<20)
	dur(&o.LeaseWait, 5*time.Second)
	o.LeaseWait = min(o.LeaseWait, o.ReadTimeout/2)
	num(&o.Leases, 4096)
	num(&o.IdleLeases, 64)
	dur(&o.IdleTime, 5*time.Second)
	dur(&o.grace, interruptGrace)
	dur(&o.blindGrace, blindGrace)
	dur(&o.closeWait, closeWait)
	dur(&o.pushPatience, pushPatience)
	if o.memoryLeft == nil {
		o.memoryLeft = memoryLeft
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return o
}

// Server serves one mount.
type Server struct {
	dir      string
	fs       *fileSystem
	server   *fuse.Server
	settings Settings
	dev      device // of the mount in mountinfo

	end  context.CancelFunc // ends what the file system waits for
	work sync.WaitGroup     // of what waits to succeed a predecessor
	done chan struct{}      // closed when the server has ended

	mu    sync.Mutex
	fuse  *os.File // this process's own descriptor of the connection, for Park; nil once the server has ended
	guard *os.File // see guard.go; may be nil
}

// Mount mounts a snapshot at dir, an existing directory, and serves it until it is unmounted. When it returns the
// file system answers. A mount of this package that is left at dir, and whose server is gone, is taken away
// first, lazily: its users keep their errors, the path is free. ctx bounds the mounting only.
func Mount(ctx context.Context, dir string, snap *catalog.Snapshot, r Reader, o Options) (*Server, error) {
	return mountTree(ctx, dir, snap.Digest(), snap.Len(), func(*table) (tree, Reader) { return snap, r }, o.withDefaults())
}

// MountNames is Mount of the names of a writable dataset, as they are at each time: what is put is there by path
// at once, or within a second where the path named something before, and so does what is deleted go. An open file
// stays one version: reading what is not in the page cache of one that was replaced or deleted is an error.
func MountNames(ctx context.Context, dir string, n Names, o Options) (*Server, error) {
	o = o.withDefaults()
	return mountTree(ctx, dir, Live, liveSlots, func(t *table) (tree, Reader) { l := newLive(n, t, o); return l, l }, o)
}

// mountTree mounts what show makes with the mount's table.
func mountTree(ctx context.Context, dir string, shows catalog.Digest, entries int, show func(*table) (tree, Reader), o Options) (*Server, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("mount dataset %q at %s: %w", o.Dataset, dir, err)
	}
	dir, err := mountinfo.Resolve(dir)
	if err != nil {
		return nil, fmt.Errorf("mount dataset %q: %w", o.Dataset, err)
	}
	if err := clearLeftover(dir, o.Logger); err != nil {
		return nil, fmt.Errorf("mount dataset %q: %w", o.Dataset, err)
	}
	if st, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("mount dataset %q: %w", o.Dataset, err)
	} else if !st.IsDir() {
		return nil, fmt.Errorf("mount dataset %q: %s is not a directory", o.Dataset, dir)
	}
	source, options := mountOptions(o, shows)
	conn, err := attach(ctx, dir, source, options)
	if err != nil {
		return nil, fmt.Errorf("mount dataset %q at %s: %w", o.Dataset, dir, err)
	}
	table, err := newTable(entries)
	if err != nil {
		conn.Close()
		detach(dir)
		return nil, fmt.Errorf("mount dataset %q at %s: %w", o.Dataset, dir, err)
	}
	snap, r := show(table)
	m, err := serve(dir, conn, table, snap, r, o, nil)
	if err != nil {
		// Closing the connection's last descriptor has made the mount dead; it must not stay.
		detach(dir)
		return nil, fmt.Errorf("mount dataset %q at %s: %w", o.Dataset, dir, err)
	}
	m.setReadAhead()
	return m, nil
}

// serve starts a server on a connection: conn and table become the Mount's, or are closed. With s, the
// kernel has had its answer to INIT from another process already.
func serve(dir string, conn *os.File, table *table, snap tree, r Reader, o Options, s *Settings) (*Server, error) {
	ctx, end := context.WithCancel(context.Background())
	release, kept := snap.Keep()
	fail := func(err error) (*Server, error) {
		end()
		conn.Close()
		table.close()
		if kept {
			release()
		}
		return nil, err
	}
	if !kept {
		return fail(errors.New("its snapshot is closed"))
	}
	m := &Server{dir: dir, fuse: conn, end: end, done: make(chan struct{})}
	m.fs = newFileSystem(ctx, snap, r, table, o)
	m.fs.conn = conn
	var err error
	if s == nil {
		m.settings = Settings{Dir: dir, Snapshot: snap.Digest(), MaxWrite: maxWrite}
		m.server, err = start(m.fs, conn, &m.settings)
		if err != nil {
			return fail(err)
		}
		m.fs.negotiate(m.server, o.Mode)
		m.settings.Mode = m.fs.mode
	} else {
		m.settings = *s
		if m.fs.live != nil {
			if err := m.fs.live.inherit(ctx); err != nil {
				return fail(err)
			}
		}
		m.server, err = restart(m.fs, conn, &m.settings)
		if err != nil {
			return fail(err)
		}
		m.fs.negotiate(m.server, s.Mode)
		if err := m.fs.inherit(); err != nil {
			o.Logger.Warn("files open by passthrough when the mount's last server went are not looked after", "dir", dir, "error", err)
		}
	}
	switch m.fs.mode {
	case Passthrough:
		m.fs.pass.run()
	case NoOpen:
		m.fs.push.start(ctx, m.enter, s != nil)
	}
	if s == nil {
		if dir != "" {
			if at, err := mountinfo.At(dir); err == nil && len(at) > 0 && at[0].Type == FSType {
				m.settings.Major, m.settings.Minor = at[0].Major, at[0].Minor
			}
		}
		table.succeed()
		m.dev = device{m.settings.Major, m.settings.Minor}
		m.guard = holdGuard(m.dev)
	} else {
		m.dev = device{s.Major, s.Minor}
		m.work.Go(func() { m.succeed(ctx, conn, table) })
	}
	go func() {
		m.server.Serve()
		// The connection is at its end, or broken. Either way nobody will answer on it any more, so it must
		// not stay open: a request would hang, where on a closed one it fails.
		end()
		m.work.Wait()
		m.mu.Lock()
		m.fuse.Close()
		m.fuse = nil
		if m.guard != nil {
			m.guard.Close()
		}
		m.mu.Unlock()
		m.fs.push.end()
		m.fs.close()
		release()
		close(m.done)
	}()
	if s == nil && dir != "" {
		m.settle()
	}
	return m, nil
}

// successionPoll is how often a successor looks whether its predecessor is gone.
const successionPoll = 50 * time.Millisecond

// succeed waits until a predecessor is gone, which it mostly is already, and then has the kernel send again what
// that one has read and not answered.
func (m *Server) succeed(ctx context.Context, conn *os.File, table *table) {
	t := time.NewTicker(successionPoll)
	defer t.Stop()
	for !table.succeed() {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
	if err := resend(conn); err != nil {
		m.fs.log.Warn("requests that the mount's last server did not answer may hang (Linux 6.9 or later can send them again)", "dir", m.dir, "error", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.guard = holdGuard(m.dev)
}

// settle has the kernel ask now what it asks once: whether it can poll files here, and in NoOpen mode whether it
// must tell of opens and closes.
//
// The first matters to a Go program that opens a file of a mount which it serves itself: it could wait for its
// own answer while it blocks the runtime's poller. go-fuse answers requests for the name used here by itself.
// The second matters while nobody serves, between two processes: whoever starts a program then, and has a file
// open here, would wait in the close of the program's copy of it.
func (m *Server) settle() {
	if fd, err := unix.Open(filepath.Join(m.dir, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		unix.Close(fd)
	}
	if m.fs.mode != NoOpen {
		return
	}
	for i := range catalog.Index(m.fs.snap.Len()) {
		if n, _ := m.fs.snap.Node(i); !n.Dir {
			if fd, err := unix.Open(filepath.Join(m.dir, m.fs.snap.Path(i)), unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
				unix.Close(fd)
			}
			return
		}
	}
}

// Dir is where the file system is mounted, absolute and without symbolic links; empty when somebody else mounted
// it (Serve).
func (m *Server) Dir() string { return m.dir }

// Device is the file system's number in mountinfo; zeros when it was not found there.
func (m *Server) Device() (major, minor uint32) { return m.dev.major, m.dev.minor }

// Mode is the mode in use: Passthrough or NoOpen.
func (m *Server) Mode() Mode { return m.fs.mode }

// Worn says that a mount of names has not much room left for more of them: whoever comes now had better get
// another one, and this one end when nobody uses it. When there is none left, names that are new fail.
func (m *Server) Worn() bool { return m.fs.live != nil && m.fs.live.worn() }

// Done is closed when the server has ended: after an unmount, once the last user is gone, or after an Abort.
func (m *Server) Done() <-chan struct{} { return m.done }

// Wait waits for Done.
func (m *Server) Wait() { <-m.done }

// Unmount takes the mount away from its path. When nobody uses it the server ends, and Unmount waits for that.
// Otherwise it happens lazily: the path is free, users keep what they have open, and Done is closed when the
// last one is gone. A process that ends before that leaves them errors, not hangs.
func (m *Server) Unmount() error {
	busy, err := m.unmount()
	if err != nil {
		return fmt.Errorf("unmount %s: %w", m.dir, err)
	}
	if !busy {
		<-m.done
	}
	return nil
}

func (m *Server) unmount() (busy bool, err error) {
	if m.dev == (device{}) {
		return false, errors.New("it could not be found among the mounts when it was made")
	}
	at, err := mountinfo.At(m.dir)
	if err != nil {
		return false, err
	}
	if len(at) == 0 {
		return true, nil // Somebody else unmounted it; whether it has users nobody can tell.
	}
	if (device{at[0].Major, at[0].Minor}) != m.dev {
		for _, o := range at[1:] {
			if (device{o.Major, o.Minor}) == m.dev {
				return false, fmt.Errorf("another mount (%s) lies on top of it; unmount that first", at[0].Type)
			}
		}
		return true, nil
	}
	m.fs.push.end() // its copy of the mount keeps the file system
	err = unix.Unmount(m.dir, unix.UMOUNT_NOFOLLOW)
	switch {
	case err == nil:
		// Copies of the mount in other places (bind mounts, other mount namespaces) keep it alive.
		return !m.gone(), nil
	case errors.Is(err, unix.EPERM):
		return fusermountUnmount(m.dir)
	case errors.Is(err, unix.EINVAL):
		return true, nil // It went meanwhile.
	case errors.Is(err, unix.EBUSY):
		return true, unix.Unmount(m.dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	return false, err
}

// gone says whether the server ends now. The kernel ends the connection within the unmount when that was the
// last mount of it, so a short wait tells; there is nothing to ask.
func (m *Server) gone() bool {
	select {
	case <-m.done:
		return true
	case <-time.After(10 * time.Second):
		return false
	}
}

// Abort ends the connection at once: whatever waits for the file system gets an error, and so does every later
// use of it. The mount itself stays until Unmount. It needs the fusectl file system or, failing that, works
// only by ending this process.
func (m *Server) Abort() error {
	select {
	case <-m.done:
		return nil // and its number may be another mount's
	default:
	}
	m.end()
	name := filepath.Join("/sys/fs/fuse/connections", strconv.FormatUint(uint64(m.dev.minor), 10), "abort")
	if err := os.WriteFile(name, []byte("1"), 0o200); err != nil {
		return fmt.Errorf("abort %s: %w; mount -t fusectl none /sys/fs/fuse/connections", m.dir, err)
	}
	return nil
}

// device is a file system's number.
type device struct{ major, minor uint32 }

// readAheadFile tells in KiB, and may be told, how far the kernel reads ahead there.
func (d device) readAheadFile() string {
	return fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", d.major, d.minor)
}

// setReadAhead raises what the kernel reads ahead of a sequential reader from the 128 KiB that FUSE gets: it
// nearly doubles the rate of buffered reads.
func (m *Server) setReadAhead() {
	if m.dev.minor == 0 {
		return
	}
	if err := os.WriteFile(m.dev.readAheadFile(), []byte(strconv.Itoa(readAhead>>10)), 0o644); err != nil {
		m.fs.log.Info("sequential reads will be slower: cannot raise the mount's read-ahead; this needs root and a writable /sys",
			"dir", m.dir, "error", err)
	}
}
