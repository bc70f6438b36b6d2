package s3_test

import (
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/source"
)

// shortPages lists its sorted keys as S3 does, but in pages of most names, however many more are asked for, as S3
// allows and Ceph's gateway does.
type shortPages struct {
	keys []string
	most int
	// repeats: a page begins with the key after which it was asked to start.
	repeats bool
	// hollow: a page of nothing comes before each other one.
	hollow   bool
	requests atomic.Int64
}

func (s *shortPages) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.requests.Add(1)
	q := r.URL.Query()
	prefix, start := q.Get("prefix"), q.Get("start-after")
	token, goesOn := strings.CutPrefix(q.Get("continuation-token"), "token-")
	last, err := hex.DecodeString(token)
	asked, _ := strconv.Atoi(q.Get("max-keys"))
	if err != nil || asked < 1 || q.Get("list-type") != "2" || q.Get("encoding-type") != "url" {
		http.Error(w, r.URL.RawQuery, http.StatusNotImplemented)
		return
	}
	var objects, prefixes strings.Builder
	names, before, more := 0, string(last), s.hollow && !goesOn
	for _, key := range s.keys {
		if more || !strings.HasPrefix(key, prefix) || key < start || key == start && !s.repeats {
			continue
		}
		name, _, below := strings.Cut(key[len(prefix):], "/")
		below = below && q.Get("delimiter") == "/"
		if name = prefix + name + "/"; !below {
			name = key
		}
		if name <= before {
			continue
		}
		if names == min(s.most, asked) {
			more = true
			continue
		}
		names, before = names+1, name
		if below {
			fmt.Fprintf(&prefixes, `<CommonPrefixes><Prefix>%s</Prefix></CommonPrefixes>`, url.QueryEscape(name))
		} else {
			fmt.Fprintf(&objects, `<Contents><Key>%s</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified><ETag>"%s"</ETag><Size>1</Size></Contents>`, url.QueryEscape(key), etag)
		}
	}
	fmt.Fprintf(w, `<ListBucketResult><EncodingType>url</EncodingType>%s%s<IsTruncated>%v</IsTruncated>`, &objects, &prefixes, more)
	if more {
		fmt.Fprintf(w, `<NextContinuationToken>token-%x</NextContinuationToken>`, before)
	}
	io.WriteString(w, `</ListBucketResult>`)
}

// However short the pages of a store are, and whatever it names twice, whoever goes on after the greatest name of a page
// finds every object and folder.
func TestShortPagesHideNothing(t *testing.T) {
	var keys []string
	for i := range 1200 {
		keys = append(keys, fmt.Sprintf("dir/%04d", i), fmt.Sprintf("dir/%04d-folder/a", i), fmt.Sprintf("dir/%04d-folder/b", i))
	}
	keys = append(keys, "dir/", "dir//", "dir/a b+c%20%", "dir/a+b/c d", "dir/new\nline", "dir/x<y&z/ü", "dir/ü/\x01", "dir-", "dir0")
	slices.Sort(keys)
	for _, s := range []*shortPages{
		{most: 1000}, {most: 600}, {most: 1000, repeats: true}, {most: 7, repeats: true}, {most: 1, repeats: true}, {most: 600, hollow: true},
	} {
		name := fmt.Sprintf("pages of %d, repeats %v, hollow %v", s.most, s.repeats, s.hollow)
		s.keys = keys
		if s.most < 100 {
			s.keys = keys[len(keys)-60:]
		}
		b := answering(t, source.Config{}, s.ServeHTTP)
		var want []string
		for _, key := range s.keys {
			if rest, ok := strings.CutPrefix(key, "dir/"); ok {
				if folder, _, below := strings.Cut(rest, "/"); below {
					key = "dir/" + folder + "/"
				}
				want = append(want, key)
			}
		}
		want = slices.Compact(want)
		var got []string
		for q := (source.PageRequest{Prefix: "dir/", Delimited: true}); ; {
			page, err := b.Page(t.Context(), q)
			if err != nil {
				t.Fatalf("%s: after %q: %v", name, q.After, err)
			}
			names := slices.Clone(page.Prefixes)
			for _, o := range page.Objects {
				names = append(names, o.Key)
			}
			slices.Sort(names)
			got = append(got, names...)
			if !page.More {
				break
			}
			q.After = names[len(names)-1]
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s:\n%s", name, d)
		}
		if pages := int64(len(want)/s.most + 1); !s.repeats && !s.hollow && s.requests.Load() != pages {
			t.Errorf("%s: %d requests for %d pages", name, s.requests.Load(), pages)
		}
		got = nil
		err := b.List(t.Context(), "", func(o source.Object) error { got = append(got, o.Key); return nil })
		if slices.Sort(got); err != nil || !slices.Equal(got, s.keys) {
			t.Errorf("%s: %d objects are listed, want %d, %v", name, len(got), len(s.keys), err)
		}
	}
}

// Who wants few names is sent few.
func TestAPageHasNoMoreThanIsAskedFor(t *testing.T) {
	s := &shortPages{keys: []string{"a/1", "a/2", "b", "c"}, most: 1000, repeats: true}
	b := answering(t, source.Config{}, s.ServeHTTP)
	page, err := b.Page(t.Context(), source.PageRequest{Delimited: true, Max: 2})
	if err != nil || len(page.Objects) != 1 || len(page.Prefixes) != 1 || !page.More {
		t.Errorf("%+v, %v", page, err)
	}
	if page, err = b.Page(t.Context(), source.PageRequest{After: "b", Max: 1}); err != nil || len(page.Objects) != 1 || page.Objects[0].Key != "c" || page.More {
		t.Errorf("after b: %+v, %v", page, err)
	}
}
