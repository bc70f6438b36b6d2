package oss

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	sdk "github.com/aliyun/aliyun-oss-go-sdk/oss"

	"github.com/stepcache/stepcache/cache/source/credentials"
)

// request is one request to the bucket.
type request struct {
	op     string // for errors: list, stat, get, put, delete
	method string
	key    string            // empty: on the bucket itself
	params map[string]string // of the query
	header map[string]string
	body   io.Reader // of length bytes
	length int64
	quiet  time.Duration // other than the bucket's
}

// answer is a request's good answer. Whoever gets one closes it.
type answer struct {
	status int
	header http.Header
	body   io.ReadCloser
	watch  *watch
}

// Read reads the body. Only the time spent in here counts as waiting for the store; the reader may take its own.
func (a *answer) Read(p []byte) (int, error) {
	a.watch.progress()
	n, err := a.body.Read(p)
	a.watch.pause()
	return n, err
}

func (a *answer) close() {
	a.body.Close()
	a.watch.stop()
}

// do sends one request, signed with the credentials as they are now, and returns its answer once its
// header is there and says success.
func (b *Bucket) do(ctx context.Context, r request) (*answer, error) {
	if b.config.Ambient {
		// The SDK asks without a context; what is got here is kept until then.
		if _, err := b.credentials.Get(ctx); err != nil {
			return nil, err
		}
	}
	quiet := b.deps.quiet
	if r.quiet > 0 {
		quiet = r.quiet
	}
	w := newWatch(ctx, quiet)
	options := []sdk.Option{sdk.WithContext(w.ctx)}
	for k, v := range r.header {
		options = append(options, sdk.SetHeader(k, v))
	}
	params := make(map[string]any, len(r.params))
	for k, v := range r.params {
		params[k] = v
	}
	var body io.Reader
	if r.length > 0 {
		// Of this type the SDK can tell the length; of any other it would send chunks.
		body = &io.LimitedReader{R: watchedReader{r.body, w}, N: r.length}
	}
	resp, err := b.bucket.Do(r.method, r.key, params, options, body, nil)
	if err != nil {
		if resp != nil {
			resp.Body.Close()
		}
		err = b.fail(ctx, w, r, resp, err)
		w.stop()
		return nil, err
	}
	w.pause()
	return &answer{status: resp.StatusCode, header: resp.Headers, body: resp.Body, watch: w}, nil
}

// signer gives the SDK the credentials of the moment, so that a rotated Secret needs no restart.
type signer struct{ reader *credentials.Reader }

// GetCredentialsE implements sdk.CredentialsProviderE.
func (s signer) GetCredentialsE() (sdk.Credentials, error) {
	v, err := s.reader.Get(context.Background())
	return keys(v), err
}

// GetCredentials implements sdk.CredentialsProvider; the SDK calls GetCredentialsE where it exists.
func (s signer) GetCredentials() sdk.Credentials {
	k, _ := s.GetCredentialsE()
	return k
}

type keys credentials.Value

func (k keys) GetAccessKeyID() string     { return k.AccessKeyID }
func (k keys) GetAccessKeySecret() string { return k.AccessKeySecret }
func (k keys) GetSecurityToken() string   { return k.SessionToken }

// unsigned takes the signature off requests, which the SDK makes even without a key.
type unsigned struct{ http.RoundTripper }

func (u unsigned) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	for _, h := range []string{"Authorization", "x-oss-content-sha256", "x-oss-security-token"} {
		r.Header.Del(h)
	}
	return u.RoundTripper.RoundTrip(r)
}

// errQuiet is the cause of a request's end when it made no progress.
var errQuiet = errors.New("no progress")

// watch ends a request that makes no progress. A bound on the whole request would have to fit the largest
// object on the slowest line; this one need not.
type watch struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	quiet  time.Duration
	timer  *time.Timer
}

func newWatch(ctx context.Context, quiet time.Duration) *watch {
	w := &watch{quiet: quiet}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	w.timer = time.AfterFunc(quiet, func() { w.cancel(errQuiet) })
	return w
}

func (w *watch) progress() { w.timer.Reset(w.quiet) }

// pause stops counting until the next progress.
func (w *watch) pause() { w.timer.Stop() }

func (w *watch) stop() {
	w.timer.Stop()
	w.cancel(nil)
}

// timedOut says whether the watch ended the request.
func (w *watch) timedOut() bool { return context.Cause(w.ctx) == errQuiet }

// watchedReader is a request's body. Being read is progress: the connection took what came before.
type watchedReader struct {
	io.Reader
	watch *watch
}

func (r watchedReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.watch.progress()
	return n, err
}
