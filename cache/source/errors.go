package source

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// Error is a failed operation on a source. Every implementation reports failures with it, so that they
// read alike: what was done to which object, the kind, the store's own words, and what to do about it.
type Error struct {
	// Op is the operation in one word: list, stat, get, put, delete, open.
	Op string
	// Name is the object or bucket: scheme://bucket/key.
	Name string
	// Kind is one of the sentinel errors of this package, or a context's error.
	Kind error
	// Err is the cause; may be nil. It must not wrap another sentinel error.
	Err error
	// Hint says what the user can do; may be empty.
	Hint string
	// Refusal is what the store answered where Kind is ErrInvalid and the answer is about the request itself; may be nil.
	Refusal *Refusal
	// After is how long the store asked to wait (Retry-After); zero when it did not.
	After time.Duration
}

// Error implements error.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: %v", e.Op, e.Name, e.Kind)
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	if e.Hint != "" {
		fmt.Fprintf(&b, "; %s", e.Hint)
	}
	return b.String()
}

// Unwrap makes errors.Is and errors.As see the kind, the cause and the store's refusal.
func (e *Error) Unwrap() []error {
	all := []error{e.Kind}
	if e.Err != nil {
		all = append(all, e.Err)
	}
	if e.Refusal != nil {
		all = append(all, e.Refusal)
	}
	return all
}

// Relist is what helps who reads objects by a listing and finds another version of one, or none.
const Relist = `have the bucket listed again (spec.refresh, the annotation data.stepcache.dev/refresh, or "stepcache refresh" beside a local tier)`

// ContextKind is the Kind of an operation whose context ended: context.Canceled when its owner gave up,
// ErrUnavailable when the time was not enough (the Err should then be the context's). It is nil while
// ctx lives.
func ContextKind(ctx context.Context) error {
	switch err := ctx.Err(); {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return ErrUnavailable
	default:
		return context.Canceled
	}
}

// Split parses the URL of a Config: the scheme, the bucket (for file: empty; for dataset: namespace/name) and
// the key prefix (for file: the folder's absolute path). A prefix is kept as it is written: "genomes/" lists a
// folder, "genomes/chr" lists what starts so.
func Split(rawURL string) (scheme, bucket, prefix string, err error) {
	bad := func(why, hint string) (string, string, string, error) {
		return "", "", "", &Error{Op: "open", Name: fmt.Sprintf("%q", redact(rawURL)), Kind: ErrInvalid, Err: errors.New(why), Hint: hint}
	}
	scheme, rest, ok := strings.Cut(rawURL, "://")
	if !ok {
		return bad("no scheme", "write s3://bucket/prefix/, oss://bucket/prefix/ or file:///folder")
	}
	switch scheme {
	case "file":
		if !strings.HasPrefix(rest, "/") {
			return bad("not an absolute path", "write file:///folder")
		}
		return scheme, "", rest, nil
	case "dataset":
		parts := strings.SplitN(rest, "/", 3)
		if len(parts) < 2 || parts[0] == "" || parts[1] == "" {
			return bad("no Dataset", "write dataset://namespace/name or dataset://namespace/name/folder")
		}
		if len(parts) == 3 {
			prefix = parts[2]
		}
		return scheme, parts[0] + "/" + parts[1], prefix, nil
	case "s3", "oss":
		// Not parsed as a URL: '?', '#' and '%' are ordinary characters of a key.
		bucket, prefix, _ = strings.Cut(rest, "/")
		if bucket == "" {
			return bad("no bucket", "write "+scheme+"://bucket/prefix/")
		}
		if strings.ContainsAny(bucket, "@:?#%\\ ") {
			return bad("no bucket has such a name", "the store's address goes into endpoint, credentials into a Secret")
		}
		return scheme, bucket, prefix, nil
	}
	return bad(fmt.Sprintf("unknown scheme %q", redact(scheme)), "use s3, oss or file")
}

// redact hides what stands where a URL has its credentials, since errors end up in logs and statuses.
func redact(s string) string {
	i := strings.LastIndex(s, "@")
	if i < 0 {
		return s
	}
	return "REDACTED" + s[i:]
}

// Endpoint parses a Config's Endpoint: the host[:port], and whether the connection is encrypted, which
// it is unless the endpoint says http://.
func Endpoint(endpoint string) (host string, secure bool, err error) {
	u := endpoint
	if !strings.Contains(u, "://") {
		u = "https://" + u
	}
	p, perr := url.Parse(u)
	if perr != nil || p.Host == "" || p.User != nil || (p.Path != "" && p.Path != "/") || p.RawQuery != "" || p.Fragment != "" ||
		(p.Scheme != "http" && p.Scheme != "https") {
		return "", false, &Error{Op: "open", Name: fmt.Sprintf("endpoint %q", redact(endpoint)), Kind: ErrInvalid,
			Err: errors.New("not host[:port]"), Hint: "write host[:port], with http:// in front for a connection without TLS"}
	}
	return p.Host, p.Scheme == "https", nil
}
