package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxEntries bounds the names; there is one for each dataset and snapshot that a node shows.
	maxEntries = 4096
	// maxConns bounds the connections: two node services during an update, and some who look.
	maxConns = 16
	// writeTimeout is how long a client may leave answers unread.
	writeTimeout = 10 * time.Second
	// acceptPause is the pause after a connection for which there was no memory, or no descriptor.
	acceptPause = 100 * time.Millisecond
)

// Server keeps the descriptors.
type Server struct {
	log *slog.Logger

	mu   sync.Mutex
	kept map[string][]*os.File
}

// Run serves a keeper at the Unix socket path, in place of a former one, until ctx ends. What was parked is
// then closed. A nil log is slog.Default.
func Run(ctx context.Context, path string, log *slog.Logger) error {
	if log == nil {
		log = slog.Default()
	}
	s := &Server{log: log, kept: map[string][]*os.File{}}
	defer s.close()
	l, err := listen(path)
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	made, err := os.Lstat(path)
	if err != nil {
		l.Close()
		return fmt.Errorf("keeper: %w", err)
	}
	defer func() {
		if now, err := os.Lstat(path); err == nil && os.SameFile(made, now) {
			os.Remove(path)
		}
	}()
	log.Info("keeping", "socket", path)
	return s.serve(ctx, l)
}

// listen makes the socket beside path and renames it, so that there is no moment without one.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, err
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("socket %s: there is something else at this path; remove it or choose another", path)
	}
	tmp := path + "~"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: tmp, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, err
	}
	return l, nil
}

func (s *Server) serve(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	slots := make(chan struct{}, maxConns)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("keeper: %w", err)
			}
			// There is no memory or no descriptor for it just now. What is parked stays.
			s.log.Warn("a connection is not accepted", "error", err)
			<-slots
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			defer c.Close()
			if err := s.converse(c); ctx.Err() == nil && !errors.Is(err, io.EOF) {
				s.log.Warn("connection ended", "error", err)
			}
		})
	}
}

// converse answers one client until it goes, or errs.
func (s *Server) converse(c *net.UnixConn) error {
	if err := authorised(c); err != nil {
		return err
	}
	for {
		p, err := receive(c)
		if err != nil {
			return err
		}
		if err := c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			p.close()
			return err
		}
		if err := s.answer(c, p); err != nil {
			return err
		}
	}
}

// answer does what a packet asks for. Its files are kept, or closed.
func (s *Server) answer(c *net.UnixConn, p packet) error {
	switch p.kind {
	case kindPark:
		if err := s.park(p.text, p.files); err != nil {
			p.close()
			return send(c, kindErr, err.Error(), nil)
		}
		return send(c, kindOK, "", nil)
	case kindDrop:
		p.close()
		s.drop(p.text)
		return send(c, kindOK, "", nil)
	case kindList:
		p.close()
		return s.list(c)
	}
	p.close()
	return fmt.Errorf("%w: kind %q", errProtocol, p.kind)
}

func checkName(name string) error {
	if name == "" || len(name) > MaxName || strings.ContainsRune(name, 0) {
		return fmt.Errorf("name %.40q: want 1 to %d bytes", name, MaxName)
	}
	return nil
}

func (s *Server) park(name string, files []*os.File) error {
	if err := checkName(name); err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("%s: nothing to keep: a park carries descriptors", name)
	}
	s.mu.Lock()
	old, again := s.kept[name]
	if !again && len(s.kept) >= maxEntries {
		s.mu.Unlock()
		return fmt.Errorf("%s: %d names are kept already", name, maxEntries)
	}
	s.kept[name] = files
	s.mu.Unlock()
	for _, f := range old {
		f.Close()
	}
	s.log.Info("parked", "name", name, "descriptors", len(files))
	return nil
}

func (s *Server) drop(name string) {
	s.mu.Lock()
	old := s.kept[name]
	delete(s.kept, name)
	s.mu.Unlock()
	for _, f := range old {
		f.Close()
	}
	if old != nil {
		s.log.Info("dropped", "name", name)
	}
}

func (s *Server) list(c *net.UnixConn) error {
	// Copies, since an entry may be dropped while it is sent.
	s.mu.Lock()
	names := make([]string, 0, len(s.kept))
	for name := range s.kept {
		names = append(names, name)
	}
	s.mu.Unlock()
	slices.Sort(names)
	for _, name := range names {
		files, err := s.copies(name)
		if err != nil {
			return send(c, kindErr, err.Error(), nil)
		}
		if files == nil {
			continue // dropped meanwhile
		}
		err = send(c, kindItem, name, files)
		for _, f := range files {
			f.Close()
		}
		if err != nil {
			return err
		}
	}
	return send(c, kindEnd, "", nil)
}

func (s *Server) copies(name string) ([]*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var files []*os.File
	for _, f := range s.kept[name] {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		files = append(files, os.NewFile(uintptr(fd), f.Name()))
	}
	return files, nil
}

func (s *Server) close() {
	s.mu.Lock()
	kept := s.kept
	s.kept = nil
	s.mu.Unlock()
	for _, files := range kept {
		for _, f := range files {
			f.Close()
		}
	}
}

// authorised lets in root and this process's own user.
func authorised(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if cerr != nil {
		return fmt.Errorf("credentials of the peer: %w", cerr)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Getuid() {
		return fmt.Errorf("user %d may not use the keeper", cred.Uid)
	}
	return nil
}
