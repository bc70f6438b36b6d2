package worker

import (
	"context"
	"runtime"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// A file that is read by descriptor before it is whole costs its readers a fifth more CPU than one that is passed through
// by the kernel. Where so many read it that their processors have enough to do until it is whole, whoever comes then is
// better off waiting for that.
const (
	// readersPerCPU is how many readers a file has for each processor of this machine before others wait.
	readersPerCPU = 2
	// justOpened is how long who was told to read a file that is not whole counts as a reader without a lease of it.
	justOpened = time.Second
	// wholePoll is how often it is seen whether a file is whole.
	wholePoll = 10 * time.Millisecond
	// wholePace is how long its readers' pace is watched for a guess at when it will be.
	wholePace = 500 * time.Millisecond
	// maxCrowds is how many files are remembered before those are forgotten that nobody has opened just now.
	maxCrowds = 1024
)

// crowds knows who has just opened which files that are not whole.
type crowds struct {
	mu     sync.Mutex
	opened map[source.ID][]time.Time
}

// join counts one more who opens a file that has so many readers by descriptor, unless they are most already. Who has
// opened it just now may be one of these readers by now, so the larger number counts.
func (c *crowds) join(id source.ID, readers, most int, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.opened == nil {
		c.opened = make(map[source.ID][]time.Time)
	}
	for other, at := range c.opened {
		if len(c.opened) < maxCrowds {
			break
		}
		if now.Sub(at[len(at)-1]) >= justOpened {
			delete(c.opened, other)
		}
	}
	at := c.opened[id]
	for len(at) > 0 && now.Sub(at[0]) >= justOpened {
		at = at[1:]
	}
	if max(readers, len(at)) >= most {
		return false
	}
	c.opened[id] = append(at, now)
	return true
}

// awaitWhole waits for a file to become whole by what others read of it, if it has a crowd of readers, as long as it can
// be expected to be whole within wait. It says whether it is.
func (w *Worker) awaitWhole(ctx context.Context, f file, wait time.Duration) bool {
	r := w.store.Residency(f.ring)
	at := time.Now()
	if r.Whole || w.crowds.join(f.ring.ID, r.Leases, readersPerCPU*runtime.NumCPU(), at) {
		return r.Whole
	}
	t := time.NewTicker(wholePoll)
	defer t.Stop()
	end, before := at.Add(wait), r.Bytes
	hope := 4.0 // that the first look at the pace is at readers who have only begun
	for {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
		}
		now := time.Now()
		if r = w.store.Residency(f.ring); r.Whole || now.After(end) {
			return r.Whole
		}
		if past := now.Sub(at); past >= wholePace {
			pace := hope * float64(r.Bytes-before) / past.Seconds()
			if float64(f.ring.Size-r.Bytes) > pace*end.Sub(now).Seconds() {
				return false
			}
			at, before, hope = now, r.Bytes, 1
		}
	}
}
