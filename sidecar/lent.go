package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/csi/broker"
	"github.com/stepcache/stepcache/csi/keeper"
)

// lentRetry is the pause between two attempts to reach the node service.
const lentRetry = 200 * time.Millisecond

// LentOptions say what to serve with nothing but what the node service lends.
type LentOptions struct {
	// Socket is the node service's, in a volume of the pod.
	Socket string
	// Tier, Datasets, Node, BufferBytes, Buffers and Logger are as in Options.
	Tier        string
	Datasets    []string
	Node        string
	BufferBytes int64
	Buffers     *client.Buffers
	Logger      *slog.Logger
}

// ServeLent serves the mounts that the node service lends to this pod until ctx ends. It needs no right.
func ServeLent(ctx context.Context, o LentOptions) error {
	if len(o.Datasets) == 0 {
		return errors.New("no Dataset to serve is named")
	}
	a := &attendant{o: o, served: map[string]*lentMount{}}
	conn, err := a.dial(ctx)
	if err != nil {
		return nil // ctx ended
	}
	defer a.clients()
	if err := a.begin(ctx, conn); err != nil {
		conn.Close()
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	gone := make(chan string, len(a.served))
	for _, m := range a.served {
		go func() { // ends with the mount, or the process
			<-m.server.Done()
			gone <- m.dataset
		}()
	}
	for {
		select {
		case <-ctx.Done():
			a.leave(conn)
			return nil
		case dataset := <-gone:
			conn.Close()
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("the node service ended the mount of dataset %s", dataset)
		case <-conn.Done():
		}
		// It was replaced, most probably. The mounts do not notice.
		conn.Close()
		a.use(nil)
		if conn, err = a.dial(ctx); err != nil {
			return nil // ctx ended; with no node service there is nobody to tell
		}
		if err := a.announce(conn); errors.Is(err, errLost) {
			conn.Close()
			return err
		} else if err != nil {
			o.Logger.Warn("the node service does not take the mounts again", "reason", err)
			conn.Close()
			pause(ctx, lentRetry)
		}
	}
}

// ReadyLent says whether all mounts of this pod are served.
func ReadyLent(ctx context.Context, socket string) error {
	c, err := broker.Dial(ctx, socket)
	if err != nil {
		return fmt.Errorf("%s: %w", unreached(err), err)
	}
	defer c.Close()
	return c.Ready()
}

// attendant serves the mounts of one pod.
type attendant struct {
	o      LentOptions
	served map[string]*lentMount // by the volume's name

	mu   sync.Mutex
	conn *broker.Conn // nil: there is no node service now
}

// lentMount is one mount that is served. It implements mount.Registrar.
type lentMount struct {
	a       *attendant
	volume  string
	dataset string
	client  *mount.Tier
	server  *mount.Server
	refused sync.Once

	used bool // a predecessor's, or a node service was told of it: somebody may have it open

	mu   sync.Mutex
	over []int32 // to be unregistered once there is a node service again
}

var _ mount.Registrar = (*lentMount)(nil)

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// dial connects to the node service, however long there is none. The error is ctx's.
func (a *attendant) dial(ctx context.Context) (*broker.Conn, error) {
	for told := ""; ; {
		c, err := broker.Dial(ctx, a.o.Socket)
		if err == nil {
			return c, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if why := unreached(err); why != told {
			a.o.Logger.Warn(why+": waiting for it", "reason", err)
			told = why
		}
		pause(ctx, lentRetry)
	}
}

// unreached says why there is no connection to the node service. Its socket is open to every user, and the file stays
// while it is replaced.
func unreached(err error) string {
	switch {
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return "this pod may not connect to the node service's socket, as where SELinux enforces; give it the mode csi or stage"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "the node service does not answer at its socket, which is for a moment where it is replaced, and always in a sandboxed runtime (gVisor, Kata), whose pods want the mode csi or stage"
	}
	return "no node service on this node"
}

func (a *attendant) use(c *broker.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conn = c
}

func (a *attendant) current() *broker.Conn {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conn
}

// begin serves every mount of the pod, and says so.
func (a *attendant) begin(ctx context.Context, conn *broker.Conn) error {
	volumes, err := conn.Volumes()
	if err != nil {
		return err
	}
	for _, dataset := range a.o.Datasets {
		if !slices.ContainsFunc(volumes, func(v broker.Volume) bool { return v.Dataset == dataset }) {
			return fmt.Errorf("dataset %s: the pod has no volume of it", dataset)
		}
	}
	for _, v := range volumes {
		if !slices.Contains(a.o.Datasets, v.Dataset) {
			return fmt.Errorf("the pod has a volume of dataset %s, which this sidecar was not told of", v.Dataset)
		}
	}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	for _, v := range volumes {
		g.Go(func() error {
			m, err := a.serve(ctx, conn, v)
			if err != nil {
				return fmt.Errorf("dataset %s: %w", v.Dataset, err)
			}
			mu.Lock()
			defer mu.Unlock()
			a.served[v.Name] = m
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := a.announce(conn); !errors.Is(err, broker.ErrGone) {
		return err
	}
	return nil // it was replaced just now: the next one is told, as whenever it is
}

// serve serves one mount: the one that a predecessor served, or a new one.
func (a *attendant) serve(ctx context.Context, conn *broker.Conn, v broker.Volume) (*lentMount, error) {
	o := Options{Tier: a.o.Tier, Node: a.o.Node, BufferBytes: a.o.BufferBytes, Buffers: a.o.Buffers, Logger: a.o.Logger}
	config, err := o.client(v.Dataset)
	if err != nil {
		return nil, err
	}
	config.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if network == "unixpacket" { // a worker of this node
			return broker.DialWorker(ctx, a.o.Socket, addr)
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	m := &lentMount{a: a, volume: v.Name, dataset: v.Dataset}
	root := uint32(0)
	options := mount.Options{Dataset: v.Dataset, Logger: a.o.Logger, Registrar: m, UID: &root, GID: &root}
	if v.Served {
		err := a.resume(ctx, conn, config, options, m)
		if err == nil {
			m.used = true
			return m, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		// Who has it open gets errors; who opens it from now on, in a container that starts, is served.
		a.o.Logger.Warn("a mount is not taken over, and made anew", "dataset", v.Dataset, "reason", err)
	}
	// The workers' answer first: until it is there no mount is made for which anybody waits.
	reader, err := mount.Connect(ctx, config)
	if err != nil {
		return nil, err
	}
	fuse, table, settings, err := conn.Claim(v.Name, v.Served)
	if err == nil && table != nil {
		closeAll(fuse, table, settings)
		err = errors.New("the node service gave a mount that somebody has served")
	}
	if err == nil {
		m.server, err = reader.Serve(ctx, fuse, options)
	}
	if err != nil {
		reader.Close()
		return nil, err
	}
	m.client = reader
	return m, nil
}

// resume goes on with the mount of a predecessor.
func (a *attendant) resume(ctx context.Context, conn *broker.Conn, config client.Config, options mount.Options, m *lentMount) error {
	fuse, table, settings, err := conn.Claim(m.volume, false)
	if err != nil {
		return err
	}
	if table == nil {
		fuse.Close()
		return errors.New("it ended meanwhile")
	}
	entry := keeper.Entry{Name: m.volume, Files: []*os.File{fuse, table, settings}}
	defer entry.Close()
	p, err := parkedFrom(entry)
	if err != nil {
		return err
	}
	kept, err := resume(ctx, config, p, options)
	if err != nil {
		return err
	}
	m.client, m.server = kept.client, kept.server
	return nil
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// errLost: the next start has a mount with a successor, and files that are passed through.
var errLost = errors.New("the node service went, and nobody has the connection of a mount that nobody has used yet")

// announce tells a node service what is served, and does what has waited for one.
func (a *attendant) announce(conn *broker.Conn) error {
	for _, m := range a.served {
		p, err := m.server.Park()
		if err != nil {
			return err // it has ended
		}
		settings, err := settingsFile(p.Settings)
		kept := false
		if err == nil {
			kept, err = conn.Serve(m.volume, p.Table, settings)
			settings.Close()
		}
		p.Close()
		if err != nil {
			return err
		}
		if !kept && !m.used {
			return fmt.Errorf("dataset %s: %w", m.dataset, errLost)
		}
		m.used = true
		if !kept {
			a.o.Logger.Warn("the node service has lost this mount's connection: it ends with this process, and no more files are passed through", "dataset", m.dataset)
		}
		m.flush(conn)
	}
	a.use(conn)
	return nil
}

// leave ends the mounts, and waits for that as long as the kubelet's patience allows.
func (a *attendant) leave(conn *broker.Conn) {
	defer conn.Close()
	if err := conn.Leave(); err != nil {
		a.o.Logger.Warn("the node service does not end the mounts yet", "reason", err)
		return
	}
	t := time.NewTimer(unmountWait)
	defer t.Stop()
	for _, m := range a.served {
		select {
		case <-m.server.Done():
		case <-t.C:
			return
		}
	}
}

// clients closes the clients of mounts that have ended; those of others go with the process.
func (a *attendant) clients() {
	for _, m := range a.served {
		select {
		case <-m.server.Done():
			m.client.Close()
		default:
		}
	}
}

// Register implements mount.Registrar.
func (m *lentMount) Register(fd int) (int32, error) {
	conn := m.a.current()
	if conn == nil {
		return 0, broker.ErrGone
	}
	id, err := conn.Register(m.volume, fd)
	if errors.Is(err, broker.ErrGone) {
		return 0, broker.ErrGone // without what broke the connection, an errno that would pass for the kernel's
	}
	if errno := syscall.Errno(0); err != nil && !errors.As(err, &errno) {
		m.refused.Do(func() {
			m.a.o.Logger.Info("files are read through this process: the node service does not register them for passthrough", "dataset", m.dataset, "reason", err)
		})
	}
	return id, err
}

// Unregister implements mount.Registrar.
func (m *lentMount) Unregister(id int32) {
	if conn := m.a.current(); conn != nil && conn.Unregister(m.volume, id) == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.over = append(m.over, id)
}

// flush unregisters what could not be when it was over.
func (m *lentMount) flush(conn *broker.Conn) {
	m.mu.Lock()
	over := m.over
	m.over = nil
	m.mu.Unlock()
	for _, id := range over {
		_ = conn.Unregister(m.volume, id) // the kernel's word, or gone again: it goes with the mount
	}
}
