package s3

import (
	"os"
	"path/filepath"
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
