package source

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The operations and the kinds of errors that a Meter tells apart.
var (
	meterOps   = [...]string{"list", "stat", "get", "put", "delete"}
	meterKinds = [...]struct {
		name string
		err  error
	}{
		{"sender", errSender}, {"not_found", ErrNotFound}, {"no_bucket", ErrNoBucket}, {"changed", ErrChanged}, {"denied", ErrDenied},
		{"unversioned", ErrUnversioned}, {"throttled", ErrThrottled}, {"unavailable", ErrUnavailable},
		{"invalid", ErrInvalid}, {"read_only", ErrReadOnly}, {"canceled", context.Canceled}, {"other", nil},
	}
)

const (
	opList = iota
	opStat
	opGet
	opPut
	opDelete
)

// Meter counts what a store was asked and what it sent. It is safe for concurrent use, and a
// prometheus.Collector.
type Meter struct {
	ops     [len(meterOps)]struct{ requests, nanos atomic.Int64 }
	errors  [len(meterKinds)]atomic.Int64
	read    atomic.Int64
	written atomic.Int64
	waited  atomic.Int64 // nanoseconds, which Limit counts

	descRequests, descSeconds, descErrors, descRead, descWritten, descWaited *prometheus.Desc
}

// NewMeter returns a Meter whose metrics carry the source's URL.
func NewMeter(url string) *Meter {
	labels := prometheus.Labels{"source": url}
	desc := func(name, help string, variable ...string) *prometheus.Desc {
		return prometheus.NewDesc("stepcache_source_"+name, help, variable, labels)
	}
	return &Meter{
		descRequests: desc("requests_total", "Requests sent to the object store; a page of a listing is one.", "op"),
		descSeconds:  desc("seconds_total", "Time spent in requests to the object store and in reading their bodies.", "op"),
		descErrors:   desc("errors_total", "Requests or bodies of the object store that failed.", "kind"),
		descRead:     desc("read_bytes_total", "Bytes of objects that the object store sent."),
		descWaited:   desc("waited_seconds_total", "Time that requests waited before they were sent, since all of maxRequests were under way."),
		descWritten:  desc("written_bytes_total", "Bytes of objects that the object store was sent."),
	}
}

// Counts is a Meter's state.
type Counts struct {
	// Requests and Seconds are by operation: list, stat, get, put, delete.
	Requests map[string]int64
	Seconds  map[string]float64
	// Errors are by kind: not_found, throttled, unavailable and so on; only those that happened.
	Errors map[string]int64
	// Read and Written are bytes of objects' contents.
	Read, Written int64
	// Waited is how many seconds requests waited for a Limit with this Meter.
	Waited float64
}

// Total is the number of requests of all operations.
func (c Counts) Total() int64 {
	var n int64
	for _, r := range c.Requests {
		n += r
	}
	return n
}

// Counts returns the state as it is now.
func (m *Meter) Counts() Counts {
	c := Counts{Requests: map[string]int64{}, Seconds: map[string]float64{}, Errors: map[string]int64{},
		Read: m.read.Load(), Written: m.written.Load(), Waited: time.Duration(m.waited.Load()).Seconds()}
	for i, op := range meterOps {
		c.Requests[op] = m.ops[i].requests.Load()
		c.Seconds[op] = time.Duration(m.ops[i].nanos.Load()).Seconds()
	}
	for i, k := range meterKinds {
		if n := m.errors[i].Load(); n > 0 {
			c.Errors[k.name] = n
		}
	}
	return c
}

// Describe implements prometheus.Collector.
func (m *Meter) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

// Collect implements prometheus.Collector.
func (m *Meter) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	for i, op := range meterOps {
		counter(m.descRequests, float64(m.ops[i].requests.Load()), op)
		counter(m.descSeconds, time.Duration(m.ops[i].nanos.Load()).Seconds(), op)
	}
	for i, k := range meterKinds {
		counter(m.descErrors, float64(m.errors[i].Load()), k.name)
	}
	counter(m.descRead, float64(m.read.Load()))
	counter(m.descWritten, float64(m.written.Load()))
	counter(m.descWaited, time.Duration(m.waited.Load()).Seconds())
}

// done counts a request's end.
func (m *Meter) done(op int, start time.Time, err error) {
	m.ops[op].requests.Add(1)
	m.ops[op].nanos.Add(int64(time.Since(start)))
	m.fail(err)
}

func (m *Meter) fail(err error) {
	if err == nil {
		return
	}
	for i, k := range meterKinds {
		if k.err == nil || errors.Is(err, k.err) {
			m.errors[i].Add(1)
			return
		}
	}
}

// Measure counts in m what goes through s.
func Measure(s Source, m *Meter) Source { return &measure{Source: s, pages: pager(s), meter: m} }

type measure struct {
	Source
	pages Pager
	meter *Meter
}

func (s *measure) pager() Pager {
	if s.pages == nil {
		return nil
	}
	return s
}

// Page implements Pager.
func (s *measure) Page(ctx context.Context, q PageRequest) (Page, error) {
	start := time.Now()
	page, err := s.pages.Page(ctx, q)
	s.meter.done(opList, start, err)
	return page, err
}

// List implements Lister.
func (s *measure) List(ctx context.Context, prefix string, yield func(Object) error) error {
	if s.pages != nil {
		return ListPages(ctx, s, prefix, yield)
	}
	start := time.Now()
	err := s.Source.List(ctx, prefix, yield)
	s.meter.done(opList, start, err)
	return err
}

// Stat implements Stater.
func (s *measure) Stat(ctx context.Context, key string) (Object, error) {
	start := time.Now()
	o, err := s.Source.Stat(ctx, key)
	s.meter.done(opStat, start, err)
	return o, err
}

// Delete implements Deleter.
func (s *measure) Delete(ctx context.Context, key string) error {
	start := time.Now()
	err := s.Source.Delete(ctx, key)
	s.meter.done(opDelete, start, err)
	return err
}

// Put implements Putter.
func (s *measure) Put(ctx context.Context, key string, r io.Reader, size int64) (Object, error) {
	start := time.Now()
	o, err := s.Source.Put(ctx, key, countingReader{r, &s.meter.written}, size)
	s.meter.done(opPut, start, err)
	return o, err
}

type countingReader struct {
	io.Reader
	n *atomic.Int64
}

func (r countingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.n.Add(int64(n))
	if err != nil && !errors.Is(err, io.EOF) {
		err = senderError{err}
	}
	return n, err
}

// errSender marks what the reader of a put's content failed with: the store did nothing wrong.
var errSender = errors.New("the content to be put cannot be read")

// senderError is such an error, in its own words.
type senderError struct{ error }

// Unwrap makes errors.Is see the mark and the error itself.
func (e senderError) Unwrap() []error { return []error{errSender, e.error} }

// Get implements Getter. An empty range sends no request and counts as none.
func (s *measure) Get(ctx context.Context, o Object, off, length int64) (Body, error) {
	start := time.Now()
	body, err := s.Source.Get(ctx, o, off, length)
	if length == 0 {
		return body, err
	}
	s.meter.done(opGet, start, err)
	if err != nil {
		return body, err
	}
	body.ReadCloser = &measureBody{ReadCloser: body.ReadCloser, meter: s.meter}
	return body, nil
}

type measureBody struct {
	io.ReadCloser
	meter  *Meter
	failed bool
}

func (b *measureBody) Read(p []byte) (int, error) {
	start := time.Now()
	n, err := b.ReadCloser.Read(p)
	b.meter.ops[opGet].nanos.Add(int64(time.Since(start)))
	b.meter.read.Add(int64(n))
	if err != nil && !errors.Is(err, io.EOF) && !b.failed {
		b.failed = true
		b.meter.fail(err)
	}
	return n, err
}
