package credentials

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// KeyAuthorities is the key of a Secret with the certificates (PEM) of authorities that the store's may be of, beside the
// system's. A Secret need not have it.
const KeyAuthorities = "ca.crt"

// maxAuthorities bounds what is read of them: no Secret holds more.
const maxAuthorities = 1 << 20

// lookEvery is how often their file is looked at.
const lookEvery = 100 * time.Millisecond

// Transport sends the requests for a bucket over connections that trust the system's authorities and the Secret's, and
// judges the certificates that are not trusted.
type Transport struct {
	name     string          // of the source, for errors
	dir      string          // the Secret's; empty: only the system's are trusted
	plain    *http.Transport // trusts the system's
	answered atomic.Bool     // the store did, so that its certificate was right

	mu     sync.Mutex
	trust  *trust
	looked time.Time // when trust was found to be still right
}

// trust is a transport, and the file of authorities that it was made with.
type trust struct {
	transport *http.Transport
	file      fs.FileInfo // nil: there is none
}

// NewTransport returns a Transport for the bucket of c whose connections are otherwise those of t.
func NewTransport(c source.Config, t *http.Transport) *Transport {
	return &Transport{name: c.URL, dir: c.CredentialsDir, plain: t, trust: &trust{transport: t}}
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	transport, err := t.current()
	if err != nil {
		if r.Body != nil {
			_ = r.Body.Close() // as who sends it does
		}
		return nil, err
	}
	resp, err := transport.RoundTrip(r)
	switch refused := (*tls.CertificateVerificationError)(nil); {
	case err == nil:
		t.answered.Store(true)
	case errors.As(err, &refused):
		t.mu.Lock()
		t.looked = time.Time{} // the Secret may have its authority by now
		t.mu.Unlock()
	}
	return resp, err
}

// current is the transport that trusts what the Secret holds now. Connections that trust something else end with their
// requests.
func (t *Transport) current() (*http.Transport, error) {
	if t.dir == "" {
		return t.plain, nil
	}
	t.mu.Lock()
	have, fresh := t.trust, time.Since(t.looked) < lookEvery
	t.mu.Unlock()
	if fresh {
		return have.transport, nil
	}
	next, err := t.look(have)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	won := t.trust == have
	if won {
		t.trust, t.looked = next, time.Now()
	}
	next = t.trust
	t.mu.Unlock()
	if won && next != have {
		have.transport.CloseIdleConnections()
	}
	return next.transport, nil
}

// look returns have where the file of authorities is still the same.
func (t *Transport) look(have *trust) (*trust, error) {
	path := filepath.Join(t.dir, KeyAuthorities)
	file, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && have.file == nil, err == nil && same(have.file, file):
		return have, nil
	case errors.Is(err, fs.ErrNotExist):
		return &trust{transport: t.plain}, nil
	case err != nil:
		return nil, denied(t.name, err, "make the folder readable")
	}
	text, err := readSmall(path, maxAuthorities)
	if err != nil {
		return nil, denied(t.name, err, "make it a readable file")
	}
	next := &trust{transport: t.plain.Clone(), file: file}
	if len(bytes.TrimSpace(text)) == 0 {
		return next, nil // as cert-manager leaves it where the authority is a public one
	}
	pool, err := authorities(text)
	if err != nil {
		return nil, denied(t.name, fmt.Errorf("key %s in folder %s: %w", KeyAuthorities, t.dir, err), "put the certificates of the store's authorities (PEM) into it")
	}
	next.transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	return next, nil
}

// authorities are the system's and those of text, all of which must be readable.
func authorities(text []byte) (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool() // the system has none
	}
	n := 0
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		n++
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", n, err)
		}
		pool.AddCert(c)
	}
	switch {
	case bytes.Contains(text, []byte("-----BEGIN")):
		return nil, fmt.Errorf("what follows certificate %d is cut short", n)
	case n == 0:
		return nil, errors.New("it holds no certificate")
	}
	return pool, nil
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
		add := "add its authority to the system's"
		if t.dir != "" {
			add = fmt.Sprintf("put that of its authority (PEM) into key %s of %s", KeyAuthorities, t.dir)
		}
		hint = "the store's certificate is not trusted: " + add + ", or write http:// for a connection without TLS"
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
