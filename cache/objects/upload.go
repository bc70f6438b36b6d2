package objects

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// Uploads in parts are the bucket's. Any worker begins one and takes its parts; only completing one gives a
// name another version, and so is the owner's.

// maxUploads bounds a list of uploads. Buckets are always asked from the first on: stores differ in the order of the
// uploads of one key, so that a client's markers would mean something else to each.
const maxUploads = 10_000

// Create implements gateway.Multipart.
func (n *Names) Create(ctx context.Context, key string, o gateway.PutOptions) (string, error) {
	p, err := n.locate(key)
	if err != nil {
		return "", err
	}
	upload, err := p.writer.BeginUpload(ctx, p.key, source.Attributes{ContentType: o.ContentType, Headers: o.Headers, Metadata: o.Metadata})
	if err != nil {
		return "", fmt.Errorf("begin an upload of %q: %w", key, told(err))
	}
	return upload, nil
}

// PutPart implements gateway.Multipart.
func (n *Names) PutPart(ctx context.Context, key, upload string, number int, size int64, r io.Reader, sums source.Sums) (gateway.Part, error) {
	p, err := n.locate(key)
	if err != nil {
		return gateway.Part{}, err
	}
	// Of one that is passed on as it comes a block is held all the same, which is staged.
	release, err := n.hold(ctx, size, max(p.writer.PartHeld(size), min(size, ring.BlockSize)))
	if err != nil {
		return gateway.Part{}, fmt.Errorf("part %d of %q: %w", number, key, err)
	}
	defer release()
	u := uploadName{key, upload}
	t := &tee{ctx: ctx, r: waited{ctx, r}, staged: n.parts.begin(u, size), now: n.c.Clock.Now}
	defer t.staged.end()
	part, err := p.writer.PutPart(ctx, p.key, upload, number, t, size, sums)
	if err != nil {
		return gateway.Part{}, fmt.Errorf("part %d of %q: %w", number, key, told(t.failed(err)))
	}
	n.counts.written.Add(size)
	if o, ok := t.staged.finishPart(); ok {
		n.parts.add(u, number, part.Version, o)
	}
	return gateway.Part{Number: part.Number, ETag: part.Version, Size: part.Size, ModTime: part.ModTime}, nil
}

// Abort implements gateway.Multipart.
func (n *Names) Abort(ctx context.Context, key, upload string) error {
	p, err := n.locate(key)
	if err != nil {
		return err
	}
	if err := p.writer.AbortUpload(ctx, p.key, upload); err != nil {
		return fmt.Errorf("abort the upload of %q: %w", key, told(err))
	}
	n.parts.drop(uploadName{key, upload}) // those that others hold go when there is need of their room
	return nil
}

// Parts implements gateway.Multipart.
func (n *Names) Parts(ctx context.Context, key, upload string, after, max int) ([]gateway.Part, bool, error) {
	p, err := n.locate(key)
	if err != nil {
		return nil, false, err
	}
	parts, more, err := p.writer.Parts(ctx, p.key, upload, after, max)
	if err != nil {
		return nil, false, fmt.Errorf("parts of the upload of %q: %w", key, told(err))
	}
	out := make([]gateway.Part, 0, len(parts))
	for _, part := range parts {
		out = append(out, gateway.Part{Number: part.Number, ETag: part.Version, Size: part.Size, ModTime: part.ModTime})
	}
	return out, more, nil
}

// Uploads implements gateway.Multipart.
func (n *Names) Uploads(ctx context.Context, prefix string) (out []gateway.Upload, more bool, err error) {
	mounts, err := n.mounts()
	if err != nil {
		return nil, false, err
	}
	room := maxUploads
	for _, m := range mounts {
		below, ok := m.prefixOf(prefix)
		if !ok {
			continue
		}
		found, err := m.writer.Uploads(ctx, below, "", room+1)
		if err != nil {
			return nil, false, fmt.Errorf("uploads below %q: %w", prefix, told(err))
		}
		for _, u := range found {
			// Some stores take no prefix here and tell all.
			if rel, ok := strings.CutPrefix(u.Key, m.prefix); ok && strings.HasPrefix(u.Key, below) {
				out = append(out, gateway.Upload{Key: m.path + rel, ID: u.ID, Started: u.Started})
			}
		}
		if room -= len(found); room < 0 {
			return out, true, nil
		}
	}
	return out, false, nil
}

// completeJSON is the completion of an upload as it travels.
type completeJSON struct {
	Upload  string
	Parts   []source.Part
	Options optionsJSON
}

// Complete implements gateway.Multipart.
func (n *Names) Complete(ctx context.Context, key, upload string, parts []gateway.Part, o gateway.PutOptions) (gateway.Info, error) {
	options, err := optionsOf(o)
	if err != nil {
		return gateway.Info{}, fmt.Errorf("complete %q: %w", key, err)
	}
	c := completeJSON{Upload: upload, Options: options}
	for _, p := range parts {
		c.Parts = append(c.Parts, source.Part{Number: p.Number, Version: p.ETag})
	}
	v, err := route(ctx, n, key,
		func(ctx context.Context, p place, s state, owned bool) (version, error) {
			return n.complete(ctx, key, p, s, owned, c)
		},
		func(ctx context.Context, m ring.Member, s state) (version, error) {
			var v versionJSON
			err := n.peers.ask(ctx, m, s.Epoch, "POST", "/complete", url.Values{"key": {key}}, c, &v)
			return v.version(), err
		}, always)
	if err != nil {
		return gateway.Info{}, err
	}
	return v.info(key), nil
}

func (n *Names) complete(ctx context.Context, key string, p place, s state, owned bool, c completeJSON) (version, error) {
	if err := waits(ctx); err != nil {
		return version{}, fmt.Errorf("complete %q: %w", key, err)
	}
	n.counts.puts.Add(1)
	var t *passage
	if n.back != nil {
		var err error
		if t, err = n.back.through(ctx, key, s, c.Options.unconditional()); err != nil {
			return version{}, fmt.Errorf("complete %q: %w", key, err)
		}
		defer t.done()
		if err := waits(ctx); err != nil {
			return version{}, fmt.Errorf("complete %q: %w", key, err)
		}
	}
	o := c.Options.write()
	u := uploadName{key, c.Upload}
	holders := n.whoHolds(u)
	w := n.begin(key, s, owned)
	object, err := p.writer.CompleteUpload(ctx, p.key, c.Upload, c.Parts, o)
	if errors.Is(err, source.ErrNoUpload) && !t.over() {
		// Completed before, by a request whose answer was lost: the parts tell what it became.
		if now, aerr := n.ask(ctx, p); aerr == nil && now.object.Version == etagOf(c.Parts) {
			object, err = now.object, nil
		}
	}
	if err == nil {
		w.now = &object
	}
	w.end() // its attributes were given to another request, so the bucket is asked
	if err != nil {
		return version{}, fmt.Errorf("complete %q: %w", key, refused(err, o))
	}
	n.makeWarm(key, p, object, &assembly{uploadName: u, made: c.Parts, size: object.Size, holders: holders})
	return version{object: object}, acknowledged(key, t.acknowledge(ctx, w))
}

// etagOf is the ETag that S3 gives an object of these parts; empty when theirs are of another kind.
func etagOf(parts []source.Part) string {
	h := md5.New()
	for _, p := range parts {
		sum, err := hex.DecodeString(p.Version)
		if err != nil || len(sum) != md5.Size {
			return ""
		}
		h.Write(sum)
	}
	return fmt.Sprintf("%s-%d", hex.EncodeToString(h.Sum(nil)), len(parts))
}
