package worker

import (
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/stepcache/stepcache/cache/ring"
	"github.com/stepcache/stepcache/cache/wire"
)

var noDeadline time.Time

// BenchmarkReadResident reads resident blocks over loopback, eight requests under way on one connection;
// the receiver checks the sums where it says so.
func BenchmarkReadResident(b *testing.B) {
	for _, size := range []int64{ring.BlockSize, 1 << 20, 100_000} {
		for _, check := range []bool{false, true} {
			name := map[int64]string{ring.BlockSize: "4MiB", 1 << 20: "1MiB", 100_000: "100KB"}[size]
			if check {
				name += "/checked"
			}
			b.Run(name, func(b *testing.B) {
				const blocks = 16
				files := map[string][]byte{"f": content(blocks*ring.BlockSize, 1)}
				if size < 1<<20 {
					files["f"] = content(size, 1)
				}
				tr := newTier(b, files)
				tr.deps = func(int) Deps { return Deps{Logger: slog.New(slog.DiscardHandler)} }
				tr.start(1)
				i := index(b, tr.snapshot(), "/f")
				c := tr.dial(0)
				if _, err := c.file(i, int64(len(files["f"])), 0); err != nil {
					b.Fatal(err)
				}
				c.r.Reset(c.Conn)
				c.SetDeadline(noDeadline)
				send := func(n int) {
					off := int64(0)
					if size >= 1<<20 {
						off = int64(n) * size % (blocks * ring.BlockSize)
					}
					c.Write(wire.AppendRequest(nil, wire.Request{Op: wire.OpRead, ID: uint32(n), Index: i, Off: off, Length: int32(size)}))
				}
				p := make([]byte, size)
				b.SetBytes(size)
				b.ResetTimer()
				sent := 0
				for ; sent < 8; sent++ {
					send(sent)
				}
				for n := 0; n < b.N; n++ {
					rep, err := wire.ReadReply(c.r)
					if err != nil || rep.Status != wire.OK {
						b.Fatal(rep.Status, err)
					}
					if _, err := io.ReadFull(c.r, p[:rep.Length]); err != nil {
						b.Fatal(err)
					}
					if check {
						if err := wire.CheckSums(p[:rep.Length], rep.Sums); err != nil {
							b.Fatal(err)
						}
					}
					send(sent)
					sent++
				}
			})
		}
	}
}
