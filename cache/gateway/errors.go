package gateway

import (
	"cmp"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"

	"github.com/stepcache/stepcache/cache/source"
)

// Failure is an answer with an S3 error code.
type Failure struct {
	Status        int
	Code, Message string
	header        map[string]string
	counted       string // what metrics call it where Code is a bucket's own, of which there may be any number
}

func (f *Failure) Error() string { return f.Code + ": " + f.Message }

func failure(status int, code, format string, args ...any) *Failure {
	return &Failure{Status: status, Code: code, Message: fmt.Sprintf(format, args...)}
}

func badArgument(format string, args ...any) *Failure {
	return failure(http.StatusBadRequest, "InvalidArgument", format, args...)
}

func notImplemented(what string) *Failure {
	return failure(http.StatusNotImplemented, "NotImplemented", "%s is not supported by this endpoint; docs/s3.md lists what is.", what)
}

// The answers for errors of Objects, by kind. The first that matches counts, so that a reader's Failure
// (a bad digest) wins over whatever kind a store gave the put that it broke.
var kinds = []struct {
	kind    error
	failure *Failure
}{
	{source.ErrNotFound, failure(http.StatusNotFound, "NoSuchKey", "The specified key does not exist.")},
	{source.ErrNoBucket, failure(http.StatusNotFound, "NoSuchBucket", "The bucket behind this Dataset does not exist.")},
	{ErrNoUpload, failure(http.StatusNotFound, "NoSuchUpload", "The specified upload does not exist. It may have been aborted or completed.")},
	{ErrBadPart, failure(http.StatusBadRequest, "InvalidPart", "One or more of the specified parts could not be found, or the ETag did not match.")},
	{ErrPartTooSmall, failure(http.StatusBadRequest, "EntityTooSmall", "A part other than the last is smaller than the minimum size.")},
	{ErrTooLarge, failure(http.StatusBadRequest, "EntityTooLarge", "The object is larger than this Dataset can take.")},
	{ErrPrecondition, failure(http.StatusPreconditionFailed, "PreconditionFailed", "At least one of the preconditions you specified did not hold.")},
	{ErrReadOnly, failure(http.StatusForbidden, "AccessDenied", "This Dataset is read-only.")},
	{source.ErrDenied, failure(http.StatusForbidden, "AccessDenied", "The bucket behind this Dataset denies access to the Dataset's own credentials.")},
	{ErrBusy, failure(http.StatusServiceUnavailable, "SlowDown", "Please reduce your request rate.")},
	{source.ErrThrottled, failure(http.StatusServiceUnavailable, "SlowDown", "Please reduce your request rate.")},
	{source.ErrChanged, failure(http.StatusServiceUnavailable, "ServiceUnavailable", "The object changed while it was read. Please try again.")},
	{source.ErrUnavailable, failure(http.StatusServiceUnavailable, "ServiceUnavailable", "The bucket behind this Dataset does not answer. Please try again.")},
	{source.ErrUnversioned, failure(http.StatusBadRequest, "InvalidRequest", "The object has no version, and its Dataset does not say allowUnversioned.")},
	{source.ErrInvalid, unexplained},
	{context.Canceled, failure(http.StatusServiceUnavailable, "ServiceUnavailable", "The worker is being stopped. Please try again.")},
	{context.DeadlineExceeded, failure(http.StatusServiceUnavailable, "ServiceUnavailable", "The time was not enough. Please try again.")},
}

// unexplained does not tell the client what is wrong, so that the log has to.
var unexplained = failure(http.StatusBadRequest, "InvalidRequest", "The request cannot be fulfilled as it stands.")

var internal = failure(http.StatusInternalServerError, "InternalError", "We encountered an internal error. Please try again.")

func failureOf(err error) *Failure {
	var f *Failure
	if errors.As(err, &f) {
		return f
	}
	for _, k := range kinds {
		if errors.Is(err, k.kind) {
			if k.failure == unexplained {
				return refused(err)
			}
			return k.failure
		}
	}
	return internal
}

// refused is what the bucket said to a request that cannot be fulfilled, where it was the bucket that said so.
func refused(err error) *Failure {
	var said *source.Refusal
	if !errors.As(err, &said) {
		return unexplained
	}
	f := failure(said.Status, said.Code, "%s", said.Message)
	f.counted = unexplained.Code
	if f.Message == "" {
		f.Message = "The bucket behind this Dataset refused the request."
	}
	return f
}

type errorBody struct {
	XMLName   xml.Name `xml:"Error"`
	Code      string
	Message   string
	Bucket    string `xml:"BucketName,omitempty"`
	Key       string `xml:",omitempty"`
	Resource  string `xml:",omitempty"`
	RequestID string `xml:"RequestId"`
	HostID    string `xml:"HostId"`
}

// fail answers with err, of which nothing has been written yet.
func (q *request) fail(err error) {
	f := failureOf(err)
	if (q.r.Context().Err() != nil || errors.Is(err, ErrLeft)) && !errors.As(err, new(*Failure)) {
		q.hangUp(codeLeft) // the client is gone, and that is what err is about
	}
	q.report(err, f)
	q.drain()
	for name, value := range f.header {
		q.w.Header().Set(name, value)
	}
	if f.Status == http.StatusServiceUnavailable {
		q.w.Header().Set("Retry-After", "1")
	}
	if f.Status == http.StatusNotModified || q.r.Method == http.MethodHead {
		q.w.WriteHeader(f.Status) // HEAD has no body, in which the code would be
		return
	}
	q.answer(f.Status, q.errorBody(f))
}

func (q *request) errorBody(f *Failure) errorBody {
	return errorBody{Code: f.Code, Message: f.Message, Bucket: q.bucket, Key: xmlText(q.key), Resource: xmlText(q.r.URL.Path), RequestID: q.id, HostID: q.id}
}

// report counts an error, and logs it if it is not the client's doing, or the client is not told what it is: some of
// them a second at most. Reads and writes that the client broke off are its own.
func (q *request) report(err error, f *Failure) {
	if f.Status >= http.StatusBadRequest {
		q.Metrics.errors.WithLabelValues(cmp.Or(f.counted, f.Code)).Inc()
	}
	if f.Status < http.StatusInternalServerError && f != unexplained || f.Status == http.StatusNotImplemented || q.r.Context().Err() != nil || errors.Is(err, ErrLeft) {
		return
	}
	if !q.limit.Allow() {
		q.unlogged.Add(1)
		return
	}
	attrs := []any{"method", q.r.Method, "bucket", q.bucket, "key", q.key, "code", f.Code, "request", q.id, "err", err}
	if n := q.unlogged.Swap(0); n > 0 {
		attrs = append(attrs, "unlogged", n)
	}
	q.Logger.Error("s3 request failed", attrs...)
}
