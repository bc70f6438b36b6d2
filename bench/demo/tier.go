package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/template"
	"time"

	"github.com/stepcache/stepcache/test/bucket"
)

// manifests is what a user of a cluster would apply too.
var manifests = template.Must(template.New("").Parse(`apiVersion: v1
kind: Secret
metadata: {name: access-key}
stringData:
  accessKeyID: {{.S3.AccessKey}}
  accessKeySecret: {{.S3.SecretKey}}
---
apiVersion: data.stepcache.dev/v1alpha1
kind: Dataset
metadata: {name: demo}
spec:
  mounts:
  - source: s3://{{.Bucket}}/
    path: /
    endpoint: {{.S3.Endpoint}}
    region: {{.S3.Region}}
    credentialsSecretRef: {name: access-key}
  workers:
    replicas: {{.Workers}}
    memory: {{.Memory}}
`))

// localTier is a running "stepcache local".
type localTier struct {
	cmd     *exec.Cmd
	env     []string
	mounted string // the dataset's folder; empty without a mount
	folder  string // removed at the end
	stderr  *bytes.Buffer
	waited  chan error
}

// startTier runs "stepcache local" on manifests and waits until it says that the dataset is ready.
func startTier(ctx context.Context, o options, s3 *bucket.Server, in *input) (*localTier, error) {
	dir, err := os.MkdirTemp("", "stepcache-demo-")
	if err != nil {
		return nil, err
	}
	t := &localTier{folder: dir, stderr: &bytes.Buffer{}, waited: make(chan error, 1)}
	// Room for the large file on one worker and the tree beside it, with what placement and pages add.
	memory := in.large.size + 2*in.treeBytes + 64<<20
	var text bytes.Buffer
	err = manifests.Execute(&text, map[string]any{"S3": s3, "Bucket": bucketName, "Workers": o.workers, "Memory": memory})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "dataset.yaml"), text.Bytes(), 0o600)
	}
	if err != nil {
		t.close()
		return nil, err
	}
	args := []string{"local", "-f", filepath.Join(dir, "dataset.yaml")}
	if !o.noMount {
		args = append(args, "--mount", filepath.Join(dir, "mnt"))
	}
	t.cmd = exec.Command(o.stepcache, args...)
	t.cmd.Stderr = t.stderr
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is ours to pass on, after the steps
	out, err := t.cmd.StdoutPipe()
	if err == nil {
		err = t.cmd.Start()
	}
	if err != nil {
		t.cmd = nil
		t.close()
		return nil, fmt.Errorf("run %s local: %w", o.stepcache, err)
	}
	ready := make(chan []string, 1)
	go func() {
		// Standard output says what to export once the dataset can be read, a variable a line.
		var env []string
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if v, ok := strings.CutPrefix(lines.Text(), "export "); ok {
				env = append(env, strings.ReplaceAll(v, "'", ""))
			} else if len(env) > 0 {
				ready <- env
				env = nil
			}
		}
		t.waited <- t.cmd.Wait()
	}()
	select {
	case t.env = <-ready:
	case err := <-t.waited:
		t.cmd = nil
		t.close()
		return nil, fmt.Errorf("stepcache local ended before the dataset was ready: %w\n%s", err, t.stderr)
	case <-ctx.Done():
		t.close()
		return nil, ctx.Err()
	}
	if !o.noMount {
		t.mounted = filepath.Join(dir, "mnt", "demo")
	}
	return t, nil
}

// stepArgs says where a step finds the dataset.
func (t *localTier) stepArgs() []string {
	if t.mounted != "" {
		return []string{"--dir", t.mounted}
	}
	for _, v := range t.env {
		if dir, ok := strings.CutPrefix(v, "STEPCACHE_TIER="); ok {
			return []string{"--tier", dir}
		}
	}
	return nil
}

// stop ends the tier and reports what it said if it failed, or left something behind.
func (t *localTier) stop(ctx context.Context) error {
	_ = t.cmd.Process.Signal(syscall.SIGTERM)
	var err error
	select {
	case err = <-t.waited:
		t.cmd = nil
	case <-time.After(time.Minute):
		return errors.New("stepcache local did not stop within a minute")
	}
	// Ended by our signal is how it should end; anything else is worth reading.
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 128+int(syscall.SIGTERM) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("stepcache local: %w\n%s", err, t.stderr)
	}
	if t.mounted != "" {
		if mounts, err := os.ReadFile("/proc/self/mounts"); err == nil && bytes.Contains(mounts, []byte(t.folder)) {
			return fmt.Errorf("stepcache local left a mount under %s", t.folder)
		}
	}
	return ctx.Err()
}

// close stops what still runs and removes the folder.
func (t *localTier) close() {
	if t.cmd != nil {
		_ = t.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-t.waited:
		case <-time.After(time.Minute):
			_ = t.cmd.Process.Kill()
			<-t.waited
		}
		t.cmd = nil
	}
	_ = os.RemoveAll(t.folder)
}
