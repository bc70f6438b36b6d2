package objects

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sort"
	"strconv"
	"strings"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

// entry is an object or a common prefix of a listing.
type entry struct {
	name   string // key or common prefix, in the dataset
	object source.Object
	prefix bool
}

// List implements gateway.Objects: the bucket's listing, which has every acknowledged write, or with those that
// are not there yet. They are asked for first: what is brought to the bucket meanwhile is found there.
func (n *Names) List(ctx context.Context, prefix, delimiter, after string, max int) (gateway.Page, error) {
	n.counts.lists.Add(1)
	if max < 1 {
		return gateway.Page{}, fmt.Errorf("%w: a page of %d entries", source.ErrInvalid, max)
	}
	mounts, err := n.mounts()
	if err != nil {
		return gateway.Page{}, err
	}
	l := &lister{prefix: prefix, delimiter: delimiter, after: after, max: max}
	if n.back != nil {
		if err := l.pending(ctx, n); err != nil {
			return gateway.Page{}, fmt.Errorf("list %q: %w", prefix, err)
		}
	}
	for _, m := range mounts {
		if err := l.list(ctx, m); err != nil && !errors.Is(err, errFull) {
			return gateway.Page{}, fmt.Errorf("list %q: %w", prefix, err)
		} else if err != nil {
			break
		}
	}
	if l.upto != "" && !l.page.More {
		l.more()
	}
	return l.page, nil
}

// errFull ends a listing whose page is full.
var errFull = errors.New("the page is full")

// lister fills one page.
type lister struct {
	prefix, delimiter, after string
	max                      int
	page                     gateway.Page
	last                     string // common prefix that was added last
	// over are objects that the bucket does not have yet, in order. Where upto is not empty, that is the last
	// name up to which they are known.
	over []entry
	upto string
}

// pending asks the members what the bucket does not have yet of the page.
func (l *lister) pending(ctx context.Context, n *Names) error {
	newest, _, upto, err := n.back.ask(ctx, url.Values{"prefix": {l.prefix}, "after": {l.after}, "limit": {strconv.Itoa(l.max + 1)}})
	if err != nil {
		return err
	}
	for key, r := range newest {
		if p, err := n.locate(key); err == nil {
			l.over = append(l.over, entry{name: key, object: versionOf(p, r).object})
		}
	}
	sort.Slice(l.over, func(i, j int) bool { return l.over[i].name < l.over[j].name })
	l.upto = upto
	return nil
}

// more ends the page with the last name up to which it is known.
func (l *lister) more() { l.page.More, l.page.Next = true, max(l.page.Next, l.upto) }

// before adds the objects of the mount that the bucket does not have yet, up to a name.
func (l *lister) before(m *mount, name string, all bool) error {
	for len(l.over) > 0 && l.over[0].name < m.path {
		l.over = l.over[1:] // of a mount that is skipped
	}
	for len(l.over) > 0 && strings.HasPrefix(l.over[0].name, m.path) && (all || l.over[0].name < name) {
		e := l.over[0]
		l.over = l.over[1:]
		if err := l.add(e); err != nil {
			return err
		}
	}
	return nil
}

// prefixOf is a prefix of the dataset's keys as one of the mount's bucket; false when no key of the mount
// can start with it.
func (m *mount) prefixOf(prefix string) (string, bool) {
	if rel, ok := strings.CutPrefix(prefix, m.path); ok {
		return m.prefix + rel, true
	}
	return m.prefix, strings.HasPrefix(m.path, prefix)
}

// list adds what a mount has.
func (l *lister) list(ctx context.Context, m *mount) error {
	prefix, ok := m.prefixOf(l.prefix)
	if !ok || m.path != "" && below(l.after, m.path) {
		return nil
	}
	// Everything up to after is skipped; a common prefix skips all that starts with it.
	after := ""
	if rel, ok := strings.CutPrefix(l.after, m.path); ok && rel != "" {
		after = m.prefix + rel
	}
	if l.skips(m.path) {
		return nil
	}
	// The bucket groups by slashes itself, unless the group is above the mount.
	delimited := l.delimiter == "/" && strings.HasPrefix(l.prefix, m.path)
	// A group at or above the mount has all its keys: one stands for them.
	rest, above := strings.CutPrefix(m.path, l.prefix)
	grouped := above && l.delimiter != "" && strings.Contains(rest, l.delimiter)
	// No more is asked for than fills the page; where what comes is to be grouped or left out, the rest in whole pages.
	most := 0
	if delimited || l.delimiter == "" {
		most = max(1, l.max-l.len())
	}
	if delimited && after != "" {
		most++ // the group that the page begins after or within comes once more
	}
	for ; ; most = 0 {
		page, err := m.pager.Page(ctx, source.PageRequest{Prefix: prefix, After: after, Delimited: delimited, Max: most})
		if err != nil {
			return err
		}
		entries := merge(m, page)
		if len(entries) == 0 && page.More {
			return fmt.Errorf("%w: %s lists nothing and says that there is more", source.ErrUnavailable, m.URL())
		}
		for _, e := range entries {
			if err := l.before(m, e.name, false); err != nil {
				return err
			}
			if len(l.over) > 0 && l.over[0].name == e.name && !e.prefix {
				e, l.over = l.over[0], l.over[1:] // it replaces what the bucket has
			}
			if err := l.add(e); err != nil {
				return err
			}
			if grouped && e.object.Skip == "" {
				return nil
			}
		}
		if !page.More {
			return l.before(m, "", true)
		}
		if l.full() {
			// That there is more is the bucket's word: it is not asked what that is.
			l.page.More = true
			return errFull
		}
		after = m.prefix + entries[len(entries)-1].name[len(m.path):]
	}
}

// below says whether every key that starts with path comes before after.
func below(after, path string) bool {
	return after > path && !strings.HasPrefix(after, path)
}

// skips says whether name lies below the common prefix that the page begins after.
func (l *lister) skips(name string) bool {
	return l.delimiter != "" && len(l.after) > len(l.prefix) && strings.HasPrefix(l.after, l.prefix) &&
		strings.HasSuffix(l.after, l.delimiter) && strings.HasPrefix(name, l.after)
}

// merge is a page in the order of bytes.
func merge(m *mount, page source.Page) []entry {
	out := make([]entry, 0, len(page.Objects)+len(page.Prefixes))
	for _, o := range page.Objects {
		out = append(out, entry{name: m.path + strings.TrimPrefix(o.Key, m.prefix), object: o})
	}
	for _, p := range page.Prefixes {
		out = append(out, entry{name: m.path + strings.TrimPrefix(p, m.prefix), prefix: true})
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].name < out[j].name })
	return out
}

func (l *lister) len() int { return len(l.page.Objects) + len(l.page.Prefixes) }

func (l *lister) full() bool { return l.len() == l.max }

// add adds an entry, or the common prefix that it is below.
func (l *lister) add(e entry) error {
	if e.name == "" || e.object.Skip != "" {
		return nil // the mount's own marker, or nothing that can be read
	}
	if l.upto != "" && e.name > l.upto {
		l.more()
		return errFull
	}
	if l.delimiter != "" && !e.prefix {
		if i := strings.Index(e.name[len(l.prefix):], l.delimiter); i >= 0 {
			e = entry{name: e.name[:len(l.prefix)+i+len(l.delimiter)], prefix: true}
		}
	}
	if e.name <= l.after || l.skips(e.name) || e.prefix && e.name == l.last {
		return nil
	}
	if l.full() {
		l.page.More = true
		return errFull
	}
	l.page.Next = e.name
	if e.prefix {
		l.last = e.name
		l.page.Prefixes = append(l.page.Prefixes, e.name)
		return nil
	}
	l.page.Objects = append(l.page.Objects, version{object: e.object}.info(e.name))
	return nil
}
