package client

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/ring"
)

// What the node's store holds has the sums that the worker sent, both when a file is brought in whole and when it
// is kept as it is read.
func TestTheNodeStoreKeepsTheSumsThatCameWithABlock(t *testing.T) {
	data := map[string][]byte{"whole": content(1, ring.BlockSize+100), "read": content(2, ring.BlockSize+100)}
	k := newTier(t, data)
	k.start("a")
	st := openStore(t)
	c := k.dial(func(c *Config) { c.Store = st })
	lease, err := c.Lease(t.Context(), k.index("whole"), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	lease.Release()
	p := make([]byte, len(data["read"]))
	if _, err := c.ReadAt(t.Context(), k.index("read"), p, 0); err != nil {
		t.Fatal(err)
	}
	for name, all := range data {
		o, _ := k.snap.Ring(k.index(name))
		eventually(t, "the store to have "+name, func() bool { return st.Residency(o).Whole })
		for n := range ring.Blocks(o.Size) {
			b, ok := st.Lookup(o, n)
			if !ok {
				t.Fatalf("%s: block %d is gone", name, n)
			}
			want := checksum.All(all[n*ring.BlockSize : min(int64(len(all)), (n+1)*ring.BlockSize)])
			if !slices.Equal(b.Sums(), want) || !st.Verify(b) {
				t.Errorf("%s: block %d: sums %x, want %x", name, n, b.Sums(), want)
			}
			b.Release()
		}
	}
}

// How much of the CPU a whole file for the node's store takes, worker and all.
func BenchmarkLeaseFill(b *testing.B) {
	const size = 24 << 20
	k := newTier(b, map[string][]byte{"f": content(1, size)})
	k.start("a")
	st := openStore(b)
	c := k.dial(func(c *Config) { c.Store = st })
	o, _ := k.snap.Ring(k.index("f"))
	b.SetBytes(size)
	before := cpu(b)
	for b.Loop() {
		lease, err := c.Lease(b.Context(), k.index("f"), time.Minute)
		if err != nil {
			b.Fatal(err)
		}
		lease.Release()
		st.Drop(o)
	}
	b.ReportMetric((cpu(b)-before).Seconds()*1e3/float64(b.N)/size*1e9/1e3, "cpu-s/GB")
}

func cpu(t testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
