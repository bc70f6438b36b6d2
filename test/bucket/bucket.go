// Package bucket runs a real S3 server, signatures checked, behind the limits that a bucket has: for
// tests, the demo and the bench.
//
// It owns the server process (versitygw with its posix backend on tmpfs), the limiter in front of it (a
// shared token bucket and a delay before the first byte of every answer) and a proxy that injects
// faults. Nothing that a user runs imports it.
//
// Concurrency: a Server is safe for concurrent use. Failure: Start returns an error that says what is
// missing; a server that dies later shows as refused connections. The process ends with Close, and also
// when this process dies.
package bucket

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/local/process"
)

// Credentials and region of every Server.
const (
	AccessKey = "stepcache-test"
	SecretKey = "stepcache-test-secret"
	Region    = "us-east-1"
)

// Options of a Server. The zero value has no limits and keeps its objects in memory.
type Options struct {
	// Dir holds the objects. Empty: a folder of its own on /dev/shm (or the temporary folder), removed by
	// Close. Files put into Dir by hand have no ETag: put fixtures through the S3 API.
	Dir string
	// BytesPerSecond is what all connections to Endpoint together receive; zero: no limit.
	BytesPerSecond int64
	// FirstByte is waited before the first byte of every answer of Endpoint.
	FirstByte time.Duration
	// Listen and ListenDirect are the addresses of Endpoint and of Direct. Empty: free ports of the loopback
	// interface.
	Listen, ListenDirect string
	// VirtualDomain is the name below which buckets are hosts. They are in the path under every other.
	VirtualDomain string
	// Binary is the server's program. Empty: STEPCACHE_VERSITYGW, or built once into the checkout's .bin.
	Binary string
}

// Server is one S3 server.
type Server struct {
	// AccessKey, SecretKey and Region sign requests to it.
	AccessKey, SecretKey, Region string

	socket  string
	folders []string
	limited *Limiter
	direct  *Limiter
	process *process.Process
}

// Start runs a server until Close, or until ctx ends.
func Start(ctx context.Context, o Options) (*Server, error) {
	program, err := binary(ctx, o.Binary)
	if err != nil {
		return nil, err
	}
	s := &Server{AccessKey: AccessKey, SecretKey: SecretKey, Region: Region}
	// A folder of its own with a short name: a Unix socket's path holds 107 bytes.
	temp := os.TempDir()
	if len(temp) > 80 {
		temp = "/tmp"
	}
	run, err := os.MkdirTemp(temp, "s3-")
	if err != nil {
		return nil, err
	}
	s.folders = append(s.folders, run)
	s.socket = filepath.Join(run, "s")
	if o.Dir == "" {
		o.Dir, err = os.MkdirTemp(memory(), "stepcache-s3-")
		if err != nil {
			s.Close()
			return nil, err
		}
		s.folders = append(s.folders, o.Dir)
	}
	args := []string{"--port", s.socket, "--access", AccessKey, "--secret", SecretKey, "--region", Region,
		"--keep-alive", "--quiet", "--iam-dir", run}
	if o.VirtualDomain != "" {
		args = append(args, "--virtual-domain", o.VirtualDomain)
	}
	args = append(args, "posix")
	if !hasXattrs(o.Dir) {
		meta := filepath.Join(run, "meta")
		if err := os.Mkdir(meta, 0o700); err != nil {
			s.Close()
			return nil, err
		}
		args = append(args, "--sidecar", meta)
	}
	s.process, err = process.Start(exec.Command(program, append(args, o.Dir)...), filepath.Join(run, "log"))
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("the S3 server: %w", err)
	}
	if err := s.ready(ctx); err != nil {
		text := s.process.Tail()
		s.Close()
		return nil, fmt.Errorf("the S3 server did not start: %w\n%s", err, text)
	}
	if s.direct, err = limitAt(o.ListenDirect, "unix", s.socket, 0, 0); err == nil {
		s.limited, err = limitAt(o.Listen, "unix", s.socket, o.BytesPerSecond, o.FirstByte)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	context.AfterFunc(ctx, s.Close)
	return s, nil
}

func (s *Server) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		c, err := net.Dial("unix", s.socket)
		if err == nil {
			return c.Close()
		}
		select {
		case <-s.process.Done():
			return errors.New("it ended at once")
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Endpoint is the server's URL behind the limits.
func (s *Server) Endpoint() string { return "http://" + s.limited.Addr() }

// Direct is the server's URL without limits, for putting fixtures.
func (s *Server) Direct() string { return "http://" + s.direct.Addr() }

// Sent counts the bytes that left the bucket through Endpoint, headers included.
func (s *Server) Sent() int64 { return s.limited.Sent() }

// Requests counts the answers that left the bucket through Endpoint.
func (s *Server) Requests() int64 { return s.limited.Answers() }

// Client is an S3 client of the server, past the limits.
func (s *Server) Client() (*minio.Client, error) {
	return minio.New(strings.TrimPrefix(s.Direct(), "http://"), &minio.Options{
		Creds:  credentials.NewStaticV4(s.AccessKey, s.SecretKey, ""),
		Region: s.Region, BucketLookup: minio.BucketLookupPath,
	})
}

// MakeBucket makes a bucket.
func (s *Server) MakeBucket(ctx context.Context, name string) error {
	c, err := s.Client()
	if err != nil {
		return err
	}
	return c.MakeBucket(ctx, name, minio.MakeBucketOptions{Region: s.Region})
}

// Close ends the server and removes what it made. It may be called more than once.
func (s *Server) Close() {
	for _, l := range []*Limiter{s.limited, s.direct} {
		if l != nil {
			l.Close()
		}
	}
	if s.process != nil {
		s.process.Kill()
	}
	for _, f := range s.folders {
		_ = os.RemoveAll(f)
	}
}

// transport dials the server itself, for the fault proxy.
func (s *Server) transport() *http.Transport {
	return &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.socket)
	}}
}

// memory is a folder in memory where there is one.
func memory() string {
	if unix.Access("/dev/shm", unix.W_OK) == nil {
		return "/dev/shm"
	}
	return os.TempDir()
}

// hasXattrs says whether the folder's file system keeps user attributes, in which the server stores
// ETags (tmpfs does since Linux 6.6).
func hasXattrs(dir string) bool {
	const name = "user.stepcache.probe"
	if unix.Setxattr(dir, name, []byte("1"), 0) != nil {
		return false
	}
	_ = unix.Removexattr(dir, name)
	return true
}

// binary finds the server's program, or builds it from the module that pins it.
func binary(ctx context.Context, given string) (string, error) {
	if given == "" {
		given = os.Getenv("STEPCACHE_VERSITYGW")
	}
	if given != "" {
		return given, nil
	}
	_, here, _, _ := runtime.Caller(0)
	if !filepath.IsAbs(here) { // built with -trimpath, and may run anywhere
		return "", errors.New("this program does not know where its checkout is: name the S3 server's program, which make .bin/versitygw builds, with --versitygw or in STEPCACHE_VERSITYGW")
	}
	root := filepath.Join(filepath.Dir(here), "..", "..")
	program := filepath.Join(root, ".bin", "versitygw")
	if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(program+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	// Test binaries of several packages run at once: one builds, the others wait.
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "github.com/versity/versitygw/cmd/versitygw")
	build.Dir = filepath.Join(root, "tools", "bucket")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the S3 server (make .bin/versitygw does the same): %w\n%s", err, out)
	}
	return program, nil
}
