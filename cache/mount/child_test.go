package mount

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// Some of what is tested needs another process: one that is killed, one that maps a file (a page fault would
// block this process's runtime, and with it the server), one that has no rights. It is this binary again.

// order tells a child what to do.
type order struct {
	// Path is the file to read, or the folder to mount at.
	Path string
	// Flags to open the file with.
	Flags int
	// Serve: how, and where to put leased files.
	Mode Mode
	Dir  string
	// Block makes a server stop for good at the first read of the file of that name, and say so.
	Block string
	// Ahead makes it also have the kernel read that file ahead then, and say so.
	Ahead bool
	// Resume says that a parked mount comes over the socket.
	Resume bool
	// Names: the mount follows the names of a writable dataset.
	Names bool
}

// child runs in the other process; the order is in the environment, after the verb.
func child(what string) int {
	var o order
	if err := json.Unmarshal([]byte(os.Getenv(childEnv+"_ORDER")), &o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	f := map[string]func(order) error{"blind": childBlind, "fault": childFault, "list": childList, "mapped": childMapped, "mmap": childMap, "read": childRead, "serve": childServe, "supported": childSupported, "user": childUser}[what]
	if f == nil {
		fmt.Fprintln(os.Stderr, "no such child:", what)
		return 2
	}
	if err := f(o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// command makes a child. It dies with this process.
func command(t testing.TB, what string, o order) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(exe)
	c.Env = append(os.Environ(), childEnv+"="+what, childEnv+"_ORDER="+string(b))
	c.Stderr = os.Stderr
	c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return c
}

// childMap maps a file and prints the digest of what it sees.
func childMap(o order) error {
	f, err := os.Open(o.Path)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	for _, flags := range []int{unix.MAP_SHARED, unix.MAP_PRIVATE} {
		b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, flags)
		if err != nil {
			return err
		}
		fmt.Printf("%x\n", sha256.Sum256(b))
		if err := unix.Munmap(b); err != nil {
			return err
		}
	}
	return nil
}

// childMapped stats and reads the served files of a folder, once it is told a line.
func childMapped(o order) error {
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	for name, want := range served() {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(o.Path, name), &st); err != nil {
			return err
		}
		if st.Uid != 0 || st.Gid != 0 {
			return fmt.Errorf("%s is of user %d and group %d", name, st.Uid, st.Gid)
		}
		if err := sameBytes(filepath.Join(o.Path, name), want); err != nil {
			return err
		}
	}
	return nil
}

// childFault maps a file that is not read ahead, and prints its first byte. SIGUSR1 does nothing to it.
func childFault(o order) error {
	c := make(chan os.Signal, 10)
	signal.Notify(c, unix.SIGUSR1)
	fd, err := unix.Open(o.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	b, err := unix.Mmap(fd, 0, 1, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	if err := unix.Madvise(b, unix.MADV_RANDOM); err != nil {
		return err
	}
	fmt.Printf("%x\n", b[0])
	return nil
}

// childRead reads a byte of a file, and prints how that went. SIGUSR1 does nothing to it.
func childRead(o order) error {
	c := make(chan os.Signal, 10)
	signal.Notify(c, unix.SIGUSR1)
	fd, err := unix.Open(o.Path, unix.O_RDONLY|unix.O_CLOEXEC|o.Flags, 0)
	if err != nil {
		return err
	}
	n, err := unix.Read(fd, make([]byte, 1))
	fmt.Printf("%d %s\n", n, unix.ErrnoName(errno(err)))
	return nil
}

// childList lists a folder and prints how many entries it has and how that ended. SIGUSR1 does nothing to it.
func childList(o order) error {
	c := make(chan os.Signal, 10)
	signal.Notify(c, unix.SIGUSR1)
	fd, err := unix.Open(o.Path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	n, buf := 0, make([]byte, 4096)
	for {
		k, err := unix.Getdents(fd, buf)
		if k <= 0 || err != nil {
			fmt.Printf("%d %s\n", n, unix.ErrnoName(errno(err)))
			return nil
		}
		for b := buf[:k]; len(b) > 0; n++ {
			b = b[binary.NativeEndian.Uint16(b[16:]):]
		}
	}
}

func errno(err error) unix.Errno {
	var e unix.Errno
	errors.As(err, &e)
	return e
}

func childSupported(order) error { return Supported() }

// childUser mounts without being root, reads, and unmounts while the file is still open.
func childUser(o order) error {
	all := served()
	s, err := buildSnapshot(all)
	if err != nil {
		return err
	}
	m, err := Mount(context.Background(), o.Path, s, newMemory(s, all), Options{Dataset: "user"})
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(o.Path, "big"))
	if err != nil {
		return err
	}
	if err := errors.Join(sameAt(f, all["big"]), m.Unmount()); err != nil {
		return err
	}
	if at, err := mountinfo.At(o.Path); err != nil || len(at) != 0 {
		return fmt.Errorf("still mounted: %v %w", at, err)
	}
	if err := errors.Join(sameAt(f, all["big"]), f.Close()); err != nil {
		return err
	}
	m.Wait()
	// And what a dead process left.
	m, err = Mount(context.Background(), o.Path, s, newMemory(s, all), Options{Dataset: "user"})
	if err != nil {
		return err
	}
	m.guard.Close() // as if it were gone
	m, err = Mount(context.Background(), o.Path, s, newMemory(s, all), Options{Dataset: "user"})
	if err != nil {
		return err
	}
	return errors.Join(sameBytes(filepath.Join(o.Path, "small"), all["small"]), m.Unmount())
}

// childBlind serves a file named f, and answers a read of it once it is told a line. It says when it is mounted, is
// asked for the file, goes on after a signal for the first three times, and does not.
func childBlind(o order) error {
	all := files{"f": content("f", 10)}
	s, err := buildSnapshot(all)
	if err != nil {
		return err
	}
	r, told := newMemory(s, all), bufio.NewReader(os.Stdin)
	answer, looks := make(chan struct{}), make(chan struct{}, 3)
	r.hook(func(ctx context.Context, _ string, _ int64) error {
		fmt.Println("asked")
		for range cap(looks) {
			select {
			case <-looks:
				fmt.Println("goes on")
			case <-ctx.Done():
				fmt.Println("ended")
				return context.Cause(ctx)
			}
		}
		<-answer
		return nil
	})
	m, err := Mount(context.Background(), o.Path, s, r, Options{Dataset: "blind", Mode: NoOpen, PushBytes: -1, grace: time.Millisecond, blindGrace: time.Hour, goesOn: func() {
		select {
		case looks <- struct{}{}:
		default:
		}
	}})
	if err != nil {
		return err
	}
	fmt.Println("mounted")
	for {
		if _, err := told.ReadString('\n'); err != nil {
			return m.Unmount()
		}
		answer <- struct{}{}
		for len(looks) > 0 {
			<-looks
		}
	}
}

// served is what the mounts of served children show.
func served() files {
	all := files{"slow": content("slow", 900_000), "big": content("big", 5<<20+77), "other": content("other", 2<<20), "small": content("small", 5000)}
	for k := range 50 {
		name := fmt.Sprintf("dir/f%02d", k)
		all[name] = content(name, 100*k)
	}
	return all
}

// note is a packet between a server child and its parent.
type note struct {
	What     string
	Settings Settings
}

func send(c *net.UnixConn, n note, p *Parked) error {
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	var rights []byte
	if p != nil {
		rights = unix.UnixRights(int(p.Conn.Fd()), int(p.Table.Fd()))
	}
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

func receive(c *net.UnixConn) (n note, p *Parked, err error) {
	b, oob := make([]byte, 64<<10), make([]byte, 256)
	k, ok, _, _, err := c.ReadMsgUnix(b, oob)
	if err == nil && k == 0 {
		err = io.EOF
	}
	if err != nil {
		return n, nil, err
	}
	if err := json.NewDecoder(bytes.NewReader(b[:k])).Decode(&n); err != nil {
		return n, nil, err
	}
	if ok > 0 {
		m, err := unix.ParseSocketControlMessage(oob[:ok])
		if err != nil {
			return n, nil, err
		}
		fds, err := unix.ParseUnixRights(&m[0])
		if err != nil || len(fds) != 2 {
			return n, nil, fmt.Errorf("%d descriptors: %v", len(fds), err)
		}
		p = &Parked{Settings: n.Settings, Conn: os.NewFile(uintptr(fds[0]), "conn"), Table: os.NewFile(uintptr(fds[1]), "table")}
	}
	return n, p, nil
}

// childServe mounts, or takes over what comes over the socket, parks it there, and serves until it is killed or
// told to unmount.
func childServe(o order) error {
	conn, err := net.FileConn(os.NewFile(3, "parent"))
	if err != nil {
		return err
	}
	c := conn.(*net.UnixConn)
	all := served()
	s, err := buildSnapshot(all)
	if err != nil {
		return err
	}
	r := &leasing{memory: newMemory(s, all), dir: o.Dir}
	names := newChanging(all)
	mounted := make(chan *Server, 1)
	hook := func(ctx context.Context, path string, _ int64) error {
		if path == o.Block {
			if err := send(c, note{What: "blocked"}, nil); err != nil {
				return err
			}
			if o.Ahead {
				in, err := (<-mounted).enter()
				if err != nil {
					return err
				}
				fd, err := in.open(path)
				if err == nil {
					err = in.readAhead(fd, int64(len(all[path])))
				}
				if err != nil {
					return err
				}
				if err := send(c, note{What: "read ahead"}, nil); err != nil {
					return err
				}
			}
			select {} // until this process is killed
		}
		return nil
	}
	r.hook(hook)
	names.hook(hook)
	opt := Options{Dataset: "served", Mode: o.Mode, Leases: 8}
	var m *Server
	if o.Resume {
		_, p, err := receive(c)
		if err != nil {
			return err
		}
		if o.Names {
			m, err = ResumeNames(context.Background(), p, names, opt)
		} else {
			m, err = Resume(context.Background(), p, s, r, opt)
		}
		if err != nil {
			return err
		}
	} else if o.Names {
		if m, err = MountNames(context.Background(), o.Path, names, opt); err != nil {
			return err
		}
	} else if m, err = Mount(context.Background(), o.Path, s, r, opt); err != nil {
		return err
	}
	mounted <- m
	p, err := m.Park()
	if err != nil {
		return err
	}
	if err := send(c, note{What: "parked", Settings: p.Settings}, p); err != nil {
		return err
	}
	p.Close()
	if _, _, err := receive(c); err == nil {
		return m.Unmount()
	}
	return nil // the parent is gone: leave without an unmount
}
