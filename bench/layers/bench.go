package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/stepcache/stepcache/bench/access"
	"github.com/stepcache/stepcache/bench/host"
)

// bench is one run.
type bench struct {
	o options
	// dir is a folder on a tmpfs, of 4 KiB pages if this is root.
	dir string
	// mounts says whether this process may mount what it likes.
	mounts bool
	// file is what a native sequential read reads, of o.bytes.
	file string
	// native is that read: N.
	native *base
}

// base is what a row is compared with.
type base struct {
	name string
	run  func(ctx context.Context) (float64, error)
	// beside: the two figures are told side by side, since their ratio says nothing.
	beside bool
	// samples are all figures of the run.
	samples []float64
}

// row is one line of the table.
type row struct {
	layer, name string
	unit        unit
	// of is measured before and after each sample; nil: the figure stands alone.
	of *base
	// reference is the figure that DESIGN.md gives and its issue asks for, in words.
	reference string
	// prepare is not timed; nil: nothing to do.
	prepare func(ctx context.Context) error
	// fills is how much memory run fills, which the host is made to back right before it (host.Back).
	fills int64
	run   func(ctx context.Context) (float64, error)

	samples, bases, ratios []float64
	// reason is why there is no figure; failed, that it should have been there.
	reason string
	failed bool
}

func (r *row) title() string { return r.layer + ": " + r.name }

// group is rows that share what setup makes.
type group struct {
	setup func(ctx context.Context, s *scope) error
	rows  []*row
}

// scope undoes what a group made, last first.
type scope struct{ undo []func() }

func (s *scope) add(f func()) { s.undo = append(s.undo, f) }

func (s *scope) close() {
	for _, f := range slices.Backward(s.undo) {
		f()
	}
	s.undo = nil
}

// cannot is why a row cannot be measured here, which is no failure.
type cannot string

func (c cannot) Error() string { return string(c) }

// measure runs the rows and reports.
func measure(ctx context.Context, o options, dir string, mounts bool) error {
	b := &bench{o: o, dir: dir, mounts: mounts}
	if err := b.scratch(); err != nil {
		return err
	}
	var groups []group
	total := 0
	for _, g := range b.groups() {
		g.rows = slices.DeleteFunc(g.rows, func(r *row) bool { return !o.match.MatchString(r.title()) })
		if len(g.rows) > 0 {
			groups = append(groups, g)
			total += len(g.rows)
		}
	}
	if total == 0 {
		return fmt.Errorf("--only %q matches no row", o.only)
	}
	rep := newReport(ctx, b)
	for _, g := range groups {
		b.group(ctx, g, func(r *row) {
			rep.rows = append(rep.rows, r)
			fmt.Fprintf(os.Stderr, "[%d/%d] %s: %s\n", len(rep.rows), total, r.title(), r.outcome())
			rep.finish(false)
			if err := o.results.Partial(rep.json); err != nil {
				fmt.Fprintln(os.Stderr, "what there is so far is not kept:", err)
			}
		})
		if ctx.Err() != nil {
			break
		}
	}
	rep.finish(ctx.Err() == nil)
	err := rep.print(os.Stdout)
	if !rep.whole {
		// What there is, for people; but for the partial one the files keep the last whole run.
		return errors.Join(err, context.Cause(ctx))
	}
	err = errors.Join(err, o.results.Whole(rep.json))
	if o.table != nil {
		err = errors.Join(err, o.table.Write(rep.markdown))
	}
	for _, r := range rep.rows {
		if r.failed {
			return errors.Join(err, errors.New("some rows failed, see above"))
		}
	}
	return err
}

// group measures one group's rows.
func (b *bench) group(ctx context.Context, g group, done func(*row)) {
	var s scope
	defer s.close()
	var err error
	if g.setup != nil {
		err = b.within(ctx, &s, func(ctx context.Context) error { return g.setup(ctx, &s) })
	}
	for _, r := range g.rows {
		rowErr := err
		if rowErr == nil {
			rowErr = b.row(ctx, r)
		}
		if ctx.Err() != nil {
			if len(r.samples) > 0 { // not of all rounds, but true
				done(r)
			}
			return
		}
		if rowErr != nil {
			r.reason = rowErr.Error()
			r.failed = !errors.As(rowErr, new(cannot))
			r.samples, r.bases, r.ratios = nil, nil, nil
		}
		done(r)
	}
}

// row takes the samples of one row: native, row, native, again and again.
func (b *bench) row(ctx context.Context, r *row) error {
	for range b.o.rounds {
		var s scope
		err := b.within(ctx, &s, func(ctx context.Context) error { return b.sample(ctx, r) })
		s.close()
		if err != nil {
			return err
		}
	}
	return nil
}

// sample takes one sample of a row.
func (b *bench) sample(ctx context.Context, r *row) error {
	if r.prepare != nil {
		if err := r.prepare(ctx); err != nil {
			return err
		}
	}
	before, err := r.of.sample(ctx)
	if err != nil {
		return err
	}
	done, err := host.Back(ctx, b.dir, r.fills, b.mounts)
	if err != nil {
		return err
	}
	v, err := r.run(ctx)
	done()
	if err != nil {
		return err
	}
	after, err := r.of.sample(ctx)
	if err != nil {
		return err
	}
	r.samples = append(r.samples, v)
	if r.of == nil {
		return nil
	}
	r.bases = append(r.bases, (before+after)/2)
	if !r.of.beside {
		r.ratios = append(r.ratios, v/((before+after)/2))
	}
	return nil
}

// within runs f, and gives it up after the bench's patience, or when ctx ends: what it waits for then ends too, a read
// of a mount that does not answer with the mount's connection. What f has started may live as long as s.
func (b *bench) within(ctx context.Context, s *scope, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	s.add(func() { cancel(nil) })
	limit := time.AfterFunc(b.o.patience, func() { cancel(fmt.Errorf("no end after %s", b.o.patience)) })
	defer limit.Stop()
	stop := context.AfterFunc(ctx, func() { host.Abort(b.dir) })
	defer stop()
	err := f(ctx)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return err
}

func (of *base) sample(ctx context.Context) (float64, error) {
	if of == nil {
		return 0, nil
	}
	v, err := of.run(ctx)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", of.name, err)
	}
	of.samples = append(of.samples, v)
	return v, nil
}

// scratch makes the file that native reads read.
func (b *bench) scratch() error {
	// Whatever the packages below make goes below this folder too.
	if err := os.Setenv("TMPDIR", b.dir); err != nil {
		return err
	}
	b.file = b.dir + "/native"
	if err := access.WriteNoise(b.file, b.o.bytes, 1); err != nil {
		return err
	}
	b.native = &base{name: "N", run: func(ctx context.Context) (float64, error) {
		return sequential(ctx, b.file, b.o.bytes, 1)
	}}
	return nil
}

// needMounts is the reason of rows that mount.
func (b *bench) needMounts() error {
	if !b.mounts {
		return cannot("needs root (CAP_SYS_ADMIN) to mount")
	}
	return nil
}

// groups are all rows, in the order of the table.
func (b *bench) groups() []group {
	return []group{
		b.storeGroup(), b.wireGroup(), b.largeGroup(), b.smallGroup(), b.treeGroup(),
		b.warmGroup(), b.onceGroup(), b.memoryGroup(), b.idleGroup(), b.evictionGroup(),
	}
}
