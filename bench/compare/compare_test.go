package main

import (
	"bytes"
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

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/bench/host/hosttest"
	"github.com/stepcache/stepcache/bench/trial"
	"github.com/stepcache/stepcache/test/bucket"
)

func TestMain(m *testing.M) { hosttest.Main(m, main) }

// TestWhole runs all of the bench in small, beside a peer that cannot mount: every row has a figure or a reason,
// all digests are equal, and table, JSON, charts and README are written.
func TestWhole(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "path")
	readme := filepath.Join(dir, "README.md")
	err := errors.Join(os.Mkdir(bad, 0o755),
		os.WriteFile(filepath.Join(bad, "geesefs"), []byte("#!/bin/sh\necho no such luck\nexit 3\n"), 0o755),
		os.WriteFile(readme, []byte("# A\n<!-- compare:begin -->\nstale\n<!-- compare:end -->b\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	stdout, stderr, err := hosttest.Run{
		Env: []string{"PATH=" + bad + ":" + os.Getenv("PATH")},
		Args: []string{"--stepcache", hosttest.Stepcache(t), "--size", "small", "--budget", "0",
			"--contenders", "direct,stepcache,geesefs", "--out", out, "--readme", readme},
	}.Do(t)
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
	if _, err := os.Stat(filepath.Join(out, "compare.partial.json")); !rep.Whole || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("whole: %v, and a partial one: %v", rep.Whole, err)
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
		// or once what was put in parts and not kept; of the smallest, answers without content would be a part.
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
	middle, ok := strings.CutPrefix(string(table), "# A\n<!-- compare:begin -->\n")
	middle, ok2 := strings.CutSuffix(middle, "<!-- compare:end -->b\n")
	if !ok || !ok2 || strings.Contains(middle, "stale") || !strings.Contains(middle, "| large file: warm, 1 reader |") {
		t.Errorf("README: %q", table)
	}
	if !strings.Contains(stdout, "large file: warm, 1 reader") || strings.Contains(stdout, "Interrupted") {
		t.Errorf("table: %s", stdout)
	}
}

// TestInterrupted ends the bench in its second round: what the first has found is told and kept, all is removed (Do
// looks after that), and the files of the last whole run stay.
func TestInterrupted(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	stdout, stderr, err := hosttest.Run{Interrupt: "large file, round 2", Args: []string{"--stepcache", self, "--size", "small",
		"--contenders", "direct", "--only", "(large|small) file.*cold|warm, 1", "--rounds", "1000", "--budget", "0", "--out", out}}.Do(t)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != host.Interrupted || !strings.Contains(stderr, "interrupted; everything is stopped and removed") {
		t.Errorf("%v, said %s", err, stderr)
	}
	if !strings.Contains(stderr, " left)") {
		t.Errorf("nothing said of the time left: %s", stderr)
	}
	// Each row once before any row twice.
	if !strings.Contains(stdout, "Interrupted") || !strings.Contains(stdout, "large file: warm, 1 reader ") || !strings.Contains(stdout, "small files: cold, 8 readers ") {
		t.Errorf("table: %s", stdout)
	}
	files, err := os.ReadDir(out)
	if err != nil || len(files) != 1 || files[0].Name() != "compare.partial.json" {
		t.Fatalf("an interrupted run wrote %v (%v)", files, err)
	}
	text, err := os.ReadFile(filepath.Join(out, files[0].Name()))
	var rep trial.Report
	if err := errors.Join(err, json.Unmarshal(text, &rep)); err != nil {
		t.Fatal(err)
	}
	for _, r := range rep.Rows {
		if f := r.Figures[trial.Direct]; r.Kind == trial.Cold && (f == nil || len(f.Samples) == 0) {
			t.Errorf("%s: %s is not kept: %+v", r.Section, r.Name, f)
		}
	}
	if rep.Whole || len(rep.Rows) != 5 {
		t.Errorf("what is kept: %d rows, whole: %v", len(rep.Rows), rep.Whole)
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
		stdout, stderr, err := hosttest.Run{Args: c.args}.Do(t)
		if err == nil || !strings.Contains(stderr, c.says) || stdout != "" {
			t.Errorf("%q: %v, said %q %q, want %q", c.args, err, stdout, stderr, c.says)
		}
	}
}
