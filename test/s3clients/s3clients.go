// Package s3clients drives real S3 clients against an endpoint: each puts, lists, copies and deletes,
// whole objects and parts, and compares every byte that comes back.
//
// It owns the clients' scripts and configurations. A client is a process of its own, except for minio-go: aws-cli,
// boto3, s3cmd and s3fs are Debian's packages, rclone is built by `make bench-peers`, and the AWS SDK for Go is a
// program of a module of its own (awsgo), built on demand. One that is missing is skipped, by its package's name.
//
// Concurrency: the clients run at once, each below a prefix of its own. Failure: a client that fails shows its
// own output; one that hangs is killed after five minutes. It may import nothing of this module.
package s3clients

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Endpoint is what the clients speak to.
type Endpoint struct {
	// URL is http://host:port or https://host:port; buckets are addressed path style.
	URL, Bucket, Region  string
	AccessKey, SecretKey string
	// CA is the file with the certificate that signs the endpoint's; empty for plain HTTP.
	CA string
}

//go:embed scripts
var scripts embed.FS

// RoundTrips runs every client, each as a subtest, and returns when all have ended.
func RoundTrips(t *testing.T, e Endpoint) {
	t.Run("clients", func(t *testing.T) {
		for name, run := range map[string]func(*testing.T, Endpoint){
			"minio-go":   MinioGo,
			"aws-sdk-go": AWSGo,
			"aws-cli":    script("aws", "awscli", "bash", "awscli.sh"),
			"boto3":      boto3("python3"),
			// A machine may have newer ones from elsewhere before Debian's.
			"aws-cli of Debian": script("/usr/bin/aws", "awscli", "bash", "awscli.sh"),
			"boto3 of Debian":   boto3("/usr/bin/python3"),
			"s3cmd":             script("s3cmd", "s3cmd", "bash", "s3cmd.sh"),
			"rclone":            script(rclone(), "rclone (make bench-peers)", "bash", "rclone.sh"),
			"s3fs":              s3fs,
		} {
			t.Run(name, func(t *testing.T) {
				if e.CA != "" && (name == "s3cmd" || name == "rclone" || name == "s3fs" || strings.HasPrefix(name, "aws-cli")) {
					return // these send the same over TLS
				}
				if name == "aws-cli of Debian" && same("aws", "/usr/bin/aws") || name == "boto3 of Debian" && same("python3", "/usr/bin/python3") {
					return // it is what the name without "of Debian" ran
				}
				t.Parallel()
				run(t, e)
			})
		}
	})
}

// AWSGo runs the program over the AWS SDK for Go v2, which is built from its own module.
func AWSGo(t *testing.T, e Endpoint) {
	program := filepath.Join(t.TempDir(), "awsgo")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	build := exec.CommandContext(ctx, "go", "build", "-o", program, ".")
	build.Dir = filepath.Join(folder(), "awsgo")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the program over the AWS SDK: %v\n%s", err, out)
	}
	run(t, e, "", program)
}

func s3fs(t *testing.T, e Endpoint) {
	if os.Geteuid() != 0 {
		t.Skip("s3fs mounts in a mount namespace of its own, which needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("s3fs needs /dev/fuse, which this machine does not have")
	}
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("s3fs mounts in a mount namespace of its own, which needs unshare (package util-linux)")
	}
	script("s3fs", "s3fs", "unshare", "-m", "bash", "s3fs.sh")(t, e)
}

func boto3(python string) func(*testing.T, Endpoint) {
	return func(t *testing.T, e Endpoint) {
		if exec.Command(python, "-c", "import boto3").Run() != nil {
			t.Skip(python + " has no boto3: it is in the package python3-boto3")
		}
		script(python, "python3", python, "boto.py")(t, e)
	}
}

// script returns what runs command's last word, which is one of scripts, unless program is missing.
func script(program, pkg string, command ...string) func(*testing.T, Endpoint) {
	return func(t *testing.T, e Endpoint) {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed: it is in the package %s", program, pkg)
		}
		name := command[len(command)-1]
		text, err := scripts.ReadFile("scripts/" + name)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, text, 0o700); err != nil {
			t.Fatal(err)
		}
		run(t, e, filepath.Dir(program), append(append([]string{}, command[:len(command)-1]...), file)...)
	}
}

// run runs a client in a folder with the files that it is to put: small, large (parts of 5 MiB) and one with an
// awkward name.
func run(t *testing.T, e Endpoint, path string, command ...string) {
	dir := t.TempDir()
	for name, size := range map[string]int{"small": 150_000, "large": 11<<20 + 17, "b c+d&e=ü日本": 1000, "empty": 0} {
		if err := os.WriteFile(filepath.Join(dir, name), Random(size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, command[0], command[1:]...)
	c.Dir = dir
	// A group of its own, all of which is killed: a script's children too.
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = 10 * time.Second
	c.Env = []string{
		"PATH=" + path + ":" + os.Getenv("PATH"), "HOME=" + dir, "LANG=C.UTF-8", "LC_ALL=C.UTF-8", "PYTHONUTF8=1",
		"ENDPOINT=" + e.URL, "HOST=" + e.URL[strings.Index(e.URL, "//")+2:], "BUCKET=" + e.Bucket, "PREFIX=" + strings.NewReplacer("/", "-", "#", "-").Replace(t.Name()),
		"AWS_ACCESS_KEY_ID=" + e.AccessKey, "AWS_SECRET_ACCESS_KEY=" + e.SecretKey, "AWS_DEFAULT_REGION=" + e.Region, "AWS_REGION=" + e.Region,
		"AWS_EC2_METADATA_DISABLED=true", "AWS_MAX_ATTEMPTS=1", "AWS_PAGER=",
	}
	if e.CA != "" {
		c.Env = append(c.Env, "AWS_CA_BUNDLE="+e.CA)
	}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Run(); err != nil {
		t.Errorf("%s: %v\n%s", filepath.Base(command[len(command)-1]), err, out.String())
	}
}

// Random is n bytes that are the same in every run.
func Random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%32d", n)))).Read(b)
	return b
}

// rclone is the program on the PATH, or the one in the checkout's .bin.
func rclone() string {
	if path, err := exec.LookPath("rclone"); err == nil {
		return path
	}
	return filepath.Join(folder(), "..", "..", ".bin", "rclone")
}

// same says whether a command is the program at a path.
func same(command, path string) bool {
	found, err := exec.LookPath(command)
	if err != nil {
		return false
	}
	a, err := os.Stat(found)
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

func folder() string {
	_, here, _, _ := runtime.Caller(0)
	return filepath.Dir(here)
}
