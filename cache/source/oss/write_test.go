package oss

import (
	"bytes"
	"errors"
	"maps"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/oss/osstest"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
)

func TestWriter(t *testing.T) {
	_, b := start(t, osstest.Options{}, deps{})
	sourcetest.Writer(t, b, false)
}

// A conditional put whose answer is lost is tried again, and meets an object with its very bytes: its own, and
// so it succeeded, or another writer's, and so it did not. Two writers are never told both that they were first.
func TestOfTwoConditionalPutsOfTheSameBytesOneIsTold(t *testing.T) {
	for size, op := range map[int]string{0: "PutObject", 5000: "PutObject", 3*smallPart + 1: "CompleteMultipartUpload"} {
		s, b := start(t, osstest.Options{}, deps{part: smallPart})
		attributes := source.Attributes{Metadata: map[string]string{"k": "v"}}
		put := func(key string) (source.Object, error) {
			return b.PutObject(t.Context(), key, bytes.NewReader(bytesOf(size)), int64(size), source.WriteOptions{Attributes: attributes, IfAbsent: true})
		}
		f := s.Inject(osstest.Fault{Kind: osstest.LoseAnswer, Op: op, Times: 1})
		o, err := put("k")
		if err != nil || f.Hits() != 1 {
			t.Errorf("%d bytes: done, and not told: %v", size, err)
		}
		at, a, err := b.Describe(t.Context(), "k")
		if err != nil || at.Version != o.Version || !maps.Equal(a.Metadata, attributes.Metadata) {
			t.Errorf("%d bytes: described as %+v with %v, %v; put as %+v", size, at, a, err, o)
		}
		f = s.Inject(osstest.Fault{Kind: osstest.Reset, Op: op, Times: 1})
		if _, err := put("k"); !errors.Is(err, source.ErrChanged) || f.Hits() != 1 {
			t.Errorf("%d bytes: another was first with the same bytes: %v", size, err)
		}
		if left := s.Uploads(testBucket); left != 0 {
			t.Errorf("%d uploads are left", left)
		}
	}
}
