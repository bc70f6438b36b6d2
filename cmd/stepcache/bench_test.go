package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/bench/trial"
	"github.com/stepcache/stepcache/test/bucket"
)

// Both ways to bench one's own data: from manifests, with cold figures, and beside a tier that runs, with warm ones
// only.
func TestBench(t *testing.T) {
	f := newFixture(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	flags := []string{"--rounds", "1", "--limit", "100ms", "--contenders", "direct,stepcache", "--only", "^(large file: (cold, 1|warm, 1|sha)|tree|limited)", "-o", "json"}
	root := os.Geteuid() == 0
	for _, c := range []struct {
		name string
		args []string
		cold bool
	}{
		{"manifests", append([]string{"bench", "-f", f.manifests}, flags...), true},
		{"a tier that runs", append([]string{"local", "-f", f.manifests, "--", self, "bench"}, flags...), false},
	} {
		stdout, stderr, status := run(t, f.dir, c.args...)
		if status != 0 {
			t.Errorf("%s: status %d, said %s", c.name, status, stderr)
			continue
		}
		var rep trial.Report
		if err := json.Unmarshal([]byte(stdout), &rep); err != nil {
			t.Errorf("%s: %v in %q", c.name, err, stdout)
			continue
		}
		if len(rep.Rows) != 7 {
			t.Errorf("%s: %d rows", c.name, len(rep.Rows))
		}
		for _, r := range rep.Rows {
			want := map[string]bool{
				trial.Native: r.Kind != trial.Cold && r.Section != "tree", // a listing is not copied
				trial.Direct: r.Kind != trial.Warm && c.cold,
				trial.Own:    root && (c.cold || r.Kind != trial.Cold),
			}
			for name, want := range want {
				fig := r.Figures[name]
				if has := fig != nil && len(fig.Samples) == 1 && fig.Samples[0] > 0; has != want {
					t.Errorf("%s: %s: %s: %s: %+v, want a figure: %v", c.name, r.Section, r.Name, name, fig, want)
				} else if !has && fig != nil && fig.Reason == "" {
					t.Errorf("%s: %s: %s: %s: no reason for no figure", c.name, r.Section, r.Name, name)
				}
			}
		}
	}
	f.nothingLeft(t)
}

// One worker has the memory of all that the manifest wants, and a file that it does not hold is not read as the large one.
func TestBenchOnOneWorker(t *testing.T) {
	f := newFixture(t)
	f.write(t, bucket.SecretKey, "16Mi", false)
	f.server.PutT(t, "fixture", "larger", bytes.Repeat([]byte("0123456789abcdef"), 24<<16))
	f.server.PutT(t, "fixture", "largest", bytes.Repeat([]byte("0123456789abcdef"), 30<<16))
	stdout, stderr, status := run(t, f.dir, "bench", "-f", f.manifests, "--rounds", "1", "--contenders", "stepcache", "--only", "^large file: re-read", "-o", "json")
	if status != 0 || strings.Contains(stderr, "--workers") || strings.Contains(stderr, "--memory") {
		t.Errorf("status %d, said %s", status, stderr)
	}
	for _, want := range []string{"1 worker on this machine instead of 2, with 32 MiB each", "files of more than 28 MiB, such as largest of 30 MiB"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("said %s, want %q", stderr, want)
		}
	}
	var rep trial.Report
	if err := json.Unmarshal([]byte(stdout), &rep); err != nil || len(rep.Rows) != 1 {
		t.Fatalf("%v in %q", err, stdout)
	}
	if fig := rep.Rows[0].Figures[trial.Own]; fig == nil || (len(fig.Samples) == 1) != (os.Geteuid() == 0) {
		t.Errorf("%+v", fig)
	}
	f.nothingLeft(t)
}

func TestBenchWrongUse(t *testing.T) {
	dir := tempDir(t)
	for _, c := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"bench"}, 2, "-f is missing: name a manifest, or set --tier"},
		{[]string{"bench", "-f", "a.yaml", "--contenders", "direct,nope"}, 2, `--contenders "nope": want some of native, direct, stepcache, rclone, s3fs, geesefs, mount-s3`},
		{[]string{"bench", "-f", "a.yaml", "--tier", "/b"}, 2, "choose one"},
		{[]string{"bench", "-f", "a.yaml", "--largest", "much"}, 2, "--largest"},
		{[]string{"bench", "-f", "a.yaml", "--rounds", "0"}, 2, "--rounds"},
		{[]string{"bench", "-f", "a.yaml", "--only", "("}, 2, "--only"},
		{[]string{"bench", "-f", "/nonexistent/a.yaml"}, 1, "no such file"},
		{[]string{"bench", "more"}, 2, "unknown command"},
	} {
		stdout, stderr, status := run(t, dir, c.args...)
		if status != c.status || !strings.Contains(stderr, c.says) || stdout != "" {
			t.Errorf("%q: status %d, said %q %q, want %d, %q", c.args, status, stdout, stderr, c.status, c.says)
		}
	}
}
