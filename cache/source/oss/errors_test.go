package oss

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
	"github.com/stepcache/stepcache/cache/source/oss/osstest"
	"github.com/stepcache/stepcache/test/ports"
)

// withHandler opens a bucket whose server is h.
func withHandler(t *testing.T, h http.HandlerFunc) *Bucket {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	b, err := Open(t.Context(), source.Config{URL: "oss://" + testBucket, Endpoint: s.URL, Region: "cn-test",
		CredentialsDir: secret(t, osstest.Credential{AccessKeyID: "id", AccessKeySecret: "secret"})})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRefusals: each way to be refused is told apart, names the object, says where to look, and quotes no
// secret.
func TestRefusals(t *testing.T) {
	key := osstest.Credential{AccessKeyID: "LTAIgood", AccessKeySecret: "good-secret", Token: "good-token"}
	for _, c := range []struct {
		name   string
		server osstest.Options
		change func(t *testing.T, c *source.Config)
		want   error
		says   []string
	}{
		{"unknown key", osstest.Options{}, func(t *testing.T, c *source.Config) {
			c.CredentialsDir = secret(t, osstest.Credential{AccessKeyID: "LTAIbad", AccessKeySecret: "good-secret"})
		}, source.ErrDenied, []string{"InvalidAccessKeyId", "key accessKeyID of the Secret"}},
		{"wrong secret", osstest.Options{}, func(t *testing.T, c *source.Config) {
			c.CredentialsDir = secret(t, osstest.Credential{AccessKeyID: "LTAIgood", AccessKeySecret: "bad-secret", Token: "good-token"})
		}, source.ErrDenied, []string{"SignatureDoesNotMatch", "key accessKeySecret of the Secret"}},
		{"wrong token", osstest.Options{}, func(t *testing.T, c *source.Config) {
			c.CredentialsDir = secret(t, osstest.Credential{AccessKeyID: "LTAIgood", AccessKeySecret: "good-secret", Token: "bad-token"})
		}, source.ErrDenied, []string{"InvalidSecurityToken", "key sessionToken of the Secret"}},
		{"mapped key", osstest.Options{}, func(t *testing.T, c *source.Config) {
			c.CredentialsDir = t.TempDir()
			for name, value := range map[string]string{"id": "LTAIbad", "accessKeySecret": "x"} {
				if err := os.WriteFile(filepath.Join(c.CredentialsDir, name), []byte(value), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			c.CredentialKeys = map[string]string{credentials.KeyID: "id"}
		}, source.ErrDenied, []string{"key id of the Secret"}},
		{"no secret", osstest.Options{}, func(t *testing.T, c *source.Config) {
			c.CredentialsDir = t.TempDir()
		}, source.ErrDenied, []string{"accessKeyID"}},
		{"anonymous on a private bucket", osstest.Options{}, func(t *testing.T, c *source.Config) {
			c.CredentialsDir, c.Anonymous = "", true
		}, source.ErrDenied, []string{"not public", "credentialsSecretRef"}},
		{"no such bucket", osstest.Options{}, func(t *testing.T, c *source.Config) { c.URL = "oss://genomez" },
			source.ErrNoBucket, []string{"genomez", "check the bucket's name"}},
		{"wrong region", osstest.Options{}, func(t *testing.T, c *source.Config) { c.Region = "cn-beijing" },
			source.ErrInvalid, []string{"not in region cn-beijing", "0002-00000226"}},
		{"clock", osstest.Options{Now: func() time.Time { return time.Now().Add(time.Hour) }}, func(*testing.T, *source.Config) {},
			source.ErrDenied, []string{"RequestTimeTooSkewed", "clock"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.server.Credentials = []osstest.Credential{key}
			s := osstest.StartT(t, c.server)
			if _, err := s.Put(testBucket, "k", []byte("content")); err != nil {
				t.Fatal(err)
			}
			config := configOf(t, s)
			c.change(t, &config)
			b, err := Open(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			_, statErr := b.Stat(t.Context(), "k")
			_, getErr := b.Get(t.Context(), source.Object{Key: "k", Size: 7, Version: "v"}, 0, 7)
			_, putErr := b.Put(t.Context(), "new", strings.NewReader("x"), 1)
			listErr := b.List(t.Context(), "", func(source.Object) error { return nil })
			deleteErr := b.Delete(t.Context(), "k")
			for op, err := range map[string]error{"stat": statErr, "get": getErr, "put": putErr, "list": listErr, "delete": deleteErr} {
				if !errors.Is(err, c.want) || source.Temporary(err) {
					t.Errorf("%s: %v, want %v", op, err, c.want)
					continue
				}
				for _, say := range append(c.says, "oss://") {
					if !strings.Contains(err.Error(), say) {
						t.Errorf("%s: %q does not say %q", op, err, say)
					}
				}
				for _, hidden := range []string{"-secret", "-token"} {
					if strings.Contains(err.Error(), hidden) {
						t.Errorf("%s: %q tells a secret", op, err)
					}
				}
			}
			if _, ok := s.Object(testBucket, "k"); !ok {
				t.Error("the object is gone")
			}
		})
	}
}

// TestAnswersOfOthers: error answers that are not the protocol's, as load balancers give them, and the
// codes that only a real store gives.
func TestAnswersOfOthers(t *testing.T) {
	xml := func(code, more string) string {
		return "<Error><Code>" + code + "</Code><Message>m</Message><RequestId>R</RequestId>" + more + "</Error>"
	}
	for _, c := range []struct {
		status       int
		header, body string
		want         error
		says         string
	}{
		{502, "", "<html>bad gateway</html>", source.ErrUnavailable, "not one of OSS"},
		{503, "", "", source.ErrUnavailable, ""},
		{429, "", "", source.ErrThrottled, ""},
		{503, "", xml("DownloadTrafficRateLimitExceeded", ""), source.ErrThrottled, "DownloadTrafficRateLimitExceeded"},
		{503, "", xml("SlowDown", ""), source.ErrThrottled, ""},
		{503, "x-oss-qos-delay-time: 7", xml("ServiceUnavailable", ""), source.ErrThrottled, ""},
		{301, "Location: http://127.0.0.1:1/", "", source.ErrInvalid, "301"},
		{404, "", xml("NoSuchKey", ""), source.ErrNotFound, ""},
		{404, "", "", source.ErrNotFound, ""},
		{404, "", "<html>nginx</html>", source.ErrUnavailable, "endpoint"},
		{403, "", "<html>forbidden</html>", source.ErrDenied, ""},
		{403, "", xml("AccessDenied", "<Endpoint>oss-cn-beijing.aliyuncs.com</Endpoint>"), source.ErrInvalid, "set endpoint to oss-cn-beijing.aliyuncs.com"},
		{403, "", xml("AccessDenied", ""), source.ErrDenied, "oss:GetObject"},
		{403, "", xml("InvalidObjectState", ""), source.ErrInvalid, "restore"},
		{403, "", xml("UserDisable", ""), source.ErrDenied, "UserDisable"},
		{412, "", xml("PreconditionFailed", ""), source.ErrChanged, ""},
		{400, "", xml("RequestTimeout", ""), source.ErrUnavailable, ""},
		{400, "", xml("Whatever", ""), source.ErrInvalid, "Whatever"},
		{416, "", xml("InvalidRange", ""), source.ErrChanged, ""},
	} {
		b := withHandler(t, func(w http.ResponseWriter, r *http.Request) {
			if name, value, ok := strings.Cut(c.header, ": "); ok {
				w.Header().Set(name, value)
			}
			w.WriteHeader(c.status)
			w.Write([]byte(c.body))
		})
		_, err := b.Get(t.Context(), source.Object{Key: "k", Size: 10, Version: "v"}, 0, 10)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "/genomes/k") {
			t.Errorf("%d %s: %v, want %v saying %q", c.status, c.body, err, c.want, c.says)
		}
		// A client is told what is about its own request, not what is about the Dataset's settings.
		var told *source.Refusal
		if wanted := c.body == xml("Whatever", "") || c.body == xml("InvalidObjectState", ""); errors.As(err, &told) != wanted || wanted && (told.Status != c.status || told.Message != "m") {
			t.Errorf("%d %s: passed on is %v", c.status, c.body, told)
		}
		kinds := 0
		for _, kind := range []error{source.ErrNotFound, source.ErrNoBucket, source.ErrChanged, source.ErrDenied, source.ErrUnversioned,
			source.ErrThrottled, source.ErrUnavailable, source.ErrInvalid, source.ErrReadOnly} {
			if errors.Is(err, kind) {
				kinds++
			}
		}
		if kinds != 1 {
			t.Errorf("%d %s: %v is of %d kinds", c.status, c.body, err, kinds)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	b := withHandler(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Retry-After", "3")
		w.WriteHeader(503)
	})
	_, err := b.Stat(t.Context(), "k")
	var e *source.Error
	if !errors.As(err, &e) || e.After != 3*time.Second {
		t.Errorf("%v", err)
	}
}

// TestNoStore: nobody listens, no such host, and TLS spoken to one that does not.
func TestNoStore(t *testing.T) {
	closed := ports.Free(t, 1)[0]
	plain := osstest.StartT(t, osstest.Options{})
	for endpoint, c := range map[string]struct {
		want error
		says string
	}{
		"http://" + closed:                  {source.ErrUnavailable, "refused"},
		"http://oss.invalid":                {source.ErrUnavailable, "check the endpoint oss.invalid"},
		"https://" + plain.Addr():           {source.ErrInvalid, "http://"},
		plain.Addr():                        {source.ErrInvalid, "http://"},
		"https://" + selfSigned(t).String(): {source.ErrInvalid, "certificate"},
	} {
		d := deps{proxy: noProxy}
		if strings.HasSuffix(endpoint, ".invalid") { // what a resolver says of it
			d.dial = func(context.Context, string, string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "oss.invalid", IsNotFound: true}}
			}
		}
		b, err := open(source.Config{URL: "oss://" + testBucket, Endpoint: endpoint, Region: "cn-test",
			CredentialsDir: secret(t, plain.Credential())}, d)
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Stat(t.Context(), "k")
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", endpoint, err)
		}
	}
}

func selfSigned(t *testing.T) net.Addr {
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.ErrorLog = discard
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr()
}

// TestRotation: new credentials in the folder are used by the next request, without opening again.
func TestRotation(t *testing.T) {
	first := osstest.Credential{AccessKeyID: "LTAIfirst", AccessKeySecret: "one"}
	second := osstest.Credential{AccessKeyID: "STS.second", AccessKeySecret: "two", Token: "token"}
	s := osstest.StartT(t, osstest.Options{Credentials: []osstest.Credential{first}})
	if _, err := s.Put(testBucket, "k", []byte("content")); err != nil {
		t.Fatal(err)
	}
	config := configOf(t, s)
	b, err := Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	mustStat(t, b, "k")
	s.SetCredentials(second)
	if _, err := b.Stat(t.Context(), "k"); !errors.Is(err, source.ErrDenied) {
		t.Errorf("with the old key: %v", err)
	}
	writeSecret(t, config.CredentialsDir, second)
	mustStat(t, b, "k")
	s.SetCredentials(first)
	writeSecret(t, config.CredentialsDir, first) // the token goes away
	mustStat(t, b, "k")
}

func TestAnonymousOnAPublicBucket(t *testing.T) {
	s := osstest.StartT(t, osstest.Options{})
	s.MakePublicBucket(testBucket)
	if _, err := s.Put(testBucket, "k", []byte("content")); err != nil {
		t.Fatal(err)
	}
	config := configOf(t, s)
	config.CredentialsDir, config.Anonymous = "", true
	b, err := Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	o := list(t, b, "")["k"]
	if got, err := read(t, b, o, 3, 4); err != nil || string(got) != "tent" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := b.Put(t.Context(), "new", strings.NewReader("x"), 1); !errors.Is(err, source.ErrDenied) {
		t.Errorf("put: %v", err)
	}
	for _, seen := range s.Seen() {
		if seen.Header.Get("Authorization") != "" {
			t.Error("an anonymous request was signed")
		}
	}
}

// TestEnvironment: without a Secret the environment is used, and blamed.
func TestEnvironment(t *testing.T) {
	s := osstest.StartT(t, osstest.Options{})
	if _, err := s.Put(testBucket, "k", nil); err != nil {
		t.Fatal(err)
	}
	config := configOf(t, s)
	config.CredentialsDir = ""
	env := map[string]string{"OSS_ACCESS_KEY_ID": s.Credential().AccessKeyID, "OSS_ACCESS_KEY_SECRET": s.Credential().AccessKeySecret}
	b, err := open(config, deps{getenv: func(k string) string { return env[k] }})
	if err != nil {
		t.Fatal(err)
	}
	mustStat(t, b, "k")
	env["OSS_ACCESS_KEY_SECRET"] = "another"
	if _, err := b.Stat(t.Context(), "k"); !errors.Is(err, source.ErrDenied) || !strings.Contains(err.Error(), "OSS_ACCESS_KEY_SECRET in the environment") {
		t.Errorf("%v", err)
	}
}
