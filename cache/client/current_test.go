package client

import (
	"errors"
	"testing"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/wire"
)

func TestCurrentTellsTheSnapshotOfNewReaders(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 1000)})
	k.start("a", "b")
	got, err := Current(testContext(t), k.config())
	if err != nil || got != k.snap.Digest() {
		t.Fatalf("%x %v", got, err)
	}
	c := k.dial(nil)
	if got, err := c.Current(testContext(t)); err != nil || got != k.snap.Digest() {
		t.Fatalf("%x %v", got, err)
	}
	config := k.config()
	config.Keys = wire.GenerateKeys()
	if got, err := Current(testContext(t), config); !errors.Is(err, wire.ErrUnauthorized) || got != (catalog.Digest{}) {
		t.Errorf("with a key that is none of theirs: %x %v", got, err)
	}
	c.Close()
	if _, err := c.Current(testContext(t)); !errors.Is(err, errClosed) {
		t.Error(err)
	}
}
