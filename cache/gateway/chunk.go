package gateway

import (
	"bufio"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// chunks decodes a body in aws-chunked encoding: chunks with a signature each, which follows from the one
// before, then a chunk of no bytes, then perhaps trailers with a signature of their own.
//
// Bytes are handed on before their chunk's signature is known, so that a chunk of any size takes constant
// memory: what is read is good only once Read has returned io.EOF.
type chunks struct {
	r    *bufio.Reader
	left int64 // of the chunk being read
	done bool
	err  error
	// id signs; nil for unsigned chunks.
	id       *identity
	previous string
	sum      hash.Hash // of the chunk being read
	claimed  string    // its signature
	// trailer is called for each trailer; nil where none may come.
	trailer func(name, value string) error
}

const (
	maxChunkHeader = 1 << 10
	maxTrailers    = 8 << 10
)

var (
	errTruncated = failure(http.StatusBadRequest, "IncompleteBody", "You did not provide the number of bytes specified by the Content-Length HTTP header, or the body's chunks end early.")
	errTrailer   = failure(http.StatusBadRequest, "MalformedTrailerError", "The request contained trailing data that was not well-formed or did not conform to our published schema.")
	errChunk     = failure(http.StatusBadRequest, "InvalidRequest", "The body is not well-formed aws-chunked encoding.")
)

// newChunks decodes a body of size bytes in all, where that is known.
func newChunks(r io.Reader, size int64, id *identity, trailer func(name, value string) error) *chunks {
	if size < 0 || size > 64<<10 {
		size = 64 << 10
	}
	c := &chunks{r: bufio.NewReaderSize(r, int(size)), id: id, trailer: trailer}
	if id != nil {
		c.previous, c.sum = id.signature, sha256.New()
	}
	return c
}

func (c *chunks) Read(p []byte) (int, error) {
	if c.err != nil || len(p) == 0 {
		return 0, c.err
	}
	var n int
	n, c.err = c.read(p)
	return n, c.err
}

func (c *chunks) read(p []byte) (int, error) {
	if c.left == 0 {
		if err := c.next(); err != nil {
			return 0, err
		}
		if c.done {
			return 0, io.EOF
		}
	}
	if int64(len(p)) > c.left {
		p = p[:c.left]
	}
	n, err := c.r.Read(p)
	c.left -= int64(n)
	if c.sum != nil {
		c.sum.Write(p[:n])
	}
	if err != nil {
		return n, truncated(err)
	}
	if c.left == 0 {
		return n, c.end()
	}
	return n, nil
}

// next reads a chunk's header, and after the last chunk all that follows.
func (c *chunks) next() error {
	line, err := c.line(maxChunkHeader)
	if err != nil {
		return err
	}
	size, extensions, _ := strings.Cut(line, ";")
	c.left, err = strconv.ParseInt(size, 16, 64)
	if err != nil || c.left < 0 || size[0] == '+' || size[0] == '-' {
		return errChunk
	}
	c.claimed = ""
	for extension := range strings.SplitSeq(extensions, ";") {
		if name, value, _ := strings.Cut(extension, "="); name == "chunk-signature" {
			c.claimed = value
		}
	}
	if c.left > 0 {
		return nil
	}
	c.done = true
	if err := c.verify("AWS4-HMAC-SHA256-PAYLOAD"); err != nil {
		return err
	}
	return c.trailers()
}

// end checks a chunk that has been read.
func (c *chunks) end() error {
	line, err := c.line(2)
	if err != nil {
		return err
	}
	if line != "" {
		return errChunk
	}
	return c.verify("AWS4-HMAC-SHA256-PAYLOAD")
}

func (c *chunks) verify(algorithm string) error {
	if c.id == nil {
		return nil
	}
	sum := hex.EncodeToString(c.sum.Sum(nil))
	c.sum.Reset()
	parts := []string{algorithm, c.id.time, c.id.scope, c.previous, emptySHA, sum}
	if algorithm == "AWS4-HMAC-SHA256-TRAILER" {
		parts = []string{algorithm, c.id.time, c.id.scope, c.previous, sum}
	}
	signature := hex.EncodeToString(mac(c.id.key, strings.Join(parts, "\n")))
	if !hmac.Equal([]byte(signature), []byte(c.claimed)) {
		return errSignature
	}
	c.previous = signature
	return nil
}

// trailers reads what follows the last chunk, to the end of the body. Clients differ in the empty lines
// between trailers, so these carry no meaning.
func (c *chunks) trailers() error {
	rest, err := io.ReadAll(io.LimitReader(c.r, maxTrailers+1))
	if err != nil {
		return truncated(err)
	}
	if len(rest) > maxTrailers {
		return errTrailer
	}
	c.claimed = ""
	for line := range strings.SplitSeq(string(rest), "\n") {
		if line = strings.TrimSuffix(line, "\r"); line == "" {
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		name = strings.ToLower(strings.TrimSpace(name))
		value = strings.TrimSpace(value)
		switch {
		case !ok || c.trailer == nil || c.claimed != "":
			return errTrailer
		case name == "x-amz-trailer-signature":
			c.claimed = value
			continue
		}
		if c.sum != nil {
			io.WriteString(c.sum, name+":"+value+"\n")
		}
		if err := c.trailer(name, value); err != nil {
			return err
		}
	}
	if c.trailer == nil {
		return nil
	}
	if c.id != nil && c.claimed == "" {
		return errTruncated // the signature comes last
	}
	return c.verify("AWS4-HMAC-SHA256-TRAILER")
}

// line reads up to a line's end, CR LF, which it leaves out.
func (c *chunks) line(most int) (string, error) {
	var b []byte
	for {
		char, err := c.r.ReadByte()
		if err != nil {
			return "", truncated(err)
		}
		if char == '\n' {
			line, ok := strings.CutSuffix(string(b), "\r")
			if !ok {
				return "", errChunk
			}
			return line, nil
		}
		if b = append(b, char); len(b) > most {
			return "", errChunk
		}
	}
}

func truncated(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errTruncated
	}
	return err
}
