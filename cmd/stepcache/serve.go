package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"syscall"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/tier/upstream"
)

func workerCommand() *cobra.Command {
	var config, id string
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "worker --config FILE",
		Short: "Serve a dataset's blocks from memory",
		Long: `Runs one cache worker until SIGTERM. The configuration is JSON (cache/worker.Config); the controller and
"stepcache local" write it.`,
		Example: "  stepcache worker --config /etc/stepcache/worker.json",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if config == "" {
				return usage{errors.New("worker: --config is missing: name the configuration file")}
			}
			c, err := worker.LoadConfig(config, func(c *worker.Config) {
				if id != "" {
					c.ID = id
				}
			})
			if err != nil {
				return err
			}
			log := logger(level)
			sources := &upstream.Opener{Logger: log}
			defer sources.Close()
			return worker.Run(cmd.Context(), c, worker.Deps{Logger: log, OpenSource: sources.Open})
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file")
	cmd.Flags().StringVar(&id, "id", "", "this worker's member id, in place of the file's: the workers of a cluster share one file")
	levelFlag(cmd, &level)
	return cmd
}

func mountCommand() *cobra.Command {
	var t tierFlags
	var cache, mode string
	var level slog.Level
	var private bool
	cmd := &cobra.Command{
		Use:   "mount DIR",
		Short: "Mount a dataset read-only, until SIGTERM or Ctrl-C",
		Long: `Mounts a Dataset of a running tier at DIR, which must be an empty folder. Files are read-only and never
change while mounted, also where the Dataset is refreshed: new mounts and "stepcache ls" see the newer listing. A
Dataset with access: ReadWrite is shown as it is: what is put, replaced or deleted shows within a second. Reads of files that a worker on this machine holds go straight to its memory
(FUSE passthrough: Linux 6.9, root); --cache-size keeps what comes from other machines in this process's
own memory as well.`,
		Example: `  stepcache mount --tier "$STEPCACHE_TIER" /mnt/genomes`,
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			ctx, log := cmd.Context(), logger(level)
			if err := mount.Supported(); err != nil {
				return err
			}
			if err := empty(a[0]); err != nil {
				return err
			}
			o := mount.Options{Private: private, Logger: log}
			if err := o.Mode.UnmarshalText([]byte(mode)); err != nil {
				return usage{err}
			}
			f, err := t.one()
			if err != nil {
				return err
			}
			c, err := f.ClientConfig()
			if err != nil {
				return err
			}
			c.Logger = log
			if cache != "" {
				n, err := humanize.ParseBytes(cache)
				if err != nil || n < 16<<20 || n > 1<<50 {
					return usage{fmt.Errorf("mount: --cache-size %q: want a size such as 2GiB, 16MiB at least", cache)}
				}
				s, remove, err := nodeCache(ctx, log, int64(n))
				if err != nil {
					return err
				}
				defer remove()
				c.Store = s
			}
			reader, err := mount.Connect(ctx, c)
			if err != nil {
				return err
			}
			defer reader.Close()
			o.Dataset = f.Dataset
			m, err := reader.Mount(ctx, a[0], o)
			if err != nil {
				return err
			}
			log.Info("mounted", "dir", a[0], "dataset", f.Dataset)
			select {
			case <-ctx.Done():
				err := m.Unmount()
				m.Wait()
				return err
			case <-m.Done():
				log.Info("unmounted by somebody else", "dir", a[0])
				return nil
			}
		},
	}
	t.add(cmd)
	cmd.Flags().StringVar(&cache, "cache-size", "", "memory of this process's own cache of what other machines' workers send")
	cmd.Flags().StringVar(&mode, "mode", "auto", "how opens are served: passthrough, no-open, or auto (by the sizes of the files)")
	cmd.Flags().BoolVar(&private, "private", os.Geteuid() != 0, "keep other users out")
	levelFlag(cmd, &level)
	return cmd
}

// empty says whether a mount at dir would hide anything. Of what is mounted there already, package mount
// knows whether it is left from a process that is gone.
func empty(dir string) error {
	if at, err := mountinfo.Resolve(dir); err == nil {
		if mounts, err := mountinfo.At(at); err != nil || len(mounts) > 0 {
			return err
		}
	}
	names, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("mount: there is no folder %s: make it (mkdir -p %s)", dir, dir)
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("mount: %s is not a folder: name one that is empty", dir)
	case err != nil:
		return fmt.Errorf("mount: %w", err)
	case len(names) > 0:
		return fmt.Errorf("mount: %s is not empty, and its files would be hidden: name a folder that is", dir)
	}
	return nil
}

// nodeCache is a store for one mount process, gone with it.
func nodeCache(ctx context.Context, log *slog.Logger, bytes int64) (*store.Store, func(), error) {
	dir, err := os.MkdirTemp("", "stepcache-node-")
	if err != nil {
		return nil, nil, err
	}
	note, mountErr := store.MountTmpfs(dir, bytes+bytes/16)
	if note != "" {
		log.Info(note)
	}
	if mountErr != nil {
		_ = os.Remove(dir)
		if dir, err = os.MkdirTemp("/dev/shm", "stepcache-node-"); err != nil {
			return nil, nil, fmt.Errorf("no memory for --cache-size: neither a tmpfs (%w) nor a folder in /dev/shm (%w)", mountErr, err)
		}
	}
	remove := func() {
		if mountErr == nil {
			_ = store.Unmount(dir)
		}
		_ = os.RemoveAll(dir)
	}
	s, err := store.Open(ctx, store.Options{Dir: dir, Quota: bytes})
	if err != nil {
		remove()
		return nil, nil, err
	}
	return s, func() { _ = s.Close(); remove() }, nil
}
