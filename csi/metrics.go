package csi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/cache/client"
	"github.com/stepcache/stepcache/cache/mount"
)

// metrics are the node service's own, and those of its mounts and their clients.
type metrics struct {
	s        *service
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec

	listening atomic.Value // string: the address

	mu   sync.Mutex
	sums map[string]*sum // by Dataset

	mounts, pods, keeper, budget, used, left *prometheus.Desc
}

func newMetrics(s *service) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("stepcache_node_"+name, help, labels, nil)
	}
	m := &metrics{
		s: s, registry: prometheus.NewRegistry(), sums: make(map[string]*sum),
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
	m.registry.MustRegister(m, mount.NewCollector(m.mountStats), client.NewCollector(m.clientStats), m.calls, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) call(method string, took time.Duration, err error) {
	m.calls.WithLabelValues(method, status.Code(err).String()).Observe(took.Seconds())
}

// sum is what the mounts of one Dataset counted.
type sum struct {
	live    map[*mounted]struct{}
	mounts  mount.Stats  // of those that ended
	clients client.Stats // theirs
	read    bool         // some had a client: those that show names have none
	since   time.Time    // when the last one ended
}

// sumsKept is how long the counts of a Dataset that has no mount stay: those of its next mount go on from them.
const sumsKept = time.Hour

// add counts a mount in.
func (m *metrics) add(n *mounted) {
	m.mu.Lock()
	defer m.mu.Unlock()
	of := m.sums[n.set.String()]
	if of == nil {
		of = &sum{live: make(map[*mounted]struct{})}
		m.sums[n.set.String()] = of
	}
	of.live[n] = struct{}{}
	of.read = of.read || n.client.Client() != nil
}

// remove keeps what a mount that has ended counted.
func (m *metrics) remove(n *mounted) {
	m.mu.Lock()
	defer m.mu.Unlock()
	of := m.sums[n.set.String()]
	delete(of.live, n)
	of.mounts.Add(n.server.Stats().Ended())
	if c := n.client.Client(); c != nil {
		of.clients.Add(c.Stats().Ended())
	}
	of.since = m.s.now()
}

// forget drops the counts of Datasets that have long had no mount.
func (m *metrics) forget(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, of := range m.sums {
		if len(of.live) == 0 && now.Sub(of.since) >= sumsKept {
			delete(m.sums, name)
		}
	}
}

// mountStats are the sums of each Dataset's mounts.
func (m *metrics) mountStats() map[string]mount.Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string]mount.Stats, len(m.sums))
	for name, of := range m.sums {
		all := of.mounts
		for n := range of.live {
			all.Add(n.server.Stats())
		}
		out[name] = all
	}
	return out
}

// clientStats are the sums of their clients.
func (m *metrics) clientStats() map[string]client.Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string]client.Stats, len(m.sums))
	for name, of := range m.sums {
		if !of.read {
			continue
		}
		all := of.clients
		for n := range of.live {
			if c := n.client.Client(); c != nil {
				all.Add(c.Stats())
			}
		}
		out[name] = all
	}
	return out
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
	m.forget(s.now())
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
