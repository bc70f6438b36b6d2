package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stepcache/stepcache/cache/checksum"
)

func payload(n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(p)
	return p
}

var requests = []Request{
	{},
	{Op: OpPing, ID: 7},
	{Op: OpRead, Flags: FlagPeer | FlagVerify, ID: math.MaxUint32, Epoch: math.MaxUint64, Snapshot: Digest{1, 2, 31: 9}, Index: 5, Off: 1 << 40, Length: 4 << 20, WaitMillis: 1},
	{Op: 200, Off: -1, Length: -1},
}

func TestRequestRoundTrip(t *testing.T) {
	var stream []byte
	for _, r := range requests {
		stream = AppendRequest(stream, r)
	}
	if len(stream) != len(requests)*RequestSize {
		t.Fatalf("%d requests take %d bytes", len(requests), len(stream))
	}
	in := bytes.NewReader(stream)
	for _, want := range requests {
		got, err := ReadRequest(in)
		if err != nil || got != want {
			t.Fatalf("got %+v, %v; want %+v", got, err, want)
		}
	}
	if _, err := ReadRequest(in); err != io.EOF {
		t.Fatalf("at the end: %v, want io.EOF", err)
	}
}

func replies() map[string][]byte {
	out := make(map[string][]byte)
	for name, n := range map[string]int{"empty": 0, "one": 1, "sum-1": checksum.Size - 1, "sum": checksum.Size, "sum+1": checksum.Size + 1, "block": MaxPayload} {
		out[name] = AppendFrame(nil, Reply{Status: Changed, ID: 3, Epoch: 9, Index: 4, Off: 1 << 33, Size: 77, Body: Digest{5}}, payload(n))
	}
	return out
}

func TestReplyRoundTrip(t *testing.T) {
	for name, frame := range replies() {
		rep, p, err := ReadFrame(bytes.NewReader(frame))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want := Reply{Status: Changed, ID: 3, Epoch: 9, Index: 4, Off: 1 << 33, Size: 77, Body: Digest{5}, Length: int32(len(p)), Sums: checksum.All(p)}
		if d := cmp.Diff(want, rep); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if !bytes.Equal(p, payload(len(p))) {
			t.Errorf("%s: payload differs", name)
		}
		// The same frame after another in the stream of a reader that wants the header only.
		in := bytes.NewReader(append(bytes.Clone(frame), frame...))
		first, err := ReadReply(in)
		if err != nil {
			t.Fatal(err)
		}
		in.Seek(int64(first.Length), io.SeekCurrent)
		if _, err := ReadReply(in); err != nil {
			t.Errorf("%s: second frame: %v", name, err)
		}
	}
}

func TestEveryFlippedBitOfAFrameIsCaught(t *testing.T) {
	frame := AppendFrame(nil, Reply{ID: 3, Epoch: 9, Index: 4}, payload(100))
	for i := range len(frame) * 8 {
		bad := bytes.Clone(frame)
		bad[i/8] ^= 1 << (i % 8)
		_, _, err := ReadFrame(bytes.NewReader(bad))
		if err == nil || (!errors.Is(err, ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF)) {
			t.Fatalf("bit %d flipped: %v", i, err)
		}
	}
	request := AppendRequest(nil, requests[2])
	for i := range len(request) * 8 {
		bad := bytes.Clone(request)
		bad[i/8] ^= 1 << (i % 8)
		if _, err := ReadRequest(bytes.NewReader(bad)); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("request bit %d flipped: %v", i, err)
		}
	}
}

func TestTruncatedFrames(t *testing.T) {
	frame := AppendFrame(nil, Reply{}, payload(checksum.Size+5))
	sums := ReplySize + 2*checksum.EncodedSize // where they end
	for _, n := range []int{1, 4, ReplySize - 1, ReplySize, ReplySize + 4, sums - checksum.EncodedSize, sums, len(frame) - 1} {
		if _, _, err := ReadFrame(bytes.NewReader(frame[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes: %v", n, len(frame), err)
		}
	}
	if _, _, err := ReadFrame(bytes.NewReader(nil)); err != io.EOF {
		t.Errorf("nothing: %v", err)
	}
}

// TestHostileLengthsAllocateNothing gives headers whose checksum is right and whose lengths are not.
func TestHostileLengthsAllocateNothing(t *testing.T) {
	for _, length := range []int32{-1, math.MinInt32, MaxPayload + 1, math.MaxInt32} {
		frame := AppendReply(nil, Reply{})
		binary.LittleEndian.PutUint32(frame[72:], uint32(length))
		binary.LittleEndian.PutUint32(frame[76:], crc32.Checksum(frame[:76], castagnoli))
		if _, _, err := ReadFrame(bytes.NewReader(frame)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("length %d: %v", length, err)
		}
	}
	frame := AppendReply(nil, Reply{Length: 1, Sums: make([]uint64, 2)})
	if _, err := ReadReply(bytes.NewReader(frame)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("two sums for a byte: %v", err)
	}
	if allocs := testing.AllocsPerRun(100, func() {
		ReadReply(bytes.NewReader(frame))
	}); allocs > 8 {
		t.Errorf("%v allocations for a header that is refused", allocs)
	}
}

func TestCheckSums(t *testing.T) {
	p := payload(3*checksum.Size + 7)
	sums := checksum.All(p)
	if err := CheckSums(p, sums); err != nil {
		t.Fatal(err)
	}
	if err := CheckSums(p, sums[:3]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a sum too few: %v", err)
	}
	p[2*checksum.Size] ^= 1
	if err := CheckSums(p, sums); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a flipped bit: %v", err)
	}
}

func FuzzReadRequest(f *testing.F) {
	for _, r := range requests {
		f.Add(AppendRequest(nil, r))
	}
	f.Add([]byte("SCq2"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ReadRequest(bytes.NewReader(b))
		if err != nil {
			return
		}
		if !bytes.Equal(AppendRequest(nil, r), b[:RequestSize]) {
			t.Fatalf("%+v does not encode to what it was decoded from", r)
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	for name, frame := range replies() {
		if name != "block" {
			f.Add(frame)
		}
	}
	f.Add([]byte("SCp2"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, p, err := ReadFrame(bytes.NewReader(b))
		if err != nil {
			return
		}
		if again := AppendFrame(nil, r, p); !bytes.Equal(again, b[:len(again)]) {
			t.Fatalf("%+v does not encode to what it was decoded from", r)
		}
	})
}

func BenchmarkReadReply(b *testing.B) {
	frame := AppendFrame(nil, Reply{}, payload(MaxPayload))
	r := bytes.NewReader(frame)
	for b.Loop() {
		r.Reset(frame)
		if _, err := ReadReply(r); err != nil {
			b.Fatal(err)
		}
	}
}

func TestASumListIsAsLongAsItsBlock(t *testing.T) {
	for _, n := range []int{1, checksum.Size, checksum.Size + 1, MaxPayload} {
		sums := checksum.All(bytes.Repeat([]byte{3}, n))
		p := checksum.Encode(nil, sums)
		got, err := SumList(p, n)
		if err != nil || !slices.Equal(got, sums) {
			t.Errorf("%d bytes: %v, %v", n, got, err)
		}
		for name, bad := range map[string][]byte{"short": p[:len(p)-1], "none": nil, "long": append(p, 0, 0, 0, 0)} {
			if _, err := SumList(bad, n); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%d bytes, %s: %v", n, name, err)
			}
		}
	}
}
