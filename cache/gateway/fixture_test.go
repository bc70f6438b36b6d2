package gateway_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/gateway"
)

const (
	accessKey, secretKey = "WRITER", "writer-secret"
	readKey, readSecret  = "READER", "reader-secret"
	bucket               = "results"
)

// fixture is a gateway on a real connection.
type fixture struct {
	*testing.T
	m      *memory
	other  *memory
	server *httptest.Server
	url    string
	logged *bytes.Buffer
	counts *gateway.Metrics
}

type server = httptest.Server

type option func(*gateway.Config, *server)

func overTLS(_ *gateway.Config, s *httptest.Server) { s.EnableHTTP2 = true }

func serve(t *testing.T, options ...option) *fixture {
	f := &fixture{T: t, m: newMemory(), other: newMemory(), logged: new(bytes.Buffer), counts: gateway.NewMetrics()}
	config := gateway.Config{
		Buckets: map[string]gateway.Objects{bucket: f.m, "other": f.other, "frozen": readOnly{f.m}},
		Keys: func() []gateway.Credential {
			return []gateway.Credential{{AccessKey: accessKey, SecretKey: secretKey, Write: true}, {AccessKey: readKey, SecretKey: readSecret}}
		},
		Domains: []string{"test", "S3.test"},
		Logger:  textLogger(f.logged), Metrics: f.counts,
	}
	f.server = httptest.NewUnstartedServer(nil)
	for _, o := range options {
		o(&config, f.server)
	}
	h, err := gateway.New(config)
	if err != nil {
		t.Fatal(err)
	}
	f.server.Config.Handler = h
	if f.server.EnableHTTP2 {
		f.server.StartTLS()
	} else {
		f.server.Start()
	}
	f.url = f.server.URL
	t.Cleanup(func() {
		f.server.CloseClientConnections()
		f.server.Close()
	})
	return f
}

func (f *fixture) client(t *testing.T, key, secret string, trailing bool) *minio.Client {
	t.Helper()
	host, _ := strings.CutPrefix(f.url, "http://")
	host, secure := strings.CutPrefix(host, "https://")
	c, err := minio.New(host, &minio.Options{
		Creds: credentials.NewStaticV4(key, secret, ""), Secure: secure, Transport: f.server.Client().Transport, TrailingHeaders: trailing, MaxRetries: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	r.Read(b)
	return b
}

// codeOf is the code of a minio-go error.
func codeOf(err error) string {
	var r minio.ErrorResponse
	if errors.As(err, &r) {
		return r.Code
	}
	if err != nil {
		return err.Error()
	}
	return "none"
}

func textLogger(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }
