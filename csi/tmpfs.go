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
// fills the node's memory through it. A second mount of it at a short path leads readers of this node to it,
// since a Unix socket's path holds 107 bytes.
func (s *service) mountSocket(target string, v volume, group string) error {
	gid, err := parseGroup(group)
	if err != nil {
		return err
	}
	options := fmt.Sprintf("size=65536,nr_inodes=32,mode=2770,uid=0,gid=%d", gid)
	if err := unix.Mount(socketSource, target, "tmpfs", tmpfsFlags, options); err != nil {
		return fmt.Errorf("mount a folder for the socket at %s: %w", target, err)
	}
	if err := s.showSocket(target, v.pod.uid); err != nil {
		_, derr := mountinfo.Detach(target, nil)
		return errors.Join(err, derr)
	}
	return nil
}

// showSocket makes the short path, in place of one that is there.
func (s *service) showSocket(target, uid string) error {
	dir := filepath.Join(s.config.SocketDir, uid)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if _, err := mountinfo.Detach(dir, nil); err != nil {
		return err
	}
	if err := unix.Mount(target, dir, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("bind %s at %s: %w", target, dir, err), os.Remove(dir))
	}
	return nil
}

// hideSockets takes away the short paths of socket folders for which gone says so, given what else is mounted.
func (s *service) hideSockets(gone func(m mountinfo.Mount, all []mountinfo.Mount) bool) error {
	entries, err := os.ReadDir(s.config.SocketDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	all, lerr := mountinfo.List()
	if err = errors.Join(err, lerr); err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(s.config.SocketDir, e.Name())
		at := mountinfo.Filter(all, dir)
		if len(at) > 0 && (at[0].Source != socketSource || !gone(at[0], all)) {
			continue
		}
		if len(at) > 0 {
			if _, derr := mountinfo.Detach(dir, nil); derr != nil {
				err = errors.Join(err, derr)
				continue
			}
		} else if info, ierr := e.Info(); ierr != nil || s.now().Sub(info.ModTime()) < youth {
			continue // it may be on its way
		}
		err = errors.Join(err, os.Remove(dir))
	}
	return err
}

// lost is true for a socket folder that no pod has any more: its short path is all that is left.
func (s *service) lost(m mountinfo.Mount, all []mountinfo.Mount) bool {
	for _, o := range all {
		if deviceOf(o) == deviceOf(m) && filepath.Dir(o.Point) != s.config.SocketDir {
			return false
		}
	}
	return true
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
	at, err := mountinfo.At(dir)
	if err != nil {
		return nil, err
	}
	if len(at) == 0 || at[0].Type != "tmpfs" || at[0].Source != socketSource {
		return nil, fmt.Errorf("socket %s: %s is not the folder of a socket volume", addr, dir)
	}
	fd, err := unix.Open(addr, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
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
