package worker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/objects"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
)

// GatewayConfig makes a worker serve the dataset over S3's protocol.
type GatewayConfig struct {
	// Listen is the address, host:port.
	Listen string `json:"listen"`
	// Bucket is the name under which the dataset is served.
	Bucket string `json:"bucket"`
	// Domains are host names below which the bucket is addressed virtual-host style too (BUCKET.DOMAIN): who
	// sets them sees to it that such names lead here.
	Domains []string `json:"domains,omitempty"`
	// Region is what clients are told; empty: us-east-1.
	Region string `json:"region,omitempty"`
	// Credentials is a folder with the files accessKeyID and secretAccessKey (reads and writes) and
	// readOnlyAccessKeyID and readOnlySecretAccessKey; read again when they change.
	Credentials string `json:"credentials"`
	// TLS is a folder with the files tls.crt and tls.key; read again when they change. Empty: plain HTTP.
	TLS string `json:"tls,omitempty"`
}

// Write policies.
const (
	// WriteThrough acknowledges a write once the bucket has it, WriteBack once Copies workers on distinct
	// nodes have it.
	WriteThrough = "Through"
	WriteBack    = "Back"
)

// WriteConfig says when a write is acknowledged.
type WriteConfig struct {
	// Policy is WriteThrough or WriteBack; empty means WriteThrough.
	Policy string `json:"policy,omitempty"`
	// Copies is how many workers hold what the bucket does not have yet.
	Copies int `json:"copies,omitempty"`
	// MaxUnflushed bounds the bytes that this worker holds for the bucket, a part of Memory that the cache
	// does not get; zero means a quarter of it.
	MaxUnflushed int64 `json:"maxUnflushed,omitempty"`
	// MaxAge is how long the bucket may lag behind. Beyond either bound writes wait for the bucket; zero means
	// a minute.
	MaxAge Duration `json:"maxAge,omitempty"`
	// FlushWithin bounds how long a worker that is stopped goes on to bring to the bucket what it holds; zero
	// means nine and a half minutes. The pod's grace period must be longer.
	FlushWithin Duration `json:"flushWithin,omitempty"`
	// Exclusive promises that nobody else writes below the mounts.
	Exclusive bool `json:"exclusive,omitempty"`
}

// maxUnflushed is the part of Memory that is for what the bucket does not have yet.
func (c Config) maxUnflushed() int64 {
	switch {
	case c.Gateway == nil || c.Write.Policy != WriteBack:
		return 0
	case c.Write.MaxUnflushed != 0:
		return c.Write.MaxUnflushed
	}
	return c.Memory / 4
}

// flushWithin is the default of WriteConfig.FlushWithin.
const flushWithin = 9*time.Minute + 30*time.Second

func (c Config) validateGateway() (errs []error) {
	g := c.Gateway
	if g == nil {
		return nil
	}
	for _, f := range []struct{ value, field, why string }{
		{g.Listen, "gateway.listen", "set host:port for the S3 endpoint"},
		{g.Bucket, "gateway.bucket", "set the name under which clients address the dataset"},
		{g.Credentials, "gateway.credentials", "set the folder of the access keys"},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("%s is empty: %s", f.field, f.why))
		}
	}
	for i, d := range g.Domains {
		if err := gateway.ValidDomain(d); err != nil {
			errs = append(errs, fmt.Errorf("gateway.domains[%d]: %w", i, err))
		}
	}
	switch c.Write.Policy {
	case "", WriteThrough:
	case WriteBack:
		if c.Write.Copies < 2 {
			errs = append(errs, fmt.Errorf("write.copies is %d: policy Back acknowledges what the bucket does not have yet, and needs at least 2", c.Write.Copies))
		}
		if u := c.maxUnflushed(); u < objects.MaxBack/4 || u > c.Memory/2 {
			errs = append(errs, fmt.Errorf("write.maxUnflushed is %d: policy Back needs at least %d and at most half of memory, which is %d", u, objects.MaxBack/4, c.Memory))
		}
		if c.Write.MaxAge < 0 || c.Write.FlushWithin < 0 {
			errs = append(errs, errors.New("write.maxAge and write.flushWithin: set positive durations, or none for the defaults"))
		}
	default:
		errs = append(errs, fmt.Errorf("write.policy %q: set Through or Back", c.Write.Policy))
	}
	for i, m := range c.Mounts {
		if strings.HasPrefix(m.URL, "file://") {
			errs = append(errs, fmt.Errorf("mounts[%d]: %s cannot be written through the tier: access: ReadWrite needs a bucket, s3:// or oss://", i, m.URL))
		}
	}
	return errs
}

// gatewayServer is the S3 endpoint and the names behind it.
type gatewayServer struct {
	w        *Worker
	listener net.Listener
	names    *objects.Names
	handler  http.Handler
	metrics  *gateway.Metrics
	readers  http.Handler // of those that follow the names

	// inside is held by each request, and taken whole when none may begin any more.
	inside sync.RWMutex
	closed bool
}

// newGateway opens the listener.
func newGateway(w *Worker) (_ *gatewayServer, err error) {
	c := w.config.Gateway
	g := &gatewayServer{w: w, metrics: gateway.NewMetrics()}
	var back *objects.Back
	if unflushed := w.config.maxUnflushed(); unflushed > 0 {
		back = &objects.Back{Copies: w.config.Write.Copies, MaxBytes: unflushed, MaxAge: time.Duration(w.config.Write.MaxAge)}
	}
	g.names, err = objects.New(objects.Config{
		Dataset: w.config.Dataset, Self: w.config.ID, Mounts: w.writableMounts, Store: w.store,
		Quota: w.config.Memory - w.config.maxUnflushed(), Back: back,
		Dir: w.config.Dir, Exclusive: w.config.Write.Exclusive, Members: (*memberList)(&w.members),
		Fetched: func(o ring.Object, d source.Digest) {
			w.digests.published(o.ID, d)
			w.digests.dirty(o.ID)
		},
		Resident: func(o source.Object, blocks ring.Object) { w.checkWhole(file{object: o, ring: blocks}) },
		Dial:     w.deps.Dial, Keys: w.keys.Keys, Clock: w.clock, Logger: w.log,
	})
	if err != nil {
		return nil, err
	}
	g.readers = w.namesHandler(g.names.Followed(), w.config.Mounts)
	keys := &gatewayKeys{dir: c.Credentials, now: w.clock.Now, note: func(err error) { w.problems.set(problemGateway, err) }}
	keys.get()
	g.handler, err = gateway.New(gateway.Config{
		Buckets: map[string]gateway.Objects{c.Bucket: g.names}, Domains: c.Domains, Region: c.Region, Keys: keys.get, Logger: w.log, Metrics: g.metrics, Clock: w.clock.Now,
	})
	if err == nil {
		g.listener, err = net.Listen("tcp", c.Listen)
	}
	if err == nil && c.TLS != "" {
		pair := &certificate{dir: c.TLS, now: w.clock.Now}
		if _, err = pair.get(nil); err == nil {
			g.listener = tls.NewListener(g.listener, &tls.Config{GetCertificate: pair.get, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}})
		}
	}
	if err != nil {
		g.close()
		return nil, fmt.Errorf("gateway: %w", err)
	}
	return g, nil
}

func (g *gatewayServer) close() {
	if g.listener != nil {
		g.listener.Close()
	}
	g.names.Close()
}

// drain has what the bucket does not have yet brought there, for a bounded time, while the worker serves on; writes
// are refused from here on, and probes are told that it is not ready.
func (g *gatewayServer) drain(ctx context.Context) {
	if g.w.config.maxUnflushed() == 0 {
		return
	}
	g.w.problems.set(problemStopping, fmt.Errorf("worker %s is being stopped: it takes no writes, and brings to the bucket what that does not have yet", g.w.config.ID))
	within := time.Duration(g.w.config.Write.FlushWithin)
	if within == 0 {
		within = flushWithin
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	g.names.Drain(ctx)
}

// serve serves until ctx ends, then finishes what is under way for a bounded time. No request is under way
// after it returns.
func (g *gatewayServer) serve(ctx context.Context) error {
	srv := &http.Server{
		Handler: g, ReadHeaderTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ConnContext: objects.WithSender,
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if srv.Shutdown(within) != nil {
			srv.Close() // ends the requests' contexts
		}
	})
	err := srv.Serve(g.listener)
	if stop() {
		srv.Close()
	} else {
		<-ended
		err = nil
	}
	g.inside.Lock()
	g.closed = true
	g.inside.Unlock()
	if err != nil {
		return fmt.Errorf("gateway: %w", err)
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (g *gatewayServer) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	g.inside.RLock()
	defer g.inside.RUnlock()
	if g.closed {
		panic(http.ErrAbortHandler)
	}
	g.handler.ServeHTTP(rw, r)
}

// writableMounts are the opened sources; nil until they are.
func (w *Worker) writableMounts() []objects.Mount {
	s := w.sources.Load()
	if s == nil {
		return nil
	}
	out := make([]objects.Mount, 0, len(s.mounts))
	for i, m := range s.mounts {
		out = append(out, objects.Mount{Path: m.Path, Prefix: m.Prefix, Source: s.sources[i].Source})
	}
	return out
}

// memberList is the members as package objects wants them.
type memberList members

func (l *memberList) List() (ring.Membership, <-chan struct{}) {
	v := (*members)(l).view()
	return v.Membership, v.replaced
}

func (l *memberList) Look() {
	select {
	case l.look <- struct{}{}:
	default:
	}
}

// readEvery is how often the files of keys and certificates are looked at.
const readEvery = time.Second

// gatewayKeys reads the access keys of a folder.
type gatewayKeys struct {
	dir  string
	now  func() time.Time
	note func(error)

	mu   sync.Mutex
	at   time.Time
	keys []gateway.Credential
}

// get is the keys in force. Those that were read last stay while the folder cannot be read.
func (k *gatewayKeys) get() []gateway.Credential {
	k.mu.Lock()
	now := k.now()
	if !k.at.IsZero() && now.Sub(k.at) < readEvery {
		defer k.mu.Unlock()
		return k.keys
	}
	k.at = now
	k.mu.Unlock()
	keys, err := readGatewayKeys(k.dir) // not under the lock: a folder that hangs holds up one request
	k.note(err)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil {
		k.keys = keys
	}
	return k.keys
}

// The files of access keys.
var gatewayKeyFiles = []struct {
	id, secret string
	write      bool
}{
	{"accessKeyID", "secretAccessKey", true},
	{"readOnlyAccessKeyID", "readOnlySecretAccessKey", false},
}

func readGatewayKeys(dir string) ([]gateway.Credential, error) {
	var out []gateway.Credential
	for _, f := range gatewayKeyFiles {
		c := gateway.Credential{Write: f.write}
		var err error
		for _, v := range []struct {
			file string
			into *string
		}{{f.id, &c.AccessKey}, {f.secret, &c.SecretKey}} {
			var b []byte
			if b, err = os.ReadFile(filepath.Join(dir, v.file)); err != nil {
				break
			}
			if *v.into = strings.TrimSpace(string(b)); *v.into == "" {
				return nil, fmt.Errorf("access keys of the S3 endpoint: file %s of %s is empty: write the key into it", v.file, dir)
			}
		}
		switch {
		case err == nil:
			out = append(out, c)
		case errors.Is(err, fs.ErrNotExist) && !f.write: // only writers then
		default:
			return nil, fmt.Errorf("access keys of the S3 endpoint: %w", err)
		}
	}
	return out, nil
}

// certificate reads a TLS certificate and its key.
type certificate struct {
	dir string
	now func() time.Time

	mu   sync.Mutex
	at   time.Time
	pair *tls.Certificate
}

// get is the certificate in force; the one before stays while the files cannot be read.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.now(); c.pair == nil || now.Sub(c.at) >= 10*readEvery {
		c.at = now
		pair, err := tls.LoadX509KeyPair(filepath.Join(c.dir, "tls.crt"), filepath.Join(c.dir, "tls.key"))
		if err == nil {
			c.pair = &pair
		} else if c.pair == nil {
			return nil, fmt.Errorf("certificate of the S3 endpoint: %w", err)
		}
	}
	return c.pair, nil
}
