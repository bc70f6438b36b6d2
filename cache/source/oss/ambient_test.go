package oss

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/oss/osstest"
)

var discard = log.New(io.Discard, "", 0)

// identity plays the services that give a machine or a pod the credentials of its role.
type identity struct {
	*httptest.Server
	mu    sync.Mutex
	give  temporary
	fail  int
	asked atomic.Int64
}

func newIdentity(t *testing.T) *identity {
	i := &identity{}
	answer := func(w http.ResponseWriter, wrap bool) {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.asked.Add(1)
		if i.fail != 0 {
			w.WriteHeader(i.fail)
			io.WriteString(w, `{"Code":"AuthenticationFail.OIDCToken.Expired","Message":"expired"}`)
			return
		}
		if wrap {
			json.NewEncoder(w).Encode(map[string]any{"Credentials": i.give})
			return
		}
		json.NewEncoder(w).Encode(i.give)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-aliyun-ecs-metadata-token-ttl-seconds") == "" {
			w.WriteHeader(400)
			return
		}
		io.WriteString(w, "metadata-token")
	})
	mux.HandleFunc("GET /latest/meta-data/ram/security-credentials/{role...}", func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("X-aliyun-ecs-metadata-token") != "metadata-token":
			w.WriteHeader(403)
		case r.PathValue("role") == "":
			io.WriteString(w, "worker role\n")
		case r.PathValue("role") == "worker role":
			answer(w, false)
		default:
			w.WriteHeader(404)
		}
	})
	mux.HandleFunc("POST /{$}", func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("Action") != "AssumeRoleWithOIDC" || r.PostFormValue("OIDCToken") != "pod-token" || r.PostFormValue("RoleArn") != "acs:ram::1:role/r" {
			w.WriteHeader(400)
			return
		}
		answer(w, true)
	})
	i.Server = httptest.NewServer(mux)
	t.Cleanup(i.Close)
	return i
}

func (i *identity) set(c osstest.Credential, until time.Time, fail int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.give = temporary{AccessKeyID: c.AccessKeyID, AccessKeySecret: c.AccessKeySecret, SecurityToken: c.Token, Expiration: until.UTC()}
	i.fail = fail
}

// The token service may be behind a proxy, the machine's own metadata service never is.
func TestAmbientCredentialsThroughAProxy(t *testing.T) {
	tokenFile := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte("pod-token"), 0o600); err != nil {
		t.Fatal(err)
	}
	var proxied []string
	d := deps{
		proxy: func(r *http.Request) (*url.URL, error) {
			proxied = append(proxied, r.URL.Host)
			return nil, errors.New("no such proxy")
		},
		metadata: "http://metadata.invalid", sts: "https://sts.invalid", now: time.Now,
		dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no such host") },
	}
	for _, c := range []struct{ role, err, proxied string }{
		{"", "no such host", ""},
		{"acs:ram::1:role/r", "no such proxy", "sts.invalid"},
	} {
		d.getenv = func(k string) string { return map[string]string{envRole: c.role, envToken: tokenFile}[k] }
		proxied = nil
		if _, err := newAmbient(d, endpoint{}).get(t.Context()); err == nil || !strings.Contains(err.Error(), c.err) || strings.Join(proxied, " ") != c.proxied {
			t.Errorf("role %q: %v, want %s; through the proxy: %q, want %s", c.role, err, c.err, proxied, c.proxied)
		}
	}
}

// TestAmbientCredentials: a machine's or pod's role is asked for once, kept, renewed before its end, and
// used on to its end when it cannot be renewed.
func TestAmbientCredentials(t *testing.T) {
	tokenFile := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte("pod-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, env := range map[string]map[string]string{
		"machine": {},
		"pod":     {envRole: "acs:ram::1:role/r", envProvider: "acs:ram::1:oidc-provider/p", envToken: tokenFile},
	} {
		t.Run(name, func(t *testing.T) {
			first := osstest.Credential{AccessKeyID: "STS.first", AccessKeySecret: "one", Token: "t1"}
			second := osstest.Credential{AccessKeyID: "STS.second", AccessKeySecret: "two", Token: "t2"}
			s := osstest.StartT(t, osstest.Options{Credentials: []osstest.Credential{first, second}})
			if _, err := s.Put(testBucket, "k", nil); err != nil {
				t.Fatal(err)
			}
			i := newIdentity(t)
			var clock atomic.Int64 // added to the time, as the credentials' keeper sees it
			config := configOf(t, s)
			config.CredentialsDir, config.Ambient = "", true
			b, err := open(config, deps{metadata: i.URL, sts: i.URL, getenv: func(k string) string { return env[k] },
				now: func() time.Time { return time.Now().Add(time.Duration(clock.Load())) }})
			if err != nil {
				t.Fatal(err)
			}
			i.set(first, time.Now().Add(time.Hour), 0)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					if _, err := b.Stat(t.Context(), "k"); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if n := i.asked.Load(); n != 1 {
				t.Errorf("8 requests asked %d times", n)
			}
			// Near the end: renewed.
			clock.Store(int64(57 * time.Minute))
			s.SetCredentials(second)
			i.set(second, time.Now().Add(2*time.Hour), 0)
			mustStat(t, b, "k")
			if n := i.asked.Load(); n != 2 {
				t.Errorf("asked %d times", n)
			}
			// Near the end of those, and the service is down: used on.
			clock.Store(int64(118 * time.Minute))
			i.set(second, time.Time{}, 500)
			mustStat(t, b, "k")
			// After the end.
			clock.Store(int64(121 * time.Minute))
			_, err = b.Stat(t.Context(), "k")
			if !errors.Is(err, source.ErrDenied) || !strings.Contains(err.Error(), "OIDCToken.Expired") {
				t.Errorf("%v", err)
			}
			if strings.Contains(err.Error(), "pod-token") {
				t.Errorf("%v tells a secret", err)
			}
		})
	}
}

// TestAmbientIsAskedOnlyIfAllowed and a request's context ends its waiting for the answer.
func TestAmbientIsAskedOnlyIfAllowed(t *testing.T) {
	s := osstest.StartT(t, osstest.Options{})
	config := configOf(t, s)
	config.CredentialsDir = ""
	hang := make(chan struct{})
	asked := make(chan struct{}, 10)
	silent := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- struct{}{}
		<-hang
	}))
	t.Cleanup(silent.Close)
	t.Cleanup(func() { close(hang) })
	d := deps{metadata: silent.URL, getenv: func(string) string { return "" }}
	b, err := open(config, d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Stat(t.Context(), "k"); !errors.Is(err, source.ErrDenied) || len(asked) != 0 {
		t.Errorf("%v, asked %d times", err, len(asked))
	}
	config.Ambient = true
	if b, err = open(config, d); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-asked
		cancel()
	}()
	if _, err := b.Stat(ctx, "k"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while asking: %v", err)
	}
}
