package gateway

import (
	"encoding/xml"
	"net/http"
	"slices"
	"strings"
)

// The subresources that are not served as such. Those that clients read in passing are answered as S3
// answers where they were never set; everything else of them is NotImplemented, and never taken for a plain
// read or write of the object.
var (
	bucketOnly = []string{
		"abac", "accelerate", "acl", "analytics", "attributes", "cors", "encryption", "intelligent-tiering", "inventory", "legal-hold",
		"lifecycle", "logging", "metadataConfiguration", "metadataTable", "metrics", "notification", "object-lock", "ownershipControls",
		"policy", "policyStatus", "publicAccessBlock", "replication", "requestPayment", "session", "tagging", "versioning", "versions",
		"website",
	}
	objectOnly = []string{
		"acl", "annotation", "attributes", "encryption", "legal-hold", "renameObject", "restore", "retention", "select", "tagging",
		"torrent",
	}
)

type grantee struct {
	XSI         string `xml:"xmlns:xsi,attr"`
	Type        string `xml:"xsi:type,attr"`
	ID          string
	DisplayName string
}

type grant struct {
	Grantee    grantee
	Permission string
}

type accessControl struct {
	XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ AccessControlPolicy"`
	Owner   owner
	Grants  []grant `xml:"AccessControlList>Grant"`
}

var ownerOnly = accessControl{Owner: stepcache, Grants: []grant{{
	Grantee:    grantee{"http://www.w3.org/2001/XMLSchema-instance", "CanonicalUser", stepcache.ID, stepcache.DisplayName},
	Permission: "FULL_CONTROL",
}}}

type empty struct{ XMLName xml.Name }

func emptyDocument(name string) empty { return empty{xml.Name{Space: namespace, Local: name}} }

func missing(code, message string) *Failure { return failure(http.StatusNotFound, code, "%s", message) }

// The answers to GET: a document, or an error.
var bucketUnset = map[string]any{
	"accelerate":        emptyDocument("AccelerateConfiguration"),
	"acl":               ownerOnly,
	"cors":              missing("NoSuchCORSConfiguration", "The CORS configuration does not exist."),
	"encryption":        missing("ServerSideEncryptionConfigurationNotFoundError", "The server side encryption configuration was not found."),
	"lifecycle":         missing("NoSuchLifecycleConfiguration", "The lifecycle configuration does not exist."),
	"logging":           emptyDocument("BucketLoggingStatus"),
	"notification":      emptyDocument("NotificationConfiguration"),
	"object-lock":       missing("ObjectLockConfigurationNotFoundError", "Object Lock configuration does not exist for this bucket."),
	"ownershipControls": missing("OwnershipControlsNotFoundError", "The bucket ownership controls were not found."),
	"policy":            missing("NoSuchBucketPolicy", "The bucket policy does not exist."),
	"policyStatus":      missing("NoSuchBucketPolicy", "The bucket policy does not exist."),
	"publicAccessBlock": missing("NoSuchPublicAccessBlockConfiguration", "The public access block configuration was not found."),
	"replication":       missing("ReplicationConfigurationNotFoundError", "The replication configuration was not found."),
	"requestPayment": struct {
		XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ RequestPaymentConfiguration"`
		Payer   string
	}{Payer: "BucketOwner"},
	"tagging":    missing("NoSuchTagSet", "The TagSet does not exist."),
	"versioning": emptyDocument("VersioningConfiguration"),
	"website":    missing("NoSuchWebsiteConfiguration", "The specified bucket does not have a website configuration."),
}

var objectUnset = map[string]any{
	"acl":        ownerOnly,
	"legal-hold": missing("NoSuchObjectLockConfiguration", "The specified object does not have a ObjectLock configuration."),
	"retention":  missing("NoSuchObjectLockConfiguration", "The specified object does not have a ObjectLock configuration."),
	"tagging": struct {
		XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ Tagging"`
		TagSet  struct{}
	}{},
}

// subresource is the one of names that the query asks for; empty for none. Of a PUT or DELETE it may be any parameter
// that says something else than these: what S3 will call its next subresource must not replace or delete the object.
func (q *request) subresource(names []string) string {
	unknown := ""
	for _, p := range q.query {
		switch {
		case slices.Contains(names, p.name):
			return p.name
		case p.name == "uploadId", p.name == "partNumber", p.name == "versionId":
		case strings.HasPrefix(strings.ToLower(p.name), "x-"): // of signatures and SDKs, or for S3's access log
		default:
			unknown = p.name
		}
	}
	if q.r.Method == http.MethodPut || q.r.Method == http.MethodDelete {
		return unknown
	}
	return ""
}

func (q *request) unset(name string, answers map[string]any) error {
	answer, known := answers[name]
	if !known || q.r.Method != http.MethodGet {
		return notImplemented(q.r.Method + " of ?" + name)
	}
	if err := q.ignore(); err != nil {
		return err
	}
	if q.key != "" {
		if _, err := q.objects.Stat(q.r.Context(), q.key); err != nil {
			return err
		}
	}
	if f, ok := answer.(*Failure); ok {
		return f
	}
	return q.answer(http.StatusOK, answer)
}

// unsupported refuses the headers of a put that would otherwise be dropped without a word: what they ask
// for is no part of a Dataset. Those that ask for what holds anyway are let through.
func unsupported(h http.Header) error {
	for name, values := range h {
		switch name {
		case "X-Amz-Acl":
			if !slices.Contains([]string{"private", "bucket-owner-full-control", "bucket-owner-read"}, values[0]) {
				return failure(http.StatusBadRequest, "AccessControlListNotSupported", "The bucket does not allow ACLs.")
			}
		case "X-Amz-Grant-Read", "X-Amz-Grant-Write", "X-Amz-Grant-Read-Acp", "X-Amz-Grant-Write-Acp", "X-Amz-Grant-Full-Control":
			return failure(http.StatusBadRequest, "AccessControlListNotSupported", "The bucket does not allow ACLs.")
		case "X-Amz-Storage-Class":
			if values[0] != "STANDARD" {
				return failure(http.StatusBadRequest, "InvalidStorageClass", "The storage class you specified is not valid: there is STANDARD.")
			}
		case "X-Amz-Server-Side-Encryption", "X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id", "X-Amz-Server-Side-Encryption-Customer-Algorithm",
			"X-Amz-Object-Lock-Mode", "X-Amz-Object-Lock-Retain-Until-Date", "X-Amz-Object-Lock-Legal-Hold",
			"X-Amz-Tagging", "X-Amz-Website-Redirect-Location", "X-Amz-Write-Offset-Bytes":
			return notImplemented(name)
		}
	}
	return nil
}
