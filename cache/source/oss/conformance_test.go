package oss

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
	"github.com/stepcache/stepcache/cache/source/oss/osstest"
	"github.com/stepcache/stepcache/cache/source/sourcetest"
)

const testBucket = "genomes"

// secret writes a key pair as a mounted Secret has it.
func secret(t *testing.T, c osstest.Credential) string {
	t.Helper()
	dir := t.TempDir()
	writeSecret(t, dir, c)
	return dir
}

func writeSecret(t *testing.T, dir string, c osstest.Credential) {
	t.Helper()
	for name, value := range map[string]string{credentials.KeyID: c.AccessKeyID, credentials.KeySecret: c.AccessKeySecret,
		credentials.KeyToken: c.Token} {
		path := filepath.Join(dir, name)
		if value == "" {
			os.Remove(path)
			continue
		}
		// Renamed into place, as the kubelet does, so that no half of it is read.
		if err := os.WriteFile(path+".new", []byte(value+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
}

func configOf(t *testing.T, s *osstest.Server) source.Config {
	return source.Config{URL: "oss://" + testBucket, Endpoint: s.Endpoint(), Region: s.Region(),
		CredentialsDir: secret(t, s.Credential())}
}

// start runs a server with one bucket and opens it.
func start(t *testing.T, o osstest.Options, d deps) (*osstest.Server, *Bucket) {
	t.Helper()
	s := osstest.StartT(t, o)
	s.MakeBucket(testBucket)
	b, err := open(configOf(t, s), d)
	if err != nil {
		t.Fatal(err)
	}
	return s, b
}

func TestConformance(t *testing.T) {
	sourcetest.Run(t, func(t *testing.T) sourcetest.Fixture {
		s := osstest.StartT(t, osstest.Options{})
		s.MakeBucket(testBucket)
		return sourcetest.Fixture{
			Config: configOf(t, s),
			Open: func(ctx context.Context, c source.Config) (source.Source, error) {
				b, err := open(c, deps{part: 1 << 20})
				if err != nil {
					return nil, err
				}
				return b, nil
			},
			Digest: source.CRC64ECMA,
			Part:   1 << 20,
			PutByHand: func(t *testing.T, key string, content []byte) {
				if _, err := s.Put(testBucket, key, content); err != nil {
					t.Fatal(err)
				}
			},
			NoKey: func(key string) string {
				if len(key) > 1023 {
					return "OSS takes keys of up to 1023 bytes"
				}
				return ""
			},
			Leftovers: func(t *testing.T) int { return s.Uploads(testBucket) },
		}
	})
}
