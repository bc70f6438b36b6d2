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
	lockFile   = "lock"        // held by the keeper
	serverFile = "server.lock" // held by the server
	readyFile  = "ready"
	socketFile = "keeper.sock"
)

// sweepAge is how old a folder must be before it can be a dead pod's: one that is being made is younger.
const sweepAge = time.Minute

// NodeDir is the folder of a node that has the folders of its pods: the webhook puts them there.
const NodeDir = "/run/stepcache/sidecars"

// sweepEvery is the pause between two looks of SweepUntil.
const sweepEvery = 15 * time.Second

// SweepUntil takes away, until ctx ends, what pods have left in the folders in base: those whose sidecar and
// keeper were both killed, and so could not. A node service does it for its node; without one the next Keep
// on the node does.
func SweepUntil(ctx context.Context, base string, log *slog.Logger) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		sweep(base, "", time.Now(), log)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Keep holds the mounts in dir until ctx ends, and then takes them and the folder away. First it does so with
// the folders beside dir that are nobody's any more.
func Keep(ctx context.Context, dir string, log *slog.Logger) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("the folder of this pod's mounts: %w", err)
	}
	lock, err := takeLock(filepath.Join(dir, lockFile), os.O_CREATE)
	if err != nil {
		return fmt.Errorf("%s is another keeper's: %w", dir, err)
	}
	defer lock.Close()
	sweep(filepath.Dir(dir), dir, time.Now(), log)
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

// sweep removes the folders in base, but for one, whose keeper and server are both dead: their mounts are dead
// too, whatever became of their pods.
func sweep(base, but string, now time.Time, log *slog.Logger) {
	entries, err := os.ReadDir(base)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			log.Warn("folders of dead pods are not looked for", "dir", base, "reason", err)
		}
		return
	}
	for _, e := range entries {
		dir := filepath.Join(base, e.Name())
		info, err := e.Info()
		if dir == but || err != nil || !info.IsDir() || now.Sub(info.ModTime()) < sweepAge {
			continue
		}
		sweepOne(dir, log)
	}
}

func sweepOne(dir string, log *slog.Logger) {
	// A folder without the file was never kept, and has no mounts.
	keeper, err := takeLock(filepath.Join(dir, lockFile), 0)
	if err != nil {
		return
	}
	defer keeper.Close()
	server, err := takeLock(filepath.Join(dir, serverFile), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return
	}
	defer server.Close() // of nil too
	if err := remove(dir); err != nil {
		log.Warn("what a dead pod left is not removed", "dir", dir, "reason", err)
		return
	}
	log.Info("removed what a dead pod left", "dir", dir)
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
