package scheme_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/scheme"
)

func TestOpenDecorates(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "k"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := scheme.Open(t.Context(), source.Config{URL: "file://" + dir, MaxRequests: 1}, scheme.Elapsed(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	o, err := s.Stat(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Get(t.Context(), o, 3, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if got, err := io.ReadAll(b); err != nil || string(got) != "tent" {
		t.Errorf("%q, %v", got, err)
	}
	if c := s.Meter.Counts(); c.Requests["get"] != 1 || c.Requests["stat"] != 1 || c.Read != 4 || s.URL() != "file://"+dir {
		t.Errorf("%s: %+v", s.URL(), c)
	}
}

// Every kind of store opens without a request, and names itself canonically.
func TestOpenByScheme(t *testing.T) {
	for _, c := range []struct {
		config source.Config
		url    string
	}{
		{source.Config{URL: "s3://bucket/prefix/", Region: "eu-central-1"}, "s3://bucket"},
		{source.Config{URL: "s3://bucket", Endpoint: "s3.eu-central-1.amazonaws.com"}, "s3://bucket"},
		{source.Config{URL: "s3://bucket/p", Endpoint: "http://store:9000/"}, "s3://store:9000/bucket"},
		{source.Config{URL: "oss://bucket/p", Region: "cn-shanghai", Endpoint: "oss-cn-shanghai.aliyuncs.com"}, "oss://bucket"},
	} {
		s, err := scheme.Open(t.Context(), c.config)
		if err != nil || s.URL() != c.url {
			t.Errorf("%+v: %v, %v", c.config, s, err)
		}
	}
	for _, c := range []source.Config{
		{URL: "gs://bucket"}, {URL: ""}, {URL: "s3://"}, {URL: "s3://b"}, {URL: "s3://bucket", Endpoint: "host/path"}, {URL: "file:///no/such/folder/here"},
		{URL: "s3://bucket", CredentialKeys: map[string]string{"nope": "x"}},
	} {
		if s, err := scheme.Open(t.Context(), c); err == nil || s != nil || !errors.Is(err, source.ErrInvalid) && !strings.HasPrefix(c.URL, "file") {
			t.Errorf("%+v: %v, %v", c, s, err)
		}
	}
}

func TestPrefix(t *testing.T) {
	for url, want := range map[string]string{
		"s3://b": "", "s3://b/": "", "s3://b/a/b/": "a/b/", "oss://b/chr": "chr", "file:///a/b": "", "nonsense": "",
	} {
		if got := scheme.Prefix(url); got != want {
			t.Errorf("%s: %q", url, got)
		}
	}
}
