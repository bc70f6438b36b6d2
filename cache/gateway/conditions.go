package gateway

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

var (
	errPrecondition = failure(http.StatusPreconditionFailed, "PreconditionFailed", "At least one of the preconditions you specified did not hold.")
	errNotModified  = failure(http.StatusNotModified, "NotModified", "Not Modified")
)

// conditions of a read, or of a copy's source: If-Match and so on, prefix X-Amz-Copy-Source- for the latter.
// As in RFC 9110, an ETag's condition outweighs the date's.
func conditions(h http.Header, prefix string, i Info, unmodified *Failure) error {
	modified := i.ModTime.Truncate(time.Second)
	if match := h.Get(prefix + "If-Match"); match != "" {
		if !matches(match, i.ETag) {
			return errPrecondition
		}
	} else if at, err := http.ParseTime(h.Get(prefix + "If-Unmodified-Since")); err == nil && modified.After(at) {
		return errPrecondition
	}
	if none := h.Get(prefix + "If-None-Match"); none != "" {
		if matches(none, i.ETag) {
			return unmodified
		}
	} else if at, err := http.ParseTime(h.Get(prefix + "If-Modified-Since")); err == nil && !modified.After(at) {
		return unmodified
	}
	return nil
}

// matches says whether a list of ETags, or "*", has this one.
func matches(list, etag string) bool {
	for tag := range strings.SplitSeq(list, ",") {
		if tag = unquote(tag); tag == "*" || tag == etag && etag != "" {
			return true
		}
	}
	return false
}

// unquote takes an ETag's quotes off; clients send it with and without.
func unquote(tag string) string {
	return strings.Trim(strings.TrimPrefix(strings.TrimSpace(tag), "W/"), `"`)
}

func quote(etag string) string { return `"` + etag + `"` }

// byteRange is what a Range header asks of an object: whole when there is none, or one that S3 ignores (of
// another unit, of several ranges, not well-formed).
func byteRange(header string, size int64) (off, n int64, partial bool, err error) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	if !ok || strings.Contains(spec, ",") {
		return 0, size, false, nil
	}
	first, last, ok := strings.Cut(strings.TrimSpace(spec), "-")
	if !ok {
		return 0, size, false, nil
	}
	outside := &Failure{
		Status: http.StatusRequestedRangeNotSatisfiable, Code: "InvalidRange", Message: "The requested range is not satisfiable.",
		header: map[string]string{"Content-Range": "bytes */" + strconv.FormatInt(size, 10)},
	}
	if first == "" {
		suffix, ok := digits(last)
		switch {
		case !ok:
			return 0, size, false, nil
		case suffix == 0 || size == 0:
			return 0, 0, false, outside
		}
		suffix = min(suffix, size)
		return size - suffix, suffix, true, nil
	}
	from, ok := digits(first)
	to := size - 1
	if ok && last != "" {
		if to, ok = digits(last); ok && to < from {
			return 0, size, false, nil
		}
		to = min(to, size-1)
	}
	switch {
	case !ok:
		return 0, size, false, nil
	case from >= size:
		return 0, 0, false, outside
	}
	return from, to - from + 1, true, nil
}

// digits parses a number of a range; one that is too large is the largest.
func digits(s string) (int64, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		n = 1<<63 - 1
	}
	return n, true
}
