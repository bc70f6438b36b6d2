package catalog

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// Whatever the bytes: Open refuses them, or every method works on every node.
func FuzzOpen(f *testing.F) {
	f.Add(awkward(f).Encoded())
	f.Add(build(f, root).Encoded())
	f.Add(build(f, root, objects("a", "a/b", "c//", "d/")).Encoded())
	f.Fuzz(func(t *testing.T, encoded []byte) {
		s, err := Open(encoded)
		if err != nil {
			return
		}
		use(t, s)
		if again, err := Open(bytes.Clone(s.Encoded())); err != nil || again.Digest() != s.Digest() {
			t.Errorf("opened once more: %v", err)
		}
	})
}

// Whatever the keys: each is shown under its own name, or a directory marker, or counted; and their order
// makes no difference. Keys are divided by 0xfe; the first byte of each gives its size and time.
func FuzzKeys(f *testing.F) {
	f.Add("\x01a\xfe\x01a/b\xfe\x00c/\xfe\x05d/\xfe\x01e//f\xfe\x01../g\xfe\x02a/b", "")
	f.Add("\x01/\xfe\x01//\xfe\x01.\xfe\x00/a/\xfe\x01n\x00\xfe\x01\xff/\xff", "p/")
	f.Add("\x01"+strings.Repeat("k/", 511)+"kk\xfe\x01"+strings.Repeat("n", 256), "q")
	f.Fuzz(func(t *testing.T, keys, prefix string) {
		if len(keys) > 1<<14 {
			return
		}
		mounts := []Mount{{URL: "s3://b", Prefix: prefix, Path: "/m"}}
		folder := prefix
		if folder != "" && !strings.HasSuffix(folder, "/") {
			folder += "/"
		}
		var given []source.Object
		for k := range strings.SplitSeq(keys, "\xfe") {
			if k == "" {
				continue
			}
			sum := md5.Sum([]byte(k))
			given = append(given, source.Object{
				Key: folder + k[1:], Size: int64(k[0] & 3), Version: hex.EncodeToString(sum[:]), ModTime: time.Unix(int64(k[0]>>2), 0).UTC(),
			})
		}
		s := build(t, mounts, given)
		use(t, s)
		backward := slices.Clone(given)
		slices.Reverse(backward)
		if build(t, mounts, backward).Digest() != s.Digest() {
			t.Fatal("the order of the listing makes a difference")
		}

		distinct := map[string]bool{} // versions of objects, without markers that are nothing but a directory
		for _, o := range given {
			if rel := o.Key[len(folder):]; o.Size > 0 || rel != "" && (!strings.HasSuffix(rel, "/") || badKey("/m", rel[:len(rel)-1]) != "") {
				distinct[o.Key+"\x00"+o.Version] = true
			}
		}
		var counted, repeated int64
		for _, n := range skipped(t, s) {
			counted += n
		}
		repeated = int64(len(given) - len(distinct)) // at most: keys that are counted are counted each time
		if shown := s.Files() + counted; shown < int64(len(distinct)) || shown > int64(len(distinct))+repeated {
			t.Errorf("%d files and %d counted of %d objects (%d repeated): %+v", s.Files(), counted, len(distinct), repeated, s.Skipped())
		}
		s.Walk(0, func(i Index) bool {
			_, o, _ := s.Object(i)
			if s.Path(i) != "/m/"+o.Key[len(folder):] || !slices.ContainsFunc(given, func(g source.Object) bool {
				return g.Key == o.Key && g.Version == o.Version && g.Size == o.Size && g.ModTime.Equal(o.ModTime)
			}) {
				t.Errorf("%q is %+v", s.Path(i), o)
			}
			return true
		})
	})
}
