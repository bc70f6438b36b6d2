package worker

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
)

func lists(tr *tier) (n int) {
	for _, g := range tr.gates {
		if g != nil {
			_, l := g.counts()
			n += l
		}
	}
	return n
}

func TestOneWorkerListsAndTheOthersPull(t *testing.T) {
	noGoroutines(t)
	files := map[string][]byte{}
	for i := range 200 {
		files[fmt.Sprintf("dir%d/file%d", i%7, i)] = content(int64(i), byte(i))
	}
	tr := newTier(t, files)
	tr.start(3)
	snap := tr.snapshot()
	if n := lists(tr); n != 1 {
		t.Errorf("the bucket was listed %d times", n)
	}
	if snap.Files() != 200 {
		t.Errorf("%d files", snap.Files())
	}
	// A reader gets it in pieces from any of them, and it is what its name says.
	for i := range 3 {
		c := tr.dial(i)
		head, _, err := c.ask(wire.Request{Op: wire.OpSnapshot})
		if err != nil {
			t.Fatal(err)
		}
		var encoded []byte
		for off := int64(0); off < head.Size; off += 1000 {
			_, p, err := c.ask(wire.Request{Op: wire.OpSnapshot, Snapshot: head.Body, Off: off, Length: 1000})
			if err != nil {
				t.Fatal(err)
			}
			encoded = append(encoded, p...)
		}
		got, err := catalog.Open(encoded)
		if err != nil || got.Digest() != snap.Digest() {
			t.Errorf("worker %d: %v", i, err)
		}
	}
}

func TestARestartFindsSnapshotAndBlocksAgain(t *testing.T) {
	want := content(2*ring.BlockSize+3, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	snap := tr.snapshot()
	i := index(t, snap, "/f")
	if _, err := tr.dial(0).file(i, int64(len(want)), 0); err != nil {
		t.Fatal(err)
	}
	d := snap.Digest()
	tr.stop(0)
	tr.add(0)
	tr.setMembers()
	if tr.snapshot().Digest() != d {
		t.Error("another snapshot")
	}
	// Even with its bucket gone, everything is served.
	if err := os.RemoveAll(tr.root); err != nil {
		t.Fatal(err)
	}
	if p, err := tr.dial(0).file(i, int64(len(want)), wire.FlagResidentOnly); err != nil || !bytes.Equal(p, want) {
		t.Fatalf("after the restart: %v", err)
	}
	if gets, l := tr.gates[0].counts(); gets != 0 || l != 0 {
		t.Errorf("the restarted worker sent %d reads and %d listings to the bucket", gets, l)
	}
}

func TestARestartedListerWithoutMemoryTakesItsPeersSnapshot(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(10, 1)})
	tr.start(3)
	d := tr.snapshot().Digest()
	l := tr.lister()
	tr.stop(l)
	if err := os.RemoveAll(filepath.Join(tr.dir, fmt.Sprintf("w%d", l))); err != nil {
		t.Fatal(err)
	}
	before := lists(tr)
	tr.add(l)
	tr.gates[l].set(nil)
	tr.setMembers()
	if tr.snapshot().Digest() != d {
		t.Error("another snapshot")
	}
	if n := lists(tr); n > before {
		t.Errorf("the bucket was listed again")
	}
}

func TestALostListerIsReplacedWithoutListing(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(10, 1)})
	tr.start(2)
	d := tr.snapshot().Digest()
	l := tr.lister()
	tr.stop(l)
	other := 1 - l
	// Before the membership says so, it serves on.
	if _, err := tr.dial(other).read(0, 0, 1, 0); !errors.Is(err, source.ErrInvalid) {
		t.Errorf("with its lister dead: %v", err)
	}
	if code, text := tr.get(other, wire.PathReady); code != 200 {
		t.Errorf("not ready: %s", text)
	}
	tr.setMembers()
	if tr.lister() != other {
		t.Fatal("nobody lists")
	}
	eventually(t, "the new lister tells its snapshot as current", func() error {
		rep, _, err := tr.dial(other).ask(wire.Request{Op: wire.OpSnapshot})
		if err == nil && rep.Body != d {
			err = errors.New("another snapshot")
		}
		return err
	})
	if _, n := tr.gates[other].counts(); n != 0 {
		t.Errorf("it listed %d times", n)
	}
}

// TestARolloutPassesAChangeOfTheProtocol: nobody replaces the next worker until this one has a snapshot, and none of
// those that have one understands it.
func TestARolloutPassesAChangeOfTheProtocol(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() { // a worker of another release: verdictBadHello to everybody
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if _, err := io.CopyN(io.Discard, c, 77); err == nil {
					c.Write(append([]byte{5}, make([]byte, 64)...))
				}
			}()
		}
	}()
	tr := newTier(t, map[string][]byte{"f": content(100, 1)})
	listed := func(i int) int { _, n := tr.gates[i].counts(); return n }
	// One of the names has the task of listing.
	for i := 0; tr.foreign == nil; i++ {
		m := ring.Member{ID: fmt.Sprintf("old%d", i), Node: "old", Addr: l.Addr().String(), State: ring.Ready}
		of := ring.Membership{Members: []ring.Member{m, {ID: "w0", Addr: "w0:1", State: ring.Ready}, {ID: "w1", Addr: "w1:1", State: ring.Ready}}}
		if first, ok := of.Lister(dataset); ok && first.ID == m.ID {
			tr.foreign = []ring.Member{m}
		}
	}
	tr.start(1)
	tr.snapshot()
	if n := listed(0); n != 1 {
		t.Errorf("the first one listed %d times", n)
	}
	tr.add(1)
	tr.setMembers()
	tr.snapshot()
	if n := listed(1); n != 0 {
		t.Errorf("the second one listed %d times, and could have asked the first", n)
	}
	if n := listed(0); n != 1 {
		t.Errorf("the first one listed %d times by then", n)
	}
}

func TestRefreshMakesANewSnapshotAndKeepsTheOld(t *testing.T) {
	want := content(100, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(2)
	old := tr.snapshot().Digest()
	if err := os.WriteFile(filepath.Join(tr.root, "g"), want, 0o644); err != nil {
		t.Fatal(err)
	}
	// Any worker takes the request.
	for i := range 2 {
		var answer struct{ Snapshot string }
		if code, err := tr.control(i, "POST", wire.PathRefresh, nil, &answer); err != nil {
			t.Fatalf("worker %d: %d %v", i, code, err)
		}
		if answer.Snapshot == fmt.Sprintf("%x", old) {
			t.Error("the same snapshot")
		}
	}
	eventually(t, "all follow", func() error {
		for _, w := range tr.workers {
			if s := w.Status(); s.Files != 2 {
				return fmt.Errorf("%d files", s.Files)
			}
		}
		return nil
	})
	snap := tr.snapshot()
	for i, w := range tr.workers {
		s, ok := w.snapshots.get(old)
		if !ok {
			t.Fatalf("worker %d forgot the old snapshot", i)
		}
		s.release()
		c := tr.dial(i)
		if _, _, err := c.ask(wire.Request{Op: wire.OpRead, Flags: wire.FlagReadThrough, Snapshot: old, Index: 1, Length: 100}); err != nil {
			t.Errorf("worker %d, old snapshot: %v", i, err)
		}
		if p, err := c.read(index(t, snap, "/g"), 0, 100, wire.FlagReadThrough); err != nil || !bytes.Equal(p, want) {
			t.Errorf("worker %d, new snapshot: %v", i, err)
		}
	}
}

// relist adds a file to the bucket and has it listed.
func (tr *tier) relist(name string) {
	tr.t.Helper()
	if err := os.WriteFile(filepath.Join(tr.root, name), nil, 0o644); err != nil {
		tr.t.Fatal(err)
	}
	if _, err := tr.control(tr.lister(), "POST", wire.PathRefresh, nil, nil); err != nil {
		tr.t.Fatal(err)
	}
}

// TestAListingWithoutNewsTakesNoRoom: neither that of others, nor twice its own.
func TestAListingWithoutNewsTakesNoRoom(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(100, 1)})
	w := tr.add(0)
	tr.setMembers()
	current := func(files int64) (d wire.Digest, size int64) {
		t.Helper()
		eventually(t, "the listing is there", func() error {
			n, ok := w.snapshots.get(wire.Digest{})
			if !ok {
				return errors.New("none")
			}
			defer n.release()
			if d, size = n.Digest(), int64(len(n.Encoded())); n.Files() != files {
				return fmt.Errorf("of %d files", n.Files())
			}
			return nil
		})
		return d, size
	}
	old, _ := current(1)
	tr.relist("g")
	d, size := current(2)
	before, err := os.Stat(w.snapshotPath(d))
	if err != nil {
		t.Fatal(err)
	}
	w.snapshots.setRoom(2 * size)
	if _, err := tr.control(0, "POST", wire.PathRefresh, nil, nil); err != nil {
		t.Fatal(err)
	}
	if now, err := os.Stat(w.snapshotPath(d)); err != nil || !os.SameFile(before, now) {
		t.Errorf("the same snapshot has another file: %v", err)
	}
	if n, ok := w.snapshots.get(old); !ok {
		t.Error("the old snapshot is gone")
	} else {
		n.release()
	}
}

// full has a worker's folder take no snapshot, until what is there in its place is removed.
func full(t *testing.T, w *Worker) {
	t.Helper()
	if err := os.RemoveAll(w.snapshotDir()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.snapshotDir(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAFollowerWhoseFolderIsFullServesFromHeap(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(100, 1)})
	tr.start(2)
	old := tr.snapshot().Digest()
	w := tr.workers[1-tr.lister()]
	full(t, w)
	tr.relist("g")
	if d := tr.snapshot().Digest(); d == old {
		t.Error("the same snapshot")
	}
	if p := w.Status().Problem; p != "" {
		t.Error(p)
	}
	// It moves where it belongs once it can.
	if err := os.Remove(w.snapshotDir()); err != nil {
		t.Fatal(err)
	}
	tr.stop(tr.lister())
	tr.setMembers()
	tr.relist("h")
	names, err := os.ReadDir(w.snapshotDir())
	if err != nil || len(names) != 3 { // two snapshots, and which one is current
		t.Errorf("the folder has %v, %v", names, err)
	}
}

func TestAFollowerWithoutRoomSaysSo(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(100, 1)})
	tr.start(2)
	old := tr.snapshot().Digest()
	i := 1 - tr.lister()
	w := tr.workers[i]
	w.snapshots.setRoom(1)
	full(t, w)
	tr.relist("g")
	eventually(t, "it says what to do", func() error {
		if p := w.Status().Problem; !strings.Contains(p, "raise the workers' memory") {
			return errors.New(p)
		}
		return nil
	})
	if cur, ok := w.snapshots.get(wire.Digest{}); !ok || cur.Digest() != old {
		t.Error("the old snapshot is not served")
	} else {
		cur.release()
	}
	if code, text := tr.get(i, wire.PathReady); code != http.StatusOK {
		t.Errorf("not ready: %s", text)
	}
	if err := os.Remove(w.snapshotDir()); err != nil {
		t.Fatal(err)
	}
	if tr.snapshot().Digest() == old {
		t.Error("it does not follow")
	}
	eventually(t, "the problem is over", func() error {
		if p := w.Status().Problem; p != "" {
			return errors.New(p)
		}
		return nil
	})
}

// TestAnOldSnapshotIsPulledWhenAReaderAsksForIt: a worker that joins later serves mounts of old ones.
func TestAnOldSnapshotIsPulledWhenAReaderAsksForIt(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(100, 1)})
	tr.start(1)
	old := tr.snapshot().Digest()
	if err := os.WriteFile(filepath.Join(tr.root, "g"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := tr.control(0, "POST", wire.PathRefresh, nil, nil); err != nil {
		t.Fatal(err)
	}
	tr.add(1)
	tr.setMembers()
	tr.snapshot()
	c := tr.dial(1)
	eventually(t, "the old snapshot is there", func() error {
		_, _, err := c.ask(wire.Request{Op: wire.OpRead, Flags: wire.FlagReadThrough, Snapshot: old, Index: 1, Length: 100})
		return err
	})
}

func TestMembershipFileThatIsWrongKeepsTheOld(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": nil})
	tr.start(1)
	tr.snapshot()
	good, err := os.ReadFile(tr.membersFile())
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]string{
		"malformed":        "{",
		"epoch falls":      `{"epoch":0,"members":[]}`,
		"epoch stays":      `{"epoch":1,"members":[]}`,
		"without addresse": `{"epoch":7,"members":[{"id":"a","state":"Ready"}]}`,
	} {
		if err := replaceFile(tr.membersFile(), []byte(b)); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" is reported", func() error {
			if s := tr.workers[0].Status(); s.Problem == "" {
				return errors.New("no problem")
			}
			return nil
		})
		if v := tr.workers[0].members.view(); v.Epoch != 1 || len(v.Members) != 1 {
			t.Errorf("%s: epoch %d with %d members in force", name, v.Epoch, len(v.Members))
		}
		if code, _ := tr.get(0, wire.PathReady); code != http.StatusOK {
			t.Errorf("%s: not ready", name)
		}
		if err := replaceFile(tr.membersFile(), good); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" is over", func() error {
			if s := tr.workers[0].Status(); s.Problem != "" {
				return errors.New(s.Problem)
			}
			return nil
		})
	}
	rep, p, err := tr.dial(0).ask(wire.Request{Op: wire.OpMembers})
	if err != nil || rep.Epoch != 1 {
		t.Fatal(err)
	}
	if m, err := ring.Parse(p); err != nil || len(m.Members) != 1 {
		t.Errorf("%s: %v", p, err)
	}
}

// TestAFolderThatIsMissingIsToldAndRecovers: the worker is up, says what is wrong, and needs no restart.
func TestAFolderThatIsMissingIsToldAndRecovers(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(10, 1)})
	away := tr.root + "-away"
	if err := os.Rename(tr.root, away); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(away) })
	tr.start(1)
	eventually(t, "the folder is named as missing", func() error {
		code, text := tr.get(0, wire.PathReady)
		if code != http.StatusServiceUnavailable || !strings.Contains(text, tr.root) {
			return fmt.Errorf("%d %s", code, text)
		}
		return nil
	})
	if code, _ := tr.get(0, wire.PathHealth); code != http.StatusOK {
		t.Error("not healthy")
	}
	if _, _, err := tr.dial(0).ask(wire.Request{Op: wire.OpSnapshot}); !errors.Is(err, wire.ErrUnknownSnapshot) || !strings.Contains(err.Error(), tr.root) {
		t.Errorf("a reader is told: %v", err)
	}
	if err := os.Rename(away, tr.root); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ready", func() error {
		if code, text := tr.get(0, wire.PathReady); code != http.StatusOK {
			return errors.New(text)
		}
		return nil
	})
}

func TestGarbageInDirIsRemoved(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(10, 1)})
	dir := filepath.Join(tr.dir, "w0", "snapshots")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]string{"pull-1": "half", strings.Repeat("ab", 32) + ".snap": "not one", "current": "zz"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(b), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tr.start(1)
	d := tr.snapshot().Digest()
	want := []string{filepath.Base(tr.workers[0].snapshotPath(d)), "current"}
	slices.Sort(want)
	// A snapshot is given out before it is kept as the current one, so that may still be under way.
	eventually(t, "only the snapshot and which is current are left", func() error {
		entries, err := os.ReadDir(dir)
		var got []string
		for _, e := range entries { // in the order of their names
			got = append(got, e.Name())
		}
		if err != nil || !slices.Equal(got, want) {
			return fmt.Errorf("%q, %w", got, err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "current")); err != nil || string(b) != hex.EncodeToString(d[:])+"\n" {
			return fmt.Errorf("current is %q, %w", b, err)
		}
		return nil
	})
}

// lines is a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// That there is no snapshot yet is how every worker begins, and nothing to be warned of.
func TestAStartWarnsOfNoSnapshot(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(10, 1)})
	var log lines
	free := make(chan struct{})
	tr.deps = func(int) Deps {
		l := slog.New(slog.NewTextHandler(&log, nil))
		return Deps{Logger: l, OpenSource: func(ctx context.Context, c source.Config) (*scheme.Source, error) {
			select {
			case <-free:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			return scheme.Open(ctx, c, scheme.Logger(l))
		}}
	}
	tr.start(2)
	for _, w := range tr.workers {
		eventually(t, "the worker says why it does not serve", func() error {
			if p := w.Status().Problem; !strings.Contains(p, wire.ListingProblem) {
				return errors.New(p)
			}
			return nil
		})
	}
	close(free)
	tr.snapshot()
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, "level=WARN") && strings.Contains(line, wire.ListingProblem) {
			t.Error(line)
		}
	}
	if !strings.Contains(log.String(), "waits for its first snapshot") {
		t.Errorf("nothing is said of it:\n%s", log.String())
	}
}

// turned is a clock that a test sets, and on which nothing comes that is waited for but the next poll.
type turned struct {
	mu  sync.Mutex
	now time.Time
}

func (c *turned) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *turned) turn(by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(by)
}

func (c *turned) After(d time.Duration) <-chan time.Time {
	if d != pollInterval {
		return make(chan time.Time)
	}
	return time.After(d / 50)
}

// hourly is a tier of one worker that lists each hour, by a clock that the test sets. listed waits for so many listings,
// and sees that no more come, whatever wakes the worker.
func hourly(t *testing.T) (tr *tier, clock *turned, listed func(times int)) {
	t.Helper()
	tr = newTier(t, map[string][]byte{"f": content(10, 1)})
	clock = &turned{now: time.Now().Round(0)}
	tr.deps = func(int) Deps { return Deps{Clock: clock} }
	tr.config = func(_ int, c *Config) { c.Refresh = Duration(time.Hour) }
	tr.start(1)
	tr.snapshot()
	var woken byte
	return tr, clock, func(times int) {
		t.Helper()
		eventually(t, "the bucket is listed", func() error {
			if _, n := tr.gates[0].counts(); n < times {
				return fmt.Errorf("%d times", n)
			}
			return nil
		})
		for range 10 {
			woken++
			d := wire.Digest{woken}
			eventually(t, "the worker is woken", func() error {
				tr.workers[0].wantSnapshot(d)
				if tr.workers[0].snapshots.missed(d).times == 0 {
					return errors.New("not yet")
				}
				return nil
			})
		}
		if _, n := tr.gates[0].counts(); n != times {
			t.Errorf("the bucket was listed %d times, not %d", n, times)
		}
	}
}

func TestAFailedListingIsNotRepeatedAtOnce(t *testing.T) {
	tr, clock, listed := hourly(t)
	listed(1)
	tr.gates[0].refuse(fmt.Errorf("%w: late in the listing", source.ErrInvalid))
	clock.turn(2 * time.Hour)
	listed(2)
	w := tr.workers[0]
	if p := w.Status().Problem; !strings.Contains(p, "late in the listing") {
		t.Errorf("the problem is %q", p)
	}
	refresh := func() error {
		r := refreshRequest{reply: make(chan refreshResult, 1)}
		w.refreshes <- r
		return (<-r.reply).err
	}
	if err := refresh(); err == nil { // who asks is not kept waiting
		t.Error("it did not fail")
	}
	listed(3)
	tr.gates[0].refuse(nil)
	if err := refresh(); err != nil {
		t.Error(err)
	}
	listed(4)
	if p := w.Status().Problem; p != "" {
		t.Error(p)
	}
	clock.turn(2 * time.Hour)
	listed(5)
}

func TestAClockThatIsSetBackStopsNoListing(t *testing.T) {
	_, clock, listed := hourly(t)
	listed(1)
	clock.turn(-24 * time.Hour)
	listed(2)
	clock.turn(time.Hour + time.Minute) // the snapshot, in which nothing is new, is of tomorrow still
	listed(3)
}

// A current snapshot takes the room of old ones only where the file system has no other.
func TestTheCurrentSnapshotIsWrittenInThePlaceOfOldOnes(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(100, 1)})
	w := tr.add(0)
	tr.setMembers()
	var old wire.Digest
	eventually(t, "there is one", func() error {
		n, ok := w.snapshots.get(wire.Digest{})
		if !ok {
			return errors.New("none")
		}
		old = n.Digest()
		n.release()
		return nil
	})
	tr.relist("g")
	held := func() bool {
		_, err := os.Stat(w.snapshotPath(old))
		n, ok := w.snapshots.get(old)
		if ok {
			n.release()
		}
		return ok && err == nil
	}
	if !held() {
		t.Fatal("the old snapshot is gone")
	}
	tries := 0
	write := func() error {
		if tries++; held() {
			return fmt.Errorf("write: %w", unix.ENOSPC)
		}
		return nil
	}
	if err := w.intoFolder(func() error { return fs.ErrPermission }); !errors.Is(err, fs.ErrPermission) || !held() {
		t.Errorf("%v", err)
	}
	if err := w.intoFolder(write); err != nil || tries != 2 || held() {
		t.Errorf("after %d tries: %v", tries, err)
	}
	none := 0
	if err := w.intoFolder(func() error { none++; return unix.ENOSPC }); !errors.Is(err, unix.ENOSPC) || none != 1 {
		t.Errorf("with nothing to drop it was tried %d times: %v", none, err)
	}
}

// Somebody has it, and this worker has no room: whoever waits for it learns what to raise, and a load does not wait for ever.
func TestWhyAnOldSnapshotIsNotHadIsTold(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(100, 1)})
	w := tr.add(0)
	d := wire.Digest{1}
	before := w.snapshots.missed(d).times
	w.snapshots.miss(d, fmt.Errorf("%w: raise the workers' memory", errNoRoom))
	if err := w.unknownSnapshot(d); !errors.Is(err, wire.ErrUnknownSnapshot) || !strings.Contains(err.Error(), "raise the workers' memory") {
		t.Error(err)
	}
	if n := w.snapshots.missed(d).times; n != before+1 {
		t.Errorf("missed %d times", n)
	}
	w.snapshots.miss(d, nil)
	if err := w.unknownSnapshot(d); strings.Contains(err.Error(), "memory") {
		t.Errorf("it is said of one that nobody has: %v", err)
	}
}

func TestManyUnknownSnapshotsAreAskedForNoMoreOften(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(1)
	k := &snapshotKeeper{w: tr.workers[0], tried: make(map[wire.Digest]time.Time)}
	just := time.Now().Add(time.Hour) // however long this test takes
	k.tried[wire.Digest{1}] = just
	for n := range 2 * maxTried {
		k.fetch(t.Context(), wire.Digest{2, byte(n)})
	}
	if k.tried[wire.Digest{1}] != just || len(k.tried) > maxTried {
		t.Errorf("%d are remembered, the first from %v", len(k.tried), k.tried[wire.Digest{1}])
	}
	for d := range k.tried { // a while later
		k.tried[d] = time.Now().Add(-fetchAgain)
	}
	k.fetch(t.Context(), wire.Digest{3})
	if _, ok := k.tried[wire.Digest{3}]; !ok || len(k.tried) != 1 {
		t.Errorf("%d are remembered", len(k.tried))
	}
}

// A listing that would take more memory than there is does not end in a kill, but in a problem that says how much it
// wants.
func TestAListingThatThereIsNoMemoryForIsNotMade(t *testing.T) {
	var left, limit atomic.Int64
	tr := newTier(t, map[string][]byte{"a": nil})
	tr.deps = func(int) Deps {
		return Deps{Memory: func() (int64, int64, bool) { return left.Load(), limit.Load(), true }}
	}
	limit.Store(1 << 40)
	tr.start(1)
	w := tr.workers[0]
	told := func() error {
		err := w.problems.of(problemSnapshot)
		if err == nil || !strings.Contains(err.Error(), "a listing of 1 objects takes ") || !strings.Contains(err.Error(), "set workers.memory to 1Gi") {
			return fmt.Errorf("it says %v", err)
		}
		return nil
	}
	eventually(t, "the worker says why it does not list", told)
	left.Store(1 << 40)
	limit.Store(0) // what a container before has left in memory is not in what this one sees
	if _, err := tr.control(0, "POST", wire.PathRefresh, nil, nil); err == nil || told() != nil {
		t.Errorf("beside what is in memory already: %v, %v", err, told())
	}
	limit.Store(1 << 40)
	if _, err := tr.control(0, "POST", wire.PathRefresh, nil, nil); err != nil {
		t.Error(err)
	}
	tr.snapshot()
}

func TestMemoryForASnapshot(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct{ memory, more, want int64 }{
		{64 * mib, 1, 1}, {2 << 30, 0, 2}, {2 << 30, 1, 3}, {2 << 30, 950 * mib, 3}, {2 << 30, 1000 * mib, 4},
	} {
		if got := memoryFor(c.memory, c.more); got != c.want {
			t.Errorf("%d MiB more beside %d: %d GiB, want %d", c.more/mib, c.memory/mib, got, c.want)
		}
	}
}
