package stepcache_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// healthy are reasons for which nothing has to be done.
var healthy = []string{"AllReady", "Bound", "Flushed", "Listed", "Loaded", "Loading", "Reachable", "Shared"}

// The README's table for troubleshooting has every reason that a condition can have, and no other.
func TestReadmeNamesEveryReason(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(readme), "<!-- reasons:begin -->")
	table, _, ok := strings.Cut(table, "<!-- reasons:end -->")
	if !ok {
		t.Fatal("README.md has no table of reasons")
	}
	var named []string
	for line := range strings.Lines(table) {
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			for _, m := range regexp.MustCompile("`([A-Z][A-Za-z]+)`").FindAllStringSubmatch(cells[1], -1) {
				named = append(named, m[1])
			}
		}
	}
	exists := []string{"InUse"} // the only one of a deletion that is waited for
	for _, glob := range []string{"api/v1alpha1/*.go", "controllers/dataset/*.go", "controllers/dataload/*.go"} {
		files, err := filepath.Glob(glob)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`(?m)^\s*Reason[A-Z]\w+\s*=\s*"([A-Za-z]+)"`).FindAllSubmatch(b, -1) {
				exists = append(exists, string(m[1]))
			}
		}
	}
	if len(exists) < 20 {
		t.Fatalf("only %d reasons found in the code: %v", len(exists), exists)
	}
	for _, r := range exists {
		if !slices.Contains(named, r) && !slices.Contains(healthy, r) {
			t.Errorf("reason %s is not in README.md", r)
		}
	}
	for _, r := range named {
		if !slices.Contains(exists, r) {
			t.Errorf("README.md explains %s, which nothing says", r)
		}
	}
}
