package oss

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	sdk "github.com/aliyun/aliyun-oss-go-sdk/oss"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

// fail makes a source.Error of what the SDK or the network said.
func (b *Bucket) fail(ctx context.Context, r request, resp *sdk.Response, err error) error {
	var already *source.Error // from the credentials
	if errors.As(err, &already) {
		return already
	}
	e := &source.Error{Op: r.op, Name: b.name(r.key), Kind: source.ErrUnavailable}
	if resp != nil {
		var service sdk.ServiceError
		foreign := !errors.As(err, &service)
		if foreign {
			service = sdk.ServiceError{StatusCode: resp.StatusCode, Message: "the answer is not one of OSS"}
			e.Hint = fmt.Sprintf("is %s the endpoint of an OSS bucket?", b.endpoint.host)
		}
		hint, kind := b.kind(service, resp.Headers)
		if e.Kind = kind; hint != "" {
			e.Hint = hint
		}
		if kind == source.ErrNotFound && foreign && r.method != http.MethodHead {
			e.Kind = source.ErrUnavailable // a proxy that has lost its store says nothing of the object
		}
		e.Err, e.After = said(service), retryAfter(resp.Headers)
		if e.Refusable(service.Code) {
			v, _ := b.credentials.Get(ctx) // those of a platform are kept; without any, the request was not signed
			e.Refusal = source.Refused(service.StatusCode, service.Code, service.Message, b.endpoint.host, v.AccessKeyID, v.AccessKeySecret, v.SessionToken)
		}
		return e
	}
	if kind := source.ContextKind(ctx); kind != nil {
		e.Kind, e.Err = kind, ctx.Err()
		return e
	}
	// The URL that net/http puts in front says again what Name says.
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var dns *net.DNSError
	hint, kind := b.transport.Untrusted(err)
	switch {
	case kind != nil:
		e.Kind, e.Hint = kind, hint
	case errors.Is(err, http.ErrSchemeMismatch):
		e.Kind, e.Hint = source.ErrInvalid, "the endpoint speaks plain HTTP: write http:// in front of it"
	case errors.As(err, &dns):
		e.Hint = fmt.Sprintf("check the endpoint %s; an -internal one resolves only inside its region", b.endpoint.host)
	}
	// As text: no type of the SDK leaves this folder.
	e.Err = errors.New(err.Error())
	return e
}

// said is what the store said, in one line and without what it quotes of the request.
func said(e sdk.ServiceError) error {
	var s strings.Builder
	fmt.Fprintf(&s, "status %d", e.StatusCode)
	if e.Code != "" {
		s.WriteString(" " + e.Code)
	}
	if e.Message != "" {
		s.WriteString(": " + strings.TrimRight(strings.Join(strings.Fields(e.Message), " "), "."))
	}
	if e.RequestID != "" {
		s.WriteString(" (request " + e.RequestID)
		if e.Ec != "" {
			s.WriteString(", EC " + e.Ec)
		}
		s.WriteString(")")
	}
	return errors.New(s.String())
}

// kind maps an error of the protocol to a sentinel error and a hint.
func (b *Bucket) kind(e sdk.ServiceError, h http.Header) (hint string, kind error) {
	switch e.Code {
	case "NoSuchUpload":
		return "", source.ErrNoUpload
	case "InvalidPart", "InvalidPartOrder":
		return "", source.ErrBadPart
	case "EntityTooSmall":
		return "", source.ErrPartTooSmall
	case "FileAlreadyExists":
		return "", source.ErrChanged
	case "NoSuchKey", "SymlinkTargetNotExist":
		return "", source.ErrNotFound
	case "NoSuchBucket":
		return fmt.Sprintf("check the bucket's name, and that it is in the region of %s", b.endpoint.host), source.ErrNoBucket
	// A range lies within the size of the version asked for: another is there now.
	case "PreconditionFailed", "InvalidRange":
		return "", source.ErrChanged
	case "InvalidAccessKeyId":
		return b.where(credentials.KeyID) + " is not known to the store: check it", source.ErrDenied
	case "SignatureDoesNotMatch":
		return b.where(credentials.KeySecret) + " does not belong to the access key's ID: check it", source.ErrDenied
	case "InvalidSecurityToken", "SecurityTokenExpired":
		return b.where(credentials.KeyToken) + " is not valid (any more): renew it together with the key", source.ErrDenied
	case "RequestTimeTooSkewed":
		hint = "set this machine's clock, which signs the requests"
		if at, err := http.ParseTime(h.Get("Date")); err == nil {
			hint += fmt.Sprintf(": the store's says %s", at.UTC().Format(time.DateTime))
		}
		return hint, source.ErrDenied
	case "InvalidArgument":
		if strings.Contains(e.Message, "signing region") {
			return fmt.Sprintf("the bucket at %s is not in region %s: correct region, or leave it out with an endpoint of OSS",
				b.endpoint.host, b.endpoint.region), source.ErrInvalid
		}
		return "", source.ErrInvalid
	case "AccessDenied":
		if e.Endpoint != "" && !strings.Contains(b.endpoint.host, e.Endpoint) {
			return fmt.Sprintf("the bucket is in another region: set endpoint to %s", e.Endpoint), source.ErrInvalid
		}
		if b.config.Anonymous {
			return "the bucket is not public: set credentialsSecretRef instead of anonymous", source.ErrDenied
		}
		return fmt.Sprintf("grant the key oss:ListObjects on the bucket and oss:GetObject on its objects (oss:PutObject, oss:DeleteObject to write); %s names it",
			b.where(credentials.KeyID)), source.ErrDenied
	case "InvalidObjectState":
		return "the object is archived: restore it, or allow real-time access of archived objects on the bucket", source.ErrInvalid
	// Transfers that the store found broken or too slow; another try is a new transfer.
	case "InvalidDigest", "IncompleteBody", "RequestTimeout":
		return "", source.ErrUnavailable
	}
	switch {
	case e.StatusCode == http.StatusTooManyRequests, h.Get("x-oss-qos-delay-time") != "",
		e.StatusCode == http.StatusServiceUnavailable && throttles(e.Code):
		return "", source.ErrThrottled
	case e.StatusCode >= 500, e.StatusCode == http.StatusRequestTimeout:
		return "", source.ErrUnavailable
	case e.StatusCode == http.StatusNotFound && e.Code == "":
		return "", source.ErrNotFound
	case e.StatusCode == http.StatusPreconditionFailed:
		return "", source.ErrChanged
	case e.StatusCode == http.StatusUnauthorized, e.StatusCode == http.StatusForbidden:
		return "", source.ErrDenied
	}
	return "", source.ErrInvalid
}

// throttles says whether a 503 asks for fewer requests: QpsLimitExceeded, DownloadTrafficRateLimitExceeded,
// SlowDown and their like.
func throttles(code string) bool {
	return code == "SlowDown" || strings.HasSuffix(code, "LimitExceeded") || strings.HasPrefix(code, "TooMany")
}

func retryAfter(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return time.Duration(n) * time.Second
}

// where says in which place the user finds one of the credentials.
func (b *Bucket) where(key string) string {
	if dir := b.config.CredentialsDir; dir != "" {
		name := key
		if mapped := b.config.CredentialKeys[key]; mapped != "" {
			name = mapped
		}
		return fmt.Sprintf("key %s of the Secret (in %s)", name, dir)
	}
	for _, env := range credentials.OSSEnv {
		if b.deps.getenv(env.ID) != "" {
			return map[string]string{credentials.KeyID: env.ID, credentials.KeySecret: env.Secret, credentials.KeyToken: env.Token}[key] +
				" in the environment"
		}
	}
	return map[string]string{credentials.KeyID: "the access key", credentials.KeySecret: "the secret",
		credentials.KeyToken: "the session token"}[key] + " of this machine's or pod's identity"
}

// strange is an answer that says success but is not to the question: something before the store, or the
// store itself, does not keep to the protocol.
func (b *Bucket) strange(r request, a *answer, what, hint string) error {
	if id := a.header.Get("x-oss-request-id"); id != "" {
		what += " (request " + id + ")"
	}
	return &source.Error{Op: r.op, Name: b.name(r.key), Kind: source.ErrInvalid,
		Err: errors.New("the answer cannot be used: " + what), Hint: hint}
}

// broken is a failure while an answer's body was read, of which got bytes had come.
func (b *Bucket) broken(ctx context.Context, r request, got int64, err error) error {
	e := &source.Error{Op: r.op, Name: b.name(r.key), Kind: source.ErrUnavailable}
	switch kind := source.ContextKind(ctx); {
	case kind != nil:
		e.Kind, e.Err = kind, ctx.Err()
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		e.Err = fmt.Errorf("the answer ended early, after %d bytes", got)
	default:
		e.Err = fmt.Errorf("after %d bytes: %v", got, err)
	}
	return e
}
