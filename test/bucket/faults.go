package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"testing"
)

// Fault is what happens to one request. The zero Fault passes it on untouched.
type Fault struct {
	// Status answers with this status and an S3 error of the given Code instead of asking the server.
	Status     int
	Code       string
	RetryAfter string
	// Reset closes the connection with a TCP reset before any answer.
	Reset bool
	// Stall holds the request until the client gives up or the proxy is closed.
	Stall bool
	// Truncate, when positive, ends the connection after this many bytes of the answer's body.
	Truncate int64
	// Flip, when positive, inverts the lowest bit of the byte with this number (from 1) of the body.
	Flip int64
	// Header changes the answer's header.
	Header func(http.Header)
}

type faultKey struct{}

func withFault(ctx context.Context, f Fault) context.Context {
	return context.WithValue(ctx, faultKey{}, f)
}

// FaultProxy is an HTTP proxy in front of a Server whose behaviour a test sets. It keeps the Host header,
// so that signatures stay valid.
type FaultProxy struct {
	server *httptest.Server
	rule   atomic.Pointer[func(*http.Request) Fault]
	bytes  atomic.Int64
	count  atomic.Int64
}

// Faults starts a proxy in front of s for the length of the test.
func Faults(t testing.TB, s *Server) *FaultProxy {
	t.Helper()
	return faults(t, "bucket", s.transport())
}

// FaultsAt starts a proxy in front of the server at an http:// URL, which need not be a Server.
func FaultsAt(t testing.TB, target string) *FaultProxy {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil || u.Scheme != "http" {
		t.Fatalf("%q is not an http:// URL: %v", target, err)
	}
	return faults(t, u.Host, &http.Transport{})
}

func faults(t testing.TB, host string, transport *http.Transport) *FaultProxy {
	f := &FaultProxy{}
	closed := make(chan struct{})
	proxy := &httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", host
			r.Out.Host = r.In.Host
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { panic(http.ErrAbortHandler) },
		ModifyResponse: func(r *http.Response) error {
			fault, _ := r.Request.Context().Value(faultKey{}).(Fault)
			if fault.Header != nil {
				fault.Header(r.Header)
			}
			r.Body = &faultyBody{ReadCloser: r.Body, fault: fault, total: &f.bytes}
			return nil
		},
	}
	f.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.count.Add(1)
		var fault Fault
		if rule := f.rule.Load(); rule != nil {
			fault = (*rule)(r)
		}
		switch {
		case fault.Reset:
			reset(w)
		case fault.Stall:
			select {
			case <-r.Context().Done():
			case <-closed:
			}
			panic(http.ErrAbortHandler)
		case fault.Status != 0:
			if fault.RetryAfter != "" {
				w.Header().Set("Retry-After", fault.RetryAfter)
			}
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(fault.Status)
			fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>injected</Message></Error>`, fault.Code)
		default:
			proxy.ServeHTTP(w, r.WithContext(withFault(r.Context(), fault)))
		}
	}))
	t.Cleanup(func() {
		close(closed)
		f.server.CloseClientConnections()
		f.server.Close()
		transport.CloseIdleConnections()
	})
	return f
}

// Set makes rule decide about every later request; nil passes everything on.
func (f *FaultProxy) Set(rule func(*http.Request) Fault) {
	if rule == nil {
		f.rule.Store(nil)
		return
	}
	f.rule.Store(&rule)
}

// Endpoint is the proxy's URL.
func (f *FaultProxy) Endpoint() string { return f.server.URL }

// BodyBytes counts the bytes of answers' bodies that were passed on, Requests all requests.
func (f *FaultProxy) BodyBytes() int64 { return f.bytes.Load() }

// Requests counts the requests received.
func (f *FaultProxy) Requests() int64 { return f.count.Load() }

func reset(w http.ResponseWriter) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // close with a reset
	}
	_ = c.Close()
}

// faultyBody truncates or flips what it reads.
type faultyBody struct {
	io.ReadCloser
	fault Fault
	read  int64
	total *atomic.Int64
}

var errTruncated = errors.New("injected truncation")

func (b *faultyBody) Read(p []byte) (int, error) {
	if t := b.fault.Truncate; t > 0 {
		if b.read >= t {
			return 0, errTruncated
		}
		p = p[:min(int64(len(p)), t-b.read)]
	}
	n, err := b.ReadCloser.Read(p)
	if at := b.fault.Flip - 1; at >= b.read && at < b.read+int64(n) {
		p[at-b.read] ^= 1
	}
	b.read += int64(n)
	b.total.Add(int64(n))
	return n, err
}
