package local

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sync/errgroup"
)

// Of runs that start in the same instant none takes another's folder for that of a killed one.
func TestRunsThatStartTogetherLeaveEachOtherAlone(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "l") // short, for the sockets' paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	for range 100 {
		states := make([]*state, 8)
		var g errgroup.Group
		for i := range states {
			g.Go(func() (err error) {
				states[i], err = openState()
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		for _, s := range states {
			if _, err := os.Stat(filepath.Join(s.dir, lockName)); err != nil {
				t.Errorf("a run that is alive: %v", err)
			}
		}
		for _, s := range states {
			s.close()
		}
	}
	// What a killed run left goes with the next one.
	killed, err := openState()
	if err != nil {
		t.Fatal(err)
	}
	killed.lock.Close()
	next, err := openState()
	if err != nil {
		t.Fatal(err)
	}
	defer next.close()
	if _, err := os.Lstat(killed.dir); !os.IsNotExist(err) {
		t.Errorf("the folder of a killed run is left: %v", err)
	}
}
