package objects

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A connection is opened with a reply that has a deadline. The first request over it may come after that, and
// is answered all the same: its body is asked for, and the answer arrives.
func TestTheFirstRequestComesLongAfterItsConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n := &Names{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Write(append([]byte("got "), p...))
	})}
	for _, r := range []struct{ method, body string }{{"PUT", "a body"}, {"GET", ""}} {
		t.Run(r.method, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			us, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer us.Close()
			them, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer them.Close()
			if err := them.SetWriteDeadline(time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
			served := make(chan struct{})
			go func() {
				defer close(served)
				n.ServeConn(ctx, them, func() bool { return true })
			}()
			defer func() { <-served }()
			transport := &http.Transport{
				DialContext:           func(context.Context, string, string) (net.Conn, error) { return us, nil },
				ExpectContinueTimeout: time.Hour,
			}
			defer transport.CloseIdleConnections()
			var body io.Reader
			if r.body != "" {
				body = io.MultiReader(strings.NewReader(r.body)) // of a length that is not told, as puts are
			}
			req, err := http.NewRequestWithContext(ctx, r.method, "http://w/", body)
			if err != nil {
				t.Fatal(err)
			}
			if body != nil {
				req.Header.Set("Expect", "100-continue")
			}
			resp, err := transport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err != nil || string(got) != "got "+r.body {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}
