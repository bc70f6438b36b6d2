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
	// maxRefusals is how many puts, one after the other, a store may take only without their condition until none is tried
	// any more.
	maxRefusals = 3
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
			if p == nil || p.flushing || p.heldUp() {
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
		if b.n.epochs.cutOff(b.n.c.Clock.Now()) {
			b.trouble(fmt.Errorf("worker %s cannot reach enough of the others to know that it is a worker still: it keeps what it holds, and serves no names, until it does", b.n.c.Self))
		}
		return fmt.Errorf("%w: the membership is not settled", gateway.ErrBusy)
	}
	b.mu.Lock()
	e, checks, gen := p.newest(), p.checks, p.gen
	needless := e != nil && e.Seq.Compare(p.dropped) <= 0 // the bucket has what came after it
	b.mu.Unlock()
	if e != nil {
		var at place
		var err error
		if !needless {
			if at, err = b.n.locate(p.key); err == nil {
				err = b.send(ctx, p, at, s, e, checks)
			}
		}
		if err != nil {
			b.mu.Lock()
			e.refused, e.by = nil, at.mount
			if lasting(err) {
				e.refused = err
			}
			b.mu.Unlock()
			if ctx.Err() == nil {
				b.trouble(fmt.Errorf("%q is not in the bucket yet: %w", p.key, err))
				b.repair(ctx, p, s)
			}
			return err
		}
		b.trouble(nil)
		b.n.forget(p.key) // who asked the bucket before this may be told only now that it has nothing
		b.mu.Lock()
		if p.gen != gen {
			b.mu.Unlock()
			return nil // found anew meanwhile: the bucket is asked then
		}
		p.floor, p.checks, p.kept, p.err = e.Seq, false, true, nil
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
	release, err := b.n.hold(ctx, e.Size, e.Size)
	if err != nil {
		return err
	}
	defer release()
	// The bucket is told what it has now, so that it takes this only in the place of that: a request that is still on its
	// way when another owner's have come, from here or from a former owner, changes nothing any more.
	now, err := b.n.ask(ctx, at)
	switch {
	case err == nil && checks && now.object.Version == e.ETag && now.object.Size == e.Size && sameAttrs(now.attrs, stored(e.Attrs)):
		return nil // a former process or owner brought it there
	case err != nil && !errors.Is(err, source.ErrNotFound):
		return err
	}
	content, cerr := b.content(ctx, p, at, e)
	if cerr != nil {
		return cerr
	}
	defer content.Close()
	o := source.WriteOptions{
		Attributes: e.Attrs,
		Begun:      func(upload string) { b.n.uploads.begun(at, upload) },
		Ended:      func(upload string, gone bool) { b.n.uploads.ended(at, upload, gone) },
	}
	got, err := b.putOver(ctx, p, at, content, now.object.Version, err == nil, o, e)
	if err != nil {
		b.corrupt(p.key, source.Object{Size: e.Size, Version: e.ETag}, err)
		return err
	}
	b.n.counts.written.Add(e.Size)
	b.n.counts.flushed.Add(1)
	at.takes(b.n.c.Clock.Now())
	if got.Version != e.ETag {
		at.tags.kind.Store(tagsOther)
		b.n.log.Warn("the bucket gave an object another ETag than it was acknowledged with: writes are not acknowledged before it has them from now on", "key", p.key, "acknowledged", e.ETag, "bucket", got.Version)
	}
	return nil
}

// putOver puts an entry in the place of the version that the bucket has, or of none; without that condition where the
// store does not know it.
func (b *back) putOver(ctx context.Context, p *pending, at place, content io.ReaderAt, has string, there bool, o source.WriteOptions, e *unsent) (got source.Object, err error) {
	put := func(o source.WriteOptions) (source.Object, error) {
		// Its last byte is read right before it is sent.
		return at.writer.PutObject(ctx, at.key, fenced{b, p.key, io.NewSectionReader(content, 0, e.Size)}, e.Size, o)
	}
	conditional, refusals := o, &at.noAbsent
	if there {
		conditional.IfMatch, refusals = has, &at.noMatch
	} else {
		conditional.IfAbsent = true
	}
	if refusals.Load() >= maxRefusals {
		return put(o)
	}
	got, err = put(conditional)
	switch {
	case err == nil:
		refusals.Store(0)
	case errors.Is(err, source.ErrChanged), there && errors.Is(err, source.ErrNotFound):
		refusals.Store(0)
		return got, fmt.Errorf("%w: another wrote it since it was asked what the bucket has: %w", gateway.ErrBusy, err)
	case refusesConditions(err):
		plain, perr := put(o)
		if perr == nil && refusals.Add(1) == maxRefusals {
			b.n.log.Warn("the bucket puts objects without conditions only: from now on a request of a former owner of a name that comes late can write over a newer version", "bucket", at.URL(), "over", there, "error", err)
		}
		return plain, perr
	}
	return got, err
}

// refusesConditions says whether an error may be because the store puts nothing on a condition. It must be what the store
// itself says of the request: a load balancer in front of it, a certificate or a region do not say that.
func refusesConditions(err error) bool {
	var refusal *source.Refusal
	return errors.Is(err, source.ErrInvalid) && (errors.Is(err, errors.ErrUnsupported) || errors.As(err, &refusal))
}

// fenced is the content of an entry. It ends well only while this worker is sure that the name is its own.
type fenced struct {
	b   *back
	key string
	r   io.Reader
}

func (f fenced) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err == io.EOF {
		if _, ok := f.b.sure(f.key); !ok {
			err = fmt.Errorf("%w: %q: it is not known whether another worker owns it by now", gateway.ErrBusy, f.key)
		}
	}
	return n, err
}

// whileOwner cancels when this worker follows a list by which the name is another's, or cannot tell whether there is
// one: what it would go on to send could come after what that one sends. stop ends it.
func (b *back) whileOwner(ctx context.Context, key string, cancel context.CancelFunc) (stop func()) {
	ctx, end := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			changed := b.n.epochs.watch()
			if !b.owns(b.n.epochs.now().Membership, key) || b.n.epochs.cutOff(b.n.c.Clock.Now()) {
				cancel()
				return
			}
			select {
			case <-changed:
			case <-b.n.c.Clock.After(lookEvery):
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
	r := b.entry(p.key, e.Record)
	b.mu.Lock()
	e.local, e.Record = true, r
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

// repair has as many workers hold what is pending of a name as should, where some were lost. It is called while the name
// is being flushed: no other owner is told what this one holds before it ends.
func (b *back) repair(ctx context.Context, p *pending, s state) {
	b.mu.Lock()
	e := p.newest()
	if e == nil || !e.acked || !e.local {
		b.mu.Unlock()
		return
	}
	for id, m := range e.at {
		if !isMember(s, m) || m.Joined > e.Seq.Epoch {
			delete(e.at, id)
			e.tried[id] = m // it is told all the same once it may drop it
		}
	}
	enough := len(e.at) >= b.copies-1
	b.mu.Unlock()
	if !enough {
		if e.Seq.Epoch < s.Epoch {
			var err error
			if e, err = b.renew(p, e, s); err != nil {
				b.n.log.Debug("what other workers held is not held by as many as should", "key", p.key, "error", err)
				return
			}
		}
		if !b.spread(ctx, p, s, e) {
			return
		}
	}
	b.excuse(ctx, p, s, e)
}

// renew gives an entry another sequence, of the list in force, in the place of its own: one of a former list does not
// count with members that came after it.
func (b *back) renew(p *pending, e *unsent, s state) (*unsent, error) {
	content, err := b.j.Content(p.key, e.Seq)
	if err != nil {
		return nil, err
	}
	defer content.Close()
	d, err := b.j.Begin(e.Size)
	if err != nil {
		return nil, err
	}
	defer d.Abort()
	if err := copyAll(d, io.NewSectionReader(content, 0, e.Size), e.Size); err != nil {
		return nil, err
	}
	r := b.entry(p.key, e.Record)
	b.mu.Lock()
	if p.newest() != e || p.committing > 0 {
		b.mu.Unlock()
		return nil, errors.New("it is being written over")
	}
	r.Seq = b.nextSeq(s.Epoch) // what is put from now on comes after it
	b.mu.Unlock()
	if err := d.Commit(r); err != nil {
		return nil, err
	}
	n := &unsent{Record: r, acked: true, local: true, at: make(map[string]ring.Member), tried: make(map[string]ring.Member)}
	b.mu.Lock()
	n.refused, n.by = e.refused, e.by
	maps.Copy(n.at, e.at) // they hold the same, which counts
	maps.Copy(n.tried, e.tried)
	p.entries = slices.DeleteFunc(p.entries, func(o *unsent) bool { return o.Seq == e.Seq })
	i, _ := slices.BinarySearchFunc(p.entries, n, func(a, o *unsent) int { return a.Seq.Compare(o.Seq) })
	p.entries = slices.Insert(p.entries, i, n)
	b.mu.Unlock()
	return n, b.j.Drop(p.key, e.Seq)
}

// excuse tells those that hold an entry, or what came before it, and are no members, that enough members do: they need
// not, and end sooner where they are being stopped.
func (b *back) excuse(ctx context.Context, p *pending, s state, e *unsent) {
	b.mu.Lock()
	former := make(map[string]ring.Member)
	for _, o := range p.entries {
		if o.Seq.Compare(e.Seq) <= 0 {
			maps.Copy(former, o.at)
			maps.Copy(former, o.tried)
		}
	}
	maps.DeleteFunc(former, func(_ string, m ring.Member) bool { return isMember(s, m) })
	gen := p.gen
	b.mu.Unlock()
	if len(former) == 0 {
		return
	}
	left := b.tellAll(ctx, former, "/forget", p.key, e.Seq)
	b.mu.Lock()
	defer b.mu.Unlock()
	if p.gen != gen {
		return
	}
	for _, o := range p.entries {
		for id := range former {
			if left[id].ID == "" && o.Seq.Compare(e.Seq) <= 0 {
				delete(o.at, id)
				delete(o.tried, id)
			}
		}
	}
}

func isMember(s state, m ring.Member) bool {
	return slices.ContainsFunc(s.Members, func(o ring.Member) bool { return memberKey(o) == memberKey(m) })
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
	// One that is not a member any more comes back with nothing that counts (see adopt). Until all are settled without
	// it, it may be asked what it holds all the same; from then on it is told if it can be. With a mark it does no harm.
	is := make(map[string]ring.Member)
	for _, m := range s.Members {
		is[m.ID] = m
	}
	over := b.n.epochs.over(s.Epoch)
	loose := make(map[string]bool)
	for id, m := range marks {
		if now, ok := is[id]; ok {
			marks[id] = now // it may have another address by now
		} else {
			delete(marks, id)
			stale[id], loose[id] = m, true
		}
	}
	for id := range stale {
		if now, ok := is[id]; ok {
			stale[id] = now
		} else if over {
			loose[id] = true
		}
	}
	tell := func(to map[string]ring.Member, word string) map[string]ring.Member {
		left := b.tellAll(ctx, to, word, p.key, floor)
		maps.DeleteFunc(left, func(id string, _ ring.Member) bool { return loose[id] })
		return left
	}
	all := maps.Clone(marks)
	maps.Copy(all, stale)
	left := map[string]ring.Member{}
	if len(all) == 1 && len(marks) == 0 {
		left = tell(all, "/forget")
		stale, marks = left, map[string]ring.Member{}
	} else if len(all) > 0 {
		// Marks first: who is told to forget must not be the last that knew.
		if left = tell(all, "/mark"); len(left) == 0 {
			left = tell(all, "/forget")
			stale, marks = map[string]ring.Member{}, left
		} else {
			stale, marks = left, maps.Clone(all)
			maps.DeleteFunc(marks, func(id string, _ ring.Member) bool { return left[id].ID != "" || is[id].ID == "" })
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
	if p.floor == floor && p.gen == gen {
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
	b.mu.Unlock()
	if len(left) > 0 {
		// Whoever settles later hears one of them. Too few can be reached where that fails: it is tried again.
		if err := b.secure(ctx, p, s); err != nil {
			return err
		}
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
		floor, enough := p.floor, p.marked(s.Membership) >= b.copies-1
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
	if p.marked(s.Membership) >= b.copies-1 || len(p.stale) == 0 {
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
