package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	"github.com/stepcache/stepcache/local"
)

func localCommand() *cobra.Command {
	var o local.Options
	var memory string
	cmd := &cobra.Command{
		Use:   "local -f FILE|FOLDER [--mount DIR] [-- COMMAND [ARG ...]]",
		Short: "Run the tier on this machine, from the manifests a cluster takes",
		Long: `Reads Dataset, DataLoad and Secret manifests, brings the tier up as processes on this machine, runs the
DataLoads, mounts each Dataset at DIR/NAME, runs COMMAND, reports what the tier did, and removes everything
again, also after Ctrl-C. Without COMMAND it prints what to export and waits for Ctrl-C.

COMMAND finds STEPCACHE_TIER in its environment, and with --mount also STEPCACHE_MOUNT (DIR),
STEPCACHE_DATASET (DIR/NAME, where there is one Dataset) and STEPCACHE_DATASET_NAME for each.
A Secret that is not among the manifests is taken from the environment (the error says from where).
The exit status is COMMAND's.`,
		Example: `  stepcache local -f examples/quickstart --mount /mnt/data -- sh -c 'sha256sum $STEPCACHE_DATASET/*'
  stepcache local -f dataset.yaml          # then, elsewhere: export STEPCACHE_TIER=...; stepcache ls /`,
		RunE: func(cmd *cobra.Command, command []string) error {
			if o.Manifests == "" {
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
			if o.Workers < 0 {
				return usage{errors.New("local: --workers: want 1 or more")}
			}
			return runLocal(cmd.Context(), o, command)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.Manifests, "filename", "f", "", "manifest file, or folder of them")
	f.StringVar(&o.Mount, "mount", "", "folder below which each Dataset is mounted")
	f.IntVar(&o.Workers, "workers", 4, "the most workers a Dataset gets on this machine")
	f.StringVar(&memory, "memory", "", "the most memory of all workers together (default: half of what is available)")
	f.DurationVar(&o.Problems, "give-up", 10*time.Second, "how long a bucket may be out of reach at the start")
	return cmd
}

func runLocal(ctx context.Context, o local.Options, command []string) error {
	var err error
	if o.Program, err = os.Executable(); err != nil {
		return err
	}
	o.Log = os.Stderr
	t, err := local.Start(ctx, o)
	if err != nil {
		return err
	}
	defer t.Close()
	if err := warm(ctx, t); err != nil {
		return err
	}
	status := runCommand(ctx, t, command)
	reporting, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	reports, err := t.Report(reporting)
	if err != nil {
		fmt.Fprintln(os.Stderr, "stepcache: report:", err)
	}
	writeReports(os.Stderr, reports)
	return status
}

func warm(ctx context.Context, t *local.Tier) error {
	var current string
	var p *progress
	var last client.LoadSum
	began := time.Now()
	done := func() {
		if p != nil {
			p.finish()
			fmt.Fprintf(os.Stderr, "%s: %s\n", current, loadLine(last, time.Since(began)))
		}
	}
	err := t.Warm(ctx, func(load string, s client.LoadSum) {
		if name := "load " + load; name != current {
			done()
			current, began = name, time.Now()
			p = newProgress(current, s.Total)
		}
		p.set(s.Resident, s.Total)
		last = s
	})
	done()
	return err
}

// runCommand runs the command, or waits for Ctrl-C, and gives back the exit status.
func runCommand(ctx context.Context, t *local.Tier, command []string) error {
	if len(command) == 0 {
		for _, v := range t.Env() {
			key, value, _ := strings.Cut(v, "=")
			fmt.Printf("export %s='%s'\n", key, strings.ReplaceAll(value, "'", `'\''`))
		}
		fmt.Println("# ready; Ctrl-C ends it and removes everything")
		<-ctx.Done()
		return nil
	}
	// The command shares our process group: Ctrl-C reaches it by itself; SIGTERM is passed on. Either way
	// the tier stays until the command has ended.
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), t.Env()...)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run %s: %w", command[0], err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			if s == syscall.SIGTERM {
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

func writeReports(out io.Writer, reports []local.Report) {
	w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "DATASET\tFILES\tBYTES\tIN MEMORY\tFROM BUCKET\tREQUESTS\tREFETCHED")
	for _, r := range reports {
		s := sum(r.Status)
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%d\t%d\n", r.Dataset, s.Files, size(s.Bytes), size(s.Used), size(s.SourceBytes), s.SourceRequests, s.Refetched)
	}
	w.Flush()
}
