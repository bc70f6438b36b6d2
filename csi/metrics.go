package csi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/status"
)

// metrics are the node service's own, and those of its mounts and their clients.
type metrics struct {
	s        *service
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec

	listening atomic.Value // string: the address

	mounts, pods, keeper, budget, used, left *prometheus.Desc
}

func newMetrics(s *service) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("stepcache_node_"+name, help, labels, nil)
	}
	m := &metrics{
		s: s, registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "stepcache_node_call_seconds", Help: "Calls of the kubelet, by method and code.", Buckets: []float64{.01, .1, 1, 10, 100},
		}, []string{"method", "code"}),
		mounts: desc("mounts", "Mounts served, by dataset.", "dataset"),
		pods:   desc("pods", "Paths at which pods have a mount, by dataset.", "dataset"),
		keeper: desc("keeper_connected", "Whether mounts would outlive this process."),
		budget: desc("cache_budget_bytes", "Memory for all datasets' caches on this node."),
		left:   desc("cache_unassigned_bytes", "What no dataset has of it."),
		used:   desc("cache_used_bytes", "Bytes held in the node's cache, by dataset.", "dataset"),
	}
	m.registry.MustRegister(m, m.calls, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) call(method string, took time.Duration, err error) {
	m.calls.WithLabelValues(method, status.Code(err).String()).Observe(took.Seconds())
}

// add exports a mount's counters. Two mounts of one snapshot, one of them ending, share a name: then those of the
// newer are missing until the next one.
func (m *metrics) add(n *mounted) {
	_ = m.registry.Register(n.server)
	if c := n.client.Client(); c != nil {
		_ = m.registry.Register(c.Collector())
	}
}

func (m *metrics) remove(n *mounted) {
	m.registry.Unregister(n.server)
	if c := n.client.Client(); c != nil {
		m.registry.Unregister(c.Collector())
	}
}

// addr is where serve listens.
func (m *metrics) addr() string {
	a, _ := m.listening.Load().(string)
	return a
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.mounts, m.pods, m.keeper, m.budget, m.left, m.used} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s := m.s
	users, err := s.users()
	if err != nil {
		s.log.Warn("metrics", "error", err)
	}
	type of struct {
		mounts, pods int
		cache        *slice
	}
	sets := map[string]of{}
	s.mu.Lock()
	for name, set := range s.sets {
		o := of{mounts: len(set.mounts), cache: set.cache}
		for _, n := range set.mounts {
			o.pods += len(users[n.device])
		}
		sets[name] = o
	}
	s.mu.Unlock()
	for name, o := range sets {
		gauge(m.mounts, float64(o.mounts), name)
		gauge(m.pods, float64(o.pods), name)
		if o.cache != nil {
			gauge(m.used, float64(o.cache.store.Stats().Used), name)
		}
	}
	connected := 0.0
	if s.keeping.current() != nil {
		connected = 1
	}
	gauge(m.keeper, connected)
	gauge(m.budget, float64(s.budget.total))
	s.budget.mu.Lock()
	left := s.budget.left
	s.budget.mu.Unlock()
	gauge(m.left, float64(left))
}

// serve answers /healthz (this process runs), /readyz (the kubelet may call, and what was parked is served) and
// /metrics until ctx ends.
func (m *metrics) serve(ctx context.Context, l net.Listener) error {
	m.listening.Store(l.Addr().String())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !m.s.registered.Load() {
			http.Error(w, m.s.unregistered(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		// A scrape under way is let finish: it looks at mounts.
		ctx, cancel := context.WithTimeout(context.Background(), goodbye)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	})
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-ended
	return nil
}
