package objects

import (
	"container/list"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// Parts of an upload come to any worker, in any order, and again; their borders are not those of blocks, and where a
// part lies is known only when the upload is completed. So a worker that sends a part to the bucket keeps its bytes as an
// object of their own, in the store, as it keeps what was put. Who completes the upload asks all members what they hold
// of it, and makes the blocks of the object of that: at leisure, or when somebody reads them first. Whatever is not held
// any more comes from the bucket. A part is known by the ETag that the bucket gave it.

const (
	// maxParts bounds the parts that are remembered: some hundred bytes each.
	maxParts = 16 << 10
	// partsTimeout bounds the time in which others tell what they hold, which is more than it takes to find that
	// one hangs: the bucket has it all.
	partsTimeout = 10 * time.Second
)

// parts are those of uploads under way whose bytes went through this worker.
type parts struct {
	*stager

	mu    sync.Mutex
	of    map[uploadName]*list.Element
	order list.List // of *keptUpload, the oldest first
	count int
}

type uploadName struct{ key, upload string }

type keptUpload struct {
	uploadName
	parts map[int]keptPart
	bytes int64
	large bool // more than is kept of an object
}

type keptPart struct {
	etag   string
	object ring.Object
}

// begin is stager.begin for a part. An upload of which more came than is kept of an object is not kept at all.
func (p *parts) begin(u uploadName, size int64) *staged {
	var dead []ring.Object
	p.mu.Lock()
	e := p.of[u]
	if e == nil {
		e = p.order.PushBack(&keptUpload{uploadName: u, parts: make(map[int]keptPart)})
		p.of[u] = e
	}
	k := e.Value.(*keptUpload)
	if k.bytes+size > p.quota/stageShare {
		k.large = true
		dead = p.empty(k)
	}
	large := k.large
	for p.order.Len() > maxParts || p.count > maxParts {
		dead = append(dead, p.remove(p.order.Front())...)
	}
	p.mu.Unlock()
	p.dropAll(dead)
	if large {
		return nil
	}
	return p.stager.begin(size)
}

func (p *parts) dropAll(objects []ring.Object) {
	for _, o := range objects {
		p.store.Drop(o)
	}
}

// add keeps a part that the bucket has, instead of one with its number that was put before.
func (p *parts) add(u uploadName, number int, etag string, o ring.Object) {
	dead := o
	p.mu.Lock()
	if e := p.of[u]; e != nil && !e.Value.(*keptUpload).large { // else meanwhile
		k := e.Value.(*keptUpload)
		before, again := k.parts[number]
		if !again {
			p.count++
		}
		k.parts[number] = keptPart{etag, o}
		k.bytes += o.Size - before.object.Size
		dead = before.object
	}
	p.mu.Unlock()
	p.store.Drop(dead)
}

// drop forgets an upload.
func (p *parts) drop(u uploadName) {
	var dead []ring.Object
	p.mu.Lock()
	if e := p.of[u]; e != nil {
		dead = p.remove(e)
	}
	p.mu.Unlock()
	p.dropAll(dead)
}

// remove forgets an upload, and returns what is to be dropped of it. The caller holds the mutex, as that of empty.
func (p *parts) remove(e *list.Element) []ring.Object {
	k := p.order.Remove(e).(*keptUpload)
	delete(p.of, k.uploadName)
	return p.empty(k)
}

func (p *parts) empty(k *keptUpload) (dead []ring.Object) {
	for _, part := range k.parts {
		dead = append(dead, part.object)
	}
	p.count -= len(k.parts)
	clear(k.parts)
	k.bytes = 0
	return dead
}

// held are the parts of an upload that this worker remembers.
func (p *parts) held(u uploadName) (out []partJSON) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.of[u]; e != nil {
		for number, part := range e.Value.(*keptUpload).parts {
			out = append(out, partJSON{Number: number, ETag: part.etag, Size: part.object.Size})
		}
	}
	return out
}

// object is what the store has of a part; without a size when it is not remembered.
func (p *parts) object(u uploadName, number int, etag string) ring.Object {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.of[u]; e != nil {
		if part := e.Value.(*keptUpload).parts[number]; part.etag == etag {
			return part.object
		}
	}
	return ring.Object{}
}

// partJSON is a part as workers tell each other of it.
type partJSON struct {
	Number int
	ETag   string
	Size   int64
}

// heldPart is a part, where it is held, and where it lies in the object.
type heldPart struct {
	partJSON
	at  *ring.Member // nil: here
	off int64
}

// holders are who holds parts of an upload.
type holders struct {
	asked chan struct{} // closed when all have answered, or will not
	held  []heldPart    // then
}

// whoHolds asks all members what they hold of an upload. Nobody who completes it waits for that: only who then reads
// the object does, as long as it takes to see that a worker hangs.
func (n *Names) whoHolds(u uploadName) *holders {
	h := &holders{asked: make(chan struct{})}
	for _, part := range n.parts.held(u) {
		h.held = append(h.held, heldPart{partJSON: part})
	}
	var mu sync.Mutex
	var answers sync.WaitGroup
	for _, m := range n.epochs.now().Members {
		if m.ID == n.c.Self || n.peers.known(m) != nil {
			continue
		}
		answers.Go(func() {
			ctx, cancel := context.WithTimeout(n.life, partsTimeout)
			defer cancel()
			var theirs []partJSON
			if err := n.peers.ask(ctx, m, 0, http.MethodGet, "/parts", u.query(), nil, &theirs); err != nil {
				n.log.Debug("a worker does not tell which parts it holds", "key", u.key, "worker", m.ID, "error", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, part := range theirs {
				h.held = append(h.held, heldPart{partJSON: part, at: &m})
			}
		})
	}
	n.asking.Go(func() {
		answers.Wait()
		close(h.asked)
	})
	return h
}

func (u uploadName) query() url.Values { return url.Values{"key": {u.key}, "upload": {u.upload}} }

// assembly is a version that was made of parts.
type assembly struct {
	uploadName
	made    []source.Part
	size    int64
	holders *holders
	found   sync.Once
	parts   []heldPart
}

// find finds the parts, in order, as far as somebody holds them: nobody knows where one lies that comes after one
// that is not held. There are none where the object cannot be of these.
func (a *assembly) find() {
	off := int64(0)
	for _, part := range a.made {
		is := func(h heldPart) bool { return h.Number == part.Number && h.ETag == part.Version && h.Size >= 0 }
		i := slices.IndexFunc(a.holders.held, func(h heldPart) bool { return is(h) && h.at == nil })
		if i < 0 {
			i = slices.IndexFunc(a.holders.held, is)
		}
		if i < 0 {
			return
		}
		h := a.holders.held[i]
		h.off = off
		a.parts = append(a.parts, h)
		off += h.Size
	}
	if off != a.size {
		a.parts = nil
	}
}

// fill makes one block of the object of its parts, and says whether they were there.
func (n *Names) fill(ctx context.Context, a *assembly, block int64, into []byte) bool {
	select {
	case <-a.holders.asked:
	case <-ctx.Done():
		return false
	}
	a.found.Do(a.find)
	at := block * ring.BlockSize
	for len(into) > 0 {
		i := sort.Search(len(a.parts), func(i int) bool { return a.parts[i].off+a.parts[i].Size > at })
		if i == len(a.parts) {
			return false
		}
		h := a.parts[i]
		piece := (at - h.off) / ring.BlockSize // of the part
		within := at - h.off - piece*ring.BlockSize
		length := min(h.Size-piece*ring.BlockSize, ring.BlockSize)
		k := min(int64(len(into)), length-within)
		if !n.readPart(ctx, a.uploadName, h, piece, length, within, into[:k]) {
			return false
		}
		into, at = into[k:], at+k
	}
	return true
}

// readPart reads from one block of a part, which has length bytes.
func (n *Names) readPart(ctx context.Context, u uploadName, h heldPart, block, length, off int64, into []byte) bool {
	if h.at == nil {
		o := n.parts.object(u, h.Number, h.ETag)
		if o.Size != h.Size {
			return false
		}
		b, ok := n.c.Store.Lookup(o, block)
		if !ok {
			return false
		}
		defer b.Release()
		// New sums are taken of the block that it becomes part of: they must not be of other bytes.
		if err := b.ReadChecked(into, off); err != nil {
			n.c.Store.Verify(b)
			return false
		}
		return true
	}
	if n.peers.known(*h.at) != nil {
		return false
	}
	whole := into
	if int64(len(into)) < length { // its sums are of all of it
		if !n.heap.TryAcquire(length) {
			return false
		}
		defer n.heap.Release(length)
		whole = make([]byte, length)
	}
	query := u.query()
	query.Set("number", strconv.Itoa(h.Number))
	query.Set("etag", h.ETag)
	query.Set("block", strconv.FormatInt(block, 10))
	ctx, cancel := context.WithTimeout(ctx, wire.WorkerTimeout)
	defer cancel()
	if err := n.peers.bytes(ctx, *h.at, "/part", query, whole); err != nil {
		n.log.Debug("a part is not held any more", "key", u.key, "part", h.Number, "worker", h.at.ID, "error", err)
		return false
	}
	if int64(len(into)) < length {
		copy(into, whole[off:])
	}
	return true
}

// dropParts has all who hold parts of an upload drop them.
func (n *Names) dropParts(ctx context.Context, a *assembly) {
	n.parts.drop(a.uploadName)
	select {
	case <-a.holders.asked:
	case <-ctx.Done():
		return
	}
	ctx, cancel := context.WithTimeout(ctx, partsTimeout)
	defer cancel()
	told := make(map[string]bool)
	for _, h := range a.holders.held {
		if h.at == nil || told[h.at.ID] || n.peers.known(*h.at) != nil {
			continue
		}
		told[h.at.ID] = true
		if err := n.peers.ask(ctx, *h.at, 0, http.MethodDelete, "/parts", a.query(), nil, nil); err != nil {
			n.log.Debug("a worker does not drop its parts", "key", a.key, "worker", h.at.ID, "error", err)
		}
	}
}

// partRoutes are the requests of other workers about parts.
func (n *Names) partRoutes(mux *http.ServeMux) {
	upload := func(r *http.Request) uploadName {
		return uploadName{r.URL.Query().Get("key"), r.URL.Query().Get("upload")}
	}
	mux.HandleFunc("GET /parts", func(w http.ResponseWriter, r *http.Request) {
		out := n.parts.held(upload(r))
		if out == nil {
			out = []partJSON{}
		}
		answer(w, http.StatusOK, out)
	})
	mux.HandleFunc("DELETE /parts", func(w http.ResponseWriter, r *http.Request) {
		n.parts.drop(upload(r))
		answer(w, http.StatusOK, json.RawMessage("{}"))
	})
	mux.HandleFunc("GET /part", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		number, err1 := strconv.Atoi(q.Get("number"))
		block, err2 := strconv.ParseInt(q.Get("block"), 10, 64)
		o := n.parts.object(upload(r), number, q.Get("etag"))
		if err1 != nil || err2 != nil || block < 0 || block >= ring.Blocks(o.Size) {
			failed(w, fmt.Errorf("%w: part %q of %q", source.ErrNotFound, q.Get("number"), q.Get("key")))
			return
		}
		b, ok := n.c.Store.Lookup(o, block)
		if !ok {
			failed(w, fmt.Errorf("%w: part %d of %q", source.ErrNotFound, number, q.Get("key")))
			return
		}
		defer b.Release()
		if !n.c.Store.Verify(b) {
			failed(w, fmt.Errorf("%w: part %d of %q", wire.ErrCorrupt, number, q.Get("key")))
			return
		}
		n.sendBlock(w, q.Get("key"), b)
	})
}

// assemblies are those of versions that are being made of their parts.
type assemblies struct {
	mu sync.Mutex
	of map[ring.Object]*assembly
}

func (a *assemblies) get(o ring.Object) *assembly {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.of[o]
}

func (a *assemblies) set(o ring.Object, to *assembly) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.of == nil {
		a.of = make(map[ring.Object]*assembly)
	}
	if to == nil {
		delete(a.of, o)
	} else {
		a.of[o] = to
	}
}
