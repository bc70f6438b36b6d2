// Package oss reads and writes the objects of a bucket of Alibaba Cloud OSS, or of a store that speaks
// its protocol.
//
// It owns the translation between the contract of package source and that protocol: where a bucket is
// reached, how a request is signed (V4, with the region), what an answer must say before its bytes are
// believed, and what an error means to the user. The client SDK signs and sends single requests; its
// retries, time-outs, checksums and types end here.
//
// Concurrency: a Bucket is safe for concurrent use and shares one pool of connections. Failure: every
// error is a source.Error; a request is made once and ends with its context, since the decorators of
// package source decide about time and repetition; only the requests of a Put, whose bytes nobody above
// still holds, are repeated here. It may import cache/source, cache/source/credentials and the SDK.
package oss

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	sdk "github.com/aliyun/aliyun-oss-go-sdk/oss"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/credentials"
)

// Bucket is one OSS bucket. It implements source.Source.
type Bucket struct {
	url         string // canonical, see source.Source
	config      source.Config
	endpoint    endpoint
	credentials *credentials.Reader
	transport   *credentials.Transport
	bucket      *sdk.Bucket
	deps        deps
	// asked says that the bucket was asked whether it has versioning, versioned that something told that it has.
	asked, versioned atomic.Bool
}

var (
	_ source.Source = (*Bucket)(nil)
	_ source.Pager  = (*Bucket)(nil)
)

// deps are what a test replaces.
type deps struct {
	dial     func(ctx context.Context, network, address string) (net.Conn, error)
	proxy    func(*http.Request) (*url.URL, error)
	getenv   func(string) string
	metadata string // address of the machine's metadata service
	sts      string // address of the token service
	now      func() time.Time
	part     int // least size of a part
}

// Bounds on connecting. How long an answer may take is bounded by the decorators of package source.
const (
	dialTimeout = 5 * time.Second
	tlsTimeout  = 5 * time.Second
)

// Open checks config and returns the bucket it names. It sends no request.
func Open(ctx context.Context, config source.Config) (*Bucket, error) {
	return open(config, deps{})
}

func open(config source.Config, d deps) (*Bucket, error) {
	scheme, name, _, err := source.Split(config.URL)
	if err != nil {
		return nil, err
	}
	if scheme != "oss" {
		return nil, invalid(config.URL, fmt.Errorf("scheme %q is not oss", scheme), "write oss://bucket/prefix/")
	}
	if err := sdk.CheckBucketName(name); err != nil {
		return nil, invalid(config.URL, err, "write the bucket's name as the OSS console shows it")
	}
	e, err := locate(config, name)
	if err != nil {
		return nil, err
	}
	if d.dial == nil {
		d.dial = source.Dialer(dialTimeout).DialContext
	}
	if d.proxy == nil {
		d.proxy = http.ProxyFromEnvironment
	}
	if d.getenv == nil {
		d.getenv = os.Getenv
	}
	if d.metadata == "" {
		d.metadata = metadataAddress
	}
	if d.now == nil {
		d.now = time.Now
	}
	if d.part == 0 {
		d.part = partSize
	}
	b := &Bucket{config: config, endpoint: e, deps: d, url: "oss://" + name}
	if !e.provider {
		b.url = "oss://" + e.host + "/" + name
	}
	b.credentials, err = credentials.Open(config, credentials.Options{Env: credentials.OSSEnv, Getenv: d.getenv,
		Ambient: newAmbient(d, e).get})
	if err != nil {
		return nil, err
	}

	requests := config.MaxRequests
	if requests <= 0 {
		requests = 64
	}
	b.transport = credentials.NewTransport(config, &http.Transport{
		Proxy:               d.proxy,
		DialContext:         d.dial,
		TLSHandshakeTimeout: tlsTimeout,
		MaxIdleConns:        requests,
		MaxIdleConnsPerHost: requests,
		IdleConnTimeout:     50 * time.Second,
		DisableCompression:  true, // an object that is stored compressed is read as it is stored
		ReadBufferSize:      64 << 10,
		WriteBufferSize:     64 << 10,
	})
	var transport http.RoundTripper = b.transport
	if config.Anonymous {
		transport = unsigned{transport}
	}
	client, err := sdk.New(e.address(), "", "",
		sdk.HTTPClient(&http.Client{
			Transport: transport,
			// The redirected request would carry a signature for another host.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}),
		sdk.AuthVersion(sdk.AuthV4),
		sdk.Region(e.region),
		sdk.ForcePathStyle(e.pathStyle),
		sdk.SetCredentialsProvider(signer{b.credentials}),
		// Uploads are summed with MD5 before they are sent, and reads by whoever holds the whole object.
		sdk.EnableCRC(false),
		sdk.EnableMD5(false),
		sdk.UserAgent("stepcache"),
		sdk.SetLogLevel(sdk.LogOff),
	)
	if err != nil {
		return nil, invalid(config.URL, err, "write the endpoint as host[:port]")
	}
	b.bucket, err = client.Bucket(name)
	if err != nil {
		return nil, invalid(config.URL, err, "write the bucket's name as the OSS console shows it")
	}
	return b, nil
}

func invalid(name string, err error, hint string) error {
	return &source.Error{Op: "open", Name: name, Kind: source.ErrInvalid, Err: err, Hint: hint}
}

// URL is the canonical name of the bucket.
func (b *Bucket) URL() string { return b.url }

// name is an object's name for people.
func (b *Bucket) name(key string) string {
	if key == "" {
		return b.url
	}
	quoted := strconv.Quote(key)
	return b.url + "/" + quoted[1:len(quoted)-1]
}

// checkKey refuses what OSS cannot hold before a request is built from it.
func (b *Bucket) checkKey(op, key string) error {
	switch {
	case key == "":
		return &source.Error{Op: op, Name: b.url, Kind: source.ErrInvalid, Err: errors.New("the key is empty")}
	case len(key) > 1023:
		return &source.Error{Op: op, Name: b.name(key[:40]) + "…", Kind: source.ErrInvalid,
			Err: fmt.Errorf("the key has %d bytes", len(key)), Hint: "OSS takes keys of up to 1023 bytes"}
	case !utf8.ValidString(key):
		return &source.Error{Op: op, Name: b.name(key), Kind: source.ErrInvalid, Err: errors.New("the key is not UTF-8"),
			Hint: "OSS takes no other keys"}
	}
	return nil
}

// Stat implements source.Stater.
func (b *Bucket) Stat(ctx context.Context, key string) (source.Object, error) {
	o, _, err := b.stat(ctx, key)
	return o, err
}

func (b *Bucket) stat(ctx context.Context, key string) (source.Object, http.Header, error) {
	if err := b.checkKey("stat", key); err != nil {
		return source.Object{}, nil, err
	}
	r := request{op: "stat", method: "HEAD", key: key}
	a, err := b.do(ctx, r)
	if err != nil {
		return source.Object{}, nil, err
	}
	defer a.body.Close()
	o := source.Object{Key: key, Digest: digest(a.header)}
	if o.Size, err = strconv.ParseInt(a.header.Get("Content-Length"), 10, 64); err != nil || o.Size < 0 {
		return source.Object{}, nil, b.strange(r, a, "it has no size", "")
	}
	o.ModTime, _ = http.ParseTime(a.header.Get("Last-Modified"))
	o.Version = b.version(a.header.Get("ETag"), o.ModTime)
	if o.Version == "" {
		return source.Object{}, nil, b.unversioned("stat", key)
	}
	return o, a.header, nil
}

// Delete implements source.Deleter.
func (b *Bucket) Delete(ctx context.Context, key string) error {
	if err := b.checkKey("delete", key); err != nil {
		return err
	}
	a, err := b.do(ctx, request{op: "delete", method: "DELETE", key: key})
	if errors.Is(err, source.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	a.body.Close()
	return nil
}

// timed starts the Version of an object without ETag, which is made of its time. No ETag starts so.
const timed = "mtime="

// version makes the token that binds an object's bytes: its ETag, or where the mount allows it the time
// to the second, which listing and stat both give.
func (b *Bucket) version(etag string, modified time.Time) string {
	etag = strings.TrimPrefix(etag, "W/")
	if etag = strings.Trim(etag, `"`); etag != "" {
		return etag
	}
	if b.config.AllowUnversioned && !modified.IsZero() {
		return timed + strconv.FormatInt(modified.Unix(), 10)
	}
	return ""
}

func (b *Bucket) unversioned(op, key string) error {
	return &source.Error{Op: op, Name: b.name(key), Kind: source.ErrUnversioned, Err: errors.New("the store gives no ETag"),
		Hint: "set allowUnversioned on the mount if objects never change under a name within a second"}
}

// digest reads the whole-object CRC that OSS sends with every answer about an object.
func digest(h http.Header) source.Digest {
	crc, err := strconv.ParseUint(h.Get("x-oss-hash-crc64ecma"), 10, 64)
	if err != nil {
		return source.Digest{}
	}
	return crcDigest(crc)
}

func crcDigest(crc uint64) source.Digest {
	sum := make([]byte, 8)
	for i := range sum {
		sum[i] = byte(crc >> (56 - 8*i))
	}
	return source.Digest{Algorithm: source.CRC64ECMA, Sum: sum}
}
