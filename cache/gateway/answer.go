package gateway

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"
)

// extend gives the client time to take the next part of the answer.
func (q *request) extend() error {
	return http.NewResponseController(q.w).SetWriteDeadline(time.Now().Add(q.answerStall))
}

// answer writes an XML answer.
func (q *request) answer(status int, v any) error {
	text, err := document(v)
	if err != nil {
		return err
	}
	h := q.w.Header()
	h.Set("Content-Type", "application/xml")
	h.Set("Content-Length", strconv.Itoa(len(text)))
	q.w.WriteHeader(status)
	q.w.Write(text) // an error is the client's leaving, and net/http closes the connection
	return nil
}

func document(v any) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(xml.Header)
	if err := xml.NewEncoder(&b).Encode(v); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// slowly answers with what work returns. Where that takes long (the bucket puts together an object of many
// parts), the answer is begun with white space, so that the client does not give up; an error is then an
// error document in an answer of status 200, as in S3.
func (q *request) slowly(work func() (any, error)) error {
	stop, ended := make(chan struct{}), make(chan struct{})
	begun := false
	go func() {
		defer close(ended)
		tick := time.NewTicker(q.keepAlive)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			if !begun {
				begun = true
				q.w.Header().Set("Content-Type", "application/xml")
				q.w.WriteHeader(http.StatusOK)
				io.WriteString(q.w, xml.Header)
			}
			// The client's leaving shows in the request's context, which work has.
			if err := q.extend(); err != nil {
				return
			}
			io.WriteString(q.w, " ")
			http.NewResponseController(q.w).Flush()
		}
	}()
	v, err := func() (any, error) {
		defer func() {
			close(stop)
			<-ended
		}()
		return work()
	}()
	if !begun {
		if err != nil {
			return err
		}
		return q.answer(http.StatusOK, v)
	}
	if err != nil {
		f := failureOf(err)
		q.report(err, f)
		v = q.errorBody(f)
		q.w.status = f.Status // it was said to be 200, and is counted as what it is
	}
	text, err := document(v)
	if err != nil {
		q.report(err, internal)
		q.hangUp(codeCut)
	}
	q.w.Write(text[len(xml.Header):])
	return nil
}

// outlet is where an object's bytes leave. It begins the answer at the first of them, so that an error
// before is still answered as one, and gives the client a new deadline for every slice. A file is passed on
// to net/http, which sends it with sendfile.
type outlet struct {
	q      *request
	status int
	begun  bool
	left   bool // the client does not take the bytes: gone, or too slow
}

// slice is what a client has to take within a Stall.
const slice = 4 << 20

func (o *outlet) begin() error {
	if !o.begun {
		o.begun = true
		o.q.w.WriteHeader(o.status)
	}
	err := o.q.extend()
	o.left = o.left || err != nil
	return err
}

func (o *outlet) Write(p []byte) (written int, err error) {
	for {
		if err := o.begin(); err != nil {
			return written, err
		}
		n, err := o.q.w.Write(p[:min(len(p), slice)])
		written += n
		o.left = o.left || err != nil
		if p = p[n:]; err != nil || len(p) == 0 {
			return written, err
		}
	}
}

// ReadFrom implements io.ReaderFrom. net/http and the kernel look through one io.LimitedReader, not two.
func (o *outlet) ReadFrom(r io.Reader) (written int64, err error) {
	from, limited := r.(*io.LimitedReader)
	if !limited {
		from = &io.LimitedReader{R: r, N: 1<<63 - 1}
	}
	for from.N > 0 {
		part := &io.LimitedReader{R: from.R, N: min(from.N, slice)}
		want := part.N
		if err := o.begin(); err != nil {
			return written, err
		}
		n, err := o.q.w.ReadFrom(part)
		written += n
		o.left = o.left || gone(err)
		from.N -= n
		if err != nil || n < want {
			return written, err
		}
	}
	return written, nil
}

// gone tells a connection's errors from those of what was to be sent over it.
func gone(err error) bool {
	for _, of := range []error{syscall.EPIPE, syscall.ECONNRESET, os.ErrDeadlineExceeded, net.ErrClosed} {
		if errors.Is(err, of) {
			return true
		}
	}
	return false
}
