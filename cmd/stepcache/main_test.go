package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/bucket"
)

// asProgram makes the test binary, and every process that it starts, be stepcache itself.
const asProgram = "STEPCACHE_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// patience bounds what normally takes a second; two loaded cores take longer.
const patience = 2 * time.Minute

// program prepares a run of stepcache in a temporary folder of its own.
func program(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "TMPDIR="+dir, "STEPCACHE_TIER=")
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// tempDir is a folder with a short name, whatever TMPDIR is: sockets are below it. Mounts that a failed test left are taken
// away before it is removed.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if below, err := mountinfo.Below(dir); err == nil {
			for _, m := range below {
				_, _ = mountinfo.Detach(m.Point, nil)
			}
		}
		_ = os.RemoveAll(dir)
	})
	return dir
}

// run runs stepcache to its end.
func run(t *testing.T, dir string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := program(t, dir, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("stepcache %v: %v\n%s", args, err, errs.String())
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// fixture is a bucket with a few objects, and the manifests of a Dataset of it.
type fixture struct {
	server    *bucket.Server
	dir       string // TMPDIR of the program
	manifests string
	objects   map[string][]byte
}

func (f *fixture) sums() string {
	var b strings.Builder
	for _, k := range []string{"dir/small", "empty", "large"} {
		sum := sha256.Sum256(f.objects[k])
		fmt.Fprintf(&b, "%s  %s\n", hex.EncodeToString(sum[:]), k)
	}
	return b.String()
}

const manifests = `apiVersion: v1
kind: Secret
metadata: {name: access-key}
stringData: {accessKeyID: %[2]s, accessKeySecret: %[3]s}
---
apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: data}
spec:
  mounts:
  - source: s3://fixture/
    endpoint: %[1]s
    region: us-east-1
    credentialsSecretRef: {name: access-key}
  workers: {replicas: 2, memory: %[4]s}
---
apiVersion: data.stepcache.dev/v1alpha1
kind: DataLoad
metadata: {name: warm}
spec: {datasetRef: {name: data}, pin: %[5]t}
`

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{server: bucket.StartT(t, bucket.Options{}), dir: tempDir(t), objects: map[string][]byte{
		"large":     bytes.Repeat([]byte("0123456789abcdef"), 9<<16), // 9 MiB: three blocks
		"dir/small": []byte("small\n"),
		"empty":     nil,
	}}
	for k, v := range f.objects {
		f.server.PutT(t, "fixture", k, v)
	}
	f.server.PutT(t, "fixture", "hollow/", nil) // a folder with nothing in it
	f.write(t, bucket.SecretKey, "64Mi", false)
	return f
}

func (f *fixture) write(t *testing.T, secret, memory string, pin bool) {
	t.Helper()
	f.manifests = filepath.Join(f.dir, "manifests.yaml")
	text := fmt.Sprintf(manifests, f.server.Endpoint(), bucket.AccessKey, secret, memory, pin)
	if err := os.WriteFile(f.manifests, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// nothingLeft checks that no folder of a run, no mount and no process is left.
func (f *fixture) nothingLeft(t *testing.T) {
	t.Helper()
	runs, err := filepath.Glob(filepath.Join(f.dir, "stepcache-*", "*"))
	if err != nil || len(runs) > 0 {
		t.Errorf("left folders %v (%v)", runs, err)
	}
	below, err := mountinfo.Below(f.dir)
	if err != nil || len(below) > 0 {
		t.Errorf("left mounts %v (%v)", below, err)
	}
	// Every process of a run names the run's folder in its arguments.
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(f.dir+"/stepcache-")) {
			t.Errorf("left process %s: %q", filepath.Dir(p), b)
		}
	}
}

func needMount(t *testing.T) {
	t.Helper()
	if err := mount.Supported(); err != nil {
		t.Skipf("no FUSE mount here: %v", err)
	}
}

const sumAll = `cd "$STEPCACHE_DATASET" && sha256sum dir/small empty large`

func TestLocalRunsACommandAndLeavesNothing(t *testing.T) {
	needMount(t)
	f := newFixture(t)
	mnt := filepath.Join(f.dir, "mnt")
	stdout, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--mount", mnt, "--", "sh", "-c", sumAll)
	if status != 0 || stdout != f.sums() {
		t.Fatalf("status %d, stdout:\n%swant:\n%sstderr:\n%s", status, stdout, f.sums(), stderr)
	}
	for _, want := range []string{"load default/warm: 9.0 MiB of 9.0 MiB resident", "default/data"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, stderr)
		}
	}
	f.nothingLeft(t)
	if _, err := os.Stat(mnt); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder of the mount is left: %v", err)
	}
}

func TestLocalKeepsFoldersThatItDidNotMake(t *testing.T) {
	needMount(t)
	f := newFixture(t)
	target := filepath.Join(f.dir, "mnt", "data")
	if err := os.MkdirAll(target, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--mount", filepath.Dir(target), "--", "true"); status != 0 {
		t.Fatalf("status %d: %s", status, stderr)
	}
	if _, err := os.Stat(target); err != nil {
		t.Error(err)
	}
	f.nothingLeft(t)
}

func TestLocalExitStatus(t *testing.T) {
	f := newFixture(t)
	for _, c := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"-f", f.manifests, "--", "sh", "-c", "exit 7"}, 7, ""},
		{[]string{"-f", f.manifests, "--", "sh", "-c", "kill -9 $$"}, 128 + 9, ""},
		{[]string{"-f", f.manifests, "--", "/no/such/program"}, 127, "/no/such/program"},
		{[]string{"-f", f.manifests, "--", "nosuchprogram"}, 127, "$PATH"},
		{[]string{"-f", f.manifests, "--", f.manifests}, 126, "permission denied"},
		{[]string{"-f", f.manifests, "--", f.dir}, 126, "is a directory"},
		{[]string{"-f", f.manifests, "--workers", "0", "--", "true"}, 2, "--workers 0"},
		{[]string{"-f", f.manifests, "--give-up", "0s", "--", "true"}, 2, "--give-up"},
		{[]string{"--", "true"}, 2, "-f is missing"},
		{[]string{"-f", f.manifests, "true"}, 2, "put -- in front"},
		{[]string{"-f", f.manifests, "--memory", "much", "--", "true"}, 2, "--memory"},
		{[]string{"-f", f.manifests, "--nonsense"}, 2, "nonsense"},
		{[]string{"-f", filepath.Join(f.dir, "absent.yaml"), "--", "true"}, 1, "absent.yaml"},
	} {
		stdout, stderr, status := run(t, f.dir, append([]string{"local"}, c.args...)...)
		if status != c.status || !strings.Contains(stderr, c.says) {
			t.Errorf("%v: status %d, want %d with %q in:\n%s%s", c.args, status, c.status, c.says, stdout, stderr)
		}
	}
	f.nothingLeft(t)
}

func TestLocalSaysWhatIsWrongWithTheBucket(t *testing.T) {
	f := newFixture(t)
	// What no waiting mends is not waited for: the program's own time is over long before such a time to give up.
	never := (10 * patience).String()
	for _, c := range []struct{ name, from, to, giveUp, says string }{
		{"wrong secret", "accessKeySecret: " + bucket.SecretKey, "accessKeySecret: wrong", never, "check the access key of Secret access-key"},
		{"no such bucket", "s3://fixture/", "s3://absent/", never, "bucket not found"},
		{"no http://", f.server.Endpoint(), strings.TrimPrefix(f.server.Endpoint(), "http://"), never, "write http:// in front of the endpoint"},
		{"nobody there", f.server.Endpoint(), "http://127.0.0.1:1", "10s", "given up after 10s (--give-up): list s3://127.0.0.1:1/fixture/: store unavailable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.write(t, bucket.SecretKey, "64Mi", false)
			f.replace(t, c.from, c.to)
			_, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--give-up", c.giveUp, "--", "true")
			last := lastLine(stderr)
			if c.giveUp == never && strings.TrimSpace(stderr) != last {
				t.Errorf("more than one line:\n%s", stderr)
			}
			if status != 1 || !strings.HasPrefix(last, "stepcache: dataset default/data: ") || !strings.Contains(last, c.says) {
				t.Errorf("status %d, want 1 and %q in the last line of:\n%s", status, c.says, stderr)
			}
			// The run's folder is gone by then, and nobody looks for a worker's log of it.
			if strings.Contains(last, f.dir) || strings.Contains(last, "worker") {
				t.Errorf("speaks of what is inside the run: %s", last)
			}
		})
	}
	f.nothingLeft(t)
}

// A bucket that does not answer yet is waited for, and that is said once.
func TestLocalWaitsForTheBucket(t *testing.T) {
	f := newFixture(t)
	proxy := bucket.Faults(t, f.server)
	proxy.Set(func(*http.Request) bucket.Fault { return bucket.Fault{Reset: true} })
	f.replace(t, f.server.Endpoint(), proxy.Endpoint())
	cmd := program(t, f.dir, "local", "-f", f.manifests, "--give-up", patience.String(), "--", "true")
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said []string
	waits := "dataset default/data: not ready yet, waiting for up to " + patience.String() + " (--give-up): list s3://"
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if said = append(said, lines.Text()); strings.HasPrefix(lines.Text(), waits) {
			proxy.Set(nil)
		}
	}
	if err := cmd.Wait(); err != nil || strings.Count(strings.Join(said, "\n"), waits) != 1 {
		t.Errorf("%v, and it said:\n%s", err, strings.Join(said, "\n"))
	}
}

// replace changes the manifests.
func (f *fixture) replace(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(f.manifests)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, []byte(from)) {
		t.Fatalf("the manifests have no %q", from)
	}
	if err := os.WriteFile(f.manifests, bytes.ReplaceAll(b, []byte(from), []byte(to)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

func TestLocalSaysWhatIsOddAboutTheDataset(t *testing.T) {
	f := newFixture(t)
	f.replace(t, "s3://fixture/", "s3://fixture/nothing/")
	other := filepath.Join(f.dir, "other.yaml")
	if err := os.WriteFile(other, []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "-f", other, "--", "true")
	for _, want := range []string{"no object below s3://fixture/nothing/", "not used: 1 object of v1, Pod"} {
		if status != 0 || !strings.Contains(stderr, want) {
			t.Errorf("status %d, want %q in:\n%s", status, want, stderr)
		}
	}
	f.replace(t, "s3://fixture/nothing/\n    endpoint: "+f.server.Endpoint()+"\n    region: us-east-1\n    credentialsSecretRef: {name: access-key}", "dataset://default/data")
	if _, stderr, status = run(t, f.dir, "local", "-f", f.manifests, "--", "true"); status != 1 || !strings.Contains(stderr, "dataset://") {
		t.Errorf("a Dataset as a source: status %d:\n%s", status, stderr)
	}
	f.nothingLeft(t)
}

func TestLocalLoadThatDoesNotFit(t *testing.T) {
	f := newFixture(t)
	// The 9 MiB object is placed whole on one worker; with a second one it does not fit 16 MiB.
	f.server.PutT(t, "fixture", "large2", f.objects["large"])
	f.server.PutT(t, "fixture", "large3", f.objects["large"])
	f.server.PutT(t, "fixture", "large4", f.objects["large"])
	f.write(t, bucket.SecretKey, "16Mi", true)
	_, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--", "true")
	if status != 1 || !strings.Contains(stderr, "dataload default/warm") {
		t.Errorf("a pinned load that does not fit: status %d:\n%s", status, stderr)
	}
	f.write(t, bucket.SecretKey, "16Mi", false)
	_, stderr, status = run(t, f.dir, "local", "-f", f.manifests, "--", "true")
	said := regexp.MustCompile(`(?m)^(stepcache: )?load default/warm failed, with .* of .* resident: .*; the steps read the rest from the bucket$`)
	told := said.FindAllString(stderr, -1)
	if status != 0 || len(told) != 2 || told[1] != "stepcache: "+told[0] || lastLine(stderr) != told[1] || strings.Contains(stderr, "load default/warm: ") {
		t.Errorf("a load that does not fit: status %d:\n%s", status, stderr)
	}
	if _, stderr, status = run(t, f.dir, "local", "-f", f.manifests, "--", "sh", "-c", "exit 7"); status != 7 {
		t.Errorf("a command after a load that does not fit: status %d, want its own, 7:\n%s", status, stderr)
	}
	cmd, _, errs := background(t, f)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.HasPrefix(lastLine(errs.String()), "stepcache: load default/warm failed") {
		t.Errorf("no command, and a load that does not fit: %v, want exit status 1:\n%s", err, errs)
	}
	f.server.PutT(t, "fixture", "huge", make([]byte, 17<<20))
	if _, stderr, _ = run(t, f.dir, "local", "-f", f.manifests, "--", "true"); !strings.Contains(stderr, "/huge has 17825792 bytes") || !strings.Contains(stderr, "more workers do not help") {
		t.Errorf("a file that fits no worker:\n%s", stderr)
	}
	f.nothingLeft(t)
}

// background starts "stepcache local" without a command and returns once it is ready, with what it
// exports.
func background(t *testing.T, f *fixture, args ...string) (*exec.Cmd, map[string]string, *bytes.Buffer) {
	t.Helper()
	cmd := program(t, f.dir, append([]string{"local", "-f", f.manifests}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	env := map[string]string{}
	var text []byte
	buf := make([]byte, 1024)
	for !bytes.Contains(text, []byte("# ready")) {
		n, err := out.Read(buf)
		if text = append(text, buf[:n]...); err != nil {
			t.Fatalf("stepcache local ended before it was ready: %s%s", text, errs.String())
		}
	}
	for _, m := range regexp.MustCompile(`export (\w+)='(.*)'`).FindAllSubmatch(text, -1) {
		env[string(m[1])] = string(m[2])
	}
	return cmd, env, &errs
}

func TestCommandsBesideATier(t *testing.T) {
	f := newFixture(t)
	local, env, errs := background(t, f)
	tier := env["STEPCACHE_TIER"]

	stdout, stderr, status := run(t, f.dir, "ls", "-R", "--tier", tier)
	if want := "/dir/\n/dir/small\n/empty\n/hollow/\n/large\n"; status != 0 || stdout != want {
		t.Errorf("ls: status %d, got %q, want %q: %s", status, stdout, want, stderr)
	}
	stdout, stderr, status = run(t, f.dir, "ls", "--tier", tier)
	if want := "/dir/\n/empty\n/hollow/\n/large\n"; status != 0 || stdout != want || stderr != "" {
		t.Errorf("ls: status %d, got %q, want %q: %s", status, stdout, want, stderr)
	}
	stdout, stderr, status = run(t, f.dir, "ls", "-o", "json", "--tier", tier, "/large")
	var entries []entry
	if err := json.Unmarshal([]byte(stdout), &entries); status != 0 || err != nil || len(entries) != 1 || entries[0].Size != 9<<20 {
		t.Errorf("ls -o json: status %d, %v, %v: %s", status, err, entries, stderr)
	}
	if _, stderr, status = run(t, f.dir, "ls", "--tier", tier, "/absent"); status != 1 || !strings.Contains(stderr, "/absent") {
		t.Errorf("ls of what is not there: status %d: %s", status, stderr)
	}

	stdout, stderr, status = run(t, f.dir, "get", "--tier", tier, "dir/small", "-")
	if status != 0 || stdout != "small\n" {
		t.Errorf("get to standard output: status %d, %q: %s", status, stdout, stderr)
	}
	dest := filepath.Join(f.dir, "copy")
	if _, stderr, status = run(t, f.dir, "get", "--tier", tier, "/", dest); status != 0 {
		t.Errorf("get /: status %d: %s", status, stderr)
	}
	for k, want := range f.objects {
		if got, err := os.ReadFile(filepath.Join(dest, k)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("get /: %s: %d bytes, %v", k, len(got), err)
		}
	}
	if info, err := os.Stat(filepath.Join(dest, "hollow")); err != nil || !info.IsDir() {
		t.Errorf("get / of an empty folder: %v, %v", info, err)
	}
	if _, stderr, status = run(t, f.dir, "get", "--tier", tier, "/large", filepath.Join(dest, "large")); status != 1 || !strings.Contains(stderr, "--force") {
		t.Errorf("get over a file: status %d: %s", status, stderr)
	}

	// A folder that is not there yet is made; a pipe is written to and stays what it is.
	if _, stderr, status = run(t, f.dir, "get", "--tier", tier, "dir/small", filepath.Join(f.dir, "new")+"/"); status != 0 {
		t.Errorf("get into a folder to be made: status %d: %s", status, stderr)
	}
	if got, err := os.ReadFile(filepath.Join(f.dir, "new", "small")); string(got) != "small\n" {
		t.Errorf("get into a folder to be made: %q, %v", got, err)
	}
	pipe := filepath.Join(f.dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	reader := exec.Command("cat", pipe)
	got := make(chan []byte, 1)
	go func() { b, _ := reader.Output(); got <- b }()
	_, stderr, status = run(t, f.dir, "get", "--force", "--tier", tier, "dir/small", pipe)
	if info, err := os.Lstat(pipe); status != 0 || err != nil || info.Mode().Type() != os.ModeNamedPipe {
		t.Fatalf("get into a pipe: status %d, %v, %v: %s", status, info, err, stderr)
	}
	if b := <-got; string(b) != "small\n" {
		t.Errorf("get into a pipe: its reader got %q", b)
	}
	if _, stderr, status = run(t, f.dir, "get", "--tier", tier, "dir", filepath.Join(dest, "empty")); status != 1 || !strings.Contains(stderr, "is a folder") {
		t.Errorf("get of a folder over a file: status %d: %s", status, stderr)
	}

	stdout, stderr, status = run(t, f.dir, "load", "--tier", tier, "--pin", "--id", "mine", "/large")
	if status != 0 || !strings.Contains(stdout, "9.0 MiB of 9.0 MiB resident") {
		t.Errorf("load: status %d, %q: %s", status, stdout, stderr)
	}
	stdout, stderr, status = run(t, f.dir, "status", "-o", "json", "--tier", tier)
	var workers []struct {
		Pinned      int64 `json:"pinned"`
		SourceBytes int64 `json:"sourceBytes"`
	}
	if err := json.Unmarshal([]byte(stdout), &workers); err != nil || status != 0 || len(workers) != 2 {
		t.Fatalf("status: %d, %v, %q: %s", status, err, stdout, stderr)
	}
	if pinned := workers[0].Pinned + workers[1].Pinned; pinned < 9<<20 {
		t.Errorf("status: %d bytes pinned, want 9 MiB and more", pinned)
	}
	// The DataLoad, the copies and the second load together: each byte once.
	if sent := workers[0].SourceBytes + workers[1].SourceBytes; sent != 9<<20+6 {
		t.Errorf("status: %d bytes came from the bucket, want %d", sent, 9<<20+6)
	}
	if stdout, stderr, status = run(t, f.dir, "load", "--tier", tier, "--unload", "--id", "mine"); status != 0 || !strings.Contains(stdout, "load mine") {
		t.Errorf("load --unload: status %d, %q: %s", status, stdout, stderr)
	}
	if _, stderr, status = run(t, f.dir, "load", "--tier", tier, "--pin", "--id", "other", "/large"); status != 0 {
		t.Errorf("load: status %d: %s", status, stderr)
	}
	stdout, stderr, status = run(t, f.dir, "load", "--tier", tier, "--unload", "--id", "other", "-o", "json")
	var ended struct {
		ID       string
		Resident int64
	}
	if err := json.Unmarshal([]byte(stdout), &ended); status != 0 || err != nil || ended.ID != "other" || ended.Resident != 9<<20 {
		t.Errorf("load --unload -o json: status %d, %v, %q: %s", status, err, stdout, stderr)
	}
	if _, stderr, status = run(t, f.dir, "load", "--tier", tier, "--unload", "--id", "mien"); status != 1 || !strings.Contains(stderr, "load mien") {
		t.Errorf("unload of what nobody knows: %d %q", status, stderr)
	}
	stdout, stderr, status = run(t, f.dir, "load", "--tier", tier, "--copies", "3", "-o", "json", "dir/**")
	var loaded struct {
		Resident int64
		Workers  map[string]any `json:"workers"`
	}
	if err := json.Unmarshal([]byte(stdout), &loaded); status != 0 || err != nil || loaded.Resident != 2*6 || len(loaded.Workers) != 2 {
		t.Errorf("load -o json: status %d, %v, %q: %s", status, err, stdout, stderr)
	}
	if !strings.Contains(stderr, "2 copies instead of 3") {
		t.Errorf("load of more copies than workers says nothing: %s", stderr)
	}
	if stdout, stderr, status = run(t, f.dir, "status", "--tier", tier); status != 0 || !strings.Contains(stdout, "data-0") {
		t.Errorf("status: %d %q: %s", status, stdout, stderr)
	}

	for _, flag := range []string{"--download=false", "--download"} {
		stdout, stderr, status = run(t, f.dir, "verify", "--tier", tier, "-f", f.manifests, flag)
		if status != 0 || !strings.Contains(stdout, "3 files compared, 0 not equal") {
			t.Errorf("verify %s: status %d, %q: %s", flag, status, stdout, stderr)
		}
	}
	f.write(t, "wrong", "64Mi", false)
	_, stderr, status = run(t, f.dir, "verify", "--tier", tier, "-f", f.manifests, "--download")
	if status != 1 || !strings.Contains(stderr, "check the access key of Secret access-key") || strings.Count(stderr, "denied") != 1 {
		t.Errorf("verify with a wrong secret: status %d: %s", status, stderr)
	}
	f.write(t, bucket.SecretKey, "64Mi", false)
	f.server.PutT(t, "fixture", "dir/small", []byte("other\n"))
	stdout, stderr, status = run(t, f.dir, "verify", "--tier", tier, "-f", f.manifests, "--download")
	if status != 1 || !strings.Contains(stdout, "/dir/small: changed") {
		t.Errorf("verify of a changed object: status %d, %q: %s", status, stdout, stderr)
	}
	for _, changed := range []bool{true, false} {
		var got struct {
			Snapshot string
			Files    int
			Changed  bool
		}
		stdout, stderr, status = run(t, f.dir, "refresh", "--tier", tier, "-o", "json")
		if err := json.Unmarshal([]byte(stdout), &got); status != 0 || err != nil || got.Snapshot == "" || got.Files != 3 || got.Changed != changed {
			t.Errorf("refresh: status %d, %v, %q, want changed %v: %s", status, err, stdout, changed, stderr)
		}
	}
	if stdout, stderr, status = run(t, f.dir, "get", "--tier", tier, "dir/small", "-"); status != 0 || stdout != "other\n" {
		t.Errorf("get after a refresh: status %d, %q: %s", status, stdout, stderr)
	}
	if stdout, stderr, status = run(t, f.dir, "refresh", "--tier", tier); status != 0 || !strings.Contains(stdout, "3 files, 9.0 MiB: as before") {
		t.Errorf("refresh: status %d, %q: %s", status, stdout, stderr)
	}

	if err := local.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := local.Wait(); err != nil {
		t.Errorf("ended by Ctrl-C: %v\n%s", err, errs)
	}
	f.nothingLeft(t)
	if _, stderr, status = run(t, f.dir, "ls", "--tier", tier); status != 1 || !strings.Contains(stderr, "stepcache local") {
		t.Errorf("ls without a tier: status %d: %s", status, stderr)
	}
	if _, stderr, status = run(t, f.dir, "ls"); status != 1 || !strings.Contains(stderr, "--tier") {
		t.Errorf("ls without a tier named: status %d: %s", status, stderr)
	}
}

// A mount never hides files, nor takes another run's mount away.
func TestLocalLeavesOthersAlone(t *testing.T) {
	needMount(t)
	f := newFixture(t)
	mnt := filepath.Join(f.dir, "mnt")
	cmd, env, errs := background(t, f, "--mount", mnt)
	for dir, says := range map[string]string{
		f.dir: fmt.Sprintf("data: another `stepcache local`, process %d, uses it; end that one", cmd.Process.Pid), tempDir(t): "data: another stepcache uses it; end that one",
	} {
		_, stderr, status := run(t, dir, "local", "-f", f.manifests, "--mount", mnt, "--", "true")
		if status != 1 || !strings.Contains(stderr, says) || strings.Contains(stderr, "umount ") {
			t.Errorf("a second run at the same folder: status %d, want %q: %s", status, says, stderr)
		}
	}
	if b, err := os.ReadFile(filepath.Join(mnt, "data", "dir", "small")); string(b) != "small\n" {
		t.Errorf("the first run's mount afterwards: %q, %v", b, err)
	}
	for dir, says := range map[string]string{mnt: "not empty", f.manifests: "not a folder", filepath.Join(f.dir, "absent"): "mkdir -p"} {
		if _, stderr, status := run(t, f.dir, "mount", "--tier", env["STEPCACHE_TIER"], dir); status != 1 || !strings.Contains(stderr, says) {
			t.Errorf("mount at %s: status %d, want %q: %s", dir, status, says, stderr)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the first run: %v\n%s", err, errs)
	}
	if strings.Contains(errs.String(), "started again") {
		t.Errorf("the first run's mount did not live through it:\n%s", errs)
	}

	for path, says := range map[string]string{"full/data/file": "not empty", "taken/data": "not a folder", "file": "not a directory"} {
		path = filepath.Join(f.dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at, _, _ := strings.Cut(strings.TrimPrefix(path, f.dir+"/"), "/")
		_, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--mount", filepath.Join(f.dir, at), "--", "true")
		if status != 1 || !strings.Contains(stderr, says) || !strings.Contains(stderr, "--mount") {
			t.Errorf("mount over %s: status %d, want %q: %s", path, status, says, stderr)
		}
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	f.nothingLeft(t)
}

// Whatever ends a run, nothing is left: a closed terminal, or a reader of its output that has gone.
func TestLocalEndsInOrder(t *testing.T) {
	needMount(t)
	f := newFixture(t)
	mnt := filepath.Join(f.dir, "mnt")
	// Tests under nohup have SIGHUP ignored, which a program that they start inherits and leaves so; but not one
	// whose parent handles it.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	cmd, _, errs := background(t, f, "--mount", mnt)
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("a closed terminal: %v\n%s", err, errs)
	}
	f.nothingLeft(t)

	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	// The command itself gets the signal as ever: it ends of it.
	done := filepath.Join(f.dir, "done")
	cmd = program(t, f.dir, "local", "-f", f.manifests, "--mount", mnt, "--", "sh", "-c", `touch "$0"; while echo y; do :; done`, done)
	cmd.Stdout, cmd.Stderr = w, w
	var exit *exec.ExitError
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 128+int(syscall.SIGPIPE) {
		t.Errorf("a reader that has gone: %v, want the command's exit status 141", err)
	}
	if _, err := os.Stat(done); err != nil {
		t.Errorf("the command did not run: %v", err)
	}
	f.nothingLeft(t)

	cmd = program(t, f.dir, "local", "-f", f.manifests)
	cmd.Stdout = w
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("nobody to read where the tier is: %v, want exit status 1", err)
	}
	f.nothingLeft(t)
}

// Who interrupts a command is told so, and what was done until then.
func TestInterruptedCommands(t *testing.T) {
	f := newFixture(t)
	f.withoutLoad(t)
	proxy := bucket.Faults(t, f.server)
	f.replace(t, f.server.Endpoint(), proxy.Endpoint())
	cmd, env, errs := background(t, f)
	tier := env["STEPCACHE_TIER"]
	asked := make(chan struct{}, 100)
	hold := func(r *http.Request) bucket.Fault {
		stall := r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/large")
		if stall {
			asked <- struct{}{}
		}
		return bucket.Fault{Stall: stall}
	}
	interrupt := func(s os.Signal, args ...string) (stdout, stderr string, status int) {
		t.Helper()
		cmd := program(t, f.dir, args...)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		for len(asked) > 0 {
			<-asked
		}
		proxy.Set(hold)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-asked:
		case <-time.After(patience):
			t.Errorf("%v: it does not ask the bucket", args)
		}
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		return out.String(), errs.String(), cmd.ProcessState.ExitCode()
	}
	_, stderr, status := interrupt(syscall.SIGTERM, "load", "--tier", tier, "--id", "mine")
	if status != 1 || !regexp.MustCompile(`^load mine: (.* of .* resident, .*; it goes on in the workers|workers may have begun), .*--id mine`+"`"+` ends it\nstepcache: interrupted(: .*)?\n$`).MatchString(stderr) {
		t.Errorf("load: status %d: %s", status, stderr)
	}
	proxy.Set(nil)
	if _, stderr, status := run(t, f.dir, "load", "--tier", tier); status != 0 {
		t.Fatalf("load: status %d: %s", status, stderr)
	}
	stdout, stderr, status := interrupt(os.Interrupt, "verify", "--tier", tier, "-f", f.manifests, "--download")
	if status != 1 || !regexp.MustCompile(`^[0-2] of 3 files compared, 0 not equal\n$`).MatchString(stdout) || stderr != "stepcache: interrupted\n" {
		t.Errorf("verify: status %d, %q: %s", status, stdout, stderr)
	}
	stdout, stderr, status = interrupt(syscall.SIGTERM, "verify", "--tier", tier, "-f", f.manifests, "--download", "-o", "json")
	var compared []verified
	if err := json.Unmarshal([]byte(stdout), &compared); status != 1 || err != nil || len(compared) > 2 || stderr != "stepcache: interrupted\n" {
		t.Errorf("verify -o json: status %d, %v, %q: %s", status, err, stdout, stderr)
	}
	proxy.Set(nil)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, errs)
	}
}

func TestInterruptedError(t *testing.T) {
	signal, other := errors.New("terminated signal received"), errors.New("other")
	for _, c := range []struct {
		signal, err error
		want        string
	}{
		{nil, context.Canceled, "context canceled"},
		{signal, signal, "interrupted"},
		{signal, context.Canceled, "interrupted"},
		{signal, fmt.Errorf("list: %w", context.Canceled), "interrupted: list: context canceled"},
		{signal, fmt.Errorf("list: %w", signal), "interrupted: list: terminated signal received"},
		{signal, other, "other"},
	} {
		if got := interrupted(c.signal, c.err); got.Error() != c.want {
			t.Errorf("%v, %v: %v, want %s", c.signal, c.err, got, c.want)
		}
	}
	if err := interrupted(signal, nil); err != nil {
		t.Error(err)
	}
}

func TestLoadOfWhatIsGone(t *testing.T) {
	f := newFixture(t)
	f.withoutLoad(t)
	cmd, env, errs := background(t, f)
	client, err := f.server.Client()
	if err != nil {
		t.Fatal(err)
	}
	if err := client.RemoveObject(t.Context(), "fixture", "dir/small", minio.RemoveObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, status := run(t, f.dir, "load", "--tier", env["STEPCACHE_TIER"], "-o", "json")
	var loaded struct {
		Failures []struct{ Path string }
	}
	if err := json.Unmarshal([]byte(stdout), &loaded); err != nil || len(loaded.Failures) != 1 || loaded.Failures[0].Path != "/dir/small" {
		t.Errorf("%v: %q", err, stdout)
	}
	if status != 1 || !strings.Contains(stderr, "1 of 2 files could not be loaded") || !strings.Contains(stderr, "/dir/small") {
		t.Errorf("status %d: %s", status, stderr)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, errs)
	}
}

// withoutLoad takes the DataLoad out of the manifests.
func (f *fixture) withoutLoad(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile(f.manifests)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.manifests, text[:bytes.LastIndex(text, []byte("---\n"))], 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestLocalReportsTheHitRatio(t *testing.T) {
	f := newFixture(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	read := `for i in 1 2; do "` + self + `" get large - >/dev/null || exit 1; done`
	_, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--", "sh", "-c", read)
	if status != 0 || !strings.Contains(stderr, "18 MiB") || !strings.Contains(stderr, "100.0 %") {
		t.Errorf("warmed by a DataLoad: status %d:\n%s", status, stderr)
	}
	f.withoutLoad(t)
	_, stderr, status = run(t, f.dir, "local", "-f", f.manifests, "--", "sh", "-c", read)
	if status != 0 || !strings.Contains(stderr, "18 MiB") || !strings.Contains(stderr, "50.0 %") {
		t.Errorf("cold: status %d:\n%s", status, stderr)
	}
}

func TestUnknownCommandIsWrongUsage(t *testing.T) {
	dir := tempDir(t)
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"lokal"}, "See `stepcache --help`"},
		{[]string{"ls", "--nonsense"}, "See `stepcache ls --help`"},
		{[]string{"get"}, "See `stepcache get --help`"},
		{[]string{"help", "bogus"}, `help: unknown command "bogus"`},
		{[]string{"completion"}, "completion: name a shell, one of bash, fish, powershell, zsh\nSee `stepcache completion --help`"},
		{[]string{"completion", "zork"}, "completion: name a shell"},
		{[]string{"completion", "bash", "extra"}, "See `stepcache completion bash --help`"},
	} {
		if stdout, stderr, status := run(t, dir, c.args...); status != 2 || !strings.Contains(stderr, c.says) || stdout != "" {
			t.Errorf("%v: status %d, %q, want 2 and %q: %s", c.args, status, stdout, c.says, stderr)
		}
	}
	for _, args := range [][]string{{"help"}, {"help", "get"}, {"help", "completion", "bash"}, {"completion", "--help"}, {"completion", "bash"}} {
		if stdout, stderr, status := run(t, dir, args...); status != 0 || stdout == "" {
			t.Errorf("%v: status %d, %q: %s", args, status, stdout, stderr)
		}
	}
}

func TestPrintable(t *testing.T) {
	for path, want := range map[string]string{
		"/a b/ü": "/a b/ü", "/two\nlines": `"/two\nlines"`, "/\x1b[2J": `"/\x1b[2J"`, "/not utf-8 \xff": `"/not utf-8 \xff"`,
		"/c1\x9b31mX": `"/c1\x9b31mX"`, "/\u009b31mX": `"/\u009b31mX"`, "/replaced \ufffd": "/replaced \ufffd",
	} {
		if got := printable(path); got != want {
			t.Errorf("printable(%q) = %s, want %s", path, got, want)
		}
	}
}

// Nor do verify and load take one of them for the other.
func TestJSONOfResultsTellsNamesApart(t *testing.T) {
	dir := tempDir(t)
	data := filepath.Join(dir, "files")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a\xfe", "a\xff", "plain"} {
		if err := os.WriteFile(filepath.Join(data, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := &fixture{dir: dir, manifests: filepath.Join(dir, "manifests.yaml")}
	text := "apiVersion: data.stepcache.dev/v1alpha1\nkind: Dataset\nmetadata: {name: data}\nspec:\n  mounts:\n  - source: file://" + data +
		"\n  workers: {replicas: 1, memory: 16Mi}\n"
	if err := os.WriteFile(f.manifests, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd, env, errs := background(t, f)
	tier := env["STEPCACHE_TIER"]
	if err := os.Remove(filepath.Join(data, "a\xff")); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, _ := run(t, dir, "load", "--tier", tier, "-o", "json")
	var loaded struct{ Failures []wire.LoadFailure }
	if err := json.Unmarshal([]byte(stdout), &loaded); err != nil || len(loaded.Failures) != 1 || loaded.Failures[0].Quoted != `"/a\xff"` || !strings.Contains(stderr, `"/a\xff"`) {
		t.Errorf("load: %v, %q: %s", err, stdout, stderr)
	}
	stdout, stderr, _ = run(t, dir, "verify", "--tier", tier, "-f", f.manifests, "-o", "json")
	var results []verified
	err := json.Unmarshal([]byte(stdout), &results)
	if want := []string{`"/a\xfe"`, `"/a\xff"`, ""}; err != nil || len(results) != 3 || !slices.EqualFunc(results, want, func(v verified, q string) bool { return v.Quoted == q }) {
		t.Errorf("verify: %v, %q, want %q: %s", err, stdout, want, stderr)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, errs)
	}
}

// Of two names that JSON cannot carry, each has a quoted form of its own.
func TestJSONTellsNamesApart(t *testing.T) {
	b := catalog.NewBuilder([]catalog.Mount{{URL: "file:///d", Path: "/"}})
	for _, key := range []string{"a\xfe", "a\xff", "plain"} {
		if err := b.Add(0, source.Object{Key: key, Size: 1, Version: "v"}); err != nil {
			t.Fatal(err)
		}
	}
	text, err := b.Encode(time.Unix(1e9, 0))
	if err != nil {
		t.Fatal(err)
	}
	s, err := catalog.Open(text)
	if err != nil {
		t.Fatal(err)
	}
	var quoted []string
	list(s, 0, false, func(e entry) bool {
		quoted = append(quoted, e.Quoted)
		return true
	})
	if want := []string{`"/a\xfe"`, `"/a\xff"`, ""}; !slices.Equal(quoted, want) {
		t.Errorf("%q, want %q", quoted, want)
	}
}

// The columns are the same in every line, wherever the widest entry comes.
func TestColumnsOfALongListing(t *testing.T) {
	var entries []entry
	for i := range 200 {
		entries = append(entries, entry{Path: fmt.Sprintf("/f%03d", i), Size: int64(i), Version: "v"})
	}
	entries[5] = entry{Path: "/f005", Dir: true}
	entries[9].Path = "/f009\xff" // which text/tabwriter takes for the beginning of text to be left alone
	entries[150].Size, entries[150].Version = 1<<40, strings.Repeat("0", 35)
	var out bytes.Buffer
	if err := printEntries(&out, slices.Values(entries), true); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if len(lines) != len(entries) || !strings.HasSuffix(lines[5], "  /f005/") {
		t.Fatalf("%d lines:\n%s", len(lines), &out)
	}
	at := len("1099511627776") + 2 + len(time.DateTime) + 2 + 35 + 2
	for i, l := range lines {
		if strings.Contains(l, "\t") || strings.Index(strings.Replace(l, `"`, "", 1), fmt.Sprintf("/f%03d", i)) != at {
			t.Errorf("line %d: %q, want its name at %d", i, l, at)
		}
	}
}

func TestLocalSweepsWhatAKilledRunLeft(t *testing.T) {
	needMount(t)
	f := newFixture(t)
	mnt := filepath.Join(f.dir, "mnt")
	cmd, _, _ := background(t, f, "--mount", mnt)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	// Its children die with it, its mounts stay.
	stdout, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--mount", mnt, "--", "sh", "-c", sumAll)
	if status != 0 || stdout != f.sums() {
		t.Fatalf("status %d, stdout:\n%sstderr:\n%s", status, stdout, stderr)
	}
	f.nothingLeft(t)
}

func TestLocalReadsOnWhenAWorkerIsKilled(t *testing.T) {
	needMount(t)
	f := newFixture(t)
	mnt := filepath.Join(f.dir, "mnt")
	script := `set -e
for i in 1 2 3; do
  for pid in $(pgrep -f "worker --config $TMPDIR/stepcache-"); do kill -9 $pid || :; done
  ` + sumAll + `
done`
	stdout, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--mount", mnt, "--", "sh", "-c", script)
	if want := strings.Repeat(f.sums(), 3); status != 0 || stdout != want {
		t.Fatalf("status %d, stdout:\n%swant:\n%sstderr:\n%s", status, stdout, want, stderr)
	}
	if !strings.Contains(stderr, "is started again") {
		t.Errorf("stderr does not say that a worker was started again:\n%s", stderr)
	}
	if !strings.Contains(stderr, "Workers were started again (") {
		t.Errorf("the table does not say that figures are missing:\n%s", stderr)
	}
	f.nothingLeft(t)
}

// A program is told a number; whoever ran it has to know which object it was, and what to do.
func TestLocalSaysWhyAReadFailed(t *testing.T) {
	needMount(t)
	f := newFixture(t)
	f.replace(t, "spec: {datasetRef: {name: data},", "spec: {datasetRef: {name: data}, paths: [/large],")
	mnt := filepath.Join(f.dir, "mnt")
	cmd, _, stderr := background(t, f, "--mount", mnt)
	f.server.PutT(t, "fixture", "dir/small", []byte("another version of it"))
	for range 2 {
		if _, err := os.ReadFile(filepath.Join(mnt, "data", "dir", "small")); !errors.Is(err, syscall.EIO) {
			t.Errorf("read of a file that changed: %v", err)
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if said := stderr.String(); strings.Count(said, ": mount: ") != 1 || !strings.Contains(said, "/fixture/dir/small") || !strings.Contains(said, "spec.refresh") {
		t.Errorf("it said:\n%s", said)
	}
	f.nothingLeft(t)
}

// The example of the README is run as it stands, but for the endpoint and the keys.
func TestReadmeExample(t *testing.T) {
	needMount(t)
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(readme), "<!-- example:local -->\n```yaml\n")
	text, rest, ok2 := strings.Cut(rest, "```\n")
	command := regexp.MustCompile(`(?m)^    stepcache (local -f genomes\.yaml .*)$`).FindStringSubmatch(rest)
	if !ok || !ok2 || command == nil {
		t.Fatal("README.md has no example:local")
	}
	f := newFixture(t)
	f.server.PutT(t, "genomes", "a.fa", []byte("ACGT\n"))
	f.server.PutT(t, "genomes", "b.fa", []byte("TGCA\n"))
	for from, to := range map[string]string{"http://127.0.0.1:9000": f.server.Endpoint(), "AKID": bucket.AccessKey, "SECRET": bucket.SecretKey} {
		if !strings.Contains(text, from) {
			t.Errorf("the example has no %s", from)
		}
		text = strings.ReplaceAll(text, from, to)
	}
	if err := os.WriteFile(filepath.Join(f.dir, "genomes.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	line := strings.ReplaceAll(command[1], "/mnt/data", filepath.Join(f.dir, "mnt"))
	cmd := program(t, f.dir)
	cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", self + " " + line}
	cmd.Dir = f.dir
	out, err := cmd.Output()
	want := fmt.Sprintf("%x  %s\n%x  %s\n", sha256.Sum256([]byte("ACGT\n")), filepath.Join(f.dir, "mnt/genomes/a.fa"),
		sha256.Sum256([]byte("TGCA\n")), filepath.Join(f.dir, "mnt/genomes/b.fa"))
	if err != nil || string(out) != want {
		t.Errorf("%v: %v\ngot:\n%swant:\n%s", cmd.Args, err, out, want)
	}
	f.nothingLeft(t)
}

func TestHelpHasExamples(t *testing.T) {
	for _, c := range rootCommand().Commands() {
		if c.Name() == "help" || c.Name() == "completion" || c.Name() == "version" {
			continue
		}
		if c.Example == "" || c.Short == "" {
			t.Errorf("%s: no example or description", c.Name())
		}
	}
}
