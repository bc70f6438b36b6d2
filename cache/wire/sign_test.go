package wire

import (
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func sha(s string) []byte { h := sha256.Sum256([]byte(s)); return h[:] }

var signedAt = time.Unix(1_700_000_000, 0)

// sent is the request as the server sees it.
func sent(t *testing.T, method, target, body string, key Key) *http.Request {
	t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	out, err := http.NewRequest(method, "http://worker:1"+target, r)
	if err != nil {
		t.Fatal(err)
	}
	if err := SignRequest(out, key, "w0", signedAt); err != nil {
		t.Fatal(err)
	}
	in := httptest.NewRequest(method, target, out.Body)
	in.Header = out.Header.Clone()
	return in
}

func TestSignedRequest(t *testing.T) {
	keys := GenerateKeys()
	old := GenerateKeys()
	keys.Control = append(keys.Control, old.Control...)
	const body = `{"id":"x"}`
	for _, key := range []Key{keys.Control[0], old.Control[0]} {
		for _, d := range []time.Duration{0, MaxSkew, -MaxSkew} {
			r := sent(t, "POST", "/v1/loads?a=b%20c&d", body, key)
			if err := VerifyRequest(r, keys, "w0", signedAt.Add(d)); err != nil {
				t.Fatalf("after %v: %v", d, err)
			}
			if b, err := io.ReadAll(r.Body); err != nil || string(b) != body {
				t.Errorf("body %q, %v", b, err)
			}
		}
	}
	for name, change := range map[string]func(r *http.Request) *http.Request{
		"method":      func(r *http.Request) *http.Request { r.Method = "DELETE"; return r },
		"path":        func(r *http.Request) *http.Request { r.URL.Path += "x"; return r },
		"query":       func(r *http.Request) *http.Request { r.URL.RawQuery += "&e"; return r },
		"body":        func(r *http.Request) *http.Request { r.Body = io.NopCloser(strings.NewReader(body + " ")); return r },
		"no body":     func(r *http.Request) *http.Request { r.Body = http.NoBody; return r },
		"timestamp":   func(r *http.Request) *http.Request { r.Header.Set(headerTimestamp, "1700000001"); return r },
		"nonce":       func(r *http.Request) *http.Request { r.Header.Set(headerNonce, strings.Repeat("00", 16)); return r },
		"short nonce": func(r *http.Request) *http.Request { r.Header.Set(headerNonce, "00"); return r },
		"unsigned":    func(r *http.Request) *http.Request { r.Header.Del(headerAuthorization); return r },
		"scheme":      func(r *http.Request) *http.Request { r.Header.Set(headerAuthorization, "Bearer x"); return r },
		"read key":    func(*http.Request) *http.Request { return sent(t, "POST", "/v1/loads", body, keys.Read[0]) },
		"strange key": func(*http.Request) *http.Request {
			return sent(t, "POST", "/v1/loads", body, GenerateKeys().Control[0])
		},
		"bad time": func(r *http.Request) *http.Request { r.Header.Set(headerTimestamp, "9223372036854775807"); return r },
	} {
		if err := VerifyRequest(change(sent(t, "POST", "/v1/loads?a=b", body, keys.Control[0])), keys, "w0", signedAt); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("%s changed: %v", name, err)
		}
	}
	// What was captured on its way to one worker is nothing to another.
	if err := VerifyRequest(sent(t, "POST", "/v1/loads", body, keys.Control[0]), keys, "w1", signedAt); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("at another worker: %v", err)
	}
	for _, d := range []time.Duration{MaxSkew + time.Second, -MaxSkew - time.Second} {
		if err := VerifyRequest(sent(t, "GET", "/v1/status", "", keys.Control[0]), keys, "w0", signedAt.Add(d)); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("after %v: %v", d, err)
		}
	}
	long := sent(t, "POST", "/v1/loads", body, keys.Control[0])
	long.Body = io.NopCloser(io.LimitReader(zeros{}, MaxBody+1))
	if err := VerifyRequest(long, keys, "w0", signedAt); err == nil {
		t.Error("a body that is too long was accepted")
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestReplayedRequestIsRefused(t *testing.T) {
	var n Nonces
	key := GenerateKeys().Control[0]
	post := sent(t, "POST", "/v1/loads", "{}", key)
	if err := n.Use(post, signedAt); err != nil {
		t.Fatal(err)
	}
	if err := n.Use(post, signedAt.Add(time.Minute)); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("replayed: %v", err)
	}
	post.Header.Set(headerNonce, strings.ToUpper(post.Header.Get(headerNonce)))
	if err := n.Use(post, signedAt.Add(time.Minute)); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("replayed in capitals: %v", err)
	}
	get := sent(t, "GET", "/v1/status", "", key)
	for range 2 {
		if err := n.Use(get, signedAt); err != nil {
			t.Errorf("GET: %v", err)
		}
	}
	// Memory is bounded: full, it refuses; once the old ones expired, it accepts.
	for i := range maxNonces {
		r := httptest.NewRequest("POST", "/", nil)
		r.Header.Set(headerNonce, string(rune('a'+i%26))+time.Duration(i).String())
		n.Use(r, signedAt)
	}
	if len(n.seen) > maxNonces {
		t.Fatalf("%d nonces remembered", len(n.seen))
	}
	if err := n.Use(sent(t, "POST", "/", "", key), signedAt); !errors.Is(err, ErrOverloaded) {
		t.Errorf("full: %v", err)
	}
	if err := n.Use(sent(t, "POST", "/", "", key), signedAt.Add(3*MaxSkew)); err != nil {
		t.Errorf("after the old ones expired: %v", err)
	}
}
