// Package e2e proves on a real cluster what the other tests cannot: an installation, workflows of Argo that
// read a Dataset in every mode, and what happens when parts are killed.
//
// It owns the order of the proof; the cluster is any that kubectl reaches, with Argo Workflows in the
// namespace argo and the bucket of test/cluster. `make e2e` starts that cluster where KUBECONFIG names none,
// and runs this package inside the cluster's network. Without STEPCACHE_E2E every test is skipped.
package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/test/bucket"
)

// namespace is where Argo runs workflows.
const namespace = "argo"

// patience bounds a wait for what takes seconds on an idle machine; with a hundred steps, minutes.
var patience = 10 * time.Minute

func init() {
	if full() {
		patience = 30 * time.Minute
	}
}

// root is the checkout: tests of a package run in its folder.
const root = "../.."

func need(t *testing.T) {
	t.Helper()
	if os.Getenv("STEPCACHE_E2E") == "" {
		t.Skip("STEPCACHE_E2E is not set: `make e2e` runs this on a cluster")
	}
}

// full says whether the long form was asked for: a hundred steps and every fault.
func full() bool { return os.Getenv("FULL") == "1" }

// run runs kubectl and returns its standard output.
func run(ctx context.Context, stdin string, args ...string) (string, error) {
	words := strings.Fields(os.Getenv("KUBECTL"))
	if len(words) == 0 {
		words = []string{"kubectl"}
	}
	cmd := exec.CommandContext(ctx, words[0], append(words[1:], args...)...)
	cmd.Dir = root
	cmd.WaitDelay = 10 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// kubectl runs kubectl, which must succeed.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := run(ctx, "", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// lab runs a command of test/cluster, for what no API does: breaking nodes, looking into them, and reading the
// audit log. Tests that need it are skipped on other clusters.
func lab(t *testing.T, args ...string) string {
	t.Helper()
	out, err := labCommand(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func labCommand(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Getenv("STEPCACHE_CLUSTER"), args...)
	cmd.WaitDelay = 10 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("cluster %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// hasLab says whether the cluster is that of test/cluster.
func hasLab() bool { return os.Getenv("STEPCACHE_CLUSTER") != "" }

// apply applies manifests given as text, in a namespace.
func apply(t *testing.T, namespace, manifests string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := run(ctx, manifests, "apply", "-n", namespace, "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// example is the text of an example's file.
func example(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(root + "/examples/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// eventually tries until check has no error, or patience ends. Every now and then it says what is waited for.
func eventually(t *testing.T, what string, check func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	start := time.Now()
	said := start
	for {
		// One try must not use up the time of all: whom kubectl asks may be frozen.
		try, done := context.WithTimeout(ctx, time.Minute)
		last := check(try)
		done()
		if last == nil {
			return
		}
		if time.Since(said) > time.Minute {
			said = time.Now()
			t.Logf("%.0f s waited until %s: %s", time.Since(start).Seconds(), what, brief(last.Error()))
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v\n%s", what, last, diagnosis())
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// brief is the beginning of a text.
func brief(text string) string {
	if len(text) > 300 {
		return text[:300] + "..."
	}
	return text
}

// diagnosis is what a person would look at first, behind what the given calls of kubectl print.
func diagnosis(first ...[]string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var b strings.Builder
	for _, args := range append(first, [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "datasets,dataloads", "-A", "-o", "yaml"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp"},
		{"logs", "-n", "stepcache-system", "-l", "data.stepcache.dev/component", "--tail=30", "--prefix", "--all-containers"},
		{"logs", "-n", namespace, "-l", "data.stepcache.dev/component=worker", "--tail=20", "--prefix"},
	}...) {
		out, err := run(ctx, "", args...)
		if err != nil {
			out += err.Error()
		}
		lines := strings.Split(out, "\n")
		fmt.Fprintf(&b, "--- %s\n%s\n", strings.Join(args, " "), strings.Join(lines[max(0, len(lines)-120):], "\n"))
	}
	return b.String()
}

// get reads one field of an object by JSONPath.
func get(ctx context.Context, namespace, kind, name, path string) (string, error) {
	return run(ctx, "", "get", kind, name, "-n", namespace, "-o", "jsonpath="+path)
}

// waitReady waits for a Dataset's condition Ready.
func waitReady(t *testing.T, namespace, name string) {
	t.Helper()
	eventually(t, "Dataset "+name+" is Ready", func(ctx context.Context) error {
		got, err := get(ctx, namespace, "dataset", name, `{.status.conditions[?(@.type=="Ready")].status} {.status.conditions[*].message}`)
		if err == nil && !strings.HasPrefix(got, "True ") {
			err = errors.New(got)
		}
		return err
	})
}

// waitLoaded waits for a DataLoad to be Complete.
func waitLoaded(t *testing.T, namespace, name string) {
	t.Helper()
	eventually(t, "DataLoad "+name+" is Complete", func(ctx context.Context) error {
		got, err := get(ctx, namespace, "dataload", name, `{.status.phase} {.status.progress} {.status.conditions[*].message}`)
		if err == nil && !strings.HasPrefix(got, "Complete ") {
			err = errors.New(got)
		}
		return err
	})
}

// waitPod waits for a pod to succeed and returns the log of its container main.
func waitPod(t *testing.T, namespace, name string) string {
	t.Helper()
	eventually(t, "pod "+name+" succeeds", func(ctx context.Context) error {
		phase, err := get(ctx, namespace, "pod", name, "{.status.phase} {.status.containerStatuses} {.status.initContainerStatuses}")
		if err == nil && strings.HasPrefix(phase, "Failed") {
			t.Fatalf("pod %s failed: %s\n%s", name, phase, diagnosis())
		}
		if err == nil && !strings.HasPrefix(phase, "Succeeded") {
			err = errors.New(phase)
		}
		return err
	})
	return kubectl(t, "logs", "-n", namespace, name, "-c", "main")
}

// input is what is in the bucket.
type input struct {
	largeSum  string // of /large.bin
	shardsSum string // of all shards, one behind the other
	bytes     int64
	shards    int
}

// put fills the bucket, past its limits.
func put(t *testing.T) input {
	t.Helper()
	c, err := minio.New("bucket.bucket:9001", &minio.Options{
		Creds: credentials.NewStaticV4(bucket.AccessKey, bucket.SecretKey, ""), Region: bucket.Region, BucketLookup: minio.BucketLookupPath,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for _, name := range []string{"demo", "artifacts"} {
		eventually(t, "the bucket "+name+" can be made", func(ctx context.Context) error {
			ok, err := c.BucketExists(ctx, name)
			if err == nil && !ok {
				err = c.MakeBucket(ctx, name, minio.MakeBucketOptions{})
			}
			return err
		})
		// What a former run left.
		for o := range c.ListObjects(ctx, name, minio.ListObjectsOptions{Recursive: true}) {
			err := o.Err
			if err == nil {
				err = c.RemoveObject(ctx, name, o.Key, minio.RemoveObjectOptions{})
			}
			if err != nil {
				t.Fatalf("empty the bucket %s: %v", name, err)
			}
		}
	}
	size := 64 << 20
	if full() {
		size = 256 << 20
	}
	large := make([]byte, 0, size)
	for i := 0; len(large) < size; i++ {
		large = fmt.Appendf(large, "line %d of the large file of the end-to-end test\n", i)
	}
	large = large[:size]
	sum := sha256.Sum256(large)
	in := input{largeSum: hex.EncodeToString(sum[:]), bytes: int64(size)}
	object := func(key string, b []byte) {
		if _, err := c.PutObject(ctx, "demo", key, bytes.NewReader(b), int64(len(b)), minio.PutObjectOptions{}); err != nil {
			t.Fatalf("put %s: %v", key, err)
		}
	}
	object("large.bin", large)
	all, shards := sha256.New(), 6
	if full() {
		shards = 12
	}
	for i := range shards {
		var b []byte
		for line := range 1000 * (i + 1) {
			b = fmt.Appendf(b, "shard %d line %d\n", i, line)
		}
		object(fmt.Sprintf("shards/%02d.bin", i), b)
		all.Write(b)
		in.bytes += int64(len(b))
		in.shards++
	}
	in.shardsSum = hex.EncodeToString(all.Sum(nil))
	return in
}

// sent is how many bytes have left the bucket by its limited port.
func sent(t *testing.T) int64 {
	t.Helper()
	r, err := http.Get("http://bucket.bucket:9002/")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	var counters struct {
		Sent int64 `json:"sent"`
	}
	if err == nil {
		err = json.Unmarshal(b, &counters)
	}
	if err != nil {
		t.Fatalf("the bucket's counters: %v: %s", err, b)
	}
	return counters.Sent
}
