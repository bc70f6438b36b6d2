package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/bmatcuk/doublestar/v4"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/tier"
)

// stageBuffer is the memory for what is read; the container's limit is a few times that.
const stageBuffer = 128 << 20

// waitLineEvery is how often what is waited for is said.
const waitLineEvery = 15 * time.Second

// stageFlags are what `stepcache stage` takes.
type stageFlags struct {
	tier                   string
	copies, paths, present []string
	limit                  int64
	wait, stall            time.Duration
	parallel               int
}

// staged is a Dataset, what is copied of it and where to.
type staged struct {
	dataset        string
	dirs           []string
	paths, present []string
}

func stageCommand() *cobra.Command {
	var o stageFlags
	cmd := &cobra.Command{
		Use:   "stage --tier DIR --copy NAMESPACE/NAME=DIR ...",
		Short: "Copy files of Datasets to folders of a pod, and end",
		Long: `Copies files of each Dataset to its folder, in parallel and checked as every read is, and ends. The webhook
adds it to pods as an init container; it needs no privilege.

--path says which files of a Dataset, as patterns (those of a DataLoad: a folder stands for all in it); a
pattern that matches nothing is an error. --if-present is a pattern that may match nothing. Without any of
them all is copied, if it has no more bytes than --limit. Whether there is room is looked at first.

It ends with status 1 when it could not copy everything: the pod's step then does not begin.`,
		Example: "  stepcache stage --tier /stepcache/tier --copy argo/genomes=/data --path 'argo/genomes=/shards/0001*'",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := o.parse()
			if err != nil {
				return usage{fmt.Errorf("stage: %w", err)}
			}
			for _, s := range all {
				if err := o.stage(cmd.Context(), s); err != nil {
					return fmt.Errorf("dataset %s: %w", s.dataset, err)
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.tier, "tier", "", "folder with the folder of a tier for each Dataset")
	f.StringArrayVar(&o.copies, "copy", nil, "NAMESPACE/NAME=DIR: a Dataset and where to copy it")
	f.StringArrayVar(&o.paths, "path", nil, "NAMESPACE/NAME=PATTERN: files to copy")
	f.StringArrayVar(&o.present, "if-present", nil, "NAMESPACE/NAME=PATTERN: files to copy if there are any")
	f.Int64Var(&o.limit, "limit", 10<<30, "bytes up to which a Dataset is copied whole; 0 for no limit")
	f.DurationVar(&o.wait, "wait", 30*time.Minute, "how long to wait for the workers to have listed the bucket")
	f.DurationVar(&o.stall, "stall", 10*time.Minute, "how long not one byte may come before it gives up")
	f.IntVar(&o.parallel, "parallel", 8, "files copied at once")
	return cmd
}

func (o *stageFlags) parse() ([]*staged, error) {
	if o.tier == "" || len(o.copies) == 0 {
		return nil, errors.New("--tier or --copy is missing: say what to copy")
	}
	if o.parallel < 1 || o.limit < 0 || o.wait <= 0 || o.stall < 0 {
		return nil, errors.New("--parallel and --wait must be positive, and --limit and --stall not negative")
	}
	var all []*staged
	of := func(dataset string) *staged {
		i := slices.IndexFunc(all, func(s *staged) bool { return s.dataset == dataset })
		if i < 0 {
			return nil
		}
		return all[i]
	}
	for _, c := range o.copies {
		dataset, dir, ok := strings.Cut(c, "=")
		namespace, name, named := strings.Cut(dataset, "/")
		if !ok || !named || namespace == "" || name == "" || strings.ContainsAny(name, "/.") || !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("--copy %q: want NAMESPACE/NAME=/folder", c)
		}
		s := of(dataset)
		if s == nil {
			s = &staged{dataset: dataset}
			all = append(all, s)
		}
		s.dirs = append(s.dirs, dir)
	}
	for _, list := range []struct {
		flag   string
		values []string
		add    func(*staged, string)
	}{
		{"--path", o.paths, func(s *staged, p string) { s.paths = append(s.paths, p) }},
		{"--if-present", o.present, func(s *staged, p string) { s.present = append(s.present, p) }},
	} {
		for _, v := range list.values {
			dataset, pattern, ok := strings.Cut(v, "=")
			if !ok || !strings.HasPrefix(pattern, "/") || !doublestar.ValidatePattern(pattern) {
				return nil, fmt.Errorf("%s %q: want NAMESPACE/NAME=/pattern", list.flag, v)
			}
			s := of(dataset)
			if s == nil {
				return nil, fmt.Errorf("%s %q: no --copy names this Dataset", list.flag, v)
			}
			list.add(s, pattern)
		}
	}
	return all, nil
}

// stage copies one Dataset.
func (o *stageFlags) stage(ctx context.Context, s *staged) error {
	_, name, _ := strings.Cut(s.dataset, "/")
	folder, err := tier.Open(filepath.Join(o.tier, name))
	if err != nil {
		return err
	}
	if folder.Dataset != s.dataset {
		return fmt.Errorf("%s is the folder of Dataset %s", folder.Dir, folder.Dataset)
	}
	dial, cancel := context.WithTimeoutCause(ctx, o.wait, fmt.Errorf("no worker has a listing after %s", o.wait))
	defer cancel()
	config, err := folder.ClientConfig()
	if err != nil {
		return err
	}
	config.BufferBytes = stageBuffer
	say := func(format string, a ...any) {
		fmt.Fprintf(os.Stderr, "stage: %s: %s\n", s.dataset, fmt.Sprintf(format, a...))
	}
	var said time.Time
	config.Progress = func(p client.Progress) {
		if now := time.Now(); p.Waiting != "" && now.Sub(said) >= waitLineEvery {
			say("waits for the workers: %s", p.Waiting)
			said = now
		}
	}
	c, err := client.Dial(dial, config)
	if err != nil {
		if cause := context.Cause(dial); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return err
	}
	defer c.Close()
	chosen, files, bytes, err := s.choose(c.Snapshot(), o.limit)
	if err != nil {
		return err
	}
	for _, dir := range s.dirs {
		if err := room(dir, bytes); err != nil {
			return err
		}
		start := time.Now()
		if err := copyFiles(ctx, newPatient(c, o.stall, say), chosen, dir, bytes, o.parallel); err != nil {
			return err
		}
		say("%d files, %s to %s in %s", files, size(bytes), dir, time.Since(start).Round(time.Millisecond))
	}
	return nil
}

// choose finds what to copy, folders too, in the order of the snapshot, and how many files and bytes it has.
func (s *staged) choose(snap *catalog.Snapshot, limit int64) (chosen []catalog.Index, files int, bytes int64, err error) {
	patterns := catalog.NewPatterns(slices.Concat(s.paths, s.present))
	matched := make([]bool, len(patterns))
	snap.WalkAll(0, func(i catalog.Index) bool {
		path, hit := snap.Path(i), len(patterns) == 0
		for k, p := range patterns {
			if p.Match(path) {
				hit, matched[k] = true, true
			}
		}
		if hit {
			n, _ := snap.Node(i)
			chosen = append(chosen, i)
			if bytes += n.Size; !n.Dir {
				files++
			}
		}
		return true
	})
	var missing []string
	for k, p := range s.paths {
		if !matched[k] {
			missing = append(missing, p)
		}
	}
	switch {
	case len(missing) > 0:
		return nil, 0, 0, fmt.Errorf("no file or folder matches %s; `stepcache ls -R` shows what there is", strings.Join(missing, ", "))
	case len(patterns) == 0 && limit > 0 && bytes > limit:
		return nil, 0, 0, fmt.Errorf("it has %s, more than the %s that are copied whole: name the files that the step reads in the pod's annotation data.stepcache.dev/stage-paths", size(bytes), size(limit))
	}
	return chosen, files, bytes, nil
}

// room says whether a folder's file system has room for so many bytes.
func room(dir string, bytes int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; bytes > free {
		return fmt.Errorf("%s has room for %s, and %s are to be copied: name fewer files, or give the pod a larger volume", dir, size(free), size(bytes))
	}
	return nil
}

func copyFiles(ctx context.Context, c files, chosen []catalog.Index, dir string, bytes int64, parallel int) error {
	p := newProgress("stage", bytes)
	defer p.finish()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, i := range chosen {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			rel := strings.TrimPrefix(c.Snapshot().Path(i), "/")
			// A second attempt, after the first was interrupted, replaces what it finds.
			return getNode(ctx, c, i, filepath.Join(dir, filepath.FromSlash(rel)), true, p)
		})
	}
	return g.Wait()
}
