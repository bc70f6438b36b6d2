package objects

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/objects/journal"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// flushAtOnce is how many names are brought to the bucket at once: each holds up to an object in memory.
	flushAtOnce = 8
	// flushTimeout bounds one try.
	flushTimeout = 2 * time.Minute
	// retryMin and retryMax bound the time between two tries of one name, retryEvery is how often it is
	// looked which are due.
	retryMin = 250 * time.Millisecond
	retryMax = 15 * time.Second
	// retellMax is the same where the bucket has it, and only copies are to be dropped.
	retellMax  = time.Second
	retryEvery = 100 * time.Millisecond
	// tellTimeout bounds a word to another worker.
	tellTimeout = 5 * time.Second
)

// keepFlushing brings what is pending to the bucket until ctx ends.
func (b *back) keepFlushing(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	places := make(chan struct{}, flushAtOnce)
	for {
		for {
			b.mu.Lock()
			if len(b.queue) == 0 {
				b.mu.Unlock()
				break
			}
			key := b.queue[0]
			b.queue = b.queue[1:]
			p := b.names[key]
			if p != nil {
				p.queued = false
			}
			if p == nil || p.flushing {
				b.mu.Unlock()
				continue
			}
			p.flushing = true
			b.mu.Unlock()
			select {
			case places <- struct{}{}:
			case <-ctx.Done():
				return
			}
			wg.Go(func() {
				defer func() { <-places }()
				b.flush(ctx, p)
			})
		}
		select {
		case <-ctx.Done():
			return
		case <-b.kick:
		case <-b.n.c.Clock.After(retryEvery):
			b.due()
		}
	}
}

// due has those flushed whose next try is due.
func (b *back) due() {
	now := b.n.c.Clock.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.names {
		if !p.flushing && !p.queued && !p.next.IsZero() && !now.Before(p.next) {
			b.enqueue(p)
		}
	}
}

// flush brings the newest entry of a name to the bucket, and tells those that hold it and what came before.
// It is the only one to do so of this name, so that the bucket is given the versions in their order.
func (b *back) flush(ctx context.Context, p *pending) {
	err := b.flushOnce(ctx, p)
	b.mu.Lock()
	defer b.mu.Unlock()
	p.flushing = false
	p.err, p.next = nil, time.Time{}
	if err != nil {
		p.err = err
		p.tries++
		most := retryMax
		if len(p.entries) == 0 {
			most = retellMax
		}
		p.next = b.n.c.Clock.Now().Add(min(retryMin<<min(p.tries-1, 16), most))
	} else {
		p.tries = 0
		// What has come meanwhile. While something is being held, leave does.
		if len(p.entries) > 0 || p.committing == 0 && (p.kept || len(p.stale) > 0 || len(p.marks) > 0) {
			b.enqueue(p)
		}
	}
	p.tell()
	b.tidy(p)
}

func (b *back) flushOnce(ctx context.Context, p *pending) error {
	s, ok := b.sure(p.key)
	if !ok {
		b.mu.Lock()
		mine := b.owns(s.Membership, p.key)
		if !mine && p.through == 0 && p.committing == 0 && b.names[p.key] == p {
			delete(b.names, p.key) // its new owner will
		}
		b.mu.Unlock()
		if !mine {
			return nil
		}
		return fmt.Errorf("%w: the membership is not settled", gateway.ErrBusy)
	}
	b.mu.Lock()
	e, checks, gen := p.newest(), p.checks, p.gen
	b.mu.Unlock()
	if e != nil {
		at, err := b.n.locate(p.key)
		if err == nil {
			err = b.send(ctx, p, at, s, e, checks)
		}
		if err != nil {
			if ctx.Err() == nil {
				b.trouble(fmt.Errorf("%q is not in the bucket yet: %w", p.key, err))
				b.repair(ctx, p, s)
			}
			return err
		}
		b.trouble(nil)
		b.mu.Lock()
		if p.gen != gen {
			b.mu.Unlock()
			return nil // found anew meanwhile: the bucket is asked then
		}
		p.floor, p.checks, p.kept = e.Seq, false, true
		p.entries = slices.DeleteFunc(p.entries, func(o *unsent) bool {
			if o.Seq.Compare(e.Seq) > 0 {
				return false
			}
			maps.Copy(p.stale, o.at)
			maps.Copy(p.stale, o.tried)
			return true
		})
		p.tell()
		b.mu.Unlock()
	}
	return b.settleCopies(ctx, p, s)
}

// send puts an entry into the bucket.
func (b *back) send(ctx context.Context, p *pending, at place, s state, e *unsent, checks bool) error {
	ctx, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	defer b.whileOwner(ctx, p.key, cancel)()
	release, err := b.n.hold(ctx, e.Size)
	if err != nil {
		return err
	}
	defer release()
	if checks {
		// A former process or owner may have brought it there.
		if now, err := b.n.ask(ctx, at); err == nil && now.object.Version == e.ETag && now.object.Size == e.Size && sameAttrs(now.attrs, stored(e.Attrs)) {
			return nil
		}
	}
	content, err := b.content(ctx, p, at, e)
	if err != nil {
		return err
	}
	defer content.Close()
	if _, ok := b.sure(p.key); !ok {
		return fmt.Errorf("%w: the membership is not settled", gateway.ErrBusy)
	}
	o := source.WriteOptions{
		Attributes: e.Attrs,
		Begun:      func(upload string) { b.n.uploads.begun(at, upload) },
		Ended:      func(upload string) { b.n.uploads.ended(at, upload) },
	}
	got, err := at.writer.PutObject(ctx, at.key, io.NewSectionReader(content, 0, e.Size), e.Size, o)
	if err != nil {
		if errors.Is(err, journal.ErrCorrupt) {
			b.drop(p, e)
		}
		return err
	}
	b.n.counts.written.Add(e.Size)
	b.n.counts.flushed.Add(1)
	if got.Version != e.ETag {
		at.tags.kind.Store(tagsOther)
		b.n.log.Warn("the bucket gave an object another ETag than it was acknowledged with: writes are not acknowledged before it has them from now on", "key", p.key, "acknowledged", e.ETag, "bucket", got.Version)
	}
	return nil
}

// drop takes the copy of an entry that is here for none, since its bytes are not what they were.
func (b *back) drop(p *pending, e *unsent) {
	b.n.log.Error("a copy of what the bucket does not have yet is corrupt in this worker's memory", "key", p.key)
	b.mu.Lock()
	e.local = false
	b.mu.Unlock()
}

// whileOwner cancels when this worker follows a list by which the name is another's: what it would go on to send could
// come after what that one sends. stop ends it.
func (b *back) whileOwner(ctx context.Context, key string, cancel context.CancelFunc) (stop func()) {
	ctx, end := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			changed := b.n.epochs.watch()
			if !b.owns(b.n.epochs.now().Membership, key) {
				cancel()
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		end()
		<-ended
	}
}

// sendsNothing waits until nothing of the names that a member owns is on its way to the bucket from here.
func (b *back) sendsNothing(ctx context.Context, s state, owner string) error {
	for {
		var wait chan struct{}
		b.mu.Lock()
		for key, p := range b.names {
			if o := s.NameOwners(b.n.c.Dataset, key, 1); p.flushing && len(o) > 0 && o[0].ID == owner {
				wait = p.changed
				break
			}
		}
		b.mu.Unlock()
		if wait == nil {
			return nil
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func sameAttrs(a, b source.Attributes) bool {
	return a.ContentType == b.ContentType && maps.Equal(a.Headers, b.Headers) && maps.Equal(a.Metadata, b.Metadata)
}

// content is that of an entry. One that this worker does not hold is taken from a member that does, and held
// here from then on where there is room.
func (b *back) content(ctx context.Context, p *pending, at place, e *unsent) (*journal.Content, error) {
	b.mu.Lock()
	local := e.local
	holders := slices.Collect(maps.Values(e.at))
	b.mu.Unlock()
	if local {
		return b.j.Content(p.key, e.Seq)
	}
	err := fmt.Errorf("%w: no worker is left that holds %q", source.ErrUnavailable, p.key)
	for _, m := range holders {
		var d *journal.Draft
		if d, err = b.j.Begin(e.Size); err != nil {
			return nil, fmt.Errorf("%w: %q, which another worker holds, has no room here: %w", gateway.ErrBusy, p.key, err)
		}
		if err = b.pull(ctx, p.key, m, at, e, d); err == nil {
			err = d.Commit(e.Record)
		}
		d.Abort()
		if err == nil {
			break
		}
		b.n.log.Debug("a copy cannot be taken over", "key", p.key, "member", m.ID, "error", err)
	}
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	e.local = true
	b.mu.Unlock()
	return b.j.Content(p.key, e.Seq)
}

// pull copies an entry's content from a member that holds it.
func (b *back) pull(ctx context.Context, key string, m ring.Member, at place, e *unsent, d io.Writer) error {
	sum := md5.New()
	o := source.Object{Key: at.key, Size: e.Size, Version: e.ETag}
	for block := range ring.Blocks(e.Size) {
		buf := make([]byte, min(ring.BlockSize, e.Size-block*ring.BlockSize))
		if err := b.n.peers.block(ctx, m, key, o, block, buf); err != nil {
			return err
		}
		sum.Write(buf)
		if _, err := d.Write(buf); err != nil {
			return err
		}
	}
	if got := hex.EncodeToString(sum.Sum(nil)); !strings.EqualFold(got, e.ETag) {
		return fmt.Errorf("%w: worker %s holds other bytes of %q: their MD5 is %s, not %s", wire.ErrCorrupt, m.ID, key, got, e.ETag)
	}
	return nil
}

// trouble notes why the bucket does not take what it is given.
func (b *back) trouble(err error) {
	b.mu.Lock()
	before := b.problem
	b.problem = err
	b.mu.Unlock()
	switch {
	case err != nil && before == nil:
		b.n.log.Warn("what was acknowledged cannot be brought to the bucket yet", "error", err)
	case err == nil && before != nil:
		b.n.log.Info("the bucket takes again what was acknowledged")
	}
}

// repair has as many workers hold what is pending of a name as should, where some were lost.
func (b *back) repair(ctx context.Context, p *pending, s state) {
	b.mu.Lock()
	e := p.newest()
	if e == nil || !e.acked || !e.local {
		b.mu.Unlock()
		return
	}
	for id, m := range e.at {
		if !slices.ContainsFunc(s.Members, func(o ring.Member) bool { return memberKey(o) == memberKey(m) }) {
			delete(e.at, id)
		}
	}
	enough := len(e.at) >= b.copies-1
	b.mu.Unlock()
	if !enough {
		b.spread(ctx, p, s, e)
	}
}

// settleCopies tells the members that hold something of a name that the bucket has it. As long as one of them
// cannot be told, those that can keep a mark, so that what that one holds is known to be old whoever asks.
func (b *back) settleCopies(ctx context.Context, p *pending, s state) error {
	b.mu.Lock()
	floor, gen := p.floor, p.gen
	// More may be pending, whose holders are told when that is in the bucket; or a copy may be on its way.
	wait := floor == (journal.Seq{}) || len(p.entries) > 0 || p.committing > 0 || !p.kept && len(p.stale) == 0 && len(p.marks) == 0
	stale, marks := maps.Clone(p.stale), maps.Clone(p.marks)
	b.mu.Unlock()
	if wait {
		return nil
	}
	// One that is not a member any more comes back with nothing that counts (see adopt).
	gone := make(map[string]bool)
	for _, l := range []map[string]ring.Member{stale, marks} {
		maps.DeleteFunc(l, func(id string, _ ring.Member) bool {
			if !slices.ContainsFunc(s.Members, func(o ring.Member) bool { return o.ID == id }) {
				gone[id] = true
			}
			return gone[id]
		})
	}
	all := maps.Clone(marks)
	maps.Copy(all, stale)
	left := map[string]ring.Member{}
	if len(all) == 1 && len(marks) == 0 {
		left = b.tellAll(ctx, all, "/forget", p.key, floor)
		stale, marks = left, map[string]ring.Member{}
	} else if len(all) > 0 {
		// Marks first: who is told to forget must not be the last that knew.
		if left = b.tellAll(ctx, all, "/mark", p.key, floor); len(left) == 0 {
			left = b.tellAll(ctx, all, "/forget", p.key, floor)
			stale, marks = map[string]ring.Member{}, left
		} else {
			stale, marks = left, all
			maps.DeleteFunc(marks, func(id string, _ ring.Member) bool { return left[id].ID != "" })
		}
	}
	// This worker's own comes before anybody may take the name to be well.
	var err error
	if len(left) == 0 {
		err = b.j.Forget(p.key, floor)
	} else {
		err = b.j.Mark(p.key, floor)
	}
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if p.floor == floor && p.gen == gen {
		for id := range gone {
			delete(p.stale, id)
			delete(p.marks, id)
		}
		for id, m := range all {
			delete(p.stale, id)
			delete(p.marks, id)
			if _, ok := stale[id]; ok {
				p.stale[id] = m
			} else if _, ok := marks[id]; ok {
				p.marks[id] = m
			}
		}
		p.kept = false
	}
	if len(left) > 0 {
		return fmt.Errorf("%w: %d workers that may hold a copy of what the bucket has by now cannot be told", gateway.ErrBusy, len(left))
	}
	return nil
}

// tellAll says a word to members, and gives those that could not be told.
func (b *back) tellAll(ctx context.Context, to map[string]ring.Member, word, key string, seq journal.Seq) map[string]ring.Member {
	var mu sync.Mutex
	left := make(map[string]ring.Member)
	var wg sync.WaitGroup
	for id, m := range to {
		wg.Go(func() {
			within, cancel := context.WithTimeout(ctx, tellTimeout)
			defer cancel()
			err := b.n.peers.known(m)
			if err == nil {
				err = b.n.peers.ask(within, m, 0, http.MethodPost, word, seqQuery(key, seq), nil, nil)
			}
			if err != nil {
				mu.Lock()
				left[id] = m
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return left
}

func seqQuery(key string, seq journal.Seq) url.Values {
	return url.Values{"key": {key}, "epoch": {strconv.FormatUint(seq.Epoch, 10)}, "n": {strconv.FormatUint(seq.N, 10)}}
}

// secure has enough members keep a mark of a name, of which another that cannot be reached may hold an old copy.
func (b *back) secure(ctx context.Context, p *pending, s state) error {
	for _, m := range b.others(s, p.key) {
		b.mu.Lock()
		floor, enough := p.floor, len(p.marks) >= b.copies-1
		_, stale := p.stale[m.ID]
		_, marked := p.marks[m.ID]
		b.mu.Unlock()
		if enough {
			return nil
		}
		if stale || marked {
			continue
		}
		if err := b.j.Mark(p.key, floor); err != nil {
			return err
		}
		left := b.tellAll(ctx, map[string]ring.Member{m.ID: m}, "/mark", p.key, floor)
		b.mu.Lock()
		if len(left) == 0 && p.floor == floor {
			p.marks[m.ID] = m
		}
		b.mu.Unlock()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(p.marks) >= b.copies-1 || len(p.stale) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %q: a worker that may hold an old copy of it cannot be reached, and too few others can be", gateway.ErrBusy, p.key)
}

// drain refuses writes from now on and waits until this worker holds nothing that the bucket does not have, or
// ctx ends; then it says so to the others.
func (b *back) drain(ctx context.Context) {
	b.mu.Lock()
	b.leaving = true
	b.mu.Unlock()
	for {
		b.mu.Lock()
		pending := 0
		for _, p := range b.names {
			pending += len(p.entries) + p.committing + p.through
			if len(p.entries) > 0 && p.tries == 0 {
				b.enqueue(p)
			}
		}
		b.mu.Unlock()
		if n, _ := b.j.Entries(); n == 0 && pending == 0 {
			b.bye(ctx)
			return
		}
		select {
		case <-ctx.Done():
			n, size := b.j.Entries()
			b.n.log.Error("stops although it holds what the bucket does not have: other workers hold it too", "objects", n, "bytes", size)
			return
		case <-b.n.c.Clock.After(retryEvery):
		}
	}
}

// bye tells the others that nothing is lost with this worker.
func (b *back) bye(ctx context.Context) {
	s := b.n.epochs.now()
	self := b.self(s)
	var wg sync.WaitGroup
	for _, m := range s.Members {
		if m.ID == self.ID || b.n.peers.known(m) != nil {
			continue
		}
		wg.Go(func() {
			within, cancel := context.WithTimeout(ctx, tellTimeout)
			defer cancel()
			if err := b.n.peers.ask(within, m, 0, http.MethodPost, "/bye", url.Values{"from": {self.ID}}, nil, nil); err != nil {
				b.n.log.Debug("a member was not told that this worker stops with nothing left", "member", m.ID, "error", err)
			}
		})
	}
	wg.Wait()
}

// Drain must be called, where writes are acknowledged before the bucket has them, while Run goes on and before
// this worker stops. It ends when the bucket has everything, or with ctx.
func (n *Names) Drain(ctx context.Context) {
	if n.back != nil {
		n.back.drain(ctx)
	}
}
