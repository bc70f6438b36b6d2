package s3

import (
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// What is put with one request, of up to partSize bytes. It is kept until the store has it, so that it can be sent
// again. Where its sender told its MD5, and it is more than passes in no time, it is on its way to the store while it
// comes, all but its last byte, which is sent only once its reader ended well: a store that got less than it was promised
// keeps nothing. Else it goes once it is all there. Either way the store is told the MD5 before the first byte, and
// compares.

// soon is how much is all there so soon that it costs more to send it while it comes: signing it chunk by chunk takes
// buffers and signatures.
const soon = 128 << 10

// pieceSize is how content is kept: in pieces that go round. What is smaller has memory of its own.
const pieceSize = 64 << 10

var pieces = sync.Pool{New: func() any { return new([pieceSize]byte) }}

// content comes from a reader once, and stays.
type content struct {
	careful
	size   int64
	kept   int64
	pieces [][]byte // with what was kept, each full but the last
	sums   source.Sums
	md5    hash.Hash // of what was kept, unless sums has it
}

func newContent(r io.Reader, size int64, sums source.Sums) *content {
	c := &content{careful: careful{r: r, left: size}, size: size, sums: sums}
	if len(sums.SHA256) != sha256.Size {
		c.sums.SHA256 = nil
	}
	if len(sums.MD5) != md5.Size {
		c.sums.MD5, c.md5 = nil, md5.New()
	}
	return c
}

// release ends the use of the content. Nobody reads it any more.
func (c *content) release() {
	for _, p := range c.pieces {
		if cap(p) == pieceSize {
			pieces.Put((*[pieceSize]byte)(p[:pieceSize]))
		}
	}
	c.pieces = nil
}

// Read takes the next bytes, and keeps them.
func (c *content) Read(p []byte) (int, error) {
	into := c.space()
	n, err := c.take(into[:min(len(into), len(p))])
	return copy(p, into[:n]), err
}

// fill takes all that is left.
func (c *content) fill() error {
	for {
		switch _, err := c.take(c.space()); err {
		case nil:
		case io.EOF:
			return nil
		default:
			return err
		}
	}
}

// space is where the next bytes are kept: some, as long as there are more to come.
func (c *content) space() []byte {
	at := int(c.kept % pieceSize)
	if at == 0 && c.kept < c.size && int64(len(c.pieces))*pieceSize == c.kept {
		if left := c.size - c.kept; left < pieceSize {
			c.pieces = append(c.pieces, make([]byte, left))
		} else {
			c.pieces = append(c.pieces, pieces.Get().(*[pieceSize]byte)[:])
		}
	}
	if c.kept == c.size {
		return nil
	}
	return c.pieces[len(c.pieces)-1][at:]
}

// take reads into space.
func (c *content) take(space []byte) (int, error) {
	n, err := c.careful.Read(space)
	c.kept += int64(n)
	if c.md5 != nil {
		c.md5.Write(space[:n])
	}
	return n, err
}

// sum is the MD5, once all is there.
func (c *content) sum() []byte {
	if c.sums.MD5 == nil {
		c.sums.MD5, c.md5 = c.md5.Sum(nil), nil
	}
	return c.sums.MD5
}

// payload is the SHA-256, once all is there.
func (c *content) payload() []byte {
	if c.sums.SHA256 == nil {
		h := sha256.New()
		for _, p := range c.pieces {
			h.Write(p)
		}
		c.sums.SHA256 = h.Sum(nil)
	}
	return c.sums.SHA256
}

// again reads what was kept from its beginning, once all is there.
func (c *content) again() io.Reader { return &kept{pieces: c.pieces} }

type kept struct {
	pieces [][]byte
	at     int // within the first
}

func (k *kept) Read(p []byte) (int, error) {
	if len(k.pieces) == 0 {
		return 0, io.EOF
	}
	n := copy(p, k.pieces[0][k.at:])
	if k.at += n; k.at == len(k.pieces[0]) {
		k.pieces, k.at = k.pieces[1:], 0
	}
	return n, nil
}

// sent is how one request sends content.
type sent struct {
	body        io.Reader
	md5, sha256 string // as the library takes them
	chunks      bool   // signed chunk by chunk, since the SHA-256 is not known
}

// asTold is how content is sent before all of it is there, by what its sender told of it.
func (b *Bucket) asTold(sums source.Sums) (s sent) {
	if len(sums.MD5) == md5.Size {
		s.md5 = base64.StdEncoding.EncodeToString(sums.MD5)
	}
	switch {
	case !b.plain():
	case len(sums.SHA256) == sha256.Size:
		s.sha256 = hex.EncodeToString(sums.SHA256)
	default:
		s.chunks = true
	}
	return s
}

// noAnswer is how long a store may take nothing and say nothing, as source.Try has it.
const noAnswer = 20 * time.Second

// maxDoubts is how many puts, one after the other, may show that a store does not take chunks with signatures.
const maxDoubts = 3

// deliver sends content, again while that helps.
func (b *Bucket) deliver(ctx context.Context, key string, c *content, send func(context.Context, sent) error) error {
	decided, doubted, before := b.asItComes(ctx, key, c, send)
	if decided {
		return before
	}
	if err := c.fill(); err != nil {
		return b.unread(key, err)
	}
	s := sent{md5: base64.StdEncoding.EncodeToString(c.sum())}
	if b.plain() {
		s.sha256 = hex.EncodeToString(c.payload())
	}
	err := source.Try(ctx, patience(c.size), func(ctx context.Context) error {
		if err := before; err != nil {
			before = nil
			return err // of the first try, which is told of and waited after like any other
		}
		body := lend(c.again())
		defer body.back()
		s.body = body
		return send(ctx, s)
	})
	if err == nil && doubted {
		b.doubts.Add(1)
	}
	return err
}

// asItComes sends content while it comes, where its sums are known, and says whether that decided the put. A
// temporary error did not. Nor did it when the store refused chunks with signatures, which doubted says, as it may know
// none: nobody on a plain connection may change the bytes, so they are all signed, and where the SHA-256 is not known before
// the first byte there is no other way.
func (b *Bucket) asItComes(ctx context.Context, key string, c *content, send func(context.Context, sent) error) (decided, doubted bool, err error) {
	if c.sums.MD5 == nil || c.size <= soon {
		return false, false, nil
	}
	s := b.asTold(c.sums)
	if s.chunks && b.doubts.Load() >= maxDoubts {
		return false, false, nil
	}
	within, cancel := context.WithCancel(ctx)
	defer cancel()
	w := &waiting{r: c, limit: noAnswer + patience(c.size).Slack}
	w.timer = time.AfterFunc(w.limit, cancel)
	defer w.timer.Stop()
	body := lend(w)
	s.body = body
	err = send(within, s)
	body.back()
	switch {
	case c.err != nil:
		return true, false, b.unread(key, c.err)
	case err == nil && !c.ended:
		return false, false, nil // what it answered was not about this content
	case err == nil:
		if s.chunks {
			b.doubts.Store(0)
		}
		return true, false, nil
	case ctx.Err() != nil:
		return true, false, err
	case within.Err() != nil:
		return false, false, &source.Error{Op: "put", Name: b.object(key), Kind: source.ErrUnavailable, Err: fmt.Errorf("no answer for %v", w.limit)}
	case source.Temporary(err):
		return false, false, err
	case s.chunks && (errors.Is(err, source.ErrInvalid) || errors.Is(err, source.ErrDenied)):
		return false, true, nil
	}
	return true, false, err
}

// waiting bounds the time that a store takes between two readings of what it is sent, and after the last. The time in r,
// which is the sender's, does not count.
type waiting struct {
	r     io.Reader
	timer *time.Timer
	limit time.Duration
}

func (w *waiting) Read(p []byte) (int, error) {
	if !w.timer.Stop() {
		return 0, context.DeadlineExceeded
	}
	n, err := w.r.Read(p)
	w.timer.Reset(w.limit)
	return n, err
}

// lent is a body that one request reads. The client library may read on after the answer came, or the request was
// given up: back waits for a reading under way and lets no other begin.
type lent struct {
	r    io.Reader
	turn chan struct{}
	over bool
}

var errOver = errors.New("the request is over")

func lend(r io.Reader) *lent {
	l := &lent{r: r, turn: make(chan struct{}, 1)}
	l.turn <- struct{}{}
	return l
}

func (l *lent) Read(p []byte) (int, error) {
	<-l.turn
	defer func() { l.turn <- struct{}{} }()
	if l.over {
		return 0, errOver
	}
	return l.r.Read(p)
}

func (l *lent) back() {
	<-l.turn
	l.over = true
	l.turn <- struct{}{}
}
