package store

// The policy judges a block by how often it was wanted, and a cache that is full of what was hot once refuses all
// that is new. Several readers of the same new file, each a little behind the other, would then have every block
// fetched by each of them. So the store remembers for a while what was let go, and a block that is wanted again
// before a quarter of the quota has been read since its last use is as good as hot. A loop that is larger than the
// cache comes back later than that: it stays with what the policy says of it.

const (
	// soon is the part of the quota that may be read between two uses of a block that is let go in between.
	soon = 4
	// maxLetGo bounds what is remembered.
	maxLetGo = 8192
)

// letGo are blocks that were let go lately, and when each was last used, by Store.read. Guarded by Store.mu.
type letGo struct {
	at    map[key]letGoAt
	order []key // a ring of the last of them
	next  int
}

type letGoAt struct {
	used int64
	slot int // of order
}

// note remembers a block.
func (l *letGo) note(k key, used int64) {
	if l.at == nil {
		l.at = make(map[key]letGoAt)
	}
	if len(l.order) < maxLetGo {
		l.order = append(l.order, k)
		l.at[k] = letGoAt{used, len(l.order) - 1}
		return
	}
	if old := l.order[l.next]; l.at[old].slot == l.next { // else it was noted again since
		delete(l.at, old)
	}
	l.order[l.next] = k
	l.at[k] = letGoAt{used, l.next}
	l.next = (l.next + 1) % maxLetGo
}

// take forgets a block and says whether it was last used after that.
func (l *letGo) take(k key, after int64) bool {
	e, known := l.at[k]
	if known {
		delete(l.at, k)
	}
	return known && e.used >= after
}
