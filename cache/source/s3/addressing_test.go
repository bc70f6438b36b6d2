package s3_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/s3"
	"github.com/stepcache/stepcache/test/bucket"
)

// behindProxy runs the test in a process of its own, whose requests go to any name through a proxy that is this handler:
// what the environment says of proxies is read once in a process.
func behindProxy(t *testing.T, h http.Handler) (here bool) {
	t.Helper()
	const again = "STEPCACHE_TEST_BEHIND_PROXY"
	if os.Getenv(again) == "" {
		cmd := exec.Command(os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), again+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return false
	}
	proxy := httptest.NewServer(h)
	t.Cleanup(proxy.Close)
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("NO_PROXY", "")
	return true
}

// A store that takes the bucket's name in the host alone, as some do, says so where it is in the path.
func TestAStoreOfVirtualHostsOnly(t *testing.T) {
	const domain = "s3.test"
	var direct string
	store := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL = &url.URL{Scheme: "http", Host: direct, Path: r.In.URL.Path, RawPath: r.In.URL.RawPath, RawQuery: r.In.URL.RawQuery}
		r.Out.Host = r.In.Host
	}}
	if !behindProxy(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.Host, "."+domain) {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `<Error><Code>InvalidPathAccess</Code><Message>Forbidden path to access server.</Message></Error>`)
			return
		}
		store.ServeHTTP(w, r)
	})) {
		return
	}
	s := bucket.StartT(t, bucket.Options{VirtualDomain: domain})
	direct = strings.TrimPrefix(s.Direct(), "http://")
	c := fixture(t, s)
	c.Endpoint = "http://" + domain
	b, err := s3.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Page(t.Context(), source.PageRequest{}); !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), "set addressingStyle: Virtual") {
		t.Errorf("with the bucket's name in the path: %v", err)
	}

	c.Addressing = source.AddressingVirtual
	c.Region = "" // asked of the store
	if b, err = s3.Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	for key, size := range map[string]int{"a/b c+d%": 100_000, "large": 20 << 20} {
		content := bytes.Repeat([]byte("0123456789"), size/10)
		put, err := b.Put(t.Context(), key, bytes.NewReader(content), int64(len(content)))
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		o, err := b.Stat(t.Context(), key)
		if err != nil || o.Version != put.Version {
			t.Errorf("%s: %+v, %v; put %+v", key, o, err, put)
		}
		body, err := b.Get(t.Context(), o, 20, 10)
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		p, err := io.ReadAll(body)
		body.Close()
		if err != nil || string(p) != "0123456789" {
			t.Errorf("%s: %q, %v", key, p, err)
		}
	}
	page, err := b.Page(t.Context(), source.PageRequest{})
	if err != nil || len(page.Objects) != 2 {
		t.Errorf("%+v, %v", page, err)
	}
	if gone, err := b.DeleteAll(t.Context(), []string{"a/b c+d%", "large"}); err != nil || len(gone) != 2 {
		t.Errorf("deleted %v, %v", gone, err)
	}
}

// Where a request names the bucket.
func TestAddressing(t *testing.T) {
	var asked []string
	if !behindProxy(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Host+r.URL.Path)
		w.WriteHeader(http.StatusForbidden)
	})) {
		return
	}
	for _, c := range []struct {
		endpoint, bucket string
		style            source.Addressing
		want             string
	}{
		{"http://s3.amazonaws.com", "data", "", "data.s3.us-east-1.amazonaws.com/key"},
		{"http://s3.amazonaws.com", "data", source.AddressingPath, "s3.us-east-1.amazonaws.com/data/key"},
		{"http://s3.amazonaws.com", "data", source.AddressingVirtual, "data.s3.us-east-1.amazonaws.com/key"},
		{"http://cos.ap-beijing.myqcloud.com", "data-125", "", "cos.ap-beijing.myqcloud.com/data-125/key"},
		{"http://cos.ap-beijing.myqcloud.com", "data-125", source.AddressingVirtual, "data-125.cos.ap-beijing.myqcloud.com/key"},
	} {
		b, err := s3.Open(t.Context(), source.Config{URL: "s3://" + c.bucket, Endpoint: c.endpoint, Region: "us-east-1", Anonymous: true, Addressing: c.style})
		if err != nil {
			t.Fatal(err)
		}
		asked = nil
		if _, err := b.Stat(t.Context(), "key"); !errors.Is(err, source.ErrDenied) || len(asked) == 0 || asked[0] != c.want {
			t.Errorf("%s, %q: asked %q, %v, want %s", c.endpoint, c.style, asked, err, c.want)
		}
	}
}
