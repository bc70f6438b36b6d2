package credentials_test

import (
	"crypto/tls"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
	"github.com/stepcache/stepcache/test/bucket"
)

func ask(t *testing.T, c *credentials.Transport, store *bucket.TLSProxy) error {
	t.Helper()
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

// A certificate is refused for good only where the store never had a right one: another is a matter of waiting.
func TestUntrusted(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	ours, other := bucket.NewAuthority(t), bucket.NewAuthority(t)
	good := ours.Certificate(t, "127.0.0.1", time.Hour)
	store := bucket.TLSAt(t, plain.URL, good)
	dir := t.TempDir()
	write(t, dir, map[string]string{"ca.crt": string(ours.PEM)})
	open := func() *credentials.Transport {
		return credentials.NewTransport(source.Config{CredentialsDir: dir}, &http.Transport{})
	}
	ask := func(c *credentials.Transport) error { return ask(t, c, store) }
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

// What is in a Secret as authorities is used as it is now, or refused with its name.
func TestAuthorities(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	ours, other := bucket.NewAuthority(t), bucket.NewAuthority(t)
	store := bucket.TLSAt(t, plain.URL, ours.Certificate(t, "127.0.0.1", time.Hour))
	dir := t.TempDir()
	c := credentials.NewTransport(source.Config{URL: "s3://bucket", CredentialsDir: dir}, &http.Transport{})
	key := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("hush")}))
	good, long := string(ours.PEM), strings.Repeat("# words\n", 1<<18)
	for _, b := range []struct{ name, text, says string }{
		{"none", "", ""},
		{"words", "hush", "it holds no certificate"},
		{"a key", key, "it holds no certificate"},
		{"no certificate within", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("hush")})), "certificate 1"},
		{"half of the second", good + string(other.PEM[:100]), "certificate 1 is cut short"},
		{"long", long + good, "longer"},
		{"with words", "# ours\n" + good + "\n# theirs\n" + string(other.PEM) + key, "good"},
		{"one", good, "good"},
	} {
		write(t, dir, map[string]string{"ca.crt": b.text})
		err := ask(t, c, store)
		switch b.says {
		case "good":
			if err != nil {
				t.Errorf("%s: %v", b.name, err)
			}
		case "":
			if hint, kind := c.Untrusted(err); !errors.Is(kind, source.ErrInvalid) || !strings.Contains(hint, "key ca.crt of "+dir) {
				t.Errorf("%s: %v: %v; %s", b.name, err, kind, hint)
			}
		default:
			want(t, err, source.ErrDenied, b.says, "ca.crt", dir, "s3://bucket")
			if strings.Contains(err.Error(), "hush") {
				t.Errorf("%s: shows a value: %v", b.name, err)
			}
		}
	}
	// A connection that is there is not used on once its authority is not trusted any more.
	if err := os.Remove(filepath.Join(dir, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ask(t, c, store) == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("what is trusted no more goes on to be used")
		}
	}
}
