package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
)

const (
	// offerRoom is what an offered snapshot may be larger than four times the current one, in bytes.
	offerRoom = 64 << 20
	// offerRate is at least how many bytes a second of it come, after offerStart: meanwhile no other is taken.
	offerRate  = 4 << 20
	offerStart = 10 * time.Second
)

// offered takes back a snapshot that a reader still reads by and no worker holds any more: all have lost their memory
// since, or dropped it. What it says is the reader's word. So it must be of mounts that are configured now, below
// whose prefixes all its keys are then; the bucket is what decides whether it has such a version of them; and the
// store knows their blocks by all that tells one version from another. ctx is the connection's, serving that of the
// worker, which takes nothing any more once it stops.
func (c *conn) offered(ctx, serving context.Context, req wire.Request, from io.Reader) error {
	w := c.worker
	if req.Snapshot == (wire.Digest{}) {
		return fmt.Errorf("%w: a snapshot without a digest", source.ErrInvalid)
	}
	if held, ok := w.snapshots.get(req.Snapshot); ok {
		held.release()
		return c.reply(ctx, req, wire.Reply{}, nil)
	}
	select {
	case w.offers <- struct{}{}:
		defer func() { <-w.offers }()
	default:
		return fmt.Errorf("%w: worker %s is receiving another snapshot", wire.ErrOverloaded, w.config.ID)
	}
	current, ok := w.snapshots.get(wire.Digest{})
	if !ok {
		return w.unknownSnapshot(wire.Digest{}) // it will list the bucket, and make the same one if nothing changed
	}
	most := min(4*int64(len(current.Encoded()))+offerRoom, maxSnapshotBytes)
	current.release()
	if req.Off <= 0 || req.Off > most {
		return fmt.Errorf("%w: a snapshot of %d bytes, beside a current one for which this worker takes at most %d", source.ErrInvalid, req.Off, most)
	}
	end, err := w.reserve(req.Off, inFolder, false)
	if err != nil {
		// Readers of those that are held would only give them back.
		return fmt.Errorf("%w: %w", wire.ErrOverloaded, err)
	}
	defer end()
	if err := c.reply(ctx, req, wire.Reply{Size: req.Off}, nil); err != nil {
		return err
	}
	src := w.sources.Load()
	snap, err := w.receiveSnapshot(req.Snapshot, func(to io.Writer) error {
		if err := c.SetReadDeadline(time.Now().Add(offerStart + time.Duration(req.Off/offerRate)*time.Second)); err != nil {
			return err
		}
		if err := serving.Err(); err != nil { // its end sets a deadline, too
			return err
		}
		_, err := io.CopyN(to, from, req.Off)
		return err
	}, src.covers)
	if err != nil {
		if errors.Is(err, catalog.ErrCorrupt) || errors.Is(err, wire.ErrCorrupt) {
			err = fmt.Errorf("%w: %w", source.ErrInvalid, err)
		}
		return fmt.Errorf("snapshot %x from a reader: %w", req.Snapshot[:6], err)
	}
	w.log.Info("took a snapshot back from a reader", "reader", c.RemoteAddr().String(), "files", snap.Files())
	w.snapshots.put(snap, inFolder, src).release()
	return c.reply(ctx, req, wire.Reply{Body: req.Snapshot}, nil)
}

// covers says what a snapshot has that is not of the mounts configured now.
func (s *sources) covers(snap *catalog.Snapshot) error {
	for i, m := range snap.Mounts() {
		if !slices.ContainsFunc(s.mounts, func(have catalog.Mount) bool {
			return have.URL == m.URL && have.Path == m.Path && below(snap, i, m, strings.TrimSuffix(have.Prefix, "/"))
		}) {
			return fmt.Errorf("%w: it is of %s/%s at %s, which the dataset does not mount any more", source.ErrInvalid, m.URL, m.Prefix, m.Path)
		}
	}
	return nil
}

// below says whether all keys of mount i are below the prefix, or the one that it names: keys begin with the mount's own.
func below(snap *catalog.Snapshot, i int, m catalog.Mount, prefix string) bool {
	if prefix == "" || m.Prefix == prefix+"/" {
		return true
	}
	all := true
	snap.Walk(0, func(n catalog.Index) bool {
		of, o, _ := snap.Object(n)
		all = of != i || o.Key == prefix
		return all
	})
	return all
}
