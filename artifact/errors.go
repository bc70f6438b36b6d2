package artifact

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/source"
)

// answer is what the transport saw of a call's last request: minio-go keeps neither Retry-After nor the
// type of a network error.
type answer struct {
	status int
	after  time.Duration
	err    error
}

type answerKey struct{}

func watch(ctx context.Context) (context.Context, *answer) {
	a := &answer{}
	return context.WithValue(ctx, answerKey{}, a), a
}

type noting struct{ next http.RoundTripper }

func (n noting) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := n.next.RoundTrip(r)
	if a, ok := r.Context().Value(answerKey{}).(*answer); ok {
		*a = answer{err: err}
		if err == nil {
			a.status = resp.StatusCode
			if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
				a.after = time.Duration(s) * time.Second
			}
		}
	}
	return resp, err
}

// fail turns an error of minio-go into one of package source, whose Kind decides about retries.
func (b *bucket) fail(ctx context.Context, op, key string, seen *answer, err error) error {
	var known *source.Error
	if errors.As(err, &known) { // credentials
		return known
	}
	e := &source.Error{Op: op, Name: b.object(key), Err: err, After: seen.after}
	if kind := source.ContextKind(ctx); kind != nil {
		e.Kind, e.Err = kind, ctx.Err()
		return e
	}
	var r minio.ErrorResponse
	if errors.As(err, &r) {
		e.Hint, e.Kind = b.kind(r)
		return e
	}
	e.Kind = source.ErrUnavailable
	var certificate *tls.CertificateVerificationError
	var plain tls.RecordHeaderError
	var dns *net.DNSError
	switch {
	case errors.As(seen.err, &plain):
		e.Kind, e.Hint = source.ErrInvalid, "the gateway does not speak TLS: write http:// in front of the endpoint"
	case errors.As(seen.err, &certificate):
		e.Kind, e.Hint = source.ErrInvalid, "the gateway's certificate is not trusted"
	case errors.As(seen.err, &dns) && dns.IsNotFound:
		e.Hint = "is there a Dataset of this name with access: ReadWrite in this namespace?"
	}
	if seen.err != nil {
		e.Err = seen.err
	}
	return e
}

// kind judges an answer by its code, and by its status where the code tells nothing.
func (b *bucket) kind(r minio.ErrorResponse) (hint string, kind error) {
	switch r.Code {
	case "NoSuchKey", "NoSuchVersion", "NoSuchUpload":
		return "", source.ErrNotFound
	case "NoSuchBucket":
		return "is there a Dataset of this name with access: ReadWrite?", source.ErrNoBucket
	case "PreconditionFailed", "InvalidRange":
		return "the object was replaced while it was read", source.ErrChanged
	case "SlowDown", "TooManyRequests", "RequestLimitExceeded", "Throttling":
		return "", source.ErrThrottled
	case "RequestTimeTooSkewed":
		return "set the node's clock", source.ErrDenied
	case "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken":
		return "check the keys of " + b.keysFrom, source.ErrDenied
	case "BadDigest", "XAmzContentSHA256Mismatch":
		return "the file changed while it was sent, or the network damages data", source.ErrUnavailable
	case "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted":
		return "", source.ErrUnavailable
	}
	switch s := r.StatusCode; {
	case s == http.StatusNotFound:
		return "", source.ErrNotFound
	case s == http.StatusPreconditionFailed, s == http.StatusRequestedRangeNotSatisfiable:
		return "", source.ErrChanged
	case s == http.StatusUnauthorized, s == http.StatusForbidden:
		return "check the keys of " + b.keysFrom, source.ErrDenied
	case s == http.StatusTooManyRequests:
		return "", source.ErrThrottled
	case s == http.StatusRequestTimeout, s >= 500 && s != http.StatusNotImplemented:
		return "", source.ErrUnavailable
	}
	return "", source.ErrInvalid
}
