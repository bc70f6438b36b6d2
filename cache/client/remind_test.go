package client

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
)

// forgetful stops all workers, clears their memory and starts them again.
func (k *cluster) forgetful(ids ...string) {
	k.t.Helper()
	for _, id := range ids {
		k.stop(id)
		if err := os.RemoveAll(filepath.Join(k.dir, id)); err != nil {
			k.t.Fatal(err)
		}
	}
	k.start(ids...)
	k.settled()
}

// folder is where the files of overFolder are.
func (k *cluster) folder() string { return strings.TrimPrefix(k.mounts[0].URL, "file://") }

func TestAReaderOutlivesTheMemoryOfAllWorkers(t *testing.T) {
	files := map[string][]byte{"dir/a": content(1, 100), "dir/b": content(2, 5<<20)}
	k := overFolder(t, files)
	k.start("w0", "w1")
	k.settled()
	c := k.dial(nil)
	if err := os.WriteFile(filepath.Join(k.folder(), "dir", "new"), []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	k.forgetful("w0", "w1") // both list the folder as it is now
	if now, err := c.Current(testContext(t)); err != nil || now == c.Snapshot().Digest() {
		t.Fatalf("the workers hold the reader's snapshot, %v", err)
	}
	for name, want := range files {
		got := make([]byte, len(want))
		if _, err := c.ReadAt(testContext(t), lookup(t, c, name), got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAReaderIsToldThatItsMountsAreGone(t *testing.T) {
	k := overFolder(t, map[string][]byte{"a": content(1, 100)})
	k.start("w0")
	c := k.dial(nil)
	was, other := k.mounts, t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "a"), []byte("another"), 0o644); err != nil {
		t.Fatal(err)
	}
	k.mounts = []worker.Mount{{Config: source.Config{URL: "file://" + other}, Path: "/"}}
	k.forgetful("w0")
	_, err := c.ReadAt(testContext(t), lookup(t, c, "a"), make([]byte, 100), 0)
	if !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "begin anew") || !strings.Contains(err.Error(), "does not mount any more") {
		t.Errorf("it was told: %v", err)
	}
	k.mounts = was // and are there again
	if err := os.WriteFile(filepath.Join(k.folder(), "new"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	k.forgetful("w0")
	eventually(t, "it reads on", func() bool {
		_, err := c.ReadAt(testContext(t), lookup(t, c, "a"), make([]byte, 100), 0)
		return err == nil
	})
}

// What is read from pages or descriptors asks for nothing: the snapshot is asked for all the same.
func TestWorkersAreRemindedOfASnapshotThatIsRead(t *testing.T) {
	k := newTier(t, map[string][]byte{"a": content(1, 100)})
	k.timing.remind = 10 * time.Millisecond
	k.start("w0", "w1")
	asked := map[string]*atomic.Int64{"w0": {}, "w1": {}}
	for id, n := range asked {
		count := func(r wire.Request) *answer {
			if r.Op == wire.OpSnapshot && r.Snapshot == k.snap.Digest() {
				n.Add(1)
			}
			return nil
		}
		k.worker(id).other.Store(&count)
	}
	k.dial(nil)
	for id, n := range asked {
		eventually(t, "worker "+id+" is asked again and again", func() bool { return n.Load() > 2 })
	}
}
