// Package mountinfo says what is mounted where, and takes mounts away, without ever touching them.
//
// It owns the reading of /proc/self/mountinfo. A stat, statfs or readdir of a FUSE mount that nobody serves
// hangs, in a state that only a signal that kills gets out of, and fails on one whose server died; so whoever
// needs to know whether a path is a mount asks here, and nothing of this package looks at a mount itself.
//
// Concurrency: functions are safe for concurrent use; the answer is a moment's, and mounts may come and go
// behind it. Failure: errors name the path; a line of mountinfo that cannot be parsed is an error, not a gap.
//
// It may import the standard library and golang.org/x/sys/unix.
package mountinfo

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is one line of mountinfo (see proc_pid_mountinfo(5)), with its octal escapes undone.
type Mount struct {
	// ID and Parent number the mount and what it is mounted on.
	ID, Parent int
	// Major and Minor are the device of the file system: st_dev of its files. For FUSE, Minor is also the
	// connection's number in /sys/fs/fuse/connections.
	Major, Minor uint32
	// Root is the path in the file system that is the root of the mount; "/" but for a bind mount.
	Root string
	// Point is where it is mounted.
	Point string
	// Options are the mount's own, comma separated; SuperOptions the file system's.
	Options, SuperOptions string
	// Type is the file system's type ("fuse.stepcache"); Source what it was mounted from.
	Type, Source string
}

// List returns the mounts that this process sees.
func List() ([]Mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w; is /proc mounted?", err)
	}
	defer f.Close()
	return Parse(f)
}

// Parse reads text in the format of /proc/self/mountinfo.
func Parse(r io.Reader) ([]Mount, error) {
	var all []Mount
	b := bufio.NewReader(r)
	for {
		line, err := b.ReadString('\n')
		if line = strings.TrimSuffix(line, "\n"); line != "" {
			m, ok := parseLine(line)
			if !ok {
				return nil, fmt.Errorf("list mounts: cannot parse the line %q", line)
			}
			all = append(all, m)
		}
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list mounts: %w", err)
		}
	}
}

// parseLine parses "ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPEROPTIONS". Fields are
// separated by one blank and may be empty (the source).
func parseLine(s string) (m Mount, ok bool) {
	own, super, ok := strings.Cut(s, " - ")
	f, g := strings.Split(own, " "), strings.Split(super, " ")
	if !ok || len(f) < 6 || len(g) < 2 {
		return m, false
	}
	major, minor, ok := strings.Cut(f[2], ":")
	if !ok {
		return m, false
	}
	var errs [4]error
	m.ID, errs[0] = strconv.Atoi(f[0])
	m.Parent, errs[1] = strconv.Atoi(f[1])
	ma, err := strconv.ParseUint(major, 10, 32)
	errs[2] = err
	mi, err := strconv.ParseUint(minor, 10, 32)
	errs[3] = err
	if errors.Join(errs[:]...) != nil {
		return m, false
	}
	m.Major, m.Minor = uint32(ma), uint32(mi)
	m.Root, m.Point, m.Options = unescape(f[3]), unescape(f[4]), unescape(f[5])
	m.Type, m.Source = unescape(g[0]), unescape(g[1])
	if len(g) > 2 {
		m.SuperOptions = unescape(g[2])
	}
	return m, true
}

// unescape undoes the kernel's \ooo, which it writes for blank, tab, newline, backslash and '#'.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Resolve makes path absolute and clean, and follows the symbolic links in it, without a look at any mount at
// the path itself (its parents are looked at: keep mounts that may be unserved out of them). A path that does
// not exist is an error.
func Resolve(path string) (string, error) {
	for range 40 { // as many links as the kernel follows
		abs, err := filepath.Abs(path)
		if err != nil {
			return "", fmt.Errorf("resolve %s: %w", path, err)
		}
		if abs == "/" {
			return abs, nil
		}
		dir, err := filepath.EvalSymlinks(filepath.Dir(abs))
		if err != nil {
			return "", fmt.Errorf("resolve %s: %w", path, err)
		}
		abs = filepath.Join(dir, filepath.Base(abs))
		at, err := At(abs)
		if err != nil {
			return "", err
		}
		if len(at) > 0 {
			return abs, nil
		}
		st, err := os.Lstat(abs)
		if err != nil {
			return "", fmt.Errorf("resolve %s: %w", path, err)
		}
		if st.Mode()&fs.ModeSymlink == 0 {
			return abs, nil
		}
		if path, err = os.Readlink(abs); err != nil {
			return "", fmt.Errorf("resolve %s: %w", abs, err)
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
	}
	return "", fmt.Errorf("resolve %s: %w", path, unix.ELOOP)
}

// At returns the mounts whose mount point is exactly path (absolute and resolved), the visible one, on top of
// the others, first.
func At(path string) ([]Mount, error) {
	all, err := List()
	if err != nil {
		return nil, err
	}
	return Filter(all, path), nil
}

// Filter picks the mounts of a list that At would return.
func Filter(all []Mount, path string) []Mount {
	at := map[int]Mount{} // by parent: what lies on top of what
	ids := map[int]bool{}
	for _, m := range all {
		if m.Point == path {
			at[m.Parent], ids[m.ID] = m, true
		}
	}
	var bottom Mount
	found := false
	for parent, m := range at {
		// The lowest one lies on a mount of another point. A root mount is its own parent in some kernels.
		if !ids[parent] || parent == m.ID {
			bottom, found = m, true
		}
	}
	if !found {
		return nil
	}
	stack := []Mount{bottom}
	for m, ok := at[bottom.ID]; ok && len(stack) < len(ids); m, ok = at[m.ID] {
		stack = append([]Mount{m}, stack...)
	}
	return stack
}

// Below returns the mounts at path and under it, those that must go first first.
func Below(path string) ([]Mount, error) {
	all, err := List()
	if err != nil {
		return nil, err
	}
	var below []Mount
	prefix := strings.TrimSuffix(path, "/") + "/"
	for _, m := range all {
		if m.Point == path || strings.HasPrefix(m.Point, prefix) {
			below = append([]Mount{m}, below...)
		}
	}
	return below, nil
}

// Detach takes away every mount at path (absolute and resolved) that keep does not hold on to, lazily: the
// path is free at once, and the file system ends with its last user. keep may be nil. It stops at the first
// mount that keep holds on to, and returns how many it took away. That there was none is no error.
func Detach(path string, keep func(Mount) bool) (int, error) {
	n := 0
	for range 1000 { // mounts that come as fast as they go get an end
		at, err := At(path)
		if err != nil || len(at) == 0 {
			return n, err
		}
		if keep != nil && keep(at[0]) {
			return n, nil
		}
		switch err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); {
		case err == nil:
			n++
		case !errors.Is(err, unix.EINVAL): // EINVAL: it went meanwhile
			return n, fmt.Errorf("unmount %s (%s) lazily: %w", path, at[0].Type, err)
		}
	}
	return n, fmt.Errorf("unmount %s lazily: something keeps mounting it again", path)
}
