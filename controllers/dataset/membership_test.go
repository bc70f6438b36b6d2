package dataset

import (
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
)

func TestMembersThatComeBackAreMarked(t *testing.T) {
	list := func(epoch uint64, ids ...string) (m ring.Membership) {
		m.Epoch = epoch
		for _, id := range ids {
			m.Members = append(m.Members, ring.Member{ID: id})
		}
		return m
	}
	for _, c := range []struct {
		name         string
		before       ring.Membership
		cached, back bool
		want         []uint64 // of w-0 and w-1
	}{
		{"to others that hold bytes", list(7, "w-0"), true, false, []uint64{0, 8}},
		{"to a tier that is empty", list(7, "w-0"), false, false, []uint64{0, 0}},
		{"with write policy Back, to a tier whose cache is empty", list(7, "w-0"), false, true, []uint64{0, 8}},
		{"with write policy Back, all of them", list(7, "w-2"), false, true, []uint64{8, 8}},
		{"with write policy Back, nobody", list(7, "w-0", "w-1"), true, true, []uint64{0, 0}},
		{"after the list was lost, what they hold counts", list(0), true, true, []uint64{0, 0}},
	} {
		next := list(8, "w-0", "w-1")
		markNew(c.before, next, c.cached, c.back)
		for i, m := range next.Members {
			if m.Joined != c.want[i] {
				t.Errorf("%s: %s joined at %d, want %d", c.name, m.ID, m.Joined, c.want[i])
			}
		}
	}
	next := list(9, "w-0")
	next.Members[0].Joined = 5
	if markNew(list(8, "w-0"), next, true, true); next.Members[0].Joined != 5 {
		t.Errorf("one that stayed: %d", next.Members[0].Joined)
	}
}
