package local

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stepcache/stepcache/local/process"
)

// keeper keeps processes running: one that ends is started again, with a growing wait, until close.
type keeper struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	logf   func(format string, args ...any)
	again  atomic.Int64 // how often one was started again
}

func newKeeper(logf func(string, ...any)) *keeper {
	k := &keeper{logf: logf}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k
}

// keep takes over a process, and starts another one whenever it ends. start is not called concurrently; its
// errors are logged and it is tried again.
func (k *keeper) keep(name string, p *process.Process, start func() (*process.Process, error)) {
	k.wg.Go(func() {
		const least, most = 100 * time.Millisecond, 10 * time.Second
		wait := least
		for {
			began := time.Now()
			select {
			case <-k.ctx.Done():
				ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
				p.Stop(ctx)
				cancel()
				return
			case <-p.Done():
			}
			k.logf("%s ended and is started again (%s)", name, ending(p))
			if time.Since(began) > most {
				wait = least
			}
			for p = nil; p == nil; wait = min(2*wait, most) {
				select {
				case <-k.ctx.Done():
					return
				case <-time.After(wait):
				}
				var err error
				if p, err = start(); err != nil {
					k.logf("%s: %v", name, err)
				} else {
					k.again.Add(1)
				}
			}
		}
	})
}

// ending says how a process ended, with the end of what it said.
func ending(p *process.Process) string {
	how := "exit status 0"
	if err := p.Err(); err != nil {
		how = err.Error()
	}
	if tail := p.Tail(); tail != "" {
		how += "; it said:\n  " + strings.ReplaceAll(tail, "\n", "\n  ")
	}
	return how
}

// close stops the processes, all at once, and waits for them.
func (k *keeper) close() {
	k.cancel()
	k.wg.Wait()
}
