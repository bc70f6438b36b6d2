package trial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
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
	// Limit is when a timed reading ends at the latest; Patience when it is given up as hanging, and so is a tier or
	// a mount that does not come.
	Limit, Patience time.Duration
	// Budget is about what all of it may take; zero: no matter. Every row is measured once, then again as often as
	// there is time; other projects are asked no more once the budget is spent.
	Budget time.Duration
	// Mounts says that this process may mount.
	Mounts bool
	// Log gets a line for each thing measured, and each figure as it comes.
	Log io.Writer
	// Each, where there is one, is called with what there is so far after every turn of a contender.
	Each func(*Report)
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
		version := c.version(ctx)
		if c.name() == Native && in.Large != nil && in.Large.Native != "" {
			version += host.InRuns(filepath.Join(in.Large.Native, in.Large.Files[0].Path))
		}
		t.report.Contenders = append(t.report.Contenders, Contender{c.name(), version})
	}
	t.began = time.Now()
	defer t.finish()
	sections := t.chosen()
	if len(sections) == 0 {
		return t.report, fmt.Errorf("--only %q matches no row", o.Only)
	}
	if err := t.measure(ctx, sections, all); err != nil {
		return t.report, err
	}
	t.report.Whole = true
	return t.report, t.report.wrong()
}

// measure runs all rounds of all sections.
func (t *trial) measure(ctx context.Context, sections []*section, all []contender) error {
	rounds := 0
	for _, s := range sections {
		p := sectionProgress{}
		for _, c := range all {
			if s.wants(c.name()) && t.cannot(c, s) == "" {
				p.first++
			}
		}
		p.planned = p.first * s.rounds
		t.progress.sections = append(t.progress.sections, p)
		rounds = max(rounds, s.rounds)
	}
	// Everything once before anything twice, so that what ends a run early costs rounds and not rows.
	for round := range rounds {
		for k, s := range sections {
			if err := t.round(ctx, k, s, round, all); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish notes what the run has taken so far.
func (t *trial) finish() {
	t.report.Machine.Finish()
	t.report.Seconds = time.Since(t.began).Seconds()
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

// CheckContenders refuses names that are of no contender, whether or not it is here.
func CheckContenders(names []string) error {
	known := append([]string{Native, Direct, Own}, Peers...)
	for _, n := range names {
		if !slices.Contains(known, n) {
			return fmt.Errorf("%q: want some of %s", n, strings.Join(known, ", "))
		}
	}
	return nil
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

// round measures the rows of the k-th section once, unless that is more often than it wants or there is time for.
func (t *trial) round(ctx context.Context, k int, s *section, round int, all []contender) error {
	p := &t.progress.sections[k]
	switch {
	case round >= s.rounds || round > 0 && p.made >= p.planned:
		return nil
	case round == 0:
		t.report.Rows = append(t.report.Rows, s.rows...)
	case t.o.Budget > 0 && time.Since(t.began)+p.round() > t.o.Budget:
		p.planned = p.made
		fmt.Fprintf(t.o.Log, "%s: no more rounds, one takes %s\n", s.name, p.round().Round(time.Second))
		return nil
	}
	for i := range all {
		c := all[(i+round)%len(all)]
		if !s.wants(c.name()) {
			continue
		}
		why := t.cannot(c, s)
		if why == "" && t.spent(c) {
			why = t.noTime().Error()
		}
		if why != "" {
			for _, r := range s.rows {
				if f := r.of(c.name()); len(f.Samples) == 0 && f.Reason == "" {
					f.Reason = why
				}
			}
			continue
		}
		t.log("%s, round %d of %d: %s", s.name, round+1, s.rounds, c.name())
		start := time.Now()
		err := t.visit(ctx, s, c)
		if t.o.Each != nil {
			t.finish()
			t.o.Each(t.report)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			fmt.Fprintf(t.o.Log, "  %s: %v\n", c.name(), err)
		}
		p.made++
		p.took += time.Since(start)
	}
	if round == s.rounds-1 {
		p.planned = p.made // what was left out since somebody hung
	}
	return nil
}

// spent says that there is no time left for a contender: for other projects once the budget is.
func (t *trial) spent(c contender) bool {
	if t.o.Budget == 0 || time.Since(t.began) < t.o.Budget {
		return false
	}
	_, other := c.(*peer)
	return other
}

// errSpent ends a turn for which no time is left.
var errSpent = errors.New("no time was left")

func (t *trial) noTime() error { return fmt.Errorf("%w of the %s of --budget", errSpent, t.o.Budget) }

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

// visit is a contender's turn. The error, where there is one, is why it could not go on; readings that failed are told
// where they were made.
func (t *trial) visit(ctx context.Context, s *section, c contender) error {
	v := &visit{t: t, s: s, c: c}
	defer v.close()
	err := s.run(ctx, v)
	if err != nil && ctx.Err() == nil {
		// Rows without a figure have this reason.
		for _, r := range s.rows {
			if m := r.of(c.name()); len(m.Samples) == 0 && m.Reason == "" && r.wants(c.name()) {
				m.Reason, m.Failed = err.Error(), !errors.Is(err, errSpent)
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
	limited, cancel := context.WithTimeout(ctx, v.t.o.Patience)
	defer cancel()
	at, err := v.c.fresh(limited, v.s.data)
	if err != nil {
		if limited.Err() != nil && ctx.Err() == nil {
			err = hang{fmt.Errorf("not ready after %s: %w", v.t.o.Patience, err)}
		}
		return err
	}
	v.at = at
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
		if ctx.Err() == nil {
			m.Reason, m.Failed = err.Error(), true
			fmt.Fprintf(v.t.o.Log, "  %v\n", err)
		}
		return got, err
	}
	gb := float64(got.Bytes) / 1e9
	if gb == 0 {
		gb = float64(got.Count) / 1e6 // of names a million
	}
	figure := r.Unit.of(got.Amount)
	fmt.Fprintf(v.t.o.Log, "  %s: %s\n", name, r.Unit.Format(figure))
	m.add(figure, CPU{
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
	return errWrong{what}
}

// errWrong ends a turn: whoever gives wrong bytes has no figures.
type errWrong struct{ what string }

func (e errWrong) Error() string { return e.what }

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
	if len(j.Files) == len(v.s.data.Files) {
		v.t.checked[v.s.name+" "+v.c.name()] = true
	}
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
	if err == nil {
		v.t.checked[key] = true
		err = v.same(ctx, j, r.Digests)
	}
	if err != nil && ctx.Err() == nil && !errors.As(err, new(errWrong)) {
		err = fmt.Errorf("compare all bytes: %w", err)
		for _, r := range v.s.rows {
			if r.wants(v.c.name()) {
				f := r.of(v.c.name())
				f.Reason, f.Failed = err.Error(), true
			}
		}
	}
	return err
}

// startReader starts a reader's process.
func startReader(cmd *exec.Cmd) (*process.Process, error) { return process.Start(cmd, "") }
