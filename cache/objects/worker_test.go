package objects_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/objects"
	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/wire"
	"github.com/stepcache/stepcache/cache/worker"
	"github.com/stepcache/stepcache/test/bucket"
)

// ask connects to worker i with a key of the role and asks for requests about names.
func (tr *tier) ask(i int, role wire.Role) (net.Conn, error) {
	tr.t.Helper()
	keys, err := wire.LoadKeys(tr.path("keys"))
	if err != nil {
		tr.t.Fatal(err)
	}
	key := map[wire.Role]wire.Key{wire.RoleRead: keys.Read[0], wire.RoleWrite: keys.Write[0]}[role]
	c, err := net.Dial("tcp", tr.workers[i].m.Addr)
	if err != nil {
		tr.t.Fatal(err)
	}
	tr.t.Cleanup(func() { c.Close() })
	if err := wire.ClientHandshake(tr.t.Context(), c, dataset, role, key); err != nil {
		tr.t.Fatal(err)
	}
	if _, err := c.Write(wire.AppendRequest(nil, wire.Request{Op: wire.OpObjects, ID: 1})); err != nil {
		tr.t.Fatal(err)
	}
	rep, err := wire.ReadReply(c)
	if err != nil {
		tr.t.Fatal(err)
	}
	text := make([]byte, rep.Length)
	if _, err := io.ReadFull(c, text); err != nil {
		tr.t.Fatal(err)
	}
	return c, rep.Status.Err(string(text))
}

// Who holds the read key only cannot ask what workers ask each other, and who speaks to a worker of a read-only dataset
// nothing about names; bad requests of who can are refused, and change nothing.
func TestStrangersAndBadRequestsAreRefused(t *testing.T) {
	tr := newTier(t, "").start(1)
	tr.mustPut(0, "k", []byte("1"))
	// The read key leads to what readers may ask, and to nothing else.
	reader := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return tr.ask(0, wire.RoleRead)
	}}}
	defer reader.CloseIdleConnections()
	for _, r := range [][2]string{
		{"GET", "/epoch"}, {"GET", "/object?key=k"}, {"GET", "/block?key=k&version=x&size=1&block=0"}, {"GET", "/held?limit=1"},
		{"DELETE", "/object?key=k"}, {"PUT", "/put?key=k&size=0"}, {"PUT", "/hold?key=k"}, {"POST", "/copy?key=k"},
		{"POST", "/complete?key=k"}, {"POST", "/mark?key=k&epoch=1&n=1"}, {"POST", "/forget?key=k&epoch=1&n=1"}, {"POST", "/release"},
	} {
		req, err := http.NewRequest(r[0], "http://w"+r[1], nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Stepcache-Epoch", "1")
		resp, err := reader.Do(req)
		if err != nil {
			t.Fatalf("%s %s with the read key: %v", r[0], r[1], err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s %s with the read key: status %d", r[0], r[1], resp.StatusCode)
		}
	}
	c, err := tr.ask(0, wire.RoleWrite)
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		if c == nil {
			return tr.ask(0, wire.RoleWrite)
		}
		defer func() { c = nil }()
		return c, nil
	}}}
	defer client.CloseIdleConnections()
	for _, r := range []struct {
		method, path, epoch, options, body string
		want                               int
	}{
		{"GET", "/object?key=k", "", "", "", 400},
		{"GET", "/object?key=k", "x", "", "", 400},
		{"GET", "/object?key=k", "0", "", "", 409},
		{"GET", "/object?key=../k", "1", "", "", 422},
		{"GET", "/block?key=k&version=x&size=-1&block=0", "", "", "", 422},
		{"GET", "/block?key=k&version=x&size=10&block=1", "", "", "", 422},
		{"GET", "/block?key=k&version=no-such-version&size=10&block=0", "", "", "", 422},
		{"PUT", "/put?key=k&size=-1", "1", "e30=", "", 422},
		{"PUT", "/put?key=k&size=2", "1", "not base64", "", 422},
		{"PUT", "/put?key=k&size=2", "1", "e30=", "no frame at all", 422},
		{"POST", "/copy?key=k", "1", "", "{", 422},
		{"POST", "/complete?key=k", "1", "", `{"Upload":"none"}`, 422},
		{"POST", "/delete", "", "", `{"Keys":["k"]}`, 400},
		{"POST", "/delete", "0", "", `{"Keys":["k"]}`, 409},
		{"POST", "/delete", "1", "", "{", 422},
		{"GET", "/part?key=k&upload=u&number=1&etag=x&block=0", "", "", "", 422},
		{"GET", "/part?key=k&upload=u&number=x&block=-1", "", "", "", 422},
		{"GET", "/parts?key=k&upload=u", "", "", "", 200},
		{"POST", "/nothing", "1", "", "", 404},
	} {
		req, err := http.NewRequest(r.method, "http://w"+r.path, bytes.NewReader([]byte(r.body)))
		if err != nil {
			t.Fatal(err)
		}
		if r.epoch != "" {
			req.Header.Set("Stepcache-Epoch", r.epoch)
		}
		req.Header.Set("Stepcache-Options", r.options)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", r.method, r.path, err)
		}
		resp.Body.Close()
		if resp.StatusCode != r.want {
			t.Errorf("%s %s: status %d, want %d", r.method, r.path, resp.StatusCode, r.want)
		}
	}
	tr.reads(0, "k", "1")

	other := newTier(t, "")
	other.add()
	other.publish()
	c2 := other.config(0)
	c2.Gateway = nil
	w, err := worker.New(context.Background(), c2, worker.Deps{})
	if err != nil {
		t.Fatal(err)
	}
	go w.Serve(context.Background())
	t.Cleanup(func() { w.Close() })
	if _, err := other.ask(0, wire.RoleWrite); !errors.Is(err, source.ErrInvalid) {
		t.Errorf("a read-only worker: %v", err)
	}
}

// A worker that was killed finds again what it held: the bucket is asked which version a name has, and for
// no byte of it.
func TestAKilledWorkerFindsItsObjectsAgain(t *testing.T) {
	tr := newTier(t, "")
	tr.add()
	tr.publish()
	tr.spawn(0)
	tr.ready()
	p := content(9<<20, 1)
	tr.mustPut(0, "kept", p)
	tr.reads(0, "kept", string(p))
	tr.workers[0].outside.Kill()
	<-tr.workers[0].outside.Done()
	tr.spawn(0)
	tr.ready()
	before := theServer(t).Sent()
	tr.reads(0, "kept", string(p))
	if sent := theServer(t).Sent() - before; sent > 1<<20 {
		t.Errorf("the bucket sent %d bytes of what the worker held", sent)
	}
}

// later is a clock that is ahead.
type later struct{ by time.Duration }

func (l later) Now() time.Time                         { return time.Now().Add(l.by) }
func (l later) After(d time.Duration) <-chan time.Time { return time.After(d) }

// hourly is a clock that is ahead, and tells when somebody begins to wait for an hour.
type hourly struct {
	later
	waits chan struct{} // holds one
}

func (h hourly) After(d time.Duration) <-chan time.Time {
	if d >= time.Hour {
		select {
		case h.waits <- struct{}{}:
		default:
		}
	}
	return h.later.After(d)
}

// Uploads that nobody completes are given up where the dataset is alone with its bucket, and left alone
// elsewhere and below other prefixes.
func TestOldUploads(t *testing.T) {
	for _, exclusive := range []bool{true, false} {
		tr := newTier(t, "")
		core := minio.Core{Client: tr.direct}
		for _, key := range []string{tr.prefix + "old", "elsewhere/old"} {
			if _, err := core.NewMultipartUpload(t.Context(), tr.bucket, key, minio.PutObjectOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		tr.write.Exclusive = exclusive
		// It looks at them again after an hour once it has looked, and much sooner where it could not.
		looked := make(chan struct{}, 1)
		tr.deps = func(_ int, d *worker.Deps) { d.Clock = hourly{later{objects.UploadAge + time.Hour}, looked} }
		tr.add()
		tr.publish()
		tr.run(0)
		select {
		case <-looked:
		case <-time.After(patience):
			t.Fatal("the uploads are not looked at")
		}
		want := []string{"artifacts/old", "elsewhere/old"}
		if exclusive {
			want = want[1:]
		}
		if u := tr.uploads(); !slices.Equal(u, want) {
			t.Errorf("exclusive %v: left are %q", exclusive, u)
		}
	}
}

// One that the bucket never gives up keeps it from no other.
func TestOldUploadsOfWhichOneIsRefused(t *testing.T) {
	f := bucket.Faults(t, theServer(t))
	tr := newTier(t, f.Endpoint())
	f.Set(func(r *http.Request) bucket.Fault {
		if r.Method == http.MethodDelete && strings.HasSuffix(r.URL.Path, "/a") {
			return bucket.Fault{Status: 405, Code: "MethodNotAllowed"}
		}
		return bucket.Fault{}
	})
	core := minio.Core{Client: tr.direct}
	for _, key := range []string{"a", "b"} {
		if _, err := core.NewMultipartUpload(t.Context(), tr.bucket, tr.prefix+key, minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	tr.write.Exclusive = true
	tr.deps = func(_ int, d *worker.Deps) { d.Clock = later{objects.UploadAge + time.Hour} }
	tr.add()
	tr.publish()
	tr.run(0)
	eventually(t, "the other is given up", func() error {
		if u := tr.uploads(); len(u) != 1 || u[0] != tr.prefix+"a" {
			return fmt.Errorf("%q", u)
		}
		return nil
	})
}

// In an exclusive dataset a version is remembered for longer; the rules are the same.
func TestExclusive(t *testing.T) {
	tr := newTier(t, "")
	tr.write.Exclusive = true
	tr.start(2)
	key := tr.keyOwnedBy(0, "k")
	eventually(t, "the membership is settled", func() error {
		tr.mustPut(0, key, []byte("1"))
		before := theServer(t).Requests()
		tr.reads(1, key, "1")
		tr.reads(0, key, "1")
		if theServer(t).Requests() != before {
			return errors.New("the bucket was asked")
		}
		return nil
	})
	for _, v := range []string{"2", "3"} {
		tr.mustPut(1, key, []byte(v))
		tr.reads(0, key, v)
		tr.reads(1, key, v)
	}
}
