package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"

	"github.com/stepcache/stepcache/artifact/plugin"
)

// Grace is how long calls under way may go on after the driver was asked to end.
const Grace = 20 * time.Second

// maxSocket is what a Unix socket's path may take, its temporary name included.
const maxSocket = 107 - len(".new")

// Serve answers on a Unix socket, whose folder it makes, until ctx ends; calls under way then have Grace to
// end. It returns nil after an ordinary end.
func (d *Driver) Serve(ctx context.Context, socket string) error {
	l, err := listen(socket)
	if err != nil {
		return err
	}
	ours, err := os.Lstat(socket)
	if err != nil {
		_ = l.Close()
		return err
	}
	s := grpc.NewServer(grpc.WaitForHandlers(true)) // which tidy up in the bucket
	plugin.RegisterArtifactServiceServer(s, d)
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(l) }()
	select {
	case err = <-failed:
		s.Stop()
	case <-ctx.Done():
		cut := time.AfterFunc(Grace, s.Stop)
		s.GracefulStop()
		cut.Stop()
		err = <-failed
	}
	if now, lerr := os.Lstat(socket); lerr == nil && os.SameFile(ours, now) { // not one that took its place
		if rerr := os.Remove(socket); err == nil {
			err = rerr
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.buckets {
		b.idle()
	}
	return err
}

// listen makes the socket under another name, lets everyone connect to it (argoexec may run as another
// user; the folder belongs to the pod), and then gives it its name: whoever sees it can connect, and one
// that a killed driver left is replaced.
func listen(socket string) (net.Listener, error) {
	if !filepath.IsAbs(socket) || len(socket) > maxSocket {
		return nil, fmt.Errorf("socket %q: want an absolute path of at most %d bytes", socket, maxSocket)
	}
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(socket); err == nil && info.Mode()&fs.ModeSocket == 0 {
		return nil, fmt.Errorf("socket %q: something else has this name", socket)
	}
	made := socket + ".new"
	if err := os.Remove(made); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(made, 0o777); err == nil {
		err = os.Rename(made, socket)
	}
	if err != nil {
		_ = l.Close()
		_ = os.Remove(made)
		return nil, err
	}
	return l, nil
}
