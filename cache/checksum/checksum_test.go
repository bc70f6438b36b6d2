package checksum

import (
	"bytes"
	"errors"
	"slices"
	"testing"
)

func content(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7 + i/251)
	}
	return p
}

// TestOf compares with xxhsum -H3 of the reference library. A sum is compared on another machine than it was taken on,
// whose processor may have other instructions: these values are what they agree on.
func TestOf(t *testing.T) {
	for n, want := range map[int]uint64{
		0: 0x2d06800538d394c2, 1: 0xc44bdff4074eecdb, 7: 0x0ffc4827844c63a6, 13: 0x523759b666e1405b, 100: 0x6dbb812cf19d012e,
		200: 0x7c64f3b17285e96a, 240: 0x4917a75c0ef8eed7, 1000: 0x1a86fba1101018cf, 1024: 0xba464919c6bb3ccd, 1025: 0x2aa0034e7827ee42,
		4096: 0x5a73a95c9a8b3549, Size - 1: 0x02326c3b72d44b0b, Size: 0x0d88401380df353c,
	} {
		if got := Of(content(n)); got != want {
			t.Errorf("%d bytes: %016x, want %016x", n, got, want)
		}
		// Wherever it lies.
		if got := Of(append([]byte{9}, content(n)...)[1:]); got != want {
			t.Errorf("%d bytes, not aligned: %016x, want %016x", n, got, want)
		}
	}
}

func TestCheckFindsWhatChanged(t *testing.T) {
	whole := content(2*Size + 100)
	sums := All(whole)
	if err := Check(whole, sums); err != nil || len(sums) != 3 {
		t.Fatalf("%d sums: %v", len(sums), err)
	}
	for name, spoil := range map[string]func(p []byte) []byte{
		"a bit, first":        func(p []byte) []byte { p[0] ^= 1; return p },
		"a bit, last":         func(p []byte) []byte { p[len(p)-1] ^= 0x80; return p },
		"a page of zeros":     func(p []byte) []byte { clear(p[8192:12288]); return p },
		"two pages exchanged": func(p []byte) []byte { copy(p, append(slices.Clone(p[4096:8192]), p[:4096]...)); return p },
		"two pieces exchanged": func(p []byte) []byte {
			return slices.Concat(p[Size:2*Size], p[:Size], p[2*Size:])
		},
		"a byte more":          func(p []byte) []byte { return append(p, 0) },
		"a byte less":          func(p []byte) []byte { return p[:len(p)-1] },
		"a piece less":         func(p []byte) []byte { return p[:Size] },
		"nothing":              func([]byte) []byte { return nil },
		"shifted by one":       func(p []byte) []byte { return append([]byte{0}, p[:len(p)-1]...) },
		"zeros of that length": func(p []byte) []byte { return make([]byte, len(p)) },
	} {
		if err := Check(spoil(bytes.Clone(whole)), sums); !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range 8 * 1000 {
		p := content(1000)
		p[i/8] ^= 1 << (i % 8)
		if Of(p) == Of(content(1000)) {
			t.Fatalf("bit %d flipped: the same sum", i)
		}
	}
}

func TestSumsOfAnyLength(t *testing.T) {
	for n, count := range map[int]int{0: 0, 1: 1, Size - 1: 1, Size: 1, Size + 1: 2, 3 * Size: 3} {
		p := content(n)
		sums := All(p)
		if len(sums) != count || Count(n) != count {
			t.Errorf("%d bytes: %d sums, Count %d, want %d", n, len(sums), Count(n), count)
		}
		// Piece by piece, as bytes arrive.
		var pieces []uint64
		for off := 0; off < n; off += Size {
			pieces = Append(pieces, p[off:min(off+Size, n)])
		}
		if !slices.Equal(pieces, sums) {
			t.Errorf("%d bytes: %x by pieces, %x at once", n, pieces, sums)
		}
		b := Encode([]byte("before"), sums)
		if len(b) != len("before")+count*EncodedSize || !slices.Equal(Decode(b[len("before"):]), sums) {
			t.Errorf("%d bytes: %x encoded", n, b)
		}
	}
}

func BenchmarkAll(b *testing.B) {
	for name, n := range map[string]int{"at hand": 256 << 10, "in memory": 256 << 20} {
		b.Run(name, func(b *testing.B) {
			p := content(n)
			b.SetBytes(int64(n))
			for b.Loop() {
				All(p)
			}
		})
	}
}
