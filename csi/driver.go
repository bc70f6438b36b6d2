package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// Config of a node service. NodeName is needed; the rest has defaults.
type Config struct {
	// NodeName is the node's, as the API server and the membership lists call it.
	NodeName string
	// KubeletDir is the kubelet's folder, at the same path here as on the node and with mounts that propagate
	// both ways; /var/lib/kubelet.
	KubeletDir string
	// Dir is the driver's own folder, below KubeletDir.
	Dir string
	// Keeper is the keeper's socket, in Dir.
	Keeper string
	// SocketDir is where workers' sockets are found by a short path, the parent of v1alpha1.NodeSocketDir: a folder
	// of the node, with mounts that propagate both ways.
	SocketDir string
	// CacheDir is where the node's caches are mounted, seen by this process only; /cache.
	CacheDir string
	// NodeMemory is for all Datasets together; zero streams everything.
	NodeMemory int64
	// BufferBytes is the memory of each mount for what is on its way; 128 MiB.
	BufferBytes int64
	// Buffers are what all mounts have together for that; nil: nothing bounds it.
	Buffers *client.Buffers
	// Linger is how long a mount is kept without a pod; a minute.
	Linger time.Duration
	// KeeperWait is how long a start waits for the keeper; 10 s.
	KeeperWait time.Duration
	// Listen is the address of health and metrics; empty: none.
	Listen string
	// Version is told to the kubelet.
	Version string
	// Seeds are addresses of the workers of a Dataset; by default its Service's.
	Seeds func(namespace, dataset string) []string
	// Node is the node's object; nil: none is told of anything.
	Node Node
	// Logger; slog.Default.
	Logger *slog.Logger
}

// Node tells others of this node.
type Node interface {
	// Ready labels the node, or takes the label away.
	Ready(ctx context.Context, ready bool) error
	// Event is for people.
	Event(ctx context.Context, reason, text string) error
}

func (c Config) withDefaults() Config {
	def := func(v *string, d string) {
		if *v == "" {
			*v = d
		}
	}
	def(&c.KubeletDir, "/var/lib/kubelet")
	def(&c.Dir, filepath.Join(c.KubeletDir, "plugins", v1alpha1.DriverName))
	def(&c.Keeper, filepath.Join(c.Dir, "keeper.sock"))
	def(&c.SocketDir, filepath.Dir(v1alpha1.NodeSocketDir("pod")))
	def(&c.CacheDir, "/cache")
	if c.BufferBytes == 0 {
		c.BufferBytes = 128 << 20
	}
	if c.Linger == 0 {
		c.Linger = time.Minute
	}
	if c.KeeperWait == 0 {
		c.KeeperWait = 10 * time.Second
	}
	if c.Seeds == nil {
		c.Seeds = func(namespace, dataset string) []string {
			return []string{fmt.Sprintf("%s.%s.svc:%d", v1alpha1.WorkersName(dataset), namespace, v1alpha1.PortData)}
		}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c
}

// Validate says what is wrong with c.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	if c.NodeName == "" {
		errs = append(errs, errors.New("no node name: set it from the pod's spec.nodeName"))
	}
	if c.NodeMemory < 0 {
		errs = append(errs, fmt.Errorf("node memory of %d bytes: set 0 to stream everything, or more", c.NodeMemory))
	}
	for name, path := range map[string]string{"kubelet folder": c.KubeletDir, "driver's folder": c.Dir, "keeper's socket": c.Keeper, "folder of sockets": c.SocketDir, "cache folder": c.CacheDir} {
		if !filepath.IsAbs(path) {
			errs = append(errs, fmt.Errorf("%s %q: want an absolute path", name, path))
		}
	}
	for _, path := range []string{c.Keeper + "~", c.csiSocket() + "~", c.registrationSocket() + "~"} {
		if len(path) > 107 {
			errs = append(errs, fmt.Errorf("socket %s: its path has %d bytes, a Unix socket's may have 107", path, len(path)))
		}
	}
	return errors.Join(errs...)
}

func (c Config) csiSocket() string { return filepath.Join(c.Dir, "csi.sock") }

func (c Config) registrationSocket() string {
	return filepath.Join(c.KubeletDir, "plugins_registry", v1alpha1.DriverName+"-reg.sock")
}

// service is one node service.
type service struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer
	registration.UnimplementedRegistrationServer

	config    Config
	log       *slog.Logger
	now       func() time.Time
	patience  time.Duration
	mountsDir string
	dialer    net.Dialer
	budget    *budget
	keeping   *keeping
	lender    *lender
	metrics   *metrics
	// left is closed when this process leaves its mounts to whoever comes.
	left chan struct{}
	work sync.WaitGroup // of mounts being followed and Events being sent

	adopted    atomic.Bool   // what was parked is served
	registered atomic.Bool   // the kubelet has taken the driver
	known      chan struct{} // holds one when it has since the last announcement

	mu   sync.Mutex
	sets map[string]*dataset // by namespace/name
	busy map[string]bool     // paths that a call is working on
	// probes are the mounts that are asked whether somebody serves them (dead), by path.
	probes map[string]*probe
	made   []made // the sockets of this process
}

// probe is a question to a mount, answered by err once done is closed.
type probe struct {
	done chan struct{}
	err  error
}

// made is a socket that this process made and a successor replaces.
type made struct {
	path   string
	server *grpc.Server // answers there
	info   fs.FileInfo  // of the file
}

const (
	// tick is how often the house is kept: idle mounts, and mounts parked by somebody else.
	tick = 3 * time.Second
	// desertedTicks in a row without anybody at the sockets are no restart of a successor.
	desertedTicks = 3
)

// Run is a node service until ctx ends. Mounts that pods have are left as they are then, parked; the others are
// taken away.
func Run(ctx context.Context, config Config) error {
	if err := config.Validate(); err != nil {
		return fmt.Errorf("node service: %w", err)
	}
	s := newService(config.withDefaults())
	if err := s.run(ctx); err != nil {
		return fmt.Errorf("node service: %w", err)
	}
	return nil
}

func newService(c Config) *service {
	s := &service{
		config: c, log: c.Logger, now: time.Now, patience: patience, mountsDir: filepath.Join(c.Dir, "mounts"),
		budget: newBudget(c.CacheDir, c.NodeMemory, c.Logger), left: make(chan struct{}), known: make(chan struct{}, 1),
		sets: map[string]*dataset{}, busy: map[string]bool{}, probes: map[string]*probe{},
	}
	s.keeping = &keeping{s: s}
	s.lender = newLender(s)
	s.metrics = newMetrics(s)
	return s
}

func (s *service) snapshotDir() string { return filepath.Join(s.config.Dir, "snapshots") }

func (s *service) run(ctx context.Context) error {
	if err := errors.Join(os.MkdirAll(s.mountsDir, 0o755), os.MkdirAll(s.config.SocketDir, 0o755)); err != nil {
		return err
	}
	// Paths are compared with those of mountinfo.
	for _, p := range []*string{&s.config.Dir, &s.mountsDir, &s.config.SocketDir} {
		resolved, err := mountinfo.Resolve(*p)
		if err != nil {
			return err
		}
		*p = resolved
	}
	g, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The keeper is told of what goes at the end.
	keeping, stopKeeping := context.WithCancel(context.WithoutCancel(ctx))
	defer stopKeeping()
	var servers []*grpc.Server
	err := s.begin(ctx, keeping, g, &servers)
	if err == nil {
		<-ctx.Done()
	}
	cancel()
	err = errors.Join(err, s.leave(servers))
	stopKeeping()
	return errors.Join(err, g.Wait())
}

// begin starts everything, in order; an end of ctx meanwhile is no error.
func (s *service) begin(ctx, keeping context.Context, g *errgroup.Group, servers *[]*grpc.Server) error {
	if s.config.Listen != "" {
		l, err := net.Listen("tcp", s.config.Listen)
		if err != nil {
			return err
		}
		g.Go(func() error { return s.metrics.serve(ctx, l) })
	}

	// First what is parked, since its readers wait.
	connected := make(chan struct{})
	var once sync.Once
	g.Go(func() error {
		s.keeping.run(keeping, func() { once.Do(func() { close(connected) }) })
		return nil
	})
	limit := time.NewTimer(s.config.KeeperWait)
	defer limit.Stop()
	former, err := mountinfo.Below(s.mountsDir)
	if err != nil {
		s.log.Warn("mounts of former node services are not looked after", "error", err)
	}
	sweep := func() {
		if err := s.sweep(ctx, former); err != nil {
			s.log.Warn("mounts of former node services are not looked after", "error", err)
		}
		s.trim("")
	}
	// Without a keeper nobody could tell what is left from what is parked.
	select {
	case <-connected:
		sweep()
	case <-limit.C:
		s.work.Go(func() {
			select {
			case <-connected:
				if ctx.Err() == nil && !s.superseded() {
					sweep()
				}
			case <-ctx.Done():
			}
		})
	case <-ctx.Done():
		return nil
	}
	s.adopted.Store(true)
	if err := s.hideSockets(s.lost); err != nil {
		s.log.Warn("workers' sockets of former pods are left", "error", err)
	}

	// What pods serve by themselves they serve on; they connect again now.
	if err := s.lender.look(); err != nil {
		s.log.Warn("mounts that pods serve are not looked after", "error", err)
	}

	if *servers, err = s.serveAll(g); err != nil {
		return err
	}
	g.Go(func() error { s.housekeep(ctx, g); return nil })
	g.Go(func() error { s.announce(ctx); return nil })
	g.Go(func() error { s.expect(ctx); return nil })
	s.log.Info("serving", "node", s.config.NodeName, "socket", s.config.csiSocket())
	return nil
}

// leave ends this process's part: what pods have goes on without it.
func (s *service) leave(servers []*grpc.Server) error {
	superseded := s.superseded() // before the sockets go
	var err error
	if !superseded {
		if s.config.Node != nil {
			ctx, cancel := context.WithTimeout(context.Background(), goodbye)
			err = s.config.Node.Ready(ctx, false)
			cancel()
		}
		s.removeSockets()
	}
	for _, server := range servers {
		stopGracefully(server)
	}
	if !superseded {
		err = errors.Join(err, s.reap(-1))
	}
	close(s.left)
	s.lender.close()
	s.work.Wait()
	return err
}

// goodbye bounds each thing that is done after the end was asked for.
const goodbye = 5 * time.Second

func stopGracefully(g *grpc.Server) {
	t := time.AfterFunc(goodbye, g.Stop)
	defer t.Stop()
	g.GracefulStop()
}

// serveAll answers at both sockets. The servers are told also where one of them is not to be made.
func (s *service) serveAll(g *errgroup.Group) (servers []*grpc.Server, err error) {
	unlock, err := s.lockSockets(unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for _, e := range []struct {
		path     string
		register func(*grpc.Server)
	}{
		{s.config.csiSocket(), func(g *grpc.Server) {
			csi.RegisterIdentityServer(g, s)
			csi.RegisterNodeServer(g, s)
		}},
		{s.config.registrationSocket(), func(g *grpc.Server) { registration.RegisterRegistrationServer(g, s) }},
	} {
		server := grpc.NewServer(grpc.UnaryInterceptor(s.call))
		e.register(server)
		servers = append(servers, server)
		if err := s.serve(g, e.path, server); err != nil {
			return servers, err
		}
	}
	return servers, nil
}

// lockSockets keeps other node services of this node from making sockets meanwhile: of two that make theirs at the same
// time each could end with one.
func (s *service) lockSockets(how int) (unlock func(), err error) {
	f, err := os.Open(s.config.Dir) // whose lock leaves nothing behind
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return func() { f.Close() }, nil
}

// serve answers at a socket, in place of whoever did. The caller has the sockets locked.
func (s *service) serve(g *errgroup.Group, path string, server *grpc.Server) error {
	l, info, err := listen(path)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.made = append(slices.DeleteFunc(s.made, func(m made) bool { return m.path == path }), made{path, server, info})
	s.mu.Unlock()
	g.Go(func() error {
		if err := server.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		return nil
	})
	return nil
}

// listen makes a socket in place of a predecessor's, with no moment without one. The name meanwhile begins with a
// dot: the kubelet's watcher of the registry overlooks such.
func listen(path string) (net.Listener, fs.FileInfo, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, nil, err
	}
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false)
	info, err := os.Lstat(tmp)
	if err = errors.Join(err, os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		l.Close()
		return nil, nil, err
	}
	return l, info, nil
}

func (s *service) sockets() []made {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.made)
}

// superseded says whether another node service has taken this one's place.
func (s *service) superseded() bool {
	for _, m := range s.sockets() {
		if now, err := os.Lstat(m.path); err == nil && !os.SameFile(m.info, now) {
			return true
		}
	}
	return false
}

// deserted are the sockets at which nobody answers any more: a successor, of an update that was undone perhaps, has
// taken them and is gone. They are none while a successor answers at any.
func (s *service) deserted() (gone []made) {
	for _, m := range s.sockets() {
		now, err := os.Lstat(m.path)
		switch {
		case err == nil && os.SameFile(m.info, now):
			continue
		case err == nil:
			c, err := s.dialer.Dial("unix", m.path)
			if err == nil {
				c.Close()
			}
			if !errors.Is(err, unix.ECONNREFUSED) {
				return nil
			}
		case !errors.Is(err, fs.ErrNotExist):
			return nil
		}
		gone = append(gone, m)
	}
	return gone
}

// takeBack makes deserted sockets anew, this process's part being its own again. The kubelet registers the driver
// again, by which the node is labelled. False: not yet.
func (s *service) takeBack(ctx context.Context, g *errgroup.Group) bool {
	unlock, err := s.lockSockets(unix.LOCK_EX | unix.LOCK_NB)
	if err != nil {
		s.log.Warn("sockets that a later node service left are not made again yet", "error", err)
		return false
	}
	defer unlock()
	gone := s.deserted() // as of now, when nobody makes any
	if len(gone) == 0 {
		return false
	}
	for _, m := range gone {
		if err := s.serve(g, m.path, m.server); err != nil {
			s.log.Error("nobody answers the kubelet: a socket that a later node service left is not made again", "socket", m.path, "error", err)
			return false
		}
	}
	if ctx.Err() != nil {
		s.removeSockets() // the end may not have seen them
		return false
	}
	s.lender.again()
	s.log.Warn("the node service that took over is gone: serving again", "node", s.config.NodeName, "socket", s.config.csiSocket())
	return true
}

func (s *service) removeSockets() {
	s.mu.Lock()
	sockets := s.made
	s.made = nil
	s.mu.Unlock()
	for _, m := range sockets {
		if now, err := os.Lstat(m.path); err == nil && os.SameFile(m.info, now) {
			_ = os.Remove(m.path)
		}
	}
}

// housekeep looks after the sockets and the mounts until ctx ends.
func (s *service) housekeep(ctx context.Context, g *errgroup.Group) {
	t := time.NewTicker(tick)
	defer t.Stop()
	adopting := make(chan struct{}, 1)
	for empty := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if len(s.deserted()) == 0 {
			empty = 0
		} else if empty++; empty < desertedTicks || !s.takeBack(ctx, g) {
			continue // what this process knows of the mounts may be of before the other one
		}
		if s.superseded() {
			s.lender.yield()
			continue // the successor does
		}
		if err := s.reap(s.config.Linger); err != nil {
			s.log.Warn("idle mounts stay", "error", err)
		}
		if err := s.lender.look(); err != nil {
			s.log.Warn("mounts that pods serve are not looked after", "error", err)
		}
		s.lender.watch()
		select {
		case adopting <- struct{}{}:
			g.Go(func() error { s.keeping.adopt(ctx); <-adopting; return nil })
		default: // it waits for workers, which is in nobody's way
		}
		if s.takeRenewed() {
			s.keeping.parkAll()
		}
	}
}

// takeRenewed says whether any Dataset's keys changed since the last call.
func (s *service) takeRenewed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	any := false
	for _, set := range s.sets {
		any = any || set.renewed
		set.renewed = false
	}
	return any
}

// announceAgain is the pause after which the node is labelled again: what makes the node's object anew, or prunes
// its labels, tells nobody.
const announceAgain = 5 * time.Minute

// announce labels the node once the kubelet knows the driver, since only then can a pod have its volume here, and
// sees to it that the label stays.
func (s *service) announce(ctx context.Context) {
	if s.config.Node == nil {
		return
	}
	var again <-chan time.Time
	for pause := time.Second; ; {
		select {
		case <-s.known:
		case <-again:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			return
		}
		again = time.After(announceAgain)
		if s.superseded() {
			continue // the label is the successor's
		}
		err := s.config.Node.Ready(ctx, true)
		if err == nil {
			pause = time.Second
			continue
		}
		s.log.Error("the node is not labelled: pods that need it may be kept away from here", "error", err)
		again = time.After(pause)
		pause = min(2*pause, 30*time.Second)
	}
}

// unregistered says why no pod can have a volume here yet. A kubelet that keeps its things elsewhere never looks into
// the folder in which this process waits for it.
func (s *service) unregistered() string {
	return fmt.Sprintf("the kubelet has not registered the driver: if its folder (--root-dir) is not %s, set --kubelet-dir", s.config.KubeletDir)
}

// expected is the time in which the kubelet comes, which watches the folder of registrations.
const expected = time.Minute

// expect says when the kubelet does not come.
func (s *service) expect(ctx context.Context) {
	if wait(ctx, expected); ctx.Err() == nil && !s.registered.Load() {
		s.log.Warn(s.unregistered())
	}
}

// event tells people, without waiting for it.
func (s *service) event(object, reason, text string) {
	if s.config.Node == nil {
		return
	}
	s.work.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), goodbye)
		defer cancel()
		if err := s.config.Node.Event(ctx, reason, text); err != nil {
			s.log.Warn("event not sent", "about", object, "error", err)
		}
	})
}

// GetInfo implements registration.RegistrationServer.
func (s *service) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: v1alpha1.DriverName, Endpoint: s.config.csiSocket(), SupportedVersions: []string{"1.0.0"},
	}, nil
}

// NotifyRegistrationStatus implements registration.RegistrationServer.
func (s *service) NotifyRegistrationStatus(_ context.Context, r *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if !r.GetPluginRegistered() {
		s.log.Error("the kubelet does not take the driver", "error", r.GetError())
		return &registration.RegistrationStatusResponse{}, nil
	}
	s.log.Info("registered with the kubelet")
	s.registered.Store(true)
	select {
	case s.known <- struct{}{}:
	default:
	}
	return &registration.RegistrationStatusResponse{}, nil
}

// call is around every call of the kubelet. Requests hold keys and are never logged.
func (s *service) call(ctx context.Context, r any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (answer any, err error) {
	began := s.now()
	answer, err = handler(ctx, r)
	method := filepath.Base(info.FullMethod)
	s.metrics.call(method, s.now().Sub(began), err)
	if err != nil {
		id := ""
		if v, ok := r.(interface{ GetVolumeId() string }); ok {
			id = v.GetVolumeId()
		}
		// The kubelet gets it too, but shows it to the pod's owner only.
		s.log.Warn("call failed", "method", method, "volume", id, "error", err)
	}
	return answer, err
}
