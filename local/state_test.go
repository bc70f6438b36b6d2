package local

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

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
	made, being := filepath.Join(filepath.Dir(killed.dir), "r1"), filepath.Join(filepath.Dir(killed.dir), "r2")
	for _, dir := range []string{made, being} {
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, newName), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	before := time.Now().Add(-2 * making)
	if err := os.Chtimes(made, before, before); err != nil { // that run was killed before it had its lock
		t.Fatal(err)
	}
	next, err := openState()
	if err != nil {
		t.Fatal(err)
	}
	defer next.close()
	for _, dir := range []string{killed.dir, made} {
		if _, err := os.Lstat(dir); !os.IsNotExist(err) {
			t.Errorf("the folder of a killed run is left: %v", err)
		}
	}
	if _, err := os.Lstat(filepath.Join(being, newName)); err != nil {
		t.Errorf("a run that is being made: %v", err)
	}
}
