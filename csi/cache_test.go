package csi

import (
	"bytes"
	"testing"

	"github.com/stepcache/stepcache/cache/catalog"
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
	if set.cache != nil || s.budget.take(64<<20) != 64<<20 {
		t.Error("the node cache stays although nobody uses it")
	}
}
