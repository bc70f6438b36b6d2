// Command demo runs the main job of Stepcache on one machine: a hundred parallel steps, each a process,
// read one dataset from a bandwidth-limited bucket, as workflows do today (direct), through a cold tier
// and through a warm one. It checks every digest and prints one table.
//
// It owns the input (the Go source tree and one large file made from it), the legs and the table. The
// bucket is a real S3 server that checks signatures (test/bucket); the tier is brought up by the
// stepcache program itself, from manifests as a cluster takes them.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/test/bucket"
)

// options are the demo's flags.
type options struct {
	stepcache, versitygw string
	steps, directSteps   int
	size                 string
	bytesPerSecond       string
	firstByte            time.Duration
	workers              int
	noMount              bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var o options
	root := &cobra.Command{
		Use:   "demo",
		Short: "A hundred parallel steps read one dataset: direct, cold and warm",
		Long: `A hundred parallel steps, each a process, hash one large file and their share of the Go source tree:
directly from a bandwidth-limited S3 bucket, then cold and warm through the tier. Every digest is checked.`,
		SilenceUsage: true, SilenceErrors: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), o) },
	}
	f := root.Flags()
	f.StringVar(&o.stepcache, "stepcache", ".bin/stepcache", "the stepcache program")
	f.StringVar(&o.versitygw, "versitygw", "", "the S3 server's program (default: built from its pinned module)")
	f.IntVar(&o.steps, "steps", 100, "parallel steps")
	f.IntVar(&o.directSteps, "direct-steps", 100, "parallel steps of the direct leg, at most")
	f.StringVar(&o.size, "size", "256MiB", "size of the large file")
	f.StringVar(&o.bytesPerSecond, "bandwidth", "200MB", "what the bucket sends a second, to all together")
	f.DurationVar(&o.firstByte, "first-byte", 20*time.Millisecond, "the bucket's delay before the first byte of every answer")
	f.IntVar(&o.workers, "workers", 2, "cache workers")
	f.BoolVar(&o.noMount, "no-mount", false, "read through the client library instead of a FUSE mount")
	root.AddCommand(stepCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		if errors.Is(err, context.Canceled) {
			err = errors.New("interrupted; everything is stopped and removed")
		}
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	size, err := humanize.ParseBytes(o.size)
	if err != nil || size == 0 || size > 1<<40 {
		return fmt.Errorf("--size %q: want a size such as 256MiB", o.size)
	}
	rate, err := humanize.ParseBytes(strings.TrimSuffix(o.bytesPerSecond, "/s"))
	if err != nil || rate > 1<<50 {
		return fmt.Errorf("--bandwidth %q: want bytes a second such as 200MB (0: no limit)", o.bytesPerSecond)
	}
	if o.steps < 1 || o.directSteps < 1 {
		return errors.New("--steps and --direct-steps: want 1 or more")
	}
	if !o.noMount {
		if err := mount.Supported(); err != nil {
			fmt.Printf("No FUSE mount here: %v\nThe steps read the same bytes through the client library instead.\n\n", err)
			o.noMount = true
		}
	}

	s3, err := bucket.Start(ctx, bucket.Options{BytesPerSecond: int64(rate), FirstByte: o.firstByte, Binary: o.versitygw})
	if err != nil {
		return err
	}
	defer s3.Close()
	in, err := putInput(ctx, s3, int64(size))
	if err != nil {
		return err
	}
	fmt.Printf("bucket: %d files of the Go source tree (%s) and one of %s, signatures checked, limited to %s/s in all and %s to first byte\n\n",
		len(in.tree), humanize.IBytes(uint64(in.treeBytes)), humanize.IBytes(size), humanize.Bytes(rate), o.firstByte)

	program, err := os.Executable()
	if err != nil {
		return err
	}
	d := &demo{program: program, s3: s3, in: in}
	n := min(o.steps, o.directSteps)
	direct, err := d.leg(ctx, "direct", n, []string{"--endpoint", s3.Endpoint()}, nil)
	if err != nil {
		return err
	}
	t, err := startTier(ctx, o, s3, in)
	if err != nil {
		return err
	}
	defer t.close()
	cold, err := d.leg(ctx, "cold", o.steps, t.stepArgs(), t.env)
	if err != nil {
		return err
	}
	warm, err := d.leg(ctx, "warm", o.steps, t.stepArgs(), t.env)
	if err != nil {
		return err
	}
	fmt.Println()
	table(os.Stdout, []leg{direct, cold, warm})
	if direct.steps != o.steps {
		fmt.Printf("\nThe direct leg ran %d of %d steps (DIRECT_STEPS), so its time is not that of %d and no ratio is given.\n", direct.steps, o.steps, o.steps)
	}
	fmt.Printf("\n%d digests checked, all equal.\n", direct.digests+cold.digests+warm.digests)
	return t.stop(ctx)
}
