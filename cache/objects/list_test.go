package objects_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// listed is what a listing should be: keys and common prefixes below prefix, in order.
func listed(keys []string, prefix, delimiter string) []string {
	var out []string
	for _, k := range keys {
		rest, ok := strings.CutPrefix(k, prefix)
		if !ok {
			continue
		}
		if i := strings.Index(rest, delimiter); delimiter != "" && i >= 0 {
			k = prefix + rest[:i+len(delimiter)]
		}
		if !slices.Contains(out, k) {
			out = append(out, k)
		}
	}
	slices.Sort(out)
	return out
}

// Listings of one mount and of several, page by page of every size, are what the keys say.
func TestListings(t *testing.T) {
	for name, paths := range map[string][]string{"one mount": {"/"}, "several mounts": {"/a", "/b/c", "/b/d", "/z-z/y"}} {
		t.Run(name, func(t *testing.T) {
			tr := newTier(t, "")
			one := tr.mounts[0]
			tr.mounts = nil
			for i, p := range paths {
				m := one
				m.Path = p
				m.URL += fmt.Sprintf("m%d/", i)
				tr.mounts = append(tr.mounts, m)
			}
			tr.start(2)
			var keys []string
			for _, p := range paths {
				for _, k := range []string{"1", "2-x/1", "2-x/2", "2/1", "2/10", "2/deep/er/1", "2/deep/er/2", "2/deep-1", "3", "é/1"} {
					keys = append(keys, strings.TrimPrefix(strings.TrimSuffix(p, "/")+"/"+k, "/"))
				}
			}
			slices.Sort(keys)
			for n, k := range keys {
				tr.mustPut(n%2, k, []byte(k))
			}
			for _, prefix := range []string{"", "a", "a/", "a/2", "a/2/", "a/2/deep", "b", "b/", "b/d/2/", "z", "nothing", "2", "2/", "2/deep/"} {
				for _, delimiter := range []string{"", "/", "-"} {
					want := listed(keys, prefix, delimiter)
					for _, max := range []int{1, 3, 1000} {
						var got []string
						token := ""
						for range 100 {
							r, err := tr.client(max%2).ListObjectsV2("data", prefix, "", token, delimiter, max)
							if err != nil {
								t.Fatal(err)
							}
							page := len(r.Contents) + len(r.CommonPrefixes)
							if page > max {
								t.Errorf("a page of %d entries, asked for %d", page, max)
							}
							for _, o := range r.Contents {
								got = append(got, o.Key)
							}
							for _, p := range r.CommonPrefixes {
								got = append(got, p.Prefix)
							}
							if token = r.NextContinuationToken; !r.IsTruncated {
								break
							}
						}
						slices.Sort(got)
						if !slices.Equal(got, want) {
							t.Errorf("prefix %q delimiter %q by %d: %q, want %q", prefix, delimiter, max, got, want)
						}
					}
					for _, after := range []string{"a", "a/2-x/1", "a/2/", "a/2/deep/zzz", "b/c/3", "2/deep/er/1", "zzz"} {
						var below []string
						for _, k := range keys {
							if k > after {
								below = append(below, k)
							}
						}
						r, err := tr.client(0).ListObjectsV2("data", prefix, after, "", delimiter, 1000)
						if err != nil {
							t.Fatal(err)
						}
						var got []string
						for _, o := range r.Contents {
							got = append(got, o.Key)
						}
						for _, p := range r.CommonPrefixes {
							got = append(got, p.Prefix)
						}
						slices.Sort(got)
						// A common prefix that after itself is, or that after lies in, is not listed again.
						want := slices.DeleteFunc(listed(below, prefix, delimiter), func(e string) bool {
							return delimiter != "" && strings.HasSuffix(e, delimiter) && strings.HasPrefix(after, e)
						})
						got = slices.DeleteFunc(got, func(e string) bool {
							return delimiter != "" && strings.HasSuffix(e, delimiter) && strings.HasPrefix(after, e)
						})
						if !slices.Equal(got, want) {
							t.Errorf("prefix %q delimiter %q after %q: %q, want %q", prefix, delimiter, after, got, want)
						}
					}
				}
			}
		})
	}
}
