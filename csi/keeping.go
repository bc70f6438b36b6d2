package csi

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/csi/keeper"
)

// statfs asks a file system something that the kernel cannot answer by itself.
func statfs(dir string) error {
	var st unix.Statfs_t
	for {
		if err := unix.Statfs(dir, &st); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func isDead(err error) bool {
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
}

// resumes is how many mounts are resumed at once: their readers wait.
const resumes = 8

// keeping is the connection to the keeper, made again whenever it breaks.
type keeping struct {
	s *service

	mu   sync.Mutex
	conn *keeper.Conn // nil: there is no keeper now
	// resuming are entries that are being adopted, so that two rounds do not take one twice.
	resuming map[string]bool
}

func (k *keeping) current() *keeper.Conn {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.conn
}

// park parks one mount.
func (k *keeping) park(m *mounted) error {
	conn := k.current()
	if conn == nil {
		return fmt.Errorf("%w: no connection to %s", keeper.ErrGone, k.s.config.Keeper)
	}
	p, err := m.server.Park()
	if err != nil {
		return err
	}
	defer p.Close()
	set := m.set
	k.s.mu.Lock()
	n := note{Namespace: set.namespace, Dataset: set.name, Keys: string(wire.FormatKeys(set.keys)), Copies: set.copies, Memory: set.memory, Settings: p.Settings}
	k.s.mu.Unlock()
	f, err := n.write()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := conn.Park(m.id, p.Conn, p.Table, f); err != nil {
		return err
	}
	k.s.mu.Lock()
	ending := m.ending
	k.s.mu.Unlock()
	if ending {
		return conn.Drop(m.id) // somebody dropped it before it was there
	}
	return nil
}

// drop has the keeper forget a mount. A keeper that is gone has forgotten it already.
func (k *keeping) drop(id string) {
	conn := k.current()
	if conn == nil || k.s.superseded() {
		return
	}
	if err := conn.Drop(id); err != nil && !errors.Is(err, keeper.ErrGone) {
		k.s.log.Warn("keeper", "error", err)
	}
}

const (
	redialLeast = 100 * time.Millisecond
	redialMost  = 2 * time.Second
)

// run keeps a connection until ctx ends. connected is called once the first one is there and what was parked
// has been adopted.
func (k *keeping) run(ctx context.Context, connected func()) {
	pause, told := redialLeast, false
	for ctx.Err() == nil {
		conn, err := keeper.Dial(ctx, k.s.config.Keeper)
		if err != nil {
			if !told && ctx.Err() == nil {
				k.s.log.Error("no keeper: mounts will not outlive this process until there is one", "error", err)
				told = true
			}
			wait(ctx, pause)
			pause = min(2*pause, redialMost)
			continue
		}
		pause, told = redialLeast, false
		k.mu.Lock()
		k.conn = conn
		k.mu.Unlock()
		k.adopt(ctx)
		k.parkAll()
		connected()
		select {
		case <-conn.Done():
			k.s.log.Warn("the keeper is gone; mounts are parked again when it is back")
		case <-ctx.Done():
		}
		k.mu.Lock()
		k.conn = nil
		k.mu.Unlock()
		conn.Close()
	}
}

// wait waits, or until ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (k *keeping) parkAll() {
	k.s.mu.Lock()
	var all []*mounted
	for _, set := range k.s.sets {
		all = append(all, set.mounts...)
	}
	k.s.mu.Unlock()
	for _, m := range all {
		if ended(m.server) {
			continue
		}
		if err := k.park(m); err != nil {
			k.s.log.Error("mount is not parked: it will not outlive this process", "dir", m.dir, "error", err)
		}
	}
	k.s.lender.parkAll()
}

// adopt resumes what is parked and not served here: what a former node service left, or made while this one
// started. What cannot be resumed now stays parked while a pod has it, and is tried again at the next round.
func (k *keeping) adopt(ctx context.Context) {
	conn := k.current()
	if conn == nil || k.s.superseded() {
		return
	}
	entries, err := conn.List()
	if err != nil {
		k.s.log.Warn("keeper", "error", err)
		return
	}
	var g errgroup.Group
	g.SetLimit(resumes)
	for _, e := range entries {
		if strings.HasPrefix(e.Name, lentPrefix) {
			if k.s.lender.known(e.Name) {
				e.Close()
			} else if err := k.s.lender.adopt(conn, e); err != nil {
				k.s.log.Warn("a pod's own mount is not taken over", "name", e.Name, "error", err)
			}
			continue
		}
		if !k.begin(e.Name) {
			e.Close()
			continue
		}
		g.Go(func() error {
			defer k.finish(e.Name)
			if err := k.resume(ctx, conn, e); err != nil {
				k.s.log.Error("a parked mount cannot be resumed; its readers wait", "name", e.Name, "error", err)
			}
			return nil
		})
	}
	_ = g.Wait() // each has told its error
}

// begin is false for what is served here, or being resumed.
func (k *keeping) begin(name string) bool {
	k.s.mu.Lock()
	for _, set := range k.s.sets {
		for _, m := range set.mounts {
			if m.id == name {
				k.s.mu.Unlock()
				return false
			}
		}
	}
	k.s.mu.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.resuming[name] {
		return false
	}
	if k.resuming == nil {
		k.resuming = map[string]bool{}
	}
	k.resuming[name] = true
	return true
}

func (k *keeping) finish(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.resuming, name)
}

// resume serves one parked mount. The entry's files are used up.
func (k *keeping) resume(ctx context.Context, conn *keeper.Conn, e keeper.Entry) error {
	s := k.s
	if len(e.Files) != 3 {
		e.Close()
		return fmt.Errorf("%w: %d descriptors", errForeign, len(e.Files))
	}
	n, err := readNote(e.Files[2])
	e.Files[2].Close()
	p := &mount.Parked{Settings: n.Settings, Conn: e.Files[0], Table: e.Files[1]}
	served, serr := p.Served()
	unserved := serr == nil && !served
	if unserved {
		// It may take long to resume it, or never be: until then readers must at least be killed when they are told to.
		_ = mount.Resend(p.Conn) // which older kernels do not know
	}
	fail := func(err error) error {
		p.Close()
		return err
	}
	if err != nil {
		return fail(err)
	}
	v, err := n.volume()
	if err != nil {
		return fail(err)
	}
	dir := n.Settings.Dir
	if filepath.Dir(dir) != s.mountsDir || filepath.Base(dir) != e.Name {
		return fail(fmt.Errorf("it is mounted at %s, not in %s", dir, s.mountsDir))
	}
	at, err := mountinfo.At(dir)
	if err != nil {
		return fail(err)
	}
	if len(at) == 0 || deviceOf(at[0]) != (device{n.Settings.Major, n.Settings.Minor}) {
		// Unmounted since, by somebody who could not tell the keeper.
		p.Close()
		s.clear(dir)
		return conn.Drop(e.Name)
	}
	err = k.serve(ctx, v, p)
	if err == nil || !unserved || ctx.Err() != nil || s.superseded() {
		return err
	}
	if users, uerr := s.users(); uerr != nil || len(users[deviceOf(at[0])]) > 0 {
		return errors.Join(err, uerr)
	}
	// Its Dataset is gone, perhaps, and no pod to come would get it.
	s.log.Warn("a parked mount cannot be resumed: unmounted, since no pod has it", "dataset", v.name(), "dir", dir, "error", err)
	err = conn.Drop(e.Name)
	s.clear(dir)
	return err
}

// serve resumes a mount of the Dataset. p is used up.
func (k *keeping) serve(ctx context.Context, v volume, p *mount.Parked) error {
	s, shows, dir := k.s, p.Settings.Snapshot, p.Settings.Dir
	s.mu.Lock()
	set := s.hold(v)
	if set.keys == nil {
		// The key counts as proven: the former node service parked it because the workers took it.
		set.proven, set.keys, set.copies, set.memory, set.current = v.keys[0], v.keys, v.copies, v.memory, shows
	}
	s.mu.Unlock()
	defer s.release(set)
	select {
	case set.turn <- struct{}{}:
	case <-ctx.Done():
		p.Close()
		return context.Cause(ctx)
	}
	defer func() { <-set.turn }()
	c, err := s.dial(ctx, set, shows)
	if err != nil {
		s.shrink(set)
		p.Close()
		return err
	}
	server, err := c.Resume(ctx, p, s.mountOptions(set))
	if err != nil {
		s.hangUp(set, c)
		s.shrink(set)
		return err
	}
	s.add(set, c, server, 0)
	s.log.Info("resumed", "dataset", set.String(), "snapshot", hex.EncodeToString(shows[:6]), "dir", dir)
	return nil
}
