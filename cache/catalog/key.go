package catalog

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

const (
	maxName = 255  // Linux's NAME_MAX
	maxPath = 4095 // Linux's PATH_MAX without its final NUL
	// maxDepth follows from maxPath: every level takes a slash and a byte.
	maxDepth = (maxPath + 1) / 2
)

// badName says why a path segment cannot be a name; "" if it can.
func badName(s string) string {
	switch {
	case s == "":
		return EmptySegment
	case s == "." || s == "..":
		return DotSegment
	case len(s) > maxName:
		return LongName
	case strings.IndexByte(s, 0) >= 0:
		return NulByte
	}
	return ""
}

// badKey says why rel, a key without its mount's prefix and without a marker's final slash, cannot be
// shown below the directory dir; "" if it can.
func badKey(dir, rel string) string {
	if len(strings.TrimSuffix(dir, "/"))+1+len(rel) > maxPath {
		return LongPath
	}
	for rest, more := rel, true; more; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		if reason := badName(name); reason != "" {
			return reason
		}
	}
	return ""
}

// checkMounts checks the mounts of a dataset and adds the slash that a prefix lacks.
func checkMounts(mounts []Mount) ([]Mount, error) {
	if len(mounts) == 0 {
		return nil, errors.New("dataset has no mounts; add one")
	}
	if len(mounts) >= noMount {
		return nil, fmt.Errorf("dataset has %d mounts; at most %d are possible", len(mounts), noMount-1)
	}
	out := make([]Mount, len(mounts))
	type place struct {
		mount    int
		segments []string
	}
	places := make([]place, len(mounts))
	for i, m := range mounts {
		if m.Prefix != "" && !strings.HasSuffix(m.Prefix, "/") {
			m.Prefix += "/"
		}
		if m.Path != "/" {
			rel, absolute := strings.CutPrefix(m.Path, "/")
			if !absolute {
				return nil, fmt.Errorf("mount path %q of %s: must start with a slash", m.Path, m.URL)
			}
			if reason := badKey("/", rel); reason != "" {
				return nil, fmt.Errorf("mount path %q of %s: %s; use a clean path such as /a/b", m.Path, m.URL, reason)
			}
		}
		out[i] = m
		places[i] = place{i, strings.Split(m.Path, "/")}
	}
	// In the order of their segments, whatever is below a path follows it at once.
	slices.SortFunc(places, func(a, b place) int { return slices.Compare(a.segments, b.segments) })
	for k := 1; k < len(places); k++ {
		a, b := out[places[k-1].mount], out[places[k].mount]
		if a.Path == "/" || a.Path == b.Path || strings.HasPrefix(b.Path, a.Path+"/") {
			return nil, fmt.Errorf("mount paths %q of %s and %q of %s overlap; give each a path of its own", a.Path, a.URL, b.Path, b.URL)
		}
	}
	return out, nil
}
