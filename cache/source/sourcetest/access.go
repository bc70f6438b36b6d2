package sourcetest

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/test/bucket"
)

// all runs one operation of each kind and checks how it fails.
func all(t *testing.T, src source.Source, kind error, parts ...string) {
	t.Helper()
	o := source.Object{Key: "k", Size: 10, Version: "0123456789abcdef0123456789abcdef"}
	_, err := src.Stat(t.Context(), "k")
	wantKind(t, err, kind, append(parts, "k")...)
	_, err = read(t.Context(), src, o, 0, 10)
	wantKind(t, err, kind, parts...)
	_, err = src.Put(t.Context(), "k", strings.NewReader("0123456789"), 10)
	wantKind(t, err, kind, parts...)
	wantKind(t, src.List(t.Context(), "", func(source.Object) error { return nil }), kind, parts...)
}

func testNoBucket(t *testing.T, s *suite) {
	c := s.Config
	c.URL += "-missing"
	src, err := s.Open(t.Context(), c)
	if err != nil { // a folder is looked at when it is opened
		wantKind(t, err, source.ErrNoBucket, "missing")
		return
	}
	all(t, src, source.ErrNoBucket, "missing")
}

func (s *suite) needsCredentials(t *testing.T) {
	t.Helper()
	if s.Config.CredentialsDir == "" {
		t.Skip("the store has no credentials")
	}
}

// copyCredentials makes a folder of its own for a test to change.
func (s *suite) copyCredentials(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	entries, err := os.ReadDir(s.Config.CredentialsDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(s.Config.CredentialsDir, e.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, e.Name()), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func testWrongCredentials(t *testing.T, s *suite) {
	s.needsCredentials(t)
	s.put(t, "k", content(1, 10))
	for key, value := range map[string]string{"accessKeyID": "nobody", "accessKeySecret": "wrong-secret-value"} {
		c := s.Config
		c.CredentialsDir = s.copyCredentials(t)
		if err := os.WriteFile(filepath.Join(c.CredentialsDir, key), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
		src, err := s.Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		_, err = src.Stat(t.Context(), "k")
		wantKind(t, err, source.ErrDenied)
		if strings.Contains(err.Error(), "wrong-secret-value") {
			t.Errorf("the error shows a secret: %v", err)
		}
		all(t, src, source.ErrDenied)
	}
	c := s.Config
	c.CredentialsDir, c.Anonymous = "", true
	src, err := s.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	all(t, src, source.ErrDenied)
}

// Missing credentials are told with the folder and the key, and may come later.
func testMissingCredentials(t *testing.T, s *suite) {
	s.needsCredentials(t)
	want := content(2, 10)
	s.put(t, "k", want)
	c := s.Config
	c.CredentialsDir = filepath.Join(t.TempDir(), "absent")
	src, err := s.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	all(t, src, source.ErrDenied, c.CredentialsDir, "accessKeyID")
	full := s.copyCredentials(t)
	if err := os.Mkdir(c.CredentialsDir, 0o700); err != nil {
		t.Fatal(err)
	}
	move := func(key string) {
		if err := os.Rename(filepath.Join(full, key), filepath.Join(c.CredentialsDir, key)); err != nil {
			t.Fatal(err)
		}
	}
	move("accessKeyID")
	all(t, src, source.ErrDenied, c.CredentialsDir, "accessKeySecret")
	move("accessKeySecret")
	o, err := src.Stat(t.Context(), "k")
	if err != nil {
		t.Fatalf("with the credentials there: %v", err)
	}
	// Rotation: wrong ones are used once they are there, and right ones again.
	key := filepath.Join(c.CredentialsDir, "accessKeySecret")
	right, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, key, []byte("rotated-away"))
	_, err = read(t.Context(), src, o, 0, o.Size)
	wantKind(t, err, source.ErrDenied)
	replace(t, key, append(right, '\n'))
	if got, err := read(t.Context(), src, o, 0, o.Size); err != nil || string(got) != string(want) {
		t.Errorf("after rotation: %d bytes, %v", len(got), err)
	}
}

// replace renames a file into place, as the kubelet does.
func replace(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// The authority of the store's certificate is in the Secret, may come later, and is replaced there.
func testAuthority(t *testing.T, s *suite) {
	s.needsCredentials(t)
	if s.Config.Endpoint == "" {
		t.Skip("the store has no network")
	}
	ours, next := bucket.NewAuthority(t), bucket.NewAuthority(t)
	proxy := bucket.TLSAt(t, s.Config.Endpoint, ours.Certificate(t, "127.0.0.1", time.Hour))
	c := s.Config
	c.Endpoint, c.CredentialsDir = proxy.Endpoint(), s.copyCredentials(t)
	file := filepath.Join(c.CredentialsDir, "ca.crt")
	src, err := s.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	want := content(3, 300_000)
	o := s.put(t, "k", want)
	right := func() {
		t.Helper()
		if got, err := read(t.Context(), src, o, 0, o.Size); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if _, err := src.Put(t.Context(), "other", bytes.NewReader(want), o.Size); err != nil {
			t.Error(err)
		}
	}
	all(t, src, source.ErrInvalid, "ca.crt of "+c.CredentialsDir)
	replace(t, file, ours.PEM)
	right()
	// A certificate of another: that worked before is no reason to give up.
	proxy.Show(next.Certificate(t, "127.0.0.1", time.Hour))
	_, err = read(t.Context(), src, o, 0, o.Size)
	wantKind(t, err, source.ErrUnavailable, "k", "ca.crt of "+c.CredentialsDir)
	replace(t, file, slices.Concat(ours.PEM, next.PEM))
	right()
	proxy.Show(next.Certificate(t, "127.0.0.1", -time.Hour))
	_, err = read(t.Context(), src, o, 0, o.Size)
	wantKind(t, err, source.ErrUnavailable, "k", "clock")
	replace(t, file, ours.PEM[:len(ours.PEM)/2])
	all(t, src, source.ErrDenied, "ca.crt", c.CredentialsDir)
}
