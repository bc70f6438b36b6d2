package mount

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

// Stats counts what a mount was asked since this process serves it. Reads that the kernel answers by itself,
// from its page cache or a file passed through, are not in it: Bytes against OpenedBytes tells how many.
type Stats struct {
	Lookups, Readdirs int64
	// Opens counts opens that the kernel asked for, and OpenedBytes the sizes of their files; both stay zero
	// in NoOpen mode.
	Opens, OpenedBytes int64
	// PassthroughOpens and PassthroughBytes are those of them that read past this process.
	PassthroughOpens, PassthroughBytes int64
	// LeaseMisses counts files that were to be passed through and that nobody held whole.
	LeaseMisses int64
	// Reads and Bytes are those that this process answered.
	Reads, Bytes int64
	// Pushed and PushedBytes are files that the kernel was given before it asked for them.
	Pushed, PushedBytes int64
	// Changed counts failures because an object in the bucket is not the one of the snapshot any more.
	Changed int64
	// Errors counts failed requests by errno ("EIO").
	Errors map[string]int64
	// Passthrough says whether files can be passed through; Leased is the number of files that are, or are
	// kept ready for it.
	Passthrough bool
	Leased      int
}

type counters struct {
	lookups, readdirs, opens, openedBytes, passOpens, passBytes, leaseMisses, reads, bytes, pushed, pushedBytes, changed, unlogged atomic.Int64

	mu     sync.Mutex
	errors map[unix.Errno]int64
}

func (c *counters) failed(e unix.Errno) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.errors == nil {
		c.errors = map[unix.Errno]int64{}
	}
	c.errors[e]++
}

// Stats returns the counts up to now.
func (m *Server) Stats() Stats {
	f := m.fs
	c := &f.count
	s := Stats{
		Lookups: c.lookups.Load(), Readdirs: c.readdirs.Load(),
		Opens: c.opens.Load(), OpenedBytes: c.openedBytes.Load(),
		PassthroughOpens: c.passOpens.Load(), PassthroughBytes: c.passBytes.Load(),
		LeaseMisses: c.leaseMisses.Load(), Reads: c.reads.Load(), Bytes: c.bytes.Load(), Changed: c.changed.Load(),
		Pushed: c.pushed.Load(), PushedBytes: c.pushedBytes.Load(),
		Errors: map[string]int64{}, Passthrough: f.mode == Passthrough && f.pass.available(),
	}
	c.mu.Lock()
	for e, n := range c.errors {
		s.Errors[unix.ErrnoName(e)] += n
	}
	c.mu.Unlock()
	f.pass.mu.Lock()
	s.Leased = len(f.pass.held)
	f.pass.mu.Unlock()
	return s
}

// Add adds what another mount counted.
func (s *Stats) Add(o Stats) {
	s.Lookups += o.Lookups
	s.Readdirs += o.Readdirs
	s.Opens += o.Opens
	s.OpenedBytes += o.OpenedBytes
	s.PassthroughOpens += o.PassthroughOpens
	s.PassthroughBytes += o.PassthroughBytes
	s.LeaseMisses += o.LeaseMisses
	s.Reads += o.Reads
	s.Bytes += o.Bytes
	s.Pushed += o.Pushed
	s.PushedBytes += o.PushedBytes
	s.Changed += o.Changed
	sum := maps.Clone(s.Errors)
	for name, n := range o.Errors {
		if sum == nil {
			sum = make(map[string]int64)
		}
		sum[name] += n
	}
	s.Errors = sum
	s.Passthrough = s.Passthrough || o.Passthrough
	s.Leased += o.Leased
}

// Ended is what stays of a mount that has ended: what it counted.
func (s Stats) Ended() Stats {
	s.Passthrough, s.Leased = false, 0
	return s
}

// collector exports Stats as metrics named stepcache_mount_*.
type collector struct {
	sums func() map[string]Stats

	lookups, readdirs, opens, opened, misses, reads, bytes, pushed, pushedBytes, changed, errors, passthrough, leased *prometheus.Desc
}

// NewCollector exports to Prometheus what sums tells of the mounts of each dataset. Mounts come and go: a series of each
// would begin above zero and end before somebody looks, and leave what Prometheus keeps for long.
func NewCollector(sums func() map[string]Stats) prometheus.Collector {
	desc := func(name, help string, variable ...string) *prometheus.Desc {
		return prometheus.NewDesc("stepcache_mount_"+name, help, append([]string{"dataset"}, variable...), nil)
	}
	return &collector{
		sums:        sums,
		lookups:     desc("lookups_total", "Names looked up."),
		readdirs:    desc("readdirs_total", "Directory reads answered."),
		opens:       desc("opens_total", "Files opened, by how they are read.", "way"),
		opened:      desc("opened_bytes_total", "Sizes of the files opened, by how they are read.", "way"),
		misses:      desc("lease_misses_total", "Opens for which nobody held the file whole."),
		reads:       desc("reads_total", "Reads that this process answered."),
		bytes:       desc("read_bytes_total", "Bytes that this process answered reads with."),
		pushed:      desc("pushed_files_total", "Small files that the kernel was given before it asked for them."),
		pushedBytes: desc("pushed_bytes_total", "Bytes of them."),
		changed:     desc("source_changed_total", "Failures because the bucket's object is not the one of the snapshot any more."),
		errors:      desc("errors_total", "Failed requests, by errno.", "errno"),
		passthrough: desc("passthrough", "Whether files can be passed through."),
		leased:      desc("leased_files", "Files passed through now, or kept ready for it."),
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		c.lookups, c.readdirs, c.opens, c.opened, c.misses, c.reads, c.bytes, c.pushed, c.pushedBytes, c.changed, c.errors, c.passthrough, c.leased,
	} {
		ch <- d
	}
}

// usual are the errnos of errnoOf that a reader gets: their series are there before the first failure, so that a burst
// of it is seen.
var usual = []unix.Errno{unix.EIO, unix.EACCES, unix.ETIMEDOUT, unix.ENOTCONN}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	for dataset, s := range c.sums() {
		count := func(d *prometheus.Desc, v int64, label ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), append([]string{dataset}, label...)...)
		}
		gauge := func(d *prometheus.Desc, v float64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, dataset)
		}
		count(c.lookups, s.Lookups)
		count(c.readdirs, s.Readdirs)
		count(c.opens, s.PassthroughOpens, "passthrough")
		count(c.opens, s.Opens-s.PassthroughOpens, "buffered")
		count(c.opened, s.PassthroughBytes, "passthrough")
		count(c.opened, s.OpenedBytes-s.PassthroughBytes, "buffered")
		count(c.misses, s.LeaseMisses)
		count(c.reads, s.Reads)
		count(c.bytes, s.Bytes)
		count(c.pushed, s.Pushed)
		count(c.pushedBytes, s.PushedBytes)
		count(c.changed, s.Changed)
		failed := map[string]int64{}
		for _, e := range usual {
			failed[unix.ErrnoName(e)] = 0
		}
		maps.Copy(failed, s.Errors)
		for name, n := range failed {
			count(c.errors, n, name)
		}
		var on float64
		if s.Passthrough {
			on = 1
		}
		gauge(c.passthrough, on)
		gauge(c.leased, float64(s.Leased))
	}
}
