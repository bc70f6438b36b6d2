package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// server is a child that serves.
type server struct {
	cmd  *exec.Cmd
	conn *net.UnixConn
}

// startServer starts a server child; with p it takes that over.
func startServer(t *testing.T, o order, p *Parked) (*server, *Parked) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	o.Resume = p != nil
	s := &server{command(t, "serve", o), c.(*net.UnixConn)}
	s.cmd.ExtraFiles = []*os.File{theirs}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	t.Cleanup(func() { s.kill() })
	if p != nil {
		if err := send(s.conn, note{What: "resume", Settings: p.Settings}, p); err != nil {
			t.Fatal(err)
		}
	}
	return s, s.expect(t, "parked")
}

func (s *server) expect(t *testing.T, what string) *Parked {
	t.Helper()
	_ = s.conn.SetReadDeadline(time.Now().Add(patience))
	n, p, err := receive(s.conn)
	if err != nil || n.What != what {
		t.Fatalf("server said %q, not %q: %v", n.What, what, err)
	}
	if p != nil {
		t.Cleanup(p.Close)
	}
	return p
}

func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// cleanMount takes a mount that other processes serve away whatever happens.
func cleanMount(t *testing.T, dir string) {
	t.Cleanup(func() {
		at, _ := mountinfo.At(dir)
		for _, a := range at {
			if a.Type == FSType {
				abort(a.Minor)
				_ = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			}
		}
	})
}

func TestResumeByAnotherProcessAfterKillWithReadInFlight(t *testing.T) {
	needFUSE(t)
	for name, o := range map[string]order{"passthrough": {Mode: Passthrough}, "no-open": {Mode: NoOpen}, "names": {Mode: NoOpen, Names: true}} {
		t.Run(name, func(t *testing.T) {
			all := served()
			dir := t.TempDir()
			cleanMount(t, dir)
			mode := o.Mode
			o := order{Path: dir, Mode: mode, Names: o.Names, Dir: tmpfs(t), Block: "slow"}
			first, parked := startServer(t, o, nil)
			// A handle that passes through, if the mode has any; one that does not; a directory that is half read.
			big, err := os.Open(filepath.Join(dir, "big"))
			if err != nil {
				t.Fatal(err)
			}
			defer big.Close()
			small, err := os.Open(filepath.Join(dir, "small"))
			if err != nil {
				t.Fatal(err)
			}
			defer small.Close()
			list, err := os.Open(filepath.Join(dir, "dir"))
			if err != nil {
				t.Fatal(err)
			}
			defer list.Close()
			names, err := list.Readdirnames(3)
			if err != nil {
				t.Fatal(err)
			}
			// And a read on its way.
			slow := make(chan error, 1)
			go func() { slow <- sameBytes(filepath.Join(dir, "slow"), all["slow"]) }()
			first.expect(t, "blocked")
			first.kill()
			// Nobody serves now. A passthrough handle does not notice; everything else waits.
			if mode == Passthrough {
				if err := sameAt(big, all["big"]); err != nil {
					t.Errorf("while nobody serves: %v", err)
				}
			}
			waiting := make(chan error, 1)
			go func() { waiting <- sameBytes(filepath.Join(dir, "other"), all["other"]) }()

			o.Block = ""
			second, parkedAgain := startServer(t, o, parked)
			for what, c := range map[string]chan error{"in flight": slow, "begun while nobody served": waiting} {
				select {
				case err := <-c:
					if err != nil {
						t.Errorf("read %s: %v", what, err)
					}
				case <-time.After(patience):
					t.Fatalf("read %s never ended", what)
				}
			}
			check := func(when string) {
				t.Helper()
				if err := errors.Join(sameAt(big, all["big"]), sameAt(small, all["small"])); err != nil {
					t.Errorf("%s: handles from before: %v", when, err)
				}
				var wg sync.WaitGroup
				for name, want := range all {
					for range 2 {
						wg.Go(func() {
							if err := sameBytes(filepath.Join(dir, name), want); err != nil {
								t.Errorf("%s: %v", when, err)
							}
						})
					}
				}
				wg.Wait()
			}
			check("resumed")
			more, err := list.Readdirnames(-1)
			if err != nil || len(names)+len(more) != 50 {
				t.Errorf("directory: %d and %d names, %v", len(names), len(more), err)
			}
			// Once more, into this process, which can be looked into.
			second.kill()
			s := snapshotOf(t, all)
			r := &leasing{memory: newMemory(s, all), dir: o.Dir}
			last := Options{Dataset: "served", IdleTime: time.Hour, IdleLeases: 10}
			var m *Server
			if o.Names {
				m, err = ResumeNames(context.Background(), parkedAgain, newChanging(all), last)
			} else {
				m, err = Resume(context.Background(), parkedAgain, s, r, last)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer end(t, m)
			if m.Mode() != mode {
				t.Errorf("resumed in mode %v", m.Mode())
			}
			check("resumed twice")
			if mode == Passthrough && m.fs.pass.available() {
				i, _ := s.Lookup("/big")
				eventually(t, "only the old handle is left", func() bool { return tableEntry(t, m, i).opens == 1 })
				e := tableEntry(t, m, i)
				if e.backing == 0 {
					t.Error("the file is not passed through")
				}
				big.Close()
				eventually(t, "no handle is left", func() bool { return tableEntry(t, m, i).opens == 0 })
				m.fs.pass.sweep(time.Now().Add(2*time.Hour), 10)
				if e := tableEntry(t, m, i); e.backing != 0 {
					t.Error("the backing id of the first server is still registered")
				}
				if err := sameBytes(filepath.Join(dir, "big"), all["big"]); err != nil {
					t.Error(err)
				}
			}
			big.Close()
			small.Close()
			list.Close()
			if err := m.Unmount(); err != nil {
				t.Error(err)
			}
			m.Wait()
		})
	}
}

// tableEntry looks into the table.
func tableEntry(t *testing.T, m *Server, i catalog.Index) slot {
	t.Helper()
	if err := m.fs.table.lock(context.Background()); err != nil {
		t.Fatal(err)
	}
	defer m.fs.table.unlock()
	return *m.fs.table.at(i)
}

func sameBytes(path string, want []byte) error {
	got, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s: wrong bytes", path)
	}
	return nil
}

func sameAt(f *os.File, want []byte) error {
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	got := make([]byte, len(want)+1)
	n, err := f.ReadAt(got, 0)
	if err != io.EOF || !bytes.Equal(got[:n], want) {
		return fmt.Errorf("%s: %d bytes, want %d, %w", f.Name(), n, len(want), err)
	}
	return nil
}

// Two servers answer while one hands over to the other.
func TestTwoServersShareAMountWhileHandingOver(t *testing.T) {
	needFUSE(t)
	all := served()
	dir := t.TempDir()
	cleanMount(t, dir)
	o := order{Path: dir, Mode: Passthrough, Dir: tmpfs(t)}
	first, parked := startServer(t, o, nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var rounds sync.Map
	for w := range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				rounds.Store(w, n)
				for _, name := range []string{"big", "other", "small", "dir/f07"} {
					if err := sameBytes(filepath.Join(dir, name), all[name]); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	progress := func() {
		t.Helper()
		for w := range 4 {
			before, _ := rounds.Load(w)
			eventually(t, "the readers go on", func() bool { now, _ := rounds.Load(w); return now != before || t.Failed() })
		}
	}
	progress()
	second, parkedAgain := startServer(t, o, parked) // both serve
	progress()
	is := func(p *Parked, want bool) {
		t.Helper()
		if served, err := p.Served(); err != nil || served != want {
			t.Errorf("served: %v, %v", served, err)
		}
	}
	is(parkedAgain, true)
	first.kill()
	progress()
	third, parked := startServer(t, o, parkedAgain)
	progress()
	second.kill()
	progress()
	eventually(t, "the last one is in charge", func() bool { served, err := parked.Served(); return err == nil && served })
	close(stop)
	wg.Wait()
	if err := send(third.conn, note{What: "unmount"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := third.cmd.Wait(); err != nil {
		t.Errorf("last server: %v", err)
	}
	is(parked, false)
	if at, err := mountinfo.At(dir); err != nil || len(at) != 0 {
		t.Errorf("still mounted: %v %v", at, err)
	}
}

func TestResumeRefusesWhatDoesNotFit(t *testing.T) {
	needFUSE(t)
	all := served()
	s := snapshotOf(t, all)
	other := snapshotOf(t, files{"x": []byte("y")})
	m := mounted(t, s, newMemory(s, all), Options{})
	null := func() *os.File {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	for _, c := range []struct {
		want  string
		spoil func(p *Parked) *catalog.Snapshot
	}{
		{"shows the snapshot", func(*Parked) *catalog.Snapshot { return other }},
		{"unknown", func(p *Parked) *catalog.Snapshot { p.Settings.Mode = Auto; return s }},
		{"kernel's settings", func(p *Parked) *catalog.Snapshot { p.Settings.Kernel = p.Settings.Kernel[:10]; return s }},
		{"not an INIT", func(p *Parked) *catalog.Snapshot { clear(p.Settings.Kernel); return s }},
		{"make no sense", func(p *Parked) *catalog.Snapshot { p.Settings.MaxWrite = 0; return s }},
		{"not one of /dev/fuse", func(p *Parked) *catalog.Snapshot { p.Conn.Close(); p.Conn = null(); return s }},
		{"not a sealed memfd", func(p *Parked) *catalog.Snapshot { p.Table.Close(); p.Table = null(); return s }},
		{"missing", func(p *Parked) *catalog.Snapshot { p.Table.Close(); p.Table = nil; return s }},
	} {
		p, err := m.Park()
		if err != nil {
			t.Fatal(err)
		}
		snap := c.spoil(p)
		if _, err := Resume(context.Background(), p, snap, newMemory(s, all), Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v, want one with %q", err, c.want)
		}
	}
	if err := sameBytes(filepath.Join(m.Dir(), "small"), all["small"]); err != nil {
		t.Error(err)
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Park(); err == nil {
		t.Error("an unmounted mount can be parked")
	}
}
