package mount

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// changing are the names of a dataset that a test puts and deletes.
type changing struct {
	mu   sync.Mutex
	all  files
	page int // names in an answer; zero: all

	before atomic.Pointer[func(ctx context.Context, path string, off int64) error]
	asked  atomic.Int64
}

func newChanging(all files) *changing { return &changing{all: maps.Clone(all)} }

func (c *changing) hook(f func(ctx context.Context, path string, off int64) error) {
	c.before.Store(&f)
}

func (c *changing) put(path string, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all[path] = data
}

func (c *changing) delete(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.all, path)
}

func versionOf(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

func (c *changing) fail(ctx context.Context, path string, off int64) error {
	if f := c.before.Load(); f != nil {
		return (*f)(ctx, path, off)
	}
	return nil
}

func (c *changing) Lookup(ctx context.Context, path string) (wire.Name, error) {
	c.asked.Add(1)
	if err := c.fail(ctx, "lookup "+path, 0); err != nil {
		return wire.Name{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if data, ok := c.all[path]; ok {
		return wire.Name{Size: int64(len(data)), Version: versionOf(data), ModTime: created}, nil
	}
	for name := range c.all {
		if strings.HasPrefix(name, path+"/") {
			return wire.Name{Dir: true}, nil
		}
	}
	return wire.Name{}, fmt.Errorf("%s: %w", path, source.ErrNotFound)
}

func (c *changing) List(ctx context.Context, folder, after string) (wire.Names, error) {
	if err := c.fail(ctx, "list "+folder, 0); err != nil {
		return wire.Names{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if folder != "" {
		folder += "/"
	}
	found := map[string]wire.Name{}
	for path, data := range c.all {
		if rest, ok := strings.CutPrefix(path, folder); ok {
			if name, _, below := strings.Cut(rest, "/"); below {
				found[name+"/"] = wire.Name{Name: name, Dir: true}
			} else {
				found[name] = wire.Name{Name: name, Size: int64(len(data)), Version: versionOf(data), ModTime: created}
			}
		}
	}
	var out wire.Names
	for _, key := range slices.Sorted(maps.Keys(found)) {
		if key <= after {
			continue
		}
		if c.page > 0 && len(out.Names) == c.page {
			last := out.Names[len(out.Names)-1]
			if out.After = last.Name; last.Dir {
				out.After += "/"
			}
			break
		}
		out.Names = append(out.Names, found[key])
	}
	return out, nil
}

func (c *changing) ReadAt(ctx context.Context, path, version string, p []byte, off int64) (int, error) {
	if err := c.fail(ctx, path, off); err != nil {
		return 0, err
	}
	c.mu.Lock()
	data, ok := c.all[path]
	c.mu.Unlock()
	switch {
	case !ok:
		return 0, fmt.Errorf("%s: %w", path, source.ErrNotFound)
	case versionOf(data) != version:
		return 0, fmt.Errorf("%s: %w", path, source.ErrChanged)
	}
	return copy(p, data[off:]), nil
}

func mountedNames(t testing.TB, n Names, o Options) *Server {
	t.Helper()
	needFUSE(t)
	l := &logs{}
	o.Logger, o.Dataset = l.logger(), "test"
	m, err := MountNames(context.Background(), t.TempDir(), n, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("the mount's log:\n" + l.String())
		}
		end(t, m)
	})
	return m
}

func TestNamesAreShownAsTheyAre(t *testing.T) {
	c := newChanging(files{"a": []byte("first"), "deep/er/b": content("b", 3<<20), "empty": nil})
	m := mountedNames(t, c, Options{})
	at := func(name string) string { return filepath.Join(m.Dir(), name) }
	for name, data := range map[string][]byte{"a": c.all["a"], "deep/er/b": c.all["deep/er/b"], "empty": nil} {
		if err := sameBytes(at(name), data); err != nil {
			t.Error(err)
		}
	}
	// What was not there is there as soon as it is put, also below folders that were not.
	if _, err := os.Stat(at("new/folder/x")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("before it is put: %v", err)
	}
	c.put("new/folder/x", []byte("put"))
	if err := sameBytes(at("new/folder/x"), []byte("put")); err != nil {
		t.Error(err)
	}
	if names := names(t, m.Dir()); !slices.Equal(names, []string{"a", "deep", "empty", "new"}) {
		t.Errorf("listed %q", names)
	}
	// What is replaced is another file, soon; who has the old one open never reads the new one.
	old, err := os.Open(at("deep/er/b"))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	before := c.all["deep/er/b"]
	head := make([]byte, 10)
	if _, err := old.ReadAt(head, 0); err != nil || !bytes.Equal(head, before[:10]) {
		t.Fatalf("%x, %v", head, err)
	}
	next := content("another", 4<<20)
	c.put("deep/er/b", next)
	eventually(t, "the name is the new version", func() bool { return sameBytes(at("deep/er/b"), next) == nil })
	got, err := io.ReadAll(io.NewSectionReader(old, 0, 5<<20))
	if !bytes.Equal(got, before[:len(got)]) {
		t.Error("an open file gave bytes of another version")
	}
	if len(got) < len(before) && !errors.Is(err, unix.EIO) {
		t.Errorf("%d of %d bytes of what was replaced, %v", len(got), len(before), err)
	}
	if st, err := old.Stat(); err != nil || st.Size() != int64(len(before)) {
		t.Errorf("an open file has another size: %v %v", st, err)
	}
	// What is deleted goes, with its folder.
	c.delete("new/folder/x")
	eventually(t, "what was deleted goes", func() bool {
		_, err := os.Stat(at("new"))
		_, inside := os.Stat(at("new/folder/x"))
		return errors.Is(err, os.ErrNotExist) && errors.Is(inside, os.ErrNotExist)
	})
	if names := names(t, m.Dir()); !slices.Equal(names, []string{"a", "deep", "empty"}) {
		t.Errorf("listed %q", names)
	}
	// A file takes a folder's name, and the other way round.
	c.delete("deep/er/b")
	c.put("deep", []byte("a file now"))
	c.delete("a")
	c.put("a/b", []byte("in a folder now"))
	eventually(t, "file and folder change places", func() bool {
		return sameBytes(at("deep"), []byte("a file now")) == nil && sameBytes(at("a/b"), []byte("in a folder now")) == nil
	})
}

// A server that was lent its connection shows names as others do.
func TestLentConnectionShowsNames(t *testing.T) {
	needAttach(t)
	c := newChanging(files{"dir/a": content("a", 2<<20)})
	dir, _, given := attached(t)
	m, err := ServeNames(context.Background(), given, c, Options{Dataset: "test"})
	if err != nil {
		t.Fatal(err)
	}
	servesItself(t, dir, m)
	if err := sameBytes(filepath.Join(dir, "dir/a"), c.all["dir/a"]); err != nil {
		t.Error(err)
	}
	c.put("dir/b", []byte("later"))
	if err := sameBytes(filepath.Join(dir, "dir/b"), []byte("later")); err != nil {
		t.Error(err)
	}
	if names := names(t, filepath.Join(dir, "dir")); !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("listed %q", names)
	}
	p, err := m.Park()
	if err != nil || p.Settings.Snapshot != Live || p.Settings.Mode != NoOpen {
		t.Fatalf("parked %+v, %v", p, err)
	}
	p.Close()
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// What is in a folder all the while is listed once, whatever comes and goes while it is read.
func TestAFolderThatChangesWhileItIsListed(t *testing.T) {
	all := files{}
	for i := range 3000 {
		all[fmt.Sprintf("dir/f%04d", 2*i)] = []byte{byte(i)}
	}
	for i := range 20 {
		all[fmt.Sprintf("dir/s%02d/x", i)] = []byte("x")
	}
	c := newChanging(all)
	c.page = 70
	m := mountedNames(t, c, Options{})
	d, err := os.Open(filepath.Join(m.Dir(), "dir"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	seen := map[string]int{}
	for i := 0; ; i++ {
		some, err := d.Readdirnames(100)
		for _, name := range some {
			seen[name]++
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("after %d names: %v; the mount counts %+v", len(seen), err, m.Stats())
		}
		c.put(fmt.Sprintf("dir/f%04d", 2*(i*173%3000)+1), []byte("new"))
		c.delete(fmt.Sprintf("dir/f%04d", 2*(i*97%3000)+1))
		c.put(fmt.Sprintf("dir/f%04d", 2*(i*11%3000)), fmt.Appendf(nil, "replaced %d", i))
	}
	for path := range all {
		name, _, _ := strings.Cut(strings.TrimPrefix(path, "dir/"), "/")
		if seen[name] != 1 {
			t.Errorf("%s is listed %d times", name, seen[name])
		}
	}
}

// Whoever lists a folder gets all of it, whatever signals it gets meanwhile.
func TestAListingGoesOnAfterSignals(t *testing.T) {
	_, cmd, out, answer := signalledListing(t)
	close(answer)
	if err := cmd.Wait(); err != nil || out.String() != "302 \n" {
		t.Errorf("listed %q, of 300 entries and two: %v", out, err)
	}
}

// Who is killed does not wait for the answer, also after signals that do not kill.
func TestAKilledListerDoesNotWait(t *testing.T) {
	m, cmd, _, _ := signalledListing(t)
	kill(t, m, cmd, "a listing")
}

// signalledListing is a process that waits for a listing, which comes once answer is closed, and has had signals
// meanwhile, for longer than the grace of other requests.
func signalledListing(t *testing.T) (m *Server, cmd *exec.Cmd, out *bytes.Buffer, answer chan struct{}) {
	all := files{}
	for i := range 300 {
		all[fmt.Sprintf("dir/f%03d", i)] = nil
	}
	c := newChanging(all)
	c.page = 100
	asked, looked, answer := make(chan struct{}, 100), make(chan struct{}, 3), make(chan struct{})
	c.hook(func(ctx context.Context, path string, _ int64) error {
		if path != "list dir" {
			return nil
		}
		asked <- struct{}{}
		select {
		case <-answer:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	m = mountedNames(t, c, Options{ReadTimeout: time.Hour, grace: time.Millisecond, goesOn: func() {
		select {
		case looked <- struct{}{}:
		default:
		}
	}})
	cmd, out = command(t, "list", order{Path: filepath.Join(m.Dir(), "dir")}), new(bytes.Buffer)
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-asked
	signalAll(cmd.Process.Pid)
	for range 3 { // it has had its grace by now, twice
		<-looked
	}
	return m, cmd, out, answer
}

func TestNamesThatCannotBeAsked(t *testing.T) {
	c := newChanging(files{"a": []byte("x"), "d/b": []byte("y")})
	m := mountedNames(t, c, Options{})
	for _, e := range []struct {
		err  error
		want unix.Errno
	}{{source.ErrUnavailable, unix.EIO}, {source.ErrDenied, unix.EACCES}, {os.ErrDeadlineExceeded, unix.ETIMEDOUT}} {
		c.hook(func(context.Context, string, int64) error { return e.err })
		if _, err := os.Stat(filepath.Join(m.Dir(), "a")); !errors.Is(err, e.want) {
			t.Errorf("%v: lookup says %v", e.err, err)
		}
		if _, err := os.ReadDir(m.Dir()); !errors.Is(err, e.want) {
			t.Errorf("%v: a listing says %v", e.err, err)
		}
	}
	c.hook(func(context.Context, string, int64) error { return nil })
	if err := sameBytes(filepath.Join(m.Dir(), "a"), []byte("x")); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if _, err := os.Stat(filepath.Join(m.Dir(), strings.Repeat("n", 256))); !errors.Is(err, unix.ENAMETOOLONG) {
		t.Errorf("a name of 256 bytes: %v", err)
	}
	if err := os.WriteFile(filepath.Join(m.Dir(), "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("a file is made: %v", err)
	}
	if err := os.Remove(filepath.Join(m.Dir(), "a")); !errors.Is(err, unix.EROFS) {
		t.Errorf("a file is removed: %v", err)
	}
}

// While two processes serve a mount, each knows the nodes that the other one told the kernel of.
func TestNamesThatAnotherServerTold(t *testing.T) {
	table, err := newTable(1 << 12)
	if err != nil {
		t.Fatal(err)
	}
	defer table.close()
	c := newChanging(files{"dir/a": nil, "dir/b": []byte("b"), "dir/c": nil})
	old, new := newLive(c, table, Options{}), newLive(c, table, Options{})
	f := &fileSystem{ctx: t.Context(), snap: new, live: new}
	dir, err := old.lookup(t.Context(), 0, "dir")
	if err != nil {
		t.Fatal(err)
	}
	if i, n, ok := f.node(nodeID(dir)); !ok || i != dir || n.Name != "dir" || !n.Dir {
		t.Errorf("node %d is %+v, %v", i, n, ok)
	}
	var told []catalog.Index
	if err := old.list(t.Context(), dir, 0, func(i catalog.Index) bool { told = append(told, i); return true }); err != nil || len(told) != 3 {
		t.Fatalf("%d names, %v", len(told), err)
	}
	var rest []string
	if err := new.list(t.Context(), dir, told[0], func(i catalog.Index) bool { rest = append(rest, new.path(i)); return true }); err != nil || !slices.Equal(rest, []string{"dir/b", "dir/c"}) {
		t.Errorf("after %s come %q, %v", old.path(told[0]), rest, err)
	}
	for _, id := range []uint64{0, nodeID(told[2]) + 1, 1<<32 + nodeID(dir)} {
		if i, n, ok := f.node(id); ok {
			t.Errorf("node id %d is %d, %+v", id, i, n)
		}
	}
	if err := new.list(t.Context(), dir, told[2]+1, func(catalog.Index) bool { return true }); !errors.Is(err, source.ErrInvalid) {
		t.Errorf("after a node that nobody told: %v", err)
	}
}

// A mount says so before it has no room for more names; when there is none, those that it has are told still.
func TestNoRoomForMoreNames(t *testing.T) {
	table, err := newTable(64) // of eight bytes
	if err != nil {
		t.Fatal(err)
	}
	defer table.close()
	l := newLive(newChanging(nil), table, Options{})
	worn := -1
	var nodes []catalog.Index
	for i := 0; ; i++ {
		got, err := l.enter(t.Context(), 0, []wire.Name{{Name: fmt.Sprintf("f%03d", i), Version: "v"}})
		if errors.Is(err, errFull) {
			break
		}
		if err != nil || i == 64 {
			t.Fatalf("name %d: %v", i, err)
		}
		nodes = append(nodes, got[0])
		if worn < 0 && l.worn() {
			worn = i
		}
	}
	if worn < len(nodes)/3 || worn > 2*len(nodes)/3 {
		t.Errorf("of %d names that have room it says so at %d", len(nodes), worn)
	}
	for i, want := range nodes {
		if got, err := l.enter(t.Context(), 0, []wire.Name{{Name: fmt.Sprintf("f%03d", i), Version: "v"}}); err != nil || got[0] != want {
			t.Errorf("name %d: node %d, not %d, %v", i, got, want, err)
		}
	}
}

// The mounts of a process share the memory of their names: none takes all of it, and it has back what ended.
func TestNamesOfAllMountsHaveOneRoom(t *testing.T) {
	shared := &nameMemory{most: 64 << 10}
	fill := func() (*live, int) {
		table, err := newTable(liveSlots)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(table.close)
		l, worn := newLive(newChanging(nil), table, Options{nameMemory: shared}), -1
		for i := range 10_000 {
			_, err := l.enter(t.Context(), 0, []wire.Name{{Name: fmt.Sprintf("f%03d", i), Version: "v"}})
			if errors.Is(err, errFull) {
				if worn < i/3 || worn > i*2/3 {
					t.Errorf("of %d names that have room it says so at %d", i, worn)
				}
				return l, i
			}
			if err != nil {
				t.Fatal(err)
			}
			if worn < 0 && l.worn() {
				worn = i
			}
		}
		t.Fatal("there is no end of room")
		return nil, 0
	}
	first, names := fill()
	if at := int64(names) * (recordHead + 5 + besideRecord); at < shared.most/3 || at > shared.most/2 {
		t.Errorf("%d names of one mount", names)
	}
	if _, n := fill(); n < names/3 || n > names*2/3 {
		t.Errorf("%d names of one mount, and %d of the next", names, n)
	}
	first.table.close()
	if _, n := fill(); n < names/2 {
		t.Errorf("%d names of the third, after the first with %d has ended", n, names)
	}
	// Who goes on with a mount has all of its names, and counts them.
	small := &nameMemory{most: 1 << 10}
	table, err := newTable(1 << 12)
	if err != nil {
		t.Fatal(err)
	}
	defer table.close()
	l := newLive(newChanging(nil), table, Options{nameMemory: shared})
	for i := range 64 {
		if _, err := l.enter(t.Context(), 0, []wire.Name{{Name: fmt.Sprint(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	next := newLive(newChanging(nil), table, Options{nameMemory: small})
	if err := next.inherit(t.Context()); err != nil || next.Len() != l.Len() || small.used < small.most || !next.worn() {
		t.Errorf("%d names, %d bytes, %v", next.Len(), small.used, err)
	}
	if _, err := next.enter(t.Context(), 0, []wire.Name{{Name: "more"}}); !errors.Is(err, errFull) {
		t.Errorf("one more: %v", err)
	}
}

func TestVersionsThatNoStoreHas(t *testing.T) {
	table, err := newTable(1 << 12)
	if err != nil {
		t.Fatal(err)
	}
	defer table.close()
	l := newLive(newChanging(nil), table, Options{})
	for length, want := range map[int]error{maxVersion: nil, maxVersion + 1: source.ErrInvalid} {
		if _, err := l.enter(t.Context(), 0, []wire.Name{{Name: "f", Version: strings.Repeat("v", length)}}); !errors.Is(err, want) {
			t.Errorf("a version of %d bytes: %v", length, err)
		}
	}
}

func TestParkedNamesThatMakeNoSense(t *testing.T) {
	table, err := newTable(liveSlots)
	if err != nil {
		t.Fatal(err)
	}
	defer table.close()
	l := newLive(newChanging(nil), table, Options{})
	if _, err := l.enter(t.Context(), 0, []wire.Name{{Name: "dir", Dir: true}, {Name: "file", Size: 7, Version: "v", ModTime: created}}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.enter(t.Context(), 2, []wire.Name{{Name: "below", Version: "w"}}); err != nil {
		t.Fatal(err)
	}
	again := newLive(newChanging(nil), table, Options{})
	if err := again.inherit(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range catalog.Index(5) {
		got, ok := again.node(i)
		if want, _ := l.node(i); !ok || got != want {
			t.Errorf("read back: %+v, not %+v", got, want)
		}
	}
	if n, _ := again.node(3); again.Len() != 5 || again.path(4) != "dir/below" || n != (liveNode{name: "file", size: 7, version: "v", mod: created}) {
		t.Errorf("read back: %d nodes, %q, %+v", again.Len(), again.path(4), n)
	}
	good := bytes.Clone(l.log()[:200])
	for i, b := range good {
		for _, flip := range []byte{1, 0x80} {
			l.log()[i] = b ^ flip
			// Whatever is there is read without a fault; most of it is refused.
			bad := newLive(newChanging(nil), table, Options{})
			_ = bad.inherit(t.Context())
			for i := range catalog.Index(bad.Len() + 1) {
				bad.node(i)
				bad.path(i)
			}
			l.log()[i] = b
		}
	}
}
