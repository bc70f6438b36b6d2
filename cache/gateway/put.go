package gateway

import (
	"encoding/xml"
	"net/http"
	"strings"

	"golang.org/x/sync/errgroup"
)

// maxMetadata is the most that the names and values of x-amz-meta- together may have, as in S3.
const maxMetadata = 2 << 10

func (q *request) put() error {
	w, err := q.mustWrite()
	if err != nil {
		return err
	}
	o, err := q.options(true)
	if err != nil {
		return err
	}
	b, err := q.sized()
	if err != nil {
		return err
	}
	o.Sums = b.sums()
	info, err := w.Put(q.r.Context(), q.key, b.size, b, o)
	if err != nil {
		return q.refused(b, err)
	}
	if err := b.verified(); err != nil {
		return err
	}
	q.stored(info.ETag, b)
	return nil
}

// refused is the answer to a failed put: what was wrong with the body, if that was it, whatever the
// Objects made of it.
func (q *request) refused(b *body, err error) error {
	if f, ok := b.err.(*Failure); ok {
		return f
	}
	return err
}

func (q *request) stored(etag string, b *body) {
	h := q.w.Header()
	h.Set("ETag", quote(etag))
	if b.sum != nil {
		h.Set(b.sum.header, encodeSum(b.sum.want))
	}
	h.Set("Content-Length", "0")
	q.w.WriteHeader(http.StatusOK)
}

// options are what a put, a copy or the creation of an upload says of the object.
func (q *request) options(conditional bool) (PutOptions, error) {
	h := q.r.Header
	if err := unsupported(h); err != nil {
		return PutOptions{}, err
	}
	o := PutOptions{ContentType: h.Get("Content-Type"), Headers: map[string]string{}, Metadata: map[string]string{}}
	for _, k := range kept[1:] {
		if value := h.Get(k.header); value != "" {
			o.Headers[k.header] = value
		}
	}
	if encoding, ok := withoutChunked(o.Headers["Content-Encoding"]); ok {
		delete(o.Headers, "Content-Encoding")
		if encoding != "" {
			o.Headers["Content-Encoding"] = encoding
		}
	}
	total := 0
	for name, values := range h {
		if short, ok := strings.CutPrefix(strings.ToLower(name), "x-amz-meta-"); ok && short != "" {
			value := strings.Join(values, ",")
			o.Metadata[short] = value
			total += len(short) + len(value)
		}
	}
	if total > maxMetadata {
		return PutOptions{}, failure(http.StatusBadRequest, "MetadataTooLarge", "Your metadata headers exceed the maximum allowed metadata size.")
	}
	if conditional {
		return o, q.putConditions(&o)
	}
	return o, nil
}

func (q *request) putConditions(o *PutOptions) error {
	h := q.r.Header
	o.IfMatch, o.IfNoneMatch = unquote(h.Get("If-Match")), unquote(h.Get("If-None-Match"))
	if o.IfNoneMatch != "" && (o.IfNoneMatch != "*" || o.IfMatch != "") {
		return notImplemented(`A put on an If-None-Match other than "*"`)
	}
	return nil
}

// withoutChunked takes aws-chunked, which is how a body was sent, from a Content-Encoding, which is kept.
func withoutChunked(encoding string) (string, bool) {
	var rest []string
	found := false
	for part := range strings.SplitSeq(encoding, ",") {
		if part = strings.TrimSpace(part); strings.EqualFold(part, "aws-chunked") {
			found = true
		} else if part != "" {
			rest = append(rest, part)
		}
	}
	return strings.Join(rest, ","), found
}

func (q *request) delete() error {
	w, err := q.mustWrite()
	if err != nil {
		return err
	}
	if err := q.ignore(); err != nil {
		return err
	}
	if q.query.has("versionId") {
		if err := current(q.query.get("versionId")); err != nil {
			return err
		}
	}
	if err := q.unconditional(); err != nil {
		return err
	}
	if err := w.Delete(q.r.Context(), q.key); err != nil {
		return err
	}
	q.w.WriteHeader(http.StatusNoContent)
	return nil
}

var errCondition = notImplemented("DELETE on a condition")

// unconditional refuses a DELETE, of an object or an upload, on one of S3's conditions.
func (q *request) unconditional() error {
	for _, name := range []string{"If-Match", "X-Amz-If-Match-Size", "X-Amz-If-Match-Last-Modified-Time", "X-Amz-If-Match-Initiated-Time"} {
		if q.r.Header.Get(name) != "" {
			return errCondition
		}
	}
	return nil
}

const (
	maxDeletes    = 1000
	maxDeleteBody = 2 << 20
	deletesAtOnce = 16
)

type toDelete struct {
	Key                          string
	VersionID                    string `xml:"VersionId"`
	ETag, Size, LastModifiedTime string // conditions
}

type deleteError struct {
	Key, Code, Message string
	VersionID          string `xml:"VersionId,omitempty"`
}

// deleteMany answers POST ?delete: each key has its own outcome.
func (q *request) deleteMany() error {
	w, err := q.mustWrite()
	if err != nil {
		return err
	}
	var asked struct {
		XMLName xml.Name `xml:"Delete"`
		Quiet   bool
		Objects []toDelete `xml:"Object"`
	}
	if err := q.parse(maxDeleteBody, &asked); err != nil {
		return err
	}
	if len(asked.Objects) == 0 || len(asked.Objects) > maxDeletes {
		return errXML
	}
	failed := make([]error, len(asked.Objects))
	return q.slowly(func() (any, error) {
		q.deleteAll(w, asked.Objects, failed)
		type deleted struct{ Key string }
		answer := struct {
			XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ DeleteResult"`
			Deleted []deleted
			Error   []deleteError
		}{}
		for i, o := range asked.Objects {
			if err := failed[i]; err != nil {
				f := failureOf(err)
				q.report(err, f)
				answer.Error = append(answer.Error, deleteError{Key: xmlText(o.Key), Code: f.Code, Message: f.Message, VersionID: xmlText(o.VersionID)})
			} else if !asked.Quiet {
				answer.Deleted = append(answer.Deleted, deleted{o.Key})
			}
		}
		return answer, nil
	})
}

// deleteAll deletes all that can be deleted, and notes what cannot.
func (q *request) deleteAll(w Writer, objects []toDelete, failed []error) {
	var keys []string
	for i, o := range objects {
		if failed[i] = o.deletable(); failed[i] == nil {
			keys = append(keys, o.Key)
		}
	}
	if bulk, ok := w.(BulkWriter); ok && len(keys) > 1 {
		errs := bulk.DeleteMany(q.r.Context(), keys)
		for i, o := range objects {
			if failed[i] == nil {
				failed[i] = errs[o.Key]
			}
		}
		return
	}
	var group errgroup.Group
	group.SetLimit(deletesAtOnce)
	for i, o := range objects {
		if failed[i] == nil {
			group.Go(func() error {
				failed[i] = w.Delete(q.r.Context(), o.Key)
				return nil
			})
		}
	}
	group.Wait()
}

func (o toDelete) deletable() error {
	switch {
	case o.VersionID != "" && o.VersionID != "null":
		return failure(http.StatusNotFound, "NoSuchVersion", "The specified version does not exist.")
	case o.ETag != "" || o.Size != "" || o.LastModifiedTime != "":
		return errCondition
	}
	return ValidKey(o.Key)
}
