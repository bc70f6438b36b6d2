package mount

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func openReadClose(b *testing.B, path string, buf []byte) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := unix.Read(fd, buf); err != nil {
		b.Fatal(err)
	}
	unix.Close(fd)
}

// BenchmarkOpenAgain opens, reads 4 KiB of and closes a file whose pages the kernel has.
func BenchmarkOpenAgain(b *testing.B) {
	all := files{"small": content("small", 4096), "big": content("big", 4<<20)}
	s := snapshotOf(b, all)
	for _, c := range []struct {
		name, file string
		o          Options
	}{
		{"no-open", "small", Options{Mode: NoOpen}},
		{"asked", "small", Options{Mode: Passthrough}},
		{"passthrough/kept", "big", Options{Mode: Passthrough}},
		{"passthrough/lease-each-time", "big", Options{Mode: Passthrough, IdleLeases: -1, IdleTime: time.Nanosecond}},
	} {
		b.Run(c.name, func(b *testing.B) {
			m := mounted(b, s, newLeasing(b, s, all), c.o)
			path, buf := filepath.Join(m.Dir(), c.file), make([]byte, 4096)
			openReadClose(b, path, buf)
			for b.Loop() {
				openReadClose(b, path, buf)
			}
		})
	}
}

// BenchmarkOpenFirst opens, reads and closes files of 4 KiB that the kernel does not have, after a listing.
func BenchmarkOpenFirst(b *testing.B) {
	const n = 20_000
	all := files{}
	for k := range n {
		all[fmt.Sprintf("d%03d/f%03d", k/200, k%200)] = content("x", 4096)
	}
	s := snapshotOf(b, all)
	for _, mode := range []Mode{NoOpen, Passthrough} {
		b.Run(mode.String(), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				m := mounted(b, s, newMemory(s, all), Options{Mode: mode})
				buf := make([]byte, 4096)
				b.StartTimer()
				for d := range n / 200 {
					dir := filepath.Join(m.Dir(), fmt.Sprintf("d%03d", d))
					entries, err := os.ReadDir(dir)
					if err != nil {
						b.Fatal(err)
					}
					for _, e := range entries {
						openReadClose(b, dir+"/"+e.Name(), buf)
					}
				}
				b.StopTimer()
				end(b, m)
				b.StartTimer()
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
		})
	}
}

// BenchmarkSequential reads 256 MiB that the kernel does not have, beside a file of the same size on tmpfs.
func BenchmarkSequential(b *testing.B) {
	const size = 256 << 20
	all := files{"f": content("f", size)}
	s := snapshotOf(b, all)
	native := filepath.Join(tmpfs(b), "f")
	if err := os.WriteFile(native, all["f"], 0o600); err != nil {
		b.Fatal(err)
	}
	run := func(name string, path func(b *testing.B) string) {
		b.Run(name, func(b *testing.B) {
			p := path(b)
			buf := make([]byte, 1<<20)
			openReadClose(b, p, buf) // a lease makes the file
			b.SetBytes(size)
			for b.Loop() {
				fd, err := unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if err != nil {
					b.Fatal(err)
				}
				_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
				for {
					n, err := unix.Read(fd, buf)
					if err != nil {
						b.Fatal(err)
					}
					if n == 0 {
						break
					}
				}
				unix.Close(fd)
			}
		})
	}
	run("native", func(*testing.B) string { return native })
	run("buffered", func(b *testing.B) string {
		return filepath.Join(mounted(b, s, newMemory(s, all), Options{}).Dir(), "f")
	})
	run("passthrough", func(b *testing.B) string {
		return filepath.Join(mounted(b, s, newLeasing(b, s, all), Options{Mode: Passthrough}).Dir(), "f")
	})
}
