package s3_test

import (
	"testing"

	"github.com/stepcache/stepcache/cache/source/s3"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
	"github.com/stepcache/stepcache/test/bucket"
)

func TestWriter(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	b, err := s3.Open(t.Context(), fixture(t, s))
	if err != nil {
		t.Fatal(err)
	}
	sourcetest.Writer(t, b, true)
}
