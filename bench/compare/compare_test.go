package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/bench/trial"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/test/bucket"
)

// asProgram makes the test binary be the bench itself.
const asProgram = "STEPCACHE_TEST_COMPARE"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// patience bounds what takes some ten seconds; two loaded cores and the race detector take longer.
const patience = 4 * time.Minute

// compare runs the bench as a process in a temporary folder of its own, which must be empty afterwards.
func compare(t *testing.T, env []string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	return compareUntil(t, "", env, args...)
}

// compareUntil interrupts it when it has said something.
func compareUntil(t *testing.T, said string, env []string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	tmp, err := os.MkdirTemp("", "c") // short: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(append(os.Environ(), asProgram+"=1", "TMPDIR="+tmp), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	var out bytes.Buffer
	errs := &listener{word: said, heard: func() { _ = cmd.Process.Signal(os.Interrupt) }}
	cmd.Stdout, cmd.Stderr = &out, errs
	err = cmd.Run()
	if left, readErr := os.ReadDir(tmp); readErr != nil || len(left) > 0 {
		t.Errorf("the bench left %v in its temporary folder (%v)", left, readErr)
	}
	if below, e := mountinfo.Below(tmp); e != nil || len(below) > 0 {
		t.Errorf("the bench left mounts: %v (%v)", below, e)
	}
	return out.String(), errs.text.String(), err
}

// listener keeps what is written and calls heard once it contains a word.
type listener struct {
	text  bytes.Buffer
	word  string
	heard func()
}

func (l *listener) Write(p []byte) (int, error) {
	n, err := l.text.Write(p)
	if l.word != "" && strings.Contains(l.text.String(), l.word) {
		l.word = ""
		l.heard()
	}
	return n, err
}

// TestWhole runs all of the bench in small, beside a peer that cannot mount: every row has a figure or a reason,
// all digests are equal, and table, JSON, charts and README are written.
func TestWhole(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "stepcache")
	if out, err := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "github.com/stepcache/stepcache/cmd/stepcache").CombinedOutput(); err != nil {
		t.Fatalf("build stepcache: %v\n%s", err, out)
	}
	bad := filepath.Join(dir, "path")
	readme := filepath.Join(dir, "README.md")
	err := errors.Join(os.Mkdir(bad, 0o755),
		os.WriteFile(filepath.Join(bad, "geesefs"), []byte("#!/bin/sh\necho no such luck\nexit 3\n"), 0o755),
		os.WriteFile(readme, []byte("# A\n"+tableBegin+"stale\n"+tableEnd+"b\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	stdout, stderr, err := compare(t, []string{"PATH=" + bad + ":" + os.Getenv("PATH")}, "--stepcache", program, "--size", "small",
		"--contenders", "direct,stepcache,geesefs", "--out", out, "--readme", readme)
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, stdout, stderr)
	}
	text, err := os.ReadFile(filepath.Join(out, "compare.json"))
	if err != nil {
		t.Fatal(err)
	}
	var rep trial.Report
	if err := json.Unmarshal(text, &rep); err != nil {
		t.Fatal(err)
	}
	root := os.Geteuid() == 0
	sections := map[string]bool{}
	for _, r := range rep.Rows {
		title := r.Section + ": " + r.Name
		sections[r.Section] = true
		puts := r.Section == "artifacts" // which are compared with the bucket, and need no mount
		for name, want := range map[string]bool{
			trial.Native: r.Kind != trial.Cold && !puts,
			trial.Direct: r.Kind != trial.Warm && r.Without != trial.Direct,
			trial.Own:    root || puts,
		} {
			f := r.Figures[name]
			if has := f != nil && len(f.Samples) == 1 && f.Samples[0] > 0 && !f.Failed; has != want {
				t.Errorf("%s: %s: %+v, want a figure: %v", title, name, f, want)
			}
		}
		if f := r.Figures["geesefs"]; puts != (f == nil) {
			t.Errorf("%s: a peer that only mounts: %+v", title, f)
		} else if !puts && (len(f.Samples) > 0 || root && !strings.Contains(f.Reason, "no such luck")) {
			t.Errorf("%s: a peer that cannot mount: %+v", title, f)
		}
		// What is a count and not a speed holds in every size. What was put through the tier does not leave the bucket,
		// or once where it was put in parts; of the smallest, answers without content would be a part.
		if f := r.Figures[trial.Own]; puts && f != nil && r.Name != "get 1 KiB" {
			most := 0.1
			if r.Name == "get 20 MiB" {
				most = 1.1
			}
			if f.LeftBucket > most {
				t.Errorf("%s: %.2f times what was put left the bucket", title, f.LeftBucket)
			}
		}
		if f := r.Figures[trial.Own]; f != nil && len(f.Samples) > 0 && r.Kind == trial.Cold && r.Section != "hundred steps" {
			if f.LeftBucket < 1 || f.LeftBucket > 1.1 {
				t.Errorf("%s: %.2f times what was read left the bucket", title, f.LeftBucket)
			}
			if r.Section == "small files" && f.Requests != 1 {
				t.Errorf("%s: %.2f requests a file", title, f.Requests)
			}
		}
	}
	if want := []string{"large file", "small files", "tree", "limited bucket", "hundred steps", "artifacts"}; len(sections) != len(want) {
		t.Errorf("sections %v, want %q", sections, want)
	}
	// Four comparisons of all bytes for us, and the digests of pods and steps; and those of seven rows of artifacts,
	// of both who put and got them.
	if least := map[bool]int{true: 6, false: 1}[root] + 14; rep.Digests < least {
		t.Errorf("%d digests compared, want %d and more", rep.Digests, least)
	}
	if rep.Machine.Kernel == "" || !slices.ContainsFunc(rep.Contenders, func(c trial.Contender) bool { return c.Name == trial.Own && c.Version != "" }) {
		t.Errorf("machine %+v and versions %+v", rep.Machine, rep.Contenders)
	}
	for section := range sections {
		svg, err := os.ReadFile(filepath.Join(out, strings.ReplaceAll(section, " ", "-")+".svg"))
		base := trial.Native
		if section == "artifacts" {
			base = trial.Direct
		}
		if err != nil || !bytes.Contains(svg, []byte("<svg")) || !bytes.Contains(svg, []byte(">"+base+"<")) {
			t.Errorf("chart of %s: %v, %d bytes", section, err, len(svg))
		}
		for d := xml.NewDecoder(bytes.NewReader(svg)); ; {
			if _, err := d.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Errorf("chart of %s: %v", section, err)
				break
			}
		}
	}
	table, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	middle, ok := strings.CutPrefix(string(table), "# A\n"+tableBegin)
	middle, ok2 := strings.CutSuffix(middle, tableEnd+"b\n")
	if !ok || !ok2 || strings.Contains(middle, "stale") || !strings.Contains(middle, "| large file: warm, 1 reader |") {
		t.Errorf("README: %q", table)
	}
	if !strings.Contains(stdout, "large file: warm, 1 reader") {
		t.Errorf("table: %s", stdout)
	}
}

// TestInterrupted ends the bench in its second round: what the first has found is told, all is removed (compare looks
// after that), and the files keep what they had.
func TestInterrupted(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	stdout, stderr, err := compareUntil(t, "large file, round 2", nil, "--stepcache", self, "--size", "small", "--contenders", "direct",
		"--only", "(large|small) file.*cold|warm, 1", "--rounds", "1000", "--budget", "0", "--out", out)
	if err == nil || !strings.Contains(stderr, "interrupted; everything is stopped and removed") {
		t.Errorf("%v, said %s", err, stderr)
	}
	if !strings.Contains(stderr, " left)") {
		t.Errorf("nothing said of the time left: %s", stderr)
	}
	if !strings.Contains(stdout, "Interrupted") || !strings.Contains(stdout, "large file: warm, 1 reader ") || strings.Contains(stdout, "small files:") {
		t.Errorf("table: %s", stdout)
	}
	if files, err := os.ReadDir(out); err != nil || len(files) > 0 {
		t.Errorf("an interrupted run wrote %v (%v)", files, err)
	}
}

// Of artifacts a reader knows what it must get: other bytes take a contender's figures away.
func TestWrongArtifact(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	if err := s.MakeBucket(t.Context(), putsBucket); err != nil {
		t.Fatal(err)
	}
	do := func(op string) trial.Done {
		t.Helper()
		job, err := json.Marshal(trial.Job{Op: op, Bucket: at(s, putsBucket), Files: []access.File{{Path: "a", Size: 3000}, {Path: "b", Size: 3000}}, Readers: 2})
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := trial.Read(t.Context(), bytes.NewReader(job), &out); err != nil {
			t.Fatal(err)
		}
		var d trial.Done
		if err := json.Unmarshal(out.Bytes(), &d); err != nil {
			t.Fatal(err)
		}
		return d
	}
	if d := do("put"); d.Count != 2 || d.Bytes != 6000 || d.Wrong != "" || d.Compared {
		t.Errorf("put: %+v", d)
	}
	if d := do("get"); d.Count != 2 || d.Bytes != 6000 || d.Wrong != "" || !d.Compared {
		t.Errorf("get: %+v", d)
	}
	if d := do("share"); d.Count != 2 || d.Bytes != 6000 || d.Wrong != "" || !d.Compared {
		t.Errorf("share: %+v", d)
	}
	content := access.Noise(3000, 1)
	s.PutT(t, putsBucket, "b", content)
	if d := do("get"); !strings.Contains(d.Wrong, "WRONG BYTES: b ") || d.Compared {
		t.Errorf("other bytes: %+v", d)
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
		{[]string{"--size", "huge"}, "--size"},
		{[]string{"--stepcache", self, "--rounds", "-1"}, "--rounds"},
		{[]string{"--stepcache", self, "--limit", "-1s"}, "--limit"},
		{[]string{"--stepcache", self, "--only", "("}, "--only"},
		{[]string{"--stepcache", self, "--contenders", "nfs"}, "rclone"},
		{[]string{"--stepcache", self, "--size", "small", "--only", "no such row", "--out", t.TempDir()}, "matches no row"},
		{[]string{"--stepcache", self, "--readme", noMarkers}, "compare:begin"},
		{[]string{"--stepcache", self, "--readme", noMarkers + "x"}, "--readme"},
		{[]string{"more"}, "unknown command"},
	} {
		stdout, stderr, err := compare(t, nil, c.args...)
		if err == nil || !strings.Contains(stderr, c.says) || stdout != "" {
			t.Errorf("%q: %v, said %q %q, want %q", c.args, err, stdout, stderr, c.says)
		}
	}
}
