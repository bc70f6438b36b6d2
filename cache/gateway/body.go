package gateway

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"hash"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/stepcache/stepcache/cache/source"
)

// maxObject is S3's own largest object, of one put too: what a Dataset takes is the Objects' affair.
const maxObject = 5 << 40

// body is a request's content, decoded. Read returns io.EOF only when all of it is there and every digest
// and signature holds; else an error that becomes the answer.
type body struct {
	r      io.Reader
	size   int64 // -1: unknown
	seen   int64
	checks []*check
	hashes []hash.Hash // of checks, each once
	sum    *check      // the x-amz-checksum- among checks, if any
	err    error
}

// content prepares to read the request's body. Nothing has been read when it returns, so that a client
// that waits for "100 Continue" has not begun to send.
func (q *request) content() (*body, error) {
	b := &body{r: q.in, size: q.r.ContentLength}
	h := q.r.Header
	var err error
	// With the list of an upload's parts comes the checksum of the object, not of the list.
	if q.r.Method != http.MethodPost || !q.query.has("uploadId") {
		if b.sum, err = headerChecksum(h); err != nil {
			return nil, err
		}
	}
	switch q.who.payload {
	case unsignedPayload:
	case streaming, streamingTrailer, streamingUnsigned:
		if b.size, err = decodedLength(h); err != nil {
			return nil, err
		}
		var id *identity
		if q.who.payload != streamingUnsigned {
			id = &q.who
		}
		var trailer func(name, value string) error
		if q.who.payload != streaming {
			if trailer, err = b.trailers(h); err != nil {
				return nil, err
			}
		}
		b.r = newChunks(b.r, q.r.ContentLength, id, trailer)
	default:
		sum, err := hex.DecodeString(q.who.payload)
		if err != nil || len(sum) != sha256.Size {
			if strings.HasPrefix(q.who.payload, "STREAMING-") {
				return nil, notImplemented("x-amz-content-sha256: " + q.who.payload)
			}
			return nil, badArgument("x-amz-content-sha256 must be UNSIGNED-PAYLOAD, a STREAMING- word, or a valid sha256 value.")
		}
		b.add(&check{name: "SHA256", hash: sha256.New(), want: sum, failed: failure(http.StatusBadRequest, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed.")})
	}
	if b.sum != nil {
		b.add(b.sum)
	}
	if given := h.Get("Content-Md5"); given != "" {
		sum, err := base64.StdEncoding.DecodeString(given)
		if err != nil || len(sum) != md5.Size {
			return nil, failure(http.StatusBadRequest, "InvalidDigest", "The Content-MD5 you specified is not valid.")
		}
		b.add(&check{name: "MD5", hash: md5.New(), want: sum, failed: failure(http.StatusBadRequest, "BadDigest", "The Content-MD5 you specified did not match what we received.")})
	}
	return b, nil
}

// add adds a check. Two of the same kind hash once.
func (b *body) add(c *check) {
	for _, other := range b.checks {
		if other.name == c.name {
			c.hash = other.hash
			b.checks = append(b.checks, c)
			return
		}
	}
	b.checks, b.hashes = append(b.checks, c), append(b.hashes, c.hash)
}

// sums are those that the client said of the content before it: what a trailer will say is not known yet.
func (b *body) sums() (s source.Sums) {
	for _, c := range b.checks {
		switch {
		case c.want == nil:
		case c.name == "MD5":
			s.MD5 = c.want
		case c.name == "SHA256":
			s.SHA256 = c.want
		}
	}
	return s
}

// sized is content whose length must be known, as that of objects and parts.
func (q *request) sized() (*body, error) {
	b, err := q.content()
	switch {
	case err != nil:
		return nil, err
	case b.size < 0:
		return nil, failure(http.StatusLengthRequired, "MissingContentLength", "You must provide the Content-Length HTTP header.")
	case b.size > maxObject:
		return nil, failure(http.StatusBadRequest, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size.")
	}
	return b, nil
}

func decodedLength(h http.Header) (int64, error) {
	n, err := strconv.ParseInt(h.Get("X-Amz-Decoded-Content-Length"), 10, 64)
	if err != nil || n < 0 {
		return 0, failure(http.StatusLengthRequired, "MissingContentLength", "You must provide the x-amz-decoded-content-length header with a streamed payload.")
	}
	return n, nil
}

// trailers sets up the checksums that x-amz-trailer announces, and returns what takes their values.
func (b *body) trailers(h http.Header) (func(name, value string) error, error) {
	announced := map[string]*check{}
	for _, list := range h.Values("X-Amz-Trailer") {
		for name := range strings.SplitSeq(list, ",") {
			name = strings.ToLower(strings.TrimSpace(name))
			c := newCheck(name)
			switch {
			case c == nil:
				return nil, failure(http.StatusBadRequest, "InvalidRequest", "The value specified in the x-amz-trailer header is not supported.")
			case b.sum != nil:
				return nil, failure(http.StatusBadRequest, "InvalidRequest", "Expecting a single x-amz-checksum- header or trailer.")
			}
			b.sum, announced[name] = c, c
		}
	}
	if len(announced) == 0 {
		return nil, errTrailer
	}
	return func(name, value string) error {
		c := announced[name]
		if c == nil || c.want != nil {
			return errTrailer
		}
		return c.set(value)
	}, nil
}

func (b *body) Read(p []byte) (int, error) {
	if b.err != nil || len(p) == 0 {
		return 0, b.err
	}
	n, err := b.r.Read(p)
	b.seen += int64(n)
	for _, h := range b.hashes {
		h.Write(p[:n])
	}
	switch {
	case b.size >= 0 && b.seen > b.size:
		b.err = errTruncated
	case err == io.EOF:
		b.err = b.end()
	case err != nil:
		b.err = truncated(err)
	}
	return n, b.err
}

func (b *body) end() error {
	if b.size >= 0 && b.seen != b.size {
		return errTruncated
	}
	for _, c := range b.checks {
		if c.want == nil {
			return errTrailer // announced, and not sent
		}
		if err := c.holds(); err != nil {
			return err
		}
	}
	return io.EOF
}

// verified is asked after the Objects say that they have stored the body: had they not read it to its end,
// they would have stored what nobody has checked.
func (b *body) verified() error {
	if b.err != io.EOF {
		return errors.New("gateway: a body was stored that was not read to its end")
	}
	return nil
}

// parse reads an XML body of at most limit bytes into v.
func (q *request) parse(limit int64, v any) error {
	b, err := q.content()
	if err != nil {
		return err
	}
	tooLong := failure(http.StatusBadRequest, "MaxMessageLengthExceeded", "Your request was too big: its body may have %d bytes.", limit)
	if b.size > limit {
		return tooLong
	}
	var text bytes.Buffer
	if _, err := io.Copy(&text, io.LimitReader(b, limit+1)); err != nil {
		return err
	}
	if int64(text.Len()) > limit {
		return tooLong
	}
	d := xml.NewDecoder(bytes.NewReader(bytes.TrimSpace(text.Bytes())))
	if err := d.Decode(v); err != nil {
		return errXML
	}
	if _, err := d.Token(); err != io.EOF {
		return errXML // something after the document
	}
	return nil
}

var errXML = failure(http.StatusBadRequest, "MalformedXML", "The XML you provided was not well-formed or did not validate against our published schema.")

// progress is what a body has to move within a Stall.
const progress = 64 << 10

// stall gives a client a time for each part of its body. Only the time in Read counts, which is the time
// spent waiting for the client: while the bucket is slow, nobody asks the client for more. Deadlines of
// connections are real time, not Config.Clock's.
type stall struct {
	io.Reader
	control *http.ResponseController
	counted prometheus.Counter
	limit   time.Duration
	spent   time.Duration
	moved   int
	read    bool // from at all, which tells a client that waits for 100 Continue to go on
}

// watch puts deadlines on the body of a request that has one, from here on: also net/http's own reading
// of what a handler left is bounded by it.
func (q *request) watch() error {
	if q.r.ContentLength == 0 {
		return nil
	}
	s := &stall{Reader: q.r.Body, control: http.NewResponseController(q.w), counted: q.Metrics.in, limit: q.bodyStall}
	q.in = s // and not q.r.Body: by its type net/http knows that a client waits for 100 Continue
	return s.control.SetReadDeadline(time.Now().Add(s.limit))
}

func (s *stall) Read(p []byte) (int, error) {
	s.read = true
	begun := time.Now()
	if s.control.SetReadDeadline(begun.Add(s.limit-s.spent)) != nil {
		return 0, errTruncated // the connection is closed
	}
	n, err := s.Reader.Read(p)
	s.spent += time.Since(begun)
	s.counted.Add(float64(n))
	if s.moved += n; s.moved >= progress {
		s.moved, s.spent = 0, 0
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return n, errStalled
	case err == io.EOF:
		// net/http watches the connection from here on, to notice when the client leaves.
		if s.control.SetReadDeadline(time.Time{}) != nil {
			return n, errTruncated
		}
	case err != nil:
		return n, errTruncated // cut, reset, or no chunked encoding: the client's doing
	}
	return n, err
}

var errStalled = &Failure{
	Status: http.StatusBadRequest, Code: "RequestTimeout",
	Message: "Your socket connection to the server was not read from or written to within the timeout period.",
	header:  map[string]string{"Connection": "close"},
}

// drained is how much of a refused body is read all the same: most clients look for an answer only when they
// have sent a part, and a connection closed before tells them nothing.
const drained = 16 << 20

// drain reads what a refused client is sending, for what is left of one Stall.
func (q *request) drain() {
	s, ok := q.in.(*stall)
	if !ok || !s.read && q.r.Header.Get("Expect") != "" { // who still waits for 100 Continue sends nothing
		return
	}
	s.moved = -2 * drained           // never so much that the time begins anew
	io.CopyN(io.Discard, s, drained) // an error is the client's leaving
}

// ignore reads the body of a request that needs none, so that its deadline is off before a long answer.
func (q *request) ignore() error {
	if q.r.ContentLength == 0 {
		return nil
	}
	n, err := io.Copy(io.Discard, io.LimitReader(q.in, progress+1))
	if err == nil && n > progress {
		err = failure(http.StatusBadRequest, "MaxMessageLengthExceeded", "This request needs no body.")
	}
	return truncated(err)
}
