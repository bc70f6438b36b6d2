package worker

import (
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

// crowd gives an incomplete file of two blocks as many readers as it may have, and asks for one more who has time.
func crowd(t *testing.T) (tr *tier, first *receiver, lease int64, size int64, next func(wait time.Duration) <-chan error) {
	t.Helper()
	want := content(2*ring.BlockSize, 5)
	size = int64(len(want))
	tr = newTier(t, map[string][]byte{"f": want})
	tr.start(1)
	i := index(t, tr.snapshot(), "/f")
	ask := func(c *receiver, wait time.Duration) (wire.Reply, *os.File, error) {
		return c.ask(wire.Request{Op: wire.OpLease, Flags: wire.FlagEarly, Index: i, WaitMillis: uint32(wait.Milliseconds())})
	}
	for k := range readersPerCPU * runtime.NumCPU() {
		c := tr.receive(0)
		rep, _, err := ask(c, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if k == 0 {
			first, lease = c, rep.Off
		}
	}
	return tr, first, lease, size, func(wait time.Duration) <-chan error {
		c, answer := tr.receive(0), make(chan error, 1)
		go func() {
			_, f, err := ask(c, wait)
			if err == nil && f == nil {
				err = errors.New("no descriptor")
			}
			answer <- err
		}()
		return answer
	}
}

func TestWhoComesToACrowdWaitsForTheWholeFile(t *testing.T) {
	noGoroutines(t)
	_, first, lease, size, next := crowd(t)
	answer := next(wire.ClientTimeout)
	if _, err := first.sums(lease, size, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-answer:
		// So slow a machine took half a second for the block, after which nobody expects the other one.
		t.Skipf("answered before the file was whole: %v", err)
	case <-time.After(10 * wholePoll):
	}
	if _, err := first.sums(lease, size, 1); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; err != nil {
		t.Error(err)
	}
}

func TestWhoComesToACrowdThatReadsNothingWaitsShortly(t *testing.T) {
	noGoroutines(t)
	_, _, _, _, next := crowd(t)
	begun := time.Now()
	if err := <-next(wire.ClientTimeout); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took < wholePace {
		t.Errorf("it waited %v", took)
	}
}

func TestWhoReadsAlreadyDoesNotWaitForOthers(t *testing.T) {
	noGoroutines(t)
	tr, _, _, _, next := crowd(t)
	if err := <-next(0); err != nil {
		t.Error(err)
	}
	if n := tr.workers[0].store.Stats().Leases; int(n) != readersPerCPU*runtime.NumCPU()+1 {
		t.Errorf("%d leases", n)
	}
}
