package worker

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
)

// made is a snapshot of one mount with some keys.
func made(t testing.TB, m catalog.Mount, keys ...string) *catalog.Snapshot {
	t.Helper()
	b := catalog.NewBuilder([]catalog.Mount{m})
	for _, key := range keys {
		if err := b.Add(0, source.Object{Key: key, Size: 1, Version: "v", ModTime: time.Unix(1, 0)}); err != nil {
			t.Fatal(err)
		}
	}
	encoded, err := b.Encode(time.Unix(2, 0))
	if err != nil {
		t.Fatal(err)
	}
	s, err := catalog.Open(encoded)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWhatIsOfferedIsTakenOnlyIfItIsOfTheDataset(t *testing.T) {
	noGoroutines(t)
	tr := newTier(t, map[string][]byte{"a": content(10, 1)})
	tr.start(1)
	now := tr.snapshot()
	w := tr.workers[0]
	old := made(t, now.Mounts()[0], "a", "gone")
	d := old.Digest()
	elsewhere := now.Mounts()[0]
	elsewhere.URL += "-other"
	foreign := made(t, elsewhere, "a")
	refused := func(name string, d wire.Digest, encoded []byte) {
		t.Helper()
		if err := wire.Offer(tr.dial(0), d, encoded); wire.StatusOf(err) != wire.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	refused("another's digest", d, foreign.Encoded())
	refused("another mount's", foreign.Digest(), foreign.Encoded())
	refused("not a snapshot", d, []byte("not a snapshot"))
	refused("a bit changed", d, append(slices.Clone(old.Encoded()[:old.Len()]), 1))
	for _, size := range []int64{-1, 0, 1 << 40} {
		if _, _, err := tr.dial(0).ask(wire.Request{Op: wire.OpOffer, Snapshot: d, Off: size}); wire.StatusOf(err) != wire.Invalid {
			t.Errorf("of %d bytes: %v", size, err)
		}
	}
	if _, _, err := tr.dial(0).ask(wire.Request{Op: wire.OpOffer, Off: 100}); wire.StatusOf(err) != wire.Invalid {
		t.Errorf("without a digest: %v", err)
	}
	// One that ends in the middle; meanwhile no other is taken.
	c := tr.dial(0)
	if rep, _, err := c.ask(wire.Request{Op: wire.OpOffer, Snapshot: d, Off: 1000}); err != nil || rep.Size != 1000 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if err := wire.Offer(tr.dial(0), d, old.Encoded()); !errors.Is(err, wire.ErrOverloaded) {
		t.Errorf("beside another: %v", err)
	}
	c.Close()
	if _, ok := w.snapshots.get(d); ok {
		t.Fatal("it is held")
	}
	// It would push out what others read, who would give that back.
	other := made(t, now.Mounts()[0], "a", "away")
	eventually(t, "another is taken", func() error { return wire.Offer(tr.dial(0), other.Digest(), other.Encoded()) })
	w.snapshots.setRoom(int64(len(now.Encoded()) + len(old.Encoded())))
	eventually(t, "it is refused for now", func() error {
		if err := wire.Offer(tr.dial(0), d, old.Encoded()); !errors.Is(err, wire.ErrOverloaded) || !strings.Contains(err.Error(), "memory") {
			return fmt.Errorf("without room: %w", err)
		}
		return nil
	})
	w.snapshots.setRoom(1 << 20)
	eventually(t, "it is taken", func() error { return wire.Offer(tr.dial(0), d, old.Encoded()) })
	if _, p, err := tr.dial(0).ask(wire.Request{Op: wire.OpSnapshot, Snapshot: d, Length: 10}); err != nil || string(p) != string(old.Encoded()[:10]) {
		t.Errorf("it is told: %v", err)
	}
	if err := wire.Offer(tr.dial(0), d, old.Encoded()); err != nil {
		t.Errorf("once more: %v", err)
	}
	if tr.snapshot().Digest() != now.Digest() {
		t.Error("another snapshot is current")
	}
	names, err := os.ReadDir(w.snapshotDir())
	if err != nil || len(names) != 4 { // three snapshots, and which one is current
		t.Errorf("the folder has %v, %v", names, err)
	}
	// What the bucket does not have stays an error.
	i := index(t, old, "/gone")
	if _, _, err := tr.dial(0).ask(wire.Request{Op: wire.OpRead, Snapshot: d, Index: i, Length: 1}); wire.StatusOf(err) != wire.NotFound {
		t.Errorf("an object that is gone: %v", err)
	}
}

func TestKeysOfWhatIsOfferedAreBelowTheMounts(t *testing.T) {
	const url = "s3://bucket"
	for _, c := range []struct {
		configured, prefix string
		keys               []string
		want               bool
	}{
		{"", "", []string{"a", "b/c"}, true},
		{"", "b/", []string{"b/c"}, true},
		{"p", "p/", []string{"p/a"}, true},
		{"p/", "p/", []string{"p/a"}, true},
		{"p", "", []string{"p/a"}, false},
		{"p", "", []string{"secret"}, false},
		{"p/q", "p/", []string{"p/secret"}, false},
		{"p/one", "p/", []string{"p/one"}, true}, // a mount of one object
		{"p/one", "p/", []string{"p/one", "p/two"}, false},
	} {
		s := &sources{mounts: []catalog.Mount{{URL: url, Prefix: c.configured, Path: "/"}}, sources: []*scheme.Source{nil}}
		err := s.covers(made(t, catalog.Mount{URL: url, Prefix: c.prefix, Path: "/"}, c.keys...))
		if (err == nil) != c.want || err != nil && !errors.Is(err, source.ErrInvalid) {
			t.Errorf("%q of a dataset of %q, with %q: %v", c.prefix, c.configured, c.keys, err)
		}
	}
}

// setRoom gives snapshots another room than that of their worker's memory.
func (s *snapshots) setRoom(bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.room, s.memory = bytes, 0
}

// TestOldSnapshotsMakeRoom: however few they are.
func TestOldSnapshotsMakeRoom(t *testing.T) {
	now := time.Unix(1000, 0)
	s := &snapshots{now: func() time.Time { return now }, held: make(map[wire.Digest]*snapshot)}
	src := &sources{mounts: []catalog.Mount{{URL: "s3://bucket", Path: "/"}}, sources: []*scheme.Source{nil}}
	names := make(map[wire.Digest]string)
	var size int64
	add := func(name string) *snapshot {
		b := catalog.NewBuilder(src.mounts)
		if err := b.Add(0, source.Object{Key: name, Size: 1, Version: "v", ModTime: time.Unix(1, 0)}); err != nil {
			t.Fatal(err)
		}
		encoded, err := b.Encode(now)
		if err != nil {
			t.Fatal(err)
		}
		snap, err := catalog.Open(encoded)
		if err != nil {
			t.Fatal(err)
		}
		size = int64(len(encoded))
		names[snap.Digest()] = name
		n := s.put(snap, inFolder, src)
		s.setCurrent(n)
		n.release()
		now = now.Add(time.Minute)
		return n
	}
	reserve := func(current bool, want ...string) (end func()) {
		t.Helper()
		dropped, end, ok := s.reserve(size, inFolder, current)
		var got []string
		for _, d := range dropped {
			got = append(got, names[d])
		}
		if ok != (want != nil) || !slices.Equal(got, want) && len(got)+len(want) > 0 {
			t.Fatalf("for one more %q were dropped, want %q: %t", got, want, ok)
		}
		return end
	}
	a, _, c := add("a"), add("b"), add("c")
	s.room = 4*size + size/2
	reserve(true, []string{}...)()
	end := reserve(false, []string{}...)
	reserve(false) // of the room that another will take
	end()
	s.room = 3*size + size/2
	now = now.Add(lately)
	for _, n := range []*snapshot{a, c} {
		u, _ := s.get(n.Digest())
		u.release()
	}
	reserve(false, "b")() // that nobody reminded of
	add("d")
	reserve(false)
	for _, n := range []*snapshot{c, a} { // the order of reminders is nobody's
		u, _ := s.get(n.Digest())
		u.release()
	}
	used, _ := s.get(a.Digest())
	reserve(true, "c")() // not one in use
	used.release()
	add("e")
	s.room = 2*size + size/2
	if got := s.expire(); len(got) != 1 || names[got[0]] != "a" {
		t.Errorf("%d were dropped for want of room", len(got))
	}
	reserve(true, "d")()
	s.room = size + size/2
	if dropped, _, ok := s.reserve(size, inFolder, true); !ok || len(dropped) > 0 {
		t.Errorf("beside the current one another is to be current, and %d were dropped: %t", len(dropped), ok)
	}
	if _, _, ok := s.reserve(size, inHeap, true); !ok {
		t.Error("the room of the heap is the folder's")
	}
	if _, _, ok := s.reserve(size, inHeap, true); ok {
		t.Error("the heap has no bound")
	}
}

func TestSnapshotsThatAreReadAreKept(t *testing.T) {
	now := time.Unix(1000, 0)
	s := &snapshots{now: func() time.Time { return now }, room: 1 << 30, held: make(map[wire.Digest]*snapshot)}
	src := &sources{mounts: []catalog.Mount{{URL: "s3://bucket", Path: "/"}}, sources: []*scheme.Source{nil}}
	var all []wire.Digest
	add := func() {
		n := s.put(made(t, src.mounts[0], string(rune('a'+len(all)))), inHeap, src)
		all = append(all, n.Digest())
		s.setCurrent(n)
		n.release()
	}
	remind := func(of ...wire.Digest) {
		for _, d := range of {
			if n, ok := s.get(d); ok {
				n.release()
			}
		}
	}
	for range 2 * maxSnapshots {
		add()
	}
	for range 10 { // hours, of which every ten minutes somebody asks for all but the second
		now = now.Add(wire.RemindEvery)
		remind(all[0])
		remind(all[2:]...)
		s.expire()
	}
	if n, ok := s.get(all[1]); ok {
		n.release()
		t.Error("one that nobody asks for is kept")
	}
	if len(s.held) != len(all)-1 {
		t.Errorf("%d of %d that are read are kept", len(s.held), len(all)-1)
	}
	s.room = s.bytes(inHeap) * 3 / 4
	if s.expire(); s.bytes(inHeap) > s.room || len(s.held) <= maxSnapshots {
		t.Errorf("%d are kept, of %d bytes, where %d may be", len(s.held), s.bytes(inHeap), s.room)
	}
	now = now.Add(keepUnused)
	if s.expire(); len(s.held) != 1 {
		t.Errorf("%d are kept that nobody asks for", len(s.held)-1)
	}
}
