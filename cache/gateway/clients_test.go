package gateway_test

import (
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"github.com/stepcache/stepcache/test/s3clients"
)

func TestRealClients(t *testing.T) {
	f := serve(t)
	s3clients.RoundTrips(t, f.endpoint(t))
	f.isEmpty(t)
}

// Over TLS, SDKs leave the payload unsigned and send checksums as trailers.
func TestRealClientsOverTLS(t *testing.T) {
	f := serve(t, overTLS)
	s3clients.RoundTrips(t, f.endpoint(t))
	f.isEmpty(t)
}

func (f *fixture) endpoint(t *testing.T) s3clients.Endpoint {
	e := s3clients.Endpoint{URL: f.url, Bucket: bucket, Region: "us-east-1", AccessKey: accessKey, SecretKey: secretKey}
	if certificate := f.server.Certificate(); certificate != nil {
		e.CA = filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(e.CA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

func (f *fixture) isEmpty(t *testing.T) {
	t.Helper()
	if got := f.m.state(); got != "0 objects, 0 uploads, 0 parts" {
		t.Errorf("left behind: %s", got)
	}
}
