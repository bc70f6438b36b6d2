package main

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
)

func TestControllerSaysWhatItLacks(t *testing.T) {
	dir := t.TempDir()
	good := []string{"controller", "--namespace", "stepcache-system", "--image", "stepcache:v1"}
	for name, c := range map[string]struct {
		args   []string
		status int
		says   string
	}{
		"image":     {[]string{"controller", "--namespace", "x"}, 2, "--image is missing"},
		"namespace": {[]string{"controller", "--image", "x", "--namespace", ""}, 2, "--namespace is missing"},
		"store":     {append(good, "--store", "disk"), 2, `--store "disk": want csi or emptydir`},
		"level":     {append(good, "--log-level", "loud"), 2, "--log-level"},
		"variable":  {append(good, "--worker-env", "GOMEMLIMIT=1"), 2, `--worker-env "GOMEMLIMIT=1": want HTTPS_PROXY, HTTP_PROXY or NO_PROXY, = and a value`},
		"no value":  {append(good, "--worker-env", "NO_PROXY"), 2, `--worker-env "NO_PROXY"`},
		"twice":     {append(good, "--worker-env", "NO_PROXY=.svc,10.0.0.1", "--worker-env", "NO_PROXY=b"), 2, "NO_PROXY is given twice"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, stderr, status := run(t, dir, c.args...); status != c.status || !strings.Contains(stderr, c.says) {
				t.Errorf("status %d: %s", status, stderr)
			}
		})
	}
}

// Who is on no cluster learns which variable or flag leads to one.
func TestWithoutACluster(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("HOME", dir)
	t.Setenv("KUBECONFIG", filepath.Join(dir, "absent"))
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for says, args := range map[string][]string{
		"controller: no cluster: this is not a pod, and there is no kubeconfig: name one with $KUBECONFIG":                {"controller", "--namespace", "x", "--image", "y"},
		"webhook: no cluster: this is not a pod, and there is no kubeconfig: name one with $KUBECONFIG":                   {"webhook", "--namespace", "x", "--image", "y"},
		"uninstall: no cluster: this is not a pod, and there is no kubeconfig: name one with --kubeconfig or $KUBECONFIG": {"uninstall", "--dry-run"},
	} {
		if _, stderr, status := run(t, dir, args...); status != 1 || !strings.Contains(stderr, says) {
			t.Errorf("%v: status %d, want 1 and %q: %s", args, status, says, stderr)
		}
	}
}

// What runs for long says more, or less, where it is told to.
func TestLogLevel(t *testing.T) {
	dir := t.TempDir()
	for _, command := range [][]string{{"worker"}, {"mount", "x"}, {"node"}, {"keeper"}, {"sidecar"}, {"controller"}, {"webhook"}} {
		if _, stderr, status := run(t, dir, append(command, "--log-level", "loud")...); status != 2 || !strings.Contains(stderr, `--log-level`) || !strings.Contains(stderr, "loud") {
			t.Errorf("%s: status %d: %s", command[0], status, stderr)
		}
	}
	if log := logger(slog.LevelDebug); !log.Enabled(t.Context(), slog.LevelDebug) {
		t.Error("debug is not logged")
	}
	if log := logger(slog.LevelWarn); log.Enabled(t.Context(), slog.LevelInfo) {
		t.Error("more than warnings is logged")
	}
}
