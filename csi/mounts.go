package csi

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// dialTimeout is how long a pod, or a mount that is resumed, waits for the workers' snapshot. It is less than the kubelet's two
	// minutes, so that the pod's events say what is waited for. What comes of it by then is kept for the next call.
	dialTimeout = 90 * time.Second
	// patience is how long a pod waits to be told the current snapshot when this node has one already.
	patience = 5 * time.Second
	// probeTimeout is how long a mount that somebody else may serve has to answer.
	probeTimeout = 5 * time.Second
)

// dataset is what this node has of one Dataset. Its fields are service.mu's but for the turn.
type dataset struct {
	namespace, name string
	// proven is a key that the workers took; whoever has it is let in while they do not answer. keys are what clients
	// use, newest first.
	proven wire.Key
	keys   []wire.Key
	// renewed says that the keeper's notes have older keys.
	renewed bool
	copies  int
	memory  int64
	// own says that copies and memory are from a volume of the Dataset's own namespace. What a namespace that may only
	// read says of them, in a Secret that anybody there can write, counts as long as there is none.
	own bool
	// dialed are the copies that the last client was made with. It is whose the turn is.
	dialed int
	// current is the snapshot that the last new pod got.
	current catalog.Digest
	cache   *slice
	clients int        // that may use the cache: those of mounts that are ending are among them
	mounts  []*mounted // oldest first
	held    int        // by those who have the turn or will: until then it stays known

	// turn is held by whoever makes mounts of it or takes its cache away.
	turn chan struct{}
}

func (d *dataset) String() string { return d.namespace + "/" + d.name }

// mounted is one mount.
type mounted struct {
	id     string // its folder's name, and its name at the keeper
	dir    string
	set    *dataset
	digest catalog.Digest
	copies int // that its client reads
	device device
	server *mount.Server
	client *mount.Tier

	// service.mu's:
	using  int       // pods that are being given it
	unused time.Time // since when no pod has it; zero: some has
	ending bool      // being unmounted by this process
}

// device is a file system's number in mountinfo.
type device struct{ major, minor uint32 }

func deviceOf(m mountinfo.Mount) device { return device{m.Major, m.Minor} }

// take returns the mount of the Dataset's current snapshot, made now if need be. It stays until done is called,
// and from then on as long as a pod has it.
func (s *service) take(ctx context.Context, v volume) (m *mounted, done func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	set, digest, err := s.admit(ctx, v)
	if err != nil {
		return nil, nil, err
	}
	defer s.release(set)
	select {
	case set.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("dataset %s: another mount of it is being made: %w", set, context.Cause(ctx))
	}
	defer func() { <-set.turn }()
	if m = s.use(set, digest); m == nil {
		if m, err = s.mount(ctx, set, digest); err != nil {
			return nil, nil, err
		}
	}
	return m, func() {
		s.mu.Lock()
		m.using--
		s.mu.Unlock()
	}, nil
}

// hold finds a Dataset, or makes it known, until release. The caller holds s.mu.
func (s *service) hold(v volume) *dataset {
	set := s.sets[v.name()]
	if set == nil {
		set = &dataset{namespace: v.namespace, name: v.dataset, turn: make(chan struct{}, 1)}
		s.sets[v.name()] = set
	}
	set.held++
	return set
}

// release forgets a Dataset that this node has nothing of any more.
func (s *service) release(set *dataset) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set.held--; set.held == 0 && set.clients == 0 {
		delete(s.sets, set.String())
	}
}

// use finds a mount that is served, and counts its user.
func (s *service) use(set *dataset, digest catalog.Digest) *mounted {
	s.mu.Lock()
	defer s.mu.Unlock()
	set.current = digest
	for _, m := range set.mounts {
		if m.digest == digest && m.copies == set.copies && !m.ending && !ended(m.server) && !m.server.Worn() {
			m.using++
			m.unused = time.Time{}
			return m
		}
	}
	return nil
}

func ended(m *mount.Server) bool {
	select {
	case <-m.Done():
		return true
	default:
		return false
	}
}

// admit decides whether a volume's key opens the Dataset, which it holds then, and tells the current snapshot. When the
// workers do not answer, a known key gets the newest snapshot that this node has.
func (s *service) admit(ctx context.Context, v volume) (*dataset, catalog.Digest, error) {
	var proven wire.Key
	var have *mounted
	s.mu.Lock()
	if set := s.sets[v.name()]; set != nil && slices.Contains(v.keys, set.proven) {
		proven = set.proven
		for _, m := range set.mounts {
			if !m.ending && !ended(m.server) {
				have = m
			}
		}
	}
	s.mu.Unlock()
	if have != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.patience)
		defer cancel()
	}
	// By a handshake of the volume's own, since a mount's connections may be of a key that was taken then. Each key by
	// itself, to know which one it is that they take.
	var failed error
	answered := false
	for _, key := range v.keys {
		c := s.clientConfig(v.namespace, v.dataset)
		c.Keys = wire.Keys{Read: []wire.Key{key}}
		if have != nil {
			c.Membership = have.client.Members() // the seeds' name may lead to a node that is gone first
		}
		digest, err := mount.Current(ctx, c)
		if err == nil {
			return s.admitted(v, key), digest, nil
		}
		failed = err
		if !errors.Is(err, wire.ErrUnauthorized) {
			break
		}
		answered = true
	}
	if have == nil || answered { // nobody is let in because there was no time for the key that counts
		return nil, catalog.Digest{}, failed
	}
	s.log.Warn("workers do not tell the current snapshot: the newest of this node is taken", "dataset", v.name(), "error", failed)
	return s.admitted(v, proven), have.digest, nil
}

// admitted holds the Dataset that a key was taken for, and records the key.
func (s *service) admitted(v volume, key wire.Key) *dataset {
	s.mu.Lock()
	defer s.mu.Unlock()
	set := s.hold(v)
	own := !v.inline || v.pod.namespace == v.namespace
	known := v.inline && len(set.mounts) > 0 && slices.Contains(set.keys, key)
	if own && !set.own || !known && own == set.own {
		set.copies, set.memory, set.own = v.copies, v.memory, own
	}
	if known {
		return set // what other pods brought may be newer
	}
	set.proven = key
	if v.inline {
		set.renew([]wire.Key{key})
	} else {
		set.renew(v.keys)
	}
	return set
}

// renew makes clients use these keys at their next connection.
func (d *dataset) renew(keys []wire.Key) {
	if !slices.Equal(d.keys, keys) {
		d.keys, d.renewed = keys, len(d.mounts) > 0
	}
}

// clientConfig is what all clients of a Dataset have in common.
func (s *service) clientConfig(namespace, name string) client.Config {
	return client.Config{
		Dataset: namespace + "/" + name, Seeds: s.config.Seeds(namespace, name), Node: s.config.NodeName,
		BufferBytes: s.config.BufferBytes, Buffers: s.config.Buffers, SnapshotDir: s.snapshotDir(),
		Logger: s.log, Dialer: s.dialWorker, Descriptor: checkLeased,
	}
}

// dial connects a client for one snapshot. The caller holds the turn.
func (s *service) dial(ctx context.Context, set *dataset, digest catalog.Digest) (*mount.Tier, error) {
	s.mu.Lock()
	cache, limit, copies := set.cache, set.memory, set.copies
	set.dialed = copies
	s.mu.Unlock()
	if cache == nil && digest != mount.Live { // of files that change nothing is kept here
		if cache = s.budget.open(ctx, set.String(), limit); cache != nil {
			s.mu.Lock()
			set.cache = cache
			s.mu.Unlock()
		}
	}
	c := s.clientConfig(set.namespace, set.name)
	c.Snapshot, c.Copies = digest, copies
	c.KeySource = func() wire.Keys {
		s.mu.Lock()
		defer s.mu.Unlock()
		return wire.Keys{Read: set.keys}
	}
	if cache != nil {
		c.Store = cache.store
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	reader, err := mount.Connect(ctx, c)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	set.clients++
	s.mu.Unlock()
	return reader, nil
}

// hangUp closes a client that dial gave.
func (s *service) hangUp(set *dataset, c *mount.Tier) {
	if err := c.Close(); err != nil {
		s.log.Warn("client", "error", err)
	}
	s.mu.Lock()
	set.clients--
	s.mu.Unlock()
}

func (s *service) mountOptions(set *dataset) mount.Options {
	return mount.Options{Dataset: set.String(), Logger: s.log}
}

// mount makes a mount, for one user already. The caller holds the turn.
func (s *service) mount(ctx context.Context, set *dataset, digest catalog.Digest) (*mounted, error) {
	if s.superseded() {
		return nil, status.Error(codes.Unavailable, "another node service has taken over; ask again")
	}
	c, err := s.dial(ctx, set, digest)
	if err != nil {
		s.trim(unfinished) // the next call goes on with what came of the snapshot, if that is still the current one
		s.shrink(set)
		return nil, err
	}
	m, err := s.mountClient(ctx, set, c)
	if err != nil {
		s.hangUp(set, c)
		s.shrink(set)
		return nil, err
	}
	return m, nil
}

func (s *service) mountClient(ctx context.Context, set *dataset, c *mount.Tier) (*mounted, error) {
	if err := os.MkdirAll(s.mountsDir, 0o755); err != nil {
		return nil, err
	}
	digest := c.Shows()
	// A folder of its own: what a dead mount leaves is in nobody's way.
	dir, err := os.MkdirTemp(s.mountsDir, set.namespace+"."+set.name+"."+hex.EncodeToString(digest[:4])+".")
	if err != nil {
		return nil, err
	}
	server, err := c.Mount(ctx, dir, s.mountOptions(set))
	if err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	s.log.Info("mounted", "dataset", set.String(), "snapshot", hex.EncodeToString(digest[:6]), "dir", dir, "mode", server.Mode())
	return s.add(set, c, server, 1), nil
}

// add makes a served mount known, parks it, and looks after it until its end. The client is the mount's from now on.
func (s *service) add(set *dataset, c *mount.Tier, server *mount.Server, using int) *mounted {
	major, minor := server.Device()
	m := &mounted{
		id: filepath.Base(server.Dir()), dir: server.Dir(), set: set, digest: c.Shows(), copies: set.dialed,
		device: device{major, minor}, server: server, client: c, using: using,
	}
	s.mu.Lock()
	set.mounts = append(set.mounts, m)
	s.mu.Unlock()
	s.metrics.add(m)
	s.work.Go(func() { s.follow(m) })
	if err := s.keeping.park(m); err != nil {
		// It is served all the same, and parked as soon as there is a keeper.
		s.log.Error("mount is not parked: it will not outlive this process", "dir", m.dir, "error", err)
	}
	return m
}

// follow waits for a mount's end, and cleans up after it.
func (s *service) follow(m *mounted) {
	select {
	case <-m.server.Done():
	case <-s.left:
		if !ended(m.server) {
			return // this process ends, and the mount goes on without it
		}
	}
	s.mu.Lock()
	expected := m.ending
	m.ending = true
	m.set.held++
	s.forget(m)
	s.mu.Unlock()
	s.metrics.remove(m)
	if !expected && !s.superseded() {
		users, err := s.users()
		s.log.Error("a mount ended by itself: pods that have it get errors and must be restarted; new pods get a new one",
			"dataset", m.set.String(), "dir", m.dir, "pods", users[m.device], "error", err)
		s.event(m.set.String(), "MountLost", fmt.Sprintf("a mount of dataset %s ended; %s", m.set, toRestart(users[m.device])))
	}
	s.keeping.drop(m.id)
	s.hangUp(m.set, m.client)
	s.clear(m.dir)
	s.trim("")
	m.set.turn <- struct{}{}
	s.shrink(m.set)
	<-m.set.turn
	s.release(m.set)
}

// unfinished starts the names of snapshots of which not all came. No mount shows one: they may go also while nobody can
// tell which mounts are parked.
const unfinished = "new-"

// trim removes snapshots that no mount shows, of those whose names start so. Those that are young may be of a mount that is
// being made.
func (s *service) trim(prefix string) {
	dir := s.snapshotDir()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // there is none yet
	}
	shown := map[string]bool{}
	s.mu.Lock()
	for _, set := range s.sets {
		for _, m := range set.mounts {
			shown[hex.EncodeToString(m.digest[:])] = true
		}
	}
	s.mu.Unlock()
	for _, e := range entries {
		digest, _, _ := strings.Cut(e.Name(), ".")
		if info, err := e.Info(); err == nil && strings.HasPrefix(digest, prefix) && !shown[digest] && s.now().Sub(info.ModTime()) > youth {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// youth is how long something that nobody seems to use is left alone, since it may be on its way.
const youth = 10 * time.Minute

// forget takes a mount out of the table. The caller holds s.mu.
func (s *service) forget(m *mounted) {
	m.set.mounts = slices.DeleteFunc(m.set.mounts, func(o *mounted) bool { return o == m })
}

// shrink gives up what is kept for a Dataset that nobody reads. The caller holds the turn.
func (s *service) shrink(set *dataset) {
	s.mu.Lock()
	if set.clients > 0 || set.cache == nil {
		s.mu.Unlock()
		return
	}
	cache := set.cache
	set.cache = nil
	s.mu.Unlock()
	if err := cache.close(); err != nil {
		s.log.Warn("node cache is left", "dataset", set.String(), "error", err)
	}
}

// clear takes away what is left at a mount's folder, and the folder. Nothing is looked at that may be dead.
func (s *service) clear(dir string) {
	if _, err := mountinfo.Detach(dir, nil); err != nil {
		s.log.Warn("a dead mount is left", "dir", dir, "error", err)
		return
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("a mount's folder is left", "dir", dir, "error", err)
	}
}

// end unmounts a mount that no pod has; false: one has, or somebody else ends it.
func (s *service) end(m *mounted) bool {
	s.mu.Lock()
	if m.ending || m.using > 0 {
		s.mu.Unlock()
		return false
	}
	m.ending = true
	s.forget(m)
	s.mu.Unlock()
	// Before the unmount: a successor must not resume what is going away.
	s.keeping.drop(m.id)
	if err := m.server.Unmount(); err != nil {
		s.log.Warn("unmount", "dir", m.dir, "error", err)
	}
	return true
}

// users are the paths at which pods have each file system of ours.
func (s *service) users() (map[device][]string, error) {
	all, err := mountinfo.List()
	users := map[device][]string{}
	for _, m := range all {
		if m.Type == mount.FSType && filepath.Dir(m.Point) != s.mountsDir {
			users[deviceOf(m)] = append(users[deviceOf(m)], m.Point)
		}
	}
	return users, err
}

// toRestart names the pods that have a mount at the paths by their UIDs, which is all that these tell.
func toRestart(paths []string) string {
	const most = 10
	var uids []string
	for _, p := range paths {
		if _, below, ok := strings.Cut(p, "/pods/"); ok {
			uid, _, _ := strings.Cut(below, "/")
			uids = append(uids, uid)
		}
	}
	slices.Sort(uids)
	uids = slices.Compact(uids) // a container may have a part of a volume besides
	text := fmt.Sprintf("%d pods of this node that have it must be restarted", len(uids))
	switch named := strings.Join(uids[:min(most, len(uids))], ", "); {
	case len(uids) > most:
		text += fmt.Sprintf("; the first by UID: %s", named)
	case len(uids) > 0:
		text += "; their UIDs: " + named
	}
	return text
}

// reap ends mounts that no pod has had for a while, and at once those that no new pod would get.
func (s *service) reap(linger time.Duration) error {
	users, err := s.users()
	if err != nil {
		return err
	}
	now := s.now()
	var over []*mounted
	s.mu.Lock()
	for _, set := range s.sets {
		for _, m := range set.mounts {
			switch {
			case m.using > 0 || len(users[m.device]) > 0:
				m.unused = time.Time{}
			case m.unused.IsZero():
				m.unused = now
			}
			if !m.unused.IsZero() && (now.Sub(m.unused) >= linger || m.digest != set.current || m.server.Worn()) {
				over = append(over, m)
			}
		}
	}
	s.mu.Unlock()
	// At once: one that somebody still has open, in a pod that has gone, takes its time.
	var g errgroup.Group
	for _, m := range over {
		g.Go(func() error {
			if s.end(m) {
				s.log.Info("unmounted, since no pod has it", "dataset", m.set.String(), "dir", m.dir)
			}
			return nil
		})
	}
	return g.Wait()
}

// sweep looks, once, for mounts of former node services, which were there before this one made any, that nobody
// serves nor keeps any more.
func (s *service) sweep(ctx context.Context, former []mountinfo.Mount) error {
	all, err := mountinfo.Below(s.mountsDir)
	if err != nil {
		return err
	}
	users, err := s.users()
	if err != nil {
		return err
	}
	ours := map[string]bool{}
	s.mu.Lock()
	for _, set := range s.sets {
		for _, m := range set.mounts {
			ours[m.dir] = true
		}
	}
	s.mu.Unlock()
	for _, m := range all {
		was := func(f mountinfo.Mount) bool { return f.Point == m.Point && deviceOf(f) == deviceOf(m) }
		if m.Type != mount.FSType || ours[m.Point] || !slices.ContainsFunc(former, was) {
			continue
		}
		if !s.dead(ctx, m.Point) {
			s.log.Warn("a mount is not this node service's, and alive: left alone", "dir", m.Point)
			continue
		}
		pods := users[deviceOf(m)]
		s.log.Error("the node service and the keeper were both gone: a mount is dead", "source", m.Source, "dir", m.Point, "pods", pods)
		if len(pods) > 0 {
			s.event(m.Source, "MountLost", fmt.Sprintf("%s: the node service and the keeper were both gone; %s", m.Source, toRestart(pods)))
		}
		s.clear(m.Point)
	}
	mounts := map[string]bool{}
	for _, m := range all {
		mounts[m.Point] = true
	}
	// Folders of mounts that were never made. One that is being made by somebody else is young.
	entries, err := os.ReadDir(s.mountsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(s.mountsDir, e.Name())
		if mounts[dir] || ours[dir] {
			continue
		}
		if info, err := e.Info(); err == nil && s.now().Sub(info.ModTime()) > youth {
			_ = os.Remove(dir)
		}
	}
	return nil
}

// dead says whether a mount's server is gone for good. One that is parked and unserved does not answer at all:
// that is not dead, and the goroutine that asked, one for each path, waits until it is served or gone.
func (s *service) dead(ctx context.Context, dir string) bool {
	s.mu.Lock()
	p := s.probes[dir]
	if p == nil {
		p = &probe{done: make(chan struct{})}
		s.probes[dir] = p
		go func() {
			p.err = statfs(dir)
			s.mu.Lock()
			delete(s.probes, dir)
			s.mu.Unlock()
			close(p.done)
		}()
	}
	s.mu.Unlock()
	t := time.NewTimer(probeTimeout)
	defer t.Stop()
	select {
	case <-p.done:
		return isDead(p.err)
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}
