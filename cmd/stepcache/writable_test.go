package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// A writable Dataset has an S3 endpoint on this machine: what is put there is in the bucket, whether the client puts the
// bucket's name in front of the host or into the path.
func TestLocalServesAWritableDataset(t *testing.T) {
	f := newFixture(t)
	f.replace(t, "spec:\n  mounts:", "spec:\n  access: ReadWrite\n  mounts:")
	if _, stderr, status := run(t, f.dir, "local", "-f", f.manifests, "--", "true"); status != 0 ||
		!strings.Contains(stderr, "load default/warm failed, with 0 B of 0 B resident: access: ReadWrite, so that there is no listing to load from") {
		t.Errorf("with a DataLoad: status %d:\n%s", status, stderr)
	}
	f.replace(t, manifests[strings.LastIndex(manifests, "---"):strings.LastIndex(manifests, "%[5]t")]+"false}\n", "")
	cmd, env, stderr := background(t, f, "--s3-domain", "s3.test")
	var mu sync.Mutex
	asked := map[string]bool{} // hosts
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(env["STEPCACHE_S3_CREDENTIALS"], name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	// All names below the domain lead here, as a wildcard in a DNS does.
	transport := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(addr)
		if err != nil || host != "s3.test" && !strings.HasSuffix(host, ".s3.test") {
			return nil, fmt.Errorf("%s is not below the domain: %w", addr, err)
		}
		mu.Lock()
		asked[host] = true
		mu.Unlock()
		return (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort("127.0.0.1", port))
	}}
	defer transport.CloseIdleConnections()
	client := func(id, secret string, style minio.BucketLookupType) *minio.Client {
		c, err := minio.New(strings.TrimPrefix(env["STEPCACHE_S3_ENDPOINT"], "http://"), &minio.Options{
			Creds: credentials.NewStaticV4(id, secret, ""), Region: "us-east-1", BucketLookup: style, Transport: transport,
		})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := client(read("accessKeyID"), read("secretAccessKey"), minio.BucketLookupDNS)
	want := bytes.Repeat([]byte("stepcache"), 1000)
	bucket := env["STEPCACHE_S3_BUCKET"]
	info, err := c.PutObject(t.Context(), bucket, "out/x", bytes.NewReader(want), int64(len(want)), minio.PutObjectOptions{})
	if err != nil {
		t.Fatalf("put: %v\n%s", err, stderr)
	}
	mu.Lock()
	if len(asked) != 1 || !asked[bucket+".s3.test"] {
		t.Errorf("the client asked %v", asked)
	}
	mu.Unlock()
	c = client(read("accessKeyID"), read("secretAccessKey"), minio.BucketLookupPath)
	r, err := c.GetObject(t.Context(), bucket, "out/x", minio.GetObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	r.Close()
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	direct, err := f.server.Client()
	if err != nil {
		t.Fatal(err)
	}
	if at, err := direct.StatObject(t.Context(), "fixture", "out/x", minio.StatObjectOptions{}); err != nil || at.ETag != info.ETag {
		t.Errorf("in the bucket: %+v, %v", at, err)
	}
	if _, err := c.PutObject(t.Context(), bucket, "dir/small", strings.NewReader("anew"), 4, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.RemoveObject(t.Context(), bucket, "large", minio.RemoveObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	seesWhatIsThere(t, f, env["STEPCACHE_TIER"], want)
	reader := client(read("readOnlyAccessKeyID"), read("readOnlySecretAccessKey"), minio.BucketLookupPath)
	if _, err := reader.PutObject(t.Context(), bucket, "no", bytes.NewReader(want), int64(len(want)), minio.PutObjectOptions{}); minio.ToErrorResponse(err).Code != "AccessDenied" {
		t.Errorf("a put with the reader's key: %v", err)
	}
	if !strings.Contains(read("env"), "AWS_ENDPOINT_URL="+env["STEPCACHE_S3_ENDPOINT"]) {
		t.Errorf("env: %s", read("env"))
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v\n%s", err, stderr)
	}
	if said := stderr.String(); !strings.Contains(said, "dataset default/data: 2 workers\n") || !strings.Contains(said, "S3 endpoint http://s3.test:") {
		t.Errorf("it said:\n%s", said)
	}
	f.nothingLeft(t)
}

// seesWhatIsThere has the commands look at a tier in which out/x was put, dir/small replaced and large removed.
func seesWhatIsThere(t *testing.T, f *fixture, tier string, x []byte) {
	t.Helper()
	stdout, stderr, status := run(t, f.dir, "ls", "-R", "--tier", tier)
	if status != 0 || !strings.Contains(stdout, "/out/\n") || !strings.Contains(stdout, "/out/x\n") || !strings.Contains(stdout, "/dir/small\n") || strings.Contains(stdout, "large") {
		t.Errorf("ls -R: %d %q %q", status, stdout, stderr)
	}
	if stdout, stderr, status = run(t, f.dir, "ls", "--tier", tier); status != 0 || !strings.Contains(stdout, "/out/\n") || strings.Contains(stdout, "/out/x") {
		t.Errorf("ls: %d %q %q", status, stdout, stderr)
	}
	if stdout, stderr, status = run(t, f.dir, "ls", "-l", "--tier", tier, "dir/small"); status != 0 || !strings.HasPrefix(stdout, "4 ") {
		t.Errorf("ls -l of a file: %d %q %q", status, stdout, stderr)
	}
	// The bucket has no folders, and so no time of one.
	if stdout, stderr, status = run(t, f.dir, "ls", "-l", "--tier", tier, "/"); status != 0 || !strings.Contains(stdout, "0  -  ") || strings.Contains(stdout, "0001-") {
		t.Errorf("ls -l of a folder: %d %q %q", status, stdout, stderr)
	}
	for _, name := range []string{"/large", "none", "out/x/y"} {
		if _, stderr, status = run(t, f.dir, "ls", "--tier", tier, name); status != 1 || !strings.Contains(stderr, "no file or folder "+name) {
			t.Errorf("ls %s: %d %q", name, status, stderr)
		}
		if _, stderr, status = run(t, f.dir, "get", "--tier", tier, name, "-"); status != 1 || !strings.Contains(stderr, "no file or folder "+name) {
			t.Errorf("get %s: %d %q", name, status, stderr)
		}
	}
	if stdout, stderr, status = run(t, f.dir, "get", "--tier", tier, "/dir/small", "-"); status != 0 || stdout != "anew" {
		t.Errorf("get: %d %q %q", status, stdout, stderr)
	}
	if _, stderr, status = run(t, f.dir, "get", "--tier", tier, "/", "-"); status != 1 || !strings.Contains(stderr, "is a folder") {
		t.Errorf("get of a folder: %d %q", status, stderr)
	}
	dest := filepath.Join(f.dir, "all")
	if _, stderr, status = run(t, f.dir, "get", "--tier", tier, "/", dest); status != 0 {
		t.Errorf("get of all: %d %q", status, stderr)
	}
	for name, want := range map[string][]byte{"out/x": x, "dir/small": []byte("anew")} {
		if got, err := os.ReadFile(filepath.Join(dest, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if _, stderr, status = run(t, f.dir, "get", "--tier", tier, "out/x", filepath.Join(dest, "out", "x")); status != 1 || !strings.Contains(stderr, "--force") {
		t.Errorf("get of what exists: %d %q", status, stderr)
	}
	if _, stderr, status = run(t, f.dir, "verify", "--tier", tier, "-f", f.manifests); status != 1 || !strings.Contains(stderr, "takes puts") {
		t.Errorf("verify: %d %q", status, stderr)
	}
	if _, stderr, status = run(t, f.dir, "bench", "--tier", tier); status != 1 || !strings.Contains(stderr, "takes puts") {
		t.Errorf("bench: %d %q", status, stderr)
	}
	if stdout, stderr, status = run(t, f.dir, "status", "--tier", tier); status != 0 || !regexp.MustCompile(`data-0 +\S+ +- `).MatchString(stdout) {
		t.Errorf("status: %d %q %q", status, stdout, stderr)
	}
}
