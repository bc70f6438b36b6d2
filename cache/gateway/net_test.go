package gateway_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/stepcache/stepcache/cache/gateway"
	"github.com/stepcache/stepcache/cache/source"
)

// dial opens a connection of its own to the gateway, which no wait outlasts.
func (f *fixture) dial(t testing.TB) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// raw sends bytes and returns the answer's first line.
func (f *fixture) raw(t testing.TB, text string) string {
	t.Helper()
	c := f.dial(t)
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return line
}

// onWire is a request as it goes over a connection.
func onWire(t testing.TB, r *http.Request) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := r.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestBodiesThatEndEarly(t *testing.T) {
	f := serve(t)
	data := random(300_000)
	for name, c := range map[string]call{
		"plain":          {method: "PUT", path: object, body: data},
		"unsigned":       {method: "PUT", path: object, body: data, payload: "UNSIGNED-PAYLOAD"},
		"signed chunks":  {method: "PUT", path: object, body: data, payload: streaming, chunks: signedChunks{size: 65536}.encode},
		"a part":         {method: "PUT", path: object + "2", body: data},
		"bytes no chunk": {method: "PUT", path: object, body: data, payload: unsignedTrailer, header: map[string]string{"x-amz-trailer": "x-amz-checksum-crc32"}, chunks: signedChunks{size: 65536, unsigned: true, trailers: []string{"x-amz-checksum-crc32:" + crc(data)}}.encode},
	} {
		text := onWire(t, f.request(t, c))
		for _, cut := range []int{1, 10, 70_000, len(data)} {
			conn := f.dial(t)
			if _, err := conn.Write(text[:len(text)-cut]); err != nil {
				t.Fatal(err)
			}
			if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if a := read(t, response); a.code != "IncompleteBody" || a.status != 400 {
				t.Errorf("%s, without its last %d bytes: %s", name, cut, a)
			}
		}
	}
	f.isEmpty(t)
}

func TestConnectionsThatAreAborted(t *testing.T) {
	f := serve(t)
	text := onWire(t, f.request(t, call{method: "PUT", path: object, body: random(300_000)}))
	for _, n := range []int{len(text) - 1, len(text) / 2, len(text) - 300_000, 100} {
		conn := f.dial(t)
		if _, err := conn.Write(text[:n]); err != nil {
			t.Fatal(err)
		}
		conn.SetLinger(0) // a reset
		conn.Close()
	}
	f.put(t, "seen", nil)
	f.server.Close() // waits for the requests under way
	if got := f.m.state(); got != "1 objects, 0 uploads, 0 parts" {
		t.Errorf("stored: %s", got)
	}
	if f.logged.Len() > 0 {
		t.Errorf("a client that leaves was logged: %s", f.logged)
	}
}

func TestDownloadsThatAreAborted(t *testing.T) {
	data := random(32 << 20) // more than the buffers of a connection hold
	name := filepath.Join(t.TempDir(), "object")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, sendfile := range []bool{false, true} {
		f := serve(t)
		if sendfile {
			file, err := os.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			f = serve(t, withObjects(onDisk{newMemory(), file, int64(len(data))}))
		} else {
			f.put(t, "a/b", data)
		}
		conn := f.dial(t)
		if _, err := conn.Write(onWire(t, f.request(t, call{method: "GET", path: object}))); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		conn.SetLinger(0) // a reset
		conn.Close()
		f.server.Close() // waits for the requests under way
		if f.logged.Len() > 0 {
			t.Errorf("sendfile %v: a client that leaves was logged: %s", sendfile, f.logged)
		}
		if n := f.count(t)["requests_total GetObject left"]; n != 1 {
			t.Errorf("sendfile %v: %v clients left", sendfile, n)
		}
	}
}

func TestExpectContinue(t *testing.T) {
	f := serve(t)
	empty := f.request(t, call{method: "PUT", path: object, header: map[string]string{"expect": "100-continue"}})
	conn := f.dial(t)
	if _, err := conn.Write(onWire(t, empty)); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	for _, want := range []int{100, 200} {
		response, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if response.StatusCode != want {
			t.Errorf("a put of nothing: %d, not %d", response.StatusCode, want)
		}
	}
	// Who is refused need not send.
	refused := f.request(t, call{method: "PUT", path: object + "2", body: random(1 << 20), key: readKey, secret: readSecret, header: map[string]string{"expect": "100-continue"}})
	text := onWire(t, refused)
	if line := f.raw(t, string(text[:len(text)-1<<20])); !strings.Contains(line, " 403 ") {
		t.Errorf("a refusal: %s", line)
	}
}

// A client that is refused while it sends learns why, although nobody reads the rest.
func TestRefusalsInTheMiddleOfABody(t *testing.T) {
	f := serve(t)
	data := random(15 << 20)
	for range 5 {
		_, err := f.client(t, readKey, readSecret, false).PutObject(t.Context(), bucket, "a/b", bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
		if codeOf(err) != "AccessDenied" {
			t.Errorf("%v", err)
		}
	}
	f.isEmpty(t)
}

// refusing reads some of a put before it refuses it.
type refusing struct{ *memory }

func (r refusing) Put(ctx context.Context, key string, size int64, body io.Reader, o gateway.PutOptions) (gateway.Info, error) {
	if _, err := io.CopyN(io.Discard, body, 1<<20); err != nil {
		return gateway.Info{}, err
	}
	return gateway.Info{}, source.ErrDenied
}

// So does one that was told to go on.
func TestARefusalAfterContinue(t *testing.T) {
	f := serve(t, withObjects(refusing{newMemory()}))
	const size = 15 << 20
	text := onWire(t, f.request(t, call{method: "PUT", path: object, body: random(size), header: map[string]string{"expect": "100-continue"}}))
	conn := f.dial(t)
	if _, err := conn.Write(text[:len(text)-size]); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	if response, err := http.ReadResponse(r, nil); err != nil || response.StatusCode != 100 {
		t.Fatalf("%+v, %v", response, err)
	}
	if _, err := conn.Write(text[len(text)-size:]); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if a := read(t, response); a.code != "AccessDenied" {
		t.Errorf("answered %s", a)
	}
}

// onDisk serves one object from a file, as a tier serves what is resident.
type onDisk struct {
	*memory
	file *os.File
	size int64
}

func (o onDisk) Open(context.Context, string) (gateway.Object, error) { return o, nil }
func (o onDisk) Info() gateway.Info                                   { return gateway.Info{Key: "a/b", Size: o.size, ETag: "x"} }
func (o onDisk) Close() error                                         { return nil }

func (o onDisk) WriteRange(ctx context.Context, w io.Writer, off, n int64) error {
	if _, err := o.file.Seek(off, io.SeekStart); err != nil {
		return err
	}
	_, err := io.Copy(w, io.LimitReader(o.file, n))
	return err
}

// counted counts the bytes that leave a listener's connections by ReadFrom of a file, which is sendfile.
type counted struct {
	net.Listener
	bytes *atomic.Int64
}

type countedConn struct {
	*net.TCPConn
	bytes *atomic.Int64
}

func (l counted) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return countedConn{c.(*net.TCPConn), l.bytes}, nil
}

func (c countedConn) ReadFrom(r io.Reader) (int64, error) {
	n, err := c.TCPConn.ReadFrom(r)
	if limited, ok := r.(*io.LimitedReader); ok {
		if _, ok := limited.R.(*os.File); ok {
			c.bytes.Add(n)
		}
	}
	return n, err
}

// reaches waits until a count, which is made after what it counts has left, is at least want.
func reaches(t *testing.T, n *atomic.Int64, want int64) {
	t.Helper()
	for end := time.Now().Add(time.Minute); n.Load() < want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d bytes by sendfile, not %d", n.Load(), want)
		}
	}
}

func TestFilesLeaveBySendfile(t *testing.T) {
	data := random(10 << 20)
	name := filepath.Join(t.TempDir(), "object")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var sent atomic.Int64
	f := serve(t, withObjects(onDisk{newMemory(), file, int64(len(data))}), func(_ *gateway.Config, s *server) { s.Listener = counted{s.Listener, &sent} })
	if a := f.must(t, call{method: "GET", path: object}); !bytes.Equal(a.body, data) {
		t.Error("other bytes")
	}
	reaches(t, &sent, int64(len(data))-4096) // all but what net/http looks at first
	sent.Store(0)
	if a := f.must(t, call{method: "GET", path: object, header: map[string]string{"range": "bytes=5000000-9000000"}}); !bytes.Equal(a.body, data[5_000_000:9_000_001]) {
		t.Error("a range: other bytes")
	}
	reaches(t, &sent, 4_000_000-4096)
}

func TestHTTP2(t *testing.T) {
	f := serve(t, overTLS)
	data := random(300_000)
	f.put(t, "a/b", data)
	response, err := f.server.Client().Do(f.request(t, call{method: "GET", path: object}))
	if err != nil {
		t.Fatal(err)
	}
	if response.ProtoMajor != 2 {
		t.Errorf("spoken over %s", response.Proto)
	}
	if a := read(t, response); !bytes.Equal(a.body, data) {
		t.Errorf("came back: %s", a)
	}
	if a := f.do(t, call{method: "PUT", path: object, body: data, header: map[string]string{"content-md5": zeroMD5}}); a.code != "BadDigest" {
		t.Errorf("bad digest: %s", a)
	}
}

// endless is an object of any size that is nowhere.
type endless struct {
	*memory
	size int64
	got  int64
}

func (e *endless) Put(ctx context.Context, key string, size int64, r io.Reader, o gateway.PutOptions) (gateway.Info, error) {
	var err error
	e.got, err = io.Copy(io.Discard, r)
	return gateway.Info{Key: key, Size: size, ETag: "x"}, err
}

func (e *endless) Open(context.Context, string) (gateway.Object, error) { return e, nil }
func (e *endless) Info() gateway.Info                                   { return gateway.Info{Key: "a/b", Size: e.size, ETag: "x"} }
func (e *endless) Close() error                                         { return nil }

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func (e *endless) WriteRange(ctx context.Context, w io.Writer, off, n int64) error {
	_, err := io.CopyN(w, zeros{}, n)
	return err
}

// discard is a response that goes nowhere, so that nothing but the gateway allocates.
type discard struct{ h http.Header }

func (d discard) Header() http.Header              { return d.h }
func (d discard) Write(p []byte) (int, error)      { return len(p), nil }
func (d discard) WriteHeader(int)                  {}
func (d discard) SetReadDeadline(time.Time) error  { return nil }
func (d discard) SetWriteDeadline(time.Time) error { return nil }

func TestLargeObjectsTakeConstantMemory(t *testing.T) {
	const size = 256 << 20
	e := &endless{memory: newMemory(), size: size}
	f := serve(t, withObjects(e))
	chunk := fmt.Sprintf("%x\r\n", 1<<20)
	var readers []io.Reader
	for range size >> 20 {
		readers = append(readers, strings.NewReader(chunk), io.LimitReader(zeros{}, 1<<20), strings.NewReader("\r\n"))
	}
	sum := crc(make([]byte, 0))
	readers = append(readers, strings.NewReader("0\r\nx-amz-checksum-crc32c:"+sum+"\r\n\r\n"))
	put := f.request(t, call{method: "PUT", path: object, payload: unsignedTrailer, header: map[string]string{"x-amz-trailer": "x-amz-checksum-crc32c", "x-amz-decoded-content-length": fmt.Sprint(size)}})
	put.Body, put.ContentLength = io.NopCloser(io.MultiReader(readers...)), -1
	get := f.request(t, call{method: "GET", path: object})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f.server.Config.Handler.ServeHTTP(discard{http.Header{}}, put)
	f.server.Config.Handler.ServeHTTP(discard{http.Header{}}, get)
	runtime.ReadMemStats(&after)
	if e.got != size {
		t.Errorf("%d bytes arrived", e.got)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 8<<20 {
		t.Errorf("%d MiB for 512 MiB that passed", used>>20)
	}
}

// pipes is a gateway whose connections are pipes in memory, for a bubble whose time is fake.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { close(p.done); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// inBubble runs test against a gateway over o, in fake time.
func inBubble(t *testing.T, o gateway.Objects, test func(t *testing.T, f *fixture, dial func() net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		logged := new(bytes.Buffer)
		f := &fixture{T: t, m: newMemory(), logged: logged, url: "http://gateway", counts: gateway.NewMetrics()}
		config := gateway.Config{
			Buckets: map[string]gateway.Objects{bucket: o}, Keys: func() []gateway.Credential {
				return []gateway.Credential{{AccessKey: accessKey, SecretKey: secretKey, Write: true}}
			},
			Logger: textLogger(logged), Metrics: f.counts,
		}
		h, err := gateway.New(config)
		if err != nil {
			t.Fatal(err)
		}
		l := &pipes{make(chan net.Conn), make(chan struct{})}
		s := &http.Server{Handler: h, ErrorLog: nil}
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		defer func() {
			s.Close()
			<-served
		}()
		test(t, f, func() net.Conn {
			client, server := net.Pipe()
			l.conns <- server
			t.Cleanup(func() { client.Close() })
			return client
		})
	})
}

func TestAClientThatStopsSending(t *testing.T) {
	m := newMemory()
	inBubble(t, m, func(t *testing.T, f *fixture, dial func() net.Conn) {
		text := onWire(t, f.request(t, call{method: "PUT", path: object, body: random(300_000)}))
		c := dial()
		if _, err := c.Write(text[:len(text)-100_000]); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		response, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if a := read(t, response); a.code != "RequestTimeout" || !response.Close {
			t.Errorf("answered %s, close %v", a, response.Close)
		}
		if waited := time.Since(begun); waited > time.Minute {
			t.Errorf("waited %v", waited)
		}
		if m.state() != "0 objects, 0 uploads, 0 parts" {
			t.Errorf("stored %s", m.state())
		}
	})
}

// trickle writes a byte a second until the other side has had enough.
func trickle(c net.Conn, text []byte) (sent int) {
	for i := range text {
		if _, err := c.Write(text[i : i+1]); err != nil {
			return i
		}
		time.Sleep(time.Second)
	}
	return len(text)
}

func TestAClientThatSendsAByteASecond(t *testing.T) {
	for name, secret := range map[string]string{"admitted": secretKey, "refused": "other"} {
		t.Run(name, func(t *testing.T) {
			m := newMemory()
			inBubble(t, m, func(t *testing.T, f *fixture, dial func() net.Conn) {
				body := random(100_000)
				text := onWire(t, f.request(t, call{method: "PUT", path: object, body: body, key: accessKey, secret: secret}))
				c := dial()
				if _, err := c.Write(text[:len(text)-len(body)]); err != nil {
					t.Fatal(err)
				}
				codes := make(chan string, 1)
				go func() {
					response, err := http.ReadResponse(bufio.NewReader(c), nil)
					if err != nil {
						codes <- err.Error()
						return
					}
					b, _ := io.ReadAll(response.Body)
					codes <- string(b)
				}()
				if sent := trickle(c, body); sent > 130 {
					t.Errorf("took %d bytes, one a second", sent)
				}
				code := <-codes
				if want := map[string]string{"admitted": "RequestTimeout", "refused": "SignatureDoesNotMatch"}[name]; !strings.Contains(code, want) {
					t.Errorf("answered %s, not %s", code, want)
				}
				if m.state() != "0 objects, 0 uploads, 0 parts" {
					t.Errorf("stored %s", m.state())
				}
			})
		})
	}
}

// slow takes its time over every read and every completion.
type slow struct {
	*memory
	wait time.Duration
	err  error
}

type slowReader struct {
	io.Reader
	wait time.Duration
}

func (s slowReader) Read(p []byte) (int, error) {
	time.Sleep(s.wait)
	return s.Reader.Read(p[:min(len(p), 10_000)])
}

func (s slow) Put(ctx context.Context, key string, size int64, r io.Reader, o gateway.PutOptions) (gateway.Info, error) {
	return s.memory.Put(ctx, key, size, slowReader{r, s.wait}, o)
}

func (s slow) Copy(ctx context.Context, from gateway.Info, to string, o gateway.PutOptions) (gateway.Info, error) {
	time.Sleep(s.wait)
	if s.err != nil {
		return gateway.Info{}, s.err
	}
	return s.memory.Copy(ctx, from, to, o)
}

func TestABucketThatIsSlowIsNotTheClientsFault(t *testing.T) {
	m := slow{newMemory(), 10 * time.Minute, nil}
	inBubble(t, m, func(t *testing.T, f *fixture, dial func() net.Conn) {
		c := dial()
		data := random(50_000)
		if _, err := c.Write(onWire(t, f.request(t, call{method: "PUT", path: object, body: data}))); err != nil {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if a := read(t, response); a.status != 200 {
			t.Errorf("answered %s", a)
		}
		if v, err := m.get("a/b"); err != nil || !bytes.Equal(v.data, data) {
			t.Errorf("not stored: %v", err)
		}
	})
}

func TestAClientThatTakesNothing(t *testing.T) {
	e := &endless{memory: newMemory(), size: 1 << 40}
	inBubble(t, e, func(t *testing.T, f *fixture, dial func() net.Conn) {
		c := dial()
		if _, err := c.Write(onWire(t, f.request(t, call{method: "GET", path: object}))); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(c)
		if line, err := r.ReadString('\n'); err != nil || !strings.Contains(line, " 200 ") {
			t.Fatalf("%q %v", line, err)
		}
		time.Sleep(10 * time.Minute) // in which nothing is read
		if n, err := io.Copy(io.Discard, r); n > 64<<20 || err != nil && !errors.Is(err, io.ErrClosedPipe) && !errors.Is(err, io.EOF) {
			t.Errorf("%d more bytes after ten minutes, %v", n, err)
		}
		synctest.Wait()
		if n := f.count(t)["requests_total GetObject left"]; n != 1 {
			t.Errorf("%v clients left", n)
		}
	})
}

func TestLongAnswersAreKeptAlive(t *testing.T) {
	for _, c := range []struct {
		wait time.Duration
		err  error
		want string
		code string // that is counted
	}{
		{35 * time.Second, nil, "<CopyObjectResult", "200"},
		{35 * time.Second, gateway.ErrBusy, "<Code>SlowDown</Code>", "503"},
		{35 * time.Second, errDisk, "<Code>InternalError</Code>", "500"},
		{2 * time.Hour, nil, "<CopyObjectResult", "200"},
	} {
		m := slow{newMemory(), c.wait, c.err}
		inBubble(t, m, func(t *testing.T, f *fixture, dial func() net.Conn) {
			if _, err := m.memory.Put(t.Context(), "a/b", 1, strings.NewReader("x"), gateway.PutOptions{}); err != nil {
				t.Fatal(err)
			}
			conn := dial()
			begun := time.Now()
			if _, err := conn.Write(onWire(t, f.request(t, call{method: "PUT", path: object + "2", header: map[string]string{"x-amz-copy-source": object}}))); err != nil {
				t.Fatal(err)
			}
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			if waited := time.Since(begun); response.StatusCode != 200 || waited > 15*time.Second {
				t.Errorf("the answer began with %d after %v", response.StatusCode, waited)
			}
			a := read(t, response)
			if !bytes.HasPrefix(a.body, []byte("<?xml")) || !bytes.Contains(a.body, []byte(c.want)) || bytes.Count(a.body, []byte("<?xml")) != 1 {
				t.Errorf("%v %v: %s", c.wait, c.err, a.body)
			}
			if spaces := bytes.Count(a.body[:bytes.LastIndex(a.body, []byte("><"))+1], []byte(" ")); spaces < int(c.wait/(10*time.Second))-1 {
				t.Errorf("%d spaces in %v", spaces, c.wait)
			}
			if logged := f.logged.Len() > 0; logged != (c.err != nil) {
				t.Errorf("%v: logged %q", c.err, f.logged)
			}
			synctest.Wait()
			if n := f.count(t)["requests_total CopyObject "+c.code]; n != 1 {
				t.Errorf("%v: counted as %v", c.err, f.count(t))
			}
		})
	}
}

// A bucket that fails every request is told of by some lines a second, the last of which say how many there were more.
func TestFailuresAreLoggedAtALimitedRate(t *testing.T) {
	f := serve(t)
	f.m.setFail(func(string) error { return errors.New("broken") })
	begun := time.Now()
	const requests = 300
	for range requests {
		f.do(t, call{method: "GET", path: object})
	}
	most := 11 + int(time.Since(begun)/time.Second)
	if n := bytes.Count(f.logged.Bytes(), []byte("s3 request failed")); n < 10 || n > most {
		t.Errorf("%d requests make %d lines, more than %d", requests, n, most)
	}
}
