package objects

import (
	"container/list"
	"fmt"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/store"
)

// Uploads that nobody completes are remembered within a bound, the last of them; parts that are put again, or of an
// upload that turns out too large, are not counted twice, and nothing of them stays in the store.
func TestPartsAreRememberedWithinABound(t *testing.T) {
	s, err := store.Open(t.Context(), store.Options{Dir: t.TempDir(), Quota: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p := parts{stager: &stager{store: s, quota: 4 << 20}, of: make(map[uploadName]*list.Element)}
	put := func(u uploadName, number, size int) {
		t.Helper()
		st := p.begin(u, int64(size))
		st.write(t.Context(), make([]byte, size))
		if o, ok := st.finishPart(); ok {
			p.add(u, number, fmt.Sprint(number), o)
		}
		st.end()
	}
	u := uploadName{"k", "u"}
	for range 10 {
		put(u, 1, 100<<10)
	}
	put(u, 2, 200<<10)
	if held := p.held(u); len(held) != 2 || p.count != 2 || p.of[u].Value.(*keptUpload).bytes != 300<<10 {
		t.Errorf("held %+v, %d counted", held, p.count)
	}
	if n := s.Stats().Objects; n != 2 {
		t.Errorf("%d objects of 2 parts", n)
	}
	if o := p.object(u, 2, "another"); o != (ring.Object{}) {
		t.Error("a part with another ETag was taken for it")
	}
	put(u, 3, 800<<10)
	put(u, 1, 1<<10)
	if held := p.held(u); len(held) != 0 || p.count != 0 || s.Stats().Objects != 0 || s.Stats().Pinned != 0 {
		t.Errorf("of what is too large %+v are held, %d objects", held, s.Stats().Objects)
	}
	for i := range maxParts + 100 {
		p.begin(uploadName{"k", fmt.Sprint(i)}, 0)
	}
	if p.order.Len() != maxParts || len(p.of) != maxParts || p.of[u] != nil {
		t.Errorf("%d uploads are remembered, %d in order", len(p.of), p.order.Len())
	}
	put(uploadName{"k", fmt.Sprint(maxParts)}, 1, 5)
	p.drop(uploadName{"k", fmt.Sprint(maxParts)})
	p.drop(u)
	if p.count != 0 || s.Stats().Objects != 0 {
		t.Errorf("%d parts after they were dropped, %d objects", p.count, s.Stats().Objects)
	}
}
