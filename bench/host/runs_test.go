package host

import (
	"os"
	"testing"
)

// Runs are no shorter than a page and no longer than the file; of what is no file in memory nothing is known.
func TestRuns(t *testing.T) {
	dir := memory(t)
	const size = 4 << 20
	one, err := os.Create(dir + "/one")
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	if err := touch(t.Context(), one, size); err != nil {
		t.Fatal(err)
	}
	got := runs(one.Name())
	if os.Geteuid() != 0 {
		if got != 0 {
			t.Errorf("without root: %d", got)
		}
		t.Skip("where pages are only root is told")
	}
	if got < 4096 || got > size {
		t.Errorf("%d bytes in runs of %d", size, got)
	}
	if runs(dir+"/none") != 0 || runs(os.DevNull) != 0 {
		t.Error("of nothing something is known")
	}
	empty, err := os.Create(dir + "/empty")
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	if runs(empty.Name()) != 0 {
		t.Error("of an empty file something is known")
	}
}
