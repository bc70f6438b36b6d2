package client

import (
	"context"
	"fmt"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/wire"
)

// Current asks the workers for the digest of the dataset's current snapshot, without the snapshot itself, and
// waits while there is none. That it answers also proves that the workers take the configuration's read key. It
// ends with ctx, or when every worker refuses this client's key.
func Current(ctx context.Context, config Config) (catalog.Digest, error) {
	c, err := newClient(config, defaultTiming())
	if err != nil {
		return catalog.Digest{}, fmt.Errorf("dataset %s: %w", config.Dataset, err)
	}
	defer c.Close()
	return c.Current(ctx)
}

// Current is the digest of the snapshot that the workers give to new readers; this client goes on reading its
// own.
func (c *Client) Current(ctx context.Context) (catalog.Digest, error) {
	if !c.begin() {
		return catalog.Digest{}, errClosed
	}
	defer c.calls.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(errClosed) })() // Close waits for this call
	var digest catalog.Digest
	err := c.fromAny(ctx, func(p *peer) error {
		ctx, cancel := context.WithTimeoutCause(ctx, c.timing.worker, wire.ErrLate)
		defer cancel()
		// One byte of it, since an empty payload is not an answer that every worker gives.
		reply, _, err := p.small(ctx, wire.Request{Op: wire.OpSnapshot, Length: 1})
		if err == nil && reply.Body == (wire.Digest{}) {
			err = fmt.Errorf("%w: a snapshot without a digest", errWrong)
		}
		digest = reply.Body
		return err
	})
	return digest, err
}
