package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// flaky is a dataset of one file whose reads fail as a test says, each a minute of its clock later.
type flaky struct {
	snapshot *catalog.Snapshot
	data     string
	most     int                  // bytes that one read gives
	fail     func(read int) error // of each read, from 1
	reads    int
	clock    time.Time
}

func newFlaky(t *testing.T, fail func(read int) error) *flaky {
	t.Helper()
	f := &flaky{data: "what the step reads", most: 8, fail: fail, clock: time.Unix(1000, 0)}
	b := catalog.NewBuilder([]catalog.Mount{{URL: "s3://bucket", Path: "/"}})
	if err := b.Add(0, source.Object{Key: "file", Size: int64(len(f.data)), Version: "1"}); err != nil {
		t.Fatal(err)
	}
	encoded, err := b.Encode(time.Unix(2, 0))
	if err != nil {
		t.Fatal(err)
	}
	if f.snapshot, err = catalog.Open(encoded); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.snapshot.Close() })
	return f
}

func (f *flaky) Snapshot() *catalog.Snapshot { return f.snapshot }
func (f *flaky) Forget(catalog.Index)        {}

// ReadAt gives a part of what is asked for and, where the test says so, an error beside it.
func (f *flaky) ReadAt(_ context.Context, _ catalog.Index, p []byte, off int64) (int, error) {
	f.reads++
	err := f.fail(f.reads)
	if err == nil {
		return copy(p[:min(len(p), f.most)], f.data[off:]), nil
	}
	f.clock = f.clock.Add(time.Minute)
	var some partly
	if errors.As(err, &some) {
		return copy(p[:min(len(p), 1)], f.data[off:]), err
	}
	return 0, err
}

// partly is an error that comes with a byte.
type partly struct{ error }

// stage copies the file as `stepcache stage` does, and returns what was said.
func (f *flaky) stage(t *testing.T, ctx context.Context, stall time.Duration) (content string, said []string, err error) {
	t.Helper()
	p := newPatient(f, stall, func(format string, a ...any) { said = append(said, fmt.Sprintf(format, a...)) })
	p.now, p.last = func() time.Time { return f.clock }, f.clock
	p.pause = func(context.Context, time.Duration) {}
	i, _ := f.snapshot.Lookup("/file")
	dir := t.TempDir()
	err = copyFiles(ctx, p, []catalog.Index{i}, dir, int64(len(f.data)), 1)
	b, rerr := os.ReadFile(filepath.Join(dir, "file"))
	if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		t.Fatal(rerr)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".stepcache-*")); len(left) > 0 {
		t.Errorf("left %q", left)
	}
	return string(b), said, err
}

var errSlow = fmt.Errorf("argo/genomes:/file: no worker could serve it within 55s: %w", context.DeadlineExceeded)

func TestAStageAsksSlowWorkersAgain(t *testing.T) {
	f := newFlaky(t, func(read int) error {
		if read <= 5 || read == 7 {
			return errSlow
		}
		return nil
	})
	got, said, err := f.stage(t, t.Context(), 10*time.Minute)
	if err != nil || got != f.data {
		t.Errorf("copied %q, %v", got, err)
	}
	if len(said) != 6 || !strings.Contains(said[4], "no byte has come for 5m0s; trying again, for 5m0s more") || !strings.Contains(said[5], "for 1m0s; trying again, for 9m0s") {
		t.Errorf("said %q", said)
	}
}

// A byte now and then is progress: the time is counted from the last one.
func TestAStageGoesOnWhileBytesCome(t *testing.T) {
	f := newFlaky(t, func(read int) error {
		if read%2 == 0 {
			return partly{errSlow}
		}
		return errSlow
	})
	got, _, err := f.stage(t, t.Context(), 3*time.Minute)
	if err != nil || got != f.data {
		t.Errorf("copied %q, %v, after %d reads", got, err, f.reads)
	}
}

func TestAStageGivesUpWhenNoByteComes(t *testing.T) {
	f := newFlaky(t, func(read int) error {
		if read == 1 {
			return nil
		}
		return errSlow
	})
	got, _, err := f.stage(t, t.Context(), 10*time.Minute)
	if err == nil || got != "" || f.reads != 1+10 || !errors.Is(err, context.DeadlineExceeded) ||
		!strings.Contains(err.Error(), "no byte has come for 10m0s, in 10 reads") || !strings.Contains(err.Error(), "/file") {
		t.Errorf("copied %q, %v after %d reads", got, err, f.reads)
	}
}

func TestAStageFailsAtOnceOfWhatNoWaitingMends(t *testing.T) {
	for _, why := range []error{
		source.ErrNotFound, source.ErrChanged, source.ErrNoBucket, source.ErrDenied, source.ErrUnversioned, source.ErrInvalid, wire.ErrUnauthorized,
	} {
		f := newFlaky(t, func(int) error { return fmt.Errorf("argo/genomes:/file: %w", why) })
		_, said, err := f.stage(t, t.Context(), 10*time.Minute)
		if !errors.Is(err, why) || f.reads != 1 || len(said) > 0 {
			t.Errorf("%v: %v after %d reads, said %q", why, err, f.reads, said)
		}
	}
}

// The pod is deleted, or its deadline has passed.
func TestAStageThatIsEndedDoesNotWait(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := newFlaky(t, func(read int) error {
		if read == 3 {
			cancel()
		}
		return errSlow
	})
	if _, _, err := f.stage(t, ctx, 10*time.Minute); err == nil || f.reads != 3 {
		t.Errorf("%v after %d reads", err, f.reads)
	}
}
