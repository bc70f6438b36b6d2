package objects

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// uploadsName is the journal of uploads that this worker began by itself: a put of more than a part.
const uploadsName = "uploads"

// uploadRecord is one line of the journal. An upload that was begun and did not end was cut off.
type uploadRecord struct {
	URL   string `json:"url"`
	Key   string `json:"key"` // in the bucket
	ID    string `json:"id"`
	Ended bool   `json:"ended,omitempty"`
}

type uploads struct {
	path string

	mu    sync.Mutex
	f     *os.File
	left  map[uploadRecord]bool // by a former process or a put that could not abort it, to be aborted
	live  map[uploadRecord]bool
	more  chan struct{} // holds one when left has more
	lines int
}

func openUploads(path string) (*uploads, error) {
	u := &uploads{path: path, left: make(map[uploadRecord]bool), live: make(map[uploadRecord]bool), more: make(chan struct{}, 1)}
	f, err := os.Open(path)
	if err == nil {
		s := bufio.NewScanner(f)
		for s.Scan() {
			var r uploadRecord
			if json.Unmarshal(s.Bytes(), &r) != nil {
				continue // the last line of a process that was killed
			}
			ended := r.Ended
			r.Ended = false
			if ended {
				delete(u.left, r)
			} else {
				u.left[r] = true
			}
		}
		err = errors.Join(s.Err(), f.Close())
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = u.rewrite()
	}
	if err != nil {
		return nil, fmt.Errorf("objects: the journal of uploads: %w", err)
	}
	return u, nil
}

// rewrite writes the journal anew. The caller holds the mutex, or nobody else knows u yet.
func (u *uploads) rewrite() error {
	f, err := os.OpenFile(u.path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	e := json.NewEncoder(w)
	u.lines = 0
	for _, set := range []map[uploadRecord]bool{u.left, u.live} {
		for r := range set {
			err = errors.Join(err, e.Encode(r))
			u.lines++
		}
	}
	err = errors.Join(err, w.Flush())
	if err == nil {
		err = os.Rename(u.path+".new", u.path)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if u.f != nil {
		_ = u.f.Close() // replaced
	}
	u.f = f
	return nil
}

func (u *uploads) begun(p place, id string) { u.note(uploadRecord{URL: p.URL(), Key: p.key, ID: id}) }

// ended forgets an upload that is gone, and keeps another to be aborted: in the journal it is one that did not end.
func (u *uploads) ended(p place, id string, gone bool) {
	r := uploadRecord{URL: p.URL(), Key: p.key, ID: id, Ended: gone}
	if gone {
		u.note(r)
		return
	}
	u.mu.Lock()
	delete(u.live, r)
	u.left[r] = true
	u.mu.Unlock()
	select {
	case u.more <- struct{}{}:
	default:
	}
}

// note writes a line. It is a small write to memory: the one I/O that is done under a lock here, since the
// order of the lines is what they say.
func (u *uploads) note(r uploadRecord) {
	u.mu.Lock()
	defer u.mu.Unlock()
	set := r
	set.Ended = false
	if r.Ended {
		delete(u.live, set)
		delete(u.left, set)
	} else {
		u.live[set] = true
	}
	if u.f == nil {
		return
	}
	line, err := json.Marshal(r)
	if err == nil {
		_, err = u.f.Write(append(line, '\n'))
	}
	if u.lines++; err != nil || u.lines > 1000+4*(len(u.live)+len(u.left)) {
		_ = u.rewrite() // where the journal cannot be written, a put goes on without: a kill may then leave its parts
	}
}

func (u *uploads) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.f != nil {
		_ = u.f.Close() // every line was written already
		u.f = nil
	}
}

// remains are what is left to be aborted.
func (u *uploads) remains() []uploadRecord {
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []uploadRecord
	for r := range u.left {
		out = append(out, r)
	}
	return out
}

const (
	// cleanEvery is how often what is left is tried again at first, sweepEvery how often in the end, and how often
	// an exclusive dataset's uploads are looked at.
	cleanEvery = 5 * time.Second
	sweepEvery = time.Hour
)

// keepUploads aborts what a former process or a put left and, in an exclusive dataset, what everybody left.
func (n *Names) keepUploads(ctx context.Context) {
	var swept time.Time
	pause, again := cleanEvery, cleanEvery
	for {
		every, more := sweepEvery, n.uploads.more
		if before := len(n.uploads.remains()); before > 0 {
			n.clean(ctx)
			left := len(n.uploads.remains())
			if left < before {
				pause = cleanEvery
			}
			if left > 0 { // the bucket is away, or refuses it: more of them make nothing quicker
				every, more = pause, nil
				pause = min(2*pause, sweepEvery)
			}
		}
		if now := n.c.Clock.Now(); n.c.Exclusive && now.Sub(swept) >= sweepEvery {
			if err := n.sweep(ctx, now); err == nil {
				swept, again = now, cleanEvery
			} else { // one that denies it does so for long
				every, again = min(every, again), min(2*again, sweepEvery)
				n.log.Debug("old uploads were not all given up", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-more:
		case <-n.c.Clock.After(every):
		}
	}
}

func (n *Names) clean(ctx context.Context) {
	mounts, err := n.mounts()
	if err != nil {
		return // not open yet
	}
	for _, r := range n.uploads.remains() {
		known := false
		for _, m := range mounts {
			if m.URL() != r.URL {
				continue
			}
			known = true
			err = m.writer.AbortUpload(ctx, r.Key, r.ID)
			switch refusal := (*source.Refusal)(nil); {
			case err == nil || errors.Is(err, source.ErrNoUpload):
				n.uploads.ended(place{m, r.Key}, r.ID, true)
				n.log.Info("removed the parts that a put left", "key", r.Key)
			case errors.As(err, &refusal):
				// Of the request itself, which stays what it is; keys that do not allow it may be corrected.
				n.uploads.ended(place{m, r.Key}, r.ID, true)
				n.log.Warn("gave up the parts that a put left: the bucket's own rule for unfinished uploads must remove them",
					"key", r.Key, "upload", r.ID, "error", err)
			case ctx.Err() == nil:
				n.log.Warn("the parts that a put left cannot be removed yet", "key", r.Key, "upload", r.ID, "error", err)
			}
			break
		}
		if !known {
			r.Ended = true
			n.uploads.note(r) // of another bucket than the dataset's: nothing to be done with these credentials
		}
	}
}

// sweep gives up uploads that are too old, at one worker of the dataset.
func (n *Names) sweep(ctx context.Context, now time.Time) error {
	if m, ok := n.epochs.now().Lister(n.c.Dataset); !ok || m.ID != n.c.Self {
		return nil
	}
	mounts, err := n.mounts()
	if err != nil {
		return err
	}
	var refused error
	for _, m := range mounts {
		err := eachUpload(ctx, m, func(u source.Upload) error {
			if now.Sub(u.Started) < UploadAge || !strings.HasPrefix(u.Key, m.prefix) { // some stores tell all
				return nil
			}
			err := m.writer.AbortUpload(ctx, u.Key, u.ID)
			if refusal := (*source.Refusal)(nil); errors.As(err, &refusal) {
				refused = err // which keeps no other from being given up
				return nil
			}
			if err != nil && !errors.Is(err, source.ErrNoUpload) {
				return err
			}
			n.log.Info("gave up an upload in parts that nobody completed", "key", u.Key, "begun", u.Started)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return refused
}

// eachUpload calls f for the uploads of a mount, of which it holds maxUploads at a time. Of one key there may be that
// many; those behind them are left to the next time.
func eachUpload(ctx context.Context, m *mount, f func(source.Upload) error) error {
	for after := ""; ; {
		found, err := m.writer.Uploads(ctx, m.prefix, after, maxUploads)
		if err != nil {
			return err
		}
		for _, u := range found {
			if err := f(u); err != nil {
				return err
			}
		}
		if len(found) < maxUploads {
			return nil
		}
		// The list may be cut within the last key, of whose uploads stores differ in the order: they are told once more.
		last := found[len(found)-1].Key
		next := last
		for i := len(found) - 1; i >= 0 && next == last; i-- {
			next = found[i].Key
		}
		if next <= after {
			return nil // the store does not go on by key
		}
		after = next
	}
}
