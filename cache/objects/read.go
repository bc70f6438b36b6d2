package objects

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"sync"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/store"
	"github.com/stepcache/stepcache/cache/wire"
)

// found is a version, and who has its bytes.
type found struct {
	version
	owner *ring.Member // nil: this worker asks the bucket itself
}

// Stat implements gateway.Objects.
func (n *Names) Stat(ctx context.Context, key string) (gateway.Info, error) {
	f, err := n.find(ctx, key)
	if err != nil {
		return gateway.Info{}, err
	}
	return f.info(key), nil
}

func (n *Names) find(ctx context.Context, key string) (found, error) {
	f, err := n.findAtOwner(ctx, key)
	if n.back == nil || !errors.Is(err, gateway.ErrBusy) || ctx.Err() != nil {
		return f, err
	}
	// Its owner cannot be reached, or does not know yet what the others hold: they are asked themselves, and then
	// the bucket, which has what none of them does.
	p, perr := n.locate(key)
	if perr != nil {
		return found{}, perr
	}
	newest, at, _, aerr := n.back.ask(ctx, url.Values{"key": {key}, "limit": {"1"}})
	if aerr != nil {
		return found{}, err
	}
	if r, ok := newest[key]; ok {
		m := at[key]
		f := found{version: versionOf(p, r), owner: &m}
		if m.ID == n.c.Self {
			f.owner = nil
		}
		return f, nil
	}
	v, err := n.ask(ctx, p)
	if err != nil {
		return found{}, fmt.Errorf("%q: %w", key, err)
	}
	return found{version: v}, nil
}

func (n *Names) findAtOwner(ctx context.Context, key string) (found, error) {
	return route(ctx, n, key,
		func(ctx context.Context, p place, s state, owned bool) (found, error) {
			v, err := n.stat(ctx, key, p, s, owned)
			return found{version: v}, err
		},
		func(ctx context.Context, m ring.Member, s state) (found, error) {
			var v versionJSON
			err := n.peers.ask(ctx, m, s.Epoch, "GET", "/object", url.Values{"key": {key}}, nil, &v)
			n.told(key, v.version(), err)
			return found{v.version(), &m}, err
		}, always)
}

func (n *Names) stat(ctx context.Context, key string, p place, s state, owned bool) (version, error) {
	if n.back != nil {
		if v, ok, err := n.back.find(ctx, key, p, s); ok || err != nil {
			return v, err
		}
	}
	v, err := n.resolve(ctx, key, p, s, owned)
	if err != nil {
		return version{}, fmt.Errorf("%q: %w", key, err)
	}
	return v, nil
}

// Open implements gateway.Objects for the S3 endpoint. When the version is not in the bucket any more by the time it is read,
// WriteRange fails with source.ErrChanged or source.ErrNotFound before the first byte or, in the middle of a
// large object, after it.
func (n *Names) Open(ctx context.Context, key string) (gateway.Object, error) {
	o, err := n.open(ctx, key, &n.counts.read)
	if err == nil {
		n.counts.reads.Add(1)
	}
	return o, err
}

// Followed are the names as a mount reads them, which opens an object for each block, and of which the counts of the
// S3 endpoint say nothing.
func (n *Names) Followed() gateway.Objects { return followed{n} }

type followed struct{ *Names }

func (f followed) Open(ctx context.Context, key string) (gateway.Object, error) {
	return f.open(ctx, key, &f.counts.followed)
}

// open opens an object, and has the bytes counted that its reader gets.
func (n *Names) open(ctx context.Context, key string, read *atomic.Int64) (gateway.Object, error) {
	p, err := n.locate(key)
	if err != nil {
		return nil, err
	}
	f, err := n.find(ctx, key)
	if err != nil {
		return nil, err
	}
	o := &object{n: n, key: key, p: p, found: f, blocks: p.blocks(f.object), read: read}
	n.replaced.open(o.blocks)
	return o, nil
}

// object is one version, open for reading.
type object struct {
	n      *Names
	key    string
	p      place
	found  found
	blocks ring.Object
	read   *atomic.Int64 // what its reader got
	closed atomic.Bool
}

func (o *object) Info() gateway.Info { return o.found.info(o.key) }

func (o *object) Close() error {
	if o.closed.CompareAndSwap(false, true) {
		o.n.replaced.close(o.blocks)
	}
	return nil
}

// WriteRange implements gateway.Object.
func (o *object) WriteRange(ctx context.Context, w io.Writer, off, length int64) error {
	if off < 0 || length < 0 || length > o.found.object.Size-off {
		return fmt.Errorf("%w: %q: %d bytes from %d of %d", source.ErrInvalid, o.key, length, off, o.found.object.Size)
	}
	for length > 0 {
		block := off / ring.BlockSize
		within := off - block*ring.BlockSize
		k := min(length, ring.BlockSize-within)
		if err := o.writeBlock(ctx, w, block, within, k); err != nil {
			if errors.Is(err, source.ErrChanged) || errors.Is(err, source.ErrNotFound) {
				o.n.forget(o.key)
			}
			return fmt.Errorf("read %q: %w", o.key, err)
		}
		off, length = off+k, length-k
		o.read.Add(k)
	}
	return nil
}

// writeBlock writes length bytes from offset off of one block.
func (o *object) writeBlock(ctx context.Context, w io.Writer, block, off, length int64) error {
	b, err := o.n.acquireSound(ctx, o.key, o.p, o.found, o.blocks, block, off, length)
	if err != nil {
		return err
	}
	defer b.Release()
	if !b.Resident() {
		// It is held in heap for as long as it takes to be sent: only so much of it for all readers together.
		if !o.n.heap.TryAcquire(int64(b.Len())) {
			b.Release()
			return o.pass(ctx, w, block*ring.BlockSize+off, length)
		}
		defer o.n.heap.Release(int64(b.Len()))
		_, err := w.Write(b.Bytes()[off : off+length])
		return err
	}
	return send(w, b, off, length)
}

// mends is how often one reader has a block fetched again whose bytes are not what they were.
const mends = 2

// acquireSound is acquire for who sends length bytes from off on of the block. They are compared with their sums first:
// who receives them has nothing to compare them with.
func (n *Names) acquireSound(ctx context.Context, key string, p place, f found, blocks ring.Object, block, off, length int64) (*store.Block, error) {
	for try := 0; ; try++ {
		b, err := n.acquire(ctx, key, p, f, blocks, block)
		if err != nil {
			return nil, err
		}
		if err = b.Check(off, length); err == nil {
			return b, nil
		}
		n.c.Store.Verify(b)
		b.Release()
		if try == mends {
			return nil, fmt.Errorf("%w: fetched %d times: %w", wire.ErrCorrupt, try, err)
		}
	}
}

// acquire returns a block in use, fetched where it is not here: from the owner, which fetches it once for
// all, or from the bucket.
func (n *Names) acquire(ctx context.Context, key string, p place, f found, blocks ring.Object, block int64) (*store.Block, error) {
	if b, ok := n.c.Store.Lookup(blocks, block); ok {
		return b, nil
	}
	// The block may be on its way for others already, as slowly as the bucket sends it. What is begun here is over by then.
	ctx, cancel := context.WithTimeout(ctx, wire.WorkerTimeout+wire.SourceTimeout)
	defer cancel()
	b, err := n.c.Store.Acquire(ctx, blocks, block, func(ctx context.Context, into []byte) error {
		if made := n.assemblies.get(blocks); made != nil && n.fill(ctx, made, block, into) {
			n.counts.assembled.Add(int64(len(into)))
			return nil
		}
		if f.owner != nil && n.peers.known(*f.owner) == nil {
			within, cancel := context.WithTimeout(ctx, wire.WorkerTimeout)
			err := n.peers.block(within, *f.owner, key, f.object, block, into)
			cancel()
			if err == nil {
				n.c.Fetched(blocks, source.Digest{})
			}
			var peer *errPeer
			if err == nil || !errors.As(err, &peer) || ctx.Err() != nil {
				return err
			}
			n.log.Debug("block fetched from the bucket, since its owner cannot be reached", "key", key, "error", err)
		}
		return n.fetch(ctx, p, f.object, blocks, block, into)
	})
	if err == nil && b.Resident() {
		n.c.Resident(f.object, blocks)
	}
	return b, err
}

// fetch reads a block of a version from the bucket.
func (n *Names) fetch(ctx context.Context, p place, o source.Object, blocks ring.Object, block int64, into []byte) error {
	off := block * ring.BlockSize
	if n.back != nil {
		if pending, err := n.back.read(ctx, p.name(), o, off, into); pending {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, wire.SourceTimeout)
	defer cancel()
	body, err := p.Get(ctx, o, off, int64(len(into)))
	if err != nil {
		return err
	}
	defer body.Close()
	if _, err = io.ReadFull(body, into); err == nil {
		n.c.Fetched(blocks, body.Digest)
	}
	return err
}

// pass sends bytes from the bucket as they come, when there is no memory to keep them.
func (o *object) pass(ctx context.Context, w io.Writer, off, length int64) error {
	if b := o.n.back; b != nil {
		if c := b.local(o.key, o.found.object); c != nil {
			defer c.Close()
			return all(io.Copy(w, io.NewSectionReader(c, off, length)))(length)
		}
		if len(b.elsewhere(o.key, o.found.object)) > 0 {
			return fmt.Errorf("%w: no memory is free for what another worker holds", gateway.ErrBusy)
		}
	}
	body, err := o.p.Get(ctx, o.found.object, off, length)
	if err != nil {
		return err
	}
	defer body.Close()
	buf := chunks.Get().(*[]byte)
	defer chunks.Put(buf)
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{body}, *buf)
	if err == nil && n != length {
		err = fmt.Errorf("%w: %d bytes of %d came", source.ErrUnavailable, n, length)
	}
	return err
}

const (
	// sendfileFrom is the least length for which opening a file is worth it.
	sendfileFrom = 64 << 10
	chunkSize    = 256 << 10
)

// chunks are the buffers that bytes are copied through.
var chunks = sync.Pool{New: func() any { b := make([]byte, chunkSize); return &b }}

// send writes bytes of a resident block: from the file itself where w can.
func send(w io.Writer, b *store.Block, off, length int64) error {
	if to, ok := w.(io.ReaderFrom); ok && length >= sendfileFrom {
		if f, err := b.Reopen(); err == nil {
			defer f.Close()
			_, at := b.File()
			if _, err := f.Seek(at+off, io.SeekStart); err != nil {
				return err
			}
			return all(to.ReadFrom(&io.LimitedReader{R: f, N: length}))(length)
		} else if !errors.Is(err, os.ErrNotExist) { // no /proc: it is copied
			return err
		}
	}
	buf := chunks.Get().(*[]byte)
	defer chunks.Put(buf)
	for length > 0 {
		p := (*buf)[:min(length, chunkSize)]
		if _, err := b.ReadAt(p, off); err != nil {
			return err
		}
		if _, err := w.Write(p); err != nil {
			return err
		}
		off, length = off+int64(len(p)), length-int64(len(p))
	}
	return nil
}

func all(n int64, err error) func(int64) error {
	return func(want int64) error {
		if err == nil && n != want {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
}

// warming is a version that is to be fetched because it is about to be read.
type warming struct {
	*expected
	key   string
	p     place
	found found
	made  *assembly
}

// makeWarm has an object made in the background of the parts of which it was completed, or fetched where they are not
// held: its readers join. It is a hint: where there are many, some are left to their readers.
func (n *Names) makeWarm(key string, p place, o source.Object, made *assembly) {
	e := n.stage.expect(p.blocks(o))
	if e == nil {
		return
	}
	n.assemblies.set(e.object, made)
	select {
	case n.warm <- warming{e, key, p, found{version: version{object: o}}, made}:
	default:
		n.assemblies.set(e.object, nil)
		e.end()
	}
}

func (n *Names) keepWarm(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case w := <-n.warm:
			n.fetchAll(ctx, w)
		}
	}
}

func (n *Names) fetchAll(ctx context.Context, w warming) {
	defer n.dropParts(ctx, w.made)
	defer n.assemblies.set(w.object, nil)
	defer w.end()
	for block := range ring.Blocks(w.object.Size) {
		b, err := n.acquire(ctx, w.key, w.p, w.found, w.object, block)
		if err != nil {
			n.log.Debug("not made warm", "key", w.key, "error", err)
			return
		}
		b.Release()
	}
}
