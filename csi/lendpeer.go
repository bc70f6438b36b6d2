package csi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/csi/broker"
	"github.com/stepcache/stepcache/csi/packets"
)

const (
	// maxRegistered bounds the files that a mount's server has registered at once; it costs this process nothing,
	// but memory of the kernel that nobody accounts for.
	maxRegistered = 8192
	// lendTimeout bounds what a request waits for.
	lendTimeout = 10 * time.Second
	// brokeredDial bounds a connection to a worker of this node.
	brokeredDial = time.Second
)

// peer is a connection of a pod.
type peer struct {
	of   *borrower
	conn *net.UnixConn
}

// accept takes the connections of one pod until its listener is closed.
func (l *lender) accept(p *borrower) {
	slots := make(chan struct{}, maxPeers)
	for {
		slots <- struct{}{}
		c, err := p.listener.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			l.s.log.Warn("connections of a pod", "pod", p.pod, "error", err)
			<-slots
			if wait(l.ctx, 100*time.Millisecond); l.ctx.Err() != nil {
				return
			}
			continue
		}
		o := &peer{of: p, conn: c}
		l.mu.Lock()
		if l.closed || l.pods[p.target] != p {
			l.mu.Unlock()
			c.Close()
			<-slots
			continue
		}
		p.peers[o] = true
		l.mu.Unlock()
		l.work.Go(func() {
			defer func() { <-slots }()
			if err := broker.Answer(c, func(r *broker.Request) broker.Reply { return l.handle(o, r) }, drop); err != nil && l.ctx.Err() == nil && p.limit.Allow() {
				l.s.log.Info("a pod's connection ended", "pod", p.pod, "reason", err)
			}
			c.Close()
			l.gone(o)
		})
	}
}

// gone notes that a pod's server is dead, or will connect again.
func (l *lender) gone(o *peer) {
	var unserved []*os.File
	l.mu.Lock()
	delete(o.of.peers, o)
	for _, v := range l.volumes {
		if v.server != o {
			continue
		}
		v.server, v.since = nil, l.s.now()
		if v.conn != nil {
			unserved = append(unserved, v.conn)
		}
	}
	l.mu.Unlock()
	for _, conn := range unserved {
		// Readers that wait can be killed from now on. Of one that is closed meanwhile it is an error.
		_ = mount.Resend(conn)
	}
}

// handle answers one request. Whatever it holds is taken for hostile.
func (l *lender) handle(o *peer, r *broker.Request) broker.Reply {
	safe := false // what came was looked at, and can be closed
	defer func() {
		if !safe {
			disarm(r.FDs)
		}
	}()
	ctx, cancel := context.WithTimeout(l.ctx, lendTimeout)
	defer cancel()
	reply, err := func() (broker.Reply, error) {
		switch r.Op {
		case broker.OpVolumes:
			return broker.Reply{Volumes: l.list(o)}, nil
		case broker.OpReady:
			return broker.Reply{}, l.ready(o)
		case broker.OpLeave:
			return broker.Reply{}, l.leave(ctx, o)
		case broker.OpDial:
			return l.dial(ctx, r.Addr)
		}
		var v *lent
		for _, of := range l.of(o) {
			if of.name == r.Volume {
				v = of
			}
		}
		if v == nil {
			return broker.Reply{}, errors.New("this pod has no such mount")
		}
		switch r.Op {
		case broker.OpClaim:
			return l.claim(ctx, v, r.Fresh)
		case broker.OpServe:
			if len(r.FDs) != 2 || !l.memory(r.FDs[0]) || !l.memory(r.FDs[1]) {
				return broker.Reply{}, errors.New("two descriptors of memory are wanted")
			}
			safe = true
			return l.serve(o, v, r)
		case broker.OpRegister:
			if len(r.FDs) != 1 {
				return broker.Reply{}, errors.New("one descriptor is wanted")
			}
			var err error
			if safe, err = checkStoreFile(r.FDs[0]); err != nil {
				return broker.Reply{}, err
			}
			return l.register(o, v, r.FDs[0])
		case broker.OpUnregister:
			return l.unregister(o, v, r.ID)
		}
		return broker.Reply{}, errors.New("no such request")
	}()
	if err != nil {
		closeFiles(reply.Files)
		reply = broker.Reply{Error: err.Error()}
		if errno := (syscall.Errno)(0); errors.As(err, &errno) && r.Op == broker.OpRegister {
			reply.Errno = int(errno)
		}
	}
	return reply
}

// of are the mounts of a connection's pod.
func (l *lender) of(o *peer) []*lent {
	return slices.DeleteFunc(l.all(), func(v *lent) bool { return v.pod != o.of.pod })
}

// list tells a pod of its mounts.
func (l *lender) list(o *peer) (volumes []broker.Volume) {
	for _, v := range l.of(o) {
		volumes = append(volumes, broker.Volume{Name: v.name, Dataset: v.dataset, Served: l.whole(v)})
	}
	return volumes
}

// whole says whether all is there that a server needs to go on with a mount.
func (l *lender) whole(v *lent) bool {
	l.mu.Lock()
	unknown := v.conn == nil
	l.mu.Unlock()
	if unknown {
		l.recall() // another node service may have given it
	}
	l.mu.Lock()
	conn, given := v.conn, v.files != nil
	l.mu.Unlock()
	return conn != nil && given && mount.Alive(conn)
}

func (l *lender) ready(o *peer) error {
	all := l.of(o)
	if len(all) == 0 {
		return errors.New("this pod has no mount")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range all {
		if v.server == nil {
			return fmt.Errorf("dataset %s is not served yet", v.dataset)
		}
	}
	return nil
}

// claim gives a mount to a server: the one that a former server left, or a new one.
func (l *lender) claim(ctx context.Context, v *lent, fresh bool) (broker.Reply, error) {
	unlock, err := v.lock(ctx)
	if err != nil {
		return broker.Reply{}, err
	}
	defer unlock()
	if l.s.superseded() {
		return broker.Reply{}, errors.New("another node service has taken over; connect again")
	}
	if !fresh && l.whole(v) {
		if files := l.copies(v); len(files) == 3 {
			return broker.Reply{Files: files}, nil
		}
	}
	l.mu.Lock()
	pause := claimPause - l.s.now().Sub(v.mounted)
	l.mu.Unlock()
	if pause > 0 && pause <= claimPause {
		wait(ctx, pause)
	}
	if err := l.over(v); err != nil {
		return broker.Reply{}, err
	}
	at, err := mountinfo.At(v.target)
	if err != nil {
		return broker.Reply{}, err
	}
	if len(at) == 0 || at[len(at)-1].Source != v.source {
		return broker.Reply{}, errors.New("the volume is gone")
	}
	place := at[len(at)-1].ID
	if _, err := mountinfo.Detach(v.target, func(m mountinfo.Mount) bool { return m.ID == place }); err != nil {
		return broker.Reply{}, err
	}
	conn, err := mount.Attach(v.target, v.source)
	if err != nil {
		return broker.Reply{}, err
	}
	l.mu.Lock()
	if l.closed || l.volumes[v.target] != v {
		l.mu.Unlock()
		conn.Close()
		return broker.Reply{}, errors.New("the node service ends; connect again")
	}
	v.conn, v.mounted, v.since = conn, l.s.now(), l.s.now()
	l.mu.Unlock()
	files := l.copies(v)
	if len(files) != 1 {
		closeFiles(files)
		return broker.Reply{}, errors.New("the mount went meanwhile")
	}
	return broker.Reply{Files: files}, nil
}

// serve notes who serves a mount, and keeps what a successor needs.
func (l *lender) serve(o *peer, v *lent, r *broker.Request) (broker.Reply, error) {
	files := []*os.File{os.NewFile(uintptr(r.FDs[0]), "open-files"), os.NewFile(uintptr(r.FDs[1]), "settings")}
	r.FDs = nil
	l.whole(v)
	l.mu.Lock()
	if !o.of.peers[o] || l.volumes[v.target] != v {
		l.mu.Unlock()
		closeFiles(files)
		return broker.Reply{}, errors.New("the volume is gone")
	}
	v.server = o
	kept := v.conn != nil && mount.Alive(v.conn)
	if !kept {
		closeFiles(files)
	} else {
		closeFiles(v.files)
		v.files = files
	}
	l.mu.Unlock()
	if !kept {
		return broker.Reply{}, nil
	}
	if at, err := mountinfo.At(v.target); err == nil && len(at) > 1 {
		if err := mount.ReadAhead(at[0].Major, at[0].Minor); err != nil && o.of.limit.Allow() {
			l.s.log.Info("sequential reads of a pod's own mount will be slower", "target", v.target, "error", err)
		}
	}
	if err := l.park(v); err != nil && o.of.limit.Allow() {
		l.s.log.Error("a pod's own mount is not parked", "dataset", v.dataset, "target", v.target, "error", err)
	}
	return broker.Reply{Kept: true}, nil
}

// leave ends what a server serves that says that it has no successor.
func (l *lender) leave(ctx context.Context, o *peer) error {
	var errs []error
	for _, v := range l.of(o) {
		unlock, err := v.lock(ctx)
		if err != nil {
			return err
		}
		l.mu.Lock()
		mine := v.server == o
		l.mu.Unlock()
		if mine {
			errs = append(errs, l.over(v))
		}
		unlock()
	}
	return errors.Join(errs...)
}

// dial connects to a worker's socket. Who is let in there is for the worker to say, who asks for a key.
func (l *lender) dial(ctx context.Context, addr string) (broker.Reply, error) {
	if !workersSocket(addr) {
		return broker.Reply{}, errors.New("this is not the path of a worker's socket")
	}
	ctx, cancel := context.WithTimeout(ctx, brokeredDial)
	defer cancel()
	c, err := l.s.dialWorker(ctx, "unixpacket", addr)
	if err != nil {
		return broker.Reply{}, err
	}
	defer c.Close()
	u, ok := c.(*net.UnixConn)
	if !ok {
		return broker.Reply{}, errors.New("no Unix socket")
	}
	f, err := u.File()
	if err != nil {
		return broker.Reply{}, err
	}
	return broker.Reply{Files: []*os.File{f}}, nil
}

// memory says whether a descriptor is of a memfd.
func (l *lender) memory(fd int) bool {
	id, err := broker.Identify(fd)
	return err == nil && id.Regular() && l.shm != (device{}) && (device{id.Major, id.Minor}) == l.shm
}

// checkStoreFile says whether a descriptor may be registered: a regular file, open for reading only, of memory
// that was mounted for a worker. With O_PATH, and for writing, the kernel would open it again for more than its
// sender may; of another file system it could be anything. safe: it can be closed without harm.
func checkStoreFile(fd int) (safe bool, err error) {
	id, err := broker.Identify(fd)
	if err != nil {
		return false, errors.New("a descriptor that cannot be looked at")
	}
	// Each time afresh, since the numbers of file systems that are gone are used again.
	devices, err := stores()
	if err != nil {
		return false, errors.New("what is mounted on the node is not known")
	}
	switch {
	case !devices[device{id.Major, id.Minor}]:
		return false, errors.New("not a file of a worker's memory that the node service mounted")
	case !id.Regular():
		return true, errors.New("not a regular file")
	case !id.ReadOnly:
		return true, errors.New("a file that is not open for reading only")
	}
	return true, nil
}

// checkLeased is checkStoreFile for what somebody sends as a worker, which any pod can be of a Dataset of its own. With
// an error, too, the descriptor can be closed.
func checkLeased(fd int) error {
	safe, err := checkStoreFile(fd)
	if !safe {
		disarm([]int{fd})
	}
	return err
}

func (l *lender) register(o *peer, v *lent, fd int) (broker.Reply, error) {
	l.mu.Lock()
	conn, mine, n := v.conn, v.server == o, len(v.registered)
	l.mu.Unlock()
	switch {
	case !mine:
		return broker.Reply{}, errors.New("the mount is served by another connection")
	case conn == nil:
		return broker.Reply{}, errors.New("the node service has no copy of the connection")
	case n >= maxRegistered:
		return broker.Reply{}, fmt.Errorf("%d files are registered already", n)
	}
	id, err := mount.Register(conn, fd)
	if err != nil {
		return broker.Reply{}, fmt.Errorf("register a file for passthrough: %w", err)
	}
	l.mu.Lock()
	v.registered[id] = true
	l.mu.Unlock()
	return broker.Reply{ID: id}, nil
}

func (l *lender) unregister(o *peer, v *lent, id int32) (broker.Reply, error) {
	l.mu.Lock()
	conn, mine := v.conn, v.server == o
	l.mu.Unlock()
	if !mine || conn == nil {
		return broker.Reply{}, errors.New("the mount is not served by this connection")
	}
	err := mount.Unregister(conn, id)
	l.mu.Lock()
	delete(v.registered, id)
	l.mu.Unlock()
	return broker.Reply{}, err
}

// disarm sees to it that closing descriptors of unknown origin does not hang. The close of a file of a FUSE mount
// waits for its server, which here may be who sent the file: such a mount is ended first. Other pods' mounts come
// from elsewhere, and have servers that their owners answer for.
func disarm(fds []int) {
	for _, fd := range fds {
		id, err := broker.Identify(fd)
		if fd < 0 || err != nil {
			continue
		}
		all, err := mountinfo.List()
		if err != nil {
			continue
		}
		for _, m := range all {
			if deviceOf(m) == (device{id.Major, id.Minor}) && m.Type == mount.FSType && lentAt([]mountinfo.Mount{m}) {
				_ = abortAt(m.Point, m.Source)
			}
		}
	}
}

// drop closes descriptors of unknown origin.
func drop(fds []int) {
	disarm(fds)
	packets.CloseAll(fds)
}
