package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/catalog"
	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/test/bucket"
	"github.com/stepcache/stepcache/test/workers"
)

func TestNamesAreTheBuckets(t *testing.T) {
	server := bucket.StartT(t, bucket.Options{})
	if err := server.MakeBucket(t.Context(), "artifacts"); err != nil {
		t.Fatal(err)
	}
	tier := workers.StartTier(t, server, "artifacts", "", 2)
	// A member that accepts connections and never answers costs time only.
	hung, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	list := tier.Membership
	list.Members = append(list.Members[:len(list.Members):len(list.Members)], ring.Member{ID: "hung", Addr: hung.Addr().String(), Node: "n9", State: ring.Ready})
	n, err := DialNames(testContext(t), Config{Dataset: tier.Dataset, Membership: list, Keys: tier.Keys, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	s3, err := minio.New(tier.Endpoints[0], &minio.Options{Creds: credentials.NewStaticV4(workers.AccessKey, workers.SecretKey, ""), BucketLookup: minio.BucketLookupPath})
	if err != nil {
		t.Fatal(err)
	}
	put := func(key string, data []byte) string {
		t.Helper()
		info, err := s3.PutObject(t.Context(), workers.Bucket, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return info.ETag
	}
	if _, err := n.Lookup(t.Context(), "dir/a"); !errors.Is(err, source.ErrNotFound) {
		t.Errorf("before it is put: %v", err)
	}
	data := content(7, 3<<20+5)
	etag := put("dir/a", data)
	if name, err := n.Lookup(t.Context(), "dir/a"); err != nil || name.Version != etag || name.Size != int64(len(data)) || name.Dir || name.Name != "a" {
		t.Errorf("%+v, %v", name, err)
	}
	if name, err := n.Lookup(t.Context(), "dir"); err != nil || !name.Dir {
		t.Errorf("%+v, %v", name, err)
	}
	if names, err := n.List(t.Context(), "dir", ""); err != nil || len(names.Names) != 1 || names.Names[0].Version != etag || names.After != "" {
		t.Errorf("%+v, %v", names, err)
	}
	got := make([]byte, len(data)-3)
	if k, err := n.ReadAt(t.Context(), "dir/a", etag, got, 3); err != nil || k != len(got) || !bytes.Equal(got, data[3:]) {
		t.Errorf("%d bytes, %v", k, err)
	}
	put("dir/a", []byte("another"))
	if k, err := n.ReadAt(t.Context(), "dir/a", etag, got[:10], 0); !errors.Is(err, source.ErrChanged) || !strings.Contains(err.Error(), "dir/a") {
		t.Errorf("of what was replaced: %d bytes, %v", k, err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if _, err := n.Lookup(t.Context(), "dir/a"); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestNamesThatThereAreNot(t *testing.T) {
	k := overFolder(t, map[string][]byte{"x": []byte("x")})
	k.start("w1")
	w := k.workers["w1"]
	config := Config{Dataset: w.config.Dataset, Seeds: []string{w.Addr().String()}, Keys: k.keys, Logger: quiet()}
	if _, err := DialNames(testContext(t), config); !errors.Is(err, ErrNotWritable) {
		t.Errorf("of a read-only dataset: %v", err)
	}
	config.Keys = wire.GenerateKeys()
	if _, err := DialNames(testContext(t), config); !errors.Is(err, wire.ErrUnauthorized) {
		t.Errorf("with another key: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	config.Seeds = []string{"127.0.0.1:1"}
	if _, err := DialNames(ctx, config); err == nil {
		t.Error("of nobody")
	}
}

// nobodys is a worker of a writable dataset that answers what a test says.
func nobodys(t *testing.T, keys wire.Keys, answer http.HandlerFunc) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns, over := make(chan net.Conn), make(chan struct{})
	srv := &http.Server{Handler: answer}
	served := make(chan error, 1)
	var all sync.WaitGroup
	all.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				if _, _, err := wire.ServerHandshake(nc, "ns/data", keys); err != nil {
					nc.Close()
					return
				}
				for {
					req, err := wire.ReadRequest(nc)
					switch {
					case err == nil && req.Op == wire.OpMembers:
						nc.Write(wire.AppendReply(nil, wire.Reply{ID: req.ID, Index: wire.NamesServed}))
						continue
					case err == nil && req.Op == wire.OpObjects:
						nc.Write(wire.AppendReply(nil, wire.Reply{ID: req.ID}))
						select {
						case conns <- nc:
							return
						case <-over:
						}
					}
					nc.Close()
					return
				}
			})
		}
	})
	go func() { served <- srv.Serve(given{conns, over, l}) }()
	t.Cleanup(func() {
		close(over)
		l.Close()
		srv.Close()
		all.Wait()
		<-served
	})
	return l.Addr().String()
}

type given struct {
	conns chan net.Conn
	over  chan struct{}
	net.Listener
}

func (g given) Accept() (net.Conn, error) {
	select {
	case nc := <-g.conns:
		return nc, nil
	case <-g.over:
		return nil, net.ErrClosed
	}
}

// Workers that may not read the bucket, or find none, say so at once to whoever connects, but not to who goes on with a
// mount.
func TestNamesOfABucketThatCannotBeRead(t *testing.T) {
	for status, kind := range map[wire.Status]error{wire.Denied: source.ErrDenied, wire.NoBucket: source.ErrNoBucket} {
		keys := wire.GenerateKeys()
		addr := nobodys(t, keys, func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set(wire.HeaderStatus, strconv.Itoa(int(status)))
			rw.WriteHeader(422)
			fmt.Fprint(rw, "s3://bucket: no luck")
		})
		config := Config{Dataset: "ns/data", Seeds: []string{addr}, Keys: keys, Logger: quiet()}
		if _, err := DialNames(testContext(t), config); !errors.Is(err, kind) || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no luck") {
			t.Errorf("%v: %v", kind, err)
		}
		config.Snapshot = catalog.Digest{1}
		n, err := DialNames(testContext(t), config)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Whatever a worker answers, what is taken for right is.
func TestNamesOfAWorkerThatIsWrong(t *testing.T) {
	keys := wire.GenerateKeys()
	var asked atomic.Int64
	var on atomic.Pointer[http.HandlerFunc]
	addr := nobodys(t, keys, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == wire.PathNames {
			fmt.Fprint(rw, `{}`)
			return
		}
		asked.Add(1)
		(*on.Load())(rw, r)
	})
	n, err := DialNames(testContext(t), Config{Dataset: "ns/data", Seeds: []string{addr}, Keys: keys, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	text := "some bytes"
	good := func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set(wire.HeaderSum, strconv.FormatUint(uint64(crc32.Checksum([]byte(text), castagnoli)), 16))
		fmt.Fprint(rw, text)
	}
	for what, bad := range map[string]http.HandlerFunc{
		"other bytes": func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set(wire.HeaderSum, "1")
			fmt.Fprint(rw, text)
		},
		"no sum":   func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, text) },
		"too few":  func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, text[:3]) },
		"too many": func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, strings.Repeat(text, 1000)) },
		"an early end": func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Content-Length", "10")
			fmt.Fprint(rw, "x")
			panic(http.ErrAbortHandler)
		},
		"overload": func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set(wire.HeaderStatus, strconv.Itoa(int(wire.Overloaded)))
			rw.WriteHeader(422)
		},
		"a code of HTTP": func(rw http.ResponseWriter, r *http.Request) { rw.WriteHeader(500) },
		"an unknown word": func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set(wire.HeaderStatus, "200")
			rw.WriteHeader(422)
		},
	} {
		var tries atomic.Int64
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if tries.Add(1) == 1 {
				bad(rw, r)
				return
			}
			good(rw, r)
		})
		on.Store(&h)
		p := make([]byte, len(text))
		if k, err := n.ReadAt(testContext(t), "x", "v", p, 0); err != nil || string(p[:k]) != text || tries.Load() != 2 {
			t.Errorf("%s: %q, %v, asked %d times", what, p, err, tries.Load())
		}
	}
	wrong := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, "{no JSON") })
	on.Store(&wrong)
	ctx, cancel := context.WithCancel(t.Context())
	before := asked.Load()
	ended := make(chan error, 1)
	go func() {
		_, err := n.Lookup(ctx, "x")
		ended <- err
	}()
	eventually(t, "it is asked again", func() bool { return asked.Load() >= before+2 })
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) || !errors.Is(err, wire.ErrCorrupt) {
		t.Errorf("what is no answer: %v", err)
	}
}

// A worker that takes a question and says nothing costs a while, and while others are slow as well nobody is given up.
func TestNamesOfWorkersThatAreLate(t *testing.T) {
	keys := wire.GenerateKeys()
	text := "some bytes"
	began, slow := make(chan string, 10), make(chan struct{})
	var addrs []string
	for range 2 {
		var addr string
		addr = nobodys(t, keys, func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == wire.PathNames {
				fmt.Fprint(rw, `{}`)
				return
			}
			began <- addr
			select {
			case <-slow:
			case <-r.Context().Done():
				return
			}
			rw.Header().Set(wire.HeaderSum, strconv.FormatUint(uint64(crc32.Checksum([]byte(text), castagnoli)), 16))
			fmt.Fprint(rw, text)
		})
		addrs = append(addrs, addr)
	}
	n, err := DialNames(testContext(t), Config{Dataset: "ns/data", Seeds: addrs, Keys: keys, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	ended := make(chan error, 1)
	p := make([]byte, len(text))
	go func() {
		_, err := n.ReadAt(testContext(t), "x", "v", p, 0)
		ended <- err
	}()
	if one, two := <-began, <-began; one == two {
		t.Error("one worker was asked twice")
	}
	close(slow)
	if err := <-ended; err != nil || string(p) != text {
		t.Errorf("%q, %v", p, err)
	}
}

// A bucket that is gone while workers serve its names is their problem until there is one again, and keeps them from
// nothing: who asks for a name is told.
func TestNamesOfABucketThatIsGoneAreToldInStatus(t *testing.T) {
	server := bucket.StartT(t, bucket.Options{})
	if err := server.MakeBucket(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	tier := workers.StartTier(t, server, "gone", "", 1)
	n, err := DialNames(testContext(t), Config{Dataset: tier.Dataset, Membership: tier.Membership, Keys: tier.Keys, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	k, err := NewControl(ControlConfig{Dataset: tier.Dataset, Membership: tier.Membership, Keys: tier.Keys})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	status := func() wire.WorkerStatus {
		t.Helper()
		s, err := k.Status(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		return s[0]
	}
	s3, err := server.Client()
	if err != nil {
		t.Fatal(err)
	}
	if err := s3.RemoveBucket(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.List(testContext(t), "", ""); !errors.Is(err, source.ErrNoBucket) {
		t.Fatal(err)
	}
	eventually(t, "it is told", func() bool {
		s := status()
		return strings.Contains(s.Problem, "gone") && s.Reason == wire.NoBucket.String() && s.Serves
	})
	if err := server.MakeBucket(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is over", func() bool {
		s := status()
		return s.Problem == "" && s.Reason == ""
	})
}
