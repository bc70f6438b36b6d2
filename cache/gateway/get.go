package gateway

import (
	"errors"
	"net/http"
	"strconv"

	"github.com/stepcache/stepcache/cache/source"
)

// kept are the headers that S3 keeps with an object, and the parameters that replace them in an answer.
var kept = []struct{ header, override string }{
	{"Content-Type", "response-content-type"},
	{"Cache-Control", "response-cache-control"},
	{"Content-Disposition", "response-content-disposition"},
	{"Content-Encoding", "response-content-encoding"},
	{"Content-Language", "response-content-language"},
	{"Expires", "response-expires"},
}

const defaultContentType = "binary/octet-stream"

// current is nil for the name of the one version that there is. Whoever has kept none asks with an empty one, as of what
// an answer did not tell: that names no version, and what it is to delete stays (as at S3).
func current(version string) error {
	switch version {
	case "null":
		return nil
	case "":
		return badArgument("Version id cannot be the empty string")
	}
	return failure(http.StatusNotFound, "NoSuchVersion", "The specified version does not exist. Datasets keep one version of an object.")
}

// get answers GET and HEAD of an object.
func (q *request) get() error {
	if err := q.ignore(); err != nil {
		return err
	}
	if q.query.has("versionId") {
		if err := current(q.query.get("versionId")); err != nil {
			return err
		}
	}
	if q.r.Method == http.MethodHead {
		info, err := q.objects.Stat(q.r.Context(), q.key)
		if err != nil {
			return err
		}
		_, _, status, err := q.selection(info)
		if err != nil {
			return err
		}
		q.w.WriteHeader(status)
		return nil
	}
	// A version may be replaced between being told and being read: the next one is as good an answer.
	replaced, err := q.getOnce()
	if replaced {
		_, err = q.getOnce()
	}
	return err
}

// getOnce answers GET, and says whether it failed, with nothing sent, because the version is another by now.
func (q *request) getOnce() (replaced bool, err error) {
	object, err := q.objects.Open(q.r.Context(), q.key)
	if err != nil {
		return false, err
	}
	replaced, err = q.send(object)
	if closing := object.Close(); closing != nil {
		q.Logger.Warn("s3: closing an object", "bucket", q.bucket, "key", q.key, "request", q.id, "err", closing)
	}
	return replaced, err
}

func (q *request) send(object Object) (replaced bool, err error) {
	off, n, status, err := q.selection(object.Info())
	if err != nil {
		return false, err
	}
	out := &outlet{q: q, status: status}
	if n == 0 {
		return false, out.begin()
	}
	if err := object.WriteRange(q.r.Context(), out, off, n); err != nil {
		if !out.begun {
			clear(q.w.Header())
			q.name()
			return errors.Is(err, source.ErrChanged) || errors.Is(err, source.ErrNotFound), err
		}
		// Either way the connection is cut: no client may take a part for the whole.
		if out.left || q.r.Context().Err() != nil || errors.Is(err, ErrLeft) {
			q.hangUp(codeLeft)
		}
		q.report(err, failureOf(err))
		q.hangUp(codeCut)
	}
	return false, nil
}

// selection decides on the conditions and the range, and sets the headers of the answer.
func (q *request) selection(i Info) (off, n int64, status int, err error) {
	h := q.w.Header()
	h.Set("ETag", quote(i.ETag))
	h.Set("Last-Modified", i.ModTime.UTC().Format(http.TimeFormat))
	if err := conditions(q.r.Header, "", i, errNotModified); err != nil {
		return 0, 0, 0, err
	}
	asked := q.r.Header.Get("Range")
	if tag := q.r.Header.Get("If-Range"); tag != "" && !matches(tag, i.ETag) {
		asked = ""
	}
	off, n, partial, err := byteRange(asked, i.Size)
	if err != nil {
		return 0, 0, 0, err
	}
	if number := q.query.get("partNumber"); number != "" {
		// The parts that an object was put in are not kept: it is one, as an object is that was copied.
		switch {
		case asked != "":
			return 0, 0, 0, failure(http.StatusBadRequest, "InvalidRequest", "Cannot specify both Range header and partNumber query parameter.")
		case number != "1":
			return 0, 0, 0, failure(http.StatusRequestedRangeNotSatisfiable, "InvalidPartNumber", "The requested partnumber is not satisfiable.")
		}
		partial = i.Size > 0
	}
	h.Set("Accept-Ranges", "bytes")
	h.Set("Content-Type", defaultContentType)
	if i.ContentType != "" {
		h.Set("Content-Type", i.ContentType)
	}
	for _, k := range kept {
		if value := i.Headers[k.header]; value != "" {
			h.Set(k.header, value)
		}
		if value := q.query.get(k.override); value != "" {
			h.Set(k.header, value)
		}
	}
	for name, value := range i.Metadata {
		h["X-Amz-Meta-"+name] = []string{value} // as it was put: in lower case
	}
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	status = http.StatusOK
	if partial {
		status = http.StatusPartialContent
		h.Set("Content-Range", "bytes "+strconv.FormatInt(off, 10)+"-"+strconv.FormatInt(off+n-1, 10)+"/"+strconv.FormatInt(i.Size, 10))
	}
	return off, n, status, nil
}
