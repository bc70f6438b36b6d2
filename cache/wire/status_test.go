package wire

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

func TestEveryStatusComesBackAsItsError(t *testing.T) {
	if OK.Err("x") != nil || StatusOf(nil) != OK {
		t.Fatal("OK is an error")
	}
	for s := NotOwner; s <= Late; s++ {
		err := s.Err("s3://b/k: no luck")
		if err == nil || err.Error() != "s3://b/k: no luck" {
			t.Errorf("status %d: %v", s, err)
		}
		if got := StatusOf(fmt.Errorf("outer: %w", err)); got != s {
			t.Errorf("status %d became %d", s, got)
		}
		if s.Err("").Error() == "" || s.String() == "unknown status" {
			t.Errorf("status %d has no text", s)
		}
	}
	if err := Status(250).Err("from the future"); !errors.Is(err, ErrInternal) {
		t.Errorf("unknown status: %v", err)
	}
}

func TestStatusOfOtherErrors(t *testing.T) {
	for err, want := range map[error]Status{
		context.DeadlineExceeded: Late,
		context.Canceled:         Unavailable,
		errors.New("a bug"):      Internal,
		source.ErrReadOnly:       Invalid,
		fmt.Errorf("%w: %w", source.ErrUnavailable, source.ErrChanged):        Changed,
		fmt.Errorf("%w: %w", source.ErrUnavailable, context.DeadlineExceeded): Unavailable, // the bucket's, not this worker's
	} {
		if got := StatusOf(err); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
	if n := len(Text(strings.Repeat("x", 1<<20))); n != MaxMessage {
		t.Errorf("message of %d bytes", n)
	}
}
