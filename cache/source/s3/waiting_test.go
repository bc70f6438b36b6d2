package s3

import (
	"bytes"
	"crypto/md5"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/stepcache/stepcache/cache/source"
)

// Where TLS protects the bytes they are not signed once more; the MD5 goes along all the same, and the content while it comes.
func TestWithTLSContentIsNotSigned(t *testing.T) {
	p := bytes.Repeat([]byte("0123456789abcdef"), 16<<10)
	sum := md5.Sum(p)
	begun := make(chan struct{})
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		h := md5.New()
		n, err := io.Copy(h, r.Body)
		if err != nil || n != int64(len(p)) || r.Header.Get("X-Amz-Content-Sha256") != "UNSIGNED-PAYLOAD" ||
			r.Header.Get("Content-Md5") != base64.StdEncoding.EncodeToString(sum[:]) {
			t.Errorf("%d bytes, %v, with %v", n, err, r.Header)
		}
		w.Header().Set("ETag", `"`+hex.EncodeToString(h.Sum(nil))+`"`)
	}))
	defer server.Close()
	b, err := Open(t.Context(), source.Config{URL: "s3://bucket", Endpoint: server.URL, Region: "r", Anonymous: true})
	if err != nil {
		t.Fatal(err)
	}
	core, err := minio.NewCore(strings.TrimPrefix(server.URL, "https://"), &minio.Options{Secure: true, Region: "r",
		Creds: credentials.NewStaticV4("key", "secret", ""), Transport: &transport{next: server.Client().Transport}})
	if err != nil {
		t.Fatal(err)
	}
	b.core = *core
	r := io.MultiReader(bytes.NewReader(p[:1000]), readerFunc(func([]byte) (int, error) {
		select {
		case <-begun:
			return 0, io.EOF
		case <-time.After(90 * time.Second):
			return 0, errors.New("the store is asked for nothing while the content comes")
		}
	}), bytes.NewReader(p[1000:]))
	o, err := b.PutObject(t.Context(), "k", r, int64(len(p)), source.WriteOptions{Sums: source.Sums{MD5: sum[:]}})
	if err != nil || o.Version != hex.EncodeToString(sum[:]) || !bytes.Equal(o.Digest.Sum, sum[:]) {
		t.Errorf("%+v, %v", o, err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// A store has a time for each piece that it is sent and for its answer; what the content takes to come does not count.
func TestAStoreThatTakesNothingIsGivenUpAndASlowSenderIsNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ended atomic.Bool
		w := &waiting{limit: time.Minute, r: readerFunc(func(p []byte) (int, error) {
			time.Sleep(time.Hour)
			return len(p), nil
		})}
		w.timer = time.AfterFunc(w.limit, func() { ended.Store(true) })
		for range 3 {
			if n, err := w.Read(make([]byte, 7)); n != 7 || err != nil || ended.Load() {
				t.Fatalf("%d bytes, %v, given up: %v", n, err, ended.Load())
			}
			time.Sleep(59 * time.Second)
		}
		if ended.Load() {
			t.Fatal("given up before its time")
		}
		time.Sleep(2 * time.Second)
		if n, err := w.Read(make([]byte, 7)); n != 0 || err == nil || !ended.Load() {
			t.Errorf("%d bytes, %v, given up: %v", n, err, ended.Load())
		}
	})
}

// Who takes a body back waits for the reading under way, and there is none after that.
func TestABodyThatIsTakenBackIsReadNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reading atomic.Int64
		l := lend(readerFunc(func(p []byte) (int, error) {
			reading.Add(1)
			time.Sleep(time.Hour)
			reading.Add(-1)
			return 0, io.EOF
		}))
		go l.Read(make([]byte, 1))
		synctest.Wait()
		if reading.Load() != 1 {
			t.Fatal("nobody reads")
		}
		l.back()
		if reading.Load() != 0 {
			t.Error("somebody still reads")
		}
		if _, err := l.Read(make([]byte, 1)); !errors.Is(err, errOver) {
			t.Errorf("read after it was taken back: %v", err)
		}
	})
}
