package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

func TestLeftoverOfAKilledServerIsHealed(t *testing.T) {
	needFUSE(t)
	all := served()
	dir := t.TempDir()
	cleanMount(t, dir)
	o := order{Path: dir, Mode: NoOpen, Dir: t.TempDir()}
	for range 2 {
		s, parked := startServer(t, o, nil)
		f, err := os.Open(filepath.Join(dir, "small")) // a user who does not let go
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		parked.Close()
		s.kill()
		if err := unix.Statfs(dir, new(unix.Statfs_t)); !errors.Is(err, unix.ENOTCONN) {
			t.Errorf("a dead mount: %v", err)
		}
		snap := snapshotOf(t, all)
		m, err := Mount(context.Background(), dir, snap, newMemory(snap, all), Options{Dataset: "test"})
		if err != nil {
			t.Fatal(err)
		}
		if err := sameBytes(filepath.Join(dir, "small"), all["small"]); err != nil {
			t.Error(err)
		}
		if err := m.Unmount(); err != nil {
			t.Error(err)
		}
		if at, _ := mountinfo.At(dir); len(at) != 0 {
			t.Errorf("left: %+v", at)
		}
	}
}

func TestParkedLeftoverIsHealedWithoutAHang(t *testing.T) {
	// Nobody serves it, and the descriptor is kept: whatever looks at the mount hangs.
	needFUSE(t)
	all := served()
	dir := t.TempDir()
	cleanMount(t, dir)
	s, parked := startServer(t, order{Path: dir, Mode: NoOpen, Dir: t.TempDir()}, nil)
	defer parked.Close()
	s.kill()
	snap := snapshotOf(t, all)
	m := mountedAt(t, dir, snap, newMemory(snap, all), Options{})
	if err := sameBytes(filepath.Join(dir, "small"), all["small"]); err != nil {
		t.Error(err)
	}
	if err := m.Unmount(); err != nil {
		t.Error(err)
	}
}

func TestAServedMountIsNotTakenAway(t *testing.T) {
	all := served()
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{})
	if _, err := Mount(context.Background(), m.Dir(), s, newMemory(s, all), Options{}); err == nil || !strings.Contains(err.Error(), "served by another process") {
		t.Errorf("a second mount: %v", err)
	}
	if err := sameBytes(filepath.Join(m.Dir(), "small"), all["small"]); err != nil {
		t.Error(err)
	}
}

func TestUnmountWhileBusyIsLazy(t *testing.T) {
	all := served()
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{})
	f, err := os.Open(filepath.Join(m.Dir(), "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if at, _ := mountinfo.At(m.Dir()); len(at) != 0 {
		t.Errorf("still there: %+v", at)
	}
	if entries, err := os.ReadDir(m.Dir()); err != nil || len(entries) != 0 {
		t.Errorf("below the mount: %v %v", entries, err)
	}
	if err := sameAt(f, all["big"]); err != nil {
		t.Errorf("the file that is open: %v", err)
	}
	select {
	case <-m.Done():
		t.Error("ended under its user")
	default:
	}
	if err := m.Unmount(); err != nil {
		t.Errorf("once more: %v", err)
	}
	f.Close()
	m.Wait()
	if err := m.Unmount(); err != nil {
		t.Errorf("after the end: %v", err)
	}
}

func TestUnmountFromOutsideEndsTheServer(t *testing.T) {
	all := served()
	s := snapshotOf(t, all)
	m := mounted(t, s, newMemory(s, all), Options{})
	if err := unix.Unmount(m.Dir(), 0); err != nil {
		t.Fatal(err)
	}
	m.Wait()
	if err := m.Unmount(); err != nil {
		t.Error(err)
	}
}

func TestAbortFreesWhoWaits(t *testing.T) {
	all := files{"f": content("f", 10)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	asked := make(chan struct{}, 10)
	r.hook(func(ctx context.Context, _ string, _ int64) error {
		asked <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	})
	m := mounted(t, s, r, Options{ReadTimeout: time.Hour})
	done := make(chan error, 1)
	go func() { done <- readErr(filepath.Join(m.Dir(), "f")) }()
	<-asked
	if err := m.Abort(); err != nil {
		// No fusectl at its usual place; the test's own will do.
		t.Log(err)
		abort(m.dev.minor)
	}
	if err := <-done; err == nil {
		t.Error("a read of an aborted mount succeeded")
	}
	if connections == "" {
		t.Skip("needs fusectl")
	}
	m.Wait()
	if err := m.Unmount(); err != nil {
		t.Error(err)
	}
	if at, _ := mountinfo.At(m.Dir()); len(at) != 0 {
		t.Errorf("still there: %+v", at)
	}
}

func TestMountErrorsSayWhatToDo(t *testing.T) {
	needFUSE(t)
	all := served()
	s := snapshotOf(t, all)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := t.TempDir()
	conn, err := openDevice()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := unix.Mount("x", foreign, "fuse.other", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d", conn.Fd())+",rootmode=40000,user_id=0,group_id=0"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(foreign, unix.MNT_DETACH)
	for dir, want := range map[string]string{
		filepath.Join(t.TempDir(), "none"): "no such file",
		file:                               "not a directory",
		foreign:                            "another kind (fuse.other)",
	} {
		if _, err := Mount(context.Background(), dir, s, newMemory(s, all), Options{Dataset: "test"}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v, want %q", dir, err, want)
		}
	}
}

func TestMountThroughASymbolicLink(t *testing.T) {
	all := served()
	s := snapshotOf(t, all)
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	m := mountedAt(t, link, s, newMemory(s, all), Options{})
	if m.Dir() != dir {
		t.Errorf("mounted at %s", m.Dir())
	}
	if err := sameBytes(filepath.Join(link, "small"), all["small"]); err != nil {
		t.Error(err)
	}
}

// asNobody makes a child of a user without rights, who can reach the program and a folder of his own.
func asNobody(t *testing.T, what string) (*exec.Cmd, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become somebody else")
	}
	// Not below TMPDIR, which others need not be able to reach, nor with a mode that the umask decides.
	dir, err := os.MkdirTemp("/tmp", "mount-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		abortAll(dir)
		_ = os.RemoveAll(dir)
	})
	own := filepath.Join(dir, "own")
	cmd := command(t, what, order{Path: own})
	b, err := os.ReadFile(cmd.Path)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Path = filepath.Join(dir, "exe")
	if err := errors.Join(os.WriteFile(cmd.Path, b, 0o755), os.Chmod(cmd.Path, 0o755), os.Chmod(dir, 0o755),
		os.Mkdir(own, 0o755), os.Chown(own, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = nil
	cmd.SysProcAttr = &unix.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Pdeathsig: unix.SIGKILL}
	return cmd, own
}

// deviceForAll says whether every user may open /dev/fuse, as on most machines but few containers.
func deviceForAll(t *testing.T) bool {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(devFuse, &st); err != nil {
		t.Fatal(err)
	}
	return st.Mode&0o006 == 0o006
}

func TestMountWithoutRoot(t *testing.T) {
	needFUSE(t)
	if _, err := fusermount(); err != nil {
		t.Skip(err)
	}
	if !deviceForAll(t) {
		t.Skip("needs a /dev/fuse that is open to every user (chmod 666 /dev/fuse)")
	}
	cmd, own := asNobody(t, "user")
	cleanMount(t, own)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// A pod with a user namespace of its own (hostUsers: false) has every volume with ids that are mapped to it.
func TestAPodWithAUserNamespaceReads(t *testing.T) {
	all := served()
	for name, serve := range map[string]func(*testing.T, *leasing) (string, *Server){
		"passthrough": func(t *testing.T, r *leasing) (string, *Server) {
			m := mounted(t, r.snap, r, Options{Mode: Passthrough})
			return m.Dir(), m
		},
		"no-open": func(t *testing.T, r *leasing) (string, *Server) {
			m := mounted(t, r.snap, r, Options{Mode: NoOpen})
			return m.Dir(), m
		},
		"lent": func(t *testing.T, r *leasing) (string, *Server) {
			needAttach(t)
			dir, kept, given := attached(t)
			return dir, servedAt(t, dir, given, r, Options{Mode: Passthrough, Registrar: &lender{conn: kept}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir, m := serve(t, newLeasing(t, snapshotOf(t, all), all))
			if m.server.KernelSettings().Flags64()&fuse.CAP_ALLOW_IDMAP == 0 {
				t.Skip("needs a kernel that maps the ids of a FUSE mount (Linux 6.12 or later)")
			}
			cmd, own := asNobody(t, "mapped")
			ids := []syscall.SysProcIDMap{{HostID: 200000, Size: 65536}}
			cmd.SysProcAttr = &unix.SysProcAttr{
				Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
				Credential: &syscall.Credential{}, Pdeathsig: unix.SIGKILL,
			}
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			tell, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Skipf("needs user namespaces: %v", err)
			}
			t.Cleanup(func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			})
			idMap(t, dir, own, cmd.Process.Pid)
			if _, err := io.WriteString(tell, "\n"); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("%v\n%s", err, &out)
			}
			if st := m.Stats(); st.Passthrough && name != "no-open" && st.PassthroughOpens == 0 {
				t.Errorf("nothing was passed through: %+v", st)
			}
		})
	}
}

// idMap shows the mount at dir also at another path, with the ids of a process's user namespace, as a runtime does.
func idMap(t *testing.T, dir, at string, pid int) {
	t.Helper()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.O_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		t.Fatalf("map the ids of %s: %v", dir, err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
}

func TestSupportedSaysWhatIsMissing(t *testing.T) {
	needFUSE(t)
	cmd, own := asNobody(t, "supported")
	cmd.Env = append(cmd.Env, "PATH="+own)
	out, err := cmd.CombinedOutput()
	want := []string{"/dev/fuse", "chmod 666"}
	if deviceForAll(t) {
		want = []string{"CAP_SYS_ADMIN", "apt-get install fuse3"}
		if _, err := fusermount(); err == nil {
			want = nil
		}
	}
	if (err == nil) != (want == nil) {
		t.Errorf("a user without rights: %v %s", err, out)
	}
	for _, w := range want {
		if !strings.Contains(string(out), w) {
			t.Errorf("a user without rights: no %q in %s", w, out)
		}
	}
	if out, err := command(t, "supported", order{}).Output(); err != nil {
		t.Errorf("root: %v %s", err, out)
	}
	for err, want := range map[error]string{
		unix.ENOENT: "modprobe fuse", unix.EPERM: "--device /dev/fuse", unix.EACCES: "be root", unix.ENXIO: "modprobe fuse", unix.EMFILE: "too many open files",
	} {
		if got := deviceError(err); !strings.Contains(got.Error(), want) || !errors.Is(got, err) {
			t.Errorf("%v: %v", err, got)
		}
	}
}

func TestExtendedAttributes(t *testing.T) {
	all := files{"dir/file": content("f", 9<<20)}
	s := snapshotOf(t, all)
	r := &resident{newMemory(s, all)}
	m := mounted(t, s, r, Options{Dataset: "argo/genomes"})
	file, dir := filepath.Join(m.Dir(), "dir/file"), filepath.Join(m.Dir(), "dir")
	d := m.settings.Snapshot
	for name, want := range map[string]string{
		XattrSource: "s3://bucket/dir/file", XattrVersion: "v-8", XattrResident: "5242880/9437184",
		XattrDataset: "argo/genomes", XattrSnapshot: hexOf(d[:]),
	} {
		if got, err := getxattr(file, name); err != nil || got != want {
			t.Errorf("%s: %q %v, want %q", name, got, err, want)
		}
	}
	for _, c := range []struct {
		path, name string
	}{{file, "user.none"}, {file, "security.selinux"}, {dir, XattrSource}, {dir, XattrResident}} {
		if got, err := getxattr(c.path, c.name); !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			t.Errorf("%s of %s: %q %v", c.name, c.path, got, err)
		}
	}
	if got, err := getxattr(m.Dir(), XattrDataset); err != nil || got != "argo/genomes" {
		t.Errorf("of the root: %q %v", got, err)
	}
	buf := make([]byte, 4096)
	n, err := unix.Listxattr(file, buf)
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	if want := []string{XattrDataset, XattrResident, XattrSnapshot, XattrSource, XattrVersion}; !slices.Equal(names, want) {
		t.Errorf("names: %q", names)
	}
	if n, err := unix.Listxattr(file, nil); err != nil || n == 0 {
		t.Errorf("size of the names: %d %v", n, err)
	}
	if _, err := unix.Listxattr(file, buf[:3]); !errors.Is(err, unix.ERANGE) {
		t.Errorf("names into 3 bytes: %v", err)
	}
	if _, err := unix.Getxattr(file, XattrSource, buf[:3]); !errors.Is(err, unix.ERANGE) {
		t.Errorf("a value into 3 bytes: %v", err)
	}
}

type resident struct{ *memory }

// Resident: the first block and the last, which is short.
func (r *resident) Resident(context.Context, uint32) ([]byte, error) { return []byte{0b1111_0101}, nil }

func getxattr(path, name string) (string, error) {
	n, err := unix.Getxattr(path, name, nil)
	if err != nil {
		return "", err
	}
	buf := make([]byte, n)
	n, err = unix.Getxattr(path, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

func TestMetrics(t *testing.T) {
	all := served()
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	m := mounted(t, s, r, Options{Mode: Passthrough})
	if err := sameBytes(filepath.Join(m.Dir(), "big"), all["big"]); err != nil {
		t.Fatal(err)
	}
	r.hook(func(context.Context, string, int64) error { return errors.New("broken") })
	_ = readErr(filepath.Join(m.Dir(), "small"))
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(NewCollector(func() map[string]Stats { return map[string]Stats{"d": m.Stats()} })); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, v := range f.Metric {
			name := f.GetName()
			for _, l := range v.Label {
				if n := l.GetName(); n != "dataset" {
					name += " " + l.GetValue()
				}
			}
			got[name] = v.GetCounter().GetValue() + v.GetGauge().GetValue()
		}
	}
	_, timeouts := got["stepcache_mount_errors_total ETIMEDOUT"] // what has not failed is there, so that its first failure is seen
	if got["stepcache_mount_opens_total buffered"] != 2 || got["stepcache_mount_opens_total passthrough"] != 0 ||
		got["stepcache_mount_read_bytes_total"] != float64(len(all["big"])) || got["stepcache_mount_errors_total EIO"] == 0 || got["stepcache_mount_errors_total ETIMEDOUT"] != 0 || !timeouts ||
		got["stepcache_mount_opened_bytes_total buffered"] != float64(len(all["big"])+5000) {
		t.Errorf("%v", got)
	}
}

// A server that goes on when its owner has given up must not touch unmapped memory: its readers get errors.
func TestAMountOutlivesTheSnapshotThatItsOwnerCloses(t *testing.T) {
	all := files{"a/one": content("one", 100), "two": content("two", 200)}
	made := snapshotOf(t, all)
	path := filepath.Join(t.TempDir(), "snapshot")
	if err := os.WriteFile(path, made.Encoded(), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := catalog.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := mounted(t, s, newMemory(made, all), Options{})
	s.Close()
	for name, want := range all {
		if got, err := os.ReadFile(filepath.Join(m.Dir(), name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if names, err := os.ReadDir(m.Dir()); err != nil || len(names) != 2 {
		t.Error(names, err)
	}
	end(t, m)
	if maps, err := os.ReadFile("/proc/self/maps"); err == nil && bytes.Contains(maps, []byte(path)) {
		t.Error("the snapshot stays mapped when the mount is gone")
	}
	if _, err := Mount(t.Context(), m.Dir(), s, newMemory(made, all), Options{}); err == nil {
		t.Error("a closed snapshot can be mounted")
	}
}
