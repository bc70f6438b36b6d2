// Package osstest is an in-process server that speaks the part of the OSS protocol which a reader and
// writer of objects needs, for tests and local runs without an account.
//
// It owns the server's side of that protocol: V4 signatures in the header and in the query are verified
// against the request as it arrived (path, query, signed headers, date, region, secret), objects are kept
// in memory or in a folder, and faults can be injected by operation and key. Its signature check is its
// own code, written from the protocol and tested against two independent client SDKs. Where OSS differs
// from S3 it follows OSS: an unsatisfiable range answers the whole object unless the request says
// x-oss-range-behavior: standard, errors of HEAD travel in x-oss-err, a listing has 100 keys by default.
//
// Concurrency: a Server is safe for concurrent use. Failure: what a client does wrong is answered as OSS
// would; what the server cannot do (a full disk) is answered 500 InternalError. It imports the standard
// library only, so that nothing of a client SDK can vouch for itself.
package osstest

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Credential is a key pair that the server accepts. With a Token it is a temporary one: requests must
// carry the token and come before Expires (zero: never).
type Credential struct {
	AccessKeyID, AccessKeySecret, Token string
	Expires                             time.Time
}

// Options configure a Server. The zero value serves region cn-test from memory with one generated key.
type Options struct {
	// Region is what signatures must be scoped to; default cn-test.
	Region string
	// Credentials are the key pairs accepted; default one generated pair.
	Credentials []Credential
	// Dir keeps objects in this folder instead of in memory; what it holds already is served.
	Dir string
	// Domain serves bucket.Domain as a bucket (virtual-hosted style) beside the path style.
	Domain string
	// Page caps the entries of one listing page, below OSS's 1000, so that few keys make many pages.
	Page int
	// StrictNames refuses keys with a leading slash or backslash, as OSS documents; by default they work.
	StrictNames bool
	// Now is the server's clock; default time.Now.
	Now func() time.Time
}

// Server is a running server.
type Server struct {
	options  Options
	listener net.Listener
	http     *http.Server
	served   chan struct{} // closed when Serve has returned
	closing  chan struct{} // closed first by Close, so that stalled answers end
	once     sync.Once

	mu          sync.Mutex
	credentials []Credential
	buckets     map[string]*bucket
	faults      []*Injected
	seen        []Seen
	count       map[string]int
}

// Seen is one request that the server got, after its signature was found good.
type Seen struct {
	Op, Bucket, Key string
	Query           url.Values
	Header          http.Header
}

// Start runs a server on a free port of the loopback interface.
func Start(options Options) (*Server, error) {
	if options.Region == "" {
		options.Region = "cn-test"
	}
	if options.Now == nil {
		options.Now = time.Now
	}
	if options.Page <= 0 || options.Page > 1000 {
		options.Page = 1000
	}
	if len(options.Credentials) == 0 {
		options.Credentials = []Credential{{AccessKeyID: "LTAI" + random(10), AccessKeySecret: random(15)}}
	}
	s := &Server{options: options, credentials: options.Credentials, buckets: map[string]*bucket{}, count: map[string]int{},
		served: make(chan struct{}), closing: make(chan struct{})}
	if options.Dir != "" {
		if err := s.load(); err != nil {
			return nil, fmt.Errorf("osstest: folder %s: %w", options.Dir, err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("osstest: %w", err)
	}
	s.listener = l
	s.http = &http.Server{Handler: http.HandlerFunc(s.serve), ErrorLog: log.New(io.Discard, "", 0)}
	go func() {
		defer close(s.served)
		s.http.Serve(l) // ends with ErrServerClosed only
	}()
	return s, nil
}

// TB is what StartT needs of a test.
type TB interface {
	Helper()
	Fatal(args ...any)
	Cleanup(func())
}

// StartT is Start for a test: it stops the server when the test ends.
func StartT(t TB, options Options) *Server {
	t.Helper()
	s, err := Start(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Close ends the server and every request under way.
func (s *Server) Close() {
	s.once.Do(func() {
		close(s.closing)
		s.http.Close()
	})
	<-s.served
}

// Endpoint is http://127.0.0.1:PORT.
func (s *Server) Endpoint() string { return "http://" + s.Addr() }

// Addr is 127.0.0.1:PORT.
func (s *Server) Addr() string { return s.listener.Addr().String() }

// Region is what signatures must be scoped to.
func (s *Server) Region() string { return s.options.Region }

// Credential is the first key pair that the server accepts.
func (s *Server) Credential() Credential {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.credentials[0]
}

// SetCredentials replaces the key pairs accepted from now on.
func (s *Server) SetCredentials(c ...Credential) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.credentials = append([]Credential(nil), c...)
}

// MakeBucket makes a private bucket; one that exists is left as it is.
func (s *Server) MakeBucket(name string) { s.makeBucket(name, false) }

// MakePublicBucket makes a bucket that anyone may read, unsigned.
func (s *Server) MakePublicBucket(name string) { s.makeBucket(name, true) }

func (s *Server) makeBucket(name string, public bool) *bucket {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.buckets[name]
	if b == nil {
		b = newBucket()
		if s.options.Dir != "" {
			b.dir = filepath.Join(s.options.Dir, name)
		}
		s.buckets[name] = b
	}
	b.public = b.public || public
	return b
}

// SetVersioning sets the versioning of a bucket to Enabled or Suspended.
func (s *Server) SetVersioning(bucket, status string) {
	b := s.bucket(bucket)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.versioning = status
}

func (s *Server) bucket(name string) *bucket {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buckets[name]
}

// Uploads counts the multi-part uploads of a bucket that were neither completed nor aborted.
func (s *Server) Uploads(bucket string) int {
	b := s.bucket(bucket)
	if b == nil {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.uploads)
}

// keptSeen is how many requests Seen tells of at least: a server may run for long.
const keptSeen = 10_000

// Seen returns the last well-signed requests, oldest first.
func (s *Server) Seen() []Seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Seen(nil), s.seen...)
}

// Count says how many well-signed requests of an operation came so far.
func (s *Server) Count(op string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count[op]
}

// call is one request on its way through the server.
type call struct {
	w         http.ResponseWriter
	r         *http.Request
	id        string
	op        string
	name, key string // bucket and object
	query     url.Values
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	c := &call{w: w, r: r, id: strings.ToUpper(random(12))}
	w.Header().Set("Server", "AliyunOSS")
	w.Header().Set("x-oss-request-id", c.id)
	w.Header().Set("x-oss-server-time", "1")
	var err error
	if c.query, err = url.ParseQuery(r.URL.RawQuery); err != nil {
		c.fail(invalid("the query is not well-formed"))
		return
	}
	s.locate(c)
	c.op = operation(r.Method, c.key, c.query)

	anonymous, err := s.verify(c)
	if err != nil {
		c.fail(err)
		return
	}
	f := s.observe(c)
	if f != nil && f.before(s, c) {
		return
	}
	if err := s.handle(c, anonymous); err != nil {
		c.fail(err)
	}
	if f != nil {
		f.after(s, c)
	}
}

// locate splits the request's host and path into bucket and key.
func (s *Server) locate(c *call) {
	path := strings.TrimPrefix(c.r.URL.Path, "/")
	host := c.r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if name, ok := strings.CutSuffix(host, "."+s.options.Domain); ok && s.options.Domain != "" {
		c.name, c.key = name, path
		return
	}
	c.name, c.key, _ = strings.Cut(path, "/")
}

// operation names a request as OSS's documentation does.
func operation(method, key string, q url.Values) string {
	object := key != ""
	switch {
	case method == "GET" && !object && q.Has("location"):
		return "GetBucketLocation"
	case method == "GET" && !object && q.Has("versioning"):
		return "GetBucketVersioning"
	case method == "GET" && !object && q.Get("list-type") == "2":
		return "ListObjectsV2"
	case method == "PUT" && !object:
		return "PutBucket"
	case method == "GET" && !object && q.Has("uploads"):
		return "ListMultipartUploads"
	case method == "GET" && object && q.Has("uploadId"):
		return "ListParts"
	case method == "GET" && object && len(subresources(q)) == 0:
		return "GetObject"
	case method == "HEAD" && object:
		return "HeadObject"
	case method == "PUT" && object && q.Has("symlink"):
		return "PutSymlink"
	case method == "PUT" && object && q.Has("uploadId"):
		return "UploadPart"
	case method == "PUT" && object && len(subresources(q)) == 0:
		return "PutObject"
	case method == "POST" && object && q.Has("uploads"):
		return "InitiateMultipartUpload"
	case method == "POST" && object && q.Has("uploadId"):
		return "CompleteMultipartUpload"
	case method == "DELETE" && object && q.Has("uploadId"):
		return "AbortMultipartUpload"
	case method == "DELETE" && object && len(subresources(q)) == 0:
		return "DeleteObject"
	}
	return "Unknown"
}

// subresources are the query's keys that select another operation than the plain one on an object.
func subresources(q url.Values) (names []string) {
	for k := range q {
		if !strings.HasPrefix(k, "x-oss-") && k != "encoding-type" {
			names = append(names, k)
		}
	}
	return names
}

func (s *Server) handle(c *call, anonymous bool) error {
	if c.name == "" {
		return &fault{Status: 501, Code: "NotImplemented", Message: "only operations on a bucket are served"}
	}
	if c.op == "PutBucket" {
		if anonymous {
			return denied("Anonymous access is forbidden for this operation.")
		}
		s.MakeBucket(c.name)
		return nil
	}
	b := s.bucket(c.name)
	if b == nil {
		return &fault{Status: 404, Code: "NoSuchBucket", Message: "The specified bucket does not exist.", EC: "0015-00000101"}
	}
	reads := c.op == "GetObject" || c.op == "HeadObject" || c.op == "ListObjectsV2"
	if anonymous && !(b.public && reads) {
		return denied("You have no right to access this object because of bucket acl.")
	}
	if len(c.key) > 1023 || s.options.StrictNames && strings.IndexAny(c.key, `/\`) == 0 {
		return &fault{Status: 400, Code: "InvalidObjectName", Message: "The specified object is not valid."}
	}
	switch c.op {
	case "GetBucketLocation":
		return c.answer(struct {
			XMLName xml.Name `xml:"LocationConstraint"`
			Region  string   `xml:",chardata"`
		}{Region: "oss-" + s.options.Region})
	case "GetBucketVersioning":
		b.mu.Lock()
		status := b.versioning
		b.mu.Unlock()
		return c.answer(struct {
			XMLName xml.Name `xml:"VersioningConfiguration"`
			Status  string   `xml:",omitempty"`
		}{Status: status})
	case "ListObjectsV2":
		return s.list(c, b)
	case "GetObject", "HeadObject":
		return s.get(c, b)
	case "ListMultipartUploads":
		return s.listUploads(c, b)
	case "ListParts":
		return s.listParts(c, b)
	case "PutObject":
		if c.r.Header.Get("x-oss-copy-source") != "" {
			return s.copy(c, b)
		}
		return s.put(c, b)
	case "PutSymlink":
		return s.symlink(c, b)
	case "DeleteObject":
		return s.delete(c, b)
	case "InitiateMultipartUpload":
		return s.initiate(c, b)
	case "UploadPart":
		return s.uploadPart(c, b)
	case "CompleteMultipartUpload":
		return s.complete(c, b)
	case "AbortMultipartUpload":
		return s.abort(c, b)
	}
	return &fault{Status: 501, Code: "NotImplemented", Message: c.r.Method + " with this query is not served"}
}

// answer sends a 200 with an XML body.
func (c *call) answer(v any) error {
	body, err := xml.Marshal(v)
	if err != nil {
		return err
	}
	c.w.Header().Set("Content-Type", "application/xml")
	c.w.Write(append([]byte(xml.Header), body...))
	return nil
}

// fault is an error answer of the protocol.
type fault struct {
	XMLName         xml.Name `xml:"Error"`
	Code            string
	Message         string
	RequestID       string `xml:"RequestId"`
	HostID          string `xml:"HostId"`
	AccessKeyID     string `xml:"OSSAccessKeyId,omitempty"`
	Provided        string `xml:"SignatureProvided,omitempty"`
	StringToSign    string `xml:",omitempty"`
	Canonical       string `xml:"CanonicalRequest,omitempty"`
	Endpoint        string `xml:",omitempty"`
	ServerTime      string `xml:",omitempty"`
	EC              string `xml:",omitempty"`
	Status          int    `xml:"-"`
	QosDelaySeconds int    `xml:"-"`
}

func (f *fault) Error() string { return f.Code + ": " + f.Message }

func invalid(message string) *fault {
	return &fault{Status: 400, Code: "InvalidArgument", Message: message}
}

func denied(message string) *fault {
	return &fault{Status: 403, Code: "AccessDenied", Message: message, EC: "0003-00000001"}
}

// fail sends an error: as the body, or for HEAD in x-oss-err.
func (c *call) fail(err error) {
	f, ok := err.(*fault)
	if !ok {
		f = &fault{Status: 500, Code: "InternalError", Message: err.Error()}
	}
	f.RequestID, f.HostID = c.id, c.r.Host
	body, _ := xml.Marshal(f)
	body = append([]byte(xml.Header), body...)
	h := c.w.Header()
	for _, k := range []string{"ETag", "Last-Modified", "Content-Range", "Content-Length", "x-oss-hash-crc64ecma"} {
		h.Del(k)
	}
	if f.EC != "" {
		h.Set("x-oss-ec", f.EC)
	}
	if f.QosDelaySeconds > 0 {
		h.Set("x-oss-qos-delay-time", fmt.Sprint(f.QosDelaySeconds))
	}
	if c.r.Method == "HEAD" {
		h.Set("x-oss-err", base64.StdEncoding.EncodeToString(body))
		c.w.WriteHeader(f.Status)
		return
	}
	h.Set("Content-Type", "application/xml")
	c.w.WriteHeader(f.Status)
	c.w.Write(body)
}

func random(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// wait blocks until the client left or the server closes.
func (s *Server) wait(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-s.closing:
	}
}
