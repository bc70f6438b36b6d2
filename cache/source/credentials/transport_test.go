package credentials_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
	"github.com/stepcache/stepcache/test/bucket"
)

// A certificate is refused for good only where the store never had a right one: another is a matter of waiting.
func TestUntrusted(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	ours, other := bucket.NewAuthority(t), bucket.NewAuthority(t)
	good := ours.Certificate(t, "127.0.0.1", time.Hour)
	store := bucket.TLSAt(t, plain.URL, good)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ours.PEM)
	open := func() *credentials.Transport {
		c := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
		t.Cleanup(c.CloseIdleConnections)
		return credentials.NewTransport(c)
	}
	ask := func(c *credentials.Transport) error {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, store.Endpoint(), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.RoundTrip(r)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	for _, c := range []struct {
		name        string
		shown       tls.Certificate
		first, then error
		says        string
	}{
		{"another authority", other.Certificate(t, "127.0.0.1", time.Hour), source.ErrInvalid, source.ErrUnavailable, "not trusted"},
		{"another name", ours.Certificate(t, "127.0.0.2", time.Hour), source.ErrInvalid, source.ErrUnavailable, "a name that is in"},
		{"expired", ours.Certificate(t, "127.0.0.1", -time.Hour), source.ErrUnavailable, source.ErrUnavailable, "clock"},
	} {
		t.Run(c.name, func(t *testing.T) {
			known := open()
			store.Show(good)
			if err := ask(known); err != nil {
				t.Fatal(err)
			}
			store.Show(c.shown)
			for by, want := range map[*credentials.Transport]error{open(): c.first, known: c.then} {
				hint, kind := by.Untrusted(ask(by))
				if !errors.Is(kind, want) || !strings.Contains(hint, c.says) {
					t.Errorf("answered %v: %v; %s, want %v", by == known, kind, hint, want)
				}
			}
			store.Show(good)
			if err := ask(known); err != nil {
				t.Errorf("renewed: %v", err)
			}
		})
	}
	if hint, kind := open().Untrusted(errors.New("reset")); kind != nil || hint != "" {
		t.Errorf("of no certificate: %v; %s", kind, hint)
	}
}
