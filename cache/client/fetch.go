package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// piece is a range of one block that is wanted: it starts on a checksum.Size boundary and ends on one or with
// the object.
type piece struct {
	index  catalog.Index
	object ring.Object
	block  int64
	off    int64 // from the object's start
	n      int
	urgent <-chan struct{} // closed when somebody waits for it
	sums   *[]uint64       // gets the sums that the bytes came with and were compared with; nil: nobody wants them
	to     io.WriterAt     // gets the bytes, at offsets from off, instead of a buffer; nil: there is one
}

// give passes on what came from a second copy; nobody else writes any more.
func (w *piece) give(dst, p []byte) error {
	if w.to == nil {
		copy(dst, p)
		return nil
	}
	if _, err := w.to.WriteAt(p, 0); err != nil {
		return fmt.Errorf("%w: %w", errSink, err)
	}
	return nil
}

// took notes the answer that was taken.
func (w *piece) took(k *call) {
	if w.sums != nil {
		*w.sums = k.reply.Sums
	}
}

const (
	// bucketTries is how many workers are asked once one has said that the bucket does not serve it: the
	// bucket is rarely better for another, and a bucket in trouble must not be asked by a hundred.
	bucketTries = 4
	// patience is how many rounds a refusal is questioned while other workers cannot be reached.
	patience = 6
	// settle is how many rounds an owner that does not have the snapshot is given to get it, before another
	// worker reads a block through that the owner would soon serve to all. They take about two seconds.
	settle = 10
	// busyTries is how often a worker that is overloaded, or throttled by the bucket, is asked again
	// before another one is.
	busyTries = 6
	// dialPatience is how long a request waits at least for a connection to a worker before another copy is asked.
	dialPatience = 50 * time.Millisecond
)

// errDialing: another copy is asked meanwhile.
var errDialing = fmt.Errorf("%w yet", errDown)

// fetch receives the bytes of w into dst, whose length is w.n, or into w.to, from whichever worker has them. It returns
// with an error only when the object is gone or changed, when every worker that answers refuses, or when
// ClientTimeout or ctx ends. Neither is touched after it has returned.
func (c *Client) fetch(ctx context.Context, w piece, dst []byte) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timing.client, errDeadline)
	defer cancel()
	pause := c.pauses()
	var last error
	for round := 1; ; round++ {
		changed := c.members.wait() // before planning, so that no change is missed
		seen := c.members.view()
		r := c.round(ctx, seen, w, dst, round)
		if r.ok {
			return nil
		}
		last = telling(last, r.err)
		switch {
		case r.final:
			return c.explain(w, r.err)
		case ctx.Err() != nil:
			return c.giveUp(ctx, w, last)
		case r.refused && (!r.hope || round >= patience):
			return c.explain(w, r.err)
		case r.stale && c.members.view() != seen:
			continue
		case r.unknown && round >= settle: // they have had time to get it from each other
			select {
			case c.forgotten <- struct{}{}:
			default:
			}
			if err := c.unwanted.Load(); err != nil {
				return c.explain(w, *err)
			}
		}
		c.count.rounds.Add(1)
		c.members.refresh()
		sleepUntil(ctx, pause.NextBackOff(), changed)
	}
}

// guess is fetch for bytes that nobody has asked for. It asks the first owner only, as often as that one is busy
// with others' guesses, and gives up with errGuess. Once somebody waits for the bytes it is fetch.
func (c *Client) guess(ctx context.Context, w piece, dst []byte) error {
	// A reader may come to wait for it, and has a deadline of its own above this one.
	ctx, cancel := context.WithTimeoutCause(ctx, c.timing.client, errDeadline)
	defer cancel()
	pause := c.pauses()
	for try := 0; ; try++ {
		steps := c.plan(c.members.view(), w)
		if len(steps) == 0 {
			return errGuess
		}
		err := c.ask(ctx, step{peer: steps[0].peer}, wire.FlagGuess, w, dst)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return c.giveUp(ctx, w, err)
		case isClosed(w.urgent):
			return c.fetch(ctx, w, dst)
		case errors.Is(err, errHung):
			steps[0].peer.suspect(err)
			return errGuess
		case errors.Is(err, wire.ErrCorrupt):
			c.count.corrupt.Add(1)
			c.count.refetched.Add(1)
			return c.fetch(ctx, w, dst) // the worker shall check what it holds
		case !errors.Is(err, wire.ErrOverloaded) || try == busyTries:
			return errGuess
		}
		sleepUntil(ctx, pause.NextBackOff(), w.urgent)
		if isClosed(w.urgent) {
			return c.fetch(ctx, w, dst)
		}
	}
}

var errDeadline = errors.New("deadline exceeded")

func (c *Client) pauses() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = c.timing.retry, c.timing.retryMax
	b.Reset()
	return b
}

// explain names the object in an error that a worker gave.
func (c *Client) explain(w piece, err error) error {
	name := c.name(w.index)
	switch {
	case errors.Is(err, source.ErrChanged):
		return fmt.Errorf("%s: changed in the bucket since snapshot %s was made; to read the new version, %s: %w", name, c.short(), source.Relist, err)
	case errors.Is(err, source.ErrNotFound):
		return fmt.Errorf("%s: deleted from the bucket since snapshot %s was made; %s: %w", name, c.short(), source.Relist, err)
	}
	return fmt.Errorf("%s: %w", name, err)
}

func (c *Client) giveUp(ctx context.Context, w piece, last error) error {
	why := context.Cause(ctx)
	switch {
	case errors.Is(why, errDeadline) && last != nil:
		return fmt.Errorf("%s: no worker could serve it within %v: %w: %w", c.name(w.index), c.timing.client, context.DeadlineExceeded, last)
	case errors.Is(why, errDeadline):
		return fmt.Errorf("%s: no worker could serve it within %v: %w", c.name(w.index), c.timing.client, context.DeadlineExceeded)
	}
	return fmt.Errorf("%s: %w", c.name(w.index), why)
}

// outcome is what one round of asking came to.
type outcome struct {
	ok      bool
	final   bool  // err is the object's: nobody can do better
	refused bool  // a worker that reached the bucket was refused; err says why
	hope    bool  // a worker could not be asked, or may answer differently later
	stale   bool  // a worker disagreed about who owns the block
	unknown bool  // a worker does not hold the snapshot
	err     error // the most telling one
}

// add takes in the failure of one step.
func (o *outcome) add(err error) {
	switch {
	case errors.Is(err, source.ErrChanged), errors.Is(err, source.ErrNotFound), errors.Is(err, errSink):
		o.final, o.err = true, err
		return
	case errors.Is(err, source.ErrDenied), errors.Is(err, source.ErrNoBucket),
		errors.Is(err, source.ErrUnversioned), errors.Is(err, source.ErrInvalid):
		if !o.refused {
			o.refused, o.err = true, err
		}
		return
	case errors.Is(err, wire.ErrNotOwner):
		o.stale, o.hope = true, true
	case errors.Is(err, wire.ErrUnknownSnapshot):
		o.unknown, o.hope = true, true
	default:
		o.hope = true
	}
	// What the bucket said tells more than that some worker is down.
	if o.err == nil || !o.refused && bucketError(err) {
		o.err = err
	}
}

// telling is the newer of two errors, unless only the one before tells what the bucket said.
func telling(before, err error) error {
	if err == nil || bucketError(before) && !bucketError(err) {
		return before
	}
	return err
}

func bucketError(err error) bool {
	return errors.Is(err, source.ErrUnavailable) || errors.Is(err, source.ErrThrottled) || errors.Is(err, source.ErrDenied) ||
		errors.Is(err, source.ErrNoBucket) || errors.Is(err, source.ErrUnversioned) || errors.Is(err, source.ErrInvalid)
}

// step is one worker to ask, and how.
type step struct {
	peer  *peer
	flags wire.Flag
	hedge *peer // who else may hold the block
}

// plan is the order in which workers are asked for a block: its owners, those of this node first; then
// everybody, as a worker that does not own the block and reads it through from the bucket. An owner is in
// it twice, for one that does not know that it is one.
func (c *Client) plan(v *view, w piece) []step {
	order := v.Owners(w.object, w.block, 0)
	owners := order[:min(c.copies, len(order))]
	steps := make([]step, 0, len(order)+len(owners))
	for _, here := range []bool{true, false} {
		for _, m := range owners {
			if (c.config.Node != "" && m.Node == c.config.Node) == here {
				steps = append(steps, step{peer: v.peers[m.ID]})
			}
		}
	}
	for i := range steps[:max(len(steps)-1, 0)] {
		steps[i].hedge = steps[i+1].peer
	}
	for _, m := range order[len(owners):] {
		steps = append(steps, step{peer: v.peers[m.ID], flags: wire.FlagReadThrough})
	}
	for _, m := range owners {
		steps = append(steps, step{peer: v.peers[m.ID], flags: wire.FlagReadThrough})
	}
	return steps
}

// round asks workers in the order of the plan until one answers.
func (c *Client) round(ctx context.Context, v *view, w piece, dst []byte, n int) outcome {
	var o outcome
	bucket := 0
	settling := false // an owner is getting the snapshot
	failed := make(map[*peer]bool)
	steps := c.plan(v, w)
	for i, s := range steps {
		if failed[s.peer] {
			continue
		}
		if settling && s.flags&wire.FlagReadThrough != 0 {
			return o
		}
		err := c.try(ctx, s, w, dst)
		if err == nil {
			if s.peer.strange.Load() {
				s.peer.strange.Store(false)
			}
			if i > 0 {
				c.count.fallbacks.Add(1)
			}
			o.ok = true
			return o
		}
		if ctx.Err() != nil {
			if !errors.Is(err, context.Cause(ctx)) {
				o.add(err)
			}
			return o
		}
		o.add(err)
		c.log.Debug("worker did not serve a block", "worker", s.peer.member.ID, "file", c.path(w.index), "block", w.block, "error", err)
		if o.final {
			failed[s.peer] = true
			if !temporary(err) && c.heldElsewhere(ctx, steps, failed, w, dst) {
				c.count.fallbacks.Add(1)
				o.ok = true
			}
			return o
		}
		switch {
		case errors.Is(err, errDialing): // it may hold yet what others have lost
		case !errors.Is(err, wire.ErrNotOwner):
			failed[s.peer] = true
		case c.members.view() != v:
			return o // there is a newer list already: plan anew
		}
		if errors.Is(err, wire.ErrUnknownSnapshot) && s.flags == 0 && !s.peer.strange.Load() {
			if settling = n < settle; !settling {
				s.peer.strange.Store(true) // it will not get it: nobody waits for that again
			}
		}
		if bucketError(err) {
			if bucket++; bucket >= bucketTries {
				return o
			}
		}
	}
	if o.err == nil {
		o.err = errors.New("no worker is ready")
		o.hope = true
	}
	return o
}

// heldElsewhere asks the owners that have not failed for what they hold, when the bucket has lost a block that another
// of its owners does not hold any more.
func (c *Client) heldElsewhere(ctx context.Context, steps []step, failed map[*peer]bool, w piece, dst []byte) bool {
	for _, s := range steps {
		if s.flags == 0 && !failed[s.peer] && c.try(ctx, step{peer: s.peer, flags: wire.FlagResidentOnly}, w, dst) == nil {
			return true
		}
	}
	return false
}

// try asks one worker, again where that worker may well answer at the second attempt.
func (c *Client) try(ctx context.Context, s step, w piece, dst []byte) error {
	flags := s.flags
	busy, lost, corrupt := 0, 0, 0
	pause := c.pauses()
	for {
		err := c.ask(ctx, s, flags, w, dst)
		switch {
		case err == nil || ctx.Err() != nil:
			return err
		case errors.Is(err, errHung):
			s.peer.suspect(err)
			return err
		case errors.Is(err, errDown):
			return err
		case errors.Is(err, errLost):
			// The network, or a restart: dialling again tells which.
			if lost++; lost > 1 {
				return err
			}
		case errors.Is(err, wire.ErrCorrupt):
			c.count.corrupt.Add(1)
			if corrupt++; corrupt > 2 {
				return err
			}
			// The worker checks what it holds; when that is sound it was the line, for once.
			flags |= wire.FlagVerify
			c.count.refetched.Add(1)
			c.log.Warn("payload failed its checksum, asking again", "worker", s.peer.member.ID, "file", c.path(w.index), "block", w.block, "error", err)
		case errors.Is(err, wire.ErrOverloaded), errors.Is(err, source.ErrThrottled):
			if busy++; busy > busyTries {
				return err
			}
			if !sleep(ctx, pause.NextBackOff()) {
				return context.Cause(ctx)
			}
		default:
			return err
		}
	}
}

// ask makes one request to one worker, hedged where there is another copy, and checks the answer.
func (c *Client) ask(ctx context.Context, s step, flags wire.Flag, w piece, dst []byte) error {
	slot, err := s.peer.slots.acquire(ctx, int64(w.n), w.urgent)
	if err != nil {
		return err
	}
	defer slot.release()
	req := wire.Request{
		Op: wire.OpRead, Flags: flags, Epoch: c.members.view().Epoch, Snapshot: c.digest,
		Index: w.index, Off: w.off, Length: int32(w.n),
	}
	if end, ok := ctx.Deadline(); ok { // so that the worker stops when nobody waits any more
		req.WaitMillis = uint32(max(1, min(time.Until(end), wire.WorkerTimeout).Milliseconds()))
	}
	conn, first, err := c.start(ctx, s, req, dst, w.to)
	if err != nil {
		return err
	}
	begun, received := time.Now(), conn.rx.Load()
	timer := time.NewTimer(c.timing.worker)
	defer timer.Stop()
	slow := time.NewTimer(c.timing.slow)
	defer slow.Stop()
	var hedge <-chan time.Time
	if s.hedge != nil && flags == 0 {
		if d, ok := c.latency.hedge(w.n); ok {
			t := time.NewTimer(d + time.Duration(rand.Int64N(int64(d)/4+1)))
			defer t.Stop()
			hedge = t.C
		}
	}
	var (
		second     *hedged
		secondDone <-chan struct{}
	)
	defer func() { second.end() }()
	// quit ends the first call; false when its answer came at the last moment and counts.
	quit := func() bool { return conn.takeBack(first) }
	last := func() error {
		err := check(first)
		if err == nil {
			w.took(first)
		}
		return err
	}
	for {
		select {
		case <-first.done:
			err := check(first)
			if err == nil {
				w.took(first)
				c.latency.observe(w.n, time.Since(begun))
				c.count.workerBytes.Add(int64(w.n))
			} else if second != nil && temporary(err) {
				// The copy was asked already: it may be about to answer.
				select {
				case <-second.call.done:
					if check(second.call) == nil {
						if err := w.give(dst, second.buf); err != nil {
							return err
						}
						w.took(second.call)
						c.count.hedgeWins.Add(1)
						c.count.workerBytes.Add(int64(w.n))
						return nil
					}
				case <-timer.C:
				case <-ctx.Done():
				}
			}
			return err
		case <-slow.C:
			slot.yield()
		case <-hedge:
			hedge = nil
			if second = c.hedge(s.hedge, req); second != nil {
				secondDone = second.call.done
			}
		case <-secondDone:
			secondDone = nil
			if check(second.call) != nil {
				continue // most often it does not hold the block
			}
			if !quit() {
				if err := check(first); err == nil {
					w.took(first)
					c.count.workerBytes.Add(int64(w.n))
					return nil
				}
			}
			if err := w.give(dst, second.buf); err != nil {
				return err
			}
			w.took(second.call)
			c.latency.observe(w.n, time.Since(begun))
			c.count.hedgeWins.Add(1)
			c.count.workerBytes.Add(int64(w.n))
			return nil
		case <-timer.C:
			// A line that is crowded still brings a block in that time: this answer's turn comes, as long as ctx lasts,
			// and whoever else was asked would make the crowd larger.
			if now := conn.rx.Load(); now-received >= ring.BlockSize {
				received = now
				timer.Reset(c.timing.worker)
				continue
			}
			if quit() {
				return fmt.Errorf("worker %s: %w", s.peer.member.ID, wire.ErrLate)
			}
			return last()
		case <-ctx.Done():
			if quit() {
				return context.Cause(ctx)
			}
			return last()
		}
	}
}

// start sends the first request of a step. Where there is another copy it waits for a connection no longer than for an
// answer: to a worker that is cut off one takes wire.DialTimeout. It is made all the same, for those that ask later.
func (c *Client) start(ctx context.Context, s step, req wire.Request, dst []byte, to io.WriterAt) (*conn, *call, error) {
	patience := time.Duration(0)
	switch {
	case s.peer.live() != nil:
	case req.Flags == wire.FlagGuess: // whoever joins it asks by himself then
		patience = dialPatience
	case s.hedge != nil && req.Flags == 0 && !s.hedge.isDown():
		if d, ok := c.latency.hedge(int(req.Length)); ok {
			patience = max(d, dialPatience)
		}
	}
	if patience > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, patience, errDialing)
		defer cancel()
	}
	return s.peer.start(ctx, req, dst, to)
}

// temporary says whether the failure is the worker's rather than the object's.
func temporary(err error) bool {
	return !errors.Is(err, source.ErrChanged) && !errors.Is(err, source.ErrNotFound)
}

// check is the verdict on a call that is done: nil only for the right bytes.
func check(k *call) error {
	if k.err != nil {
		return k.err
	}
	if k.bad != nil {
		return k.bad
	}
	if k.reply.Status != wire.OK { // only then is the payload a text
		return k.reply.Status.Err(string(k.body))
	}
	return nil
}

// hedged is a request to a second copy, with a buffer of its own.
type hedged struct {
	c    *Client
	conn *conn
	call *call
	slot *slot
	buf  []byte
	size int
}

// hedge asks a second copy, if that costs nothing: a connection, a slot and a buffer are free.
func (c *Client) hedge(p *peer, req wire.Request) *hedged {
	conn := p.live()
	if conn == nil {
		p.wake() // what is not first for anything has none after a while
		return nil
	}
	if !c.latency.pay() {
		return nil
	}
	slot, ok := p.slots.try(int64(req.Length))
	if !ok {
		return nil
	}
	buf, size, ok := c.cache.spare(int(req.Length))
	if !ok {
		slot.release()
		return nil
	}
	req.Flags |= wire.FlagResidentOnly
	call, err := conn.start(req, buf, nil)
	if err != nil {
		slot.release()
		c.cache.giveBack(buf, size)
		return nil
	}
	c.count.hedges.Add(1)
	return &hedged{c: c, conn: conn, call: call, slot: slot, buf: buf, size: size}
}

// end gives the hedge's buffer back once nobody writes into it.
func (h *hedged) end() {
	if h == nil {
		return
	}
	last := func() {
		h.conn.takeBack(h.call)
		h.slot.release()
		h.c.cache.giveBack(h.buf, h.size)
	}
	if h.conn.abandon(h.call) {
		h.slot.release()
		h.c.cache.giveBack(h.buf, h.size)
	} else if isClosed(h.call.done) || !h.c.spawn(last) {
		last()
	}
}
