package gateway

import (
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what gateways are asked and what they answer. It is safe for concurrent use, and a
// prometheus.Collector. No label has a value that a client could make up: operations are those of route,
// codes those of HTTP and the two below, errors S3's.
type Metrics struct {
	requests *prometheus.CounterVec
	errors   *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	inFlight prometheus.Gauge
	in, out  prometheus.Counter
}

// Codes of requests that have no whole answer.
const (
	codeCut  = "cut"  // the answer broke off: the rest could not be read
	codeLeft = "left" // the client went away, or took its answer too slowly
)

// operationOther is what is no operation of S3 that is supported, a request that cannot be parsed included.
const operationOther = "other"

// NewMetrics returns Metrics that have counted nothing.
func NewMetrics() *Metrics {
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Name: "stepcache_gateway_" + name, Help: help}
	}
	return &Metrics{
		requests: prometheus.NewCounterVec(opts("requests_total", "Requests to the S3 endpoint, by S3's name of the operation and the status of the answer, which is cut where it broke off and left where the client did."), []string{"operation", "code"}),
		errors:   prometheus.NewCounterVec(opts("errors_total", "Errors that the S3 endpoint answered, by S3's code; in a deletion of many objects each is one."), []string{"error"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "stepcache_gateway_request_seconds", Help: "Time from the head of a request to the S3 endpoint to the end of its answer.",
			Buckets: []float64{.001, .004, .016, .064, .25, 1, 4, 16, 64, 256},
		}, []string{"operation"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "stepcache_gateway_requests", Help: "Requests to the S3 endpoint under way."}),
		in:       prometheus.NewCounter(opts("received_bytes_total", "Bytes of the bodies of requests to the S3 endpoint, as they were sent.")),
		out:      prometheus.NewCounter(opts("sent_bytes_total", "Bytes of the bodies of answers of the S3 endpoint.")),
	}
}

func (m *Metrics) parts() []prometheus.Collector {
	return []prometheus.Collector{m.requests, m.errors, m.seconds, m.inFlight, m.in, m.out}
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.parts() {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.parts() {
		c.Collect(ch)
	}
}

// ended counts a request whose handler is done.
func (m *Metrics) ended(operation, code string, took time.Duration) {
	m.inFlight.Dec()
	m.requests.WithLabelValues(operation, code).Inc()
	m.seconds.WithLabelValues(operation).Observe(took.Seconds())
}

// counted is a response whose status is noted and whose bytes are counted as they leave, since an answer may
// take minutes. What else a ResponseWriter can do is found through Unwrap.
type counted struct {
	http.ResponseWriter
	sent   prometheus.Counter
	status int
}

// Unwrap serves http.ResponseController.
func (c *counted) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *counted) WriteHeader(status int) {
	if status >= http.StatusOK { // not 100 Continue
		c.status = status
	}
	c.ResponseWriter.WriteHeader(status)
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.sent.Add(float64(n))
	return n, err
}

// ReadFrom implements io.ReaderFrom: by sendfile, where the response can (one of HTTP/2 cannot).
func (c *counted) ReadFrom(r io.Reader) (n int64, err error) {
	if to, ok := c.ResponseWriter.(io.ReaderFrom); ok {
		n, err = to.ReadFrom(r)
	} else {
		n, err = io.Copy(struct{ io.Writer }{c.ResponseWriter}, r)
	}
	c.sent.Add(float64(n))
	return n, err
}

// code is the status as a label.
func (c *counted) code() string { return strconv.Itoa(max(c.status, http.StatusOK)) }
