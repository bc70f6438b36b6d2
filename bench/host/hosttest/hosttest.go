// Package hosttest runs a bench's own program in its tests, as a process, and looks after what it leaves behind.
//
// It owns how a test binary becomes the bench, the program under measurement (built once for all tests of a package)
// and the temporary folder of each run, which must be empty afterwards. Concurrency: for tests that run one after the
// other. Failure: a run that takes longer than Patience is interrupted. It may import cache/mount/mountinfo.
package hosttest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// Patience bounds what takes some ten seconds; two loaded cores and the race detector take longer.
const Patience = 4 * time.Minute

// asBench makes a test binary be the bench.
const asBench = "STEPCACHE_TEST_BENCH"

// Main is a TestMain: the tests run, or the bench where Run has started it.
func Main(m *testing.M, bench func()) {
	if os.Getenv(asBench) != "" {
		bench()
		return
	}
	dir, err := os.MkdirTemp("", "bench-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	built = filepath.Join(dir, "stepcache")
	status := m.Run()
	os.RemoveAll(dir)
	os.Exit(status)
}

// built is where the program under measurement goes.
var built string

var build = sync.OnceValues(func() ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w", "-o", built, "github.com/stepcache/stepcache/cmd/stepcache").CombinedOutput()
})

// Stepcache is the program under measurement.
func Stepcache(t *testing.T) string {
	t.Helper()
	if out, err := build(); err != nil {
		t.Fatalf("build stepcache: %v\n%s", err, out)
	}
	return built
}

// Run is one run of the bench.
type Run struct {
	Args []string
	// Env is added to that of the test.
	Env []string
	// Interrupt is what the bench says on standard error when it is interrupted; empty: it is not.
	Interrupt string
}

// Do runs it.
func (r Run) Do(t *testing.T) (stdout, stderr string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	tmp, err := os.MkdirTemp("", "b") // short: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, r.Args...)
	cmd.Env = append(append(os.Environ(), asBench+"=1", "TMPDIR="+tmp), r.Env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	var out bytes.Buffer
	errs := &listener{word: r.Interrupt, heard: func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Errorf("interrupt: %v", err)
		}
	}}
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
