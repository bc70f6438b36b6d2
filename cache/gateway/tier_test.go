package gateway_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
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
	s3server "github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/s3clients"
)

// The same clients against two real workers over a real bucket: half of the names are the other worker's.
func TestRealClientsOfATier(t *testing.T) {
	server, err := s3server.Start(context.Background(), s3server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := server.MakeBucket(t.Context(), "artifacts"); err != nil {
		t.Fatal(err)
	}
	endpoint := startTier(t, server, "artifacts")
	s3clients.RoundTrips(t, s3clients.Endpoint{URL: "http://" + endpoint, Bucket: "data", Region: "us-east-1", AccessKey: accessKey, SecretKey: secretKey})

	direct, err := server.Client()
	if err != nil {
		t.Fatal(err)
	}
	for o := range direct.ListObjects(t.Context(), "artifacts", minio.ListObjectsOptions{Recursive: true}) {
		t.Errorf("left in the bucket: %s %v", o.Key, o.Err)
	}
	for u := range direct.ListIncompleteUploads(t.Context(), "artifacts", "", true) {
		t.Errorf("an upload left in the bucket: %s %v", u.Key, u.Err)
	}
}

// startTier runs two workers and returns the address of the first one's gateway, which answers.
func startTier(t *testing.T, server *s3server.Server, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "gateway-") // the workers' memory and their short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("secret/accessKeyID", server.AccessKey)
	write("secret/accessKeySecret", server.SecretKey)
	write("s3/accessKeyID", accessKey)
	write("s3/secretAccessKey", secretKey)
	if err := os.Mkdir(filepath.Join(dir, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := wire.WriteKeys(filepath.Join(dir, "keys"), wire.GenerateKeys()); err != nil {
		t.Fatal(err)
	}
	ports := freePorts(t, 6)
	members := ring.Membership{Epoch: 1}
	for i := range 2 {
		members.Members = append(members.Members, ring.Member{ID: fmt.Sprintf("w%d", i), Addr: ports[3*i], Control: ports[3*i+1], Node: fmt.Sprintf("n%d", i), State: ring.Ready})
	}
	list, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	write("members.json", string(list))
	return runWorkers(t, server, name, dir, members, ports)
}

// freePorts are addresses that nobody listens at.
func freePorts(t *testing.T, n int) (ports []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // held until all are known, so that they differ
		ports = append(ports, l.Addr().String())
	}
	return ports
}

func runWorkers(t *testing.T, server *s3server.Server, name, dir string, members ring.Membership, ports []string) string {
	t.Helper()
	for i, m := range members.Members {
		w, err := worker.New(context.Background(), worker.Config{
			Dataset: "ns/data", ID: m.ID, Memory: 256 << 20, Dir: filepath.Join(dir, m.ID), KeysDir: filepath.Join(dir, "keys"),
			Mounts:         []worker.Mount{{Path: "/", Config: source.Config{URL: "s3://" + name + "/", Endpoint: server.Endpoint(), Region: server.Region, CredentialsDir: filepath.Join(dir, "secret")}}},
			MembershipFile: filepath.Join(dir, "members.json"), Listen: m.Addr, Control: m.Control,
			Gateway: &worker.GatewayConfig{Listen: ports[3*i+2], Bucket: "data", Credentials: filepath.Join(dir, "s3")},
		}, worker.Deps{Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- w.Serve(context.Background()) }()
		t.Cleanup(func() {
			w.Close()
			if err := <-done; err != nil {
				t.Errorf("worker %s: %v", m.ID, err)
			}
		})
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		c, err := minio.NewCore(ports[2], &minio.Options{Creds: credentials.NewStaticV4(accessKey, secretKey, ""), MaxRetries: 1})
		if err != nil {
			t.Fatal(err)
		}
		if _, err = c.ListObjects("data", "", "", "/", 1); err == nil {
			return ports[2]
		}
		if time.Now().After(deadline) {
			t.Fatalf("the tier does not answer: %v", err)
		}
	}
}
