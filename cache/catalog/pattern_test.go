package catalog

import (
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
