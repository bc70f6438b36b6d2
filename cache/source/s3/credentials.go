package s3

import (
	"context"
	"sync"
	"time"

	miniocreds "github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

// signer gives minio-go the credentials as they are now. minio-go asks IsExpired before each request,
// and keeps what it got until that says true.
type signer struct {
	reader   *credentials.Reader
	platform *platform

	mu     sync.Mutex
	last   credentials.Value
	looked time.Time // when last was found to be still right
	now    func() time.Time
}

// lookEvery is how often the files or the environment are looked at. minio-go asks twice for each request, which
// for requests of small objects would be a sixth of the worker's system calls.
const lookEvery = 100 * time.Millisecond

func newSigner(c source.Config) (*signer, error) {
	s := &signer{now: time.Now}
	s.platform = newPlatform(c.URL, func() time.Time { return s.now() })
	var err error
	s.reader, err = credentials.Open(c, credentials.Options{Env: credentials.S3Env, Ambient: s.platform.get})
	return s, err
}

// IsExpired implements credentials.Provider of minio-go.
func (s *signer) IsExpired() bool {
	if s.reader.FromPlatform() {
		return s.platform.stale(s.value())
	}
	now := s.now()
	s.mu.Lock()
	looked := s.looked
	s.mu.Unlock()
	if !looked.IsZero() && now.Sub(looked) < lookEvery {
		return false
	}
	v, err := s.reader.Get(context.Background()) // files or the environment: nothing to wait for
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil || v != s.last {
		return true
	}
	s.looked = now
	return false
}

// refused says that the store does not take the credentials: they are looked at again before the next request.
func (s *signer) refused() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.looked = time.Time{}
}

// value is what requests are signed with.
func (s *signer) value() credentials.Value {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// RetrieveWithCredContext implements credentials.Provider of minio-go.
func (s *signer) RetrieveWithCredContext(cc *miniocreds.CredContext) (miniocreds.Value, error) {
	ctx := context.Background()
	if cc != nil && cc.Context != nil {
		ctx = cc.Context
	}
	v, err := s.reader.Get(ctx)
	if err != nil {
		return miniocreds.Value{}, err
	}
	s.mu.Lock()
	s.last, s.looked = v, time.Time{}
	s.mu.Unlock()
	kind := miniocreds.SignatureV4
	if v == (credentials.Value{}) {
		kind = miniocreds.SignatureAnonymous
	}
	return miniocreds.Value{AccessKeyID: v.AccessKeyID, SecretAccessKey: v.AccessKeySecret, SessionToken: v.SessionToken, SignerType: kind}, nil
}

// Retrieve implements credentials.Provider of minio-go.
func (s *signer) Retrieve() (miniocreds.Value, error) { return s.RetrieveWithCredContext(nil) }
