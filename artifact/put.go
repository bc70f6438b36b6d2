package artifact

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"mime"
	"path"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/source"
)

// Objects larger than partSize go in parts, a few at once. Parts of a file are read from it as they are
// sent; those of a stream are held in memory, one at a time.
const (
	partSize      = 32 << 20
	streamPart    = 16 << 20
	maxParts      = 10_000
	partsAtOnce   = 4
	abortPatience = 30 * time.Second
	// slowest is the rate below which a part's request is given up.
	slowest = 128 << 10
)

// Metadata of objects: the permissions of a file that are not 0644 (the name is that of AWS DataSync),
// and what tells an upload's object from another of the same size when the answer to its completion was
// lost.
const (
	modeMetadata   = "File-Permissions"
	uploadMetadata = "Stepcache-Upload"
)

// signed are the digests that a request carries: on a plain connection the SHA-256 that its signature
// covers, so that nobody on the way can change the bytes; under TLS the MD5.
func (b *bucket) signed(r io.Reader) (md5Base64, sha256Hex string, err error) {
	var h hash.Hash = md5.New()
	if b.plain {
		h = sha256.New()
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	if _, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{r}, *buf); err != nil {
		return "", "", err
	}
	if b.plain {
		return "", hex.EncodeToString(h.Sum(nil)), nil
	}
	return base64.StdEncoding.EncodeToString(h.Sum(nil)), "", nil
}

// tryPut is try for a request that sends n bytes.
func (b *bucket) tryPut(ctx context.Context, n int64, f func(context.Context) error) error {
	return b.tryFor(ctx, b.options.Stall+time.Duration(n/slowest)*time.Second, f)
}

func putOptions(key, mode string) minio.PutObjectOptions {
	o := minio.PutObjectOptions{ContentType: mime.TypeByExtension(path.Ext(key)), UserMetadata: map[string]string{}, DisableContentSha256: true}
	if o.ContentType == "" {
		o.ContentType = "application/octet-stream"
	}
	if mode != "" {
		o.UserMetadata[modeMetadata] = mode
	}
	return o
}

// putFile stores the size bytes of r under key.
func (b *bucket) putFile(ctx context.Context, key string, r io.ReaderAt, size int64, mode string) error {
	if size > partSize {
		return b.putParts(ctx, key, r, size, mode)
	}
	return b.putWhole(ctx, key, r, size, mode)
}

func (b *bucket) putWhole(ctx context.Context, key string, r io.ReaderAt, size int64, mode string) error {
	return b.tryPut(ctx, size, func(ctx context.Context) error {
		md5Base64, sha256Hex, err := b.signed(io.NewSectionReader(r, 0, size))
		if err != nil {
			return err
		}
		ctx, seen := watch(ctx)
		if _, err := b.core.PutObject(ctx, b.name, key, io.NewSectionReader(r, 0, size), size, md5Base64, sha256Hex, putOptions(key, mode)); err != nil {
			return b.fail(ctx, "put", key, seen, err)
		}
		return nil
	})
}

func (b *bucket) putParts(ctx context.Context, key string, r io.ReaderAt, size int64, mode string) error {
	part := int64(partSize)
	if size > part*maxParts {
		part = (size/maxParts + 1<<20) &^ (1<<20 - 1)
	}
	u, err := b.begin(ctx, key, mode)
	if err != nil {
		return err
	}
	u.parts = make([]minio.CompletePart, (size+part-1)/part)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(partsAtOnce)
	for i := range u.parts {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			off := int64(i) * part
			n := min(part, size-off)
			if err := b.options.slots.Acquire(gctx, 1); err != nil {
				return b.fail(gctx, "put", key, &answer{}, err)
			}
			defer b.options.slots.Release(1)
			return u.send(gctx, i+1, &u.parts[i], func() *io.SectionReader { return io.NewSectionReader(r, off, n) }, n)
		})
	}
	if err := g.Wait(); err != nil {
		return u.abort(ctx, err)
	}
	if err := ctx.Err(); err != nil {
		return u.abort(ctx, b.fail(ctx, "put", key, &answer{}, err))
	}
	return u.complete(ctx, size)
}

// upload is one object on its way in parts.
type upload struct {
	*bucket
	key, id, nonce string
	parts          []minio.CompletePart
}

func (b *bucket) begin(ctx context.Context, key, mode string) (*upload, error) {
	u := &upload{bucket: b, key: key, nonce: rand.Text()}
	o := putOptions(key, mode)
	o.UserMetadata[uploadMetadata] = u.nonce
	err := b.try(ctx, func(ctx context.Context) (err error) {
		ctx, seen := watch(ctx)
		if u.id, err = b.core.NewMultipartUpload(ctx, b.name, key, o); err != nil {
			return b.fail(ctx, "put", key, seen, err)
		}
		return nil
	})
	return u, err
}

// send sends one part, whose bytes open gives again for each try.
func (u *upload) send(ctx context.Context, number int, done *minio.CompletePart, open func() *io.SectionReader, n int64) error {
	return u.tryPut(ctx, n, func(ctx context.Context) error {
		md5Base64, sha256Hex, err := u.signed(open())
		if err != nil {
			return err
		}
		ctx, seen := watch(ctx)
		p, err := u.core.PutObjectPart(ctx, u.name, u.key, u.id, number, open(), n, minio.PutObjectPartOptions{
			Md5Base64: md5Base64, Sha256Hex: sha256Hex, DisableContentSha256: true})
		if err != nil {
			return u.fail(ctx, "put", u.key, seen, err)
		}
		*done = minio.CompletePart{PartNumber: number, ETag: p.ETag}
		return nil
	})
}

// complete makes the parts an object. Where an answer was lost the store may know the upload no more
// because it is complete: the object then carries its nonce.
func (u *upload) complete(ctx context.Context, size int64) error {
	tries := 0
	err := u.tryPut(ctx, size/16, func(ctx context.Context) error { // stores may copy the bytes
		tries++
		ctx, seen := watch(ctx)
		_, err := u.core.CompleteMultipartUpload(ctx, u.name, u.key, u.id, u.parts, minio.PutObjectOptions{})
		if err == nil {
			return nil
		}
		err = u.fail(ctx, "put", u.key, seen, err)
		if tries > 1 && errors.Is(err, source.ErrNotFound) {
			if _, info, serr := u.stat(ctx, u.key); serr == nil && info.UserMetadata[uploadMetadata] == u.nonce {
				return nil
			}
		}
		return err
	})
	if err != nil {
		return u.abort(ctx, err)
	}
	return nil
}

// abort removes the parts of an upload that failed with err, also when ctx ended, and returns err with a
// word about what is left where that failed too.
func (u *upload) abort(ctx context.Context, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortPatience)
	defer cancel()
	// A worker that hangs must not take all of the time: another may answer.
	aerr := u.tryFor(ctx, min(u.options.Stall, abortPatience/3), func(ctx context.Context) error {
		ctx, seen := watch(ctx)
		if err := u.core.AbortMultipartUpload(ctx, u.name, u.key, u.id); err != nil {
			return u.fail(ctx, "put", u.key, seen, err)
		}
		return nil
	})
	if aerr != nil && !errors.Is(aerr, source.ErrNotFound) {
		return fmt.Errorf("%w; its parts (upload %s) could not be removed: %v", err, u.id, aerr)
	}
	return err
}

// putStream stores what r has, of unknown length, holding one part of it.
func (b *bucket) putStream(ctx context.Context, key string, r io.Reader) (size int64, err error) {
	if err := b.options.streams.Acquire(ctx, 1); err != nil {
		return 0, b.fail(ctx, "put", key, &answer{}, err)
	}
	defer b.options.streams.Release(1)
	buf := make([]byte, streamPart)
	n, last, err := fill(r, buf)
	if err != nil {
		return 0, err
	}
	if last {
		return int64(n), b.putWhole(ctx, key, bytes.NewReader(buf[:n]), int64(n), "")
	}
	u, err := b.begin(ctx, key, "")
	if err != nil {
		return 0, err
	}
	for number := 1; n > 0; number++ {
		if number > maxParts {
			return 0, u.abort(ctx, &source.Error{Op: "put", Name: b.object(key), Kind: source.ErrInvalid,
				Err: fmt.Errorf("a stream of more than %d GiB", int64(maxParts)*streamPart>>30), Hint: "save it from a file"})
		}
		part, done, opened := bytes.NewReader(buf[:n]), minio.CompletePart{}, 0
		open := func() *io.SectionReader {
			opened++
			return io.NewSectionReader(part, 0, part.Size())
		}
		if err := u.send(ctx, number, &done, open, part.Size()); err != nil {
			return 0, u.abort(ctx, err)
		}
		u.parts, size = append(u.parts, done), size+part.Size()
		if last {
			break
		}
		if opened > 2 {
			// A request that was answered early, with an error, may still be sending from the buffer.
			buf = make([]byte, streamPart)
		}
		if n, last, err = fill(r, buf); err != nil {
			return 0, u.abort(ctx, err)
		}
	}
	return size, u.complete(ctx, size)
}

// fill reads buf full, or says that r ended before.
func fill(r io.Reader, buf []byte) (n int, last bool, err error) {
	n, err = io.ReadFull(r, buf)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return n, true, nil
	}
	return n, false, err
}
