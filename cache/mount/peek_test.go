package mount

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/stepcache/stepcache/cache/catalog"
)

// peeking is a Reader that has every second mebibyte at hand, in two pieces.
type peeking struct {
	*memory
	given, back atomic.Int64
}

func (p *peeking) Peek(i catalog.Index, off int64, b []byte) ([][]byte, func(), bool) {
	if off>>20%2 == 1 {
		return nil, nil, false
	}
	n := len(b)
	data := bytes.Clone(p.all[p.snap.Path(i)[1:]][off : off+int64(n)])
	p.given.Add(1)
	return [][]byte{data[:n/3], data[n/3:]}, func() {
		clear(data) // the kernel has them now
		p.back.Add(1)
	}, true
}

func TestBytesAtHandGoToTheKernelAndAreGivenBack(t *testing.T) {
	all := files{"one": content("one", 1), "page": content("page", 4096), "odd": content("odd", 7<<20+13)}
	s := snapshotOf(t, all)
	r := &peeking{memory: newMemory(s, all)}
	m := mounted(t, s, r, Options{})
	for name, want := range all {
		got, err := os.ReadFile(filepath.Join(m.Dir(), name))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if r.given.Load() == 0 || r.reads.Load() == 0 {
		t.Fatalf("%d reads found their bytes, %d did not", r.given.Load(), r.reads.Load())
	}
	eventually(t, "all bytes are given back", func() bool { return r.given.Load() == r.back.Load() })
	var total int64
	for _, data := range all {
		total += int64(len(data))
	}
	if st := m.Stats(); st.Bytes < total {
		t.Errorf("%d bytes counted of %d", st.Bytes, total)
	}
}

func TestListingAndStattingReadsNothing(t *testing.T) {
	all := files{}
	for _, dir := range []string{"", "a/", "a/b/"} {
		for n := range 50 {
			all[dir+string(rune('A'+n%26))+string(rune('a'+n/26))] = content("x", 10_000)
		}
	}
	s := snapshotOf(t, all)
	r := newMemory(s, all)
	m := mounted(t, s, r, Options{Mode: NoOpen})
	before, found := r.reads.Load(), 0
	err := filepath.WalkDir(m.Dir(), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			found++
			_, err = e.Info()
		}
		return err
	})
	if err != nil || found != len(all) {
		t.Fatal(found, err)
	}
	if n := r.reads.Load() - before; n != 0 {
		t.Errorf("%d reads of a listing", n)
	}
}
