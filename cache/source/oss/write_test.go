package oss

import (
	"testing"

	"github.com/stepcache/stepcache/cache/source/oss/osstest"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
)

func TestWriter(t *testing.T) {
	_, b := start(t, osstest.Options{}, deps{})
	sourcetest.Writer(t, b, false)
}
