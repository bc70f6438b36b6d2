package objects_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/local/process"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/ports"
)

// patience is how long a test waits for what normally takes milliseconds.
const patience = 90 * time.Second

// workerEnv makes this test binary a worker: it names the configuration.
const workerEnv = "STEPCACHE_TEST_WORKER"

var (
	server     *bucket.Server
	serverOnce sync.Once
	buckets    atomic.Int64
)

func TestMain(m *testing.M) {
	if path := os.Getenv(workerEnv); path != "" {
		c, err := worker.LoadConfig(path, nil)
		if err == nil {
			log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
			err = worker.Run(context.Background(), c, worker.Deps{Logger: log})
			// Something else may have an address for a moment after its former process was killed.
			for deadline := time.Now().Add(patience); errors.Is(err, syscall.EADDRINUSE) && time.Now().Before(deadline); {
				fmt.Fprintln(os.Stderr, err)
				time.Sleep(50 * time.Millisecond)
				err = worker.Run(context.Background(), c, worker.Deps{Logger: log})
			}
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if server != nil {
		server.Close()
	}
	os.Exit(code)
}

// theServer is one S3 server for all tests of the package.
func theServer(t testing.TB) *bucket.Server {
	t.Helper()
	serverOnce.Do(func() {
		s, err := bucket.Start(context.Background(), bucket.Options{})
		if err != nil {
			t.Fatal(err)
		}
		server = s
	})
	if server == nil {
		t.Fatal("the S3 server did not start")
	}
	return server
}

func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %v: %v", what, patience, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func content(size int, seed int) []byte {
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(p)
	return p
}

// tier is some workers of one writable dataset over a bucket of its own.
type tier struct {
	t       testing.TB
	dir     string
	bucket  string
	prefix  string
	direct  *minio.Client // the bucket itself
	mounts  []worker.Mount
	write   worker.WriteConfig
	memory  int64
	scrub   int64
	deps    func(i int, d *worker.Deps)
	epoch   uint64
	workers []*member
	trusted *x509.CertPool // of the gateways' certificate; nil: plain HTTP
}

// member is one worker, in this process or in one of its own.
type member struct {
	m       ring.Member
	gateway string
	inside  *worker.Worker
	done    chan error
	outside *process.Process
	state   ring.State
}

const (
	dataset   = "ns/data"
	accessKey = "tier-access"
	secretKey = "tier-secret-key"
	readKey   = "tier-read"
	readSec   = "tier-read-secret"
)

// newTier prepares a tier; endpoint is that of the bucket as the workers see it, empty for the server's own.
func newTier(t testing.TB, endpoint string) *tier {
	t.Helper()
	s := theServer(t)
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "stepcache-objects-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	tr := &tier{t: t, dir: dir, prefix: "artifacts/", memory: 128 << 20, bucket: fmt.Sprintf("b-%d", buckets.Add(1))}
	if tr.direct, err = s.Client(); err != nil {
		t.Fatal(err)
	}
	if err := s.MakeBucket(t.Context(), tr.bucket); err != nil {
		t.Fatal(err)
	}
	if endpoint == "" {
		endpoint = s.Endpoint()
	}
	tr.files("secret", map[string]string{"accessKeyID": s.AccessKey, "accessKeySecret": s.SecretKey})
	tr.files("s3", map[string]string{"accessKeyID": accessKey, "secretAccessKey": secretKey, "readOnlyAccessKeyID": readKey, "readOnlySecretAccessKey": readSec})
	tr.mounts = []worker.Mount{{Path: "/", Config: source.Config{URL: "s3://" + tr.bucket + "/" + tr.prefix, Endpoint: endpoint, Region: s.Region, CredentialsDir: tr.path("secret")}}}
	tr.files("keys", nil)
	if err := wire.WriteKeys(tr.path("keys"), wire.GenerateKeys()); err != nil {
		t.Fatal(err)
	}
	return tr
}

func (tr *tier) path(name string) string { return filepath.Join(tr.dir, name) }

func (tr *tier) files(dir string, files map[string]string) {
	tr.t.Helper()
	if err := os.MkdirAll(tr.path(dir), 0o700); err != nil {
		tr.t.Fatal(err)
	}
	for name, v := range files {
		if err := os.WriteFile(filepath.Join(tr.path(dir), name), []byte(v), 0o600); err != nil {
			tr.t.Fatal(err)
		}
	}
}

func (tr *tier) config(i int) worker.Config {
	w := tr.workers[i]
	gateway := &worker.GatewayConfig{Listen: w.gateway, Bucket: "data", Credentials: tr.path("s3")}
	if tr.trusted != nil {
		gateway.TLS = tr.path("tls")
	}
	return worker.Config{
		Dataset: dataset, ID: w.m.ID, Mounts: tr.mounts, Memory: tr.memory, Dir: tr.path(w.m.ID), KeysDir: tr.path("keys"),
		MembershipFile: tr.path("members.json"), Listen: w.m.Addr, Control: w.m.Control,
		Gateway: gateway, Write: tr.write, ScrubBytesPerSecond: tr.scrub,
	}
}

// add makes worker number len(workers), with addresses of its own, not running and not yet a member.
func (tr *tier) add() int {
	tr.t.Helper()
	p := ports.Free(tr.t, 3)
	i := len(tr.workers)
	tr.workers = append(tr.workers, &member{
		m:       ring.Member{ID: fmt.Sprintf("w%d", i), Addr: p[0], Control: p[1], Node: fmt.Sprintf("n%d", i), State: ring.Ready},
		gateway: p[2],
	})
	return i
}

// start makes n workers and runs them in this process.
func (tr *tier) start(n int) *tier {
	tr.t.Helper()
	for range n {
		tr.add()
	}
	tr.publish()
	for i := range n {
		tr.run(i)
	}
	tr.ready()
	return tr
}

// run runs worker i in this process.
func (tr *tier) run(i int) {
	tr.t.Helper()
	w := tr.workers[i]
	d := worker.Deps{Logger: slog.New(slog.NewTextHandler(testLog{tr.t}, &slog.HandlerOptions{Level: slog.LevelDebug})).With("id", w.m.ID)}
	if tr.deps != nil {
		tr.deps(i, &d)
	}
	var err error
	if w.inside, err = worker.New(context.Background(), tr.config(i), d); err != nil {
		tr.t.Fatal(err)
	}
	w.done = make(chan error, 1)
	inside, done := w.inside, w.done
	go func() { done <- inside.Serve(context.Background()) }()
	tr.t.Cleanup(func() { inside.Close() })
}

// spawn runs worker i in a process of its own.
func (tr *tier) spawn(i int) {
	tr.t.Helper()
	w := tr.workers[i]
	b, err := json.Marshal(tr.config(i))
	if err != nil {
		tr.t.Fatal(err)
	}
	path := tr.path(w.m.ID + ".json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		tr.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), workerEnv+"="+path)
	if w.outside, err = process.Start(cmd, tr.path(w.m.ID+".log")); err != nil {
		tr.t.Fatal(err)
	}
	p := w.outside
	tr.t.Cleanup(func() {
		p.Kill()
		if tr.t.Failed() {
			tr.t.Logf("log of %s:\n%s", w.m.ID, tail(tr.path(w.m.ID+".log")))
		}
	})
}

// quit has the workers in processes of their own say in their logs what each of their goroutines does.
func (tr *tier) quit() {
	for _, w := range tr.workers {
		if w.outside != nil {
			w.outside.Signal(syscall.SIGQUIT)
			<-w.outside.Done()
		}
	}
}

func tail(path string) string {
	b, _ := os.ReadFile(path)
	return string(b[max(0, len(b)-64000):])
}

// next is the membership with the next epoch: the workers that are added and not gone.
func (tr *tier) next() []byte {
	tr.t.Helper()
	tr.epoch++
	m := ring.Membership{Epoch: tr.epoch}
	for _, w := range tr.workers {
		if w.state != "gone" {
			m.Members = append(m.Members, w.m)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		tr.t.Fatal(err)
	}
	return b
}

// tell has worker i alone follow a membership, as the controller does.
func (tr *tier) tell(i int, list []byte) {
	tr.t.Helper()
	keys, err := wire.LoadKeys(tr.path("keys"))
	if err != nil {
		tr.t.Fatal(err)
	}
	req, err := http.NewRequest("POST", "http://"+tr.workers[i].m.Control+wire.PathMembers, bytes.NewReader(list))
	if err == nil {
		err = wire.SignRequest(req, keys.Control[0], tr.workers[i].m.ID, time.Now())
	}
	if err != nil {
		tr.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		tr.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		tr.t.Fatalf("worker %d was told a membership: status %d", i, resp.StatusCode)
	}
}

// metric is one figure of worker i.
func (tr *tier) metric(i int, name string) int64 {
	tr.t.Helper()
	resp, err := http.Get("http://" + tr.workers[i].m.Control + wire.PathMetrics)
	if err != nil {
		tr.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		tr.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
			if err != nil {
				tr.t.Fatal(err)
			}
			return int64(f)
		}
	}
	tr.t.Fatalf("worker %d has no metric %s", i, name)
	return 0
}

// publish writes the next membership for all workers to find.
func (tr *tier) publish() {
	tr.t.Helper()
	b := tr.next()
	err := os.WriteFile(tr.path("members.new"), b, 0o600)
	if err == nil {
		err = os.Rename(tr.path("members.new"), tr.path("members.json"))
	}
	if err != nil {
		tr.t.Fatal(err)
	}
}

// ready waits until every worker answers requests.
func (tr *tier) ready() {
	tr.t.Helper()
	for i, w := range tr.workers {
		if w.state == "gone" {
			continue
		}
		eventually(tr.t, "worker "+w.m.ID+" serves", func() error {
			_, err := tr.client(i).ListObjects("data", "", "", "/", 1)
			return err
		})
	}
}

// membership is the list of those that are members, without its epoch.
func (tr *tier) membership() (m ring.Membership) {
	for _, w := range tr.workers {
		if w.state != "gone" {
			m.Members = append(m.Members, w.m)
		}
	}
	return m
}

// owner is the number of the worker that owns a key.
func (tr *tier) owner(key string) int {
	o := tr.membership().NameOwners(dataset, key, 1)[0]
	for i, w := range tr.workers {
		if w.m.ID == o.ID {
			return i
		}
	}
	return -1
}

// keyOwnedBy is a key that worker i owns.
func (tr *tier) keyOwnedBy(i int, like string) string {
	for n := 0; ; n++ {
		if k := fmt.Sprintf("%s-%d", like, n); tr.owner(k) == i {
			return k
		}
	}
}

// client is an S3 client of worker i's gateway. It tries once, so that a test sees every error.
func (tr *tier) client(i int) minio.Core {
	tr.t.Helper()
	o := &minio.Options{
		Creds: credentials.NewStaticV4(accessKey, secretKey, ""), Region: "us-east-1", BucketLookup: minio.BucketLookupPath, MaxRetries: 1,
	}
	if tr.trusted != nil {
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: tr.trusted}}
		tr.t.Cleanup(transport.CloseIdleConnections)
		o.Secure, o.Transport = true, transport
	}
	c, err := minio.NewCore(tr.workers[i].gateway, o)
	if err != nil {
		tr.t.Fatal(err)
	}
	return *c
}

func (tr *tier) put(i int, key string, p []byte, o minio.PutObjectOptions) (minio.UploadInfo, error) {
	return tr.client(i).PutObject(tr.t.Context(), "data", key, bytes.NewReader(p), int64(len(p)), "", "", o)
}

func (tr *tier) mustPut(i int, key string, p []byte) minio.UploadInfo {
	tr.t.Helper()
	info, err := tr.put(i, key, p, minio.PutObjectOptions{})
	if err != nil {
		tr.t.Fatalf("put %q through worker %d: %v", key, i, err)
	}
	return info
}

func (tr *tier) get(i int, key string) ([]byte, minio.ObjectInfo, error) {
	r, info, _, err := tr.client(i).GetObject(tr.t.Context(), "data", key, minio.GetObjectOptions{})
	if err != nil {
		return nil, info, err
	}
	defer r.Close()
	p, err := io.ReadAll(r)
	return p, info, err
}

func (tr *tier) keys(i int, prefix string) []string {
	tr.t.Helper()
	var out []string
	for o := range tr.client(i).ListObjectsIter(tr.t.Context(), "data", minio.ListObjectsOptions{Prefix: prefix, Recursive: true}) {
		if o.Err != nil {
			tr.t.Fatal(o.Err)
		}
		out = append(out, o.Key)
	}
	return out
}

// inBucket is what the bucket itself has of a key.
func (tr *tier) inBucket(key string) ([]byte, minio.ObjectInfo, error) {
	core := minio.Core{Client: tr.direct}
	r, info, _, err := core.GetObject(tr.t.Context(), tr.bucket, tr.prefix+key, minio.GetObjectOptions{})
	if err != nil {
		return nil, info, err
	}
	defer r.Close()
	p, err := io.ReadAll(r)
	return p, info, err
}

// uploads are the unfinished uploads of the bucket.
func (tr *tier) uploads() []string {
	tr.t.Helper()
	core := minio.Core{Client: tr.direct}
	r, err := core.ListMultipartUploads(tr.t.Context(), tr.bucket, "", "", "", "", 1000)
	if err != nil {
		tr.t.Fatal(err)
	}
	var out []string
	for _, u := range r.Uploads {
		out = append(out, u.Key)
	}
	return out
}

func code(err error) string {
	var r minio.ErrorResponse
	if errors.As(err, &r) {
		return r.Code
	}
	return fmt.Sprint(err)
}

// testLog is the log of a worker in the test's output. Workers outlive the test by no line.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

func md5Hex(s string) string {
	sum := md5.Sum([]byte(s))
	return hex.EncodeToString(sum[:])
}
