package s3_test

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/source"
	"github.com/stepcache/stepcache/cache/source/s3"
	"github.com/stepcache/stepcache/test/bucket"
)

// patience is how long a test waits for what normally takes milliseconds.
const patience = 90 * time.Second

func random(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(p)
	return p
}

func sumsOf(p []byte) source.Sums {
	m, s := md5.Sum(p), sha256.Sum256(p)
	return source.Sums{MD5: m[:], SHA256: s[:]}
}

// halves yields half of p, then the rest once go is closed.
func halves(p []byte, proceed <-chan struct{}) io.Reader {
	return io.MultiReader(bytes.NewReader(p[:len(p)/2]), readerFunc(func([]byte) (int, error) {
		select {
		case <-proceed:
			return 0, io.EOF
		case <-time.After(patience):
			return 0, errors.New("the bucket is asked for nothing while the content comes")
		}
	}), bytes.NewReader(p[len(p)/2:]))
}

// put puts p in one of the ways there are, whole or as a part, and says what the bucket has of it then.
func put(t *testing.T, b *s3.Bucket, part bool, key string, r io.Reader, size int, sums source.Sums) (etag string, err error) {
	t.Helper()
	if !part {
		o, err := b.PutObject(t.Context(), key, r, int64(size), source.WriteOptions{Sums: sums})
		return o.Version, err
	}
	upload, err := b.BeginUpload(t.Context(), key, source.Attributes{})
	if err != nil {
		t.Fatal(err)
	}
	made, err := b.PutPart(t.Context(), key, upload, 1, r, int64(size), sums)
	if err != nil {
		if parts, _, lerr := b.Parts(t.Context(), key, upload, 0, 10); lerr != nil || len(parts) > 0 {
			t.Errorf("%s: parts %+v, %v", key, parts, lerr)
		}
		if aerr := b.AbortUpload(t.Context(), key, upload); aerr != nil {
			t.Error(aerr)
		}
		return "", err
	}
	if _, cerr := b.CompleteUpload(t.Context(), key, upload, []source.Part{made}, source.WriteOptions{}); cerr != nil {
		t.Fatal(cerr)
	}
	return made.Version, nil
}

func has(t *testing.T, b *s3.Bucket, key string, want []byte) {
	t.Helper()
	o, err := b.Stat(t.Context(), key)
	if err != nil {
		t.Errorf("%s: %v", key, err)
		return
	}
	if got, _, err := get(t.Context(), b, o, 0, o.Size); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes of %d, %v", key, len(got), len(want), err)
	}
}

// Content whose MD5 its sender told is on its way to the bucket before it is all there, unless it is small, with that MD5
// and a signature over every byte.
func TestContentIsSentWhileItComes(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	config := fixture(t, s)
	f := bucket.Faults(t, s)
	config.Endpoint = f.Endpoint()
	b, err := s3.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1, 1000, 128 << 10, 128<<10 + 1, 1<<20 + 7, 16 << 20, 17 << 20} {
		p := random(size)
		small := size <= 128<<10
		for _, part := range []bool{false, true} {
			for _, hash := range []bool{false, true} {
				if size > 16<<20 && !part {
					continue // goes in parts, each with sums of its own
				}
				key := fmt.Sprintf("%d-%v-%v", size, part, hash)
				sums, want := sumsOf(p), "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
				if hash || small {
					want = hex.EncodeToString(sums.SHA256)
				}
				if !hash {
					sums.SHA256 = nil
				}
				begun := make(chan struct{})
				r := halves(p, begun)
				if small {
					r = bytes.NewReader(p)
				}
				var once sync.Once
				f.Set(func(r *http.Request) bucket.Fault {
					if r.Method == http.MethodPut {
						once.Do(func() { close(begun) })
						if got := r.Header.Get("X-Amz-Content-Sha256"); got != want || r.Header.Get("Content-Md5") != base64.StdEncoding.EncodeToString(sums.MD5) {
							t.Errorf("%s: sent with %s and MD5 %q", key, got, r.Header.Get("Content-Md5"))
						}
					}
					return bucket.Fault{}
				})
				etag, err := put(t, b, part, key, r, size, sums)
				f.Set(nil)
				if err != nil || etag != hex.EncodeToString(sums.MD5) {
					t.Errorf("%s: %s, %v", key, etag, err)
					continue
				}
				has(t, b, key, p)
			}
		}
	}
}

// A sum that the reader of the content holds to be right, and that is not, is the bucket's to find: it stores nothing.
func TestBytesThatAreDamagedOnTheWayAreRefusedByTheBucket(t *testing.T) {
	b, err := s3.Open(t.Context(), fixture(t, bucket.StartT(t, bucket.Options{})))
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1, 1000, 1 << 20, 17 << 20} {
		p := random(size)
		sums := sumsOf(p)
		p[size/2] ^= 1
		for name, s := range map[string]source.Sums{"MD5": {MD5: sums.MD5}, "both": sums, "the hash": {MD5: sumsOf(p).MD5, SHA256: sums.SHA256}} {
			for _, part := range []bool{false, true} {
				if size > 16<<20 && !part {
					continue
				}
				key := fmt.Sprintf("%d-%s-%v", size, name, part)
				if etag, err := put(t, b, part, key, bytes.NewReader(p), size, s); err == nil {
					t.Errorf("%s: taken, as %s", key, etag)
				}
				if o, err := b.Stat(t.Context(), key); !errors.Is(err, source.ErrNotFound) {
					t.Errorf("%s is there: %+v, %v", key, o, err)
				}
			}
		}
	}
}

// What is cut off, or put off, while it comes is sent again when it is all there.
func TestContentThatWasCutOffIsSentAgain(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	config := fixture(t, s)
	f := bucket.Faults(t, s)
	config.Endpoint = f.Endpoint()
	b, err := s3.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	for name, fault := range map[string]bucket.Fault{
		"reset": {Reset: true}, "slow down": {Status: 503, Code: "SlowDown"},
		"answer lost": {Header: func(http.Header) { panic(http.ErrAbortHandler) }},
	} {
		for _, size := range []int{200_000, 3 << 20} {
			for _, part := range []bool{false, true} {
				p, key := random(size), fmt.Sprintf("%s-%d-%v", name, size, part)
				begun := make(chan struct{})
				var tries atomic.Int64
				f.Set(func(r *http.Request) bucket.Fault {
					if r.Method != http.MethodPut {
						return bucket.Fault{}
					}
					if tries.Add(1) > 1 {
						return bucket.Fault{}
					}
					close(begun)
					return fault
				})
				sums := sumsOf(p)
				etag, err := put(t, b, part, key, halves(p, begun), size, sums)
				f.Set(nil)
				if err != nil || etag != hex.EncodeToString(sums.MD5) || tries.Load() != 2 {
					t.Errorf("%s: %s, %v, after %d tries", key, etag, err, tries.Load())
					continue
				}
				has(t, b, key, p)
			}
		}
	}
}

// A bucket that refuses while the content still comes has decided: the answer does not wait for another try, and nothing
// reads the content any more once Put has returned.
func TestARefusalWhileTheContentComes(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	config := fixture(t, s)
	f := bucket.Faults(t, s)
	config.Endpoint = f.Endpoint()
	b, err := s3.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		half, begun := make(chan struct{}), make(chan struct{})
		var tries atomic.Int64
		f.Set(func(r *http.Request) bucket.Fault {
			if tries.Add(1) == 1 {
				select {
				case <-half:
				case <-time.After(patience):
				}
				close(begun)
			}
			return bucket.Fault{Status: 412, Code: "PreconditionFailed"}
		})
		p := random(200_000) // no more than a server of Go takes after it has answered
		read := 0            // not guarded, for the race detector to see
		r := io.MultiReader(bytes.NewReader(p[:1000]), readerFunc(func([]byte) (int, error) {
			close(half)
			return 0, io.EOF
		}), halves(p[1000:], begun))
		_, err := b.PutObject(t.Context(), "k", readerFunc(func(p []byte) (int, error) {
			n, err := r.Read(p)
			read += n
			return n, err
		}), int64(len(p)), source.WriteOptions{IfAbsent: true, Sums: sumsOf(p)})
		f.Set(nil)
		if !errors.Is(err, source.ErrChanged) || tries.Load() != 1 || read == 0 {
			t.Fatalf("%v after %d tries and %d bytes", err, tries.Load(), read)
		}
	}
}

// A store that does not know chunks with signatures gets what it knows, and is asked no more after a few puts; one that
// refused for a while is.
func TestAStoreThatKnowsNoChunksWithSignatures(t *testing.T) {
	s := bucket.StartT(t, bucket.Options{})
	f := bucket.Faults(t, s)
	for _, c := range []struct {
		what    string
		fault   bucket.Fault
		refuses func(chunked int) bool
		want    int
	}{
		{"not implemented", bucket.Fault{Status: 501, Code: "NotImplemented"}, func(int) bool { return true }, 3},
		{"another signature", bucket.Fault{Status: 403, Code: "SignatureDoesNotMatch"}, func(int) bool { return true }, 3},
		{"two of three", bucket.Fault{Status: 400, Code: "InvalidRequest"}, func(n int) bool { return n%3 != 0 }, 9},
	} {
		config := fixture(t, s)
		config.Endpoint = f.Endpoint()
		b, err := s3.Open(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		var chunked atomic.Int64
		f.Set(func(r *http.Request) bucket.Fault {
			if strings.HasPrefix(r.Header.Get("X-Amz-Content-Sha256"), "STREAMING-") {
				if c.refuses(int(chunked.Add(1))) {
					return c.fault
				}
			}
			return bucket.Fault{}
		})
		for n := range 9 {
			p, key := random(200_000+n), fmt.Sprint(n)
			if _, err := put(t, b, n%2 == 1, key, bytes.NewReader(p), len(p), source.Sums{MD5: sumsOf(p).MD5}); err != nil {
				t.Errorf("%s, put %d: %v", c.what, n, err)
				continue
			}
			has(t, b, key, p)
		}
		f.Set(nil)
		if chunked := int(chunked.Load()); chunked != c.want {
			t.Errorf("%s: %d of 9 puts were tried in chunks, want %d", c.what, chunked, c.want)
		}
	}
}
