package trial

import (
	"context"
	"errors"
	"fmt"
	"os/exec"

	"github.com/dustin/go-humanize"

	"github.com/stepcache/stepcache/bench/host"
)

// The pods and steps of the sections that have many of them.
const (
	pods  = 8
	steps = 100
)

// mostBuffers is what a reader and whoever serves it may take for buffers.
const mostBuffers = 1 << 30

// sections are all, in the order of the report.
func (t *trial) sections() []*section {
	return []*section{t.largeSection(), t.smallSection(), t.treeSection(), t.podsSection(), t.stepsSection(), t.artifactsSection()}
}

// hashTool is what hashes as steps do; empty: there is none.
func hashTool() string {
	path, _ := exec.LookPath("sha256sum")
	return path
}

// largeSection: one large file, by one reader and by many.
func (t *trial) largeSection() *section {
	s := &section{name: "large file", data: t.in.Large, rounds: t.o.Rounds, rows: []*Row{
		{Name: "cold, 1 reader", Unit: BytesPerSecond, Kind: Cold, Of: "warm, 1 reader", Reach: "above every peer"},
		{Name: "cold, 8 readers", Unit: BytesPerSecond, Kind: Cold, Of: "warm, 8 readers", Reach: "above every peer"},
		{Name: "warm, 1 reader", Unit: BytesPerSecond, Kind: Warm, Reach: "≥ 0.95, huge pages ≥ 2.5"},
		{Name: "warm, 8 readers", Unit: BytesPerSecond, Kind: Warm, Reach: "≥ 0.9"},
		{Name: "re-read", Unit: BytesPerSecond, Kind: Warm, Of: "warm, 1 reader", Reach: "≥ 0.95"},
		{Name: "random 4 KiB", Unit: PerSecond, Kind: Warm, Reach: "≥ 0.8"},
		{Name: "random 64 KiB", Unit: PerSecond, Kind: Warm},
		{Name: "sha256sum", Unit: BytesPerSecond, Kind: Warm},
	}}
	if s.data == nil {
		return s
	}
	read := func(readers int) Job { return Job{Op: opSequential, Files: s.data.Files, Readers: readers} }
	randomly := func(piece int) Job {
		return Job{Op: opRandom, Files: s.data.Files, Piece: piece, Count: 200_000, Limit: t.o.Limit / 2}
	}
	s.run = func(ctx context.Context, v *visit) error {
		do := &doing{ctx: ctx, v: v}
		if v.c.name() == Direct {
			do.fresh("cold, 1 reader", 1, read(1))
			do.fresh("cold, 8 readers", 1, read(8))
			return do.err
		}
		do.fresh("cold, 8 readers", 1, read(8))
		do.fresh("cold, 1 reader", 1, read(1))
		do.warm(read(1))
		do.here("re-read", read(1))
		do.anew("warm, 1 reader", read(1))
		do.anew("warm, 8 readers", read(8))
		do.anew("random 4 KiB", randomly(4<<10))
		do.anew("random 64 KiB", randomly(64<<10))
		if tool := hashTool(); tool != "" {
			do.anew("sha256sum", Job{Op: opHash, Files: s.data.Files, Tool: tool})
		}
		do.check(len(s.data.Files))
		return do.err
	}
	return s
}

// smallSection: many small files.
func (t *trial) smallSection() *section {
	s := &section{name: "small files", data: t.in.Small, rounds: t.o.Rounds, rows: []*Row{
		{Name: "cold, 1 reader", Unit: PerSecond, Kind: Cold, Of: "first open, 1 reader", Reach: "≥ 1,400/s, one GET a file"},
		{Name: "cold, 8 readers", Unit: PerSecond, Kind: Cold, Of: "first open, 8 readers", Reach: "≥ 2,700/s, one GET a file"},
		{Name: "first open, 1 reader", Unit: PerSecond, Kind: Warm, Reach: "≥ 5 K/s"},
		{Name: "first open, 8 readers", Unit: PerSecond, Kind: Warm},
		{Name: "re-open", Unit: PerSecond, Kind: Warm, Reach: "≥ 120 K/s"},
	}}
	if s.data == nil {
		return s
	}
	read := func(n, readers int, whole bool) Job {
		return Job{Op: opSmall, Files: s.data.Files[:min(n, len(s.data.Files))], Readers: readers, Whole: whole, Limit: t.o.Limit}
	}
	all := len(s.data.Files)
	s.run = func(ctx context.Context, v *visit) error {
		do := &doing{ctx: ctx, v: v}
		do.fresh("cold, 1 reader", 1, read(all, 1, true))
		n := int(do.fresh("cold, 8 readers", 1, read(all, 8, true)).Count)
		if v.c.name() == Direct {
			return do.err
		}
		if n == 0 {
			n = all
		}
		// What the limit has left out is cold: only what was read is read again.
		fill := read(n, 8, true)
		fill.Limit = 0
		do.warm(fill)
		do.anew("first open, 1 reader", read(n, 1, true))
		if do.takes("re-open") {
			do.untimed(fill) // what the limit left out
			do.here("re-open", read(n, 1, false))
		}
		do.anew("first open, 8 readers", read(n, 8, true))
		do.check(n)
		return do.err
	}
	return s
}

// treeSection: a great many names.
func (t *trial) treeSection() *section {
	s := &section{name: "tree", data: t.in.Tree, rounds: t.o.Rounds, rows: []*Row{
		{Name: "ls -lR, first", Unit: PerSecond, Kind: Any, Reach: "≥ 100 K/s"},
		{Name: "ls -lR, again", Unit: PerSecond, Kind: Warm},
		{Name: "open and stat", Unit: PerSecond, Kind: Any},
	}}
	if s.data == nil {
		return s
	}
	walk := Job{Op: opWalk, Files: s.data.Files[:1], Entries: s.data.Entries, Limit: t.o.Limit}
	s.run = func(ctx context.Context, v *visit) error {
		do := &doing{ctx: ctx, v: v}
		do.fresh("ls -lR, first", 1, walk)
		do.warm(walk)
		do.here("ls -lR, again", walk)
		do.here("open and stat", Job{Op: opOpenStat, Files: s.data.Files, Limit: t.o.Limit})
		return do.err
	}
	return s
}

// podsSection: eight pods, each with a mount of its own, that all want one file from a bucket with a bandwidth.
func (t *trial) podsSection() *section {
	s := &section{name: "limited bucket", data: t.in.Limited, rounds: t.o.SlowRounds, rows: []*Row{
		{Name: "eight pods hash one file, cold", Unit: Seconds, Kind: Any, Reach: "≤ 1/4 of the best peer, 1 × from the bucket"},
	}}
	if s.data == nil {
		return s
	}
	s.run = func(ctx context.Context, v *visit) error {
		do := &doing{ctx: ctx, v: v}
		do.fresh("eight pods hash one file, cold", pods, Job{Op: opHash, Files: s.data.Files, Readers: pods, Tool: hashTool()})
		return do.err
	}
	return s
}

// stepsSection: a hundred steps at once on one mount.
func (t *trial) stepsSection() *section {
	s := &section{name: "hundred steps", data: t.in.Steps, rounds: t.o.Rounds, rows: []*Row{
		{Name: "hash one file, cold", Unit: Seconds, Kind: Cold, Of: "hash one file, warm", Without: Direct},
		{Name: "hash one file, warm", Unit: Seconds, Kind: Warm, Reach: "≤ 1.1"},
	}}
	if s.data == nil {
		return s
	}
	hash := Job{Op: opHash, Files: s.data.Files, Readers: steps, Tool: hashTool()}
	s.run = func(ctx context.Context, v *visit) error {
		if v.c.name() == Direct {
			return nil // a hundred times the file through the bucket's bandwidth says nothing new
		}
		do := &doing{ctx: ctx, v: v}
		do.fresh("hash one file, cold", 1, hash)
		do.warm(Job{Op: opSequential, Files: s.data.Files})
		do.anew("hash one file, warm", hash)
		return do.err
	}
	return s
}

// doing is one contender's way through a section. A reading that fails costs its own row: its cache and mounts are
// taken away in whatever state they are, and the next reading has new ones, filled where it is of what is cached. After
// a second reading that hangs, and where there is nothing to read from, it does nothing more.
type doing struct {
	ctx context.Context
	v   *visit
	err error
	// fill reads what the next readings want to be cached; filled says that it was read since the cache was empty.
	fill   *Job
	filled bool
	hangs  int
}

// takes says whether a row is to be measured.
func (d *doing) takes(row string) bool {
	if d.err != nil || !d.v.takes(row) {
		return false
	}
	if d.v.t.spent(d.v.c) {
		d.err = d.v.t.noTime()
	}
	return d.err == nil
}

// begin empties the cache and mounts so often.
func (d *doing) begin(mounts int) bool {
	d.filled = false
	d.stop(d.v.fresh(d.ctx, mounts))
	return d.err == nil
}

// stop ends the way with an error.
func (d *doing) stop(err error) {
	d.err = err
	if isHang(err) {
		d.v.t.hung[d.v.s.name+d.v.c.name()] = true
	}
}

// failed goes on after a reading that failed.
func (d *doing) failed(err error) {
	if isHang(err) {
		d.hangs++
	}
	if d.ctx.Err() != nil || d.hangs > 1 || errors.As(err, new(errWrong)) {
		d.stop(err)
		return
	}
	d.v.close()
	d.filled = false
}

// ready has something to read from, filled.
func (d *doing) ready() bool {
	if d.err != nil || d.v.at == nil && !d.begin(1) {
		return false
	}
	if d.fill != nil && !d.filled {
		if _, err := d.v.untimed(d.ctx, *d.fill); err != nil {
			d.stop(fmt.Errorf("fill the cache: %w", err))
			return false
		}
		d.filled = true
	}
	return true
}

// roomy is a session that knows how many bytes of files its cache holds.
type roomy interface{ room() int64 }

// fits says whether the cache holds what a row wants to be cached: else the row has a reason in place of a figure that
// would not be a warm one.
func (d *doing) fits(row string) bool {
	at, ok := d.v.at.(roomy)
	r := d.v.row(row)
	if !ok || r.Kind != Warm || d.fill == nil || d.fill.Op == opWalk {
		return true
	}
	size := int64(0)
	for _, f := range d.fill.Files {
		size += f.Size
	}
	if size <= at.room() {
		return true
	}
	r.of(d.v.c.name()).Reason = fmt.Sprintf("not warm: the %s that are read do not fit the tier's memory, which has room for %s",
		humanize.IBytes(uint64(size)), humanize.IBytes(uint64(at.room())))
	return false
}

// fresh measures a row with nothing cached, on so many mounts.
func (d *doing) fresh(row string, mounts int, j Job) (r result) {
	if d.takes(row) && d.begin(mounts) {
		// Cached once for each mount, and once in the kernel's page cache.
		if r = d.fills(2*int64(mounts), row, j); d.v.at != nil {
			d.filled = true
		}
	}
	return r
}

// fills measures a row that fills memory, so many times what it reads. The host backs it, the same for every contender
// and as the last thing before: what tier and mounts have taken by then is theirs.
func (d *doing) fills(times int64, row string, j Job) (r result) {
	size := int64(0)
	if d.v.c.name() != Native { // which fills nothing
		for _, f := range j.Files {
			size += times * f.Size
		}
	}
	done, err := host.Back(d.ctx, "", size+min(size/4, mostBuffers), d.v.t.o.Mounts)
	if err != nil {
		d.stop(err)
		return r
	}
	defer done()
	return d.measure(row, j)
}

// warm says what the next readings want to be cached.
func (d *doing) warm(j Job) { d.fill = &j }

// put is here, of objects that are put or got.
func (d *doing) put(row string, j Job) (r result) {
	if d.takes(row) && d.ready() {
		// At their most in the bucket and in the cache, in parts and as a whole.
		r = d.fills(4, row, j)
	}
	return r
}

// here measures a row in the mount that there is.
func (d *doing) here(row string, j Job) (r result) {
	if d.takes(row) && d.ready() && d.fits(row) {
		r = d.measure(row, j)
	}
	return r
}

// untimed reads in the mount that there is, without a figure.
func (d *doing) untimed(j Job) (r result) {
	if d.ready() {
		var err error
		if r, err = d.v.untimed(d.ctx, j); err != nil {
			d.failed(err)
		}
	}
	return r
}

// anew measures a row in a mount of which the kernel knows nothing.
func (d *doing) anew(row string, j Job) {
	if d.takes(row) && d.ready() && d.fits(row) {
		if d.stop(d.v.mount(d.ctx, 1)); d.err == nil {
			d.fills(1, row, j) // the kernel's page cache
		}
	}
}

// measure takes a sample; after one that failed there is no mount any more.
func (d *doing) measure(row string, j Job) result {
	r, err := d.v.measure(d.ctx, row, j)
	if err != nil {
		d.failed(err)
	}
	return r
}

// check compares the first n files with the originals.
func (d *doing) check(n int) {
	if d.err == nil && d.v.at != nil {
		d.stop(d.v.check(d.ctx, n))
	}
}
