// Package gateway is an S3 endpoint over the names of datasets.
//
// It owns the protocol: addresses of buckets and keys, SigV4 signatures of requests and of chunks,
// checksums, conditions, ranges, listings, multipart uploads, XML and error codes. What the names are,
// where their bytes lie and when a put is acknowledged is the Objects' affair (objects.go); who listens,
// with which certificate, is the caller's. docs/s3.md says which calls are supported.
//
// It is a front of its own on net/http rather than a backend of rclone/gofakes3, which was read for it:
// that library keeps credentials and clock in package variables, takes streamed chunks without their
// signatures and trailers, gives a backend neither conditions nor the moment at which a body's digest is
// known, and has no deadline for a body. All four decide what may be stored, so a layer in front of it
// would have had to do the same work and hand over a request that is no longer what the client signed.
//
// Concurrency: a handler serves any number of requests at once and keeps nothing between them. A request
// holds one buffer of a few dozen KiB, whatever the size of its object. Its goroutines (one that feeds a
// copy between buckets, one that keeps a long answer alive, the deletes of a bulk delete) end before it does.
//
// Failure: nothing is stored of a request that is refused: what can be known from its head is checked
// before the Objects are called, and what only the end of the body tells (digests, signatures of chunks,
// its length) is the error of the reader that they must read to its end. Errors of Objects become S3's
// codes by their kind; those without a kind are answered as InternalError and logged. A read that fails
// after its first byte cuts the connection. Bodies and answers that stand still are cut off (Config.Stall).
//
// It may import cache/source, for the kinds of errors, and nothing else of this module.
package gateway

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Config of a gateway.
type Config struct {
	// Buckets are the names served, by bucket name; in a tier that is the Dataset's.
	Buckets map[string]Objects
	// Region is what GET location answers; empty means us-east-1. Requests may be signed for any region:
	// there is one, and many clients cannot be told its name.
	Region string
	// Keys returns the credentials that are valid now. It is called for every request and must be cheap;
	// more than one pair of a kind lets old and new overlap in a rotation.
	Keys func() []Credential
	// Domains are the host names below which buckets are addressed virtual-host style (bucket.DOMAIN); the
	// longest counts. Path style is always served.
	Domains []string
	// Stall is the time within which a client has to send the next 64 KiB of a body, and in which it has
	// to take the next 4 MiB of an answer; only the time spent waiting for the client counts against a
	// body. Zero means 60 s for a body and 5 minutes for an answer.
	Stall time.Duration
	// Logger is told of failures that are not the client's. nil: slog.Default().
	Logger *slog.Logger
	// Metrics counts requests. nil: nobody looks at the counts.
	Metrics *Metrics
	// Clock tells the time that signatures are compared with. nil: time.Now.
	Clock func() time.Time

	keepAlive time.Duration // after which a long answer is begun with white space; zero: 10 s
}

// Credential is one key pair.
type Credential struct {
	AccessKey, SecretKey string
	// Write allows puts and deletes.
	Write bool
}

// New returns the handler of a gateway. Whoever serves it sets ReadHeaderTimeout, IdleTimeout and
// MaxHeaderBytes of the http.Server, and neither ReadTimeout nor WriteTimeout, which would end large objects.
func New(c Config) (http.Handler, error) {
	if c.Keys == nil {
		return nil, errors.New("gateway: no Keys: without credentials nobody could be let in")
	}
	for name, o := range c.Buckets {
		if name == "" || strings.Contains(name, "/") || o == nil {
			return nil, fmt.Errorf("gateway: bucket %q: a name without slashes and its objects are needed", name)
		}
	}
	c.Domains = slices.Clone(c.Domains)
	for i, d := range c.Domains {
		if err := ValidDomain(d); err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
		c.Domains[i] = strings.ToLower(d)
	}
	slices.SortFunc(c.Domains, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	if c.Region == "" {
		c.Region = "us-east-1"
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics()
	}
	if c.Clock == nil {
		c.Clock = time.Now
	}
	g := &gateway{
		Config: c, bodyStall: c.Stall, answerStall: c.Stall, started: c.Clock().UTC(),
		limit: rate.NewLimiter(rate.Every(time.Second), 10),
	}
	if c.Stall == 0 {
		g.bodyStall, g.answerStall = time.Minute, 5*time.Minute
	}
	if c.keepAlive == 0 {
		g.keepAlive = 10 * time.Second
	}
	return g, nil
}

type gateway struct {
	Config
	bodyStall, answerStall time.Duration
	started                time.Time     // the creation date of the buckets, which S3 wants to have one
	limit                  *rate.Limiter // of log lines about failed requests
	unlogged               atomic.Int64
}

// request is one request whose sender is known.
type request struct {
	*gateway
	w  *counted
	r  *http.Request
	in io.Reader // the body, watched
	id string
	// operation is S3's name of what is asked for. code is how the request ended, where no status says it.
	operation, code string
	// bucket and key are what the address names; either may be empty.
	bucket, key string
	objects     Objects // of bucket; nil without one
	query       query
	who         identity
}

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := &request{
		gateway: g, w: &counted{ResponseWriter: w, sent: g.Metrics.out}, r: r, in: r.Body, id: newID(),
		operation: operationOther, code: codeCut,
	}
	g.Metrics.inFlight.Inc()
	begun := time.Now()
	defer func() { g.Metrics.ended(q.operation, q.code, time.Since(begun)) }()
	q.name()
	// A connection keeps the deadline of the answer before; and what net/http sends after this function
	// has time of its own.
	defer q.extend()
	err := errors.Join(q.extend(), q.watch())
	if err != nil && !errors.Is(err, http.ErrNotSupported) {
		q.hangUp(codeLeft) // the connection is closed already
	}
	if r.ContentLength == 0 && r.ProtoMajor == 1 && strings.EqualFold(r.Header.Get("Expect"), "100-continue") {
		// S3 says so of an empty body too, net/http does not. botocore takes an answer without it for a refusal,
		// and the next one on the same connection for two.
		q.w.WriteHeader(http.StatusContinue)
	}
	if err == nil {
		err = q.serve()
	}
	if err != nil {
		q.fail(err)
	}
	q.code = q.w.code()
}

// hangUp ends the request and its connection.
func (q *request) hangUp(code string) {
	q.code = code
	panic(http.ErrAbortHandler)
}

func (q *request) serve() error {
	var err error
	if q.query, err = parseQuery(q.r.URL.RawQuery); err != nil {
		return err
	}
	q.bucket, q.key = address(q.r, q.Domains)
	q.operation, _ = q.route()
	if q.r.Method == http.MethodOptions {
		return failure(http.StatusForbidden, "AccessForbidden", "CORS is not enabled for this bucket.")
	}
	if q.who, err = q.authenticate(); err != nil {
		return err
	}
	var answer func() error
	q.operation, answer = q.route() // anew: headers of a presigned address are there now, such as what a copy is of
	if q.bucket == "" {
		return answer()
	}
	var known bool
	if q.objects, known = q.Buckets[q.bucket]; !known {
		if q.key == "" && q.r.Method == http.MethodPut {
			return failure(http.StatusForbidden, "AccessDenied", "Buckets are Datasets; they are not created through this endpoint.")
		}
		return failure(http.StatusNotFound, "NoSuchBucket", "The specified bucket does not exist.")
	}
	if q.key != "" {
		if err := ValidKey(q.key); err != nil {
			return err
		}
	}
	return answer()
}

// name says in the answer which request it is to.
func (q *request) name() {
	q.w.Header().Set("X-Amz-Request-Id", q.id)
	q.w.Header().Set("X-Amz-Id-2", q.id)
}

func newID() string {
	var b [8]byte
	rand.Read(b[:])
	return strings.ToUpper(hex.EncodeToString(b[:]))
}
