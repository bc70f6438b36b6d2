package artifact_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/artifact"
)

// testSize is a size in the environment, or the usual one.
func testSize(t *testing.T, name string, usual int64) int64 {
	v := os.Getenv(name)
	if v == "" {
		return usual
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q is no number", name, v)
	}
	return n
}

// A directory whose listing has several pages. STEPCACHE_TEST_FILES=10000 makes it one of ten thousand files.
func TestDirectoryOfThousandsOfFiles(t *testing.T) {
	files := int(testSize(t, "STEPCACHE_TEST_FILES", 2500))
	f := start(t, artifact.Options{})
	f.configuration = fmt.Sprintf("{endpoint: %q, bucket: %s}", f.server.Direct(), bucketName)
	for i := range files {
		name := fmt.Sprintf("out/%02d/%04d", i%100, i)
		if i < 100 {
			if err := os.MkdirAll(filepath.Dir(f.path(name)), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(f.path(name), []byte(strconv.Itoa(i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	art := f.artifact("wf/out")
	if err := f.save(t.Context(), f.path("out"), art); err != nil {
		t.Fatal(err)
	}
	names, err := f.list(t.Context(), art)
	if err != nil || len(names) != files {
		t.Fatalf("%d names, %v", len(names), err)
	}
	if err := f.load(t.Context(), art, f.path("in")); err != nil {
		t.Fatal(err)
	}
	for i := range files {
		got, err := os.ReadFile(f.path(fmt.Sprintf("in/%02d/%04d", i%100, i)))
		if err != nil || string(got) != strconv.Itoa(i) {
			t.Fatalf("%d: %q, %v", i, got, err)
		}
	}
	if err := f.delete(t.Context(), art); err != nil {
		t.Fatal(err)
	}
	if left := f.objects(t); len(left) > 0 {
		t.Errorf("%d objects left", len(left))
	}
}

// Several large artifacts pass at once in less than what a container of 256 MiB has for them.
// STEPCACHE_TEST_LARGE=2048 makes each 2 GiB.
func TestLargeArtifactsInConstantMemory(t *testing.T) {
	size := testSize(t, "STEPCACHE_TEST_LARGE", 64)
	size <<= 20
	f := start(t, artifact.Options{})
	f.configuration = fmt.Sprintf("{endpoint: %q, bucket: %s}", f.server.Direct(), bucketName)
	path := f.path("out")
	sparse, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := sparse.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, size / 3, size - 9} {
		if _, err := sparse.WriteAt([]byte("stepcache"), off); err != nil {
			t.Fatal(err)
		}
	}
	sparse.Close()

	heap := watchHeap(t)
	g, ctx := errgroup.WithContext(t.Context())
	g.Go(func() error {
		if err := f.save(ctx, path, f.artifact("k")); err != nil {
			return err
		}
		return f.load(ctx, f.artifact("k"), f.path("in"))
	})
	for i := range 2 {
		g.Go(func() error {
			in, err := os.Open(path)
			if err != nil {
				return err
			}
			defer in.Close()
			key := fmt.Sprint("s", i)
			if err := f.saveStream(ctx, in, f.artifact(key)); err != nil {
				return err
			}
			return f.open(ctx, f.artifact(key), io.Discard)
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	// The client's own buffers, in the same process, are in it too.
	most := heap()
	t.Logf("%d MiB of heap at most", most>>20)
	if most > 160<<20 {
		t.Errorf("%d MiB of heap live at once", most>>20)
	}
	got, err := os.Open(f.path("in"))
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if info, err := got.Stat(); err != nil || info.Size() != size {
		t.Fatalf("%v, %v", info, err)
	}
	for _, off := range []int64{0, size / 3, size - 9} {
		b := make([]byte, 9)
		if _, err := got.ReadAt(b, off); err != nil || string(b) != "stepcache" {
			t.Errorf("at %d: %q, %v", off, b, err)
		}
	}
}

// watchHeap collects garbage again and again, and returns what ends that and tells the most bytes that
// were live.
func watchHeap(t *testing.T) func() uint64 {
	var most atomic.Uint64
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			runtime.GC()
			metrics.Read(live) // not what was allocated since, of which nobody knows whether it is live
			most.Store(max(most.Load(), live[0].Value.Uint64()))
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	end := func() uint64 {
		select {
		case <-stop:
		default:
			close(stop)
		}
		<-ended
		return most.Load()
	}
	t.Cleanup(func() { end() })
	return end
}
