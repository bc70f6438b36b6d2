package catalog

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/bmatcuk/doublestar/v4"
)

func TestPatterns(t *testing.T) {
	for p, want := range map[string]int{
		"/": 1, "/a,b/**": 1, "/{a,b}": 2, "/{a,b}/{c,d,e}": 6, "/{a,{b,c}x{d,e},f}": 6, "/{a}": 2, "/{}": 2,
		`/\{a,b\}`: 1, "/[{,}]{a,b,c}": 3, "/{a,[,}],b}": 3, "/[^{]{a,[!,]}": 2, `/[\]{,]`: 1,
		"/{" + strings.Repeat("a,", 255) + "a}": 256,
		"/{" + strings.Repeat("a,", 256) + "a}": 257,
		"/" + strings.Repeat("{a,b}", 8):        256,
		"/" + strings.Repeat("{a,b}", 9):        257,
		"/{{{}}}":                               4, "/" + strings.Repeat("{", 256) + strings.Repeat("}", 256): 257,
		"/" + strings.Repeat("{a,", 250) + strings.Repeat("}", 250): 251,
	} {
		if got := Alternatives(p); got != want {
			t.Errorf("%q: %d, want %d", p, got, want)
		}
		if err := CheckPattern(p); (err == nil) != (want <= MaxAlternatives) {
			t.Errorf("%q, %d alternatives: %v", p, want, err)
		}
	}
	for _, p := range []string{"/[", "/{a", "/a}", `/a\`, "/" + strings.Repeat("a", 1024)} {
		if CheckPattern(p) == nil {
			t.Errorf("%.20q is let in", p)
		}
	}
}

// What is let in is matched in a bounded number of steps: this ends soon, or never.
func FuzzCheckPattern(f *testing.F) {
	f.Add("/**/"+strings.Repeat("{,}", 40)+"x", "/a/b")
	f.Add("/{{{{a,b},c},d}[,{]}", "/a/{")
	f.Add("/"+strings.Repeat("{", 300)+strings.Repeat("}", 300), "/")
	f.Fuzz(func(t *testing.T, p, path string) {
		if CheckPattern(p) == nil {
			if _, err := doublestar.Match(p, path); err != nil {
				t.Errorf("%q: %v", p, err)
			}
		}
	})
}

// What a walk finds is what the matcher says of each path, and it looks at each file once, below the patterns' folders.
func TestAWalkFindsWhatThePatternsMatch(t *testing.T) {
	s := build(t, []Mount{{URL: "s3://b", Path: "/"}}, objects(
		"a/1", "a/2", "a/b/1", "a/b/c/1", "a-b/1", "a-b/2", "ab/1", "a*b/[x]/1", "a*b/{y}/1", "d", "e/f.bin", "e/g/f.bin", "e/g/f.txt", `q\r/1`))
	var all []string
	s.Walk(0, func(i Index) bool { all = append(all, s.Path(i)); return true })
	for _, c := range []struct {
		patterns []string
		looked   int
	}{
		{nil, 0}, {[]string{"/"}, len(all)}, {[]string{"/**"}, len(all)}, {[]string{"/a"}, 4}, {[]string{"/a/"}, 4}, {[]string{"/a/**"}, 4},
		{[]string{"/a/b", "/a-b", "/a", "/a"}, 6}, {[]string{"/a/1", "/a/1*", "/d"}, 5}, {[]string{"/d/x", "/none", "/none/*", "/a/b/d/*"}, 0},
		{[]string{"/e/**/*.bin"}, 3}, {[]string{"/**/*.bin", "/a/b/*"}, len(all)}, {[]string{`/a\*b/\[x\]`, `/a\*b/\{y\}`}, 2},
		{[]string{`/a\*b/\[*`}, 2}, {[]string{"/{a,ab}/1"}, len(all)}, {[]string{`/q\\r`, `/\q\\r/*`}, 1}, {[]string{"/a?b", "/a/[12]"}, len(all)},
		{[]string{"/a//b", "/a/../d"}, 0},
	} {
		want := make(map[string]bool)
		for _, path := range all {
			for _, p := range c.patterns {
				if p = strings.TrimSuffix(p, "/"); !strings.HasSuffix(p, "/**") {
					p += "/**"
				}
				ok, err := doublestar.Match(p, path)
				if err != nil {
					t.Fatal(err)
				}
				want[path] = want[path] || ok
			}
		}
		maps.DeleteFunc(want, func(_ string, ok bool) bool { return !ok })
		looked, got := make(map[string]int), make(map[string]bool)
		s.WalkMatching(NewPatterns(c.patterns), func(i Index, path string, matches bool) bool {
			if looked[path]++; path != s.Path(i) || looked[path] > 1 {
				t.Errorf("%q: %q, which is %q, is looked at %d times", c.patterns, path, s.Path(i), looked[path])
			}
			if matches {
				got[path] = true
			}
			return true
		})
		if !maps.Equal(got, want) || len(looked) != c.looked {
			t.Errorf("%q: %q, want %q; %d files are looked at, want %d", c.patterns, slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)), len(looked), c.looked)
		}
	}
	calls := 0
	s.WalkMatching(NewPatterns([]string{"/a", "/d"}), func(Index, string, bool) bool { calls++; return false })
	if calls != 1 {
		t.Errorf("%d calls after the first that ended it", calls-1)
	}
}
