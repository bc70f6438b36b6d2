package manifest

import (
	"maps"
	"slices"
	"strings"
)

// nearest is the name among properties, or kinds, that a misspelt one most likely means; empty if none is near.
func nearest[V any](name string, properties map[string]V) string {
	best, distance := "", 1+len(name)/3
	for _, p := range slices.Sorted(maps.Keys(properties)) {
		if d := edits(strings.ToLower(name), strings.ToLower(p)); d <= distance && (best == "" || d < distance) {
			best, distance = p, d
		}
	}
	return best
}

// edits is the Levenshtein distance of two short names; of long ones it is simply large.
func edits(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
