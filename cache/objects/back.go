package objects

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/objects/journal"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// Back makes writes be acknowledged before the bucket has them: see the package comment.
type Back struct {
	// Copies is how many workers on distinct nodes hold what is acknowledged; at least 2.
	Copies int
	// MaxBytes bounds what this worker holds, MaxAge how long the bucket may lag behind; zero means a minute.
	MaxBytes int64
	MaxAge   time.Duration
}

const (
	// MaxBack is the largest object that is written back. A larger one is on its way to the bucket while it
	// comes, part by part, which no acknowledgement could shorten by much, and would fill memory twice.
	MaxBack = 8 << 20
	// sureWait is how long an operation waits for this worker to know what is pending of its names.
	sureWait = 10 * time.Second
	// flushWait is how long a write that goes through waits for what is pending of its name.
	flushWait = 45 * time.Second
	// hungAfter is after what time without a look at the membership this worker takes itself to have hung.
	hungAfter = 15 * time.Second
	// maxAgeDefault is the default of Back.MaxAge.
	maxAgeDefault = time.Minute
	// journalName is the folder of the journal.
	journalName = "unflushed"
)

// back is what a worker knows of what is pending. The journal has what this worker holds, for whomever;
// names has what it knows of the names that it owns.
type back struct {
	n      *Names
	j      *journal.Journal
	copies int
	maxAge time.Duration
	kick   chan struct{}

	mu      sync.Mutex
	names   map[string]*pending
	queue   []string // to be flushed
	last    uint64   // N of the last sequence given
	leaving bool
	blocked error // why names are not served; nil when they are
	problem error // why the bucket does not take what it is given; nil when it does
	// gathered is what other members told that they hold of this worker's names, under the list that is
	// being settled, by id and address; byes are those that stopped with nothing left.
	gathered map[string]gathered
	byes     map[string]bool
}

type gathered struct {
	member  ring.Member
	epoch   uint64 // of the list under which it was told
	records []journal.Record
	still   map[record]bool // the entries of these that it held still when it was asked again
}

// unsent is one version of a name that is not in the bucket.
type unsent struct {
	journal.Record
	acked bool
	local bool // it is in this worker's journal
	// at are the others that hold it, tried those that may, since they were asked to.
	at, tried map[string]ring.Member
	// refused is why the bucket did not take it when it was tried last, where another try will not help; by is whose that is.
	refused error
	by      *mount
}

// pending is a name of which something is not in the bucket yet, or of which other members may hold what is
// there by now. Guarded by back.mu.
type pending struct {
	key     string
	entries []*unsent // in order, all above floor
	// floor is up to where the bucket has it. stale are members that may hold something up to there; marks
	// are those that have a mark of floor instead.
	floor        journal.Seq
	stale, marks map[string]ring.Member
	// kept says that this worker's own journal may have entries up to floor, and no mark.
	kept bool
	gen  uint64 // grows when all of this was found anew
	// through are writes that go to the bucket directly, under way or waiting; committing those that are
	// being held. Only one of the two kinds goes on at a time. Of the first, over are those that take the place of
	// what the bucket refuses, and dropped is up to where one has.
	through, committing, over int
	dropped                   journal.Seq
	queued, flushing          bool
	checks                    bool // the bucket may have the newest entry already: a former process or owner sent it
	tries                     int
	next                      time.Time // of another try
	err                       error     // of the last try
	changed                   chan struct{}
}

func newBack(n *Names, c Back) (*back, error) {
	j, err := journal.Open(filepath.Join(n.c.Dir, journalName), c.MaxBytes, n.log)
	if err != nil {
		return nil, fmt.Errorf("objects: %w", err)
	}
	if c.MaxAge <= 0 {
		c.MaxAge = maxAgeDefault
	}
	b := &back{
		n: n, j: j, copies: c.Copies, maxAge: c.MaxAge, kick: make(chan struct{}, 1),
		names: make(map[string]*pending), gathered: make(map[string]gathered), byes: make(map[string]bool),
	}
	if k, size := j.Entries(); k > 0 {
		n.log.Info("found what a former process acknowledged and the bucket may not have", "objects", k, "bytes", size)
	}
	return b, nil
}

func (p *pending) tell() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// marked is how many members have a mark. The caller holds the mutex of all names.
func (p *pending) marked(list ring.Membership) (n int) {
	for _, m := range list.Members {
		if _, ok := p.marks[m.ID]; ok {
			n++
		}
	}
	return n
}

// acked is the newest entry that was acknowledged; nil when there is none.
func (p *pending) acked() *unsent {
	for _, e := range slices.Backward(p.entries) {
		if e.acked {
			return e
		}
	}
	return nil
}

// newest is the newest entry; nil when there is none.
func (p *pending) newest() *unsent {
	if len(p.entries) == 0 {
		return nil
	}
	return p.entries[len(p.entries)-1]
}

// refused is why what is pending does not come to the bucket, nor what it has by now is dropped, however often that is
// tried; nil when it may.
func (p *pending) refused() error {
	if e := p.newest(); e != nil {
		return e.refused
	}
	if lasting(p.err) {
		return p.err
	}
	return nil
}

// heldUp says whether nothing is to be brought to the bucket: it would come there over a write that takes its place.
func (p *pending) heldUp() bool {
	e := p.newest()
	return p.over > 0 && e != nil && e.Seq.Compare(p.dropped) > 0
}

// name is the state of a key. The caller holds the mutex.
func (b *back) name(key string) *pending {
	p := b.names[key]
	if p == nil {
		p = &pending{key: key, stale: make(map[string]ring.Member), marks: make(map[string]ring.Member), changed: make(chan struct{})}
		b.names[key] = p
	}
	return p
}

// tidy forgets a name of which nothing is pending. The caller holds the mutex.
func (b *back) tidy(p *pending) {
	if len(p.entries) == 0 && len(p.stale) == 0 && len(p.marks) == 0 && !p.kept && p.through == 0 && p.committing == 0 && !p.flushing && b.names[p.key] == p {
		delete(b.names, p.key)
	}
}

// enqueue has a name flushed. The caller holds the mutex.
func (b *back) enqueue(p *pending) {
	if p.queued {
		return
	}
	p.queued = true
	b.queue = append(b.queue, p.key)
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// sure is the membership, and whether this worker owns the name under it and knows all that is pending of it.
func (b *back) sure(key string) (state, bool) {
	return b.n.epochs.sure(b.n.c.Clock.Now(), func(l ring.Membership) bool { return b.owns(l, key) })
}

func (b *back) owns(l ring.Membership, key string) bool {
	o := l.NameOwners(b.n.c.Dataset, key, 1)
	return len(o) > 0 && o[0].ID == b.n.c.Self
}

// waitSure waits until this worker knows what is pending of the name, under the membership s.
func (b *back) waitSure(ctx context.Context, key string, s state) (state, error) {
	within := time.NewTimer(sureWait)
	defer within.Stop()
	for {
		changed := b.n.epochs.watch()
		now, ok := b.sure(key)
		if ok && now.Epoch == s.Epoch {
			return now, nil
		}
		if now.Epoch != s.Epoch {
			return now, &errMoved{now.Epoch}
		}
		select {
		case <-changed:
		case <-b.n.c.Clock.After(lookEvery): // it may have hung, and looks again
		case <-within.C:
			return now, fmt.Errorf("%w: %q: this worker does not know yet what the others hold of it", gateway.ErrBusy, key)
		case <-ctx.Done():
			return now, ctx.Err()
		}
	}
}

// errMoved: the membership has changed since it was looked up who owns a name, and nothing was done yet.
type errMoved struct{ epoch uint64 }

func (e *errMoved) Error() string {
	return fmt.Sprintf("%v: the membership has changed, to epoch %d", gateway.ErrBusy, e.epoch)
}
func (e *errMoved) Unwrap() error { return gateway.ErrBusy }

// find is the newest version of a name that was acknowledged and is pending; false when the bucket's is the one.
func (b *back) find(ctx context.Context, key string, p place, s state) (version, bool, error) {
	for {
		if _, err := b.waitSure(ctx, key, s); err != nil {
			return version{}, false, err
		}
		var v version
		pending := false
		b.mu.Lock()
		if st := b.names[key]; st != nil {
			if e := st.acked(); e != nil {
				v, pending = versionOf(p, e.Record), true
			}
		}
		b.mu.Unlock()
		// Still: what is pending of a name that moves is forgotten here.
		if now, ok := b.sure(key); ok && now.Epoch == s.Epoch {
			return v, pending, nil
		}
	}
}

func versionOf(p place, r journal.Record) version {
	o := source.Object{Key: p.key, Size: r.Size, Version: r.ETag, ModTime: r.Time}
	if sum, err := hex.DecodeString(r.ETag); err == nil { // it is the content's MD5: see tags
		o.Digest = source.Digest{Algorithm: source.MD5, Sum: sum}
	}
	return version{o, stored(r.Attrs)}
}

// next gives a sequence after all that were given. The caller holds the mutex.
func (b *back) nextSeq(epoch uint64) journal.Seq {
	b.last = max(b.last+1, uint64(b.n.c.Clock.Now().UnixNano()))
	return journal.Seq{Epoch: epoch, N: b.last}
}

// lagging says whether the bucket is too far behind. What it refuses for good is not, once it has taken what came later:
// then it does not refuse everything.
func (b *back) lagging() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	before := b.n.c.Clock.Now().Add(-b.maxAge)
	for _, p := range b.names {
		for _, e := range p.entries {
			if e.Time.Before(before) && (e.refused == nil || e.by != nil && e.by.taken.Load() <= e.Time.UnixNano()) {
				return true
			}
		}
	}
	return false
}

// others are the members that may hold a copy of what this worker holds of a name, in order.
func (b *back) others(s state, key string) []ring.Member {
	var out []ring.Member
	for _, m := range s.NameOwners(b.n.c.Dataset, key, 0) {
		if m.ID != b.n.c.Self && b.n.peers.known(m) == nil {
			out = append(out, m)
		}
	}
	return out
}

// apart says whether m is on another node than all of those.
func apart(m ring.Member, those ...ring.Member) bool {
	return m.Node == "" || !slices.ContainsFunc(those, func(o ring.Member) bool { return o.Node == m.Node })
}

func (b *back) self(s state) ring.Member {
	for _, m := range s.Members {
		if m.ID == b.n.c.Self {
			return m
		}
	}
	return ring.Member{ID: b.n.c.Self}
}

// passage is a write that goes to the bucket itself. None, where writes are not acknowledged before the bucket has them,
// does nothing.
type passage struct {
	b *back
	p *pending
	s state
	// upto, when not zero, is what the write takes the place of, since the bucket refuses that; gen is the name's then.
	upto journal.Seq
	gen  uint64
}

// through begins a write that goes to the bucket itself: after all that is pending of the name, and such that
// no copy of that can come back over it. One over whatever there is does not wait for what the bucket refuses for good:
// since it may fail, that is pending, and served, until acknowledge. done must be called when it has ended.
func (b *back) through(ctx context.Context, key string, s state, over bool) (*passage, error) {
	s, err := b.waitSure(ctx, key, s)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	if b.leaving {
		b.mu.Unlock()
		return nil, errStopping(b.n)
	}
	t := &passage{b: b, p: b.name(key), s: s}
	t.p.through++
	b.mu.Unlock()
	if err := t.wait(ctx, over); err != nil {
		t.done()
		return nil, err
	}
	return t, nil
}

// wait waits until nothing is pending and no copy can come back, or until the write may go over what is.
func (t *passage) wait(ctx context.Context, over bool) (err error) {
	b, p := t.b, t.p
	within := time.NewTimer(flushWait)
	defer within.Stop()
	for {
		list := b.n.epochs.now().Membership
		b.mu.Lock()
		changed, failed, refused := p.changed, p.err, p.refused()
		pending := len(p.entries) > 0 || p.committing > 0
		safe := !p.kept && (len(p.stale) == 0 || p.marked(list) >= b.copies-1)
		busy := p.flushing || p.kept
		if !pending && !safe && p.kept && !p.flushing {
			b.enqueue(p)
		}
		if pending && p.committing == 0 && p.tries == 0 {
			b.enqueue(p)
		}
		b.mu.Unlock()
		if now, ok := b.sure(p.key); !ok {
			err = fmt.Errorf("%w: %q: the membership has changed", gateway.ErrBusy, p.key)
		} else if now.Epoch != list.Epoch {
			continue
		} else if !pending && safe {
			return nil
		} else if !pending && !busy {
			if err = b.secure(ctx, p, t.s); err == nil {
				continue
			}
		} else if refused != nil && over && pending {
			if t.takeOver() {
				return nil
			}
		} else if refused != nil {
			err = refused
		}
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-within.C:
			return errors.Join(fmt.Errorf("%w: %q: what was put before is not in the bucket yet", gateway.ErrBusy, p.key), failed)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// takeOver has nothing of the name be brought to the bucket until the write has ended; false while something is, or while
// more is being held.
func (t *passage) takeOver() bool {
	t.b.mu.Lock()
	defer t.b.mu.Unlock()
	if t.p.flushing || t.p.committing > 0 || len(t.p.entries) == 0 || t.p.refused() == nil {
		return false
	}
	t.p.over++
	t.upto, t.gen = t.p.newest().Seq, t.p.gen
	return true
}

// over says whether the write takes the place of something that the bucket refuses.
func (t *passage) over() bool { return t != nil && t.upto != journal.Seq{} }

// acknowledge waits until the write, which the bucket has committed by now, may be acknowledged.
func (t *passage) acknowledge(ctx context.Context, w *write) error {
	if t.over() {
		if err := t.drop(ctx); err != nil {
			return err
		}
	}
	return w.acknowledge(ctx)
}

// drop drops what the write took the place of, such that no copy of it comes back.
func (t *passage) drop(ctx context.Context) error {
	b, p := t.b, t.p
	same := func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if p.gen != t.gen { // found anew meanwhile: another may have owned the name
			return fmt.Errorf("%w: %q: the membership has changed", gateway.ErrBusy, p.key)
		}
		return nil
	}
	b.mu.Lock()
	if p.gen == t.gen && p.dropped.Compare(t.upto) < 0 {
		p.dropped = t.upto
		if e := p.newest(); e != nil && e.Seq == t.upto {
			e.refused, p.tries = nil, 0
		}
		b.enqueue(p)
	}
	b.mu.Unlock()
	if err := same(); err != nil {
		return err
	}
	if err := t.wait(ctx, false); err != nil {
		return err
	}
	return same()
}

// done ends a write, whatever became of it.
func (t *passage) done() {
	if t == nil {
		return
	}
	t.b.mu.Lock()
	defer t.b.mu.Unlock()
	t.p.through--
	if t.over() {
		if t.p.over--; t.p.over == 0 {
			t.b.enqueue(t.p)
		}
	}
	t.b.tidy(t.p)
}

// lasting says whether what went wrong with a try to bring something to the bucket will again.
func lasting(err error) bool {
	return err != nil && !source.Temporary(err) && !canceled(err) && !errors.Is(err, gateway.ErrBusy)
}

func errStopping(n *Names) error {
	return fmt.Errorf("%w: worker %s is being stopped and takes no writes", gateway.ErrBusy, n.c.Self)
}

// local is the content of a version that this worker holds, whosever name it is; nil when it does not.
func (b *back) local(key string, o source.Object) *journal.Content {
	for _, r := range slices.Backward(b.j.Of(key)) {
		if !r.Mark && r.ETag == o.Version && r.Size == o.Size {
			if c, err := b.j.Content(key, r.Seq); err == nil {
				return c
			}
		}
	}
	return nil
}

// read reads bytes of a block of a version that is pending: from this worker's journal, or from another's where this
// worker owns the name and has no sound copy. false when it is not pending as far as this worker knows.
func (b *back) read(ctx context.Context, key string, o source.Object, off int64, into []byte) (bool, error) {
	var err error
	if c := b.local(key, o); c != nil {
		_, err = c.ReadAt(into, off)
		c.Close()
		if err == nil {
			return true, nil
		}
		b.corrupt(key, o, err)
	}
	holders := b.elsewhere(key, o)
	for _, m := range holders {
		if err = b.n.peers.block(ctx, m, key, o, off/ring.BlockSize, into); err == nil {
			return true, nil
		}
	}
	return len(holders) > 0, err
}

// elsewhere are the members that hold a version which is pending, where this worker owns the name and does not.
func (b *back) elsewhere(key string, o source.Object) (holders []ring.Member) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.names[key]; p != nil {
		for _, e := range p.entries {
			if !e.local && e.ETag == o.Version && e.Size == o.Size {
				holders = slices.AppendSeq(holders, maps.Values(e.at))
			}
		}
	}
	return holders
}

// corrupt takes this worker's copy of a version for none when it could not be read since its bytes are not what they
// were: where the name is its own, that is brought to the bucket from another.
func (b *back) corrupt(key string, o source.Object, err error) {
	if !errors.Is(err, journal.ErrCorrupt) {
		return
	}
	b.n.log.Error("a copy of what the bucket does not have yet is corrupt in this worker's memory", "key", key, "error", err)
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.names[key]; p != nil {
		for _, e := range p.entries {
			if e.ETag == o.Version && e.Size == o.Size {
				e.local = false
			}
		}
	}
}

// Unflushed is what is not in the bucket yet.
func (n *Names) Unflushed() (u wire.Unflushed) {
	b := n.back
	if b == nil {
		return u
	}
	count := func(r journal.Record) {
		u.Objects++
		u.Bytes += r.Size
		if u.Oldest.IsZero() || r.Time.Before(u.Oldest) {
			u.Oldest = r.Time
		}
	}
	s := n.epochs.now()
	now := n.c.Clock.Now()
	var held []journal.Record
	for _, key := range b.j.Keys() {
		for _, r := range b.j.Of(key) {
			if !r.Mark {
				held = append(held, r)
			}
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range held {
		owner, err := n.owner(s, r.Key)
		switch {
		case err == nil && owner.ID == n.c.Self:
			if p := b.names[r.Key]; p == nil || r.Seq.Compare(p.floor) > 0 {
				count(r)
			}
		// For an owner that is not there, or that should have brought it to the bucket by now.
		case err != nil || !s.settled || n.peers.known(owner) != nil || now.Sub(r.Time) > heldFor:
			count(r)
		}
	}
	for _, p := range b.names {
		for _, e := range p.entries {
			if !e.local {
				count(e.Record)
			}
		}
	}
	switch {
	case b.problem != nil && u.Objects > 0:
		u.Problem = b.problem.Error()
	case b.blocked != nil:
		u.Problem = b.blocked.Error()
	}
	return u
}

// heldFor is how long a copy is taken to be its owner's to count.
const heldFor = 5 * time.Second
