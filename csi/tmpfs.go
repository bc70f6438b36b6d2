package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

const (
	storeSource  = "stepcache-store"
	socketSource = "stepcache-socket"
	tmpfsFlags   = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
)

// mountStore mounts a worker's memory: huge pages that are never swapped, as far as this kernel has them. The
// pages are charged to whoever writes them, the pod.
func (s *service) mountStore(target string, v volume, group string) error {
	gid, err := parseGroup(group)
	if err != nil {
		return err
	}
	// A file that holds anything takes a page; the rest is for folders and what is being written.
	inodes := v.size/4096 + 4096
	base := fmt.Sprintf("size=%d,nr_inodes=%d,mode=2770,uid=0,gid=%d", v.size, inodes, gid)
	for _, more := range []string{",huge=within_size,noswap", ",huge=within_size", ",noswap", ""} {
		err = unix.Mount(storeSource, target, "tmpfs", tmpfsFlags, base+more)
		if err == nil {
			if more != ",huge=within_size,noswap" {
				s.log.Info("this kernel gives the store less than it could have", "pod", v.pod, "options", base+more)
			}
			return nil
		}
		if !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	return fmt.Errorf("mount a tmpfs of %d bytes at %s: %w", v.size, target, err)
}

// mountSocket mounts a folder for a worker's socket. It is a file system of its own, and tiny, so that nobody
// fills the node's memory through it; a link with a short path leads the node service to it, since a Unix
// socket's path holds 107 bytes.
func (s *service) mountSocket(target string, v volume, group string) error {
	gid, err := parseGroup(group)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.config.SocketDir, 0o755); err != nil {
		return err
	}
	options := fmt.Sprintf("size=65536,nr_inodes=32,mode=2770,uid=0,gid=%d", gid)
	if err := unix.Mount(socketSource, target, "tmpfs", tmpfsFlags, options); err != nil {
		return fmt.Errorf("mount a folder for the socket at %s: %w", target, err)
	}
	if err := s.linkSocket(target, v.pod.uid); err != nil {
		_, derr := mountinfo.Detach(target, nil)
		return errors.Join(err, derr)
	}
	return nil
}

// linkSocket makes the short path, also over one that is there.
func (s *service) linkSocket(target, uid string) error {
	link := filepath.Join(s.config.SocketDir, uid)
	tmp := filepath.Join(s.config.SocketDir, "."+uid)
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, link)
}

// unlinkSockets removes the links for which gone says so.
func (s *service) unlinkSockets(gone func(target string) bool) error {
	entries, err := os.ReadDir(s.config.SocketDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		link := filepath.Join(s.config.SocketDir, e.Name())
		if target, lerr := os.Readlink(link); lerr == nil && gone(target) {
			err = errors.Join(err, os.Remove(link))
		}
	}
	return err
}

// parseGroup reads what the kubelet takes from the pod's fsGroup: a worker is not root and reaches its volumes
// by their group.
func parseGroup(group string) (uint32, error) {
	if group == "" {
		return 0, invalid("the pod has no securityContext.fsGroup, by which it would reach this volume")
	}
	gid, err := strconv.ParseUint(group, 10, 32)
	if err != nil {
		return 0, invalid("volume mount group %.40q is not a number", group)
	}
	return uint32(gid), nil
}

// dialWorker connects to a worker: over the network, or to its socket. What lies in a socket's folder was made by
// a pod, so only a socket right there is taken, never what a link leads to.
func (s *service) dialWorker(ctx context.Context, network, addr string) (net.Conn, error) {
	if network != "unixpacket" {
		return s.dialer.DialContext(ctx, network, addr)
	}
	dir, name := filepath.Split(addr)
	dir = filepath.Clean(dir)
	if filepath.Dir(dir) != s.config.SocketDir || name != v1alpha1.SocketName {
		return nil, fmt.Errorf("socket %s: not a worker's: those are in folders of %s", addr, s.config.SocketDir)
	}
	target, err := os.Readlink(dir)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", addr, err)
	}
	at, err := mountinfo.At(target)
	if err != nil {
		return nil, err
	}
	if len(at) == 0 || at[0].Type != "tmpfs" || at[0].Source != socketSource {
		return nil, fmt.Errorf("socket %s: %s is not a socket volume", addr, target)
	}
	fd, err := unix.Open(filepath.Join(target, name), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", addr, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("socket %s: %w", addr, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, fmt.Errorf("socket %s: it is not a socket", addr)
	}
	return s.dialer.DialContext(ctx, network, fmt.Sprintf("/proc/self/fd/%d", fd))
}
