package osstest

import (
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

func (s *Server) get(c *call, b *bucket) error {
	o := b.find(c.key)
	if o == nil {
		return &fault{Status: 404, Code: "NoSuchKey", Message: "The specified key does not exist.", EC: "0026-00000001"}
	}
	if o.Type == "Symlink" {
		link := o
		if o = b.find(link.Target); o == nil || o.Type == "Symlink" {
			return &fault{Status: 404, Code: "SymlinkTargetNotExist", Message: "The symlink target object does not exist."}
		}
		c.w.Header().Set("x-oss-symlink-target-size", strconv.FormatInt(o.Blob.Size, 10))
		followed := *o
		followed.Type = "Symlink"
		o = &followed
	}
	h := c.w.Header()
	if id := b.versionID(); id != "" {
		h.Set("x-oss-version-id", id)
	}
	h.Set("ETag", `"`+o.ETag+`"`)
	h.Set("Last-Modified", o.Modified.Format(http.TimeFormat))
	h.Set("Accept-Ranges", "bytes")
	h.Set("x-oss-object-type", o.Type)
	h.Set("x-oss-storage-class", "Standard")
	h.Set("x-oss-hash-crc64ecma", strconv.FormatUint(o.CRC, 10))
	if o.MD5 != nil {
		h.Set("Content-MD5", base64.StdEncoding.EncodeToString(o.MD5))
	}
	h.Set("Content-Type", o.ContentType)
	if o.ContentType == "" {
		h.Set("Content-Type", "application/octet-stream")
	}
	for k, v := range o.Kept {
		h.Set(k, v)
	}
	if err := precondition(c.r, o); err != nil {
		return err
	}
	if notModified(c.r, o) {
		h.Del("Content-Type")
		c.w.WriteHeader(http.StatusNotModified)
		return nil
	}
	off, n, status := int64(0), o.Blob.Size, http.StatusOK
	if c.r.Method == "GET" && c.r.Header.Get("Range") != "" {
		first, count, verdict := parseRange(c.r.Header.Get("Range"), o.Blob.Size,
			c.r.Header.Get("x-oss-range-behavior") == "standard")
		switch verdict {
		case rangeGood:
			off, n, status = first, count, http.StatusPartialContent
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, o.Blob.Size))
		case rangeUnsatisfiable:
			return &fault{Status: 416, Code: "InvalidRange", Message: "The requested range cannot be satisfied."}
		}
	}
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	if c.r.Method == "HEAD" {
		c.w.WriteHeader(status)
		return nil
	}
	body, err := b.open(o.Blob, off, n)
	if err != nil {
		return err
	}
	defer body.Close()
	c.w.WriteHeader(status)
	io.Copy(c.w, body) // a client that left is no error of the server
	return nil
}

func precondition(r *http.Request, o *object) error {
	failed := &fault{Status: 412, Code: "PreconditionFailed", Message: "At least one of the pre-conditions you specified did not hold."}
	if m := r.Header.Get("If-Match"); m != "" && m != "*" && !strings.EqualFold(strings.Trim(m, `"`), o.ETag) {
		return failed
	}
	if t, err := http.ParseTime(r.Header.Get("If-Unmodified-Since")); err == nil && o.Modified.Truncate(time.Second).After(t) {
		return failed
	}
	return nil
}

func notModified(r *http.Request, o *object) bool {
	if m := r.Header.Get("If-None-Match"); m != "" {
		return m == "*" || strings.EqualFold(strings.Trim(m, `"`), o.ETag)
	}
	t, err := http.ParseTime(r.Header.Get("If-Modified-Since"))
	return err == nil && !o.Modified.Truncate(time.Second).After(t)
}

type rangeVerdict int

const (
	rangeGood rangeVerdict = iota
	rangeIgnored
	rangeUnsatisfiable
)

// parseRange reads "bytes=a-b", "bytes=a-" or "bytes=-n". Without standard, OSS ignores a range that does
// not lie wholly within the object; with it, the end is cut and a start beyond the end is refused.
func parseRange(header string, size int64, standard bool) (off, n int64, v rangeVerdict) {
	spec, ok := strings.CutPrefix(header, "bytes=")
	from, to, dash := strings.Cut(spec, "-")
	if !ok || !dash || strings.Contains(spec, ",") {
		return 0, 0, rangeIgnored
	}
	last := size - 1
	var err error
	switch {
	case from == "":
		var count int64
		if count, err = parseOffset(to); err != nil {
			return 0, 0, rangeIgnored
		}
		if count == 0 || size == 0 {
			return 0, 0, rangeUnsatisfiable
		}
		if count > size && !standard {
			return 0, 0, rangeIgnored
		}
		return max(size-count, 0), min(count, size), rangeGood
	case to == "":
		off, err = parseOffset(from)
	default:
		if off, err = parseOffset(from); err == nil {
			last, err = parseOffset(to)
		}
	}
	if err != nil || last < off && to != "" {
		return 0, 0, rangeIgnored
	}
	if off >= size {
		if standard {
			return 0, 0, rangeUnsatisfiable
		}
		return 0, 0, rangeIgnored
	}
	if last >= size {
		if !standard {
			return 0, 0, rangeIgnored
		}
		last = size - 1
	}
	return off, last - off + 1, rangeGood
}

func parseOffset(s string) (int64, error) {
	if s == "" || s[0] == '+' || s[0] == '-' {
		return 0, strconv.ErrSyntax
	}
	return strconv.ParseInt(s, 10, 64)
}

// receive stores the request's body and checks it against Content-Length and Content-MD5.
func (s *Server) receive(c *call, b *bucket) (blob, []byte, uint64, error) {
	content, sum, crc, err := b.write(c.r.Body, c.r.ContentLength)
	if err != nil {
		b.discard(content)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return blob{}, nil, 0, &fault{Status: 400, Code: "IncompleteBody", Message: "The body is shorter than Content-Length says."}
		}
		return blob{}, nil, 0, err
	}
	if want := c.r.Header.Get("Content-MD5"); want != "" && want != base64.StdEncoding.EncodeToString(sum) {
		b.discard(content)
		return blob{}, nil, 0, &fault{Status: 400, Code: "InvalidDigest", Message: "The Content-MD5 you specified was invalid."}
	}
	c.w.Header().Set("x-oss-hash-crc64ecma", strconv.FormatUint(crc, 10))
	c.w.Header().Set("ETag", fmt.Sprintf(`"%X"`, sum))
	return content, sum, crc, nil
}

func (s *Server) put(c *call, b *bucket) error {
	content, sum, crc, err := s.receive(c, b)
	if err != nil {
		return err
	}
	o := s.normal(c.key, content, sum, crc)
	o.ContentType, o.Kept = c.r.Header.Get("Content-Type"), kept(c.r.Header)
	if err := b.storeIf(c, o); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusOK)
	return nil
}

// kept are the headers that are stored with an object.
func kept(h http.Header) map[string]string {
	out := map[string]string{}
	for k := range h {
		switch {
		case strings.HasPrefix(k, "X-Oss-Meta-"), k == "Cache-Control", k == "Content-Disposition", k == "Content-Encoding", k == "Content-Language", k == "Expires":
			out[k] = h.Get(k)
		}
	}
	return out
}

// storeIf stores o unless the request forbids to overwrite what is there, which has no effect with versioning.
func (b *bucket) storeIf(c *call, o *object) error {
	if id := b.versionID(); id != "" {
		c.w.Header().Set("x-oss-version-id", id)
	} else if c.r.Header.Get("x-oss-forbid-overwrite") == "true" {
		b.forbid.Lock()
		defer b.forbid.Unlock()
		if b.find(o.Key) != nil {
			return &fault{Status: 409, Code: "FileAlreadyExists", Message: "The object you specified already exists and can not be overwritten."}
		}
	}
	return b.store(o)
}

// copy makes an object of another.
func (s *Server) copy(c *call, b *bucket) error {
	name, err := url.PathUnescape(c.r.Header.Get("x-oss-copy-source"))
	key, ok := strings.CutPrefix(name, "/"+c.name+"/")
	if err != nil || !ok {
		return invalid("x-oss-copy-source must name an object of this bucket.")
	}
	from := b.find(key)
	if from == nil {
		return &fault{Status: 404, Code: "NoSuchKey", Message: "The specified key does not exist."}
	}
	if want := c.r.Header.Get("x-oss-copy-source-if-match"); want != "" && strings.Trim(want, `"`) != from.ETag {
		return &fault{Status: 412, Code: "PreconditionFailed", Message: "At least one of the pre-conditions you specified did not hold."}
	}
	body, err := b.open(from.Blob, 0, from.Blob.Size)
	if err != nil {
		return err
	}
	defer body.Close()
	content, sum, crc, err := b.write(body, from.Blob.Size)
	if err != nil {
		return err
	}
	o := s.normal(c.key, content, sum, crc)
	o.ContentType, o.Kept = from.ContentType, from.Kept
	if c.r.Header.Get("x-oss-metadata-directive") == "REPLACE" {
		o.ContentType, o.Kept = c.r.Header.Get("Content-Type"), kept(c.r.Header)
	}
	if err := b.storeIf(c, o); err != nil {
		return err
	}
	return c.answer(struct {
		XMLName      xml.Name `xml:"CopyObjectResult"`
		ETag         string
		LastModified time.Time
	}{ETag: `"` + o.ETag + `"`, LastModified: o.Modified})
}

func (s *Server) symlink(c *call, b *bucket) error {
	target, err := url.QueryUnescape(c.r.Header.Get("x-oss-symlink-target"))
	if err != nil || target == "" {
		return invalid("x-oss-symlink-target must name an object.")
	}
	content, sum, crc, err := b.write(strings.NewReader(""), 0)
	if err != nil {
		return err
	}
	o := s.normal(c.key, content, sum, crc)
	o.Type, o.Target = "Symlink", target
	if err := b.store(o); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusOK)
	return nil
}

func (s *Server) delete(c *call, b *bucket) error {
	b.remove(c.key)
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}
