// Package credentials reads the credentials of a bucket: from the folder of a mounted Secret, from the
// environment, or from the platform; and from that folder the authorities of the store's certificate.
//
// It owns where they come from and when they are read again, for every kind of store; how credentials
// sign a request is the store's. Concurrency: a Reader and a Transport are safe for concurrent use. Failure: Get fails
// with a source.Error of kind ErrDenied that names the folder and the key that is missing and never
// holds a value, or ErrUnavailable where another try may get them; Open fails only for settings that can
// never work, so that a Secret may come later.
//
// It may import cache/source.
package credentials

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/stepcache/stepcache/cache/source"
)

// The names of the keys of a Secret, which a Config's CredentialKeys may map to others.
const (
	KeyID     = "accessKeyID"
	KeySecret = "accessKeySecret"
	KeyToken  = "sessionToken"
)

// maxValue bounds what is read from one key's file; session tokens are a few kilobytes.
const maxValue = 64 << 10

// Value is a set of credentials. The zero Value asks for unsigned requests.
type Value struct {
	AccessKeyID, AccessKeySecret, SessionToken string
}

// String keeps secrets out of logs.
func (v Value) String() string { return fmt.Sprintf("credentials of access key %q", v.AccessKeyID) }

// GoString keeps secrets out of logs.
func (v Value) GoString() string { return v.String() }

// Env names the environment variables that hold one set of credentials.
type Env struct{ ID, Secret, Token string }

// The variables that the stores' own tools read. Earlier ones win.
var (
	S3Env = []Env{
		{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"},
		{"AWS_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN"},
	}
	OSSEnv = []Env{
		{"OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"},
		{"ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "ALIBABA_CLOUD_SECURITY_TOKEN"},
	}
)

// Options are what a store adds to a Config.
type Options struct {
	// Env lists the variables to try, in order.
	Env []Env
	// Getenv replaces os.Getenv.
	Getenv func(string) string
	// Ambient asks the platform (instance or pod identity). It is called for every Get, so it keeps what
	// it got until that expires. An error that is a source.Error is Get's; any other is a refusal. Used only where the
	// Config says Ambient.
	Ambient func(context.Context) (Value, error)
}

// Reader gives the credentials as they are now.
type Reader struct {
	name    string // of the source, for errors
	dir     string
	keys    [3]string // file names of id, secret and token
	anon    bool
	env     []Env
	getenv  func(string) string
	ambient func(context.Context) (Value, error)

	mu    sync.Mutex
	seen  stamp // of the files that value was read from
	value Value
}

// Open checks the settings; it reads no credentials yet.
func Open(c source.Config, o Options) (*Reader, error) {
	r := &Reader{name: c.URL, dir: c.CredentialsDir, anon: c.Anonymous, env: o.Env, getenv: o.Getenv}
	if r.getenv == nil {
		r.getenv = os.Getenv
	}
	if c.Ambient {
		r.ambient = o.Ambient
	}
	for i, k := range []string{KeyID, KeySecret, KeyToken} {
		r.keys[i] = k
		if m := c.CredentialKeys[k]; m != "" {
			r.keys[i] = m
		}
		if !filepath.IsLocal(r.keys[i]) {
			return nil, r.invalid(fmt.Errorf("credential key %s is mapped to %q", k, r.keys[i]), "map it to the name of a key of the Secret")
		}
	}
	for k := range c.CredentialKeys {
		if k != KeyID && k != KeySecret && k != KeyToken {
			return nil, r.invalid(fmt.Errorf("unknown credential key %q", k), "map "+KeyID+", "+KeySecret+" or "+KeyToken)
		}
	}
	return r, nil
}

// Get returns the credentials. Those of a folder are read again when its files changed, which costs
// three stats a call.
func (r *Reader) Get(ctx context.Context) (Value, error) {
	switch {
	case r.anon:
		return Value{}, nil
	case r.dir != "":
		return r.fromDir()
	}
	for _, e := range r.env {
		id, secret := strings.TrimSpace(r.getenv(e.ID)), strings.TrimSpace(r.getenv(e.Secret))
		switch {
		case id != "" && secret != "":
			return Value{id, secret, strings.TrimSpace(r.getenv(e.Token))}, nil
		case id != "":
			return Value{}, r.denied(fmt.Errorf("the environment has %s but not %s", e.ID, e.Secret), "set it too")
		case secret != "":
			return Value{}, r.denied(fmt.Errorf("the environment has %s but not %s", e.Secret, e.ID), "set it too")
		}
	}
	if r.ambient != nil {
		v, err := r.ambient(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return Value{}, &source.Error{Op: "get credentials", Name: r.name, Kind: source.ContextKind(ctx), Err: ctx.Err()}
			}
			if known := (*source.Error)(nil); errors.As(err, &known) {
				return Value{}, known
			}
			return Value{}, r.denied(fmt.Errorf("the platform gives none: %w", err), "give the pod or machine an identity, or set credentialsSecretRef")
		}
		return v, nil
	}
	hint := "set credentialsSecretRef (credentialsDir), or anonymous for a public bucket"
	if len(r.env) > 0 {
		hint = fmt.Sprintf("set credentialsSecretRef (credentialsDir), or %s and %s in the environment, or anonymous for a public bucket", r.env[0].ID, r.env[0].Secret)
	}
	return Value{}, r.denied(errors.New("no credentials"), hint)
}

// FromPlatform says whether Get asks the platform, since nothing else has credentials.
func (r *Reader) FromPlatform() bool {
	if r.anon || r.dir != "" || r.ambient == nil {
		return false
	}
	for _, e := range r.env {
		if r.getenv(e.ID) != "" || r.getenv(e.Secret) != "" {
			return false
		}
	}
	return true
}

// stamp tells whether files were replaced or rewritten since they were read.
type stamp [3]struct {
	info fs.FileInfo // nil when the file is missing
}

func (s stamp) same(o stamp) bool {
	for i := range s {
		if !same(s[i].info, o[i].info) {
			return false
		}
	}
	return true
}

// same says whether a file, which need not be there, is neither replaced nor rewritten.
func same(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// fromDir reads the folder. The kubelet replaces all files of a Secret at once by renaming the link
// ..data: they are read through one resolved folder, so that the id and secret belong together. A
// folder without that link is read until nothing changed meanwhile.
func (r *Reader) fromDir() (Value, error) {
	var err error
	for range 5 {
		var s stamp
		if s, err = r.stat(r.dir); err != nil {
			return Value{}, err
		}
		r.mu.Lock()
		if s.same(r.seen) && s[0].info != nil {
			v := r.value
			r.mu.Unlock()
			return v, nil
		}
		r.mu.Unlock()
		var v Value
		v, err = r.read()
		after, serr := r.stat(r.dir)
		if serr != nil {
			return Value{}, serr
		}
		if !after.same(s) {
			continue // rotated while being read
		}
		if err != nil {
			return Value{}, err
		}
		r.mu.Lock()
		r.seen, r.value = s, v
		r.mu.Unlock()
		return v, nil
	}
	if err == nil {
		err = &source.Error{Op: "read credentials of", Name: r.name, Kind: source.ErrUnavailable, Err: fmt.Errorf("files in %s keep changing", r.dir)}
	}
	return Value{}, err
}

func (r *Reader) stat(dir string) (stamp, error) {
	var s stamp
	for i, k := range r.keys {
		info, err := os.Stat(filepath.Join(dir, k))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s, r.denied(err, "make the folder readable")
		}
		if err == nil {
			s[i].info = info
		}
	}
	return s, nil
}

func (r *Reader) read() (Value, error) {
	dir := r.dir
	if d, err := filepath.EvalSymlinks(filepath.Join(dir, "..data")); err == nil {
		dir = d
	}
	var v [3]string
	for i, k := range r.keys {
		b, err := readSmall(filepath.Join(dir, k), maxValue)
		switch {
		case errors.Is(err, fs.ErrNotExist) && i == 2:
			continue // the session token is optional
		case errors.Is(err, fs.ErrNotExist):
			if _, derr := os.Stat(r.dir); derr != nil {
				return Value{}, r.denied(fmt.Errorf("folder %s is not there", r.dir), "create the Secret with the keys "+r.keys[0]+" and "+r.keys[1])
			}
			return Value{}, r.denied(fmt.Errorf("folder %s has no key %s", r.dir, k), "add it to the Secret, or map another key's name to it in credentialKeys")
		case err != nil:
			return Value{}, r.denied(err, "make it a readable file")
		}
		// A Secret made from a file often ends in a newline, which no store's key has.
		v[i] = strings.TrimSpace(string(b))
		if v[i] == "" && i < 2 {
			return Value{}, r.denied(fmt.Errorf("key %s in folder %s is empty", k, r.dir), "put the value into the Secret")
		}
		if strings.ContainsFunc(v[i], func(c rune) bool { return c <= ' ' || c > '~' }) {
			return Value{}, r.denied(fmt.Errorf("key %s in folder %s holds spaces or characters that no key has", k, r.dir), "put the bare value into the Secret, not encoded or quoted")
		}
	}
	return Value{v[0], v[1], v[2]}, nil
}

func readSmall(name string, most int64) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s is longer than %d bytes", name, most)
	}
	return b, err
}

func (r *Reader) denied(err error, hint string) error { return denied(r.name, err, hint) }

func denied(name string, err error, hint string) error {
	return &source.Error{Op: "read credentials of", Name: name, Kind: source.ErrDenied, Err: err, Hint: hint}
}

func (r *Reader) invalid(err error, hint string) error {
	return &source.Error{Op: "open", Name: r.name, Kind: source.ErrInvalid, Err: err, Hint: hint}
}
