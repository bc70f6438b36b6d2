// Command layers measures each layer of the data path as a ratio to native memory: a row of its table is
// a layer's rate divided by that of a plain read of a file on a tmpfs of 4 KiB pages (or by what else the
// row names), measured before and after it in the same run, so that the figures of two machines, or of a
// quiet and a busy hour, can be compared.
//
// It owns the rows, how they are interleaved with what they are compared with, and the report. Tiers and
// mounts are the real ones: processes of the stepcache program, brought up by package local.
//
// Concurrency: one goroutine measures; readers are started by a row and have ended when it has its
// figure. Failure: a row that cannot be measured here says why; one that fails or hangs says how, the others still
// run, and the exit status is 1; interrupted, it is 130, after what there is. As root everything is mounted in a mount namespace of its own, so that
// nothing is left however the program ends.
//
// It may import bench/access, bench/host, cache/..., tier, local and test/bucket.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/bench/host"
)

type options struct {
	stepcache, versitygw string
	only, size           string
	rounds, files        int
	output, readme, out  string
	patience             time.Duration

	match   *regexp.Regexp
	bytes   int64
	results *host.Results
	table   *host.Place // nil: no README
}

func main() { host.Main(command()) }

func command() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "layers",
		Short: "Each layer of the data path as a ratio to native memory, in one run",
		Long: `Measures store, wire, client, mounts, small files, warming, eviction and memory, each beside a native read in
the same run, and prints one table. bench/README.md says how to read it. Mounts need root.`,
		Example: `  go run ./bench/layers --stepcache .bin/stepcache
  go run ./bench/layers --stepcache .bin/stepcache --only 'same node' --rounds 9
  go run ./bench/layers --stepcache .bin/stepcache -o json > layers.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return host.Isolated(cmd.Context(), func(ctx context.Context, dir string, mounts bool) error {
				return measure(ctx, o, dir, mounts)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.stepcache, "stepcache", ".bin/stepcache", "the stepcache program")
	f.StringVar(&o.versitygw, "versitygw", "", "the S3 server's program (default: built from its pinned module)")
	f.StringVar(&o.only, "only", "", "measure the rows whose \"layer: name\" matches this regular expression")
	f.StringVar(&o.size, "size", "256MiB", "size of the file that is read; others follow from it")
	f.IntVar(&o.files, "files", 10_000, "number of small files; trees have 10 and 100 times as many")
	f.IntVar(&o.rounds, "rounds", 5, "samples of each row, of which the median is told")
	f.StringVarP(&o.output, "output", "o", "table", "table or json")
	f.DurationVar(&o.patience, "patience", 2*time.Minute, "when a sample is given up as hanging")
	f.StringVar(&o.out, "out", "bench/out", "folder for layers.json; layers.partial.json there is what there is so far")
	f.StringVar(&o.readme, "readme", "", "also write the table into this file, between its markers")
	cmd.AddCommand(&cobra.Command{
		Use: aloneCommand, Hidden: true, Args: cobra.NoArgs, Short: "Read the bucket of a job that comes as JSON, for the row of warming",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var j aloneJob
			if err := json.NewDecoder(cmd.InOrStdin()).Decode(&j); err != nil {
				return err
			}
			took, err := j.run(cmd.Context())
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(took)
		},
	})
	return cmd
}

func (o *options) check() (err error) {
	size, err := humanize.ParseBytes(o.size)
	if err != nil || size < 1<<20 || size > 1<<36 {
		return fmt.Errorf("--size %q: want 1MiB to 64GiB", o.size)
	}
	o.bytes = int64(size) &^ (1<<20 - 1)
	if o.rounds < 1 || o.rounds > 1000 {
		return fmt.Errorf("--rounds %d: want 1 to 1000", o.rounds)
	}
	if o.files < 10 || o.files > 1_000_000 {
		return fmt.Errorf("--files %d: want 10 to 1000000", o.files)
	}
	if o.match, err = regexp.Compile(o.only); err != nil {
		return fmt.Errorf("--only: %w", err)
	}
	if o.output != "table" && o.output != "json" {
		return fmt.Errorf("-o %q: want table or json", o.output)
	}
	if o.stepcache, err = filepath.Abs(o.stepcache); err != nil {
		return err
	}
	if _, err := os.Stat(o.stepcache); err != nil {
		return fmt.Errorf("--stepcache: %w; `make build` makes it", err)
	}
	if o.patience <= 0 {
		return fmt.Errorf("--patience %s: want a time such as 2m", o.patience)
	}
	if o.readme != "" {
		if o.table, err = host.PlaceIn(o.readme, "table"); err != nil {
			return err
		}
	}
	if o.out, err = filepath.Abs(o.out); err == nil {
		o.results, err = host.ResultsIn(o.out, "layers")
	}
	return err
}
