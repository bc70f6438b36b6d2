package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/stepcache/stepcache/artifact/plugin"
	"github.com/stepcache/stepcache/test/bucket"
)

// As an Argo pod has it: one argument, keys in the environment, SIGTERM at the end, which is status 0 also
// while a call is under way.
func TestArtifactDriver(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	if err := s.MakeBucket(t.Context(), "artifacts"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	short, err := os.MkdirTemp("/tmp", "artifact-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(short)
	socket := filepath.Join(short, "stepcache", "socket")
	cmd := program(t, dir, "artifact", socket)
	cmd.Env = append(cmd.Env, "STEPCACHE_S3_ACCESS_KEY_ID="+bucket.AccessKey, "STEPCACHE_S3_SECRET_ACCESS_KEY="+bucket.SecretKey)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no socket")
		}
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(addr, "unix://"))
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := plugin.NewArtifactServiceClient(conn)
	out, in := filepath.Join(dir, "out"), filepath.Join(dir, "in")
	if err := os.WriteFile(out, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	art := &plugin.Artifact{Name: "a", Plugin: &plugin.PluginArtifact{
		Name: "stepcache", Key: "k", Configuration: fmt.Sprintf("{endpoint: %q, bucket: artifacts}", s.Endpoint()),
	}}
	saved, err := c.Save(t.Context(), &plugin.SaveArtifactRequest{Path: out, OutputArtifact: art})
	if err != nil || !saved.GetSuccess() {
		t.Fatalf("%v, %v", saved, err)
	}
	loaded, err := c.Load(t.Context(), &plugin.LoadArtifactRequest{Path: in, InputArtifact: art})
	if err != nil || !loaded.GetSuccess() {
		t.Fatalf("%v, %v", loaded, err)
	}
	// Another user's step reads and writes it.
	if info, err := os.Stat(in); err != nil || info.Mode().Perm() != 0o666 || info.Size() != 5 {
		t.Errorf("%v, %v", info, err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr.String())
	}
	if strings.Contains(stderr.String(), bucket.SecretKey) {
		t.Errorf("shows a secret:\n%s", stderr.String())
	}
}

func TestArtifactDriverCalledWrongly(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{{"artifact"}, {"artifact", "/a", "/b"}} {
		if _, stderr, status := run(t, dir, args...); status != 2 || !strings.Contains(stderr, "accepts 1 arg") {
			t.Errorf("%v: status %d: %s", args, status, stderr)
		}
	}
	if _, stderr, status := run(t, dir, "artifact", "relative"); status != 1 || !strings.Contains(stderr, "absolute") {
		t.Errorf("status %d: %s", status, stderr)
	}
}
