package local

import (
	"context"
	"sync"
	"time"

	"github.com/stepcache/stepcache/local/process"
)

// keeper keeps processes running: one that ends is started again, with a growing wait, until close.
type keeper struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	logf   func(format string, args ...any)
}

func newKeeper(logf func(string, ...any)) *keeper {
	k := &keeper{logf: logf}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k
}

// keep starts a process and from then on keeps one running. start is not called concurrently. Only the
// first start's error is returned; later ones are logged and tried again.
func (k *keeper) keep(name string, start func() (*process.Process, error)) error {
	p, err := start()
	if err != nil {
		return err
	}
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
			k.logf("%s ended (%v) and is started again: %s", name, p.Err(), p.Tail())
			if time.Since(began) > most {
				wait = least
			}
			for p = nil; p == nil; wait = min(2*wait, most) {
				select {
				case <-k.ctx.Done():
					return
				case <-time.After(wait):
				}
				if p, err = start(); err != nil {
					k.logf("%s: %v", name, err)
				}
			}
		}
	})
	return nil
}

// close stops the processes, all at once, and waits for them.
func (k *keeper) close() {
	k.cancel()
	k.wg.Wait()
}
