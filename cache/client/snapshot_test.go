package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

func names(n int) []string {
	var out []string
	for k := range n {
		out = append(out, fmt.Sprintf("dir-%d/file-%d", k%7, k))
	}
	return out
}

func TestDialWaitsWhileWorkersListAndTellsProgress(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.start("a", "b")
	var n atomic.Int64
	listing := func(r wire.Request) *answer {
		if r.Op == wire.OpSnapshot && n.Add(1) <= 6 {
			return &answer{status: wire.UnknownSnapshot, text: "listing: 1234 objects so far"}
		}
		return nil
	}
	for _, id := range []string{"a", "b"} {
		k.worker(id).other.Store(&listing)
	}
	var told []Progress
	c := k.dial(func(c *Config) { c.Progress = func(p Progress) { told = append(told, p) } })
	if c.Snapshot().Digest() != k.snap.Digest() {
		t.Fatal("another snapshot")
	}
	if len(told) < 2 || !strings.Contains(told[0].Waiting, "1234 objects") || told[len(told)-1].Received != told[len(told)-1].Size {
		t.Fatalf("progress: %+v", told)
	}
}

func TestDialEndsWithItsContextAndSaysWhatItWaitedFor(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": nil})
	k.start("a")
	never := func(r wire.Request) *answer { return &answer{status: wire.UnknownSnapshot, text: "secret missing"} }
	k.worker("a").other.Store(&never)
	ctx, cancel := context.WithCancelCause(testContext(t))
	config := k.config()
	config.Progress = func(Progress) { cancel(errTest) }
	_, err := dial(ctx, config, quick())
	if !errors.Is(err, errTest) || !errors.Is(err, wire.ErrUnknownSnapshot) || !strings.Contains(err.Error(), "secret missing") {
		t.Fatal(err)
	}
	if n, stacks := ours(); n > 0 {
		t.Fatalf("a failed Dial left %d goroutines:\n%s", n, stacks)
	}
}

func TestAWrongKeyIsRefusedAtOnce(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": nil})
	k.start("a", "b")
	config := k.config()
	config.Keys = wire.GenerateKeys()
	_, err := dial(testContext(t), config, quick())
	if !errors.Is(err, wire.ErrUnauthorized) {
		t.Fatal(err)
	}
	config = k.config()
	config.Dataset = "other/dataset"
	if _, err := dial(testContext(t), config, quick()); !errors.Is(err, wire.ErrUnauthorized) {
		t.Fatal(err)
	}
	// During a rotation the new key is tried first and the old one serves.
	config = k.config()
	config.Keys.Read = append(wire.GenerateKeys().Read, config.Keys.Read...)
	c, err := dial(testContext(t), config, quick())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestWorkersOfAnotherReleaseAreToldAtOnce: as a wrong key is, and one of this release among them is enough.
func TestWorkersOfAnotherReleaseAreToldAtOnce(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": nil})
	k.start("a", "b")
	others := map[string]bool{k.worker("a").addr: true, k.worker("b").addr: true}
	config := k.config()
	config.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if !others[addr] {
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		}
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			if _, err := io.CopyN(io.Discard, there, 77); err == nil {
				there.Write(append([]byte{5}, make([]byte, 64)...)) // verdictBadHello
			}
		}()
		return here, nil
	}
	if _, err := dial(testContext(t), config, quick()); !errors.Is(err, wire.ErrVersion) || errors.Is(err, wire.ErrUnauthorized) {
		t.Fatal(err)
	}
	delete(others, k.worker("b").addr)
	c, err := dial(testContext(t), config, quick())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestConfigsThatCannotWorkAreRefusedWithTheReason(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": nil})
	k.start("a")
	for what, change := range map[string]func(*Config){
		"no dataset":         func(c *Config) { c.Dataset = "" },
		"no workers to ask":  func(c *Config) { c.Membership = ring.Membership{} },
		"no read key":        func(c *Config) { c.Keys = wire.Keys{} },
		"buffers of 1 bytes": func(c *Config) { c.BufferBytes = 1 },
		"copies is -1":       func(c *Config) { c.Copies = -1 },
		"no such file":       func(c *Config) { c.MembershipFile = filepath.Join(t.TempDir(), "none") },
		"ids must be unique": func(c *Config) { c.Membership.Members = append(c.Membership.Members, c.Membership.Members...) },
	} {
		config := k.config()
		change(&config)
		if _, err := dial(testContext(t), config, quick()); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestASnapshotWithAnotherDigestIsRefused(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.start("a", "b")
	// Both lie about what they send when asked for the pinned digest; then one comes to its senses.
	other := makeSnapshot(t, map[string][]byte{"f": content(2, 1000)}, "v2")
	digest := k.snap.Digest()
	var n atomic.Int64
	lie := func(r wire.Request) *answer {
		if r.Op == wire.OpSnapshot && n.Add(1) <= 4 {
			return &answer{body: other.Encoded(), change: func(r *wire.Reply) { r.Body = digest }}
		}
		return nil
	}
	for _, id := range []string{"a", "b"} {
		k.worker(id).other.Store(&lie)
	}
	c := k.dial(func(c *Config) { c.Snapshot = digest })
	if c.Snapshot().Digest() != digest || c.Stats().Corrupt < 4 {
		t.Fatalf("%+v", c.Stats())
	}
}

func TestTheSnapshotStaysTheSameForTheLifeOfTheClient(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 100_000)})
	k.start("a")
	c := k.dial(nil)
	next := makeSnapshot(t, map[string][]byte{"f": content(2, 100_000), "g": nil}, "v2")
	k.worker("a").snapshot.Store(next) // the tier refreshed
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 100_000); err != nil {
		t.Fatal(err)
	}
	for _, r := range k.worker("a").seen() {
		if r.Snapshot != k.snap.Digest() {
			t.Fatal("a read by another snapshot")
		}
	}
	if d := k.dial(nil).Snapshot().Digest(); d != next.Digest() {
		t.Fatal("a new client does not get the new snapshot")
	}
}

func TestSnapshotsOfANodeAreSharedAndADamagedOneIsPulledAnew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "snapshots")
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.start("a")
	var pulls atomic.Int64
	count := func(r wire.Request) *answer {
		if r.Op == wire.OpSnapshot {
			pulls.Add(1)
		}
		return nil
	}
	k.worker("a").other.Store(&count)
	digest := k.snap.Digest()
	shared := func(c *Config) { c.SnapshotDir = dir; c.Snapshot = digest }
	k.dial(shared).Close()
	first := pulls.Load()
	k.dial(shared).Close()
	if pulls.Load() != first || first == 0 {
		t.Fatalf("pulled %d times, then %d", first, pulls.Load())
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if err := os.WriteFile(files[0], []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := k.dial(shared)
	if pulls.Load() == first || c.Snapshot().Digest() != digest {
		t.Fatal("the damaged file was used")
	}
	if _, err := catalog.OpenFile(files[0]); err != nil {
		t.Fatal(err)
	}
}

// A snapshot goes to the node's folder as it comes, and is in no other memory; where it cannot be there, in that.
func TestASnapshotIsReceivedIntoTheFolder(t *testing.T) {
	dir := t.TempDir()
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.start("a")
	for what, c := range map[string]struct {
		dir  string
		want int // names in it once the snapshot came, before it is looked at
	}{"a folder": {dir, 1}, "none": {filepath.Join(os.Args[0], "snapshots"), 0}} {
		var came []string
		client := k.dial(func(config *Config) {
			config.SnapshotDir = c.dir
			config.Progress = func(Progress) { came, _ = filepath.Glob(filepath.Join(c.dir, "new-*")) }
		})
		if len(came) != c.want || client.Snapshot().Digest() != k.snap.Digest() {
			t.Errorf("%s: %v", what, came)
		}
		if _, err := os.Stat(client.snapshotPath(k.snap.Digest())); (err == nil) != (c.want > 0) {
			t.Errorf("%s: %v", what, err)
		}
		if left, _ := filepath.Glob(filepath.Join(c.dir, "new-*")); len(left) > 0 {
			t.Errorf("%s: %v is left", what, left)
		}
	}
}

// A pull that was ended, as by a pod that may wait no longer, leaves what it has received to the next.
func TestAPullGoesOnWhereOneBeforeWasEnded(t *testing.T) {
	files := map[string][]byte{}
	for _, n := range names(1000) {
		files[n] = nil
	}
	k := newTier(t, files)
	k.start("a")
	whole := k.snap.Encoded()
	piece := len(whole)/20 + 1
	var mu sync.Mutex
	var asked []int64
	inPieces := func(r wire.Request) *answer {
		if r.Op != wire.OpSnapshot || r.Off >= int64(len(whole)) {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.Off)
		return &answer{body: whole[r.Off:min(int(r.Off)+piece, len(whole))], change: func(r *wire.Reply) {
			r.Size, r.Body = int64(len(whole)), k.snap.Digest()
		}}
	}
	k.worker("a").other.Store(&inPieces)
	pull := func(change func(*Config)) (from []int64, err error) {
		eventually(t, "the end of the pull before", func() bool { return k.worker("a").open() == 0 })
		mu.Lock()
		asked = nil
		mu.Unlock()
		config := k.config()
		change(&config)
		ctx, cancel := context.WithCancel(testContext(t))
		defer cancel()
		if progress := config.Progress; progress != nil {
			config.Progress = func(p Progress) { progress(p); cancel() }
		}
		c, err := dial(ctx, config, k.timing)
		if err == nil {
			defer c.Close()
			if c.Snapshot().Digest() != k.snap.Digest() {
				t.Error("another snapshot")
			}
		}
		mu.Lock()
		defer mu.Unlock()
		return asked, err
	}
	unfinishedIn := func(dir string) string {
		return (&Client{config: Config{SnapshotDir: dir}}).unfinishedPath(k.snap.Digest())
	}
	for _, want := range []catalog.Digest{k.snap.Digest(), {}} {
		dir := t.TempDir()
		in := func(c *Config) { c.SnapshotDir, c.Snapshot = dir, want }
		var had []byte
		for n := range 2 { // each gets a piece, or some, and ends
			_, err := pull(func(c *Config) { in(c); c.Progress = func(Progress) {} })
			if err == nil || !strings.Contains(err.Error(), "of the snapshot were received") {
				t.Fatalf("pull %d: %v", n, err)
			}
			before := len(had)
			if had, err = os.ReadFile(unfinishedIn(dir)); err != nil || len(had) <= before {
				t.Fatalf("pull %d left %d bytes after %d: %v", n, len(had), before, err)
			}
		}
		from, err := pull(in)
		if want == (catalog.Digest{}) { // what the current one is has to be asked
			from = from[1:]
		}
		if err != nil || len(from) == 0 || from[0] != int64(len(had)-1) {
			t.Errorf("asked from %d after %d bytes: %v", from, len(had), err)
		}
		onlySnapshot(t, dir, k.snap.Digest())
	}
	for what, there := range map[string][]byte{
		"complete": whole, "empty": {}, "damaged": append([]byte("damaged"), whole[7:2*piece]...), "too long": append(bytes.Clone(whole), "more"...),
	} {
		dir := t.TempDir()
		in := func(c *Config) { c.SnapshotDir, c.Snapshot = dir, k.snap.Digest() }
		if err := os.WriteFile(unfinishedIn(dir), there, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := pull(in); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		onlySnapshot(t, dir, k.snap.Digest())
	}
	// What another pull has is left alone.
	dir := t.TempDir()
	if err := os.WriteFile(unfinishedIn(dir), whole[:piece], 0o600); err != nil {
		t.Fatal(err)
	}
	f, have := (&Client{config: Config{SnapshotDir: dir}}).resume(k.snap.Digest())
	if f == nil || have != int64(piece-1) {
		t.Fatal(f, have)
	}
	defer f.Close()
	if from, err := pull(func(c *Config) { c.SnapshotDir = dir }); err != nil || from[len(from)-1] != int64(19*piece) {
		t.Errorf("asked from %d: %v", from, err)
	}
	if now, err := os.ReadFile(f.Name()); err != nil || len(now) != piece {
		t.Errorf("another pull's file has %d bytes, %v", len(now), err)
	}
}

// onlySnapshot checks that there is nothing in the folder but one.
func onlySnapshot(t *testing.T, dir string, want catalog.Digest) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	s, err := catalog.OpenFile(filepath.Join(dir, files[0].Name()))
	if err != nil || s.Digest() != want || !strings.HasSuffix(files[0].Name(), snapshotSuffix) {
		t.Fatal(files, err)
	}
	s.Close()
}

// A snapshot for which the container's memory has no room is an error that says so, and the heap of who has one in
// memory is the smaller for it.
func TestASnapshotInMemoryFitsTheContainer(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.start("a")
	size := int64(len(k.snap.Encoded()))
	const heap = 1 << 30
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(heap))
	pull := func(limit int64, dir string, full error) (*Client, error) {
		config := k.config()
		config.SnapshotDir = dir
		c, err := newClient(config, quick())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.limit = func() (int64, bool) { return limit, true }
		c.disk = func(string, int64, int64) error { return full }
		c.snapshot, err = c.pull(testContext(t), k.snap.Digest())
		return c, err
	}
	limit := 3 * size // room for two
	one, err := pull(limit, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	two, err := pull(limit, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if now := debug.SetMemoryLimit(-1); now != heap-2*size {
		t.Errorf("beside two snapshots the heap may have %d bytes", now)
	}
	if _, err := pull(limit, "", nil); !errors.Is(err, errTooLarge) || !strings.Contains(err.Error(), testDataset) {
		t.Errorf("one too many: %v", err)
	}
	if _, err := pull(1, t.TempDir(), nil); err != nil {
		t.Errorf("into a folder: %v", err)
	}
	if _, err := pull(limit, t.TempDir(), errors.New("the disk is full")); !errors.Is(err, errTooLarge) {
		t.Errorf("into a folder whose disk is full: %v", err)
	}
	one.Close()
	two.Close()
	if now := debug.SetMemoryLimit(-1); now != heap {
		t.Errorf("beside none the heap may have %d bytes", now)
	}
}

// What workers call snapshots fills no node's disk, though it is sent at the same time.
func TestASnapshotLeavesRoomOnTheDisk(t *testing.T) {
	var disk unix.Statfs_t
	dir := t.TempDir()
	if err := unix.Statfs(dir, &disk); err != nil {
		t.Fatal(err)
	}
	all := int64(disk.Blocks) * disk.Bsize
	if err := roomOnDisk(dir, all-all/10, smallSnapshot); err == nil {
		t.Error("nine tenths of the disk are taken")
	}
	if err := roomOnDisk(dir, smallSnapshot, 0); err != nil {
		t.Errorf("a small one: %v", err)
	}
	if err := roomOnDisk(dir, all, all); err != nil {
		t.Errorf("one that is there: %v", err)
	}
	if err := roomOnDisk(filepath.Join(dir, "none"), smallSnapshot+1, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

// Nor does one that is gone on with, whose size another worker told.
func TestAPullThatGoesOnLeavesRoomOnTheDisk(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.start("a")
	whole := k.snap.Encoded()
	for _, want := range []catalog.Digest{k.snap.Digest(), {}} {
		config := k.config()
		config.SnapshotDir = t.TempDir()
		c, err := newClient(config, quick())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		var size, has int64
		c.disk = func(_ string, s, h int64) error { size, has = s, h; return errors.New("the disk is full") }
		if err := os.WriteFile(c.unfinishedPath(k.snap.Digest()), whole[:len(whole)/2], 0o600); err != nil {
			t.Fatal(err)
		}
		if c.snapshot, err = c.pull(testContext(t), want); err != nil || c.snapshot.Digest() != k.snap.Digest() {
			t.Fatal(err)
		}
		if size != int64(len(whole)) || has <= 0 {
			t.Errorf("of a snapshot of %d bytes, not %d, the disk has %d", size, len(whole), has)
		}
		if files, err := os.ReadDir(config.SnapshotDir); err != nil || len(files) > 0 {
			t.Errorf("the folder of a full disk has %v, %v", files, err)
		}
	}
}

func TestTheOldestSnapshotsOfAFolderGo(t *testing.T) {
	dir := t.TempDir()
	files := map[string][]byte{"f": content(1, 1000)}
	k := newTier(t, files)
	k.start("a")
	old := time.Now().Add(-2 * unfinished)
	for name, made := range map[string]time.Time{"new-1": old, "new-2": time.Now(), "other": old} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, made, made)); err != nil {
			t.Fatal(err)
		}
	}
	var clients []*Client
	var paths []string
	for n := range 3 {
		s := makeSnapshot(t, files, fmt.Sprintf("v%d", n))
		k.worker("a").snapshot.Store(s)
		c := k.dial(func(c *Config) { c.SnapshotDir, c.SnapshotsKept = dir, 2 })
		if c.Snapshot().Digest() != s.Digest() {
			t.Fatal("another snapshot")
		}
		clients, paths = append(clients, c), append(paths, c.snapshotPath(s.Digest()))
		at := old.Add(time.Duration(n) * time.Minute) // file times are coarse
		if err := os.Chtimes(paths[n], at, at); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]bool{
		paths[0]: false, paths[1]: true, paths[2]: true,
		filepath.Join(dir, "new-1"): false, filepath.Join(dir, "new-2"): true, filepath.Join(dir, "other"): true,
	} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: kept %v, want %v", filepath.Base(path), err == nil, want)
		}
	}
	if p := clients[0].Snapshot().Path(k.index("f")); p != "/f" {
		t.Errorf("who has a snapshot open reads %q", p)
	}
}

func TestMembershipFileIsFollowedAndABadOneIgnored(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 100_000)})
	k.start("a")
	file := filepath.Join(t.TempDir(), "members.json")
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(file+".new", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	publish := func(m ring.Membership) {
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		write(b)
	}
	publish(k.membership())
	c := k.dial(func(c *Config) { c.Membership = ring.Membership{}; c.MembershipFile = file })
	write([]byte("{not json"))
	for range 5 {
		c.members.refresh()
	}
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 100_000); err != nil {
		t.Fatal(err)
	}
	// Everybody moves: only the file knows.
	k.worker("a").stop()
	k.mu.Lock()
	delete(k.workers, "a")
	k.mu.Unlock()
	k.start("b")
	c.Forget(k.index("f"))
	done := make(chan error)
	go func() { done <- checkRead(ctx, c, k.index("f"), k.data["f"], 0, 100_000) }()
	publish(k.membership())
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	// An older list is not gone back to.
	epoch := c.Stats().Epoch
	old := k.membership()
	old.Epoch = 1
	old.Members = nil
	publish(old)
	for range 5 {
		c.members.refresh()
	}
	c.Forget(k.index("f"))
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 100_000); err != nil {
		t.Fatal(err)
	}
	if c.Stats().Epoch < epoch {
		t.Fatal("the epoch went back")
	}
}

func TestSeedsTellTheMembership(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 100_000)})
	k.start("a", "b", "c")
	c := k.dial(func(c *Config) {
		c.Membership = ring.Membership{}
		c.Seeds = []string{"127.0.0.1:1", k.worker("b").addr}
	})
	if err := checkRead(ctx, c, k.index("f"), k.data["f"], 0, 100_000); err != nil {
		t.Fatal(err)
	}
	if c.Stats().Epoch != k.membership().Epoch {
		t.Fatal("the membership did not come from the seed")
	}
}

func TestAReadWaitsForAWorkerToComeBack(t *testing.T) {
	ctx := testContext(t)
	k := newTier(t, map[string][]byte{"f": content(1, 100_000)})
	k.start("a")
	c := k.dial(nil)
	k.worker("a").stop()
	done := make(chan error)
	go func() { done <- checkRead(ctx, c, k.index("f"), k.data["f"], 0, 100_000) }()
	eventually(t, "a round without anybody", func() bool { return c.Stats().Rounds > 2 })
	k.worker("a").restart()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
