package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/test/bucket"
)

// The tests of this file run against real workers, in this process.

// cluster is some workers of one dataset.
type cluster struct {
	t      testing.TB
	dir    string
	keys   wire.Keys
	mounts []worker.Mount
	copies int
	memory int64 // of each worker

	mu      sync.Mutex
	epoch   uint64
	workers map[string]*running
}

type running struct {
	*worker.Worker
	config worker.Config
	done   chan error
}

func newCluster(t testing.TB, mounts ...worker.Mount) *cluster {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sc-")
	if err != nil {
		t.Skipf("no folder on tmpfs (/dev/shm): %v", err)
	}
	k := &cluster{t: t, dir: dir, keys: wire.GenerateKeys(), mounts: mounts, copies: 1, memory: 256 << 20, workers: make(map[string]*running)}
	if err := wire.WriteKeys(filepath.Join(dir, "keys"), k.keys); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for id := range k.workers {
			k.stop(id)
		}
		os.RemoveAll(dir)
	})
	return k
}

// overFolder serves a local folder with the given files.
func overFolder(t testing.TB, files map[string][]byte) *cluster {
	t.Helper()
	root := t.TempDir()
	for name, p := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, p, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return newCluster(t, worker.Mount{Config: source.Config{URL: "file://" + root}, Path: "/"})
}

// overBucket serves the bucket "data" behind an endpoint.
func overBucket(t testing.TB, s *bucket.Server, endpoint string) *cluster {
	t.Helper()
	secret := t.TempDir()
	for name, v := range map[string]string{"accessKeyID": s.AccessKey, "accessKeySecret": s.SecretKey} {
		if err := os.WriteFile(filepath.Join(secret, name), []byte(v), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return newCluster(t, worker.Mount{Path: "/", Config: source.Config{
		URL: "s3://data/", Endpoint: endpoint, Region: s.Region, CredentialsDir: secret,
	}})
}

func (k *cluster) membersFile() string { return filepath.Join(k.dir, "members.json") }

// start starts workers, or starts them again, and tells everybody.
func (k *cluster) start(ids ...string) {
	k.t.Helper()
	for _, id := range ids {
		c := worker.Config{
			Dataset: testDataset, ID: id, Mounts: k.mounts, Memory: k.memory, Dir: filepath.Join(k.dir, id),
			KeysDir: filepath.Join(k.dir, "keys"), MembershipFile: k.membersFile(), Copies: k.copies,
			Listen: "127.0.0.1:0", Control: "127.0.0.1:0", Socket: filepath.Join(k.dir, id+".s"),
		}
		w, err := worker.New(context.Background(), c, worker.Deps{Logger: quiet()})
		if err != nil {
			k.t.Fatal(err)
		}
		r := &running{Worker: w, config: c, done: make(chan error, 1)}
		go func() { r.done <- w.Serve(context.Background()) }()
		k.mu.Lock()
		k.workers[id] = r
		k.mu.Unlock()
	}
	k.publish()
}

// stop stops a worker without telling anybody.
func (k *cluster) stop(id string) {
	k.mu.Lock()
	r := k.workers[id]
	delete(k.workers, id)
	k.mu.Unlock()
	r.Close()
	if err := <-r.done; err != nil {
		k.t.Errorf("worker %s: %v", id, err)
	}
}

// membership is the list of the running workers.
func (k *cluster) membership() ring.Membership {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := ring.Membership{Epoch: k.epoch}
	for id, r := range k.workers {
		m.Members = append(m.Members, ring.Member{
			ID: id, Node: "node-" + id, Addr: r.Addr().String(), Control: r.ControlAddr().String(),
			Socket: r.config.Socket, State: ring.Ready,
		})
	}
	return m
}

// publish writes the list with the next epoch.
func (k *cluster) publish() {
	k.t.Helper()
	k.mu.Lock()
	k.epoch++
	k.mu.Unlock()
	b, err := json.Marshal(k.membership())
	if err != nil {
		k.t.Fatal(err)
	}
	if err := os.WriteFile(k.membersFile()+".new", b, 0o600); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Rename(k.membersFile()+".new", k.membersFile()); err != nil {
		k.t.Fatal(err)
	}
}

func (k *cluster) dial(change func(*Config)) *Client {
	k.t.Helper()
	config := Config{Dataset: testDataset, MembershipFile: k.membersFile(), Keys: k.keys, Logger: quiet(), Copies: k.copies}
	if change != nil {
		change(&config)
	}
	c, err := dial(testContext(k.t), config, quick())
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { c.Close() })
	return c
}

func (k *cluster) control() *Control {
	k.t.Helper()
	ctl, err := NewControl(ControlConfig{Dataset: testDataset, MembershipFile: k.membersFile(), Keys: k.keys})
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(ctl.Close)
	return ctl
}

// settled waits until every worker has the snapshot.
func (k *cluster) settled() {
	k.t.Helper()
	ctl := k.control()
	eventually(k.t, "the snapshot at every worker", func() bool {
		all, err := ctl.Status(testContext(k.t))
		for _, s := range all {
			if s.Snapshot == "" {
				return false
			}
		}
		return err == nil
	})
}

// connected waits until the clients have a connection to every worker. One that is first made under load may take
// longer than a dial may, and then the block is read through another worker.
func (k *cluster) connected(clients ...*Client) {
	k.t.Helper()
	for _, c := range clients {
		for _, p := range c.members.view().peers {
			eventually(k.t, "a connection to worker "+p.member.ID, func() bool {
				_, err := p.get(testContext(k.t))
				return err == nil
			})
		}
	}
}

func lookup(t testing.TB, c *Client, name string) uint32 {
	t.Helper()
	i, ok := c.Snapshot().Lookup("/" + name)
	if !ok {
		t.Fatalf("no file %s", name)
	}
	return i
}

func TestRealWorkersServeEverySizeWhileTheyAreStoppedStartedAndAdded(t *testing.T) {
	ctx := testContext(t)
	files := awkwardFiles()
	for _, copies := range []int{1, 2} {
		t.Run(fmt.Sprintf("copies-%d", copies), func(t *testing.T) {
			k := overFolder(t, files)
			k.copies = copies
			k.start("a", "b", "c")
			c := k.dial(func(c *Config) { c.BufferBytes = 16 << 20 })
			var names []string
			index := make(map[string]uint32)
			for name := range files {
				names = append(names, name)
				index[name] = lookup(t, c, name)
			}
			steps := []func(){
				func() {},
				func() { k.stop("b") }, // nobody is told
				func() { k.start("b") },
				func() { k.start("d") },
				func() { k.stop("c"); k.publish() },
				func() { k.stop("d") },
				func() { k.start("c", "d") },
			}
			for round, step := range steps {
				var g errgroup.Group
				for reader := range 4 {
					rnd := rand.New(rand.NewPCG(uint64(round), uint64(reader)))
					g.Go(func() error {
						for range 6 {
							name := names[rnd.IntN(len(names))]
							off := rnd.Int64N(int64(len(files[name])) + 1)
							if err := checkRead(ctx, c, index[name], files[name], off, rnd.IntN(1<<20)); err != nil {
								return fmt.Errorf("round %d: %s: %w", round, name, err)
							}
						}
						return nil
					})
				}
				step() // while they read
				if err := g.Wait(); err != nil {
					t.Fatal(err)
				}
			}
			for name, want := range files {
				if err := checkRead(ctx, c, index[name], want, 0, len(want)+1); err != nil {
					t.Fatal(err)
				}
			}
			if s := c.Stats(); s.Corrupt != 0 {
				t.Fatalf("%+v", s)
			}
		})
	}
}

func TestEightClientsReadingTheSameColdFileCostTheBucketOneCopy(t *testing.T) {
	size := 256 << 20
	if testing.Short() || raceDetector {
		size = 64 << 20
	}
	s := bucket.StartT(t, bucket.Options{})
	want := content(1, size)
	s.PutT(t, "data", "big", want)
	k := overBucket(t, s, s.Endpoint())
	k.start("a", "b")
	ctx := testContext(t)
	var clients []*Client
	for range 8 {
		clients = append(clients, k.dial(func(c *Config) { c.BufferBytes = 32 << 20 }))
	}
	k.settled()
	k.connected(clients...)
	before := s.Sent()
	var g errgroup.Group
	for _, c := range clients {
		i := lookup(t, c, "big")
		g.Go(func() error {
			for off := 0; off < size; off += 1 << 20 {
				if err := checkRead(ctx, c, i, want, int64(off), 1<<20); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	sent := s.Sent() - before
	t.Logf("the bucket sent %.4f times the size", float64(sent)/float64(size))
	// On a machine that is so busy that an answer is late, a block costs one copy more, of the other worker's.
	var late int64
	for n, c := range clients {
		s := c.Stats()
		late += s.Fallbacks
		if s.WorkerBytes > int64(size)+int64(size)/50+s.Fallbacks*ring.BlockSize || s.Fallbacks > 2 {
			t.Errorf("client %d received %d bytes for %d: %+v", n, s.WorkerBytes, size, s)
		}
	}
	if sent < int64(size) || sent > int64(size)*102/100+late*ring.BlockSize {
		t.Errorf("the bucket sent %d bytes for %d, with %d blocks read through another worker", sent, size, late)
	}
}

func TestAnObjectOverwrittenOrDeletedUnderAReaderIsNeverAMixture(t *testing.T) {
	ctx := testContext(t)
	s := bucket.StartT(t, bucket.Options{})
	old := content(1, 9<<20)
	s.PutT(t, "data", "over", old)
	s.PutT(t, "data", "gone", old)
	k := overBucket(t, s, s.Endpoint())
	k.start("a", "b")
	c := k.dial(nil)
	over, gone := lookup(t, c, "over"), lookup(t, c, "gone")
	// The first block is read, and is in the tier; the others are not.
	for _, i := range []uint32{over, gone} {
		if err := checkRead(ctx, c, i, old, 0, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	s.PutT(t, "data", "over", content(2, 9<<20))
	mc, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	if err := mc.RemoveObject(ctx, "data", "gone", minio.RemoveObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	for i, kind := range map[uint32]error{over: source.ErrChanged, gone: source.ErrNotFound} {
		c.Forget(i)
		_, err := c.ReadAt(ctx, i, make([]byte, 100), 8<<20)
		if !errors.Is(err, kind) || !strings.Contains(err.Error(), source.Relist) {
			t.Fatal(err)
		}
		// A read that spans both is the old bytes, as far as they go, or an error.
		p := make([]byte, 9<<20)
		n, err := c.ReadAt(ctx, i, p, 0)
		if err == nil || !bytes.Equal(p[:n], old[:n]) {
			t.Fatalf("%d bytes, %v", n, err)
		}
		// What the tier holds is of the right version, and stays readable.
		if err := checkRead(ctx, c, i, old, 0, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	// A refresh gives the new version to new clients.
	digest, err := k.control().Refresh(ctx)
	if err != nil || len(digest) != 64 {
		t.Fatal(digest, err)
	}
	eventually(t, "the new snapshot", func() bool {
		n := k.dial(nil)
		defer n.Close()
		d := n.Snapshot().Digest()
		if fmt.Sprintf("%x", d) != digest {
			return false
		}
		if _, ok := n.Snapshot().Lookup("/gone"); ok {
			t.Fatal("the deleted object is still listed")
		}
		if err := checkRead(ctx, n, lookup(t, n, "over"), content(2, 9<<20), 0, 9<<20); err != nil {
			t.Fatal(err)
		}
		return true
	})
}

func TestABucketThatFailsStallsAndTruncatesCostsTimeOnly(t *testing.T) {
	ctx := testContext(t)
	s := bucket.StartT(t, bucket.Options{})
	want := content(1, 17<<20)
	s.PutT(t, "data", "f", want)
	proxy := bucket.Faults(t, s)
	k := overBucket(t, s, proxy.Endpoint())
	k.start("a", "b")
	c := k.dial(nil)
	i := lookup(t, c, "f")
	var n atomic.Int64
	proxy.Set(func(r *http.Request) bucket.Fault {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/f") {
			return bucket.Fault{}
		}
		switch n.Add(1) {
		case 1:
			return bucket.Fault{Status: 503, Code: "SlowDown"}
		case 2:
			return bucket.Fault{Reset: true}
		case 3:
			return bucket.Fault{Truncate: 1 << 20}
		case 5:
			return bucket.Fault{Status: 500, Code: "InternalError"}
		}
		return bucket.Fault{}
	})
	for off := int64(0); off < int64(len(want)); off += 1 << 20 {
		if err := checkRead(ctx, c, i, want, off, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if n.Load() < 6 {
		t.Fatalf("%d requests: the faults were not met", n.Load())
	}
}

func TestAStalledBucketDoesNotKeepOthersFromWhatTheTierHolds(t *testing.T) {
	ctx := testContext(t)
	s := bucket.StartT(t, bucket.Options{})
	files := map[string][]byte{"warm": content(1, 9<<20)}
	for n := range 8 {
		files[fmt.Sprintf("cold%d", n)] = content(uint64(n), 9<<20)
	}
	for name, p := range files {
		s.PutT(t, "data", name, p)
	}
	proxy := bucket.Faults(t, s)
	k := overBucket(t, s, proxy.Endpoint())
	k.start("a")
	c := k.dial(func(c *Config) { c.BufferBytes = 16 << 20 })
	warm := lookup(t, c, "warm")
	if err := checkRead(ctx, c, warm, files["warm"], 0, 9<<20); err != nil {
		t.Fatal(err)
	}
	c.Forget(warm)
	stuck, cancel := context.WithCancelCause(ctx)
	var met atomic.Int64
	proxy.Set(func(r *http.Request) bucket.Fault {
		if strings.Contains(r.URL.Path, "/cold") {
			met.Add(1)
			return bucket.Fault{Stall: true}
		}
		return bucket.Fault{}
	})
	var wg sync.WaitGroup
	for n := range 8 {
		i := lookup(t, c, fmt.Sprintf("cold%d", n))
		wg.Go(func() {
			if _, err := c.ReadAt(stuck, i, make([]byte, 1<<20), 0); !errors.Is(err, errTest) {
				t.Errorf("read of a stalled object: %v", err)
			}
		})
	}
	eventually(t, "the stall", func() bool { return met.Load() > 0 })
	for off := int64(0); off < 9<<20; off += 1 << 20 {
		if err := checkRead(ctx, c, warm, files["warm"], off, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	cancel(errTest)
	wg.Wait()
}

func TestLeasesAndResidencyOfRealWorkers(t *testing.T) {
	ctx := testContext(t)
	files := map[string][]byte{"f": content(1, 9<<20), "g": content(2, 100_000)}
	k := overFolder(t, files)
	k.start("a", "b")
	c := k.dial(nil)
	k.settled()
	for name, want := range files {
		i := lookup(t, c, name)
		bits, err := c.Resident(ctx, i)
		if err != nil || bytes.Count(bits, []byte{0}) != len(bits) {
			t.Fatal(bits, err)
		}
		if _, err := c.Lease(ctx, i, 0); !errors.Is(err, ErrNoLease) || !errors.Is(err, wire.ErrNotResident) {
			t.Fatal(err)
		}
		lease, err := c.Lease(ctx, i, testDeadline)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(lease.File)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		lease.Release()
		bits, err = c.Resident(ctx, i)
		if err != nil || int(bits[0]) != 1<<ring.Blocks(int64(len(want)))-1 {
			t.Fatal(bits, err)
		}
	}
}

func TestControlOfRealWorkersLoadsAndReports(t *testing.T) {
	ctx := testContext(t)
	files := map[string][]byte{"x/f": content(1, 9<<20), "x/g": content(2, 100_000), "y/h": content(3, 4096)}
	k := overFolder(t, files)
	k.start("a", "b", "c")
	k.dial(nil) // the workers have a snapshot
	ctl := k.control()
	eventually(t, "status of all", func() bool {
		all, err := ctl.Status(ctx)
		if err != nil {
			return false
		}
		for _, s := range all {
			if s.Files != 3 || s.Snapshot == "" {
				return false
			}
		}
		return len(all) == 3
	})
	req := wire.LoadRequest{ID: "warm", Paths: []string{"/x/**"}, Pin: true}
	if err := ctl.Load(ctx, req); err != nil {
		t.Fatal(err)
	}
	if err := ctl.Load(ctx, req); err != nil {
		t.Fatalf("again: %v", err)
	}
	sum, err := ctl.Wait(ctx, req, 5*time.Millisecond, nil)
	if err != nil || sum.Total != 9<<20+100_000 || sum.Resident != sum.Total || len(sum.Workers) != 3 {
		t.Fatalf("%+v, %v", sum, err)
	}
	if err := ctl.DeleteLoad(ctx, "warm"); err != nil {
		t.Fatal(err)
	}
	if err := ctl.DeleteLoad(ctx, "warm"); err != nil {
		t.Fatal(err)
	}
	if _, err := ctl.LoadStatus(ctx, "warm"); !errors.Is(err, ErrNoLoad) {
		t.Fatal(err)
	}
	// A worker that is gone and still listed is named.
	k.stop("c")
	if _, err := ctl.Status(ctx); err == nil || !strings.Contains(err.Error(), "worker c") {
		t.Fatal(err)
	}
}
