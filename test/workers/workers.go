// Package workers runs the workers of a writable dataset over a bucket of the test server, in the process
// of a test: what serves S3 in a cluster, without the cluster.
//
// It owns the workers and their folder, which end with the test. Concurrency: functions are for the test's
// goroutine. Failure: the test fails.
//
// It may import cache/..., test/bucket and test/ports.
package workers

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/ports"
)

// What clients of the endpoints need.
const (
	// Bucket is the name of the dataset.
	Bucket = "data"
	// AccessKey and SecretKey read and write, ReadKey and ReadSecret only read.
	AccessKey, SecretKey = "tier-access", "tier-secret-key"
	ReadKey, ReadSecret  = "tier-read", "tier-read-secret"
)

// patience is how long a worker may take until it serves.
const patience = time.Minute

// Start runs n workers of a dataset that is a bucket's keys below prefix, which ends in a slash or is empty,
// and returns the addresses of their S3 endpoints once all answer.
func Start(t testing.TB, server *bucket.Server, bucketName, prefix string, n int) (endpoints []string) {
	t.Helper()
	return StartTier(t, server, bucketName, prefix, n).Endpoints
}

// Tier is what runs, for those who read otherwise than by S3.
type Tier struct {
	Endpoints []string // of S3
	// Dataset, Membership and Keys are what a client of the workers needs.
	Dataset    string
	Membership ring.Membership
	Keys       wire.Keys
}

// StartTier is Start that tells more.
func StartTier(t testing.TB, server *bucket.Server, bucketName, prefix string, n int) Tier {
	t.Helper()
	tier, configs := prepare(t, server, bucketName, prefix, n)
	for _, c := range configs {
		run(t, c)
	}
	for _, e := range tier.Endpoints {
		answers(t, e)
	}
	return tier
}

// StartReadOnly runs workers that take no puts. takePuts ends them and runs, with what they hold, such that do.
func StartReadOnly(t testing.TB, server *bucket.Server, bucketName, prefix string, n int) (tier Tier, takePuts func()) {
	t.Helper()
	tier, configs := prepare(t, server, bucketName, prefix, n)
	var running []*worker.Worker
	for _, c := range configs {
		c.Gateway = nil
		running = append(running, run(t, c))
	}
	return tier, func() {
		t.Helper()
		for i, w := range running {
			w.Close()
			run(t, configs[i])
		}
		for _, e := range tier.Endpoints {
			answers(t, e)
		}
	}
}

// prepare makes what workers need, which are to run by the configurations.
func prepare(t testing.TB, server *bucket.Server, bucketName, prefix string, n int) (_ Tier, configs []worker.Config) {
	t.Helper()
	var endpoints []string
	dir, err := os.MkdirTemp("", "workers-") // short: there are sockets below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(dir, path)
		err := os.MkdirAll(filepath.Dir(path), 0o700)
		if err == nil {
			err = os.WriteFile(path, []byte(text), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write("secret/accessKeyID", server.AccessKey)
	write("secret/accessKeySecret", server.SecretKey)
	write("s3/accessKeyID", AccessKey)
	write("s3/secretAccessKey", SecretKey)
	write("s3/readOnlyAccessKeyID", ReadKey)
	write("s3/readOnlySecretAccessKey", ReadSecret)
	if err := os.Mkdir(filepath.Join(dir, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	keys := wire.GenerateKeys()
	if err := wire.WriteKeys(filepath.Join(dir, "keys"), keys); err != nil {
		t.Fatal(err)
	}
	addresses := ports.Free(t, 3*n)
	members := ring.Membership{Epoch: 1}
	for i := range n {
		members.Members = append(members.Members, ring.Member{
			ID: fmt.Sprintf("w%d", i), Addr: addresses[3*i], Control: addresses[3*i+1], Node: fmt.Sprintf("n%d", i), State: ring.Ready,
		})
		endpoints = append(endpoints, addresses[3*i+2])
	}
	list, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	write("members.json", string(list))
	for i, m := range members.Members {
		configs = append(configs, worker.Config{
			Dataset: "ns/" + Bucket, ID: m.ID, Memory: 256 << 20, Dir: filepath.Join(dir, m.ID), KeysDir: filepath.Join(dir, "keys"),
			Mounts: []worker.Mount{{Path: "/", Config: source.Config{
				URL: "s3://" + bucketName + "/" + prefix, Endpoint: server.Endpoint(), Region: server.Region, CredentialsDir: filepath.Join(dir, "secret"),
			}}},
			MembershipFile: filepath.Join(dir, "members.json"), Listen: m.Addr, Control: m.Control,
			Gateway: &worker.GatewayConfig{Listen: endpoints[i], Bucket: Bucket, Credentials: filepath.Join(dir, "s3")},
		})
	}
	return Tier{Endpoints: endpoints, Dataset: "ns/" + Bucket, Membership: members, Keys: keys}, configs
}

// run runs a worker until the test ends.
func run(t testing.TB, c worker.Config) *worker.Worker {
	t.Helper()
	w, err := worker.New(context.Background(), c, worker.Deps{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- w.Serve(context.Background()) }()
	t.Cleanup(func() {
		w.Close()
		if err := <-done; err != nil {
			t.Errorf("worker %s: %v", c.ID, err)
		}
	})
	return w
}

// answers waits until an endpoint serves.
func answers(t testing.TB, endpoint string) {
	t.Helper()
	c, err := minio.NewCore(endpoint, &minio.Options{Creds: credentials.NewStaticV4(AccessKey, SecretKey, ""), BucketLookup: minio.BucketLookupPath, MaxRetries: 1})
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if _, err = c.ListObjects(Bucket, "", "", "/", 1); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the worker at %s does not answer: %v", endpoint, err)
		}
	}
}
