package objects

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/stepcache/stepcache/cache/wire"
)

func framed(t *testing.T, r io.Reader) []byte {
	t.Helper()
	p, err := io.ReadAll(newFramer(r))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestFrames(t *testing.T) {
	for _, size := range []int{0, 1, frameMax - 1, frameMax, frameMax + 1, 3*frameMax + 17} {
		want := bytes.Repeat([]byte{7, 1, 3}, size/3+1)[:size]
		for name, r := range map[string]io.Reader{
			"whole": bytes.NewReader(want), "by byte": iotest.OneByteReader(bytes.NewReader(want)), "with its end": iotest.DataErrReader(bytes.NewReader(want)),
		} {
			if name == "by byte" && size > 1000 {
				continue
			}
			if got, err := io.ReadAll(newUnframer(bytes.NewReader(framed(t, r)))); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %s: %d came, %v", size, name, len(got), err)
			}
		}
	}
}

// Nothing but the whole body, unchanged, ends well.
func TestFramesThatAreCutOrChanged(t *testing.T) {
	want := bytes.Repeat([]byte("stepcache"), 100)
	p := framed(t, bytes.NewReader(want))
	for n := range p {
		if _, err := io.ReadAll(newUnframer(bytes.NewReader(p[:n]))); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut after %d bytes: %v", n, err)
		}
		q := bytes.Clone(p)
		q[n] ^= 1
		if _, err := io.ReadAll(newUnframer(bytes.NewReader(q))); !errors.Is(err, wire.ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("byte %d changed: %v", n, err)
		}
	}
	broken := errors.New("broken")
	f := newFramer(io.MultiReader(bytes.NewReader(want), iotest.ErrReader(broken)))
	if _, err := io.ReadAll(f); !errors.Is(err, broken) || !errors.Is(f.err, broken) {
		t.Errorf("a body that fails: %v, noted %v", err, f.err)
	}
}

func FuzzUnframer(f *testing.F) {
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0}, 16))
	p, _ := io.ReadAll(newFramer(bytes.NewReader([]byte("seed"))))
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		got, err := io.ReadAll(newUnframer(bytes.NewReader(p)))
		if err == nil && len(got) > len(p) {
			t.Errorf("%d bytes out of %d", len(got), len(p))
		}
	})
}

func TestKeysThatNoFileSystemShouldHold(t *testing.T) {
	for _, key := range []string{"", "..", "a/../b", ".", "a/./b", "a\x00b", "\xff", string(bytes.Repeat([]byte("k"), 1025))} {
		if checkKey(key) == nil {
			t.Errorf("%q is taken for a key", key)
		}
	}
	for _, key := range []string{"a", "a/b", "a/", "...", "..a/b..", "ü"} {
		if err := checkKey(key); err != nil {
			t.Errorf("%q: %v", key, err)
		}
	}
}
