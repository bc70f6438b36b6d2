package s3

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

// Credentials are looked at now and then, not for each request; those that the store refuses, before the next.
func TestRotatedCredentialsAreFoundInTimeOrOnceTheOldAreRefused(t *testing.T) {
	dir := t.TempDir()
	write := func(key, value string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, key+".new"), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, key+".new"), filepath.Join(dir, key)); err != nil {
			t.Fatal(err)
		}
	}
	write(credentials.KeyID, "id")
	write(credentials.KeySecret, "one")
	s, err := newSigner(source.Config{URL: "s3://bucket/", CredentialsDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	clock := time.Unix(1e9, 0)
	s.now = func() time.Time { return clock }
	retrieve := func(want string) {
		t.Helper()
		if !s.IsExpired() {
			t.Fatalf("secret %q is not looked for", want)
		}
		if v, err := s.Retrieve(); err != nil || v.SecretAccessKey != want {
			t.Fatalf("secret %q, %v; want %q", v.SecretAccessKey, err, want)
		}
		if s.IsExpired() {
			t.Fatalf("secret %q is not kept", want)
		}
	}
	retrieve("one")
	write(credentials.KeySecret, "two")
	if clock = clock.Add(lookEvery - 1); s.IsExpired() {
		t.Error("the files are looked at for each request")
	}
	clock = clock.Add(1)
	retrieve("two")
	write(credentials.KeySecret, "three")
	s.refused()
	retrieve("three")
	if err := os.Remove(filepath.Join(dir, credentials.KeyID)); err != nil {
		t.Fatal(err)
	}
	if clock = clock.Add(lookEvery); !s.IsExpired() {
		t.Error("credentials that were taken away are used on")
	}
	if _, err := s.Retrieve(); err == nil {
		t.Error("there are credentials although the Secret is gone")
	}
}

// agent is what gives a pod the credentials of its identity; it answers as it is told.
type agent struct {
	answer atomic.Pointer[http.HandlerFunc]
	asked  atomic.Int64
	over   chan struct{} // closed with the test
}

func startAgent(t *testing.T) *agent {
	t.Helper()
	a := &agent{over: make(chan struct{})}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.asked.Add(1)
		(*a.answer.Load())(w, r)
	}))
	t.Cleanup(server.Close)
	t.Cleanup(func() { close(a.over) })
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE",
		"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", server.URL)
	return a
}

func (a *agent) set(h http.HandlerFunc) { a.answer.Store(&h) }

func (a *agent) give(id string, until time.Time) {
	a.set(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"AccessKeyId":%q,"SecretAccessKey":"s","Token":"t","Expiration":%q}`, id, until.UTC().Format(time.RFC3339))
	})
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

func (a *agent) silent(_ http.ResponseWriter, r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-a.over:
	}
}

func broken(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// Only a platform that says no is a reason to give up, and one that says nothing holds up nobody for long.
func TestPlatformWithoutCredentials(t *testing.T) {
	a := startAgent(t)
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   error
	}{
		"refuses":       {status(403), source.ErrDenied},
		"has no such":   {status(404), source.ErrDenied},
		"restarts":      {status(503), source.ErrUnavailable},
		"is overrun":    {status(429), source.ErrUnavailable},
		"is not there":  {broken, source.ErrUnavailable},
		"never answers": {a.silent, source.ErrUnavailable},
		"breaks off":    {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"Access`) }, source.ErrUnavailable},
		"says nothing":  {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `<html>`) }, source.ErrUnavailable},
	} {
		a.set(c.answer)
		b, err := Open(t.Context(), source.Config{URL: "s3://bucket", Endpoint: "http://127.0.0.1:1", Region: "r", Ambient: true})
		if err != nil {
			t.Fatal(err)
		}
		b.signer.platform.timeout = 100 * time.Millisecond
		if c.want == source.ErrDenied {
			b.signer.platform.timeout = time.Minute
		}
		asked := a.asked.Load()
		if _, err := b.Stat(t.Context(), "k"); !errors.Is(err, c.want) || a.asked.Load() == asked {
			t.Errorf("a platform that %s: %v, want %v", name, err, c.want)
		}
	}
}

// Credentials are used until they end, whatever becomes of the platform, and replaced before that where it lives.
func TestPlatformCredentialsAreUsedUntilTheyEnd(t *testing.T) {
	a := startAgent(t)
	start := time.Now().Truncate(time.Second)
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   error
	}{"refuses": {status(403), source.ErrDenied}, "restarts": {status(503), source.ErrUnavailable}, "never answers": {a.silent, source.ErrUnavailable}} {
		s, err := newSigner(source.Config{URL: "s3://bucket/", Ambient: true})
		if err != nil {
			t.Fatal(err)
		}
		var after atomic.Int64
		s.now = func() time.Time { return start.Add(time.Duration(after.Load())) }
		retrieve := func(want string) {
			t.Helper()
			if v, err := s.Retrieve(); err != nil || v.AccessKeyID != want {
				t.Fatalf("a platform that %s: credentials %q, %v, want %q", name, v.AccessKeyID, err, want)
			}
		}
		until := func(what string, is func() bool) {
			t.Helper()
			for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("a platform that %s: %s", name, what)
				}
			}
		}
		a.give("one", start.Add(time.Hour))
		retrieve("one")
		if s.IsExpired() {
			t.Errorf("a platform that %s: new credentials are not kept", name)
		}
		a.set(c.answer)
		s.platform.timeout = time.Minute // which nobody waits for
		after.Store(int64(50 * time.Minute))
		if !s.IsExpired() {
			t.Errorf("a platform that %s: is not asked before the credentials end", name)
		}
		asked := a.asked.Load()
		retrieve("one")
		retrieve("one")
		until("is not asked before the credentials end", func() bool { return a.asked.Load() > asked })
		if name == "never answers" {
			continue
		}
		until("is asked for each request", func() bool { return !s.IsExpired() })
		a.give("two", start.Add(2*time.Hour))
		after.Add(int64(renewPause))
		until("gives credentials that nobody takes", func() bool {
			if s.IsExpired() {
				v, err := s.Retrieve()
				return err == nil && v.AccessKeyID == "two"
			}
			return false
		})
		if s.IsExpired() {
			t.Errorf("a platform that %s: the second credentials are not kept", name)
		}
		a.set(c.answer)
		after.Store(int64(2 * time.Hour))
		if v, err := s.Retrieve(); !errors.Is(err, c.want) || v.AccessKeyID != "" {
			t.Errorf("a platform that %s, once the credentials ended: %q, %v, want %v", name, v.AccessKeyID, err, c.want)
		}
	}
}
