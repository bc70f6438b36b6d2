package dataset

import (
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// However long an API server was away, nobody waits long once it is back.
func TestAPassThatFailedIsTriedAgainSoon(t *testing.T) {
	limiter := Queue().RateLimiter
	var last time.Duration
	for range 40 {
		last = limiter.When(reconcile.Request{})
	}
	if last != 30*time.Second {
		t.Errorf("after 40 failures it waits %v", last)
	}
	limiter.Forget(reconcile.Request{})
	if first := limiter.When(reconcile.Request{}); first != 5*time.Millisecond {
		t.Errorf("after a success it waits %v", first)
	}
}
