package worker

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// Of two mounts of one bucket, which have one URL, each has its own figures.
func TestMountsOfOneBucketAreCountedApart(t *testing.T) {
	tr := newTier(t, map[string][]byte{"train/a": content(1000, 1), "ref/b": content(10, 2)})
	tr.mounts = []Mount{
		{Config: source.Config{URL: "file://" + tr.root}, Path: "/train"},
		{Config: source.Config{URL: "file://" + tr.root}, Path: "/ref"},
	}
	tr.start(1)
	snap := tr.snapshot()
	c := tr.dial(0)
	for _, path := range []string{"/train/train/a", "/ref/ref/b"} {
		i := index(t, snap, path)
		if _, err := c.read(i, 0, int(mustRing(t, tr, i).Size), 0); err != nil {
			t.Fatal(err)
		}
	}
	_, text := tr.get(0, wire.PathMetrics)
	for path, bytes := range map[string]int{"/train": 1000, "/ref": 10} {
		if want := fmt.Sprintf("stepcache_source_read_bytes_total{mount=%q,source=%q} %d\n", path, "file://"+tr.root, bytes); !strings.Contains(text, want) {
			t.Errorf("not among the metrics: %s", want)
		}
	}
}

// An error that never was has a series, at zero: the first burst of it would not be seen otherwise.
func TestErrorsAreCountedFromZero(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": nil})
	tr.start(1)
	_, text := tr.get(0, wire.PathMetrics)
	for _, s := range []wire.Status{wire.Changed, wire.Overloaded, wire.Late} {
		if want := fmt.Sprintf("stepcache_worker_errors_total{status=%q} 0\n", s); !strings.Contains(text, want) {
			t.Errorf("not among the metrics: %s", want)
		}
	}
	if strings.Contains(text, `status="ok"`) || strings.Contains(text, "unknown status") {
		t.Errorf("what is no error is counted as one: %s", text)
	}
}
