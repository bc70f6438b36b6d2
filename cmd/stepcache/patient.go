package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// files is what is copied out of: a client.Client, or a patient one.
type files interface {
	Snapshot() *catalog.Snapshot
	ReadAt(ctx context.Context, i catalog.Index, p []byte, off int64) (int, error)
	Forget(i catalog.Index)
}

// final are the errors of a read that no waiting mends: of the object, of the keys, or of what was asked for.
var final = []error{
	source.ErrNotFound, source.ErrChanged, source.ErrNoBucket, source.ErrDenied, source.ErrUnversioned, source.ErrInvalid,
	wire.ErrUnauthorized,
}

// patient reads again what workers were too slow or too few to serve, for as long as bytes come: each of its
// reads has the client's own deadline, which a worker on a node where a hundred pods start at once may miss, or
// one that is being replaced.
type patient struct {
	files
	// stall is how long not one byte may come, of any file, before a failed read is told.
	stall time.Duration
	now   func() time.Time
	// pause waits, no longer than ctx lasts.
	pause func(ctx context.Context, d time.Duration)
	say   func(format string, a ...any)

	mu     sync.Mutex
	last   time.Time // when a byte came last, or when it began
	failed int       // reads since then
}

// newPatient begins to count now.
func newPatient(f files, stall time.Duration, say func(format string, a ...any)) *patient {
	return &patient{files: f, stall: stall, now: time.Now, pause: sleep, say: say, last: time.Now()}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// ReadAt is the client's, until it has read something.
func (p *patient) ReadAt(ctx context.Context, i catalog.Index, b []byte, off int64) (int, error) {
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval, pauses.MaxInterval = time.Second, 15*time.Second
	for {
		n, err := p.files.ReadAt(ctx, i, b, off)
		if n > 0 {
			p.came()
		}
		switch {
		case err == nil, errors.Is(err, io.EOF), ctx.Err() != nil, slices.ContainsFunc(final, func(e error) bool { return errors.Is(err, e) }):
			return n, err
		case n > 0:
			return n, nil // the caller comes again for the rest
		}
		if err := p.late(err); err != nil {
			return 0, err
		}
		if p.pause(ctx, pauses.NextBackOff()); ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
	}
}

func (p *patient) came() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last, p.failed = p.now(), 0
}

// late counts a failed read and says so; it returns an error once that is enough.
func (p *patient) late(err error) error {
	p.mu.Lock()
	silent := p.now().Sub(p.last)
	p.failed++
	failed := p.failed
	p.mu.Unlock()
	if silent >= p.stall {
		return fmt.Errorf("no byte has come for %s, in %d reads: %w", silent.Round(time.Second), failed, err)
	}
	p.say("no byte has come for %s; trying again, for %s more: %v", silent.Round(time.Second), (p.stall - silent).Round(time.Second), err)
	return nil
}
