package oss

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/stepcache/stepcache/cache/source"
)

// Get implements source.Getter with one request, bound to the object's version.
func (b *Bucket) Get(ctx context.Context, o source.Object, off, length int64) (source.Body, error) {
	if err := b.checkKey("get", o.Key); err != nil {
		return source.Body{}, err
	}
	if off < 0 || length < 0 || off > o.Size || length > o.Size-off {
		return source.Body{}, &source.Error{Op: "get", Name: b.name(o.Key), Kind: source.ErrInvalid,
			Err: fmt.Errorf("range %d+%d is not within the object's %d bytes", off, length, o.Size)}
	}
	if length == 0 {
		return source.Body{ReadCloser: http.NoBody, Digest: o.Digest}, nil
	}
	r := request{op: "get", method: "GET", key: o.Key, header: map[string]string{
		"Range": fmt.Sprintf("bytes=%d-%d", off, off+length-1),
		// Without it OSS answers a range that does not lie in the object with the whole of it.
		"x-oss-range-behavior": "standard",
	}}
	seconds, isTimed := strings.CutPrefix(o.Version, timed)
	switch {
	case o.Version == "":
		return source.Body{}, b.unversioned("get", o.Key)
	case isTimed:
		n, err := strconv.ParseInt(seconds, 10, 64)
		if err != nil {
			return source.Body{}, &source.Error{Op: "get", Name: b.name(o.Key), Kind: source.ErrInvalid,
				Err: fmt.Errorf("version %q is not one of this source", o.Version)}
		}
		r.header["If-Unmodified-Since"] = time.Unix(n, 0).UTC().Format(http.TimeFormat)
	default:
		r.header["If-Match"] = `"` + o.Version + `"`
	}
	a, err := b.do(ctx, r)
	if err != nil {
		return source.Body{}, err
	}
	if err := b.believe(r, a, o, off, length); err != nil {
		a.body.Close()
		return source.Body{}, err
	}
	return source.Body{ReadCloser: &body{bucket: b, ctx: ctx, request: r, answer: a, want: length}, Digest: digest(a.header)}, nil
}

// believe checks that an answer is of the very version and range asked for: a proxy or cache between us
// and the store may have ignored either.
func (b *Bucket) believe(r request, a *answer, o source.Object, off, length int64) error {
	modified, _ := http.ParseTime(a.header.Get("Last-Modified"))
	switch version := b.version(a.header.Get("ETag"), modified); {
	case version == "":
		return b.unversioned("get", o.Key)
	case version != o.Version:
		return &source.Error{Op: "get", Name: b.name(o.Key), Kind: source.ErrChanged,
			Err: fmt.Errorf("the answer is of version %q, asked for %q", version, o.Version)}
	}
	const proxy = "a proxy before the store that does not keep to requests is the likely cause: use the store's own endpoint"
	switch a.status {
	case http.StatusPartialContent:
		first, last, size, ok := contentRange(a.header.Get("Content-Range"))
		switch {
		case !ok:
			return b.strange(r, a, fmt.Sprintf("Content-Range %q", a.header.Get("Content-Range")), proxy)
		case size != o.Size:
			return &source.Error{Op: "get", Name: b.name(o.Key), Kind: source.ErrChanged,
				Err: fmt.Errorf("it has %d bytes now, asked for one of %d", size, o.Size)}
		case first != off || last != off+length-1:
			return b.strange(r, a, fmt.Sprintf("it holds bytes %d to %d, asked for %d to %d", first, last, off, off+length-1), proxy)
		}
	case http.StatusOK:
		if size := a.header.Get("Content-Length"); off != 0 || length != o.Size || size != strconv.FormatInt(length, 10) {
			return b.strange(r, a, fmt.Sprintf("it holds the whole object, asked for bytes %d to %d", off, off+length-1), proxy)
		}
	default:
		return b.strange(r, a, fmt.Sprintf("status %d", a.status), proxy)
	}
	if n := a.header.Get("Content-Length"); n != "" && n != strconv.FormatInt(length, 10) {
		return b.strange(r, a, fmt.Sprintf("it has %s bytes, asked for %d", n, length), proxy)
	}
	return nil
}

// contentRange parses "bytes first-last/size".
func contentRange(s string) (first, last, size int64, ok bool) {
	span, total, found := strings.Cut(strings.TrimPrefix(s, "bytes "), "/")
	from, to, dash := strings.Cut(span, "-")
	if !strings.HasPrefix(s, "bytes ") || !found || !dash {
		return 0, 0, 0, false
	}
	var errs [3]error
	first, errs[0] = strconv.ParseInt(from, 10, 64)
	last, errs[1] = strconv.ParseInt(to, 10, 64)
	size, errs[2] = strconv.ParseInt(total, 10, 64)
	return first, last, size, errors.Join(errs[:]...) == nil && 0 <= first && first <= last && last < size
}

// body yields exactly the bytes asked for, or fails.
type body struct {
	bucket  *Bucket
	ctx     context.Context // the caller's: whether it ended decides what an error means
	request request
	answer  *answer
	got     int64
	want    int64
	err     error
}

func (r *body) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if r.got == r.want {
		return 0, io.EOF
	}
	if left := r.want - r.got; int64(len(p)) > left {
		p = p[:left]
	}
	n, err := r.answer.body.Read(p)
	r.got += int64(n)
	switch {
	case r.got == r.want:
		return n, io.EOF // all that was asked for is here, however the connection ended
	case err != nil:
		r.err = r.bucket.broken(r.ctx, r.request, r.got, err)
		return n, r.err
	}
	return n, nil
}

func (r *body) Close() error {
	if r.err == nil {
		r.err = &source.Error{Op: "get", Name: r.bucket.name(r.request.key), Kind: source.ErrInvalid, Err: errors.New("read after close")}
	}
	return r.answer.body.Close()
}
