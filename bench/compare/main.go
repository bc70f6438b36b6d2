// Command compare measures what a step gets from this project beside what its user would take instead: a native
// folder, the bucket itself, and the mounts of other projects that are on the PATH, in one run on one machine.
//
// It owns the input (two real S3 servers, one without limits and one with a bandwidth, and what is in them), the
// sizes, and the charts; package trial owns what is measured and how. Concurrency: one goroutine measures.
// Failure: the exit status is 1 where this project had no figure or anybody gave wrong bytes, and 130 where it was
// interrupted, after what there is; what other projects cannot do is told in the report.
//
// It may import bench/..., test/bucket and what those may.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/bench/trial"
)

type options struct {
	stepcache, versitygw string
	size, only, out      string
	contenders           []string
	rounds, slowRounds   int
	limit, patience      time.Duration
	budget               time.Duration
	readme               string

	scale   scale
	match   *regexp.Regexp
	results *host.Results
	table   *host.Place // nil: no README
}

func main() { host.Main(command()) }

func command() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "compare",
		Short: "What a step gets, beside what its user would take instead, in one run",
		Long: `Reads the same data as native files, from the bucket by a parallel client, through this project cold and warm,
and through whichever of rclone, s3fs, geesefs and mount-s3 are on the PATH: one large file, many small ones, a
great many names, eight pods and a hundred steps; and puts and gets artifacts, through this project and at the bucket.
Prints a table and writes JSON and charts into --out; what there is so far is in compare.partial.json there.
bench/README.md says how to read it. Mounts need root.`,
		Example: `  go run ./bench/compare --size small
  go run ./bench/compare --only 'small files' --contenders stepcache,rclone --rounds 5`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return host.Isolated(cmd.Context(), func(ctx context.Context, dir string, mounts bool) error {
				return run(ctx, o, dir, mounts)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.stepcache, "stepcache", ".bin/stepcache", "the stepcache program")
	f.StringVar(&o.versitygw, "versitygw", "", "the S3 server's program (default: built from its pinned module)")
	f.StringVar(&o.size, "size", "full", "small (seconds, says nothing of speed), medium, or full")
	f.StringVar(&o.only, "only", "", "measure the rows whose \"section: row\" matches this regular expression")
	f.StringSliceVar(&o.contenders, "contenders", nil, "measure only these, and native (default: all that are there)")
	f.IntVar(&o.rounds, "rounds", 0, "samples of each row, of which the median is told (default: by size)")
	f.IntVar(&o.slowRounds, "slow-rounds", 0, "samples of rows that take long (default: by size)")
	f.DurationVar(&o.limit, "limit", 0, "when a timed reading of many files ends at the latest (default: by size)")
	f.DurationVar(&o.patience, "patience", time.Minute, "when a reading, or a mount that does not come, is given up as hanging")
	f.DurationVar(&o.budget, "budget", 11*time.Minute, "about what all may take: rounds are left out for it, and then other projects (0: no matter)")
	f.StringVar(&o.out, "out", "bench/out", "folder for the results and the charts")
	f.StringVar(&o.readme, "readme", "", "also write the table into this file, between its markers")
	cmd.AddCommand(&cobra.Command{Use: "read", Hidden: true, Args: cobra.NoArgs, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return trial.Read(cmd.Context(), os.Stdin, os.Stdout) }})
	return cmd
}

func (o *options) check() (err error) {
	var ok bool
	if o.scale, ok = scales[o.size]; !ok {
		return fmt.Errorf("--size %q: want small, medium or full", o.size)
	}
	if o.rounds < 0 || o.slowRounds < 0 || o.rounds > 1000 || o.slowRounds > 1000 {
		return errors.New("--rounds and --slow-rounds: want 1 to 1000")
	}
	if o.limit < 0 || o.patience <= 0 || o.budget < 0 {
		return errors.New("--limit, --patience and --budget: want a time such as 3s")
	}
	o.rounds, o.slowRounds = pick(o.rounds, o.scale.rounds), pick(o.slowRounds, o.scale.slowRounds)
	if o.limit == 0 {
		o.limit = o.scale.limit
	}
	if o.match, err = regexp.Compile(o.only); err != nil {
		return fmt.Errorf("--only: %w", err)
	}
	if err := trial.CheckContenders(o.contenders); err != nil {
		return fmt.Errorf("--contenders %w", err)
	}
	for _, p := range []*string{&o.stepcache, &o.out} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if _, err := os.Stat(o.stepcache); err != nil {
		return fmt.Errorf("--stepcache: %w; `make build` makes it", err)
	}
	if o.readme != "" {
		if o.table, err = host.PlaceIn(o.readme, "compare"); err != nil {
			return err
		}
	}
	o.results, err = host.ResultsIn(o.out, "compare")
	return err
}

func pick(given, otherwise int) int {
	if given > 0 {
		return given
	}
	return otherwise
}

func run(ctx context.Context, o options, dir string, mounts bool) error {
	// Whatever is made from here on is in this folder's memory.
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	in, remove, err := input(ctx, o, dir)
	defer remove()
	if err != nil {
		return fmt.Errorf("input: %w", err)
	}
	rep, runErr := trial.Run(ctx, trial.Options{
		Program: o.stepcache, Reader: []string{self, "read"}, Only: o.match, Contenders: o.contenders,
		Rounds: o.rounds, SlowRounds: o.slowRounds, Limit: o.limit, Patience: o.patience, Budget: o.budget, Mounts: mounts, Log: os.Stderr,
		Each: func(rep *trial.Report) {
			if err := o.results.Partial(rep.JSON); err != nil {
				fmt.Fprintln(os.Stderr, "what there is so far is not kept:", err)
			}
		},
	}, in)
	if len(rep.Rows) == 0 {
		return runErr
	}
	err = rep.Print(os.Stdout)
	if !rep.Whole {
		// What there is, for people; but for the partial one the files keep the last whole run.
		return errors.Join(err, runErr)
	}
	err = errors.Join(err, o.results.Whole(rep.JSON), charts(rep, o.out))
	if o.table != nil {
		err = errors.Join(err, o.table.Write(rep.Markdown))
	}
	return errors.Join(err, runErr)
}
