package osstest

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
)

// Kind is a way to misbehave.
type Kind int

// The faults. After counts bytes of the answer's body (of the request's for FlipRequest).
const (
	// Unavailable answers 503 ServiceUnavailable without doing anything.
	Unavailable Kind = iota
	// SlowDown answers 503 with a throttling code and x-oss-qos-delay-time.
	SlowDown
	// InternalError answers 500.
	InternalError
	// Reset resets the connection: instead of an answer, or after After bytes of the body.
	Reset
	// Stall stops sending: instead of an answer, or after After bytes; it ends when the client leaves.
	Stall
	// Truncate closes the connection in good order after After bytes of the body.
	Truncate
	// FlipBit inverts one bit of the body's byte at After.
	FlipBit
	// WrongETag answers with another ETag than the object's.
	WrongETag
	// NoETag answers without ETag.
	NoETag
	// NoDigest answers without x-oss-hash-crc64ecma.
	NoDigest
	// IgnoreRange serves as if Range had not been sent.
	IgnoreRange
	// IgnoreIfMatch serves as if no condition had been sent.
	IgnoreIfMatch
	// FlipRequest inverts one bit of the request's body at byte After before it is stored.
	FlipRequest
	// WrongDigest answers with another x-oss-hash-crc64ecma than the content's.
	WrongDigest
	// Refused answers 403 AccessDenied although the signature is good.
	Refused
	// LoseAnswer does what was asked and then resets the connection instead of answering.
	LoseAnswer
)

// Fault says what to do to which requests.
type Fault struct {
	Kind Kind
	// Op limits it to an operation ("GetObject"), Key to an object; empty means any.
	Op, Key string
	// After is where in the body it strikes.
	After int64
	// Skip lets that many matching requests pass first.
	Skip int
	// Times is how many requests it strikes; zero means all.
	Times int
}

// Injected is a Fault in force.
type Injected struct {
	fault   Fault
	passed  int // guarded by Server.mu
	struck  int // guarded by Server.mu
	removed atomic.Bool
	hits    atomic.Int64
}

// Hits says how many requests it struck.
func (i *Injected) Hits() int { return int(i.hits.Load()) }

// Remove ends it.
func (i *Injected) Remove() { i.removed.Store(true) }

// Inject puts a fault in force. A request is struck by the first that matches it.
func (s *Server) Inject(f Fault) *Injected {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := &Injected{fault: f}
	s.faults = append(s.faults, i)
	return i
}

// observe records the request and returns the fault that strikes it, if any.
func (s *Server) observe(c *call) *strike {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count[c.op]++
	if len(s.seen) >= 2*keptSeen {
		s.seen = append(s.seen[:0], s.seen[keptSeen:]...)
	}
	s.seen = append(s.seen, Seen{c.op, c.name, c.key, c.query, c.r.Header.Clone()})
	for _, i := range s.faults {
		f := i.fault
		if i.removed.Load() || f.Op != "" && f.Op != c.op || f.Key != "" && f.Key != c.key {
			continue
		}
		if i.passed < f.Skip {
			i.passed++
			continue
		}
		if f.Times > 0 && i.struck >= f.Times {
			continue
		}
		i.struck++
		i.hits.Add(1)
		return &strike{Fault: f}
	}
	return nil
}

// strike is a fault at work on one request.
type strike struct {
	Fault
	inner http.ResponseWriter
}

// before changes the request or its writer; done means that the request has been dealt with.
func (f *strike) before(s *Server, c *call) (done bool) {
	switch f.Kind {
	case Unavailable:
		c.fail(&fault{Status: 503, Code: "ServiceUnavailable", Message: "Please try again later."})
		return true
	case SlowDown:
		c.fail(&fault{Status: 503, Code: "QpsLimitExceeded", Message: "Please reduce your request rate.", QosDelaySeconds: 1})
		return true
	case InternalError:
		c.fail(&fault{Status: 500, Code: "InternalError", Message: "We encountered an internal error. Please try again."})
		return true
	case Refused:
		c.fail(denied("The bucket's policy denies it."))
		return true
	case Reset:
		if f.After == 0 {
			reset(c.w)
			return true
		}
	case Stall:
		if f.After == 0 {
			s.wait(c.r.Context())
			panic(http.ErrAbortHandler)
		}
	case IgnoreRange:
		c.r.Header.Del("Range")
	case IgnoreIfMatch:
		c.r.Header.Del("If-Match")
		c.r.Header.Del("If-Unmodified-Since")
	case FlipRequest:
		c.r.Body = &flippedBody{c.r.Body, f.After}
	case LoseAnswer:
		f.inner = c.w
		c.w = &discarded{header: http.Header{}}
		return false
	}
	f.inner = c.w
	c.w = &struckWriter{ResponseWriter: c.w, strike: f, server: s, request: c.r}
	return false
}

func (f *strike) after(s *Server, c *call) {
	if f.Kind == LoseAnswer {
		reset(f.inner)
	}
}

// reset ends the connection with a RST instead of a FIN.
func reset(w http.ResponseWriter) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	conn.Close()
}

var errStruck = errors.New("struck by an injected fault")

type struckWriter struct {
	http.ResponseWriter
	strike  *strike
	server  *Server
	request *http.Request
	sent    int64
	started bool
	dead    bool
}

func (w *struckWriter) WriteHeader(status int) {
	w.started = true
	switch w.strike.Kind {
	case WrongETag:
		w.Header().Set("ETag", `"00000000000000000000000000000BAD"`)
	case NoETag:
		w.Header().Del("ETag")
	case NoDigest:
		w.Header().Del("x-oss-hash-crc64ecma")
	case WrongDigest:
		w.Header().Set("x-oss-hash-crc64ecma", "1")
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *struckWriter) Write(p []byte) (int, error) {
	if w.dead {
		return 0, errStruck
	}
	if !w.started {
		w.WriteHeader(http.StatusOK)
	}
	at := w.strike.After - w.sent
	if at < 0 || at >= int64(len(p)) {
		n, err := w.ResponseWriter.Write(p)
		w.sent += int64(n)
		return n, err
	}
	switch w.strike.Kind {
	case FlipBit:
		p = append([]byte(nil), p...)
		p[at] ^= 0x10
		n, err := w.ResponseWriter.Write(p)
		w.sent += int64(n)
		return n, err
	case Reset, Truncate, Stall:
		w.ResponseWriter.Write(p[:at])
		w.ResponseWriter.(http.Flusher).Flush()
		w.dead = true
		switch w.strike.Kind {
		case Reset:
			reset(w.ResponseWriter)
			return 0, errStruck
		case Stall:
			w.server.wait(w.request.Context())
		}
		panic(http.ErrAbortHandler)
	}
	n, err := w.ResponseWriter.Write(p)
	w.sent += int64(n)
	return n, err
}

type flippedBody struct {
	io.ReadCloser
	at int64
}

func (b *flippedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.at >= 0 && b.at < int64(n) {
		p[b.at] ^= 0x10
	}
	b.at -= int64(n)
	return n, err
}

// discarded is the writer of an answer that nobody gets.
type discarded struct{ header http.Header }

func (d *discarded) Header() http.Header         { return d.header }
func (d *discarded) WriteHeader(int)             {}
func (d *discarded) Write(p []byte) (int, error) { return len(p), nil }
