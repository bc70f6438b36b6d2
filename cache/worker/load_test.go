package worker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
)

// waitLoad waits until the load has finished on worker i, done or not.
func (tr *tier) waitLoad(i int, id string) wire.LoadStatus {
	tr.t.Helper()
	var s wire.LoadStatus
	eventually(tr.t, "load "+id+" finishes", func() error {
		s = wire.LoadStatus{}
		if _, err := tr.control(i, "GET", wire.PathLoads+"/"+id, nil, &s); err != nil {
			return err
		}
		if s.Finished.IsZero() {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	return s
}

func (tr *tier) load(req wire.LoadRequest) {
	tr.t.Helper()
	for i, w := range tr.workers {
		if w != nil {
			if _, err := tr.control(i, "POST", wire.PathLoads, req, nil); err != nil {
				tr.t.Fatalf("worker %d: %v", i, err)
			}
		}
	}
}

func TestALoadMakesEveryOwnedBlockResidentOnce(t *testing.T) {
	noGoroutines(t)
	files := map[string][]byte{"other/x": content(1000, 99), "shards/empty": nil}
	var total int64
	for i := range 20 {
		n := int64(i) * 500_000
		files[fmt.Sprintf("shards/s%02d", i)] = content(n, byte(i))
		total += n
	}
	tr := newTier(t, files)
	tr.start(3)
	snap := tr.snapshot()
	tr.load(wire.LoadRequest{ID: "warm", Paths: []string{"/shards/**"}})
	var loaded, got int64
	for i := range tr.workers {
		s := tr.waitLoad(i, "warm")
		if !s.Done || s.Resident != s.Total || s.Fetched != s.Total || s.Problem != "" {
			t.Errorf("worker %d: %+v", i, s)
		}
		loaded += s.Total
		got += tr.workers[i].Status().SourceBytes
	}
	if loaded != total || got != total {
		t.Errorf("%d bytes loaded, %d left the source, want %d", loaded, got, total)
	}
	for name, want := range files {
		if len(want) == 0 || strings.HasPrefix(name, "other") {
			continue
		}
		c := tr.dial(tr.owners(snap, "/"+name, 0)[0])
		if p, err := c.file(index(t, snap, "/"+name), int64(len(want)), wire.FlagResidentOnly); err != nil || !bytes.Equal(p, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The same again is the same load; another under its id is refused.
	tr.load(wire.LoadRequest{ID: "warm", Paths: []string{"/shards/**"}})
	if code, err := tr.control(0, "POST", wire.PathLoads, wire.LoadRequest{ID: "warm"}, nil); code != http.StatusConflict {
		t.Errorf("another load of the same id: %d %v", code, err)
	}
	if code, err := tr.control(0, "DELETE", wire.PathLoads+"/warm", nil, nil); err != nil {
		t.Errorf("%d %v", code, err)
	}
	for _, m := range []string{"DELETE", "GET"} {
		if code, _ := tr.control(0, m, wire.PathLoads+"/warm", nil, nil); code != http.StatusNotFound {
			t.Errorf("%s of a load that is gone: %d", m, code)
		}
	}
}

func TestAPatternThatMatchesAFolderLoadsAllInIt(t *testing.T) {
	tr := newTier(t, map[string][]byte{"a/one": content(10, 1), "a/b/two": content(20, 2), "ab": content(40, 3), "c/[x]/three": content(80, 4)})
	tr.start(1)
	tr.snapshot()
	for n, c := range []struct {
		patterns []string
		total    int64
	}{
		{[]string{"/a"}, 30}, {[]string{"/a/"}, 30}, {[]string{"a"}, 30}, {[]string{"/a/**"}, 30}, {[]string{"/a/b", "/ab"}, 60},
		{[]string{"/a*"}, 70}, {[]string{"/a/*"}, 30}, {[]string{"/*/*/t*"}, 100}, {[]string{"/a/one"}, 10}, {[]string{"/"}, 150}, {[]string{"/**"}, 150},
		{[]string{`/c/\[x\]`}, 80}, {[]string{"/{a,c}"}, 110},
	} {
		id := fmt.Sprintf("load-%d", n)
		tr.load(wire.LoadRequest{ID: id, Paths: c.patterns})
		if s := tr.waitLoad(0, id); !s.Done || s.Total != c.total {
			t.Errorf("%q: %d bytes, want %d: %+v", c.patterns, s.Total, c.total, s)
		}
	}
}

func TestALoadOfCopies(t *testing.T) {
	want := content(3*ring.BlockSize, 1)
	tr := newTier(t, map[string][]byte{"f": want})
	tr.start(3)
	snap := tr.snapshot()
	tr.load(wire.LoadRequest{ID: "c", Copies: 2})
	var source, total int64
	for i := range tr.workers {
		s := tr.waitLoad(i, "c")
		if !s.Done {
			t.Errorf("worker %d: %+v", i, s)
		}
		source += tr.workers[i].Status().SourceBytes
		total += s.Resident
	}
	if size := int64(len(want)); source != size || total != 2*size {
		t.Errorf("%d bytes left the source and %d are held; want %d and %d", source, total, size, 2*size)
	}
	for _, i := range tr.owners(snap, "/f", 0)[:2] {
		if _, err := tr.dial(i).file(index(t, snap, "/f"), int64(len(want)), wire.FlagResidentOnly); err != nil {
			t.Errorf("worker %d: %v", i, err)
		}
	}
}

func TestAPinnedLoadIsNotEvicted(t *testing.T) {
	files := map[string][]byte{"pinned": content(2*ring.BlockSize, 1)}
	for i := range 8 {
		files[fmt.Sprintf("other%d", i)] = content(ring.BlockSize, byte(i+2))
	}
	tr := newTier(t, files)
	tr.config = func(_ int, c *Config) { c.Memory = 4*ring.BlockSize + 1<<20 }
	tr.start(1)
	snap := tr.snapshot()
	tr.load(wire.LoadRequest{ID: "p", Paths: []string{"/pinned"}, Pin: true})
	if s := tr.waitLoad(0, "p"); !s.Done {
		t.Fatalf("%+v", s)
	}
	c := tr.dial(0)
	for range 3 {
		for i := range 8 {
			if _, err := c.read(index(t, snap, fmt.Sprintf("/other%d", i)), 0, ring.BlockSize, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := c.file(index(t, snap, "/pinned"), 2*ring.BlockSize, wire.FlagResidentOnly); err != nil {
		t.Errorf("evicted: %v", err)
	}
	if p := tr.workers[0].Status().Pinned; p < 2*ring.BlockSize {
		t.Errorf("%d bytes pinned", p)
	}
	if _, err := tr.control(0, "DELETE", wire.PathLoads+"/p", nil, nil); err != nil {
		t.Fatal(err)
	}
	if p := tr.workers[0].Status().Pinned; p != 0 {
		t.Errorf("%d bytes still pinned after the load was deleted", p)
	}
}

func TestALoadThatDoesNotFitSaysSoAndIsNotDone(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(4*ring.BlockSize, 1)})
	tr.config = func(_ int, c *Config) { c.Memory = 2*ring.BlockSize + 1<<20 }
	tr.start(1)
	tr.snapshot()
	for _, pin := range []bool{false, true} {
		id := fmt.Sprintf("big-%v", pin)
		tr.load(wire.LoadRequest{ID: id, Pin: pin})
		s := tr.waitLoad(0, id)
		if s.Done || !strings.Contains(s.Problem, "memory") || s.Total != 4*ring.BlockSize {
			t.Errorf("pin %v: %+v", pin, s)
		}
		if p := tr.workers[0].Status().Pinned; p != 0 {
			t.Errorf("pin %v: %d bytes stay pinned", pin, p)
		}
	}
	// A worker is added: now it fits for those that share it, if the object moves; with half the files it does.
	tr.load(wire.LoadRequest{ID: "none", Paths: []string{"/nothing/**"}})
	if s := tr.waitLoad(0, "none"); s.Done || !strings.Contains(s.Problem, "/nothing/**") {
		t.Errorf("a pattern that matches nothing: %+v", s)
	}
}

func TestALoadListsWhatFailed(t *testing.T) {
	files := map[string][]byte{}
	for i := range 5 {
		files[fmt.Sprintf("f%d", i)] = content(1000, byte(i))
	}
	tr := newTier(t, files)
	tr.start(1)
	tr.snapshot()
	if err := os.Remove(filepath.Join(tr.root, "f3")); err != nil {
		t.Fatal(err)
	}
	tr.load(wire.LoadRequest{ID: "l"})
	s := tr.waitLoad(0, "l")
	if s.Done || s.FailedFiles != 1 || len(s.Failures) != 1 || s.Failures[0].Path != "/f3" || !strings.Contains(s.Failures[0].Reason, source.Relist) || s.Resident != 4000 || s.Total != 5000 {
		t.Errorf("%+v", s)
	}
}

func TestALoadTriesAgainWhatFailedForAWhile(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(1)
	tr.snapshot()
	var tries atomic.Int64 // a bucket that fails is also probed
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		if tries.Add(1) <= 2 {
			return fmt.Errorf("%w: injected", source.ErrUnavailable)
		}
		return nil
	})
	tr.load(wire.LoadRequest{ID: "l"})
	if s := tr.waitLoad(0, "l"); !s.Done || len(s.Failures) != 0 || s.FailedFiles != 0 {
		t.Errorf("%+v", s)
	}
}

// What is pinned is promised until the load is deleted: a bucket that refuses for longer than a load tries must not end it.
func TestALoadThatPinsIsTriedAgainAfterItFailed(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(1)
	tr.snapshot()
	tr.gates[0].set(func(context.Context, source.Object, int64) error { return source.ErrThrottled })
	for _, pin := range []bool{true, false} {
		tr.load(wire.LoadRequest{ID: fmt.Sprint("pin-", pin), Pin: pin})
		if s := tr.waitLoad(0, fmt.Sprint("pin-", pin)); s.Done || s.FailedFiles != 1 {
			t.Errorf("%+v", s)
		}
	}
	gets, _ := tr.gates[0].counts()
	eventually(t, "it is tried again, and stays finished", func() error {
		s, err := tr.workers[0].loads.get("pin-true")
		if err != nil || s.Done || s.Finished.IsZero() {
			t.Fatalf("%+v, %v", s, err)
		}
		if now, _ := tr.gates[0].counts(); now == gets {
			return errors.New("nobody asks the bucket")
		}
		return nil
	})
	tr.gates[0].set(nil)
	eventually(t, "it is done", func() error {
		if s, err := tr.workers[0].loads.get("pin-true"); err != nil || !s.Done || s.Resident != 1000 || s.FailedFiles != 0 || s.Problem != "" {
			return fmt.Errorf("%+v, %v", s, err)
		}
		return nil
	})
	if s, err := tr.workers[0].loads.get("pin-false"); err != nil || s.Done {
		t.Errorf("a load that failed and pins nothing: %+v, %v", s, err)
	}
}

// A snapshot that all workers have lost is not waited for without end.
func TestALoadOfASnapshotThatNobodyHoldsSaysSo(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(2)
	tr.snapshot()
	tr.load(wire.LoadRequest{ID: "old", Snapshot: strings.Repeat("ab", 32), Pin: true})
	for i := range tr.workers {
		if s := tr.waitLoad(i, "old"); s.Done || !strings.Contains(s.Problem, "abababababab") || !strings.Contains(s.Problem, "load the current one") || !s.Lost {
			t.Errorf("worker %d: %+v", i, s)
		}
	}
}

func TestALoadFollowsTheMembership(t *testing.T) {
	files := map[string][]byte{}
	var total int64
	for i := range 40 {
		files[fmt.Sprintf("f%d", i)] = content(10_000, byte(i))
		total += 10_000
	}
	tr := newTier(t, files)
	tr.start(2)
	tr.snapshot()
	tr.load(wire.LoadRequest{ID: "l", Pin: true})
	for i := range tr.workers {
		if s := tr.waitLoad(i, "l"); !s.Done {
			t.Fatalf("worker %d: %+v", i, s)
		}
	}
	tr.stop(1)
	tr.setMembers()
	eventually(t, "the last worker holds and pins everything", func() error {
		var s wire.LoadStatus
		if _, err := tr.control(0, "GET", wire.PathLoads+"/l", nil, &s); err != nil {
			return err
		}
		if !s.Done || s.Resident != total || tr.workers[0].Status().Pinned < total {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	// One is added: the first pins its share only.
	tr.add(1)
	tr.setMembers()
	eventually(t, "the share of the first fell", func() error {
		var s wire.LoadStatus
		if _, err := tr.control(0, "GET", wire.PathLoads+"/l", nil, &s); err != nil {
			return err
		}
		if !s.Done || s.Total >= total || s.Total == 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// TestALoadBeforeTheMembershipIsNotDone: a worker that is not in the list owns nothing, which is no success.
func TestALoadBeforeTheMembershipIsNotDone(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.add(0)
	if _, err := tr.control(0, "POST", wire.PathLoads, wire.LoadRequest{ID: "l"}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it says what it waits for", func() error {
		var s wire.LoadStatus
		if _, err := tr.control(0, "GET", wire.PathLoads+"/l", nil, &s); err != nil {
			return err
		}
		if s.Done || !s.Finished.IsZero() {
			t.Fatalf("%+v", s)
		}
		if !strings.Contains(s.Problem, "membership") {
			return errors.New(s.Problem)
		}
		return nil
	})
	tr.setMembers()
	if s := tr.waitLoad(0, "l"); !s.Done || s.Resident != 1000 {
		t.Errorf("%+v", s)
	}
}

func TestALoadIsCancelledByDelete(t *testing.T) {
	noGoroutines(t)
	tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
	tr.start(1)
	tr.snapshot()
	began := make(chan struct{}, 16)
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		began <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	tr.load(wire.LoadRequest{ID: "l", Pin: true})
	<-began
	if _, err := tr.control(0, "DELETE", wire.PathLoads+"/l", nil, nil); err != nil {
		t.Fatal(err)
	}
	if s := tr.workers[0].Status(); s.Pinned != 0 {
		t.Errorf("%d bytes still pinned", s.Pinned)
	}
}

// trickling is a source whose bodies come a byte at a time, whenever the test lets one.
type trickling struct {
	source.Source
	next <-chan struct{}
}

func (s trickling) Get(ctx context.Context, o source.Object, off, n int64) (source.Body, error) {
	b, err := s.Source.Get(ctx, o, off, n)
	if err == nil {
		b.ReadCloser = &trickle{b.ReadCloser, ctx, s.next}
	}
	return b, err
}

type trickle struct {
	io.ReadCloser
	ctx  context.Context
	next <-chan struct{}
}

func (r *trickle) Read(p []byte) (int, error) {
	select {
	case <-r.next:
		return r.ReadCloser.Read(p[:1])
	case <-r.ctx.Done():
		return 0, r.ctx.Err()
	}
}

// A bucket that falls silent within a block is given up, and so is one that goes on when its load is deleted or its
// worker stops.
func TestWhatEndsAFillThatIsSlow(t *testing.T) {
	for name, end := range map[string]func(*tier){
		"silence": func(tr *tier) {
			s := tr.waitLoad(0, "l")
			if s.Done || len(s.Failures) != 1 || !strings.Contains(s.Failures[0].Reason, "sent next to nothing") {
				tr.t.Errorf("%+v", s)
			}
		},
		"the load is deleted": func(tr *tier) {
			if _, err := tr.control(0, "DELETE", wire.PathLoads+"/l", nil, nil); err != nil {
				tr.t.Error(err)
			}
		},
		"the membership is replaced": func(tr *tier) {
			gets, _ := tr.gates[0].counts()
			tr.setMembers()
			eventually(tr.t, "it is asked for anew", func() error {
				if now, _ := tr.gates[0].counts(); now == gets {
					return errors.New("not yet")
				}
				return nil
			})
		},
		"the worker stops": func(*tier) {},
	} {
		t.Run(name, func(t *testing.T) {
			noGoroutines(t)
			tr := newTier(t, map[string][]byte{"f": content(1000, 1)})
			g, next := &gate{}, make(chan struct{})
			tr.deps = func(int) Deps {
				return Deps{OpenSource: func(ctx context.Context, c source.Config) (*scheme.Source, error) {
					s, err := scheme.Open(ctx, c)
					if err != nil {
						return nil, err
					}
					return &scheme.Source{Source: gated{trickling{s, next}, g}, Meter: s.Meter}, nil
				}}
			}
			tr.start(1)
			tr.gates[0] = g
			tr.workers[0].sourceTimeout = patience
			if name == "silence" {
				tr.workers[0].sourceTimeout = time.Second
			}
			tr.snapshot()
			tr.load(wire.LoadRequest{ID: "l"})
			for range 2 {
				select {
				case next <- struct{}{}:
				case <-time.After(patience):
					t.Fatal("nobody reads")
				}
			}
			end(tr)
			tr.stop(0)
		})
	}
}

// A load has the more requests under way the sooner blocks are here, within bounds.
func TestALoadHasFewerRequestsUnderWayWhereBlocksTakeLong(t *testing.T) {
	p := newPlaces()
	free := func(want int) {
		t.Helper()
		if p.n != want || len(p.free) != want {
			t.Errorf("%d requests may be under way and %d begin, want %d", p.n, len(p.free), want)
		}
	}
	free(firstFills)
	for _, c := range []struct {
		pace  time.Duration
		times int
		want  int
	}{
		{slowBlock + 1, 3, firstFills - 3}, {slowBlock, 1, firstFills - 2}, {time.Hour, loadFills, leastFills}, {0, loadFills, loadFills}, {0, 1, loadFills},
		{time.Hour, 1, loadFills - 1},
	} {
		for range c.times {
			<-p.free
			p.leave(c.pace)
		}
		free(c.want)
	}
}

func TestFailedFilesFitIntoAnAnswer(t *testing.T) {
	for name, want := range map[string]int{"/a": maxFailures, "/" + strings.Repeat("\xff", 4000): 3} {
		s := wire.LoadStatus{ID: strings.Repeat("i", maxLoadID)}
		for range 2 * maxFailures {
			s.Failures = withFailure(s.Failures, wire.LoadFailure{Path: name, Quoted: wire.Quoted(name), Reason: strconv.Quote(name) + " is not there"})
		}
		text, err := json.Marshal(s)
		if err != nil || len(s.Failures) < want || len(text) > wire.MaxControl {
			t.Errorf("%.9q: %d failed files in %d bytes, %v", name, len(s.Failures), len(text), err)
		}
	}
}

func TestLoadRequestsThatAreWrong(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": nil})
	tr.start(1)
	for name, r := range map[string]any{
		"no id":         wire.LoadRequest{},
		"slash in id":   wire.LoadRequest{ID: "a/b"},
		"long id":       wire.LoadRequest{ID: strings.Repeat("x", 300)},
		"bad pattern":   wire.LoadRequest{ID: "a", Paths: []string{"/[a"}},
		"endless":       wire.LoadRequest{ID: "a", Paths: []string{"/**/" + strings.Repeat("{,}", 40) + "x"}},
		"bad snapshot":  wire.LoadRequest{ID: "a", Snapshot: "zz"},
		"bad copies":    wire.LoadRequest{ID: "a", Copies: -1},
		"unknown field": map[string]any{"id": "a", "path": "/x"},
		"not an object": "hello",
	} {
		if code, err := tr.control(0, "POST", wire.PathLoads, r, nil); code != http.StatusBadRequest || err == nil {
			t.Errorf("%s: %d %v", name, code, err)
		}
	}
}

func TestControlNeedsTheControlKey(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": nil})
	tr.start(1)
	tr.snapshot()
	for _, path := range []string{wire.PathStatus, wire.PathLoads + "/none"} {
		if code, _ := tr.get(0, path); code != http.StatusUnauthorized {
			t.Errorf("%s unsigned: %d", path, code)
		}
		if code, _ := tr.controlWith(0, tr.keys.Read[0], "GET", path, nil, nil); code != http.StatusUnauthorized {
			t.Errorf("%s with the read key: %d", path, code)
		}
		if code, err := tr.control(0, "GET", path, nil, nil); code != http.StatusOK && code != http.StatusNotFound {
			t.Errorf("%s: %d %v", path, code, err)
		}
	}
	if code, text := tr.get(0, wire.PathMetrics); code != http.StatusOK || !strings.Contains(text, "stepcache_store_quota_bytes") || !strings.Contains(text, "stepcache_source_requests_total") {
		t.Errorf("metrics: %d %s", code, text)
	}
	// A request that was seen on the way is not served again.
	req, err := http.NewRequest("POST", "http://"+tr.workers[0].ControlAddr().String()+wire.PathLoads, strings.NewReader(`{"id":"x"}`))
	if err != nil {
		t.Fatal(err)
	}
	if err := wire.SignRequest(req, tr.keys.Control[0], "w0", quick{}.Now()); err != nil {
		t.Fatal(err)
	}
	for n, want := range []int{http.StatusOK, http.StatusUnauthorized} {
		req.Body, err = req.GetBody()
		if err != nil {
			t.Fatal(err)
		}
		c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("sent %d times: %d, want %d", n+1, resp.StatusCode, want)
		}
	}
}

func TestConfigThatIsWrongNamesEveryField(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.json")
	write := func(s string) error {
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := LoadConfig(path, nil)
		return err
	}
	err := write(`{"copies":-1,"mounts":[{"url":"s3://b/p","path":"a"},{"url":"nfs://x","path":"/a"},{"url":"s3://c","path":"/a/b"}]}`)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"dataset", "id is", "memory", "dir is", "keysDir", "listen", "control", "copies", "mounts[0]", "mounts[1]", "overlap"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not named in: %v", want, err)
		}
	}
	if err := write(`{"mesurements":1}`); err == nil || !strings.Contains(err.Error(), "mesurements") {
		t.Errorf("unknown field: %v", err)
	}
	if err := write(`{"dataset":"a/b","id":"w","memory":8388608,"dir":"/d","keysDir":"/k","listen":":0","control":":0","refresh":"10m","mounts":[{"url":"s3://b","path":"/","endpoint":"http://x:1"}]}`); err != nil {
		t.Errorf("a good one: %v", err)
	}
	back := `{"dataset":"a/b","id":"w","memory":8388608,"dir":"/d","keysDir":"/k","listen":":0","control":":0","mounts":[{"url":"s3://b","path":"/","endpoint":"http://x:1"}],
		"gateway":{"listen":":0","bucket":"b","credentials":"/c"},"write":{"policy":"Back","copies":%s}}`
	if err := write(fmt.Sprintf(back, "2")); err != nil {
		t.Errorf("write.policy Back: %v", err)
	}
	if err := write(strings.Replace(fmt.Sprintf(back, "2"), "8388608", "4194304", 1)); err == nil || !strings.Contains(err.Error(), "write.maxUnflushed") {
		t.Errorf("write.policy Back without the memory for it: %v", err)
	}
	if err := write(fmt.Sprintf(back, "1")); err == nil || !strings.Contains(err.Error(), "write.copies") {
		t.Errorf("one copy: %v", err)
	}
	if err := write(strings.Replace(fmt.Sprintf(back, "2"), "Back", "Sometimes", 1)); err == nil || !strings.Contains(err.Error(), "Through or Back") {
		t.Errorf("another policy: %v", err)
	}
	gateway := `{"dataset":"a/b","id":"w","memory":8388608,"dir":"/d","keysDir":"/k","listen":":0","control":":0","mounts":[{"url":"s3://b","path":"/","endpoint":"http://x:1"}],
		"gateway":{"listen":":0","bucket":"b","credentials":"/c","domains":["s3.example.org","%s"]}}`
	if err := write(fmt.Sprintf(gateway, "localhost")); err != nil {
		t.Errorf("domains: %v", err)
	}
	if err := write(fmt.Sprintf(gateway, "*.example.org")); err == nil || !strings.Contains(err.Error(), "gateway.domains[1]") {
		t.Errorf("a domain with a wildcard: %v", err)
	}
	if _, err := LoadConfig(path+"x", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// What a load brings in goes before what was read often: it is what will be read next.
func TestALoadGoesBeforeWhatWasReadOften(t *testing.T) {
	files := map[string][]byte{}
	for i := range 60 {
		files[fmt.Sprintf("old/f%02d", i)] = content(256<<10, byte(i))
		if i < 40 {
			files[fmt.Sprintf("new/f%02d", i)] = content(256<<10, byte(100+i))
		}
	}
	tr := newTier(t, files)
	tr.config = func(_ int, c *Config) { c.Memory = 16 << 20 }
	tr.start(1)
	snap := tr.snapshot()
	c := tr.dial(0)
	for range 8 {
		for i := range 60 {
			if _, err := c.file(index(t, snap, fmt.Sprintf("/old/f%02d", i)), 256<<10, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	before, _ := tr.gates[0].counts()
	for _, path := range []string{"/new/**", "/old/f0*"} { // the second finds what the first left
		id := strings.Trim(path, "/*")[:3]
		if _, err := tr.control(0, http.MethodPost, wire.PathLoads, wire.LoadRequest{ID: id, Paths: []string{path}}, nil); err != nil {
			t.Fatal(err)
		}
		if st := tr.waitLoad(0, id); !st.Done || st.Resident != st.Total || st.Problem != "" {
			t.Errorf("%+v", st)
		}
		if id == "new" {
			if gets, _ := tr.gates[0].counts(); gets-before != 40 {
				t.Errorf("40 files were fetched %d times", gets-before)
			}
			for i := range 40 { // and they are kept when the load is over
				if _, err := c.read(index(t, snap, fmt.Sprintf("/new/f%02d", i)), 0, 256<<10, wire.FlagResidentOnly); err != nil {
					t.Error(err)
				}
			}
		}
	}
	if st := tr.workers[0].store.Stats(); st.Pinned != 0 || st.Used > st.Quota {
		t.Errorf("%d bytes are pinned, %d of %d used", st.Pinned, st.Used, st.Quota)
	}
	// A load that pins finds room, although another is under way and holds it.
	hold := make(chan struct{})
	tr.gates[0].set(func(ctx context.Context, o source.Object, off int64) error {
		if strings.HasPrefix(o.Key, "new/") {
			select {
			case <-hold:
			case <-ctx.Done():
			}
		}
		return nil
	})
	if _, err := tr.control(0, http.MethodDelete, wire.PathLoads+"/new", nil, nil); err != nil {
		t.Fatal(err)
	}
	r, _ := snap.Ring(index(t, snap, "/new/f00"))
	tr.workers[0].store.Drop(r)
	if _, err := tr.control(0, http.MethodPost, wire.PathLoads, wire.LoadRequest{ID: "held", Paths: []string{"/new/**"}}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the load holds what it brings in", func() error {
		if p := tr.workers[0].store.Stats().Pinned; p < 40*256<<10 {
			return fmt.Errorf("%d bytes", p)
		}
		return nil
	})
	if _, err := tr.control(0, http.MethodPost, wire.PathLoads, wire.LoadRequest{ID: "pin", Paths: []string{"/old/f[0-3]*"}, Pin: true}, nil); err != nil {
		t.Fatal(err)
	}
	if st := tr.waitLoad(0, "pin"); !st.Done {
		t.Errorf("%+v", st)
	}
	close(hold)
}

// The control endpoint takes so many connections and no more, and takes others once some are closed.
func TestControlConnectionsAreLimited(t *testing.T) {
	tr := newTier(t, map[string][]byte{"f": nil})
	tr.start(1)
	addr := tr.workers[0].ControlAddr().String()
	// ask makes one request on a connection that stays open; nil when it is refused.
	ask := func() net.Conn {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		if _, err = io.WriteString(c, "GET "+wire.PathHealth+" HTTP/1.1\r\nHost: x\r\n\r\n"); err == nil {
			_, err = http.ReadResponse(bufio.NewReader(c), nil)
		}
		if err != nil {
			c.Close()
			return nil
		}
		return c
	}
	before := tr.workers[0].counts.refused.Load()
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for c := ask(); c != nil; c = ask() {
		if open = append(open, c); len(open) > maxControlConns {
			t.Fatalf("%d connections are open", len(open))
		}
	}
	// Connections of the test's own requests may have been among them.
	if len(open) < maxControlConns/2 || tr.workers[0].counts.refused.Load() == before {
		t.Errorf("refused with %d connections open", len(open))
	}
	open[0].Close()
	eventually(t, "a connection is taken once another is closed", func() error {
		c := ask()
		if c == nil {
			return errors.New("refused")
		}
		open = append(open, c)
		return nil
	})
}
