package csi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/csi/broker"
	"github.com/stepcache/stepcache/csi/keeper"
)

// What mountinfo says of the volumes of pods that serve mounts by themselves. It is all that a node service needs
// to know them again: the source holds the pod's uid, and for a mount the Dataset's name.
const (
	lentSource   = "stepcache-lent:"
	lenderSource = "stepcache-lender:"
)

const (
	// lentPrefix begins the names of lent mounts at the keeper.
	lentPrefix = "lent-"
	// maxLent bounds a pod's mounts: the keeper has room for so many of each pod that a node can have.
	maxLent = 16
	// maxPeers bounds the connections of a pod.
	maxPeers = 16
	// lostAfter is how long a mount may be without its server. A sidecar that was killed is back sooner, unless
	// it is killed again and again; and until then whoever reads waits, and a process that waits for an answer
	// to what the killed one had read cannot be killed, so that its pod would be Terminating.
	lostAfter = time.Minute
	// claimPause is the least time between two mounts of one volume.
	claimPause = 200 * time.Millisecond
)

// lender lends mounts to pods that serve them by themselves (doc.go).
type lender struct {
	s    *service
	shm  device          // of memfds
	ctx  context.Context // ends with the node service
	end  context.CancelFunc
	work sync.WaitGroup
	// looking is held by whoever compares what is known with what is mounted.
	looking chan struct{}
	// recalling is held by whoever asks the keeper, which pods can have us do.
	recalling chan struct{}

	mu      sync.Mutex
	pods    map[string]*borrower // by the target of the socket's volume
	volumes map[string]*lent     // by target
	deaf    map[string]bool      // targets in which there is no listening, which was said
	closed  bool
}

// borrower is a pod with a socket's volume.
type borrower struct {
	pod, target string
	device      device
	listener    *net.UnixListener
	peers       map[*peer]bool
	limit       *rate.Limiter // of log lines about what it does
}

// lent is a mount that a pod serves, or will.
type lent struct {
	name, pod, dataset, target string
	source                     string
	// turn is held by whoever mounts it or ends it.
	turn chan struct{}

	// lender.mu's:
	conn       *os.File   // nil: nobody has been given it, or it is over
	files      []*os.File // for a successor of its server: the table and the settings; nil before OpServe
	server     *peer      // who serves it; nil: nobody
	since      time.Time  // since when nobody has
	mounted    time.Time
	registered map[int32]bool
}

func newLender(s *service) *lender {
	l := &lender{s: s, looking: make(chan struct{}, 1), recalling: make(chan struct{}, 1), pods: map[string]*borrower{}, volumes: map[string]*lent{}, deaf: map[string]bool{}}
	l.ctx, l.end = context.WithCancel(context.Background())
	if fd, err := unix.MemfdCreate("stepcache-shm", unix.MFD_CLOEXEC); err == nil {
		if id, err := broker.Identify(fd); err == nil {
			l.shm = device{id.Major, id.Minor}
		}
		unix.Close(fd)
	}
	return l
}

func lentName(target string) string {
	h := sha256.Sum256([]byte(target))
	return lentPrefix + hex.EncodeToString(h[:12])
}

// publishMount makes a lent mount's place: a file system that is dead, which only the pod's server brings to
// life. Until then whoever looks at it gets an error, never an empty folder, and nobody waits.
func (l *lender) publishMount(target string, v volume) error {
	source := lentSource + v.pod.uid + ":" + v.name()
	l.mu.Lock()
	n := 0
	for _, o := range l.volumes {
		if o.pod == v.pod.uid && o.target != target {
			n++
		}
	}
	l.mu.Unlock()
	if n >= maxLent {
		return status.Errorf(codes.ResourceExhausted, "pod %s has %d mounts of its own already, which is as many as a pod may have", v.pod, n)
	}
	if err := l.s.publish(target, mount.FSType, source, func() error {
		conn, err := mount.Attach(target, source)
		if err != nil {
			return err
		}
		return conn.Close()
	}); err != nil {
		return err
	}
	return l.look()
}

// publishSocket makes the folder of the pod's socket, and listens there.
func (l *lender) publishSocket(target string, v volume) error {
	source := lenderSource + v.pod.uid
	if err := l.s.publish(target, "tmpfs", source, func() error {
		if err := unix.Mount(source, target, "tmpfs", tmpfsFlags, "size=65536,nr_inodes=16,mode=0755,uid=0,gid=0"); err != nil {
			return fmt.Errorf("mount a folder for the socket at %s: %w", target, err)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := l.look(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pods[target] == nil {
		return status.Errorf(codes.Unavailable, "nobody listens at %s yet", target)
	}
	return nil
}

// look takes over what is mounted and not known, and forgets what is known and not mounted: another node
// service may have published it, or taken it away.
func (l *lender) look() error {
	l.looking <- struct{}{}
	defer func() { <-l.looking }()
	all, err := mountinfo.List()
	if err != nil {
		return err
	}
	sockets, mounts := map[string]mountinfo.Mount{}, map[string]mountinfo.Mount{}
	for _, m := range all {
		switch {
		case m.Type == "tmpfs" && strings.HasPrefix(m.Source, lenderSource):
			sockets[m.Point] = m
		case m.Type == mount.FSType && strings.HasPrefix(m.Source, lentSource):
			mounts[m.Point] = m
		}
	}
	superseded := l.s.superseded() // the sockets are the successor's to make
	l.mu.Lock()
	for target, v := range l.volumes {
		if _, there := mounts[target]; !there {
			v.forget()
			delete(l.volumes, target)
		}
	}
	for target, m := range mounts {
		pod, dataset, ok := strings.Cut(strings.TrimPrefix(m.Source, lentSource), ":")
		if ok && l.volumes[target] == nil && !l.closed {
			l.volumes[target] = &lent{
				name: lentName(target), pod: pod, dataset: dataset, target: target, source: m.Source,
				turn: make(chan struct{}, 1), since: l.s.now(), registered: map[int32]bool{},
			}
		}
	}
	for target, p := range l.pods {
		if m, there := sockets[target]; !there || deviceOf(m) != p.device {
			p.close()
			delete(l.pods, target)
		}
	}
	for target := range l.deaf {
		if _, there := sockets[target]; !there {
			delete(l.deaf, target)
		}
	}
	for target := range sockets {
		if l.pods[target] != nil || l.closed || superseded {
			delete(sockets, target)
		}
	}
	l.mu.Unlock()
	for target, m := range sockets {
		l.listen(target, m)
	}
	return nil
}

// listen begins to answer a pod. The caller holds looking.
func (l *lender) listen(target string, m mountinfo.Mount) {
	listener, err := listenIn(target, deviceOf(m))
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		// The pod's own doing, perhaps: it must not be in the way of others.
		if !l.deaf[target] {
			l.s.log.Warn("a pod is lent nothing: its socket cannot be made", "target", target, "error", err)
		}
		l.deaf[target] = true
		return
	}
	if l.closed {
		listener.Close()
		return
	}
	delete(l.deaf, target)
	p := &borrower{
		pod: strings.TrimPrefix(m.Source, lenderSource), target: target, device: deviceOf(m), listener: listener, peers: map[*peer]bool{},
		limit: rate.NewLimiter(rate.Every(time.Minute), 10),
	}
	l.pods[target] = p
	l.work.Go(func() { l.accept(p) })
}

// listenIn makes the socket in a pod's folder, in place of a former one. What lies there may be the pod's doing:
// no link is followed. The folder must be on that device: when the pod has ended meanwhile, the mount is gone and
// a socket in the folder below it would keep that from being removed, and the pod Terminating.
func listenIn(target string, on device) (*net.UnixListener, error) {
	dir, err := unix.Open(target, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	var folder unix.Stat_t
	if err := unix.Fstat(dir, &folder); err != nil {
		return nil, err
	}
	if (device{unix.Major(folder.Dev), unix.Minor(folder.Dev)}) != on {
		return nil, fmt.Errorf("%w: its mount is gone", fs.ErrNotExist)
	}
	// Through the descriptor, since a socket's path has 107 bytes at most.
	const tmp = ".new"
	if err := unix.Unlinkat(dir, tmp, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	listener, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir, tmp), Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false)
	err = func() error {
		fd, err := unix.Openat(dir, tmp, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
			return errors.New("somebody else writes there")
		}
		// Any user of the pod's containers that have the volume.
		if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), 0o666); err != nil {
			return err
		}
		return unix.Renameat(dir, tmp, dir, v1alpha1.LenderSocketName)
	}()
	if err != nil {
		listener.Close()
		return nil, err
	}
	return listener, nil
}

// close ends a pod's connections. The caller holds lender.mu.
func (p *borrower) close() {
	p.listener.Close()
	for c := range p.peers {
		c.conn.Close()
	}
}

// forget closes what is kept of a mount. The caller holds lender.mu.
func (v *lent) forget() {
	for _, f := range append(v.files, v.conn) {
		if f != nil {
			f.Close()
		}
	}
	v.conn, v.files, v.server = nil, nil, nil
	v.registered = map[int32]bool{}
}

// lock takes a mount's turn.
func (v *lent) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case v.turn <- struct{}{}:
		return func() { <-v.turn }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// over ends a mount: whoever uses it gets errors. What makes its place stays. The caller holds the turn.
func (l *lender) over(v *lent) error {
	l.mu.Lock()
	kept := v.conn != nil
	v.forget()
	v.since = l.s.now()
	l.mu.Unlock()
	err := abortAt(v.target, v.source)
	if kept {
		l.s.keeping.drop(v.name)
	}
	return err
}

// abortAt ends the connection of the file system at target that lies on the one that makes its place.
func abortAt(target, source string) error {
	at, err := mountinfo.At(target)
	if err != nil || len(at) < 2 || at[0].Type != mount.FSType || at[0].Source != source {
		return err
	}
	// It aborts, and then may or may not unmount.
	if err := unix.Unmount(target, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINVAL) {
		return &fs.PathError{Op: "abort", Path: target, Err: err}
	}
	return nil
}

// unpublish ends what a pod's volume of either kind was for, given what mountinfo says. It leaves the unmounting.
func (l *lender) unpublish(ctx context.Context, target string, at []mountinfo.Mount) error {
	if strings.HasPrefix(at[0].Source, lenderSource) {
		l.mu.Lock()
		if p := l.pods[target]; p != nil {
			p.close()
			delete(l.pods, target)
		}
		l.mu.Unlock()
		return nil
	}
	l.mu.Lock()
	v := l.volumes[target]
	l.mu.Unlock()
	if v == nil {
		l.s.keeping.drop(lentName(target))
		return abortAt(target, at[0].Source)
	}
	unlock, err := v.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	err = l.over(v)
	l.mu.Lock()
	delete(l.volumes, target)
	l.mu.Unlock()
	return err
}

// yield gives up the sockets in pods, which another node service has taken: servers that are connected here connect to
// that one, which would take them for gone.
func (l *lender) yield() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for target, p := range l.pods {
		p.close()
		delete(l.pods, target)
	}
}

// again gives up what another node service had taken and left: its sockets in pods, in which look listens anew, and
// the mounts that it ended. What it made in their place is at the keeper. Servers that connected to it connect anew, and
// have the time for it that any has.
func (l *lender) again() {
	l.yield()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range l.volumes {
		if v.conn != nil && !mount.Alive(v.conn) {
			v.forget()
		}
		if v.server == nil {
			v.since = l.s.now()
		}
	}
}

// lentAt says whether a mount is of a pod that serves by itself.
func lentAt(at []mountinfo.Mount) bool {
	return len(at) > 0 && (strings.HasPrefix(at[0].Source, lentSource) || strings.HasPrefix(at[0].Source, lenderSource))
}

// adopt takes what a former node service left at the keeper.
func (l *lender) adopt(conn *keeper.Conn, e keeper.Entry) error {
	find := func() *lent {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, v := range l.volumes {
			if v.name == e.Name {
				return v
			}
		}
		return nil
	}
	v := find()
	if v == nil {
		if err := l.look(); err != nil {
			e.Close()
			return err
		}
		if v = find(); v == nil {
			e.Close()
			return conn.Drop(e.Name)
		}
	}
	alive := len(e.Files) == 3 && mount.Alive(e.Files[0])
	l.mu.Lock()
	switch {
	case v.conn != nil: // what is parked is this, or will be
		l.mu.Unlock()
		e.Close()
		return nil
	case !alive: // ended by somebody who could not tell the keeper
		l.mu.Unlock()
		e.Close()
		return conn.Drop(e.Name)
	}
	v.conn, v.files = e.Files[0], e.Files[1:]
	if v.server == nil {
		v.since = l.s.now()
	}
	l.mu.Unlock()
	return nil
}

// recall takes what another node service has left at the keeper since this one began.
func (l *lender) recall() {
	l.recalling <- struct{}{}
	defer func() { <-l.recalling }()
	conn := l.s.keeping.current()
	if conn == nil {
		return
	}
	entries, err := conn.List()
	if err != nil {
		l.s.log.Warn("keeper", "error", err)
		return
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name, lentPrefix) || l.known(e.Name) {
			e.Close()
		} else if err := l.adopt(conn, e); err != nil {
			l.s.log.Warn("a pod's own mount is not taken over", "name", e.Name, "error", err)
		}
	}
}

// known says whether what is parked under a name is held here.
func (l *lender) known(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range l.volumes {
		if v.name == name {
			return v.conn != nil
		}
	}
	return false
}

// park parks a mount, if it is served.
func (l *lender) park(v *lent) error {
	conn := l.s.keeping.current()
	if conn == nil {
		return fmt.Errorf("%w: no connection to %s", keeper.ErrGone, l.s.config.Keeper)
	}
	files := l.copies(v)
	defer closeFiles(files)
	if len(files) != 3 {
		return nil
	}
	return conn.Park(v.name, files...)
}

// copies are descriptors of a mount's connection and of what a successor needs.
func (l *lender) copies(v *lent) (files []*os.File) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if v.conn == nil {
		return nil
	}
	for _, f := range append([]*os.File{v.conn}, v.files...) {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			closeFiles(files)
			return nil
		}
		files = append(files, os.NewFile(uintptr(fd), f.Name()))
	}
	return files
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func (l *lender) all() []*lent {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make([]*lent, 0, len(l.volumes))
	for _, v := range l.volumes {
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b *lent) int { return strings.Compare(a.target, b.target) })
	return all
}

func (l *lender) parkAll() {
	for _, v := range l.all() {
		if err := l.park(v); err != nil {
			l.s.log.Error("a pod's own mount is not parked", "dataset", v.dataset, "target", v.target, "error", err)
		}
	}
}

// watch ends the mounts whose server is gone for too long.
func (l *lender) watch() {
	now := l.s.now()
	for _, v := range l.all() {
		l.mu.Lock()
		lost := v.conn != nil && v.server == nil && now.Sub(v.since) >= lostAfter
		l.mu.Unlock()
		if !lost {
			continue
		}
		select {
		case v.turn <- struct{}{}:
		default:
			continue // somebody is at it
		}
		l.mu.Lock()
		lost = v.conn != nil && v.server == nil
		l.mu.Unlock()
		if lost {
			l.s.log.Warn("a pod's own mount has had no server for too long: who reads it gets errors", "dataset", v.dataset, "pod", v.pod, "target", v.target)
			if err := l.over(v); err != nil {
				l.s.log.Warn("a pod's own mount is not ended", "target", v.target, "error", err)
			}
		}
		<-v.turn
	}
}

// close leaves everything to a successor.
func (l *lender) close() {
	l.end()
	l.mu.Lock()
	l.closed = true
	for _, p := range l.pods {
		p.close()
	}
	l.mu.Unlock()
	// What a pod sent may hold its own goroutine up (disarm), which must not hold up the end.
	done := make(chan struct{})
	go func() { l.work.Wait(); close(done) }()
	t := time.NewTimer(goodbye)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range l.volumes {
		v.forget()
	}
}

// stores are the devices of the memory that this node service, or one before it, mounted for workers.
func stores() (map[device]bool, error) {
	all, err := mountinfo.List()
	if err != nil {
		return nil, err
	}
	found := map[device]bool{}
	for _, m := range all {
		if m.Type == "tmpfs" && m.Source == storeSource {
			found[deviceOf(m)] = true
		}
	}
	return found, nil
}

// workersSocket says whether an address can be a worker's socket, before anything is done with it.
func workersSocket(addr string) bool {
	return filepath.IsAbs(addr) && len(addr) < 108 && filepath.Base(addr) == v1alpha1.SocketName
}
