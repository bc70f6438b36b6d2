package credentials

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/source"
)

// Transport sends the requests for a bucket, and judges the certificates that its store shows.
type Transport struct {
	plain    *http.Transport
	answered atomic.Bool // the store did, so that its certificate was right
}

// NewTransport returns a Transport that sends its requests with t.
func NewTransport(t *http.Transport) *Transport { return &Transport{plain: t} }

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.plain.RoundTrip(r)
	if err == nil {
		t.answered.Store(true)
	}
	return resp, err
}

// Untrusted judges an error of a request where it is about the store's certificate; else there is no kind.
func (t *Transport) Untrusted(err error) (hint string, kind error) {
	var refused *tls.CertificateVerificationError
	if !errors.As(err, &refused) {
		return "", nil
	}
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	// What was right once will be again: a certificate that is renewed too late, or one backend of several.
	kind = source.ErrUnavailable
	switch {
	case errors.As(err, &authority):
		hint = "the store's certificate is not trusted: add its authority to the system's, or write http:// for a connection without TLS"
	case errors.As(err, &name):
		hint = "give the endpoint by a name that is in the store's certificate"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "renew the store's certificate, and check the clock of this machine", kind
	default:
		return "the store's certificate is not valid: give it another", kind
	}
	if !t.answered.Load() {
		kind = source.ErrInvalid
	}
	return hint, kind
}
