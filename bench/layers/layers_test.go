package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// asProgram makes the test binary be the bench itself.
const asProgram = "STEPCACHE_TEST_LAYERS"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	dir, err := os.MkdirTemp("", "layers-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	built = filepath.Join(dir, "stepcache")
	status := m.Run()
	os.RemoveAll(dir)
	os.Exit(status)
}

// patience bounds what takes some ten seconds; two loaded cores and the race detector take longer.
const patience = 4 * time.Minute

// layers runs the bench as a process in a temporary folder of its own, which must be empty afterwards.
func layers(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	tmp, err := os.MkdirTemp("", "l") // short: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "TMPDIR="+tmp)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	left, readErr := os.ReadDir(tmp)
	if readErr != nil || len(left) > 0 {
		t.Errorf("the bench left %v in its temporary folder (%v)", left, readErr)
	}
	if below, e := mountinfo.Below(tmp); e != nil || len(below) > 0 {
		t.Errorf("the bench left mounts: %v (%v)", below, e)
	}
	return out.String(), errs.String(), err
}

// built is where the program under measurement goes.
var built string

// build makes it, once for all tests.
var build = sync.OnceValues(func() ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w", "-o", built, "github.com/stepcache/stepcache/cmd/stepcache").CombinedOutput()
})

func stepcache(t *testing.T) string {
	t.Helper()
	if out, err := build(); err != nil {
		t.Fatalf("build stepcache: %v\n%s", err, out)
	}
	return built
}

type result struct {
	Machine host.Machine
	Root    bool
	Native  *spread `json:"nativeBytesPerSecond"`
	Rows    []rowJSON
}

// TestEveryRow runs all of the bench in a tiny size: each row has a figure, or says why it has none.
func TestEveryRow(t *testing.T) {
	program := stepcache(t)
	stdout, stderr, err := layers(t, "--stepcache", program, "--size", "2MiB", "--files", "20", "--rounds", "1", "-o", "json")
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, stdout, stderr)
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
	program := stepcache(t)
	readme := filepath.Join(t.TempDir(), "README.md")
	before, after := "# A\n"+tableBegin, tableEnd+"b\n"
	if err := os.WriteFile(readme, []byte(before+"old\n"+after), 0o644); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, err := layers(t, "--stepcache", program, "--size", "1MiB", "--rounds", "2", "--only", "^wire: ", "--readme", readme)
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

// TestInterrupted stops the bench while it measures: what it has started ends, and nothing is left.
func TestInterrupted(t *testing.T) {
	program := stepcache(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	tmp, err := os.MkdirTemp("", "l")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "--stepcache", program, "--size", "1MiB", "--only", "^(client|same node)", "--rounds", "50")
	cmd.Env = append(os.Environ(), asProgram+"=1", "TMPDIR="+tmp)
	cmd.WaitDelay = 30 * time.Second
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		said.WriteString(lines.Text() + "\n")
		if strings.Contains(lines.Text(), "client: ") { // a tier runs, and mounts are next
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(said.String(), "interrupted") {
		t.Errorf("interrupted: %v, said %q", err, said.String())
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("the bench left %v (%v)", left, err)
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
		{[]string{"--stepcache", self, "--only", "no such row"}, "matches no row"},
		{[]string{"--stepcache", self, "-o", "yaml"}, "table or json"},
		{[]string{"--stepcache", self, "--readme", noMarkers}, "table:begin"},
		{[]string{"--stepcache", self, "--readme", noMarkers + "x"}, "--readme"},
		{[]string{"more"}, "unknown command"},
	} {
		stdout, stderr, err := layers(t, c.args...)
		if err == nil || !strings.Contains(stderr, c.says) || stdout != "" {
			t.Errorf("%q: %v, said %q %q, want %q", c.args, err, stdout, stderr, c.says)
		}
	}
}

// A row that fails says how, the others are measured, and the report tells one from the other.
func TestOutcomes(t *testing.T) {
	b := &bench{o: options{rounds: 3}}
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
	if got := spreadOf(good.ratios); got != (spread{3 / 3.5, 3 / 5.5, 3 / 1.5}) || good.reason != "" {
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
