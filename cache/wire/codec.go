package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// RequestSize and ReplySize are the lengths in bytes of the encoded headers; a reply's Sums and payload
// follow its header.
const (
	RequestSize = 76
	ReplySize   = 80
)

// MaxPayload bounds a reply's payload, and so every allocation that a frame can cause.
const MaxPayload = ring.BlockSize

// maxSums is the number of sums of the largest payload.
const maxSums = MaxPayload / checksum.Size

// MaxMessage bounds the text of a reply that is not OK.
const MaxMessage = 4 << 10

// The first four bytes of each frame: they tell a request from a reply, and this version of the
// protocol from another.
var (
	requestMagic = [4]byte{'S', 'C', 'q', '2'}
	replyMagic   = [4]byte{'S', 'C', 'p', '2'}
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CheckSums compares p with its sums. The error wraps ErrCorrupt.
func CheckSums(p []byte, sums []uint64) error {
	if err := checksum.Check(p, sums); err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return nil
}

// SumList decodes the sums of n bytes that are a payload of their own (checksum.Encode).
func SumList(p []byte, n int) ([]uint64, error) {
	if len(p) != checksum.EncodedSize*checksum.Count(n) {
		return nil, fmt.Errorf("%w: %d bytes of sums for %d bytes", ErrCorrupt, len(p), n)
	}
	return checksum.Decode(p), nil
}

// AppendRequest appends the encoding of r to b.
func AppendRequest(b []byte, r Request) []byte {
	start := len(b)
	b = append(b, requestMagic[:]...)
	b = append(b, byte(r.Op), byte(r.Flags), 0, 0)
	b = binary.LittleEndian.AppendUint32(b, r.ID)
	b = binary.LittleEndian.AppendUint32(b, r.Index)
	b = binary.LittleEndian.AppendUint64(b, r.Epoch)
	b = append(b, r.Snapshot[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.Off))
	b = binary.LittleEndian.AppendUint32(b, uint32(r.Length))
	b = binary.LittleEndian.AppendUint32(b, r.WaitMillis)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// ReadRequest reads one request. It is io.EOF when the stream ends before the first byte. The header
// decodes only if its checksum holds; whether Off and Length make sense is for the receiver to judge
// against the file, and is answered Invalid.
func ReadRequest(r io.Reader) (Request, error) {
	var h [RequestSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return Request{}, err
	}
	return DecodeRequest(h[:])
}

// DecodeRequest decodes one request from exactly RequestSize bytes (a packet of the Unix socket).
func DecodeRequest(h []byte) (Request, error) {
	if len(h) != RequestSize {
		return Request{}, fmt.Errorf("%w: request of %d bytes", ErrCorrupt, len(h))
	}
	if !bytes.Equal(h[:4], requestMagic[:]) {
		return Request{}, fmt.Errorf("%w: not a request of this protocol", ErrCorrupt)
	}
	if crc32.Checksum(h[:RequestSize-4], castagnoli) != binary.LittleEndian.Uint32(h[RequestSize-4:]) {
		return Request{}, fmt.Errorf("%w: request header fails its checksum", ErrCorrupt)
	}
	if h[6] != 0 || h[7] != 0 {
		return Request{}, fmt.Errorf("%w: request uses reserved bytes", ErrCorrupt)
	}
	return Request{
		Op:         Op(h[4]),
		Flags:      Flag(h[5]),
		ID:         binary.LittleEndian.Uint32(h[8:]),
		Index:      binary.LittleEndian.Uint32(h[12:]),
		Epoch:      binary.LittleEndian.Uint64(h[16:]),
		Snapshot:   Digest(h[24:56]),
		Off:        int64(binary.LittleEndian.Uint64(h[56:])),
		Length:     int32(binary.LittleEndian.Uint32(h[64:])),
		WaitMillis: binary.LittleEndian.Uint32(h[68:]),
	}, nil
}

// AppendReply appends the encoding of r's header and sums to b. r.Length is the payload's length and
// r.Sums must cover it (checksum.All of the payload, or the stored ones).
func AppendReply(b []byte, r Reply) []byte {
	start := len(b)
	b = append(b, replyMagic[:]...)
	b = append(b, byte(r.Status), 0)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(r.Sums)))
	b = binary.LittleEndian.AppendUint32(b, r.ID)
	b = binary.LittleEndian.AppendUint32(b, r.Index)
	b = binary.LittleEndian.AppendUint64(b, r.Epoch)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.Off))
	b = binary.LittleEndian.AppendUint64(b, uint64(r.Size))
	b = append(b, r.Body[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(r.Length))
	crcAt := len(b)
	b = append(b, 0, 0, 0, 0)
	b = checksum.Encode(b, r.Sums)
	crc := crc32.Checksum(b[start:crcAt], castagnoli)
	crc = crc32.Update(crc, castagnoli, b[crcAt+4:])
	binary.LittleEndian.PutUint32(b[crcAt:], crc)
	return b
}

// ReadReply reads a reply's header and sums; Length bytes of payload follow in r, which the caller
// reads and hands to CheckSums. Every length is checked before anything is allocated for it. It is
// io.EOF when the stream ends before the first byte.
func ReadReply(r io.Reader) (Reply, error) {
	var h [ReplySize + checksum.EncodedSize*maxSums]byte
	if _, err := io.ReadFull(r, h[:ReplySize]); err != nil {
		return Reply{}, err
	}
	n, err := sumsLength(h[:ReplySize])
	if err != nil {
		return Reply{}, err
	}
	if _, err := io.ReadFull(r, h[ReplySize:ReplySize+checksum.EncodedSize*n]); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Reply{}, err
	}
	return decodeReply(h[:ReplySize+checksum.EncodedSize*n])
}

// sumsLength is the number of sums that follow the header h, or an error if it cannot be right.
func sumsLength(h []byte) (int, error) {
	if !bytes.Equal(h[:4], replyMagic[:]) {
		return 0, fmt.Errorf("%w: not a reply of this protocol", ErrCorrupt)
	}
	n := int(binary.LittleEndian.Uint16(h[6:]))
	length := int32(binary.LittleEndian.Uint32(h[72:]))
	if length < 0 || length > MaxPayload {
		return 0, fmt.Errorf("%w: reply of %d bytes", ErrCorrupt, length)
	}
	if n != checksum.Count(int(length)) {
		return 0, fmt.Errorf("%w: reply of %d bytes with %d sums", ErrCorrupt, length, n)
	}
	return n, nil
}

// decodeReply decodes a header with its sums, whose number sumsLength has checked.
func decodeReply(h []byte) (Reply, error) {
	crc := crc32.Checksum(h[:ReplySize-4], castagnoli)
	crc = crc32.Update(crc, castagnoli, h[ReplySize:])
	if crc != binary.LittleEndian.Uint32(h[ReplySize-4:]) {
		return Reply{}, fmt.Errorf("%w: reply header fails its checksum", ErrCorrupt)
	}
	if h[5] != 0 {
		return Reply{}, fmt.Errorf("%w: reply uses a reserved byte", ErrCorrupt)
	}
	rep := Reply{
		Status: Status(h[4]),
		ID:     binary.LittleEndian.Uint32(h[8:]),
		Index:  binary.LittleEndian.Uint32(h[12:]),
		Epoch:  binary.LittleEndian.Uint64(h[16:]),
		Off:    int64(binary.LittleEndian.Uint64(h[24:])),
		Size:   int64(binary.LittleEndian.Uint64(h[32:])),
		Body:   Digest(h[40:72]),
		Length: int32(binary.LittleEndian.Uint32(h[72:])),
	}
	if len(h) > ReplySize {
		rep.Sums = checksum.Decode(h[ReplySize:])
	}
	return rep, nil
}

// AppendFrame appends a whole reply: header, sums computed here, and payload. It is for small payloads
// and packets; Length and Sums of r are set from p.
func AppendFrame(b []byte, r Reply, p []byte) []byte {
	r.Length, r.Sums = int32(len(p)), checksum.All(p)
	return append(AppendReply(b, r), p...)
}

// ReadFrame reads a whole reply with its payload and checks the sums.
func ReadFrame(r io.Reader) (Reply, []byte, error) {
	rep, err := ReadReply(r)
	if err != nil {
		return Reply{}, nil, err
	}
	p := make([]byte, rep.Length)
	if _, err := io.ReadFull(r, p); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Reply{}, nil, err
	}
	if err := CheckSums(p, rep.Sums); err != nil {
		return Reply{}, nil, err
	}
	return rep, p, nil
}
