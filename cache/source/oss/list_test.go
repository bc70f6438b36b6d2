package oss

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/oss/osstest"
)

func list(t *testing.T, b *Bucket, prefix string) map[string]source.Object {
	t.Helper()
	got := map[string]source.Object{}
	if err := b.List(t.Context(), prefix, func(o source.Object) error {
		if _, ok := got[o.Key]; ok {
			t.Errorf("%q was listed twice", o.Key)
		}
		got[o.Key] = o
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return got
}

// TestListManyPages: trees of several shapes, listed by many small pages at once, come out once each and
// as they are.
func TestListManyPages(t *testing.T) {
	s, b := start(t, osstest.Options{Page: 7}, deps{})
	r := rand.New(rand.NewPCG(1, 2))
	want := map[string]string{}
	put := func(key string) {
		etag, err := s.Put(testBucket, key, []byte(key))
		if err != nil {
			t.Fatal(err)
		}
		want[key] = etag
	}
	names := []string{"a", "a b", "a+b", "a%2Fb", "é", "基因", "z\nz", "-", "~", "A", "a.b", "."}
	for range 600 {
		depth := r.IntN(5)
		var parts []string
		for range depth + 1 {
			parts = append(parts, names[r.IntN(len(names))])
		}
		put(strings.Join(parts, "/"))
	}
	for i := range 150 {
		put(fmt.Sprintf("flat/%03d", i))
	}
	put("flat/")   // a marker
	put("/rooted") // a leading slash
	put("flat")    // an object beside a folder
	for _, prefix := range []string{"", "a/", "flat", "flat/", "flat/1", "a+b/", "/", "none", "基"} {
		got := list(t, b, prefix)
		n := 0
		for key, etag := range want {
			if !strings.HasPrefix(key, prefix) {
				continue
			}
			n++
			o, ok := got[key]
			if !ok || o.Version != etag || o.Size != int64(len(key)) || o.ModTime.IsZero() {
				t.Errorf("prefix %q: key %q: %+v", prefix, key, o)
			}
		}
		if len(got) != n {
			t.Errorf("prefix %q: %d keys listed, %d put", prefix, len(got), n)
		}
	}
	// What a listing says binds a read.
	for key, o := range list(t, b, "flat/") {
		if o.Size == 0 {
			continue
		}
		if got, err := read(t, b, o, 0, o.Size); err != nil || string(got) != key {
			t.Errorf("%q: %q, %v", key, got, err)
		}
	}
}

func TestListEndsWithYield(t *testing.T) {
	s, b := start(t, osstest.Options{Page: 5}, deps{})
	for i := range 100 {
		if _, err := s.Put(testBucket, fmt.Sprint(i), nil); err != nil {
			t.Fatal(err)
		}
	}
	enough, n := errors.New("enough"), 0
	err := b.List(t.Context(), "", func(source.Object) error {
		if n++; n == 8 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || n != 8 {
		t.Errorf("%v after %d objects", err, n)
	}
}

// TestListFollowsSymlinks: a link is listed as what a read of it gives, or a read would never match.
func TestListFollowsSymlinks(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{})
	if _, err := s.Put(testBucket, "target", []byte("content")); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"link": "target", "dangling": "nothing"} {
		a, err := b.do(t.Context(), request{op: "put", method: "PUT", key: link, params: map[string]string{"symlink": ""},
			header: map[string]string{"x-oss-symlink-target": target}})
		if err != nil {
			t.Fatal(err)
		}
		a.body.Close()
	}
	got := list(t, b, "")
	if content, err := read(t, b, got["link"], 0, 7); err != nil || string(content) != "content" || got["link"].Size != 7 {
		t.Errorf("link: %+v %q %v", got["link"], content, err)
	}
	if o := got["dangling"]; o.Skip == "" || o.Version != "" {
		t.Errorf("a link to nothing: %+v", o)
	}
	if _, err := b.Stat(t.Context(), "dangling"); !errors.Is(err, source.ErrNotFound) {
		t.Errorf("a link to nothing: %v", err)
	}
}

// TestListWithLinksThatCannotBeFollowed: they are listed with the reason, and keep no other from being listed; one that is
// not answered for is asked for again alone, and its answer is a sign of life.
func TestListWithLinksThatCannotBeFollowed(t *testing.T) {
	answers := map[string][]int{"archived": {400}, "denied": {403}, "gone": {404}, "busy": {503, 503, 200}, "good": {200}, "unversioned": {200}}
	var mu sync.Mutex
	asked := map[string]int{}
	b := withHandler(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			fmt.Fprint(w, "<ListBucketResult>")
			for key := range answers {
				fmt.Fprintf(w, "<Contents><Key>%s</Key><Type>Symlink</Type><ETag>\"link\"</ETag></Contents>", key)
			}
			fmt.Fprint(w, "</ListBucketResult>")
			return
		}
		mu.Lock()
		defer mu.Unlock()
		key := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
		status := answers[key][min(asked[key], len(answers[key])-1)]
		asked[key]++
		if key != "unversioned" {
			w.Header().Set("ETag", `"v"`)
		}
		w.Header().Set("Content-Length", "7")
		w.WriteHeader(status)
	})
	var signs atomic.Int32
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotFirstResponseByte: func() { signs.Add(1) }})
	page, err := b.Page(ctx, source.PageRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, o := range page.Objects {
		if got[o.Key] = o.Skip; (o.Version == "v") != (o.Skip == "") {
			t.Errorf("%+v", o)
		}
	}
	want := map[string]string{"busy": "", "good": "", "archived": "archived", "denied": "credentials", "gone": "nothing", "unversioned": "version"}
	for key, why := range want {
		if skip, ok := got[key]; !ok || !strings.Contains(skip, why) || (why == "") != (skip == "") {
			t.Errorf("%s: listed %v, skipped for %q", key, ok, skip)
		}
	}
	if n := signs.Load(); len(got) != len(want) || asked["good"] != 1 || n != 10 { // the last makes sure of the credentials
		t.Errorf("%q with %d answers, asked %v", got, n, asked)
	}
}

// A token that ends while links are followed refuses them all, which is no word about any of them.
func TestListWhoseCredentialsEndWhileLinksAreFollowed(t *testing.T) {
	var over atomic.Bool
	b := withHandler(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodHead:
			over.Store(true)
			w.WriteHeader(http.StatusForbidden)
		case over.Load():
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, "<Error><Code>SecurityTokenExpired</Code><Message>The security token has expired.</Message></Error>")
		default:
			fmt.Fprint(w, `<ListBucketResult><Contents><Key>a</Key><Type>Symlink</Type><ETag>"link"</ETag></Contents></ListBucketResult>`)
		}
	})
	if page, err := b.Page(t.Context(), source.PageRequest{}); !errors.Is(err, source.ErrDenied) || len(page.Objects) > 0 && page.Objects[0].Skip == "" {
		t.Errorf("%+v, %v", page, err)
	}
}

// TestStrangeListings: an answer that is not a listing is an error, never an empty bucket.
func TestStrangeListings(t *testing.T) {
	for name, c := range map[string]struct {
		body string
		want error
	}{
		"html":      {"<html><body>Welcome</body></html>", source.ErrInvalid},
		"text":      {"ok", source.ErrInvalid},
		"empty":     {"", source.ErrInvalid},
		"truncated": {`<?xml version="1.0"?><ListBucketResult><Contents><Key>a</Key>`, source.ErrInvalid},
		"encoding":  {"<ListBucketResult><EncodingType>url</EncodingType><Contents><Key>%zz</Key></Contents></ListBucketResult>", source.ErrInvalid},
		"no keys":   {"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", source.ErrInvalid},
	} {
		b := withHandler(t, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte(c.body)) })
		err := b.List(t.Context(), "", func(source.Object) error { return nil })
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// Who wants few names is sent few.
func TestAPageHasNoMoreThanIsAskedFor(t *testing.T) {
	s, b := start(t, osstest.Options{}, deps{})
	for _, key := range []string{"a/1", "a/2", "b", "c"} {
		if _, err := s.Put(testBucket, key, []byte(key)); err != nil {
			t.Fatal(err)
		}
	}
	page, err := b.Page(t.Context(), source.PageRequest{Delimited: true, Max: 2})
	if err != nil || len(page.Objects) != 1 || len(page.Prefixes) != 1 || !page.More {
		t.Errorf("%+v, %v", page, err)
	}
}
