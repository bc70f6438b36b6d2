package trial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os/exec"
	"regexp"
	"slices"
	"time"

	"github.com/stepcache/stepcache/bench/host"
	"github.com/stepcache/stepcache/local/process"
)

// Options of Run.
type Options struct {
	// Program is the stepcache binary. Reader is a command that calls Read.
	Program string
	Reader  []string
	// Tier is the folder of a running tier, which is read in place of one of the bench's own: there are no cold
	// figures then.
	Tier string
	// Manifests, where there are some, are what the bench's own tiers are made of; else that follows from the
	// data's Bucket.
	Manifests []string
	// Only are the rows and contenders that are measured: "section: row". Contenders are those with which to
	// compare; empty: all that are there.
	Only       *regexp.Regexp
	Contenders []string
	// Rounds is how often each row is measured, SlowRounds how often those that take long (eight pods).
	Rounds, SlowRounds int
	// Limit is when a timed reading ends at the latest; Patience when it is given up as hanging.
	Limit, Patience time.Duration
	// Budget is about what all of it may take; zero: no matter. Every row is measured once; more rounds of a section
	// are begun while its share of what is left of the budget lets them.
	Budget time.Duration
	// Mounts says that this process may mount.
	Mounts bool
	// Log gets a line for each thing measured.
	Log io.Writer
}

// trial is a run.
type trial struct {
	o      Options
	in     Input
	report *Report
	// hung counts how often a contender hung in a section: it is not asked again.
	hung map[string]bool
	// originals are the digests of the native files, by section and what was read; checked are the sections of
	// contenders that were compared with them.
	originals map[string]string
	checked   map[string]bool

	began    time.Time
	progress progress
}

// Run measures all rows and returns what there is also where it ends early.
func Run(ctx context.Context, o Options, in Input) (*Report, error) {
	if o.Only == nil {
		o.Only = regexp.MustCompile("")
	}
	if o.Log == nil {
		o.Log = io.Discard
	}
	t := &trial{o: o, in: in, hung: map[string]bool{}, originals: map[string]string{}, checked: map[string]bool{},
		report: &Report{Date: time.Now().UTC(), Machine: host.Describe(ctx, o.Program), Rounds: o.Rounds}}
	all := t.contenders()
	for _, c := range all {
		t.report.Contenders = append(t.report.Contenders, Contender{c.name(), c.version(ctx)})
	}
	t.began = time.Now()
	defer func() {
		t.report.Machine.Finish()
		t.report.Seconds = time.Since(t.began).Seconds()
	}()
	sections := t.chosen()
	if len(sections) == 0 {
		return t.report, fmt.Errorf("--only %q matches no row", o.Only)
	}
	for _, s := range sections {
		p := sectionProgress{}
		for _, c := range all {
			if s.wants(c.name()) && t.cannot(c, s) == "" {
				p.first++
			}
		}
		p.planned = p.first * s.rounds
		t.progress.sections = append(t.progress.sections, p)
	}
	for k, s := range sections {
		share := (o.Budget - time.Since(t.began)) / time.Duration(len(sections)-k)
		if err := t.section(ctx, k, s, all, share); err != nil {
			return t.report, err
		}
	}
	return t.report, t.report.wrong()
}

// chosen are the sections that have rows to be measured, with no others.
func (t *trial) chosen() (chosen []*section) {
	for _, s := range t.sections() {
		if s.data == nil {
			continue
		}
		s.rows = slices.DeleteFunc(s.rows, func(r *Row) bool { return !t.o.Only.MatchString(s.name + ": " + r.Name) })
		for _, r := range s.rows {
			r.Section = s.name
		}
		if len(s.rows) > 0 {
			chosen = append(chosen, s)
		}
	}
	return chosen
}

// contenders are those that can be measured here, and the reasons of those that cannot.
func (t *trial) contenders() []contender {
	all := []contender{nativeFiles{}, direct{}, &own{t.o.Program, t.o.Tier, t.o.Manifests}}
	for _, p := range peers() {
		all = append(all, p)
	}
	return slices.DeleteFunc(all, func(c contender) bool {
		return len(t.o.Contenders) > 0 && !slices.Contains(t.o.Contenders, c.name()) && c.name() != Native
	})
}

// section is rows that are measured together, since they share a cache that one of them has filled.
type section struct {
	name   string
	data   *Data
	rounds int
	rows   []*Row
	// run measures all rows of one contender once.
	run func(ctx context.Context, v *visit) error
}

func (s *section) wants(contender string) bool {
	return slices.ContainsFunc(s.rows, func(r *Row) bool { return r.wants(contender) })
}

// visit is one contender's turn in one round of a section.
type visit struct {
	t  *trial
	s  *section
	c  contender
	at session
}

// section measures the rows of the k-th section.
func (t *trial) section(ctx context.Context, k int, s *section, all []contender, share time.Duration) error {
	t.report.Rows = append(t.report.Rows, s.rows...)
	p := &t.progress.sections[k]
	began := time.Now()
	for round := range s.rounds {
		if spent := time.Since(began); round > 0 && t.o.Budget > 0 && spent+spent/time.Duration(round) > share {
			fmt.Fprintf(t.o.Log, "%s: no more rounds, %d took %s\n", s.name, round, spent.Round(time.Second))
			break
		}
		for i := range all {
			c := all[(i+round)%len(all)]
			if !s.wants(c.name()) {
				continue
			}
			if why := t.cannot(c, s); why != "" {
				for _, r := range s.rows {
					r.of(c.name()).Reason = why
				}
				continue
			}
			t.log("%s, round %d of %d: %s", s.name, round+1, s.rounds, c.name())
			start := time.Now()
			err := t.visit(ctx, s, c)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				fmt.Fprintf(t.o.Log, "%s: %s: %v\n", s.name, c.name(), err)
			}
			p.made++
			p.took += time.Since(start)
		}
	}
	p.planned = p.made // what was left out for the budget, or since somebody hung
	return nil
}

// log says what is measured now, and how long all of it may still take.
func (t *trial) log(format string, a ...any) {
	line := fmt.Sprintf(format, a...)
	spent := time.Since(t.began)
	budget := t.o.Budget - spent
	if t.o.Budget == 0 {
		budget = math.MaxInt64
	}
	if left, ok := t.progress.left(budget); ok {
		line += fmt.Sprintf(" (%s, about %s left)", spent.Round(time.Second), left.Round(time.Second))
	}
	fmt.Fprintln(t.o.Log, line)
}

// cannot is why a contender has no figures in a section.
func (t *trial) cannot(c contender, s *section) string {
	switch c.(type) {
	case nativeFiles:
		if s.data.Native == "" {
			return "no native copy"
		}
	case direct:
		if s.data.Bucket == nil {
			return "the bucket's credentials are not here"
		}
	case *own:
		if !t.o.Mounts && !s.data.Puts {
			return "needs root (CAP_SYS_ADMIN) to mount"
		}
		if s.data.Bucket == nil && t.o.Tier == "" && len(t.o.Manifests) == 0 {
			return "the bucket's credentials are not here"
		}
	default:
		if !t.o.Mounts {
			return "needs root (CAP_SYS_ADMIN) to mount"
		}
		if s.data.Bucket == nil {
			return "the bucket's credentials are not here"
		}
	}
	if t.hung[s.name+c.name()] {
		return "it hung before"
	}
	return ""
}

func (t *trial) visit(ctx context.Context, s *section, c contender) error {
	v := &visit{t: t, s: s, c: c}
	defer v.close()
	err := s.run(ctx, v)
	if err != nil && ctx.Err() == nil {
		if isHang(err) {
			t.hung[s.name+c.name()] = true
		}
		// Rows without a figure have this reason.
		for _, r := range s.rows {
			if m := r.of(c.name()); len(m.Samples) == 0 && m.Reason == "" && r.wants(c.name()) {
				m.Reason, m.Failed = err.Error(), true
			}
		}
	}
	return err
}

func (v *visit) close() {
	if v.at != nil {
		v.at.close()
		v.at = nil
	}
}

// fresh begins with nothing cached and mounts n times.
func (v *visit) fresh(ctx context.Context, n int) (err error) {
	v.close()
	if v.at, err = v.c.fresh(ctx, v.s.data); err != nil {
		return err
	}
	return v.mount(ctx, n)
}

// mount bounds what a contender may take for it.
func (v *visit) mount(ctx context.Context, n int) error {
	limited, cancel := context.WithTimeout(ctx, v.t.o.Patience)
	defer cancel()
	err := v.at.mount(limited, n)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		err = hang{fmt.Errorf("no mount after %s: %w", v.t.o.Patience, err)}
	}
	return err
}

// anew mounts once more, so that the kernel and the mount's process know nothing; what is cached behind them stays.
func (v *visit) anew(ctx context.Context) error {
	if v.at == nil {
		return v.fresh(ctx, 1)
	}
	return v.mount(ctx, 1)
}

// untimed reads without a figure.
func (v *visit) untimed(ctx context.Context, j Job) (result, error) {
	v.at.where(&j)
	return v.t.read(ctx, &j)
}

// row is the section's row of that name, if somebody wants it.
func (v *visit) row(name string) *Row {
	if k := slices.IndexFunc(v.s.rows, func(r *Row) bool { return r.Name == name }); k >= 0 {
		return v.s.rows[k]
	}
	return nil
}

// takes says whether the contender has a figure in a row.
func (v *visit) takes(name string) bool {
	r := v.row(name)
	if r == nil || !r.wants(v.c.name()) {
		return false
	}
	if r.Kind == Cold && v.c.name() == Own && v.t.o.Tier != "" {
		r.of(Own).Reason = errWarm.Error()
		return false
	}
	return true
}

// measure takes one sample of a row that the contender takes.
func (v *visit) measure(ctx context.Context, name string, j Job) (result, error) {
	r := v.row(name)
	m := r.of(v.c.name())
	v.at.where(&j)
	mountGroups, workerGroups := v.at.groups()
	mountCPU, workerCPU := cpuOf(mountGroups), cpuOf(workerGroups)
	b := v.s.data.Bucket
	var sent, requests int64
	if b != nil && b.Sent != nil {
		sent, requests = b.Sent(), b.Requests()
	}
	got, err := v.t.read(ctx, &j)
	if err != nil {
		err = fmt.Errorf("%s: %w", name, err)
		m.Reason, m.Failed = err.Error(), true
		return got, err
	}
	gb := float64(got.Bytes) / 1e9
	if gb == 0 {
		gb = float64(got.Count) / 1e6 // of names a million
	}
	m.add(r.Unit.of(got.Amount), CPU{
		Reader: got.cpu.Seconds() / gb,
		Mount:  (cpuOf(mountGroups) - mountCPU).Seconds() / gb,
		Worker: (cpuOf(workerGroups) - workerCPU).Seconds() / gb,
	})
	if b != nil && b.Sent != nil {
		m.left(b.Sent()-sent, b.Requests()-requests, j.Op, got)
	}
	switch {
	case got.Wrong != "":
		return got, v.wrong(got.Wrong)
	case got.Compared:
		v.t.report.Digests++
	case len(got.Digests) > 0:
		return got, v.same(ctx, j, got.Digests)
	}
	return got, nil
}

// wrong takes the contender's figures away.
func (v *visit) wrong(what string) error {
	for _, r := range v.s.rows {
		if r.wants(v.c.name()) {
			m := r.of(v.c.name())
			m.Samples, m.Reason, m.Failed, m.Wrong = nil, what, true, true
		}
	}
	return errors.New(what)
}

// same compares digests with those of the native files, read by the same job.
func (v *visit) same(ctx context.Context, j Job, got []string) error {
	if v.s.data.Native == "" || v.c.name() == Native {
		return nil
	}
	j.Dirs, j.Bucket, j.Readers, j.Limit = []string{v.s.data.Native}, nil, 1, 0
	key := fmt.Sprint(v.s.name, " ", j.Op, " ", len(j.Files))
	want := v.t.originals[key]
	if want == "" {
		r, err := v.t.read(ctx, &j)
		if err != nil {
			return fmt.Errorf("the original: %w", err)
		}
		want = r.Digests[0]
		v.t.originals[key] = want
	}
	for _, d := range got {
		if d != want {
			return v.wrong(fmt.Sprintf("WRONG BYTES: digest %s instead of %s", d, want))
		}
	}
	v.t.report.Digests++
	return nil
}

// check compares all that the contender has with the originals, once.
func (v *visit) check(ctx context.Context, files int) error {
	key := v.s.name + " " + v.c.name()
	if v.t.checked[key] || v.c.name() == Native {
		return nil
	}
	j := Job{Op: opDigest, Files: v.s.data.Files[:min(files, len(v.s.data.Files))], Readers: 2}
	r, err := v.untimed(ctx, j)
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	v.t.checked[key] = true
	return v.same(ctx, j, r.Digests)
}

// startReader starts a reader's process.
func startReader(cmd *exec.Cmd) (*process.Process, error) { return process.Start(cmd, "") }
