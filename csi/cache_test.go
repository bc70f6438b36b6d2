package csi

import (
	"bytes"
	"testing"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/wire"
)

// A mount that is ending is out of the table, and yet its client reads and fills the node's cache.
func TestTheNodeCacheStaysUntilItsLastClientIsClosed(t *testing.T) {
	needMounts(t)
	want := content("a", 3<<20)
	k := newTier(t, map[string][]byte{"a": want})
	k.publish(1, "")
	c := newMachine(t, k).config()
	c.NodeMemory = 64 << 20
	s := newService(c.withDefaults())
	set := &dataset{namespace: "argo", name: "genomes", keys: k.keys.Read, copies: 1, memory: 64 << 20, turn: make(chan struct{}, 1)}
	one, err := s.dial(testContext(t), set, catalog.Digest{})
	if err != nil {
		t.Fatal(err)
	}
	two, err := s.dial(testContext(t), set, catalog.Digest{})
	if err != nil {
		t.Fatal(err)
	}
	cache := set.cache
	if cache == nil {
		t.Fatal("no node cache")
	}
	s.hangUp(set, one)
	s.shrink(set)
	if set.cache != cache {
		t.Fatal("the node cache went although a client may use it")
	}
	i, ok := two.Client().Snapshot().Lookup("/a")
	if !ok {
		t.Fatal("no file")
	}
	p := make([]byte, len(want))
	if _, err := two.Client().ReadAt(testContext(t), i, p, 0); err != nil || !bytes.Equal(p, want) {
		t.Fatal(err)
	}
	eventually(t, "what was read to be in the node's cache", func() bool { return cache.store.Stats().Bytes == int64(len(want)) })
	s.hangUp(set, two)
	s.shrink(set)
	if set.cache != nil || s.budget.left != s.budget.total {
		t.Error("the node cache stays although nobody uses it")
	}
}

// What a namespace that may only read says of copies and memory is nothing to the Dataset's own.
func TestSettingsAreOfTheDatasetsOwnNamespace(t *testing.T) {
	s := &service{sets: make(map[string]*dataset)}
	key, newer := wire.GenerateKeys().Read[0], wire.GenerateKeys().Read[0]
	let := func(what, namespace string, key wire.Key, copies int, want int) {
		t.Helper()
		set := s.admitted(volume{inline: what != "", namespace: "argo", dataset: "genomes", keys: []wire.Key{key}, pod: pod{namespace: namespace}, copies: copies, memory: int64(copies)}, key)
		if set.copies != want || set.memory != int64(want) {
			t.Errorf("%s of %q: %d copies, %d bytes, want %d", what, namespace, set.copies, set.memory, want)
		}
	}
	let("first", "friends", key, 9, 9)
	s.sets["argo/genomes"].mounts = []*mounted{{copies: 9}}
	let("another", "friends", key, 8, 9)
	let("own", "argo", key, 2, 2)
	let("another", "friends", key, 9, 2)
	let("with a new key", "friends", newer, 9, 2)
	let("own, of an older Secret", "argo", newer, 1, 2)
	let("", "", key, 3, 3) // a PersistentVolume
	let("another", "friends", newer, 9, 3)
	// A mount that reads other copies is not shared.
	if m := s.use(s.sets["argo/genomes"], catalog.Digest{}); m != nil {
		t.Errorf("a mount of %d copies", m.copies)
	}
}
