package gateway

import (
	"encoding/xml"
	"net/http"
	"slices"
	"time"
)

const namespace = "http://s3.amazonaws.com/doc/2006-03-01/"

// stamp is a time as S3's XML has it.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

type owner struct {
	ID          string
	DisplayName string
}

// There are no accounts: everything belongs to one owner.
var stepcache = owner{ID: "stepcache", DisplayName: "stepcache"}

// service answers at the root: the list of buckets.
func (q *request) service() error {
	if q.key != "" || q.r.URL.Path != "/" && q.r.URL.Path != "" {
		return failure(http.StatusBadRequest, "InvalidURI", "Couldn't parse the specified URI: it names no bucket.")
	}
	if q.r.Method != http.MethodGet && q.r.Method != http.MethodHead {
		return errMethod
	}
	type bucket struct{ Name, CreationDate string }
	answer := struct {
		XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListAllMyBucketsResult"`
		Owner   owner
		Buckets struct {
			Bucket []bucket
		}
	}{Owner: stepcache}
	for name := range q.Buckets {
		answer.Buckets.Bucket = append(answer.Buckets.Bucket, bucket{name, stamp(q.started)})
	}
	slices.SortFunc(answer.Buckets.Bucket, func(a, b bucket) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return q.answer(http.StatusOK, answer)
}

var errMethod = failure(http.StatusMethodNotAllowed, "MethodNotAllowed", "The specified method is not allowed against this resource.")

func (q *request) onBucket() error {
	if name := q.subresource(bucketOnly); name != "" {
		return q.unset(name, bucketUnset)
	}
	switch q.r.Method {
	case http.MethodHead:
		if err := q.ignore(); err != nil {
			return err
		}
		q.w.Header().Set("X-Amz-Bucket-Region", q.Region)
		q.w.WriteHeader(http.StatusOK)
		return nil
	case http.MethodGet:
		if err := q.ignore(); err != nil {
			return err
		}
		switch {
		case q.query.has("location"):
			return q.location()
		case q.query.has("uploads"):
			return q.uploads()
		}
		return q.list()
	case http.MethodPost:
		if q.query.has("delete") {
			return q.deleteMany()
		}
		return notImplemented("POST of an object from a form")
	case http.MethodPut:
		return failure(http.StatusConflict, "BucketAlreadyOwnedByYou", "The bucket exists: buckets are Datasets.")
	case http.MethodDelete:
		return notImplemented("Deletion of a bucket, which is a Dataset,")
	}
	return errMethod
}

func (q *request) onObject() error {
	if name := q.subresource(objectOnly); name != "" {
		return q.unset(name, objectUnset)
	}
	upload := q.query.get("uploadId")
	switch q.r.Method {
	case http.MethodGet:
		if upload != "" {
			return q.parts(upload)
		}
		return q.get()
	case http.MethodHead:
		return q.get()
	case http.MethodPut:
		switch {
		case q.query.has("uploadId") || q.query.has("partNumber"):
			return q.putPart(upload)
		case q.r.Header.Get("X-Amz-Copy-Source") != "":
			return q.copy()
		}
		return q.put()
	case http.MethodPost:
		switch {
		case q.query.has("uploads"):
			return q.create()
		case upload != "":
			return q.complete(upload)
		}
		return errMethod
	case http.MethodDelete:
		if upload != "" {
			return q.abort(upload)
		}
		return q.delete()
	}
	return errMethod
}

func (q *request) location() error {
	answer := struct {
		XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ LocationConstraint"`
		Region  string   `xml:",chardata"`
	}{}
	if q.Region != "us-east-1" { // which has an empty name here, for historical reasons
		answer.Region = q.Region
	}
	return q.answer(http.StatusOK, answer)
}
