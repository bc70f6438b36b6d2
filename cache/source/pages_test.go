package source_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source"
)

// keys is a store of sorted keys that answers pages as S3 does.
type keys struct {
	at    func(i int) string
	n     int
	page  int
	pages atomic.Int64
	fault func(source.PageRequest) error
}

func sorted(list []string, page int) *keys {
	sort.Strings(list)
	return &keys{at: func(i int) string { return list[i] }, n: len(list), page: page}
}

func (k *keys) Page(ctx context.Context, q source.PageRequest) (source.Page, error) {
	k.pages.Add(1)
	if k.fault != nil {
		if err := k.fault(q); err != nil {
			return source.Page{}, err
		}
	}
	var p source.Page
	i := sort.Search(k.n, func(i int) bool { return k.at(i) > q.After && k.at(i) >= q.Prefix })
	for ; i < k.n && strings.HasPrefix(k.at(i), q.Prefix); i++ {
		if len(p.Objects)+len(p.Prefixes) == k.page {
			p.More = true
			return p, nil
		}
		key := k.at(i)
		if d := strings.IndexByte(key[len(q.Prefix):], '/'); q.Delimited && d >= 0 {
			folder := key[:len(q.Prefix)+d+1]
			p.Prefixes = append(p.Prefixes, folder)
			i += sort.Search(k.n-i, func(j int) bool { return !strings.HasPrefix(k.at(i+j), folder) }) - 1
			continue
		}
		p.Objects = append(p.Objects, source.Object{Key: key, Size: int64(i), Version: "v"})
	}
	return p, nil
}

// Whatever the keys and the page size, every key below the prefix is listed once, and the pages are
// hardly more than the keys fill.
func TestListPagesYieldsEveryKeyOnce(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	parts := []string{"a", "b", "a-", "a.", "a0", "", "é", "zz", "~"}
	for round := range 300 {
		set := map[string]bool{}
		for range r.IntN(2000) {
			var key []string
			for range 1 + r.IntN(5) {
				key = append(key, parts[r.IntN(len(parts))])
			}
			if k := strings.Join(key, "/"); k != "" {
				set[k] = true
			}
		}
		var all []string
		for k := range set {
			all = append(all, k)
		}
		k := sorted(all, 1+r.IntN(50))
		prefix := []string{"", "a", "a/", "a-/", "b/a/", "no", "a//"}[r.IntN(7)]
		var want, got []string
		for _, key := range all {
			if strings.HasPrefix(key, prefix) {
				want = append(want, key)
			}
		}
		err := source.ListPages(t.Context(), k, prefix, func(o source.Object) error { got = append(got, o.Key); return nil })
		sort.Strings(got)
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("round %d, prefix %q, pages of %d: %v\n%s", round, prefix, k.page, err, cmp.Diff(want, got))
		}
	}
}

// A bucket that could be cut into far more parts than help costs hardly more pages than a flat one.
func TestListPagesCostsNoExtraPages(t *testing.T) {
	for name, at := range map[string]func(int) string{
		"a folder an object": func(i int) string { return fmt.Sprintf("f%06d/x", i) },
		"one flat folder":    func(i int) string { return fmt.Sprintf("data/%06d", i) },
		"a thousand folders": func(i int) string { return fmt.Sprintf("a/b/%03d/%06d", i/100, i) },
		"one deep chain":     func(i int) string { return strings.Repeat("d/", i%10) + fmt.Sprint(i) },
	} {
		var list []string
		for i := range 100_000 {
			list = append(list, at(i))
		}
		k := sorted(list, 1000)
		n := 0
		if err := source.ListPages(t.Context(), k, "", func(source.Object) error { n++; return nil }); err != nil || n != 100_000 {
			t.Errorf("%s: %d keys, %v", name, n, err)
		}
		if p := k.pages.Load(); p > 150 {
			t.Errorf("%s: %d pages for 100", name, p)
		}
	}
}

func TestListPagesMillionKeysInBoundedMemory(t *testing.T) {
	const n = 1_000_000
	k := &keys{at: func(i int) string { return fmt.Sprintf("f%05d/%07d", i/1000, i) }, n: n, page: 1000}
	live := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, most, listed := live(), uint64(0), 0
	err := source.ListPages(t.Context(), k, "", func(source.Object) error {
		if listed++; listed%(n/5) == 0 {
			most = max(most, live())
		}
		return nil
	})
	if err != nil || listed != n {
		t.Fatalf("listed %d, %v", listed, err)
	}
	if grown := int64(most) - int64(before); grown > 48<<20 { // held, they would be 150 MB
		t.Errorf("%d bytes live while listing", grown)
	}
}

func TestListPagesRefusesAStoreOutOfOrder(t *testing.T) {
	none := func(source.Object) error { return nil }
	for name, p := range map[string]pageFunc{
		"unordered": func(source.PageRequest) source.Page {
			return source.Page{Objects: []source.Object{{Key: "b"}, {Key: "a"}}}
		},
		"ignores start-after": func(source.PageRequest) source.Page {
			return source.Page{Objects: []source.Object{{Key: "a"}}, More: true}
		},
		"ignores the prefix": func(source.PageRequest) source.Page { return source.Page{Objects: []source.Object{{Key: "other"}}} },
		"empty without end":  func(source.PageRequest) source.Page { return source.Page{More: true} },
	} {
		prefix := ""
		if name == "ignores the prefix" {
			prefix = "mine/"
		}
		if err := source.ListPages(t.Context(), p, prefix, none); !errors.Is(err, source.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type pageFunc func(source.PageRequest) source.Page

func (f pageFunc) Page(_ context.Context, q source.PageRequest) (source.Page, error) {
	return f(q), nil
}

// Where a store cannot answer for common prefixes, everything is listed in one part.
func TestListPagesWithoutPlacesToCut(t *testing.T) {
	var list []string
	for i := range 20_000 {
		list = append(list, fmt.Sprintf("%02d/%d", i%50, i))
	}
	for _, kind := range []error{source.ErrUnavailable, source.ErrDenied} {
		k := sorted(list, 100)
		var looks atomic.Int32
		k.fault = func(q source.PageRequest) error {
			if q.Delimited {
				looks.Add(1)
				return &source.Error{Op: "list", Kind: kind}
			}
			return nil
		}
		n := 0
		err := source.ListPages(t.Context(), k, "", func(source.Object) error { n++; return nil })
		if kind == source.ErrUnavailable && (err != nil || n != len(list)) || kind == source.ErrDenied && !errors.Is(err, kind) {
			t.Errorf("%v: %d listed, %v", kind, n, err)
		}
		if looks.Load() != 1 {
			t.Errorf("%v: asked %d times", kind, looks.Load())
		}
	}
}

func TestListPagesErrors(t *testing.T) {
	var list []string
	for i := range 20_000 {
		list = append(list, fmt.Sprintf("%02d/%d", i%50, i))
	}
	broken := errors.New("broken")
	k := sorted(list, 100)
	var asked atomic.Int32
	k.fault = func(source.PageRequest) error {
		if asked.Add(1) > 40 {
			return broken
		}
		return nil
	}
	if err := source.ListPages(t.Context(), k, "", func(source.Object) error { return nil }); !errors.Is(err, broken) {
		t.Errorf("a page that fails: %v", err)
	}
	k.fault = nil
	n := 0
	if err := source.ListPages(t.Context(), k, "", func(source.Object) error { n++; return broken }); !errors.Is(err, broken) || n != 1 {
		t.Errorf("a yield that fails: %d calls, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	k.fault = func(source.PageRequest) error { return ctx.Err() }
	err := source.ListPages(ctx, k, "", func(source.Object) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}
