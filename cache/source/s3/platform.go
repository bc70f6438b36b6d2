package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	miniocreds "github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sync/singleflight"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

const (
	platformTimeout = 5 * time.Second
	// renewPause is how long after a renewal that failed the next is tried, while there are credentials.
	renewPause = 10 * time.Second
)

// platform gives the temporary credentials of an instance or pod identity. It keeps them until they end, and asks for
// others before that; however many requests need new ones, they are asked for once. minio-go's own keeping of them
// would hold a mutex meanwhile, for which every other request waits, and drops those that it cannot replace in time.
type platform struct {
	name    string // of the source, for errors
	client  *http.Client
	timeout time.Duration
	now     func() time.Time
	flight  singleflight.Group

	mu    sync.Mutex
	value credentials.Value
	until time.Time // when value ends
	renew time.Time // when others are asked for
}

func newPlatform(name string, now func() time.Time) *platform {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = source.CredentialsProxy(http.ProxyFromEnvironment)
	return &platform{name: name, client: &http.Client{Transport: &transport{next: t}}, timeout: platformTimeout, now: now}
}

// get waits for new credentials only where there are none that still last.
func (p *platform) get(ctx context.Context) (credentials.Value, error) {
	v, lasts, due := p.held()
	if lasts && !due {
		return v, nil
	}
	done := p.flight.DoChan("", func() (any, error) {
		// Not of the caller's context: others wait for the same answer.
		ctx, cancel := context.WithTimeout(context.Background(), p.timeout)
		defer cancel()
		return p.ask(ctx)
	})
	if lasts {
		return v, nil
	}
	select {
	case <-ctx.Done():
		return credentials.Value{}, ctx.Err()
	case r := <-done:
		return r.Val.(credentials.Value), r.Err
	}
}

// stale says whether there is something else to sign requests with than v, or should be.
func (p *platform) stale(v credentials.Value) bool {
	held, lasts, due := p.held()
	return v != held || !lasts || due
}

func (p *platform) held() (v credentials.Value, lasts, due bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	return p.value, now.Before(p.until), !now.Before(p.renew)
}

func (p *platform) ask(ctx context.Context) (credentials.Value, error) {
	ctx, seen := watch(ctx)
	got, err := new(miniocreds.IAM).RetrieveWithCredContext(&miniocreds.CredContext{Context: ctx, Client: p.client})
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if err != nil {
		p.renew = now.Add(renewPause)
		if ctx.Err() == nil && refuses(seen, err) {
			return credentials.Value{}, err
		}
		return credentials.Value{}, &source.Error{Op: "get credentials of", Name: p.name, Kind: source.ErrUnavailable,
			Err:  fmt.Errorf("the platform gives none now: %w", err),
			Hint: "has the pod or machine an identity, and does what gives it its credentials run?"}
	}
	p.value = credentials.Value{AccessKeyID: got.AccessKeyID, AccessKeySecret: got.SecretAccessKey, SessionToken: got.SessionToken}
	p.until = got.Expiration
	p.renew = p.until.Add(-p.until.Sub(now) / 5)
	return p.value, nil
}

// refuses says whether an error is the platform's refusal, or one for which it was not even asked.
func refuses(seen *answer, err error) bool {
	var sts miniocreds.ErrorResponse
	if errors.As(err, &sts) && (sts.STSError.Code == "Throttling" || sts.STSError.Code == "IDPCommunicationError") {
		return false // although with status 400
	}
	switch s := seen.status; {
	case s == http.StatusRequestTimeout, s == http.StatusTooManyRequests:
		return false
	default:
		return seen.err == nil && (s == 0 || s/100 == 4)
	}
}
