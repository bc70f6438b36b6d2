package sourcetest

import (
	"bytes"
	"io"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

// put puts content and checks what Put says of it.
func (s *suite) put(t *testing.T, key string, content []byte) source.Object {
	t.Helper()
	o, err := s.src.Put(t.Context(), key, bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatalf("put %s: %v", name(s.src, key), err)
	}
	if o.Key != key || o.Size != int64(len(content)) || o.Version == "" {
		t.Fatalf("put %s of %d bytes answered %+v", name(s.src, key), len(content), o)
	}
	return o
}

func (s *suite) get(t *testing.T, o source.Object, off, length int64) ([]byte, error) {
	t.Helper()
	b, err := s.src.Get(t.Context(), o, off, length)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	return io.ReadAll(b)
}

func testPutStatGet(t *testing.T, s *suite) {
	want := content(1, 100_000)
	put := s.put(t, "a/b.bin", want)
	o, err := s.src.Stat(t.Context(), "a/b.bin")
	if err != nil {
		t.Fatal(err)
	}
	if o.Key != put.Key || o.Size != put.Size || o.Version != put.Version {
		t.Errorf("stat says %+v, put said %+v", o, put)
	}
	for _, r := range [][2]int64{{0, 100_000}, {0, 1}, {99_999, 1}, {4095, 4098}, {100_000, 0}} {
		got, err := s.get(t, o, r[0], r[1])
		if err != nil || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
			t.Errorf("range %d+%d: %d bytes, %v", r[0], r[1], len(got), err)
		}
	}
}
