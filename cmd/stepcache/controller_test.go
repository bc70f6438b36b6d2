package main

import (
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
	} {
		t.Run(name, func(t *testing.T) {
			if _, stderr, status := run(t, dir, c.args...); status != c.status || !strings.Contains(stderr, c.says) {
				t.Errorf("status %d: %s", status, stderr)
			}
		})
	}
}
