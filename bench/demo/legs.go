package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/test/bucket"
)

// demo runs legs of steps over one input.
type demo struct {
	program string
	s3      *bucket.Server
	in      *input
}

// leg is what one leg measured.
type leg struct {
	name    string
	steps   int
	wall    time.Duration
	left    int64 // bytes that left the bucket
	read    int64 // bytes that the steps read
	digests int
}

// leg runs n steps at once and checks every digest that they print.
func (d *demo) leg(ctx context.Context, name string, n int, args, env []string) (leg, error) {
	p := newProgress(name, int64(n))
	defer p.finish()
	var read, digests atomic.Int64
	before, start := d.s3.Sent(), time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for i := range n {
		g.Go(func() error {
			files := append([]file{d.in.large}, d.in.share(i, n)...)
			if err := d.step(ctx, files, args, env); err != nil {
				return fmt.Errorf("%s leg, step %d of %d: %w", name, i+1, n, err)
			}
			for _, f := range files {
				read.Add(f.size)
			}
			digests.Add(int64(len(files)))
			p.add(1)
			return nil
		})
	}
	err := g.Wait()
	return leg{name, n, time.Since(start), d.s3.Sent() - before, read.Load(), int(digests.Load())}, err
}

// step runs one step and compares what it found with what was put.
func (d *demo) step(ctx context.Context, files []file, args, env []string) error {
	var paths, stdout, stderr bytes.Buffer
	for _, f := range files {
		paths.WriteString(f.path + "\n")
	}
	cmd := exec.CommandContext(ctx, d.program, append([]string{"step"}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &paths, &stdout, &stderr
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	var want strings.Builder
	for _, f := range files {
		fmt.Fprintf(&want, "%s  %s\n", f.sha256, f.path)
	}
	got := stdout.String()
	if got == want.String() {
		return nil
	}
	g, w := strings.Split(got, "\n"), strings.Split(want.String(), "\n")
	for i := range w {
		if i >= len(g) || g[i] != w[i] {
			return fmt.Errorf("WRONG BYTES: got %q, want %q", strings.Join(g[i:min(i+1, len(g))], ""), w[i])
		}
	}
	return fmt.Errorf("unexpected output after the last file: %q", strings.Join(g[len(w):], " "))
}

// table prints the legs side by side; the first is what the others are compared with.
func table(out io.Writer, legs []leg) {
	w := tabwriter.NewWriter(out, 0, 8, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "leg\tsteps\twall time\tleft the bucket\tread by steps\thit ratio\ttimes direct\t")
	for i, l := range legs {
		hits, ratio := "-", "-"
		if i > 0 {
			hits = fmt.Sprintf("%.1f %%", 100*max(0, 1-float64(l.left)/float64(l.read)))
			if l.steps == legs[0].steps {
				ratio = fmt.Sprintf("%.2f x", legs[0].wall.Seconds()/l.wall.Seconds())
			}
		}
		fmt.Fprintf(w, "%s\t%d\t%.1f s\t%s\t%s\t%s\t%s\t\n", l.name, l.steps, l.wall.Seconds(),
			humanize.Bytes(uint64(l.left)), humanize.Bytes(uint64(l.read)), hits, ratio)
	}
	w.Flush()
}
