package objects

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/ring"
)

const (
	// routeTries is how often the owner is looked up again when workers disagree about the membership.
	routeTries = 5
	// catchUp is how long a worker that is behind is given to read the membership again.
	catchUp = 2 * time.Second
)

// owner is the member that decides which version a name has.
func (n *Names) owner(s state, key string) (ring.Member, error) {
	if o := s.NameOwners(n.c.Dataset, key, 1); len(o) > 0 {
		return o[0], nil
	}
	return ring.Member{}, fmt.Errorf("%w: dataset %s: no worker is Ready under membership epoch %d", gateway.ErrBusy, n.c.Dataset, s.Epoch)
}

// local executes an operation on this worker; owned says that it owns the name under s.
type local[T any] func(ctx context.Context, p place, s state, owned bool) (T, error)

// remotely executes it at m, under the epoch of s.
type remotely[T any] func(ctx context.Context, m ring.Member, s state) (T, error)

// route executes an operation where the name's owner is, or here when that cannot be reached. again says
// whether it may be executed here after it may have begun there.
func route[T any](ctx context.Context, n *Names, key string, here local[T], there remotely[T], again func() bool) (T, error) {
	var none T
	p, err := n.locate(key)
	if err != nil {
		return none, err
	}
	for try := 1; ; try++ {
		s := n.epochs.now()
		m, err := n.owner(s, key)
		if err != nil {
			return none, err
		}
		if m.ID == n.c.Self {
			v, err := here(ctx, p, s, true)
			if moved := (*errMoved)(nil); errors.As(err, &moved) && try < routeTries {
				continue
			}
			return v, err
		}
		var v T
		if err = n.peers.known(m); err == nil {
			n.counts.forwarded.Add(1)
			v, err = there(ctx, m, s)
		}
		var stale *errStale
		var peer *errPeer
		switch {
		case err == nil || ctx.Err() != nil:
			return v, err
		case errors.As(err, &stale):
			n.epochs.heard(stale.epoch, n.c.Clock.Now())
			if try < routeTries && again() {
				if !n.epochs.wait(ctx, max(stale.epoch, s.Epoch+1), catchUp/routeTries) && stale.epoch > s.Epoch {
					n.epochs.wait(ctx, stale.epoch, catchUp)
				}
				continue
			}
			err = fmt.Errorf("%w: %q: the workers do not follow the same membership: %w", gateway.ErrBusy, key, err)
		case errors.As(err, &peer):
			err = fmt.Errorf("%w: %q: its owner cannot be reached: %w", gateway.ErrBusy, key, err)
		default:
			return none, err
		}
		if !again() || n.back != nil {
			return none, err // what its owner has pending is not known here
		}
		n.log.Debug("executed here for an owner that cannot be reached", "key", key, "owner", m.ID, "error", err)
		n.counts.direct.Add(1)
		return here(ctx, p, s, false)
	}
}

func always() bool { return true }
