package objects_test

import "testing"

// What readers get is counted at the workers, through whichever door; the S3 endpoint's own counts leave mounts out.
func TestReadersAreCountedByTheirDoor(t *testing.T) {
	tr := newTier(t, "").start(2)
	const size = 300_000
	p := content(size, 1)
	key := tr.keyOwnedBy(0, "counted")
	etag := tr.mustPut(0, key, p).ETag
	sum := func(name string) (n int64) {
		for i := range tr.workers {
			n += tr.metric(i, name)
		}
		return n
	}
	for i := range tr.workers { // of worker 1, whose copy comes from worker 0, which is no reader
		tr.reads(i, key, string(p))
	}
	names := tr.names()
	got := make([]byte, size/3)
	for off := int64(0); off < size; off += size / 3 {
		if n, err := names.ReadAt(t.Context(), key, etag, got, off); n != len(got) || err != nil {
			t.Fatalf("%d bytes from %d: %v", n, off, err)
		}
	}
	for name, want := range map[string]int64{
		"stepcache_objects_reads_total": 2, "stepcache_objects_read_bytes_total": 2 * size, "stepcache_worker_served_bytes_total": 3 * size,
	} {
		if n := sum(name); n != want {
			t.Errorf("%s: %d, want %d", name, n, want)
		}
	}
}
