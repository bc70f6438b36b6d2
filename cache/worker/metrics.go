package worker

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/stepcache/stepcache/cache/wire"
)

// counts are a worker's own counters; the store and the sources have theirs.
type counts struct {
	// served are those of reads; gateway.names counts what readers of a writable dataset get.
	served, opened, peerBytes     atomic.Int64
	verified, unverified, corrupt atomic.Int64
	corruptPeer, refused          atomic.Int64
	statuses                      [wire.Late + 1]atomic.Int64
}

// status counts an answer that is not OK.
func (c *counts) status(s wire.Status) {
	if int(s) < len(c.statuses) {
		c.statuses[s].Add(1)
	}
}

// newRegistry makes the registry of one worker.
func newRegistry(w *Worker) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), &collector{w: w})
	if w.gateway != nil {
		r.MustRegister(w.gateway.metrics)
	}
	return r
}

// collector reads the counters when it is asked.
type collector struct{ w *Worker }

// Describe leaves the collector unchecked: what it yields depends on nothing but the table in Collect.
func (c *collector) Describe(chan<- *prometheus.Desc) {}

var statusDesc = prometheus.NewDesc("stepcache_worker_errors_total", "Requests answered with a status other than OK.", []string{"status"}, nil)

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	st, s := c.w.store.Stats(), c.w.Status()
	ready := 0.0
	if c.w.problems.ready() == nil {
		ready = 1
	}
	for _, m := range []struct {
		name, help string
		kind       prometheus.ValueType
		value      float64
	}{
		{"store_quota_bytes", "Most that the store may hold.", prometheus.GaugeValue, float64(st.Quota)},
		{"store_used_bytes", "What the store holds of its quota.", prometheus.GaugeValue, float64(st.Used)},
		{"store_pinned_bytes", "What loads keep from eviction.", prometheus.GaugeValue, float64(st.Pinned)},
		{"store_zombie_bytes", "Bytes of evicted files that readers still have open.", prometheus.GaugeValue, float64(st.Zombie)},
		{"store_blocks", "Resident blocks.", prometheus.GaugeValue, float64(st.Blocks)},
		{"store_objects", "Objects with a resident block.", prometheus.GaugeValue, float64(st.Objects)},
		{"store_leases", "Descriptors that are handed out.", prometheus.GaugeValue, float64(st.Leases)},
		{"store_hits_total", "Blocks found resident.", prometheus.CounterValue, float64(st.Hits)},
		{"store_misses_total", "Blocks that were fetched.", prometheus.CounterValue, float64(st.Misses)},
		{"store_shared_total", "Requests that joined a fetch under way.", prometheus.CounterValue, float64(st.Shared)},
		{"store_uncached_total", "Blocks served without being kept.", prometheus.CounterValue, float64(st.Uncached)},
		{"store_evicted_total", "Blocks evicted.", prometheus.CounterValue, float64(st.Evicted)},
		{"store_corrupt_total", "Blocks whose bytes no longer matched their checksums.", prometheus.CounterValue, float64(st.Corrupt)},
		{"worker_served_bytes_total", "Bytes sent to readers: mounts and other clients, those of the S3 endpoint, and copies that it makes itself.", prometheus.CounterValue, float64(s.ServedBytes)},
		{"worker_opened_bytes_total", "Bytes of files handed out as descriptors.", prometheus.CounterValue, float64(s.OpenedBytes)},
		{"worker_peer_bytes_total", "Bytes fetched from other workers.", prometheus.CounterValue, float64(c.w.counts.peerBytes.Load())},
		{"worker_verified_objects_total", "Whole objects that match the bucket's digest.", prometheus.CounterValue, float64(s.Verified)},
		{"worker_unverified_objects_total", "Objects that were compared with no digest of the bucket: it publishes none, or they are spread over workers.", prometheus.CounterValue, float64(s.Unverified)},
		{"worker_corrupt_objects_total", "Whole objects that did not match the bucket's digest.", prometheus.CounterValue, float64(s.Corrupt)},
		{"worker_refetched_blocks_total", "Blocks fetched again after a checksum failed.", prometheus.CounterValue, float64(s.Refetched)},
		{"worker_refused_total", "Connections and control requests that were refused.", prometheus.CounterValue, float64(c.w.counts.refused.Load())},
		{"worker_requests", "Requests under way.", prometheus.GaugeValue, float64(len(c.w.requests))},
		{"worker_membership_epoch", "Epoch of the membership in force.", prometheus.GaugeValue, float64(s.Epoch)},
		{"worker_ready", "1 when the worker can serve.", prometheus.GaugeValue, ready},
		{"snapshot_files", "Files of the current snapshot.", prometheus.GaugeValue, float64(s.Files)},
		{"snapshot_bytes", "Bytes of the current snapshot.", prometheus.GaugeValue, float64(s.Bytes)},
	} {
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc("stepcache_"+m.name, m.help, nil, nil), m.kind, m.value)
	}
	if c.w.gateway != nil {
		n := c.w.gateway.names.Counts()
		for _, m := range []struct {
			name, help string
			value      int64
		}{
			{"puts", "Puts and completed uploads executed by this worker.", n.Puts},
			{"deletes", "Deletions executed by this worker.", n.Deletes},
			{"copies", "Copies executed by this worker.", n.Copies},
			{"reads", "Objects opened through this worker's S3 endpoint.", n.Reads},
			{"lists", "Listings through this worker's S3 endpoint.", n.Lists},
			{"written_bytes", "Bytes put to the bucket by this worker.", n.Written},
			{"read_bytes", "Bytes of objects read through this worker's S3 endpoint.", n.Read},
			{"forwarded", "Operations passed on to the owner of a name.", n.Forwarded},
			{"direct", "Operations executed for an owner that could not be reached.", n.Direct},
			{"waited", "Writes acknowledged only after versions that others may remember had expired.", n.Waited},
			{"acknowledged_back", "Puts acknowledged before the bucket had them.", n.Back},
			{"flushed", "Versions brought to the bucket after they were acknowledged.", n.Flushed},
			{"staged", "Puts whose bytes the tier holds since.", n.Staged},
			{"unstaged", "Puts whose bytes the tier had no room for.", n.Unstaged},
			{"assembled_bytes", "Bytes of uploads in parts that were not fetched back, since workers held the parts.", n.Assembled},
		} {
			out <- prometheus.MustNewConstMetric(prometheus.NewDesc("stepcache_objects_"+m.name+"_total", m.help, nil, nil), prometheus.CounterValue, float64(m.value))
		}
	}
	if c.w.gateway != nil {
		age := 0.0
		if u := s.Unflushed; !u.Oldest.IsZero() {
			age = max(0, c.w.clock.Now().Sub(u.Oldest).Seconds())
		}
		for _, m := range []struct {
			name, help string
			value      float64
		}{
			{"unflushed", "Objects acknowledged and not yet in the bucket, as far as this worker answers for them.", float64(s.Unflushed.Objects)},
			{"unflushed_bytes", "Bytes of them.", float64(s.Unflushed.Bytes)},
			{"unflushed_age_seconds", "How long the oldest of them has been waiting.", age},
		} {
			out <- prometheus.MustNewConstMetric(prometheus.NewDesc("stepcache_objects_"+m.name, m.help, nil, nil), prometheus.GaugeValue, m.value)
		}
	}
	for i := range c.w.counts.statuses { // those that never were too: the first burst of one is seen then
		if s := wire.Status(i); s != wire.OK {
			out <- prometheus.MustNewConstMetric(statusDesc, prometheus.CounterValue, float64(c.w.counts.statuses[i].Load()), s.String())
		}
	}
}
