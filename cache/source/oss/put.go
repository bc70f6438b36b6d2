package oss

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/stepcache/stepcache/cache/source"
)

const (
	// partSize is the least size of a part: large enough that requests cost little, small enough that
	// parallel+2 of them are little memory.
	partSize = 8 << 20
	// parallel is how many parts are under way at once. One connection to OSS is far from a NIC's speed.
	parallel = 4
	maxParts = 10_000
)

// finishTimeout is how long the store may take to complete an upload of thousands of parts,
// cleanTimeout how long a Put that failed may take to remove what it left.
const (
	finishTimeout = 2 * time.Minute
	cleanTimeout  = 20 * time.Second
)

// patience is how long sending n bytes may take beyond the time of other requests: as long as a line of
// 128 KiB/s needs.
func patience(n int) source.RetryOptions {
	return source.RetryOptions{Slack: time.Duration(n/(128<<10)) * time.Second}
}

var ecma = crc64.MakeTable(crc64.ECMA)

// Put implements source.Putter. A body of up to one part goes as one request; a longer one in parts,
// which are invisible until the last request names them all. The store checks each request against its
// MD5 before it keeps it.
func (b *Bucket) Put(ctx context.Context, key string, r io.Reader, size int64) (source.Object, error) {
	return b.putWith(ctx, key, r, size, source.WriteOptions{})
}

func (b *Bucket) putWith(ctx context.Context, key string, r io.Reader, size int64, o source.WriteOptions) (source.Object, error) {
	if err := b.checkKey("put", key); err != nil {
		return source.Object{}, err
	}
	if err := b.decides(ctx, key, o); err != nil {
		return source.Object{}, err
	}
	p := &put{Bucket: b, key: key, in: r, size: size, part: partOf(size, b.deps.part), options: o}
	if o.IfAbsent {
		p.nonce = rand.Text()
	}
	if size >= 0 && size <= int64(p.part) {
		p.part = int(size) + 1 // so that the end shows within the first
	}
	first, err := p.next(nil)
	if err != nil {
		return source.Object{}, err
	}
	send := p.parts
	if p.ended {
		send = p.whole
	}
	made, err := send(ctx, first)
	if err == nil {
		err = b.decided(key, o)
	}
	if err != nil {
		return source.Object{}, err
	}
	return made, nil
}

// partOf is the size of the parts of an object: larger than least when there would be too many.
func partOf(size int64, least int) int {
	if each := (size + maxParts - 1) / maxParts; each > int64(least) {
		return int((each + 1<<20 - 1) >> 20 << 20)
	}
	return least
}

// put is one Put under way. It is read by one goroutine; requests of parts run beside it.
type put struct {
	*Bucket
	key   string
	in    io.Reader
	size  int64 // announced, or -1
	part  int   // bytes of a part
	read  int64 // bytes read of in
	crc   uint64
	ended bool // in is at its end

	options source.WriteOptions
	nonce   string // in the object's metadata; empty without a condition
}

// nonceMetadata tells the object of one conditional put from that of another with the same bytes, when the
// answer to it was lost: of those who put a lock, one must be told that it has it. Readers do not see it.
const nonceMetadata = "Stepcache-Put"

// header is that of a request that makes the object, or begins it.
func (p *put) header() map[string]string {
	h := attributes(p.options.Attributes)
	p.condition(h)
	if p.nonce != "" {
		h[metaPrefix+nonceMetadata] = p.nonce
	}
	return h
}

// condition adds the put's own, of which decides made sure, to the header of a request.
func (p *put) condition(h map[string]string) {
	if p.options.IfAbsent {
		h["x-oss-forbid-overwrite"] = "true"
	}
}

// next reads the next part, into buf where it has room. It sets ended when there is nothing behind it.
func (p *put) next(buf []byte) ([]byte, error) {
	if buf == nil {
		// One byte more than is expected tells that the end is there.
		n := min(int64(p.part), p.size-p.read+1)
		if p.size < 0 {
			n = min(int64(p.part), 64<<10)
		}
		buf = make([]byte, 0, max(n, 512))
	}
	buf = buf[:0]
	for idle := 0; len(buf) < p.part && !p.ended; {
		if len(buf) == cap(buf) {
			grown := make([]byte, len(buf), min(2*cap(buf), p.part))
			copy(grown, buf)
			buf = grown
		}
		n, err := p.in.Read(buf[len(buf):min(cap(buf), p.part)])
		buf = buf[:len(buf)+n]
		p.read += int64(n)
		if idle++; n > 0 {
			idle = 0
		}
		// Only io.EOF is the end: io.ErrUnexpectedEOF is a client that broke off, and what it sent is no object.
		switch {
		case err == io.EOF:
			p.ended = true
		case err == nil && idle == 100:
			err = io.ErrNoProgress
			fallthrough
		case err != nil:
			return nil, fmt.Errorf("put %s: reading what to put: %w", p.name(p.key), err)
		}
		if p.size >= 0 && (p.read > p.size || p.ended && p.read < p.size) {
			more := "more than"
			if p.read < p.size {
				more = fmt.Sprintf("only %d of", p.read)
			}
			return nil, &source.Error{Op: "put", Name: p.name(p.key), Kind: source.ErrInvalid,
				Err: fmt.Errorf("what to put has %s the %d bytes announced", more, p.size)}
		}
	}
	p.crc = crc64.Update(p.crc, ecma, buf)
	return buf, nil
}

// send sends bytes held here, again while that helps.
func (p *put) send(ctx context.Context, r request, content []byte) (header http.Header, err error) {
	sum := md5.Sum(content)
	r.op, r.key, r.body = "put", p.key, content
	if r.header == nil {
		r.header = map[string]string{"Content-Type": contentType}
	}
	r.header["Content-MD5"] = base64.StdEncoding.EncodeToString(sum[:])
	err = source.Try(ctx, patience(len(content)), func(ctx context.Context) error {
		a, err := p.do(ctx, r)
		if err != nil {
			return err
		}
		defer a.body.Close()
		header = a.header
		return nil
	})
	return header, err
}

const contentType = "application/octet-stream"

// whole puts an object in one request.
func (p *put) whole(ctx context.Context, content []byte) (source.Object, error) {
	h, err := p.send(ctx, request{method: "PUT", header: p.header()}, content)
	if err != nil {
		return p.settle(ctx, err)
	}
	return p.done(ctx, h.Get("ETag"), h)
}

// parts puts an object in parts, reading ahead of those under way by one.
func (p *put) parts(ctx context.Context, first []byte) (o source.Object, err error) {
	id, err := p.initiate(ctx)
	if err != nil {
		return source.Object{}, err
	}
	gone := false
	if p.options.Begun != nil {
		p.options.Begun(id)
		defer func() { p.options.Ended(id, gone) }()
	}
	etags, err := p.sendParts(ctx, id, first)
	if err == nil {
		parts := make([]source.Part, len(etags))
		for i, e := range etags {
			parts[i] = source.Part{Number: i + 1, Version: e}
		}
		var h http.Header
		var etag string
		if etag, h, err = p.complete(ctx, id, parts); err == nil {
			gone = true
			return p.done(ctx, etag, h)
		}
		// The store may have completed it although its answer did not come, or came too late. That does not
		// say that the upload is gone: the same bytes may be another put's.
		if o, err = p.settle(ctx, err); err == nil {
			return o, nil
		}
	}
	gone, err = p.abort(ctx, id, err)
	return source.Object{}, err
}

func (p *put) initiate(ctx context.Context) (id string, err error) {
	r := request{op: "put", method: "POST", key: p.key, params: map[string]string{"uploads": ""},
		header: p.header()}
	err = source.Try(ctx, source.RetryOptions{}, func(ctx context.Context) error {
		var out struct {
			UploadID string `xml:"UploadId"`
		}
		_, err := p.exchange(ctx, r, maxAnswer, &out)
		id = out.UploadID
		return err
	})
	if err == nil && id == "" {
		err = &source.Error{Op: "put", Name: p.name(p.key), Kind: source.ErrUnavailable, Err: errors.New("the answer names no upload")}
	}
	return id, err
}

func (p *put) sendParts(ctx context.Context, id string, content []byte) ([]string, error) {
	partCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(partCtx)
	g.SetLimit(parallel)
	free := make(chan []byte, parallel+1)
	// Slots are reserved before a part's goroutine starts, so that none of them moves the slice.
	etags := make([]string, 0, maxParts)
	read := func() error {
		for {
			if len(etags) == maxParts {
				return &source.Error{Op: "put", Name: p.name(p.key), Kind: source.ErrInvalid,
					Err:  fmt.Errorf("more than %d parts of %d bytes", maxParts, p.part),
					Hint: "announce the size, so that larger parts are chosen"}
			}
			etags = append(etags, "")
			slot, number, part := &etags[len(etags)-1], len(etags), content
			g.Go(func() error {
				h, err := p.send(gctx, request{method: "PUT", params: map[string]string{
					"partNumber": strconv.Itoa(number), "uploadId": id}}, part)
				if err != nil {
					return err
				}
				if *slot = h.Get("ETag"); *slot == "" {
					return &source.Error{Op: "put", Name: p.name(p.key), Kind: source.ErrUnavailable,
						Err: fmt.Errorf("the answer to part %d has no ETag", number)}
				}
				free <- part // has room for all there are
				return nil
			})
			if p.ended {
				return nil
			}
			if gctx.Err() != nil {
				return nil // Wait knows why
			}
			var buf []byte
			select {
			case buf = <-free:
			default:
			}
			var err error
			if content, err = p.next(buf); err != nil {
				return err
			}
			if len(content) == 0 {
				return nil // the part before was full and the last
			}
		}
	}
	err := read()
	if err != nil {
		cancel() // the parts under way
	}
	if werr := g.Wait(); err == nil {
		err = werr
	}
	if err == nil && gctx.Err() != nil && ctx.Err() != nil {
		err = &source.Error{Op: "put", Name: p.name(p.key), Kind: source.ContextKind(ctx), Err: ctx.Err()}
	}
	return etags, err
}

func (p *put) complete(ctx context.Context, id string, parts []source.Part) (etag string, header http.Header, err error) {
	type part struct {
		PartNumber int
		ETag       string
	}
	in := struct {
		XMLName xml.Name `xml:"CompleteMultipartUpload"`
		Part    []part
	}{}
	for _, e := range parts {
		in.Part = append(in.Part, part{e.Number, e.Version})
	}
	content, err := xml.Marshal(in)
	if err != nil {
		return "", nil, err
	}
	r := request{op: "put", method: "POST", key: p.key, params: map[string]string{"uploadId": id},
		header: map[string]string{"Content-Type": "application/xml"}, body: content}
	p.condition(r.header)
	err = source.Try(ctx, source.RetryOptions{Slack: finishTimeout}, func(ctx context.Context) error {
		var out struct {
			XMLName xml.Name `xml:"CompleteMultipartUploadResult"`
			ETag    string
		}
		header, err = p.exchange(ctx, r, maxAnswer, &out)
		etag = out.ETag
		return err
	})
	return etag, header, err
}

// done makes the answer of a Put, if the store says that it holds the very bytes that were read.
func (p *put) done(ctx context.Context, etag string, h http.Header) (source.Object, error) {
	o := source.Object{Key: p.key, Size: p.read, Version: strings.Trim(etag, `"`), ModTime: p.deps.now(), Digest: digest(h)}
	if at, err := http.ParseTime(h.Get("Date")); err == nil {
		o.ModTime = at
	}
	if o.Digest.Algorithm != source.None && !bytes.Equal(o.Digest.Sum, crcDigest(p.crc).Sum) {
		// It must not stay: whoever reads it next cannot know.
		err := fmt.Errorf("the store holds other bytes than were sent: CRC64 %x, not %x", o.Digest.Sum, crcDigest(p.crc).Sum)
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
		defer cancel()
		if derr := p.Delete(clean, p.key); derr != nil {
			err = fmt.Errorf("%w, and could not be deleted: %v", err, derr)
		}
		return source.Object{}, &source.Error{Op: "put", Name: p.name(p.key), Kind: source.ErrUnavailable, Err: err, Hint: "put it again"}
	}
	if o.Version == "" {
		// An answer without ETag: ask what it became.
		return p.Stat(ctx, p.key)
	}
	return o, nil
}

// settle finds out whether a put whose answer did not come succeeded all the same: when the object that
// is there now has the very bytes, and is this put's where that matters. It returns the put's error otherwise.
func (p *put) settle(ctx context.Context, failed error) (source.Object, error) {
	var o source.Object
	if !source.Temporary(failed) && !errors.Is(failed, source.ErrNotFound) && !errors.Is(failed, source.ErrNoUpload) && !errors.Is(failed, source.ErrChanged) {
		return o, failed
	}
	ctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	var h http.Header
	err := source.Try(ctx, source.RetryOptions{Elapsed: cleanTimeout}, func(ctx context.Context) (err error) {
		o, h, err = p.stat(ctx, p.key)
		return err
	})
	if err == nil && p.nonce != "" && h.Get(metaPrefix+nonceMetadata) != p.nonce {
		return source.Object{}, failed
	}
	if err == nil && o.Size == p.read && o.Digest.Algorithm == source.CRC64ECMA && bytes.Equal(o.Digest.Sum, crcDigest(p.crc).Sum) {
		return o, nil
	}
	return source.Object{}, failed
}

// abort gives up an upload, so that its parts are neither kept nor paid for. It says whether they are gone, and
// returns the put's error.
func (p *put) abort(ctx context.Context, id string, failed error) (gone bool, _ error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
	defer cancel()
	err := source.Try(ctx, source.RetryOptions{Elapsed: cleanTimeout}, func(ctx context.Context) error {
		a, err := p.do(ctx, request{op: "put", method: "DELETE", key: p.key, params: map[string]string{"uploadId": id}})
		if err == nil {
			a.body.Close()
		}
		return err
	})
	if err == nil || errors.Is(err, source.ErrNotFound) || errors.Is(err, source.ErrNoUpload) {
		return true, failed
	}
	return false, fmt.Errorf("%w; the parts of upload %s could not be removed from the bucket: %v", failed, id, err)
}
