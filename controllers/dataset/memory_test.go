package dataset

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/ports"
)

const cgroupRoot = "/sys/fs/cgroup"

// memoryGroup is a control group with a limit, as a pod's container has.
type memoryGroup struct {
	dir string
	v2  bool
}

// newMemoryGroup makes one, or skips and says what is missing.
func newMemoryGroup(t *testing.T, limit int64) *memoryGroup {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a control group and a tmpfs")
	}
	g := &memoryGroup{v2: true}
	parent, file := cgroupRoot, "memory.max"
	if b, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers")); err != nil || !bytes.Contains(b, []byte("memory")) {
		g.v2, parent, file = false, filepath.Join(cgroupRoot, "memory"), "memory.limit_in_bytes"
		if _, err := os.Stat(filepath.Join(parent, file)); err != nil && !errors.Is(err, os.ErrNotExist) || !isCgroup(parent) {
			t.Skipf("needs the memory controller of control groups: neither %s/cgroup.controllers has it (v2) nor is it mounted at %s (v1)", cgroupRoot, parent)
		}
	} else if err := os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte("+memory"), 0); err != nil {
		if b, rerr := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.subtree_control")); rerr != nil || !bytes.Contains(b, []byte("memory")) {
			t.Skipf("needs delegation of control groups: the memory controller cannot be turned on below %s: %v", cgroupRoot, err)
		}
	}
	dir, err := os.MkdirTemp(parent, "stepcache-test-")
	if err != nil {
		t.Skipf("needs delegation of control groups: %v", err)
	}
	g.dir = dir
	t.Cleanup(func() {
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) { // its last process is being reaped
			err := os.Remove(dir)
			if err == nil {
				return
			}
			if time.Now().After(end) {
				t.Errorf("the control group is left: %v", err)
				return
			}
		}
	})
	if err := os.WriteFile(filepath.Join(dir, file), []byte(strconv.FormatInt(limit, 10)), 0); err != nil {
		t.Skipf("needs delegation of control groups: %v", err)
	}
	return g
}

func isCgroup(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP_SUPER_MAGIC
}

// ooms are how often the group ran out of memory, and killed for it.
func (g *memoryGroup) ooms(t *testing.T) map[string]int64 {
	t.Helper()
	file, want := "memory.events", []string{"oom", "oom_kill"}
	if !g.v2 {
		file, want = "memory.oom_control", []string{"under_oom", "oom_kill"}
	}
	b, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]int64{}
	for line := range strings.Lines(string(b)) {
		if name, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			got[name] = n
		}
	}
	all := map[string]int64{}
	for _, name := range want {
		n, ok := got[name]
		if !ok {
			t.Fatalf("%s does not count %s:\n%s", file, name, b)
		}
		all[name] = n
	}
	return all
}

// peak is the most that the group held.
func (g *memoryGroup) peak() int64 {
	file := "memory.peak"
	if !g.v2 {
		file = "memory.max_usage_in_bytes"
	}
	b, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		return -1 // kernels before 5.19
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A full cache under load is never an OOM kill: a real worker, in a control group with exactly the limit that
// its pod has and with a tmpfs of the size that its pod gets, serves a bucket that is larger than its quota
// to readers that want everything at once: fills, a listing of many files, evictions, uncached reads of a file
// that is larger than the cache, and descriptors that readers hold on to while their files are evicted.
func TestAFullCacheIsNeverAnOOMKill(t *testing.T) {
	if testing.Short() {
		t.Skip("moves gigabytes, which -short leaves out")
	}
	worker := filepath.Join(t.TempDir(), "stepcache")                                  // without the race detector, which multiplies memory
	build := exec.Command("go", "build", "-trimpath", "-o", worker, "./cmd/stepcache") // as make build does, whose cache this uses
	build.Dir = "../.."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, c := range []struct {
		name                 string
		quota                string
		large, size          int // files, and MiB of each
		small                int
		readers, eachOfLarge int
	}{
		{"64Mi", "64Mi", 6, 32, 4000, 12, 3},
		{"1Gi", "1Gi", 8, 160, 4000, 8, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := &v1alpha1.Dataset{}
			d.Namespace, d.Name = "argo", "genomes"
			d.Spec.Workers = v1alpha1.Workers{Replicas: 1, Memory: resource.MustParse(c.quota), Copies: 1}
			quota := d.Spec.Workers.MemoryBytes()
			pod := (&Reconciler{Options: Options{Store: StoreCSI}}).podSpec(&pass{dataset: d}, "stepcache:test")
			limit := pod.Containers[0].Resources.Limits.Memory().Value()
			if r := pod.Containers[0].Resources.Requests.Memory().Value(); r != limit {
				t.Errorf("request %d, limit %d: a node could promise memory that it has not", r, limit)
			}
			var tmpfs, goLimit string
			for _, v := range pod.Volumes {
				if v.Name == "store" {
					tmpfs = v.CSI.VolumeAttributes[v1alpha1.AttributeSize]
				}
			}
			for _, e := range pod.Containers[0].Env {
				if e.Name == "GOMEMLIMIT" {
					goLimit = e.Value
				}
			}
			group := newMemoryGroup(t, limit)

			objects, err := os.MkdirTemp("/dev/shm", "stepcache-memory-")
			if err != nil {
				t.Skipf("needs /dev/shm, for a bucket in memory: %v", err)
			}
			t.Cleanup(func() { os.RemoveAll(objects) })
			s3 := bucket.StartT(t, bucket.Options{Dir: objects})
			sums := fill(t, s3, objects, c.large, c.size, int(quota>>20)*3/2, c.small)
			m := startWorker(t, worker, group, d, s3, tmpfs, goLimit)
			before := group.ooms(t)
			most := m.mostOf(t, "stepcache_store_used_bytes")
			readAll(t, m, sums, c.readers, c.eachOfLarge)
			used := most()

			after := group.ooms(t)
			for name, n := range after {
				if n != before[name] || n != 0 {
					t.Errorf("%s went from %d to %d", name, before[name], n)
				}
			}
			select {
			case <-m.gone:
				t.Errorf("the worker is gone: %v", m.end)
			default:
			}
			// Not what it holds in the end: a file that was read by its descriptor goes as a whole.
			evicted := m.metric(t, "stepcache_store_evicted_total")
			if evicted == 0 || used < float64(quota)*3/4 {
				t.Errorf("%v blocks evicted, at most %v of %d bytes held: the cache was not full", evicted, used, quota)
			}
			t.Logf("limit %d MiB, most held %d MiB (resident set of the process %.0f MiB); %v blocks evicted, %v uncached",
				limit>>20, group.peak()>>20, m.metric(t, "process_resident_memory_bytes")/mi, evicted, m.metric(t, "stepcache_store_uncached_total"))
		})
	}
}

// fill puts objects by hand into the server's folder, since thousands of requests take a busy machine minutes,
// and returns the checksum of each. They have no ETag, so that the mount allows for that.
func fill(t *testing.T, s3 *bucket.Server, dir string, large, mib, huge, small int) map[string]uint32 {
	t.Helper()
	if err := s3.MakeBucket(t.Context(), "inputs"); err != nil {
		t.Fatal(err)
	}
	sums := map[string]uint32{}
	put := func(name string, size int) {
		path := filepath.Join(dir, "inputs", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		sum := crc32.New(castagnoli)
		_, err = io.CopyN(io.MultiWriter(f, sum), rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%32s", name)))), int64(size))
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		sums["/"+name] = sum.Sum32()
	}
	put("large/huge", huge<<20)
	for i := range large {
		put(fmt.Sprintf("large/%02d", i), mib<<20)
	}
	for i := range small {
		put(fmt.Sprintf("small/%03d/%05d", i%100, i), i%16<<10)
	}
	return sums
}

// machine is a worker in its control group.
type machine struct {
	gone          chan struct{} // closed when it has ended, as end says
	end           error
	keys          wire.Keys
	members       ring.Membership
	dir, controls string
}

func startWorker(t *testing.T, program string, group *memoryGroup, d *v1alpha1.Dataset, s3 *bucket.Server, tmpfs, goLimit string) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "m") // its socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	write := func(name, text string) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write("credentials/access-key/accessKeyID", s3.AccessKey)
	write("credentials/access-key/accessKeySecret", s3.SecretKey)
	m := &machine{gone: make(chan struct{}), keys: wire.GenerateKeys(), dir: dir}
	if err := errors.Join(wire.WriteKeys(filepath.Join(dir, "keys"), m.keys), os.Mkdir(filepath.Join(dir, "store"), 0o755)); err != nil {
		t.Fatal(err)
	}
	d.Spec.Mounts = []v1alpha1.Mount{{Source: "s3://inputs/", Path: "/", Endpoint: s3.Endpoint(), Region: s3.Region, AllowUnversioned: true, CredentialsSecretRef: &v1alpha1.CredentialsRef{Name: "access-key"}}}
	c, err := (&Reconciler{Options: Options{Store: StoreCSI}}).workerConfig(d)
	if err != nil {
		t.Fatal(err)
	}
	free := ports.Free(t, 2)
	c.ID, c.Dir, c.KeysDir, c.MembershipFile, c.Socket = "genomes-worker-0", filepath.Join(dir, "store"), filepath.Join(dir, "keys"), "", filepath.Join(dir, "w.sock")
	c.Listen, c.Control = free[0], free[1]
	for i := range c.Mounts {
		c.Mounts[i].CredentialsDir = filepath.Join(dir, "credentials", "access-key")
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	write("worker.json", string(b))
	m.controls = c.Control
	m.members = ring.Membership{Epoch: 1, Members: []ring.Member{{ID: c.ID, Node: "n1", Addr: c.Listen, Control: c.Control, Socket: c.Socket, State: ring.Ready}}}

	// The tmpfs is in a mount namespace that goes with the worker; its options are those of package csi.
	script := `options="size=$1,mode=0700"
mount -t tmpfs -o "$options,huge=within_size,noswap" store "$2" 2>/dev/null ||
mount -t tmpfs -o "$options,huge=within_size" store "$2" 2>/dev/null ||
mount -t tmpfs -o "$options" store "$2" || exit 1
echo $$ >"$3/cgroup.procs" || exit 1
exec "$4" worker --config "$5"`
	cmd := exec.Command("sh", "-c", script, "sh", tmpfs, c.Dir, group.dir, program, filepath.Join(dir, "worker.json"))
	cmd.Env = append(os.Environ(), "GOMEMLIMIT="+goLimit)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(m.gone)
		m.end = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-m.gone
		if t.Failed() {
			b := said.Bytes()
			t.Logf("the worker said:\n%s", b[max(0, len(b)-4<<10):])
		}
	})
	return m
}

// metric reads one of the worker's.
func (m *machine) metric(t *testing.T, name string) float64 {
	t.Helper()
	f, err := m.scrape(name)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (m *machine) scrape(name string) (float64, error) {
	r, err := http.Get("http://" + m.controls + "/metrics")
	if err != nil {
		return 0, err
	}
	defer r.Body.Close()
	for s := bufio.NewScanner(r.Body); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), name+" "); ok {
			return strconv.ParseFloat(v, 64)
		}
	}
	return 0, fmt.Errorf("no metric %s", name)
}

// mostOf follows one of the worker's metrics until the function is called, which returns the highest value seen.
func (m *machine) mostOf(t *testing.T, name string) (stop func() float64) {
	ctx, cancel := context.WithCancel(t.Context())
	var most float64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if f, err := m.scrape(name); err == nil { // else it does not listen yet
				most = max(most, f)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return func() float64 {
		cancel()
		<-done
		return most
	}
}

// readAll reads everything several times, and holds descriptors meanwhile.
func readAll(t *testing.T, m *machine, sums map[string]uint32, readers, each int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	dial := func() *client.Client {
		c, err := client.Dial(ctx, client.Config{
			Dataset: "argo/genomes", Membership: m.members, Keys: m.keys, Node: "n1", BufferBytes: 64 << 20, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	clients := []*client.Client{dial(), dial(), dial()}
	var large, small []string
	for name := range sums {
		if strings.HasPrefix(name, "/large/") {
			large = append(large, name)
		} else {
			small = append(small, name)
		}
	}
	if snap := clients[0].Snapshot(); int(snap.Files()) != len(sums) {
		t.Fatalf("%d files are listed, want %d", snap.Files(), len(sums))
	}
	var leases atomic.Int64
	holding, stop := context.WithCancel(ctx)
	var holders errgroup.Group
	for h := range 2 {
		holders.Go(func() error {
			r := rand.New(rand.NewPCG(uint64(h), 1))
			var held []*client.Lease
			defer func() {
				for _, l := range held {
					l.Release()
				}
			}()
			for holding.Err() == nil {
				name := large[r.IntN(len(large))]
				i, _ := clients[h].Snapshot().Lookup(name)
				l, err := clients[h].Lease(holding, i, 100*time.Millisecond)
				if err != nil {
					// Not held whole at the moment, or not at all: most of the time, since everything is evicted.
					select {
					case <-holding.Done():
					case <-time.After(10 * time.Millisecond):
					}
					continue
				}
				leases.Add(1)
				sum := crc32.New(castagnoli)
				if _, err := io.Copy(sum, io.NewSectionReader(l.File, 0, 1<<40)); err != nil || sum.Sum32() != sums[name] {
					l.Release()
					return fmt.Errorf("%s by its descriptor: checksum %08x, want %08x (%v)", name, sum.Sum32(), sums[name], err)
				}
				if held = append(held, l); len(held) > 1 {
					held[0].Release()
					held = held[1:]
				}
			}
			return nil
		})
	}
	g, ctx := errgroup.WithContext(ctx)
	for k := range readers {
		g.Go(func() error {
			r := rand.New(rand.NewPCG(uint64(k), 2))
			c := clients[k%len(clients)]
			buf := make([]byte, 1<<20)
			read := func(name string) error {
				i, ok := c.Snapshot().Lookup(name)
				if !ok {
					return fmt.Errorf("%s is not listed", name)
				}
				return check(ctx, c, i, name, sums[name], buf)
			}
			// Each begins elsewhere, so that all are read.
			order := r.Perm(len(large))
			for n := range min(each, len(large)) {
				name := large[order[n]]
				if n == 0 {
					name = large[k%len(large)]
				}
				if err := read(name); err != nil {
					return err
				}
				for range 100 {
					if err := read(small[r.IntN(len(small))]); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	err := g.Wait()
	stop()
	if err := errors.Join(err, holders.Wait()); err != nil {
		t.Error(err)
	}
	t.Logf("%d descriptors held", leases.Load())
}

func check(ctx context.Context, c *client.Client, i catalog.Index, name string, want uint32, buf []byte) error {
	n, _ := c.Snapshot().Node(i)
	sum := uint32(0)
	for off := int64(0); off < n.Size; {
		k, err := c.ReadAt(ctx, i, buf[:min(int64(len(buf)), n.Size-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("%s at %d: %w", name, off, err)
		}
		sum = crc32.Update(sum, castagnoli, buf[:k])
		off += int64(k)
	}
	if sum != want {
		return fmt.Errorf("%s: checksum %08x, want %08x", name, sum, want)
	}
	return nil
}
