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

// route is what a request asks for: S3's name of the operation, and what answers it once its sender is known.
// It looks at the request alone, so that also one that is refused is counted as what it was (a presigned copy as a put:
// its headers are only known once its signature is).
func (q *request) route() (operation string, answer func() error) {
	switch {
	case q.bucket == "":
		return "ListBuckets", q.service
	case q.key == "":
		return q.onBucket()
	}
	return q.onObject()
}

func (q *request) onBucket() (operation string, answer func() error) {
	if name := q.subresource(bucketOnly); name != "" {
		return operationOther, func() error { return q.unset(name, bucketUnset) }
	}
	switch q.r.Method {
	case http.MethodHead:
		return "HeadBucket", q.headBucket
	case http.MethodGet:
		switch {
		case q.query.has("location"):
			return "GetBucketLocation", q.location
		case q.query.has("uploads"):
			return "ListMultipartUploads", q.uploads
		case q.query.get("list-type") == "2":
			return "ListObjectsV2", q.list
		}
		return "ListObjects", q.list
	case http.MethodPost:
		if q.query.has("delete") {
			return "DeleteObjects", q.deleteMany
		}
		return operationOther, refuse(notImplemented("POST of an object from a form"))
	case http.MethodPut:
		return "CreateBucket", refuse(failure(http.StatusConflict, "BucketAlreadyOwnedByYou", "The bucket exists: buckets are Datasets."))
	case http.MethodDelete:
		return "DeleteBucket", refuse(notImplemented("Deletion of a bucket, which is a Dataset,"))
	}
	return operationOther, refuse(errMethod)
}

func (q *request) onObject() (operation string, answer func() error) {
	if name := q.subresource(objectOnly); name != "" {
		return operationOther, func() error { return q.unset(name, objectUnset) }
	}
	upload := q.query.has("uploadId")
	switch q.r.Method {
	case http.MethodGet:
		if upload {
			return "ListParts", q.ofUpload(q.parts)
		}
		return "GetObject", q.get
	case http.MethodHead:
		return "HeadObject", q.get
	case http.MethodPut:
		copied := q.r.Header.Get("X-Amz-Copy-Source") != ""
		switch {
		case upload || q.query.has("partNumber"):
			if copied {
				return "UploadPartCopy", q.ofUpload(q.putPart)
			}
			return "UploadPart", q.ofUpload(q.putPart)
		case copied:
			return "CopyObject", q.copy
		}
		return "PutObject", q.put
	case http.MethodPost:
		switch {
		case q.query.has("uploads"):
			return "CreateMultipartUpload", q.create
		case upload:
			return "CompleteMultipartUpload", q.ofUpload(q.complete)
		}
	case http.MethodDelete:
		if upload {
			return "AbortMultipartUpload", q.ofUpload(q.abort)
		}
		return "DeleteObject", q.delete
	}
	return operationOther, refuse(errMethod)
}

// ofUpload is an answer about the upload that the query names. Whoever was given no name, since no upload was created,
// asks with an empty one: that must not be taken for the object's, here or in the bucket.
func (q *request) ofUpload(answer func(upload string) error) func() error {
	return func() error {
		upload := q.query.get("uploadId")
		switch {
		case !q.query.has("uploadId"):
			return badArgument("This operation needs an uploadId.")
		case upload == "":
			return ErrNoUpload
		}
		return answer(upload)
	}
}

func refuse(f *Failure) func() error { return func() error { return f } }

func (q *request) headBucket() error {
	if err := q.ignore(); err != nil {
		return err
	}
	q.w.Header().Set("X-Amz-Bucket-Region", q.Region)
	q.w.WriteHeader(http.StatusOK)
	return nil
}

func (q *request) location() error {
	if err := q.ignore(); err != nil {
		return err
	}
	answer := struct {
		XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ LocationConstraint"`
		Region  string   `xml:",chardata"`
	}{}
	if q.Region != "us-east-1" { // which has an empty name here, for historical reasons
		answer.Region = q.Region
	}
	return q.answer(http.StatusOK, answer)
}
