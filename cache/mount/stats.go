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

// descs are of the metrics of a mount, named stepcache_mount_*.
type descs struct {
	lookups, readdirs, opens, opened, misses, reads, bytes, pushed, pushedBytes, changed, errors, passthrough, leased *prometheus.Desc
}

func (m *Server) descs() descs {
	labels := prometheus.Labels{"dataset": m.fs.opt.Dataset, "dir": m.dir}
	desc := func(name, help string, variable ...string) *prometheus.Desc {
		return prometheus.NewDesc("stepcache_mount_"+name, help, variable, labels)
	}
	return descs{
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

// Describe makes a Server a prometheus.Collector. Several mounts can be registered if their datasets or paths
// differ. What it says is the same at any time, or the Server could not be unregistered.
func (m *Server) Describe(ch chan<- *prometheus.Desc) {
	d := m.descs()
	for _, d := range []*prometheus.Desc{
		d.lookups, d.readdirs, d.opens, d.opened, d.misses, d.reads, d.bytes, d.pushed, d.pushedBytes, d.changed, d.errors, d.passthrough, d.leased,
	} {
		ch <- d
	}
}

// Collect is Stats as metrics.
func (m *Server) Collect(ch chan<- prometheus.Metric) {
	s, d := m.Stats(), m.descs()
	count := func(d *prometheus.Desc, v int64, label ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), label...)
	}
	gauge := func(d *prometheus.Desc, v float64) { ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	count(d.lookups, s.Lookups)
	count(d.readdirs, s.Readdirs)
	count(d.opens, s.PassthroughOpens, "passthrough")
	count(d.opens, s.Opens-s.PassthroughOpens, "buffered")
	count(d.opened, s.PassthroughBytes, "passthrough")
	count(d.opened, s.OpenedBytes-s.PassthroughBytes, "buffered")
	count(d.misses, s.LeaseMisses)
	count(d.reads, s.Reads)
	count(d.bytes, s.Bytes)
	count(d.pushed, s.Pushed)
	count(d.pushedBytes, s.PushedBytes)
	count(d.changed, s.Changed)
	for name, n := range s.Errors {
		count(d.errors, n, name)
	}
	var on float64
	if s.Passthrough {
		on = 1
	}
	gauge(d.passthrough, on)
	gauge(d.leased, float64(s.Leased))
}
