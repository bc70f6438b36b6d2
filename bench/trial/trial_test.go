package trial

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// The test binary is also a reader, and a file system that never answers.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("STEPCACHE_TEST_READER") != "":
		if err := Read(context.Background(), os.Stdin, os.Stdout); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		return
	case os.Getenv("STEPCACHE_TEST_SILENT") != "":
		silent(os.Args[len(os.Args)-1])
		return
	}
	os.Exit(m.Run())
}

// silent mounts a FUSE file system and answers nothing.
func silent(dir string) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR, 0)
	if err == nil {
		err = unix.Mount("silent", dir, "fuse", 0, "fd="+itoa(fd)+",rootmode=40000,user_id=0,group_id=0")
	}
	if err != nil {
		os.Stderr.WriteString(err.Error())
		os.Exit(1)
	}
	select {}
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

// data is a folder with two files.
func data(t *testing.T) *Data {
	t.Helper()
	dir := t.TempDir()
	d := &Data{Native: dir}
	for k, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(dir, name), access.Noise(9000, uint64(k)), 0o644); err != nil {
			t.Fatal(err)
		}
		d.Files = append(d.Files, access.File{Path: name, Size: 9000})
	}
	return d
}

func newTrial(t *testing.T, patience time.Duration) *trial {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("STEPCACHE_TEST_READER", "1")
	return &trial{o: Options{Reader: []string{self}, Patience: patience, Log: io.Discard}, began: time.Now(), hung: map[string]bool{}, originals: map[string]string{},
		checked: map[string]bool{}, report: &Report{}}
}

// liar is a contender whose bytes are not those of the originals.
type liar struct{ folder }

func (l *liar) name() string                                  { return "liar" }
func (l *liar) version(context.Context) string                { return "1" }
func (l *liar) fresh(context.Context, *Data) (session, error) { return l, nil }

// Wrong bytes of a contender take its figures away, and are told.
func TestWrongBytes(t *testing.T) {
	tr := newTrial(t, time.Minute)
	d := data(t)
	other := t.TempDir()
	for _, f := range d.Files {
		if err := os.WriteFile(filepath.Join(other, f.Path), access.Noise(9000, 7), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	row := &Row{Section: "s", Name: "read", Unit: PerSecond, Kind: Any}
	s := &section{name: "s", data: d, rounds: 1, rows: []*Row{row}}
	s.run = func(ctx context.Context, v *visit) error {
		do := &doing{ctx: ctx, v: v}
		do.fresh("read", 1, Job{Op: opSmall, Files: d.Files, Readers: 2, Whole: true})
		do.check(2)
		return do.err
	}
	for _, c := range []contender{nativeFiles{}, &liar{folder{dir: other}}} {
		_ = tr.visit(t.Context(), s, c)
	}
	tr.report.Rows = s.rows
	tr.report.Contenders = []Contender{{Name: Native}, {Name: "liar"}}
	f := row.Figures["liar"]
	if f == nil || !f.Wrong || len(f.Samples) > 0 || !strings.Contains(f.Reason, "WRONG BYTES") {
		t.Errorf("the liar's figure: %+v", f)
	}
	if n := row.Figures[Native]; n == nil || len(n.Samples) != 1 || n.Failed {
		t.Errorf("the native figure: %+v", n)
	}
	var text bytes.Buffer
	if err := tr.report.Print(&text); err != nil || !strings.Contains(text.String(), "WRONG BYTES") {
		t.Errorf("%v, said %s", err, &text)
	}
}

// stuck is a contender whose mounts never answer. They are given time to come, since one that does not is a hang too;
// what reads them takes all that it is given.
type stuck struct {
	dir string
	t   *trial
}

func (s *stuck) name() string                   { return "stuck" }
func (s *stuck) version(context.Context) string { return "1" }
func (s *stuck) fresh(context.Context, *Data) (session, error) {
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		return nil, err
	}
	s.t.o.Patience = time.Minute
	return &stuckSession{peerSession{&mounts{scratch: s.dir, command: func(dir string, _ int) *exec.Cmd {
		self, _ := os.Executable()
		cmd := exec.Command(self, dir)
		cmd.Env = []string{"STEPCACHE_TEST_SILENT=1"}
		return cmd
	}}}, s.t}, nil
}

type stuckSession struct {
	peerSession
	t *trial
}

func (s *stuckSession) mount(ctx context.Context, n int) error {
	err := s.peerSession.mount(ctx, n)
	if err == nil {
		s.t.o.Patience = 5 * time.Second
	}
	return err
}

// A mount that never answers is given up, taken away, and not asked again.
func TestSilentMount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse: ", err)
	}
	tr := newTrial(t, time.Minute)
	dir, err := mountinfo.Resolve(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	d := data(t)
	s := &section{name: "s", data: d, rounds: 1, rows: []*Row{{Section: "s", Name: "read", Unit: PerSecond, Kind: Any},
		{Section: "s", Name: "again", Unit: PerSecond, Kind: Any}, {Section: "s", Name: "and again", Unit: PerSecond, Kind: Any}}}
	s.run = func(ctx context.Context, v *visit) error {
		do := &doing{ctx: ctx, v: v}
		for _, r := range s.rows {
			do.fresh(r.Name, 2, Job{Op: opSmall, Files: d.Files, Readers: 2, Whole: true})
		}
		return do.err
	}
	tr.o.Mounts = true
	c := &stuck{filepath.Join(dir, "s"), tr}
	err = tr.visit(t.Context(), s, c)
	if !isHang(err) || !strings.Contains(err.Error(), "no end after 5s") {
		t.Errorf("a mount that never answers: %v", err)
	}
	if below, err := mountinfo.Below(dir); err != nil || len(below) > 0 {
		t.Errorf("left %v (%v)", below, err)
	}
	d.Bucket = &Bucket{}
	if why := tr.cannot(c, s); !strings.Contains(why, "hung") {
		t.Errorf("it is asked again: %q", why)
	}
	for _, r := range s.rows { // of the third, too, which was not asked for
		if f := r.Figures["stuck"]; f == nil || !f.Failed || f.Reason == "" {
			t.Errorf("its figure: %+v", f)
		}
	}
}

// A program that mounts nothing is told with what it said.
func TestNoMount(t *testing.T) {
	tr := newTrial(t, time.Minute)
	m := &mounts{scratch: t.TempDir(), command: func(string, int) *exec.Cmd {
		return exec.Command("sh", "-c", "echo no such bucket; exit 3")
	}}
	v := &visit{t: tr, at: &peerSession{m}}
	err := v.mount(t.Context(), 1)
	v.close()
	if err == nil || !strings.Contains(err.Error(), "no such bucket") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("%v", err)
	}
}

// Who needs time before a mount anew may be told of its cache is given it, and is not mounted anew without.
func TestSettle(t *testing.T) {
	m := &mounts{scratch: t.TempDir(), settle: time.Hour, command: func(string, int) *exec.Cmd { return exec.Command("sleep", "600") }}
	defer m.unmount()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrClosedPipe)
	if err := m.mount(ctx, 1); !errors.Is(err, io.ErrClosedPipe) || len(m.processes) != 1 {
		t.Fatalf("the first mount: %v, %d processes", err, len(m.processes))
	}
	before := m.pids()
	if err := m.mount(ctx, 1); !errors.Is(err, io.ErrClosedPipe) || !slices.Equal(m.pids(), before) {
		t.Errorf("a mount anew: %v, processes %v, were %v", err, m.pids(), before)
	}
}

// A row that is said to be warm tells what left the bucket all the same.
func TestWarmRowThatFetches(t *testing.T) {
	for _, c := range []struct {
		kind       Kind
		bytes, get float64
		want       string
	}{
		{Cold, 0, -1, "0.00 ×"}, {Warm, 0, -1, "-"}, {Warm, 0.04, 0.04, "-"}, {Warm, 1, -1, "1.00 ×"}, {Warm, 0.01, 2.04, "0.01 ×; 2.04"}, {Warm, -1, -1, "-"},
	} {
		f := &Figure{Samples: []float64{1}, LeftBucket: c.bytes, Requests: c.get}
		if got := f.bucket(&Row{Kind: c.kind}); got != c.want {
			t.Errorf("%s, %v of the bytes, %v requests: %q, want %q", c.kind, c.bytes, c.get, got, c.want)
		}
	}
}

// Each operation tells what it read.
func TestJobs(t *testing.T) {
	d := data(t)
	for _, c := range []struct {
		job          Job
		count, bytes int64
	}{
		{Job{Op: opSequential, Readers: 3}, 3, 27000},
		{Job{Op: opRandom, Piece: 4096, Count: 100}, 100, 409600},
		{Job{Op: opSmall, Readers: 2, Whole: true}, 2, 18000},
		{Job{Op: opSmall, Readers: 1}, 2, 8192},
		{Job{Op: opOpenStat}, 2, 0},
		{Job{Op: opWalk, Entries: 2}, 2, 0},
		{Job{Op: opDigest, Readers: 2}, 2, 18000},
		{Job{Op: opHash, Readers: 4, Tool: "sha256sum"}, 4, 36000},
	} {
		c.job.Dirs, c.job.Files = []string{d.Native}, d.Files
		text, err := json.Marshal(c.job)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := Read(t.Context(), bytes.NewReader(text), &out); err != nil {
			t.Errorf("%s: %v", c.job.Op, err)
			continue
		}
		var done Done
		if err := json.Unmarshal(out.Bytes(), &done); err != nil || done.Count != c.count || done.Bytes != c.bytes || done.Took <= 0 {
			t.Errorf("%s: %+v %v, want %d of %d bytes", c.job.Op, done, err, c.count, c.bytes)
		}
		if digests := map[string]int{opDigest: 1, opHash: 1}[c.job.Op]; len(done.Digests) != digests {
			t.Errorf("%s: digests %q", c.job.Op, done.Digests)
		}
	}
}

// What comes short or is not there is an error, not a figure.
func TestBadJobs(t *testing.T) {
	d := data(t)
	for _, c := range []struct{ job, says string }{
		{"", "EOF"},
		{`{"op":"walk"}`, "nowhere"},
		{`{"op":"small","dirs":["/"]}`, "no files"},
		{`{"op":"dance","dirs":["DIR"],"files":[{"path":"a","size":9000}]}`, "dance"},
		{`{"op":"sequential","dirs":["DIR"],"files":[{"path":"a","size":9001}]}`, "9000 bytes of 9001"},
		{`{"op":"small","whole":true,"dirs":["DIR"],"files":[{"path":"a","size":9001}]}`, "9000 bytes of 9001"},
		{`{"op":"random","piece":65536,"count":1,"dirs":["DIR"],"files":[{"path":"a","size":9000}]}`, "less than a piece"},
		{`{"op":"open-stat","dirs":["DIR"],"files":[{"path":"a","size":1}]}`, "instead of 1"},
		{`{"op":"walk","entries":3,"dirs":["DIR"]}`, "2 entries instead of 3"},
		{`{"op":"hash","tool":"sha256sum","dirs":["DIR"],"files":[{"path":"c","size":1}]}`, "sha256sum"},
		{`{"op":"digest","dirs":["DIR"],"files":[{"path":"c","size":1}]}`, "no such file"},
	} {
		err := Read(t.Context(), strings.NewReader(strings.ReplaceAll(c.job, "DIR", d.Native)), &bytes.Buffer{})
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", c.job, err, c.says)
		}
	}
}

// Ratios are taken round by round, and of times less is better.
func TestRatios(t *testing.T) {
	rep := &Report{Contenders: []Contender{{Name: Native}, {Name: Own}, {Name: "rclone"}, {Name: "s3fs"}}, Rows: []*Row{
		{Section: "a", Name: "warm", Unit: BytesPerSecond, Kind: Warm, Figures: map[string]*Figure{
			Native: {Samples: []float64{10, 20, 30}}, Own: {Samples: []float64{20, 20, 15}}, "rclone": {Samples: []float64{5, 4}}}},
		{Section: "a", Name: "pods", Unit: Seconds, Kind: Any, Figures: map[string]*Figure{
			Own: {Samples: []float64{2}}, "rclone": {Samples: []float64{30}}, "s3fs": {Samples: []float64{20}}}},
	}}
	if s, ok := rep.Ratio(rep.Rows[0], Own); !ok || s != (host.Spread{Median: 1, Min: 0.5, Max: 2}) {
		t.Errorf("ratio by rounds: %+v", s)
	}
	if s, ok := rep.Ratio(rep.Rows[0], "rclone"); !ok || s != (host.Spread{Median: 4.5 / 20, Min: 4.0 / 20, Max: 5.0 / 20}) {
		t.Errorf("ratio of medians: %+v", s)
	}
	if x, peer, ok := rep.BestPeer(rep.Rows[1]); !ok || x != 10 || peer != "s3fs" {
		t.Errorf("best peer by time: %v %s", x, peer)
	}
	if x, peer, _ := rep.BestPeer(rep.Rows[0]); x != 20/4.5 || peer != "rclone" {
		t.Errorf("best peer by rate: %v %s", x, peer)
	}
	var names []string
	for _, c := range []string{Native, Direct, Own} {
		for _, k := range []Kind{Cold, Warm, Any} {
			if (&Row{Kind: k}).wants(c) {
				names = append(names, c+" "+string(k))
			}
		}
	}
	if want := []string{"native warm", "native any", "direct cold", "direct any", "stepcache cold", "stepcache warm", "stepcache any"}; !slices.Equal(names, want) {
		t.Errorf("rows: %q", names)
	}
}

// What is left takes as long as what was measured: of the same section, or where nothing was, of all.
func TestTimeLeft(t *testing.T) {
	p := progress{sections: []sectionProgress{{planned: 6, first: 2}, {planned: 2, first: 1}}}
	if _, ok := p.left(time.Hour); ok {
		t.Error("it knows before anything was measured")
	}
	p.sections[0].made, p.sections[0].took = 3, 30*time.Second
	for budget, want := range map[time.Duration]time.Duration{
		time.Hour:        50 * time.Second, // all of both sections
		20 * time.Second: 20 * time.Second, // more is not begun
		-time.Second:     10 * time.Second, // but each section once
	} {
		if left, ok := p.left(budget); !ok || left != want {
			t.Errorf("half of one section, nothing of the other, %s of the budget: %s, want %s", budget, left, want)
		}
	}
	p.sections[0].planned = 3
	p.sections[1].made, p.sections[1].took = 1, time.Minute
	if left, _ := p.left(time.Hour); left != time.Minute {
		t.Errorf("one visit left: %s", left)
	}
	p.sections[1].made, p.sections[1].took = 2, 2*time.Minute
	if left, _ := p.left(time.Hour); left != 0 {
		t.Errorf("none left: %s", left)
	}
}

// Every row is measured once, and again while the budget lasts; other projects are asked no more without it.
func TestBudget(t *testing.T) {
	d := data(t)
	d.Bucket = &Bucket{}
	for budget, want := range map[time.Duration]int{1: 1, time.Hour: 3} {
		tr := newTrial(t, time.Minute)
		tr.o.Budget, tr.o.Mounts = budget, true
		var sections []*section
		for _, name := range []string{"s", "t"} {
			s := &section{name: name, data: d, rounds: 3, rows: []*Row{{Section: name, Name: "read", Unit: PerSecond, Kind: Any}}}
			s.run = func(ctx context.Context, v *visit) error {
				do := &doing{ctx: ctx, v: v}
				do.fresh("read", 1, Job{Op: opSmall, Files: d.Files, Readers: 1, Whole: true})
				return do.err
			}
			sections = append(sections, s)
		}
		told := 0
		tr.o.Each = func(rep *Report) { told++ }
		other := &peer{program: "other", path: "/nonexistent/other", command: rclone}
		if err := tr.measure(t.Context(), sections, []contender{nativeFiles{}, other}); err != nil {
			t.Fatal(err)
		}
		asked := 0
		for _, s := range sections {
			if n := len(s.rows[0].of(Native).Samples); n != want {
				t.Errorf("a budget of %s: %d samples, want %d", budget, n, want)
			}
			f := s.rows[0].of("other")
			if f.Failed {
				asked += 3
			} else if !strings.Contains(f.Reason, "no time was left of the 1ns") {
				t.Errorf("a budget of %s: the other project: %+v", budget, f)
			}
		}
		if asked += 2 * want; told != asked || budget == 1 && asked != 2 {
			t.Errorf("a budget of %s: %d turns told, want %d", budget, told, asked)
		}
	}
}

// flaky is a contender that reads other files than those that are there, when told so.
type flaky struct {
	folder
	made int
}

func (f *flaky) name() string                   { return "flaky" }
func (f *flaky) version(context.Context) string { return "1" }
func (f *flaky) fresh(context.Context, *Data) (session, error) {
	f.made++
	return f, nil
}

// A reading that fails costs its own row: the next begins with nothing cached, and fills the cache where it is of
// what is cached.
func TestFailedReading(t *testing.T) {
	tr := newTrial(t, time.Minute)
	d := data(t)
	read := Job{Op: opSmall, Files: d.Files, Readers: 2, Whole: true}
	bad := Job{Op: opSmall, Files: []access.File{{Path: "missing", Size: 1}}, Readers: 1, Whole: true}
	for _, c := range []struct {
		name       string
		cold, warm Job
		failed     string
		made       int
	}{
		{"all is well", read, read, "", 1},
		{"cold", bad, read, "cold", 2},
		{"warm", read, bad, "warm", 2},
	} {
		f := &flaky{folder: folder{dir: d.Native}}
		s := &section{name: c.name, data: d, rounds: 1}
		for _, name := range []string{"cold", "warm", "again"} {
			s.rows = append(s.rows, &Row{Section: c.name, Name: name, Unit: PerSecond, Kind: Any})
		}
		fill := read
		s.run = func(ctx context.Context, v *visit) error {
			do := &doing{ctx: ctx, v: v}
			do.fresh("cold", 1, c.cold)
			do.warm(fill)
			do.anew("warm", c.warm)
			do.here("again", read)
			if !do.filled || do.v.at == nil {
				t.Errorf("%s: the last reading was of an empty cache", c.name)
			}
			return do.err
		}
		if err := tr.visit(t.Context(), s, f); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		for _, r := range s.rows {
			got := r.of("flaky")
			if failed := r.Name == c.failed; got.Failed != failed || (len(got.Samples) == 1) == failed || strings.Contains(got.Reason, "missing") != failed {
				t.Errorf("%s: %s: %+v", c.name, r.Name, got)
			}
		}
		if f.made != c.made {
			t.Errorf("%s: begun %d times, want %d", c.name, f.made, c.made)
		}
	}
}

// small is a contender whose cache has room for so many bytes.
type small struct {
	folder
	holds int64
}

func (s *small) name() string                                  { return "small" }
func (s *small) version(context.Context) string                { return "1" }
func (s *small) fresh(context.Context, *Data) (session, error) { return s, nil }
func (s *small) room() int64                                   { return s.holds }

// A row has no warm figure of what the cache does not hold, but a reason.
func TestWarmRowThatDoesNotFit(t *testing.T) {
	tr := newTrial(t, time.Minute)
	d := data(t)
	read := Job{Op: opSmall, Files: d.Files, Readers: 2, Whole: true}
	for holds, fits := range map[int64]bool{18000: true, 17999: false} {
		s := &section{name: "s", data: d, rounds: 1}
		for name, kind := range map[string]Kind{"cold": Cold, "again": Warm, "anew": Warm, "other": Any} {
			s.rows = append(s.rows, &Row{Section: "s", Name: name, Unit: PerSecond, Kind: kind})
		}
		s.run = func(ctx context.Context, v *visit) error {
			do := &doing{ctx: ctx, v: v}
			do.fresh("cold", 1, read)
			do.warm(read)
			do.here("again", read)
			do.anew("anew", read)
			do.here("other", read)
			return do.err
		}
		if err := tr.visit(t.Context(), s, &small{folder{dir: d.Native}, holds}); err != nil {
			t.Error(err)
		}
		for _, r := range s.rows {
			want := fits || r.Kind != Warm
			if f := r.of("small"); f.Failed || (len(f.Samples) == 1) != want || strings.Contains(f.Reason, "do not fit the tier's memory") == want {
				t.Errorf("room for %d: %s: %+v", holds, r.Name, f)
			}
		}
	}
}

// A tier that does not come is given up.
func TestNotReady(t *testing.T) {
	tr := newTrial(t, time.Millisecond)
	s := &section{name: "s", data: data(t), rounds: 1, rows: []*Row{{Section: "s", Name: "read", Unit: PerSecond, Kind: Any}}}
	s.run = func(ctx context.Context, v *visit) error {
		do := &doing{ctx: ctx, v: v}
		do.fresh("read", 1, Job{Op: opSmall, Files: s.data.Files})
		return do.err
	}
	if err := tr.visit(t.Context(), s, late{}); !isHang(err) || !strings.Contains(err.Error(), "not ready after 1ms") {
		t.Errorf("%v", err)
	}
	if f := s.rows[0].of("late"); !f.Failed || len(f.Samples) > 0 {
		t.Errorf("its figure: %+v", f)
	}
}

// late is a contender that is never ready.
type late struct{ contender }

func (late) name() string { return "late" }
func (late) fresh(ctx context.Context, _ *Data) (session, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// The direct reader goes where the others go: to Amazon's endpoint as it is written.
func TestAmazonEndpoint(t *testing.T) {
	for _, host := range []string{"s3.eu-west-3.amazonaws.com", "s3.dualstack.eu-west-3.amazonaws.com"} {
		c, err := (&Bucket{Endpoint: "https://" + host, Region: "eu-west-3", AccessKey: "AKID", SecretKey: "secret"}).Client()
		if err != nil {
			t.Fatal(err)
		}
		u, err := c.Presign(t.Context(), "GET", "name", "key", time.Minute, nil)
		if err != nil {
			t.Fatal(err)
		}
		if u.Host != "name."+host {
			t.Errorf("asked %s of the endpoint %s", u.Host, host)
		}
	}
}
