// Package envtest runs a real API server and its store for tests: kube-apiserver and etcd, built once from
// the Go modules that tools/envtest pins, with the CustomResourceDefinitions of config/crd.
//
// It owns the build and the processes, and plays what tests need of a cluster beside them. Concurrency: test
// binaries of several packages may call Start at once; one builds, the others wait. Failure: Start says what is
// missing; the processes end with the stop function, and by themselves within seconds of this process's death.
// Nothing that a user runs imports it.
package envtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// Env names a folder with kube-apiserver and etcd to use instead of building them.
const Env = "STEPCACHE_ENVTEST"

// Start runs an API server until stop is called.
func Start(ctx context.Context) (cluster *rest.Config, stop func() error, err error) {
	bin, err := Programs(ctx)
	if err != nil {
		return nil, nil, err
	}
	dir, err := os.MkdirTemp("", "envtest-")
	if err != nil {
		return nil, nil, err
	}
	for _, name := range []string{"etcd", "kube-apiserver"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(guard(filepath.Join(bin, name))), 0o700); err != nil {
			return nil, nil, err
		}
	}
	crds, err := filepath.Glob(filepath.Join(root(), "config", "crd", "data.*.yaml"))
	if err != nil {
		return nil, nil, err
	}
	env := &envtest.Environment{
		BinaryAssetsDirectory: dir,
		CRDDirectoryPaths:     crds,
		ErrorIfCRDPathMissing: true,
		// Ready within seconds; CI's machines are slow and busy.
		ControlPlaneStartTimeout: 3 * time.Minute,
		ControlPlaneStopTimeout:  time.Minute,
	}
	cluster, err = env.Start()
	if err != nil {
		_ = env.Stop()
		_ = os.RemoveAll(dir)
		return nil, nil, fmt.Errorf("API server: %w", err)
	}
	// Tests are to wait for the server, not for the client's own limits.
	cluster.QPS, cluster.Burst = -1, 0
	return cluster, func() error {
		err := env.Stop()
		_ = os.RemoveAll(dir)
		return err
	}, nil
}

// guard is a script that runs a program and kills it when the process that started the script is gone, which
// a test that is killed for its time-out is without a word.
func guard(program string) string {
	return fmt.Sprintf(`#!/bin/sh
parent=$PPID
'%s' "$@" &
child=$!
trap 'kill -TERM $child 2>/dev/null' TERM INT
(while kill -0 $parent && kill -0 $child; do sleep 1; done; kill -9 $child) >/dev/null 2>&1 &
wait $child
wait $child
`, strings.ReplaceAll(program, "'", `'\''`))
}

func root() string {
	_, here, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(here), "..", "..")
}

// Programs is the folder that holds kube-apiserver and etcd; they are built where they are missing or older
// than their pins, which takes minutes the first time.
func Programs(ctx context.Context) (string, error) {
	if dir := os.Getenv(Env); dir != "" {
		return dir, nil
	}
	dir := filepath.Join(root(), ".bin", "envtest")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	module := filepath.Join(root(), "tools", "envtest")
	pins, err := os.ReadFile(filepath.Join(module, "go.mod"))
	if err != nil {
		return "", err
	}
	stamp := filepath.Join(dir, "go.mod.built")
	if built, err := os.ReadFile(stamp); err == nil && bytes.Equal(built, pins) {
		return dir, nil
	}
	version, err := pinned(pins)
	if err != nil {
		return "", err
	}
	const at = "k8s.io/component-base/version."
	flags := "-s -w -X " + at + "gitVersion=" + version + " -X " + at + "gitMajor=1 -X " + at + "gitMinor=" + strings.Split(version, ".")[1] + " -X " + at + "gitTreeState=clean"
	for _, p := range []struct{ name, path, flags string }{
		{"etcd", "go.etcd.io/etcd/server/v3", "-s -w"},
		{"kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver", flags},
	} {
		build := exec.CommandContext(ctx, "go", "build", "-ldflags", p.flags, "-o", filepath.Join(dir, p.name), p.path)
		build.Dir = module
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s for tests: %w\n%s", p.name, err, out)
		}
	}
	return dir, os.WriteFile(stamp, pins, 0o644)
}

// pinned is the version of Kubernetes in a go.mod.
func pinned(mod []byte) (string, error) {
	for line := range strings.Lines(string(mod)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "k8s.io/kubernetes" {
			return f[1], nil
		}
	}
	return "", fmt.Errorf("tools/envtest/go.mod does not pin k8s.io/kubernetes")
}
