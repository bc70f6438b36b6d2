package objects

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/stepcache/stepcache/cache/wire"
)

// The body of a put that is passed on is a row of frames, each of a length, the CRC32C of length and
// content, and the content; an empty frame ends it. A body that does not end with one was cut off.

const (
	frameHead = 8
	frameMax  = 256 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func frameSum(length, content []byte) uint32 {
	return crc32.Update(crc32.Checksum(length, castagnoli), castagnoli, content)
}

// framer turns a body into frames.
type framer struct {
	r     io.Reader
	buf   []byte
	have  []byte // of buf, not yet taken
	ended bool
	// begun says that a byte of r was asked for; err is r's error, io.EOF included.
	begun bool
	err   error
}

func newFramer(r io.Reader) *framer { return &framer{r: r, buf: make([]byte, frameHead+frameMax)} }

func (f *framer) Read(p []byte) (int, error) {
	if len(f.have) == 0 {
		if f.ended {
			return 0, io.EOF
		}
		if err := f.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, f.have)
	f.have = f.have[n:]
	return n, nil
}

func (f *framer) next() error {
	f.begun = true
	n := 0
	for n == 0 && f.err == nil { // what is there goes at once: its sender may be slow
		n, f.err = f.r.Read(f.buf[frameHead:])
	}
	if f.err != nil && f.err != io.EOF {
		return f.err // what came before it is of no use either
	}
	if n == 0 {
		f.ended = true
	}
	binary.LittleEndian.PutUint32(f.buf, uint32(n))
	binary.LittleEndian.PutUint32(f.buf[4:], frameSum(f.buf[:4], f.buf[frameHead:frameHead+n]))
	f.have = f.buf[:frameHead+n]
	return nil
}

// unframer is the body that a framer framed. It ends only with the empty frame.
type unframer struct {
	r    io.Reader
	buf  []byte
	have []byte
	err  error
}

func newUnframer(r io.Reader) *unframer { return &unframer{r: r} }

func (u *unframer) Read(p []byte) (int, error) {
	for len(u.have) == 0 && u.err == nil {
		u.err = u.next()
	}
	if len(u.have) == 0 {
		return 0, u.err
	}
	n := copy(p, u.have)
	u.have = u.have[n:]
	return n, nil
}

func (u *unframer) next() error {
	var head [frameHead]byte
	if _, err := io.ReadFull(u.r, head[:]); err != nil {
		return cutOff(err)
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > frameMax {
		return fmt.Errorf("%w: frame of %d bytes", wire.ErrCorrupt, n)
	}
	if u.buf == nil && n > 0 {
		u.buf = make([]byte, frameMax)
	}
	content := u.buf[:n]
	if _, err := io.ReadFull(u.r, content); err != nil {
		return cutOff(err)
	}
	if frameSum(head[:4], content) != binary.LittleEndian.Uint32(head[4:]) {
		return fmt.Errorf("%w: a frame fails its checksum", wire.ErrCorrupt)
	}
	if n == 0 {
		return io.EOF
	}
	u.have = content
	return nil
}

func cutOff(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
