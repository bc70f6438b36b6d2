package mount

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
)

// awkward sizes: empty, one, around a page, a request, a block.
var awkward = []int{0, 1, 511, 4095, 4096, 4097, 65535, 65536, 1<<20 - 1, 1 << 20, 1<<20 + 1, 4<<20 - 1, 4 << 20, 4<<20 + 1, 9<<20 + 12345}

func awkwardFiles() files {
	all := files{}
	for _, n := range awkward {
		name := fmt.Sprintf("sizes/%d.bin", n)
		all[name] = content(name, n)
	}
	tail := content("tail", 6<<20)
	clear(tail[1<<20:]) // zeros to the end
	all["sizes/sparse-tail.bin"] = tail
	return all
}

func TestAwkwardSizesReadWhole(t *testing.T) {
	all := awkwardFiles()
	for _, mode := range []Mode{NoOpen, Passthrough} {
		t.Run(mode.String(), func(t *testing.T) {
			s := snapshotOf(t, all)
			m := mounted(t, s, newMemory(s, all), Options{Mode: mode})
			if m.Mode() != mode {
				t.Fatalf("mode is %v", m.Mode())
			}
			for name, want := range all {
				got, err := os.ReadFile(filepath.Join(m.Dir(), name))
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, want %d, equal %v, error %v", name, len(got), len(want), bytes.Equal(got, want), err)
				}
				st, err := os.Stat(filepath.Join(m.Dir(), name))
				if err != nil || st.Size() != int64(len(want)) || st.Mode() != 0o444 || !st.ModTime().Equal(created.Add(-time.Hour)) {
					t.Errorf("%s: stat %v %v", name, st, err)
				}
			}
			if err := m.Unmount(); err != nil {
				t.Fatal(err)
			}
			m.Wait()
		})
	}
}

func TestRandomReadsEqualTheSource(t *testing.T) {
	all := awkwardFiles()
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{Mode: Passthrough})
	var wg sync.WaitGroup
	for name, want := range all {
		wg.Go(func() {
			f, err := os.Open(filepath.Join(m.Dir(), name))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			r := rand.New(rand.NewPCG(uint64(len(want)), 1))
			for range 40 {
				off := r.Int64N(int64(len(want)) + 10)
				buf := make([]byte, r.IntN(300_000))
				if r.IntN(3) == 0 {
					// Drop what the kernel has, so that the read comes to us.
					_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
				}
				n, err := f.ReadAt(buf, off)
				end := min(off+int64(len(buf)), int64(len(want)))
				var expect []byte
				if off < end {
					expect = want[off:end]
				}
				if !bytes.Equal(buf[:n], expect) {
					t.Errorf("%s [%d, +%d): wrong bytes (%d of %d)", name, off, len(buf), n, len(expect))
				}
				if (n < len(buf)) != (err == io.EOF) || err != nil && err != io.EOF {
					t.Errorf("%s [%d, +%d): %d bytes, %v", name, off, len(buf), n, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestListingEqualsWalk(t *testing.T) {
	all := files{}
	for d := range 20 {
		for f := range 30 {
			all[fmt.Sprintf("d%02d/sub%d/f%03d", d, f%3, f)] = []byte(fmt.Sprint(d, f))
		}
	}
	for name := range oddNames() {
		all["odd/"+name] = []byte(name)
	}
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{})
	for range 2 { // the second time from the kernel's cache
		var want []string
		s.Walk(0, func(i catalog.Index) bool {
			n, _ := s.Node(i)
			want = append(want, fmt.Sprintf("%s %d", s.Path(i), n.Size))
			return true
		})
		var got []string
		err := filepath.WalkDir(m.Dir(), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			st, err := d.Info()
			if err != nil {
				return err
			}
			got = append(got, fmt.Sprintf("%s %d", strings.TrimPrefix(p, m.Dir()), st.Size()))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Fatalf("listing differs: %d entries, want %d", len(got), len(want))
		}
	}
}

// oddNames are what a bucket may hold and a file system can show.
func oddNames() files {
	all := files{}
	for _, n := range []string{
		"new\nline", "tab\there", " lead", "trail ", "quote'\"", "back\\slash", "\xff\xfe not UTF-8", "\x01\x7f",
		"*?[", "-rf", "ünï", "日本語", "…", strings.Repeat("x", 255), strings.Repeat("é", 127), "a,b=c",
	} {
		all[n] = []byte("content of " + n)
	}
	return all
}

func TestOddNames(t *testing.T) {
	all := oddNames()
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{})
	entries, err := os.ReadDir(m.Dir())
	if err != nil || len(entries) != len(all) {
		t.Fatalf("%d entries, want %d: %v", len(entries), len(all), err)
	}
	for _, e := range entries {
		got, err := os.ReadFile(filepath.Join(m.Dir(), e.Name()))
		if err != nil || !bytes.Equal(got, all[e.Name()]) {
			t.Errorf("%q: %q %v", e.Name(), got, err)
		}
	}
}

func TestHugeDirectoryWithSeeks(t *testing.T) {
	const n = 100_000
	all := files{}
	for k := range n {
		all[fmt.Sprintf("huge/file-%06d", k)] = nil
	}
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{})
	fd, err := unix.Open(filepath.Join(m.Dir(), "huge"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	// First a part, by small reads; then a jump back to a place in the middle; then all of it.
	names, offs := dents(t, fd, 5000)
	if len(names) < 5000 || names[0] != "." || names[1] != ".." || names[2] != "file-000000" {
		t.Fatalf("starts with %q", names[:3])
	}
	if _, err := unix.Seek(fd, offs[2999], io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if again, _ := dents(t, fd, 1); again[0] != names[3000] {
		t.Fatalf("after a seek: %q, want %q", again[0], names[3000])
	}
	if _, err := unix.Seek(fd, 0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	names, _ = dents(t, fd, n+10)
	if len(names) != n+2 {
		t.Fatalf("%d entries, want %d", len(names), n+2)
	}
	for k, name := range names[2:] {
		if want := fmt.Sprintf("file-%06d", k); name != want {
			t.Fatalf("entry %d is %q, want %q", k, name, want)
		}
	}
	// A position behind the end is the end, not a failure.
	if _, err := unix.Seek(fd, 1<<40, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if names, _ := dents(t, fd, 1); len(names) != 0 {
		t.Fatalf("behind the end: %q", names)
	}
}

// dents reads at least n entries of a directory if there are so many, and the position behind each.
func dents(t *testing.T, fd, n int) (names []string, offs []int64) {
	t.Helper()
	buf := make([]byte, 4096)
	for len(names) < n {
		k, err := unix.Getdents(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if k == 0 {
			break
		}
		for b := buf[:k]; len(b) > 0; {
			reclen := int(b[16]) | int(b[17])<<8
			var off int64
			for i := range 8 {
				off |= int64(b[8+i]) << (8 * i)
			}
			name, _, _ := bytes.Cut(b[19:reclen], []byte{0})
			names, offs = append(names, string(name)), append(offs, off)
			b = b[reclen:]
		}
	}
	return names, offs
}

func TestErrnoTable(t *testing.T) {
	all := files{"dir/file": content("f", 10_000), "top": []byte("x")}
	s := snapshotOf(t, all)
	for _, mode := range []Mode{NoOpen, Passthrough} {
		m := mounted(t, s, newMemory(s, all), Options{Mode: mode})
		d := m.Dir()
		var st unix.Stat_t
		buf := make([]byte, 10)
		open := func(p string, flags int) error {
			fd, err := unix.Open(p, flags|unix.O_CLOEXEC, 0o600)
			if err == nil {
				unix.Close(fd)
			}
			return err
		}
		withFD := func(p string, f func(fd int) error) error {
			fd, err := unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open: %w", err)
			}
			defer unix.Close(fd)
			return f(fd)
		}
		for _, c := range []struct {
			what string
			got  error
			want error
		}{
			{"stat of nothing", unix.Stat(d+"/none", &st), unix.ENOENT},
			{"again, from the kernel's negative entry", unix.Stat(d+"/none", &st), unix.ENOENT},
			{"open of nothing", open(d+"/dir/none", unix.O_RDONLY), unix.ENOENT},
			{"below a file", unix.Stat(d+"/top/x", &st), unix.ENOTDIR},
			{"a name of 256 bytes", unix.Stat(d+"/"+strings.Repeat("n", 256), &st), unix.ENAMETOOLONG},
			{"a name of 2000 bytes", unix.Stat(d+"/"+strings.Repeat("n", 2000), &st), unix.ENAMETOOLONG},
			{"list a file", open(d+"/top", unix.O_DIRECTORY), unix.ENOTDIR},
			{"read a directory", withFD(d+"/dir", func(fd int) error { _, err := unix.Read(fd, buf); return err }), unix.EISDIR},
			{"open for writing", open(d+"/top", unix.O_WRONLY), unix.EROFS},
			{"open for appending", open(d+"/top", unix.O_RDWR|unix.O_APPEND), unix.EROFS},
			{"truncate at open", open(d+"/top", unix.O_WRONLY|unix.O_TRUNC), unix.EROFS},
			{"create", open(d+"/new", unix.O_CREAT|unix.O_WRONLY), unix.EROFS},
			{"truncate", unix.Truncate(d+"/top", 0), unix.EROFS},
			{"mkdir", unix.Mkdir(d+"/new", 0o700), unix.EROFS},
			{"rmdir", unix.Rmdir(d + "/dir"), unix.EROFS},
			{"unlink", unix.Unlink(d + "/top"), unix.EROFS},
			{"rename", unix.Rename(d+"/top", d+"/new"), unix.EROFS},
			{"link", unix.Link(d+"/top", d+"/new"), unix.EROFS},
			{"symlink", unix.Symlink("top", d+"/new"), unix.EROFS},
			{"mknod", unix.Mknod(d+"/new", unix.S_IFREG|0o600, 0), unix.EROFS},
			{"chmod", unix.Chmod(d+"/top", 0o600), unix.EROFS},
			{"chown", unix.Chown(d+"/top", 1, 1), unix.EROFS},
			{"utimes", unix.UtimesNanoAt(unix.AT_FDCWD, d+"/top", nil, 0), unix.EROFS},
			{"setxattr", unix.Setxattr(d+"/top", "user.x", []byte("y"), 0), unix.EROFS},
			{"removexattr", unix.Removexattr(d+"/top", XattrSource), unix.EROFS},
			{"access for writing", unix.Access(d+"/top", unix.W_OK), unix.EROFS},
			{"access for reading", unix.Access(d+"/top", unix.R_OK), nil},
			{"access to execute", unix.Access(d+"/top", unix.X_OK), unix.EACCES},
			{"access to a directory", unix.Access(d+"/dir", unix.R_OK|unix.X_OK), nil},
			{"readlink", func() error { _, err := unix.Readlink(d+"/top", buf); return err }(), unix.EINVAL},
			{"fsync", withFD(d+"/top", unix.Fsync), nil},
			{"fdatasync", withFD(d+"/top", unix.Fdatasync), nil},
			{"fsync of a directory", withFD(d+"/dir", unix.Fsync), nil},
			{"syncfs", withFD(d+"/top", unix.Syncfs), nil},
			{"flock", withFD(d+"/top", func(fd int) error { return unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB) }), nil},
			{"flock, exclusive", withFD(d+"/top", func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }), nil},
			{"fcntl lock", withFD(d+"/top", func(fd int) error {
				return unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
			}), nil},
			{"ioctl", withFD(d+"/top", func(fd int) error { _, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS); return err }), unix.ENOTTY},
			{"lseek to data", withFD(d+"/dir/file", func(fd int) error { _, err := unix.Seek(fd, 5, unix.SEEK_DATA); return err }), nil},
			{"lseek to a hole", withFD(d+"/dir/file", func(fd int) error {
				if off, err := unix.Seek(fd, 5, unix.SEEK_HOLE); err != nil || off != 10_000 {
					return fmt.Errorf("%d %w", off, err)
				}
				return nil
			}), nil},
			{"fallocate", withFD(d+"/top", func(fd int) error { return unix.Fallocate(fd, 0, 0, 10) }), unix.EBADF},
		} {
			if !errors.Is(c.got, c.want) {
				t.Errorf("%v: %s: %v, want %v", mode, c.what, c.got, c.want)
			}
		}
	}
}

func TestStatfsShowsTheDataset(t *testing.T) {
	all := awkwardFiles()
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{})
	var st unix.Statfs_t
	if err := unix.Statfs(m.Dir(), &st); err != nil {
		t.Fatal(err)
	}
	got := int64(st.Blocks) * st.Frsize
	if got < s.Bytes() || got > s.Bytes()+st.Frsize || st.Files != uint64(s.Len()) || st.Bfree != 0 || st.Bavail != 0 || st.Namelen != 255 {
		t.Errorf("%+v for %d bytes in %d files", st, s.Bytes(), s.Files())
	}
	if st.Flags&unix.ST_RDONLY == 0 || st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 {
		t.Errorf("flags %x", st.Flags)
	}
}
