package main

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// stageFixture is a running tier of Dataset default/data as a pod sees it: a folder named as the Dataset.
func stageFixture(t *testing.T) (f *fixture, tier string) {
	t.Helper()
	f = newFixture(t)
	_, env, _ := background(t, f)
	tier = filepath.Join(f.dir, "tier")
	if err := os.Mkdir(tier, 0o755); err != nil {
		t.Fatal(err)
	}
	d0, err := filepath.Glob(filepath.Join(env["STEPCACHE_TIER"], "*", "tier.json"))
	if err != nil || len(d0) != 1 {
		d0 = []string{filepath.Join(env["STEPCACHE_TIER"], "tier.json")}
	}
	if err := os.Symlink(filepath.Dir(d0[0]), filepath.Join(tier, "data")); err != nil {
		t.Fatal(err)
	}
	return f, tier
}

// have are the files below a folder, and the folders with nothing in them, which end with a slash.
func have(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if d.IsDir() {
			in, err := os.ReadDir(path)
			if err != nil || len(in) > 0 {
				return err
			}
			rel += "/"
		}
		all = append(all, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestStage(t *testing.T) {
	f, tier := stageFixture(t)
	for _, c := range []struct {
		name   string
		args   []string
		status int
		files  []string
		says   string
	}{
		{"everything", nil, 0, []string{"dir/small", "empty", "hollow/", "large"}, "3 files, 9.0 MiB"},
		{"a file", []string{"--path", "default/data=/large"}, 0, []string{"large"}, "1 files"},
		{"a folder", []string{"--path", "default/data=/dir/"}, 0, []string{"dir/small"}, ""},
		{"a folder with nothing in it", []string{"--path", "default/data=/hollow"}, 0, []string{"hollow/"}, "0 files"},
		{"patterns", []string{"--path", "default/data=/{empty,dir/**}", "--path", "default/data=/lar*"}, 0, []string{"dir/small", "empty", "large"}, ""},
		{"more than the limit, but named", []string{"--limit", "10", "--path", "default/data=/large"}, 0, []string{"large"}, ""},
		{"no limit", []string{"--limit", "0"}, 0, []string{"dir/small", "empty", "hollow/", "large"}, ""},
		{"if present", []string{"--if-present", "default/data=/nope", "--if-present", "default/data=/empty"}, 0, []string{"empty"}, ""},
		{"nothing present", []string{"--if-present", "default/data=/nope"}, 0, nil, "0 files"},
		{"no such file", []string{"--path", "default/data=/empty", "--path", "default/data=/nope"}, 1, nil, "no file or folder matches /nope"},
		{"too much", []string{"--limit", "10"}, 1, nil, "stage-paths"},
		{"another Dataset's pattern", []string{"--path", "default/other=/x"}, 2, nil, "no --copy names this Dataset"},
		{"bad pattern", []string{"--path", "default/data=/["}, 2, nil, "want NAMESPACE/NAME=/pattern"},
		{"relative pattern", []string{"--path", "default/data=x"}, 2, nil, "want NAMESPACE/NAME=/pattern"},
		{"relative folder", []string{"--copy", "default/data=x"}, 2, nil, "want NAMESPACE/NAME=/folder"},
		{"no tier", []string{"--tier", "/nowhere"}, 1, nil, "not the folder of a tier"},
		{"bad flag", []string{"--parallel", "0"}, 2, nil, "--parallel"},
	} {
		dir := filepath.Join(f.dir, "to", strings.ReplaceAll(c.name, " ", "-"))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		args := append([]string{"stage", "--tier", tier, "--copy", "default/data=" + dir}, c.args...)
		_, stderr, status := run(t, f.dir, args...)
		if status != c.status || !strings.Contains(stderr, c.says) {
			t.Errorf("%s: status %d, want %d with %q in:\n%s", c.name, status, c.status, c.says, stderr)
		}
		got := have(t, dir)
		if !slices.Equal(got, c.files) {
			t.Errorf("%s: %v, want %v", c.name, got, c.files)
		}
		for _, name := range got {
			if strings.HasSuffix(name, "/") {
				continue
			}
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || !bytes.Equal(b, f.objects[name]) {
				t.Errorf("%s: %s has %d bytes, %v", c.name, name, len(b), err)
			}
			if i, err := os.Stat(filepath.Join(dir, name)); err != nil || i.Mode().Perm() != 0o644 {
				t.Errorf("%s: %s: %v, %v: others must be able to read it", c.name, name, i.Mode(), err)
			}
		}
	}
	// A second attempt, as after a container was started again, begins anew.
	dir := filepath.Join(f.dir, "to", "everything")
	if err := os.WriteFile(filepath.Join(dir, "large"), []byte("a part"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, stderr, status := run(t, f.dir, "stage", "--tier", tier, "--copy", "default/data="+dir); status != 0 {
		t.Errorf("again: status %d: %s", status, stderr)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "large")); err != nil || !bytes.Equal(b, f.objects["large"]) {
		t.Errorf("again: %d bytes, %v", len(b), err)
	}
}

// Whether there is room is known before the first byte is copied.
func TestStageWithoutRoom(t *testing.T) {
	f, tier := stageFixture(t)
	small := filepath.Join(f.dir, "to")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { _, _ = mountinfo.Detach(small, nil) })
	_, stderr, status := run(t, f.dir, "stage", "--tier", tier, "--copy", "default/data="+small)
	if status != 1 || !strings.Contains(stderr, "has room for 1.0 MiB, and 9.0 MiB are to be copied") {
		t.Errorf("status %d: %s", status, stderr)
	}
	if got := have(t, small); len(got) > 0 {
		t.Errorf("copied %v", got)
	}
}

func TestSidecarUsage(t *testing.T) {
	dir := tempDir(t)
	for _, c := range []struct {
		args   []string
		status int
		says   string
	}{
		{nil, 2, "want either --dir"},
		{[]string{"--dir", dir, "--node-socket", dir}, 2, "want either --dir"},
		{[]string{"--node-socket", dir}, 2, "say what to mount"},
		{[]string{"--node-socket", dir, "--keep"}, 2, "--keep goes with --dir alone"},
		{[]string{"--node-socket", dir, "--check"}, 1, "node service"},
		{[]string{"--dir", dir}, 2, "say what to mount"},
		{[]string{"--dir", dir, "--tier", dir, "--dataset", "genomes"}, 2, "want NAMESPACE/NAME"},
		{[]string{"--dir", dir, "--tier", dir, "--dataset", "a/genomes", "--dataset", "b/genomes"}, 2, "each name once"},
		{[]string{"--dir", dir, "--tier", dir, "--dataset", "a/genomes", "--buffer", "much"}, 2, "--buffer"},
		{[]string{"--dir", dir, "--check", "--keep"}, 2, "--keep goes with --dir alone"},
		{[]string{"--dir", dir, "--check"}, 1, "not everything is mounted yet"},
	} {
		_, stderr, status := run(t, dir, append([]string{"sidecar"}, c.args...)...)
		if status != c.status || !strings.Contains(stderr, c.says) {
			t.Errorf("%v: status %d, want %d with %q in:\n%s", c.args, status, c.status, c.says, stderr)
		}
	}
	for says, args := range map[string][]string{
		"--image is missing":  {"--namespace", "x"},
		"--namespace is":      {"--image", "x", "--namespace", ""},
		"--stage-limit":       {"--stage-limit", "much"},
		"--image-pull-policy": {"--image-pull-policy", "often"},
		"--log-level":         {"--log-level", "loud"},
	} {
		if _, stderr, status := run(t, dir, append([]string{"webhook"}, args...)...); status != 2 || !strings.Contains(stderr, says) {
			t.Errorf("%v: status %d: %s", args, status, stderr)
		}
	}
}

// The sub-command as the webhook adds it to pods: the probe, the mount, the end.
func TestSidecarMounts(t *testing.T) {
	needMount(t)
	f, tier := stageFixture(t)
	dir := filepath.Join(f.dir, "pods", "0123")
	keep := program(t, f.dir, "sidecar", "--keep", "--dir", dir)
	serve := program(t, f.dir, "sidecar", "--dir", dir, "--tier", tier, "--dataset", "default/data")
	var out bytes.Buffer
	for _, p := range []interface{ Start() error }{keep, serve} {
		if p == any(serve) {
			serve.Stderr = &out
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- serve.Wait() }()
	for status := 1; status != 0; {
		select {
		case err := <-ended:
			t.Fatalf("ended before it was ready: %v\n%s", err, out.String())
		default:
		}
		_, _, status = run(t, f.dir, "sidecar", "--check", "--dir", dir)
	}
	for name, want := range f.objects {
		if got, err := os.ReadFile(filepath.Join(dir, "data", name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if err := serve.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the sidecar's end: %v\n%s", err, out.String())
	}
	if err := keep.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := keep.Wait(); err != nil {
		t.Errorf("the keeper's end: %v", err)
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
	if below, err := mountinfo.Below(filepath.Dir(dir)); err != nil || len(below) > 0 {
		t.Errorf("left mounts %v (%v)", below, err)
	}
}
