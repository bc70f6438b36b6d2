package artifact_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/artifact"
)

func TestSocket(t *testing.T) {
	f := start(t, artifact.Options{})
	dir, err := os.MkdirTemp("", "artifact-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "made", "deep", "socket")
	// What a killed driver left is replaced.
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{socket, socket + ".new"} {
		dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		dead.SetUnlinkOnClose(false)
		dead.Close()
	}
	before, err := os.Lstat(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- artifact.New(artifact.Options{Getenv: keys}).Serve(ctx, socket) }()
	waitFor(t, "the new socket", func() bool {
		now, err := os.Lstat(socket)
		return err == nil && !os.SameFile(before, now)
	})
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("%v, %v: every user of the pod must be able to connect", info.Mode(), err)
	}
	a := connect(t, socket)
	if err := a.save(t.Context(), f.write(t, "out", []byte("x"), 0o644), f.artifact("k")); err != nil {
		t.Error(err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("an ordinary end: %v", err)
	}
	if left, err := os.ReadDir(filepath.Dir(socket)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestSocketThatCannotBe(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	for socket, part := range map[string]string{
		"": "absolute", "relative/socket": "absolute", "/" + strings.Repeat("x", 120): "bytes", file: "something else", file + "/socket": "not a directory",
	} {
		wantError(t, artifact.New(artifact.Options{}).Serve(t.Context(), socket), part)
	}
	if b, err := os.ReadFile(file); string(b) != "precious" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}
