package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/local"
)

func localCommand() *cobra.Command {
	var o local.Options
	var memory string
	cmd := &cobra.Command{
		Use:                   "local -f FILE|FOLDER [--mount DIR] [-- COMMAND [ARG ...]]",
		DisableFlagsInUseLine: true,
		Short:                 "Run the tier on this machine, from the manifests a cluster takes",
		Long: `Reads Dataset, DataLoad and Secret manifests, brings the tier up as processes on this machine, runs the
DataLoads, mounts each Dataset at DIR/NAME, runs COMMAND, reports what the tier did, and removes everything
again, also after Ctrl-C. Without COMMAND it prints what to export and waits for Ctrl-C.

DIR/NAME must be empty or absent. A mount shows one listing of the bucket for as long as it lasts, so that no
file changes under COMMAND; where the Dataset has a refresh interval, "stepcache ls" and "get" and new mounts see
the newer listing. Mounts are read-only; a Dataset with access: ReadWrite also gets an S3 endpoint on this
machine, whose address and access keys are printed. Schedules are not kept, and a DataLoad runs once.

COMMAND finds STEPCACHE_TIER in its environment, and with --mount also STEPCACHE_MOUNT (DIR),
STEPCACHE_DATASET (DIR/NAME, where there is one Dataset) and STEPCACHE_DATASET_NAME for each; with one writable
Dataset also STEPCACHE_S3_ENDPOINT, STEPCACHE_S3_BUCKET and STEPCACHE_S3_CREDENTIALS (a folder with the access
keys and with env, a file to source for the AWS CLI and SDKs).
A Secret that is not among the manifests is taken from the environment (the error says from where).
The exit status is COMMAND's: 127 when there is no such command, 126 when it cannot be run.

A DataLoad that fails is told when it does and again at the end. COMMAND runs all the same, since it reads the rest from
the bucket, and its exit status stays; without COMMAND it is 1. Only a DataLoad that pins ends the run.`,
		Example: `  stepcache local -f genomes.yaml --mount /mnt/data -- sh -c 'sha256sum $STEPCACHE_DATASET/*'
  stepcache local -f dataset.yaml          # then, elsewhere: export STEPCACHE_TIER=...; stepcache ls /`,
		RunE: func(cmd *cobra.Command, command []string) error {
			if len(o.Manifests) == 0 {
				return usage{errors.New("local: -f is missing: name a manifest file or a folder of them")}
			}
			if at := cmd.ArgsLenAtDash(); len(command) > 0 && at != 0 {
				return usage{fmt.Errorf("local: unexpected argument %q: put -- in front of the command", command[0])}
			}
			if memory != "" {
				n, err := humanize.ParseBytes(memory)
				if err != nil || n == 0 || n > 1<<50 {
					return usage{fmt.Errorf("local: --memory %q: want a size such as 4GiB", memory)}
				}
				o.Memory = int64(n)
			}
			if o.Workers < 1 {
				return usage{fmt.Errorf("local: --workers %d: want 1 or more", o.Workers)}
			}
			if o.Problems <= 0 {
				return usage{fmt.Errorf("local: --give-up %v: want a time such as 30s", o.Problems)}
			}
			if o.S3Domain != "" {
				if err := gateway.ValidDomain(o.S3Domain); err != nil {
					return usage{fmt.Errorf("local: --s3-domain: %w", err)}
				}
			}
			if len(command) > 0 {
				// Before the tier comes up for nothing.
				if _, err := exec.LookPath(command[0]); err != nil {
					fmt.Fprintf(os.Stderr, "stepcache: cannot run %q: %v\n", command[0], errors.Unwrap(err))
					return exit(notFound(err))
				}
			}
			return runLocal(cmd.Context(), o, command)
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&o.Manifests, "filename", "f", nil, "manifest file, folder of them, or - for standard input; may be repeated")
	f.StringVar(&o.Mount, "mount", "", "folder below which each Dataset is mounted")
	f.IntVar(&o.Workers, "workers", 4, "the most workers a Dataset gets on this machine")
	f.StringVar(&memory, "memory", "", "the most memory of all workers together (default: half of what is available)")
	f.StringVar(&o.S3Domain, "s3-domain", "", "host name of the S3 endpoint, for clients that put the bucket in front of it; all names below it must lead to this machine (as those below localhost do)")
	f.DurationVar(&o.Problems, "give-up", 10*time.Second, "how long a bucket may be out of reach at the start; one that refuses the keys, or is not there, is told at once")
	return cmd
}

func runLocal(ctx context.Context, o local.Options, command []string) error {
	var err error
	if o.Program, err = os.Executable(); err != nil {
		return err
	}
	// A reader of our output that goes away must not end us before everything is removed. A handler rather
	// than ignoring it: what we start gets the default back.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	o.Log, o.Flags = os.Stderr, true
	t, err := local.Start(ctx, o)
	if err != nil {
		return err
	}
	defer t.Close()
	failed, err := warm(ctx, t)
	if err != nil {
		return err
	}
	before, _ := ask(t) // what cannot be told now is not told later
	status := runCommand(ctx, t, command)
	after, err := ask(t)
	if err != nil {
		fmt.Fprintln(os.Stderr, "stepcache: report:", err)
	}
	writeReports(os.Stderr, before, after)
	if len(command) == 0 && status == nil {
		return failed // nothing else was to be done
	}
	if failed != nil {
		fmt.Fprintln(os.Stderr, "stepcache:", failed) // again: what the command printed stands in between
	}
	return status
}

// ask asks the workers, for a bounded time and also after Ctrl-C.
func ask(t *local.Tier) ([]local.Report, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return t.Report(ctx)
}

// notFound is what a shell ends with when it cannot run a command.
func notFound(err error) int {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EISDIR) {
		return 126
	}
	return 127
}

// warm runs the DataLoads; failed is of those that the command can do without.
func warm(ctx context.Context, t *local.Tier) (failed, err error) {
	var p *progress
	var last client.LoadSum
	began := time.Now()
	end := func() {
		if p != nil {
			p.finish()
			p = nil
		}
	}
	defer end()
	err = t.Warm(ctx, func(load string, s client.LoadSum) {
		if p == nil {
			p = newProgress("load "+load, s.Total)
		}
		p.set(s.Resident, s.Total)
		last = s
	}, func(load string, why error) {
		end()
		if why == nil {
			fmt.Fprintf(os.Stderr, "load %s: %s\n", load, loadLine(last, time.Since(began)))
		} else {
			why = fmt.Errorf("load %s failed, with %s of %s resident: %w", load, size(last.Resident), size(last.Total), why)
			fmt.Fprintln(os.Stderr, why)
			failed = errors.Join(failed, why)
		}
		last, began = client.LoadSum{}, time.Now()
	})
	return failed, err
}

// runCommand runs the command, or waits for Ctrl-C, and gives back the exit status.
func runCommand(ctx context.Context, t *local.Tier, command []string) error {
	if len(command) == 0 {
		var b strings.Builder
		for _, v := range t.Env() {
			key, value, _ := strings.Cut(v, "=")
			fmt.Fprintf(&b, "export %s='%s'\n", key, strings.ReplaceAll(value, "'", `'\''`))
		}
		b.WriteString("# ready; Ctrl-C ends it and removes everything\n")
		if _, err := os.Stdout.WriteString(b.String()); err != nil {
			return fmt.Errorf("nobody can know where the tier is: %w", err)
		}
		<-ctx.Done()
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// The command shares our process group: Ctrl-C reaches it by itself; other signals that end us are passed
	// on. Either way the tier stays until the command has ended.
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), t.Env()...)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, endings()...)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run %s: %w", command[0], err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			if s != os.Interrupt {
				_ = cmd.Process.Signal(s)
			}
		case err := <-ended:
			var status *exec.ExitError
			if !errors.As(err, &status) {
				return err
			}
			if ws, ok := status.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
				return exit(128 + int(ws.Signal())) // as a shell says it
			}
			return exit(status.ExitCode())
		}
	}
}

// writeReports tells what the tiers did, and of the command's reads how many came from the tier.
func writeReports(out io.Writer, before, after []local.Report) {
	w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "DATASET\tFILES\tBYTES\tIN MEMORY\tFROM BUCKET\tREQUESTS\tOPENED\tHIT RATIO\tREFETCHED")
	atLeast, restarts := false, int64(0)
	for i, r := range after {
		restarts += r.Restarts
		s := sum(r.Status)
		var old wire.WorkerStatus
		if i < len(before) {
			old = sum(before[i].Status)
		}
		opened, hits := hitRatio(old, s)
		if r.Mounted != "" && opened != "-" && hits != "100.0 %" {
			hits, atLeast = "≥ "+hits, true
		}
		files, bytes := listed(s)
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%d\n", r.Dataset, files, bytes, size(s.Used),
			size(s.SourceBytes), s.SourceRequests, opened, hits, s.Refetched)
	}
	w.Flush()
	if atLeast {
		fmt.Fprintln(out, "≥: what the kernel has read before it gives out again without asking, and nobody counts that.")
	}
	if restarts > 0 {
		fmt.Fprintf(out, "Workers were started again (%d in all): what they had fetched and served before is not counted.\n", restarts)
	}
}

// hitRatio is how many bytes were read, or opened in files whose memory was handed out, since old, and the
// share of them that did not have to come from the bucket for it. What a DataLoad fetched before is not held
// against it.
func hitRatio(old, s wire.WorkerStatus) (opened, ratio string) {
	bytes := s.ServedBytes + s.OpenedBytes - old.ServedBytes - old.OpenedBytes
	fetched := max(0, s.SourceBytes-old.SourceBytes)
	if bytes <= 0 { // nothing read, or a worker that counts anew since it was started again
		return "-", "-"
	}
	return size(bytes), fmt.Sprintf("%.1f %%", 100*max(0, 1-float64(fetched)/float64(bytes)))
}
