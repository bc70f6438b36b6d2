package worker

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// crowd gives a file of two blocks, of which none is there, as many readers as it may have.
type crowd struct {
	*tier
	file, size int64
	first      *receiver // one of the readers
	lease      int64     // and its lease
}

func gather(t *testing.T) *crowd {
	t.Helper()
	want := content(2*ring.BlockSize, 5)
	c := &crowd{tier: newTier(t, map[string][]byte{"f": want}), size: int64(len(want))}
	c.start(1)
	c.workers[0].leaseFill = ring.BlockSize
	c.file = int64(index(t, c.snapshot(), "/f"))
	for range readersPerCPU * runtime.NumCPU() {
		c.first = c.receive(0)
		rep, _, err := c.first.ask(wire.Request{Op: wire.OpLease, Flags: wire.FlagEarly, Index: uint32(c.file)})
		if err != nil {
			t.Fatal(err)
		}
		c.lease = rep.Off
	}
	return c
}

// next opens the file as one more.
func (c *crowd) next() <-chan error {
	r, answer := c.receive(0), make(chan error, 1)
	go func() {
		_, f, err := r.ask(wire.Request{Op: wire.OpLease, Index: uint32(c.file), WaitMillis: uint32(wire.ClientTimeout.Milliseconds())})
		if err == nil && f == nil {
			err = errors.New("no descriptor")
		}
		answer <- err
	}()
	return answer
}

func (c *crowd) read(block int64) {
	c.t.Helper()
	if _, err := c.first.sums(c.lease, c.size, block); err != nil {
		c.t.Fatal(err)
	}
}

func TestWhoComesToACrowdGetsTheWholeFile(t *testing.T) {
	noGoroutines(t)
	c := gather(t)
	begun := time.Now()
	answer := c.next()
	slow := func(err error) {
		if !errors.Is(err, wire.ErrNotResident) {
			t.Fatal(err)
		}
		if took := time.Since(begun); took < wholePace {
			t.Fatalf("after %v: %v", took, err)
		}
		t.Skip("so slow a machine took half a second for a block, after which nobody expects the other one")
	}
	c.read(0)
	select {
	case err := <-answer:
		slow(err)
	case <-time.After(10 * wholePoll):
	}
	c.read(1)
	took := time.Since(begun)
	if err := <-answer; err != nil {
		if took < wholePace {
			t.Fatal(err)
		}
		slow(err)
	}
}

func TestACrowdThatReadsNothingIsNotWaitedForLong(t *testing.T) {
	noGoroutines(t)
	c := gather(t)
	begun := time.Now()
	if err := <-c.next(); !errors.Is(err, wire.ErrNotResident) {
		t.Error(err)
	}
	if took := time.Since(begun); took < wholePace {
		t.Errorf("it waited %v", took)
	}
}

// Who comes to a file without a crowd reads it, and is one of the crowd.
func TestNobodyWaitsWithoutACrowd(t *testing.T) {
	noGoroutines(t)
	c := gather(t)
	if _, _, err := c.first.ask(wire.Request{Op: wire.OpRelease, Off: c.lease}); err != nil {
		t.Fatal(err)
	}
	if err := <-c.next(); !errors.Is(err, wire.ErrNotResident) {
		t.Error(err)
	}
	known := &c.workers[0].crowds
	known.mu.Lock()
	defer known.mu.Unlock()
	if n := len(known.opened); n != 1 {
		t.Errorf("%d files are known to have been opened", n)
	}
}

func TestCrowds(t *testing.T) {
	var c crowds
	id := source.ID{1}
	now := time.Now()
	at := func(d time.Duration) time.Time { return now.Add(d) }
	join := func(what string, readers int, d time.Duration, want bool) {
		t.Helper()
		if got := c.join(id, readers, 3, at(d)); got != want {
			t.Errorf("%s: %v", what, got)
		}
	}
	for k := range 3 {
		join("all at once", 0, time.Duration(k), true)
	}
	join("one too many", 0, 10, false)
	join("a reader of another time", 2, 20, false)
	join("most of them came long ago and read nothing", 0, justOpened+1, true)
	join("and one more", 0, justOpened+2, true)
	join("as many read it", 3, 3*justOpened, false)
	join("they do not any more", 2, 3*justOpened, true)
	for k := range 3 * maxCrowds {
		id = source.ID{2, byte(k), byte(k >> 8)}
		join("another file", 0, time.Duration(k)*justOpened, true)
	}
	if n := len(c.opened); n > maxCrowds {
		t.Errorf("%d files are remembered", n)
	}
}
