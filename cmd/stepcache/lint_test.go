package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stepcache/stepcache/lint"
)

const slowWorkflow = `# keep me
apiVersion: argoproj.io/v1alpha1
kind: Workflow
spec:
  templates:
  - name: m
    container: {image: x}
    outputs:
      artifacts:
      - {name: a, path: /tmp/a} # and me
`

const fastWorkflow = `# keep me
apiVersion: argoproj.io/v1alpha1
kind: Workflow
spec:
  templates:
  - name: m
    volumes: [{name: tmp, emptyDir: {}}]
    container: {image: x, volumeMounts: [{name: tmp, mountPath: /tmp}]}
    outputs:
      artifacts:
      - {name: a, path: /tmp/a, archive: {tar: {compressionLevel: 0}}} # and me
`

func TestLint(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		return path
	}
	slow := write("all/slow.yaml", slowWorkflow)
	write("all/sub/other.yml", "kind: ConfigMap\n")
	write("all/notes.txt", "a: b: c")
	broken := write("broken.yaml", "a: b: c\n")
	stubborn := write("stubborn.yaml", strings.Replace(slowWorkflow, "/tmp/a", "/a", 1))
	if err := os.MkdirAll(filepath.Join(dir, "none"), 0o755); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args           []string
		status         int
		stdout, stderr []string
	}{
		"text":         {[]string{slow}, 1, []string{slow + ":10: warning: ", "[gzip]\n", "[volume]\n"}, []string{"2 of 2 can be mended"}},
		"a folder":     {[]string{filepath.Join(dir, "all")}, 1, []string{slow + ":10: "}, nil},
		"yaml":         {[]string{"-o", "yaml", slow}, 0, []string{fastWorkflow}, nil},
		"yaml of two":  {[]string{"-o", "yaml", slow, slow}, 0, []string{fastWorkflow + "---\n" + fastWorkflow}, nil},
		"stubborn":     {[]string{"-o", "yaml", stubborn}, 1, []string{"archive: {tar: {compressionLevel: 0}}"}, []string{stubborn + ":10: warning: ", "[volume]"}},
		"broken":       {[]string{broken, slow}, 2, []string{slow + ":10: "}, []string{broken + ":1: ", "mapping values"}},
		"missing":      {[]string{filepath.Join(dir, "nothing.yaml")}, 2, nil, []string{"nothing.yaml"}},
		"empty folder": {[]string{filepath.Join(dir, "none")}, 2, nil, []string{"no .yaml"}},
		"no argument":  {nil, 2, nil, []string{"requires at least 1 arg", "--help"}},
		"output":       {[]string{"-o", "xml", slow}, 2, nil, []string{"-o xml"}},
		"fix and yaml": {[]string{"--fix", "-o", "yaml", slow}, 2, nil, []string{"do not go together"}},
		"fix of stdin": {[]string{"--fix", "-"}, 2, nil, []string{"-o yaml"}},
		"fix of pipe":  {[]string{"--fix", pipe}, 2, nil, []string{pipe + ": --fix cannot write what is not a regular file: use -o yaml"}},
		"help":         {[]string{"--help"}, 0, []string{"--fix", "gzip", "Exit status"}, nil},
		"no workflow":  {[]string{filepath.Join(dir, "all", "sub")}, 0, nil, []string{"no workflow of Argo in 1 file\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, status := run(t, dir, append([]string{"lint"}, c.args...)...)
			if status != c.status {
				t.Errorf("status %d, want %d", status, c.status)
			}
			for _, s := range c.stdout {
				if !strings.Contains(stdout, s) {
					t.Errorf("standard output lacks %q:\n%s", s, stdout)
				}
			}
			for _, s := range c.stderr {
				if !strings.Contains(stderr, s) {
					t.Errorf("standard error lacks %q:\n%s", s, stderr)
				}
			}
			if len(c.stdout) == 0 && stdout != "" {
				t.Errorf("standard output:\n%s", stdout)
			}
		})
	}
	if b, err := os.ReadFile(slow); string(b) != slowWorkflow || err != nil {
		t.Errorf("a file was changed without --fix: %v\n%s", err, b)
	}

	stdout, _, status := run(t, dir, "lint", "-o", "json", slow)
	var findings []lint.Finding
	if err := json.Unmarshal([]byte(stdout), &findings); err != nil || status != 1 || len(findings) != 2 ||
		findings[0].File != slow || findings[0].Line != 10 || findings[0].Rule != lint.Gzip || !findings[0].Fixable {
		t.Errorf("status %d, %v: %+v", status, err, findings)
	}
	if stdout, _, status := run(t, dir, "lint", "-o", "json", filepath.Join(dir, "all", "sub")); strings.TrimSpace(stdout) != "[]" || status != 0 {
		t.Errorf("nothing found: %q, status %d", stdout, status)
	}

	// --fix writes through a link, keeps the mode, and leaves nothing beside the file.
	link := filepath.Join(dir, "link.yaml")
	if err := os.Symlink(slow, link); err != nil {
		t.Fatal(err)
	}
	if _, stderr, status := run(t, dir, "lint", "--fix", link); status != 0 || !strings.Contains(stderr, "2 mended") {
		t.Errorf("status %d: %s", status, stderr)
	}
	if b, err := os.ReadFile(slow); string(b) != fastWorkflow || err != nil {
		t.Errorf("%v\n%s", err, b)
	}
	if info, err := os.Lstat(slow); err != nil || info.Mode() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if entries, err := os.ReadDir(filepath.Dir(slow)); err != nil || len(entries) != 3 {
		t.Errorf("%v, %v", entries, err)
	}
	if _, stderr, status := run(t, dir, "lint", "--fix", stubborn); status != 1 {
		t.Errorf("status %d: %s", status, stderr)
	}
}

// What was added above a finding moved it.
func TestLintFixTellsLinesAsTheyAreThen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "w.yaml")
	text := strings.Replace(slowWorkflow, "container: {image: x}", "container:\n      image: x", 1) + `  - name: fan
    script: {image: x, source: "true"}
  - name: main
    steps:
    - - {name: f, template: fan}
    - - {name: g, template: m, withParam: "{{steps.f.outputs.result}}"}
`
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, status := run(t, dir, "lint", "--fix", path)
	if status != 0 || !strings.Contains(stderr, "2 mended") {
		t.Errorf("status %d: %s", status, stderr)
	}
	fixed, err := os.ReadFile(path)
	if err != nil || strings.Count(string(fixed), "\n") == strings.Count(text, "\n") {
		t.Fatalf("no line was added: %v\n%s", err, fixed)
	}
	if again, _, _ := run(t, dir, "lint", path); again != stdout || !strings.Contains(stdout, "[stdout]") {
		t.Errorf("told after the fix:\n%sand by the next run:\n%s", stdout, again)
	}
}

func TestLintOfStandardInput(t *testing.T) {
	dir := t.TempDir()
	cmd := program(t, dir, "lint", "-o", "yaml", "-")
	cmd.Stdin = strings.NewReader(slowWorkflow)
	out, err := cmd.Output()
	if err != nil || string(out) != fastWorkflow {
		t.Errorf("%v\n%s", err, out)
	}
}
