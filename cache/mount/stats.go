package mount

import (
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

// Describe makes a Server a prometheus.Collector. Several mounts can be registered if their datasets or paths
// differ.
func (m *Server) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

// Collect is Stats as metrics, named stepcache_mount_*.
func (m *Server) Collect(ch chan<- prometheus.Metric) {
	s := m.Stats()
	labels := prometheus.Labels{"dataset": m.fs.opt.Dataset, "dir": m.dir}
	send := func(kind prometheus.ValueType, name, help string, v float64, more ...string) {
		var names, values []string
		for i := 0; i+1 < len(more); i += 2 {
			names, values = append(names, more[i]), append(values, more[i+1])
		}
		d := prometheus.NewDesc("stepcache_mount_"+name, help, names, labels)
		ch <- prometheus.MustNewConstMetric(d, kind, v, values...)
	}
	count := func(name, help string, v int64, more ...string) {
		send(prometheus.CounterValue, name, help, float64(v), more...)
	}
	const opens, opened = "Files opened, by how they are read.", "Sizes of the files opened, by how they are read."
	count("lookups_total", "Names looked up.", s.Lookups)
	count("readdirs_total", "Directory reads answered.", s.Readdirs)
	count("opens_total", opens, s.PassthroughOpens, "way", "passthrough")
	count("opens_total", opens, s.Opens-s.PassthroughOpens, "way", "buffered")
	count("opened_bytes_total", opened, s.PassthroughBytes, "way", "passthrough")
	count("opened_bytes_total", opened, s.OpenedBytes-s.PassthroughBytes, "way", "buffered")
	count("lease_misses_total", "Opens for which nobody held the file whole.", s.LeaseMisses)
	count("reads_total", "Reads that this process answered.", s.Reads)
	count("read_bytes_total", "Bytes that this process answered reads with.", s.Bytes)
	count("pushed_files_total", "Small files that the kernel was given before it asked for them.", s.Pushed)
	count("pushed_bytes_total", "Bytes of them.", s.PushedBytes)
	count("source_changed_total", "Failures because the bucket's object is not the one of the snapshot any more.", s.Changed)
	for name, n := range s.Errors {
		count("errors_total", "Failed requests, by errno.", n, "errno", name)
	}
	var on float64
	if s.Passthrough {
		on = 1
	}
	send(prometheus.GaugeValue, "passthrough", "Whether files can be passed through.", on)
	send(prometheus.GaugeValue, "leased_files", "Files passed through now, or kept ready for it.", float64(s.Leased))
}
