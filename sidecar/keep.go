package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/csi/keeper"
)

// Files in a pod's folder, beside a folder for each Dataset.
const (
	lockFile   = "lock"
	readyFile  = "ready"
	socketFile = "keeper.sock"
)

// sweepAge is how old a folder must be before it can be a dead pod's: one that is being made is younger.
const sweepAge = time.Minute

// Keep holds the mounts in dir until ctx ends, and then takes them and the folder away. First it does so with
// the folders beside dir that nobody keeps any more.
func Keep(ctx context.Context, dir string, log *slog.Logger) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("the folder of this pod's mounts: %w", err)
	}
	lock, err := takeLock(filepath.Join(dir, lockFile), os.O_CREATE)
	if err != nil {
		return fmt.Errorf("%s is another keeper's: %w", dir, err)
	}
	defer lock.Close()
	sweep(dir, time.Now(), log)
	// Connections are closed when this returns, and nobody serves any more, so detaching waits for nobody.
	err = keeper.Run(ctx, filepath.Join(dir, socketFile), log)
	return errors.Join(err, remove(dir))
}

func takeLock(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|flags, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// sweep removes the folders beside dir whose keeper is dead.
func sweep(dir string, now time.Time, log *slog.Logger) {
	base := filepath.Dir(dir)
	entries, err := os.ReadDir(base)
	if err != nil {
		log.Warn("folders of dead pods are not looked for", "dir", base, "reason", err)
		return
	}
	for _, e := range entries {
		other := filepath.Join(base, e.Name())
		info, err := e.Info()
		if other == dir || err != nil || !info.IsDir() || now.Sub(info.ModTime()) < sweepAge {
			continue
		}
		// One without the file was never kept, and has no mounts.
		lock, err := takeLock(filepath.Join(other, lockFile), 0)
		if err != nil {
			continue
		}
		if err := remove(other); err != nil {
			log.Warn("what a dead pod left is not removed", "dir", other, "reason", err)
		} else {
			log.Info("removed what a dead pod left", "dir", other)
		}
		lock.Close()
	}
}

// remove takes away the mounts in a pod's folder, and the folder. It removes nothing that has content: what is
// in a mount is the bucket's.
func remove(dir string) error {
	real, err := mountinfo.Resolve(dir)
	if err != nil {
		return err
	}
	below, err := mountinfo.Below(real)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range below {
		if m.Type != mount.FSType {
			continue
		}
		if _, err := mountinfo.Detach(m.Point, nil); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := os.Remove(dir); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
