package objects

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// MaxSize is the protocol's bound of an object in bytes.
const MaxSize = 5 << 40

// versionJSON is a version as it travels between workers.
type versionJSON struct {
	Object source.Object
	Attrs  source.Attributes
}

func (v versionJSON) version() version { return version{v.Object, v.Attrs} }

// optionsJSON are put options as they travel.
type optionsJSON struct {
	Attrs    source.Attributes
	IfMatch  string
	IfAbsent bool
	Sums     source.Sums // of a put's content
}

func optionsOf(o gateway.PutOptions) (optionsJSON, error) {
	out := optionsJSON{
		Attrs:   source.Attributes{ContentType: o.ContentType, Headers: o.Headers, Metadata: o.Metadata},
		IfMatch: o.IfMatch, Sums: o.Sums,
	}
	switch o.IfNoneMatch {
	case "":
	case "*":
		out.IfAbsent = true
	default:
		return out, fmt.Errorf("%w: If-None-Match of a put is * or nothing", source.ErrInvalid)
	}
	return out, nil
}

// unconditional says whether a write is to be whatever there is.
func (o optionsJSON) unconditional() bool { return o.IfMatch == "" && !o.IfAbsent }

func (o optionsJSON) write() source.WriteOptions {
	return source.WriteOptions{Attributes: o.Attrs, IfMatch: o.IfMatch, IfAbsent: o.IfAbsent, Sums: o.Sums}
}

// Put implements gateway.Writer.
func (n *Names) Put(ctx context.Context, key string, size int64, r io.Reader, o gateway.PutOptions) (gateway.Info, error) {
	options, err := optionsOf(o)
	switch {
	case err != nil:
	case size < 0:
		err = fmt.Errorf("%w: the size is not known", source.ErrInvalid)
	case size > MaxSize:
		err = gateway.ErrTooLarge
	}
	if err != nil {
		return gateway.Info{}, fmt.Errorf("put %q: %w", key, err)
	}
	r = waited{ctx, r}
	var body *framer // once it is passed on
	v, err := route(ctx, n, key,
		func(ctx context.Context, p place, s state, owned bool) (version, error) {
			return n.put(ctx, key, p, s, owned, size, r, options)
		},
		func(ctx context.Context, m ring.Member, s state) (version, error) {
			if body == nil {
				body = newFramer(r)
			}
			query := url.Values{"key": {key}, "size": {strconv.FormatInt(size, 10)}}
			v, err := n.peers.put(ctx, m, s.Epoch, query, options, body)
			return v.version(), err
		},
		func() bool { return body == nil || !body.begun })
	if err != nil {
		return gateway.Info{}, err
	}
	return v.info(key), nil
}

// tee is the content of a put on its way to the bucket: what passes is staged as well.
type tee struct {
	ctx    context.Context
	r      io.Reader
	staged *staged
	now    func() time.Time
	read   int64
	// ended is when r ended: the bucket commits nothing before that. err is r's error, io.EOF included.
	ended time.Time
	err   error
}

func (t *tee) Read(p []byte) (int, error) {
	if t.err != nil {
		return 0, t.err
	}
	n, err := t.r.Read(p)
	t.staged.write(t.ctx, p[:n])
	t.read += int64(n)
	if err != nil {
		t.err, t.ended = err, t.now()
	}
	return n, err
}

// failed is why a put failed whose source says err: what is wrong with the content is said in its own words.
func (t *tee) failed(err error) error {
	if t.err != nil && t.err != io.EOF && !errors.Is(err, t.err) {
		return t.err
	}
	return err
}

// mostHeld is the most that one put holds in memory while it is sent.
const mostHeld = 64 << 20

// hold takes the memory that a put of size bytes, sent at once, holds of them, in line with others. The large ones share
// half of all, so that they hold up each other and not the small ones, however little of them is held.
func (n *Names) hold(ctx context.Context, size, held int64) (release func(), err error) {
	w := min(max(held, 1), mostHeld)
	large := size > maxWriting/8
	if large {
		if err := n.large.Acquire(ctx, w); err != nil {
			return nil, fmt.Errorf("%w: too many large puts are under way: %w", gateway.ErrBusy, err)
		}
	}
	if err := n.writing.Acquire(ctx, w); err != nil {
		if large {
			n.large.Release(w)
		}
		return nil, fmt.Errorf("%w: too many puts are under way: %w", gateway.ErrBusy, err)
	}
	return func() {
		n.writing.Release(w)
		if large {
			n.large.Release(w)
		}
	}, nil
}

// put executes a put on this worker.
func (n *Names) put(ctx context.Context, key string, p place, s state, owned bool, size int64, r io.Reader, o optionsJSON) (version, error) {
	if n.back != nil {
		return n.back.put(ctx, key, p, s, size, r, o)
	}
	return n.putThrough(ctx, key, p, s, owned, size, r, o)
}

// putThrough is a put that is acknowledged once the bucket has it.
func (n *Names) putThrough(ctx context.Context, key string, p place, s state, owned bool, size int64, r io.Reader, o optionsJSON) (version, error) {
	n.counts.puts.Add(1)
	release, err := n.hold(ctx, size, size)
	if err != nil {
		return version{}, fmt.Errorf("put %q: %w", key, err)
	}
	defer release()
	options := o.write()
	if err := n.precheck(ctx, p, options); err != nil {
		return version{}, fmt.Errorf("put %q: %w", key, err)
	}
	w := n.begin(key, s, owned)
	t := &tee{ctx: ctx, r: r, staged: n.stage.begin(size), now: n.c.Clock.Now}
	defer t.staged.end()
	options.Begun = func(upload string) { n.uploads.begun(p, upload) }
	options.Ended = func(upload string, gone bool) { n.uploads.ended(p, upload, gone) }
	object, err := p.writer.PutObject(ctx, p.key, t, size, options)
	if err != nil {
		w.end()
		return version{}, fmt.Errorf("put %q: %w", key, refused(t.failed(err), options))
	}
	n.counts.written.Add(size)
	if t.staged.finish(p.blocks(object)) {
		n.counts.staged.Add(1)
	} else if size > 0 {
		n.counts.unstaged.Add(1)
	}
	v := version{object, stored(o.Attrs)}
	w.finish(&v, t.ended)
	return v, acknowledged(key, w.acknowledge(ctx))
}

// acknowledged is the error of a write that the bucket has, but whose writer gave up.
func acknowledged(key string, err error) error {
	if err != nil {
		return fmt.Errorf("%q: written, but not acknowledged: %w", key, err)
	}
	return nil
}

// stored is what the bucket says of attributes that it was given.
func stored(a source.Attributes) source.Attributes {
	if a.ContentType == "" {
		a.ContentType = "application/octet-stream"
	}
	return a
}

// precheck refuses a put whose conditions do not hold before its content is read. The bucket decides again.
func (n *Names) precheck(ctx context.Context, p place, o source.WriteOptions) error {
	if o.IfMatch == "" && !o.IfAbsent {
		return nil
	}
	v, err := n.ask(ctx, p)
	switch {
	case errors.Is(err, source.ErrNotFound) && o.IfAbsent:
		return nil
	case err != nil:
		return err
	case o.IfAbsent:
		return fmt.Errorf("%w: it exists, with ETag %s", gateway.ErrPrecondition, v.object.Version)
	case o.IfMatch != "*" && o.IfMatch != v.object.Version:
		return fmt.Errorf("%w: its ETag is %s", gateway.ErrPrecondition, v.object.Version)
	}
	return nil
}

// Delete implements gateway.Writer.
func (n *Names) Delete(ctx context.Context, key string) error {
	_, err := route(ctx, n, key,
		func(ctx context.Context, p place, s state, owned bool) (struct{}, error) {
			return struct{}{}, n.remove(ctx, key, p, s, owned)
		},
		func(ctx context.Context, m ring.Member, s state) (struct{}, error) {
			return struct{}{}, n.peers.ask(ctx, m, s.Epoch, "DELETE", "/object", url.Values{"key": {key}}, nil, nil)
		}, always)
	return err
}

func (n *Names) remove(ctx context.Context, key string, p place, s state, owned bool) error {
	if err := waits(ctx); err != nil {
		return fmt.Errorf("delete %q: %w", key, err)
	}
	n.counts.deletes.Add(1)
	var t *passage
	if n.back != nil {
		var err error
		if t, err = n.back.through(ctx, key, s, true); err != nil {
			return fmt.Errorf("delete %q: %w", key, err)
		}
		defer t.done()
		if err := waits(ctx); err != nil {
			return fmt.Errorf("delete %q: %w", key, err)
		}
	}
	w := n.begin(key, s, owned)
	err := p.Delete(ctx, p.key)
	if t.over() && lasting(err) && n.absent(ctx, p) {
		err = nil // what it refuses to take it may refuse to delete as well
	}
	if err == nil {
		w.now = &source.Object{}
	}
	w.end()
	if err != nil {
		return fmt.Errorf("delete %q: %w", key, err)
	}
	return acknowledged(key, t.acknowledge(ctx, w))
}

// absent says whether the bucket has nothing of that name, as far as it tells. Of one that it can never have it may
// refuse to be asked, but not to list what there is.
func (n *Names) absent(ctx context.Context, p place) bool {
	_, err := n.ask(ctx, p)
	if errors.Is(err, source.ErrNotFound) {
		return true
	}
	if err == nil || !errors.Is(err, source.ErrInvalid) {
		return false
	}
	page, err := p.pager.Page(ctx, source.PageRequest{Prefix: p.key, Delimited: true})
	return err == nil && !page.More && !slices.ContainsFunc(page.Objects, func(o source.Object) bool { return o.Key == p.key })
}

// copyJSON is a copy as it travels.
type copyJSON struct {
	From    string // its key
	Version string
	Size    int64
	Options optionsJSON
}

// Copy implements gateway.Writer. The owner of the new name executes it.
func (n *Names) Copy(ctx context.Context, from gateway.Info, to string, o gateway.PutOptions) (gateway.Info, error) {
	options, err := optionsOf(o)
	if err != nil {
		return gateway.Info{}, fmt.Errorf("copy to %q: %w", to, err)
	}
	c := copyJSON{From: from.Key, Version: from.ETag, Size: from.Size, Options: options}
	v, err := route(ctx, n, to,
		func(ctx context.Context, p place, s state, owned bool) (version, error) {
			return n.copy(ctx, to, p, s, owned, c)
		},
		func(ctx context.Context, m ring.Member, s state) (version, error) {
			var v versionJSON
			err := n.peers.ask(ctx, m, s.Epoch, "POST", "/copy", url.Values{"key": {to}}, c, &v)
			return v.version(), err
		}, always)
	if err != nil {
		return gateway.Info{}, err
	}
	return v.info(to), nil
}

// maxCopy is what a bucket copies by itself; more goes through this worker.
const maxCopy = 5 << 30

func (n *Names) copy(ctx context.Context, to string, p place, s state, owned bool, c copyJSON) (version, error) {
	from, err := n.locate(c.From)
	if err != nil {
		return version{}, err
	}
	n.counts.copies.Add(1)
	if n.back != nil {
		if err := n.toBucket(ctx, c.From); err != nil {
			return version{}, fmt.Errorf("copy %q to %q: %w", c.From, to, err)
		}
	}
	o := c.Options.write()
	object := source.Object{Key: from.key, Size: c.Size, Version: c.Version}
	if from.URL() != p.URL() || c.Size > maxCopy || !c.Options.unconditional() {
		body, err := from.Get(ctx, object, 0, c.Size)
		if err != nil {
			return version{}, fmt.Errorf("copy %q to %q: %w", c.From, to, err)
		}
		defer body.Close()
		return n.put(ctx, to, p, s, owned, c.Size, waited{ctx, body}, c.Options)
	}
	var t *passage
	if n.back != nil {
		if t, err = n.back.through(ctx, to, s, true); err != nil {
			return version{}, fmt.Errorf("copy %q to %q: %w", c.From, to, err)
		}
		defer t.done()
	}
	if err := n.precheck(ctx, p, o); err != nil {
		return version{}, fmt.Errorf("copy %q to %q: %w", c.From, to, err)
	}
	if err := waits(ctx); err != nil {
		return version{}, fmt.Errorf("copy %q to %q: %w", c.From, to, err)
	}
	w := n.begin(to, s, owned)
	began := n.c.Clock.Now()
	became, err := p.writer.Copy(ctx, object, p.key, o)
	if err != nil {
		w.end()
		return version{}, fmt.Errorf("copy %q to %q: %w", c.From, to, told(err))
	}
	v := version{became, stored(c.Options.Attrs)}
	w.finish(&v, began)
	return v, acknowledged(to, t.acknowledge(ctx, w))
}

// toBucket returns once nothing of a name is pending, whoever owns it.
func (n *Names) toBucket(ctx context.Context, key string) error {
	_, err := route(ctx, n, key,
		func(ctx context.Context, p place, s state, owned bool) (struct{}, error) {
			return struct{}{}, n.back.settled(ctx, key, s)
		},
		func(ctx context.Context, m ring.Member, s state) (struct{}, error) {
			return struct{}{}, n.peers.ask(ctx, m, s.Epoch, "POST", "/settled", url.Values{"key": {key}}, nil, nil)
		}, always)
	return err
}
