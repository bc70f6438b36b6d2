package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/bench/host/hosttest"
)

func TestMain(m *testing.M) { hosttest.Main(m, main) }

type result struct {
	Machine host.Machine
	Root    bool
	Native  *host.Spread `json:"nativeBytesPerSecond"`
	Rows    []rowJSON
}

// TestEveryRow runs all of the bench in a tiny size: each row has a figure, or says why it has none.
func TestEveryRow(t *testing.T) {
	out := t.TempDir()
	stdout, stderr, err := hosttest.Run{Args: []string{"--stepcache", hosttest.Stepcache(t), "--size", "2MiB", "--files", "20", "--rounds", "1",
		"-o", "json", "--out", out}}.Do(t)
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, stdout, stderr)
	}
	kept, err := os.ReadFile(filepath.Join(out, "layers.json"))
	if _, e := os.Stat(filepath.Join(out, "layers.partial.json")); err != nil || string(kept) != stdout || !errors.Is(e, os.ErrNotExist) {
		t.Errorf("kept: %d bytes, %v; a partial one: %v", len(kept), err, e)
	}
	var r result
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v in %q", err, stdout)
	}
	b := &bench{o: options{bytes: 2 << 20, files: 20}}
	var want, got, root []string
	for _, g := range b.groups() {
		for _, row := range g.rows {
			want = append(want, row.title())
		}
	}
	for _, row := range r.Rows {
		title := row.Layer + ": " + row.Name
		got = append(got, title)
		switch {
		case row.Failed:
			t.Errorf("%s failed: %s", title, row.Reason)
		case row.Reason != "":
			t.Logf("%s: %s", title, row.Reason)
			root = append(root, title)
		case row.Figure == nil || row.Figure.Median < 0 || len(row.Samples) != 1:
			t.Errorf("%s has neither a figure nor a reason: %+v", title, row)
		case row.Of != "" && (row.Base == nil || len(row.Bases) != 1):
			t.Errorf("%s was not compared with %s: %+v", title, row.Of, row)
		case row.Of != "" && row.Of != "plain LRU" && (row.Ratio == nil || row.Ratio.Median <= 0):
			t.Errorf("%s has no ratio to %s: %+v", title, row.Of, row)
		}
		if row.Reference == "" {
			t.Errorf("%s names no figure to reach", title)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("rows %q, want %q", got, want)
	}
	if r.Root && len(root) > 2 {
		t.Errorf("root could not measure %q", root)
	}
	if r.Native == nil || r.Native.Median <= 0 || r.Machine.Kernel == "" || r.Machine.Cores == 0 {
		t.Errorf("no native figure or machine: %+v", r)
	}
	// The figures that are counts, not speeds, hold in every size.
	for _, row := range r.Rows {
		if row.Layer == "once" && row.Figure != nil && row.Figure.Median > 1.02 {
			t.Errorf("%s: %.3f times its size", row.Name, row.Figure.Median)
		}
	}
}

// TestReadme writes the table between the markers and nothing else.
func TestReadme(t *testing.T) {
	readme := filepath.Join(t.TempDir(), "README.md")
	before, after := "# A\n<!-- table:begin -->\n", "<!-- table:end -->b\n"
	if err := os.WriteFile(readme, []byte(before+"old\n"+after), 0o644); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, err := hosttest.Run{Args: []string{"--stepcache", hosttest.Stepcache(t), "--size", "1MiB", "--rounds", "2",
		"--only", "^wire: ", "--out", t.TempDir(), "--readme", readme}}.Do(t)
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	if !strings.Contains(stdout, "frames of 1 MiB") || strings.Contains(stdout, "store") && strings.Contains(stdout, "insert") {
		t.Errorf("the table is not that of --only: %s", stdout)
	}
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	middle, ok := strings.CutPrefix(string(text), before)
	middle, ok2 := strings.CutSuffix(middle, after)
	if !ok || !ok2 || strings.Contains(middle, "old") || !strings.Contains(middle, "| wire | frames of 1 MiB") || !strings.Contains(middle, "2 rounds") {
		t.Errorf("README: %q", text)
	}
}

// TestInterrupted stops the bench while it measures: what it has started ends, nothing is left, and what it has found
// so far is told and kept.
func TestInterrupted(t *testing.T) {
	out := t.TempDir()
	// A tier runs then, and mounts are next.
	stdout, stderr, err := hosttest.Run{Interrupt: "client: ", Args: []string{"--stepcache", hosttest.Stepcache(t), "--size", "1MiB",
		"--only", "^(client|same node)", "--rounds", "50", "--out", out}}.Do(t)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != host.Interrupted || !strings.Contains(stderr, "interrupted") {
		t.Errorf("%v, said %q", err, stderr)
	}
	if !strings.Contains(stdout, "Interrupted") || !strings.Contains(stdout, "over loopback TCP") || strings.Contains(stdout, "without passthrough") {
		t.Errorf("table: %s", stdout)
	}
	files, err := os.ReadDir(out)
	if err != nil || len(files) != 1 || files[0].Name() != "layers.partial.json" {
		t.Fatalf("an interrupted run wrote %v (%v)", files, err)
	}
	text, err := os.ReadFile(filepath.Join(out, files[0].Name()))
	if err != nil || !bytes.Contains(text, []byte("over loopback TCP")) {
		t.Errorf("what is kept: %s, %v", text, err)
	}
}

func TestWrongUse(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	noMarkers := filepath.Join(t.TempDir(), "README.md")
	if err := os.WriteFile(noMarkers, []byte("# A\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--stepcache", "/nonexistent/stepcache"}, "make build"},
		{[]string{"--stepcache", self, "--size", "12"}, "--size"},
		{[]string{"--stepcache", self, "--size", "much"}, "--size"},
		{[]string{"--stepcache", self, "--rounds", "0"}, "--rounds"},
		{[]string{"--stepcache", self, "--files", "1"}, "--files"},
		{[]string{"--stepcache", self, "--only", "("}, "--only"},
		{[]string{"--stepcache", self, "--only", "no such row", "--out", t.TempDir()}, "matches no row"},
		{[]string{"--stepcache", self, "--patience", "0s"}, "--patience"},
		{[]string{"--stepcache", self, "-o", "yaml"}, "table or json"},
		{[]string{"--stepcache", self, "--readme", noMarkers}, "table:begin"},
		{[]string{"--stepcache", self, "--readme", noMarkers + "x"}, "--readme"},
		{[]string{"more"}, "unknown command"},
	} {
		stdout, stderr, err := hosttest.Run{Args: c.args}.Do(t)
		if err == nil || !strings.Contains(stderr, c.says) || stdout != "" {
			t.Errorf("%q: %v, said %q %q, want %q", c.args, err, stdout, stderr, c.says)
		}
	}
}

// A row that fails says how, the others are measured, and the report tells one from the other.
func TestOutcomes(t *testing.T) {
	b := &bench{o: options{rounds: 3, patience: time.Minute}}
	v := 0.0
	of := &base{name: "N", run: func(context.Context) (float64, error) { v++; return v, nil }}
	good := &row{layer: "a", name: "good", unit: bytesPerSecond, of: of, run: func(context.Context) (float64, error) { return 3, nil }}
	bad := &row{layer: "a", name: "bad", unit: each, of: of, run: func(context.Context) (float64, error) { return 0, os.ErrInvalid }}
	not := &row{layer: "a", name: "not here", unit: each, prepare: func(context.Context) error { return cannot("needs a moon") }}
	undone := false
	b.group(t.Context(), group{
		setup: func(_ context.Context, s *scope) error { s.add(func() { undone = true }); return nil },
		rows:  []*row{good, bad, not},
	}, func(*row) {})
	if !undone {
		t.Error("what the group made was not undone")
	}
	// Native runs gave 1, 2 | 3, 4 | 5, 6 around the samples.
	if got := host.SpreadOf(good.ratios); got != (host.Spread{Median: 3 / 3.5, Min: 3 / 5.5, Max: 3 / 1.5}) || good.reason != "" {
		t.Errorf("good: %+v %q", got, good.reason)
	}
	if !bad.failed || bad.samples != nil || !strings.Contains(bad.outcome(), "FAILED") {
		t.Errorf("bad: %+v", bad)
	}
	if not.failed || not.outcome() != "not measured: needs a moon" {
		t.Errorf("not: %s", not.outcome())
	}
}

func TestLRU(t *testing.T) {
	// 1 2 3 and then 1 again and again: three fit, two do not hold a loop of three.
	trace := []uint64{1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3}
	if got := lru(trace, 3); got != 100 {
		t.Errorf("a loop that fits: %v %%", got)
	}
	if got := lru(trace, 2); got != 0 {
		t.Errorf("a loop that does not: %v %%", got)
	}
}

// A row that hangs is given up, the others are measured.
func TestPatience(t *testing.T) {
	b := &bench{o: options{rounds: 2, patience: time.Millisecond}, dir: t.TempDir()}
	stuck := &row{layer: "a", name: "stuck", unit: each, run: func(ctx context.Context) (float64, error) {
		<-ctx.Done()
		return 0, os.ErrDeadlineExceeded
	}}
	b.group(t.Context(), group{rows: []*row{stuck}}, func(*row) {})
	if !stuck.failed || !strings.Contains(stuck.reason, "no end after 1ms") {
		t.Errorf("stuck: %+v", stuck)
	}
	b.o.patience = time.Minute
	good := &row{layer: "a", name: "good", unit: each, run: func(context.Context) (float64, error) { return 3, nil }}
	b.group(t.Context(), group{rows: []*row{good}}, func(*row) {})
	if good.reason != "" || len(good.samples) != 2 {
		t.Errorf("good: %+v", good)
	}
}
