package worker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
)

const dataset = "ns/data"

// patience is how long a test waits for what normally takes milliseconds.
const patience = 60 * time.Second

// quick is a clock whose waits are a fiftieth of what they are, so that polls and backoffs are quick.
type quick struct{}

func (quick) Now() time.Time                         { return time.Now() }
func (quick) After(d time.Duration) <-chan time.Time { return time.After(d / 50) }

// memory is a folder in memory for the length of the test.
func memory(t testing.TB) string {
	t.Helper()
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "stepcache-worker-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func content(size int64, seed byte) []byte {
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// tier is some workers of one dataset.
type tier struct {
	t       testing.TB
	dir     string
	keys    wire.Keys
	mounts  []Mount
	workers []*Worker
	done    []chan error
	deps    func(i int) Deps
	config  func(i int, c *Config)
	gates   []*gate
	epoch   uint64
	joined  map[int]uint64 // the epoch at which a worker came to others, for tell
	root    string         // of the file source
	foreign []ring.Member  // of the list too, and none of workers
}

// newTier prepares workers over a local folder with the given files.
func newTier(t testing.TB, files map[string][]byte) *tier {
	t.Helper()
	tr := &tier{t: t, dir: memory(t), keys: wire.GenerateKeys(), root: t.TempDir()}
	for name, p := range files {
		path := filepath.Join(tr.root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, p, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tr.mounts = []Mount{{Config: source.Config{URL: "file://" + tr.root}, Path: "/"}}
	if err := wire.WriteKeys(filepath.Join(tr.dir, "keys"), tr.keys); err != nil {
		t.Fatal(err)
	}
	return tr
}

func (tr *tier) membersFile() string { return filepath.Join(tr.dir, "members.json") }

// configOf is the configuration of worker i.
func (tr *tier) configOf(i int) Config {
	c := Config{
		Dataset: dataset, ID: fmt.Sprintf("w%d", i), Mounts: tr.mounts, Memory: 256 << 20,
		Dir: filepath.Join(tr.dir, fmt.Sprintf("w%d", i)), KeysDir: filepath.Join(tr.dir, "keys"),
		MembershipFile: tr.membersFile(), Listen: "127.0.0.1:0", Control: "127.0.0.1:0",
		Socket: filepath.Join(tr.dir, fmt.Sprintf("w%d.sock", i)), ScrubBytesPerSecond: 1 << 30,
	}
	if tr.config != nil {
		tr.config(i, &c)
	}
	return c
}

// start starts n workers, which know of each other.
func (tr *tier) start(n int) {
	tr.t.Helper()
	for i := range n {
		tr.add(i)
	}
	tr.setMembers()
}

// add makes worker i and serves it; setMembers tells the others.
func (tr *tier) add(i int) *Worker {
	tr.t.Helper()
	g := &gate{}
	d := Deps{}
	if tr.deps != nil {
		d = tr.deps(i)
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.NewTextHandler(testLog{tr.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if d.Clock == nil {
		d.Clock = quick{}
	}
	if d.OpenSource == nil {
		d.OpenSource = func(ctx context.Context, c source.Config) (*scheme.Source, error) {
			s, err := scheme.Open(ctx, c, scheme.Logger(d.Logger))
			if err != nil {
				return nil, err
			}
			return &scheme.Source{Source: gated{s, g}, Meter: s.Meter}, nil
		}
	}
	w, err := New(context.Background(), tr.configOf(i), d)
	if err != nil {
		tr.t.Fatal(err)
	}
	w.peers.pong = patience // workers of a loaded machine are slow, none of them hangs
	for len(tr.workers) <= i {
		tr.workers, tr.done, tr.gates = append(tr.workers, nil), append(tr.done, nil), append(tr.gates, nil)
	}
	done := make(chan error, 1)
	tr.workers[i], tr.done[i], tr.gates[i] = w, done, g
	go func() { done <- w.Serve(context.Background()) }()
	tr.t.Cleanup(func() { w.Close() })
	return w
}

// stop stops worker i and takes it from the list that setMembers writes.
func (tr *tier) stop(i int) {
	tr.t.Helper()
	tr.workers[i].Close()
	if err := <-tr.done[i]; err != nil {
		tr.t.Errorf("worker %d: %v", i, err)
	}
	tr.workers[i] = nil
}

// setMembers writes the list of the running workers with the next epoch, and waits until they follow it.
func (tr *tier) setMembers() {
	tr.t.Helper()
	tr.epoch++
	m := ring.Membership{Epoch: tr.epoch, Members: slices.Clone(tr.foreign)}
	for i, w := range tr.workers {
		if w != nil {
			m.Members = append(m.Members, ring.Member{
				ID: fmt.Sprintf("w%d", i), Node: fmt.Sprintf("n%d", i), Addr: w.Addr().String(),
				Control: w.ControlAddr().String(), State: ring.Ready,
			})
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		tr.t.Fatal(err)
	}
	if err := replaceFile(tr.membersFile(), b); err != nil {
		tr.t.Fatal(err)
	}
	for _, w := range tr.workers {
		if w != nil {
			eventually(tr.t, "the new membership is in force", func() error {
				if e := w.members.view().Epoch; e != tr.epoch {
					return fmt.Errorf("epoch %d, want %d", e, tr.epoch)
				}
				return nil
			})
		}
	}
}

// snapshot waits until every worker serves the same snapshot, has noted it, and has no problem with it left.
func (tr *tier) snapshot() *catalog.Snapshot {
	tr.t.Helper()
	var digests []wire.Digest
	eventually(tr.t, "all workers serve one snapshot", func() error {
		digests = nil
		for _, w := range tr.workers {
			if w == nil {
				continue
			}
			s, ok := w.snapshots.get(wire.Digest{})
			if !ok {
				return errors.New(w.problems.String())
			}
			digests = append(digests, s.Digest())
			s.release()
			if err := w.problems.of(problemSnapshot); err != nil {
				return err
			}
		}
		for _, d := range digests {
			if d != digests[0] {
				return errors.New("they differ")
			}
		}
		return nil
	})
	for _, w := range tr.workers {
		if w != nil {
			s, _ := w.snapshots.get(wire.Digest{})
			tr.t.Cleanup(s.release)
			return s.Snapshot
		}
	}
	return nil
}

// lister is the index of the worker that lists.
func (tr *tier) lister() int {
	for i, w := range tr.workers {
		if w != nil {
			m, _ := w.members.view().Lister(dataset)
			for j := range tr.workers {
				if fmt.Sprintf("w%d", j) == m.ID {
					return j
				}
			}
			tr.t.Fatalf("worker %d knows no lister", i)
		}
	}
	return -1
}

// owners are the workers' indexes in order of ownership of a block.
func (tr *tier) owners(snap *catalog.Snapshot, path string, block int64) []int {
	tr.t.Helper()
	r, ok := snap.Ring(index(tr.t, snap, path))
	if !ok {
		tr.t.Fatalf("%s is not a file", path)
	}
	for _, w := range tr.workers {
		if w == nil {
			continue
		}
		var out []int
		for _, m := range w.members.view().Owners(r, block, 0) {
			var i int
			fmt.Sscanf(m.ID, "w%d", &i)
			out = append(out, i)
		}
		return out
	}
	return nil
}

func index(t testing.TB, snap *catalog.Snapshot, path string) uint32 {
	t.Helper()
	i, ok := snap.Lookup(path)
	if !ok {
		t.Fatalf("%s is not in the snapshot", path)
	}
	return i
}

// eventually waits for f to succeed.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// testLog writes to the test's log; after the test ended it is silent.
type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	defer func() { recover() }() // a log line after the end of the test panics
	l.t.Log(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

// gate lets a test hold or fail what one worker asks of its source.
type gate struct {
	mu   sync.Mutex
	hook func(ctx context.Context, o source.Object, off int64) error
	gets int
	list int
	no   error // what listings end with
}

// refuse has listings fail; nil: not any more.
func (g *gate) refuse(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.no = err
}

func (g *gate) set(hook func(ctx context.Context, o source.Object, off int64) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hook = hook
}

func (g *gate) counts() (gets, lists int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.gets, g.list
}

type gated struct {
	source.Source
	g *gate
}

func (s gated) Get(ctx context.Context, o source.Object, off, n int64) (source.Body, error) {
	s.g.mu.Lock()
	s.g.gets++
	hook := s.g.hook
	s.g.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, o, off); err != nil {
			return source.Body{}, err
		}
	}
	return s.Source.Get(ctx, o, off, n)
}

func (s gated) List(ctx context.Context, prefix string, yield func(source.Object) error) error {
	s.g.mu.Lock()
	s.g.list++
	no := s.g.no
	s.g.mu.Unlock()
	if no != nil {
		return no
	}
	return s.Source.List(ctx, prefix, yield)
}

// reader is a connection to a worker, with one request at a time.
type reader struct {
	net.Conn
	t  testing.TB
	r  *bufio.Reader
	id uint32
}

func (tr *tier) dial(i int) *reader { return dial(tr.t, tr.workers[i], tr.keys.Read[0]) }

func dial(t testing.TB, w *Worker, key wire.Key) *reader {
	t.Helper()
	c, err := net.Dial("tcp", w.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := wire.ClientHandshake(context.Background(), c, dataset, wire.RoleRead, key); err != nil {
		t.Fatal(err)
	}
	return &reader{Conn: c, t: t, r: bufio.NewReader(c)}
}

// ask sends a request and returns its answer; the error is the status's or the connection's.
func (c *reader) ask(req wire.Request) (wire.Reply, []byte, error) {
	c.id++
	req.ID = c.id
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(wire.AppendRequest(nil, req)); err != nil {
		return wire.Reply{}, nil, err
	}
	rep, p, err := wire.ReadFrame(c.r)
	if err != nil {
		return rep, nil, err
	}
	if rep.ID != req.ID || rep.Index != req.Index && req.Op == wire.OpRead {
		return rep, nil, fmt.Errorf("answer %d to request %d", rep.ID, req.ID)
	}
	if rep.Status != wire.OK {
		return rep, nil, rep.Status.Err(string(p))
	}
	return rep, p, nil
}

// read reads a range of a file.
func (c *reader) read(i uint32, off int64, n int, flags wire.Flag) ([]byte, error) {
	_, p, err := c.ask(wire.Request{Op: wire.OpRead, Flags: flags, Index: i, Off: off, Length: int32(n)})
	return p, err
}

// file reads a whole file block by block.
func (c *reader) file(i uint32, size int64, flags wire.Flag) ([]byte, error) {
	out := make([]byte, 0, size)
	for block := range ring.Blocks(size) {
		p, err := c.read(i, blockOff(block), int(blockLen(size, block)), flags)
		if err != nil {
			return nil, err
		}
		out = append(out, p...)
	}
	return out, nil
}

// control sends a signed request to worker i's control endpoint.
func (tr *tier) control(i int, method, path string, body, answer any) (int, error) {
	tr.t.Helper()
	return tr.controlWith(i, tr.keys.Control[0], method, path, body, answer)
}

func (tr *tier) controlWith(i int, key wire.Key, method, path string, body, answer any) (int, error) {
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return 0, err
		}
		in = bytes.NewReader(b)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+tr.workers[i].ControlAddr().String()+path, in)
	if err != nil {
		return 0, err
	}
	if err := wire.SignRequest(req, key, tr.workers[i].config.ID, time.Now()); err != nil {
		return 0, err
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode >= 300 {
		return resp.StatusCode, errors.New(string(b))
	}
	if answer == nil {
		return resp.StatusCode, nil
	}
	return resp.StatusCode, json.Unmarshal(b, answer)
}

// get is an unsigned request.
func (tr *tier) get(i int, path string) (int, string) {
	tr.t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	resp, err := c.Get("http://" + tr.workers[i].ControlAddr().String() + path)
	if err != nil {
		tr.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		tr.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// noGoroutines checks at the end of the test that none of this package is left.
func noGoroutines(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		var left string
		eventually(t, "no goroutine is left", func() error {
			buf := make([]byte, 1<<20)
			buf = buf[:runtime.Stack(buf, true)]
			for _, g := range strings.Split(string(buf), "\n\n")[1:] { // but this one
				for _, p := range []string{"cache/worker", "cache/store", "cache/source", "cache/catalog"} {
					if strings.Contains(g, p+".") && !strings.Contains(g, "testing.tRunner") {
						left = g
						return errors.New(left)
					}
				}
			}
			return nil
		})
	})
}
