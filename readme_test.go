package stepcache_test

import (
	"io/fs"
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
			for _, m := range regexp.MustCompile(`(?m)^\s*(?:const )?Reason[A-Z]\w+\s*=\s*"([A-Za-z]+)"`).FindAllSubmatch(b, -1) {
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

// A cluster that has Fluid too takes dataset and dataload for Fluid's: the kinds have the same names, and its group
// comes first. So what users are told to run names the short ones, which are ours alone.
func TestCommandsForUsersNameOurKinds(t *testing.T) {
	const gap = `[\s/#]+` // a comment goes on in another line
	const flags = `(?:-\S+` + gap + `(?:\S+` + gap + `)?)*`
	kinds := regexp.MustCompile(`\bkubectl` + gap + flags + `[a-z]+` + gap + flags + `([\w.,/-]+)`)
	told := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && strings.HasPrefix(d.Name(), "."):
			return filepath.SkipDir
		case d.IsDir() || !slices.Contains([]string{".go", ".md", ".yaml", ".json"}, filepath.Ext(path)):
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range kinds.FindAllSubmatch(b, -1) {
			for name := range strings.SplitSeq(string(m[1]), ",") {
				name, _, _ = strings.Cut(name, "/")
				switch strings.TrimRight(name, ".") {
				case "dset", "dload":
					told++
				case "dataset", "datasets", "dataload", "dataloads":
					t.Errorf("%s: %q; say dset or dload", path, m[0])
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if told < 10 {
		t.Errorf("only %d commands found", told)
	}
}
