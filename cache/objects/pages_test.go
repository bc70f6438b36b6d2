package objects

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

// pages is a bucket's listing, in pages of a thousand, and counts how often it is asked.
type pages struct {
	source.Source
	keys  []string // in order
	asked int
	told  int // names, in all
}

func (p *pages) Page(_ context.Context, q source.PageRequest) (page source.Page, err error) {
	p.asked++
	for _, k := range p.keys {
		if k <= q.After || !strings.HasPrefix(k, q.Prefix) {
			continue
		}
		rest := k[len(q.Prefix):]
		if i := strings.IndexByte(rest, '/'); q.Delimited && i >= 0 {
			k = q.Prefix + rest[:i+1]
			if k > q.After && !slices.Contains(page.Prefixes, k) {
				page.Prefixes = append(page.Prefixes, k)
			}
		} else {
			page.Objects = append(page.Objects, source.Object{Key: k, Version: "v"})
		}
		if len(page.Objects)+len(page.Prefixes) == q.Keys() {
			page.More = true
			break
		}
	}
	p.told += len(page.Objects) + len(page.Prefixes)
	return page, nil
}

// A page of a listing is one request to the bucket, also where it is as large as the bucket's own (it was two), and
// none is left out or told twice.
func TestAPageOfAListingAsksTheBucketOnce(t *testing.T) {
	for _, c := range []struct {
		keys, folders, max int
		delimiter          string
		asked              int
	}{
		{keys: 2500, max: 1000, asked: 3},
		{keys: 2000, max: 1000, asked: 3}, // the bucket does not tell that there is no third page
		{keys: 1000, max: 1000, asked: 2},
		{keys: 999, max: 1000, asked: 1},
		{keys: 25, max: 10, asked: 3},
		{keys: 25, folders: 25, max: 10, delimiter: "/", asked: 3},
		{keys: 2500, folders: 2500, max: 1000, delimiter: "/", asked: 3},
		{keys: 2500, folders: 1500, max: 1000, delimiter: "/", asked: 3},
	} {
		p := &pages{}
		for i := range c.keys {
			if i < c.folders {
				p.keys = append(p.keys, fmt.Sprintf("data/%05d/x", i))
			} else {
				p.keys = append(p.keys, fmt.Sprintf("data/%05d", i))
			}
		}
		n := &Names{}
		n.opened.Store(&[]*mount{{Source: p, pager: p, prefix: "data/"}})
		var got []string
		for after, more := "", true; more; {
			page, err := n.List(t.Context(), "", c.delimiter, after, c.max)
			if err != nil {
				t.Fatal(err)
			}
			if len(page.Objects)+len(page.Prefixes) > c.max {
				t.Fatalf("a page of %d and %d", len(page.Objects), len(page.Prefixes))
			}
			got = append(got, namesOf(page)...)
			if more = page.More; more && page.Next <= after {
				t.Fatalf("after %q comes %q", after, page.Next)
			}
			after = page.Next
		}
		if len(got) != c.keys || !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != c.keys {
			t.Errorf("%+v: %d names, %d different", c, len(got), len(slices.Compact(slices.Sorted(slices.Values(got)))))
		}
		if p.asked != c.asked || p.told > c.keys+c.asked {
			t.Errorf("%+v: the bucket was asked %d times, and told %d names", c, p.asked, p.told)
		}
	}
}

// A common prefix at or above a mount is known with the first key of the mount that can be read, of the bucket or on its
// way there: the listing of what is above a large mount paged through all of it.
func TestACommonPrefixAboveAMountAsksForOneKey(t *testing.T) {
	large, between, empty := &pages{}, &pages{}, &pages{}
	for i := range 2500 {
		large.keys = append(large.keys, fmt.Sprintf("data/%05d", i))
	}
	between.keys = []string{"x"}
	mounts := []*mount{
		{Source: large, pager: large, prefix: "data/", path: "a/b/"}, {Source: between, pager: between, path: "a/c/"},
		{Source: linked{}, pager: linked{}, path: "l-l/"}, {Source: empty, pager: empty, path: "z/"},
	}
	for _, c := range []struct {
		prefix, delimiter, after string
		want                     []string
		asked                    int
	}{
		{delimiter: "/", want: []string{"a/", "l-l/", "z/"}, asked: 1},
		{delimiter: "/", after: "a/", want: []string{"l-l/", "z/"}},
		{delimiter: "/", after: "a/b/data", want: []string{"l-l/", "z/"}, asked: 1},
		{prefix: "a", delimiter: "/", want: []string{"a/"}, asked: 1},
		{prefix: "a/", delimiter: "/", want: []string{"a/b/", "a/c/"}, asked: 1},
		{prefix: "a/b/0000", delimiter: "/", want: []string{"a/b/00000", "a/b/00001", "a/b/00002", "a/b/00003", "a/b/00004", "a/b/00005", "a/b/00006", "a/b/00007", "a/b/00008", "a/b/00009"}, asked: 1},
		{delimiter: "-", after: "l", want: []string{"l-", "z/1"}},
	} {
		large.asked = 0
		l := &lister{prefix: c.prefix, delimiter: c.delimiter, after: c.after, max: 100}
		for _, pending := range []string{"a/b/00000", "a/b/1", "z/1"} {
			if strings.HasPrefix(pending, c.prefix) {
				l.over = append(l.over, entry{name: pending})
			}
		}
		for _, m := range mounts {
			if err := l.list(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		if got := namesOf(l.page); !slices.Equal(got, c.want) || l.page.More || large.asked != c.asked {
			t.Errorf("%+v: %q, more: %v; the large mount's bucket was asked %d times", c, got, l.page.More, large.asked)
		}
	}
}

// linked is a bucket with links that cannot be followed.
type linked struct{ source.Source }

func (linked) Page(_ context.Context, q source.PageRequest) (page source.Page, _ error) {
	for _, o := range []source.Object{{Key: "a", Skip: "a link"}, {Key: "b", Version: "v"}, {Key: "c/x", Skip: "a link"}, {Key: "d", Version: "v"}, {Key: "e", Skip: "a link"}} {
		if o.Key > q.After {
			page.Objects = append(page.Objects, o)
		}
	}
	return page, nil
}

func TestWhatCannotBeReadIsNotListed(t *testing.T) {
	n := &Names{}
	n.opened.Store(&[]*mount{{Source: linked{}, pager: linked{}}})
	for _, delimiter := range []string{"", "/"} {
		for _, most := range []int{1, 10} {
			var got []string
			for after, more := "", true; more; {
				page, err := n.List(t.Context(), "", delimiter, after, most)
				if err != nil {
					t.Fatal(err)
				}
				got, more, after = append(got, namesOf(page)...), page.More, page.Next
			}
			if !slices.Equal(got, []string{"b", "d"}) {
				t.Errorf("delimiter %q, %d a page: %q", delimiter, most, got)
			}
		}
	}
}

// namesOf are a page's, in order.
func namesOf(p gateway.Page) []string {
	out := slices.Clone(p.Prefixes)
	for _, o := range p.Objects {
		out = append(out, o.Key)
	}
	slices.Sort(out)
	return out
}

// begun has uploads under way, some of which are not below what it is asked for.
type begun struct {
	source.Writer
	uploads []source.Upload
}

func (b begun) Uploads(_ context.Context, _, after string, max int) ([]source.Upload, error) {
	i := 0
	for i < len(b.uploads) && b.uploads[i].Key <= after {
		i++
	}
	return b.uploads[i:min(i+max, len(b.uploads))], nil
}

// Every upload is come to, however many there are, also where the list is cut within those of a key.
func TestEachUploadIsComeTo(t *testing.T) {
	var b begun
	for i := range 2*maxUploads + 5 {
		b.uploads = append(b.uploads, source.Upload{Key: fmt.Sprintf("p/%05d", i/7), ID: fmt.Sprint(i)})
	}
	came := make(map[string]bool)
	err := eachUpload(t.Context(), &mount{writer: b, prefix: "p/"}, func(u source.Upload) error { came[u.ID] = true; return nil })
	if err != nil || len(came) != len(b.uploads) {
		t.Errorf("%d of %d, %v", len(came), len(b.uploads), err)
	}
	for i := range b.uploads { // more of one key than are held
		b.uploads[i].Key = "p/k"
	}
	if err := eachUpload(t.Context(), &mount{writer: b, prefix: "p/"}, func(source.Upload) error { return nil }); err != nil {
		t.Error(err)
	}
}

// A list of uploads that is cut says so, over several buckets too, and not where it is just not.
func TestAListOfUploadsSaysWhenItIsCut(t *testing.T) {
	uploads := func(n int, prefix string) (b begun) {
		for i := range n {
			b.uploads = append(b.uploads, source.Upload{Key: fmt.Sprintf("%s%05d", prefix, i), ID: "x"})
		}
		return b
	}
	const half = maxUploads / 2
	for _, c := range []struct {
		a, b begun
		want int
		more bool
	}{
		{uploads(half, "p/"), uploads(half, "q/"), maxUploads, false},
		{uploads(half, "p/"), uploads(half+1, "q/"), maxUploads + 1, true},
		{uploads(maxUploads+1, "p/"), uploads(1, "q/"), maxUploads + 1, true},
		{uploads(maxUploads, "p/"), uploads(1, "q/"), maxUploads + 1, true},
		{uploads(maxUploads, "p/"), uploads(0, "q/"), maxUploads, false},
		{uploads(maxUploads+5, "elsewhere/"), uploads(0, "q/"), 0, true},
	} {
		n := &Names{}
		n.opened.Store(&[]*mount{{writer: c.a, path: "a/", prefix: "p/"}, {writer: c.b, path: "b/", prefix: "q/"}})
		found, more, err := n.Uploads(t.Context(), "")
		if err != nil || len(found) != c.want || more != c.more {
			t.Errorf("of %d and %d: %d, more: %v, %v", len(c.a.uploads), len(c.b.uploads), len(found), more, err)
		}
	}
}
