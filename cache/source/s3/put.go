package s3

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
	"io"
	"maps"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/source"
)

// The parts of a large object. They are equal, which some stores demand, and grow only with a size that
// is known to need it.
const (
	partSize = 16 << 20
	maxParts = 10_000
	// inFlight bounds the bytes of parts held in memory by one Put (one part at least).
	inFlight = 64 << 20
)

// abortTimeout bounds the removal of the parts of a Put that failed, which goes on after its context
// ended.
const abortTimeout = 30 * time.Second

// grace is how long requests under way may go on after a Put failed or was canceled: a part whose
// request is cut off may still become one after the upload was aborted, and then stay for ever.
const grace = 5 * time.Second

// Put implements source.Putter.
func (b *Bucket) Put(ctx context.Context, key string, r io.Reader, size int64) (source.Object, error) {
	return b.putWith(ctx, key, r, size, &putOptions{})
}

// putWith puts with attributes and conditions. Every request carries the MD5 of its bytes, which the store
// checks.
func (b *Bucket) putWith(ctx context.Context, key string, r io.Reader, size int64, o *putOptions) (source.Object, error) {
	part := int64(partSize)
	if size >= 0 && size <= part {
		return b.putWhole(ctx, key, r, size, o)
	}
	if size > part*maxParts {
		part = (size/maxParts + 1<<20) &^ (1<<20 - 1)
	}
	first, last, err := readPart(r, nil, part, size)
	if err != nil {
		return source.Object{}, b.unread(key, err)
	}
	if last {
		return b.putWhole(ctx, key, bytes.NewReader(first), int64(len(first)), o)
	}
	return b.putParts(ctx, key, first, r, part, size, o)
}

// unread reports an error of the reader that Put was given: it is not the store's.
func (b *Bucket) unread(key string, err error) error {
	if errors.Is(err, errLength) {
		return b.invalid("put", key, err)
	}
	return fmt.Errorf("put %s: read the content: %w", b.object(key), err)
}

var errLength = errors.New("the content is not as long as it was said to be")

// readPart reads up to n bytes into buf (grown as needed when nil), and says whether the content, of
// which left bytes are still expected (-1: unknown), ends with them.
func readPart(r io.Reader, buf []byte, n, left int64) (part []byte, last bool, err error) {
	switch {
	case left >= 0 && left <= n:
		// One byte more than expected, to see that there is none.
		b := bytes.NewBuffer(buf[:0])
		b.Grow(int(left) + bytes.MinRead)
		got, err := io.Copy(b, io.LimitReader(r, left+1))
		if err == nil && got != left {
			err = fmt.Errorf("%w: %d bytes before its end", errLength, left-got)
			if got > left {
				err = fmt.Errorf("%w: there is more", errLength)
			}
		}
		return b.Bytes(), true, err
	case buf == nil && left < 0:
		b := &bytes.Buffer{}
		got, err := io.Copy(b, io.LimitReader(r, n))
		return b.Bytes(), got < n, err
	case buf == nil:
		buf = make([]byte, n)
	}
	got, err := io.ReadFull(r, buf[:n])
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		if left >= 0 {
			return nil, true, fmt.Errorf("%w: %d bytes before its end", errLength, left-int64(got))
		}
		return buf[:got], true, nil
	}
	return buf[:got], false, err
}

// patience is how long n bytes may take to be sent: retries as ever, but a try that does move is not
// ended while it could still be sending at 128 KiB/s.
func patience(n int64) source.RetryOptions {
	return source.RetryOptions{Slack: time.Duration(n/(128<<10)) * time.Second}
}

// signed is the SHA-256 that the request's signature covers, so that nobody on a plain connection can
// change the bytes; TLS needs none. Signing chunk by chunk instead, minio-go's default, is what fewer
// stores understand, and one of them loses count of the connection's bytes after an empty object.
func (b *Bucket) signed(p []byte) string {
	if !b.plain() {
		return ""
	}
	sum := sha256.Sum256(p)
	return hex.EncodeToString(sum[:])
}

// nonceMetadata tells the object of one conditional put from that of another with the same bytes, when the
// answer to it was lost: of those who put a lock, one must be told that it has it. Readers do not see it.
const nonceMetadata = "Stepcache-Put"

// maxMetadata is the most that the protocol's stores keep of names and values.
const maxMetadata = 2 << 10

// mark gives a put a nonce; none where the metadata have no room for one. A put without is not known again: it
// is told that another was first.
func mark(o *minio.PutObjectOptions) (nonce string) {
	nonce = rand.Text()
	marked := make(map[string]string, len(o.UserMetadata)+1)
	maps.Copy(marked, o.UserMetadata)
	marked[metaPrefix+nonceMetadata] = nonce // also in the place of a user's own of that name
	total := 0
	for k, v := range marked {
		if name, ok := strings.CutPrefix(k, metaPrefix); ok {
			total += len(name) + len(v)
		}
	}
	if total > maxMetadata {
		return ""
	}
	o.UserMetadata = marked
	return nonce
}

func (b *Bucket) putWhole(ctx context.Context, key string, r io.Reader, size int64, w *putOptions) (source.Object, error) {
	var info minio.UploadInfo
	options := w.PutObjectOptions
	nonce := ""
	if w.conditional() {
		nonce = mark(&options)
	}
	tries := 0
	c := newContent(r, size, w.Sums)
	defer c.release()
	err := b.deliver(ctx, key, c, func(ctx context.Context, s sent) (err error) {
		tries++
		ctx, seen := watch(ctx)
		options.DisableContentSha256 = !s.chunks
		info, err = b.core.PutObject(ctx, b.name, key, s.body, size, s.md5, s.sha256, options)
		if err == nil {
			return nil
		}
		err = b.fail(ctx, "put", key, seen, err)
		if tries > 1 && nonce != "" && errors.Is(err, source.ErrChanged) {
			// By the try before, whose answer was lost? Another writer's may have the same bytes.
			if o, i, serr := b.stat(ctx, key); serr == nil && i.UserMetadata[nonceMetadata] == nonce {
				info.ETag = o.Version
				return nil
			}
		}
		return err
	})
	if err != nil {
		return source.Object{}, err
	}
	o, err := b.put(ctx, key, info.ETag, size)
	if err == nil && info.ETag == hex.EncodeToString(c.sum()) { // else encrypted, and no digest
		o.Digest = source.Digest{Algorithm: source.MD5, Sum: c.sum()}
	}
	return o, err
}

// put describes what was put. A store that gives no ETag is asked for what it does give.
func (b *Bucket) put(ctx context.Context, key, etag string, size int64) (source.Object, error) {
	b.has()
	if etag == "" {
		return b.Stat(ctx, key)
	}
	return source.Object{Key: key, Size: size, Version: etag, ModTime: time.Now().UTC().Truncate(time.Second)}, nil
}

// putParts puts an object of several parts, a few of them at once.
func (b *Bucket) putParts(ctx context.Context, key string, first []byte, r io.Reader, part, size int64, w *putOptions) (o source.Object, err error) {
	upload, err := b.begin(ctx, key, w.PutObjectOptions)
	if err != nil {
		return o, err
	}
	w.begun(upload)
	defer func() {
		gone := true
		if err != nil {
			gone, err = b.abort(ctx, key, upload, err)
		}
		w.ended(upload, gone)
	}()
	parts, sums, total, err := b.sendParts(ctx, key, upload, first, r, part, size)
	if err != nil {
		return o, err
	}
	etag, err := b.complete(ctx, key, upload, parts, sums, total, w)
	if err != nil {
		return o, err
	}
	return b.put(ctx, key, etag, total)
}

func (b *Bucket) sendParts(ctx context.Context, key, upload string, buf []byte, r io.Reader, part, size int64) (
	parts []minio.CompletePart, sums []byte, total int64, err error,
) {
	// Buffers go round between the reader of the content and the senders; first counts as one.
	spare := int(max(inFlight/part, 1)) - 1
	free := make(chan []byte, spare+1)
	for range spare {
		free <- nil
	}
	sending, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	giveUp := func() { time.AfterFunc(grace, stop) }
	defer context.AfterFunc(ctx, giveUp)()
	g, failed := errgroup.WithContext(sending)
	var results []*minio.CompletePart
	left, last := size, false
read:
	for number := 1; ; number++ {
		if number > 1 {
			var spare []byte
			select {
			case spare = <-free:
			case <-failed.Done():
				break read
			case <-ctx.Done():
				err = &source.Error{Op: "put", Name: b.object(key), Kind: source.ContextKind(ctx), Err: ctx.Err()}
				break read
			}
			if spare == nil {
				spare = make([]byte, part, part+bytes.MinRead)
			}
			if buf, last, err = readPart(r, spare, part, left); err != nil {
				err = b.unread(key, err)
				break
			}
			if len(buf) == 0 {
				break // the content ended with the part before
			}
		}
		if number > maxParts {
			err = b.invalid("put", key, fmt.Errorf("content of unknown length is longer than %d parts of %d bytes; give its size", maxParts, part))
			break
		}
		total += int64(len(buf))
		if left >= 0 {
			left -= int64(len(buf))
		}
		done := &minio.CompletePart{PartNumber: number}
		results = append(results, done)
		p := buf // buf is the next part's by the time this one is sent
		sum, signed := md5.Sum(p), b.signed(p)
		sums = append(sums, sum[:]...)
		g.Go(func() error {
			defer func() { free <- p[:cap(p)] }()
			return source.Try(sending, patience(int64(len(p))), func(ctx context.Context) error {
				ctx, seen := watch(ctx)
				body := lend(bytes.NewReader(p))
				defer body.back() // p is another part's afterwards
				sent, err := b.core.PutObjectPart(ctx, b.name, key, upload, number, body, int64(len(p)),
					minio.PutObjectPartOptions{
						Md5Base64: base64.StdEncoding.EncodeToString(sum[:]), Sha256Hex: signed, DisableContentSha256: true})
				if err != nil {
					return b.fail(ctx, "put", key, seen, err)
				}
				done.ETag = sent.ETag
				return nil
			})
		})
		if last || left == 0 {
			break
		}
	}
	if err != nil {
		giveUp()
		_ = g.Wait() // what else failed does not matter any more
		return nil, nil, 0, err
	}
	if err := g.Wait(); err != nil {
		return nil, nil, 0, err
	}
	for _, p := range results {
		parts = append(parts, *p)
	}
	return parts, sums, total, nil
}

// complete makes the parts an object. When an answer was lost the store may know the upload no more
// because it is complete: then the object has the ETag that the parts give. A total below 0 is not known, and
// sums are nil where nothing follows from them.
func (b *Bucket) complete(ctx context.Context, key, upload string, parts []minio.CompletePart, sums []byte, total int64, w *putOptions) (etag string, err error) {
	whole := md5.Sum(sums)
	want := fmt.Sprintf("%s-%d", hex.EncodeToString(whole[:]), len(parts))
	tries := 0
	err = source.Try(ctx, source.RetryOptions{Slack: time.Minute}, func(ctx context.Context) error {
		tries++
		ctx, seen := watch(ctx)
		info, err := b.core.CompleteMultipartUpload(ctx, b.name, key, upload, parts, w.conditions())
		if err == nil {
			etag = strings.Trim(info.ETag, `"`)
			return nil
		}
		err = b.fail(ctx, "put", key, seen, err)
		gone := errors.Is(err, source.ErrNoUpload) || errors.Is(err, source.ErrNotFound)
		if tries > 1 && !gone && w.conditional() && errors.Is(err, source.ErrChanged) {
			// By the try before, which leaves no upload? One that another was before is still there.
			_, _, perr := b.Parts(ctx, key, upload, 0, 1)
			gone = errors.Is(perr, source.ErrNoUpload)
		}
		if tries > 1 && sums != nil && gone {
			if o, serr := b.Stat(ctx, key); serr == nil && o.Version == want && (total < 0 || o.Size == total) {
				etag = want
				return nil
			}
		}
		return err
	})
	return etag, err
}

// abort removes the parts of an upload that failed with err, says whether they are gone, and returns err, with a
// word about what is left where that failed too.
func (b *Bucket) abort(ctx context.Context, key, upload string, err error) (gone bool, _ error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
	defer cancel()
	aerr := source.Try(ctx, source.RetryOptions{Elapsed: abortTimeout}, func(ctx context.Context) error {
		ctx, seen := watch(ctx)
		if err := b.core.AbortMultipartUpload(ctx, b.name, key, upload); err != nil {
			return b.fail(ctx, "put", key, seen, err)
		}
		if left, err := b.core.ListObjectParts(ctx, b.name, key, upload, 0, 1); err == nil && len(left.ObjectParts) > 0 {
			return &source.Error{Op: "put", Name: b.object(key), Kind: source.ErrUnavailable, Err: errors.New("a part came after the upload was aborted")}
		}
		return nil
	})
	if aerr != nil && !errors.Is(aerr, source.ErrNotFound) && !errors.Is(aerr, source.ErrNoUpload) {
		return false, fmt.Errorf("%w; its parts (upload %s) could not be removed: %v", err, upload, aerr)
	}
	return true, err
}
