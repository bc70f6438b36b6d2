package worker

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"sync"

	"github.com/minio/crc64nvme"
	"golang.org/x/time/rate"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

// Bounds of what is remembered of objects between their first block and their check.
const (
	maxChecks  = 1 << 16
	maxObjects = 1 << 17
	// maxRefetch is how often in a row an object that fails the bucket's digest is fetched again unasked:
	// a bucket that has it corrupt would be asked for ever.
	maxRefetch = 2
	hashChunk  = 256 << 10
)

// digests finds out when an object became whole here and whether it was compared with the digest that the
// bucket publishes for it. Safe for concurrent use.
type digests struct {
	mu sync.Mutex
	// objects are those with a block fetched since their last check.
	objects map[source.ID]*checkState
	queue   []file
	wake    chan struct{} // capacity 1
	// failed counts the checks in a row that found an object corrupt.
	failed map[source.ID]int
}

type checkState struct {
	digest source.Digest // as published with a ranged answer
	dirty  bool          // a block was fetched since the last check began
	queued bool
	spread bool // over workers, and counted as such
}

func newDigests() *digests {
	return &digests{objects: make(map[source.ID]*checkState), failed: make(map[source.ID]int), wake: make(chan struct{}, 1)}
}

// state is the state of an object. When too many are remembered one is forgotten: its check is lost, which
// shows as neither verified nor corrupt. Callers hold mu.
func (d *digests) state(id source.ID) *checkState {
	s := d.objects[id]
	if s == nil {
		if len(d.objects) >= maxObjects {
			for other, o := range d.objects {
				if !o.queued {
					delete(d.objects, other)
					break
				}
			}
		}
		s = &checkState{}
		d.objects[id] = s
	}
	return s
}

// published notes the digest that came with an answer of the bucket.
func (d *digests) published(id source.ID, digest source.Digest) {
	if digest.Algorithm == source.None {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state(id).digest = digest
}

// dirty notes that a block of the object was fetched.
func (d *digests) dirty(id source.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state(id).dirty = true
}

// spread notes that no worker will have all of the object; false when that is known.
func (d *digests) spread(id source.ID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.state(id)
	known := s.spread
	s.spread = true
	return !known
}

// whole notes that the object is whole; false when it cannot be checked because too many wait.
func (d *digests) whole(f file) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.objects[f.ring.ID]
	if s == nil || !s.dirty || s.queued {
		return true
	}
	if len(d.queue) >= maxChecks {
		delete(d.objects, f.ring.ID)
		return false
	}
	s.queued = true
	d.queue = append(d.queue, f)
	select {
	case d.wake <- struct{}{}:
	default:
	}
	return true
}

// next takes the next object to check, with the digest to compare it with.
func (d *digests) next() (file, source.Digest, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.queue) == 0 {
		return file{}, source.Digest{}, false
	}
	f := d.queue[0]
	d.queue = d.queue[1:]
	s := d.state(f.ring.ID)
	delete(d.objects, f.ring.ID)
	if f.object.Digest.Algorithm != source.None {
		return f, f.object.Digest, true
	}
	return f, s.digest, true
}

// fail counts a corrupt object and says whether it is worth fetching again unasked.
func (d *digests) fail(id source.ID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.failed) > maxObjects {
		clear(d.failed)
	}
	d.failed[id]++
	return d.failed[id] <= maxRefetch
}

func (d *digests) good(id source.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.failed, id)
}

// checkWhole queues the check of f if all of it is resident now. What is spread over workers is whole nowhere: its first
// owner counts it.
func (w *Worker) checkWhole(f file) {
	if w.scrubRate <= 0 {
		return
	}
	if w.store.Residency(f.ring).Whole {
		if !w.digests.whole(f) {
			w.counts.unverified.Add(1)
		}
	} else if f.ring.Size > ring.StripeThreshold && w.keepsWhole(f) != nil {
		_, place := w.members.view().owners(w.config.ID, f.ring, 0, w.config.Copies)
		if place == 0 && w.digests.spread(f.ring.ID) {
			w.counts.unverified.Add(1)
		}
	}
}

// keepDigests checks whole objects, one at a time and slowly.
func (w *Worker) keepDigests(ctx context.Context) error {
	if w.scrubRate <= 0 {
		return nil
	}
	// No more at once than a chunk: what has just become whole is usually followed by more that is on its way, and the
	// processors are wanted for that. A second's worth at once was a seventh of what a load of 512 MiB cost.
	limit := rate.NewLimiter(rate.Limit(w.scrubRate), hashChunk)
	buf := make([]byte, hashChunk)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.digests.wake:
		}
		for {
			f, digest, ok := w.digests.next()
			if !ok {
				break
			}
			if err := w.check(ctx, f, digest, limit, buf); err != nil {
				return nil // ctx ended
			}
		}
	}
}

// errGone: a block of the object was evicted before it could be checked.
var errGone = errors.New("no longer whole")

func (w *Worker) check(ctx context.Context, f file, want source.Digest, limit *rate.Limiter, buf []byte) error {
	h := newHash(want.Algorithm)
	if h == nil {
		w.counts.unverified.Add(1)
		return nil
	}
	err := w.hashObject(ctx, f, h, limit, buf)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		w.log.Debug("object not checked", "object", f.String(), "error", err)
		return nil
	}
	if bytes.Equal(h.Sum(nil), want.Sum) {
		w.counts.verified.Add(1)
		w.digests.good(f.ring.ID)
		return nil
	}
	defer w.counts.corrupt.Add(1) // once it is dropped
	// What was read by its name is in no snapshot by which it could be asked for: its next reader fetches it.
	again := w.digests.fail(f.ring.ID) && f.snapshot != wire.Digest{}
	w.log.Error("object does not match the digest that its bucket publishes: dropped",
		"object", f.String(), "algorithm", algorithmName(want.Algorithm), "published", hex.EncodeToString(want.Sum), "is", hex.EncodeToString(h.Sum(nil)), "fetchedAgain", again)
	w.store.Drop(f.ring)
	if again {
		w.mends.pushAll(f.ring)
	}
	return nil
}

// hashObject feeds the object's bytes to h.
func (w *Worker) hashObject(ctx context.Context, f file, h hash.Hash, limit *rate.Limiter, buf []byte) error {
	for block := range ring.Blocks(f.ring.Size) {
		b, ok := w.store.Lookup(f.ring, block)
		if !ok {
			return errGone
		}
		err := func() error {
			defer b.Release()
			for off := 0; off < b.Len(); off += len(buf) {
				p := buf[:min(len(buf), b.Len()-off)]
				if err := limit.WaitN(ctx, len(p)); err != nil {
					return err
				}
				if n, err := b.ReadAt(p, int64(off)); n < len(p) {
					return fmt.Errorf("read block %d: %w", block, err)
				}
				h.Write(p)
			}
			return nil
		}()
		if err != nil {
			return err
		}
	}
	return nil
}

// newHash is the hash of an algorithm, whose Sum is in the byte order that package source uses; nil when
// there is none.
func newHash(a source.Algorithm) hash.Hash {
	switch a {
	case source.MD5:
		return md5.New()
	case source.CRC64ECMA:
		return crc64.New(crc64.MakeTable(crc64.ECMA))
	case source.CRC32C:
		return crc32.New(crc32.MakeTable(crc32.Castagnoli))
	case source.CRC64NVME:
		return crc64nvme.New()
	case source.CRC32:
		return crc32.NewIEEE()
	case source.SHA256:
		return sha256.New()
	}
	return nil
}

func algorithmName(a source.Algorithm) string {
	return map[source.Algorithm]string{
		source.MD5: "MD5", source.CRC64ECMA: "CRC64-ECMA", source.CRC32C: "CRC32C",
		source.CRC64NVME: "CRC64-NVME", source.CRC32: "CRC32", source.SHA256: "SHA-256",
	}[a]
}
