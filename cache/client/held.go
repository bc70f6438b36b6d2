package client

import (
	"context"
	"errors"
	"fmt"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// ReadHeld reads all of a small file, len(p) bytes, if the first of its owners holds it in memory. Nobody waits
// for them: nothing is fetched from the bucket for it, no other worker is asked, nothing is kept here, and
// requests that somebody waits for go first. p is left alone once it has returned.
func (c *Client) ReadHeld(ctx context.Context, i catalog.Index, p []byte) error {
	if !c.begin() {
		return errClosed
	}
	defer c.calls.Done()
	o, err := c.object(i)
	if err != nil {
		return err
	}
	if int64(len(p)) != o.Size || o.Size == 0 || o.Size > ring.BlockSize {
		return fmt.Errorf("%s: %d bytes of a file of %d: %w", c.name(i), len(p), o.Size, source.ErrInvalid)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	w := piece{index: i, object: o, n: len(p)}
	steps := c.plan(c.members.view(), w)
	if len(steps) == 0 {
		return fmt.Errorf("%s: %w", c.name(i), errGuess)
	}
	err = c.ask(ctx, step{peer: steps[0].peer}, wire.FlagResidentOnly, w, p)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errHung):
		steps[0].peer.suspect(err)
	case errors.Is(err, wire.ErrCorrupt):
		c.count.corrupt.Add(1)
	}
	return fmt.Errorf("%s: %w", c.name(i), err)
}
