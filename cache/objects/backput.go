package objects

import (
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/objects/journal"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// tags is how a bucket makes ETags of objects put as one. An acknowledgement carries the ETag that the bucket
// will give, so nothing is written back until a put has shown how it does that, and nothing ever where it is
// not the MD5 (as with some encryptions).
type tags struct{ kind atomic.Int32 }

const (
	tagsUnknown = iota
	tagsLower
	tagsUpper
	tagsOther
)

func (t *tags) learn(sum []byte, etag string) {
	switch h := hex.EncodeToString(sum); etag {
	case h:
		t.kind.Store(tagsLower)
	case strings.ToUpper(h):
		t.kind.Store(tagsUpper)
	default:
		t.kind.Store(tagsOther)
	}
}

// of is the ETag of content with that MD5; false when it cannot be told.
func (t *tags) of(sum []byte) (string, bool) {
	switch h := hex.EncodeToString(sum); t.kind.Load() {
	case tagsLower:
		return h, true
	case tagsUpper:
		return strings.ToUpper(h), true
	}
	return "", false
}

// put executes a put of a name that this worker owns: it is acknowledged once enough workers hold it, or else
// once the bucket has it.
func (b *back) put(ctx context.Context, key string, p place, s state, size int64, r io.Reader, o optionsJSON) (version, error) {
	s, err := b.waitSure(ctx, key, s)
	if err != nil {
		return version{}, err
	}
	d := b.draft(key, p, s, size, o)
	if d == nil {
		return b.putThrough(ctx, key, p, s, size, r, o)
	}
	defer d.Abort()
	b.n.counts.puts.Add(1)
	sum := newSummed(r, o.Sums)
	t := &tee{ctx: ctx, r: sum, staged: b.n.stage.begin(size), now: b.n.c.Clock.Now}
	defer t.staged.end()
	if err := copyAll(d, t, size); err != nil {
		return version{}, fmt.Errorf("put %q: %w", key, t.failed(err))
	}
	var st *pending
	etag, ok := p.tags.of(sum.md5())
	if ok {
		st, ok = b.enter(key)
	}
	// Meanwhile it was learnt that the ETag cannot be told; or writes of this name go through, now that there is one that
	// must: in line with them.
	if !ok {
		v, err := b.putThrough(ctx, key, p, s, size, waited{ctx, d.Content()}, o)
		if moved := (*errMoved)(nil); errors.As(err, &moved) {
			err = fmt.Errorf("put %q: %w: %v", key, gateway.ErrBusy, moved) // its content is read already
		}
		return v, err
	}
	defer b.leave(st)
	w := b.n.begin(key, s, true)
	v, err := b.commit(ctx, st, p, s, d, journal.Record{Key: key, ETag: etag, Attrs: o.Attrs})
	if err != nil {
		w.end()
		return version{}, fmt.Errorf("put %q: %w", key, err)
	}
	if t.staged.finish(p.blocks(v.object)) {
		b.n.counts.staged.Add(1)
	} else if size > 0 {
		b.n.counts.unstaged.Add(1)
	}
	w.finish(&v, t.ended)
	return v, nil
}

// draft begins an entry for a put; nil when it is to go through.
func (b *back) draft(key string, p place, s state, size int64, o optionsJSON) *journal.Draft {
	if kind := p.tags.kind.Load(); size > MaxBack || !o.unconditional() || kind == tagsUnknown || kind == tagsOther {
		return nil
	}
	b.mu.Lock()
	st := b.names[key]
	not := b.leaving || st != nil && st.through > 0
	b.mu.Unlock()
	self := b.self(s)
	enough := 1
	for _, m := range b.others(s, key) {
		if apart(m, self) {
			enough++
		}
	}
	if not || enough < b.copies || b.lagging() {
		return nil
	}
	d, err := b.j.Begin(size)
	if err != nil {
		if !errors.Is(err, journal.ErrFull) {
			b.n.log.Warn("a put goes through to the bucket, since the journal cannot be written", "key", key, "error", err)
		}
		return nil
	}
	return d
}

// copyAll copies size bytes of r, which must end there.
func copyAll(w io.Writer, r io.Reader, size int64) error {
	buf := chunks.Get().(*[]byte)
	defer chunks.Put(buf)
	for n := int64(0); ; {
		k, err := r.Read(*buf)
		if n += int64(k); n > size {
			return fmt.Errorf("%w: there is more than the %d bytes that were said to come", source.ErrInvalid, size)
		}
		if _, werr := w.Write((*buf)[:k]); werr != nil {
			return werr
		}
		switch {
		case err == io.EOF && n == size:
			return nil
		case err == io.EOF:
			return fmt.Errorf("%w: it ends after %d bytes of %d", source.ErrInvalid, n, size)
		case err != nil:
			return err
		}
	}
}

// enter begins the holding of a put; false when writes of the name go through.
func (b *back) enter(key string) (*pending, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	st := b.name(key)
	if st.through > 0 || b.leaving {
		b.tidy(st)
		return nil, false
	}
	st.committing++
	return st, true
}

func (b *back) leave(st *pending) {
	b.mu.Lock()
	defer b.mu.Unlock()
	st.committing--
	if st.committing == 0 && (st.kept || len(st.stale) > 0) {
		b.enqueue(st) // what the bucket has by now can be dropped
	}
	st.tell()
	b.tidy(st)
}

// commit makes a draft an entry, here and at others, and returns once it may be acknowledged.
func (b *back) commit(ctx context.Context, st *pending, p place, s state, d *journal.Draft, r journal.Record) (version, error) {
	if now, ok := b.sure(st.key); !ok || now.Epoch != s.Epoch {
		return version{}, fmt.Errorf("%w: the membership has changed", gateway.ErrBusy)
	}
	b.mu.Lock()
	r.Seq, r.Time = b.nextSeq(s.Epoch), b.n.c.Clock.Now().UTC()
	b.mu.Unlock()
	if err := d.Commit(r); err != nil {
		return version{}, err
	}
	r = b.entry(st.key, r)
	e := &unsent{Record: r, local: true, at: make(map[string]ring.Member), tried: make(map[string]ring.Member)}
	b.mu.Lock()
	i, _ := slices.BinarySearchFunc(st.entries, e, func(a, o *unsent) int { return a.Seq.Compare(o.Seq) })
	st.entries = slices.Insert(st.entries, i, e)
	b.enqueue(st)
	b.mu.Unlock()
	held := b.spread(ctx, st, s, e)
	v := versionOf(p, r)
	// What counts is that this worker was the owner after the others had it: see the package comment.
	if now, ok := b.sure(st.key); !ok || now.Epoch != s.Epoch {
		return version{}, fmt.Errorf("%w: the membership has changed", gateway.ErrBusy)
	}
	if held {
		b.mu.Lock()
		e.acked = true
		b.mu.Unlock()
		b.n.counts.back.Add(1)
		return v, nil
	}
	return v, b.flushed(ctx, st, r.Seq)
}

// entry is a record as this worker's journal has it, with its size and sums.
func (b *back) entry(key string, r journal.Record) journal.Record {
	for _, have := range b.j.Of(key) {
		if have.Seq == r.Seq && !have.Mark {
			return have
		}
	}
	return r
}

// flushed waits until the bucket has a name up to seq.
func (b *back) flushed(ctx context.Context, st *pending, seq journal.Seq) error {
	for {
		b.mu.Lock()
		done, refused, changed := st.floor.Compare(seq) >= 0, st.refused(), st.changed
		b.mu.Unlock()
		switch {
		case done:
			return nil
		case refused != nil:
			return refused
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// spread has others hold an entry that this worker holds, until as many do as are wanted.
func (b *back) spread(ctx context.Context, st *pending, s state, e *unsent) bool {
	c, err := b.j.Content(st.key, e.Seq)
	if err != nil {
		return false
	}
	defer c.Close()
	b.mu.Lock()
	have := []ring.Member{b.self(s)}
	for _, m := range e.at {
		have = append(have, m)
	}
	b.mu.Unlock()
	left := slices.DeleteFunc(b.others(s, st.key), func(m ring.Member) bool {
		return slices.ContainsFunc(have, func(o ring.Member) bool { return o.ID == m.ID })
	})
	for len(have) < b.copies {
		var try []ring.Member // at once, on nodes of their own
		for i := 0; i < len(left) && len(have)+len(try) < b.copies; {
			if apart(left[i], append(slices.Clone(have), try...)...) {
				try = append(try, left[i])
				left = slices.Delete(left, i, i+1)
			} else {
				i++
			}
		}
		if len(try) == 0 {
			return false
		}
		b.mu.Lock()
		if st.floor.Compare(e.Seq) >= 0 {
			b.mu.Unlock()
			return true // the bucket has it by now
		}
		if !slices.Contains(st.entries, e) {
			b.mu.Unlock()
			return false // what is pending was found anew meanwhile
		}
		for _, m := range try {
			e.tried[m.ID] = m // it may hold it, whatever it answers
		}
		b.mu.Unlock()
		errs := make([]error, len(try))
		var wg sync.WaitGroup
		for i, m := range try {
			wg.Go(func() {
				within, cancel := context.WithTimeout(ctx, wire.WorkerTimeout)
				defer cancel()
				errs[i] = b.n.peers.hold(within, m, s.Epoch, e.Record, io.NewSectionReader(c, 0, e.Size))
			})
		}
		wg.Wait()
		b.mu.Lock()
		for i, m := range try {
			if errs[i] == nil {
				have = append(have, m)
				e.at[m.ID] = m
			}
			if st.floor.Compare(e.Seq) >= 0 {
				st.stale[m.ID] = m // brought to the bucket before this one had it, and told the others
			}
		}
		b.mu.Unlock()
		for i, m := range try {
			var stale *errStale
			if errors.As(errs[i], &stale) {
				b.n.epochs.heard(stale.epoch, b.n.c.Clock.Now())
			}
			if errs[i] != nil {
				b.n.log.Debug("a worker does not hold a copy", "key", st.key, "member", m.ID, "error", errs[i])
			}
		}
		if ctx.Err() != nil {
			return false
		}
	}
	return true
}

// putThrough is a put that goes to the bucket itself.
func (b *back) putThrough(ctx context.Context, key string, p place, s state, size int64, r io.Reader, o optionsJSON) (version, error) {
	t, err := b.through(ctx, key, s, o.unconditional())
	if err != nil {
		return version{}, fmt.Errorf("put %q: %w", key, err)
	}
	defer t.done()
	learns := size <= MaxBack && o.unconditional() && p.tags.kind.Load() == tagsUnknown
	sum := newSummed(r, o.Sums)
	if learns {
		r = sum
	}
	v, err := b.n.putThrough(ctx, key, p, s, true, size, r, o)
	if err == nil {
		p.takes(b.n.c.Clock.Now())
		if t.over() {
			err = acknowledged(key, t.drop(ctx))
		}
	}
	if err == nil && learns {
		p.tags.learn(sum.md5(), v.object.Version)
		if p.tags.kind.Load() == tagsOther {
			b.n.log.Warn("writes to this bucket are not acknowledged before it has them: its ETags are not the MD5 of the content, so what it will give cannot be told", "bucket", p.URL())
		}
	}
	return v, err
}

// summed is content whose MD5 is taken as it passes, unless its sender told it.
type summed struct {
	io.Reader
	told []byte
	h    hash.Hash
}

func newSummed(r io.Reader, sums source.Sums) *summed {
	if len(sums.MD5) == md5.Size {
		return &summed{Reader: r, told: sums.MD5}
	}
	h := md5.New()
	return &summed{Reader: io.TeeReader(r, h), h: h}
}

// md5 is known once the content has ended well.
func (s *summed) md5() []byte {
	if s.told != nil {
		return s.told
	}
	return s.h.Sum(nil)
}

// hold has m hold an entry.
func (p *peers) hold(ctx context.Context, m ring.Member, epoch uint64, r journal.Record, content io.Reader) error {
	o, err := json.Marshal(r)
	if err != nil {
		return err
	}
	guard := &guarded{r: newFramer(content)}
	defer guard.stop()
	req, err := p.request(ctx, http.MethodPut, m, "/hold", url.Values{"from": {p.n.c.Self}, "key": {r.Key}}, epoch, guard)
	if err != nil {
		return err
	}
	req.ContentLength = -1
	req.Header.Set("Expect", "100-continue")
	req.Header.Set(headerOptions, base64.StdEncoding.EncodeToString(o))
	return p.do(ctx, m, req, func(*http.Response) error { return nil })
}

// serveHold takes a copy of what the owner of a name was given.
func (n *Names) serveHold(w http.ResponseWriter, r *http.Request) {
	http.NewResponseController(w).EnableFullDuplex() // see drain
	if err := n.back.take(w, r); err != nil {
		var stale *errStale
		if errors.As(err, &stale) {
			answer(w, http.StatusConflict, refusal{Kind: "stale", Text: "another membership", Epoch: stale.epoch})
		} else {
			failed(w, err)
		}
		drain(w, r)
		return
	}
	answer(w, http.StatusOK, struct{}{})
}

func (b *back) take(w http.ResponseWriter, r *http.Request) error {
	var rec journal.Record
	epoch, err := strconv.ParseUint(r.Header.Get(wire.HeaderEpoch), 10, 64)
	if err == nil {
		var text []byte
		if text, err = base64.StdEncoding.DecodeString(r.Header.Get(headerOptions)); err == nil {
			err = json.Unmarshal(text, &rec)
		}
	}
	if err == nil && (rec.Key == "" || rec.Key != r.URL.Query().Get("key") || rec.Mark || rec.Size < 0 || rec.Size > MaxBack || rec.Seq.Epoch != epoch) {
		err = errors.New("it is no entry")
	}
	if err == nil {
		err = checkKey(rec.Key)
	}
	if err != nil {
		return fmt.Errorf("%w: a copy of another worker: %w", source.ErrInvalid, err)
	}
	may := func() error {
		s := b.n.epochs.now()
		o, err := b.n.owner(s, rec.Key)
		if err != nil || s.Epoch != epoch || o.ID != r.URL.Query().Get("from") {
			return &errStale{epoch: s.Epoch}
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.leaving {
			return errStopping(b.n)
		}
		return nil
	}
	b.n.epochs.heard(epoch, b.n.c.Clock.Now())
	b.n.epochs.wait(r.Context(), epoch, catchUp)
	if err := may(); err != nil {
		return err
	}
	d, err := b.j.Begin(rec.Size)
	if err != nil {
		return fmt.Errorf("%w: worker %s: %w", gateway.ErrBusy, b.n.c.Self, err)
	}
	defer d.Abort()
	if err := copyAll(d, contentOf(w, r), rec.Size); err != nil {
		return err
	}
	if !slices.Equal(d.Sums(), rec.Sums) {
		return fmt.Errorf("%w: a copy of %q does not match its sums", wire.ErrCorrupt, rec.Key)
	}
	if err := waits(r.Context()); err != nil {
		return err
	}
	if err := may(); err != nil { // others may have been told meanwhile what this worker holds
		return err
	}
	if err := d.Commit(rec); err != nil {
		return err
	}
	// They may have been told right before it was there. Then it does not count, and its owner has to know.
	return may()
}
