package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// remind has the workers keep the snapshot for as long as this client reads by it, also while nothing that is read asks
// them, and gives it back once none holds it: all may have lost their memory since the bucket was listed anew.
func (c *Client) remind(ctx context.Context) {
	// All readers of a dataset find out in one moment, maybe while its workers begin.
	pause := c.pauses()
	pause.InitialInterval, pause.MaxInterval = c.timing.retryMax, 30*c.timing.retryMax
	pause.Reset()
	said := ""
	for sleepUntil(ctx, c.timing.remind-rand.N(c.timing.remind/5+1), c.forgotten) {
		refused, err := c.keepSnapshot(ctx)
		switch {
		case err == nil:
			pause.Reset()
			said = ""
		case ctx.Err() == nil && err.Error() != said:
			said = err.Error()
			c.log.Info("no worker holds the snapshot that this reads", "digest", c.short(), "error", err)
		}
		c.unwanted.Store(nil)
		if refused {
			err = fmt.Errorf("snapshot %s, which this reads, is held by no worker any more and not taken back; begin anew to read the current one: %w", c.short(), err)
			c.unwanted.Store(&err)
		}
		if !sleep(ctx, pause.NextBackOff()) {
			return
		}
	}
}

// keepSnapshot asks every worker for the snapshot and offers it to one if none holds it; the others get it from that
// one. refused says that there is no worker but has refused it.
func (c *Client) keepSnapshot(ctx context.Context) (refused bool, err error) {
	var without []*peer
	held, err := false, errors.New("no worker is ready")
	peers := c.sources()
	for _, p := range peers {
		used := p.live() != nil
		ask, cancel := context.WithTimeoutCause(ctx, c.timing.worker, wire.ErrLate)
		_, _, aerr := p.small(ask, wire.Request{Op: wire.OpSnapshot, Snapshot: c.digest, Length: 1})
		cancel()
		if !used {
			p.rest() // thousands of readers remind all workers: those that read nothing there keep no connection for it
		}
		switch {
		case aerr == nil:
			held = true
		case errors.Is(aerr, wire.ErrUnknownSnapshot):
			without = append(without, p)
		default:
			err = fmt.Errorf("worker %s: %w", p.member.ID, aerr)
		}
	}
	if held {
		return false, nil
	}
	refused = len(without) > 0 && len(without) == len(peers)
	for _, p := range without {
		oerr := c.offer(ctx, p)
		if oerr == nil {
			return false, nil
		}
		refused = refused && errors.Is(oerr, source.ErrInvalid)
		err = fmt.Errorf("worker %s: %w", p.member.ID, oerr)
	}
	return refused, err
}

func (c *Client) offer(ctx context.Context, p *peer) error {
	nc, err := c.prove(ctx, "tcp", p.member.Addr, nil)
	if err != nil {
		return err
	}
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	return wire.Offer(nc, c.digest, c.snapshot.Encoded())
}
