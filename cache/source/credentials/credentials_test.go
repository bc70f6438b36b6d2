package credentials_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, value := range files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func open(t *testing.T, c source.Config, env map[string]string) *credentials.Reader {
	t.Helper()
	c.URL = "s3://bucket"
	r, err := credentials.Open(c, credentials.Options{Env: credentials.S3Env, Getenv: func(k string) string { return env[k] }})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// want fails unless the error is of the kind and says every part.
func want(t *testing.T, err, kind error, parts ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%v, want %v", err, kind)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("does not say %q: %v", p, err)
		}
	}
}

func TestFolder(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"accessKeyID": "id\n", "accessKeySecret": "se/cret+=\r\n"})
	r := open(t, source.Config{CredentialsDir: dir}, map[string]string{"AWS_ACCESS_KEY_ID": "other", "AWS_SECRET_ACCESS_KEY": "other"})
	if v, err := r.Get(t.Context()); err != nil || v != (credentials.Value{AccessKeyID: "id", AccessKeySecret: "se/cret+="}) {
		t.Errorf("%+v, %v", v, err)
	}
	write(t, dir, map[string]string{"sessionToken": "token"})
	if v, err := r.Get(t.Context()); err != nil || v.SessionToken != "token" {
		t.Errorf("with a token: %+v, %v", v, err)
	}
}

func TestFolderWithOtherKeyNames(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"fs.oss.accessKeyId": "id", "AK": "secret"})
	r := open(t, source.Config{CredentialsDir: dir, CredentialKeys: map[string]string{"accessKeyID": "fs.oss.accessKeyId", "accessKeySecret": "AK"}}, nil)
	if v, err := r.Get(t.Context()); err != nil || v.AccessKeyID != "id" || v.AccessKeySecret != "secret" {
		t.Errorf("%+v, %v", v, err)
	}
	for name, keys := range map[string]map[string]string{
		"leads out": {"accessKeyID": "../../etc/passwd"}, "absolute": {"accessKeyID": "/etc/passwd"}, "unknown": {"accessKey": "x"},
	} {
		_, err := credentials.Open(source.Config{URL: "s3://b", CredentialsDir: dir, CredentialKeys: keys}, credentials.Options{})
		if !errors.Is(err, source.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is missing is named, and no value ever is.
func TestBadFolder(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		parts []string
	}{
		"empty folder": {nil, []string{"accessKeyID", "add it"}},
		"no secret":    {map[string]string{"accessKeyID": "hush-id"}, []string{"accessKeySecret", "add it"}},
		"empty value":  {map[string]string{"accessKeyID": "hush-id", "accessKeySecret": " \n"}, []string{"accessKeySecret", "empty"}},
		"two lines":    {map[string]string{"accessKeyID": "hush-id", "accessKeySecret": "hush\nhush"}, []string{"accessKeySecret"}},
		"binary":       {map[string]string{"accessKeyID": "hush\x00\xff", "accessKeySecret": "hush"}, []string{"accessKeyID"}},
		"huge":         {map[string]string{"accessKeyID": strings.Repeat("hush", 1<<20), "accessKeySecret": "hush"}, []string{"accessKeyID", "longer"}},
		"a folder":     {map[string]string{"accessKeyID/x": "hush", "accessKeySecret": "hush"}, []string{"accessKeyID", "regular"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, c.files)
			_, err := open(t, source.Config{CredentialsDir: dir}, nil).Get(t.Context())
			want(t, err, source.ErrDenied, append(c.parts, dir, "s3://bucket")...)
			if err != nil && strings.Contains(err.Error(), "hush") {
				t.Errorf("shows a value: %v", err)
			}
		})
	}
	missing := filepath.Join(t.TempDir(), "none")
	_, err := open(t, source.Config{CredentialsDir: missing}, nil).Get(t.Context())
	want(t, err, source.ErrDenied, missing, "not there", "accessKeyID", "accessKeySecret")
}

func TestEnvironment(t *testing.T) {
	for _, c := range []struct {
		env   map[string]string
		parts []string
	}{
		{map[string]string{"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t"}, nil},
		{nil, []string{"no credentials", "AWS_ACCESS_KEY_ID", "credentialsSecretRef", "anonymous"}},
		{map[string]string{"AWS_ACCESS_KEY_ID": "id"}, []string{"AWS_SECRET_ACCESS_KEY"}},
		{map[string]string{"AWS_SECRET_ACCESS_KEY": "s"}, []string{"AWS_ACCESS_KEY_ID"}},
	} {
		v, err := open(t, source.Config{}, c.env).Get(t.Context())
		switch {
		case c.parts != nil:
			want(t, err, source.ErrDenied, c.parts...)
		case err != nil || v != (credentials.Value{AccessKeyID: "id", AccessKeySecret: "s", SessionToken: "t"}):
			t.Errorf("%+v, %v", v, err)
		}
	}
	if v, err := open(t, source.Config{Anonymous: true}, map[string]string{"AWS_ACCESS_KEY_ID": "id"}).Get(t.Context()); err != nil || v != (credentials.Value{}) {
		t.Errorf("anonymous: %+v, %v", v, err)
	}
}

func TestPlatformOnlyWhereAllowedAndLast(t *testing.T) {
	asked := 0
	open := func(c source.Config, env map[string]string, err error) *credentials.Reader {
		c.URL = "s3://b"
		r, oerr := credentials.Open(c, credentials.Options{Env: credentials.S3Env, Getenv: func(k string) string { return env[k] },
			Ambient: func(context.Context) (credentials.Value, error) {
				asked++
				return credentials.Value{AccessKeyID: "platform"}, err
			}})
		if oerr != nil {
			t.Fatal(oerr)
		}
		return r
	}
	_, err := open(source.Config{}, nil, nil).Get(t.Context())
	want(t, err, source.ErrDenied)
	env := map[string]string{"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "s"}
	if v, err := open(source.Config{Ambient: true}, env, nil).Get(t.Context()); err != nil || v.AccessKeyID != "id" || asked != 0 {
		t.Errorf("%+v, %v, asked %d times", v, err, asked)
	}
	r := open(source.Config{Ambient: true}, nil, nil)
	if v, err := r.Get(t.Context()); err != nil || v.AccessKeyID != "platform" || !r.FromPlatform() {
		t.Errorf("%+v, %v", v, err)
	}
	_, err = open(source.Config{Ambient: true}, nil, errors.New("no metadata service")).Get(t.Context())
	want(t, err, source.ErrDenied, "no metadata service", "identity")
	_, err = open(source.Config{Ambient: true}, nil, &source.Error{Kind: source.ErrUnavailable, Err: errors.New("it restarts")}).Get(t.Context())
	want(t, err, source.ErrUnavailable, "it restarts")
}

// The kubelet replaces a Secret's files by renaming ..data: the id and secret read are always a pair.
func TestRotationOfASecretNeverMixesPairs(t *testing.T) {
	dir := t.TempDir()
	rotate := func(i int) {
		version := fmt.Sprintf("..v%d", i)
		write(t, dir, map[string]string{version + "/accessKeyID": fmt.Sprint(i), version + "/accessKeySecret": fmt.Sprint(i)})
		if err := os.Symlink(version, filepath.Join(dir, "..next")); err != nil {
			t.Error(err)
		}
		if err := os.Rename(filepath.Join(dir, "..next"), filepath.Join(dir, "..data")); err != nil {
			t.Error(err)
		}
	}
	rotate(0)
	for _, k := range []string{"accessKeyID", "accessKeySecret"} {
		if err := os.Symlink("..data/"+k, filepath.Join(dir, k)); err != nil {
			t.Fatal(err)
		}
	}
	r := open(t, source.Config{CredentialsDir: dir}, nil)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				v, err := r.Get(t.Context())
				if err != nil && !errors.Is(err, source.ErrUnavailable) || v.AccessKeyID != v.AccessKeySecret {
					t.Errorf("%q with %q, %v", v.AccessKeyID, v.AccessKeySecret, err)
					return
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for i := range 200 {
		rotate(i + 1)
	}
	close(done)
	wg.Wait()
	if v, err := r.Get(t.Context()); err != nil || v.AccessKeyID != "200" {
		t.Errorf("%+v, %v", v, err)
	}
}

func TestValuesDoNotPrint(t *testing.T) {
	v := credentials.Value{AccessKeyID: "id", AccessKeySecret: "hush", SessionToken: "hush"}
	for _, s := range []string{fmt.Sprint(v), fmt.Sprintf("%v %+v %#v %s", v, v, v, &v)} {
		if strings.Contains(s, "hush") {
			t.Error(s)
		}
	}
}
