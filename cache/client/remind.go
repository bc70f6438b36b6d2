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
	for sleepUntil(ctx, c.timing.remind-rand.N(c.timing.remind/5+1), c.forgotten) {
		err := c.giveBack(ctx)
		if err != nil && ctx.Err() == nil {
			c.log.Info("no worker holds the snapshot that this reads", "dataset", c.config.Dataset, "digest", c.short(), "error", err)
		}
		if !errors.Is(err, source.ErrInvalid) {
			c.unwanted.Store(nil)
			continue
		}
		err = fmt.Errorf("snapshot %s, which this reads, is held by no worker any more and not taken back; begin anew to read the current one: %w", c.short(), err)
		c.unwanted.Store(&err)
	}
}

// giveBack asks every worker for the snapshot and offers it to one if none holds it; the others get it from that one. It
// is source.ErrInvalid if all who could be asked refuse it, whatever the time.
func (c *Client) giveBack(ctx context.Context) error {
	var without []*peer
	held, last := false, errors.New("no worker is ready")
	for _, p := range c.sources() {
		ask, cancel := context.WithTimeoutCause(ctx, c.timing.worker, wire.ErrLate)
		_, _, err := p.small(ask, wire.Request{Op: wire.OpSnapshot, Snapshot: c.digest, Length: 1})
		cancel()
		switch {
		case err == nil:
			held = true
		case errors.Is(err, wire.ErrUnknownSnapshot):
			without = append(without, p)
		default:
			last = fmt.Errorf("worker %s: %w", p.member.ID, err)
		}
	}
	if held {
		return nil
	}
	for i, p := range without {
		err := c.offer(ctx, p)
		if err == nil {
			return nil
		}
		if i == 0 || !errors.Is(err, source.ErrInvalid) {
			last = fmt.Errorf("worker %s: %w", p.member.ID, err)
		}
	}
	return last
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
