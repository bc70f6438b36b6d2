package sidecar

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/csi/keeper"
	"github.com/stepcache/stepcache/tier"
)

const (
	// keeperWait is how long a server waits for its keeper, which began before it.
	keeperWait = 10 * time.Second
	// keeperRetry is the pause between two attempts to reach it.
	keeperRetry = 50 * time.Millisecond
	// snapshotWait is how long workers have to find the snapshot of a mount that is taken over. A node service ends a
	// mount that has no server for a minute.
	snapshotWait = 10 * time.Second
	// unmountWait is how long the end waits for readers; the kubelet gives 2 s at least.
	unmountWait = time.Second
)

// Options say what to mount.
type Options struct {
	// Dir is the pod's folder on its node.
	Dir string
	// Tier has a folder for each Dataset (tier.Open), named as the Dataset.
	Tier string
	// Datasets are namespace/name. Each is mounted at Dir/name, so that the names must differ.
	Datasets []string
	// Node is the name of this pod's node.
	Node string
	// BufferBytes is the memory of each Dataset's reader; zero means the client's default.
	BufferBytes int64
	// Buffers are what all of them have together; nil: nothing bounds that.
	Buffers *client.Buffers
	Logger  *slog.Logger
}

// Serve mounts the Datasets and serves them until ctx ends. That a Dataset is still being listed is waited
// for. Ready tells when all are mounted.
func Serve(ctx context.Context, o Options) (err error) {
	if len(o.Datasets) == 0 {
		return errors.New("no Dataset to mount is named")
	}
	if apart() {
		return errors.New("this is not the user namespace that all ids are in (the pod has hostUsers: false, or its whole node is in another), and what is mounted in another may be of no use to other containers: install the node service, use the mode stage, or give the pod hostUsers: true")
	}
	if err := mount.Supported(); err != nil {
		return err
	}
	ready := filepath.Join(o.Dir, readyFile)
	if err := os.Remove(ready); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the folder of this pod's mounts: %w", err)
	}
	// While it is held nobody takes the mounts for a dead pod's.
	lock, err := takeLock(filepath.Join(o.Dir, serverFile), os.O_CREATE)
	if err != nil {
		return fmt.Errorf("%s is another server's: %w", o.Dir, err)
	}
	defer lock.Close()
	kept := recall(ctx, o)
	defer func() {
		for _, e := range kept { // those nobody took
			e.Close()
		}
	}()
	s := &server{options: o, mounts: make(map[string]*mounted)}
	defer func() {
		if ctx.Err() != nil { // or a successor goes on with them
			s.close()
		}
	}()
	var mu sync.Mutex
	g, dialing := errgroup.WithContext(ctx)
	for _, dataset := range o.Datasets {
		g.Go(func() error {
			mu.Lock()
			name := base(dataset)
			entry, had := kept[name]
			delete(kept, name)
			mu.Unlock()
			m, err := o.mount(dialing, dataset, entry, had)
			if err != nil {
				return fmt.Errorf("dataset %s: %w", dataset, err)
			}
			mu.Lock()
			defer mu.Unlock()
			s.mounts[name] = m
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	park, stop := context.WithCancel(ctx)
	parked := s.park(park)
	defer func() { stop(); <-parked }()
	if err := os.WriteFile(ready, nil, 0o644); err != nil {
		return err
	}
	defer os.Remove(ready)
	gone := make(chan string, len(s.mounts))
	for name, m := range s.mounts {
		go func() { // ends with the mount, or the process
			<-m.server.Done()
			gone <- name
		}()
	}
	select {
	case <-ctx.Done():
		return nil
	case name := <-gone:
		return fmt.Errorf("dataset %s was unmounted by somebody else", name)
	}
}

// apart says whether this process has a user namespace of its own. The node's has all ids.
func apart() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && !slices.Equal(strings.Fields(string(b)), []string{"0", "0", "4294967295"})
}

// Ready says whether everything is mounted in dir.
func Ready(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, readyFile)); err != nil {
		return fmt.Errorf("not everything is mounted yet: %w", err)
	}
	return nil
}

func base(dataset string) string { return dataset[strings.LastIndexByte(dataset, '/')+1:] }

// mounted is one Dataset that is served.
type mounted struct {
	client *mount.Tier
	server *mount.Server
}

type server struct {
	options Options
	mounts  map[string]*mounted
}

// mount mounts a Dataset, or goes on with the mount that a predecessor parked.
func (o *Options) mount(ctx context.Context, dataset string, entry keeper.Entry, had bool) (*mounted, error) {
	defer entry.Close()
	c, err := o.client(dataset)
	if err != nil {
		return nil, err
	}
	at := filepath.Join(o.Dir, base(dataset))
	if err := mkdirUnmounted(at); err != nil {
		return nil, err
	}
	options := mount.Options{Dataset: dataset, Logger: o.Logger}
	if had {
		m, err := takeOver(ctx, c, entry, at, options)
		if err == nil {
			return m, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		// Who has it open gets errors; who opens it from now on is served.
		o.Logger.Warn("a mount is not taken over, and made anew", "dataset", dataset, "reason", err)
	}
	if err := detach(at); err != nil {
		return nil, err
	}
	reader, err := mount.Connect(ctx, c)
	if err != nil {
		return nil, err
	}
	m, err := reader.Mount(ctx, at, options)
	if err != nil {
		reader.Close()
		return nil, err
	}
	return &mounted{reader, m}, nil
}

// client is how a Dataset is read.
func (o *Options) client(dataset string) (client.Config, error) {
	folder, err := tier.Open(filepath.Join(o.Tier, base(dataset)))
	if err != nil {
		return client.Config{}, err
	}
	if folder.Dataset != dataset {
		return client.Config{}, fmt.Errorf("%s is the folder of Dataset %s", folder.Dir, folder.Dataset)
	}
	c, err := folder.ClientConfig()
	if err != nil {
		return client.Config{}, err
	}
	watch, err := wire.WatchKeys(folder.KeysDir(), nil)
	if err != nil {
		return client.Config{}, err
	}
	c.KeySource, c.Logger, c.BufferBytes, c.Buffers = watch.Keys, o.Logger, o.BufferBytes, o.Buffers
	if o.Node != "" {
		c.Node = o.Node
	}
	return c, nil
}

// takeOver goes on with a parked mount, if it is what lies at a path. One that was ended or unmounted since would be over
// at once, or show nothing there.
func takeOver(ctx context.Context, c client.Config, entry keeper.Entry, at string, o mount.Options) (*mounted, error) {
	p, err := parkedFrom(entry)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*mounted, error) {
		p.Close()
		return nil, err
	}
	real, err := mountinfo.Resolve(at)
	if err != nil {
		return fail(err)
	}
	on, err := mountinfo.At(real)
	if err != nil {
		return fail(err)
	}
	if len(on) == 0 || on[0].Major != p.Settings.Major || on[0].Minor != p.Settings.Minor {
		return fail(errors.New("it was unmounted"))
	}
	if !mount.Alive(p.Conn) {
		return fail(errors.New("it was ended"))
	}
	return resume(ctx, c, p, o)
}

// resume serves a parked mount. p is used up.
func resume(ctx context.Context, c client.Config, p *mount.Parked, o mount.Options) (*mounted, error) {
	c.Snapshot = p.Settings.Snapshot
	reader, err := reconnect(ctx, c)
	if err != nil {
		p.Close()
		return nil, err
	}
	m, err := reader.Resume(ctx, p, o)
	if err != nil {
		reader.Close()
		return nil, err
	}
	return &mounted{reader, m}, nil
}

// reconnect connects to the workers for what a mount shows. It waits while they are away or list, but not once they
// have another snapshot and this one no more: no server could go on with the mount, and its readers would wait for ever.
func reconnect(ctx context.Context, c client.Config) (*mount.Tier, error) {
	for {
		dial, cancel := context.WithCancelCause(ctx)
		t := time.AfterFunc(snapshotWait, func() { cancel(context.DeadlineExceeded) })
		c.Progress = func(p client.Progress) {
			if p.Size > 0 { // it is being received
				t.Reset(snapshotWait)
			}
		}
		reader, err := mount.Connect(dial, c)
		over := dial.Err() != nil && ctx.Err() == nil
		t.Stop()
		cancel(nil)
		if err == nil || !over {
			return reader, err
		}
		if !errors.Is(err, wire.ErrUnknownSnapshot) {
			continue
		}
		if now, cerr := mount.Current(ctx, c); cerr == nil && now != c.Snapshot {
			return nil, err
		}
	}
}

// mkdirUnmounted makes a folder without a look at a mount on it.
func mkdirUnmounted(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// detach takes away what is mounted at dir.
func detach(dir string) error {
	real, err := mountinfo.Resolve(dir)
	if err != nil {
		return err
	}
	_, err = mountinfo.Detach(real, nil)
	return err
}

// drop has the keeper forget the mounts: what is unmounted lazily would be parked, and whoever has it open wait for ever.
// A keeper that is gone has forgotten them already.
func (s *server) drop() {
	ctx, cancel := context.WithTimeout(context.Background(), unmountWait)
	defer cancel()
	c, err := keeper.Dial(ctx, filepath.Join(s.options.Dir, socketFile))
	if err != nil {
		return
	}
	defer c.Close()
	for name := range s.mounts {
		if err := c.Drop(name); err != nil && !errors.Is(err, keeper.ErrGone) {
			s.options.Logger.Warn("keeper", "dataset", name, "reason", err)
		}
	}
}

// close ends the mounts, lazily those in use, and the clients.
func (s *server) close() {
	s.drop()
	var g sync.WaitGroup
	for name, m := range s.mounts {
		g.Go(func() {
			unmounted := make(chan struct{})
			go func() { // ends with the process at the latest
				defer close(unmounted)
				if err := m.server.Unmount(); err != nil {
					s.options.Logger.Warn("a mount is not taken away", "dataset", name, "reason", err)
				}
				m.server.Wait()
				m.client.Close()
			}()
			select {
			case <-unmounted:
			case <-time.After(unmountWait):
			}
		})
	}
	g.Wait()
}

// recall asks the keeper for the mounts that a predecessor parked.
func recall(ctx context.Context, o Options) map[string]keeper.Entry {
	kept := make(map[string]keeper.Entry)
	c, err := dialKeeper(ctx, o.Dir)
	if err != nil {
		return kept // park will say so
	}
	defer c.Close()
	all, err := c.List()
	if err != nil {
		o.Logger.Warn("what a predecessor parked is not known", "reason", err)
		return kept
	}
	for _, e := range all {
		kept[e.Name] = e
	}
	return kept
}

func dialKeeper(ctx context.Context, dir string) (*keeper.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, keeperWait)
	defer cancel()
	for {
		c, err := keeper.Dial(ctx, filepath.Join(dir, socketFile))
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(keeperRetry):
		}
	}
}

// park has the keeper hold the mounts, and its successor when it was started again, until ctx ends. It
// returns once they are held, or that was given up; the channel is closed when all is over.
func (s *server) park(ctx context.Context) <-chan struct{} {
	over, first := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		once := sync.OnceFunc(func() { close(first) })
		defer once()
		for ctx.Err() == nil {
			c, err := dialKeeper(ctx, s.options.Dir)
			if err == nil {
				err = s.parkAll(c)
			}
			if err != nil && ctx.Err() == nil {
				s.options.Logger.Warn("nobody keeps the mounts: they end with this process", "reason", err)
			}
			once()
			if c == nil {
				continue
			}
			select {
			case <-ctx.Done():
			case <-c.Done():
			}
			c.Close()
		}
	}()
	<-first
	return over
}

func (s *server) parkAll(c *keeper.Conn) error {
	for name, m := range s.mounts {
		p, err := m.server.Park()
		if err != nil {
			return err
		}
		settings, err := settingsFile(p.Settings)
		if err == nil {
			err = c.Park(name, p.Conn, p.Table, settings)
			settings.Close()
		}
		p.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// settingsFile is a memfd with what a successor must know.
func settingsFile(s mount.Settings) (*os.File, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("stepcache-settings", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "settings")
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// maxSettings bounds what is read of a settings file.
const maxSettings = 1 << 20

func parkedFrom(e keeper.Entry) (*mount.Parked, error) {
	if len(e.Files) != 3 {
		return nil, fmt.Errorf("%d descriptors are parked for %s, not 3", len(e.Files), e.Name)
	}
	p := &mount.Parked{}
	if err := json.NewDecoder(io.NewSectionReader(e.Files[2], 0, maxSettings)).Decode(&p.Settings); err != nil {
		return nil, fmt.Errorf("the settings parked for %s: %w", e.Name, err)
	}
	for i, to := range []**os.File{&p.Conn, &p.Table} {
		fd, err := unix.FcntlInt(e.Files[i].Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			p.Close()
			return nil, err
		}
		*to = os.NewFile(uintptr(fd), "parked")
	}
	return p, nil
}
