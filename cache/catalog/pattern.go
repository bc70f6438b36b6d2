package catalog

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/bmatcuk/doublestar/v4"
)

const (
	// MaxAlternatives bounds how many patterns one with braces stands for: /{a,b}/{c,d} for four. The matcher tries them
	// one by one for each path, and a few dozen braces are more than it would ever be done with.
	MaxAlternatives = 256
	// maxPattern bounds a pattern's bytes: a match takes as many steps as they and the path's bytes multiplied.
	maxPattern = 1024
)

// CheckPattern says why a pattern of paths cannot be matched, or not soon.
func CheckPattern(p string) error {
	switch {
	case len(p) > maxPattern:
		return fmt.Errorf("the pattern %.64q... is longer than %d bytes: give several", p, maxPattern)
	case !doublestar.ValidatePattern(p):
		return fmt.Errorf("the pattern %q has a bracket or brace that is not closed", p)
	case Alternatives(p) > MaxAlternatives:
		return fmt.Errorf("the pattern %q stands for more than %d, one for each combination of what its braces have: give several, or * for some of them", p, MaxAlternatives)
	}
	return nil
}

// Alternatives is how many patterns a valid one stands for, or MaxAlternatives+1 where they are more. Braces without
// a comma count one more than what is in them, since the matcher takes them apart all the same.
func Alternatives(p string) int {
	type brace struct{ before, here int } // of the alternatives before the last comma, and of the one after it
	open := []brace{{0, 1}}
	for i := 0; i < len(p); i++ {
		top := &open[len(open)-1]
		switch p[i] {
		case '\\':
			i++
		case '[': // what is in a class is itself
			for i++; i < len(p) && p[i] != ']'; i++ {
				if p[i] == '\\' {
					i++
				}
			}
		case '{':
			open = append(open, brace{0, 1})
		case ',':
			if len(open) > 1 {
				top.before, top.here = min(top.before+top.here, MaxAlternatives+1), 1
			}
		case '}':
			if len(open) > 1 {
				open = open[:len(open)-1]
				outer := &open[len(open)-1]
				outer.here = min(outer.here*(max(1, top.before)+top.here), MaxAlternatives+1)
			}
		}
	}
	return open[0].here
}

// Pattern is a valid pattern of paths, made ready: one that matches a folder stands for all in it.
type Pattern struct {
	// Folder is the path, which may be a file's, at or below which everything lies that it matches.
	Folder string
	// Glob is what paths are matched with; empty: it matches all of those.
	Glob  string
	below string // Folder with a slash at its end
}

// NewPattern makes a pattern ready. CheckPattern has nothing against it.
func NewPattern(p string) Pattern {
	p = strings.TrimSuffix(p, "/")
	var plain []byte // what is before the first wildcard
	var out Pattern
	for i := 0; i < len(p) && out.Glob == ""; i++ {
		switch p[i] {
		case '*', '?', '[', '{':
			plain = plain[:bytes.LastIndexByte(plain, '/')+1]
			if out.Glob = p; !strings.HasSuffix(p, "/**") {
				out.Glob += "/**" // which matches zero folders too, and so the file or folder itself
			}
			continue
		case '\\':
			i = min(i+1, len(p)-1)
		}
		plain = append(plain, p[i])
	}
	out.Folder = strings.TrimSuffix(string(plain), "/")
	out.below = out.Folder + "/"
	if out.Folder == "" {
		out.Folder = "/"
	}
	return out
}

// NewPatterns makes several ready.
func NewPatterns(patterns []string) []Pattern {
	out := make([]Pattern, len(patterns))
	for i, p := range patterns {
		out[i] = NewPattern(p)
	}
	return out
}

// Match says whether the pattern matches a path of the dataset.
func (p Pattern) Match(path string) bool {
	if path != p.Folder && !strings.HasPrefix(path, p.below) {
		return false
	}
	if p.Glob == "" {
		return true
	}
	ok, _ := doublestar.Match(p.Glob, path)
	return ok
}

// WalkMatching calls f for each file at or below the folders of the patterns, once, with its path and whether any of
// them matches it, until f returns false.
func (s *Snapshot) WalkMatching(patterns []Pattern, f func(i Index, path string, matches bool) bool) {
	// What lies below the folder of another comes behind it, and is looked at with it.
	sorted := slices.SortedFunc(slices.Values(patterns), func(a, b Pattern) int { return cmp.Compare(a.below, b.below) })
	for more := true; more && len(sorted) > 0; {
		n := 1
		for n < len(sorted) && strings.HasPrefix(sorted[n].below, sorted[0].below) {
			n++
		}
		group := sorted[:n]
		sorted = sorted[n:]
		if top, ok := s.Lookup(group[0].Folder); ok {
			s.Walk(top, func(i Index) bool {
				path := s.Path(i)
				more = f(i, path, slices.ContainsFunc(group, func(p Pattern) bool { return p.Match(path) }))
				return more
			})
		}
	}
}
