package source_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

func TestSplit(t *testing.T) {
	for url, want := range map[string][3]string{
		"s3://b":                     {"s3", "b", ""},
		"s3://b/":                    {"s3", "b", ""},
		"s3://b/p/q/":                {"s3", "b", "p/q/"},
		"oss://b/p?x#y%20 z":         {"oss", "b", "p?x#y%20 z"},
		"s3://b//odd":                {"s3", "b", "/odd"},
		"file:///a/b":                {"file", "", "/a/b"},
		"file:///":                   {"file", "", "/"},
		"s3://my.bucket-1/chr1/x.fa": {"s3", "my.bucket-1", "chr1/x.fa"},
	} {
		scheme, bucket, prefix, err := source.Split(url)
		if err != nil || [3]string{scheme, bucket, prefix} != want {
			t.Errorf("%s: %q %q %q, %v", url, scheme, bucket, prefix, err)
		}
	}
	for url, hint := range map[string]string{
		"":                       "s3://",
		"bucket/prefix":          "s3://",
		"s3:///key":              "bucket",
		"http://host/b":          "s3",
		"S3://b":                 "s3",
		"file://relative":        "file:///",
		"s3://id:secret@b/p":     "Secret",
		"s3://host:9000/b":       "endpoint",
		"oss://id:secret@b?x":    "Secret",
		"s3://b c/d":             "endpoint",
		"id:secret@s3://bucket/": "file",
	} {
		_, _, _, err := source.Split(url)
		if !errors.Is(err, source.ErrInvalid) || !strings.Contains(err.Error(), hint) {
			t.Errorf("%q: %v", url, err)
		} else if strings.Contains(err.Error(), "id:secret") {
			t.Errorf("%q: the error shows credentials: %v", url, err)
		}
	}
}

func TestEndpoint(t *testing.T) {
	for in, want := range map[string]struct {
		host   string
		secure bool
	}{
		"host":               {"host", true},
		"host:9000":          {"host:9000", true},
		"http://host:9000":   {"host:9000", false},
		"https://host/":      {"host", true},
		"[::1]:9000":         {"[::1]:9000", true},
		"http://[::1]:9000/": {"[::1]:9000", false},
	} {
		host, secure, err := source.Endpoint(in)
		if err != nil || host != want.host || secure != want.secure {
			t.Errorf("%s: %q %v %v", in, host, secure, err)
		}
	}
	for _, in := range []string{"", "ftp://host", "http://", "host/bucket", "http://u:p@host", "host?x", "ho st", "://"} {
		if _, _, err := source.Endpoint(in); !errors.Is(err, source.ErrInvalid) || strings.Contains(err.Error(), "u:p") {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestIdentifyTellsVersionsApart(t *testing.T) {
	base := source.Object{Key: "k", Version: "v", Size: 1}
	seen := map[source.ID]string{source.Identify("s3://b", base): "base"}
	for name, id := range map[string]source.ID{
		"url":          source.Identify("s3://c", base),
		"key":          source.Identify("s3://b", source.Object{Key: "l", Version: "v", Size: 1}),
		"version":      source.Identify("s3://b", source.Object{Key: "k", Version: "w", Size: 1}),
		"size":         source.Identify("s3://b", source.Object{Key: "k", Version: "v", Size: 2}),
		"moved border": source.Identify("s3://b", source.Object{Key: "kv", Version: "", Size: 1}),
	} {
		if other, ok := seen[id]; ok {
			t.Errorf("%s and %s share an ID", name, other)
		}
		seen[id] = name
	}
	if source.Identify("s3://b", source.Object{Key: "k", Version: "v", Size: 1, Skip: "x"}) != source.Identify("s3://b", base) {
		t.Error("the ID depends on more than URL, key, version and size")
	}
}
