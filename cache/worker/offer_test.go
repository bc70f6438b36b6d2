package worker

import (
	"errors"
	"os"
	"slices"
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
	if err != nil || len(names) != 3 { // two snapshots, and which one is current
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

func TestSnapshotsThatAreReadAreKept(t *testing.T) {
	now := time.Unix(1000, 0)
	s := &snapshots{now: func() time.Time { return now }, memory: 1 << 30, held: make(map[wire.Digest]*snapshot)}
	src := &sources{mounts: []catalog.Mount{{URL: "s3://bucket", Path: "/"}}, sources: []*scheme.Source{nil}}
	var all []wire.Digest
	add := func() {
		n := s.put(made(t, src.mounts[0], string(rune('a'+len(all)))), src)
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
	s.memory = snapshotPart * s.bytes() * 3 / 4
	if s.expire(); s.bytes() > s.memory/snapshotPart || len(s.held) <= maxSnapshots {
		t.Errorf("%d are kept, of %d bytes, where %d may be", len(s.held), s.bytes(), s.memory/snapshotPart)
	}
	now = now.Add(keepUnused)
	if s.expire(); len(s.held) != 1 {
		t.Errorf("%d are kept that nobody asks for", len(s.held)-1)
	}
}
