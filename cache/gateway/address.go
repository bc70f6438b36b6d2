package gateway

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// MaxKey is the longest key, in bytes.
const MaxKey = 1024

// ValidDomain says whether buckets can be addressed below a host name: one of letters, digits, hyphens and dots, that
// is no address and has no port.
func ValidDomain(domain string) error {
	ok := len(domain) <= 253 && net.ParseIP(domain) == nil
	for label := range strings.SplitSeq(domain, ".") {
		ok = ok && label != "" && len(label) <= 63 && strings.Trim(label, "-") == label && !strings.ContainsFunc(label, func(c rune) bool {
			return c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z')
		})
	}
	if !ok {
		return fmt.Errorf("domain %q: want the host name below which buckets are addressed, such as s3.example.org, without scheme, port and wildcard", domain)
	}
	return nil
}

// address splits a request's address into bucket and key: bucket.DOMAIN/key, for the first of the domains that is
// one, or host/bucket/key.
func address(r *http.Request, domains []string) (bucket, key string) {
	path := strings.TrimPrefix(r.URL.Path, "/")
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	for _, domain := range domains {
		if host == domain {
			break // of a shorter domain it would be below
		}
		if name, below := strings.CutSuffix(host, "."+domain); below && name != "" {
			return name, path
		}
	}
	bucket, key, _ = strings.Cut(path, "/")
	return bucket, key
}

// ValidKey says whether a key can be the name of an object here: UTF-8 that XML can carry, at most MaxKey
// bytes, and a path: no leading slash, no empty, "." or ".." segment, since a key is also a file's name
// in a mount. A trailing slash is a folder's marker.
func ValidKey(key string) error {
	switch {
	case key == "":
		return badArgument("The key is empty.")
	case len(key) > MaxKey:
		return failure(http.StatusBadRequest, "KeyTooLongError", "Your key is too long: %d bytes, of %d.", len(key), MaxKey)
	case !utf8.ValidString(key):
		return badArgument("The key is not UTF-8.")
	case strings.ContainsFunc(key, notXML):
		return badArgument("The key has characters that no listing could show.")
	}
	for segment := range strings.SplitSeq(strings.TrimSuffix(key, "/"), "/") {
		if segment == "" || segment == "." || segment == ".." {
			return badArgument(`The key is no path: it has a leading slash, or a segment that is empty, "." or "..".`)
		}
	}
	return nil
}

func notXML(r rune) bool {
	return r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r == 0xFFFE || r == 0xFFFF
}

// xmlText makes what a client sent fit to be repeated in an error.
func xmlText(s string) string {
	return strings.Map(func(r rune) rune {
		if notXML(r) {
			return utf8.RuneError
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
}

// query is a request's query as signatures see it: in order of its encoded names and values.
type query []parameter

type parameter struct{ name, value string }

func parseQuery(raw string) (query, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, badArgument("The query cannot be parsed.")
	}
	var q query
	for name, all := range values {
		for _, value := range all {
			q = append(q, parameter{name, value})
		}
	}
	slices.SortFunc(q, func(a, b parameter) int {
		if c := strings.Compare(escape(a.name, false), escape(b.name, false)); c != 0 {
			return c
		}
		return strings.Compare(escape(a.value, false), escape(b.value, false))
	})
	return q, nil
}

func (q query) has(name string) bool {
	return slices.ContainsFunc(q, func(p parameter) bool { return p.name == name })
}

func (q query) get(name string) string {
	for _, p := range q {
		if p.name == name {
			return p.value
		}
	}
	return ""
}

// canonical is the query as it is signed, without the parameter except.
func (q query) canonical(except string) string {
	var b strings.Builder
	for _, p := range q {
		if p.name == except {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('&')
		}
		b.WriteString(escape(p.name, false))
		b.WriteByte('=')
		b.WriteString(escape(p.value, false))
	}
	return b.String()
}

// escape is the percent-encoding of signatures and of listings: all but unreserved characters, in upper
// case, a space as %20; slashes are kept on demand.
func escape(s string, slashes bool) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.' || c == '~' || c == '/' && slashes {
			b.WriteByte(c)
			continue
		}
		b.WriteByte('%')
		b.WriteByte(hex[c>>4])
		b.WriteByte(hex[c&15])
	}
	return b.String()
}
