package artifact_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stepcache/stepcache/artifact"
	"github.com/stepcache/stepcache/artifact/plugin"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/ports"
)

func TestConfigurationThatIsRefused(t *testing.T) {
	f := &fixture{argoexec: connect(t, serve(t, artifact.Options{Getenv: keys}))}
	for configuration, parts := range map[string][]string{
		"":                                  {"say which Dataset"},
		"just text":                         {"not a YAML mapping"},
		"[a, b]":                            {"not a YAML mapping"},
		"a: b: c":                           {"not a YAML mapping"},
		"dataset: [a]":                      {"dataset must be a string"},
		"dataset: a\nbukket: b":             {`unknown key "bukket"`, "bucket"},
		"bucket: b":                         {"say which Dataset"},
		"dataset: a/b":                      {`dataset "a/b"`},
		"dataset: a\nnamespace: ../x":       {`namespace "../x"`},
		"dataset: a\nendpoint: ftp://x":     {"endpoint"},
		"dataset: a\nendpoint: http://x/y":  {"endpoint"},
		"dataset: artifacts\nbucket: B_A_D": {"B_A_D"},
		// Credentials, in whatever spelling, are refused without being repeated.
		"dataset: a\naccessKey: hush":                               {`"accessKey" looks like a credential`, "STEPCACHE_S3_ACCESS_KEY_ID", "STEPCACHE_S3_CREDENTIALS"},
		"dataset: a\nsecret_key: hush":                              {`"secret_key" looks like a credential`},
		"dataset: a\nauth: {user: x, password: hush}":               {`"password" looks like a credential`},
		"dataset: a\nx: [{SESSION-TOKEN: hush}]":                    {`"SESSION-TOKEN" looks like a credential`},
		"dataset: a\naccessKeySecret: {name: my-cred, key: hush}":   {`"accessKeySecret" looks like a credential`},
		"bucket: b\nendpoint: http://hush:hush@bucket.example:9000": {"endpoint holds credentials"},
		"dataset: a\nsecretKey: &x [*x]\n  hush":                    {"not a YAML mapping"},
	} {
		a := f.artifact("k")
		a.Plugin.Configuration = configuration
		_, err := f.isDirectory(t.Context(), a)
		wantError(t, err, parts...)
		if err != nil && strings.Contains(err.Error(), "hush") {
			t.Errorf("repeats a secret: %v", err)
		}
	}
}

func TestArtifactsThatCannotBe(t *testing.T) {
	f := start(t, artifact.Options{})
	path := f.write(t, "out", []byte("x"), 0o644)
	for key, part := range map[string]string{
		"": "no key", "/": "no key", "//": "empty", "/rooted": "empty", "a//b": "empty", "..": ". or ..", "a/../b": ". or ..",
		"../../other/k": ". or ..", "./a": ". or ..", "a/.": ". or ..", "nul\x00": "parts", strings.Repeat("k", 1025): "1025 bytes",
	} {
		a := f.artifact(key)
		for call, err := range map[string]error{
			"save": f.save(t.Context(), path, a), "load": f.load(t.Context(), a, f.path("in")), "delete": f.delete(t.Context(), a),
			"stream": f.open(t.Context(), a, io.Discard),
		} {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s %.20q: %v, want %q", call, key, err, part)
			}
		}
	}
	wantError(t, f.load(t.Context(), &plugin.Artifact{Name: "a"}, f.path("in")), "plugin")
	wantError(t, f.save(t.Context(), path, nil), "plugin")
	wantError(t, f.save(t.Context(), "relative", f.artifact("k")), "absolute")
	wantError(t, f.load(t.Context(), f.artifact("k"), ""), "absolute")
	wantError(t, f.save(t.Context(), "/", f.artifact("k")), "artifact")
	wantError(t, f.save(t.Context(), f.path("none"), f.artifact("k")), "no such file")
	wantError(t, f.save(t.Context(), path, f.artifact("k/")), "ends in a slash")
	f.write(t, "latin/caf\xe9", []byte("x"), 0o644)
	wantError(t, f.save(t.Context(), f.path("latin"), f.artifact("k")), "not UTF-8")
	f.write(t, "deep/"+strings.Repeat(strings.Repeat("d", 200)+"/", 6)+"f", []byte("x"), 0o644)
	wantError(t, f.save(t.Context(), f.path("deep"), f.artifact("k")), "1024")
	if left := f.objects(t); len(left) > 0 {
		t.Errorf("stored: %v", left)
	}
}

// A bucket may hold anything. What it lists never becomes a file outside the artifact, nor a file that is
// not the one of that name.
func TestListedNamesThatLeadOut(t *testing.T) {
	for _, evil := range []string{"../evil", "sub/../../evil", "/evil", "a//evil", "./evil", "..", "sub/..", "../evil/"} {
		var gets atomic.Int32
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Method == http.MethodHead:
				w.WriteHeader(http.StatusNotFound)
			case r.URL.Query().Has("list-type"):
				fmt.Fprint(w, listing("k/"+evil))
			default:
				gets.Add(1)
				w.Header().Set("ETag", `"e"`)
				fmt.Fprint(w, "evil")
			}
		}))
		f := &fixture{argoexec: connect(t, serve(t, artifact.Options{Getenv: keys})), dir: t.TempDir()}
		f.configuration = fmt.Sprintf("{endpoint: %q, bucket: bucket}", server.URL)
		err := f.load(t.Context(), f.artifact("k"), f.path("deep/in"))
		wantError(t, err, "cannot be a file below")
		wantError(t, f.open(t.Context(), f.artifact("k"), io.Discard), "cannot be a file below")
		if gets.Load() > 0 {
			t.Errorf("%q was read", evil)
		}
		err = filepath.WalkDir(f.dir, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				t.Errorf("%q made %s", evil, path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		server.Close()
	}
}

// listing is a page of ListObjectsV2 with these keys of four bytes.
func listing(keys ...string) string {
	var b strings.Builder
	b.WriteString(`<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated><EncodingType>url</EncodingType>`)
	for _, k := range keys {
		fmt.Fprintf(&b, `<Contents><Key>%s</Key><Size>4</Size><ETag>"e"</ETag><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>`, k)
	}
	b.WriteString(`</ListBucketResult>`)
	return b.String()
}

// argoexec takes 4 MiB; a listing that is longer cannot be answered, and a part of it would be a wrong one.
func TestListingLargerThanAReply(t *testing.T) {
	total := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !r.URL.Query().Has("list-type") {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		first, page := 0, []string(nil)
		if after := r.URL.Query().Get("start-after"); after != "" {
			n, _ := strconv.Atoi(after[2:9])
			first = n + 1
		}
		for i := first; i < min(first+1000, total); i++ {
			page = append(page, fmt.Sprintf("k/%07d%s", i, strings.Repeat("0", 490)))
		}
		fmt.Fprint(w, listing(page...))
	}))
	defer server.Close()
	f := &fixture{argoexec: connect(t, serve(t, artifact.Options{Getenv: keys}))}
	f.configuration = fmt.Sprintf("{endpoint: %q, bucket: bucket}", server.URL)
	total = 8_100 // of 502 bytes: 4 MiB less a little
	if names, err := f.list(t.Context(), f.artifact("k")); len(names) != total || err != nil {
		t.Errorf("%d names, %v", len(names), err)
	}
	total = 9_000
	names, err := f.list(t.Context(), f.artifact("k"))
	wantError(t, err, "4 MiB", "list a directory below it")
	if len(names) > 0 {
		t.Errorf("%d names of a listing that is not whole", len(names))
	}
}

func TestLinksAndSpecialFiles(t *testing.T) {
	f := start(t, artifact.Options{})
	secret := f.write(t, "secret", []byte("hush"), 0o600)
	f.write(t, "out/dir/file", []byte("1"), 0o644)
	for link, to := range map[string]string{
		"inside": "dir/file", "dir/up": "../dir/file", "out": "../secret", "absolute": secret, "dangling": "none", "folder": "dir", "loop": "loop",
	} {
		if err := os.Symlink(to, f.path("out/"+link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(f.path("out/pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", f.path("out/sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := f.save(t.Context(), f.path("out"), f.artifact("k")); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(f.objects(t), " "); got != "k/dir/file k/dir/up k/inside" {
		t.Errorf("stored: %s", got)
	}
	// The artifact itself may be a link to what lies beside it, and to nothing else.
	for link, to := range map[string]string{"near": "out/dir", "far": "/etc/hostname", "up": "../../etc/hostname"} {
		if err := os.Symlink(to, f.path(link)); err != nil {
			t.Fatal(err)
		}
		err := f.save(t.Context(), f.path(link), f.artifact("l/"+link))
		if link == "near" && err != nil {
			t.Error(err)
		}
		if link != "near" {
			wantError(t, err, "escapes")
		}
	}
	wantError(t, f.save(t.Context(), f.path("out/pipe"), f.artifact("p")), "pipe")

	// A link that waits where an input will be is not followed either.
	victim := f.write(t, "elsewhere/victim", []byte("precious"), 0o644)
	for name, to := range map[string]string{"in1.tmp": victim, "in2.tmp": filepath.Dir(victim)} {
		if err := os.MkdirAll(f.path("inputs"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, f.path("inputs/"+name)); err != nil {
			t.Fatal(err)
		}
	}
	wantError(t, f.load(t.Context(), f.artifact("k/inside"), f.path("inputs/in1.tmp")), "escapes")
	if err := f.load(t.Context(), f.artifact("k"), f.path("inputs/in2.tmp")); err == nil {
		t.Error("a directory was loaded through a link that leads out")
	}
	if got := tree(t, f.path("elsewhere")); len(got) != 1 || got["victim"] != "precious" {
		t.Errorf("%v", got)
	}
}

func TestEmptyDirectory(t *testing.T) {
	overBoth(t, artifact.Options{}, func(t *testing.T, f *fixture) {
		if err := os.MkdirAll(f.path("empty"), 0o755); err != nil {
			t.Fatal(err)
		}
		// One in which nothing can be saved is empty too.
		if err := os.MkdirAll(f.path("links"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/etc/hostname", f.path("links/out")); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"empty", "links"} {
			art := f.artifact("wf/" + name)
			if err := f.save(t.Context(), f.path(name), art); err != nil {
				t.Fatal(err)
			}
			if err := f.load(t.Context(), art, f.path("in-"+name)); err != nil {
				t.Fatal(err)
			}
			if got := tree(t, f.path("in-"+name)); len(got) > 0 {
				t.Errorf("%v", got)
			}
			if names, err := f.list(t.Context(), art); len(names) > 0 || err != nil {
				t.Errorf("%v, %v", names, err)
			}
			if is, err := f.isDirectory(t.Context(), art); !is || err != nil {
				t.Errorf("%v, %v", is, err)
			}
			if err := f.delete(t.Context(), art); err != nil {
				t.Error(err)
			}
		}
		if left := f.objects(t); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// What has the artifact's name as the beginning of its own is another artifact's.
func TestDeleteTakesNothingElse(t *testing.T) {
	overBoth(t, artifact.Options{}, func(t *testing.T, f *fixture) {
		for _, key := range []string{"wf/out/a", "wf/out/b/c", "wf/out2", "wf/ou", "other"} {
			f.server.PutT(t, bucketName, f.prefix+key, []byte("x"))
		}
		for range 2 {
			if err := f.delete(t.Context(), f.artifact("wf/out")); err != nil {
				t.Error(err)
			}
		}
		if got := strings.Join(f.objects(t), " "); got != "other wf/ou wf/out2" {
			t.Errorf("left: %s", got)
		}
	})
}

func TestCredentialsFromAFolderAreReadAgain(t *testing.T) {
	f := &fixture{server: bucket.StartT(t, bucket.Options{}), dir: t.TempDir()}
	if err := f.server.MakeBucket(t.Context(), bucketName); err != nil {
		t.Fatal(err)
	}
	f.write(t, "secrets/artifacts/accessKeyID", []byte(bucket.AccessKey), 0o600)
	secret := f.write(t, "secrets/artifacts/secretAccessKey", []byte("wrong"), 0o600)
	f.write(t, "secrets/other/accessKeyID", []byte(bucket.AccessKey), 0o600)
	f.argoexec = connect(t, serve(t, artifact.Options{CredentialsDir: f.path("secrets")}))
	f.configuration = fmt.Sprintf("dataset: artifacts\nendpoint: %s\n", f.server.Endpoint())
	path := f.write(t, "out", []byte("x"), 0o644)
	err := f.save(t.Context(), path, f.artifact("k"))
	wantError(t, err, "denied", f.path("secrets/artifacts"))
	if err := os.WriteFile(secret+".new", []byte(bucket.SecretKey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(secret+".new", secret); err != nil {
		t.Fatal(err)
	}
	if err := f.save(t.Context(), path, f.artifact("k")); err != nil {
		t.Errorf("after the Secret was mended: %v", err)
	}
	f.configuration = fmt.Sprintf("dataset: other\nendpoint: %s\n", f.server.Endpoint())
	wantError(t, f.save(t.Context(), path, f.artifact("k")), "secretAccessKey", "NAME-s3")
}

func TestNoCredentialsSaysWhereTheyComeFrom(t *testing.T) {
	f := start(t, artifact.Options{Getenv: func(string) string { return "" }})
	wantError(t, f.save(t.Context(), f.write(t, "out", nil, 0o644), f.artifact("k")),
		"no credentials", "STEPCACHE_S3_ACCESS_KEY_ID", "STEPCACHE_S3_CREDENTIALS", "NAME-s3")
}

// The service on the node is used where it answers; signatures hold either way.
func TestNodeLocalService(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	if err := s.MakeBucket(t.Context(), bucketName); err != nil {
		t.Fatal(err)
	}
	node := bucket.FaultsAt(t, s.Direct())
	far := bucket.FaultsAt(t, s.Direct())
	nobody := ports.Free(t, 1)[0]
	for address, wantFar := range map[string]bool{strings.TrimPrefix(node.Endpoint(), "http://"): false, nobody: true, "unix:///none/socket": true} {
		before, beforeNode := far.Requests(), node.Requests()
		f := &fixture{argoexec: connect(t, serve(t, artifact.Options{Getenv: keys, NodeAddress: address})), dir: t.TempDir()}
		f.configuration = fmt.Sprintf("endpoint: %s\nbucket: %s\n", far.Endpoint(), bucketName)
		if err := f.save(t.Context(), f.write(t, "out", []byte("x"), 0o644), f.artifact("k")); err != nil {
			t.Errorf("%s: %v", address, err)
		}
		if err := f.load(t.Context(), f.artifact("k"), f.path("in")); err != nil {
			t.Errorf("%s: %v", address, err)
		}
		if usedFar, usedNode := far.Requests() > before, node.Requests() > beforeNode; usedFar != wantFar || usedNode == wantFar {
			t.Errorf("%s: node asked: %v, the Service: %v", address, usedNode, usedFar)
		}
	}
}

func TestSaveStream(t *testing.T) {
	overBoth(t, artifact.Options{}, func(t *testing.T, f *fixture) {
		for name, content := range map[string][]byte{
			"empty": {}, "small": []byte("hello"), "one part": large[:16<<20], "odd": large[:33<<20+1],
		} {
			if err := f.saveStream(t.Context(), bytes.NewReader(content), f.artifact("s/"+name)); err != nil {
				t.Fatal(err)
			}
			if err := f.load(t.Context(), f.artifact("s/"+name), f.path(name)); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(f.path(name)); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%s: %d bytes, %v", name, len(got), err)
			}
		}
		wantError(t, f.saveStream(t.Context(), strings.NewReader("x"), f.artifact("s/")), "ends in a slash")
	})
}
