package client

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// counters count since Dial.
type counters struct {
	bufferHits, joins, nearHits, storeHits, misses           atomic.Int64
	ahead, direct                                            atomic.Int64
	bufferBytes, nearBytes, storeBytes, directBytes          atomic.Int64
	workerBytes                                              atomic.Int64
	corrupt, refetched, fallbacks, rounds, hedges, hedgeWins atomic.Int64
	leases                                                   atomic.Int64
}

// Stats are what a Client did since Dial, and what it holds now.
type Stats struct {
	// How reads found the blocks they touched: in memory; on their way for somebody else; where a worker of this
	// machine has them; in the node's store; nowhere, so that they were fetched; and fetched past the buffers, which
	// were all in use.
	BufferHits, Joins, NearHits, StoreHits, Misses, Direct int64
	// ReadAhead counts the blocks that were fetched before anybody asked.
	ReadAhead int64
	// Bytes that readers got from memory, from where a worker of this machine has them, from the node's store, and
	// past the buffers.
	BufferBytes, NearBytes, StoreBytes, DirectBytes int64
	// WorkerBytes were received from workers.
	WorkerBytes int64
	// Corrupt counts payloads, snapshots and blocks of the node's store that failed their checksum;
	// Refetched those that were fetched again for it.
	Corrupt, Refetched int64
	// Fallbacks counts blocks that another worker served than the first to ask, Rounds how often nobody
	// could serve one at the first attempt.
	Fallbacks, Rounds int64
	// Hedges were sent to a second copy since the first was slow; HedgeWins answered before it.
	Hedges, HedgeWins int64
	// Leases counts descriptors given out.
	Leases int64
	// Epoch is the membership's.
	Epoch uint64
	// Buffered and Pooled are bytes of memory, in use and kept for reuse; their sum is at most Budget.
	Buffered, Pooled, Budget int64
}

// Stats returns a copy of the counters.
func (c *Client) Stats() Stats {
	n := &c.count
	s := Stats{
		BufferHits: n.bufferHits.Load(), Joins: n.joins.Load(), NearHits: n.nearHits.Load(), StoreHits: n.storeHits.Load(), Misses: n.misses.Load(),
		Direct: n.direct.Load(), ReadAhead: n.ahead.Load(),
		BufferBytes: n.bufferBytes.Load(), NearBytes: n.nearBytes.Load(), StoreBytes: n.storeBytes.Load(), DirectBytes: n.directBytes.Load(),
		WorkerBytes: n.workerBytes.Load(), Corrupt: n.corrupt.Load(), Refetched: n.refetched.Load(),
		Fallbacks: n.fallbacks.Load(), Rounds: n.rounds.Load(), Hedges: n.hedges.Load(), HedgeWins: n.hedgeWins.Load(),
		Leases: n.leases.Load(), Epoch: c.members.view().Epoch, Budget: c.cache.budget(),
	}
	s.Buffered, s.Pooled = c.cache.usage()
	return s
}

// Add adds what another Client did and holds.
func (s *Stats) Add(o Stats) {
	s.BufferHits += o.BufferHits
	s.Joins += o.Joins
	s.NearHits += o.NearHits
	s.StoreHits += o.StoreHits
	s.Misses += o.Misses
	s.Direct += o.Direct
	s.ReadAhead += o.ReadAhead
	s.BufferBytes += o.BufferBytes
	s.NearBytes += o.NearBytes
	s.StoreBytes += o.StoreBytes
	s.DirectBytes += o.DirectBytes
	s.WorkerBytes += o.WorkerBytes
	s.Corrupt += o.Corrupt
	s.Refetched += o.Refetched
	s.Fallbacks += o.Fallbacks
	s.Rounds += o.Rounds
	s.Hedges += o.Hedges
	s.HedgeWins += o.HedgeWins
	s.Leases += o.Leases
	s.Epoch = max(s.Epoch, o.Epoch)
	s.Buffered += o.Buffered
	s.Pooled += o.Pooled
	s.Budget += o.Budget
}

// Ended is what stays of a Client that is closed: what it did.
func (s Stats) Ended() Stats {
	s.Epoch, s.Buffered, s.Pooled, s.Budget = 0, 0, 0, 0
	return s
}

// NewCollector exports to Prometheus what sums tells of the Clients of each dataset, those that are closed included.
func NewCollector(sums func() map[string]Stats) prometheus.Collector {
	desc := func(name, help string, variable ...string) *prometheus.Desc {
		return prometheus.NewDesc("stepcache_client_"+name, help, append([]string{"dataset"}, variable...), nil)
	}
	return &collector{
		sums:    sums,
		blocks:  desc("blocks_total", "Blocks that reads touched, by where they were found.", "from"),
		bytes:   desc("bytes_total", "Bytes that readers got, by where from; near: from where this machine's worker has them; worker: bytes received from workers.", "from"),
		events:  desc("events_total", "Checksum failures, refetches, fallbacks, rounds, hedges and leases.", "event"),
		buffers: desc("buffer_bytes", "Memory for blocks.", "state"),
		epoch:   desc("membership_epoch", "Epoch of the membership in use."),
	}
}

type collector struct {
	sums                                  func() map[string]Stats
	blocks, bytes, events, buffers, epoch *prometheus.Desc
}

// Describe implements prometheus.Collector.
func (k *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{k.blocks, k.bytes, k.events, k.buffers, k.epoch} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (k *collector) Collect(out chan<- prometheus.Metric) {
	for dataset, s := range k.sums() {
		counter := func(d *prometheus.Desc, v int64, label string) {
			out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), dataset, label)
		}
		counter(k.blocks, s.BufferHits, "buffer")
		counter(k.blocks, s.Joins, "join")
		counter(k.blocks, s.NearHits, "near")
		counter(k.blocks, s.StoreHits, "store")
		counter(k.blocks, s.Misses, "miss")
		counter(k.blocks, s.Direct, "direct")
		counter(k.blocks, s.ReadAhead, "read_ahead")
		counter(k.bytes, s.BufferBytes, "buffer")
		counter(k.bytes, s.NearBytes, "near")
		counter(k.bytes, s.StoreBytes, "store")
		counter(k.bytes, s.DirectBytes, "direct")
		counter(k.bytes, s.WorkerBytes, "worker")
		counter(k.events, s.Corrupt, "corrupt")
		counter(k.events, s.Refetched, "refetched")
		counter(k.events, s.Fallbacks, "fallback")
		counter(k.events, s.Rounds, "round")
		counter(k.events, s.Hedges, "hedge")
		counter(k.events, s.HedgeWins, "hedge_win")
		counter(k.events, s.Leases, "lease")
		for state, v := range map[string]int64{"used": s.Buffered, "pooled": s.Pooled, "budget": s.Budget} {
			out <- prometheus.MustNewConstMetric(k.buffers, prometheus.GaugeValue, float64(v), dataset, state)
		}
		out <- prometheus.MustNewConstMetric(k.epoch, prometheus.GaugeValue, float64(s.Epoch), dataset)
	}
}
