package objects_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// certificate gives the gateways a certificate, and clients the pool that trusts it.
func (tr *tier) certificate() {
	tr.t.Helper()
	s := httptest.NewTLSServer(nil)
	defer s.Close()
	pair := s.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		tr.t.Fatal(err)
	}
	tr.files("tls", map[string]string{
		"tls.crt": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})),
		"tls.key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
	})
	tr.trusted = x509.NewCertPool()
	tr.trusted.AddCert(s.Certificate())
}

// impatient is a client of a worker over a connection of its own.
type impatient struct {
	minio.Core
	transport *http.Transport

	mu    sync.Mutex
	local []string // addresses of its connections
}

// states are those of a worker's ends of its connections, where they are known.
func (c *impatient) states(at map[string]string) (out []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.local {
		if s := at[a]; s != "" {
			out = append(out, s)
		}
	}
	return out
}

func (tr *tier) impatient(i int) *impatient {
	tr.t.Helper()
	c := &impatient{transport: &http.Transport{}}
	var dialer net.Dialer
	c.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		nc, err := dialer.DialContext(ctx, network, addr)
		if err == nil {
			c.mu.Lock()
			c.local = append(c.local, nc.LocalAddr().String())
			c.mu.Unlock()
		}
		return nc, err
	}
	if tr.trusted != nil {
		c.transport.TLSClientConfig = &tls.Config{RootCAs: tr.trusted}
	}
	core, err := minio.NewCore(tr.workers[i].gateway, &minio.Options{
		Creds: credentials.NewStaticV4(accessKey, secretKey, ""), Secure: tr.trusted != nil, Region: "us-east-1",
		BucketLookup: minio.BucketLookupPath, MaxRetries: 1, Transport: c.transport,
	})
	if err != nil {
		tr.t.Fatal(err)
	}
	c.Core = *core
	tr.t.Cleanup(c.transport.CloseIdleConnections)
	return c
}

// givesUp makes a request and gives it up once all of it is sent.
func (c *impatient) givesUp(ctx context.Context, do func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sent := false
	err := do(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(i httptrace.WroteRequestInfo) {
		sent = i.Err == nil
		cancel()
	}}))
	if !sent || !errors.Is(err, context.Canceled) {
		return fmt.Errorf("the request was not sent and given up: %w", err)
	}
	return nil
}

// sockets are the states of a worker's ends of connections to its gateway, by the address of the other end.
func sockets(t *testing.T, gateway string) map[string]string {
	t.Helper()
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 3 && address(f[1]) == gateway {
			out[address(f[2])] = f[3]
		}
	}
	return out
}

// address is one of /proc/net/tcp, which has the four bytes of the IP address the other way round.
func address(s string) string {
	b, err := hex.DecodeString(strings.Replace(s, ":", "", 1))
	if err != nil || len(b) != 6 {
		return ""
	}
	return fmt.Sprintf("%d.%d.%d.%d:%d", b[3], b[2], b[1], b[0], int(b[4])<<8|int(b[5]))
}

// A client that times out on a worker that hangs does its write through another one. The worker that hung
// finds the first request in its connection, and does nothing of it, whoever owns the name.
func TestAWorkerThatHungDoesNothingThatItsClientsGaveUp(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%v", secure), func(t *testing.T) {
			t.Parallel() // it waits most of the time
			tr := newTier(t, "")
			if secure {
				tr.certificate()
			}
			tr.spawned(2)
			ctx := t.Context()
			type given struct {
				key string
				c   *impatient
				do  func(ctx context.Context) error
			}
			var all []*given
			tr.mustPut(0, "from", []byte("copied"))
			for owner := range 2 {
				for n := range 8 {
					for _, kind := range []string{"delete", "delete many", "copy", "put"} {
						g := &given{key: tr.keyOwnedBy(owner, fmt.Sprintf("%s/%d", kind, n)), c: tr.impatient(1)}
						g.do = map[string]func(ctx context.Context) error{
							"delete": func(ctx context.Context) error {
								return g.c.RemoveObject(ctx, "data", g.key, minio.RemoveObjectOptions{})
							},
							"delete many": func(ctx context.Context) error {
								objects := make(chan minio.ObjectInfo, 1)
								objects <- minio.ObjectInfo{Key: g.key}
								close(objects)
								for e := range g.c.RemoveObjects(ctx, "data", objects, minio.RemoveObjectsOptions{}) {
									return e.Err
								}
								return nil
							},
							"copy": func(ctx context.Context) error {
								_, err := g.c.CopyObject(ctx, "data", "from", "data", g.key, nil, minio.CopySrcOptions{}, minio.PutObjectOptions{})
								return err
							},
							"put": func(ctx context.Context) error {
								_, err := g.c.PutObject(ctx, "data", g.key, strings.NewReader("given up"), 8, "", "", minio.PutObjectOptions{DisableContentSha256: true})
								return err
							},
						}[kind]
						all = append(all, g)
					}
				}
			}
			each := func(what string, f func(g *given) error) {
				t.Helper()
				failed := make(chan error, len(all))
				for _, g := range all {
					go func() { failed <- f(g) }()
				}
				for range all {
					if err := <-failed; err != nil {
						t.Errorf("%s: %v", what, err)
					}
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			each("put what is to be kept or replaced, over the connection that stays", func(g *given) error {
				_, err := g.c.PutObject(ctx, "data", g.key, strings.NewReader("old"), 3, "", "", minio.PutObjectOptions{})
				return err
			})
			goOn := tr.hangs(1)
			each("give up", func(g *given) error { return g.c.givesUp(ctx, g.do) })
			eventually(t, "the worker's ends of the connections are told that they are closed", func() error {
				at := sockets(t, tr.workers[1].gateway)
				for _, g := range all {
					if s := g.c.states(at); slices.Contains(s, "01") { // established
						return fmt.Errorf("%s: %q", g.key, s)
					}
				}
				return nil
			})
			each("put again elsewhere", func(g *given) error {
				_, err := tr.put(0, g.key, []byte("new"), minio.PutObjectOptions{})
				return err
			})
			goOn()
			eventually(t, "the worker has done with the connections", func() error {
				at := sockets(t, tr.workers[1].gateway)
				for _, g := range all {
					if s := g.c.states(at); len(s) > 0 {
						return fmt.Errorf("%s: %q", g.key, s)
					}
				}
				return nil
			})
			for _, g := range all {
				if got, _, err := tr.inBucket(g.key); err != nil || !bytes.Equal(got, []byte("new")) {
					t.Errorf("%s was put last as %q, and is %q in the bucket, %v", g.key, "new", got, err)
				}
			}
		})
	}
}
