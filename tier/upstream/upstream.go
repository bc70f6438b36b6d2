// Package upstream reads one Dataset's tier as the source of another: dataset://namespace/name/folder.
//
// It owns one implementation of source.Source, which lists the snapshot that the upstream workers give to new
// readers and reads bytes through cache/client. A key is a path of the upstream Dataset without its first
// slash, and a version is the identity of the upstream's object version, so that its bytes are bound to what
// the bucket itself has. It is read-only.
//
// What admits is the upstream's read key, from a folder that its owner's controller fills: the reader Secret, or
// in another namespace its copy. It is read at every connection, so that nobody who lost it makes a new one.
//
// Concurrency: a Dataset and an Opener are safe for concurrent use. Goroutines are those of clients; Close ends
// them. Failure: source.Error as everywhere; what the upstream says of an object is passed on, all else is
// ErrUnavailable, or ErrDenied where the key is missing or refused.
//
// It may import cache/...; cmd gives it to workers.
package upstream

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// Buffers is the memory of one upstream's client: what is on its way to the store of this worker.
	Buffers = 32 << 20
	// lookWithin bounds one look for a snapshot; the caller tries again.
	lookWithin = 15 * time.Second
)

// Opener opens sources, the upstream ones here and all others with scheme.Open. Its fields are not changed
// after the first Open.
type Opener struct {
	// Address is where the workers of a Dataset are found; nil means their Service, as Kubernetes names it.
	Address func(namespace, name string) string
	// Dial connects to workers; nil means a net.Dialer.
	Dial   func(ctx context.Context, network, addr string) (net.Conn, error)
	Logger *slog.Logger

	mu     sync.Mutex
	opened []*Dataset
}

// Open is worker.Deps.OpenSource.
func (o *Opener) Open(ctx context.Context, c source.Config) (*scheme.Source, error) {
	kind, _, _, err := source.Split(c.URL)
	if err != nil {
		return nil, err
	}
	if kind != "dataset" {
		return scheme.Open(ctx, c, scheme.Elapsed(wire.SourceTimeout), scheme.Logger(o.Logger))
	}
	d, err := o.Dataset(c)
	if err != nil {
		return nil, err
	}
	meter := source.NewMeter(d.URL())
	limited := source.Limit(source.Measure(d, meter), source.LimitOptions{Requests: c.MaxRequests, BytesPerSecond: c.BytesPerSecond, Meter: meter})
	return &scheme.Source{Source: source.Retry(limited, source.RetryOptions{Elapsed: wire.SourceTimeout, Logger: o.Logger}), Meter: meter}, nil
}

// Dataset opens an upstream Dataset without decorators. It sends no request.
func (o *Opener) Dataset(c source.Config) (*Dataset, error) {
	kind, name, _, err := source.Split(c.URL)
	if err != nil {
		return nil, err
	}
	if kind != "dataset" || c.CredentialsDir == "" {
		return nil, &source.Error{Op: "open", Name: c.URL, Kind: source.ErrInvalid, Err: errors.New("an upstream is dataset://namespace/name, with the folder of its read key")}
	}
	address := o.Address
	if address == nil {
		address = func(namespace, name string) string {
			return net.JoinHostPort(name+"-worker."+namespace+".svc", "7070")
		}
	}
	ns, n, _ := strings.Cut(name, "/")
	d := &Dataset{name: name, url: "dataset://" + name, keys: c.CredentialsDir, seed: address(ns, n), dial: o.Dial, log: o.Logger, turn: make(chan struct{}, 1)}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.opened = append(o.opened, d)
	return d, nil
}

// Close ends all that was opened. No read may be under way.
func (o *Opener) Close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range o.opened {
		d.Close()
	}
	o.opened = nil
}

// Dataset is one upstream.
type Dataset struct {
	name, url, keys, seed string
	dial                  func(ctx context.Context, network, addr string) (net.Conn, error)
	log                   *slog.Logger

	turn   chan struct{} // held by who looks for the newest snapshot or connects
	looked time.Time     // when the last look began that found anything out; these two belong to who has the turn
	failed error         // how it ended

	mu     sync.Mutex
	cur    *reader
	closed bool
}

var _ source.Source = (*Dataset)(nil)

// reader is a client, which is bound to one snapshot, and who uses it.
type reader struct {
	*client.Client
	users int
	old   bool
}

// URL implements source.Source.
func (d *Dataset) URL() string { return d.url }

// Close ends the connections. No read may be under way.
func (d *Dataset) Close() {
	d.mu.Lock()
	d.closed = true
	cur := d.cur
	d.cur = nil
	d.mu.Unlock()
	if cur != nil {
		cur.Client.Close()
	}
}

// use returns a reader, which leave gives back; where fresh is set, of the snapshot that the upstream gives after the
// call began. To look is one small request, and one at a time: of the readers of many changed files, those that waited for
// another's look, which began after they came, take what that found, also where it was nothing.
func (d *Dataset) use(ctx context.Context, fresh bool) (*reader, error) {
	called := time.Now()
	if r := d.join(); r != nil {
		if !fresh {
			return r, nil
		}
		d.leave(r)
	}
	select {
	case d.turn <- struct{}{}:
		defer func() { <-d.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r := d.join()
	if meanwhile := d.looked.After(called); r != nil && (!fresh || meanwhile && d.failed == nil) {
		return r, nil
	} else if meanwhile && d.failed != nil {
		if r != nil {
			d.leave(r)
		}
		return nil, d.failed
	}
	began := time.Now()
	r, err := d.look(ctx, r)
	if err == nil || ctx.Err() == nil { // who gave up found nothing out
		d.looked, d.failed = began, err
	}
	return r, err
}

// look asks for the newest snapshot, and connects where that is not r's. It gives r back, or returns it. The caller has
// the turn.
func (d *Dataset) look(ctx context.Context, r *reader) (next *reader, err error) {
	ctx, cancel := context.WithTimeout(ctx, lookWithin)
	defer cancel()
	defer func() {
		if r != nil && next != r {
			d.leave(r)
		}
	}()
	config, err := d.config()
	if err != nil {
		return nil, err
	}
	if r != nil {
		current, err := r.Current(ctx)
		if err != nil {
			return nil, err
		}
		if current == r.Snapshot().Digest() {
			return r, nil
		}
	}
	waiting := ""
	config.Progress = func(p client.Progress) { waiting = p.Waiting }
	c, err := client.Dial(ctx, config)
	if err != nil {
		if waiting != "" {
			err = fmt.Errorf("%s: %w", waiting, err)
		}
		return nil, err
	}
	next = &reader{Client: c, users: 1}
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		c.Close()
		return nil, errors.New("closed")
	}
	last := d.cur
	d.cur = next
	idle := false
	if last != nil {
		last.old = true
		idle = last.users == 0
	}
	d.mu.Unlock()
	if idle {
		last.Client.Close()
	}
	return next, nil
}

// join counts one more user of the reader that there is; nil where there is none.
func (d *Dataset) join() *reader {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cur != nil {
		d.cur.users++
	}
	return d.cur
}

func (d *Dataset) leave(r *reader) {
	d.mu.Lock()
	r.users--
	end := r.old && r.users == 0
	d.mu.Unlock()
	if end {
		r.Client.Close()
	}
}

// config is what a client needs. The folder is read here and at every connection.
func (d *Dataset) config() (client.Config, error) {
	keys, err := wire.LoadKeys(d.keys)
	if err != nil {
		return client.Config{}, fmt.Errorf("%w: no read key: %w", wire.ErrUnauthorized, err)
	}
	config := client.Config{
		Dataset: d.name, Seeds: []string{d.seed}, Keys: keys, BufferBytes: Buffers, Dialer: d.dial, Logger: d.log,
		KeySource: func() wire.Keys {
			keys, _ := wire.LoadKeys(d.keys) // without them the client says that it has none
			return keys
		},
	}
	if b, err := os.ReadFile(filepath.Join(d.keys, "copies")); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && n > 0 {
			config.Copies = n
		}
	}
	return config, nil
}

func (d *Dataset) fail(ctx context.Context, op, key string, err error) error {
	e := &source.Error{Op: op, Name: d.url + "/" + key, Kind: source.ErrUnavailable, Err: err}
	if done := new(source.Error); errors.As(err, &done) && strings.HasPrefix(done.Name, d.url) {
		return err
	}
	switch kind := source.ContextKind(ctx); {
	case kind != nil:
		e.Kind, e.Err = kind, errors.Join(err, ctx.Err())
	case errors.Is(err, wire.ErrUnauthorized):
		e.Kind, e.Hint = source.ErrDenied, "the Dataset's owner shares it in spec.shareWith"
	default:
		for _, kind := range []error{source.ErrNotFound, source.ErrChanged, source.ErrDenied, source.ErrInvalid, source.ErrUnversioned} {
			if errors.Is(err, kind) {
				e.Kind = kind
			}
		}
	}
	if e.Err == e.Kind {
		e.Err = nil // said already
	}
	return e
}

// object is file i as the source shows it.
func object(s *catalog.Snapshot, i catalog.Index) (source.Object, bool) {
	_, o, ok := s.Object(i)
	if !ok {
		return source.Object{}, false
	}
	r, ok := s.Ring(i)
	if !ok {
		return source.Object{}, false
	}
	return source.Object{
		Key: strings.TrimPrefix(s.Path(i), "/"), Size: o.Size, Version: hex.EncodeToString(r.ID[:]), ModTime: o.ModTime, Digest: o.Digest,
	}, true
}

// List implements source.Lister: the upstream's current snapshot.
func (d *Dataset) List(ctx context.Context, prefix string, yield func(source.Object) error) error {
	r, err := d.use(ctx, true)
	if err != nil {
		return d.fail(ctx, "list", prefix, err)
	}
	defer d.leave(r)
	s := r.Snapshot()
	for i := range s.Len() {
		if i%4096 == 0 && ctx.Err() != nil {
			return d.fail(ctx, "list", prefix, ctx.Err())
		}
		if o, ok := object(s, catalog.Index(i)); ok && strings.HasPrefix(o.Key, prefix) {
			if err := yield(o); err != nil {
				return err
			}
		}
	}
	return nil
}

// find looks a key up; the path must be the key itself, not another spelling.
func find(s *catalog.Snapshot, key string) (catalog.Index, source.Object, bool) {
	i, ok := s.Lookup("/" + key)
	if !ok {
		return 0, source.Object{}, false
	}
	o, ok := object(s, i)
	return i, o, ok && o.Key == key
}

// Stat implements source.Stater.
func (d *Dataset) Stat(ctx context.Context, key string) (source.Object, error) {
	r, err := d.use(ctx, true)
	if err != nil {
		return source.Object{}, d.fail(ctx, "stat", key, err)
	}
	defer d.leave(r)
	_, o, ok := find(r.Snapshot(), key)
	if !ok {
		return source.Object{}, d.fail(ctx, "stat", key, source.ErrNotFound)
	}
	return o, nil
}

// Get implements source.Getter.
func (d *Dataset) Get(ctx context.Context, o source.Object, off, length int64) (source.Body, error) {
	if off < 0 || length < 0 || off+length < off || off+length > o.Size {
		return source.Body{}, d.fail(ctx, "get", o.Key, fmt.Errorf("%w: range %d+%d is not within %d bytes", source.ErrInvalid, off, length, o.Size))
	}
	if length == 0 {
		return source.Body{ReadCloser: io.NopCloser(strings.NewReader(""))}, nil
	}
	for fresh := false; ; fresh = true {
		r, err := d.use(ctx, fresh)
		if err != nil {
			return source.Body{}, d.fail(ctx, "get", o.Key, err)
		}
		i, have, ok := find(r.Snapshot(), o.Key)
		if ok && have.Version == o.Version {
			return source.Body{ReadCloser: &body{d: d, r: r, ctx: ctx, key: o.Key, i: i, off: off, left: length}, Digest: have.Digest}, nil
		}
		d.leave(r)
		switch {
		case !fresh: // the upstream may have a newer listing than this reader's
		case !ok:
			return source.Body{}, d.fail(ctx, "get", o.Key, source.ErrNotFound)
		default:
			return source.Body{}, d.fail(ctx, "get", o.Key, source.ErrChanged)
		}
	}
}

// body reads a range of one file.
type body struct {
	d         *Dataset
	r         *reader
	ctx       context.Context
	key       string
	i         catalog.Index
	off, left int64
	err       error
}

func (b *body) Read(p []byte) (int, error) {
	switch {
	case b.err != nil:
		return 0, b.err
	case b.left == 0:
		return 0, io.EOF
	case len(p) == 0:
		return 0, nil
	}
	p = p[:min(int64(len(p)), b.left)]
	n, err := b.r.ReadAt(b.ctx, b.i, p, b.off)
	b.off += int64(n)
	b.left -= int64(n)
	if n < len(p) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		b.err = b.d.fail(b.ctx, "get", b.key, err)
		return n, b.err
	}
	return n, nil
}

func (b *body) Close() error {
	if b.r != nil {
		b.d.leave(b.r)
		b.r, b.err = nil, io.ErrClosedPipe
	}
	return nil
}

// Put implements source.Source.
func (d *Dataset) Put(ctx context.Context, key string, _ io.Reader, _ int64) (source.Object, error) {
	return source.Object{}, &source.Error{Op: "put", Name: d.url + "/" + key, Kind: source.ErrReadOnly, Hint: "write to the Dataset's own bucket"}
}

// Delete implements source.Source.
func (d *Dataset) Delete(ctx context.Context, key string) error {
	return &source.Error{Op: "delete", Name: d.url + "/" + key, Kind: source.ErrReadOnly, Hint: "delete in the Dataset's own bucket"}
}
