package s3

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/source"
)

// answer is what the transport saw of a call's last request: minio-go keeps neither the status of a
// success, nor Retry-After, nor the type of a network error, and fails on an Expires that is no date.
type answer struct {
	status       int
	strange      bool // a 404 that is not S3's: minio-go takes each for a key that is not there
	doubtful     bool // a 404 to HEAD that may not be S3's
	after        time.Duration
	expires      string // taken out of the header
	uncompressed bool
	err          error
	// end, once set, is called instead of sending another request, which is one for the next page.
	end context.CancelFunc
}

type answerKey struct{}

// watch lets the transport note what it sees during one call.
func watch(ctx context.Context) (context.Context, *answer) {
	a := &answer{}
	return context.WithValue(ctx, answerKey{}, a), a
}

// transport notes answers.
type transport struct{ next http.RoundTripper }

func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	a, ok := r.Context().Value(answerKey{}).(*answer)
	if ok && a.end != nil {
		a.end() // minio-go takes no pause before it passes on this error alone
		return nil, context.Canceled
	}
	resp, err := t.next.RoundTrip(r)
	if ok {
		*a = answer{err: err}
		if err == nil {
			a.status, a.after, a.uncompressed = resp.StatusCode, retryAfter(resp), resp.Uncompressed
			a.expires = resp.Header.Get("Expires")
			resp.Header.Del("Expires")
			switch {
			case resp.StatusCode != http.StatusNotFound:
			case r.Method == http.MethodHead:
				// There is no body to tell, only a type, which versitygw up to 1.2 has as well.
				a.doubtful = strings.HasPrefix(resp.Header.Get("Content-Type"), "text/")
			default:
				a.strange = strange(resp)
			}
		}
	}
	return resp, err
}

// maxError bounds what is read of an error's document.
const maxError = 64 << 10

// strange says whether an answer, which it leaves readable, has something else than S3's document of an error: that of a
// proxy without its store, for one.
func strange(r *http.Response) bool {
	body := r.Body
	text, err := io.ReadAll(io.LimitReader(body, maxError))
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(text), body), body}
	if err != nil || len(bytes.TrimSpace(text)) == 0 {
		return false
	}
	var e struct {
		XMLName xml.Name `xml:"Error"`
		Code    string
	}
	return xml.Unmarshal(text, &e) != nil || e.Code == ""
}

// retryAfter reads seconds; the other form, a date, is not used by object stores.
func retryAfter(r *http.Response) time.Duration {
	seconds, err := strconv.Atoi(r.Header.Get("Retry-After"))
	if err != nil || seconds < 0 {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// fail turns an error of minio-go into the contract's.
func (b *Bucket) fail(ctx context.Context, op, key string, seen *answer, err error) error {
	e := &source.Error{Op: op, Name: b.object(key), Err: err, After: seen.after}
	var known *source.Error
	if errors.As(err, &known) { // credentials
		return known
	}
	if kind := source.ContextKind(ctx); kind != nil {
		e.Kind, e.Err = kind, ctx.Err()
		return e
	}
	var r minio.ErrorResponse
	if !errors.As(err, &r) {
		e.Hint, e.Kind = b.network(seen)
		if seen.err != nil {
			e.Err = seen.err
		}
		return e
	}
	if seen.strange && seen.status == r.StatusCode {
		e.Kind, e.Err = source.ErrUnavailable, errors.New("404 Not Found, in words that are not S3's")
		e.Hint = fmt.Sprintf("is %s the endpoint of an S3 store, and does the store behind it run?", b.core.EndpointURL().Host)
		return e
	}
	if e.Hint, e.Kind = b.kind(r); e.Kind == source.ErrDenied {
		b.signer.refused()
	}
	// minio-go refuses some requests itself, without an answer.
	if e.Refusable(r.Code) && seen.err == nil && seen.status == r.StatusCode {
		endpoint := b.core.EndpointURL()
		v := b.signer.value()
		e.Refusal = source.Refused(r.StatusCode, r.Code, r.Message, endpoint.Host, endpoint.Hostname(), v.AccessKeyID, v.AccessKeySecret, v.SessionToken)
	}
	e.Err = fmt.Errorf("%s: %w", r.Code, err)
	if r.StatusCode == http.StatusNotImplemented && r.Code == "NotImplemented" { // and not minio-go's "501 …" for what is not S3's
		e.Err = fmt.Errorf("%w: %w", e.Err, errors.ErrUnsupported)
	}
	return e
}

// network judges an error without an answer, or with one that could not be read.
func (b *Bucket) network(seen *answer) (hint string, kind error) {
	if hint, kind := b.transport.Untrusted(seen.err); kind != nil {
		return hint, kind
	}
	var plain tls.RecordHeaderError
	var dns *net.DNSError
	switch {
	case errors.As(seen.err, &plain):
		return "the store does not speak TLS: write http:// in front of the endpoint", source.ErrInvalid
	case errors.As(seen.err, &dns) && dns.IsNotFound:
		return "the endpoint's name is not known: check endpoint and region", source.ErrUnavailable
	case errors.Is(seen.err, io.EOF) && b.plain():
		return "the store closed the connection without an answer: if it speaks TLS, leave http:// out of the endpoint", source.ErrUnavailable
	case seen.err == nil && seen.status == http.StatusOK:
		return "the answer is cut short or not S3's", source.ErrUnavailable
	}
	return "", source.ErrUnavailable
}

// kind judges an answer by its code, and by its status where the code is another store's own.
func (b *Bucket) kind(r minio.ErrorResponse) (hint string, kind error) {
	switch r.Code {
	case "NoSuchKey", "NoSuchVersion":
		return "", source.ErrNotFound
	case "NoSuchUpload":
		return "", source.ErrNoUpload
	case "InvalidPart", "InvalidPartOrder":
		return "", source.ErrBadPart
	case "EntityTooSmall":
		return "", source.ErrPartTooSmall
	case "ConditionalRequestConflict": // another write was under way: the same again may be decided
		return "", source.ErrUnavailable
	case "NoSuchBucket":
		return b.bucketHint(), source.ErrNoBucket
	case "PreconditionFailed":
		return "", source.ErrChanged
	case "SlowDown", "SlowDownRead", "SlowDownWrite", "TooManyRequests", "RequestLimitExceeded", "Throttling", "ThrottlingException":
		return "", source.ErrThrottled
	case "RequestTimeTooSkewed":
		return "set this machine's clock", source.ErrDenied
	case "AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "InvalidRegion", "IllegalLocationConstraintException":
		if r.Region != "" && r.Region != b.config.Region {
			return fmt.Sprintf("the bucket is in region %s: set region: %s", r.Region, r.Region), source.ErrInvalid
		}
		return "the bucket is in another region or behind another endpoint: set region and endpoint", source.ErrInvalid
	// Of Volcengine TOS, Tencent COS, Huawei OBS and Alibaba OSS.
	case "InvalidPathAccess", "PathStyleDomainForbidden", "VirtualHostDomainRequired", "SecondLevelDomainForbidden":
		return "the store wants the bucket's name in the host: set addressingStyle: Virtual", source.ErrInvalid
	case "InvalidObjectState":
		return "the object is archived: restore it first", source.ErrInvalid
	case "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted":
		if r.StatusCode != 0 { // minio-go's own InternalError is about an answer it cannot use
			return "", source.ErrUnavailable
		}
	case "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
		"XAdminUserNotFound": // of versitygw, with status 404
		return b.credentialsHint(r.Code), source.ErrDenied
	}
	switch s := r.StatusCode; {
	case s == http.StatusNotFound && (r.Code == "" || r.Code == "NotFound"):
		return "", source.ErrNotFound
	case s == http.StatusNotFound: // of something else than the key: never that it is not there
		return "", source.ErrInvalid
	case s == http.StatusPreconditionFailed:
		return "", source.ErrChanged
	case s == http.StatusUnauthorized, s == http.StatusForbidden:
		return b.credentialsHint(r.Code), source.ErrDenied
	case s == http.StatusTooManyRequests:
		return "", source.ErrThrottled
	case s == http.StatusRequestTimeout, s >= 500 && s != http.StatusNotImplemented:
		return "", source.ErrUnavailable
	case s == http.StatusMovedPermanently, s == http.StatusTemporaryRedirect:
		return "the bucket is in another region or behind another endpoint: set region and endpoint", source.ErrInvalid
	case s == http.StatusBadRequest && b.plain() && strings.HasPrefix(r.Code, "400"): // not S3's XML
		return "if the store speaks TLS, leave http:// out of the endpoint", source.ErrInvalid
	}
	return "", source.ErrInvalid
}

func (b *Bucket) plain() bool { return b.core.EndpointURL().Scheme == "http" }

func (b *Bucket) bucketHint() string {
	return "make the bucket, or correct its name, endpoint or region"
}

func (b *Bucket) credentialsHint(code string) string {
	where := "the environment"
	switch {
	case b.config.Anonymous:
		return "requests are unsigned: set credentialsSecretRef instead of anonymous, or make the bucket public"
	case b.config.CredentialsDir != "":
		where = b.config.CredentialsDir
	case b.config.Ambient:
		where = "the environment or of the platform"
	}
	if code == "AccessDenied" {
		return fmt.Sprintf("allow the access key of %s to do this in the bucket's policy", where)
	}
	return fmt.Sprintf("check the access key of %s", where)
}
