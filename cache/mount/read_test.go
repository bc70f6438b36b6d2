package mount

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
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
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
)

func readErr(path string) error {
	_, err := os.ReadFile(path)
	return err
}

func TestReadFailuresHaveTheirErrnoAndALogLine(t *testing.T) {
	all := files{"a": content("a", 300_000), "dir/b": content("b", 10)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	var log logs
	m := mounted(t, s, r, Options{Logger: log.logger()})
	hasty := mounted(t, s, r, Options{Logger: log.logger(), ReadTimeout: 20 * time.Millisecond})
	for _, c := range []struct {
		name string
		fail func(ctx context.Context) error
		want unix.Errno
		log  []string
	}{
		{"changed", func(context.Context) error { return fmt.Errorf("%s/a: %w", bucketURL, source.ErrChanged) }, unix.EIO,
			[]string{"changed in the bucket", "s3://bucket/a", "path=/a", "newer listing"}},
		{"deleted", func(context.Context) error { return fmt.Errorf("%s/a: %w", bucketURL, source.ErrNotFound) }, unix.EIO,
			[]string{"changed in the bucket", "s3://bucket/a"}},
		{"denied", func(context.Context) error { return fmt.Errorf("%s/a: %w", bucketURL, source.ErrDenied) }, unix.EACCES,
			[]string{"access denied"}},
		{"unavailable", func(context.Context) error { return source.ErrUnavailable }, unix.EIO, []string{"store unavailable"}},
		{"anything", func(context.Context) error { return errors.New("no idea") }, unix.EIO, []string{"no idea"}},
		{"blocked till the deadline", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, unix.ETIMEDOUT, []string{"deadline"}},
		{"panic", func(context.Context) error { panic("a bug") }, unix.EIO, []string{"bug: ", "a bug"}},
	} {
		before := log.String()
		m := m
		if c.want == unix.ETIMEDOUT {
			m = hasty
		}
		r.hook(func(ctx context.Context, _ string, _ int64) error { return c.fail(ctx) })
		// The kernel reads ahead, and reads again what that did not bring: two requests fail or more.
		if err := readErr(filepath.Join(m.Dir(), "a")); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		text := strings.TrimPrefix(log.String(), before)
		for _, want := range c.log {
			if !strings.Contains(text, want) {
				t.Errorf("%s: no %q in the log:\n%s", c.name, want, text)
			}
		}
		m.fs.limit.SetBurst(1000) // the next case wants its line too
		m.fs.limit.SetLimit(1000)
	}
	r.hook(func(context.Context, string, int64) error { return nil })
	if err := sameBytes(filepath.Join(m.Dir(), "a"), all["a"]); err != nil {
		t.Errorf("after the failures: %v", err)
	}
	st := m.Stats()
	if st.Changed < 2 || st.Errors["EIO"] < 4 || st.Errors["EACCES"] < 1 || hasty.Stats().Errors["ETIMEDOUT"] < 1 {
		t.Errorf("%+v", st)
	}
}

func TestChangedObjectIsNeverAMixture(t *testing.T) {
	// The first half is read, then the object changes: the second half fails, also when the first is asked for
	// together with it.
	all := files{"f": content("f", 4<<20)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	m := mounted(t, s, r, Options{})
	f, err := os.Open(filepath.Join(m.Dir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1000)
	if _, err := f.ReadAt(buf, 0); err != nil || !bytes.Equal(buf, all["f"][:1000]) {
		t.Fatal(err)
	}
	r.hook(func(context.Context, string, int64) error { return source.ErrChanged })
	if n, err := f.ReadAt(buf, 3<<20); !errors.Is(err, unix.EIO) || n != 0 {
		t.Errorf("%d %v", n, err)
	}
}

func TestShortReaderIsAnError(t *testing.T) {
	// A reader that has less than the snapshot says must not look like the end of the file, nor like zeros.
	all := files{"f": content("f", 100_000)}
	s := snapshotOf(t, all)
	r := newMemory(s, files{"f": all["f"][:50_000]})
	m := mounted(t, s, r, Options{})
	b, err := os.ReadFile(filepath.Join(m.Dir(), "f"))
	if !errors.Is(err, unix.EIO) || len(b) > 50_000 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func TestLogOfFailuresIsLimited(t *testing.T) {
	all := files{"f": content("f", 10)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	r.hook(func(context.Context, string, int64) error { return errors.New("broken") })
	var log logs
	m := mounted(t, s, r, Options{Logger: log.logger()})
	for range 500 {
		if err := readErr(filepath.Join(m.Dir(), "f")); !errors.Is(err, unix.EIO) {
			t.Fatal(err)
		}
	}
	if n := strings.Count(log.String(), "broken"); n == 0 || n > 250 {
		t.Errorf("%d lines for 500 failures", n)
	}
}

func TestKilledReaderDoesNotWait(t *testing.T) {
	all := files{"f": content("f", 10)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	asked := make(chan struct{}, 100)
	r.hook(func(ctx context.Context, _ string, _ int64) error {
		asked <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	})
	m := mounted(t, s, r, Options{ReadTimeout: time.Hour, blindGrace: time.Hour}) // it would wait for that long
	for _, flags := range []int{0, unix.O_DIRECT} {
		c := command(t, "read", order{Path: filepath.Join(m.Dir(), "f"), Flags: flags})
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		<-asked
		kill(t, m, c, "its read")
	}
}

// kill kills a process that waits for the mount, which must end it.
func kill(t *testing.T, m *Server, c *exec.Cmd, what string) {
	t.Helper()
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Errorf("a killed process still waits for %s", what)
		abort(m.dev.minor)
	}
}

// Each direct read has a buffer of its own here, and the kernel sends as many as there are readers.
func TestDirectReadsWaitForTheirTurn(t *testing.T) {
	all := files{"f": content("f", 10), "g": content("g", 10), "h": content("h", 10)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	goon := make(chan struct{})
	var mu sync.Mutex
	under, most := 0, 0
	r.hook(func(ctx context.Context, path string, _ int64) error {
		if path != "f" {
			return nil
		}
		mu.Lock()
		under++
		most = max(most, under)
		mu.Unlock()
		defer func() { mu.Lock(); under--; mu.Unlock() }()
		select {
		case <-goon:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	m := mounted(t, s, r, Options{ReadTimeout: time.Hour})
	path := filepath.Join(m.Dir(), "f")
	const readers = maxDirect + 3
	got := make(chan error, readers)
	for range readers {
		go func() {
			b, err := readDirect(path, len(all["f"]))
			if err == nil && !bytes.Equal(b, all["f"]) {
				err = fmt.Errorf("read %x", b)
			}
			got <- err
		}()
	}
	eventually(t, "all have asked", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return m.Stats().Reads == readers && under >= maxDirect
	})
	// One whose turn has not come can be killed, and neither who does not read directly waits, nor who reads another file.
	c := command(t, "read", order{Path: path, Flags: unix.O_DIRECT})
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another has asked", func() bool { return m.Stats().Reads == readers+1 })
	kill(t, m, c, "its turn")
	if b, err := os.ReadFile(filepath.Join(m.Dir(), "g")); err != nil || !bytes.Equal(b, all["g"]) {
		t.Errorf("g: %x, %v", b, err)
	}
	if b, err := readDirect(filepath.Join(m.Dir(), "h"), len(all["h"])); err != nil || !bytes.Equal(b, all["h"]) {
		t.Errorf("h, of another group: %x, %v", b, err)
	}
	close(goon)
	for range readers {
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
	if most != maxDirect {
		t.Errorf("%d direct reads at once, want %d", most, maxDirect)
	}
}

func TestDropPages(t *testing.T) {
	page := os.Getpagesize()
	resident := func(b []byte) (n int) { // pages that lie within b
		t.Helper()
		start := int(-uintptr(unsafe.Pointer(&b[0])) % uintptr(page))
		b = b[start : start+(len(b)-start)/page*page]
		vec := make([]byte, len(b)/page)
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&vec[0]))); errno != 0 {
			t.Fatal(errno)
		}
		for _, v := range vec {
			n += int(v & 1)
		}
		return n
	}
	for _, c := range []struct{ from, length int }{{0, 1 << 20}, {1, 1 << 20}, {100, 3 * page}} {
		whole := bytes.Repeat([]byte{1}, c.from+c.length+page)
		b := whole[c.from : c.from+c.length : c.from+c.length]
		before := resident(b)
		dropPages(b[:1]) // what it has room for is meant
		if after := resident(b); before == 0 || after != 0 {
			t.Errorf("%d bytes from %d: %d pages of memory before, %d after", c.length, c.from, before, after)
		}
		if end := whole[c.from+c.length:]; bytes.IndexByte(whole[:c.from], 0) >= 0 || bytes.IndexByte(end, 0) >= 0 {
			t.Errorf("%d bytes from %d: what is around them is gone", c.length, c.from)
		}
	}
	for _, small := range [][]byte{nil, make([]byte, 1), make([]byte, page-1)} {
		dropPages(small) // there is no whole page in it
	}
}

func TestSignalDoesNotFailARead(t *testing.T) {
	all := files{"f": content("f", 10)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	asked, goon := make(chan struct{}, 100), make(chan struct{})
	r.hook(func(ctx context.Context, _ string, _ int64) error {
		asked <- struct{}{}
		select {
		case <-goon:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	patient := mounted(t, s, r, Options{grace: time.Hour})
	hasty := mounted(t, s, r, Options{grace: time.Millisecond})
	// Reads through the page cache wait for the page, which no signal ends. Direct ones wait for us.
	for _, c := range []struct {
		slow bool
		want string
	}{{false, "1 \n"}, {true, "-1 EINTR\n"}} {
		m := patient
		if c.slow {
			m = hasty
		}
		cmd := command(t, "read", order{Path: filepath.Join(m.Dir(), "f"), Flags: unix.O_DIRECT})
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-asked
		// Every thread gets the signal, so that the one that waits does. Then the read ends soon; or later
		// than the grace, and the program gets to decide.
		signalAll(cmd.Process.Pid)
		if !c.slow {
			time.AfterFunc(10*time.Millisecond, func() { goon <- struct{}{} })
		}
		if err := cmd.Wait(); err != nil || out.String() != c.want {
			t.Errorf("slow %v: %q, want %q: %v", c.slow, out.String(), c.want, err)
		}
	}
}

// A server in a PID namespace of its own, as one in a pod is, does not see who sends a request.
func TestSignalDoesNotFailAReadOfWhoCannotBeSeen(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	cleanMount(t, dir)
	server := command(t, "blind", order{Path: dir})
	server.SysProcAttr.Cloneflags = unix.CLONE_NEWPID
	tell, err := server.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	says, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer server.Wait()
	defer server.Process.Kill()
	defer time.AfterFunc(patience, func() { server.Process.Kill() }).Stop()
	lines := bufio.NewScanner(says)
	expect := func(want string) {
		t.Helper()
		if lines.Scan(); lines.Text() != want {
			t.Fatalf("the server said %q, not %q", lines.Text(), want)
		}
	}
	expect("mounted")
	// A direct read would be told EINTR, and a page fault SIGBUS, which Go's own signals did to those that wait.
	for what, want := range map[string]string{"read": "1 \n", "fault": fmt.Sprintf("%x\n", content("f", 10)[0])} {
		cmd, out := command(t, what, order{Path: filepath.Join(dir, "f"), Flags: unix.O_DIRECT}), new(bytes.Buffer)
		cmd.Stdout = out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		expect("asked")
		signalAll(cmd.Process.Pid)
		for range 3 { // it has had the grace of who can be seen, twice
			expect("goes on")
		}
		fmt.Fprintln(tell)
		if err := cmd.Wait(); err != nil || out.String() != want {
			t.Errorf("%s: %q, want %q: %v", what, out.String(), want, err)
		}
	}
}

// A process that was killed and cannot be seen waits for a while, and no longer.
func TestWhoCannotBeSeenDoesNotWaitForEver(t *testing.T) {
	conn, other, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	defer other.Close()
	looks := 0
	f := &fileSystem{ctx: t.Context(), conn: conn, opt: Options{ReadTimeout: time.Hour, grace: time.Millisecond, blindGrace: 20 * time.Millisecond, goesOn: func() { looks++ }}}
	cancel := make(chan struct{})
	close(cancel)
	for name, bound := range map[string]func(<-chan struct{}, uint32) (context.Context, func()){"read": f.requestContext, "names": f.patientContext} {
		ctx, stop := bound(cancel, 0)
		select {
		case <-ctx.Done():
		case <-time.After(patience):
		}
		cause := context.Cause(ctx)
		if stop(); cause != errInterrupted || looks == 0 {
			t.Errorf("%s: %v after %d looks", name, cause, looks)
		}
		looks = 0
	}
}

// signalAll sends SIGUSR1 to every thread of a process.
func signalAll(pid int) {
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, task := range tasks {
		var tid int
		fmt.Sscan(task.Name(), &tid)
		_ = unix.Tgkill(pid, tid, unix.SIGUSR1)
	}
}

func TestWaysToReadAFile(t *testing.T) {
	all := files{"f": content("f", 3<<20+123), "g": content("g", 4097)}
	s := snapshotOf(t, all)
	for _, mode := range []Mode{NoOpen, Passthrough} {
		r := newLeasing(t, s, all)
		m := mounted(t, s, r, Options{Mode: mode, IdleTime: time.Hour})
		if mode == Passthrough {
			needPassthrough(t, m)
		}
		for name, want := range all {
			path := filepath.Join(m.Dir(), name)
			for _, way := range []struct {
				name string
				read func() ([]byte, error)
			}{
				{"O_DIRECT", func() ([]byte, error) { return readDirect(path, len(want)) }},
				{"sendfile", func() ([]byte, error) { return readSendfile(path) }},
				{"splice", func() ([]byte, error) { return readSplice(path) }},
				{"preadv", func() ([]byte, error) { return readVectors(path, len(want)) }},
				{"copy_file_range", func() ([]byte, error) { return readCopy(t, path, len(want)) }},
				{"by bytes", func() ([]byte, error) { return readBytes(path, 4097) }},
			} {
				got, err := way.read()
				if err != nil || !bytes.Equal(got, want[:min(len(got), len(want))]) || len(got) != len(want) && way.name != "by bytes" {
					t.Errorf("%v: %s by %s: %d bytes of %d, %v", mode, name, way.name, len(got), len(want), err)
				}
			}
			out, err := command(t, "mmap", order{Path: path}).Output()
			if sum := fmt.Sprintf("%x\n", sha256.Sum256(want)); err != nil || string(out) != sum+sum {
				t.Errorf("%v: %s by mmap: %s, %v", mode, name, out, err)
			}
		}
		if mode == Passthrough {
			i, _ := s.Lookup("/f")
			if m.Stats().PassthroughOpens == 0 || tableEntry(t, m, i).backing == 0 {
				t.Error("nothing was passed through")
			}
		}
	}
}

func readDirect(path string, size int) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// Aligned memory, as O_DIRECT on a disk would want it.
	buf, err := unix.Mmap(-1, 0, (size+8192)&^4095, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(buf)
	n := 0
	for {
		k, err := unix.Pread(fd, buf[n:], int64(n))
		if err != nil {
			return nil, err
		}
		if k == 0 {
			return bytes.Clone(buf[:n]), nil
		}
		n += k
	}
}

// readSendfile sends a file over TCP as a web server would.
func readSendfile(path string) ([]byte, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		f, err := os.Open(path)
		if err != nil {
			return
		}
		defer f.Close()
		_, _ = io.Copy(c, f)
	})
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return io.ReadAll(c)
}

func readSplice(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	defer w.Close()
	var all []byte
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Splice(int(f.Fd()), nil, int(w.Fd()), nil, len(buf), 0)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return all, nil
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return nil, err
		}
		all = append(all, buf[:n]...)
	}
}

func readVectors(path string, size int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all := make([]byte, size)
	for off := 0; off < size; {
		mid := off + (size-off)/3
		n, err := unix.Preadv(int(f.Fd()), [][]byte{all[off:mid], all[mid:]}, int64(off))
		if err != nil || n == 0 {
			return all[:off], err
		}
		off += n
	}
	return all, nil
}

func readCopy(t *testing.T, path string, size int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out, err := os.Create(filepath.Join(t.TempDir(), "copy"))
	if err != nil {
		return nil, err
	}
	defer out.Close()
	if _, err := io.Copy(out, f); err != nil { // copy_file_range where the kernel can
		return nil, err
	}
	all := make([]byte, size+1)
	n, err := out.ReadAt(all, 0)
	if err == io.EOF {
		err = nil
	}
	return all[:n], err
}

func readBytes(path string, n int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []byte
	b := make([]byte, 1)
	for range n {
		k, err := f.Read(b)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		all = append(all, b[:k]...)
	}
	return all, nil
}

func TestPageCacheIsKeptOverOpens(t *testing.T) {
	all := files{"f": content("f", 700_000)}
	s := snapshotOf(t, all)
	for _, mode := range []Mode{NoOpen, Passthrough} {
		r := newMemory(s, all)
		m := mounted(t, s, r, Options{Mode: mode})
		path := filepath.Join(m.Dir(), "f")
		if err := sameBytes(path, all["f"]); err != nil {
			t.Fatal(err)
		}
		n := r.reads.Load()
		for range 5 {
			if err := sameBytes(path, all["f"]); err != nil {
				t.Fatal(err)
			}
		}
		if again := r.reads.Load(); again != n {
			t.Errorf("%v: %d reads for the first time, %d more for five times again", mode, n, again-n)
		}
	}
}

func TestReadAheadIsRaised(t *testing.T) {
	all := files{"f": content("f", 8<<20)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	m := mounted(t, s, r, Options{Mode: NoOpen})
	b, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", m.dev.major, m.dev.minor))
	if err != nil {
		t.Skipf("needs /sys: %v", err)
	}
	if strings.TrimSpace(string(b)) != "1024" {
		t.Skipf("needs a writable /sys: read-ahead is %s", b)
	}
	if err := sameBytes(filepath.Join(m.Dir(), "f"), all["f"]); err != nil {
		t.Fatal(err)
	}
	if n := r.reads.Load(); n > 24 {
		t.Errorf("%d requests for 8 MiB", n)
	}
}

func TestForgetAfterTheLastClose(t *testing.T) {
	all := files{"large": content("large", 2<<20), "small": content("small", 10)}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	m := mounted(t, s, r, Options{Mode: Passthrough})
	large, _ := s.Lookup("/large")
	a, err := os.Open(filepath.Join(m.Dir(), "large"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.Open(filepath.Join(m.Dir(), "large"))
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	eventually(t, "one handle is left", func() bool { return tableEntry(t, m, large).opens == 1 })
	if r.forgotten(large) != 0 {
		t.Error("forgotten while it is open")
	}
	b.Close()
	eventually(t, "the file is forgotten", func() bool { return r.forgotten(large) == 1 })
	if err := sameBytes(filepath.Join(m.Dir(), "small"), all["small"]); err != nil {
		t.Fatal(err)
	}
	small, _ := s.Lookup("/small")
	eventually(t, "the small file is forgotten", func() bool { return r.forgotten(small) == 1 })
}

func TestManyReadersAtOnce(t *testing.T) {
	all := awkwardFiles()
	s := snapshotOf(t, all)
	m := mounted(t, s, newLeasing(t, s, all), Options{Mode: Passthrough, IdleTime: 20 * time.Millisecond, IdleLeases: 2})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for name, want := range all {
				if err := sameBytes(filepath.Join(m.Dir(), name), want); err != nil {
					t.Error(err)
				}
			}
			if _, err := os.ReadDir(filepath.Join(m.Dir(), "sizes")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	checkQuiet(t, m)
}

// checkQuiet waits until no handle counts as open.
func checkQuiet(t *testing.T, m *Server) {
	t.Helper()
	eventually(t, "no file counts as open", func() bool {
		open := 0
		if err := m.fs.table.lock(context.Background()); err != nil {
			t.Fatal(err)
		}
		m.fs.table.each(func(_ catalog.Index, s *slot) { open += int(s.opens) })
		m.fs.table.unlock()
		return open == 0
	})
}
