package catalog

import (
	"fmt"

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
