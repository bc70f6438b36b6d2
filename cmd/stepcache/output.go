package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/tier"
)

// logger writes what long-running sub-commands log, from a level on: text on standard error.
func logger(from slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: from}))
}

// levelFlag adds --log-level to a long-running sub-command.
func levelFlag(cmd *cobra.Command, level *slog.Level) {
	cmd.Flags().TextVar(level, "log-level", slog.LevelInfo, "debug, info, warn or error")
}

// tierFlags are what every command that reads a tier takes.
type tierFlags struct {
	dir     string
	dataset string
}

func (t *tierFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&t.dir, "tier", os.Getenv(tier.Env), "folder of a running tier (default $"+tier.Env+")")
	cmd.Flags().StringVar(&t.dataset, "dataset", "", "which Dataset, as namespace/name or name, where the folder has several")
}

// one is the tier that the flags mean.
func (t *tierFlags) one() (tier.Folder, error) {
	all, err := tier.All(t.dir)
	if err != nil {
		return tier.Folder{}, err
	}
	var names []string
	for _, f := range all {
		if t.dataset == f.Dataset || t.dataset == shortName(f.Dataset) || t.dataset == "" && len(all) == 1 {
			return f, nil
		}
		names = append(names, f.Dataset)
	}
	if t.dataset == "" {
		return tier.Folder{}, usage{fmt.Errorf("the tier has %d Datasets: choose one with --dataset: %v", len(all), names)}
	}
	return tier.Folder{}, fmt.Errorf("the tier has no Dataset %s; it has %v", t.dataset, names)
}

func shortName(dataset string) string {
	for i := range dataset {
		if dataset[i] == '/' {
			return dataset[i+1:]
		}
	}
	return dataset
}

// jsonFlag adds -o json.
func jsonFlag(cmd *cobra.Command) *string {
	return cmd.Flags().StringP("output", "o", "text", "text or json")
}

func checkOutput(o string) error {
	if o != "text" && o != "json" {
		return usage{fmt.Errorf("-o %s: want text or json", o)}
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printable is a path for people: one with line breaks or the like is quoted, as it would fake other lines, and one
// that is not UTF-8, whose bytes a terminal may take for commands.
func printable(path string) string {
	if !utf8.ValidString(path) || strings.ContainsFunc(path, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(path)
	}
	return path
}

// size writes bytes for people.
func size(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }

// progress shows how far a transfer is: a bar with rate and time left on a terminal, a line every few
// seconds elsewhere.
type progress struct {
	name  string
	out   *os.File
	mu    sync.Mutex
	bar   *progressbar.ProgressBar // nil where there is no terminal
	last  time.Time                // when the last line was written, or when it began
	done  int64
	total int64
	// lastDone is what was done by then.
	lastDone int64
}

const lineEvery = 5 * time.Second

func newProgress(name string, total int64) *progress {
	now := time.Now()
	p := &progress{name: name, out: os.Stderr, total: total, last: now}
	if term.IsTerminal(int(p.out.Fd())) {
		p.bar = progressbar.NewOptions64(total, progressbar.OptionSetDescription(name), progressbar.OptionShowBytes(true),
			progressbar.OptionSetWriter(p.out), progressbar.OptionClearOnFinish(), progressbar.OptionSetPredictTime(true),
			progressbar.OptionThrottle(100*time.Millisecond))
	}
	return p
}

// set says how many of how many bytes are done.
func (p *progress) set(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		if total != p.total {
			p.bar.ChangeMax64(total)
		}
		_ = p.bar.Set64(done)
	}
	p.done, p.total = done, total
	if now := time.Now(); p.bar == nil && now.Sub(p.last) >= lineEvery {
		p.line(now)
		p.last, p.lastDone = now, done
	}
}

// add says that n more bytes are done.
func (p *progress) add(n int64) {
	p.mu.Lock()
	done, total := p.done+n, p.total
	p.mu.Unlock()
	p.set(done, total)
}

// line tells the rate since the last line, which is what the time left depends on: what was loaded before
// arrives at once and then it stalls.
func (p *progress) line(now time.Time) {
	rate := float64(p.done-p.lastDone) / now.Sub(p.last).Seconds()
	left := "unknown"
	if rate > 0 {
		left = time.Duration(float64(p.total-p.done) / rate * float64(time.Second)).Round(time.Second).String()
	}
	fmt.Fprintf(p.out, "%s: %s of %s, %s/s, %s left\n", p.name, size(p.done), size(p.total), size(int64(rate)), left)
}

func (p *progress) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}

// loadLine sums a load up.
func loadLine(s client.LoadSum, took time.Duration) string {
	return fmt.Sprintf("%s of %s resident, %s fetched in %s", size(s.Resident), size(s.Total), size(s.Fetched), took.Round(time.Millisecond))
}
