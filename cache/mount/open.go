package mount

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
)

// passthrough hands files to the kernel, so that it reads them by itself.
//
// The kernel allows one backing file for an inode at a time, and no handle that reads through the page cache
// beside handles that pass through: an open that breaks this gets EIO. So the table says of each file how many
// handles are open and which way, the first open decides, and the others follow until the last is closed.
type passthrough struct {
	f       *fileSystem
	leaser  Leaser
	kernel  registrar
	off     atomic.Bool // for good: the kernel refused once
	pages   pages
	flights singleflight.Group
	work    sync.WaitGroup // the sweeper and the flights

	mu      sync.Mutex
	held    map[catalog.Index]*holding
	closing map[catalog.Index]chan struct{} // closed with the file's last handle; for awaitClose
}

// registrar is the connection's, as far as passthrough needs it.
type registrar interface {
	RegisterBackingFd(*fuse.BackingMap) (int32, syscall.Errno)
	UnregisterBackingFd(id int32) syscall.Errno
}

// holding is a backing id that this process looks after: it registered it, or took it over.
type holding struct {
	id    int32
	lease Lease     // nil when a predecessor took it
	idle  time.Time // when the last handle was closed; zero while there is one
}

// lost says whether the one that gave the lease is gone.
func (h *holding) lost() bool {
	if h.lease == nil {
		return false
	}
	select {
	case <-h.lease.Lost(): // never of nil
		return true
	default:
		return false
	}
}

func (p *passthrough) init(f *fileSystem) {
	p.f, p.held, p.closing = f, map[catalog.Index]*holding{}, map[catalog.Index]chan struct{}{}
	p.leaser, _ = f.reader.(Leaser)
}

// negotiate takes the connection, and notes when it cannot pass through.
func (p *passthrough) negotiate(k registrar, flags uint64) {
	p.kernel = k
	if p.f.opt.Registrar != nil {
		p.kernel = lentRegistrar{p.f.opt.Registrar}
	}
	if p.f.opt.wrap != nil {
		p.kernel = p.f.opt.wrap(k)
	}
	if flags&fuse.CAP_PASSTHROUGH == 0 {
		if p.leaser != nil {
			p.f.log.Info("files are read through this process: the kernel has no FUSE passthrough (Linux 6.9 or later has)")
		}
		p.off.Store(true)
	} else if p.leaser != nil && p.f.opt.Registrar == nil && !hasCap(unix.CAP_SYS_ADMIN) {
		p.f.log.Info("files are read through this process: FUSE passthrough needs CAP_SYS_ADMIN")
		p.off.Store(true)
	}
	if p.leaser == nil {
		p.off.Store(true)
	}
}

func (p *passthrough) available() bool { return !p.off.Load() }

// run sweeps until the connection ends.
func (p *passthrough) run() {
	p.work.Go(func() {
		t := time.NewTicker(max(p.f.opt.IdleTime/2, 10*time.Millisecond))
		defer t.Stop()
		for {
			select {
			case now := <-t.C:
				p.sweep(now, p.f.opt.IdleLeases)
				p.pages.sweep(now.Add(-p.f.opt.IdleTime))
			case <-p.f.ctx.Done():
				return
			}
		}
	})
}

// close gives the leases back; the backing ids went with the connection.
func (p *passthrough) close() {
	p.work.Wait()
	p.mu.Lock()
	held := p.held
	p.held = nil
	p.mu.Unlock()
	for _, h := range held {
		if h.lease != nil {
			h.lease.Release()
		}
	}
}

// Open of a file. In NoOpen mode the kernel hears ENOSYS once and asks no more.
func (f *fileSystem) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	i, n, ok := f.node(in.NodeId)
	switch {
	case !ok:
		return f.fail(unix.ESTALE)
	case n.Dir:
		return f.fail(unix.EISDIR)
	case in.Flags&unix.O_ACCMODE != unix.O_RDONLY || in.Flags&unix.O_TRUNC != 0:
		return f.fail(unix.EROFS)
	case f.mode == NoOpen:
		return fuse.ENOSYS
	}
	out.Fh = in.NodeId
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
	f.count.opens.Add(1)
	f.count.openedBytes.Add(n.Size)
	if n.Size < f.opt.LeaseMin {
		return fuse.OK // Such a file is never passed through, so nothing is counted.
	}
	ctx, stop := f.requestContext(cancel, in.Pid)
	defer stop()
	id, err := f.pass.open(ctx, i, n.Size, in.Unique)
	if err != nil {
		return f.failed(ctx, "open", i, err)
	}
	if id != 0 {
		f.count.passOpens.Add(1)
		f.count.passBytes.Add(n.Size)
		out.OpenFlags, out.BackingID = fuse.FOPEN_PASSTHROUGH|fuse.FOPEN_NOFLUSH, id
	}
	return fuse.OK
}

// Release of a handle: the kernel has done with it.
func (f *fileSystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	i, n, ok := f.node(in.NodeId)
	if !ok || n.Dir || f.mode == NoOpen {
		return
	}
	if n.Size < f.opt.LeaseMin || f.pass.release(i, in.Unique) {
		f.reader.Forget(i)
	}
}

// open counts a handle and returns the backing id that it reads through, or 0 for the page cache.
func (p *passthrough) open(ctx context.Context, i catalog.Index, size int64, unique uint64) (int32, error) {
	if size >= closeMin && !p.off.Load() {
		if err := p.awaitClose(ctx, i); err != nil {
			return 0, err
		}
	}
	for try := 0; ; try++ {
		// The second time round the file was idle between acquire and now, and swept: it can be so again, but
		// one try is enough.
		id, decided, err := p.count(ctx, i, size, unique, p.off.Load() || try == 2)
		if err != nil || decided {
			return id, err
		}
		if p.acquire(ctx, i, size) != nil {
			try = 1 // No lease, whatever the reason: the page cache.
		}
	}
}

const (
	// closeMin is the size from which on reading a file through this process, and not passed through, costs more than
	// closeWait.
	closeMin = 16 << 20
	// closeWait is how long an open waits for handles that do not pass through to be closed. The kernel tells of a
	// close after close(2) has returned, so that who reads a file twice in a row would open it beside itself.
	closeWait = 10 * time.Millisecond
)

// awaitClose waits a moment where a file is open and not passed through, since the next handle would follow.
func (p *passthrough) awaitClose(ctx context.Context, i catalog.Index) error {
	t := p.f.table
	if err := t.lock(ctx); err != nil {
		return err
	}
	var closed chan struct{}
	if s := t.at(i); s.opens > 0 && s.backing == 0 {
		p.mu.Lock()
		if closed = p.closing[i]; closed == nil {
			closed = make(chan struct{})
			p.closing[i] = closed
		}
		p.mu.Unlock()
	}
	t.unlock()
	if closed == nil {
		return nil
	}
	wait := time.NewTimer(p.f.opt.closeWait)
	defer wait.Stop()
	select {
	case <-closed:
	case <-wait.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// count adds a handle if it is clear which way it reads: because others are open, a backing id is ready, the kernel
// has its pages, or buffered says that there will be no backing id.
func (p *passthrough) count(ctx context.Context, i catalog.Index, size int64, unique uint64, buffered bool) (id int32, decided bool, err error) {
	t := p.f.table
	if buffered { // who has waited for a lease in vain, perhaps until ctx ended, opens the file all the same
		ctx = context.WithoutCancel(ctx)
	}
	if err := t.lock(ctx); err != nil {
		return 0, false, err
	}
	defer t.unlock()
	s := t.at(i)
	if s.opens == 0 && s.backing == 0 && !buffered && !p.pages.once(i, size) {
		return 0, false, nil
	}
	if t.once(unique) {
		s.opens++
	}
	p.pages.opened(i)
	if s.backing != 0 {
		p.mu.Lock()
		if h := p.held[i]; h != nil && h.id == s.backing {
			h.idle = time.Time{}
		} else if p.held != nil {
			// A predecessor's. A lease of an earlier backing id is found by the sweep.
			p.keep(i, &holding{id: s.backing})
		}
		p.mu.Unlock()
	}
	return s.backing, true, nil
}

// keep notes a holding. What was noted before for the file is given back. Only with mu held.
func (p *passthrough) keep(i catalog.Index, h *holding) {
	if old := p.held[i]; old != nil && old.lease != nil {
		p.work.Go(old.lease.Release)
	}
	p.held[i] = h
}

// release takes a handle away, and says whether it was the last.
func (p *passthrough) release(i catalog.Index, unique uint64) (last bool) {
	t := p.f.table
	if err := t.lock(p.f.ctx); err != nil {
		if p.f.ctx.Err() == nil {
			p.f.log.Error("a closed file counts as open from now on", "path", p.f.snap.Path(i), "error", err)
		}
		return false
	}
	s := t.at(i)
	if t.once(unique) && s.opens > 0 {
		s.opens--
	}
	last = s.opens == 0
	over := false
	if last && s.backing == 0 {
		p.mu.Lock()
		if closed := p.closing[i]; closed != nil {
			delete(p.closing, i)
			close(closed)
		}
		p.mu.Unlock()
	}
	if last && s.backing != 0 {
		p.mu.Lock()
		if h := p.held[i]; h != nil && h.id == s.backing {
			h.idle = time.Now()
		} else if p.held != nil {
			p.keep(i, &holding{id: s.backing, idle: time.Now()})
		}
		over = p.idle() > p.f.opt.IdleLeases
		p.mu.Unlock()
	}
	if last {
		p.pages.closed(i)
	}
	t.unlock()
	if over {
		p.sweep(time.Now(), p.f.opt.IdleLeases)
	}
	return last
}

// idle counts the holdings without a handle. Only with mu held.
func (p *passthrough) idle() (n int) {
	for _, h := range p.held {
		if !h.idle.IsZero() {
			n++
		}
	}
	return n
}

// sweep unregisters what has been idle for long, or is idle and lost, and the oldest of what is more than keep; and
// it gives back leases of backing ids that are gone, because the other server of the mount has unregistered them.
func (p *passthrough) sweep(now time.Time, keep int) {
	p.mu.Lock()
	empty := len(p.held) == 0
	p.mu.Unlock()
	if empty || p.f.table.lock(p.f.ctx) != nil {
		return
	}
	var drop []Lease
	p.mu.Lock()
	var idle []catalog.Index
	for i, h := range p.held {
		switch s := p.f.table.at(i); {
		case s.backing != h.id:
			drop = append(drop, h.lease)
			delete(p.held, i)
		case s.opens == 0 && h.idle.IsZero():
			h.idle = now // the other server closed the last handle
			fallthrough
		case s.opens == 0:
			idle = append(idle, i)
		default:
			h.idle = time.Time{}
		}
	}
	slices.SortFunc(idle, func(a, b catalog.Index) int { return p.held[a].idle.Compare(p.held[b].idle) })
	left := len(idle)
	for _, i := range idle {
		h := p.held[i]
		if now.Sub(h.idle) < p.f.opt.IdleTime && left <= keep && !h.lost() {
			continue
		}
		left--
		p.kernel.UnregisterBackingFd(h.id)
		p.f.table.at(i).backing = 0
		drop = append(drop, h.lease)
		delete(p.held, i)
	}
	p.mu.Unlock()
	p.f.table.unlock()
	for _, l := range drop {
		if l != nil {
			l.Release()
		}
	}
}

// acquire leases a file and registers it, once for all who ask at the same time. nil means that the table has
// a backing id for it now, or that somebody has opened it meanwhile.
func (p *passthrough) acquire(ctx context.Context, i catalog.Index, size int64) error {
	p.work.Add(1)
	defer p.work.Done()
	c := p.flights.DoChan(strconv.FormatUint(uint64(i), 10), func() (any, error) {
		wait := time.Duration(0)
		if size <= p.f.opt.LeaseWaitMax {
			wait = p.f.opt.LeaseWait
		}
		// Not the context of the one who came first: the others wait too. The slack is for the answer's way, and for a
		// large file that the tier would rather wait for.
		ctx, cancel := context.WithTimeout(p.f.ctx, 2*p.f.opt.LeaseWait)
		defer cancel()
		return nil, p.register(ctx, i, size, wait)
	})
	select {
	case r := <-c:
		return r.Err
	case <-ctx.Done():
		p.work.Go(func() { <-c })
		return context.Cause(ctx)
	}
}

func (p *passthrough) register(ctx context.Context, i catalog.Index, size int64, wait time.Duration) error {
	t := p.f.table
	if err := t.lock(ctx); err != nil {
		return err
	}
	decided := *t.at(i) != (slot{}) // by one who came between this opener's look and this flight
	t.unlock()
	if decided {
		return nil
	}
	p.mu.Lock()
	full := len(p.held) >= p.f.opt.Leases
	p.mu.Unlock()
	if full {
		p.f.count.leaseMisses.Add(1)
		return errors.New("too many files are passed through")
	}
	lease, err := p.leaser.Lease(ctx, i, wait)
	if err != nil {
		p.f.count.leaseMisses.Add(1)
		return err // No news: it is read through this process.
	}
	kept := false
	defer func() {
		if !kept {
			lease.Release()
		}
	}()
	if err := checkFile(lease, size); err != nil {
		p.f.log.Error("a leased file is not what the snapshot says: it is read block by block", "path", p.f.snap.Path(i), "error", err)
		return err
	}
	if err := t.lock(ctx); err != nil {
		return err
	}
	defer t.unlock()
	s := t.at(i)
	if s.opens > 0 || s.backing != 0 {
		return nil
	}
	id, errno := p.kernel.RegisterBackingFd(&fuse.BackingMap{Fd: int32(lease.File().Fd())})
	switch errno {
	case 0:
	case unix.EAGAIN, unix.ENOMEM, unix.ENFILE, unix.EMFILE:
		p.f.count.leaseMisses.Add(1)
		return errno // not this one, or not now: the Registrar's word, or a want that passes
	default:
		if p.off.CompareAndSwap(false, true) && p.f.ctx.Err() == nil {
			p.f.log.Warn("files are read through this process from now on: the kernel refused passthrough", "error", explain(errno))
		}
		return errno
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held == nil {
		return errors.New("unmounted")
	}
	s.backing = id
	p.pages.forget(i) // The kernel drops them as it opens the file.
	p.keep(i, &holding{id: id, lease: lease, idle: time.Now()})
	kept = true
	return nil
}

// checkFile looks whether a leased file can be the one of the snapshot.
func checkFile(l Lease, size int64) error {
	var st unix.Stat_t
	if l.File() == nil {
		return errors.New("the lease has no file")
	}
	if err := unix.Fstat(int(l.File().Fd()), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return errors.New("not a regular file")
	}
	if st.Size != size {
		return fmt.Errorf("it has %d bytes, not %d", st.Size, size)
	}
	return nil
}

// explain says what a refusal of passthrough comes from.
func explain(e syscall.Errno) error {
	switch e {
	case unix.EPERM:
		return fmt.Errorf("%w: it needs CAP_SYS_ADMIN in the first user namespace", e)
	case unix.ENOTTY, unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL:
		return fmt.Errorf("%w: it needs Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH, and a store on tmpfs or a disk", e)
	case unix.ELOOP:
		return fmt.Errorf("%w: the store is on a stacked file system (overlay); put it on tmpfs or a disk", e)
	}
	return e
}

// inherit takes over what a predecessor has left in the table.
func (f *fileSystem) inherit() error {
	if f.live != nil {
		return nil // nothing is passed through
	}
	if err := f.table.lock(f.ctx); err != nil {
		return err
	}
	defer f.table.unlock()
	f.pass.mu.Lock()
	defer f.pass.mu.Unlock()
	now := time.Now()
	f.table.each(func(i catalog.Index, s *slot) {
		if s.backing == 0 {
			return
		}
		h := &holding{id: s.backing}
		if s.opens == 0 {
			h.idle = now
		}
		f.pass.held[i] = h
	})
	return nil
}
