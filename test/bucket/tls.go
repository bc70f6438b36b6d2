package bucket

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"testing"
	"time"
)

// Authority signs certificates that no system trusts.
type Authority struct {
	PEM  []byte
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes an authority of its own.
func NewAuthority(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: rand.Text()}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	a.cert, a.key = a.sign(t, template)
	a.PEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
	return a
}

// Certificate is one for a host (an address) that ends, or has ended, so long from now.
func (a *Authority) Certificate(t testing.TB, host string, ends time.Duration) tls.Certificate {
	t.Helper()
	c, key := a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), IPAddresses: []net.IP{net.ParseIP(host)},
		NotBefore: time.Now().Add(-12 * time.Hour), NotAfter: time.Now().Add(ends),
	})
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key}
}

// sign signs with the authority, or itself where that is not there yet.
func (a *Authority) sign(t testing.TB, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, by := a.cert, a.key
	if parent == nil {
		parent, by = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c, key
}

// TLSProxy speaks TLS in front of a server, with a certificate that a test sets. It keeps the Host header, so that
// signatures stay valid.
type TLSProxy struct {
	server *httptest.Server
	shown  atomic.Pointer[tls.Certificate]
}

// TLSAt starts a proxy in front of the server at an http:// URL for the length of the test.
func TLSAt(t testing.TB, target string, c tls.Certificate) *TLSProxy {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil || u.Scheme != "http" {
		t.Fatalf("%q is not an http:// URL: %v", target, err)
	}
	transport := &http.Transport{}
	p := &TLSProxy{server: httptest.NewUnstartedServer(&httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", u.Host
			r.Out.Host = r.In.Host
		},
		ErrorLog: log.New(io.Discard, "", 0),
	})}
	p.shown.Store(&c)
	p.server.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that do not trust it
	p.server.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{*p.shown.Load()}, NextProtos: []string{"http/1.1"}}, nil
	}}
	p.server.StartTLS()
	t.Cleanup(func() {
		p.server.CloseClientConnections()
		p.server.Close()
		transport.CloseIdleConnections()
	})
	return p
}

// Endpoint is the proxy's URL.
func (p *TLSProxy) Endpoint() string { return p.server.URL }

// Show makes c the certificate of all later connections, and ends those that there are.
func (p *TLSProxy) Show(c tls.Certificate) {
	p.shown.Store(&c)
	p.server.CloseClientConnections()
}
